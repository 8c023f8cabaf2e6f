"""Slice: the cgroup that holds everything of one environment: CPU, memory, IO and pids.

Groups under the cgroupfs driver (cgroup v1 and v2), slice units under the systemd driver. What no cgroup can do (OOM
scores, disk space, and on v1 the IO of groups below the slice) is kept by `host/keep.py`.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import pulumi

from components.device import SPEEDS
from components.host_command import HostCommand, HostCommandArgs
from settings.host import HostFacts
from settings.ledger import Environment, Ledger, Tier, slice_name

CGROUPS = "/sys/fs/cgroup"
UNITS = "/etc/systemd/system"
SYSTEM_UNIT = "system.slice.d/bulkhead.conf"
PAGE = 4096
# The kernel's default weight of a group (v2) and shares (v1): what the system's own services run at.
SYSTEM_WEIGHT, SYSTEM_SHARES = 100, 1024
MAX_WEIGHT, MAX_SHARES = 10_000, 262_144
MIN_WEIGHT, MIN_SHARES = 1, 2
IDLE_SHARES = 3
"""What cpu.shares shows of a group of the idle class; the kernel refuses to be told another number."""
CFS_PERIOD_US = 100_000
QUOTA_STEP_US = 10  # systemd takes a quota in hundredths of a percent
HIGH = 31 / 32
"""memory.high as a part of memory.max: just below it, an environment is made to reclaim its own memory and slowed
down, so that one that only reads files does not run into its ceiling."""
IO_WEIGHT = {Tier.PROTECTED: 10_000, Tier.BEST_EFFORT: 1}
BFQ_WEIGHT = {Tier.PROTECTED: 1000, Tier.BEST_EFFORT: 1}
"""The ends of the kernel's scales; the system's own is 100 on both."""
IO_WEIGHTS = {"bfq": ("io.bfq.weight", BFQ_WEIGHT), "iocost": ("io.weight", IO_WEIGHT)}
IO_MAX = ("rbps", "wbps", "riops", "wiops")
IO_PROPERTIES = ("IOReadBandwidthMax", "IOWriteBandwidthMax", "IOReadIOPSMax", "IOWriteIOPSMax")
"""SPEEDS in the words of io.max and of systemd."""
OOM_SCORE_ADJ = {Tier.PROTECTED: 0, Tier.BEST_EFFORT: 1000}
"""When the whole machine is out of memory, a process with 1000 is the first to go whatever its size; with less, a
small dev could outlive a large prod (the score counts in thousandths of the machine's memory)."""

Speed = Mapping[str, int]
"""Bytes and operations a second, see `components.device.SPEEDS`."""


class SliceArgs(NamedTuple):
    """One environment's share of the host: its entry in the ledger, the whole ledger, and what the host is like."""

    environment: Environment
    ledger: Ledger
    facts: HostFacts


class Setting(NamedTuple):
    """A cgroup file: what is written to it, if anything, and what it shows then (None: that tells nothing)."""

    file: str
    value: str | None
    shown: str | None


class Slice(pulumi.ComponentResource):
    """The cgroup of one environment. `cgroup_parent` is how the engine's driver spells it.

    `speed`: the disk's, of `components.device`. `files`: what `effective_files` says of it.
    """

    cgroup_parent: pulumi.Output[str]
    files: pulumi.Output[Mapping[str, str]]

    def __init__(
        self,
        name: str,
        args: SliceArgs,
        speed: pulumi.Input[Speed | None] = None,
        opts: pulumi.ResourceOptions | None = None,
    ) -> None:
        super().__init__("bulkhead:index:Slice", name, None, opts)
        parent = slice_name(args.environment.name, args.facts.cgroup_driver)
        measured: pulumi.Output[Speed | None] = pulumi.Output.from_input(speed)
        command = HostCommand(
            f"{name}-cgroup",
            HostCommandArgs(
                host=args.facts.address,
                create=measured.apply(lambda known: scripts(args, known)[0]),
                delete=scripts(args)[1],
                # Groups made by hand are gone after a reboot, so a new boot makes the next `pulumi up` write them.
                environment={"BOOT_ID": args.facts.boot} if args.facts.cgroup_driver == "cgroupfs" else {},
            ),
            opts=pulumi.ResourceOptions(parent=self),
        )
        # Whoever uses the parent waits until the group has its limits.
        self.cgroup_parent = command.stdout.apply(lambda _: parent)
        self.files = measured.apply(lambda known: effective_files(args, known))
        self.register_outputs({"cgroup_parent": self.cgroup_parent, "files": self.files})


def effective_files(args: SliceArgs, speed: Speed | None = None) -> Mapping[str, str]:
    """Absolute paths of cgroup files, and what the kernel shows in each when all is well."""
    parent = slice_name(args.environment.name, args.facts.cgroup_driver)
    if args.facts.cgroup_driver != "systemd":
        shown = {path_of(parent, one.file): one.shown for one in cgroupfs_settings(args, speed)}
    elif args.facts.cgroup_version == 2:
        folder = f"{CGROUPS}/bulkhead.slice"
        shown = {f"{folder}/{parent}/{one.file}": one.shown for one in v2_settings(args, speed)}
        if args.environment.tier is Tier.PROTECTED:
            kept = str(pages(protected(args.ledger, "memory")))
            shown |= {
                f"{folder}/cpu.weight": str(parent_weight(args)),
                f"{folder}/memory.min": kept,
                f"{folder}/memory.low": kept,
                f"{CGROUPS}/system.slice/memory.low": str(pages(args.ledger.system.memory or 0)),
            }
    else:
        # On v1 systemd writes what it makes of properties that are v2's; of these files that is certain.
        certain = [one for one in v1_settings(args) if one.file in ("memory/memory.limit_in_bytes", "pids/pids.max")]
        shown = {path_of(f"/bulkhead.slice/{parent}", one.file): one.shown for one in certain}
    return {path: value for path, value in shown.items() if value is not None}


def cpu_ratio(args: SliceArgs) -> float | None:
    """CPU time of the environment for each of the system's under full contention; None for best-effort.

    A protected environment's weight stands to the system's as its reservation to the system's share, so
    that both promises hold however many others ask.
    """
    reserved = args.environment.reservations
    if args.environment.tier is not Tier.PROTECTED or reserved is None or reserved.cpus is None:
        return None
    return reserved.cpus / system_share(args)


def cpu_weight(args: SliceArgs) -> int:
    """The environment's `cpu.weight`, as the kernel (v2) and systemd spell it."""
    ratio = cpu_ratio(args)
    return MIN_WEIGHT if ratio is None else clamp(SYSTEM_WEIGHT * ratio, MIN_WEIGHT, MAX_WEIGHT)


def parent_weight(args: SliceArgs) -> int:
    """The weight of systemd's common parent slice: all protected environments' together."""
    return clamp(SYSTEM_WEIGHT * protected(args.ledger, "cpus") / system_share(args), MIN_WEIGHT, MAX_WEIGHT)


def system_share(args: SliceArgs) -> float:
    """The system's CPUs; at least a hundredth of the machine, so that a weight has something to stand to."""
    return max(args.ledger.system.cpus or 0.0, 0.01 * args.ledger.capacity.cpus)


def protected(ledger: Ledger, resource: str) -> Any:
    """The sum of all protected environments' reservations of a resource."""
    reserved = [one.reservations for one in ledger.environments.values() if one.tier is Tier.PROTECTED]
    return sum(getattr(one, resource, None) or 0 for one in reserved)


def idle(args: SliceArgs) -> bool:
    """Whether the whole environment is of the idle class: it runs when nobody else wants the CPU."""
    unseen = args.facts.cgroup_driver == "systemd" and args.facts.cgroup_version == 1  # CPUWeight=idle is of v2
    return args.environment.tier is Tier.BEST_EFFORT and args.facts.cpu_idle and not unseen


def scripts(args: SliceArgs, speed: Speed | None = None) -> tuple[str, str]:
    """The create and delete scripts for the host's driver and cgroup version."""
    parent = slice_name(args.environment.name, args.facts.cgroup_driver)
    if args.facts.cgroup_driver == "systemd":
        return systemd_scripts(args, parent, speed)
    return cgroupfs_scripts(cgroupfs_settings(args, speed), parent, args.facts.cgroup_version)


def cgroupfs_settings(args: SliceArgs, speed: Speed | None) -> Iterator[Setting]:
    """The files of the host's cgroup version, in the order in which they have to be written."""
    return v2_settings(args, speed) if args.facts.cgroup_version == 2 else v1_settings(args, speed)


def v1_settings(args: SliceArgs, speed: Speed | None = None) -> Iterator[Setting]:
    """cgroup v1 files (controller/file). It has no memory protection: there prod is protected by dev's ceilings."""
    if idle(args):
        yield exact("cpu/cpu.idle", "1")
        yield Setting("cpu/cpu.shares", None, str(IDLE_SHARES))
    else:
        ratio = cpu_ratio(args)
        shares = MIN_SHARES if ratio is None else clamp(SYSTEM_SHARES * ratio, MIN_SHARES, MAX_SHARES)
        # The class first: leaving it resets the shares, and until then the kernel refuses any.
        if args.facts.cpu_idle:
            yield exact("cpu/cpu.idle", "0")
        yield exact("cpu/cpu.shares", str(shares))
    quota = cpu_quota(args)
    yield exact("cpu/cpu.cfs_period_us", str(CFS_PERIOD_US))
    yield exact("cpu/cpu.cfs_quota_us", "-1" if quota is None else str(quota))
    memory = memory_limit(args)
    ceiling = ("-1", None) if memory is None else (str(memory), str(memory))  # no ceiling is shown as a huge number
    if args.facts.swap_limit:
        # Memory and swap together first up, then down: the kernel keeps limit_in_bytes <= memsw.limit_in_bytes.
        yield Setting("memory/memory.memsw.limit_in_bytes", "-1", None)
    yield Setting("memory/memory.limit_in_bytes", *ceiling)
    if args.facts.swap_limit:
        yield Setting("memory/memory.memsw.limit_in_bytes", *ceiling)
    yield exact("pids/pids.max", pids_limit(args))
    if args.facts.io == "bfq":
        yield exact("blkio/blkio.bfq.weight", str(BFQ_WEIGHT[args.environment.tier]))
    if args.facts.device and args.facts.io:
        number, limits = args.facts.device.number, io_limits(args, speed)
        for name in SPEEDS:
            file = f"blkio/blkio.throttle.{name}_device"
            # 0 takes a ceiling away, and then the file shows nothing.
            yield exact(file, f"{number} {limits[name]}") if limits else Setting(file, f"{number} 0", None)


def v2_settings(args: SliceArgs, speed: Speed | None = None) -> Iterator[Setting]:
    """cgroup v2 files. `memory.min` and `memory.low` are what reclaim leaves a protected environment."""
    if idle(args):
        yield exact("cpu.idle", "1")
    else:
        if args.facts.cpu_idle:
            yield exact("cpu.idle", "0")
        yield exact("cpu.weight", str(cpu_weight(args)))
    quota = cpu_quota(args)
    yield exact("cpu.max", f"{'max' if quota is None else quota} {CFS_PERIOD_US}")
    memory = memory_limit(args)
    yield exact("memory.min", str(memory_kept(args)))
    yield exact("memory.low", str(memory_kept(args)))
    yield exact("memory.high", "max" if memory is None else str(memory_high(memory)))
    yield exact("memory.max", "max" if memory is None else str(memory))
    if args.facts.swap_limit:
        yield exact("memory.swap.max", "max" if memory is None else "0")
    yield exact("pids.max", pids_limit(args))
    if args.facts.io in IO_WEIGHTS:
        file, weights = IO_WEIGHTS[args.facts.io]
        weight = weights[args.environment.tier]
        yield Setting(file, str(weight), f"default {weight}")
    if args.facts.device and args.facts.io:
        number, limits = args.facts.device.number, io_limits(args, speed)
        keys = " ".join(f"{key}={limits[name] if limits else 'max'}" for name, key in zip(SPEEDS, IO_MAX, strict=True))
        yield Setting("io.max", f"{number} {keys}", f"{number} {keys}" if limits else None)


def exact(file: str, value: str) -> Setting:
    """A file that shows what is written to it."""
    return Setting(file, value, value)


def path_of(parent: str, file: str) -> str:
    """A group's file: on v1 its controller names the hierarchy."""
    controller, _, leaf = file.rpartition("/")
    return f"{CGROUPS}/{controller}{parent}/{leaf}" if controller else f"{CGROUPS}{parent}/{leaf}"


def cgroupfs_scripts(settings: Iterable[Setting], parent: str, version: int) -> tuple[str, str]:
    """Scripts that write the files below the group's directory in every hierarchy, and remove it again."""
    lines = []
    if version == 2:
        lines += [
            f"echo '+cpu +memory +pids' > {CGROUPS}/cgroup.subtree_control",
            f"! grep -qw io {CGROUPS}/cgroup.controllers || echo +io > {CGROUPS}/cgroup.subtree_control",
        ]
    for file, value, _ in settings:
        path = path_of(parent, file)
        folder = path.rpartition("/")[0]
        if f"mkdir -p {folder}" not in lines:
            lines.append(f"mkdir -p {folder}")
        if value is not None:
            lines.append(f"echo '{value}' > {path}")
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


def systemd_scripts(args: SliceArgs, unit: str, speed: Speed | None) -> tuple[str, str]:
    """Scripts that install and remove a slice unit: raw writes would be undone by `systemctl daemon-reload`."""
    quota = cpu_quota(args)
    memory = memory_limit(args)
    properties = {
        "CPUAccounting": "yes",
        "CPUWeight": "idle" if idle(args) else str(cpu_weight(args)),
        "CPUQuota": "" if quota is None else f"{quota * 100 / CFS_PERIOD_US:.2f}%",
        "MemoryAccounting": "yes",
        "MemoryMin": str(memory_kept(args)),
        "MemoryLow": str(memory_kept(args)),
        "MemoryHigh": "infinity" if memory is None else str(memory_high(memory)),
        "MemoryMax": "infinity" if memory is None else str(memory),
        "MemorySwapMax": "infinity" if memory is None else "0",
        "TasksAccounting": "yes",
        "TasksMax": "infinity" if (pids := pids_limit(args)) == "max" else pids,
        **io_properties(args, speed),
    }
    # systemd nests every bulkhead-….slice in bulkhead.slice. Left at its defaults, the whole of it would weigh as much
    # as the system's services, and a memory protection below it would count for nothing.
    kept = str(pages(protected(args.ledger, "memory")))
    parent = {
        "CPUAccounting": "yes",
        "CPUWeight": str(parent_weight(args)),
        "MemoryAccounting": "yes",
        "MemoryMin": kept,
        "MemoryLow": kept,
        **({"IOWeight": str(IO_WEIGHT[Tier.PROTECTED])} if args.facts.io in IO_WEIGHTS else {}),
    }
    # The engine and sshd run there. A protected environment has no ceiling: this is what it cannot push out.
    system = f"[Slice]\nMemoryLow={pages(args.ledger.system.memory or 0)}\n"
    create = (
        written(SYSTEM_UNIT, system)
        + slice_unit("bulkhead.slice", "Bulkhead: all environments", parent)
        + slice_unit(unit, f"Bulkhead: everything of environment {args.environment.name}", properties)
        + f"systemctl daemon-reload\nsystemctl enable --quiet {unit}\nsystemctl start {unit}\n"
    )
    delete = (
        # Stopping a slice stops everything in it.
        f"if find {CGROUPS} -path '*/{unit}/*' -name cgroup.procs -exec cat {{}} + | grep -q .; then\n"
        f"  echo '{unit} still holds processes: stop them first: make down ENV={args.environment.name}' >&2\n"
        "  exit 1\n"
        "fi\n"
        f"systemctl disable --quiet {unit}\nsystemctl stop {unit}\nrm -f {UNITS}/{unit}\n"
        # What all environments share goes with the last of them.
        f"if ! ls {UNITS}/bulkhead-*.slice > /dev/null 2>&1; then\n"
        f"  systemctl stop bulkhead.slice\n  rm -f {UNITS}/bulkhead.slice {UNITS}/{SYSTEM_UNIT}\n"
        f"  rmdir {UNITS}/{SYSTEM_UNIT.rpartition('/')[0]} 2> /dev/null || true\n"
        "fi\n"
        "systemctl daemon-reload\n"
    )
    return create, delete


def io_properties(args: SliceArgs, speed: Speed | None) -> dict[str, str]:
    """IO as a unit spells it. systemd takes a ceiling away only where the unit says `infinity`."""
    if args.facts.device is None or not args.facts.io:
        return {}
    properties = {"IOAccounting": "yes"}
    if args.facts.io in IO_WEIGHTS:
        properties["IOWeight"] = str(IO_WEIGHT[args.environment.tier])  # systemd writes it to BFQ too, on its scale
    limits = io_limits(args, speed)
    for name, key in zip(SPEEDS, IO_PROPERTIES, strict=True):
        properties[key] = f"/dev/{args.facts.device.name} {limits[name] if limits else 'infinity'}"
    return properties


def slice_unit(unit: str, description: str, properties: Mapping[str, str]) -> str:
    """Shell text that writes a slice unit."""
    body = "\n".join(f"{key}={value}" for key, value in properties.items())
    return written(
        unit,
        f"[Unit]\nDescription={description}\nBefore=slices.target\n"
        f"[Slice]\n{body}\n[Install]\nWantedBy=slices.target\n",
    )


def written(unit: str, text: str) -> str:
    """Shell text that writes a file below UNITS in one step: other slices' scripts run at the same time."""
    file = f"{UNITS}/{unit}"
    return f"mkdir -p {file.rpartition('/')[0]}\ncat > {file}.$$ <<'UNIT'\n{text}UNIT\nmv {file}.$$ {file}\n"


def memory_limit(args: SliceArgs) -> int | None:
    """The hard ceiling in bytes, in whole pages as the kernel keeps it; None when there is none."""
    limits = args.environment.limits
    return None if limits is None or limits.memory is None else pages(limits.memory)


def memory_high(limit: int) -> int:
    """Where an environment below a ceiling of `limit` bytes begins to be slowed down."""
    return pages(int(limit * HIGH))


def memory_kept(args: SliceArgs) -> int:
    """What reclaim leaves this environment, in bytes: a protected environment's reservation."""
    reserved = args.environment.reservations
    if args.environment.tier is not Tier.PROTECTED or reserved is None:
        return 0
    return pages(reserved.memory or 0)


def pids_limit(args: SliceArgs) -> str:
    """The ceiling on processes and threads as the kernel spells it."""
    limits = args.environment.limits
    return "max" if limits is None or limits.pids is None else str(limits.pids)


def cpu_quota(args: SliceArgs) -> int | None:
    """CPU time in µs a period, for a best-effort environment limited below the whole machine; else None.

    A quota is not work-conserving, and a protected environment never has one.
    """
    limit = None if args.environment.limits is None else args.environment.limits.cpus
    if args.environment.tier is Tier.PROTECTED or limit is None or limit >= args.ledger.capacity.cpus:
        return None
    return int(limit * CFS_PERIOD_US) // QUOTA_STEP_US * QUOTA_STEP_US


def io_limits(args: SliceArgs, speed: Speed | None) -> Speed | None:
    """A best-effort environment's ceilings, by SPEEDS; None where weights divide, or nothing was measured."""
    share = None if args.environment.limits is None else args.environment.limits.io
    if args.environment.tier is Tier.PROTECTED or args.facts.io != "throttle" or speed is None or share is None:
        return None
    return {name: max(1, int(speed[name] * share)) for name in SPEEDS}


def pages(size: int) -> int:
    """Bytes rounded down to whole pages, as the kernel keeps them."""
    return size // PAGE * PAGE


def clamp(value: float, low: int, high: int) -> int:
    """`value` rounded and kept between the kernel's bounds."""
    return max(low, min(high, round(value)))
