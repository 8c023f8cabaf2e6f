"""A command of prod that makes its folder."""

import pulumi
import pulumi_command as command

from stacks import environment


def build() -> None:
    """The environment, and the command beside it."""
    built = environment.build()
    provider = command.Provider("shell", opts=pulumi.ResourceOptions(parent=built))
    command.local.Command(
        "folder",
        create="install --directory --mode 0750 /srv/corpus-prod/uploads",
        opts=pulumi.ResourceOptions(parent=built, provider=provider),
    )
