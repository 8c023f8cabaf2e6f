"""A network of dev that is labelled with what prod's stack puts out."""

import pulumi
import pulumi_docker as docker

from components.labels import label_inputs, labels
from stacks import environment


def build() -> None:
    """The environment, and the network beside it."""
    prod = pulumi.StackReference(f"{pulumi.get_organization()}/{pulumi.get_project()}/corpus-prod")
    docker.Network(
        "curious",
        name="corpus-dev-curious",
        ipam_configs=[{"subnet": "10.87.200.0/24"}],
        labels=label_inputs(labels("corpus-dev", "best-effort"), {"seen": prod.get_output("endpoints").apply(str)}),
        opts=pulumi.ResourceOptions(parent=environment.build()),
    )
