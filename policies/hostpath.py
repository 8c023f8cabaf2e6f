"""Paths on the Docker host as a mount means them: normalised, and with the usual aliases resolved.
Links that someone made on the host itself cannot be seen at preview."""

import posixpath
import re
from collections.abc import Iterable, Iterator
from fnmatch import fnmatchcase

from policies.world import CONTAINER, VOLUME, Field

MOUNTS = {
    CONTAINER: ("volumes.hostPath", "volumes.volumeName", "mounts.source", "mounts.volumeOptions.driverOptions.*"),
    VOLUME: ("driverOpts.*",),
}
"""Where a mount names what it opens. The provider takes a `volumeName` that begins with / as a path."""

LINKS = {"volumes.volumeName": {VOLUME: "{}"}, "mounts.source": {VOLUME: "{}"}}
"""A name that is unknown at preview, but is a volume's of this stack, is no path."""

SOCKETS = (
    "/run/docker.sock",
    "/run/user/*/docker.sock",
    "/run/containerd/containerd.sock",
    "/run/podman/podman.sock",
    "/run/user/*/podman/podman.sock",
    "/run/crio/crio.sock",
    "/run/buildkit/buildkitd.sock",
)
"""Where engines listen. /var/run is /run."""

SOCKET_NAMES = frozenset(socket.rpartition("/")[2] for socket in SOCKETS)

ENGINE_DATA = (
    "/var/lib/docker",
    "/var/lib/containerd",
    "/home/*/.local/share/docker",
    "/root/.local/share/docker",
)
"""Where an engine keeps every environment's volumes, layers and container files."""

DISKS = ("/dev",)
"""Devices that a volume may be mounted from."""

# (what a path begins with, what that is): /var/run links to /run, and a process's root and cwd lead back to /.
ALIASES = (
    (re.compile(r"^/var/run(?=/|$)"), "/run"),
    (re.compile(r"^/proc/[^/]+/(?:task/[^/]+/)?(?:root|cwd)(?=/|$)"), ""),
)


def normal(path: str) -> str:
    """`/var/run/../run//docker.sock` as `/run/docker.sock`. A path without a leading / is taken from /."""
    path = _clean(path)
    before = ""
    while path != before:  # one alias can lead to another: /proc/1/root/var/run
        before = path
        for alias, target in ALIASES:
            path = _clean(alias.sub(target, path))
    return path


def _clean(path: str) -> str:
    return posixpath.normpath("/" + path.lstrip("/"))


def overlaps(path: str, places: Iterable[str]) -> str | None:
    """The first of `places` that a mount of `path` opens: the place itself, something in it, or a folder above it.

    `*` in a place stands for any one part, as in `/run/user/*/docker.sock`.
    """
    parts = normal(path).split("/")[1:]
    return next((place for place in places if _overlap(parts, place.split("/")[1:])), None)


def _overlap(path: list[str], place: list[str]) -> bool:
    return path == [""] or all(fnmatchcase(one, other) for one, other in zip(path, place, strict=False))


def within(path: str, folder: str) -> bool:
    """Whether a path is this folder or in it."""
    path, folder = normal(path), normal(folder)
    return path == folder or path.startswith(f"{folder.rstrip('/')}/")


def opened(field: Field) -> Iterator[str]:
    """Every path on the host that a value of `MOUNTS` opens: `/run`, or `/a` and `/b` of `lowerdir=/a,upperdir=/b`."""
    value = str(field.value)
    if field.path.endswith(".device"):
        yield value
    if field.path.startswith("driverOpts.") or ".driverOptions." in field.path:
        yield from (part for part in re.split(r"[,=:]", value) if "/" in part)
    elif value.startswith("/"):
        yield value


def socket_in(path: str) -> str | None:
    """The engine's socket that a mount of `path` opens: by its place, or by its name wherever it was moved to."""
    place = overlaps(path, SOCKETS)
    return place or ("an engine socket" if normal(path).rpartition("/")[2] in SOCKET_NAMES else None)
