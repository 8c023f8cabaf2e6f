"""Calls the Pulumi CLI with the environment that this checkout wants: its tools, its backend, its passphrase.
A user who is logged in elsewhere, or sets Pulumi's own variables, keeps what they chose."""

import errno
import json
import os
import re
import secrets
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from settings.state import state_folder

STATE_SPACE = 16 * 2**20
"""Bytes that the state's disk must have free: a checkpoint of 400 containers, its backup and a lock take 3 MB."""

ANSI = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


HINTS = {
    "stack is currently locked": "Another run holds the stack, or was killed. "
    "If none runs: make pulumi ARGS='cancel --yes --stack NAME'",
    "pending operations": "An earlier run was cut off. "
    "Bring the state up to date: make pulumi ARGS='refresh --yes --stack NAME'",
    "incorrect passphrase": "The stack's encryptionsalt (in Pulumi.NAME.yaml) belongs to another passphrase. "
    "Set PULUMI_CONFIG_PASSPHRASE to that one, or remove the line if the stack is not deployed and has no secrets.",
}
"""What Pulumi says, and the next step in this checkout."""


def hint(said: str) -> str:
    """The next steps for what Pulumi said, as lines to append."""
    return "".join(f"\n{step}" for words, step in HINTS.items() if words in said)


class PulumiError(Exception):
    """A command cannot be run or failed; the text names the next step."""


class Result(NamedTuple):
    """What a captured command answered: exit code, and standard output and error as one text."""

    code: int
    output: str

    @property
    def plain(self) -> str:
        """The output without terminal colours."""
        return ANSI.sub("", self.output)


def environment(base: Mapping[str, str], root: Path, home: Path) -> dict[str, str]:
    """The variables for the Pulumi CLI: those of `base`, plus our defaults where the user decided nothing.

    Backend: PULUMI_BACKEND_URL or an access token, else Pulumi.yaml's, else the login, else `file://` in the state
    folder. Passphrase: the user's variables, else the generated file, the latter only for a `file://` backend.
    """
    tools = root / ".bulkhead" / "pulumi"
    wanted = {
        **base,
        "PATH": os.pathsep.join([str(tools / "bin"), str(root / ".venv" / "bin"), base.get("PATH", os.defpath)]),
        "PULUMI_HOME": str(tools),
        "PULUMI_SKIP_UPDATE_CHECK": "true",
        "BULKHEAD_LEDGER": base.get("BULKHEAD_LEDGER") or str(root / "Pulumi.host.yaml"),
    }
    state = state_folder(base, home)
    credentials = _credentials(base, home, tools)
    backend = base.get("PULUMI_BACKEND_URL") or _project_backend(root)
    if not backend and not base.get("PULUMI_ACCESS_TOKEN"):
        backend = _login(credentials)
        if backend is None:
            backend = wanted["PULUMI_BACKEND_URL"] = f"file://{state / 'pulumi'}"
    # The login is kept under the user's own PULUMI_HOME, which ours would hide.
    wanted.setdefault("PULUMI_CREDENTIALS_PATH", str(credentials))
    chosen = {"PULUMI_CONFIG_PASSPHRASE", "PULUMI_CONFIG_PASSPHRASE_FILE"} & base.keys()
    if not chosen and (backend or "").startswith("file://"):
        wanted["PULUMI_CONFIG_PASSPHRASE_FILE"] = str(state / "passphrase")
    return wanted


def _credentials(base: Mapping[str, str], home: Path, tools: Path) -> Path:
    own = base.get("PULUMI_HOME")
    folder = own if own and Path(own) != tools else home / ".pulumi"
    return Path(base.get("PULUMI_CREDENTIALS_PATH") or folder)


def _login(credentials: Path) -> str | None:
    try:
        stored = json.loads((credentials / "credentials.json").read_text())
    except (OSError, ValueError):
        return None
    return str(stored.get("current") or "") or None if isinstance(stored, dict) else None


def _project_backend(root: Path) -> str | None:
    try:
        project = yaml.safe_load((root / "Pulumi.yaml").read_text())
        return str(project["backend"]["url"])
    except (OSError, yaml.YAMLError, KeyError, TypeError):
        return None  # a broken Pulumi.yaml is Pulumi's to explain


def prepare(variables: Mapping[str, str], state: Path) -> None:
    """Make the `file://` backend's folder and our passphrase file if they are the ones in use and not there yet.

    PulumiError if the disk is full, or if stacks exist whose passphrase is gone.
    """
    backend = backend_folder(variables.get("PULUMI_BACKEND_URL", ""))
    passphrase = state / "passphrase"
    with _disk_explained(backend or state):
        if backend:
            free = shutil.disk_usage(existing(backend)).free
            if free < STATE_SPACE:
                raise OSError(errno.ENOSPC, f"{free / 2**20:.1f} MiB free, {STATE_SPACE / 2**20:.0f} MiB needed")
            if backend.parent == state:
                state.mkdir(parents=True, exist_ok=True, mode=0o700)
            backend.mkdir(parents=True, exist_ok=True, mode=0o700)
        if variables.get("PULUMI_CONFIG_PASSPHRASE_FILE") == str(passphrase) and not passphrase.exists():
            if backend and any(backend.glob(".pulumi/stacks/**/*.json")):
                raise PulumiError(
                    f"{passphrase} is gone, and the state in {backend} is encrypted with it. "
                    "Next step: restore the file, or set PULUMI_CONFIG_PASSPHRASE to what it held."
                )
            write_passphrase(passphrase)


def backend_folder(url: str) -> Path | None:
    """The folder of a `file://` backend; None for any other."""
    return Path(url.removeprefix("file://")).expanduser() if url.startswith("file://") else None


def existing(folder: Path) -> Path:
    """The folder, or the nearest one above it that is there."""
    return next(path for path in (folder, *folder.parents) if path.exists())


@contextmanager
def _disk_explained(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        full = error.errno in {errno.ENOSPC, errno.EDQUOT}
        problem = "the disk is full" if full else "cannot be written"
        raise PulumiError(
            f"State folder {folder}: {problem} ({error.strerror}). "
            "Pulumi records every change there, so nothing was started. "
            "Next step: free some space, or set XDG_STATE_HOME to another disk."
        ) from None


def write_passphrase(file: Path) -> None:
    """A new random passphrase, readable by its owner only, and never half written or overwritten."""
    file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    draft = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        with os.fdopen(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as new:
            new.write(secrets.token_urlsafe(32))
            new.flush()
            os.fsync(new.fileno())
        os.link(draft, file)  # fails where another run was quicker: its passphrase counts
    except FileExistsError:
        pass
    finally:
        draft.unlink(missing_ok=True)


class Pulumi:
    """The CLI in a checkout. `run` shows its output as it comes, `capture` returns it."""

    def __init__(self, root: Path, variables: Mapping[str, str]) -> None:
        self.root, self.variables = root, variables

    @classmethod
    def of(cls, root: Path) -> "Pulumi":
        """The CLI for this user and checkout, with backend and passphrase made. PulumiError on a full disk."""
        variables = environment(os.environ, root, Path.home())
        prepare(variables, state_folder(os.environ, Path.home()))
        return cls(root, variables)

    def run(self, *arguments: str) -> int:
        """Exit code; the output goes to the terminal. Ctrl-C reaches Pulumi, which then ends by itself."""
        try:
            child = subprocess.Popen(self._command(arguments), env=self.variables)
        except FileNotFoundError:
            raise self._not_installed() from None
        with _left_to_child():
            code = child.wait()
        if code and self.disk_is_full():
            raise PulumiError(self._disk_full())
        return code

    def capture(self, *arguments: str, variables: Mapping[str, str] = {}) -> Result:
        """Exit code and output of a run that asks nothing. `variables`: further ones, for this run."""
        try:
            done = subprocess.run(
                self._command(arguments),
                env={**self.variables, **variables},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
                check=False,
            )
        except FileNotFoundError:
            raise self._not_installed() from None
        output = done.stdout
        if done.returncode and ("no space left on device" in output or self.disk_is_full()):
            output += f"\n{self._disk_full()}\n"
        return Result(done.returncode, output)

    def stacks(self) -> dict[str, int]:
        """Resources in each stack's state, by stack; 0 for one that is not deployed."""
        listed = json.loads(self._answer("stack", "ls", "--json"))
        return {stack["name"]: stack.get("resourceCount") or 0 for stack in listed}

    def create(self, stack: str) -> None:
        """A new, empty stack; the user's selected one stays selected. PulumiError if that fails."""
        self._answer("stack", "init", stack, "--no-select")

    def resources(self, stack: str) -> list[dict[str, Any]]:
        """The resources in the state of an existing stack, as `pulumi stack export` has them (secrets encrypted)."""
        state = json.loads(self._answer("stack", "export", "--stack", stack))
        return list(state["deployment"].get("resources") or [])

    def outputs(self, stack: str) -> dict[str, Any]:
        """The outputs of an existing stack, as docs/outputs.schema.json describes them."""
        return dict(json.loads(self._answer("stack", "output", "--json", "--stack", stack)))

    def secret(self, stack: str, output: str) -> Any:
        """The value of one secret output; None where the stack has no such output."""
        return json.loads(self._answer("stack", "output", "--json", "--show-secrets", "--stack", stack)).get(output)

    def disk_is_full(self) -> bool:
        """Whether the state's disk has no room for another checkpoint."""
        folder = backend_folder(self.variables.get("PULUMI_BACKEND_URL", ""))
        return bool(folder and folder.exists() and shutil.disk_usage(folder).free < STATE_SPACE // 16)

    def _command(self, arguments: tuple[str, ...]) -> list[str]:
        found = shutil.which("pulumi", path=self.variables["PATH"])
        if found is None:
            raise self._not_installed()
        return [found, "--cwd", str(self.root), *arguments]

    def _answer(self, *arguments: str) -> str:
        done = subprocess.run(
            self._command((*arguments, "--non-interactive")),
            env=self.variables,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            said = ANSI.sub("", done.stderr or done.stdout).strip()
            raise PulumiError(f"pulumi {' '.join(arguments)}: {said}{hint(said)}")
        return done.stdout

    def _not_installed(self) -> PulumiError:
        return PulumiError("pulumi is not installed. Next step: make setup")

    def _disk_full(self) -> str:
        return (
            f"The state's disk is full: {self.variables['PULUMI_BACKEND_URL']}. Next step: free some space, then "
            "run the same command again; Pulumi goes on with what it had recorded."
        )


@contextmanager
def _left_to_child() -> Iterator[None]:
    """Ctrl-C reaches the whole process group: Pulumi ends its update in order, and we wait for that."""
    before: Callable[..., Any] | int | None = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
