"""What the rules see: the ledger, one resource's inputs, and the graph of the stack that is deployed.
Values are read through `fields`, which turns what is not known at preview into `UNKNOWN` instead of raising."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from functools import cached_property
from pathlib import Path
from typing import Any, Final, NamedTuple

from pulumi_policy import PolicyResource
from pulumi_policy.proxy import UnknownValueError

from settings.ledger import Environment, Ledger, LedgerSettings

CONTAINER: Final = "docker:index/container:Container"
NETWORK: Final = "docker:index/network:Network"
VOLUME: Final = "docker:index/volume:Volume"
IMAGE: Final = "docker:index/remoteImage:RemoteImage"
PROVIDER: Final = "pulumi:providers:docker"
STACK: Final = "pulumi:pulumi:Stack"

HOST: Final = "host"
"""The stack of the machine itself. It is no environment."""

BOUNDLESS: Final = {"cpus": 1e6, "memory": 2**60, "disk": 2**60}
"""Stands in for capacity that the ledger leaves to the engine, which the pack does not ask: percentages
still add up, and absolute amounts are weighed at deploy, when the capacity is known."""


class Unknown(Enum):
    """The type of `UNKNOWN`, so that a type checker tells it from every value."""

    UNKNOWN = "unknown at preview"


UNKNOWN: Final = Unknown.UNKNOWN


class Field(NamedTuple):
    """One value of a resource's inputs: `networksAdvanced[0].name`, and a str, float, bool, None or UNKNOWN."""

    path: str
    value: Any


def fields(props: Mapping[str, Any], pattern: str) -> Iterator[Field]:
    """The values at a dotted pattern such as `networksAdvanced.name` or `driverOpts.*`.

    Lists are walked wherever they stand. A missing key at the end of a pattern is a Field with None, so that a
    rule sees what is unset; below a missing block there is nothing. An unknown block is one UNKNOWN.
    """
    return _walk(props, pattern.split("."), "")


def _walk(node: Any, keys: list[str], path: str) -> Iterator[Field]:
    if node is UNKNOWN:
        yield Field(path, UNKNOWN)
    elif isinstance(node, Sequence) and not isinstance(node, str):
        for index in range(len(node)):
            yield from _walk(_at(node, index), keys, f"{path}[{index}]")
    elif isinstance(node, Mapping):
        if not keys:  # a block where a plain value belongs: nobody knows what it means
            yield Field(path, UNKNOWN)
            return
        for key in node if keys[0] == "*" else keys[:1]:
            yield from _walk(_at(node, key), keys[1:], f"{path}.{key}" if path else key)
    elif not keys:
        yield Field(path, node)


def _at(node: Any, key: str | int) -> Any:
    """One element. The SDK's proxies raise on unknowns here (and in `in`, `get`, iteration: not used)."""
    try:
        return node[key]
    except UnknownValueError:
        return UNKNOWN
    except KeyError:
        return None


@dataclass(frozen=True)
class Resource:
    """One resource of the deployment, with the inputs that its provider has checked (wire names)."""

    type: str
    name: str
    urn: str
    props: Mapping[str, Any]

    @property
    def stack(self) -> str:
        """The stack's name: `dev` of `urn:pulumi:dev::bulkhead::docker:index/network:Network::backend`."""
        return self.urn.split("::")[0].rpartition(":")[2]

    def fields(self, pattern: str) -> Iterator[Field]:
        """The values at a pattern; see `fields`."""
        return fields(self.props, pattern)


@dataclass
class World:
    """The ledger, and what this run has registered so far.

    `seen` holds the inputs of every resource that this stack manages: a resource that is only looked up
    (`Network.get`) is never analysed and so is not in it. `open` holds what a rule could not decide from one
    resource alone; `told`, which rule says of a resource that there is no ledger to judge it by.
    """

    read_ledger: Callable[[], Ledger]
    seen: dict[str, Resource] = field(default_factory=dict)
    open: dict[str, set[str]] = field(default_factory=dict)
    told: dict[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, file: Path) -> "World":
        """The world of a ledger file, which is read when the first rule asks for it."""
        return cls(lambda: LedgerSettings.read(file).resolve(BOUNDLESS))

    @cached_property
    def ledger(self) -> Ledger:
        """The ledger. SettingsError when it cannot be read or does not add up."""
        return self.read_ledger()

    def owner(self, name: str) -> Environment | None:
        """The environment whose name begins a network's, volume's or container's: `dev-alice` before `dev`."""
        owners = [one for one in self.ledger.environments.values() if name.startswith(f"{one.name}-")]
        return max(owners, key=lambda one: len(one.name), default=None)


class Graph:
    """The whole stack after its last resource was registered: who depends on whom, and the ids that are known."""

    def __init__(self, world: World, resources: Iterable[PolicyResource]) -> None:
        self._world = world
        self._resources = {resource.urn: resource for resource in resources}

    def behind(self, urn: str, path: str) -> list[Resource]:
        """The resources that the property at `path` was made from; a looked-up one with what is known of it."""
        resource = self._resources.get(urn)
        sources = resource.property_dependencies.get(path.split(".")[0].split("[")[0], []) if resource else []
        return [
            self._world.seen.get(source.urn) or Resource(source.resource_type, source.name, source.urn, source.props)
            for source in sources
        ]

    def creates(self, kind: str, reference: str) -> bool:
        """Whether this stack itself makes the `kind` of that name or id."""
        return any(
            reference in (value for _, value in (*mine.fields("name"), *self._ids(mine.urn))) for mine in self.of(kind)
        )

    def of(self, kind: str) -> list[Resource]:
        """The resources of a type that this stack makes."""
        return [mine for mine in self._world.seen.values() if mine.type == kind]

    def _ids(self, urn: str) -> Iterator[Field]:
        if urn in self._resources:
            yield from fields(self._resources[urn].props, "id")
