"""Reservation: what a protected environment is promised is in the ledger, and its containers get it.
Every environment stays inside its own slice, without a quota where a reservation is meant."""

import re
from collections.abc import Iterator, Mapping
from typing import Any

from policies.rule import ENVIRONMENTS, EVERYWHERE, PROTECTED, Finding, Subject, UndecidedError, number, rule
from policies.wire import UNKNOWN
from policies.world import BUILT, CONTAINER, HOST, IMAGE, STACK, Field
from settings.errors import SettingsError
from settings.ledger import RESOURCES, Environment, Ledger, Tier, promise, shown, slice_name

DRIVERS = ("cgroupfs", "systemd")

NO_CPUS = re.compile(r"0*\.?0*")


@rule(
    id="protected-reservation",
    title="every protected environment has cpus and memory reserved in a ledger that adds up",
    references=("CIS 5.11", "CIS 5.12"),
    reads={STACK: ()},
    tiers=EVERYWHERE,
)
def protected_reservation(_field: Field, about: Subject) -> Iterator[Finding]:
    """Judged on the stack itself, before anything else is."""
    try:
        ledger = about.ledger
        if about.resource.stack != HOST:
            ledger.environment(about.resource.stack)
    except SettingsError as error:
        yield Finding(
            " / ".join(str(error).splitlines()).rstrip("."),
            "without a ledger that adds up no environment has a promise, and nothing can be allowed",
            "correct the ledger there",
        )
        return
    yield from _unreserved(ledger)


def _unreserved(ledger: Ledger) -> Iterator[Finding]:
    for environment in ledger.environments.values():
        reserved = environment.reservations
        missing = [key for key in ("cpus", "memory") if not getattr(reserved, key, None)]
        if environment.tier is Tier.PROTECTED and missing:
            yield Finding(
                f"{ledger.file}: {environment.name}.reservations without {' and '.join(missing)}",
                f"{environment.name} is protected in name only: nothing is kept free for it",
                f"add reservations: {{{', '.join(f'{key}: 50%' for key in missing)}}} to {environment.name} there",
            )


@rule(
    id="own-slice",
    title="containers and builds run in the slice of their own environment",
    references=("CIS 5.25",),
    reads={CONTAINER: ("cgroupParent",), IMAGE: ("build.cgroupParent",), BUILT: ("build.cgroupParent",)},
    tiers=EVERYWHERE,
)
def own_slice(field: Field, about: Subject) -> Iterator[Finding]:
    """Either spelling of the slice is right: which one it is depends on the engine's cgroup driver."""
    slices = {slice_name(name, driver): name for name in about.ledger.environments for driver in DRIVERS}
    parent = str(field.value or "")
    owner = next((name for spelled, name in slices.items() if _within(parent, spelled)), None)
    if about.own is None:
        if owner:
            yield Finding(
                repr(parent),
                f"a container of the host's own would use up what {owner} is promised",
                "leave cgroup_parent out: the system's containers run outside the environments' slices",
            )
        return
    if slices.get(parent) == about.own.name:
        return
    taken = f"in the slice of {owner}, and use up its budget" if owner else "outside every budget"
    yield Finding(
        repr(parent) if parent else "not set",
        f"it would run {taken}, instead of within the reservations and limits of {about.own.name}",
        f"set it to the host stack's output environments.{about.own.name}.cgroup_parent "
        f"({' or '.join(slice_name(about.own.name, driver) for driver in DRIVERS)})",
    )


def _within(parent: str, spelled: str) -> bool:
    """Whether a cgroup parent is a slice or beneath it: in a path after a /, in a systemd unit's name after a dash."""
    beneath = f"{spelled}/" if spelled.startswith("/") else f"{spelled.removesuffix('.slice')}-"
    return parent == spelled or parent.startswith(beneath)


@rule(
    id="protected-cpu-quota",
    title="containers of a protected environment have no CPU quota and no CPU set",
    references=("CIS 5.12",),
    reads={CONTAINER: ("cpus", "cpuQuota", "cpuSet")},
    tiers=PROTECTED,
)
def protected_cpu_quota(field: Field, _about: Subject) -> Iterator[Finding]:
    """`cpuPeriod` alone limits nothing, and neither does `cpus: "0"`; `cpuSet: "0"` is the first CPU."""
    if field.value and not (field.path == "cpus" and NO_CPUS.fullmatch(str(field.value))):
        yield Finding(
            repr(field.value),
            "the kernel would stop it there even while the machine is idle: a ceiling where the environment "
            "was promised a floor, and may burst",
            "remove it (deploy.resources.limits.cpus in Compose); reserve CPU for the environment in the ledger",
        )


MIB = 2**20
ROUNDING = 1e-9
NANO_SHARES = 1024
"""CPU shares of one CPU, as Compose and the engine count them."""


@rule(
    id="ledger-pids",
    title="the processes that environments may have fit into the host",
    references=("CIS 5.29", "a fork bomb takes the host's process ids"),
    reads={STACK: ()},
    tiers=EVERYWHERE,
    exemptable=EVERYWHERE,
    options={
        "capacity": number(32768, "Process ids of the host; 32768 is the kernel's default kernel.pid_max.", 1),
        "system": number(4096, "Of these, what the system and protected environments keep.", 1),
    },
)
def ledger_pids(_field: Field, about: Subject) -> Iterator[Finding]:
    """Every environment that is held to a number takes it in the worst case, all at once."""
    held = {one.name: one.limits.pids for one in about.ledger.environments.values() if one.limits and one.limits.pids}
    free = about.options["capacity"] - about.options["system"]
    if sum(held.values()) > free:
        yield Finding(
            f"{about.ledger.file}: {' + '.join(f'{name} {pids}' for name, pids in held.items())}",
            f"that is more than the {free:g} that the host has beside the system's {about.options['system']:g}",
            "lower limits.pids there, or raise the option capacity of this rule with kernel.pid_max",
        )


@rule(
    id="service-fits",
    title="no service is allowed more than its environment has",
    references=("CIS 5.11", "CIS 5.12"),
    reads={CONTAINER: ("memory", "cpus")},
    exemptable=ENVIRONMENTS,
)
def service_fits(field: Field, about: Subject) -> Iterator[Finding]:
    """A limit above the environment's own never takes effect: the kernel stops another service first."""
    if not field.value or about.own is None:
        return
    own = about.measured().environment(about.own.name)
    resource, amount = ("memory", float(field.value) * MIB) if field.path == "memory" else ("cpus", float(field.value))
    most = getattr(own.limits, resource, None)
    if most and amount > most:
        yield Finding(
            shown(resource, amount),
            f"{own.name} itself is limited to {shown(resource, most)}, so this limit never takes effect and "
            "another service is stopped in its place",
            f"set at most {shown(resource, most)}",
        )


def _reserved(about: Subject) -> Mapping[str, float]:
    """What the stack's containers reserve in all: CPUs and bytes."""
    containers = [Subject(one, about.world) for one in about.whole().of(CONTAINER)]
    return {
        "cpus": sum((one.one("cpuShares") or 0) / NANO_SHARES for one in containers),
        "memory": sum((one.one("memoryReservation") or 0) * MIB for one in containers),
    }


@rule(
    id="service-reservations",
    title="what services reserve is no more than what their environment has reserved",
    references=("CIS 5.12",),
    reads={STACK: ()},
    tiers=PROTECTED,
    exemptable=PROTECTED,
)
def service_reservations(_field: Field, about: Subject) -> Iterator[Finding]:
    """A service's reservation is a part of its environment's; more than the whole nobody keeps free."""
    reserved = _reserved(about)
    own = _own(about)
    for resource, amount in reserved.items():
        most = getattr(own.reservations, resource, None) or 0
        if amount > most:
            yield Finding(
                f"{shown(resource, amount)} reserved by services",
                f"{own.name} has {shown(resource, most)} reserved: the services are promised more than is kept free",
                f"lower deploy.resources.reservations by {shown(resource, amount - most)}, or raise "
                f"{own.name}.reservations in the ledger",
                at=resource,
            )


def _own(about: Subject) -> Environment:
    return about.measured().environment(about.resource.stack)


@rule(
    id="rollout-fits",
    title="a protected environment fits while its containers are replaced",
    references=("two containers of one service run at once while one replaces the other",),
    reads={STACK: ()},
    tiers=PROTECTED,
    exemptable=PROTECTED,
)
def rollout_fits(_field: Field, about: Subject) -> Iterator[Finding]:
    """Memory limits of all containers, twice for those that start before the old one stops, against what is reserved
    and what nobody is promised."""
    ledger, own = about.measured(), _own(about)
    needed = 0.0
    for container in about.whole().of(CONTAINER):
        limit = (Subject(container, about.world).one("memory") or 0) * MIB
        # The provider's own default is to delete first.
        needed += limit * (2 if container.delete_before_replace is False else 1)
    memory = next(row for row in ledger.rows() if row.resource == "memory")
    most = promise(own, "memory") + memory.free
    if needed > most:
        yield Finding(
            f"{shown('memory', needed)} while containers are replaced",
            f"{own.name} has {shown('memory', promise(own, 'memory'))}, and {shown('memory', memory.free)} of the "
            "machine is promised to nobody: a deploy would run it out of memory",
            f"lower memory limits by {shown('memory', needed - most)}, replace large services stop-first "
            "(deploy.update_config.order), or reserve more in the ledger",
            at="memory",
        )


@rule(
    id="reservation-step",
    title="a reservation is not lowered by more than a step at a time",
    references=("a promise to prod is not taken back by an edit",),
    reads={STACK: ()},
    tiers=EVERYWHERE,
    exemptable=EVERYWHERE,
    options={"percent": number(10, "How much lower than what is deployed a reservation may be.")},
)
def reservation_step(_field: Field, about: Subject) -> Iterator[Finding]:
    """Against what the host stack has put out. An environment that lost its protection, or its entry, has lowered it
    to nothing. Exempted in the ledger (`bulkhead:exempt`)."""
    about.whole()  # the stack itself is registered before anything that it shows
    deployed = about.world.promised
    if deployed is None:
        raise UndecidedError
    if not deployed:
        return  # nothing is deployed yet
    ledger = about.measured()
    for name, told in sorted(_mapping(deployed.get("environments")).items()):
        reserved = _mapping(_mapping(_mapping(told).get("budget")).get("reservations"))
        now = ledger.environments.get(name)
        for resource in RESOURCES:
            before = reserved.get(resource) or 0
            if before is UNKNOWN:
                raise UndecidedError
            amount = (getattr(now.reservations, resource, None) if now and now.reservations else None) or 0
            least = before * (1 - about.options["percent"] / 100)
            if amount < least * (1 - ROUNDING):
                yield Finding(
                    f"{ledger.file}: {name}.reservations.{resource}: {shown(resource, amount)}",
                    f"{name} has {shown(resource, before)} today, and would lose more than "
                    f"{about.options['percent']:g}% of it at once",
                    f"keep at least {shown(resource, least)}, or write into bulkhead:exempt of the ledger: "
                    f"{{rule: reservation-step, environment: {name}, reason: …, owner: …, expires: …}}",
                    at=f"{name}.{resource}",
                    environment=name,
                )


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}
