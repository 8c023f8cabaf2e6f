"""`up`, `preview` and `down` over several stacks: what is done in which order, and what stops it.
Each is one readable function; Pulumi does the work."""

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import nullcontext
from itertools import pairwise
from pathlib import Path
from typing import Any

from rich.console import Console

from cli import agent as agents
from cli import policyconfig, previews
from cli.agent import Agent
from cli.order import HOST, Stacks
from cli.previews import Outcome, Preview
from cli.pulumi import Pulumi, PulumiError
from settings.ledger import Tier

CONTAINER = "docker:index/container:Container"
VOLUME = "docker:index/volume:Volume"
JOBS = "backup_jobs"  # stacks.environment
STRICT = "--expect-no-changes"  # Pulumi's own word on whether a deploy can be left out
RETRY_UP = "See the error above; correct it, then make up again"


def policy_pack(root: Path, variables: Mapping[str, str]) -> tuple[str, ...]:
    """Pulumi's options for the pack that every preview and deploy goes through: POLICY_PACK, else the checkout's own.

    Its config goes with it, where there is one. SettingsError for a config that does not fit the pack.
    """
    pack = root / (variables.get("POLICY_PACK") or "policies")
    config = policyconfig.find(pack, root, variables)
    if config is None:
        return ("--policy-pack", str(pack))
    policyconfig.check(config, pack)
    return ("--policy-pack", str(pack), "--policy-pack-config", str(config))


def up(
    pulumi: Pulumi, stacks: Stacks, pack: Sequence[str], agent: Agent, console: Console, *, held: bool = False
) -> int:
    """Deploy what differs, tell the host's agent what is to be there, and prove that every boundary holds.

    Fails when the proof does: what is deployed stays, and somebody has to look. `held`: no backup is taken by schedule
    until it is told again, since the data is yet to come.
    """
    with agent.deploying(stacks.names):
        changed: list[str] = []
        code = deploy(pulumi, stacks, pack, changed, console)
        # Also of a deploy that failed: the stacks before it are as they say. And of one without changes: a plain
        # `pulumi up` before it has told the host nothing.
        for name in stacks.environments if code == 0 else changed:
            agent.declare(name, pulumi.outputs(name))
            agent.entrust(name, pulumi.secret(name, JOBS), held=held)
    if code:
        return code
    if not agent.declared():
        console.print("Proof: no environment is deployed yet, so there is nothing to try a way from")
        return 0
    return agents.prove(agent, console)


def deploy(pulumi: Pulumi, stacks: Stacks, pack: Sequence[str], changed: list[str], console: Console) -> int:
    """Deploy what differs: host first, protected environments next. Stops at the first stack that fails.

    `changed` gets the environments that were deployed.
    Stacks without changes are found by previews, some at a time, since a deploy of each would take longer. A violation
    in a deployed stack stops everything before anything is applied; so does host's change when host is not among the
    stacks that were named, since it touches every environment.
    """
    _say_without_file(stacks, console)
    names = (HOST, *stacks.environments)  # an environment needs the host's slices, so host is always looked at
    known = pulumi.stacks()
    keep_promises(pulumi, stacks, known)
    deployed = {name for name, resources in known.items() if resources}
    # Without host's outputs a preview of an environment can only fail.
    first = [name for name in names if name in deployed] if HOST in deployed else []
    found = previews.run(pulumi, first, pack, console, [STRICT])
    violating = [preview for preview in found.values() if preview.violations]
    for preview in violating:
        previews.show(preview, console)
    if violating:
        return _stopped(f"{' and '.join(one.stack for one in violating)}: nothing was changed. {RETRY_UP}", console)
    if HOST not in found or found[HOST].outcome is not Outcome.UNCHANGED:
        if HOST in found and HOST not in stacks.names:
            return _stopped(
                f"host: it has changes, which touch every environment. Nothing was changed. "
                f"Next step: make preview ENV={HOST}, then make up ENV={HOST}, then this again",
                console,
            )
        if not _apply(HOST, found, known, pulumi, pack, console):
            return _stopped(f"host: no environment was changed. {RETRY_UP}", console)
        # What the environments' previews read from the host stack may be different now.
        again = [name for name in stacks.environments if name in deployed]
        found |= previews.run(pulumi, again, pack, console, [STRICT])
    else:
        previews.unchanged(found[HOST], console)
    failed = [preview for preview in found.values() if preview.outcome is Outcome.FAILED]
    for preview in failed:
        previews.show(preview, console)
    if failed:
        at = " and ".join(preview.stack for preview in failed)
        return _stopped(f"{at}: no environment was changed. {RETRY_UP}", console)
    for name in stacks.environments:
        unchanged = name in found and found[name].outcome is Outcome.UNCHANGED
        if _apply(name, found, known, pulumi, pack, console):
            changed += [] if unchanged else [name]
        else:
            rest = stacks.environments[stacks.environments.index(name) + 1 :]
            untouched = f"not touched: {', '.join(rest)}. " if rest else ""
            return _stopped(f"{name}: {untouched}{RETRY_UP}", console)
    return 0


def keep_promises(pulumi: Pulumi, stacks: Stacks, known: Mapping[str, int]) -> None:
    """PulumiError when the ledger takes back what a deployed environment has: its entry, or its protection.

    Without the entry its slice would go from under its containers, and without protection its volumes could. The
    latter is done on purpose with BULKHEAD_CONFIRM.
    """
    for name in (name for name, resources in known.items() if resources and name != HOST):
        resources = pulumi.resources(name)
        containers = sum(resource["type"] == CONTAINER for resource in resources)
        if name not in stacks.tiers and containers:
            raise PulumiError(
                f"{name} is deployed with {containers} containers, and the ledger does not have it any more: nothing "
                f"was changed. Next step: put it back into Pulumi.host.yaml, or remove it first: make down ENV={name}"
            )
        lowered = stacks.tiers.get(name) is Tier.BEST_EFFORT and protects(resources)
        if lowered and not confirmed(name, pulumi.variables, None):
            raise PulumiError(
                f"{name} was deployed as protected, and the ledger makes it {Tier.BEST_EFFORT}: its volumes would lose "
                "their protection, so nothing was changed. Next step: put its tier back in Pulumi.host.yaml; or, to do "
                f"it on purpose, set BULKHEAD_CONFIRM={name}"
            )


def protects(resources: Sequence[Mapping[str, Any]]) -> bool:
    """Whether a stack's state holds a protected volume."""
    return any(resource["type"] == VOLUME and resource.get("protect") for resource in resources)


def _apply(
    name: str,
    found: Mapping[str, Preview],
    known: Collection[str],
    pulumi: Pulumi,
    pack: Sequence[str],
    console: Console,
) -> bool:
    preview = found.get(name)
    if preview and preview.outcome is Outcome.UNCHANGED:
        previews.unchanged(preview, console)
        return True
    if preview and preview.outcome is Outcome.FAILED:
        previews.show(preview, console)
        return False
    console.rule(f"{name}: {preview.changes if preview else 'first deploy'}", align="left")
    if name not in known:
        pulumi.create(name)
    # Its own preview is the gate: policies see every resource of the stack before one of them is created.
    return pulumi.run("up", "--yes", "--stack", name, *pack) == 0


def _stopped(text: str, console: Console) -> int:
    console.print(f"Stopped at {text}", style="red", markup=False, highlight=False)
    return 1


def _say_without_file(stacks: Stacks, console: Console) -> None:
    for name in stacks.without_file:
        console.print(f"{name}: in the ledger, but Pulumi.{name}.yaml is missing: left out", style="yellow")


def preview(pulumi: Pulumi, stacks: Stacks, pack: Sequence[str], console: Console, *, drift: bool = False) -> int:
    """Show what `up` would do to every stack; 1 if any preview fails or violates a policy.

    `drift`: compare with the engine too, and fail on any difference.
    """
    found = previewed(pulumi, stacks, pack, console, [STRICT, "--refresh"] if drift else [])
    for one in found.values():
        if one.outcome is not Outcome.UNCHANGED:
            previews.show(one, console)
        elif one.advice:
            previews.unchanged(one, console)
    console.print(previews.table(found.values()))
    bad = {Outcome.FAILED, Outcome.CHANGED} if drift else {Outcome.FAILED}
    return int(any(one.outcome in bad for one in found.values()))


def previewed(
    pulumi: Pulumi,
    stacks: Stacks,
    pack: Sequence[str],
    console: Console,
    options: Sequence[str] = (),
    variables: Mapping[str, Mapping[str, str]] = {},
) -> dict[str, Preview]:
    """The preview of every stack, in deploy order; one that is not possible yet has failed and says why.

    `options` and `variables` are those of `previews.run`.
    """
    _say_without_file(stacks, console)
    resources = pulumi.stacks()
    keep_promises(pulumi, stacks, resources)
    possible = [name for name in stacks.names if name == HOST or resources.get(HOST)]
    for name in possible:
        if name not in resources:
            pulumi.create(name)
    found = previews.run(pulumi, possible, pack, console, options, variables)
    waiting = "The host stack is not deployed, and its outputs are needed. Next step: make up"
    return {name: found.get(name) or Preview(name, Outcome.FAILED, "", 0, waiting) for name in stacks.names}


def ready(pulumi: Pulumi, words: Sequence[str]) -> None:
    """Makes the stack that a `pulumi config` is about, where it is one with settings that was never deployed: the
    secrets of an environment are set before that."""
    named = [after for word, after in pairwise([*words, ""]) if word in ("--stack", "-s")]
    named += [word.partition("=")[2] for word in words if word.startswith("--stack=")]
    ours = len(named) == 1 and (pulumi.root / f"Pulumi.{named[0]}.yaml").exists()
    if words[:1] == ["config"] and ours and named[0] not in pulumi.stacks():
        pulumi.create(named[0])


def down(
    pulumi: Pulumi,
    stacks: Stacks,
    variables: Mapping[str, str],
    ask: Callable[[str], str] | None,
    agent: Agent,
    console: Console,
) -> int:
    """Destroy in reverse order, host last; protected resources (volumes) stay, and are named.

    PulumiError, before anything is destroyed, if a protected environment is not confirmed, or if host is to go
    while an environment still has containers.
    """
    resources = pulumi.stacks()
    going = [name for name in reversed(stacks.names) if resources.get(name)]
    for name in going:
        protected = stacks.tiers.get(name) is Tier.PROTECTED or protects(pulumi.resources(name))
        if protected and not confirmed(name, variables, ask):
            raise PulumiError(
                f"{name} is protected, and destroying it was not confirmed: nothing was destroyed. "
                f"Next step: type its name when asked, or set BULKHEAD_CONFIRM={name}"
            )
    if HOST in going:
        _nothing_else_runs(pulumi, resources, going)
    for name in going:
        console.rule(f"{name}: destroy", align="left")
        # Host's own agent goes with it, and its marks too.
        with agent.deploying([name]) if name != HOST else nullcontext():
            if pulumi.run("destroy", "--yes", "--exclude-protected", "--stack", name):
                return _stopped(f"{name}: see the error above; correct it, then make down again", console)
            if name != HOST:
                agent.forget(name)
    for name in going:
        console.print(remains(name, pulumi.resources(name)), markup=False, highlight=False)
    if not going:
        console.print("Nothing is deployed.")
    return 0


def confirmed(
    environment: str, variables: Mapping[str, str], ask: Callable[[str], str] | None, question: str = ""
) -> bool:
    """Whether the user named the environment: in BULKHEAD_CONFIRM (one or several names), else when asked."""
    if environment in variables.get("BULKHEAD_CONFIRM", "").replace(",", " ").split():
        return True
    question = question or f"{environment} is protected. Type its name to destroy it"
    return ask is not None and ask(question) == environment


def _nothing_else_runs(pulumi: Pulumi, resources: Mapping[str, int], going: Sequence[str]) -> None:
    others = [name for name, count in resources.items() if count and name not in going]
    for name in others:
        running = sum(resource["type"] == CONTAINER for resource in pulumi.resources(name))
        if running:
            raise PulumiError(
                f"{name} has {running} containers, which need the host stack's slices: nothing was destroyed. "
                f"Next step: make down ENV={name}, then make down ENV=host"
            )


def remains(stack: str, resources: Sequence[Mapping[str, Any]]) -> str:
    """What a destroyed stack still has, and how to delete it for good."""
    kept = [resource for resource in resources if resource.get("protect") and resource.get("custom")]
    if not kept:
        return f"{stack}: nothing remains"
    volumes = [str(resource["id"]) for resource in kept if resource["type"] == VOLUME]
    others = [resource["urn"].split("::")[-1] for resource in kept if resource["type"] != VOLUME]
    parts = [f"volume {name}" for name in volumes] + others
    steps = [
        f"  make pulumi ARGS='state unprotect --all --yes --stack {stack}'",
        f"  BULKHEAD_CONFIRM={stack} make down ENV={stack}",
        *([f"  docker volume rm {' '.join(volumes)}"] if volumes else []),
    ]
    return "\n".join([f"{stack}: kept, since protected: {', '.join(parts)}. To delete for good:", *steps])
