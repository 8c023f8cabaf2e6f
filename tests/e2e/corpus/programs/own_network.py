"""A network of dev with a smaller frame, as behind a tunnel, and a bridge named after its environment."""

import pulumi
import pulumi_docker as docker

from components.labels import label_inputs, labels
from stacks import environment


def build() -> None:
    """The environment, and the network beside it."""
    docker.Network(
        "tunnel",
        name="corpus-dev-tunnel",
        driver="bridge",
        internal=True,
        options={"com.docker.network.driver.mtu": "1400", "com.docker.network.bridge.name": "corpus-dev-tun"},
        ipam_configs=[{"subnet": "10.87.200.0/24", "gateway": "10.87.200.1"}],
        labels=label_inputs(labels("corpus-dev", "best-effort")),
        opts=pulumi.ResourceOptions(parent=environment.build()),
    )
