"""An image that dev builds in its own slice, and a tag of its own for it."""

import pulumi
import pulumi_docker as docker

from components.image import Image, ImageArgs
from settings.compose import Build
from settings.ledger import Tier, slice_name
from settings.project import root
from stacks import environment


def build() -> None:
    """The environment, and the image beside it."""
    opts = pulumi.ResourceOptions(parent=environment.build())
    parent = slice_name("corpus-dev", "cgroupfs")
    made = Build(context=str(root() / "app"))
    image = Image("lab", ImageArgs("corpus-dev", Tier.BEST_EFFORT, "lab", parent, build=made), opts=opts)
    docker.Tag("newest", source_image=image.reference, target_image="bulkhead/corpus-dev-lab:newest", opts=opts)
