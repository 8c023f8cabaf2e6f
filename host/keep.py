"""keep: what no cgroup of an environment can hold by itself, done again at each run: OOM scores, the disk ceiling, and
on cgroup v1 the IO ceilings of the groups below the slice.

An environment that is over its disk ceiling, in bytes or in files, is paused (`docker pause`): it loses nothing, cannot
grow, and goes on as soon as it is below again. `docker unpause` lets it go on for GRACE_SECONDS, to remove what is too
much.
"""

import argparse
import errno
import fcntl
import json
import os
import re
import subprocess
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from host.machine import START_ENGINE, Places, Undecided, ask, deploying, inspect, read_json, write

LABEL, PROBE, BEST_EFFORT = "bulkhead.environment", "bulkhead.probe", "best-effort"
GRACE_SECONDS = 15 * 60
DU_SECONDS = 200
"""A count that takes longer is not waited for: keep has other things to do, and 300 seconds (its unit's limit)."""
DU_SHARE = 20
"""After counting an environment's files for a second, they are not counted again for this many, unless so much has been
written to the disk since, or so many files made, that it may be over its ceiling."""
COUNTED = ("used", "deleted", "inodes", "inodes_ceiling", "disk_used", "disk_inodes", "counted_at", "seconds")
"""What is known from a count until the next: of the environment, of the disks at that time, of the count itself."""
DELETED = " (deleted)"
"""How /proc ends the name of a file that has none any more."""
ENGINE_PIDS = ("run/docker.pid", "run/docker/containerd/containerd.pid")
ENGINE_SCORE = -500
"""What Docker's own unit gives it; Debian's docker.io runs with 0 (measured). Containers do not inherit it."""
PASSES = 5
"""Processes that start while scores are written are found by looking again; their children have the score by birth."""


# --- OOM scores ----------------------------------------------------------------------------------------------------


def guard(places: Places) -> dict[str, int]:
    """Sees to it that the engine outlives everything else. Returns the score of each pid file's process afterwards.

    Found by its pid files, and not by name: any process in a container may call itself dockerd.
    """
    found: dict[str, int] = {}
    for file in ENGINE_PIDS:
        try:
            score = places.processes / (places.root / file).read_text().strip() / "oom_score_adj"
            found[file] = int(score.read_text())
        except (OSError, ValueError):
            continue  # another service has started it, and given it a score
        if found[file] > ENGINE_SCORE:
            try:
                score.write_text(str(ENGINE_SCORE))
                found[file] = int(score.read_text())
            except OSError:
                continue  # root in a container may not lower a score
    return found


def folders(engine: Mapping[str, Any], parent: str, places: Places) -> list[Path]:
    """An environment's group, in each hierarchy that has it."""
    path = f"bulkhead.slice/{parent}" if engine["cgroup_driver"] == "systemd" else parent.strip("/")
    trees = [places.cgroups] if int(engine["cgroup_version"]) == 2 else sorted(places.cgroups.glob("*/"))
    return [tree / path for tree in trees if (tree / path).is_dir()]


def processes(groups: Iterable[Path]) -> set[int]:
    """The ids of all processes in these groups and below them."""
    found = set()
    for group in groups:
        for listed in group.rglob("cgroup.procs"):
            try:
                found |= {int(line) for line in listed.read_text().split()}
            except OSError:
                continue  # the group has just gone
    return found


def populated(group: Path) -> list[Path]:
    """The groups below this one, however deep, that have processes of their own."""
    found = []
    for listed in group.rglob("*/cgroup.procs"):
        try:
            if listed.read_text().strip():
                found.append(listed.parent)
        except OSError:
            continue  # the group has just gone
    return found


def raise_scores(groups: Sequence[Path], wanted: int, places: Places) -> tuple[int, int]:
    """Gives every process of the groups at least this score. Returns how many there are, and how many were changed.

    A score is never lowered: what a service asks for itself, to go even earlier, is its own affair.
    """
    changed = 0
    for _ in range(PASSES):
        running, before = processes(groups), changed
        for process in running:
            file = places.processes / str(process) / "oom_score_adj"
            try:
                if int(file.read_text()) < wanted:
                    file.write_text(str(wanted))
                    changed += 1
            except OSError:
                continue  # it has ended
        if changed == before:
            break
    return len(running), changed


# --- IO ceilings on cgroup v1 --------------------------------------------------------------------------------------


def spread(slices: Mapping[str, str], groups: Iterable[Path], places: Places) -> int:
    """Divides a slice's throttles (`slices`: its declared files) among the groups in it that have processes.

    On cgroup v1 a throttle holds for the processes of its own group only, not for those of groups below (measured), and
    BuildKit has its groups one deeper than containers. In equal parts, so that all together stay below the ceiling
    whichever of them is busy; where the slice has no ceiling any more, theirs go too. Returns how many groups have one.
    """
    declared = {places.root / path.lstrip("/"): ceiling for path, ceiling in slices.items()}
    throttled = set()
    for group in groups:
        for file in group.glob("blkio.throttle.*_device"):
            number, _, amount = declared.get(file, "").partition(" ")
            inner = [one for one in populated(group) if (one / file.name).exists()]
            for one in inner:
                part = {number: str(max(1, int(amount) // len(inner)))} if number else {}
                try:
                    there = dict(line.split() for line in (one / file.name).read_text().splitlines())
                    for device in {*there, *part}:
                        if there.get(device) != part.get(device):
                            (one / file.name).write_text(f"{device} {part.get(device, 0)}")
                except OSError:
                    continue  # its container has just ended
                throttled |= {one} if part else set()
    return len(throttled)


# --- disk ----------------------------------------------------------------------------------------------------------


def inspected() -> list[dict[str, Any]]:
    """All containers. One may end between the list and the question, so that it is asked a second time."""
    for last in (False, True):
        identifiers = ask(["docker", "ps", "--all", "--quiet", "--no-trunc"], START_ENGINE).split()
        try:
            return inspect("container", *identifiers)
        except Undecided:
            if last:
                raise
    raise AssertionError


def members(environment: str, parent: str, containers: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The containers with an environment's label, and those in its slice (builds, or what somebody started there).

    The prober's are not: it would wait for what is paused, and they go by themselves. They have no environment's label,
    and what has one is none, whatever else it says that it is.
    """
    labels = [(one, one["Config"].get("Labels") or {}) for one in containers]
    return [
        one
        for one, known in labels
        if known.get(LABEL) == environment or (one["HostConfig"]["CgroupParent"] == parent and PROBE not in known)
    ]


def layer(container: Mapping[str, Any], places: Places) -> set[str]:
    """The folder of a container's own layer; none of one that has ended and whose engine does not tell. Undecided.

    Docker's containerd store tells it of none. Of one that runs the kernel does: it is what is mounted on its root.
    """
    told = (container.get("GraphDriver") or {}).get("Data") or {}
    if "UpperDir" in told:
        return {str(told["UpperDir"])}
    try:
        file = places.processes / str(container["State"].get("Pid")) / "mountinfo"
        mounts = file.read_text(errors="surrogateescape")
    except OSError:
        return set()
    # The last mount there is the one that is seen.
    roots = re.findall(r"^(?:[^ ]+ ){4}/ .* - (.*)", mounts, re.MULTILINE)
    upper = re.search(r"^overlay .*[ ,]upperdir=([^,]+)", roots[-1]) if roots else None
    if upper:
        return {re.sub(r"\\(\d{3})", lambda code: chr(int(code[1], 8)), upper[1])}
    if container["HostConfig"].get("ReadonlyRootfs"):
        return set()
    raise Undecided(
        f"{container['Name'].lstrip('/')}: the folder of its own layer is not known, so nothing holds what it writes "
        "there. Next step: read_only: true for its service, or an engine whose store is an overlay: docker info"
    )


def written_to(
    environment: str, containers: Sequence[Mapping[str, Any]], places: Places
) -> tuple[set[str], Sequence[str]]:
    """The folders on the host that an environment fills: its volumes, folders that it may write to, its containers' own
    layers, and what the engine has of each (logs of any driver, /etc/hosts). And what cannot be found of them.

    Images and the build cache are shared by all and made by deploys only; they are no part of it.
    """
    unknown = []
    names = ask(["docker", "volume", "ls", "--quiet", "--filter", f"label={LABEL}={environment}"], START_ENGINE).split()
    paths = {str(volume["Mountpoint"]) for volume in inspect("volume", *names) if not volume.get("Options")}
    for container in containers:
        mounts = container.get("Mounts") or ()
        paths |= {
            mount["Source"]
            for mount in mounts
            if (mount.get("Type") == "volume" and mount.get("Driver") == "local")
            or (mount.get("Type") == "bind" and mount.get("RW") and Path(mount["Source"]).is_dir())
        }
        try:
            paths |= layer(container, places)
        except Undecided as error:
            unknown.append(str(error))
        paths |= {str(Path(container[key]).parent) for key in ("LogPath", "HostnamePath") if container.get(key)}
    return paths, unknown


def disks(paths: Iterable[str]) -> dict[int, list[str]]:
    """Those of the folders that are there, by the disk that they are on."""
    found: dict[int, list[str]] = {}
    for path in sorted(paths):
        try:
            found.setdefault(Path(path).stat().st_dev, []).append(path)
        except OSError:
            continue  # it is not there, or has just gone
    return found


def on_disks(paths: Iterable[str]) -> tuple[int, int]:
    """Bytes and inodes in use on the disks that hold these folders, by whomever; each disk once."""
    found = [os.statvfs(there[0]) for there in disks(paths).values()]
    return (
        sum((one.f_blocks - one.f_bfree) * one.f_frsize for one in found),
        sum(one.f_files - one.f_ffree for one in found),
    )


def used(paths: Iterable[str], seconds: float = DU_SECONDS, unit: str = "--block-size=1") -> int:
    """Bytes that these folders take up on the disk, or how many `--inodes`; what is in two of them counts once.
    TimeoutExpired."""
    there = sorted(path for path in paths if Path(path).exists())
    if not there:
        return 0
    counted = subprocess.run(
        # Files that go meanwhile make it end with 1; what it counted is right all the same.
        ["nice", "-n", "19", "du", "--summarize", "--total", "--one-file-system", unit, "--", *there],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        timeout=seconds,
        check=False,
    )
    lines = counted.stdout.splitlines()
    if not lines:
        raise Undecided("du counted nothing. Next step: see that `du` of coreutils is there")
    return int(lines[-1].split()[0])


def inodes(paths: Iterable[str], ceiling: int, seconds: float = DU_SECONDS) -> tuple[int, int]:
    """How many inodes these folders have on the disk where they are nearest to their share of them, and this share:
    what `ceiling` bytes are of the disk. (0, 0) where every file system makes them as it needs them. TimeoutExpired.

    They are counted only where the disk has more than the share in use; otherwise it is what is in use by all.
    """
    end, found = time.monotonic() + seconds, []
    for there in disks(paths).values():
        whole = os.statvfs(there[0])
        size, count = whole.f_blocks * whole.f_frsize, whole.f_files - whole.f_ffree
        if size and whole.f_files:
            share = whole.f_files * min(ceiling, size) // size
            found.append((used(there, end - time.monotonic(), "--inodes") if count > share else count, share))
    return max(found, key=lambda one: one[0] - one[1], default=(0, 0))


def listed(folder: Path) -> Iterator[Path]:
    """What is in a folder of /proc; nothing when its process has ended."""
    try:
        yield from folder.iterdir()
    except OSError:
        return


def deleted(running: Iterable[int], paths: Iterable[str], places: Places, seconds: float = DU_SECONDS) -> int:
    """Bytes on the disks of these folders in files that have no name any more and that a process has open or mapped,
    each file once. TimeoutExpired.

    A file of a volume has its disk's st_dev. One of a container's own layer has its overlay's, but the size of its file
    system is that of the disk below (measured). What has neither is in memory (tmpfs, memfd), and counts there.
    """
    there, end = disks(paths), time.monotonic() + seconds
    sizes = {file_system(path) for one in there.values() for path in one} - {0}
    found: dict[tuple[int, int], int] = {}
    for process in (places.processes / str(one) for one in running):
        # A thread may have files of its own, and a file that is mapped may be closed.
        for folder in (*(thread / "fd" for thread in listed(process / "task")), process / "map_files"):
            for link in listed(folder):
                if time.monotonic() > end:
                    raise subprocess.TimeoutExpired("deleted", seconds)
                try:
                    if not nameless(link):
                        continue
                    file = link.stat()
                    ours = file.st_dev in there or file_system(link) in sizes
                except OSError:
                    continue  # it has just been closed
                if ours and not file.st_nlink:
                    found[file.st_dev, file.st_ino] = file.st_blocks * 512
    return sum(found.values())


def nameless(link: Path) -> bool:
    """Whether a link of /proc leads to what may have no name any more, as far as its text says. No other is followed: a
    file of a server that does not answer would be waited for."""
    try:
        return str(link.readlink()).endswith(DELETED)
    except OSError as error:
        return error.errno == errno.ENAMETOOLONG  # too deep to be told


def file_system(path: str | Path) -> int:
    """The size of the file system that a path leads to, bytes."""
    found = os.statvfs(path)
    return found.f_blocks * found.f_frsize


def hold(
    over: bool,
    containers: Sequence[Mapping[str, Any]],
    before: Mapping[str, Any],
    deploys: bool,
    now: float,
) -> dict[str, Any]:
    """Pauses an environment that is over a ceiling, lets one go on that is not. Returns how it stands now.

    `paused`: the containers that were paused here, and so may be unpaused here; `started`: when each had been started.
    `released_until`: seconds since 1970.
    """
    running = {one["Id"] for one in containers if one["State"]["Status"] == "running"}
    started = {one["Id"]: one["State"].get("StartedAt") for one in containers}
    paused = {one["Id"] for one in containers if one["State"]["Status"] == "paused"}
    mine, until = set(before.get("paused") or ()) & paused, float(before.get("released_until") or 0)

    def stands(state: str, paused: set[str], until: float) -> dict[str, Any]:
        since = {one: started[one] for one in sorted(paused)}
        return {"state": state, "paused": sorted(paused), "started": since, "released_until": until}

    if not over:
        if mine:
            _each("unpause", mine)
        return stands("below", set(), 0.0)
    known = before.get("started") or {}
    if any(started[one] == known.get(one, started[one]) for one in set(before.get("paused") or ()) & running):
        until = now + GRACE_SECONDS  # somebody has let it go on; after a reboot the engine has started it anew
    if deploys or now < until:
        return stands("released", mine, until)
    return stands("paused", mine | _each("pause", running), 0.0)


def _each(verb: str, identifiers: Iterable[str]) -> set[str]:
    """One by one: a container that has just ended must not keep the others from it. Those with which it worked."""
    done = set()
    for identifier in sorted(identifiers):
        command = ["docker", verb, identifier]
        if not subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, check=False).returncode:
            done.add(identifier)
    return done


def counted(
    ceiling: int, groups: Sequence[Path], paths: Iterable[str], places: Places, seconds: float
) -> dict[str, int]:
    """What an environment takes up on the disk: bytes (`deleted`: those of them that du does not see), and inodes of
    its share of them. TimeoutExpired."""
    end = time.monotonic() + seconds
    size = used(paths, seconds)
    gone = deleted(processes(groups), paths, places, end - time.monotonic())
    count, share = inodes(paths, ceiling, end - time.monotonic())
    return {"used": size + gone, "deleted": gone, "inodes": count, "inodes_ceiling": share}


def disk(
    environment: str,
    promised: Mapping[str, Any],
    groups: Sequence[Path],
    containers: Sequence[Mapping[str, Any]],
    before: Mapping[str, Any],
    deploys: bool,
    places: Places,
    seconds: float,
) -> dict[str, Any]:
    """Counts what an environment takes up on the disk, when it is due, and holds it to its ceiling.

    `uncounted`: what should count and cannot be found.
    """
    ceiling, now = int(promised["disk"]), time.time()
    mine = members(environment, promised["cgroup_parent"], containers)
    paths, unknown = written_to(environment, mine, places)
    filled, files = on_disks(paths)
    stood = {key: before.get(key) or 0 for key in COUNTED}
    near = (
        before.get("state") != "below"
        or filled - stood["disk_used"] > ceiling - stood["used"]
        or files - stood["disk_inodes"] > stood["inodes_ceiling"] - stood["inodes"]
    )
    if before.get("ceiling") != ceiling or now >= stood["counted_at"] + (1 if near else DU_SHARE) * stood["seconds"]:
        stood = {
            **counted(ceiling, groups, paths, places, seconds),
            "disk_used": filled,
            "disk_inodes": files,
            "counted_at": now,
            "seconds": round(time.time() - now, 3),
        }
    over = stood["used"] > ceiling or stood["inodes"] > stood["inodes_ceiling"]
    stands = hold(over, mine, before, deploys, time.time())
    changed = stands["state"] != before.get("state")
    return {
        "ceiling": ceiling,
        **stood,
        "uncounted": unknown,
        "since": time.time() if changed else before.get("since"),
        **stands,
    }


# --- the verb ------------------------------------------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="the report for a program")
    parser.add_argument("--news", action="store_true", help="print only what is not as it was at the last run")


def run(args: argparse.Namespace, places: Places = Places()) -> int:  # noqa: B008 - frozen
    """Keeps all of it, writes `keep.json` and the metrics, prints. 0: kept, 1: somebody is over, 2: undecided."""
    places.run.mkdir(parents=True, exist_ok=True)
    with (places.run / "keep.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # the second would take what the first paused for the user's doing
        file = places.state / "keep.json"
        try:
            before = json.loads(file.read_text())
        except (OSError, ValueError):
            before = {}
        report = kept(read_json(places.declared / "host.json"), before, places)
        write(file, json.dumps(report, indent=2) + "\n")
    write(places.state / "metrics/keep.prom", metrics(report))
    if args.json:
        print(json.dumps(report, indent=2))
    elif not args.news or _states(report) != _states(before):
        print("\n".join(told(report)), flush=True)
    over = any(one["disk"] and one["disk"]["state"] != "below" for one in report["environments"].values())
    return 2 if report["undecided"] else int(over)


def kept(declared: Mapping[str, Any], before: Mapping[str, Any], places: Places) -> dict[str, Any]:
    """Does all of it. What needs no engine is done first, and also when the engine does not answer."""
    engine, under_way, scores = declared["engine"], deploying(places), guard(places)
    environments: dict[str, Any] = {}
    slices = {name: folders(engine, one["cgroup_parent"], places) for name, one in declared["environments"].items()}
    for name, promised in declared["environments"].items():
        running, changed = (0, 0)
        if promised.get("oom_score_adj", 0) > 0:
            running, changed = raise_scores(slices[name], promised["oom_score_adj"], places)
        flat = int(engine["cgroup_version"]) == 1
        environments[name] = {
            "processes": running,
            "scores_raised": changed,
            "throttled_groups": spread(promised.get("files") or {}, slices[name], places) if flat else 0,
            "disk": None,
        }
    undecided = []
    limited = {
        name: one for name, one in declared["environments"].items() if one.get("disk") and one["tier"] == BEST_EFFORT
    }
    known = {name: ((before.get("environments") or {}).get(name) or {}).get("disk") or {} for name in environments}
    freed = [name for name in environments if name not in limited and known[name].get("paused")]
    try:
        containers = inspected() if limited or freed else []
        for name, promised in limited.items():
            try:
                deploys, seconds = name in under_way, DU_SECONDS / len(limited)
                stands = disk(name, promised, slices[name], containers, known[name], deploys, places, seconds)
                undecided += [f"{name}: {problem}" for problem in stands["uncounted"]]
                environments[name]["disk"] = stands
            except subprocess.TimeoutExpired:
                undecided.append(
                    f"{name}: its files could not be counted within {DU_SECONDS / len(limited):.0f} s, so nothing "
                    "holds its disk. Next step: see which folder has so many: du --inodes"
                )
        for name in freed:  # its ceiling has been taken away while it was above it
            hold(False, containers, known[name], False, 0)
            known[name] = {}
    except Undecided as error:
        undecided.append(str(error))
    for name in (*limited, *freed):  # what is paused has to be known at the next run
        environments[name]["disk"] = environments[name]["disk"] or known[name] or None
    return {
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
        "environments": environments,
        "engine_scores": scores,
        "undecided": undecided,
    }


def _states(report: Mapping[str, Any]) -> Any:
    states = {name: (one.get("disk") or {}).get("state") for name, one in (report.get("environments") or {}).items()}
    return states, report.get("undecided")


def told(report: Mapping[str, Any]) -> Iterator[str]:
    """The report for people, what is wrong first."""
    for name, one in report["environments"].items():
        stands = one["disk"]
        if stands and stands["state"] != "below":
            held = f"{name}: {_over(stands)}"
            if stands["state"] == "paused":
                yield (
                    f"PAUSED {held}: {len(stands['paused'])} containers wait. They go on when it is below again. To "
                    f"remove something: docker unpause <container> gives {GRACE_SECONDS // 60} minutes; or raise "
                    f"limits.disk in Pulumi.host.yaml and run make up ENV=host"
                )
            else:
                yield f"OVER {held}: released for now, paused again unless it comes below"
    yield from (f"undecided: {problem}" for problem in report["undecided"])
    for file, score in report["engine_scores"].items():
        if score > ENGINE_SCORE:
            yield f"the engine ({file}) has OOM score {score} and may be killed before a large prod is: see make doctor"
    for name, one in report["environments"].items():
        stands = one["disk"]
        space = f", {_gib(stands['used'])} of {_gib(stands['ceiling'])} on the disk" if stands else ""
        yield f"{name}: {one['processes']} processes scored ({one['scores_raised']} new){space}"


def _over(stands: Mapping[str, Any]) -> str:
    """By what an environment is over its ceiling, bytes first."""
    if stands["used"] <= stands["ceiling"]:
        return (
            f"{stands['inodes']} files on the disk, over its share of {stands['inodes_ceiling']} of the disk's inodes"
        )
    gone = f" ({_gib(stands['deleted'])} deleted and still open)" if stands.get("deleted") else ""
    return f"{_gib(stands['used'])} on the disk{gone}, over its ceiling of {_gib(stands['ceiling'])}"


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f} GiB"


def metrics(report: Mapping[str, Any]) -> str:
    """Prometheus text."""
    environments = report["environments"]
    limited = {name: one["disk"] for name, one in environments.items() if one["disk"]}
    files = {name: one for name, one in limited.items() if one.get("inodes_ceiling")}
    families: list[tuple[str, str, Mapping[str, float]]] = [
        ("disk_bytes", "What the environment takes up on the disk.", {k: v["used"] for k, v in limited.items()}),
        ("disk_limit_bytes", "Its ceiling.", {k: v["ceiling"] for k, v in limited.items()}),
        (
            "disk_inodes",
            "Inodes that it takes up where it is nearest to its share; all that are in use, if those are fewer.",
            {k: v["inodes"] for k, v in files.items()},
        ),
        ("disk_inodes_limit", "Its share of them.", {k: v["inodes_ceiling"] for k, v in files.items()}),
        ("disk_paused", "1 while it is paused for it.", {k: int(v["state"] == "paused") for k, v in limited.items()}),
        ("disk_over", "1 while it is over it.", {k: int(v["state"] != "below") for k, v in limited.items()}),
        ("scored_processes", "Its processes that die first.", {k: v["processes"] for k, v in environments.items()}),
    ]
    lines = []
    for name, text, values in families:
        lines += [f"# HELP bulkhead_keep_{name} {text}", f"# TYPE bulkhead_keep_{name} gauge"]
        lines += [
            f'bulkhead_keep_{name}{{environment="{environment}"}} {value}' for environment, value in values.items()
        ]
    for name, text, number in (
        ("undecided", "How much could not be decided.", len(report["undecided"])),
        ("last_run_timestamp_seconds", "When keep ran last.", round(time.time(), 3)),
    ):
        lines += [f"# HELP bulkhead_keep_{name} {text}", f"# TYPE bulkhead_keep_{name} gauge"]
        lines.append(f"bulkhead_keep_{name} {number}")
    return "\n".join(lines) + "\n"
