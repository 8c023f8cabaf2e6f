"""restore: brings a backup back into a fresh volume, checks it there, and only then puts it in place of the old one.
A drill does the same into a volume that is thrown away: a backup counts when it has been restored and checked."""

import argparse
import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from host import engines
from host.backup import RESTORE_LABEL as LABEL
from host.backup import (
    WAIT_SECONDS,
    Job,
    Phases,
    State,
    alone,
    begun_anew,
    between_wal,
    holder,
    jobs,
    said_of,
    wal_meanwhile,
)
from host.engines import Container, mountpoint
from host.keep import BEST_EFFORT, used
from host.machine import ANSWER_SECONDS, START_ENGINE, Places, Undecided, ask, inspect, read_json, regularly, write
from host.restic import BackupError, Repository, Snapshot

KEPT = "bulkhead.kept"
INTENT = "exchange.json"
"""In a job's folder, while its volume changes places with a restored one."""
HEALTHY_SECONDS, RECOVERY_SECONDS, UNPACK_SECONDS = 180.0, 6 * 3600.0, 24 * 3600.0
PROGRESS_SECONDS = 2.0
ROOM = 1.1
"""Free space that a restore needs, as a part of what it brings back: file systems have their own needs."""
SLACK = 0.01
"""Part of a table's rows by which it may be smaller than at the time of its backup, and still count as restored: rows
are deleted too while WAL is written."""
KEYS = 0.5
"""Part of the keys which a restored Redis has read at least; where it does not tell (before 7), of those that do not
expire which it has."""
CHECKED_IN = 10
"""Drills in which all of a repository is read once: what is damaged may be in an older backup only."""
SOCKET = "/tmp"  # noqa: S108 - in a container of its own
Say = Callable[[str], None]


@dataclass
class Restored:
    """A volume that was restored and checked. `until`: seconds since 1970 up to which its data is known to go."""

    job: Job
    volume: str
    snapshot: Snapshot
    until: float
    phases: Phases
    found: dict[str, Any] = field(default_factory=dict)


class TooEarly(BackupError):
    """The time that was asked for is inside of the base backup, which is consistent only from its end on."""


def chosen(job: Job, repository: Repository, at: str) -> tuple[Snapshot, float | None]:
    """The snapshot for a time or an id, and up to when WAL goes on from there. BackupError where there is none.

    That is the time that was asked for; as far as there is WAL where it is None; not at all from a snapshot that is
    called by its id, for which it is the snapshot's own time.
    """
    bases = repository.snapshots(f"job:{job.name}", "kind:base")
    if not bases:
        raise BackupError(f"{job.key}: no snapshot in {repository.url}. Next step: make backup")
    if at in ("", "latest"):
        return bases[-1], None
    named = [one for one in bases if one.id.startswith(at)]
    if len(named) == 1 and len(at) >= 4:
        return named[0], float(named[0].facts["at"])
    try:
        moment = datetime.fromisoformat(at)
    except ValueError:
        known = ", ".join(f"{one.id[:8]} ({one.at:%Y-%m-%d %H:%M:%S %Z})" for one in bases[-5:])
        raise BackupError(
            f"{at}: neither a time (2026-11-25 14:00:05) nor a snapshot; the newest are {known}"
        ) from None
    seconds = moment.astimezone().timestamp()
    before = [one for one in bases if one.facts["at"] <= seconds]
    if not before:
        raise BackupError(f"{at}: before the oldest snapshot, {bases[0].at:%Y-%m-%d %H:%M:%S %Z}")
    return before[-1], seconds if job.wal else None


def wal_for(job: Job, repository: Repository, base: Snapshot, until: float | None) -> Snapshot | None:
    """The snapshot of a base backup's WAL that goes up to a time; the newest where none is asked for. BackupError."""
    every = repository.snapshots(f"job:{job.name}", "kind:wal")
    found = [one for one in every if one.facts.get("history") == base.facts.get("history")]
    if until is None:  # not by time: the clock may have been set back
        return max(found, key=lambda one: engines.lsn(one.facts["position"]), default=None)
    if reaching := [one for one in found if one.facts["at"] >= until]:
        return reaching[0]
    goes = f"goes up to {local(found[-1].facts['at'])}" if found else "has not come yet"
    raise BackupError(
        f"{job.key}: WAL in {repository.url} {goes}, not up to {local(until)}. Next step: make backup brings "
        "the newest; or choose an earlier time, or none for the newest"
    )


def local(at: float) -> str:
    """A time as it is called on the host, and as `--at` takes it."""
    return f"{datetime.fromtimestamp(at).astimezone():%Y-%m-%d %H:%M:%S}"


# --- into a volume


@contextmanager
def volume_made(name: str, job: Job) -> Iterator[str]:
    """A fresh volume, which goes again if the body fails. BackupError where there is one of that name: it stays."""
    if name in ask(["docker", "volume", "ls", "--quiet"], START_ENGINE).split():
        raise BackupError(f"volume {name} is there already. Next step: another name, or docker volume rm {name}")
    ask(["docker", "volume", "create", "--label", f"{LABEL}={job.key}", name], START_ENGINE)
    try:
        yield name
    except BaseException:
        ask(["docker", "volume", "rm", "--force", name], START_ENGINE)
        raise


def need_room(folder: Path, size: int) -> None:
    """BackupError unless so many bytes, and some, are free beside a folder."""
    there = next(path for path in (folder, *folder.parents) if path.exists())
    free = shutil.disk_usage(there).free
    if free < size * ROOM:
        raise BackupError(
            f"{size * ROOM / 2**30:.2f} GiB are needed for the restore, {free / 2**30:.2f} GiB are free in {there}. "
            "Next step: make room (make restore RELEASE=<kept volume> removes what an earlier restore kept)"
        )


def template(job: Job) -> Container:
    """A container of the job's service, running or not: its image and its limits are what the data needs."""
    found = engines.containers(job.environment, job.volume, stopped=True)
    service = job.declared.get("service")
    for one in found:
        if service in (None, one.inspected["Config"]["Labels"][engines.SERVICE]):
            return one
    raise BackupError(f"{job.key}: no container of its service is there. Next step: make up ENV={job.environment}")


def throwaway(job: Job, like: Container, *words: str, user: str, entry: str, options: Sequence[str] = ()) -> list[str]:
    """`docker` words that make a container of the service's image with no network and nothing of the old volume."""
    memory = int(like.inspected["HostConfig"].get("Memory") or 0)
    limits = [f"--memory={memory}", f"--memory-swap={memory}"] if memory else []
    parent = budget(job.places)
    return [
        *("--network=none", "--cap-drop=ALL", "--security-opt=no-new-privileges", f"--user={user}"),
        *(f"--label={LABEL}={job.key}", f"--entrypoint={entry}"),
        *([f"--cgroup-parent={parent}"] if parent else []),
        *limits,
        *options,
        like.image,
        *words,
    ]


def budget(places: Places) -> str:
    """The slice of a best-effort environment: prod's own is for prod. Empty where there is none."""
    environments = read_json(places.declared / "host.json")["environments"]
    return next((str(one["cgroup_parent"]) for one in environments.values() if one["tier"] == BEST_EFFORT), "")


UNPACK = 'mkdir -p "$1" && tar -x -p -f - -C "$1" < /from/base.tar && chown "$2:$3" /to "$1" && chmod 700 "$1"'
RECOVER = (
    'cd "$1" && { [ ! -e .bulkhead.conf ] || mv .bulkhead.conf postgresql.auto.conf; } && '
    'cp -p postgresql.auto.conf .bulkhead.conf && printf %s "$4" >> postgresql.auto.conf && '
    ': > recovery.signal && chown "$2:$3" recovery.signal'
)
RECOVERED = 'cd "$1" && mv .bulkhead.conf postgresql.auto.conf && rm -f recovery.signal'


def in_volume(
    job: Job, snapshot: Snapshot, volume: str, script: str, *words: str, options: Sequence[str] = ()
) -> list[str]:
    """The words that run a script beside a volume, which is /to. In a container, since a volume may hold anything,
    links to files of the host too. `$1`: where the data is, `$2`, `$3`: whose it is, then `words`."""
    uid, gid = snapshot.facts["owner"]
    caps = [f"--cap-add={name}" for name in ("CHOWN", "DAC_OVERRIDE", "FOWNER")]
    arguments = ("-euc", script, "sh", f"/to/{snapshot.facts['inside']}", str(uid), str(gid), *words)
    mounted = (*options, *caps, f"--volume={volume}:/to")
    return throwaway(job, template(job), *arguments, user="0:0", entry="sh", options=mounted)


def ran_in_volume(job: Job, snapshot: Snapshot, volume: str, script: str, *words: str) -> None:
    """Runs a script beside a volume, see `in_volume`. Undecided where it fails."""
    ask(["docker", "run", *in_volume(job, snapshot, volume, script, *words, options=("--rm",))], START_ENGINE)


def unpack(job: Job, repository: Repository, snapshot: Snapshot, size: int, volume: str, say: Say) -> None:
    """A base backup of so many bytes into a volume; tells how far it is. BackupError if either end fails.

    Through a named pipe that both see: what goes through the engine's own streams is copied five times on the way.
    """
    job.folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="unpack-", dir=job.folder) as folder:
        pipe = Path(folder, "base.tar")
        os.mkfifo(pipe)
        pipe.parent.chmod(0o755)  # to an engine with user namespaces even its root is somebody else
        pipe.chmod(0o644)
        command = in_volume(job, snapshot, volume, UNPACK, options=(f"--volume={folder}:/from:ro",))
        with progress(mountpoint(volume), size, say), started(command) as container:
            with taken(pipe, container) as sink:
                error = dumped(repository, snapshot, "/base.tar", sink)
            if error and CLOSED not in str(error):
                raise error
            code = ask(["docker", "wait", container.id], START_ENGINE, seconds=RECOVERY_SECONDS).strip()
            if code != "0":
                raise BackupError(f"unpacking ended with {code}: {last_words(container)}")
            if error:
                raise error


CLOSED = "broken pipe"
"""What restic says where the other end of the pipe has ended, which says why itself."""


def dumped(repository: Repository, snapshot: Snapshot, file: str, sink: int) -> BackupError | None:
    """Writes a snapshot's file into a pipe or another file; what went wrong."""
    try:
        repository.dump_into(sink, snapshot.id, file, UNPACK_SECONDS)
    except subprocess.TimeoutExpired:
        return BackupError(f"{file} of {snapshot.id[:8]} is not unpacked within {UNPACK_SECONDS:g} s")
    except BackupError as error:
        return error
    return None


@contextmanager
def taken(pipe: Path, reader: Container) -> Iterator[int]:
    """A named pipe to write into, once a container has opened it to read. BackupError where it ends before, or does
    not: the image's shell is whoever's who made it."""
    deadline = time.monotonic() + HEALTHY_SECONDS
    while True:
        try:
            sink = os.open(pipe, os.O_WRONLY | os.O_NONBLOCK)
            break
        except OSError as error:
            if error.errno != errno.ENXIO:
                raise
        alive(reader, "unpacking")
        if time.monotonic() > deadline:
            raise BackupError(f"unpacking has not begun within {HEALTHY_SECONDS:g} s: {last_words(reader)}")
        time.sleep(0.05)
    try:
        os.set_blocking(sink, True)
        yield sink
    finally:
        os.close(sink)


@contextmanager
def progress(folder: Path, size: int, say: Say) -> Iterator[None]:
    """Says every few seconds how much of so many bytes has come, and how long the rest will take."""
    began = time.monotonic()

    def tell() -> None:
        there, took = used([str(folder)]), time.monotonic() - began
        rest = max(0.0, took / there * (size - there)) if there else 0.0
        say(f"  {there / 2**20:.0f} of {size / 2**20:.0f} MiB, about {rest:.0f} s left")

    with regularly(PROGRESS_SECONDS, tell):
        yield


# --- PostgreSQL

NOT_REACHED = "recovery ended before configured recovery target was reached"
"""What PostgreSQL 13 and later end with where no commit in the WAL is later than the target's time."""
TOO_EARLY = "requested recovery stop point is before consistent recovery point"
"""What a server ends with where the target's time is inside of the base backup, which took hours, perhaps."""
RESTORE_COMMAND = 'cp "/wal/%f" "%p" 2>/dev/null || cp "/wal/%f.partial" "%p"'


def restore_postgres(
    job: Job, repository: Repository, snapshot: Snapshot, until: float | None, volume: str, phases: Phases, say: Say
) -> Restored:
    """Base backup, then WAL (see `chosen`; a base without WAL comes back as it was), then the server is asked."""
    like = template(job)
    same_version(job, like, snapshot)
    own = until == snapshot.facts["at"]
    wal = None if own or not job.wal else wal_for(job, repository, snapshot, until)
    size = repository.size(snapshot.id)
    need_room(mountpoint(volume), size + (repository.size(wal.id) if wal else 0))
    say(f"{job.key}: base backup {snapshot.id[:8]} of {snapshot.at:%Y-%m-%d %H:%M:%S}")
    phases.begin("unpack")
    unpack(job, repository, snapshot, size, volume, say)
    phases.begin("WAL")
    folder = job.folder / f"restore-{os.getpid()}"
    try:
        folder.mkdir(parents=True, mode=0o700)
        archive = folder / "wal"
        archive.mkdir()
        if wal:
            say(f"{job.key}: WAL up to {wal.at:%Y-%m-%d %H:%M:%S}")
            begins = snapshot.facts.get("segment")  # a snapshot of WAL goes back to the base backup before the last
            repository.restore(wal.id, folder, engines.since(begins) if begins else ())
        for file in (archive, *archive.rglob("*")):
            file.chmod(0o755 if file.is_dir() else 0o644)
        target = {}
        if wal is None:
            target["recovery_target"] = "immediate"
        elif until is not None:
            target["recovery_target_time"] = datetime.fromtimestamp(until, UTC).isoformat()

        def replayed(**target: str) -> dict[str, Any]:
            phases.begin("recovery")
            settings = {"restore_command": RESTORE_COMMAND, "recovery_target_action": "promote"}
            with recovery(job, snapshot, volume, settings | target):
                return asked_postgres(job, like, snapshot, wal, archive, volume, phases, say)

        try:
            found = replayed(**target)
        except BackupError as error:
            if TOO_EARLY in str(error):
                raise TooEarly(
                    f"{job.key}: at {local(until or 0)} the base backup {snapshot.id[:8]} still went on, and there "
                    "is none before it that WAL goes on from. Next step: a later time"
                ) from None
            if "recovery_target_time" not in target or NOT_REACHED not in str(error):
                raise
            # The WAL goes beyond that time, so nothing was committed after it: all of the WAL is what was asked for.
            say(f"{job.key}: nothing was committed after that time")
            found = replayed()
            if "behind" in found:
                raise BackupError(
                    f"{job.key}: {found['behind']}. WAL since the base backup is missing. Next step: "
                    f"AT={snapshot.id[:8]} brings the base backup as it was"
                ) from None
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    reached = until or (wal.facts["at"] if wal else snapshot.facts["at"])
    return Restored(job, volume, snapshot, reached, phases, found)


def same_version(job: Job, like: Container, snapshot: Snapshot) -> None:
    """BackupError where the service's image has another major version than the data."""
    command = throwaway(
        job, like, "--version", user="65534:65534", entry=f"{snapshot.facts['programs']}/postgres", options=("--rm",)
    )
    wanted = int(snapshot.facts["version"]) // 10000
    try:
        told = ask(["docker", "run", *command], START_ENGINE).split()
        there = int(told[2].partition(".")[0])
    except (Undecided, IndexError, ValueError) as error:
        raise BackupError(f"{job.key}: the image has no PostgreSQL {wanted}: {error}") from None
    if there != wanted:
        raise BackupError(
            f"{job.key}: the backup is of PostgreSQL {wanted}, the image has {there}. Next step: deploy the version of "
            "the backup, restore, then upgrade"
        )


@contextmanager
def recovery(job: Job, snapshot: Snapshot, volume: str, settings: Mapping[str, str]) -> Iterator[None]:
    """Makes a cluster recover when it starts; afterwards it says nothing of that any more."""
    lines = "".join(f"{name} = '{value}'\n" for name, value in settings.items())
    ran_in_volume(job, snapshot, volume, RECOVER, lines)
    yield
    ran_in_volume(job, snapshot, volume, RECOVERED)


@contextmanager
def postgres_on(
    job: Job, like: Container, snapshot: Snapshot, volume: str, options: Sequence[str] = ()
) -> Iterator[tuple[Container, Callable[..., str]]]:
    """A server on a restored volume, without a network: its container, and what asks it. It may still be starting."""
    facts = snapshot.facts
    uid, gid = facts["owner"]
    settings = {"listen_addresses": "", "unix_socket_directories": SOCKET, "archive_mode": "off", "hot_standby": "on"}
    # What it says is read, so it says it here, and in English.
    settings |= {"logging_collector": "off", "log_destination": "stderr", "lc_messages": "C"}
    words = [*facts["argv"], *(word for name, value in settings.items() for word in ("-c", f"{name}={value}"))]
    mounts = (f"--volume={volume}:{facts['mount']}", f"--tmpfs={SOCKET}:mode=1777", *options)
    command = throwaway(job, like, *words, user=f"{uid}:{gid}", entry=f"{facts['programs']}/postgres", options=mounts)
    with started(command) as container:

        def query(sql: str, database: str = "postgres", seconds: float = ANSWER_SECONDS) -> str:
            flags = ("--tuples-only", "--no-align", f"--command={sql}")
            return container.said(*psql(facts, database), *flags, user=str(uid), seconds=seconds).strip()

        yield container, query


def psql(facts: Mapping[str, Any], database: str) -> list[str]:
    """The words that start the client in such a container."""
    return [
        *(f"{facts['programs']}/psql", f"--host={SOCKET}", f"--username={facts['user']}", "--no-password"),
        *("--no-psqlrc", "--quiet", "--set=ON_ERROR_STOP=1", f"--dbname={database}"),
    ]


def asked_postgres(
    job: Job,
    like: Container,
    snapshot: Snapshot,
    wal: Snapshot | None,
    archive: Path,
    volume: str,
    phases: Phases,
    say: Say,
) -> dict[str, Any]:
    """Starts the server on the restored volume, waits until it has recovered, asks, stops it."""
    with postgres_on(job, like, snapshot, volume, [f"--volume={archive}:/wal:ro"]) as (container, query):
        replayed = recovered(job, container, query, say)
        phases.begin("rows")

        def script(text: str, database: str) -> "subprocess.CompletedProcess[str]":
            words = (*psql(snapshot.facts, database), "--tuples-only", "--no-align", "--file=-")
            return container.typed(text, *words, user=str(snapshot.facts["owner"][0]))

        rows = engines.counted(query, script, engines.COUNT_SECONDS)
        fewer = lost(snapshot.facts["rows"], rows)
        found: dict[str, Any] = {"rows": rows, "position": replayed, "problems": []}
        if fewer:
            # With WAL it is another time's data: a queue may be empty by then. How far it goes says if all is there.
            found["fewer"] = fewer
            say(f"{job.key}: fewer rows than when the base backup began: {'; '.join(fewer)}")
        if wal and query(f"select '{replayed}'::pg_lsn >= '{wal.facts['position']}'::pg_lsn") != "t":
            found["behind"] = f"WAL was replayed to {replayed}, and {wal.facts['position']} was there when it was saved"
        if check := job.declared.get("verify"):
            phases.begin("verify")
            database = job.declared.get("database") or engines.one_database(query)
            found["verify"] = query(check, database, RECOVERY_SECONDS)
            if found["verify"] in ("", "f", "0"):
                found["problems"].append(f"the query of verify says {found['verify'] or 'nothing'}: {check}")
        phases.begin("stop")
        return found


def recovered(job: Job, container: Container, query: Callable[..., str], say: Say) -> str:
    """Waits until a server takes writes; the position that it had replayed up to. BackupError if it ends, or never."""
    said_at = time.monotonic()
    deadline = said_at + RECOVERY_SECONDS
    while True:
        alive(container)
        try:
            state = query("select pg_is_in_recovery(), coalesce(pg_last_wal_replay_lsn(), '0/0')")
        except BackupError:
            state = ""
        if state.startswith("f|"):
            return state.partition("|")[2]
        if time.monotonic() > deadline:
            raise BackupError(f"{job.key}: still recovering after {RECOVERY_SECONDS:g} s")
        if time.monotonic() - said_at > 5:
            said_at = time.monotonic()
            say(f"  recovering: {state.partition('|')[2] or 'starting'}")
        time.sleep(0.3)


def lost(before: Mapping[str, int | None], rows: Mapping[str, int | None]) -> list[str]:
    """Tables that have less than they had when the backup began, of those that could be counted both times."""
    return [
        f"table {name}: {rows.get(name, 'no')} rows, {count} at the time of the backup"
        for name, count in before.items()
        if count is not None and (there := rows.get(name, -1)) is not None and there < count - SLACK * count
    ]


@contextmanager
def started(command: Sequence[str]) -> Iterator[Container]:
    """A throwaway container, gone afterwards; it is asked to stop first, so that a database is closed in order."""
    made = ask(["docker", "run", "--detach", *command], START_ENGINE).strip()
    try:
        yield Container(*inspect("container", made))
        ask(["docker", "stop", "--time=120", made], START_ENGINE, seconds=150)
    finally:
        ask(["docker", "rm", "--force", "--volumes", made], START_ENGINE)


def alive(container: Container, what: str = "the restored server") -> None:
    """BackupError with the end of its log where a throwaway container has ended."""
    (now,) = inspect("container", container.id)
    if now["State"]["Status"] != "running":
        raise BackupError(f"{what} ended with {now['State']['ExitCode']}: {last_words(container)}")


def last_words(container: Container) -> str:
    """The end of a container's log."""
    command = ["docker", "logs", "--tail=20", container.id]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    return done.stdout.strip()


# --- Redis and files

WRITTEN = {"aof_rewrite_in_progress:0", "aof_rewrite_scheduled:0", "aof_last_bgrewrite_status:ok", "aof_enabled:1"}


def until_told(container: Container, check: Callable[[], bool]) -> None:
    """Waits until a server in a throwaway container says so. BackupError if it ends, or never does."""
    deadline = time.monotonic() + RECOVERY_SECONDS
    while True:
        alive(container)
        with suppress(BackupError):
            if check():
                return
        if time.monotonic() > deadline:
            raise BackupError(f"the restored server is not ready after {RECOVERY_SECONDS:g} s")
        time.sleep(0.3)


def restore_redis(
    job: Job, repository: Repository, snapshot: Snapshot, _until: float | None, volume: str, phases: Phases, say: Say
) -> Restored:
    """The snapshot, loaded by a server that writes its own append-only file of it: with one, none is ever read."""
    facts, like = snapshot.facts, template(job)
    settings, owner = facts["settings"], facts["owner"]
    folder = mountpoint(volume) / facts["inside"]
    need_room(folder, 2 * repository.size(snapshot.id))
    folder.mkdir(parents=True, exist_ok=True)
    dump = folder / settings["dbfilename"]
    phases.begin("unpack")
    with dump.open("wb") as file:
        if error := dumped(repository, snapshot, "/dump.rdb", file.fileno()):
            raise error
    for path in (mountpoint(volume), folder, *folder.rglob("*")):
        os.chown(path, *owner)
    phases.begin("load")
    inside = str(Path(facts["mount"]) / facts["inside"])
    names = {name: value for name, value in settings.items() if name != "appendonly"}
    words = ["--dir", inside, "--port", "0", "--unixsocket", f"{SOCKET}/redis", "--save", "", "--appendonly", "no"]
    words += [word for name, value in names.items() for word in (f"--{name}", value)]
    options = (f"--volume={volume}:{facts['mount']}", f"--tmpfs={SOCKET}:mode=1777")
    command = throwaway(job, like, *words, user=f"{owner[0]}:{owner[1]}", entry="redis-server", options=options)
    with started(command) as container:

        def asked_(*words: str) -> str:
            return container.said("redis-cli", "-s", f"{SOCKET}/redis", *words)

        until_told(container, lambda: "loading:0" in asked_("info", "persistence"))
        loaded, told = asked_("info", "persistence"), asked_("info", "keyspace")
        if settings["appendonly"] == "yes":
            asked_("config", "set", "appendonly", "yes")
            until_told(container, lambda: WRITTEN.issubset(asked_("info", "persistence").splitlines()))
        asked_("save")  # what `redis-cli --rdb` wrote ends with the mark of its stream
    found: dict[str, Any] = {**engines.keys(told), "problems": []}
    # They were counted just before, and what expires may have done so since: a busy server is never exactly so.
    read = engines.loaded(loaded)
    there, wanted = (found["keys"], facts["keys"] - facts["expires"]) if read is None else (read, facts["keys"])
    if there < wanted * KEYS:
        found["problems"].append(f"{there} keys, {facts['keys']} at the time of the backup")
    say(f"{job.key}: {found['keys']} keys")
    return Restored(job, volume, snapshot, facts["at"], phases, found)


def restore_files(
    job: Job, repository: Repository, snapshot: Snapshot, _until: float | None, volume: str, phases: Phases, say: Say
) -> Restored:
    """All files; restic compares what it wrote with its checksums."""
    folder, size = mountpoint(volume), repository.size(snapshot.id)
    need_room(folder, size)
    phases.begin("unpack")
    with progress(folder, size, say):
        # The folder itself is in the snapshot, with its owner and mode.
        repository.call("restore", snapshot.id, "--target", str(folder.parent), "--verify", seconds=RECOVERY_SECONDS)
    found: dict[str, Any] = {"files": sum(1 for path in folder.rglob("*") if path.is_file()), "problems": []}
    if size and not found["files"]:
        found["problems"].append(f"no file, {size} bytes at the time of the backup")
    phases.begin("verify")
    if check := job.declared.get("verify"):
        like = template(job)
        mount = like.mount(job.volume)
        user = like.inspected["Config"].get("User") or "0:0"
        options = ("--rm", f"--volume={volume}:{mount}:ro")
        command = throwaway(job, like, "-c", check, user=user, entry="sh", options=options)
        try:
            done = subprocess.run(
                ["docker", "run", *command], capture_output=True, text=True, timeout=RECOVERY_SECONDS, check=False
            )
        except subprocess.TimeoutExpired:
            raise BackupError(f"{job.key}: the command of verify did not end in {RECOVERY_SECONDS:g} s") from None
        if done.returncode:
            found["problems"].append(
                f"the command of verify ended with {done.returncode}: {done.stderr.strip()[-200:]}"
            )
    return Restored(job, volume, snapshot, snapshot.facts["at"], phases, found)


RESTORE: Mapping[str, Callable[[Job, Repository, Snapshot, float | None, str, Phases, Say], Restored]] = {
    "postgres": restore_postgres,
    "redis": restore_redis,
    "files": restore_files,
}


def restored(job: Job, repository: Repository, at: str, volume: str, say: Say) -> Restored:
    """A backup in a fresh volume, checked. BackupError, and no volume, where anything is wrong with it."""
    snapshot, until = chosen(job, repository, at)
    while True:
        try:
            return _restored(job, repository, snapshot, until, volume, say)
        except TooEarly:
            before = [
                one
                for one in repository.snapshots(f"job:{job.name}", "kind:base")
                if one.at < snapshot.at and one.facts.get("history") == snapshot.facts.get("history")
            ]
            if not before:
                raise
            say(f"{job.key}: the base backup {snapshot.id[:8]} still went on then: from the one before")
            snapshot = before[-1]


def _restored(
    job: Job, repository: Repository, snapshot: Snapshot, until: float | None, volume: str, say: Say
) -> Restored:
    """The same, from this snapshot. TooEarly where its base backup had not ended then."""
    phases = Phases("prepare")
    with volume_made(volume, job):
        done = RESTORE[job.engine](job, repository, snapshot, until, volume, phases, say)
        problems = [*done.found["problems"], *([done.found["behind"]] if "behind" in done.found and not until else [])]
        if done.until == snapshot.facts["at"]:
            problems += done.found.get("fewer", [])  # nothing came after the base backup that could have removed them
        if problems:
            raise BackupError(f"{job.key}: restored, and not as it was: {'; '.join(problems)}")
        return done


# --- in place of the old one


def swapped(done: Restored, state: State, say: Say) -> str:
    """Puts a restored volume in place of the service's, which is kept under a dated name: that name.

    Its services stop meanwhile. What does not become healthy with it gets the old data back, also after an interruption
    of any kind: what is about to be done is on the disk (see `undone`). BackupError then.
    """
    job = done.job
    kept = f"{job.volume}-kept-{datetime.now(UTC):%Y%m%d-%H%M%S}"
    running = engines.containers(job.environment, job.volume)
    ids = [one.id for one in running]
    ask(["docker", "volume", "create", "--label", f"{KEPT}={job.key}", kept], START_ENGINE)
    intent = job.folder / INTENT
    here, fresh, there = (mountpoint(name) for name in (job.volume, done.volume, kept))
    folders = {"here": str(here), "fresh": str(fresh), "there": str(there)}
    write(intent, json.dumps({**folders, "ids": ids, "kept": kept, "old": here.stat().st_ino}))
    with undisturbed():
        try:
            say(f"stopping {', '.join(one.inspected['Name'].lstrip('/') for one in running) or 'nothing'}")
            services("stop", ids)
            exchanged(here, fresh, there)
            services("start", ids)
            if ids:
                healthy(ids)
        except BaseException as error:
            say(f"it does not run with it ({error}): putting the old data back")
            undone(intent)
            raise BackupError(
                f"{job.key}: {error}. The old data is in place again; the restored is in {done.volume}"
            ) from None
        begun_anew(job, state)
        state.save(jobs(job.places))
        intent.unlink()
    ask(["docker", "volume", "rm", done.volume], START_ENGINE)
    return kept


def services(verb: str, ids: Sequence[str]) -> None:
    """Stops or starts these containers; a database has a minute to close in order."""
    if ids and verb == "stop":
        ask(["docker", "stop", "--time=60", *ids], START_ENGINE, seconds=90 * len(ids))
    elif ids:
        ask(["docker", verb, *ids], START_ENGINE, seconds=120)


def undone(intent: Path) -> None:
    """Gives a volume its old data back, however far the exchange had come, and starts its services."""
    known = json.loads(intent.read_text())
    here, fresh, there = (Path(known[name]) for name in ("here", "fresh", "there"))
    there_are = ask(["docker", "ps", "--all", "--quiet", "--no-trunc"], START_ENGINE).split()
    ids = [one for one in known["ids"] if one in there_are]
    if not here.exists() or here.stat().st_ino != known["old"]:
        services("stop", ids)
        if here.exists():
            empty = not any(here.iterdir())  # made by the engine in between
            if fresh.exists() and not empty:
                fresh.rmdir()
            here.rmdir() if empty else here.rename(fresh)
        there.rename(here)
        there.mkdir(mode=0o700)
    # From here on it is the engine's to start them, whatever comes.
    intent.unlink()
    services("start", ids)
    ask(["docker", "volume", "rm", "--force", known["kept"]], START_ENGINE)


def put_right(places: Places) -> bool:
    """Undoes what was interrupted. Whether that could be done: what cannot be stands in nobody else's way."""
    well = True
    for intent in interrupted(places):
        name = f"{intent.parent.parent.name}/{intent.parent.name}"
        say(f"{name}: putting the old data back, since a restore was interrupted")
        try:
            undone(intent)
        except (BackupError, Undecided, OSError, ValueError) as error:
            say(f"{name}: it could not be put back: {error}. Next step: {intent} says which folders are which")
            well = False
    return well


def swept(every: Sequence[Job]) -> None:
    """Removes what a run that was killed has left: containers, passing volumes, folders. Nothing else runs now."""
    with suppress(Undecided):  # the engine; whoever needs it says so
        for one in ask(["docker", "ps", "--all", "--quiet", f"--filter=label={LABEL}"], START_ENGINE).split():
            ask(["docker", "rm", "--force", "--volumes", one], START_ENGINE)
        for name in ask(["docker", "volume", "ls", "--quiet", f"--filter=label={LABEL}"], START_ENGINE).split():
            if PASSING.search(name):
                ask(["docker", "volume", "rm", "--force", name], START_ENGINE)
    for folder in (found for job in every for left in LEFT for found in job.folder.glob(left)):
        shutil.rmtree(folder, ignore_errors=True)


PASSING = re.compile(r"-(drill|unmasked)-\d{8}-\d{6}-\d+$")


def passing(job: Job, what: str) -> str:
    """Names a volume that goes before its run ends, or with the next one (`swept`). It is not called as a volume of
    any other environment than its data's: that one could name it as its own."""
    return f"{job.volume}-{what}-{datetime.now(UTC):%Y%m%d-%H%M%S}-{os.getpid()}"


LEFT = ("unpack-*", "restore-*")


def interrupted(places: Places) -> list[Path]:
    """Exchanges that something has ended in the middle."""
    return sorted((places.state / "backup").glob(f"*/*/{INTENT}"))


@contextmanager
def undisturbed() -> Iterator[None]:
    """Whoever asked may go away meanwhile, or want it to end: it is finished, or undone, first."""
    names = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGPIPE)
    before = {name: signal.signal(name, signal.SIG_IGN) for name in names}
    try:
        yield
    finally:
        for name, handler in before.items():
            signal.signal(name, handler)


def exchanged(here: Path, fresh: Path, there: Path) -> None:
    """Renames folders: what is `here` goes `there`, and what is `fresh` is here. A moment, whatever its size."""
    there.rmdir()
    here.rename(there)
    fresh.rename(here)
    fresh.mkdir(mode=0o700)


def healthy(ids: Sequence[str]) -> None:
    """Waits until these containers run, and are healthy where they can say so. BackupError where one is not in time."""
    deadline = time.monotonic() + HEALTHY_SECONDS
    while True:
        states = [one["State"] for one in inspect("container", *ids)]
        told = [(one.get("Health") or {}).get("Status", one["Status"]) for one in states]
        if all(one in ("healthy", "running") for one in told):
            return
        if time.monotonic() > deadline:
            raise BackupError(f"not healthy after {HEALTHY_SECONDS:g} s: {', '.join(told)}")
        time.sleep(0.5)


def newer(job: Job, until: float) -> str:
    """What would be lost, as text: the volume was written to after the time that is restored. Empty if it was not."""
    newest = max((path.lstat().st_mtime for path in mountpoint(job.volume).rglob("*") if path.is_file()), default=0.0)
    if newest <= until + 1:
        return ""
    return f"{job.volume} was written to until {newest - until:.0f} s after what is restored"


# --- a masked copy for another environment

ROLES = """
select rolname || '|' || format('alter role %I password %L', rolname, rolpassword) from pg_authid
where rolcanlogin and rolpassword is not null
"""
LOGINS = "select rolname from pg_authid where rolcanlogin and rolpassword is not null"


def refreshed(job: Job, to: Job, mask: str, say: Say) -> Restored:
    """The newest backup of `job` in a fresh volume, masked, with the passwords of `to`: ready to be that one's data.

    BackupError, and no volume, where the mask fails: it goes in one transaction for each database. Until it is masked
    it is in a passing volume of `job`'s environment.
    """
    if job.engine != "postgres":
        raise BackupError(f"{job.key} is backed up by {job.engine}, and masks are SQL: only postgres can be refreshed")
    container = to.container()
    server = engines.Postgres.of(container, to.volume, to.declared.get("user"), to.places)
    passwords = dict(line.split("|", 1) for line in server.query(ROLES).splitlines())
    volume = passing(job, "unmasked")
    done = restored(job, source(job, ""), "latest", volume, say)
    done.phases.begin("mask")
    facts = done.snapshot.facts
    try:
        with postgres_on(job, template(job), done.snapshot, volume) as (copy, query):
            recovered(job, copy, query, say)
            # Who logs in where the copy goes does so with its own passwords, and nobody with those of where it is from.
            for role in query(LOGINS).splitlines():
                query(passwords.get(role) or f'alter role "{role}" password null')
            databases, folder = query(engines.DATABASES).splitlines(), mountpoint(volume)
            for database in databases:
                if query(engines.TABLES, database):
                    say(f"{job.key}: masking {database}")
                    masked(copy, facts, database, mask)
            # What the mask has replaced is still in dead rows, in statistics, and in the WAL: dev owns the files.
            for database in databases:
                need_room(folder, int(query(LARGEST, database)))
                query("delete from pg_statistic", database)
                query("delete from pg_statistic_ext_data", database)
                query("vacuum (full)", database, RECOVERY_SECONDS)
                query("analyze", database, RECOVERY_SECONDS)
            logs = query("show log_directory")
            query("checkpoint", seconds=RECOVERY_SECONDS)
        forgotten(job, done.snapshot, volume, logs)
        with volume_made(f"{to.volume}-refresh-{datetime.now(UTC):%Y%m%d-%H%M%S}", job) as fresh:
            folder.rename(mountpoint(fresh))
    finally:
        ask(["docker", "volume", "rm", "--force", volume], START_ENGINE)
    return Restored(to, fresh, done.snapshot, time.time(), done.phases, done.found)


LARGEST = "select coalesce(max(pg_total_relation_size(oid)), 0) from pg_class where relkind in ('r', 'm')"
FORGET = 'cd "$1" && rm -rf -- "$4"/* log/* pg_log/* pg_stat/* pg_stat_tmp/*'


def forgotten(job: Job, snapshot: Snapshot, volume: str, logs: str) -> None:
    """Takes WAL, logs (of that folder) and texts of queries out of a cluster that was stopped in order."""
    facts, like = snapshot.facts, template(job)
    ran_in_volume(job, snapshot, volume, FORGET, logs)
    data = str(Path(facts["mount"]) / facts["inside"])
    options = ("--rm", f"--volume={volume}:{facts['mount']}")
    uid, gid = facts["owner"]
    entry = f"{facts['programs']}/pg_resetwal"
    command = throwaway(job, like, f"--pgdata={data}", user=f"{uid}:{gid}", entry=entry, options=options)
    ask(["docker", "run", *command], START_ENGINE)


def masked(copy: Container, facts: Mapping[str, Any], database: str, mask: str) -> None:
    """Runs the mask in one database of the copy. BackupError with the server's words where it fails."""
    words = [*psql(facts, database), "--single-transaction", "--file=-"]
    done = copy.typed(mask, *words, user=str(facts["owner"][0]))
    if done.returncode:
        raise BackupError(f"the mask failed in {database}, so nothing was replaced: {done.stderr.strip()[-500:]}")


def refresh(args: argparse.Namespace, state: State, places: Places) -> int:
    """Every volume of an environment that is to get a copy, or one: restored, masked, put in place."""
    (environment,) = args.environment
    file = places.declared / "backup" / f"{environment}.json"
    told = read_json(file).get("refresh", {}) if file.exists() else {}
    chosen_ = {key: one for key, one in told.items() if not args.job or {key, one["volume"]} & set(args.job)}
    if not chosen_:
        raise BackupError(
            f"{environment}: no volume says where a copy comes from. Next step: x-bulkhead: {{refresh: {{environment: "
            "prod, mask: mask.sql}}, then make up"
        )
    for key, one in chosen_.items():
        began = time.time()
        job = one_of(jobs(places, [one["environment"]], [key]))
        to = Job(environment, key, {**one, "service": None}, {}, began, 0.0, 0.0, places)
        with wal_meanwhile(job.places):
            done = refreshed(job, to, one["mask"], say)
        if not args.yes:
            say(f"Nothing was changed: the masked copy is in {done.volume}. Next step: with YES=1; or docker volume rm")
            continue
        done.phases.begin("exchange")
        kept = swapped(done, state, say)
        say(f"{to.key}: has a masked copy of {job.key}")
        say(f"What was there is kept as {kept}, until: make restore RELEASE={kept}")
        record = {"job": to.key, "kind": "refresh", "start": began, "end": time.time(), "from": job.key}
        state.record(record | {"phases": done.phases.ended()})
    state.save(jobs(places))
    return 0


# --- drill


def drilled(job: Job, state: State, say: Say) -> bool:
    """Restores the newest backup from every target into a volume that goes again. Whether all of it was there."""
    known, began = state.of(job), time.time()
    drills = int(known.get("drills") or 0)
    known["drill_at"] = began
    record: dict[str, Any] = {"job": job.key, "kind": "drill", "start": began}
    try:
        if not job.repositories:
            raise BackupError(f"{job.key}: no target")
        for target, repository in job.repositories.items():
            say(f"{job.key}: restoring the newest backup from {target}")
            started_at = time.time()
            name = passing(job, "drill")
            with wal_meanwhile(job.places):
                done = restored(job, repository, "latest", name, say)
                ask(["docker", "volume", "rm", name], START_ENGINE)
                if "fewer" in done.found:
                    # Deleted since, as WAL tells, or never saved: as it was then it has them, or this is an error.
                    restored(job, repository, done.snapshot.id, name, say)
                    ask(["docker", "volume", "rm", name], START_ENGINE)
            done.phases.begin("check")
            record[target] = {
                "snapshot": done.snapshot.id,
                "rto": round(time.time() - started_at, 3),
                "rpo": round(began - done.until, 3),
                "found": done.found,
            }
            with between_wal(job, "check"):  # it wants the repository for itself
                part = f"--read-data-subset={drills % CHECKED_IN + 1}/{CHECKED_IN}"
                repository.call("check", part, seconds=RECOVERY_SECONDS)
            record[target]["phases"] = done.phases.ended()
        known |= {
            "last_verified": began,
            "drills": drills + 1,
            "drill_error": None,
            "rto": max(record[target]["rto"] for target in job.repositories),
            "rpo": max(record[target]["rpo"] for target in job.repositories),
        }
        say(f"{job.key}: verified: back in {known['rto']:.1f} s, data of {known['rpo']:.0f} s before")
    except Exception as error:
        known["drill_error"] = record["error"] = said_of(error)
        say(f"{job.key}: DRILL FAILED: {said_of(error)}")
    record["end"] = time.time()
    state.record(record)
    return "error" not in record


# --- the verb


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--environment", action="append", default=[], help="of this environment only")
    parser.add_argument("--job", action="append", default=[], help="this volume only")
    parser.add_argument("--refresh", action="store_true", help="put a masked copy of real data into --environment")
    parser.add_argument("--drill", action="store_true", help="restore the newest, check it, throw it away")
    parser.add_argument("--at", default="latest", help="a time; or a snapshot's id, as it was then")
    parser.add_argument("--target", default="", help="from this target; else the first")
    parser.add_argument("--as-caller", action="store_true", help="with the AWS_… credentials of this command")
    parser.add_argument("--to", default="", help="into a new volume of this name, and leave it there")
    parser.add_argument("--yes", action="store_true", help="put it in place of what is there")
    parser.add_argument("--lose-newer", action="store_true", help="also where that was written to since")
    parser.add_argument("--release-kept", action="store_true", help="keep nothing of what was there")
    parser.add_argument("--release", default="", help="remove a volume that an earlier restore has kept")
    parser.add_argument("--find", default="", help="list the snapshots' files whose names match")
    parser.add_argument("--file", default="", help="bring back one file of a snapshot, into --to (a folder)")


def run(args: argparse.Namespace, places: Places = Places()) -> int:  # noqa: B008 - frozen
    """0: done, 1: it failed or was refused, 2: undecided."""
    os.umask(0o077)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        return asked(args, places)
    except BackupError as error:
        print(error, file=sys.stderr)
        return 1


def say(text: str) -> None:
    """To whoever asked, if they are still there: what was begun is finished without them too."""
    with suppress(OSError):
        print(text, flush=True)


def asked(args: argparse.Namespace, places: Places) -> int:
    if args.release:
        return release(args.release)
    wanted = [] if args.refresh else jobs(places, args.environment, args.job)
    if args.find or args.file:
        return searched(one_of(wanted), args)
    with alone(places, "drill" if args.drill else "refresh" if args.refresh else "restore", WAIT_SECONDS) as free:
        if not free:
            raise BackupError(f"not now: {holder(places)} goes on. Next step: wait for it, then run this again")
        state = State(places)
        put_right(places)
        if args.refresh:
            return refresh(args, state, places)
        if args.drill:
            well = True
            for job in wanted:
                well &= drilled(job, state, say)
                state.save(jobs(places))
            return 0 if well else 1
        return put_back(one_of(wanted), args, state, places)


def one_of(wanted: Sequence[Job]) -> Job:
    if len(wanted) != 1:
        named = ", ".join(job.key for job in wanted) or "none"
        raise BackupError(f"name one volume with its environment; these match: {named}")
    return wanted[0]


def source(job: Job, target: str, *, as_caller: bool = False) -> Repository:
    """A target's repository; `as_caller`: with the credentials of this process, which need only read."""
    if target and target not in job.repositories:
        raise BackupError(f"{target}: no target of {job.key}; known: {', '.join(job.repositories)}")
    found = job.repositories[target] if target else next(iter(job.repositories.values()))
    return replace(found, variables={}, read_only=True) if as_caller else found


def put_back(job: Job, args: argparse.Namespace, state: State, places: Places) -> int:
    """Restores into a fresh volume; then, with --yes, in place of the old one."""
    volume = args.to or f"{job.volume}-restore-{datetime.now(UTC):%Y%m%d-%H%M%S}"
    began = time.time()
    with wal_meanwhile(job.places):
        done = restored(job, source(job, args.target, as_caller=args.as_caller), args.at, volume, say)
    say(f"{job.key}: restored into {volume} and checked, in {time.time() - began:.1f} s: {json.dumps(summary(done))}")
    record = {"job": job.key, "kind": "restore", "start": began, "snapshot": done.snapshot.id}
    if args.to or not args.yes:
        state.record(record | {"end": time.time(), "phases": done.phases.ended(), "volume": volume})
    if args.to:
        return 0
    if not args.yes:
        say(
            "Nothing else was changed. Next step: the same with YES=1 to put it in place; or docker volume rm " + volume
        )
        return 0
    done.phases.begin("exchange")
    if (would := newer(job, done.until)) and not args.lose_newer:
        raise BackupError(f"{would}: nothing was changed. Next step: with LOSE_NEWER=1 to lose that; it is in {volume}")
    kept = swapped(done, state, say)
    state.record(record | {"end": time.time(), "phases": done.phases.ended()})
    state.save(jobs(places))
    if args.release_kept:
        say(f"{job.key}: in place")
        return release(kept)
    say(f"{job.key}: in place. What was there is kept as {kept}, until: make restore RELEASE={kept}")
    return 0


def summary(done: Restored) -> dict[str, Any]:
    return {key: value for key, value in done.found.items() if key != "problems"}


def release(name: str) -> int:
    """Removes a kept volume, and no other."""
    (found,) = inspect("volume", name)
    if KEPT not in (found.get("Labels") or {}):
        raise BackupError(f"{name} is not a volume that a restore has kept: it stays")
    ask(["docker", "volume", "rm", name], START_ENGINE)
    say(f"{name}: removed")
    return 0


def searched(job: Job, args: argparse.Namespace) -> int:
    """Lists files of a snapshot, or brings one back."""
    repository = source(job, args.target, as_caller=args.as_caller)
    snapshot, _ = chosen(job, repository, args.at)
    top = f"/{mountpoint(job.volume).name}" if job.engine == "files" else ""
    if args.file:
        target = Path(args.to or ".") / Path(args.file).name
        with target.open("xb") as file:
            try:
                repository.dump_into(file, snapshot.id, f"{top}/{args.file.lstrip('/')}")
            except BackupError:
                target.unlink()
                raise
        say(f"{target}: {target.stat().st_size} bytes of snapshot {snapshot.id[:8]}")
        return 0
    for path in (path.removeprefix(top) for path in repository.files(snapshot.id)):
        if Path(path).match(args.find):
            say(f"{snapshot.id[:8]}  {path}")
    return 0
