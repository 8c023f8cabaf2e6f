"""A volume of dev that says nowhere whose it is."""

import pulumi
import pulumi_docker as docker

from stacks import environment


def build() -> None:
    """The environment, and the volume beside it."""
    docker.Volume("stray", name="corpus-dev-stray", opts=pulumi.ResourceOptions(parent=environment.build()))
