"""A network of dev under a name of prod's."""

import pulumi
import pulumi_docker as docker

from components.labels import label_inputs, labels
from stacks import environment


def build() -> None:
    """The environment, and the network beside it."""
    docker.Network(
        "shadow",
        name="corpus-prod-shadow",
        ipam_configs=[{"subnet": "10.87.200.0/24"}],
        labels=label_inputs(labels("corpus-dev", "best-effort")),
        opts=pulumi.ResourceOptions(parent=environment.build()),
    )
