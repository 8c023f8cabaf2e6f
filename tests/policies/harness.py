"""Drives the pack's server in process with the messages that the engine sends:
every resource is remedied and analysed when it is registered, the whole stack at the end."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any, NamedTuple

from google.protobuf import struct_pb2  # type: ignore[import-untyped]
from pulumi.runtime.proto import analyzer_pb2
from pulumi_policy.deserialize import SPECIAL_SECRET_SIG, SPECIAL_SIG_KEY
from pulumi_policy.proxy import UNKNOWN_STRING_VALUE

from policies.registry import RULES
from policies.rule import Rule, Setting
from policies.server import Server
from policies.world import CONTAINER, IMAGE, NETWORK, STACK, VOLUME, World

UNKNOWN = UNKNOWN_STRING_VALUE

LEDGER = """
config:
  bulkhead:environments:
    prod: {tier: protected, subnet: 10.81.0.0/16, reservations: {cpus: 40%, memory: 40%}}
    prod-eu: {tier: protected, subnet: 10.84.0.0/16, reservations: {cpus: 10%, memory: 10%}}
    dev: {tier: best-effort, subnet: 10.82.0.0/16, limits: {memory: 20%}}
    dev-alice: {tier: best-effort, subnet: 10.83.0.0/16, limits: {memory: 10%}}
"""

GIB = 2**30
HOST_OUTPUTS: Mapping[str, Any] = {
    "capacity": {"cpus": 10.0, "memory": 10 * GIB, "disk": 1000 * GIB},
    "environments": {
        "prod": {"tier": "protected", "budget": {"reservations": {"cpus": 4.0, "memory": 4 * GIB}, "limits": None}},
        "dev": {"tier": "best-effort", "budget": {"reservations": None, "limits": {"memory": 2 * GIB}}},
    },
}
"""What the host stack has put out: a machine of 10 CPUs and 10 GiB with the promises of `LEDGER`."""

TODAY = date(2026, 6, 15)
BACKUPS = {
    f"prod-{name}": {"last_verified": datetime(2026, 6, day, 12, tzinfo=UTC).timestamp()} if day else {}
    for name, day in {"data": 14, "old": 6, "last": 7, "never": 0}.items()
}
"""When the host has last checked a restore of each volume's backup; the ledger's limit is eight days."""
TIERS = {"prod": "protected", "prod-eu": "protected", "dev": "best-effort", "dev-alice": "best-effort"}


@dataclass(frozen=True)
class Given:
    """One resource of a fixture. `after` names the resources that each property was made from."""

    type: str
    name: str
    props: Mapping[str, Any]
    after: Mapping[str, Sequence[str]] = field(default_factory=dict)
    outputs: Mapping[str, Any] = field(default_factory=dict)
    read: bool = False  # only looked up (`Network.get`): the engine shows it to no policy
    parent: str = ""  # a component, by its name
    protect: bool = False
    delete_before_replace: bool | None = None
    provider: bool | None = None  # None: as its type says, components have none

    def but(self, **changes: Any) -> "Given":
        """The same with other properties; None takes one away."""
        props = {key: value for key, value in {**self.props, **changes}.items() if value is not None}
        return replace(self, props=props)


IMAGE_ID = "sha256:" + "ab" * 32


def labels(stack: str) -> list[dict[str, str]]:
    """The labels that every resource of `stack` has."""
    return [
        {"label": "bulkhead.environment", "value": stack},
        {"label": "bulkhead.tier", "value": TIERS.get(stack, "host")},
    ]


def container(stack: str, **changes: Any) -> Given:
    """A container of `stack` that no rule objects to, with `changes`."""
    props = {
        "name": f"{stack}-api-1-4f3a2b1",
        "image": IMAGE_ID,
        "cgroupParent": f"/bulkhead-{stack}",
        "networkMode": "bridge",
        "networksAdvanced": [{"name": f"{stack}-backend", "aliases": ["api"]}],
        "envs": [f"GREETING={SECRET}"],
        "uploads": [{"file": "/run/secrets/key", "content": SECRET, "permissions": "0444"}],
        "memory": 256,
        "user": "10001",
        "readOnly": True,
        "init": True,
        "capabilities": {"drops": ["ALL"]},
        "securityOpts": ["no-new-privileges:true"],
        "logDriver": "json-file",
        "logOpts": {"max-size": "10m"},
        "healthcheck": {"tests": ["CMD", "true"]},
        "restart": "unless-stopped",
        "stopTimeout": 10,
        "destroyGraceSeconds": 10,
        "labels": labels(stack),
    }
    return Given(CONTAINER, "api", props).but(**changes)


SUBNETS = {"prod": "10.81.1.0/24", "prod-eu": "10.84.1.0/24", "dev": "10.82.1.0/24", "dev-alice": "10.83.1.0/24"}


def network(stack: str, **changes: Any) -> Given:
    """A network of `stack` that no rule objects to, with `changes`."""
    props = {
        "name": f"{stack}-backend",
        "driver": "bridge",
        "ipamConfigs": [{"subnet": SUBNETS.get(stack, "10.99.1.0/24")}],
        "labels": labels(stack),
    }
    return Given(NETWORK, "backend", props).but(**changes)


def volume(stack: str, **changes: Any) -> Given:
    """A volume of `stack` that no rule objects to (in prod, below `declared()`), with `changes`."""
    props = {"name": f"{stack}-data", "driver": "local", "labels": labels(stack)}
    return Given(VOLUME, "data", props, protect=True, parent="declared").but(**changes)


def component(kind: str, name: str, **props: Any) -> Given:
    """One of Bulkhead's components, with the inputs that it shows to policies."""
    return Given(f"bulkhead:index:{kind}", name, props)


DECLARED = component("Volume", "declared", backup={"engine": "files", "schedule": "daily"})
"""The component of a volume that is backed up."""


PROMISES = "bulkhead:index:Promises"


def promises(outputs: Any = HOST_OUTPUTS) -> Given:
    """The host stack's outputs, as every stack of Bulkhead shows them."""
    return Given(PROMISES, "promises", {"outputs": outputs})


IMAGE_MADE = Given(IMAGE, "image-of-containers", {"name": f"nginx:1@sha256:{'cd' * 32}"}, outputs={"imageId": IMAGE_ID})
"""The image whose id `container()` has: the stack makes it."""


SECRET = "hunter2-never-to-be-shown"


def secret(value: Any) -> Any:
    """A value as a Pulumi secret on the wire."""
    return {SPECIAL_SIG_KEY: SPECIAL_SECRET_SIG, "value": value}


class Violation(NamedTuple):
    """One diagnostic. `level`: mandatory or advisory."""

    rule: str
    resource: str
    message: str
    level: str = "mandatory"


def run(
    stack: str,
    resources: Iterable[Given],
    file: Path,
    rules: Sequence[Rule] = RULES,
    settings: Mapping[str, Setting] | None = None,
    remedy: bool = False,
    today: date = TODAY,
    twice: Sequence[Given] = (),
) -> list[Violation]:
    """What the pack says to a preview of `stack` with `resources`.

    `remedy`: remedies are applied first, as the engine does. `twice`: versions of resources that are analysed before
    the final ones, as the engine does with what is replaced.
    """
    server: Any = Server(rules, World(World.of(file).read_settings, today, backups=BACKUPS))
    server._settings = settings or {}
    root = Given(STACK, f"bulkhead-{stack}", {})
    # Components are there before their children, whatever the order of the rest.
    everything = [root, *sorted(resources, key=lambda one: not one.type.startswith("bulkhead:"))]
    if not any(one.type == PROMISES for one in everything):
        everything.insert(1, promises())
    if any(one.type == CONTAINER for one in everything) and not any(one.name == IMAGE_MADE.name for one in everything):
        everything.append(IMAGE_MADE)
    urns = {one.name: urn(stack, one) for one in everything}
    found: list[Violation] = []
    for one in (one for one in twice if not one.read):
        server.Analyze(as_input(one, urns), None)
    for one in everything:
        if not one.read:
            request = as_input(one, urns)
            if remedy:
                for remediation in server.Remediate(request, None).remediations:
                    request.properties.CopyFrom(remediation.properties)
            found += violations(server.Analyze(request, None), one.name)
    whole = analyzer_pb2.AnalyzeStackRequest(resources=[as_output(one, urns) for one in everything if not one.read])
    names = {urn: name for name, urn in urns.items()}
    for diagnostic in server.AnalyzeStack(whole, None).diagnostics:
        found += violations(analyzer_pb2.AnalyzeResponse(diagnostics=[diagnostic]), names[diagnostic.urn])
    return found


def urn(stack: str, one: Given) -> str:
    """A URN as the engine makes it, below a component where there is a parent."""
    return f"urn:pulumi:{stack}::bulkhead::{one.parent and 'bulkhead:index:Service$'}{one.type}::{one.name}"


def struct(props: Mapping[str, Any]) -> struct_pb2.Struct:
    """Properties on the wire."""
    made = struct_pb2.Struct()
    made.update(dict(props))
    return made


def as_input(one: Given, urns: Mapping[str, str]) -> analyzer_pb2.AnalyzeRequest:
    """A resource as it is analysed before each step: its inputs."""
    request = analyzer_pb2.AnalyzeRequest(
        type=one.type,
        name=one.name,
        urn=urns[one.name],
        properties=struct(one.props),
        options=analyzer_pb2.AnalyzerResourceOptions(
            parent=urns.get(one.parent, ""),
            protect=one.protect,
            deleteBeforeReplace=bool(one.delete_before_replace),
            deleteBeforeReplaceDefined=one.delete_before_replace is not None,
        ),
    )
    packages = ("docker:", "command:", "random:", "docker-build:", "pulumi-python:", "pulumi-nodejs:")
    if one.provider if one.provider is not None else one.type.startswith(packages):
        request.provider.CopyFrom(analyzer_pb2.AnalyzerProviderResource(type="pulumi:providers:any"))
    return request


def as_output(one: Given, urns: Mapping[str, str]) -> analyzer_pb2.AnalyzerResource:
    """A resource as the stack's analysis sees it: outputs, with an id that is unknown unless it is given."""
    return analyzer_pb2.AnalyzerResource(
        type=one.type,
        name=one.name,
        urn=urns[one.name],
        properties=struct({"ipcMode": UNKNOWN, **one.props, "id": UNKNOWN, **one.outputs}),
        parent=urns.get(one.parent, ""),
        dependencies=sorted({urns[source] for sources in one.after.values() for source in sources}),
        propertyDependencies={
            key: analyzer_pb2.AnalyzerPropertyDependencies(urns=[urns[source] for source in sources])
            for key, sources in one.after.items()
        },
    )


LEVEL_NAMES = {analyzer_pb2.MANDATORY: "mandatory", analyzer_pb2.ADVISORY: "advisory"}


def violations(response: analyzer_pb2.AnalyzeResponse, name: str) -> list[Violation]:
    """The diagnostics of an answer."""
    return [
        Violation(one.policyName, name, one.message, LEVEL_NAMES[one.enforcementLevel]) for one in response.diagnostics
    ]


def attachable(one: Given, stack: str) -> bool:
    """Whether a container has the usual network of its stack, and no other."""
    attached = one.props.get("networksAdvanced") if one.type == CONTAINER else None
    return isinstance(attached, list) and attached == container(stack).props["networksAdvanced"]
