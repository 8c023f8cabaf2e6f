"""An image that dev builds in its own slice, and a tag of its own for it."""

import pulumi
import pulumi_docker as docker

from settings.ledger import slice_name
from settings.project import root
from stacks import environment


def build() -> None:
    """The environment, and the image beside it."""
    opts = pulumi.ResourceOptions(parent=environment.build())
    image = docker.RemoteImage(
        "lab",
        name="bulkhead/corpus-dev-lab:1.0",
        build={"context": str(root() / "app"), "cgroup_parent": slice_name("corpus-dev", "cgroupfs")},
        opts=opts,
    )
    docker.Tag("newest", source_image=image.name, target_image="bulkhead/corpus-dev-lab:newest", opts=opts)
