"""Files: the secrets and configs of a service whose root is read-only, in a volume that only this service mounts.

The engine refuses to copy files into a container with a read-only root, also where a volume is mounted. So a carrier,
a container that is made but never started, takes them into the volume. A service with a writable root needs none of
this: its files are uploaded into its own containers.
"""

import hashlib
import hmac
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

import pulumi
import pulumi_docker as docker

from components.labels import FILES, label_inputs, labels
from components.secret import Secret, SecretArgs
from settings.ledger import Tier


@dataclass(frozen=True)
class File:
    """A file put into the container before it starts: a secret or a config. `mode` is octal text."""

    target: str
    content: pulumi.Input[str]
    mode: str = "0444"
    uid: str | None = None
    gid: str | None = None


@dataclass(frozen=True)
class FilesArgs:
    """`image_id`: the service's own image, so that a folder's other files are there too."""

    environment: str
    tier: Tier
    service: str
    image_id: pulumi.Input[str]
    cgroup_parent: pulumi.Input[str]
    files: Sequence[File]


class Files(pulumi.ComponentResource):
    """`mounts`: one read-only mount for each folder that holds a file. Depend on the component when you use them.

    Other content makes other volumes, so that a new container never shares them with the old one.
    """

    mounts: list[Any]

    def __init__(self, name: str, args: FilesArgs, opts: pulumi.ResourceOptions | None = None) -> None:
        super().__init__("bulkhead:index:Files", name, None, opts)
        child = pulumi.ResourceOptions(parent=self, delete_before_replace=False)
        own = labels(args.environment, args.tier, args.service)
        # Salted: a label may be read by more than the secret may, and a weak secret is guessed from its hash.
        salt = Secret(f"{name}-salt", SecretArgs(tier=Tier.BEST_EFFORT, generate=16), opts=child).value
        content = digest(args.files, args.image_id, salt)
        volumes = {
            folder: docker.Volume(
                f"{name}-{number}",
                driver="local",
                labels=label_inputs(own, {FILES: content}),
                opts=child,
            )
            for number, folder in enumerate(folders(args.files))
        }
        docker.Container(
            f"{name}-carrier",
            image=args.image_id,
            cgroup_parent=args.cgroup_parent,
            start=False,
            must_run=False,
            network_mode="none",
            security_opts=["no-new-privileges:true"],
            capabilities={"drops": ["ALL"]},
            labels=label_inputs(own, {FILES: "carrier"}),
            volumes=[
                docker.ContainerVolumeArgs(volume_name=volume.name, container_path=folder)
                for folder, volume in volumes.items()
            ],
            uploads=uploads(args.files),
            opts=child,
        )
        self.mounts = [
            {"volume_name": volume.name, "container_path": folder, "read_only": True}
            for folder, volume in volumes.items()
        ]
        self.register_outputs({"folders": list(volumes)})


def folders(files: Sequence[File]) -> list[str]:
    """The folders that hold the files. Raises `pulumi.RunError` for a file in the root, which no volume can hold."""
    found = sorted({str(PurePosixPath(file.target).parent) for file in files})
    if found and found[0] == "/":
        names = ", ".join(file.target for file in files if str(PurePosixPath(file.target).parent) == "/")
        raise pulumi.RunError(
            f"{names}: the service's root is read-only, so a file cannot be put there. "
            "Give the secret or config a target in a folder (target: /etc/app/app.conf), or remove read_only."
        )
    return found


def digest(files: Sequence[File], image_id: pulumi.Input[str], salt: pulumi.Input[str]) -> pulumi.Output[str]:
    """12 hex digits over all targets, owners and contents, keyed with `salt`.

    The image counts too: a folder's other files come from it, and the engine copies them into an empty volume only.
    """
    ordered = sorted(files, key=lambda file: file.target)
    places = [(file.target, file.mode, file.uid, file.gid) for file in ordered]
    return pulumi.Output.all(salt, image_id, *[file.content for file in ordered]).apply(
        lambda known: hmac.new(known[0].encode(), repr((places, known[1:])).encode(), hashlib.sha256).hexdigest()[:12]
    )


def uploads(files: Sequence[File]) -> list[Any]:
    """Files for the provider to copy in between create and start."""
    return [
        {"file": file.target, "content": file.content, "permissions": file.mode}
        | ({"owner": file.uid} if file.uid else {})
        | ({"group": file.gid} if file.gid else {})
        for file in sorted(files, key=lambda file: file.target)
    ]
