"""The host stack: what the one Docker host promises each environment of the ledger, and the slices that keep it."""

from pathlib import Path

import pulumi
import pulumi_command as command

from components.promises import Promises
from components.slice import Slice, SliceArgs
from settings import host
from settings.ledger import Budget, LedgerSettings
from settings.project import root

# Engines before it build through their own API: 20.10 runs builds in a group of its own on either way.
BUILDKIT_IN_SLICES = 23
BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


def build() -> None:
    """Slices for every environment of the ledger; outputs that the environments' stacks and monitoring read."""
    settings = LedgerSettings.read(root() / "Pulumi.host.yaml")
    facts = host.facts(settings.host)
    ledger = settings.resolve(facts.capacity())
    provider = command.Provider("command")
    # What is deployed now, for the policy that no promise is lowered by much at once.
    Promises("promises", pulumi.StackReference("host", stack_name=host_stack()))
    reserved = [one.reservations for one in ledger.environments.values() if one.reservations]
    protected = Budget(
        cpus=sum(budget.cpus or 0 for budget in reserved), memory=sum(budget.memory or 0 for budget in reserved)
    )
    told = {}
    for environment in ledger.environments.values():
        slice_ = Slice(
            environment.name,
            SliceArgs(
                environment=environment.name,
                tier=environment.tier,
                reservations=environment.reservations,
                limits=environment.limits,
                driver=facts.cgroup_driver,
                cgroup_version=facts.cgroup_version,
                capacity_cpus=ledger.capacity.cpus,
                system_cpus=ledger.system.cpus or 0.0,
                protected=protected,
                host=facts.address,  # the machine that was asked, also when DOCKER_HOST named it
                boot=BOOT_ID.read_text().strip() if facts.local else "",
            ),
            opts=pulumi.ResourceOptions(providers=[provider]),
        )
        told[environment.name] = {
            "tier": str(environment.tier),
            "subnet": str(environment.subnet),
            "cgroup_parent": slice_.cgroup_parent,
            "budget": {
                "reservations": budget(environment.reservations),
                "limits": budget(environment.limits),
            },
        }
    pulumi.export("capacity", ledger.capacity.model_dump())
    pulumi.export("system", budget(ledger.system))
    pulumi.export(
        "engine",
        {
            "version": facts.server_version,
            "cgroup_driver": facts.cgroup_driver,
            "cgroup_version": facts.cgroup_version,
            "legacy_builder": int(facts.server_version.split(".")[0]) < BUILDKIT_IN_SLICES,
        },
    )
    pulumi.export("environments", told)


def host_stack() -> str:
    """The full name of the host stack, beside this one."""
    return f"{pulumi.get_organization()}/{pulumi.get_project()}/host"


def budget(share: Budget | None) -> dict[str, float | int | None] | None:
    """A budget for the outputs: CPUs, bytes, processes; None where nothing is promised."""
    return None if share is None else share.model_dump()
