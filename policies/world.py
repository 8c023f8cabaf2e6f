"""What the rules see: the ledger, one resource's inputs, and the graph of the stack that is deployed.
Values are read through `fields`, which finds what is set, unset and `UNKNOWN` at a pattern."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, date, datetime
from functools import cached_property
from pathlib import Path
from typing import Any, Final, NamedTuple

from policies.wire import UNKNOWN, properties
from settings.backup import last_known
from settings.ledger import Environment, Ledger, LedgerSettings

CONTAINER: Final = "docker:index/container:Container"
NETWORK: Final = "docker:index/network:Network"
VOLUME: Final = "docker:index/volume:Volume"
IMAGE: Final = "docker:index/remoteImage:RemoteImage"
TAG: Final = "docker:index/tag:Tag"
PUSHED: Final = "docker:index/registryImage:RegistryImage"
PROVIDER: Final = "pulumi:providers:docker"
STACK: Final = "pulumi:pulumi:Stack"
REFERENCE: Final = "pulumi:pulumi:StackReference"
OURS: Final = "bulkhead:index:"
DECLARED: Final = f"{OURS}Volume"
"""The component of a volume: what the Compose file says of it."""
JOB: Final = f"{OURS}BackupJob"
ENVIRONMENT: Final = f"{OURS}Environment"
"""The component of an environment: its inputs tell what its Compose files read on the deployer's machine."""
BUILT: Final = f"{OURS}Image"
"""The component of an image: where it is built here, its inputs tell how."""

HOST: Final = "host"
"""The stack of the machine itself. It is no environment."""

BOUNDLESS: Final = {"cpus": 1e6, "memory": 2**60, "disk": 2**60}
"""Stands in for capacity that the ledger leaves to the engine, which the pack does not ask: percentages
still add up, and absolute amounts are weighed with the capacity that the host stack has put out."""


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
    elif isinstance(node, list):
        for index, one in enumerate(node):
            yield from _walk(one, keys, f"{path}[{index}]")
    elif isinstance(node, Mapping):
        if not keys:  # a block where a plain value belongs: nobody knows what it means
            yield Field(path, UNKNOWN)
            return
        for key in node if keys[0] == "*" else keys[:1]:
            yield from _walk(node.get(key), keys[1:], f"{path}.{key}" if path else key)
    elif not keys:
        yield Field(path, node)


@dataclass(frozen=True)
class Resource:
    """One resource of the deployment, with the inputs that its provider has checked (wire names).

    `parent`: URN of the component it is a child of. `provider`: the inputs of its provider, None for a component.
    `delete_before_replace`: as the program says, None where it leaves it to the provider.
    """

    type: str
    name: str
    urn: str
    props: Mapping[str, Any]
    parent: str = ""
    provider: Mapping[str, Any] | None = None
    protect: bool = False
    delete_before_replace: bool | None = None

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
    `today`: UTC, against which exemptions expire. `backups`: what the host knows of each volume's (`last_known`); None
    where nobody has asked it.
    """

    read_settings: Callable[[], LedgerSettings]
    today: date = field(default_factory=lambda: datetime.now(UTC).date())
    seen: dict[str, Resource] = field(default_factory=dict)
    open: dict[str, set[str]] = field(default_factory=dict)
    told: dict[str, str] = field(default_factory=dict)
    backups: Mapping[str, Mapping[str, float]] | None = None

    @classmethod
    def of(cls, file: Path, backups: str | None = None) -> "World":
        """The world of a ledger file, which is read when the first rule asks for it. `backups`: as JSON; what is none
        counts as if nothing had ever been backed up."""
        return cls(lambda: LedgerSettings.read(file), backups=last_known(backups) if backups else None)

    @cached_property
    def settings(self) -> LedgerSettings:
        """The ledger as written. SettingsError when it cannot be read."""
        return self.read_settings()

    @cached_property
    def ledger(self) -> Ledger:
        """The ledger. SettingsError when it cannot be read or does not add up."""
        return self.settings.resolve(BOUNDLESS)

    @property
    def promised(self) -> Mapping[str, Any] | None:
        """The outputs of the host stack as deployed, empty before its first deploy; None where the program does not
        show them (`components.promises`). UNKNOWN values stand where they stand."""
        for one in self.seen.values():
            outputs = one.props.get("outputs") if one.type == f"{OURS}Promises" else None
            if isinstance(outputs, Mapping):
                return outputs
        return None

    def measured(self) -> Ledger | None:
        """The ledger in absolute amounts; None as long as nobody has said what the machine has.

        Capacity that the ledger leaves to the engine is what the host stack has put out.
        """
        told = (self.promised or {}).get("capacity")
        asked = {key: value for key, value in (told or {}).items() if isinstance(value, int | float)}
        return self.settings.resolve(asked) if self.settings.missing_capacity <= asked.keys() else None

    def owner(self, name: str) -> Environment | None:
        """The environment whose name begins a network's, volume's or container's: `dev-alice` before `dev`."""
        owners = [one for one in self.ledger.environments.values() if name.startswith(f"{one.name}-")]
        return max(owners, key=lambda one: len(one.name), default=None)

    def component(self, resource: Resource, kind: str) -> Resource | None:
        """The nearest component `bulkhead:index:<kind>` that the resource is a child of."""
        return next((one for one in self.above(resource) if one.type == f"{OURS}{kind}"), None)

    def above(self, resource: Resource) -> Iterator[Resource]:
        """Everything that the resource is a child of, the nearest first."""
        one = self.seen.get(resource.parent)
        while one is not None:
            yield one
            one = self.seen.get(one.parent)


class Graph:
    """The whole stack after its last resource was registered: who depends on whom, and the ids that are known.

    `resources`: `pulumirpc.AnalyzerResource` messages, read only where a rule asks.
    """

    def __init__(self, world: World, resources: Sequence[Any]) -> None:
        self._world = world
        self._resources = {resource.urn: resource for resource in resources}
        self._read: dict[str, Resource] = {}

    def behind(self, urn: str, path: str) -> list[Resource]:
        """The resources that the property at `path` was made from; a looked-up one with what is known of it."""
        resource = self._resources.get(urn)
        key = path.split(".")[0].split("[")[0]
        if resource is None or key not in resource.propertyDependencies:
            return []
        sources = resource.propertyDependencies[key].urns
        return [self._world.seen.get(source) or self._outputs(source) for source in sources]

    def creates(self, kind: str, reference: str) -> bool:
        """Whether this stack itself makes the `kind` of that name or id."""
        return any(
            reference in (value for _, value in (*mine.fields("name"), *self._ids(mine.urn))) for mine in self.of(kind)
        )

    def of(self, kind: str) -> list[Resource]:
        """The resources of a type that this stack makes."""
        return [mine for mine in self._world.seen.values() if mine.type == kind]

    def puts_out(self, one: Resource, key: str) -> Any:
        """An output of a resource, by its wire name; None where it has none of that name."""
        return self._outputs(one.urn).props.get(key)

    def made_from(self, kind: str) -> Iterator[tuple[str, str]]:
        """(URN of a resource, name of one of type `kind`, also a looked-up one, that it was made from)."""
        for urn, one in self._resources.items():
            sources = {
                *one.dependencies,
                *(source for made in one.propertyDependencies.values() for source in made.urns),
            }
            for source in sorted(sources):
                made, _, name = source.partition("::")[2].partition("::")[2].partition("::")
                if made.rpartition("$")[2] == kind:
                    yield urn, name

    def _outputs(self, urn: str) -> Resource:
        if urn not in self._read:
            one = self._resources.get(urn)
            made = ("", "", {}) if one is None else (one.type, one.name, properties(one.properties))
            self._read[urn] = Resource(made[0], made[1], urn, made[2])
        return self._read[urn]

    def _ids(self, urn: str) -> Iterator[Field]:
        if urn in self._resources:
            yield from fields(self._outputs(urn).props, "id")
