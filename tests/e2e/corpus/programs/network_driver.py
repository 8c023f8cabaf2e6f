"""A macvlan: its containers are hosts of the office's network."""

import pulumi
import pulumi_docker as docker

from components.labels import label_inputs, labels
from stacks import environment


def build() -> None:
    """The environment, and the network beside it."""
    docker.Network(
        "office",
        name="corpus-dev-office",
        driver="macvlan",
        ipam_configs=[{"subnet": "10.87.200.0/24"}],
        labels=label_inputs(labels("corpus-dev", "best-effort")),
        opts=pulumi.ResourceOptions(parent=environment.build()),
    )
