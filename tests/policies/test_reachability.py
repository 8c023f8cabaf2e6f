"""The reach of random stacks, by the pack and by brute force over the whole host: both must name the same resources.
The model below is written from what Docker does, and shares nothing with the rules."""

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from hashlib import sha256
from pathlib import Path
from random import Random
from typing import Any, Generic, NamedTuple, TypeVar

import pytest
from hypothesis import HealthCheck, Phase, find, given, settings
from hypothesis import strategies as st

from policies.registry import BY_ID
from policies.world import CONTAINER, NETWORK, VOLUME
from settings.ledger import LedgerSettings
from tests.policies.harness import LEDGER, TIERS, UNKNOWN, Given, run

T = TypeVar("T")

GRAPHS = 10_000

HOLES = ("network-reach", "namespace-reach", "volume-reach", "engine-data", "host-namespaces")
"""Each closes a way out of an environment that no other rule of these closes."""

RULES = (*HOLES, "own-names")
"""Names tell the other rules who owns what."""

ENVIRONMENTS = tuple(TIERS)

# --- The model ---


class Node(NamedTuple):
    """A thing on the host. `whose`: an environment, or one of those below."""

    kind: str
    name: str
    whose: str


NOBODY_KNOWN = "nobody known"
HOST = Node("namespace", "host", "the host")
DEFAULT_BRIDGE = Node(NETWORK, "bridge", "everybody")
ENGINE = Node("path", "/var/lib/docker", "the engine")
UNTOLD = Node("anything", "", NOBODY_KNOWN)

PATHS = {
    "/var/lib/docker/volumes/prod-data/_data": True,
    "/var/lib/docker/": True,
    "//var//lib/./docker": True,
    "/srv/../var/lib/docker/volumes": True,
    "/proc/1/root/var/lib/docker": True,
    "/var/lib/containerd": True,
    "/home/ci/.local/share/docker/volumes": True,
    "/home": True,
    "/var/lib": True,
    "/": True,
    "/srv/files": False,
    "/var/lib/docker/../postgresql": False,
    "/var/lib/dockerfiles": False,
    "/home/ci/.local/share/fonts": False,
    "/var/run/files": False,
    UNKNOWN: True,
}
"""Whether a bind of the path shows what the engine keeps of every environment."""

OPTIONS = {
    **PATHS,
    "none": False,
    "bind": False,
    "tmpfs": False,
    "overlay": False,
    "ext4": False,
    "size=10m,uid=1000": False,
    "lowerdir=/srv/a:/srv/b,upperdir=/srv/c,workdir=/srv/d": False,
    "lowerdir=/srv/a:/var/lib,upperdir=/srv/c,workdir=/srv/d": True,
    "lowerdir=var/lib/docker": True,
    "/dev/sda1": True,
}
"""The same of an option of the `local` driver, which hands it to mount(2); a disk shows all its files."""


def whose(name: str) -> str | None:
    """The environment that owns a name: of prod-eu-db, prod-eu; of prod-db, prod; of prod or shared, none."""
    words = name.split("-")
    prefixes = ("-".join(words[:count]) for count in range(len(words) - 1, 0, -1))
    return next((prefix for prefix in prefixes if prefix in ENVIRONMENTS), None)


@dataclass
class Host:
    """Who shares a network, a namespace or a volume with whom, once the stack is deployed.

    `written`: what a resource of the stack itself asks for. `shared`: the same, and what stands, both ways round.
    """

    stack: str
    resources: Sequence[Given]
    written: dict[str, set[Node]] = field(default_factory=dict)
    shared: dict[Node, set[Node]] = field(default_factory=lambda: defaultdict(set))

    def __post_init__(self) -> None:
        for environment in ENVIRONMENTS:
            for standing in ("db-1", "web-1"):
                one = Node(CONTAINER, f"{environment}-{standing}", environment)
                self._join(one, Node(NETWORK, f"{environment}-backend", environment))
                self._join(one, Node(VOLUME, f"{environment}-data", environment))
        for made in self.made():
            self.written[made.name] = set(self._asked(made)) - {self.node(made)}
            for other in self.written[made.name]:
                self._join(self.node(made), other)

    def made(self) -> list[Given]:
        """What the stack makes."""
        return [one for one in self.resources if not one.read and one.type in (CONTAINER, NETWORK, VOLUME)]

    def node(self, one: Given) -> Node:
        """A resource that the stack makes, as a thing on the host."""
        return Node(one.type, one.props["name"], self.stack)

    def foreign(self, nodes: set[Node]) -> bool:
        """Whether one of them is not the stack's own."""
        return any(one.whose != self.stack for one in nodes)

    def direct(self) -> set[str]:
        """The resources that ask for something that is not the stack's own."""
        return {name for name, nodes in self.written.items() if self.foreign(nodes)}

    def transitive(self) -> set[str]:
        """The resources from which a way leads to something that is not the stack's own, over whatever lies between."""
        return {one.name for one in self.made() if self.foreign(self._reached(self.node(one)))}

    def _reached(self, start: Node) -> set[Node]:
        reached, edge = {start}, [start]
        while edge:
            new = self.shared[edge.pop()] - reached
            reached |= new
            edge += new
        return reached

    def _join(self, one: Node, other: Node) -> None:
        self.shared[one].add(other)
        self.shared[other].add(one)

    def _asked(self, one: Given) -> Iterator[Node]:
        yield from self._meant(one.type, one.props["name"])
        if one.type == CONTAINER:
            yield from self._networks(one)
            yield from self._namespaces(one)
            yield from self._mounts(one)
        elif one.type == VOLUME:
            yield from self._options(one.props.get("driver"), one.props.get("driverOpts", {}))

    def _meant(self, kind: str, text: str) -> set[Node]:
        """Everything that the engine may find under a name or id."""
        found = {self.node(one) for one in self.made() if one.type == kind and text in (one.props["name"], _id(one))}
        owner = whose(text)
        if owner:
            found.add(Node(kind, text, owner))
        return found or {Node(kind, text, NOBODY_KNOWN)}

    def _sources(self, one: Given, key: str, *kinds: str) -> Iterator[Node]:
        """What an unknown value may turn out to be: all that its property was made from, if that tells."""
        sources = [source for source in self.resources if source.name in one.after.get(key, ())]
        for source in sources:
            told = source.type in kinds and not source.read  # nobody is shown what is only looked up
            yield from self._meant(source.type, source.props["name"]) if told else {UNTOLD}
        if not sources:
            yield UNTOLD

    def _networks(self, one: Given) -> Iterator[Node]:
        networks = one.props.get("networksAdvanced", [])
        names = [UNKNOWN] if networks == UNKNOWN else [each["name"] for each in networks]
        mode = one.props.get("networkMode")
        if mode == UNKNOWN:
            yield from self._sources(one, "networkMode", NETWORK, CONTAINER)
        elif mode in (None, "bridge", "default"):
            names += [] if names else ["bridge"]
        elif mode == "host":
            yield HOST
        elif mode != "none" and not mode.startswith("container:"):
            yield from self._meant(NETWORK, mode)
        for name in names:
            if name == UNKNOWN:
                yield from self._sources(one, "networksAdvanced", NETWORK)
            elif name == "host":
                yield HOST
            elif name == "bridge":
                yield DEFAULT_BRIDGE
            else:
                yield from self._meant(NETWORK, name)

    def _namespaces(self, one: Given) -> Iterator[Node]:
        for key in ("networkMode", "pidMode", "ipcMode", "usernsMode", "cgroupnsMode"):
            mode = one.props.get(key, "")
            if mode.startswith("container:"):
                yield from self._meant(CONTAINER, mode.split(":")[1].strip("/"))
            elif mode == "host":
                yield HOST
            elif mode == UNKNOWN and key != "networkMode":
                yield from self._sources(one, key, CONTAINER)

    def _mounts(self, one: Given) -> Iterator[Node]:
        for mount in one.props.get("volumes", ()):
            if "hostPath" in mount:
                yield from self._path(mount["hostPath"])
            elif "fromContainer" in mount and mount["fromContainer"] == UNKNOWN:
                yield from self._sources(one, "volumes", CONTAINER)
            elif "fromContainer" in mount:
                yield from self._meant(CONTAINER, mount["fromContainer"].removesuffix(":ro").strip("/"))
            else:
                yield from self._source(one, "volumes", mount.get("volumeName"))
        for mount in one.props.get("mounts", ()):
            yield from self._source(one, "mounts", mount.get("source"))
            options = mount.get("volumeOptions", {})
            yield from self._options(options.get("driverName"), options.get("driverOptions", {}))

    def _source(self, one: Given, key: str, text: str | None) -> Iterator[Node]:
        if text == UNKNOWN:
            yield from self._sources(one, key, VOLUME)
        elif text:
            yield from self._path(text) if text.startswith("/") else self._meant(VOLUME, text)

    def _path(self, path: str) -> Iterator[Node]:
        if PATHS[path]:
            yield ENGINE

    def _options(self, driver: str | None, options: Mapping[str, str]) -> Iterator[Node]:
        if driver not in (None, "local"):
            yield UNTOLD
        if any(OPTIONS[value] for value in options.values()):
            yield ENGINE


def _id(one: Given) -> str | None:
    return one.outputs.get("id")


# --- Random stacks ---


class Value(NamedTuple):
    """A value as the program writes it, and the resources that it is made from."""

    text: str
    after: tuple[str, ...] = ()


class Stack(NamedTuple):
    """A graph of resources, and the environment that is deployed with it."""

    name: str
    resources: tuple[Given, ...]


class Pools(NamedTuple, Generic[T]):
    """What a container can be written with. `kept`: what stays inside, as far as one sees; `wild`: the rest."""

    kept: tuple[T, ...]
    wild: tuple[T, ...]

    def among(self, wild: bool) -> tuple[T, ...]:
        """What there is to choose from."""
        return self.kept + self.wild if wild else self.kept


class Dice:
    """Choices, one for each byte: hypothesis draws a whole graph at once, since a draw takes longer than a verdict.

    A zero is the first choice, so that a counterexample shrinks to what is written first.
    """

    def __init__(self, thrown: bytes) -> None:
        self._thrown = iter(thrown)

    def one(self, values: Sequence[T]) -> T:
        """One of the values."""
        return values[next(self._thrown) % len(values)]

    def some(self, values: Sequence[T], least: int, most: int) -> list[T]:
        """From `least` to `most` of the values."""
        return [self.one(values) for _ in range(self.one(range(least, most + 1)))]

    def wild(self) -> bool:
        """Now and then."""
        return self.one((False, False, False, True))


def made_id(name: str) -> str:
    """An id as the engine gives it."""
    return sha256(name.encode()).hexdigest()


STRANGE = made_id("strange")
"""The id of something that the stack did not make."""

COMMAND = Given("command:local:Command", "run", {"create": "echo ready"})


def bind(path: str) -> Mapping[str, Any]:
    """A local volume that is a bind in disguise."""
    return {"driverOpts": {"type": "none", "o": "bind", "device": path}}


def overlay(**options: str) -> Mapping[str, Any]:
    """A local volume that lies over folders of the host."""
    return {"driverOpts": {"type": "overlay", **options}}


VOLUME_PROPS = Pools[Mapping[str, Any]](
    (
        {},
        {"driver": "local"},
        {"driverOpts": {"type": "tmpfs", "device": "tmpfs", "o": "size=10m,uid=1000"}},
        *(bind(path) for path, shows in PATHS.items() if not shows),
        overlay(o="lowerdir=/srv/a:/srv/b,upperdir=/srv/c,workdir=/srv/d"),
    ),
    (
        *(bind(path) for path, shows in PATHS.items() if shows),
        overlay(o="lowerdir=/srv/a:/var/lib,upperdir=/srv/c,workdir=/srv/d"),
        overlay(device="overlay", o="lowerdir=var/lib/docker"),
        {"driverOpts": {"type": "ext4", "device": "/dev/sda1"}},
        {"driver": "sshfs"},
        {"driver": UNKNOWN},
    ),
)
"""Volumes of the stack's own; the wild ones look like it, and are no such thing."""

HOST_MODES: Sequence[Mapping[str, str]] = (
    {},
    {},
    *({f"{kind}Mode": "host"} for kind in ("pid", "ipc", "userns", "cgroupns")),
)

PAIRS = [(one, two) for one in ENVIRONMENTS for two in ENVIRONMENTS if one != two]
LEFT_OUT = ((), ("media", "taken"), ("backend", "data"), ("taken", "data"), ("plain",))


def stack_of(thrown: bytes) -> Stack:
    """A stack of one to four containers, with the networks and volumes that they use."""
    dice = Dice(thrown)
    stack, other = dice.one(PAIRS)
    deployed, wild, count = dice.one((False, True)), dice.wild(), dice.one(range(1, 5))
    at_hand = around(dice, stack, other, wild)
    containers: list[Given] = []
    for number in range(count):
        owner = dice.one((stack, stack, "", *([other] if wild else [])))
        containers.append(Given(CONTAINER, f"c{number}", {"name": f"{owner}-c{number}".strip("-")}))
    networks, volumes = network_values(stack, other), volume_values(stack, other)
    for number, one in enumerate(containers):
        peers = container_values(stack, other, containers, number)
        containers[number] = container(dice, one, networks, volumes, peers)
    used = {source for one in containers for sources in one.after.values() for source in sources}
    left_out = dice.one(LEFT_OUT)  # made by an earlier deploy, or by nobody
    kept = [one for one in at_hand if one.name in used or not (one.read or one.name in left_out)]
    everything = [*kept, *containers]
    if "run" in used:
        everything.append(COMMAND)
    if deployed:
        everything = [one if one.read else replace(one, outputs={"id": made_id(one.name)}) for one in everything]
    return Stack(stack, tuple(everything))


STACKS = st.binary(min_size=128, max_size=128).map(stack_of)


def around(dice: Dice, stack: str, other: str, wild: bool) -> list[Given]:
    """Networks and volumes that are made or looked up beside the containers."""
    return [
        Given(NETWORK, "backend", {"name": f"{stack}-backend"}),
        Given(NETWORK, "plain", {"name": "plain"}),
        Given(NETWORK, "taken", {"name": f"{other if wild else stack}-taken"}),
        Given(VOLUME, "data", {"name": f"{stack}-data"}),
        Given(VOLUME, "media", {"name": f"{stack}-media", **dice.one(VOLUME_PROPS.among(wild))}),
        *(
            Given(kind, f"{found}-{name}", {"name": f"{owner}-{name}"}, read=True)
            for found, owner in (("own", stack), ("found", other))
            for kind, name in ((NETWORK, "backend"), (VOLUME, "data"), (CONTAINER, "db-1"))
        ),
    ]


def network_values(stack: str, other: str) -> Pools[Value]:
    """Names and ids of networks."""
    return Pools(
        (
            *map(
                Value,
                (
                    f"{stack}-backend",
                    f"{stack}-elsewhere",
                    f"{stack}-taken",
                    "plain",
                    made_id("backend"),
                    made_id("taken"),
                ),
            ),
            *(Value(UNKNOWN, after) for after in (("backend",), ("plain",), ("backend", "plain"))),
            Value(UNKNOWN, ("taken",)),
        ),
        (
            *map(Value, (f"{other}-backend", f"{other}-taken", other, "shared", STRANGE, "bridge", "host", UNKNOWN)),
            *(Value(UNKNOWN, after) for after in (("found-backend",), ("backend", "run"), ("data",), ("own-backend",))),
        ),
    )


def volume_values(stack: str, other: str) -> Pools[Value]:
    """Names of volumes, and paths where a name belongs."""
    return Pools(
        (
            *map(Value, (f"{stack}-data", f"{stack}-media", f"{stack}-elsewhere")),
            *(Value(UNKNOWN, after) for after in (("data",), ("media",), ("data", "media"))),
            *BINDS.kept,
        ),
        (
            *map(Value, (f"{other}-data", f"{other}-elsewhere", other, "shared")),
            *(Value(UNKNOWN, after) for after in (("found-data",), ("own-data",), ("data", "run"), ("backend",))),
            *BINDS.wild,
        ),
    )


def container_values(stack: str, other: str, containers: Sequence[Given], number: int) -> Pools[Value]:
    """Names and ids of containers; only what stands before it can be what a container is made from."""
    return Pools(
        (
            *(Value(one.props["name"]) for one in containers),
            *(Value(f"/{one.props['name']}") for one in containers),
            *(Value(made_id(one.name)) for one in containers),
            *(Value(UNKNOWN, (one.name,)) for one in containers[:number]),
            *map(Value, (f"{stack}-db-1", f"{stack}-elsewhere")),
        ),
        (
            *map(Value, (f"{other}-db-1", f"/{other}-web-1", f"{other}-elsewhere", "shared", STRANGE, UNKNOWN)),
            *(Value(UNKNOWN, after) for after in (("found-db-1",), ("own-db-1",), ("c0", "run"), ("data",))),
        ),
    )


def joining(value: Value) -> Value:
    """The mode that joins a container's namespace."""
    return value if value.text == UNKNOWN else value._replace(text=f"container:{value.text}")


MOUNT_OPTIONS = Pools[Mapping[str, Any]](
    (
        {"driverName": "local"},
        {"driverOptions": {"type": "none", "o": "bind", "device": "/srv/files"}},
        {"driverOptions": {"type": "tmpfs", "device": "tmpfs", "o": "size=10m,uid=1000"}},
    ),
    (
        {"driverName": "sshfs"},
        {"driverName": UNKNOWN},
        {"driverOptions": {"type": "none", "o": "bind", "device": "/var/lib/docker/volumes/prod-data/_data"}},
        {"driverOptions": {"type": "overlay", "o": "lowerdir=/srv/a:/var/lib,upperdir=/srv/c,workdir=/srv/d"}},
    ),
)
"""`volumeOptions` of a volume that is made in the mount."""

BINDS = Pools(
    tuple(Value(path) for path, shows in PATHS.items() if not shows),
    tuple(Value(path) for path, shows in PATHS.items() if shows),
)


def container(dice: Dice, one: Given, networks: Pools[Value], volumes: Pools[Value], containers: Pools[Value]) -> Given:
    """The container with networks, namespaces and mounts."""
    wild = dice.wild()
    props, after = dict(one.props), defaultdict[str, list[str]](list)

    def write(key: str, value: Value) -> str:
        after[key] += value.after
        return value.text

    joined = Pools(tuple(map(joining, containers.kept)), tuple(map(joining, containers.wild)))
    modes = Pools(
        (Value("bridge"), Value("none"), *networks.kept, *joined.kept),
        (Value("default"), Value("host"), *networks.wild, *joined.wild),
    )
    names = [{"name": write("networksAdvanced", one)} for one in dice.some(networks.among(wild), 0 if wild else 1, 3)]
    if names:
        props["networksAdvanced"] = UNKNOWN if names == [{"name": UNKNOWN}] else names
    for key, pool in (("networkMode", modes), ("pidMode", joined), ("ipcMode", joined)):
        for value in dice.some(pool.among(wild), 0, 1):
            props[key] = write(key, value)
    if wild:
        props |= dice.one(HOST_MODES)
    mounts = [{"type": "volume", "volumeOptions": options} for options in dice.some(MOUNT_OPTIONS.among(wild), 0, 1)]
    for value in dice.some(volumes.among(wild), 0, 1):
        source = write("mounts", value)
        mounts.append({"type": "bind" if source.startswith("/") else "volume", "source": source})
    binds = [{"hostPath": write("volumes", value)} for value in dice.some(BINDS.among(wild), 0, 1)]
    binds += [{"volumeName": write("volumes", value)} for value in dice.some(volumes.among(wild), 0, 2)]
    for value in dice.some(containers.among(wild), 0, 1):
        text = write("volumes", value)
        binds.append({"fromContainer": text if text == UNKNOWN or dice.one((True, False)) else f"{text}:ro"})
    props |= {"mounts": mounts, "volumes": binds}
    return replace(one, props=props, after={key: sorted(set(sources)) for key, sources in after.items() if sources})


# --- The two, compared ---


def refused(stack: Stack, ledger: Path, without: str = "") -> set[str]:
    """The resources that the pack refuses."""
    rules = [BY_ID[rule] for rule in RULES if rule != without]
    found = run(stack.name, stack.resources, ledger, rules)
    return {one.resource for one in found if one.level == "mandatory"}


def reaching(stack: Stack) -> tuple[set[str], set[str]]:
    """The resources that reach out of the environment by themselves, and by whatever lies between."""
    host = Host(stack.name, stack.resources)
    return host.direct(), host.transitive()


@pytest.fixture(scope="module")
def ledger(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """One ledger for all graphs, read once."""
    file = tmp_path_factory.mktemp("ledger") / "Pulumi.host.yaml"
    file.write_text(LEDGER)
    read = LedgerSettings.read(file)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(LedgerSettings, "read", lambda path: read if path == file else None)
        yield file


def test_pack_and_brute_force_agree_on_every_graph(ledger: Path) -> None:
    seen: Counter[str] = Counter()

    @settings(
        max_examples=GRAPHS,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(STACKS)
    def agree(stack: Stack) -> None:
        said, (direct, transitive) = refused(stack, ledger), reaching(stack)
        assert said == direct
        assert bool(said) == bool(transitive)
        seen["graph"] += 1
        seen["refused" if said else "clean"] += 1
        seen["through another container"] += any(
            one.type == CONTAINER and one.name in transitive - direct for one in stack.resources
        )

    agree()
    assert seen["graph"] >= GRAPHS
    # Not worth much if nearly all of them were of one kind.
    assert all(count >= GRAPHS / 10 for count in seen.values())


@pytest.mark.parametrize("rule", HOLES)
def test_without_a_rule_a_graph_is_found_that_passes_and_should_not(rule: str, ledger: Path) -> None:
    def missed(stack: Stack) -> bool:
        return bool(reaching(stack)[0] - refused(stack, ledger, without=rule))

    found = find(
        STACKS,
        missed,
        settings=settings(max_examples=1_000, database=None, phases=[Phase.generate]),
        random=Random(0),  # noqa: S311 - the same graphs on every run
    )
    assert refused(found, ledger) == reaching(found)[0], "with the rule, it is refused"
