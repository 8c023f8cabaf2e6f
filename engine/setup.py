"""Set-up: everything a fresh Debian machine needs for `make up` and `make test`, one row of STEPS each.
Standard library only, since it makes the Python environment. Says what it installs first; a no-op the second time."""

from __future__ import annotations

import sys

if sys.version_info < (3, 11):  # noqa: UP036 - this is the message for whoever runs it with an older one
    sys.exit("Bulkhead needs Python 3.11 or newer. On Debian 12: apt-get install python3, and use /usr/bin/python3.")

import hashlib
import http.client
import os
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from engine import dockerd
from engine.dockerd import EngineError, Places

ROOT = Path(__file__).resolve().parent.parent
LEDGER = "Pulumi.host.yaml"
BASE_IMAGE = "debian:bookworm-slim"
DEFAULT_HOST = "unix:///var/run/docker.sock"
LOCAL_HOSTS = (DEFAULT_HOST, "unix:///run/docker.sock")
GIB = 2**30
PROGRESS_SECONDS = 2.0  # silence that a user puts up with
OUTPUT_LINES = 15  # of a failed command's output

NO_NETWORK = re.compile(
    r"Temporary failure|Could not resolve|NewConnectionError|Network is unreachable|Max retries exceeded"
    r"|Connection refused|No matching distribution found|Failed to fetch"
)
UNTRUSTED = re.compile(r"CERTIFICATE_VERIFY_FAILED")
NO_SPACE = re.compile(r"No space left on device|Disk quota exceeded|not enough free space")


class SetupError(Exception):
    """A step cannot be done; the text is one message with the next step."""


@dataclass(frozen=True)
class Machine:
    """Where set-up works: the checkout, the user's cache and state folders, and the engine's address."""

    root: Path
    cache: Path
    state: Path
    docker_host: str

    @property
    def venv(self) -> Path:
        return self.root / ".venv"

    @property
    def python(self) -> Path:
        return self.venv / "bin" / "python"

    @property
    def pulumi_home(self) -> Path:
        return self.root / ".bulkhead" / "pulumi"

    @property
    def places(self) -> Places:
        return Places(own=self.state / "engine", socket=Path(self.docker_host.removeprefix("unix://")))

    @property
    def local(self) -> bool:
        """The engine is meant to run on this machine, so that set-up may install and start it."""
        return self.docker_host in LOCAL_HOSTS


def machine(root: Path, environment: Mapping[str, str]) -> Machine:
    """The machine as the user's variables and ledger describe it; the ledger's `bulkhead:host` beats DOCKER_HOST."""
    home = Path(environment.get("HOME") or Path.home())
    ledger = root / LEDGER
    text = ledger.read_text(encoding="utf-8", errors="replace") if ledger.exists() else ""
    # The environment that could parse YAML is not there yet, and this key is one plain line.
    written = re.search(r"""^\s+["']?bulkhead:host["']?:\s*["']?([^\s"'#]+)""", text, re.MULTILINE)
    return Machine(
        root=root,
        cache=Path(environment.get("XDG_CACHE_HOME") or home / ".cache") / "bulkhead",
        state=Path(environment.get("XDG_STATE_HOME") or home / ".local" / "state") / "bulkhead",
        docker_host=(written[1] if written else environment.get("DOCKER_HOST")) or DEFAULT_HOST,
    )


def say(text: str) -> None:
    """Progress goes to standard error, so that what a command prints can be piped."""
    print(text, file=sys.stderr, flush=True)


def run(command: Sequence[str | Path], what: str) -> None:
    """Run a command quietly; show `what` with the seconds after a while. SetupError with the end of its output."""
    with tempfile.TemporaryFile() as output:
        started = said = time.monotonic()
        child = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=os.environ | {"DEBIAN_FRONTEND": "noninteractive"},
        )
        while child.poll() is None:
            time.sleep(0.05)
            now = time.monotonic()
            # A terminal's line is rewritten; a log gets a line now and then.
            pause, end = (PROGRESS_SECONDS, "\r") if sys.stderr.isatty() else (10.0, "\n")
            if now - said >= pause:
                said = now
                print(f"  {what}: {now - started:.0f} s", end=end, file=sys.stderr, flush=True)
        if time.monotonic() - started >= PROGRESS_SECONDS:
            say(f"  {what}: done in {time.monotonic() - started:.0f} s")
        if child.returncode:
            output.seek(0)
            raise SetupError(failure(what, command, output.read().decode(errors="replace")))


def failure(what: str, command: Sequence[str | Path], output: str) -> str:
    """The message for a failed command: the end of its output, and the next step that its words suggest."""
    hints = (
        (UNTRUSTED, "The package index's certificate is not trusted: name your authority with PIP_CERT"),
        (NO_SPACE, "The disk is full: free some space (docker system prune, apt-get clean)"),
        (NO_NETWORK, "No package source answers: check the network, or name your mirror (PIP_INDEX_URL, apt sources)"),
    )
    hint = next((text for pattern, text in hints if pattern.search(output)), "See the lines above")
    lines = [f"  {line}" for line in output.splitlines()[-OUTPUT_LINES:]]
    called = " ".join(map(str, command))
    return "\n".join([f"{what} failed: {called}", *lines, f"Next step: {hint}, then run the same command again."])


def need_space(folder: Path, size: int, what: str) -> None:
    """SetupError unless `folder` (or what exists above it) has `size` bytes free."""
    there = next(path for path in (folder, *folder.parents) if path.exists())
    free = shutil.disk_usage(there).free
    if free < size:
        raise SetupError(
            f"{what} needs {size / GIB:.1f} GiB in {there}, and {free / GIB:.1f} GiB are free. "
            "Next step: free some space there, then run the same command again."
        )


# --- Debian packages -----------------------------------------------------------------------------------------


def apt_install(package: str, size: int = GIB // 4) -> None:
    """Install one Debian package. SetupError without Debian, without root, without room or without network."""
    if shutil.which("apt-get") is None:
        raise SetupError(
            f"{package} is missing, and this is not a Debian machine (no apt-get). "
            f"Next step: install what Debian calls {package} with your package manager, then run this again."
        )
    if os.geteuid() != 0:
        raise SetupError(
            f"{package} is missing, and installing it needs root. "
            f"Next step: sudo apt-get install {package}, then run the same command again."
        )
    need_space(Path("/var/lib/dpkg"), size, package)
    say(f"Installing Debian package: {package}")
    install = ["apt-get", "install", "-qq", "-y", "--no-install-recommends", package]
    try:
        run(install, f"apt-get install {package}")
    except SetupError:
        # A new machine has no package lists, an old one has outdated ones.
        run(["apt-get", "update", "-qq"], "apt-get update")
        run(install, f"apt-get install {package}")


# --- Python environment --------------------------------------------------------------------------------------


def stamp(files: Iterable[Path], where: Path) -> str:
    """What an environment was made from: these files' contents, the place (scripts hold it) and the Python."""
    digest = hashlib.sha256(f"{where} {sys.version_info[:3]} {os.path.realpath(sys.executable)}".encode())
    for file in files:
        digest.update(file.read_bytes() if file.exists() else b"")
    return digest.hexdigest()


@dataclass(frozen=True)
class Pip:
    """One pip installation into `.venv`, repeated when `file` changes."""

    name: str
    file: str
    arguments: tuple[str, ...]

    def _stamp(self, machine: Machine) -> tuple[Path, str]:
        # Of the place itself: a copy of the checkout whose .venv is a link would install again, over the original's.
        return machine.venv / f"{self.file}.stamp", stamp([machine.root / self.file], machine.venv.resolve())

    def missing(self, machine: Machine) -> str | None:
        file, wanted = self._stamp(machine)
        there = machine.python.exists() and file.exists() and file.read_text() == wanted
        return None if there else f"into .venv, from {self.file}"

    def install(self, machine: Machine) -> None:
        need_space(machine.root, GIB, "The Python environment")
        if not machine.python.exists():
            make_venv(machine)
        file, wanted = self._stamp(machine)
        file.unlink(missing_ok=True)
        pip: list[str | Path] = [
            machine.python,
            "-m",
            "pip",
            "install",
            "--quiet",
            "--no-input",
            "--disable-pip-version-check",
        ]
        run([*pip, *self.arguments, str(machine.root / self.file).removesuffix("/pyproject.toml")], self.name)
        file.write_text(wanted)


def make_venv(machine: Machine) -> None:
    """A new `.venv`, whole or not at all."""
    if not _has_ensurepip():
        apt_install("python3-venv")
    shutil.rmtree(machine.venv, ignore_errors=True)
    try:
        run([sys.executable, "-m", "venv", machine.venv], "python -m venv .venv")
    except BaseException:
        shutil.rmtree(machine.venv, ignore_errors=True)
        raise


def _has_ensurepip() -> bool:
    """Debian splits ensurepip from Python into python3-venv."""
    import importlib.util

    return importlib.util.find_spec("ensurepip") is not None


# --- Pulumi engine -------------------------------------------------------------------------------------------


def _pulumi_stamp(machine: Machine) -> tuple[Path, str]:
    sources = sorted(
        file
        for pattern in ("*.py", "**/go.mod", "**/go.sum", "**/*.go")
        for file in (machine.root / "engine").glob(pattern)
    )
    # Of the place itself: copies of the checkout whose .bulkhead is a link would take turns at installing it.
    return machine.pulumi_home / "engine.stamp", stamp(sources, machine.pulumi_home.resolve())


def pulumi_missing(machine: Machine) -> str | None:
    file, wanted = _pulumi_stamp(machine)
    path = f"{machine.pulumi_home / 'bin'}{os.pathsep}{os.environ.get('PATH', '')}"
    runs = all(shutil.which(name, path=path) for name in ("pulumi", "pulumi-language-python"))
    there = runs and file.exists() and file.read_text() == wanted
    return None if there else "into .bulkhead, built from pinned Go modules where they are not on PATH"


def pulumi_install(machine: Machine) -> None:
    from engine import build

    file, wanted = _pulumi_stamp(machine)
    build.ensure(machine.pulumi_home, machine.cache, say)
    file.write_text(wanted)


# --- Docker engine -------------------------------------------------------------------------------------------


def docker_missing(machine: Machine) -> str | None:
    if machine.docker_host.startswith("unix://"):
        return None if dockerd.answers(machine.places.socket) else f"none answers at {machine.docker_host}"
    if not machine.docker_host.startswith("ssh://"):
        raise SetupError(
            f"{machine.docker_host}: only unix:// and ssh:// engines are supported, since host commands run there too. "
            "Next step: set DOCKER_HOST or bulkhead:host to ssh://user@machine."
        )
    # Another machine's engine is never installed or started from here.
    ssh = ["ssh", "-o", "BatchMode=yes", "-o", "ConnectTimeout=5", machine.docker_host, "--"]
    try:
        asked = subprocess.run(
            [*ssh, "docker", "version"],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=30,
            check=False,
        )
    except FileNotFoundError:
        raise SetupError("ssh is not installed. Next step: sudo apt-get install openssh-client") from None
    if asked.returncode == 0:
        return None
    raise SetupError(
        f"The Docker engine at {machine.docker_host} does not answer: {asked.stderr.strip()}\n"
        f"Next step: see that this works: ssh {machine.docker_host} docker version. "
        "Nothing is installed on another machine from here."
    )


def docker_install(machine: Machine) -> None:
    if not machine.local:
        raise SetupError(
            f"No Docker engine answers at {machine.docker_host}, which DOCKER_HOST or bulkhead:host names. "
            f"Next step: start it, or unset that to use {DEFAULT_HOST}."
        )
    if os.geteuid() == 0:
        dockerd.keep_containers(machine.places, say)  # before the package starts the engine
    if shutil.which("dockerd", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/local/sbin") is None:
        apt_install("docker.io", size=GIB)
    if dockerd.answers(machine.places.socket):
        return  # the package has started it
    if os.geteuid() != 0:
        raise SetupError(
            "Docker is installed but not running, and starting it needs root. "
            "Next step: sudo systemctl start docker (without systemd: sudo make engine-start), then run this again."
        )
    if Path("/run/systemd/system").exists():
        say("Starting Docker: systemctl start docker")
        run(["systemctl", "start", "docker"], "systemctl start docker")
    else:
        say(f"Starting Docker by hand, since no service manager runs (log: {machine.places.log})")
        dockerd.start(machine.places, say)


# --- Base image ----------------------------------------------------------------------------------------------


def base_image_missing(machine: Machine) -> str | None:
    """Needed only by compose projects whose Dockerfiles start from it, and only on an engine of this machine."""
    if not machine.docker_host.startswith("unix://") or not uses_base_image(machine.root):
        return None
    try:
        status, _ = dockerd.get(machine.places.socket, f"/images/{BASE_IMAGE}/json")
    except (OSError, http.client.HTTPException):
        status = 0
    return None if status == 200 else f"{BASE_IMAGE}, pulled or, where no registry answers, made from Debian packages"


def uses_base_image(root: Path) -> bool:
    """Whether a Dockerfile below one of the environments' compose files starts from the base image."""
    listed = (file.read_text(errors="replace") for file in root.glob("Pulumi.*.yaml"))
    folders = {(root / name).parent for text in listed for name in re.findall(r"[\w./-]+\.ya?ml\b", text)}
    dockerfiles = (file for folder in folders - {root} for file in folder.rglob("*Dockerfile*") if file.is_file())
    return any(re.search(rf"^FROM\s+{BASE_IMAGE}\b", file.read_text(), re.MULTILINE) for file in dockerfiles)


def base_image_install(machine: Machine) -> None:
    from engine import base_image

    # It talks to the engine through `docker`, which must mean the one that was checked.
    os.environ["DOCKER_HOST"] = machine.docker_host
    base_image.ensure(machine.cache, say)


# --- Firewall and backups ------------------------------------------------------------------------------------


def missing_on_host(machine: Machine, program: str) -> str | None:
    """Needed on the Docker host itself; another machine is prepared by `make bootstrap`."""
    there = shutil.which(program, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")
    return None if there or not machine.docker_host.startswith("unix://") else f"no `{program}`"


# --- The table -----------------------------------------------------------------------------------------------


def graphviz_missing(_: Machine) -> str | None:
    return None if shutil.which("dot") else "no `dot`"


@dataclass(frozen=True)
class Step:
    """`missing` is cheap and says what will be installed, or None if it is there; `install` does it."""

    name: str
    missing: Callable[[Machine], str | None]
    install: Callable[[Machine], None]


PACKAGES = Pip("Python packages", "requirements.txt", ("--requirement",))
TOOLS = Pip("Test and lint tools", "requirements-dev.txt", ("--requirement",))
PROJECT = Pip("Bulkhead itself", "pyproject.toml", ("--no-deps", "--editable"))

STEPS = {
    "packages": Step(PACKAGES.name, PACKAGES.missing, PACKAGES.install),
    "tools": Step(TOOLS.name, TOOLS.missing, TOOLS.install),
    "project": Step(PROJECT.name, PROJECT.missing, PROJECT.install),
    "pulumi": Step("Pulumi, its plugins and Compose", pulumi_missing, pulumi_install),
    "docker": Step("Docker engine", docker_missing, docker_install),
    "base-image": Step("Base image", base_image_missing, base_image_install),
    "nftables": Step(
        "nftables, for the firewall", partial(missing_on_host, program="nft"), lambda _: apt_install("nftables")
    ),
    "restic": Step("restic, for backups", partial(missing_on_host, program="restic"), lambda _: apt_install("restic")),
    "graphviz": Step("Graphviz, which draws the diagram", graphviz_missing, lambda _: apt_install("graphviz")),
}

COMMANDS: Mapping[str, Sequence[str]] = {
    "up": ("packages", "project", "pulumi", "nftables", "restic", "docker", "base-image"),
    "preview": ("packages", "project", "pulumi"),  # works with the engine out of reach, as in a pull request
    "test": ("packages", "tools", "project", "pulumi", "nftables", "restic", "docker", "base-image", "graphviz"),
    "diagram": ("packages", "project", "pulumi", "graphviz"),
    "lint": ("packages", "tools", "project"),
    "plan": ("packages", "project"),
    "engine-start": ("docker",),
}


def set_up(steps: Sequence[str], machine: Machine) -> None:
    """Every step that is not there yet, in order, each said before it is done. A step's errors say the next one."""
    for step in (STEPS[name] for name in steps):
        what = step.missing(machine)
        if what:
            say(f"{step.name}: {what}")
            step.install(machine)


def check(machine: Machine) -> bool:
    """One line per step: there, or what `make setup` would do. True if all is there."""
    complete = True
    for step in (STEPS[name] for name in COMMANDS["up"]):
        try:
            what = step.missing(machine)
        except (SetupError, EngineError, OSError, RuntimeError) as error:
            what = str(error)
        complete = complete and what is None
        print(f"{'ok' if what is None else 'missing':8} {step.name}{f': {what}' if what else ''}")
    return complete


def main(arguments: Sequence[str]) -> int:
    """`setup.py up|preview|test|diagram|lint|plan|check|engine-start|engine-stop`."""
    here = machine(ROOT, os.environ)
    command = arguments[0] if len(arguments) == 1 else ""
    try:
        if command == "check":
            return 0 if check(here) else 1
        if command == "engine-stop":
            dockerd.stop(here.places, say)
        elif command in COMMANDS:
            set_up(COMMANDS[command], here)
        else:
            say(f"usage: python3 -m engine.setup {'|'.join([*COMMANDS, 'check', 'engine-stop'])}")
            return 2
    except KeyboardInterrupt:
        say("\nStopped. Run the same command again: it goes on with the step it was at.")
        return 130
    # RuntimeError: the engine's and the base image's own errors, whose text is written for the user as well.
    except (SetupError, EngineError, RuntimeError, OSError, subprocess.TimeoutExpired) as error:
        say(f"Set-up stopped: {error}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
