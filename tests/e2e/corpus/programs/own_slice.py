"""A container of dev that takes its processor time from prod's slice."""

import pulumi
import pulumi_docker as docker

from components.labels import label_inputs, labels
from stacks import environment


def build() -> None:
    """The environment, and the container beside it."""
    docker.Container(
        "greedy",
        image="registry.example/tool:1.0",
        cgroup_parent="/bulkhead-corpus-prod",
        network_mode="none",
        labels=label_inputs(labels("corpus-dev", "best-effort")),
        opts=pulumi.ResourceOptions(parent=environment.build()),
    )
