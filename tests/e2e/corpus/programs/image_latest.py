"""An image of prod without a version, whose tags nobody pushes again, as its exemption says."""

import pulumi
import pulumi_docker as docker

from stacks import environment


class Tools(pulumi.ComponentResource):
    """The image, exempted from image-digest only."""

    def __init__(self, name: str, opts: pulumi.ResourceOptions) -> None:
        exempt = {
            "rule": "image-digest",
            "reason": "the registry refuses to push a tag again",
            "owner": "ops",
            "expires": "2099-12-31",
        }
        super().__init__("bulkhead:index:Tools", name, {"exempt": [exempt]}, opts)
        docker.RemoteImage(f"{name}-pull", name="registry.example/tool", opts=pulumi.ResourceOptions(parent=self))
        self.register_outputs({})


def build() -> None:
    """The environment, and the image beside it."""
    Tools("tools", pulumi.ResourceOptions(parent=environment.build()))
