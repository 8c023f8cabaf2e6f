"""Image: what a service runs, named by content: built from its context, or an image of a registry.

Containers reference the image's id, never a tag that may move, so that only a changed image replaces them.
"""

import asyncio
import hashlib
import os
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pulumi
import pulumi_docker as docker

from components.labels import labels
from settings import host
from settings.compose import Build
from settings.dockerfile import fetches, images
from settings.ledger import Tier
from settings.project import root
from settings.reads import sent

# Engines from here on heed a build's cgroup parent in BuildKit. 20.10 runs BuildKit in a group of the engine's own,
# and heeds the parent in its first builder only (both measured).
BUILDKIT_IN_SLICES = 23
BUILD_SECONDS = 3600
SHOWN_LINES = 25
CACHE_NAMESPACE = "BUILDKIT_CACHE_MOUNT_NS"


@dataclass(frozen=True)
class ImageArgs:
    """Exactly one of `image` (a reference) and `build`.

    `cgroup_parent`: the environment's slice: a build of dev's must not slow prod either. `host`: the engine's
    address. `exempt`: exemptions from policies, as written.
    """

    environment: str
    tier: Tier
    service: str
    cgroup_parent: pulumi.Input[str]
    image: str | None = None
    build: Build | None = None
    host: str | None = None
    exempt: Sequence[Mapping[str, Any]] = ()


class Image(pulumi.ComponentResource):
    """`image_id` is `sha256:…` of the engine's; `digest` the registry's for pulled images, else the id."""

    reference: str
    image_id: pulumi.Output[str]
    digest: pulumi.Output[str]

    def __init__(self, name: str, args: ImageArgs, opts: pulumi.ResourceOptions | None = None) -> None:
        super().__init__("bulkhead:index:Image", name, inputs(args), opts)
        if args.build is not None:
            content = content_hash(args.build)
            self.reference = f"bulkhead/{args.environment}-{args.service}:{content}"
            # Another content is another resource: replacing one, the provider would delete the new image with the
            # old, as both have the name. And the same content from another checkout's path is no change.
            # The provider only finds it: it would build where no slice is heeded (ADR 5).
            build = pulumi.ResourceHook(f"{name}-{content}-build", lambda _: built(self.reference, args))
            remote = docker.RemoteImage(
                f"{name}-{content}",
                name=self.reference,
                opts=pulumi.ResourceOptions(
                    parent=self, hooks=pulumi.ResourceHookBinding(before_create=[build]), delete_before_replace=True
                ),
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


def inputs(args: ImageArgs) -> dict[str, Any]:
    """What policies are to know of the image: how it is built, and what it is exempted from."""
    told: dict[str, Any] = {"exempt": list(args.exempt)} if args.exempt else {}
    if args.build is not None:
        context = Path(args.build.context)
        # As bytes: to BuildKit a carriage return alone ends no line.
        dockerfile = (context / args.build.dockerfile).read_bytes().decode(errors="replace")
        told["build"] = {
            # Relative: the same project in another checkout is no change.
            "context": str(context.relative_to(root()) if context.is_relative_to(root()) else context),
            "dockerfile": args.build.dockerfile,
            "target": args.build.target,
            "buildArgs": dict(args.build.args),
            "fetches": list(fetches(dockerfile, args.build.args)),
            "images": images(dockerfile, args.build.args),
            "cgroupParent": args.cgroup_parent,
        }
    return told


async def built(reference: str, args: ImageArgs) -> None:
    """Builds the image in its environment's slice, unless the engine has it. RuntimeError with the log's end."""
    parent = await pulumi.Output.from_input(args.cgroup_parent).future()
    if args.build is None or not parent:
        raise RuntimeError(f"{reference}: the host stack names no slice; deploy the ledger first: make up ENV=host")
    command = build_command(reference, args, args.build, parent)
    variables = os.environ | {"DOCKER_HOST": host.address(args.host)}
    await asyncio.to_thread(_build, reference, command, variables, args.tier)


def build_command(reference: str, args: ImageArgs, build: Build, parent: str) -> list[str]:
    """The `docker build` of an image, in the group `parent`."""
    told = labels(args.environment, args.tier, args.service)
    return [
        *("docker", "build", "--tag", reference, "--cgroup-parent", parent, "--force-rm"),
        *("--file", str(Path(build.context) / build.dockerfile)),
        *(word for name, value in sorted(told.items()) for word in ("--label", f"{name}={value}")),
        *(word for name, value in sorted(build.args.items()) for word in ("--build-arg", f"{name}={value}")),
        # BuildKit has one set of cache mounts for all builds: what dev's puts there, prod's would install.
        *("--build-arg", f"{CACHE_NAMESPACE}={args.environment}"),
        *(("--target", build.target) if build.target else ()),
        build.context,
    ]


def own_cache(tier: Tier, buildkit: bool) -> list[str]:
    """Options so that a build takes no layer of another environment's.

    A cache mount with an id of its own leaves that out of a layer's key in BuildKit: what dev put into the mount, dev's
    layer has, and prod's build would take it. An image is built once for each content, so that little is lost.
    """
    return ["--no-cache"] if buildkit and tier is Tier.PROTECTED else []


def _build(reference: str, command: Sequence[str], variables: Mapping[str, str], tier: Tier) -> None:
    look = ["docker", "image", "inspect", "--format", "{{.Id}}", reference]
    if subprocess.run(look, env=variables, capture_output=True, check=False).returncode == 0:
        return
    ask = ["docker", "version", "--format", "{{.Server.Version}}"]
    version = subprocess.run(ask, env=variables, capture_output=True, text=True, check=False).stdout
    if not version[:1].isdigit():
        raise RuntimeError(f"{reference}: the engine at {variables['DOCKER_HOST']} does not answer; run `make doctor`")
    buildkit = int(version.split(".")[0]) >= BUILDKIT_IN_SLICES
    pulumi.log.info(f"building {reference} in its environment's slice")
    try:
        ran = subprocess.run(
            [*command[:2], *own_cache(tier, buildkit), *command[2:]],
            env={**variables, "DOCKER_BUILDKIT": str(int(buildkit))},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            timeout=BUILD_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired as expired:
        raise RuntimeError(f"{reference}: the build took more than {BUILD_SECONDS} s and was given up") from expired
    if ran.returncode:
        end = "\n".join(ran.stdout.rstrip().splitlines()[-SHOWN_LINES:])
        hint = (
            "\nThis engine's BuildKit does not keep to an environment's slice, so its first builder is used. "
            "Write the Dockerfile without BuildKit's options, or install Docker 23 or newer."
            if "requires BuildKit" in ran.stdout
            else ""
        )
        raise RuntimeError(f"{reference}: the build failed:\n{end}{hint}")


def content_hash(build: Build) -> str:
    """12 hex digits over all that decides the result of a build: context (less .dockerignore), file, arguments."""
    context = Path(build.context)
    digest = hashlib.sha256(repr((build.dockerfile, sorted(build.args.items()), build.target)).encode())
    for relative in sent(build):
        path = context / relative
        if path.is_dir() and not path.is_symlink():
            continue
        content = str(path.readlink()).encode() if path.is_symlink() else path.read_bytes()
        digest.update(f"{relative}\0{path.lstat().st_mode & 0o111}\0{len(content)}\0".encode())
        digest.update(content)
    return digest.hexdigest()[:12]
