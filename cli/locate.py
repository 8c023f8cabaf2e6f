"""Where in a stack's files a resource is described: its URN and property as a file and a line.
The names are those that the components give, so a resource from elsewhere is at the top of the stack's settings."""

import re
from pathlib import Path
from typing import NamedTuple

from cli.order import HOST
from settings.errors import Loc, SettingsError
from settings.project import read_environment
from settings.sources import Sources


class Place(NamedTuple):
    """A line (1-based) of a file."""

    path: Path
    line: int


SERVICES, NETWORKS, VOLUMES, SECRETS = ("services",), ("networks",), ("volumes",), ("secrets",)
LEDGER = ("config", "bulkhead:environments")
KINDS: dict[str, tuple[Loc, str]] = {
    "Service": (SERVICES, "{stack}-(.+)"),
    "Service$Container": (SERVICES, r"{stack}-(.+)-\d+"),
    "Service$Files": (SERVICES, "{stack}-(.+)-files"),
    "Service$Files$Container": (SERVICES, "{stack}-(.+)-files-carrier"),
    "Service$Files$Secret": (SERVICES, "{stack}-(.+)-files-salt"),
    "Service$Files$Secret$Command": (SERVICES, "{stack}-(.+)-files-salt-generated"),
    "Service$Files$Volume": (SERVICES, r"{stack}-(.+)-files-\d+"),
    "Image": (SERVICES, "{stack}-(.+)"),
    "Image$RemoteImage": (SERVICES, "{stack}-(.+)-[0-9a-z]+"),  # a hash, or `pull`
    "Network": (NETWORKS, "{stack}-(.+)"),
    "Network$Network": (NETWORKS, "{stack}-(.+)-bridge"),
    "Volume": (VOLUMES, "{stack}-(.+)"),
    "Volume$Volume": (VOLUMES, "{stack}-(.+)-data"),
    "Secret": (SECRETS, "{stack}-(.+)"),
    "Secret$Command": (SECRETS, "{stack}-(.+)-generated"),
    "Slice": (LEDGER, "(.+)"),
    "Slice$HostCommand": (LEDGER, "(.+)-cgroup"),
    "Slice$HostCommand$Command": (LEDGER, "(.+)-cgroup-(?:local|remote)"),
}
"""Types below the environment: the section of the file that describes one, and the key in its name."""

LIMITS = "deploy.resources.limits"
KEYS: dict[str, tuple[str, ...]] = {
    "capabilities": ("cap_add", "cap_drop"),
    "capabilities.adds": ("cap_add",),
    "capabilities.drops": ("cap_drop",),
    "cpuPeriod": (f"{LIMITS}.cpus",),
    "cpuQuota": (f"{LIMITS}.cpus",),
    "cpus": (f"{LIMITS}.cpus",),
    "destroyGraceSeconds": ("stop_grace_period",),
    "entrypoints": ("entrypoint",),
    "envs": ("environment",),
    "exempt": ("x-bulkhead.exempt",),
    "hosts": ("extra_hosts",),
    "image": ("image", "build"),
    "ipamConfigs": ("ipam",),
    "ipcMode": ("ipc",),
    "logDriver": ("logging.driver",),
    "logOpts": ("logging.options",),
    "memory": (f"{LIMITS}.memory",),
    "memoryReservation": ("deploy.resources.reservations.memory",),
    "memorySwap": (f"{LIMITS}.memory",),
    "mounts": ("volumes", "tmpfs"),
    "name": ("name", "image", "build"),  # a network's or a volume's; of an image it is the reference
    "networkMode": ("network_mode", "networks"),
    "networksAdvanced": ("networks",),
    "pidMode": ("pid",),
    "pidsLimit": (f"{LIMITS}.pids",),
    "securityOpts": ("security_opt",),
    "stopTimeout": ("stop_grace_period",),
    "uploads": ("secrets", "configs"),
}
"""Compose's keys for a property, the likeliest first. A property that is not here has Compose's own name."""


class Locator:
    """The files of one stack. Those that cannot be read say nothing: the preview has said why."""

    def __init__(self, root: Path, stack: str) -> None:
        self._stack = stack
        self._top = Place(root / f"Pulumi.{stack}.yaml", 1)
        try:
            files = [self._top.path] if stack == HOST else read_environment(stack, root).compose
            self._sources: Sources | None = Sources(files)
        except SettingsError:
            self._sources = None
        self._written = self._sources.written() if self._sources else set()

    def place(self, urn: str, path: str) -> Place:
        """The line of the key behind a property, else of the service, network or the like, else of the stack."""
        described = self._described(urn)
        if self._sources is None or described not in self._written:
            return self._top
        keys = [(*described, *key.split(".")) for key in compose_keys(path)]
        longest = max(map(len, keys), default=0)
        written = (key[:length] for length in range(longest, len(described), -1) for key in keys)
        found = self._sources.find(next((key for key in written if key in self._written), described))
        return Place(*found) if found else self._top

    def _described(self, urn: str) -> Loc:
        """The path of what describes a resource, in the files; empty if its name tells of none."""
        _, _, types, name = (urn.split("::", 3) + [""] * 4)[:4]
        chain = "$".join(kind.rpartition(":")[2] for kind in types.split("$"))
        section, pattern = KINDS.get(chain.removeprefix("Environment$"), ((), ""))
        key = re.fullmatch(pattern.replace("{stack}", re.escape(self._stack)), name)
        return (*section, key[1]) if section and key else ()


def compose_keys(path: str) -> tuple[str, ...]:
    """Compose's keys for a property's path: `cap_add` for `capabilities.adds[0]`."""
    words = re.findall(r"\w+", re.split(r"[\[,]", path)[0])
    if not words:
        return ()
    own = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", words[0]).lower()
    return KEYS.get(".".join(words[:2])) or KEYS.get(words[0]) or (own,)
