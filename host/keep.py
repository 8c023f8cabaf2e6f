"""keep: what no cgroup of an environment can hold by itself, done again at each run: OOM scores, the disk ceiling, and
on cgroup v1 the IO ceilings of the groups below the slice.

An environment that is over its disk ceiling is paused (`docker pause`): it loses nothing, cannot grow, and goes on as
soon as it is below again. `docker unpause` lets it go on for GRACE_SECONDS, to remove what is too much.
"""

import argparse
import fcntl
import json
import shutil
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
written to the disk since that it may be over its ceiling."""
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

    The prober's are not: it would wait for what is paused, and they go by themselves.
    """
    labels = [(one, one["Config"].get("Labels") or {}) for one in containers]
    return [
        one
        for one, known in labels
        if (known.get(LABEL) == environment or one["HostConfig"]["CgroupParent"] == parent) and PROBE not in known
    ]


def written_to(environment: str, containers: Sequence[Mapping[str, Any]]) -> set[str]:
    """The folders on the host that an environment fills: its volumes, folders that it may write to, its containers' own
    layers, and what the engine has of each (logs of any driver, /etc/hosts).

    Images and the build cache are shared by all and made by deploys only; they are no part of it.
    """
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
        layers = (container.get("GraphDriver") or {}).get("Data") or {}
        paths |= {layers[key] for key in ("UpperDir",) if key in layers}
        paths |= {str(Path(container[key]).parent) for key in ("LogPath", "HostnamePath") if container.get(key)}
    return paths


def on_disks(paths: Iterable[str]) -> int:
    """Bytes in use on the disks that hold these folders, by whomever; each disk once."""
    disks = {path.stat().st_dev: path for path in map(Path, paths) if path.exists()}
    return sum(shutil.disk_usage(path).used for path in disks.values())


def used(paths: Iterable[str], seconds: float = DU_SECONDS) -> int:
    """Bytes that these folders take up on the disk; what is in two of them counts once. TimeoutExpired."""
    there = sorted(path for path in paths if Path(path).exists())
    if not there:
        return 0
    counted = subprocess.run(
        # Files that go meanwhile make it end with 1; what it counted is right all the same.
        ["nice", "-n", "19", "du", "--summarize", "--total", "--one-file-system", "--block-size=1", "--", *there],
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


def hold(
    ceiling: int,
    size: int,
    containers: Sequence[Mapping[str, Any]],
    before: Mapping[str, Any],
    deploys: bool,
    now: float,
) -> dict[str, Any]:
    """Pauses an environment that is over its ceiling, lets one go on that is not. Returns how it stands now.

    `paused`: the containers that were paused here, and so may be unpaused here. `released_until`: seconds since 1970.
    """
    running = {one["Id"] for one in containers if one["State"]["Status"] == "running"}
    paused = {one["Id"] for one in containers if one["State"]["Status"] == "paused"}
    mine, until = set(before.get("paused") or ()) & paused, float(before.get("released_until") or 0)
    if size <= ceiling:
        if mine:
            _each("unpause", mine)
        return {"state": "below", "paused": [], "released_until": 0.0}
    if set(before.get("paused") or ()) & running:
        until = now + GRACE_SECONDS  # somebody has let it go on
    if deploys or now < until:
        return {"state": "released", "paused": sorted(mine), "released_until": until}
    stopped = _each("pause", running)
    return {"state": "paused", "paused": sorted(mine | stopped), "released_until": 0.0}


def _each(verb: str, identifiers: Iterable[str]) -> set[str]:
    """One by one: a container that has just ended must not keep the others from it. Those with which it worked."""
    done = set()
    for identifier in sorted(identifiers):
        command = ["docker", verb, identifier]
        if not subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, check=False).returncode:
            done.add(identifier)
    return done


def disk(
    environment: str,
    promised: Mapping[str, Any],
    containers: Sequence[Mapping[str, Any]],
    before: Mapping[str, Any],
    deploys: bool,
    seconds: float = DU_SECONDS,
) -> dict[str, Any]:
    """Counts what an environment takes up on the disk, when it is due, and holds it to its ceiling."""
    ceiling, now = int(promised["disk"]), time.time()
    mine = members(environment, promised["cgroup_parent"], containers)
    size, at, took, there = (before.get(key) or 0 for key in ("used", "counted_at", "seconds", "disk_used"))
    paths = written_to(environment, mine)
    filled = on_disks(paths)
    near = before.get("state") != "below" or filled - there > ceiling - size
    if before.get("ceiling") != ceiling or now >= at + (1 if near else DU_SHARE) * took:
        size = used(paths, seconds)
        at, took, there = now, time.time() - now, filled
    stands = hold(ceiling, size, mine, before, deploys, time.time())
    changed = stands["state"] != before.get("state")
    return {
        "ceiling": ceiling,
        "used": size,
        "counted_at": at,
        "seconds": round(took, 3),
        "disk_used": there,
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
    for name, promised in declared["environments"].items():
        groups = folders(engine, promised["cgroup_parent"], places)
        running, changed = (0, 0)
        if promised.get("oom_score_adj", 0) > 0:
            running, changed = raise_scores(groups, promised["oom_score_adj"], places)
        flat = int(engine["cgroup_version"]) == 1
        environments[name] = {
            "processes": running,
            "scores_raised": changed,
            "throttled_groups": spread(promised.get("files") or {}, groups, places) if flat else 0,
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
                environments[name]["disk"] = disk(
                    name, promised, containers, known[name], name in under_way, DU_SECONDS / len(limited)
                )
            except subprocess.TimeoutExpired:
                undecided.append(
                    f"{name}: its files could not be counted within {DU_SECONDS / len(limited):.0f} s, so nothing "
                    "holds its disk. Next step: see which folder has so many: du --inodes"
                )
        for name in freed:  # its ceiling has been taken away while it was above it
            hold(0, 0, containers, known[name], False, 0)
    except Undecided as error:
        undecided.append(str(error))
    for name in (*limited, *(freed if undecided else ())):  # what is paused has to be known at the next run
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
            held = f"{name}: {_gib(stands['used'])} on the disk, over its ceiling of {_gib(stands['ceiling'])}"
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


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f} GiB"


def metrics(report: Mapping[str, Any]) -> str:
    """Prometheus text."""
    environments = report["environments"]
    limited = {name: one["disk"] for name, one in environments.items() if one["disk"]}
    families: list[tuple[str, str, Mapping[str, float]]] = [
        ("disk_bytes", "What the environment takes up on the disk.", {k: v["used"] for k, v in limited.items()}),
        ("disk_limit_bytes", "Its ceiling.", {k: v["ceiling"] for k, v in limited.items()}),
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
