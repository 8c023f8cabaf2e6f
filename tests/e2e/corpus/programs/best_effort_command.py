"""A command of dev that nobody has read: it runs as the deployer."""

import pulumi
import pulumi_command as command

from stacks import environment


def build() -> None:
    """The environment, and the command beside it."""
    built = environment.build()
    provider = command.Provider("shell", opts=pulumi.ResourceOptions(parent=built))
    command.local.Command(
        "sync",
        create="rsync --archive ./assets/ /srv/corpus-dev/assets/",
        opts=pulumi.ResourceOptions(parent=built, provider=provider),
    )
