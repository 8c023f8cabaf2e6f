"""Hardening: what makes a container root on the host, whatever environment it is in.
One resource decides each of these."""

from collections.abc import Iterator

from policies.hostpath import LINKS, MOUNTS, normal, opened, overlaps
from policies.rule import EVERYWHERE, Finding, Subject, rule
from policies.world import CONTAINER, Field

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


@rule(
    id="privileged",
    title="no container is privileged",
    references=("PSS baseline: Privileged Containers", "CIS 5.5"),
    reads={CONTAINER: ("privileged",)},
    tiers=EVERYWHERE,
)
def privileged(field: Field, _about: Subject) -> Iterator[Finding]:
    """All capabilities and all devices: the container's root is the host's."""
    if field.value:
        yield Finding(
            "true",
            "it has every capability and device of the host, and so reaches every environment",
            "remove privileged; give it the one capability or device that it needs (cap_add, devices)",
        )


@rule(
    id="engine-socket",
    title="no container gets the engine's socket",
    references=("CIS 5.32", "PSS baseline: HostPath Volumes"),
    reads=MOUNTS,
    links=LINKS,
    tiers=EVERYWHERE,
)
def engine_socket(field: Field, _about: Subject) -> Iterator[Finding]:
    """By its own path, a folder that holds it, or a volume that is a bind in disguise; wherever it was moved to."""
    for path in opened(field):
        place = overlaps(path, SOCKETS)
        if place or normal(path).rpartition("/")[2] in SOCKET_NAMES:
            yield Finding(
                repr(path),
                f"it opens {place or 'an engine socket'}: whoever writes to it is root on the host",
                "remove the mount; what needs the engine belongs in the host stack",
            )
            return
