"""backup: runs the jobs that deploys declared when they are due, records every run, and says what is overdue.

One run at a time on a host. A job is tried again with growing pauses until it succeeds; nothing that it did before
counts as a backup. What is declared is `/etc/bulkhead/backup/<environment>.json`, which only root may read.
"""

import argparse
import fcntl
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from importlib import import_module
from pathlib import Path
from typing import Any

from host import engines, restic
from host.engines import Container, Postgres, Redis
from host.machine import Places, Undecided, deploying, read_json, regularly, write
from host.restic import BackupError, Repository, Snapshot
from host.watch import program

FIRST_PAUSE, LONGEST_PAUSE = 60.0, 3600.0
JITTER = 0.1
"""Part of its period by which a job is early, always the same for the same job: not all at three o'clock."""
RESTORE_LABEL = "bulkhead.restore"
"""Of the containers and volumes that a restore or a drill makes."""
DRILL_AFTER = 3600.0
"""Seconds after the first backup until it is first drilled: a deploy has ended by then."""
WAL_SECONDS = 45
WAL_OVERDUE_SECONDS = 1800.0
"""A backup of a large database may hold it up for a while: one run at a time."""
OVERDUE = 1.5
"""Periods after which a job that has not succeeded is overdue."""
UNPRUNED = 2
WAL_UNPRUNED = 20_000
"""Times the base backups that are to be kept, and snapshots of WAL (ten days' worth), beyond which somebody is told
that nobody prunes a bucket."""
LOWEST = ("nice", "-n", "19", "ionice", "-c", "3")
"""What is due runs with the lowest claims on CPU and disk; where systemd starts it, its unit says the same."""
LIMIT_SECONDS = 12 * 3600
STOP_SECONDS = 60.0
WAIT_SECONDS = 900.0
"""What somebody who asks by hand waits for a run of the schedule."""
SLOT_BYTES = 2 * 2**30
"""WAL that a server may keep for us. Beyond it the slot is given up, and a new base backup is made: a target that is
away must not fill prod's disk."""
SPOOL_FREE = 0.1
"""Share of the disk below which what is free is prod's, and not for WAL that no target takes."""
RECORDS_BYTES = 4 * 2**20
WAL_KEPT = {"last": 3, "daily": 2}
"""Each snapshot of WAL has all that is on the host, which goes back to the base backup before the last."""
STATES_KEPT = 10
CLOCK_SECONDS = 60.0
"""By which two times may be the wrong way round before the clock was set back: time servers move it a little."""
LAST = ("last_success", "last_verified")
"""What a deploy asks of each volume."""
RUNS = "backup.lock"
"""Of backups, drills and restores there is one at a time."""


@dataclass(frozen=True)
class Job:
    """A backup of one volume, as declared; see `settings.backup.Backup` for its fields.

    `since`: when it was declared, in seconds since 1970. `verified_within`, `drill`: as in `BackupSettings`.
    """

    environment: str
    name: str
    declared: Mapping[str, Any]
    repositories: Mapping[str, Repository]
    since: float
    verified_within: float
    drill: float
    places: Places

    @property
    def key(self) -> str:
        return f"{self.environment}/{self.name}"

    @property
    def volume(self) -> str:
        return str(self.declared["volume"])

    @property
    def names(self) -> frozenset[str]:
        """What a user may call it: the volume as in the Compose file or as on the engine, or its service."""
        return frozenset({self.name, self.volume, str(self.declared["service"])})

    @property
    def engine(self) -> str:
        return str(self.declared["engine"])

    @property
    def every(self) -> float:
        return float(self.declared["schedule"])

    @property
    def targets(self) -> list[Repository]:
        """Its repositories, folders first: a bucket that does not answer holds up nothing that is here."""
        return sorted(self.repositories.values(), key=lambda one: one.in_bucket)

    @property
    def wal(self) -> bool:
        """Whether it has WAL, and so can be brought back as it was at any second."""
        return self.engine == "postgres"

    @property
    def folder(self) -> Path:
        """What it keeps on the host."""
        return self.places.state / "backup" / self.environment / self.name

    @property
    def spool(self) -> Path:
        return self.folder / "wal"

    def container(self) -> Container:
        return engines.of_service(self.environment, self.volume, self.declared.get("service"))


def jobs(places: Places, environments: Sequence[str] = (), names: Sequence[str] = ()) -> list[Job]:
    """The declared jobs. BackupError for a name that no deploy has declared."""
    found: list[Job] = []
    for file in sorted((places.declared / "backup").glob("*.json")):
        if not environments or file.stem in environments:
            found += told(file.stem, read_json(file), file.stat().st_mtime, places)
    known = {word for job in found for word in job.names}
    for name in names:
        if name not in known:
            raise BackupError(f"{name}: no such backup. Next step: declare it (x-bulkhead.backup); known: "
                              f"{', '.join(sorted(job.key for job in found)) or 'none'}")  # fmt: skip
    return [job for job in found if not names or job.names & set(names)]


def told(environment: str, declared: Mapping[str, Any], since: float, places: Places) -> Iterator[Job]:
    """The jobs of an environment, as its stack hands them over."""
    for name, job in sorted(declared["jobs"].items()):
        repositories = {
            target: Repository(
                where["repository"],
                declared["password"],
                places.state / "backup/cache",
                where["variables"],
                where["append_only"],
                mark=places.state / "backup/repositories" / hashlib.sha256(where["repository"].encode()).hexdigest(),
            )
            for target, where in job["targets"].items()
        }
        within = (float(declared["verified_within"]), float(declared["drill"]))
        yield Job(environment, name, job, repositories, since, *within, places)


# --- what is known of each job


class State:
    """What is known of each job, by key: `last_success`, `last_verified`, `failures`, ... (seconds since 1970).

    What is known of WAL is in a file for each environment, since WAL is archived while a base backup or a drill goes
    on, by another process: who holds that environment's lock (`between_wal`) writes it, all at once, and nobody else.
    """

    def __init__(self, places: Places) -> None:
        self._folder = places.state / "backup"
        self._file = self._folder / "state.json"
        self._records = self._folder / "records.jsonl"
        self._metrics = places.state / "metrics/backup.prom"
        self.jobs = _entries(self._file)

    def of(self, job: Job) -> dict[str, Any]:
        """A job's entry, without its WAL."""
        return self.jobs.setdefault(job.key, {"failures": 0})

    def known(self, job: Job) -> dict[str, Any]:
        """All that is known of a job, its WAL as it is now."""
        return self.of(job) | _entries(self._wal(job)).get(job.key, {})

    def _wal(self, job: Job) -> Path:
        return self._folder / f"wal-{job.environment}.json"

    def note_wal(self, job: Job, **new: Any) -> None:
        """Notes what is new of a job's WAL."""
        entries = _entries(self._wal(job))
        entries[job.key] = entries.get(job.key, {}) | new
        _write_entries(self._wal(job), entries)

    def save(self, declared: Sequence[Job]) -> None:
        _write_entries(self._file, self.jobs)
        self.tell(declared)

    def tell(self, declared: Sequence[Job]) -> None:
        """Writes the metrics."""
        write(self._metrics, metrics(self, declared))

    def record(self, record: Mapping[str, Any]) -> None:
        """Adds a line to the records; the oldest half goes when they grow too long."""
        self._records.parent.mkdir(parents=True, exist_ok=True)
        if self._records.exists() and self._records.stat().st_size > RECORDS_BYTES:
            lines = self._records.read_text().splitlines(keepends=True)
            write(self._records, "".join(lines[len(lines) // 2 :]))
        with self._records.open("a") as file:
            file.write(json.dumps(record, sort_keys=True) + "\n")


def _entries(file: Path) -> dict[str, dict[str, Any]]:
    try:
        found: dict[str, dict[str, Any]] = json.loads(file.read_text())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise Undecided(f"{file}: {error}. Next step: remove it; every backup is then made anew") from None
    return found


def _write_entries(file: Path, entries: Mapping[str, Any]) -> None:
    write(file, json.dumps(entries, indent=1, sort_keys=True) + "\n")


def gap(known: Mapping[str, Any]) -> str:
    """What is missing in a job's WAL since its last base backup; empty where that and its WAL fit together."""
    return str(known["gap"]) if known.get("gap") and known["gap_at"] > (known.get("last_success") or 0) else ""


def noted(at: float | None, now: float) -> float:
    """A time that was noted; 0 where there is none, or one in the future: the clock was set back since, by an hour or
    by years, and nothing may wait for it to come there again."""
    return float(at) if at and at <= now + CLOCK_SECONDS else 0.0


def due_at(job: Job, known: Mapping[str, Any], now: float) -> float:
    """When a job is to run next, in seconds since 1970."""
    if known["failures"]:
        pause = min(LONGEST_PAUSE, FIRST_PAUSE * 2.0 ** (int(known["failures"]) - 1))
        return noted(known["last_attempt"], now) + pause
    succeeded = noted(known.get("last_success"), now)
    if known.get("wanted") or gap(known) or not succeeded:
        return 0.0
    after = succeeded + job.every
    minutes = job.declared.get("at")
    early = zlib.crc32(job.key.encode()) / 2**32 * JITTER
    if minutes is None:
        return after - job.every * early
    # The nearest such time of the day to a whole period after the last one; jobs of the same time follow each other.
    day = datetime.fromtimestamp(after).replace(hour=minutes // 60, minute=minutes % 60, second=0, microsecond=0)
    return min(
        (day + timedelta(days=days) for days in (-1, 0, 1)), key=lambda one: abs(one.timestamp() - after)
    ).timestamp()


def drill_due_at(job: Job, known: Mapping[str, Any], now: float) -> float:
    """When a job's newest backup is to be restored next, to see that it can be."""
    if known.get("drill_error") and known.get("drill_at"):
        return noted(known["drill_at"], now) + LONGEST_PAUSE
    if known.get("last_verified"):
        return noted(known["last_verified"], now) + job.drill
    return noted(known["last_success"], now) + DRILL_AFTER if known.get("last_success") else float("inf")


def wal_due_at(known: Mapping[str, Any], now: float) -> float:
    return noted(known.get("wal_at"), now) + WAL_SECONDS


def alarms(job: Job, known: Mapping[str, Any], now: float) -> Iterator[tuple[str, str]]:
    """What somebody has to look at: what it is, and what is known. The clock alone judges, whatever ran or did not."""
    since = float(known.get("last_success") or job.since)
    latest = max(since, *(float(known.get(what) or 0) for what in ("wal_at", "last_verified", "drill_at")))
    if latest > now + CLOCK_SECONDS:
        yield "clock", f"a backup or drill was {latest - now:.0f} s in the future: the clock was set back"
    if now - since > job.every * OVERDUE:
        yield "overdue", f"last success {ago(known.get('last_success'), now)}; wanted every {job.every:g} s"
    if known["failures"]:
        yield "failed", f"{known['failures']} times: {known.get('error')}"
    if known.get("wal_error"):
        yield "WAL failed", str(known["wal_error"])
    if job.wal and now - (noted(known.get("wal_at"), now) or job.since) > WAL_OVERDUE_SECONDS:
        yield "WAL overdue", f"in the targets up to {ago(known.get('wal_at'), now)}"
    if known.get("shrunk"):
        yield "shrunk", str(known["shrunk"])
    if known.get("unpruned"):
        yield "not pruned", str(known["unpruned"])
    if missing := gap(known):
        yield "gap", missing
    verified = float(known.get("last_verified") or job.since)
    if now - verified > job.verified_within:
        yield "not verified", f"last verified restore {ago(known.get('last_verified'), now)}"
    if known.get("drill_error"):
        yield "drill failed", str(known["drill_error"])


def alarming(places: Places) -> Iterator[tuple[Job, str, str]]:
    """Every alarm: the job, what it is, what is known."""
    state, now, waiting = State(places), time.time(), held(places)
    for job in jobs(places):
        for what, known in alarms(job, state.known(job), now):
            yield job, what, known
        if job.environment in waiting:
            yield job, "held", "not backed up by schedule: its data was yet to come back: make restore for each volume"


def ago(at: float | None, now: float) -> str:
    if not at:
        return "never"
    return f"{datetime.fromtimestamp(at, UTC):%Y-%m-%d %H:%M:%S} UTC ({now - at:.0f} s ago)"


def metrics(state: State, declared: Sequence[Job]) -> str:
    """The state in Prometheus' text format."""
    series = (
        ("last_success_timestamp_seconds", "When the last backup succeeded.", "last_success"),
        ("last_verified_timestamp_seconds", "When a restore of a backup was last checked.", "last_verified"),
        ("wal_timestamp_seconds", "Up to when WAL is in the targets.", "wal_at"),
        ("failures", "Failed attempts since the last success.", "failures"),
        ("size_bytes", "Of the last backup.", "size"),
        ("added_bytes", "That were new in the last backup.", "added"),
        ("seconds", "That the last backup took.", "seconds"),
        ("wal_seconds", "That it took to bring the last WAL into the targets.", "wal_seconds"),
        ("rto_seconds", "That the last drill took until the service answered.", "rto"),
        ("rpo_seconds", "That the last drill's data was old.", "rpo"),
    )
    lines, known = [], {job.key: state.known(job) for job in declared}
    for name, text, key in series:
        lines += [f"# HELP bulkhead_backup_{name} {text}", f"# TYPE bulkhead_backup_{name} gauge"]
        for job in declared:
            value = known[job.key].get(key) or 0
            lines.append(f'bulkhead_backup_{name}{{environment="{job.environment}",job="{job.name}"}} {value:.15g}')
    return "\n".join(lines) + "\n"


# --- running


class Phases:
    """How long each phase of a run took, in seconds: one goes on until the next begins, and what comes again adds up.

    A backup's: `server` (what is asked of it), `rows` (counted), `save` (its checkpoint included), `copy` (into further
    targets), `forget`. A restore's, of PostgreSQL: `prepare`, `unpack`, `WAL` (fetched), `recovery`, `rows`, `verify`,
    `stop`, `exchange`; of Redis `load`, of a masked copy `mask`, of a drill `check`.
    """

    def __init__(self, first: str) -> None:
        self.seconds: dict[str, float] = {}
        self._name, self._since = first, time.monotonic()

    def begin(self, name: str) -> None:
        now = time.monotonic()
        took = self.seconds.get(self._name, 0.0) + now - self._since
        self.seconds[self._name] = round(took, 3)
        self._name, self._since = name, now

    def ended(self) -> dict[str, float]:
        """All of them, the one that goes on included."""
        self.begin(self._name)
        return self.seconds


@contextmanager
def alone(places: Places, what: str, wait: float = 0.0, lock: str = RUNS) -> Iterator[bool]:
    """Whether nothing else of this kind runs, after waiting for it for so many seconds. The lock goes with its process,
    however that ends; its file says whose it is and since when."""
    places.run.mkdir(parents=True, exist_ok=True)
    deadline, told = time.monotonic() + wait, False
    with (places.run / lock).open("a+") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() >= deadline:
                    yield False
                    return
            if not told:
                told = True
                print(f"waiting for {holder(places, lock)}", file=sys.stderr, flush=True)
            time.sleep(0.2)
        file.truncate(0)
        file.write(json.dumps({"pid": os.getpid(), "what": what, "since": time.time()}))
        file.flush()
        yield True


def holder(places: Places, lock: str = RUNS) -> str:
    """Who holds a lock, as text."""
    try:
        held = json.loads((places.run / lock).read_text())
        return f"{held['what']}, process {held['pid']}, for {time.time() - held['since']:.0f} s"
    except (OSError, ValueError, KeyError):
        return "another run"


def stop(places: Places) -> int:
    """Ends the run that goes on, and waits until it has. What it has not finished is no backup."""
    with alone(places, "stop") as free:
        if free:
            return 0
    with suppress(OSError, ValueError, KeyError):
        os.kill(int(json.loads((places.run / RUNS).read_text())["pid"]), signal.SIGTERM)
    with alone(places, "stop", STOP_SECONDS) as free:
        return 0 if free else 2


def back_up(job: Job, state: State, say: Callable[[str], None], *, hurry: bool, rate: int = 0) -> bool:
    """One backup of a job into all its targets. Returns whether it succeeded; the reason is in state and records.
    `rate`: bytes a second that it reads or stores at most; 0 for no ceiling."""
    known, started = state.of(job), time.time()
    known["last_attempt"] = started
    record: dict[str, Any] = {"job": job.key, "kind": "backup", "start": started}
    phases = Phases("server")
    say(f"{job.key}: backing up")
    try:
        with wal_meanwhile(job.places):
            snapshot = saved(job, phases, hurry=hurry, rate=rate)
            less = shrunk(job, known.get("whole"), snapshot)
            if not less:
                known["whole"] = {"size": snapshot.size, "rows": snapshot.facts.get("rows")}
                phases.begin("forget")
                for repository in job.targets:  # without the ceiling: WAL waits for it
                    prune(job, repository)
        known |= {
            "last_success": started,
            "failures": 0,
            "error": None,
            "wanted": False,
            "snapshot": snapshot.id,
            "facts": snapshot.facts,
            "size": snapshot.size,
            "added": snapshot.added,
            "seconds": round(time.time() - started, 3),
            "shrunk": less,
            "unpruned": unpruned(job, job.targets),
        }
        record |= {"snapshot": snapshot.id, "new": snapshot.added, "total": snapshot.size, "facts": snapshot.facts}
        say(f"{job.key}: {snapshot.size} bytes, {snapshot.added} new, snapshot {snapshot.id[:8]}")
    except Exception as error:  # what runs in an environment may answer anything, and other jobs wait for this one
        known |= {"failures": known["failures"] + 1, "error": said_of(error)}
        record["error"] = said_of(error)
        say(f"{job.key}: FAILED: {said_of(error)}")
    record |= {"end": time.time(), "phases": phases.ended()}
    state.record(record)
    return "error" not in record


def ceiling(job: Job, known: Mapping[str, Any]) -> int:
    """Bytes a second that a scheduled run reads or stores at most: as declared, but more where as much as last time
    would not be there in half its period, or half of what a run may take. 0 for no ceiling."""
    declared = int(job.declared.get("rate") or 0)
    needed = int(known.get("size") or 0) / (min(job.every, LIMIT_SECONDS) / 2)
    return max(declared, round(needed)) if declared else 0


def saved(job: Job, phases: Phases, *, hurry: bool, rate: int) -> Snapshot:
    """Takes the backup: into the first target from the source, into the others from there. That restic can where one
    of two needs credentials only, so a second bucket gets a backup of its own."""
    targets = [replace(one, rate=rate) for one in job.targets]
    if not targets:
        raise BackupError(f"{job.key}: no target. Next step: name one under bulkhead:backup in Pulumi.host.yaml")
    first, *others = targets
    snapshot = TAKE[job.engine](job, first, hurry, phases)
    for other in others:
        if first.variables and other.variables != first.variables:
            phases.begin("server")
            TAKE[job.engine](job, other, hurry, phases)
        else:
            phases.begin("copy")
            other.copy_from(first, snapshot.id)
    return snapshot


def shrunk(job: Job, whole: Mapping[str, Any] | None, now: Snapshot) -> str | None:
    """What a backup has much less of than the last one that had all: bytes, or rows of the tables that were counted
    both times, since an emptied database is not smaller. Until it has it again, or somebody says that this is the data
    (--anew), it is compared with that one, and older ones are not let go of: they are what is asked for next."""
    if not whole:
        return None
    least = 1 - float(job.declared.get("shrink", 0.5))
    counted = now.facts.get("rows") or {}
    rows = {name: count for name, count in (whole["rows"] or {}).items() if None not in (count, counted.get(name, 0))}
    amounts = {
        "bytes": (whole["size"], now.size),
        "rows": (sum(rows.values()), sum(counted.get(name, 0) for name in rows)),
    }
    less = [f"from {before} to {there} {what}" for what, (before, there) in amounts.items() if there < before * least]
    if not less:
        return None
    return (
        f"{', '.join(less)} since the last that had all. No backup is let go of meanwhile. "
        f"If this is the data: make backup ENV={job.environment} ARGS=--anew"
    )


def prune(job: Job, repository: Repository) -> None:
    """Lets go of the base backups that are not kept, in one target, and of the WAL before the last but one: of what is
    older, each base backup comes back as it was."""
    with alone(job.places, "prune", WAIT_SECONDS, wal_lock(job)) as free:
        if not free:
            return  # WAL takes long, as after a target was away: the next run lets go of it
        bases, gone = repository.forget(job.declared["retain"], f"job:{job.name}", "kind:base")
        if job.wal and len(bases) > 2:
            gone |= repository.forget(WAL_KEPT, f"job:{job.name}", "kind:wal")[1]
        if gone:
            repository.prune()


def unpruned(job: Job, targets: Sequence[Repository]) -> str | None:
    """Says where much more is than is to be kept: the host cannot let go of it there itself."""
    kept = sum(count for count in job.declared["retain"].values() if count)
    for repository in targets:
        if repository.append_only:
            kinds = Counter(one.kind for one in repository.snapshots(f"job:{job.name}"))
            if kinds["base"] > UNPRUNED * kept or kinds["wal"] > WAL_UNPRUNED:
                return (
                    f"{kinds['base']} backups in {repository.url}, and {kinds['wal']} times WAL; "
                    f"at most {kept} backups are to be kept"
                )
    return None


def prune_states(repository: Repository) -> None:
    """Lets go of all but the newest of what was stored beside the backups."""
    if repository.forget({"last": STATES_KEPT}, "kind:state")[1]:
        repository.prune()


def take_postgres(job: Job, repository: Repository, hurry: bool, phases: Phases) -> Snapshot:
    """A base backup with all the WAL that it needs, and the rows that every table had just before."""
    server = Postgres.of(job.container(), job.volume, job.declared.get("user"), job.places)
    server.end_bases()  # there is one at a time, so nobody reads what still goes on
    with between_wal(job, "backup"):
        server.hold()
        facts = server.facts() | {"at": time.time(), "history": history(job, server)[0], "position": server.position()}
    phases.begin("rows")
    facts["rows"] = engines.counted(server.query, server.script, engines.COUNT_SECONDS)
    phases.begin("save")
    tags = restic.tags(job.name, "base", facts)
    try:
        return repository.save_stream(server.base(hurry=hurry, rate=repository.rate), "base.tar", tags, LIMIT_SECONDS)
    except BaseException:  # restic has ended by now: what would look to it like the end of the file is none any more
        with suppress(BackupError):
            server.end_bases()
        raise


def take_redis(job: Job, repository: Repository, _hurry: bool, phases: Phases) -> Snapshot:
    server = Redis(job.container())
    command, variables = server.snapshot()
    facts = server.facts(job.volume) | {"at": time.time()}
    tags = restic.tags(job.name, "base", facts)
    phases.begin("save")
    return repository.save_stream(command, "dump.rdb", tags, LIMIT_SECONDS, variables)


def take_files(job: Job, repository: Repository, _hurry: bool, phases: Phases) -> Snapshot:
    before, after = job.declared.get("before"), job.declared.get("after")
    container = job.container() if before or after else None
    with engines.quiet(container, before, after):
        tags = restic.tags(job.name, "base", {"engine": "files", "at": time.time()})
        phases.begin("save")
        return repository.save_folder(engines.mountpoint(job.volume), tags, LIMIT_SECONDS)


TAKE: Mapping[str, Callable[[Job, Repository, bool, Phases], Snapshot]] = {
    "postgres": take_postgres,
    "redis": take_redis,
    "files": take_files,
}


def archive(job: Job, state: State, say: Callable[[str], None]) -> bool:
    """Brings the WAL that is new into all targets. A gap in it makes a new base backup due."""
    started = time.time()
    try:
        with between_wal(job, "WAL"):
            try:
                _archive(job, state, started, say)
            except Exception as error:
                state.note_wal(job, wal_error=said_of(error))
                raise
    except Exception as error:
        say(f"{job.key}: WAL: FAILED: {said_of(error)}")
        state.record({"job": job.key, "kind": "wal", "start": started, "end": time.time(), "error": said_of(error)})
        return False
    return True


def _archive(job: Job, state: State, started: float, say: Callable[[str], None]) -> None:
    unsaved = set(state.known(job).get("unsaved") or ())
    server = Postgres.of(job.container(), job.volume, job.declared.get("user"), job.places)
    name, another = history(job, server)
    server.hold()
    position = server.position()
    # First: what is copied is not kept by the server any more, and is in no target if this ends in between.
    waiting = [repository.url for repository in job.targets]
    state.note_wal(job, unsaved=waiting)
    dear = bool(unsaved) or job.environment in best_effort(job.places)
    try:
        copied, missing = (0, False) if dear and full(job.spool) else server.archive(job.spool)
    finally:
        server.let_go(SLOT_BYTES, max(SLOT_BYTES, shutil.disk_usage(server.folder).free // 2))
    if dear and full(job.spool):
        shutil.rmtree(job.spool)
        why = "no target has taken WAL until its disk was nearly full; a new base backup follows"
        state.note_wal(job, unsaved=[], gap=why, gap_at=started)
        raise BackupError(why)
    if another or missing:
        what = "another cluster is in the volume" if another else f"WAL is missing before {ago(started, started)}"
        why = f"{what}; a new base backup follows"
        state.note_wal(job, gap=why, gap_at=started)
        say(f"{job.key}: {why}")
    for repository in job.targets:
        if copied or repository.url in unsaved:
            facts = {"engine": "postgres", "at": started, "position": position, "history": name}
            repository.save_folder(job.spool, restic.tags(job.name, "wal", facts), LIMIT_SECONDS)
        waiting.remove(repository.url)
        state.note_wal(job, unsaved=waiting)
    state.note_wal(job, wal_at=started, wal_error=None, wal_seconds=round(time.time() - started, 3))


def wal_lock(job: Job) -> str:
    """Keeps apart what archives an environment's WAL, what wants its repositories for itself, and what begins anew."""
    return f"wal-{job.environment}.lock"


@contextmanager
def between_wal(job: Job, what: str) -> Iterator[None]:
    """While no other process archives WAL of the job's environment. BackupError where one does for too long."""
    with alone(job.places, what, WAIT_SECONDS, wal_lock(job)) as free:
        if not free:
            raise BackupError(f"{holder(job.places, wal_lock(job))} has not ended in time. It is tried again")
        yield


@contextmanager
def wal_meanwhile(places: Places) -> Iterator[None]:
    """Has WAL archived while the body takes hours: else all that is written meanwhile is lost with the host.

    A process for each environment, so that dev's server, which may answer as slowly as it likes, holds up its own only.
    """
    children = dict[str, "subprocess.Popen[bytes]"]()
    command = restic.ends_too([*program(), "backup", "--wal", "--environment"], "TERM")

    def bring() -> None:
        for name in sorted({job.environment for job in jobs(places) if job.wal}):
            if name not in children or children[name].poll() is not None:
                children[name] = subprocess.Popen([*command, name], stdin=subprocess.DEVNULL, stdout=sys.stderr)

    try:
        with regularly(WAL_SECONDS, bring):
            yield
    finally:
        for child in children.values():
            child.terminate()
        for child in children.values():
            child.wait()


def said_of(error: Exception) -> str:
    """An error in words; of one that nobody has foreseen, its kind too."""
    foreseen = (BackupError, Undecided, OSError, subprocess.SubprocessError)
    return str(error) if isinstance(error, foreseen) else f"{type(error).__name__}: {error}"


def history(job: Job, server: Postgres) -> tuple[str, bool]:
    """What base backups and WAL that fit to each other have in common, and whether it has just become another one.

    That is so for another cluster in the volume, and for one that was restored (`begun_anew`).
    """
    file, cluster = job.folder / "history", server.cluster()
    before = file.read_text() if file.exists() else ""
    if before.partition("-")[0] == cluster:
        return before, False
    if before:
        put_away(job)
    name = f"{cluster}-{time.time_ns()}"
    write(file, name)
    return name, bool(before)


def put_away(job: Job) -> None:
    """WAL of a history that has ended: of no use to the next one."""
    if job.spool.exists():
        job.spool.rename(job.spool.with_name(f"wal-{datetime.now(UTC):%Y%m%d-%H%M%S-%f}"))


def full(spool: Path) -> bool:
    """Whether the WAL on the host takes the last of its disk, since no target has taken it for too long."""
    if not spool.exists():
        return False
    usage = shutil.disk_usage(spool)
    held = sum(file.stat().st_size for file in spool.iterdir())
    return usage.free < usage.total * SPOOL_FREE and held > SLOT_BYTES


def begun_anew(job: Job, state: State) -> None:
    """Another history begins in the job's volume: its WAL fits to no backup that is there, so a new one is wanted."""
    state.of(job)["wanted"] = True
    state.of(job).pop("whole", None)  # whoever restores an older one means it
    with alone(job.places, "restore", WAIT_SECONDS, wal_lock(job)):  # whoever has it then: this must be done
        (job.folder / "history").unlink(missing_ok=True)
        put_away(job)


def trim(job: Job) -> None:
    """Lets go of the WAL on the host from before the base backup before the last."""
    repository = job.targets[0]
    bases = repository.snapshots(f"job:{job.name}", "kind:base")
    if len(bases) > 2:
        oldest = bases[-2].at.timestamp()
        for segment in job.spool.glob("*"):
            if engines.SEGMENT.fullmatch(segment.name) and segment.stat().st_mtime < oldest - 3600:
                segment.unlink()
        for other in job.folder.glob("wal-*"):
            if other.stat().st_mtime < oldest - 3600:
                shutil.rmtree(other)


# --- the verb


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--environment", action="append", default=[], help="of this environment only")
    parser.add_argument("--job", action="append", default=[], help="this volume only")
    parser.add_argument("--due", action="store_true", help="only what is due; says nothing if nothing is")
    parser.add_argument("--wal", action="store_true", help="only WAL that is due, also while another run goes on")
    parser.add_argument("--stop", action="store_true", help="end the run that goes on")
    parser.add_argument("--background", action="store_true", help="in a process of its own")
    parser.add_argument("--store", metavar="NAME", default="", help="standard input, with the backups of --environment")
    parser.add_argument("--anew", action="store_true", help="this is the data: into a new repository where one is gone")
    parser.add_argument("--rate", type=int, metavar="MIB", help="at most so much a second; else of --due as declared")
    parser.add_argument("--list", action="store_true", help="the snapshots, newest last")
    parser.add_argument("--last", action="store_true", help="each volume's last success and check, as JSON")
    parser.add_argument("--json", action="store_true", help="the report for a program")


def run(args: argparse.Namespace, places: Places = Places()) -> int:  # noqa: B008 - frozen
    """0: done, 1: a backup failed, 2: undecided."""
    os.umask(0o077)
    if args.stop:
        return stop(places)
    restore = import_module("host.restore")  # all of the program, before a deploy puts another in its place
    try:
        every, wanted = jobs(places), jobs(places, args.environment, args.job)
    except BackupError as error:
        print(error, file=sys.stderr)
        return 1
    if args.anew and not args.environment:
        print("--anew: name the environment, since it says that its data is as it should be", file=sys.stderr)
        return 1
    if args.list:
        return show(wanted, args.json)
    state = State(places)
    if args.last:
        print(json.dumps({job.volume: {key: state.of(job).get(key) for key in LAST} for job in wanted}))
        return 0
    now = time.time()
    if args.due:
        under_way = deploying(places) | held(places)
        wanted = [job for job in wanted if job.environment not in under_way and is_due(job, state, now)]
        if not wanted and not restore.interrupted(places):
            state.tell(every)
            return 0
    if args.background:
        return in_background(args)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    if args.wal:
        return 0 if behind(wanted, state, every, places) else 1
    if args.store:
        return stored(wanted, args.store, sys.stdin.buffer.read(), places)
    with alone(places, "backup", 0 if args.due else WAIT_SECONDS) as free:
        if not free:
            if not args.due:
                print(f"not now: {holder(places)} goes on. Next step: wait for it", file=sys.stderr)
            return 0 if args.due else 2
        state = State(places)
        well = bool(restore.put_right(places))
        restore.swept(every)
        for environment in sorted(held(places) & {job.environment for job in wanted}):
            if args.anew:
                (places.declared / f"backup/{environment}.held").unlink()
                continue
            print(
                f"{environment}: its data was yet to come back. Next step: make restore for each volume; then, "
                f"or if this is the data: make backup ENV={environment} ARGS=--anew",
                file=sys.stderr,
            )
            wanted, well = [job for job in wanted if job.environment != environment], False
        for job in wanted if args.anew else ():
            state.of(job).pop("whole", None)
            for mark in (one.mark for one in job.targets if one.mark):
                mark.unlink(missing_ok=True)
        last, unnoted = best_effort(places), False
        for job in sorted(wanted, key=lambda job: job.environment in last):
            try:
                well &= worked(job, state, args, every)
            except OSError as error:  # as of a full disk: what the others need may be on another one
                print(f"{job.key}: FAILED, and could not be noted: {error}. Next step: df", file=sys.stderr)
                unnoted = True
    if args.json:
        print(json.dumps({job.key: state.known(job) for job in wanted}, indent=1))
    return 2 if unnoted else 0 if well else 1


def behind(wanted: Sequence[Job], state: State, every: Sequence[Job], places: Places) -> bool:
    """Archives the WAL that is due. Whether it all went well."""
    without, now, done = deploying(places) | held(places), time.time(), []
    for job in (one for one in wanted if one.wal and one.environment not in without):
        with alone(places, "WAL", lock=wal_lock(job)) as free:
            pass  # else somebody is at it, or at what wants the repository for itself
        if free and wal_due_at(state.known(job), now) <= now:
            done.append(archive(job, state, print))
    state.tell(every)
    return all(done)


def held(places: Places) -> frozenset[str]:
    """Environments whose data is yet to come: a backup of them as they are now would become the newest."""
    return frozenset(file.stem for file in (places.declared / "backup").glob("*.held"))


def best_effort(places: Places) -> frozenset[str]:
    """Environments whose backups come after the others'."""
    try:
        environments = read_json(places.declared / "host.json")["environments"]
    except Undecided:
        return frozenset()
    return frozenset(name for name, one in environments.items() if one["tier"] == "best-effort")


def stored(wanted: Sequence[Job], name: str, data: bytes, places: Places) -> int:
    """Saves data as a file in every repository of these jobs; the newest ten are kept."""
    repositories = {one.url: one for job in wanted for one in job.targets}
    facts = {"engine": "state", "at": time.time()}
    with alone(places, "backup", WAIT_SECONDS) as free, tempfile.NamedTemporaryFile() as file:
        if not free:
            print(f"not now: {holder(places)} goes on. Next step: make up again", file=sys.stderr)
            return 2
        file.write(data)
        file.flush()
        failed = 0
        for repository in repositories.values():
            try:
                tags = restic.tags(name, "state", facts)
                repository.save_stream(["cat", file.name], f"{name}.tar.gz", tags, LIMIT_SECONDS)
                prune_states(repository)
            except BackupError as error:
                failed += 1
                print(error, file=sys.stderr)
    if failed:
        return 1
    print(f"settings and state are with the backups, in {len(repositories)} targets")
    return 0


def is_due(job: Job, state: State, now: float) -> bool:
    known = state.known(job)
    times = [due_at(job, known, now), drill_due_at(job, known, now), *([wal_due_at(known, now)] if job.wal else [])]
    return min(times) <= now


def worked(job: Job, state: State, args: argparse.Namespace, every: Sequence[Job]) -> bool:
    """One job: its backup, its WAL, its drill. The state is saved after each: a kill loses at most one of them."""
    from host import restore  # it builds on this module

    def say(text: str) -> None:
        print(text, file=sys.stderr if args.json else sys.stdout, flush=True)

    well, now, known = True, time.time(), state.of(job)
    if not args.due or due_at(job, state.known(job), now) <= now:
        rate = args.rate * 2**20 if args.rate else ceiling(job, known) if args.due else 0
        well = back_up(job, state, say, hurry=not args.due, rate=rate)
        state.save(every)
    if job.wal:
        archived = archive(job, state, say)
        if archived and known.get("trimmed") != known.get("snapshot"):
            trim(job)
            known["trimmed"] = known.get("snapshot")
        well &= archived
        state.save(every)
    if args.due and drill_due_at(job, known, now) <= now:
        well &= restore.drilled(job, state, say)
        state.save(every)
    return well


def in_background(args: argparse.Namespace) -> int:
    """Starts what is due in a session of its own, with the lowest claims on CPU and disk."""
    options = [f"--environment={one}" for one in args.environment] + [f"--job={one}" for one in args.job]
    subprocess.Popen(
        [*LOWEST, *program(), "backup", "--due", *options],
        stdin=subprocess.DEVNULL,
        start_new_session=True,
    )
    return 0


def show(wanted: Sequence[Job], as_json: bool) -> int:
    """Prints the snapshots of each job and target."""
    found = [
        {
            "job": job.key,
            "target": target,
            "snapshot": one.id[:8],
            "at": one.at.isoformat(timespec="seconds"),
            "kind": one.kind,
        }
        for job in wanted
        for target, repository in job.repositories.items()
        for one in repository.snapshots(f"job:{job.name}")
    ]
    if as_json:
        print(json.dumps(found, indent=1))
    else:
        for one in found:
            print("  ".join(str(value) for value in one.values()))
    return 0
