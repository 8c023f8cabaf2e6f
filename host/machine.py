"""What the agent's verbs share: the folders they read and write, commands with a time limit, marks of deploys,
files written in one piece. It decides nothing."""

import json
import os
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ANSWER_SECONDS = 60
DEPLOY_SECONDS = 30 * 60
"""A deploy's mark that is older was left behind by one that was killed."""


class Undecided(Exception):
    """Something that has to be known cannot be found out; the text names it and the next step."""


@dataclass(frozen=True)
class Places:
    """Where the agent reads and writes; `root` is another folder in tests."""

    root: Path = Path("/")

    @property
    def declared(self) -> Path:
        """`host.json`, `stacks/<environment>.json`, `firewall.nft`: what the last deploys declared."""
        return self.root / "etc/bulkhead"

    @property
    def state(self) -> Path:
        """What verbs found, and `metrics/*.prom`."""
        return self.root / "var/lib/bulkhead"

    @property
    def run(self) -> Path:
        """What does not outlive a boot."""
        return self.root / "run/bulkhead"

    @property
    def cgroups(self) -> Path:
        return self.root / "sys/fs/cgroup"

    @property
    def processes(self) -> Path:
        return self.root / "proc"


def deploying(places: Places, now: float | None = None) -> frozenset[str]:
    """Stacks that are being deployed: a file `deploying/<stack>` that is younger than DEPLOY_SECONDS.

    The command line makes it before it changes a stack, and removes it after it has declared what it deployed.
    """
    now = time.time() if now is None else now
    marks = places.run / "deploying"
    found = set()
    for mark in marks.iterdir() if marks.is_dir() else ():
        try:
            age = now - mark.stat().st_mtime
        except FileNotFoundError:
            continue  # that deploy has just ended
        if age < DEPLOY_SECONDS:
            found.add(mark.name)
    return frozenset(found)


START_ENGINE = "start Docker; see `docker info`"
"""The remedy for `ask` where the engine does not answer."""


def ask(
    command: Sequence[str], remedy: str, variables: Mapping[str, str] = {}, *, seconds: float = ANSWER_SECONDS
) -> str:
    """Standard output of a command. `Undecided` with the remedy when it fails or takes longer than `seconds`."""
    try:
        done = subprocess.run(
            command,
            env={**os.environ, **variables},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=seconds,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise Undecided(f"{command[0]}: {error}. Next step: {remedy}") from None
    if done.returncode:
        said = done.stderr.strip() or f"exit code {done.returncode}"
        raise Undecided(f"{' '.join(command[:3])}: {said}. Next step: {remedy}")
    return done.stdout


@contextmanager
def regularly(seconds: float, do: Callable[[], None]) -> Iterator[None]:
    """Does something every so many seconds beside the body, and no more when that has ended."""
    over = threading.Event()

    def run() -> None:
        while not over.wait(seconds):
            do()

    beside = threading.Thread(target=run, daemon=True)
    beside.start()
    try:
        yield
    finally:
        over.set()
        beside.join()


def inspect(kind: str, *names: str) -> list[dict[str, Any]]:
    """What the engine knows of containers or volumes; Undecided if one is not there."""
    return list(json.loads(ask(["docker", kind, "inspect", *names], START_ENGINE))) if names else []


def read_json(path: Path) -> Any:
    """The document in a file. `Undecided` when it is not there or not JSON."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise Undecided(f"{path}: {error}. Next step: make up, which writes it") from None


def write(path: Path, text: str) -> None:
    """Replaces a file in one step, so that no reader finds half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    draft.write_text(text)
    draft.chmod(0o644)
    draft.replace(path)
