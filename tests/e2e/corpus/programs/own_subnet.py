"""A network of dev with addresses of prod's range."""

import pulumi
import pulumi_docker as docker

from components.labels import label_inputs, labels
from stacks import environment


def build() -> None:
    """The environment, and the network beside it."""
    docker.Network(
        "squatter",
        name="corpus-dev-squatter",
        ipam_configs=[{"subnet": "10.86.200.0/24"}],
        labels=label_inputs(labels("corpus-dev", "best-effort")),
        opts=pulumi.ResourceOptions(parent=environment.build()),
    )
