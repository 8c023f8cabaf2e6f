"""A second provider for the same engine, with a longer wait for pulls."""

import pulumi
import pulumi_docker as docker

from settings import host
from stacks import environment


def build() -> None:
    """The environment, and a network through the second provider."""
    built = environment.build()
    docker.Provider("patient", host=host.address(None), opts=pulumi.ResourceOptions(parent=built))
