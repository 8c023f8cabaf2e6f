"""A Swarm service: the engine makes its containers, where no rule for containers looks."""

import pulumi
import pulumi_docker as docker

from stacks import environment


def build() -> None:
    """The environment, and the service beside it."""
    docker.Service(
        "swarm",
        name="corpus-dev-swarm",
        task_spec={"container_spec": {"image": "registry.example/tool:1.0"}},
        opts=pulumi.ResourceOptions(parent=environment.build()),
    )
