"""The host stack: what the one Docker host promises each environment of the ledger, and the slices that keep it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pulumi
import pulumi_command as command

from components.agent import Agent, AgentArgs, declaration
from components.device import Device
from components.firewall import TABLE, Firewall, FirewallArgs
from components.promises import Promises
from components.slice import OOM_SCORE_ADJ, Slice, SliceArgs
from settings import host
from settings.ledger import Budget, LedgerSettings
from settings.project import root

BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
SYSTEMD = Path("/run/systemd/system")


def build() -> None:
    """Slices for every environment of the ledger; outputs that the environments' stacks and monitoring read."""
    settings = LedgerSettings.read(root() / "Pulumi.host.yaml")
    facts = host.facts(settings.host)
    ledger = settings.resolve(facts.capacity())
    provider = command.Provider("command")
    device = Device("device", facts, opts=pulumi.ResourceOptions(providers=[provider]))
    # Where systemd runs, its units bring everything back after a reboot.
    boot = BOOT_ID.read_text().strip() if facts.local and not SYSTEMD.exists() else ""
    firewall = Firewall(
        "firewall",
        FirewallArgs(
            environments=list(ledger.environments.values()),
            connections=facts.connections and facts.connections[1],
            host=facts.address,
            boot=boot,
        ),
        opts=pulumi.ResourceOptions(providers=[provider]),
    )
    slices: dict[str, Slice] = {}
    told: dict[str, dict[str, Any]] = {}
    promised: dict[str, dict[str, Any]] = {}
    for environment in ledger.environments.values():
        slice_ = slices[environment.name] = Slice(
            environment.name,
            SliceArgs(environment, ledger, facts),
            speed=device.speed,
            opts=pulumi.ResourceOptions(providers=[provider]),
        )
        promised[environment.name] = {
            "tier": str(environment.tier),
            "budget": {
                "reservations": budget(environment.reservations),
                "limits": budget(environment.limits),
            },
        }
        told[environment.name] = {
            **promised[environment.name],
            "subnet": str(environment.subnet),
            "cgroup_parent": slice_.cgroup_parent,
        }
    now = {
        "capacity": ledger.capacity.model_dump(),
        "environments": promised,
        "firewall": {"family": "inet", "table": TABLE, "environments": sorted(ledger.environments)},
    }
    shown = {name: pulumi.Output.all(one.cgroup_parent, one.files) for name, one in slices.items()}
    Agent(
        "agent",
        AgentArgs(
            sources=root() / "host",
            declared=pulumi.Output.all(**shown).apply(
                lambda known: declaration(ledger, facts, now["firewall"], known, OOM_SCORE_ADJ)
            ),
            facts=facts,
        ),
        opts=pulumi.ResourceOptions(providers=[provider], depends_on=[firewall, *slices.values()]),
    )
    deployed = pulumi.StackReference("host", stack_name=stack_of("host")).outputs
    Promises("promises", deployed.apply(lambda before: not_lowered(before or {}, now)))
    pulumi.export("capacity", ledger.capacity.model_dump())
    pulumi.export("system", budget(ledger.system))
    pulumi.export(
        "engine",
        {
            "version": facts.server_version,
            "cgroup_driver": facts.cgroup_driver,
            "cgroup_version": facts.cgroup_version,
        },
    )
    pulumi.export("environments", told)
    pulumi.export("firewall", {**now["firewall"], "environments": firewall.environments})


def stack_of(name: str) -> str:
    """The full name of a stack beside this one: `host`, or an environment's."""
    return f"{pulumi.get_organization()}/{pulumi.get_project()}/{name}"


def not_lowered(deployed: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, Any]:
    """What is promised now, or still, by `capacity` and `environments`: what a deploy would lower stays as deployed.

    The policy that no promise is lowered by much at once needs the higher one; showing all that is deployed instead
    would make every deploy of the host a change for the next one.
    """
    environments = dict(now["environments"])
    for name, before in (deployed.get("environments") or {}).items():
        reserved = (before.get("budget") or {}).get("reservations") or {}
        mine = ((now["environments"].get(name) or {}).get("budget") or {}).get("reservations") or {}
        if any((amount or 0) > (mine.get(resource) or 0) for resource, amount in reserved.items()):
            environments[name] = {key: before[key] for key in ("tier", "budget") if key in before}
    return {**now, "environments": environments}


def budget(share: Budget | None) -> dict[str, float | int | None] | None:
    """A budget for the outputs: CPUs, bytes, processes; None where nothing is promised."""
    return None if share is None else share.model_dump()
