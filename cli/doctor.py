"""`doctor`: line by line, what a deploy needs and what is there, with the remedy for what is not.
Each check is a function from what was read to lines; only `examine` touches the machine."""

import os
import re
import shutil
import stat
import subprocess
from collections.abc import Iterable, Iterator, Mapping, Sequence
from enum import StrEnum
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

from rich.table import Table
from rich.text import Text

from cli import bucket
from cli.pulumi import STATE_SPACE, Pulumi, PulumiError, backend_folder, environment, existing
from settings import host
from settings.backup import BucketTarget, FolderTarget
from settings.compose_cli import find_compose
from settings.errors import SettingsError
from settings.host import HostFacts
from settings.ledger import DEFAULT_IO, LedgerSettings, Tier, shown
from settings.state import state_folder

OLDEST_PULUMI = (3, 200)
LOW_DISK = 0.10  # of the data root's file system: below it, an image build fills the disk of both environments
FULL_TABLE = 0.80  # of the connections that the kernel can track: it drops what is new when there is no room


class Status(StrEnum):
    """`missing` is required and stops a deploy; `warn` weakens what Bulkhead promises."""

    OK = "ok"
    WARN = "warn"
    MISSING = "missing"


class Line(NamedTuple):
    """One check: its name, how it stands, what was found, what to do about it."""

    name: str
    status: Status
    found: str
    remedy: str = ""


Version = tuple[int, ...]


class KnownBad(NamedTuple):
    """Engine versions `first` ≤ v < `fixed` that lose isolation, when, and what that means."""

    identifier: str
    ranges: tuple[tuple[Version, Version], ...]
    consequence: str


KNOWN_BAD = (
    # GitHub advisory GHSA-4vq8-7jfc-9cvp: affected <= 25.0.12 and >= 26.0.0-rc1, < 28.0.0.
    KnownBad(
        "CVE-2025-54410",
        (((0,), (25, 0, 13)), ((26, 0, 0), (28, 0, 0))),
        "a reload of firewalld removes the isolation between networks, except that of internal ones",
    ),
    # GitHub advisory GHSA-x4rx-4gw3-53p4: affected >= 28.2.0, < 28.3.3.
    KnownBad(
        "CVE-2025-54388",
        (((28, 2, 0), (28, 3, 3)),),
        "a reload of firewalld opens ports published on 127.0.0.1 to other machines",
    ),
)

UNIFIED = "kernel parameter systemd.unified_cgroup_hierarchy=1"
# sshd gives itself that; keep (host/keep.py) gives the engine its own, which Debian's docker.io starts with 0.
PROTECTED_SCORES = {"dockerd": -500, "containerd": -500, "sshd": -1000}
UNITS = {"dockerd": "docker", "sshd": "ssh"}

HOST_PROGRAMS = {
    "nft": ("nftables", Status.MISSING, "there would be no firewall, so nothing is deployed"),
    "restic": ("restic", Status.WARN, "nothing can be backed up"),
}
"""Their packages, and what is without them."""

REQUIRED_CONTROLLERS = {"cpu": "CPU weights", "memory": "memory ceilings", "pids": "process ceilings"}


def version_of(text: str) -> Version:
    """Numbers of a version such as `20.10.24+dfsg1` or `v3.259.0`; empty if it has none."""
    found = re.search(r"(\d+)\.(\d+)(?:\.(\d+))?", text)
    return tuple(int(part or 0) for part in found.groups()) if found else ()


def engine_version(version: str, firewalld: bool | None) -> Iterator[Line]:
    """The engine's version against KNOWN_BAD. `firewalld`: it runs on that machine (None: cannot be seen)."""
    numbers = version_of(version)
    bad = [known for known in KNOWN_BAD if any(first <= numbers < fixed for first, fixed in known.ranges)]
    if not bad:
        yield Line("Docker version", Status.OK, version)
    for known in bad:
        found = f"{version} has {known.identifier}: {known.consequence}"
        update = "Update Docker to 28.3.3 or newer (or 25.0.13)."
        if firewalld is False:
            yield Line("Docker version", Status.OK, f"{found}. firewalld does not run here, so it does not apply.")
        elif firewalld is None:
            yield Line("Docker version", Status.WARN, found, f"{update} It matters only where firewalld runs.")
        else:
            yield Line(
                "Docker version",
                Status.WARN,
                f"{found}. firewalld runs here.",
                f"{update} Until then restart Docker after each reload of firewalld.",
            )


def cgroups(facts: HostFacts) -> Iterator[Line]:
    """cgroup version, driver and controllers."""
    protection = {1: "v1: no memory protection there, so prod is protected by dev's ceilings alone", 2: "v2"}
    found = protection.get(facts.cgroup_version, f"v{facts.cgroup_version}")
    yield Line("cgroup version", Status.OK if facts.cgroup_version in protection else Status.WARN, found)
    known = facts.cgroup_driver in {"cgroupfs", "systemd"}
    yield Line(
        "cgroup driver",
        Status.OK if known else Status.MISSING,
        facts.cgroup_driver,
        "" if known else "Run the engine with the cgroupfs or the systemd driver (a rootless one may have none).",
    )
    if facts.controllers is None:
        yield Line("cgroup controllers", Status.WARN, "not read: no python3 there", "Install python3 on that machine.")
        return
    io = "blkio" if facts.cgroup_version == 1 else "io"
    for name, purpose in {**REQUIRED_CONTROLLERS, io: "IO weights and ceilings"}.items():
        there = name in facts.controllers
        absent = Status.MISSING if name in REQUIRED_CONTROLLERS else Status.WARN
        yield Line(
            f"cgroup {name}",
            Status.OK if there else absent,
            purpose if there else f"missing, so no {purpose}",
            "" if there else f"Enable it: kernel parameter cgroup_enable={name}, or a kernel that has it.",
        )


def io_isolation(facts: HostFacts, ledger: LedgerSettings | None) -> Iterator[Line]:
    """Whether a best-effort environment's reads and writes leave any to the others, and by what means."""
    device = facts.device
    if not facts.io or device is None:
        if facts.controllers is None:
            found, remedy = "not read: there is no python3 on the engine's machine", "Install python3 there."
        elif device is None:
            found = "none: the engine's data is on no block device"
            remedy = "Put Docker's data-root on a disk of its own with ext4 or xfs."
        elif facts.ceilings_stop_at_units and "blkio" in facts.controllers:
            found = f"none: {device.name} honours no weights, and slice units have no ceilings on cgroup v1"
            remedy = f"{_weights(device.name)} Or boot with cgroup v2: {UNIFIED}."
        else:
            found = "none: the kernel has no IO controller"
            remedy = "Use a kernel that has one (CONFIG_BLK_CGROUP and CONFIG_BLK_DEV_THROTTLING)."
        yield Line("IO isolation", Status.WARN, found, remedy)
        return
    disk = f"{device.name} ({', '.join(device.schedulers)})"
    if device.weights:
        yield Line("IO isolation", Status.OK, f"{disk}: by weights ({device.weights}); best-effort has the lowest")
        return
    better = _weights(device.name)
    speed = facts.measured
    if speed is None or speed.get("device") != device.number:
        yield Line("IO isolation", Status.WARN, f"{disk}: none yet; the next make up measures the disk", better)
        return
    shares = {
        name: float(one.limits.io.value) / 100 if one.limits and one.limits.io else DEFAULT_IO
        for name, one in (ledger.environments.items() if ledger else ())
        if one.tier is Tier.BEST_EFFORT
    }
    given = ", ".join(f"{name} {share:.0%}" for name, share in shares.items()) or "no best-effort environment"
    found = (
        f"{disk}: by ceilings of {speed['read_bps'] / 1e6:.0f} MB/s read and {speed['write_bps'] / 1e6:.0f} MB/s "
        f"written, measured {str(speed['at'])[:10]}: {given}"
    )
    full = sum(shares.values()) >= 1
    if full:
        found += ", which leaves the others nothing"
        better = f"Lower limits.io in Pulumi.host.yaml. {better}"
    if facts.cgroup_version == 1:
        found += ". On cgroup v1 only direct IO and reads are held, not writes through the page cache"
        better += f" Or boot with cgroup v2: {UNIFIED}."
    yield Line("IO isolation", Status.WARN if full or facts.cgroup_version == 1 else Status.OK, found, better)


def _weights(disk: str) -> str:
    return (
        f"For weights, which use what is idle: echo bfq > /sys/block/{disk}/queue/scheduler (keep it with a udev "
        "rule), or turn iocost on (cgroup v2); then make up ENV=host."
    )


def cpu_class(facts: HostFacts) -> Line:
    """Whether best-effort is of the idle class, or only has the lowest weight."""
    if facts.cpu_idle:
        return Line("CPU idle class", Status.OK, "best-effort runs when nobody else wants the CPU")
    return Line(
        "CPU idle class",
        Status.WARN,
        "not there: best-effort has the lowest weight instead, and wakes up beside others",
        "It takes Linux 5.15, and systemd 252 with the systemd driver.",
    )


def preemption(facts: HostFacts) -> Iterator[Line]:
    """Whether prod, when it wakes up, waits for what a best-effort environment has the kernel do (docs/research)."""
    if facts.preemption in ("voluntary", "full"):
        yield Line("kernel preemption", Status.OK, facts.preemption)
    elif facts.preemption:
        yield Line(
            "kernel preemption",
            Status.WARN,
            f"{facts.preemption}: what dev has the kernel do, such as reading large files, is interrupted at the next "
            "tick only, and prod waits for that each time it wakes up",
            "Add preempt=full to the kernel's command line (GRUB_CMDLINE_LINUX in /etc/default/grub, update-grub, "
            "reboot), or take a distribution's kernel.",
        )


def memory_protection(facts: HostFacts) -> Iterator[Line]:
    """On cgroup v2: whether what is kept for an environment reaches its containers. (v1 has none, see `cgroups`.)"""
    if facts.cgroup_version == 2 and facts.controllers is not None and not facts.recursive_memory:
        yield Line(
            "memory protection",
            Status.WARN,
            "a reservation does not reach the containers in it",
            "mount -o remount,memory_recursiveprot /sys/fs/cgroup (keep it in /etc/fstab), as systemd mounts it.",
        )


def oom_scores(scores: Mapping[str, int]) -> Iterator[Line]:
    """Whether the engine and sshd outlive a machine that is out of memory. dev's processes have 1000, prod's 0."""
    for program, score in sorted(scores.items()):
        wanted = PROTECTED_SCORES[program]
        if score <= wanted:
            yield Line(f"OOM score of {program}", Status.OK, str(score))
            continue
        yield Line(
            f"OOM score of {program}",
            Status.WARN,
            f"{score}: it may be killed before a large prod is",
            f"Write OOMScoreAdjust={wanted} into its unit (systemctl edit {UNITS.get(program, program)}), or now: "
            f"choom -n {wanted} -p $(pidof {program})",
        )


def disk_ceilings(ledger: LedgerSettings | None) -> Iterator[Line]:
    """How a best-effort environment is kept from filling the disk."""
    for name, one in ledger.environments.items() if ledger else ():
        if one.tier is not Tier.BEST_EFFORT:
            continue
        if one.limits and one.limits.disk:
            yield Line(f"disk of {name}", Status.OK, "watched: it is paused while it is over limits.disk")
        else:
            yield Line(
                f"disk of {name}",
                Status.WARN,
                "no ceiling: it can fill the disk of every environment",
                f"Write limits.disk for {name} in Pulumi.host.yaml, as in {{disk: 20%}}.",
            )


def swap(meminfo: str) -> Line:
    """Swap of the engine's machine, from /proc/meminfo."""
    found = re.search(r"^SwapTotal:\s+(\d+) kB", meminfo, re.MULTILINE)
    size = int(found[1]) * 1024 if found else 0
    if not size:
        return Line("swap", Status.OK, "none: a container over its memory limit is killed at once")
    return Line(
        "swap",
        Status.WARN,
        f"{shown('memory', size)}: under pressure prod's memory may be swapped out as well",
        "Turn it off for a predictable prod: swapoff -a, and remove it from /etc/fstab.",
    )


def live_restore(facts: HostFacts) -> Line:
    """Whether services outlive a restart of the engine."""
    if facts.live_restore:
        return Line("live-restore", Status.OK, "on: services go on while the engine restarts")
    return Line(
        "live-restore",
        Status.WARN,
        "off: an engine that crashes leaves services with restart: unless-stopped stopped",
        'Write {"live-restore": true} to /etc/docker/daemon.json, then systemctl reload docker.',
    )


def free_disk(facts: HostFacts) -> Line:
    found = f"{shown('disk', facts.disk_free)} of {shown('disk', facts.disk)} free for {facts.data_root}"
    if facts.disk_free >= LOW_DISK * facts.disk:
        return Line("free disk", Status.OK, found)
    return Line("free disk", Status.WARN, found, "Free some: docker system df, docker system prune.")


def host_programs(facts: HostFacts) -> Iterator[Line]:
    """What deploys and the agent run on the engine's machine. (One that was not read is told by `cgroups`.)"""
    if facts.programs is None:
        return
    for name, (package, absent, without) in HOST_PROGRAMS.items():
        there = name in facts.programs
        yield Line(
            f"{name} on the host",
            Status.OK if there else absent,
            "installed" if there else f"not installed: {without}",
            "" if there else f"Run apt-get install {package} there, or make setup (of a server: make bootstrap).",
        )


def connections(facts: HostFacts) -> Iterator[Line]:
    """The room in the kernel's one table of connections: best-effort environments can fill half of it, prod all."""
    if facts.connections is None:
        return
    count, most = facts.connections
    found = f"{count} of {most} tracked, of all environments together"
    if count <= FULL_TABLE * most:
        yield Line("connections", Status.OK, found)
        return
    yield Line(
        "connections",
        Status.WARN,
        f"{found}: when it is full, new ones of prod fail too",
        "See whose they are: conntrack -L (package conntrack). For more: sysctl -w net.netfilter.nf_conntrack_max="
        f"{2 * most} (keep it in /etc/sysctl.d).",
    )


def folder_targets(ledger: LedgerSettings | None) -> dict[str, str]:
    """The folders of the engine's machine that backups go to, by their targets' names."""
    targets = ledger.backup.targets if ledger else {}
    return {name: str(Path(one.path)) for name, one in targets.items() if isinstance(one, FolderTarget)}


def backup_folders(facts: HostFacts, ledger: LedgerSettings | None) -> Iterator[Line]:
    """Whether backups in a folder outlive the engine's disk, and have room. The default one counts once it is used."""
    chosen = ledger is not None and "targets" in ledger.backup.model_fields_set
    for name, path in folder_targets(ledger).items():
        place = facts.folders.get(path)
        if place is None or not (place.there or chosen):
            continue
        found = f"{shown('disk', place.free)} of {shown('disk', place.size)} free for {path}"
        status, remedy = Status.WARN, ""
        if place.shared:
            found += ", on the disk of the engine's data: what breaks it takes both"
            remedy = (
                "Mount another disk there (it may not be mounted now), or name one, or a bucket, in bulkhead:backup."
            )
        elif not place.there:
            found = f"{path} is not there: the first backup makes it, on the disk of what is above it"
            remedy = "Mount its disk, if it is to have one."
        elif place.free < LOW_DISK * place.size:
            remedy = "Keep fewer backups (retain of x-bulkhead.backup), or mount a larger disk."
        else:
            status = Status.OK
        yield Line(f"backup target {name}", status, found, remedy)


def buckets(ledger: LedgerSettings | None, notes: Path) -> Iterator[Line]:
    """What the endpoints of backups' buckets cannot do, as `make bucket` has found with their owner's credentials."""
    known, targets = bucket.noted(notes), ledger.backup.targets if ledger else {}
    for name, target in targets.items():
        if not isinstance(target, BucketTarget):
            continue
        found, where = known.get("/".join(target.place)), f"backup target {name}"
        if found is None:
            remedy = "make bucket, with the owner's credentials, says what it can and sets it."
            yield Line(where, Status.WARN, f"nobody has looked at bucket {target.bucket} from here", remedy)
        elif found["lacking"]:
            lacking = ", ".join(f"{feature}: {how}" for feature, how in found["lacking"].items())
            remedy = "Know what you do without (docs/runbooks/ransomware.md), or use another endpoint: make bucket."
            yield Line(where, Status.WARN, f"on {found['at']}: {lacking}", remedy)
        else:
            yield Line(where, Status.OK, f"nothing was lacking on {found['at']}")


def state(variables: Mapping[str, str], own: Path) -> Iterator[Line]:
    """Where the state is, whether it has room, and who may read the passphrase."""
    backend = variables.get("PULUMI_BACKEND_URL")
    if backend is None:
        yield Line("state", Status.OK, "the backend of your login or of Pulumi.yaml")
    elif folder := backend_folder(backend):
        there = existing(folder)
        room = shutil.disk_usage(there).free >= STATE_SPACE and os.access(there, os.W_OK)
        remedy = "Free some space, or set XDG_STATE_HOME to another disk."
        yield Line("state", Status.OK if room else Status.MISSING, backend, "" if room else remedy)
    else:
        yield Line("state", Status.OK, backend)
    file = variables.get("PULUMI_CONFIG_PASSPHRASE_FILE")
    if not file:
        chosen = "PULUMI_CONFIG_PASSPHRASE" if "PULUMI_CONFIG_PASSPHRASE" in variables else "the backend's own secrets"
        yield Line("passphrase", Status.OK, chosen)
    elif not Path(file).exists():
        made = Path(file) == own / "passphrase"
        found = f"{file}: {'made by the first deploy' if made else 'not there'}"
        remedy = "" if made else "Set PULUMI_CONFIG_PASSPHRASE_FILE to the file that holds it."
        yield Line("passphrase", Status.OK if made else Status.MISSING, found, remedy)
    else:
        mode = stat.S_IMODE(Path(file).stat().st_mode)
        private = not mode & 0o077
        yield Line(
            "passphrase",
            Status.OK if private else Status.WARN,
            f"{file}, mode {mode:04o}",
            "" if private else f"Others can read it: chmod 600 {file}",
        )


def capacity(written: LedgerSettings, facts: HostFacts) -> Iterator[Line]:
    """The ledger's promises against the machine, and a declared capacity against the real one."""
    try:
        ledger = written.resolve(facts.capacity())
    except SettingsError as error:
        yield Line("ledger", Status.MISSING, str(error), "Correct the ledger; make plan shows it.")
        return
    for row in ledger.rows():
        there = facts.capacity()[row.resource]
        found = f"{shown(row.resource, row.capacity)}, {shown(row.resource, row.free)} not promised"
        if row.capacity > there:
            found = (
                f"the ledger declares {shown(row.resource, row.capacity)}, the machine has {shown(row.resource, there)}"
            )
            yield Line(f"ledger: {row.resource}", Status.WARN, found, "Declare what is there in bulkhead:capacity.")
        else:
            yield Line(f"ledger: {row.resource}", Status.OK, found)


def tools(root: Path, variables: Mapping[str, str]) -> Iterator[Line]:
    """Pulumi, its language host and plugins, Compose and the Python environment. Runs two of them for their version."""
    set_up = "Run make setup."
    pulumi = _pulumi_version(root, variables)
    recent = version_of(pulumi) >= OLDEST_PULUMI
    yield Line(
        "pulumi",
        Status.OK if recent else Status.MISSING,
        pulumi or "not installed",
        "" if recent else set_up,
    )
    language = shutil.which("pulumi-language-python", path=variables["PATH"])
    yield Line("Python language host", *_there(language, set_up))
    plugins = Path(variables["PULUMI_HOME"]) / "plugins"
    for name in ("docker", "command"):
        plugin = plugins / f"resource-{name}-v{metadata.version(f'pulumi_{name}')}"
        yield Line(f"plugin {name}", *_there(str(plugin) if plugin.is_dir() else None, f"{plugin.name}: {set_up}"))
    try:
        compose = find_compose()
        asked = subprocess.run([*compose, "version", "--short"], capture_output=True, text=True, check=False)
        yield Line("Compose", Status.OK, f"{asked.stdout.strip()} ({' '.join(compose)})")
    except (SettingsError, OSError) as error:
        yield Line("Compose", Status.MISSING, str(error), set_up)
    python = root / ".venv" / "bin" / "python"
    yield Line("Python environment", *_there(str(python) if python.exists() else None, set_up))


def _there(found: str | None, remedy: str) -> tuple[Status, str, str]:
    return (Status.OK, found, "") if found else (Status.MISSING, "not installed", remedy)


def _pulumi_version(root: Path, variables: Mapping[str, str]) -> str:
    try:
        asked = Pulumi(root, variables).capture("version")
    except PulumiError:
        return ""
    return asked.plain.strip() if asked.code == 0 else ""


def examine(root: Path) -> list[Line]:
    """Every check, on this machine and the engine it names."""
    variables = environment(os.environ, root, Path.home())
    lines = [*tools(root, variables), *state(variables, state_folder(os.environ, Path.home()))]
    try:
        ledger: LedgerSettings | None = LedgerSettings.read(root / "Pulumi.host.yaml")
    except SettingsError as error:
        ledger = None
        lines.append(Line("ledger", Status.MISSING, str(error), "Correct it, then run make doctor again."))
    try:
        facts = host.facts(ledger.host if ledger else None, list(folder_targets(ledger).values()))
    except SettingsError as error:
        return [*lines, Line("Docker engine", Status.MISSING, str(error), error.remedy)]
    lines.append(Line("Docker engine", Status.OK, f"{facts.address} ({facts.system}, kernel {facts.kernel})"))
    lines += engine_version(facts.server_version, _runs("firewalld") if facts.local else None)
    lines.append(live_restore(facts))
    lines += [
        *cgroups(facts),
        cpu_class(facts),
        *preemption(facts),
        *memory_protection(facts),
        *io_isolation(facts, ledger),
    ]
    if facts.local:
        lines.append(swap(Path("/proc/meminfo").read_text()))
    lines += [*oom_scores(facts.scores), *disk_ceilings(ledger)]
    lines += buckets(ledger, state_folder(os.environ, Path.home()) / bucket.NOTES)
    lines += [free_disk(facts), *backup_folders(facts, ledger), *host_programs(facts), *connections(facts)]
    return [*lines, *(capacity(ledger, facts) if ledger else [])]


def _runs(program: str) -> bool:
    """Whether a process of that name runs here. (firewalld is a script; its command name is its own all the same.)"""
    names = (_text(file) for file in Path("/proc").glob("[0-9]*/comm"))
    return any(name.strip() == program for name in names)


def _text(file: Path) -> str:
    try:
        return file.read_text()
    except OSError:
        return ""  # the process has ended


def table(lines: Iterable[Line]) -> Table:
    """The lines for a terminal, remedies under what was found."""
    colours = {Status.OK: "green", Status.WARN: "yellow", Status.MISSING: "red"}
    checks = Table.grid(padding=(0, 2))
    for name, status, found, remedy in lines:
        text = f"{found}\n→ {remedy}" if remedy and status is not Status.OK else found
        checks.add_row(Text(status, style=colours[status]), name, Text(text))
    return checks


def exit_code(lines: Sequence[Line]) -> int:
    """1 only if something required is missing."""
    return int(any(line.status is Status.MISSING for line in lines))
