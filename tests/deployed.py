"""What end-to-end tests and the benchmark share: a copy of this checkout to deploy from, and everything that one of
its environments has on the engine, to be counted and removed. Needs no pytest, which `make bench` does not install."""

import os
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import docker

CHECKOUT = Path(__file__).parents[1]
LABEL = "bulkhead.environment"


def isolated(state: Path) -> dict[str, str]:
    """This process's variables without the user's choices for Pulumi and Bulkhead, and for the `make` that runs this
    (its ARGS are not those of another); with a state of its own."""
    chosen = ("PULUMI_", "BULKHEAD_", "MAKE", "MFLAGS", "ARGS", "ENV")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(chosen)}
    return kept | {"XDG_STATE_HOME": str(state), "CI": "true"}


def copied(folder: Path) -> None:
    """The files of this checkout, and its installed tools as links.

    What is installed is brought up to date first: set-up in a copy whose pyproject.toml differs from the installed one
    would make the copy the one that this checkout's tools import, also when it is gone.
    """
    subprocess.run([CHECKOUT / "engine/bootstrap.sh", "plan"], cwd=CHECKOUT, check=True, capture_output=True)
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"],
        cwd=CHECKOUT,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    ).stdout
    for name in filter(None, listed.split("\0")):
        source, target = CHECKOUT / name, folder / name
        if source.is_file():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, target)
    for tools in (".venv", ".bulkhead"):
        (folder / tools).symlink_to(CHECKOUT / tools)


def labelled(engine: docker.DockerClient, labels: Sequence[str]) -> Mapping[str, list[Any]]:
    """Everything on the engine that carries one of these labels (`name=value`), by kind; of images the tagged ones."""
    found: dict[str, list[Any]] = {"containers": [], "networks": [], "volumes": [], "images": []}
    for label in labels:
        filters: dict[str, Any] = {"label": label}
        found["containers"] += engine.containers.list(all=True, filters=filters)
        found["networks"] += engine.networks.list(filters=filters)
        found["volumes"] += engine.volumes.list(filters=filters)
        found["images"] += [image for image in engine.images.list(filters=filters) if image.tags]
    return {kind: list({one.id: one for one in ones}.values()) for kind, ones in found.items()}


def groups(environment: str) -> list[Path]:
    """The environment's cgroups, in whichever hierarchies they are."""
    return [path for path in Path("/sys/fs/cgroup").rglob(f"bulkhead-{environment}") if path.is_dir()]


def removed(engine: docker.DockerClient, environments: Sequence[str], labels: Sequence[str] = ()) -> None:
    """Removes what these environments have left on the engine and in the cgroup tree, and what has these labels."""
    left = labelled(engine, [*(f"{LABEL}={environment}" for environment in environments), *labels])
    for container in left["containers"]:
        container.remove(force=True, v=True)
    for network in left["networks"]:
        network.remove()
    for volume in left["volumes"]:
        volume.remove(force=True)
    for image in left["images"]:
        for tag in image.tags:
            engine.images.remove(tag, force=True)
    for environment in environments:
        for group in groups(environment):
            for inner in sorted((path for path in group.rglob("*") if path.is_dir()), reverse=True):
                inner.rmdir()
            group.rmdir()
