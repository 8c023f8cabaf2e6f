"""Drives the pack's real servicer in process, with the SDK's own proxies and unknowns, as the engine does:
every resource is analysed when it is registered, the whole stack at the end."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

from google.protobuf import struct_pb2  # type: ignore[import-untyped]
from pulumi.runtime.proto import analyzer_pb2
from pulumi_policy import EnforcementLevel
from pulumi_policy.deserialize import SPECIAL_SECRET_SIG, SPECIAL_SIG_KEY
from pulumi_policy.policy import _PolicyAnalyzerServicer
from pulumi_policy.proxy import UNKNOWN_STRING_VALUE

from policies.pack import policies
from policies.registry import RULES
from policies.rule import Rule
from policies.world import CONTAINER, NETWORK, STACK, VOLUME, World

UNKNOWN = UNKNOWN_STRING_VALUE

LEDGER = """
config:
  bulkhead:environments:
    prod: {tier: protected, subnet: 10.81.0.0/16, reservations: {cpus: 40%, memory: 40%}}
    prod-eu: {tier: protected, subnet: 10.84.0.0/16, reservations: {cpus: 10%, memory: 10%}}
    dev: {tier: best-effort, subnet: 10.82.0.0/16, limits: {memory: 20%}}
    dev-alice: {tier: best-effort, subnet: 10.83.0.0/16, limits: {memory: 10%}}
"""


@dataclass(frozen=True)
class Given:
    """One resource of a fixture. `after` names the resources that each property was made from."""

    type: str
    name: str
    props: Mapping[str, Any]
    after: Mapping[str, Sequence[str]] = field(default_factory=dict)
    outputs: Mapping[str, Any] = field(default_factory=dict)
    read: bool = False  # only looked up (`Network.get`): never analysed by itself
    parent: str = ""

    def but(self, **changes: Any) -> "Given":
        """The same with other properties; None takes one away."""
        props = {key: value for key, value in {**self.props, **changes}.items() if value is not None}
        return replace(self, props=props)


def container(stack: str, **changes: Any) -> Given:
    """A container of `stack` that no rule objects to, with `changes`."""
    props = {
        "name": f"{stack}-api-1-4f3a2b1",
        "image": UNKNOWN,
        "cgroupParent": f"/bulkhead-{stack}",
        "networkMode": "bridge",
        "networksAdvanced": [{"name": f"{stack}-backend", "aliases": ["api"]}],
        "envs": [f"PASSWORD={SECRET}"],
        "uploads": [{"file": "/run/secrets/key", "content": SECRET}],
        "memory": 256,
    }
    return Given(CONTAINER, "api", props).but(**changes)


def network(stack: str, **changes: Any) -> Given:
    """A network of `stack` that no rule objects to, with `changes`."""
    return Given(NETWORK, "backend", {"name": f"{stack}-backend", "driver": "bridge"}).but(**changes)


def volume(stack: str, **changes: Any) -> Given:
    """A volume of `stack` that no rule objects to, with `changes`."""
    return Given(VOLUME, "data", {"name": f"{stack}-data", "driver": "local"}).but(**changes)


SECRET = "hunter2-never-to-be-shown"


def secret(value: Any) -> Any:
    """A value as a Pulumi secret on the wire."""
    return {SPECIAL_SIG_KEY: SPECIAL_SECRET_SIG, "value": value}


class Violation(NamedTuple):
    """One mandatory diagnostic."""

    rule: str
    resource: str
    message: str


def run(stack: str, resources: Iterable[Given], file: Path, rules: Sequence[Rule] = RULES) -> list[Violation]:
    """What the pack says to a preview of `stack` with `resources`. Everything it says must be mandatory."""
    servicer: Any = _PolicyAnalyzerServicer(  # its methods have no types
        "bulkhead", "0.1.0", policies(rules, World.of(file)), EnforcementLevel.MANDATORY
    )
    root = Given(STACK, f"bulkhead-{stack}", {})
    everything = [root, *resources]
    urns = {one.name: urn(stack, one) for one in everything}
    found: list[Violation] = []
    for one in everything:
        if not one.read:
            request = analyzer_pb2.AnalyzeRequest(
                type=one.type,
                name=one.name,
                urn=urns[one.name],
                properties=struct(one.props),
                options=analyzer_pb2.AnalyzerResourceOptions(parent=one.parent),
            )
            found += violations(servicer.Analyze(request, None), one.name)
    whole = analyzer_pb2.AnalyzeStackRequest(resources=[as_output(one, urns) for one in everything])
    names = {urn: name for name, urn in urns.items()}
    for diagnostic in servicer.AnalyzeStack(whole, None).diagnostics:
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


def as_output(one: Given, urns: Mapping[str, str]) -> analyzer_pb2.AnalyzerResource:
    """A resource as the stack's analysis sees it: outputs, with an id that is unknown unless it is given."""
    return analyzer_pb2.AnalyzerResource(
        type=one.type,
        name=one.name,
        urn=urns[one.name],
        properties=struct({"ipcMode": UNKNOWN, **one.props, "id": UNKNOWN, **one.outputs}),
        parent=one.parent,
        dependencies=sorted({urns[source] for sources in one.after.values() for source in sources}),
        propertyDependencies={
            key: analyzer_pb2.AnalyzerPropertyDependencies(urns=[urns[source] for source in sources])
            for key, sources in one.after.items()
        },
    )


def violations(response: analyzer_pb2.AnalyzeResponse, name: str) -> list[Violation]:
    """The diagnostics of an answer. One that is not mandatory means that a rule failed open."""
    for diagnostic in response.diagnostics:
        assert diagnostic.enforcementLevel == analyzer_pb2.MANDATORY, diagnostic.message
    return [Violation(one.policyName, name, one.message) for one in response.diagnostics]
