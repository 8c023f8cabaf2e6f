"""The ledger (`Pulumi.host.yaml`): what the machine has, what the system keeps, what every environment is promised.
Written quantities are resolved against the capacity; a promise that the machine cannot keep is refused here."""

import itertools
import re
from collections.abc import Iterator, Mapping
from decimal import Decimal
from enum import StrEnum
from ipaddress import IPv4Network, IPv6Network, ip_network
from pathlib import Path
from typing import Annotated, Any, Final, Literal, NamedTuple, TypeVar, cast

from pydantic import AfterValidator, BeforeValidator, Field, ValidationError, field_validator, model_validator

from settings.backup import BackupSettings
from settings.errors import Frozen, Loc, SettingsError, did_you_mean, dotted, faults, sentence, together
from settings.exemption import LedgerExemption
from settings.units import NANO, Percent, format_bytes, parse_bytes, parse_cpus, parse_percent
from settings.yamlfile import YamlFile

RESOURCES = ("cpus", "memory", "disk")
"""What is promised in parts of the machine; pids are a ceiling only."""

DEFAULT_PIDS = 4096
"""Ceiling of a best-effort environment that names none: without one, a fork bomb takes the host's pids."""

PRIVATE = tuple(IPv4Network(block) for block in ("10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16"))
"""RFC 1918. `IPv4Network.is_private` also admits loopback, link-local and documentation ranges."""

DEFAULT_IO = 0.5
"""Ceiling on reads and writes of a best-effort environment that names none, as a share of the disk's measured speed:
half for it, half for everyone else."""

UNIQUE_LOCAL = IPv6Network("fc00::/7")
"""RFC 4193."""

NO_EGRESS: Final = "none"
INTERNET: Final = "internet"
"""Words of `egress`: nothing, and every address that is neither private nor link-local."""

Egress = tuple[str | IPv4Network | IPv6Network, ...]

NAME = re.compile(r"[a-z](?:-?[a-z0-9]){0,30}", re.ASCII)
VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*", re.ASCII)


_Entry = TypeVar("_Entry")


class Tier(StrEnum):
    """`protected` has reservations and may burst; `best-effort` has limits and gives way."""

    PROTECTED = "protected"
    BEST_EFFORT = "best-effort"


def _share(parse: Any) -> BeforeValidator:
    return BeforeValidator(lambda written: parse_percent(written) or parse(written))


# As written: whole units (bytes, billionths of a CPU) or a percentage of the capacity.
Cpus = Annotated[int | Percent, _share(parse_cpus)]
Bytes = Annotated[int | Percent, _share(parse_bytes)]
Count = Annotated[int, Field(gt=0, strict=True)]


def _percent(written: object) -> Percent:
    percent = parse_percent(written)
    if percent is None:
        raise ValueError("not a share of the disk's speed; write a percentage such as 50%")
    return percent


Portion = Annotated[Percent, BeforeValidator(_percent)]


class Shares(Frozen):
    """Reservations, or what the system keeps, as written."""

    cpus: Cpus | None = None
    memory: Bytes | None = None
    disk: Bytes | None = None


class Limits(Shares):
    """Ceilings as written. `pids` counts processes and threads of the whole environment.

    `io`: of reads and writes, as a share of the speed that was measured of the engine's disk; best-effort only, and
    only where the disk's scheduler knows no weights.
    """

    pids: Count | None = None
    io: Portion | None = None


class CapacitySettings(Frozen):
    """The machine as declared; a missing key is asked of the engine."""

    cpus: Annotated[int, BeforeValidator(parse_cpus)] | None = None
    memory: Annotated[int, BeforeValidator(parse_bytes)] | None = None
    disk: Annotated[int, BeforeValidator(parse_bytes)] | None = None


class EnvironmentShares(Frozen):
    """One environment as written in the ledger. `subnet6`: only where its networks have IPv6.

    `egress`: `none`, `internet`, or a list of networks and `internet`. Without it a best-effort environment has the
    internet, and a protected one everything but other environments. `inherit`: the deployer's variables that a
    best-effort environment's Compose files may read; a protected one's may read them all.
    """

    tier: Tier
    subnet: IPv4Network
    subnet6: IPv6Network | None = None
    egress: Egress | None = None
    inherit: tuple[str, ...] = ()
    reservations: Shares | None = None
    limits: Limits | None = None

    @field_validator("tier", mode="before")
    @classmethod
    def _known_tier(cls, written: object) -> object:
        known = [tier.value for tier in Tier]
        if written not in known:
            raise ValueError(f"unknown tier; use {' or '.join(known)}")
        return written

    @field_validator("subnet", mode="before")
    @classmethod
    def _private_subnet(cls, written: object) -> IPv4Network:
        try:
            subnet = IPv4Network(written if isinstance(written, str) else "")
        except ValueError as error:
            raise ValueError(
                f"not an IPv4 network address with a prefix ({error or 'empty'}); write it like 10.81.0.0/16"
            ) from None
        if not any(subnet.subnet_of(block) for block in PRIVATE):
            blocks = ", ".join(map(str, PRIVATE))
            raise ValueError(f"outside the private ranges; choose a network within {blocks}")
        if not 16 <= subnet.prefixlen <= 24:
            raise ValueError(f"prefix /{subnet.prefixlen}; choose one between /16 and /24")
        return subnet

    @field_validator("subnet6", mode="before")
    @classmethod
    def _unique_local(cls, written: object) -> IPv6Network | None:
        if written is None:
            return None
        try:
            subnet = IPv6Network(written if isinstance(written, str) else "")
        except ValueError as error:
            raise ValueError(
                f"not an IPv6 network address with a prefix ({error or 'empty'}); write it like fd81::/48"
            ) from None
        if not subnet.subnet_of(UNIQUE_LOCAL) or not 40 <= subnet.prefixlen <= 64:
            raise ValueError(
                f"choose a network within {UNIQUE_LOCAL}, with a prefix between /40 and /64, as in fd81::/48"
            )
        return subnet

    @field_validator("egress", mode="before")
    @classmethod
    def _known_egress(cls, written: object) -> Egress | None:
        if written is None or written in (NO_EGRESS, INTERNET):
            return None if written is None else (str(written),)
        found: list[str | IPv4Network | IPv6Network] = []
        for one in written if isinstance(written, list) and written else [written]:
            try:
                found.append(INTERNET if one == INTERNET else ip_network(one if isinstance(one, str) else ""))
            except ValueError:
                raise ValueError(
                    f"egress {one!r}; write none, internet, or a list of networks and internet, "
                    "as in [internet, 192.168.5.0/24]"
                ) from None
        return tuple(found)

    @field_validator("inherit", mode="before")
    @classmethod
    def _names(cls, written: object) -> object:
        if not isinstance(written, list) or not all(VARIABLE.fullmatch(str(one)) for one in written):
            raise ValueError("not a list of variables' names; write it like [TAG, GIT_SHA]")
        return tuple(written)

    @model_validator(mode="after")
    def _tier_has_its_budget(self) -> "EnvironmentShares":
        reserved, limits = self.reservations or Shares(), self.limits or Limits()
        if self.tier is Tier.PROTECTED and not (reserved.cpus and reserved.memory):
            raise ValueError(
                "a protected environment needs reservations of cpus and memory; "
                "add for example reservations: {cpus: 60%, memory: 50%}"
            )
        if self.tier is Tier.BEST_EFFORT and not limits.memory:
            raise ValueError(
                "a best-effort environment needs a memory limit; "
                "add for example limits: {cpus: 100%, memory: 30%, pids: 4096}"
            )
        if self.tier is Tier.PROTECTED and limits.io:
            raise ValueError(
                "a protected environment's reads and writes have no ceiling; "
                "remove limits.io, or lower that of the best-effort environments"
            )
        if self.tier is Tier.PROTECTED and self.inherit:
            raise ValueError("a protected environment reads every variable of its deployer; remove inherit")
        if self.tier is Tier.BEST_EFFORT and self.reservations:
            raise ValueError(
                "a best-effort environment gives way and cannot have reservations; "
                "remove them, or make its tier protected"
            )
        return self


class Capacity(Frozen):
    """The whole machine. `memory` and `disk` in bytes."""

    cpus: float
    memory: int
    disk: int


class Budget(Frozen):
    """Resolved amounts: CPUs, bytes, bytes, count, and of the disk's speed a share between 0 and 1.

    `None`: not promised, or not limited.
    """

    cpus: float | None = None
    memory: int | None = None
    disk: int | None = None
    pids: int | None = None
    io: float | None = None


class Environment(Frozen):
    """One environment with its budget in absolute amounts. `egress`: None where nothing but the others is closed."""

    name: str
    tier: Tier
    subnet: IPv4Network
    subnet6: IPv6Network | None = None
    egress: Egress | None = None
    reservations: Budget | None = None
    limits: Budget | None = None


class Row(Frozen):
    """One resource of the plan's table; amounts in CPUs or bytes, `promised` by environment."""

    resource: str
    capacity: float
    system: float
    promised: Mapping[str, float]
    free: float


class Ledger(Frozen):
    """The machine and its environments, every amount absolute.

    >>> ledger = LedgerSettings.read(Path("Pulumi.host.yaml")).resolve({"cpus": 12, "memory": 16 * 2**30})
    >>> ledger.environment("prod").reservations.cpus
    7.2
    """

    file: str
    host: str | None
    outward: bool = False
    capacity: Capacity
    system: Budget
    environments: Mapping[str, Environment]

    def environment(self, name: str) -> Environment:
        """The environment `name`. SettingsError with the known names if the ledger has no such one."""
        return _known(name, self.environments, self.file)

    def rows(self) -> list[Row]:
        """Capacity, system share, promises and what is free, per resource."""
        return [self._row(resource) for resource in RESOURCES]

    def _row(self, resource: str) -> Row:
        capacity = _whole(resource, getattr(self.capacity, resource))
        system = _whole(resource, getattr(self.system, resource) or 0)
        promised = {name: promise(environment, resource) for name, environment in self.environments.items()}
        free = capacity - system - sum(promised.values())
        return Row(
            resource=resource,
            capacity=_amount(resource, capacity),
            system=_amount(resource, system),
            promised={name: _amount(resource, whole) for name, whole in promised.items()},
            free=_amount(resource, free),
        )


def _known(name: str, environments: Mapping[str, _Entry], file: str) -> _Entry:
    if name not in environments:
        raise SettingsError(
            file=file,
            key="bulkhead:environments",
            value=name,
            problem="no such environment in the ledger",
            remedy=f"Add it with a tier and a subnet. {did_you_mean(name, environments)}",
        )
    return environments[name]


def promise(environment: Environment, resource: str) -> int:
    """What the machine must be able to give at once, in whole units (bytes, billionths of a CPU).

    Protected: the reservation, or a limit above it, since nothing takes that memory back from it.
    Best-effort: its limit, except of CPU, which it uses only while it is idle.
    """
    reserved = getattr(environment.reservations, resource, None) or 0
    limit = getattr(environment.limits, resource, None) or 0
    held = reserved if resource == "cpus" else max(reserved, limit)
    return _whole(resource, held)


def _whole(resource: str, amount: float) -> int:
    return round(amount * NANO) if resource == "cpus" else int(amount)


def _amount(resource: str, whole: int) -> float:
    return whole / NANO if resource == "cpus" else whole


class Faulty(NamedTuple):
    """A fault of the ledger's own arithmetic: where it stands, the value, and what to say."""

    loc: Loc
    value: object
    problem: str
    remedy: str


def _environment_name(name: str) -> str:
    if name == "host":
        raise ValueError("'host' is the stack of the machine itself; choose another environment name")
    if not NAME.fullmatch(name) or len(name) > 31:
        raise ValueError(
            "not an environment name; use up to 31 lower-case letters, digits and single dashes, "
            "starting with a letter and not ending with a dash"
        )
    return name


KEYS: Mapping[str, str] = {
    f"bulkhead:{name}": name for name in ("host", "outward", "capacity", "system", "environments", "backup", "exempt")
}


class LedgerSettings(Frozen):
    """The ledger as written; `resolve` makes it absolute. `folder`: where its file is, which is the checkout.

    `outward`: each proof also tries the host's addresses that are on no bridge of the engine, as those that the
    internet knows. `backup`: where backups go. `exempt`: exemptions from policies that judge the ledger itself.
    """

    file: str = "Pulumi.host.yaml"
    host: str | None = None
    outward: bool = False
    capacity: CapacitySettings = CapacitySettings()
    system: Shares = Shares()
    environments: Mapping[Annotated[str, AfterValidator(_environment_name)], EnvironmentShares] = Field(min_length=1)
    backup: BackupSettings = BackupSettings()
    exempt: tuple[LedgerExemption, ...] = ()
    folder: Path = Path()
    lines: Mapping[Loc, int] = Field(default={}, repr=False, exclude=True)

    @field_validator("capacity", "system", "backup", mode="before")
    @classmethod
    def _empty_is_none(cls, written: object) -> object:
        return {} if written is None else written

    @field_validator("host")
    @classmethod
    def _reachable_by_commands(cls, host: str | None) -> str | None:
        if host is not None and not host.startswith(("unix://", "ssh://")):
            raise ValueError(
                "host commands reach a machine only locally or by SSH; write unix:///… or ssh://user@machine"
            )
        return host

    @classmethod
    def read(cls, path: Path) -> "LedgerSettings":
        """Reads the `bulkhead:` keys of the ledger file. SettingsError names file and line, key and remedy.

        What needs no capacity is refused here: also two environments that share addresses.
        """
        document = YamlFile(path)
        config = (document.data or {}).get("config") if isinstance(document.data, dict | None) else None
        if not isinstance(config, dict) or not config.get("bulkhead:environments"):
            raise SettingsError(
                file=document.at(("config", "bulkhead:environments")),
                key="bulkhead:environments",
                problem="lists no environment",
                remedy="Write one, as in "
                "`prod: {tier: protected, subnet: 10.81.0.0/16, reservations: {cpus: 60%, memory: 50%}}`.",
            )
        unknown = [key for key in config if str(key).startswith("bulkhead:") and key not in KEYS]
        if unknown:
            raise together([_unknown_key(document, ("config", key), KEYS) for key in unknown])
        written = {KEYS[key]: value for key, value in config.items() if key in KEYS}
        lines = {_inner(loc): line for loc, line in document.lines.items()}
        try:
            settings = cls(file=document.name, folder=path.absolute().parent, lines=lines, **written)
        except ValidationError as error:
            raise together(faults(error, lambda *fault: _translated(document, *fault))) from None
        if overlaps := [settings._error(fault) for fault in _overlaps(settings.environments)]:
            raise together(overlaps)
        return settings

    def environment(self, name: str) -> EnvironmentShares:
        """The environment `name` as written. SettingsError with the known names if the ledger has no such one."""
        return _known(name, self.environments, self.file)

    @property
    def missing_capacity(self) -> frozenset[str]:
        """The capacities that the ledger leaves to the engine: a subset of cpus, memory, disk."""
        return frozenset(name for name in RESOURCES if getattr(self.capacity, name) is None)

    def resolve(self, asked: Mapping[str, float | int] = {}) -> Ledger:
        """Absolute amounts. `asked` holds what the engine says (CPUs, bytes) for `missing_capacity`.

        SettingsError if the promises exceed the machine, or a limit is below its own reservation.
        """
        unknown = sorted(self.missing_capacity - {name for name, amount in asked.items() if amount > 0})
        if unknown:
            raise self._error(
                Faulty(
                    ("capacity",),
                    self.capacity.model_dump(exclude_none=True),
                    f"{' and '.join(unknown)} not declared, and the engine did not say",
                    "Start the engine, or declare it, as in {cpus: 12, memory: 16GiB, disk: 1TB}.",
                )
            )
        whole = {
            name: cast(int, getattr(self.capacity, name) or _whole(name, asked.get(name, 0))) for name in RESOURCES
        }
        ledger = Ledger(
            file=self.file,
            host=self.host,
            outward=self.outward,
            capacity=Capacity(cpus=whole["cpus"] / NANO, memory=whole["memory"], disk=whole["disk"]),
            system=_budget(self.system, whole),
            environments={
                name: Environment(
                    name=name,
                    tier=written.tier,
                    subnet=written.subnet,
                    subnet6=written.subnet6,
                    egress=written.egress or (None if written.tier is Tier.PROTECTED else (INTERNET,)),
                    reservations=_budget(written.reservations, whole) if written.reservations else None,
                    limits=_budget(_with_ceilings(written.limits, written.tier), whole) if written.limits else None,
                )
                for name, written in self.environments.items()
            },
        )
        found = [*_contradictions(ledger), *_overpromised(ledger)]
        if found:
            raise together([self._error(fault) for fault in found])
        return ledger

    def _error(self, fault: Faulty) -> SettingsError:
        line = next((self.lines[loc] for loc in _parents(fault.loc) if loc in self.lines), None)
        return SettingsError(
            file=f"{self.file}:{line}" if line else self.file,
            key=f"bulkhead:{dotted(fault.loc)}",
            value=fault.value,
            problem=fault.problem,
            remedy=fault.remedy,
        )


def _with_ceilings(limits: Limits, tier: Tier) -> Limits:
    if tier is not Tier.BEST_EFFORT:
        return limits
    defaults = {"pids": DEFAULT_PIDS, "io": Percent(Decimal(100) * Decimal(DEFAULT_IO))}
    return limits.model_copy(update={name: value for name, value in defaults.items() if getattr(limits, name) is None})


def _budget(written: Shares, capacity: Mapping[str, int]) -> Budget:
    whole = {name: _resolved(getattr(written, name), capacity[name]) for name in RESOURCES}
    return Budget(
        cpus=None if whole["cpus"] is None else whole["cpus"] / NANO,
        memory=whole["memory"],
        disk=whole["disk"],
        pids=getattr(written, "pids", None),
        io=float(written.io.value) / 100 if isinstance(written, Limits) and written.io else None,
    )


def _resolved(written: int | Percent | None, capacity: int) -> int | None:
    return written.of(capacity) if isinstance(written, Percent) else written


def _overlaps(environments: Mapping[str, EnvironmentShares]) -> Iterator[Faulty]:
    for (one, here), (other, there) in itertools.combinations(environments.items(), 2):
        for key in ("subnet", "subnet6"):
            mine, theirs = getattr(here, key), getattr(there, key)
            if mine and theirs and mine.overlaps(theirs):
                yield Faulty(
                    ("environments", other, key),
                    str(theirs),
                    f"overlaps {mine} of {one}",
                    "Give every environment addresses of its own.",
                )


def _contradictions(ledger: Ledger) -> Iterator[Faulty]:
    for environment, resource in itertools.product(ledger.environments.values(), RESOURCES):
        reserved = getattr(environment.reservations, resource, None)
        limit = getattr(environment.limits, resource, None)
        capacity = getattr(ledger.capacity, resource)
        loc: Loc = ("environments", environment.name, "limits", resource)
        if reserved and limit and limit < reserved:
            yield Faulty(
                loc,
                shown(resource, limit),
                f"below its own reservation of {shown(resource, reserved)}",
                "Raise the limit or lower the reservation.",
            )
        if limit and limit > capacity:
            yield Faulty(
                loc,
                shown(resource, limit),
                f"more than the machine has ({shown(resource, capacity)})",
                "Lower it to 100% or less.",
            )


def _overpromised(ledger: Ledger) -> Iterator[Faulty]:
    for row in ledger.rows():
        if row.free >= 0:
            continue
        held = {"system": row.system, **row.promised}
        parts = ", ".join(f"{name} {shown(row.resource, amount)}" for name, amount in held.items() if amount)
        promised = sum(held.values())
        yield Faulty(
            ("environments",),
            f"{100 * promised / row.capacity:.4g}%",
            f"{row.resource}: {shown(row.resource, promised)} promised of {shown(row.resource, row.capacity)} "
            f"({parts})",
            f"Lower reservations, best-effort limits or the system's share by "
            f"{shown(row.resource, -row.free)}, or declare the larger machine in bulkhead:capacity.",
        )


def shown(resource: str, amount: float) -> str:
    """An amount as users read it: `7.2 CPUs`, `8GiB`; bytes rounded to three digits if not exact."""
    if resource == "cpus":
        return f"{amount:.9g} CPUs"
    exact = format_bytes(int(amount))
    if len(exact) <= 8:
        return exact
    power = min(4, (int(amount).bit_length() - 1) // 10)
    return f"{amount / 1024**power:.3g} {['B', 'KiB', 'MiB', 'GiB', 'TiB'][power]}"


def _inner(loc: Loc) -> Loc:
    """A path in the file as a path in the model: without `config` and the namespace."""
    return tuple(KEYS.get(str(part), part) if index == 0 else part for index, part in enumerate(loc[1:]))


def _parents(loc: Loc) -> Iterator[Loc]:
    return (loc[:length] for length in range(len(loc), 0, -1))


def _translated(document: YamlFile, loc: Loc, kind: str, message: str, value: Any) -> SettingsError:
    # Pydantic appends the name of a union's branch to the path; those are no keys of the file.
    keys = tuple(part for part in loc if part not in _BRANCHES)
    written: Loc = ("config", f"bulkhead:{keys[0]}", *keys[1:])
    if kind == "extra_forbidden":
        return _unknown_key(document, written, _FIELDS.get(str(keys[-2]), EnvironmentShares.model_fields))
    plain = kind != "missing" and loc[-1] != "[key]" and isinstance(value, str | int | float | list)
    problem, _, remedy = message.partition("; ")
    return SettingsError(
        file=document.at(written),
        key=dotted(written[1:]),
        problem=problem,
        remedy=sentence(remedy),
        **({"value": value} if plain else {}),
    )


_BRANCHES = frozenset({"int", "is-instance[Percent]", "[key]"})

_FIELDS: Mapping[str, Any] = {
    "capacity": CapacitySettings.model_fields,
    "system": Shares.model_fields,
    "reservations": Shares.model_fields,
    "limits": Limits.model_fields,
    "exempt": LedgerExemption.model_fields,
}


def _unknown_key(document: YamlFile, loc: Loc, known: Mapping[str, Any]) -> SettingsError:
    return SettingsError(
        file=document.at(loc),
        key=dotted(loc[1:]),
        problem="unknown key",
        remedy=did_you_mean(str(loc[-1]), known),
    )


def slice_name(environment: str, driver: Literal["cgroupfs", "systemd"] | str) -> str:
    """The cgroup that holds everything of an environment, as the engine's cgroup driver spells it.

    cgroupfs takes a path; systemd takes a slice, in whose name a dash nests, so the environment's own
    dashes become underscores (systemd.slice(5)). SettingsError for a driver without slices.
    """
    spellings = {
        "cgroupfs": f"/bulkhead-{environment}",
        "systemd": f"bulkhead-{environment.replace('-', '_')}.slice",
    }
    if driver not in spellings:
        raise SettingsError(
            file="Docker engine",
            key="cgroup driver",
            value=driver,
            problem="environments cannot be given slices with this driver",
            remedy="Run the engine with the cgroupfs or the systemd driver (a rootless one may have none).",
        )
    return spellings[driver]
