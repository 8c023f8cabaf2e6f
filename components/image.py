"""Image: what a service runs, named by content: built from its context, or an image of a registry.

Containers reference the image's id, never a tag that may move, so that only a changed image replaces them.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import pulumi
import pulumi_docker as docker

from components.labels import labels
from settings.compose import Build
from settings.ledger import Tier


@dataclass(frozen=True)
class ImageArgs:
    """Exactly one of `image` (a reference) and `build`.

    `cgroup_parent`: the environment's slice: a build of dev's must not slow prod either. `legacy_builder`: build
    through the engine's API instead of buildx. Engine 20.10 heeds the cgroup parent on neither way.
    """

    environment: str
    tier: Tier
    service: str
    cgroup_parent: pulumi.Input[str]
    image: str | None = None
    build: Build | None = None
    legacy_builder: pulumi.Input[bool] = False


class Image(pulumi.ComponentResource):
    """`image_id` is `sha256:…` of the engine's; `digest` the registry's for pulled images, else the id."""

    reference: str
    image_id: pulumi.Output[str]
    digest: pulumi.Output[str]

    def __init__(self, name: str, args: ImageArgs, opts: pulumi.ResourceOptions | None = None) -> None:
        super().__init__("bulkhead:index:Image", name, None, opts)
        if args.build is not None:
            content = content_hash(args.build)
            self.reference = f"bulkhead/{args.environment}-{args.service}:{content}"
            # Another content is another resource: replacing one, the provider would delete the new image with the
            # old, as both have the name. And the same content from another checkout's path is no change.
            remote = docker.RemoteImage(
                f"{name}-{content}",
                name=self.reference,
                build=docker.RemoteImageBuildArgs(
                    context=args.build.context,
                    dockerfile=args.build.dockerfile,
                    build_args=dict(args.build.args),
                    target=args.build.target,
                    cgroup_parent=args.cgroup_parent,
                    use_legacy_builder=args.legacy_builder,
                    labels=labels(args.environment, args.tier, args.service),
                    remove=True,
                    force_remove=True,
                ),
                opts=pulumi.ResourceOptions(parent=self, ignore_changes=["build"]),
            )
        else:
            self.reference = args.image or ""
            # Others may use it too: what we did not build we do not delete.
            remote = docker.RemoteImage(
                f"{name}-pull", name=self.reference, keep_locally=True, opts=pulumi.ResourceOptions(parent=self)
            )
        self.image_id = remote.image_id
        self.digest = pulumi.Output.all(remote.repo_digest, remote.image_id).apply(lambda ids: ids[0] or ids[1])
        self.register_outputs({"image_id": self.image_id, "digest": self.digest})


def content_hash(build: Build) -> str:
    """12 hex digits over all that decides the result of a build: context (less .dockerignore), file, arguments."""
    from docker.utils.build import exclude_paths  # here, since previews without a build need not load it

    context = Path(build.context)
    ignore = context / ".dockerignore"
    patterns = ignore.read_text().splitlines() if ignore.is_file() else []
    patterns = [line.strip() for line in patterns if line.strip() and not line.startswith("#")]
    digest = hashlib.sha256(repr((build.dockerfile, sorted(build.args.items()), build.target)).encode())
    for relative in sorted(exclude_paths(str(context), patterns, dockerfile=build.dockerfile)):
        path = context / relative
        if path.is_dir() and not path.is_symlink():
            continue
        content = str(path.readlink()).encode() if path.is_symlink() else path.read_bytes()
        digest.update(f"{relative}\0{path.lstat().st_mode & 0o111}\0{len(content)}\0".encode())
        digest.update(content)
    return digest.hexdigest()[:12]
