"""A bridge to whose containers others are routed."""

import pulumi
import pulumi_docker as docker

from components.labels import label_inputs, labels
from stacks import environment


def build() -> None:
    """The environment, and the network beside it."""
    docker.Network(
        "routed",
        name="corpus-dev-routed",
        driver="bridge",
        options={"com.docker.network.bridge.gateway_mode_ipv4": "routed"},
        ipam_configs=[{"subnet": "10.87.200.0/24"}],
        labels=label_inputs(labels("corpus-dev", "best-effort")),
        opts=pulumi.ResourceOptions(parent=environment.build()),
    )
