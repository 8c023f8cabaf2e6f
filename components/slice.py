"""Slice: the cgroup that holds everything of one environment, with its CPU weight, memory and pids.

Groups under the cgroupfs driver (cgroup v1 and v2), slice units under the systemd driver. It does not touch IO.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import pulumi

from components.host_command import HostCommand, HostCommandArgs
from settings.ledger import Budget, Tier, slice_name

CGROUPS = "/sys/fs/cgroup"
UNITS = "/etc/systemd/system"
PAGE = 4096
# The kernel's default weight of a group (v2) and shares (v1): what the system's own services run at.
SYSTEM_WEIGHT, SYSTEM_SHARES = 100, 1024
MAX_WEIGHT, MAX_SHARES = 10_000, 262_144
MIN_WEIGHT, MIN_SHARES = 1, 2
CFS_PERIOD_US = 100_000


@dataclass(frozen=True)
class SliceArgs:
    """One environment's share of the host.

    `driver`: the engine's cgroup driver, `cgroupfs` or `systemd`. `cgroup_version`: 1 or 2.
    `system_cpus`: CPUs kept for the system, `capacity_cpus`: CPUs there are; weights are relative to them.
    `protected`: the sum of all protected environments' reservations, which systemd's common parent slice needs.
    `boot`: an id of the host's current boot: groups made by hand (cgroupfs) are gone after a reboot,
    so a new boot makes the next `pulumi up` write them again.
    """

    environment: str
    tier: Tier
    reservations: Budget | None
    limits: Budget | None
    driver: str
    cgroup_version: int
    capacity_cpus: float
    system_cpus: float
    protected: Budget = field(default_factory=Budget)
    host: str | None = None
    boot: str = ""


class Slice(pulumi.ComponentResource):
    """The cgroup of one environment. `cgroup_parent` is how the engine's driver spells it."""

    cgroup_parent: pulumi.Output[str]

    def __init__(self, name: str, args: SliceArgs, opts: pulumi.ResourceOptions | None = None) -> None:
        super().__init__("bulkhead:index:Slice", name, None, opts)
        parent = slice_name(args.environment, args.driver)
        create, delete = scripts(args, parent)
        command = HostCommand(
            f"{name}-cgroup",
            HostCommandArgs(
                host=args.host,
                create=create,
                delete=delete,
                environment={"BOOT_ID": args.boot} if args.driver == "cgroupfs" else {},
            ),
            opts=pulumi.ResourceOptions(parent=self),
        )
        # Whoever uses the parent waits until the group has its limits.
        self.cgroup_parent = command.stdout.apply(lambda _: parent)
        self.register_outputs({"cgroup_parent": self.cgroup_parent})


def cpu_ratio(args: SliceArgs) -> float | None:
    """CPU time of the environment for each of the system's under full contention; None for best-effort.

    A protected environment's weight stands to the system's as its reservation to the system's share, so
    that both promises hold however many others ask.
    """
    if args.tier is not Tier.PROTECTED or args.reservations is None or args.reservations.cpus is None:
        return None
    return args.reservations.cpus / system_share(args)


def cpu_weight(args: SliceArgs) -> int:
    """The environment's `cpu.weight`, as the kernel (v2) and systemd spell it."""
    ratio = cpu_ratio(args)
    return MIN_WEIGHT if ratio is None else clamp(SYSTEM_WEIGHT * ratio, MIN_WEIGHT, MAX_WEIGHT)


def system_share(args: SliceArgs) -> float:
    """The system's CPUs; at least a hundredth of the machine, so that a weight has something to stand to."""
    return max(args.system_cpus, 0.01 * args.capacity_cpus)


def scripts(args: SliceArgs, parent: str) -> tuple[str, str]:
    """The create and delete scripts for the host's driver and cgroup version."""
    if args.driver == "systemd":
        return systemd_scripts(args, parent)
    files = v2_files(args) if args.cgroup_version == 2 else v1_files(args)
    return cgroupfs_scripts(files, parent, args.cgroup_version)


def v1_files(args: SliceArgs) -> Mapping[str, str]:
    """cgroup v1 files (controller/file) and their values; a limit that is not set is written as none."""
    ratio = cpu_ratio(args)
    shares = MIN_SHARES if ratio is None else clamp(SYSTEM_SHARES * ratio, MIN_SHARES, MAX_SHARES)
    quota = cpu_quota(args)
    memory = memory_limit(args)
    return {
        "cpu/cpu.shares": str(shares),
        "cpu/cpu.cfs_period_us": str(CFS_PERIOD_US),
        "cpu/cpu.cfs_quota_us": "-1" if quota is None else str(quota),
        # memory + swap first up, then down: the kernel keeps limit_in_bytes <= memsw.limit_in_bytes.
        "memory/memory.memsw.limit_in_bytes?": "-1",
        "memory/memory.limit_in_bytes": "-1" if memory is None else str(memory),
        "memory/memory.memsw.limit_in_bytes?2": "-1" if memory is None else str(memory),
        "pids/pids.max": pids_limit(args),
    }


def v2_files(args: SliceArgs) -> Mapping[str, str]:
    """cgroup v2 files and their values; `memory.low` is what reclaim leaves a protected environment."""
    quota = cpu_quota(args)
    memory = memory_limit(args)
    return {
        "cpu.weight": str(cpu_weight(args)),
        "cpu.max": f"{'max' if quota is None else quota} {CFS_PERIOD_US}",
        "memory.low": str(memory_low(args)),
        "memory.max": "max" if memory is None else str(memory),
        "memory.swap.max?": "max" if memory is None else "0",
        "pids.max": pids_limit(args),
    }


def cgroupfs_scripts(files: Mapping[str, str], parent: str, version: int) -> tuple[str, str]:
    """Scripts that write the files below the group's directory in every hierarchy, and remove it again.

    A key that ends in `?` is written only where the kernel has the file (swap accounting may be off).
    """
    lines = []
    if version == 2:
        lines += [
            f"echo '+cpu +memory +pids' > {CGROUPS}/cgroup.subtree_control",
            f"mkdir -p {CGROUPS}{parent}",
        ]
    for key, value in files.items():
        file, optional, _ = key.partition("?")
        controller, _, leaf = file.rpartition("/")
        path = f"{CGROUPS}/{controller}{parent}/{leaf}" if controller else f"{CGROUPS}{parent}/{leaf}"
        if controller and f"mkdir -p {CGROUPS}/{controller}{parent}" not in lines:
            lines.append(f"mkdir -p {CGROUPS}/{controller}{parent}")
        lines.append(f"{f'[ ! -e {path} ] || ' if optional else ''}echo '{value}' > {path}")
    delete = (
        # The engine makes the group in every hierarchy; a container's own group goes a moment after it.
        f"for group in {CGROUPS}{parent} {CGROUPS}/*{parent}; do\n"
        '  [ -d "$group" ] || continue\n'
        "  tries=0\n"
        '  until find "$group" -depth -type d -exec rmdir {} \\; && [ ! -d "$group" ]; do\n'
        "    tries=$((tries + 1))\n"
        '    [ "$tries" -lt 20 ] || { echo "$group still holds processes: stop them first: make down" >&2; exit 1; }\n'
        "    sleep 0.25\n"
        "  done\n"
        "done\n"
    )
    return "\n".join(lines) + "\n", delete


def systemd_scripts(args: SliceArgs, unit: str) -> tuple[str, str]:
    """Scripts that install and remove a slice unit: raw writes would be undone by `systemctl daemon-reload`."""
    quota = cpu_quota(args)
    memory = memory_limit(args)
    properties = {
        "CPUAccounting": "yes",
        "CPUWeight": str(cpu_weight(args)),
        "CPUQuota": "" if quota is None else f"{quota * 100 // CFS_PERIOD_US}%",
        "MemoryAccounting": "yes",
        "MemoryLow": str(memory_low(args)),
        "MemoryMax": "infinity" if memory is None else str(memory),
        "MemorySwapMax": "infinity" if memory is None else "0",
        "TasksAccounting": "yes",
        "TasksMax": "infinity" if (pids := pids_limit(args)) == "max" else pids,
    }
    # systemd nests every bulkhead-….slice in bulkhead.slice. Left at its defaults, the whole of it would weigh as much
    # as the system's services, and a memory protection below it would count for nothing.
    parent = {
        "CPUAccounting": "yes",
        "CPUWeight": str(clamp(SYSTEM_WEIGHT * (args.protected.cpus or 0) / system_share(args), 1, MAX_WEIGHT)),
        "MemoryAccounting": "yes",
        "MemoryLow": str((args.protected.memory or 0) // PAGE * PAGE),
    }
    create = (
        unit_file("bulkhead.slice", "Bulkhead: all environments", parent)
        + unit_file(unit, f"Bulkhead: everything of environment {args.environment}", properties)
        + f"systemctl daemon-reload\nsystemctl enable --quiet {unit}\nsystemctl start {unit}\n"
    )
    delete = (
        # Stopping a slice stops everything in it.
        f"if find {CGROUPS} -path '*/{unit}/*' -name cgroup.procs -exec cat {{}} + | grep -q .; then\n"
        f"  echo '{unit} still holds processes: stop them first: make down ENV={args.environment}' >&2\n"
        "  exit 1\n"
        "fi\n"
        f"systemctl disable --quiet {unit}\nsystemctl stop {unit}\nrm -f {UNITS}/{unit}\nsystemctl daemon-reload\n"
    )
    return create, delete


def unit_file(unit: str, description: str, properties: Mapping[str, str]) -> str:
    """Shell text that writes a slice unit."""
    body = "\n".join(f"{key}={value}" for key, value in properties.items())
    return (
        f"cat > {UNITS}/{unit} <<'UNIT'\n[Unit]\nDescription={description}\nBefore=slices.target\n"
        f"[Slice]\n{body}\n[Install]\nWantedBy=slices.target\nUNIT\n"
    )


def memory_limit(args: SliceArgs) -> int | None:
    """The hard ceiling in bytes, in whole pages as the kernel keeps it; None when there is none."""
    if args.limits is None or args.limits.memory is None:
        return None
    return args.limits.memory // PAGE * PAGE


def memory_low(args: SliceArgs) -> int:
    """What reclaim leaves this environment, in bytes: a protected environment's reservation."""
    if args.tier is not Tier.PROTECTED or args.reservations is None:
        return 0
    return (args.reservations.memory or 0) // PAGE * PAGE


def pids_limit(args: SliceArgs) -> str:
    """The ceiling on processes and threads as the kernel spells it."""
    return "max" if args.limits is None or args.limits.pids is None else str(args.limits.pids)


def cpu_quota(args: SliceArgs) -> int | None:
    """CPU time in µs a period, for a best-effort environment limited below the whole machine; else None.

    A quota is not work-conserving, and a protected environment never has one.
    """
    limit = None if args.limits is None else args.limits.cpus
    if args.tier is Tier.PROTECTED or limit is None or limit >= args.capacity_cpus:
        return None
    return int(limit * CFS_PERIOD_US)


def clamp(value: float, low: int, high: int) -> int:
    """`value` rounded and kept between the kernel's bounds."""
    return max(low, min(high, round(value)))
