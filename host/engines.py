"""What a backup is taken of: PostgreSQL, Redis, or the files of a volume, in a running container of a service.
Everything of a database runs in its own container, with its own programs: any image works unmodified."""

import os
import re
import stat
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Any

from host.machine import ANSWER_SECONDS, START_ENGINE, Places, Undecided, ask, inspect
from host.restic import BackupError

LABEL, SERVICE = "bulkhead.environment", "bulkhead.service"
SLOT = "bulkhead"
OUR_SLOT = f"from pg_replication_slots where slot_name = '{SLOT}'"
BASE = "bulkhead-base"
"""What a server calls the connection of a base backup of ours."""
OUR_BASES = f"from pg_stat_replication where application_name = '{BASE}'"
NO_BASE = f"not exists (select 1 {OUR_BASES})"
HISTORY_MOST, SEGMENT_MOST, MOST = 2**20, 2**30, 8 * 2**30
"""Bytes of a history file, of a segment (PostgreSQL's own ceiling), and of WAL that is copied at once: the slot is
given up long before. Who runs in an environment owns its `pg_wal`, and may put there what they like."""
SEGMENT = re.compile(r"[0-9A-F]{24}")
HEXADECIMAL = "0123456789ABCDEF"
HISTORY = re.compile(r"[0-9A-F]{8}\.history")
COUNT_SECONDS = 10
"""A table that takes longer to count is not counted: a backup must not cost prod more than it is worth."""

DATABASES = "select datname from pg_database where datallowconn and not datistemplate order by 1"
TABLES = "select relname from pg_stat_user_tables"
COUNT = r"""
\set VERBOSITY verbose
\set ON_ERROR_STOP on
select 'table', schemaname || '.' || relname from pg_stat_user_tables;
set statement_timeout = '%ds';
\set ON_ERROR_STOP off
select format('select ''rows'', %%L, count(*) from %%I.%%I', schemaname || '.' || relname, schemaname, relname)
from pg_stat_user_tables order by 1
\gexec
"""
"""For psql: the tables, then the rows of each; one that takes too long does not keep the others from being counted."""
TABLE, ROWS = re.compile(r"^table\|(.*)$", re.M), re.compile(r"^rows\|(.*)\|(\d+)$", re.M)
CANCELLED = " 57014: "
"""A statement that was, in psql's words of any language."""
TYPED_SECONDS = 12 * 3600.0


@dataclass(frozen=True)
class Container:
    """A container as the engine inspects it."""

    inspected: Mapping[str, Any]

    @property
    def id(self) -> str:
        return str(self.inspected["Id"])

    @property
    def image(self) -> str:
        return str(self.inspected["Image"])

    @property
    def variables(self) -> dict[str, str]:
        return dict(line.partition("=")[::2] for line in self.inspected["Config"].get("Env") or ())

    def mount(self, volume: str) -> str | None:
        """Where a volume is in it."""
        return next((one["Destination"] for one in self.inspected["Mounts"] if one.get("Name") == volume), None)

    def command(
        self, *words: str, user: str = "", variables: Mapping[str, str] = {}, interactive: bool = False
    ) -> list[str]:
        """What runs a command in it. Values of variables are taken from our own environment, not from the words."""
        options = [*(["--user", user] if user else []), *(["--interactive"] if interactive else [])]
        return ["docker", "exec", *options, *(word for name in variables for word in ("--env", name)), self.id, *words]

    def said(
        self, *words: str, user: str = "", variables: Mapping[str, str] = {}, seconds: float = ANSWER_SECONDS
    ) -> str:
        """What a command in it prints. BackupError where it fails, or takes longer than `seconds`."""
        command = self.command(*words, user=user, variables=variables)
        try:
            return ask(command, "see docker logs", variables, seconds=seconds)
        except Undecided as error:
            raise BackupError(str(error)) from None

    def typed(
        self, text: str, *words: str, user: str = "", seconds: float = TYPED_SECONDS
    ) -> "subprocess.CompletedProcess[str]":
        """Runs a command in it that reads this text. BackupError where it takes longer than `seconds`."""
        command = self.command(*words, user=user, interactive=True)
        try:
            return subprocess.run(command, input=text, capture_output=True, text=True, timeout=seconds, check=False)
        except subprocess.TimeoutExpired:
            raise BackupError(f"{words[0]}: no answer within {seconds:g} s. Next step: see docker logs") from None

    def secret(self, *names: str) -> str:
        """The value of the first of these variables, or of the file that `<name>_FILE` names; "" if it has none."""
        for name in names:
            if value := self.variables.get(name):
                return value
            if file := self.variables.get(f"{name}_FILE"):
                return self.said("cat", file).rstrip("\n")
        return ""


def containers(environment: str, volume: str, *, stopped: bool = False) -> list[Container]:
    """The containers of an environment's services that have a volume."""
    words = ["docker", "ps", "--quiet", "--no-trunc", "--filter", f"label={LABEL}={environment}"]
    listed = ask([*words, "--filter", f"volume={volume}", *(["--all"] if stopped else [])], START_ENGINE).split()
    return [Container(one) for one in inspect("container", *listed) if SERVICE in (one["Config"].get("Labels") or {})]


def of_service(environment: str, volume: str, service: str | None) -> Container:
    """The running container that a volume is backed up through. BackupError where there is none."""
    found = [
        one
        for one in containers(environment, volume)
        if service is None or one.inspected["Config"]["Labels"][SERVICE] == service
    ]
    if not found:
        raise BackupError(f"no running container of {environment} has volume {volume}. Next step: docker ps --all")
    return found[0]


def mountpoint(volume: str) -> Path:
    """The folder of a local volume on the host."""
    (found,) = inspect("volume", volume)
    return Path(found["Mountpoint"])


@dataclass(frozen=True)
class Postgres:
    """A running PostgreSQL server. `data`: its cluster, as it is called in the container; `folder`: on the host.

    `uid`: who it runs as; a local connection of that user needs no password, in Debian's clusters (peer) and in those
    of the official images (trust). `argv`: how the server was started.
    """

    container: Container
    volume: str
    programs: PurePosixPath
    uid: int
    data: PurePosixPath
    folder: Path
    socket: str
    port: int
    argv: Sequence[str]
    user: str

    def facts(self) -> dict[str, Any]:
        """What is needed to start it again on another volume, when nothing of it runs any more. `segment`: of WAL, from
        which on a base backup that begins later can need any."""
        owner, mount = self.folder.lstat(), str(self.container.mount(self.volume))
        version, segment = self.query(
            "select current_setting('server_version_num'), pg_walfile_name(pg_current_wal_flush_lsn())"
        ).split("|")
        return {
            "engine": "postgres",
            "version": int(version),
            "segment": segment,
            "programs": str(self.programs),
            "owner": [owner.st_uid, owner.st_gid],
            "inside": str(self.data.relative_to(mount)),
            "mount": mount,
            "argv": list(self.argv),
            "user": self.user,
        }

    @classmethod
    def of(cls, container: Container, volume: str, user: str | None, places: Places) -> "Postgres":
        """Finds the server in a container. BackupError where there is none."""
        listed = ask(["docker", "top", container.id, "-eo", "pid,ppid,comm"], START_ENGINE).splitlines()[1:]
        rows = [line.split(None, 2) for line in listed]
        servers = {pid for pid, _, name in rows if name.strip() == "postgres"}
        first = next((pid for pid, parent, name in rows if pid in servers and parent not in servers), None)
        if first is None:
            raise BackupError(f"{container.inspected['Name']}: no PostgreSQL runs there. Next step: docker logs")
        process = places.processes / first
        # The server changes into its cluster when it starts.
        data, programs = process.joinpath("cwd").readlink(), process.joinpath("exe").readlink().parent
        mount = container.mount(volume)
        if mount is None or not data.is_relative_to(mount):
            raise BackupError(f"the cluster {data} of {container.inspected['Name']} is not in volume {volume}")
        folder = mountpoint(volume) / data.relative_to(mount)
        lines = read_inside(mountpoint(volume), folder / "postmaster.pid").splitlines()
        if len(lines) < 5 or not lines[3].strip().isdigit():
            raise BackupError(f"{container.inspected['Name']}: PostgreSQL is still starting. It is tried again")
        uid = folder.lstat().st_uid
        argv = process.joinpath("cmdline").read_bytes().decode().rstrip("\0").split("\0")
        names = container.said("id", "-un", str(uid)).strip()
        return cls(
            container,
            volume,
            PurePosixPath(programs),
            uid,
            PurePosixPath(data),
            folder,
            lines[4].strip(),
            int(lines[3]),
            tuple(argv[1:]),
            user or container.variables.get("POSTGRES_USER") or names,
        )

    def program(self, name: str, *words: str) -> list[str]:
        """The command that runs one of the server's client programs beside it."""
        return self.container.command(*self._words(name, *words), user=str(self.uid))

    def query(self, sql: str, database: str = "postgres") -> str:
        """The answer, one row a line, columns separated by `|`. BackupError where it fails."""
        words = self._psql(database, "--set=ON_ERROR_STOP=1", f"--command={sql}")
        return self.container.said(*words, user=str(self.uid)).strip()

    def script(self, text: str, database: str) -> "subprocess.CompletedProcess[str]":
        """What psql makes of a script, whose errors do not end it."""
        return self.container.typed(text, *self._psql(database, "--file=-"), user=str(self.uid))

    def _psql(self, database: str, *words: str) -> list[str]:
        flags = ("--no-psqlrc", "--tuples-only", "--no-align", "--quiet", f"--dbname={database}")
        return self._words("psql", *flags, *words)

    def _words(self, name: str, *words: str) -> list[str]:
        return [
            str(self.programs / name), f"--host={self.socket}", f"--port={self.port}", f"--username={self.user}",
            "--no-password", *words,
        ]  # fmt: skip

    def base(self, *, hurry: bool, rate: int = 0) -> list[str]:
        """The command that prints a base backup as a tar file, with all the WAL that it needs.

        `hurry`: with a checkpoint at once, for somebody who waits. Otherwise the server spreads it, over up to 0.9 of
        its `checkpoint_timeout`: 4.5 minutes in which no processor is used and nobody waits, against a burst of writes
        that prod would feel each night. `rate`: bytes a second that it reads at most; 0 for no ceiling.
        """
        slow = [f"--max-rate={min(max(rate // 1024, 32), 2**20)}"] if rate else []
        return self.program(
            "pg_basebackup", "--pgdata=-", "--format=tar", "--wal-method=fetch",
            f"--checkpoint={'fast' if hurry else 'spread'}", "--label=bulkhead", f"--dbname=application_name={BASE}",
            *slow,
        )  # fmt: skip

    def end_bases(self) -> None:
        """Ends base backups of ours that nobody reads: what runs in a container outlives the `docker exec` that has
        started it, and this would go on reading all of prod's disk."""
        self.query("select pg_terminate_backend(pid) " + OUR_BASES)

    def position(self) -> str:
        """Up to where the WAL is on the disk: all that has been committed is before it."""
        return self.query("select pg_current_wal_flush_lsn()")

    def cluster(self) -> str:
        """Which cluster it is: another one has another history, whatever its WAL is called."""
        return self.query("select system_identifier from pg_control_system()")

    def hold(self) -> None:
        """Sees that the server keeps its WAL until it is archived."""
        state = self.query("select wal_status " + OUR_SLOT)
        if state.startswith("lost"):
            self.query(f"select pg_drop_replication_slot('{SLOT}')")
            state = ""
        if not state:
            self.query(f"select pg_create_physical_replication_slot('{SLOT}', true)")

    def let_go(self, most: int, with_base: int) -> None:
        """Gives up what is not archived where that is more than so many bytes: prod's disk comes first. What a base
        backup needs, beyond `with_base` bytes: the base backup ends then."""
        lag = f"{OUR_SLOT} and pg_wal_lsn_diff(pg_current_wal_lsn(), restart_lsn)"
        if self.query(f"select 1 {lag} > {with_base}"):
            self.end_bases()
            most = 0
        spared = f" and {NO_BASE}" if most else ""
        self.query(f"select pg_drop_replication_slot('{SLOT}') {lag} > {most}{spared}")

    def archive(self, spool: Path) -> tuple[int, bool]:
        """Copies the WAL that is new into a folder. Returns how many files are new, and whether there is a gap.

        Whole segments never change while the slot holds them; the last one is copied as far as it has come, and
        again the next time. As long as a base backup goes on the slot holds what that will ask for at its end.
        """
        spool.mkdir(parents=True, exist_ok=True, mode=0o700)
        held, last = self.query(
            "select pg_walfile_name(restart_lsn), pg_walfile_name(pg_current_wal_insert_lsn()) " + OUR_SLOT
        ).split("|")
        done = sorted(one.name for one in spool.iterdir() if SEGMENT.fullmatch(one.name))
        gap = bool(done) and held > following(done[-1])
        copied = 0
        with opened(mountpoint(self.volume), self.folder / "pg_wal") as source:
            there = sorted(os.listdir(source))  # noqa: PTH208 - pathlib has no descriptors
            taken = 0
            for name in there:
                whole = bool(SEGMENT.fullmatch(name)) and held <= name < last
                if (whole or HISTORY.fullmatch(name)) and not (spool / name).exists():
                    copied += copied_from(source, name, spool / name, SEGMENT_MOST if whole else HISTORY_MOST)
                    taken += (spool / name).stat().st_size
                    if taken > MOST:
                        raise BackupError(f"more than {MOST / 2**30:g} GiB of WAL at once")
            partial = spool / f"{last}.partial"
            for old in spool.glob("*.partial"):
                if old != partial:
                    old.unlink()
            # After a switch the next segment has no file until something is written to it.
            copied += copied_from(source, last, partial) if last in there else 0
        self.query(f"select pg_replication_slot_advance('{SLOT}', {lsn_of(last)}) where {NO_BASE}")
        return copied, gap


def counted(
    query: Callable[[str], str], script: "Callable[[str, str], subprocess.CompletedProcess[str]]", seconds: int
) -> dict[str, int | None]:
    """Rows of every table, by `database.schema.table`; None where counting takes longer than so many seconds.

    One client for each database: to start one in a container takes longer than to count a table. BackupError.
    """
    found: dict[str, int | None] = {}
    for database in query(DATABASES).splitlines():
        done = script(COUNT % seconds, database)
        tables, rows = TABLE.findall(done.stdout), dict(ROWS.findall(done.stdout))
        if done.returncode or len(tables) - len(rows) > done.stderr.count(CANCELLED):
            raise BackupError(f"psql in {database}: {done.stderr.strip()[-500:] or done.returncode}")
        found |= {f"{database}.{name}": int(rows[name]) if name in rows else None for name in tables}
    return found


def lsn_of(segment: str) -> str:
    """SQL for the position at which a segment of the server's own size begins."""
    log, number = int(segment[8:16], 16), int(segment[16:24], 16)
    size = "(select setting::bigint from pg_settings where name = 'wal_segment_size')"
    return f"('0/0'::pg_lsn + ({log}::numeric * 4294967296 + {number}::numeric * {size}))"


def following(segment: str) -> str:
    """The name of the next segment; of a server with segments of another size than 16 MiB, one that is not after it."""
    log, number = int(segment[8:16], 16), int(segment[16:24], 16) + 1
    return f"{segment[:8]}{log + (number >> 8):08X}{number & 0xFF:08X}"


def since(segment: str) -> list[str]:
    """Patterns of the names of a segment and all after it, of any timeline, whole or not, and of the histories."""
    number = segment[8:]
    after = [
        f"????????{number[:place]}[{HEXADECIMAL[HEXADECIMAL.index(digit) + 1 :]}]*"
        for place, digit in enumerate(number)
        if digit != "F"
    ]
    return ["*.history", f"????????{number}*", *after]


@contextmanager
def opened(root: Path, folder: Path) -> Iterator[int]:
    """A folder below `root`, never through a link: who runs in an environment owns what is in its volumes.

    BackupError where there is one; a cluster whose WAL is elsewhere is not supported.
    """
    descriptor = os.open(root, os.O_RDONLY | os.O_DIRECTORY)
    try:
        for part in folder.relative_to(root).parts:
            inner = os.open(part, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=descriptor)
            os.close(descriptor)
            descriptor = inner
        yield descriptor
    except NotADirectoryError:
        raise BackupError(f"{folder}: a link is in its path, and none is followed") from None
    finally:
        os.close(descriptor)


@contextmanager
def file_in(folder: int, name: str) -> Iterator[IO[bytes]]:
    """A regular file of an opened folder: no link, and nothing that one could wait for. BackupError for another."""
    try:
        descriptor = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=folder)
    except OSError as error:
        raise BackupError(f"{name}: {error.strerror}") from None
    with os.fdopen(descriptor, "rb") as file:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise BackupError(f"{name}: not a file")
        yield file


def read_inside(root: Path, path: Path, most: int = 4096) -> str:
    """The beginning of a small file in a volume, whose files are whoever's who runs there. BackupError."""
    with opened(root, path.parent) as folder, file_in(folder, path.name) as file:
        return file.read(most).decode(errors="replace")


def copied_from(folder: int, name: str, target: Path, most: int = SEGMENT_MOST) -> int:
    """Copies a file unless the copy is of the same time: 1 if it did. In one step, with the time that it had before.
    BackupError where it has more than so many bytes; what comes to it meanwhile is left."""
    with file_in(folder, name) as source:
        now = os.fstat(source.fileno())
        if target.exists() and target.stat().st_mtime_ns == now.st_mtime_ns:
            return 0
        if now.st_size > most:
            raise BackupError(f"{name}: {now.st_size} bytes, and at most {most} are one of WAL's files")
        draft, left = target.with_name(f".{target.name}"), now.st_size
        with draft.open("wb") as file:
            while left and (piece := source.read(min(left, 1 << 20))):
                left -= file.write(piece)
            file.flush()
            os.fsync(file.fileno())  # it is not copied again, and the server keeps it no longer
        os.utime(draft, ns=(now.st_atime_ns, now.st_mtime_ns))
        draft.replace(target)
    return 1


def one_database(query: Callable[[str], str]) -> str:
    """The database that is meant where none is named: the only one beside the server's own, if there is one only."""
    own = [name for name in query(DATABASES).splitlines() if name != "postgres"]
    return own[0] if len(own) == 1 else "postgres"


@dataclass(frozen=True)
class Redis:
    """A running Redis server, asked with its own client."""

    container: Container

    def _variables(self) -> dict[str, str]:
        password = self.container.secret("REDIS_PASSWORD", "REDISCLI_AUTH")
        return {"REDISCLI_AUTH": password} if password else {}

    def said(self, *words: str) -> str:
        answer = self.container.said("redis-cli", *words, variables=self._variables()).strip()
        if answer.startswith(("NOAUTH", "ERR", "WRONGPASS")):
            raise BackupError(f"redis-cli {words[0]}: {answer}. Next step: name its password in REDIS_PASSWORD_FILE")
        return answer

    def snapshot(self) -> tuple[list[str], dict[str, str]]:
        """The command that prints a snapshot, and the variables that it needs."""
        variables = self._variables()
        return self.container.command("redis-cli", "--rdb", "-", variables=variables), variables

    def facts(self, volume: str) -> dict[str, Any]:
        """What is needed to start it again on another volume, and how many keys it has, of them some that expire."""
        wanted = ("dir", "dbfilename", "appendonly", "appendfilename", "appenddirname")
        settings = {name: self.said("config", "get", name).splitlines()[-1] for name in wanted}
        folder, mount = PurePosixPath(settings.pop("dir")), str(self.container.mount(volume))
        # What runs there may answer anything, and a restore writes where it says.
        names = [settings[name] for name in wanted if name.endswith("name")]
        if not folder.is_relative_to(mount) or ".." in folder.parts or any("/" in name for name in names):
            raise BackupError(f"Redis keeps its data in {folder} ({', '.join(names)}), which is not in volume {volume}")
        owner = mountpoint(volume).stat()
        return {
            "engine": "redis",
            "version": self.said("info", "server").partition("redis_version:")[2].split()[0],
            "owner": [owner.st_uid, owner.st_gid],
            "inside": str(folder.relative_to(mount)),
            "mount": mount,
            "settings": settings,
            **keys(self.said("info", "keyspace")),
        }


def keys(told: str) -> dict[str, int]:
    """`keys` and `expires` of all databases together, from `INFO keyspace`."""
    return {name: sum(map(int, re.findall(rf"\b{name}=(\d+)", told))) for name in ("keys", "expires")}


def lsn(written: str) -> int:
    """A position in the WAL, `16/B374D848`, as a number."""
    high, low = written.split("/")
    return int(high, 16) << 32 | int(low, 16)


def loaded(told: str) -> int | None:
    """How many keys a Redis has read when it started, with those that had expired by then, from `INFO persistence`;
    None before version 7."""
    counts = re.findall(r"\brdb_last_load_keys_(?:expired|loaded):(\d+)", told)
    return sum(map(int, counts)) if len(counts) == 2 else None


@contextmanager
def quiet(container: Container | None, before: str | None, after: str | None) -> Iterator[None]:
    """Runs `before` in a container, then the body, and `after` whatever happened."""
    try:
        if container and before:
            container.said("sh", "-c", before)
        yield
    finally:
        if container and after:
            container.said("sh", "-c", after)
