"""Reservation: what a protected environment is promised is in the ledger, and its containers get it.
Every environment stays inside its own slice, without a quota where a reservation is meant."""

import re
from collections.abc import Iterator

from policies.rule import EVERYWHERE, Finding, Subject, rule
from policies.world import CONTAINER, HOST, IMAGE, STACK, Field
from settings.errors import SettingsError
from settings.ledger import Ledger, Tier, slice_name

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
    reads={CONTAINER: ("cgroupParent",), IMAGE: ("build.cgroupParent",)},
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
    tiers=frozenset({Tier.PROTECTED}),
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
