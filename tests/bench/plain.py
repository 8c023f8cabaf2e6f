"""A plain Pulumi program: an image, a network and containers, with the arguments that `resources.json` gives.
The benchmark copies it into a project of its own. It uses nothing of Bulkhead, and stands for a user without it."""

import json
from pathlib import Path
from typing import Any

import pulumi
import pulumi_docker as docker


def build(image: str, network: dict[str, Any], containers: dict[str, dict[str, Any]]) -> None:
    """`containers` by resource name; image and network are put in here, so that they are waited for."""
    options = pulumi.ResourceOptions(provider=docker.Provider("docker"))
    pulled = docker.RemoteImage("image", name=image, keep_locally=True, opts=options)
    bridge = docker.Network("network", **network, opts=options)
    for name, arguments in containers.items():
        networks = [attachment | {"name": bridge.name} for attachment in arguments["networks_advanced"]]
        own = arguments | {"image": pulled.image_id, "networks_advanced": networks}
        docker.Container(name, **own, opts=options)


if __name__ == "__main__":
    build(**json.loads(Path("resources.json").read_text()))
