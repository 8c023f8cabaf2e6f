"""A container of dev on dev's own network, without any hardening: the pack adds what it can by itself."""

import pulumi
import pulumi_docker as docker

from components.labels import label_inputs, labels
from settings.ledger import slice_name
from stacks import environment


def build() -> None:
    """The environment, and the container beside it."""
    own = label_inputs(labels("corpus-dev", "best-effort"))
    opts = pulumi.ResourceOptions(parent=environment.build())
    network = docker.Network(
        "lab", name="corpus-dev-lab", ipam_configs=[{"subnet": "10.87.200.0/24"}], labels=own, opts=opts
    )
    scratch = docker.Volume("scratch", name="corpus-dev-scratch", labels=own, opts=opts)
    docker.Container(
        "notebook",
        image="registry.example/tool:1.0",
        cgroup_parent=slice_name("corpus-dev", "cgroupfs"),
        networks_advanced=[{"name": network.name}],
        volumes=[{"volume_name": scratch.name, "container_path": "/work"}],
        labels=own,
        opts=opts,
    )
