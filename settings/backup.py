"""Backups as the user writes them: what is backed up (`x-bulkhead.backup` of a volume) and where to (the ledger).
Who may open what is not written here: each environment has its own repository, key and credentials, as secrets."""

import json
import re
from collections.abc import Mapping
from itertools import permutations
from pathlib import PurePosixPath
from posixpath import normpath
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import AfterValidator, BeforeValidator, Field, field_validator, model_validator

from settings.errors import Frozen
from settings.units import parse_bytes

Engine = Literal["postgres", "redis", "files"]
SPANS = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 7 * 86400}
_SPAN = re.compile(r"(\d+)\s*([smhdw])", re.ASCII)
_CLOCK = re.compile(r"([01]\d|2[0-3]):([0-5]\d)", re.ASCII)
_NAME = re.compile(r"[a-z](?:-?[a-z0-9]){0,30}", re.ASCII)
_BUCKET = re.compile(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]", re.ASCII)
WORDS = {"hourly": 3600, "daily": 86400, "weekly": 7 * 86400}
LAST_KNOWN = "BULKHEAD_BACKUPS"
"""The variable in which a command hands what the host knows of its backups to programs and policies (`last_known`)."""
LAST = ("last_success", "last_verified")


def parse_span(written: object) -> int:
    """Seconds of `15m`, `6h`, `1d`, `hourly`, `daily` or `weekly`. ValueError for anything else, or zero."""
    text = str(written).strip()
    match = _SPAN.fullmatch(text)
    seconds = WORDS.get(text) or (int(match[1]) * SPANS[match[2]] if match else 0)
    if not isinstance(written, str) or seconds <= 0:
        raise ValueError(f"not a span of time; write {', '.join(WORDS)}, or a number with s, m, h, d or w, such as 6h")
    return seconds


def parse_clock(written: str) -> int | None:
    """Minutes after midnight of `03:00`; None for anything else."""
    match = _CLOCK.fullmatch(written.strip())
    return int(match[1]) * 60 + int(match[2]) if match else None


def last_known(told: str) -> dict[str, dict[str, float]]:
    """Of each volume's backup that the host knows of, by the engine's name of the volume: those of `LAST` that there
    were, in seconds since 1970. `told`: as JSON; empty for anything else."""
    try:
        volumes = json.loads(told)
    except ValueError:
        return {}
    return {
        volume: {key: known[key] for key in LAST if isinstance(known.get(key), int | float)}
        for volume, known in (volumes.items() if isinstance(volumes, dict) else ())
        if isinstance(known, dict)
    }


def _schedule(written: object) -> str:
    if not isinstance(written, str) or parse_clock(written) is None:
        try:
            parse_span(written)
        except ValueError:
            raise ValueError(
                f"not a schedule; write {', '.join(WORDS)}, a time of the day such as '03:00', or a span such as 6h"
            ) from None
    return str(written)


Span = Annotated[int, BeforeValidator(parse_span)]
Positive = Annotated[int, Field(gt=0, strict=True)]


class Retain(Frozen):
    """How many snapshots are kept, as restic's `forget --keep-…` counts them; the newest is always kept."""

    last: Positive = 2
    hourly: Positive | None = None
    daily: Positive | None = 7
    weekly: Positive | None = 4
    monthly: Positive | None = 6


class Backup(Frozen):
    """How a volume is backed up.

    `engine`: `postgres` (base backups and WAL, restored to any second), `redis` (a snapshot), `files` (the volume,
    between the commands `before` and `after` in its service's container). `schedule`: `daily`, a time of the host's day
    (`03:00`), or a span (`6h`). `service`: whose container has the volume; needed only where several have. `target`:
    names of the ledger's targets; all of them where it is empty. `user`, `database`: of postgres, where they are not
    the image's own. `verify`: a query (postgres; its answer must not be empty, zero or false) or a command (files) that
    a restored copy is asked. `shrink`: a snapshot that is smaller than the last by more than this share is reported.
    `rate`: bytes a second that a scheduled run reads or stores at most (more where it would not be done in half its
    period); without a ceiling where it is null.
    """

    engine: Engine
    schedule: Annotated[str, BeforeValidator(_schedule)]
    retain: Retain = Retain()
    target: tuple[str, ...] = ()
    service: str | None = None
    user: str | None = None
    database: str | None = None
    verify: str | None = None
    before: str | None = None
    after: str | None = None
    shrink: Annotated[float, Field(gt=0, lt=1)] = 0.5
    rate: Annotated[int, BeforeValidator(parse_bytes), Field(ge=2**20)] | None = 32 * 2**20

    @property
    def every(self) -> int:
        """Seconds from one backup to the next."""
        return WORDS["daily"] if self.at is not None else parse_span(self.schedule)

    @property
    def at(self) -> int | None:
        """Minutes after midnight, where it is a time of the day."""
        return parse_clock(self.schedule)

    @field_validator("target", mode="before")
    @classmethod
    def _one_or_several(cls, written: object) -> object:
        return (written,) if isinstance(written, str) else tuple(written) if isinstance(written, list) else written

    @model_validator(mode="after")
    def _of_its_engine(self) -> "Backup":
        postgres = {"user": self.user, "database": self.database}
        for name in (key for key, value in postgres.items() if value and self.engine != "postgres"):
            raise ValueError(f"{name} is of engine postgres only; remove it")
        if self.verify and self.engine == "redis":
            raise ValueError("verify is of engines postgres and files only; remove it")
        for name in (key for key in ("before", "after") if getattr(self, key) and self.engine != "files"):
            raise ValueError(f"{name} is of engine files only; remove it")
        return self


class Refresh(Frozen):
    """Where a best-effort environment's volume gets a copy of real data from: the same volume of `environment`, from
    its newest backup. `mask`: a file of SQL, beside the first Compose file, which takes out of the copy what dev is not
    to see; without one, policy refuses it."""

    environment: str
    mask: Annotated[str, Field(min_length=1)] | None = None


def _endpoint(written: str) -> str:
    parts = urlsplit(written)
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.path.strip("/") or parts.query:
        raise ValueError("not an endpoint; write it like https://s3.eu-central-1.amazonaws.com")
    if parts.scheme == "http" and parts.hostname not in ("127.0.0.1", "localhost", "::1"):
        raise ValueError("backups would travel in the clear; write https:// (http only for a server on loopback)")
    return written.rstrip("/")


def _bucket(written: str) -> str:
    if not _BUCKET.fullmatch(written):
        raise ValueError("not a bucket's name; use 3 to 63 lower-case letters, digits, dots and dashes")
    return written


class FolderTarget(Frozen):
    """A folder on the host, which should be on another disk than the engine's."""

    path: Annotated[str, Field(pattern=r"^/.+$")]

    @property
    def place(self) -> tuple[str, ...]:
        """Where it is, from the outside in."""
        return PurePosixPath(normpath(self.path)).parts

    def repository(self, environment: str) -> str:
        """An environment's own repository there, as restic spells it."""
        return f"{self.path.rstrip('/')}/{environment}"


class BucketTarget(Frozen):
    """A bucket of an S3 server. `lock`: no version younger than that can be deleted; at most the bucket's owner can
    lift that (nobody can, with `make bucket ENV=prod ARGS=--compliance`). `append_only`: the host's credentials cannot
    delete, and `make prune` lets go of old snapshots with others, from elsewhere.
    """

    endpoint: Annotated[str, AfterValidator(_endpoint)]
    bucket: Annotated[str, AfterValidator(_bucket)]
    prefix: Annotated[str, Field(pattern=r"^[A-Za-z0-9._/-]*$")] = ""
    region: str = "us-east-1"
    lock: Span | None = None
    append_only: bool = True

    @property
    def place(self) -> tuple[str, ...]:
        """Where it is, from the outside in."""
        return (self.endpoint, self.bucket, *(part for part in self.prefix.split("/") if part))

    def key(self, environment: str) -> str:
        """The prefix of an environment's own objects, without slashes at its ends."""
        return "/".join(part for part in (*self.prefix.split("/"), environment) if part)

    def repository(self, environment: str) -> str:
        """An environment's own repository there, as restic spells it."""
        return f"s3:{self.endpoint}/{self.bucket}/{self.key(environment)}"


def _target(written: object) -> object:
    if not isinstance(written, dict) or ("path" in written) == ("endpoint" in written):
        raise ValueError("neither a folder nor a bucket; write {path: /srv/backup} or {endpoint: https://…, bucket: …}")
    return (FolderTarget if "path" in written else BucketTarget)(**written)


def _target_name(name: str) -> str:
    if not _NAME.fullmatch(name):
        raise ValueError("not a name; use lower-case letters, digits and single dashes, starting with a letter")
    return name


Target = Annotated[FolderTarget | BucketTarget, BeforeValidator(_target)]


DEFAULT_FOLDER = "/var/backups/bulkhead"
"""Where backups go that nobody has named a target for. It should be on another disk than the engine's data."""


class BackupSettings(Frozen):
    """`bulkhead:backup` of the ledger. `targets`: by name. `verified_within`: seconds for which a verified restore
    counts. `drill`: seconds from one drill to the next."""

    targets: Mapping[Annotated[str, AfterValidator(_target_name)], Target] = Field(
        default={"local": FolderTarget(path=DEFAULT_FOLDER)}, min_length=1
    )
    verified_within: Span = 8 * 86400
    drill: Span = 7 * 86400

    @field_validator("targets")
    @classmethod
    def _apart(cls, targets: Mapping[str, FolderTarget | BucketTarget]) -> Mapping[str, FolderTarget | BucketTarget]:
        """One repository inside another would be open to whoever may write to that one."""
        for one, other in permutations(sorted(targets), 2):
            inner, outer = targets[one].place, targets[other].place
            if inner[: len(outer)] == outer:
                raise ValueError(f"{one} is inside {other}, or the same; give each a folder or prefix of its own")
        return targets

    def of(self, backup: Backup) -> Mapping[str, Any]:
        """The targets of one backup, by name. KeyError for a name that the ledger does not have."""
        return {name: self.targets[name] for name in backup.target or sorted(self.targets)}
