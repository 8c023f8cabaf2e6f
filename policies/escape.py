"""Escape hatches: resources that make containers, or change the host, where the other rules do not look.
What the pack cannot judge is refused."""

import re
from collections.abc import Iterator, Mapping

from policies.reach import naming
from policies.rule import (
    BEST_EFFORT,
    EVERYWHERE,
    OPEN,
    Finding,
    Open,
    Subject,
    UndecidedError,
    accepted,
    listed,
    rule,
)
from policies.wire import UNKNOWN
from policies.world import (
    CONTAINER,
    IMAGE,
    NETWORK,
    OURS,
    PROVIDER,
    PUSHED,
    REFERENCE,
    STACK,
    TAG,
    VOLUME,
    Field,
)
from settings.errors import did_you_mean

JUDGED = frozenset(
    {
        CONTAINER,
        NETWORK,
        VOLUME,
        IMAGE,
        TAG,
        PUSHED,
        "command:local:Command",
        "command:remote:Command",
        PROVIDER,
        "pulumi:providers:command",
        "pulumi:providers:pulumi",
        STACK,
        REFERENCE,
    }
)
"""Resources that other rules judge."""

HARMLESS = frozenset({"random", "tls", "time", "std"})
"""Packages whose resources live in Pulumi's state only."""

ENGINE_CALL = re.compile(
    r"\b(?:docker|dockerd|podman|nerdctl|ctr|crictl|containerd|runc|nsenter|unshare|chroot|systemd-run|systemctl)\b"
    r"|\bcgroup|\.sock\b",
    re.ASCII,
)
"""A script that drives an engine, or moves processes between cgroups and namespaces."""

GENERATOR = re.compile(r"head -c \d{1,4} /dev/urandom \| base64 -w0 \| tr '\+/' '-_' \| tr -d '='")
"""The script with which components.secret makes a secret."""


@rule(
    id="unsupported-resource",
    title="environments use only resources that the pack can judge",
    references=(
        "Swarm services, plugins, dynamic and other providers bypass every rule for containers",
        "a RegistryImage builds what no rule for builds judges",
    ),
    reads={"*": ()},
    options={"packages": listed([], "Further Pulumi packages that a program may use: cloudflare, aws.")},
)
def unsupported_resource(_field: Field, about: Subject) -> Iterator[Finding]:
    """A type that nobody thought of is refused too. A component, which has no provider, makes nothing by itself."""
    kind = about.resource.type
    package = kind.removeprefix("pulumi:providers:").partition(":")[0]
    if kind == PUSHED and about.resource.props.get("build") is not None:
        yield Finding(
            "a RegistryImage with build",
            "where it builds, what with and from whose files is under no rule",
            "build it with components.image (build in Compose), and push that",
        )
    if kind in JUDGED or package in {*HARMLESS, *about.options["packages"]} - {"docker", "command"}:
        return
    if about.resource.provider is None and not kind.startswith(("pulumi:providers:", "docker:", "command:")):
        return
    yield Finding(
        kind,
        "it can start containers or code on the host, or elsewhere, that no other rule sees",
        "use docker Container, Network, Volume and RemoteImage; for a package that cannot touch the host, list it in "
        "the option packages of this rule",
    )


@rule(
    id="engine-command",
    title="commands of an environment drive no container engine and touch no other environment",
    references=("docker run in a command bypasses every rule for containers",),
    reads={"command:*": ("create", "update", "delete", "interpreter", "stdin", "dir", "environment.*")},
)
def engine_command(field: Field, about: Subject) -> Iterator[Finding]:
    """The script itself may hold secrets, so only the word that gives it away is shown."""
    text = str(field.value or "")
    call = ENGINE_CALL.search(text)
    if call:
        yield Finding(
            f"a script with {call[0]!r}",
            "what it starts is in no plan and under no rule",
            "declare a docker Container, or do it in the host stack",
        )
    elif field.value and (owner := naming(text, about)):
        yield Finding(
            f"a script with the name of {owner}",
            f"it may read or change what is {owner}'s",
            f"name only what is {about.resource.stack}'s",
        )


@rule(
    id="best-effort-command",
    title="a best-effort environment runs only commands that are known",
    references=("a shell script can do anything that the deployer may",),
    reads={"command:*": ("create", "update", "delete", "interpreter", "stdin", "environment.*")},
    tiers=BEST_EFFORT,
    options={"allow": listed([], "Scripts that may run as they are written here, to the letter.")},
)
def best_effort_command(field: Field, about: Subject) -> Iterator[Finding]:
    """What a script does cannot be told from its text, so the text itself must be known."""
    text = str(field.value or "")
    known = field.path in ("create", "update", "delete") and (
        GENERATOR.fullmatch(text) or text in about.options["allow"]
    )
    if text and not known:
        yield Finding(
            "a script that is not known" if field.path in ("create", "update", "delete") else "set",
            "it runs on the deployer's machine with all that the deployer may do, to any environment",
            "do it in an image's build or in a service; or list the script, as it is, in the option allow of this rule",
        )


@rule(
    id="one-docker-host",
    title="a stack has one Docker host, the ledger's",
    references=("a second provider deploys where the ledger does not count",),
    reads={PROVIDER: ("host", "context")},
    tiers=EVERYWHERE,
)
def one_docker_host(field: Field, about: Subject) -> Iterator[Finding | Open]:
    """Two providers for one address are one host. A context may be any machine."""
    fix = "give every provider of the stack the ledger's bulkhead:host"
    if field.path == "context":
        if field.value:
            yield Finding(repr(field.value), "what a context leads to is known on the deployer's machine only", fix)
        return
    promised = about.ledger.host
    if promised and field.value != promised:
        yield Finding(
            repr(field.value) if field.value else "not set",
            f"the ledger counts {promised}: what runs elsewhere has no budget and no walls",
            fix,
        )
        return
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
            fix,
        )


OWN_LABELS = ("bulkhead.environment", "bulkhead.tier")


@rule(
    id="own-labels",
    title="every resource says whose it is",
    references=("what has no label is found by no command, monitoring or proof",),
    reads={CONTAINER: (), NETWORK: (), VOLUME: ()},
)
def own_labels(_field: Field, about: Subject) -> Iterator[Finding]:
    """`bulkhead.environment` and, on containers and networks, `bulkhead.tier`. A volume cannot be relabelled without
    losing its data, so its tier may be an older one."""
    own = about.own
    values = dict(about.resource.fields("labels.value"))
    written = {
        name: values.get(path.removesuffix("label") + "value") for path, name in about.resource.fields("labels.label")
    }
    if UNKNOWN in written or UNKNOWN in (written.get(label) for label in OWN_LABELS):
        raise UndecidedError
    wanted = {"bulkhead.environment": about.resource.stack}
    if about.resource.type != VOLUME and own:
        wanted["bulkhead.tier"] = str(own.tier)
    for label, value in wanted.items():
        if written.get(label) != value:
            yield Finding(
                f"{label}={written.get(label)}" if label in written else f"{label} not set",
                "commands, monitoring and proofs take it for another environment's, or do not see it at all",
                f"add the label {label}={value} (components.labels)",
                at="labels",
            )


@rule(
    id="exemption",
    title="exemptions are complete, accepted and not expired",
    references=("an exemption without an end is a hole",),
    reads={f"{OURS}*": ()},
    tiers=EVERYWHERE,
)
def exemption(_field: Field, about: Subject) -> Iterator[Finding]:
    """Also of those that nothing needs any more: they are removed, or will hide something later."""
    from policies.registry import BY_ID  # here, since the registry imports this module

    written = about.resource.props.get("exempt", [])
    if not isinstance(written, list):
        raise UndecidedError
    for number, one in enumerate(written):
        if not isinstance(one, Mapping):
            raise UndecidedError
        name = str(one.get("rule"))
        judged = (
            accepted(one, BY_ID[name], about)
            if name in BY_ID
            else f"there is no rule of that name. {did_you_mean(name, BY_ID)}"
        )
        if isinstance(judged, str):
            yield Finding(
                repr(name),
                f"this exemption does not count: {judged.removesuffix('.')}",
                "correct or remove it (x-bulkhead.exempt)",
                at=f"exempt[{number}]",
            )
