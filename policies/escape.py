"""Escape hatches: resources that make containers where the other rules do not look.
What the pack cannot judge is refused."""

import re
from collections.abc import Iterator

from policies.rule import EVERYWHERE, OPEN, Finding, Open, Subject, rule
from policies.world import CONTAINER, IMAGE, NETWORK, PROVIDER, VOLUME, Field

JUDGED = frozenset(
    {CONTAINER, NETWORK, VOLUME, IMAGE, "docker:index/tag:Tag", "docker:index/registryImage:RegistryImage"}
)
"""Resources of the docker provider that other rules judge, or that start nothing on the host."""

ENGINE_CALL = re.compile(
    r"\b(?:docker|dockerd|podman|nerdctl|ctr|crictl|containerd|runc|nsenter|systemd-run)\b|\bcgroup", re.ASCII
)
"""A script that drives an engine, or moves processes between cgroups and namespaces."""


@rule(
    id="unsupported-resource",
    title="environments use only resources that the pack can judge",
    references=("Swarm services, plugins and dynamic providers bypass every rule for containers",),
    reads={"docker:*": (), "docker-build:*": (), "pulumi-python:dynamic*": (), "pulumi-nodejs:dynamic*": ()},
)
def unsupported_resource(_field: Field, about: Subject) -> Iterator[Finding]:
    """A type of the docker provider that nobody thought of is refused too."""
    if about.resource.type not in JUDGED:
        yield Finding(
            about.resource.type,
            "it can start containers or code on the host that no other rule sees",
            "use docker Container, Network, Volume and RemoteImage",
        )


@rule(
    id="engine-command",
    title="commands of an environment drive no container engine",
    references=("docker run in a command bypasses every rule for containers",),
    reads={"command:*": ("create", "update", "delete", "interpreter")},
)
def engine_command(field: Field, _about: Subject) -> Iterator[Finding]:
    """The script itself may hold secrets, so only the word that gives it away is shown."""
    call = ENGINE_CALL.search(str(field.value or ""))
    if call:
        yield Finding(
            f"a script with {call[0]!r}",
            "what it starts is in no plan and under no rule",
            "declare a docker Container, or do it in the host stack",
        )


@rule(
    id="one-docker-host",
    title="a stack has one Docker host",
    references=("a second provider deploys where the ledger does not count",),
    reads={PROVIDER: ("host",)},
    tiers=EVERYWHERE,
)
def one_docker_host(field: Field, about: Subject) -> Iterator[Finding | Open]:
    """Two providers for one address are one host."""
    if about.graph is None:
        yield OPEN
        return
    others = {
        str(host.value or "the default")
        for provider in about.graph.of(PROVIDER)
        for host in provider.fields("host")
        if provider.urn != about.resource.urn and host.value != field.value
    }
    if others:
        yield Finding(
            repr(field.value) if field.value else "not set",
            f"another provider of this stack has {', '.join(sorted(others))}: what runs on two machines "
            "is not kept apart by one ledger",
            "give every provider of the stack the ledger's bulkhead:host",
        )
