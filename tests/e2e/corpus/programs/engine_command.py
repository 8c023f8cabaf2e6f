"""A command of prod that starts a container behind the plan's back."""

import pulumi
import pulumi_command as command

from stacks import environment


def build() -> None:
    """The environment, and the command beside it."""
    built = environment.build()
    provider = command.Provider("shell", opts=pulumi.ResourceOptions(parent=built))
    command.local.Command(
        "behind",
        create="docker run --detach --privileged registry.example/tool:1.0",
        opts=pulumi.ResourceOptions(parent=built, provider=provider),
    )
