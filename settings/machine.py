"""What a Docker host's /sys and mounts say of its disk, cgroups and service manager. Standard library only, since a
remote machine is sent this file: `ssh host python3 - DATA_ROOT FOLDER... < settings/machine.py` prints what `read`
returns."""

import gzip
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

MEASURED = Path("/var/lib/bulkhead/device.json")
SYS = Path("/sys")
CGROUPS = Path("/sys/fs/cgroup")
GUARDS = ("dockerd", "containerd", "sshd")
"""Programs that have to outlive everything else when the machine is out of memory."""
PROGRAMS = ("nft", "restic")
"""What deploys and the agent run there, beside the engine."""
PREEMPTION = {
    "PREEMPT_RT": "full",
    "PREEMPT_NONE": "none",
    "PREEMPT_VOLUNTARY": "voluntary",
    "PREEMPT_LAZY": "lazy",
    "PREEMPT": "full",
}
"""What a kernel is built with (kernel/Kconfig.preempt), and what that is called on its command line."""
TRACKED = Path("/proc/sys/net/netfilter")


def read(data_root: Path, folders: Iterable[Path] = ()) -> dict[str, Any]:
    """The facts as plain values: `systemd` (its version, 0 without), `recursive_memory`, `controllers`, `disk`,
    `scores` (OOM scores of GUARDS), `measured` (what host/device.py found, None before the first deploy), `programs`
    (those of PROGRAMS that are installed), `connections` (how many are tracked, and at most), `preemption` and
    `folders` (`place`).

    `disk` is None where the data root's file system stands on no block device (overlay, zfs), else `number` (MAJ:MIN
    of the whole disk), `name` and `size` (bytes) of the device whose throttle holds for the file system, `schedulers`
    of the disks below it, and `iocost` if it is on for all of them.
    """
    folder = existing(data_root)
    device = whole(folder)
    below = disks(folder)
    return {
        "systemd": systemd(),
        "recursive_memory": "memory_recursiveprot" in options(CGROUPS),
        "controllers": sorted(controllers()),
        "scores": scores(),
        "measured": measured(),
        "programs": programs(os.environ.get("PATH", os.defpath)),
        "connections": connections(),
        "preemption": preemption(),
        "folders": {str(one): place(one, data_root) for one in folders},
        "disk": device
        and {
            "number": (device / "dev").read_text().strip(),
            "name": device.name.replace("!", "/"),
            "size": int((device / "size").read_text()) * 512,
            "schedulers": sorted({scheduler(disk) or "" for disk in below}),
            "iocost": all(iocost(disk) for disk in below),
        },
    }


def existing(folder: Path) -> Path:
    """The folder, or what stands above it: a user who is not root may not see Docker's own."""
    return next(path for path in (folder, *folder.parents) if os.access(path, os.F_OK))


def place(folder: Path, data_root: Path, sys: Path = SYS) -> dict[str, Any]:
    """Of a folder, or what it would be made in: whether it is `there`, `size` and `free` bytes of its file system, and
    whether that is `shared` with the engine's data: the same, or one on the same disk."""
    found, data = existing(folder), existing(data_root)
    room = shutil.disk_usage(found)
    same = found.stat().st_dev == data.stat().st_dev
    shared = same or not {*disks(found, sys)}.isdisjoint(disks(data, sys))
    return {"there": found == folder, "size": room.total, "free": room.free, "shared": shared}


def _device(folder: Path, sys: Path) -> Path | None:
    number = folder.stat().st_dev
    device = sys / "dev" / "block" / f"{os.major(number)}:{os.minor(number)}"
    return device.resolve() if device.exists() else None


def whole(folder: Path, sys: Path = SYS) -> Path | None:
    """The device under a folder's file system, as a /sys folder: of a partition its disk, since cgroups throttle
    whole devices only. A logical volume is a device of its own."""
    device = _device(folder, sys)
    return device.parent if device and (device / "partition").exists() else device


def disks(folder: Path, sys: Path = SYS) -> list[Path]:
    """The whole disks under a folder's file system, as /sys folders; none for one without a device (overlay, zfs)."""
    device = _device(folder, sys)
    return list(_below(device)) if device else []


def _below(device: Path) -> Iterator[Path]:
    slaves = list((device / "slaves").glob("*"))
    for slave in slaves:  # LVM, dm-crypt and RAID stand on other devices
        yield from _below(slave.resolve())
    if not slaves:
        yield device.parent if (device / "partition").exists() else device


def scheduler(disk: Path) -> str | None:
    """The active scheduler of a disk: the one in brackets."""
    try:
        active = re.search(r"\[(.+?)\]", (disk / "queue" / "scheduler").read_text())
    except OSError:
        return None
    return active[1] if active else None


def iocost(disk: Path, tree: Path = CGROUPS) -> bool:
    """Whether cgroup v2's iocost model is on for the disk (io.cost.qos has a line `8:0 enable=1 …`)."""
    try:
        number = (disk / "dev").read_text().strip()
        return any(line.startswith(f"{number} enable=1") for line in (tree / "io.cost.qos").read_text().splitlines())
    except OSError:
        return False


def controllers(tree: Path = CGROUPS) -> frozenset[str]:
    """Controllers of the mounted hierarchy: v2 lists them in a file, v1 has a folder for each."""
    listed = tree / "cgroup.controllers"
    if listed.exists():
        return frozenset(listed.read_text().split())
    return frozenset(name for folder in tree.glob("*/cgroup.procs") for name in folder.parent.name.split(","))


def systemd() -> int:
    """The version of systemd if it runs the machine, else 0."""
    if not Path("/run/systemd/system").is_dir():
        return 0
    try:
        told = subprocess.run(["systemctl", "--version"], capture_output=True, text=True, check=False).stdout
    except OSError:
        return 0
    found = re.match(r"systemd (\d+)", told)
    return int(found[1]) if found else 0


def programs(path: str) -> list[str]:
    """Those of PROGRAMS that root finds; `path`: of the user that asks, who may have no folders of root's in it."""
    return [name for name in PROGRAMS if shutil.which(name, path=f"{path}:/usr/local/sbin:/usr/sbin:/sbin")]


def connections(folder: Path = TRACKED) -> list[int] | None:
    """How many connections the kernel tracks and how many it can, None where it tracks none."""
    try:
        return [int((folder / f"nf_conntrack_{name}").read_text()) for name in ("count", "max")]
    except OSError:
        return None


def preemption(proc: Path = Path("/proc"), boot: Path = Path("/boot"), release: str = platform.release()) -> str:
    """How the kernel's own work is interrupted for a process that wakes up: `none`, `voluntary`, `lazy` or `full`;
    empty where nothing tells. As it was built, unless its command line says otherwise (with PREEMPT_DYNAMIC)."""
    try:
        file = boot / f"config-{release}"
        config = file.read_text() if file.exists() else gzip.decompress((proc / "config.gz").read_bytes()).decode()
        line = (proc / "cmdline").read_text()
    except (OSError, ValueError):
        return ""
    built = {name for name in re.findall(r"^CONFIG_(PREEMPT\w*)=y$", config, re.MULTILINE)}
    said = re.findall(r"(?:^|\s)preempt=(none|voluntary|lazy|full)(?=\s|$)", line)
    if said and "PREEMPT_DYNAMIC" in built:
        return str(said[-1])
    return next((mode for name, mode in PREEMPTION.items() if name in built), "")


def measured(file: Path = MEASURED) -> dict[str, Any] | None:
    """The disk's speed as it was measured, see host/device.py."""
    try:
        found = json.loads(file.read_text())
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def scores(proc: Path = Path("/proc")) -> dict[str, int]:
    """The OOM score of each of GUARDS that runs. The lowest: a session's sshd has given its own up."""
    found: dict[str, int] = {}
    for folder in proc.glob("[0-9]*"):
        try:
            name = (folder / "comm").read_text().strip()
            if name in GUARDS:
                score = int((folder / "oom_score_adj").read_text())
                found[name] = min(found.get(name, score), score)
        except OSError:
            continue  # it has just ended
    return found


def options(mount_point: Path, mounts: Path = Path("/proc/self/mounts")) -> frozenset[str]:
    """The options of a mount point as the kernel shows them; the last mount there is the one that is seen."""
    found: frozenset[str] = frozenset()
    for line in mounts.read_text().splitlines():
        fields = line.split(" ")
        if fields[1].encode().decode("unicode_escape") == str(mount_point):
            found = frozenset(fields[3].split(","))
    return found


if __name__ == "__main__":
    print(json.dumps(read(Path(sys.argv[1]), map(Path, sys.argv[2:]))))
