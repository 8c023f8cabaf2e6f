"""restic: one environment's repository of backups in one target. Encrypted, deduplicated, compressed by restic itself.
Nothing here knows what is in a backup: `host/backup.py` decides what is saved, `host/restore.py` what comes back."""

import base64
import json
import os
import select
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any, NamedTuple, TypeVar

from host.machine import Undecided

FACTS = "facts:"
ABSENT = ("config: no such file or directory", "config file: Stat: The specified key does not exist")
REFUSED = ("AccessDenied", "Access Denied", "Access Key Id you provided", "request signature we calculated")
"""As S3 servers word it, which is all that restic passes on."""
UNREACHABLE = ("connection refused", "no such host", "i/o timeout", "connection reset")
LOCKED = "`unlock` command can be used"
FULL = ("no space left on device", "QuotaExceeded", "XMinioStorageFull", "disk quota exceeded")
STEPS = (
    (
        REFUSED,
        "see that the secrets backup_<target>_key_id and _secret_key are right (then make up), and that the repository "
        "is there: make bucket makes it",
    ),
    (UNREACHABLE, "the target does not answer: see that it runs and can be reached from the host"),
    (FULL, "the target is full: make room there, or let fewer snapshots be kept (retain)"),
    (("wrong password or no key found",), "this is another repository's key: see docs/runbooks/lost-key.md"),
)
NOT_INSTALLED = "restic is not installed. Next step: apt-get install restic"
ANSWER_SECONDS = 600
INCOMPLETE = 3
"""restic's exit code for a snapshot without some of what was to be in it."""
GIVE_UP_SECONDS = 2.0


Made = TypeVar("Made")


def ends_too(command: Sequence[str], signal: str = "KILL") -> list[str]:
    """A command that is sent a signal when whoever starts it ends, however that ends."""
    return ["setpriv", "--pdeathsig", signal, *command]


class BackupError(Exception):
    """A backup or restore did not succeed; the text names what failed and the next step."""

    @property
    def refused(self) -> bool:
        """Whether the target does not let these credentials do it."""
        return any(word in str(self) for word in REFUSED)

    @property
    def absent(self) -> bool:
        """Whether the target says that there is no repository yet."""
        return not self.refused and any(word in str(self) for word in ABSENT)


@dataclass(frozen=True)
class Snapshot:
    """A snapshot. `facts`: what the job knew when it was made. `size`: bytes, `added`: bytes new to the repository."""

    id: str
    at: datetime
    kind: str
    facts: Mapping[str, Any]
    size: int = 0
    added: int = 0


@dataclass(frozen=True)
class Repository:
    """Where it is, its key, and the credentials of its target as restic's variables (`AWS_ACCESS_KEY_ID`, ...).

    `append_only`: the credentials cannot delete, so nothing is let go of here. `read_only`: they cannot even lock it.
    `mark`: a file that says that it has been there; it is not begun anew then where it is gone. `rate`: bytes a second
    that are stored at most; 0 for no ceiling.
    """

    url: str
    password: str = field(repr=False)
    cache: Path
    variables: Mapping[str, str] = field(default_factory=dict, repr=False)
    append_only: bool = False
    read_only: bool = False
    mark: Path | None = None
    rate: int = 0

    @property
    def environment(self) -> dict[str, str]:
        ours = {"RESTIC_REPOSITORY": self.url, "RESTIC_PASSWORD": self.password, "RESTIC_CACHE_DIR": str(self.cache)}
        return {**os.environ, "GOMAXPROCS": "2", **self.variables, **ours}

    @property
    def incomplete(self) -> Path:
        """A file with the ids of snapshots that have holes, and could not be removed."""
        return self.cache.with_name("incomplete")

    @property
    def _restic(self) -> list[str]:
        slow = [f"--limit-upload={max(1, self.rate // 1024)}"] if self.rate else []
        return ["restic", *(["--no-lock"] if self.read_only else []), *slow]

    def call(self, *words: str, seconds: float = ANSWER_SECONDS) -> str:
        """Standard output of `restic words`. BackupError with the next step."""
        try:
            return self._call(words, seconds)
        except BackupError as error:
            if LOCKED not in str(error) or not self.prepared(error):
                raise
            return self._call(words, seconds)

    def _call(self, words: Sequence[str], seconds: float) -> str:
        try:
            done = subprocess.run(
                [*self._restic, "--quiet", *words],
                env=self.environment,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                timeout=seconds,
                check=False,
            )
        except FileNotFoundError:
            raise Undecided(NOT_INSTALLED) from None
        except subprocess.TimeoutExpired:
            raise BackupError(f"restic {words[0]}: no answer within {seconds:g} s from {self.url}") from None
        if done.returncode:
            raise self.error(words[0], done.stderr)
        return done.stdout

    def error(self, verb: str, said: str) -> BackupError:
        """What restic said, with the step that its words suggest."""
        lines = [line for line in said.splitlines() if " " in line and not line.startswith("\t")]  # not Go's stack
        lines = [line for line in lines if line.startswith("Fatal")] or lines[:5]
        step = next((text for words, text in STEPS if any(word.lower() in said.lower() for word in words)), "see above")
        return BackupError(f"restic {verb} in {self.url}: {' / '.join(lines)}. Next step: {step}")

    def prepared(self, error: BackupError) -> bool:
        """Whether what stood in the way could be put right: no repository yet, or a lock of a run that was killed."""
        if error.refused:
            return False
        if error.absent:
            if self.mark and self.mark.exists():
                raise BackupError(
                    f"{self.url}: the repository was there, and is gone. Next step: mount its disk, or bring it back; "
                    "to begin a new one: make backup ENV=… ARGS=--anew"
                )
            self.init()
            return True
        if LOCKED in str(error):
            # Only locks whose process is gone, or that are older than half an hour.
            self._call(("unlock",), ANSWER_SECONDS)
            return True
        return False

    @property
    def in_bucket(self) -> bool:
        return self.url.startswith("s3:")

    def there(self) -> bool:
        """Whether it has been made. BackupError where that cannot be known, or the key is another's."""
        try:
            self._call(("cat", "config"), ANSWER_SECONDS)
        except BackupError as error:
            if not error.absent:
                raise
            return False
        return True

    def init(self) -> None:
        """Makes it. In a bucket only its owner can: restic asks for the bucket as a whole, once."""
        self._call(("init",), ANSWER_SECONDS)
        self._seen()

    # --- saving

    def save_stream(
        self,
        producer: Sequence[str],
        name: str,
        tags: Sequence[str],
        seconds: float,
        variables: Mapping[str, str] = {},
    ) -> Snapshot:
        """A snapshot of what a command prints, as one file. BackupError, and no snapshot, where the command fails.

        `variables`: further ones of the command's environment.
        """
        return self._again(lambda: self._save_stream(producer, name, tags, seconds, variables))

    def _again(self, save: Callable[[], Made]) -> Made:
        """Does it, and once more where what stood in the way could be put right."""
        try:
            return save()
        except BackupError as error:
            if not self.prepared(error):
                raise
            return save()

    def _save_stream(
        self, producer: Sequence[str], name: str, tags: Sequence[str], seconds: float, variables: Mapping[str, str]
    ) -> Snapshot:
        """The stream, once.

        restic takes the end of its input for the end of the file, so the pipe is held open until it is known how the
        command ended: half a database must not look like a backup. A repository that has never been there is asked for
        first: else the command would read all of a database, and wait for its checkpoint, for nobody.
        """
        if self.mark and not self.mark.exists():
            self._call(("cat", "config"), ANSWER_SECONDS)
            self._seen()
        command = self._backup("--stdin", "--stdin-filename", name, tags=tags)
        reading, writing = os.pipe()
        with (
            os.fdopen(writing, "wb") as held,
            os.fdopen(reading, "rb") as output,
            _running(command, self.environment, output) as restic,
        ):
            output.close()
            code, told = _fed(producer, {**os.environ, **variables}, held, restic.process, seconds)
            if code and not _ends(restic):
                said = told.decode(errors="replace").strip().splitlines()[-3:]
                raise BackupError(f"{' '.join(producer[:4])} …: {' / '.join(said) or code}")
            held.close()
            return self._saved(restic, tags, None, seconds)

    def save_folder(self, folder: Path, tags: Sequence[str], seconds: float = 24 * 3600) -> Snapshot:
        """A snapshot of a folder, by its name, with its owner and mode; what has not changed is not read again.
        BackupError, as for any failure, where it takes longer than so many seconds."""
        return self._again(lambda: self._save_folder(folder, tags, seconds))

    def _save_folder(self, folder: Path, tags: Sequence[str], seconds: float) -> Snapshot:
        command = self._backup("--ignore-inode", folder.name, tags=tags)
        with _running(command, self.environment, subprocess.DEVNULL, folder.parent) as restic:
            return self._saved(restic, tags, folder, seconds)

    def _backup(self, *words: str, tags: Sequence[str]) -> list[str]:
        tagged = [word for tag in tags for word in ("--tag", tag)]
        return [*self._restic, "--quiet", "backup", "--json", "--host", "bulkhead", *tagged, *words]

    def _saved(self, restic: "Running", tags: Sequence[str], folder: Path | None, seconds: float) -> Snapshot:
        try:
            code, output, said = restic.ended(seconds)
        except subprocess.TimeoutExpired:
            raise BackupError(f"restic backup: not done within {seconds:g} s in {self.url}") from None
        told = [json.loads(line) for line in output.splitlines() if line.startswith(b"{")]
        summary: dict[str, Any] = next((line for line in reversed(told) if line.get("message_type") == "summary"), {})
        if code == INCOMPLETE and summary and folder and not _missed(said, folder):
            pass  # files that were removed meanwhile are no part of what there was
        elif code:
            error = self.error("backup", said.decode(errors="replace"))
            if made := summary.get("snapshot_id"):
                # It is there, with holes, and must never be taken for a backup.
                self.incomplete.parent.mkdir(parents=True, exist_ok=True)
                with self.incomplete.open("a") as file:
                    file.write(f"{made}\n")
                with suppress(BackupError):
                    self.call("forget", *([] if self.append_only else ["--prune"]), made)
            raise error
        now = datetime.now(UTC).isoformat()
        self._seen()
        made = _snapshot({"id": summary["snapshot_id"], "time": now, "tags": list(tags)})
        return replace(made, size=summary["total_bytes_processed"], added=summary["data_added"])

    def _seen(self) -> None:
        if self.mark:
            self.mark.parent.mkdir(parents=True, exist_ok=True)
            self.mark.touch()

    # --- finding and bringing back

    def snapshots(self, *tags: str) -> list[Snapshot]:
        """Those that have all these tags, the oldest first."""
        words = ["--tag", ",".join(tags)] if tags else []
        return self._whole(json.loads(self.call("snapshots", "--json", *words)) or [])

    def _whole(self, listed: Sequence[Mapping[str, Any]]) -> list[Snapshot]:
        holes = set(self.incomplete.read_text().split()) if self.incomplete.exists() else set()
        whole = [one for one in listed if not any(one["id"].startswith(short) for short in holes)]
        return sorted(map(_snapshot, whole), key=lambda one: one.at)

    def restore(self, snapshot: str, into: Path, only: Sequence[str] = ()) -> None:
        """A snapshot's files, into a folder: all, or those whose names match one of some patterns."""
        words = [word for pattern in only for word in ("--include", pattern)]
        self.call("restore", snapshot, "--target", str(into), *words, seconds=24 * 3600)

    def dump(self, snapshot: str, file: str) -> list[str]:
        """The command that prints one file of a snapshot; it needs `environment`."""
        return ends_too([*self._restic, "--quiet", "dump", snapshot, file])

    def dump_into(self, target: IO[bytes] | int, snapshot: str, file: str, seconds: float | None = None) -> None:
        """Writes one file of a snapshot into an open one. BackupError where it is not there, or not whole;
        subprocess.TimeoutExpired where that takes longer than so many seconds."""
        done = subprocess.run(
            self.dump(snapshot, file),
            env=self.environment,
            stdin=subprocess.DEVNULL,
            stdout=target,
            stderr=subprocess.PIPE,
            timeout=seconds,
            check=False,
        )
        if done.returncode:
            raise self.error("dump", done.stderr.decode(errors="replace"))

    def size(self, snapshot: str) -> int:
        """Bytes that a snapshot takes up once it is restored."""
        return int(json.loads(self.call("stats", "--json", "--mode", "restore-size", snapshot))["total_size"])

    def files(self, snapshot: str) -> Iterator[str]:
        """The paths in a snapshot."""
        for line in self.call("ls", "--json", snapshot).splitlines():
            found = json.loads(line)
            if found.get("struct_type") == "node" and found.get("type") == "file":
                yield found["path"]

    def forget(self, retain: Mapping[str, int | None], *tags: str) -> tuple[list[Snapshot], bool]:
        """Lets go of the snapshots that `retain` (as in `x-bulkhead.backup`) does not keep. Returns those that stay,
        and whether others went, whose data is there until `prune`. An append-only one lets go of nothing, unasked."""
        if self.append_only:
            return [], False
        kept = [word for key, count in retain.items() if count for word in (f"--keep-{key}", str(count))]
        words = ("forget", "--json", "--group-by", "host", "--tag", ",".join(tags), *kept)
        groups = json.loads(self.call(*words, seconds=6 * 3600) or "[]")
        stay = [one for group in groups for one in group["keep"] or ()]
        return self._whole(stay), any(group["remove"] for group in groups)

    def prune(self) -> None:
        """Lets go of the data that no snapshot has."""
        self.call("prune", seconds=6 * 3600)

    def copy_from(self, other: "Repository", *snapshots: str) -> None:
        """Copies snapshots of another repository that are not here yet."""
        theirs = {"RESTIC_FROM_REPOSITORY": other.url, "RESTIC_FROM_PASSWORD": other.password}
        variables = {**other.variables, **self.variables, **theirs}
        joined = Repository(self.url, self.password, self.cache, variables, rate=self.rate)
        self._again(lambda: joined.call("copy", *snapshots, seconds=24 * 3600))
        self._seen()

    def check(self) -> None:
        """Reads everything and compares it with its checksums. BackupError for what is damaged."""
        self.call("check", "--read-data", seconds=24 * 3600)


class Running(NamedTuple):
    """restic as a process, and files for what it says: a pipe would be full before its input has ended."""

    process: "subprocess.Popen[bytes]"
    output: IO[bytes]
    errors: IO[bytes]

    def ended(self, seconds: float) -> tuple[int, bytes, bytes]:
        """Waits for it: its exit code, and what it said. subprocess.TimeoutExpired where it takes longer."""
        code = self.process.wait(seconds)
        for file in (self.output, self.errors):
            file.seek(0)
        return code, self.output.read(), self.errors.read()


def tags(job: str, kind: str, facts: Mapping[str, Any]) -> list[str]:
    """A snapshot's tags: what finds it again, and the facts in one that restic cannot split."""
    packed = base64.urlsafe_b64encode(json.dumps(facts, sort_keys=True).encode()).decode()
    return [f"job:{job}", f"kind:{kind}", f"{FACTS}{packed}"]


def _snapshot(listed: Mapping[str, Any]) -> Snapshot:
    known = listed.get("tags") or []
    packed = next((tag.removeprefix(FACTS) for tag in known if tag.startswith(FACTS)), "")
    facts = json.loads(base64.urlsafe_b64decode(packed)) if packed else {}
    kind = next((tag.removeprefix("kind:") for tag in known if tag.startswith("kind:")), "")
    at = datetime.fromisoformat(str(listed["time"])).astimezone()
    return Snapshot(str(listed["id"]), at, kind, facts)


def _missed(said: bytes, folder: Path) -> bool:
    """Whether restic could not read something of the folder that is there; what is gone meanwhile does not count.

    Of an error it tells as JSON where, and not what (restic 4945).
    """
    items = []
    for line in said.decode(errors="replace").splitlines():
        if line.strip():
            try:
                items.append(json.loads(line)["item"])
            except (ValueError, KeyError, TypeError):
                return True
    return not items or any(os.path.lexists(folder.parent / item) for item in items)


def _fed(
    producer: Sequence[str],
    environment: Mapping[str, str],
    sink: IO[bytes],
    reader: "subprocess.Popen[bytes]",
    seconds: float,
) -> tuple[int, bytes]:
    """Runs what feeds a reader, and no longer than that reads: its exit code, and what it said.

    By itself it would end when it next writes, and before a database writes anything it waits for a checkpoint.
    """
    with tempfile.TemporaryFile() as errors:
        made = subprocess.Popen(producer, env=environment, stdin=subprocess.DEVNULL, stdout=sink, stderr=errors)
        try:
            if not _one_ends((made, reader), seconds):
                raise BackupError(f"{producer[0]} did not end within {seconds:g} s")
        finally:
            if made.poll() is None:
                made.kill()
            made.wait()
        errors.seek(0)
        return made.returncode, errors.read()


def _one_ends(processes: Sequence["subprocess.Popen[bytes]"], seconds: float) -> bool:
    """Waits until one of them ends. Whether one did within so many seconds."""
    with ExitStack() as stack:
        poller = select.poll()
        for one in processes:
            descriptor = os.pidfd_open(one.pid)
            stack.callback(os.close, descriptor)
            poller.register(descriptor, select.POLLIN)
        return bool(poller.poll(seconds * 1000))


def _ends(restic: Running) -> bool:
    """Whether restic ends though its input is still open: what fed it then failed because restic did."""
    try:
        restic.process.wait(GIVE_UP_SECONDS)
    except subprocess.TimeoutExpired:
        return False
    return True


@contextmanager
def _running(
    command: Sequence[str], environment: Mapping[str, str], stdin: IO[bytes] | int, folder: Path | None = None
) -> Iterator[Running]:
    """restic, which does not outlive the body, nor this process, however that ends: what fed it would end too, and half
    a database look like a whole one."""
    with tempfile.TemporaryFile() as output, tempfile.TemporaryFile() as errors:
        if shutil.which(command[0]) is None:
            raise Undecided(NOT_INSTALLED)
        child = subprocess.Popen(
            ends_too(command), env=environment, stdin=stdin, stdout=output, stderr=errors, cwd=folder
        )
        try:
            yield Running(child, output, errors)
        finally:
            if child.poll() is None:
                child.kill()
            child.wait()
