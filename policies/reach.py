"""Reach: no container gets to another environment's network, addresses, namespaces, volumes or names.
Who owns a name is told by its prefix, the longest environment of the ledger that it begins with."""

from collections.abc import Iterator
from ipaddress import ip_network

from policies.hostpath import LINKS, MOUNTS, opened, overlaps
from policies.rule import EVERYWHERE, OPEN, Finding, Open, Subject, rule
from policies.world import CONTAINER, NETWORK, VOLUME, Field
from settings.ledger import Tier

SHARED_NETWORKS = frozenset({"", "bridge", "default"})
"""What the engine calls its default network, and what it takes when nothing is named."""

JOINS = "container:"
NAMED = "{}"

ENGINE_DATA = (
    "/var/lib/docker",
    "/var/lib/containerd",
    "/home/*/.local/share/docker",
    "/root/.local/share/docker",
)
"""Where an engine keeps every environment's volumes, layers and container files."""

DISKS = ("/dev",)


@rule(
    id="network-reach",
    title="containers attach only to networks of their own environment",
    references=("CIS 5.30", "dev to prod over a shared network"),
    reads={CONTAINER: ("networksAdvanced.name", "networkMode")},
    links={
        "networksAdvanced.name": {NETWORK: NAMED},
        "networkMode": {NETWORK: NAMED, CONTAINER: JOINS + NAMED},
    },
    tiers=EVERYWHERE,
)
def network_reach(field: Field, about: Subject) -> Iterator[Finding | Open]:
    """The provider attaches to `networkMode` and to every `networksAdvanced`. Its other modes are namespace-reach's."""
    network = str(field.value or "")
    if network in SHARED_NETWORKS:
        if about.own and not (field.path == "networkMode" and _names_networks(about)):
            yield Finding(
                repr(network) if network else "not set",
                "that is the engine's default bridge, which every container without a network of its own shares, "
                "whatever its environment",
                f"name a network of {about.own.name} in networksAdvanced (networks in Compose)",
            )
    elif field.path != "networkMode" or not _is_mode(network):
        yield from _reach(network, NETWORK, "attached to it, it could talk to everything there", about)


def _is_mode(network: str) -> bool:
    return network in ("none", "host") or network.startswith(JOINS)


def _names_networks(about: Subject) -> bool:
    return any(True for _ in about.resource.fields("networksAdvanced.name"))


def _reach(name: str, kind: str, consequence: str, about: Subject) -> Iterator[Finding | Open]:
    """What is wrong with using the network, volume or container `name`: another environment's, or nobody's known."""
    mine, noun = about.resource.stack, kind.rpartition(":")[2].lower()
    owner = about.world.owner(name)
    if owner is not None and owner != about.own:
        yield Finding(
            repr(name),
            f"this {noun} belongs to {owner.name}; {consequence}",
            f"use a {noun} of {mine}, named {mine}-…",
        )
    elif not name.startswith(f"{mine}-"):
        yield from _unowned(name, kind, consequence, about)


def _unowned(name: str, kind: str, consequence: str, about: Subject) -> Iterator[Finding | Open]:
    mine, noun = about.resource.stack, kind.rpartition(":")[2].lower()
    if about.graph is None:
        yield OPEN
    elif not about.graph.creates(kind, name):
        yield Finding(
            repr(name),
            f"{mine} neither makes this {noun} nor is it named after {mine}, so it may be another environment's; "
            f"{consequence}",
            f"use a {noun} that this stack makes, or whose name begins with {mine}-",
        )


@rule(
    id="namespace-reach",
    title="containers join no namespace of the host and none of another environment's containers",
    references=("PSS baseline: Host Namespaces", "CIS 5.10", "CIS 5.16", "CIS 5.17", "CIS 5.31"),
    reads={CONTAINER: ("networkMode", "pidMode", "ipcMode", "usernsMode")},
    links={
        "networkMode": {NETWORK: NAMED, CONTAINER: JOINS + NAMED},
        "pidMode": {CONTAINER: JOINS + NAMED},
        "ipcMode": {CONTAINER: JOINS + NAMED},
    },
)
def namespace_reach(field: Field, about: Subject) -> Iterator[Finding | Open]:
    """A namespace of the host is refused to best-effort environments; one of another environment to all."""
    mode = str(field.value or "")
    if mode.startswith(JOINS):
        container = mode.removeprefix(JOINS).lstrip("/")
        yield from _reach(container, CONTAINER, "in its namespace it would be part of it", about)
    elif mode == "host" and about.own and about.own.tier is Tier.BEST_EFFORT:
        yield Finding(
            "'host'",
            "in the host's own namespace it sees and reaches every environment",
            f"remove it, so that the container gets a namespace within {about.own.name}",
        )


@rule(
    id="volume-reach",
    title="containers mount only volumes of their own environment",
    references=("dev to prod over a shared volume",),
    reads={CONTAINER: ("volumes.volumeName", "volumes.fromContainer", "mounts.source")},
    links={
        "volumes.volumeName": {VOLUME: NAMED},
        "volumes.fromContainer": {CONTAINER: NAMED},
        "mounts.source": {VOLUME: NAMED},
    },
    tiers=EVERYWHERE,
)
def volume_reach(field: Field, about: Subject) -> Iterator[Finding | Open]:
    """Paths are engine-data's: the provider takes a `volumeName` or `source` that begins with / as one."""
    name = str(field.value or "")
    if field.path.endswith("fromContainer"):
        name, kind = name.split(":")[0].lstrip("/"), CONTAINER  # `/db:ro` is db, read-only
    else:
        kind = VOLUME
    if name and not name.startswith("/"):
        yield from _reach(name, kind, "mounted, its data could be read or changed", about)


@rule(
    id="engine-data",
    title="no mount opens the engine's data directory or a disk of the host",
    references=("CIS 5.6", "PSS baseline: HostPath Volumes", "dev to prod through /var/lib/docker/volumes"),
    reads={
        CONTAINER: (*MOUNTS[CONTAINER], "mounts.volumeOptions.driverName"),
        VOLUME: (*MOUNTS[VOLUME], "driver"),
    },
    links=LINKS,
    tiers=EVERYWHERE,
)
def engine_data(field: Field, _about: Subject) -> Iterator[Finding]:
    """A `local` volume with a device is a bind in disguise, and another driver may be anything."""
    if field.path.endswith(("driver", "driverName")):
        if field.value not in (None, "", "local"):
            yield Finding(
                repr(field.value),
                "what a volume of another driver opens on the host cannot be told from here",
                "use the local driver",
            )
        return
    for path in opened(field):
        place = overlaps(path, (*ENGINE_DATA, *DISKS)) if field.path.endswith("device") else overlaps(path, ENGINE_DATA)
        if place:
            yield Finding(
                repr(path),
                f"it opens {place}, and with it the volumes and files of every environment",
                "mount a named volume of this environment, or a folder that holds nothing else",
            )
            return


@rule(
    id="own-names",
    title="networks, volumes and containers bear no other environment's name",
    references=("names tell who owns what",),
    reads={NETWORK: ("name",), VOLUME: ("name",), CONTAINER: ("name",)},
    tiers=EVERYWHERE,
)
def own_names(field: Field, about: Subject) -> Iterator[Finding]:
    """Without it, a network made here could pass there for one of its own."""
    owner = about.world.owner(str(field.value or ""))
    if owner is not None and owner != about.own:
        mine = about.resource.stack
        yield Finding(
            repr(field.value),
            f"{owner.name} owns every name that begins with {owner.name}-: "
            f"made by {mine}, it would take {owner.name}'s place or be used by it",
            f"name it {mine}-…",
        )


@rule(
    id="own-subnet",
    title="networks use no address of another environment",
    references=("dev to prod by address",),
    reads={NETWORK: ("ipamConfigs.subnet",)},
    tiers=EVERYWHERE,
)
def own_subnet(field: Field, about: Subject) -> Iterator[Finding]:
    """The ledger's ranges are IPv4, so an IPv6 subnet overlaps none."""
    if not field.value:
        return
    try:
        subnet = ip_network(str(field.value), strict=False)
    except ValueError:
        yield Finding(
            repr(field.value), "it is no subnet, so nobody knows whose addresses it takes", "write it as a.b.c.d/n"
        )
        return
    for other in about.ledger.environments.values():
        if other != about.own and subnet.version == 4 and subnet.overlaps(other.subnet):
            yield Finding(
                repr(field.value),
                f"it overlaps {other.subnet} of {other.name}: firewall rules could not tell them apart",
                f"take a part of {about.own.subnet}" if about.own else "take addresses outside every environment's",
            )
