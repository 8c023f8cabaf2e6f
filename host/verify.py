"""verify: what the last deploys declared against what the engine, the kernel and the firewall really have.

Every comparison is a function from what was read to differences; only `read`, `listing` and `processes` touch the
machine. A difference counts when a second look, a moment later, finds it too and its stack is not being deployed.
"""

import argparse
import difflib
import fcntl
import json
import math
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from ipaddress import ip_network
from pathlib import Path
from typing import Any, NamedTuple

from host import backup
from host.keep import BEST_EFFORT
from host.machine import START_ENGINE, Places, Undecided, ask, deploying, read_json, write

SECOND_LOOK_SECONDS = 2.0
HOST = "host"
LABEL, FILES_LABEL, PROBE_LABEL = "bulkhead.environment", "bulkhead.files", "bulkhead.probe"
PROOF_SECONDS = 15 * 60
KEEP_SECONDS = 10 * 60
"""keep runs every minute, and may take five (its unit's limit): what is older, nobody has kept since."""
ABSENT = "not there"
OUTSIDER = "container that no deploy made"
SLICE_FILE = "cgroup file"
INSTALL_NFT = "apt-get install nftables"
# v1 shows a memory limit that is not set as the largest whole page below 2**63.
UNLIMITED = 2**62
PLACED_BY = ("cpu", "memory", "pids")
OR = " or "
CONTAINER_GROUP = re.compile(r"[0-9a-f]{64}")


class Difference(NamedTuple):
    """One difference. `environment`: whose it is, or `host`. `where`: a container, a file, a rule's chain."""

    environment: str
    what: str
    where: str
    expected: str
    observed: str

    @property
    def key(self) -> tuple[str, ...]:
        """What stays the same while it lasts: a state or a value may waver, an added thing is told by itself."""
        if self.expected != ABSENT:
            return self[:4]
        return (*self[:4], self.observed.partition(", ")[2]) if self.what == OUTSIDER else self


@dataclass(frozen=True)
class Declared:
    """What deploys declared: `host.json`, each environment's outputs, the firewall's file (None: none)."""

    host: Mapping[str, Any]
    stacks: Mapping[str, Mapping[str, Any]]
    firewall: Path | None = None

    @property
    def environments(self) -> Mapping[str, Mapping[str, Any]]:
        found: Mapping[str, Mapping[str, Any]] = self.host["environments"]
        return found


@dataclass
class Look:
    """What one look found. `compared`: how many of each kind were looked at."""

    differences: list[Difference] = field(default_factory=list)
    undecided: list[str] = field(default_factory=list)
    compared: dict[str, int] = field(default_factory=dict)


class Process(NamedTuple):
    """A process: its pid namespace, and its cgroup by controller (`""` is v2's)."""

    pid: int
    namespace: str
    groups: Mapping[str, str]


# --- containers ----------------------------------------------------------------------------------------------------


class Limit(NamedTuple):
    """What `docker update` can change of a container, as the outputs declare it and as the engine shows it."""

    what: str
    declared: Callable[[Mapping[str, Any]], Any]
    shown: Callable[[Mapping[str, Any]], Any]


def quota(config: Mapping[str, Any]) -> float:
    """CPUs that a container may use, from a HostConfig; 0 is all."""
    if config.get("NanoCpus"):
        return float(config["NanoCpus"]) / 1e9
    return float(max(config.get("CpuQuota") or 0, 0)) / (config.get("CpuPeriod") or 100_000)


LIMITS = (
    Limit("memory limit in bytes", lambda it: it.get("memory") or 0, lambda config: config.get("Memory") or 0),
    Limit("CPU limit", lambda it: float(it.get("cpus") or 0), quota),
    Limit("CPU shares", lambda it: it.get("cpu_shares") or 0, lambda config: config.get("CpuShares") or 0),
    Limit("process limit", lambda _: 0, lambda config: max(config.get("PidsLimit") or 0, 0)),
    Limit("CPU set", lambda _: "", lambda config: config.get("CpusetCpus") or ""),
    Limit("IO weight", lambda _: 0, lambda config: config.get("BlkioWeight") or 0),
    Limit(
        "restart policy",
        lambda it: str(it.get("restart") or "no").partition(":")[0],
        lambda config: (config.get("RestartPolicy") or {}).get("Name") or "no",
    ),
)


def containers(
    declared: Declared, inspected: Sequence[Mapping[str, Any]], running: Sequence[Process] = ()
) -> Iterator[Difference]:
    """Declared containers that are gone, stopped or changed, and containers of nobody that touch an environment."""
    groups = {process.pid: process.groups for process in running}
    there = {container["Id"]: container for container in inspected}
    ours: dict[str, str] = {}
    for environment, stack in declared.stacks.items():
        for name, service in stack["services"].items():
            for identifier in service["containers"]:
                ours[identifier] = environment
                if identifier in there:
                    yield from container_(environment, service, stack, there[identifier])
                else:
                    where = f"service {name}, container {identifier[:12]}"
                    yield Difference(environment, "container removed", where, "running", ABSENT)
    for container in inspected:
        if container["Id"] in ours:
            continue
        parents = [str(container["HostConfig"].get("CgroupParent") or "")]
        parents += groups.get(container["State"]["Pid"], {}).values()
        if touched := touches(declared, ours, container, parents):
            environment, how = touched
            yield Difference(
                environment,
                OUTSIDER,
                named(container),
                ABSENT,
                f"{container['State']['Status']}, {how}",
            )


def container_(
    environment: str, service: Mapping[str, Any], stack: Mapping[str, Any], container: Mapping[str, Any]
) -> Iterator[Difference]:
    """What differs of one declared container."""
    config, where = container["HostConfig"], named(container)
    expected, observed = states(service, container)
    if observed not in expected:
        yield Difference(environment, "container state", where, expected[0], observed)
    parent = stack["slice"]["cgroup_parent"]
    if config["CgroupParent"] != parent:
        yield Difference(environment, "slice of a container", where, parent, config["CgroupParent"] or "none")
    attached = set(service["networks"])
    on = set(container["NetworkSettings"]["Networks"] or {})
    if attached != on:
        yield Difference(environment, "networks of a container", where, listed(attached), listed(on))
    for limit in LIMITS:
        wanted, shown = limit.declared(service), limit.shown(config)
        if wanted != shown:
            yield Difference(environment, limit.what, where, amount(wanted), amount(shown))


def states(service: Mapping[str, Any], container: Mapping[str, Any]) -> tuple[tuple[str, ...], str]:
    """The states that are as declared, the usual one first, and the one it is in.

    A service that others wait for, or that nothing restarts, may have ended well.
    """
    state = container["State"]
    ended = f"exited with code {state['ExitCode']}"
    observed = ended if state["Status"] == "exited" else state["Status"]
    well = "exited with code 0"
    if service.get("completes"):
        return (well, "running"), observed
    if str(service.get("restart") or "no").startswith(("no", "on-failure")):
        return ("running", well), observed
    return ("running",), observed


def touches(
    declared: Declared, ours: Mapping[str, str], container: Mapping[str, Any], parents: Sequence[str]
) -> tuple[str, str] | None:
    """The environment that a container of nobody touches, and how; None when it touches none.

    `ours`: the environments of the declared containers, by id. `parents`: the cgroups that it is in or asked for.
    """
    config, labels = container["HostConfig"], container["Config"].get("Labels") or {}
    if FILES_LABEL in labels and container["State"]["Status"] == "created":
        return None  # it only carries files into a volume and is never started
    if PROBE_LABEL in labels and young(container):
        return None  # the prover's, and gone in a moment
    if backup.RESTORE_LABEL in labels and young(container, backup.LIMIT_SECONDS):
        return None  # a restore's
    for environment, promised in declared.environments.items():
        if any(inside(path, promised["cgroup_parent"]) for path in parents):
            return environment, f"in its slice {promised['cgroup_parent']}"
    for environment, stack in declared.stacks.items():
        own = {name for name, network in stack["networks"].items() if not network["external"]}
        if networks_ := sorted(set(container["NetworkSettings"]["Networks"] or {}) & own):
            return environment, f"on its network {', '.join(networks_)}"
        mounted = {mount.get("Name") for mount in container.get("Mounts") or ()} & set(stack["volumes"])
        if mounted:
            return environment, f"with its volume {', '.join(sorted(map(str, mounted)))}"
    for mode in ("NetworkMode", "PidMode", "IpcMode"):
        kind, _, other = str(config.get(mode) or "").partition(":")
        if kind == "container" and other in ours:
            return ours[other], f"with the {mode} of its container {other[:12]}"
    return (str(labels[LABEL]), f"labelled {LABEL}={labels[LABEL]}") if labels.get(LABEL) else None


def young(container: Mapping[str, Any], seconds: float = PROOF_SECONDS) -> bool:
    """Whether it was made within so many seconds: the time that a proof may take."""
    made = datetime.fromisoformat(str(container["Created"])[:19]).replace(tzinfo=UTC)
    return (datetime.now(UTC) - made).total_seconds() < seconds


def inside(path: str, parent: str) -> bool:
    """Whether a cgroup path is that of `parent`, or below it; both in the spelling of one driver."""
    return f"/{parent.strip('/')}/" in f"/{path.strip('/')}/"


def named(container: Mapping[str, Any]) -> str:
    return f"container {container['Name'].lstrip('/')} ({container['Id'][:12]})"


def listed(names: Iterable[str]) -> str:
    return ", ".join(sorted(names)) or "none"


def amount(value: Any) -> str:
    """A limit as text; the engine's 0 is none."""
    return (f"{value:g}" if isinstance(value, float) else str(value)) if value else "none"


# --- networks ------------------------------------------------------------------------------------------------------


def networks(declared: Declared, inspected: Sequence[Mapping[str, Any]]) -> Iterator[Difference]:
    """Declared networks that are gone or changed, and networks of nobody with an environment's label or range."""
    there = {network["Name"]: network for network in inspected}
    ours = {name: environment for environment, stack in declared.stacks.items() for name in stack["networks"]}
    for environment, stack in declared.stacks.items():
        for name, network in stack["networks"].items():
            where = f"network {name}"
            if name not in there:
                yield Difference(environment, "network removed", where, str(network.get("subnet")), ABSENT)
            elif not network["external"]:
                pairs = (
                    ("subnet of a network", network["subnet"], listed(subnets(there[name]))),
                    ("a network's way out", way_out(network["internal"]), way_out(there[name]["Internal"])),
                )
                for what, expected, observed in pairs:
                    if expected != observed:
                        yield Difference(environment, what, where, expected, observed)
            elif declared.environments[environment].get("tier") == BEST_EFFORT:
                yield from outside(environment, declared.environments[environment], where, there[name])
    for name, network in there.items():
        if name in ours:
            continue
        found = [
            (environment, f"{subnet}, within its range {promised[key]}")
            for environment, promised in declared.environments.items()
            for key in ("subnet", "subnet6")
            for subnet in subnets(network)
            if promised.get(key) and overlap(subnet, promised[key])
        ]
        if label := (network.get("Labels") or {}).get(LABEL):
            found.append((label, f"labelled {LABEL}={label}"))
        if found:
            yield Difference(found[0][0], "network that no deploy made", f"network {name}", ABSENT, found[0][1])


def outside(
    environment: str, promised: Mapping[str, Any], where: str, network: Mapping[str, Any]
) -> Iterator[Difference]:
    """Subnets of a network that somebody else made, beyond the environment's ranges: the firewall does not know that
    what comes from there is the environment's."""
    ranges = [str(promised[key]) for key in ("subnet", "subnet6") if promised.get(key)]
    for subnet in subnets(network):
        if ranges and not any(within(subnet, one) for one in ranges):
            yield Difference(environment, "range of an external network", where, f"within {OR.join(ranges)}", subnet)


def within(subnet: str, range_: str) -> bool:
    a, b = ip_network(subnet, strict=False), ip_network(range_, strict=False)
    return a.version == b.version and a.subnet_of(b)  # type: ignore[arg-type]


def subnets(network: Mapping[str, Any]) -> list[str]:
    return [one["Subnet"] for one in (network.get("IPAM") or {}).get("Config") or () if one.get("Subnet")]


def overlap(one: str, other: str) -> bool:
    a, b = ip_network(one, strict=False), ip_network(other, strict=False)
    # Told apart by version, since ranges of two versions do not compare.
    return a.version == b.version and not (a[-1] < b[0] or b[-1] < a[0])  # type: ignore[operator]


def way_out(internal: bool) -> str:
    return "internal" if internal else "open"


# --- cgroups -------------------------------------------------------------------------------------------------------


def files(environment: str, wanted: Mapping[str, str], places: Places) -> Iterator[Difference]:
    """cgroup files whose value is another. A trailing `?` of a path: not every kernel has the file."""
    for path, expected in wanted.items():
        file = places.root / path.rstrip("?").lstrip("/")
        try:
            observed = file.read_text().strip()
        except OSError as error:
            if path.endswith("?") and file.parent.is_dir():
                continue
            observed = error.strerror or str(error)
        if not same(expected, observed):
            yield Difference(environment, SLICE_FILE, path.rstrip("?"), expected, observed)


def same(expected: str, observed: str) -> bool:
    """Whether two spellings of a file's content mean the same: blanks and the ways to say unlimited aside.

    `expected` may have several, with OR between them.
    """
    return any(list(map(value, one.split())) == list(map(value, observed.split())) for one in expected.split(OR))


def value(word: str) -> str:
    return "max" if word in ("-1", "max") or (word.isdigit() and int(word) >= UNLIMITED) else word


def parents_of(declared: Declared) -> dict[str, tuple[str, str]]:
    """The environment of each declared container, and the slice that it belongs in, by its id."""
    return {
        identifier: (environment, stack["slice"]["cgroup_parent"])
        for environment, stack in declared.stacks.items()
        for service in stack["services"].values()
        for identifier in service["containers"]
    }


def placement(
    declared: Declared, inspected: Sequence[Mapping[str, Any]], running: Sequence[Process]
) -> Iterator[Difference]:
    """Processes of an environment's containers outside its slice, and of no container inside one."""
    ours = parents_of(declared)
    known = {container["State"]["Pid"]: container for container in inspected if container["Id"] in ours}
    spaces = {process.namespace: known[process.pid] for process in running if process.pid in known}
    # Of a container in the host's pid namespace only the first process can be told from the host's own.
    shared = {process.namespace for process in running if process.pid == 1}
    for process in running:
        container = known.get(process.pid)
        if container is None and process.namespace not in shared:
            container = spaces.get(process.namespace)
        if container is None:
            yield from intruding(declared, process)
            continue
        environment, parent = ours[container["Id"]]
        out = sorted({path for path in process.groups.values() if not inside(path, parent)})
        if out:
            where = f"process {process.pid} of {named(container)}, /proc/{process.pid}/cgroup"
            yield Difference(environment, "process outside its slice", where, parent, ", ".join(out))


def intruding(declared: Declared, process: Process) -> Iterator[Difference]:
    """A process in an environment's slice that is in no container's group: put there past the engine."""
    for environment, promised in declared.environments.items():
        paths = {path for path in process.groups.values() if inside(path, promised["cgroup_parent"])}
        if strange := sorted(path for path in paths if not CONTAINER_GROUP.search(path)):
            where = f"process {process.pid}, /proc/{process.pid}/cgroup"
            yield Difference(environment, "process that no container has", where, ABSENT, ", ".join(strange))


def ceilings(
    declared: Declared, inspected: Sequence[Mapping[str, Any]], running: Sequence[Process], places: Places
) -> Iterator[Difference]:
    """Limits of containers in the kernel that are others than the engine says: written past it."""
    ours = parents_of(declared)
    groups = {process.pid: process.groups for process in running}
    for container in inspected:
        group = groups.get(container["State"]["Pid"])
        if container["Id"] not in ours or not group:
            continue
        environment, parent = ours[container["Id"]]
        if not all(inside(path, parent) for path in group.values()):
            continue  # it was moved, which is a difference of its own, and these files are another group's
        wanted = container_files(container["HostConfig"], group)
        for one in files(environment, wanted, places):
            yield one._replace(what=f"{SLICE_FILE} of {named(container)}")


def container_files(config: Mapping[str, Any], groups: Mapping[str, str]) -> dict[str, str]:
    """A container's own cgroup files and what they show for its limits of memory, swap (none beside it) and CPU, and
    for its share of the environment's CPU."""
    memory, cpus = str(config.get("Memory") or "max"), quota(config)
    period, shares = config.get("CpuPeriod") or 100_000, int(config.get("CpuShares") or 1024)
    if "memory" in groups:
        return {
            f"/sys/fs/cgroup/memory{groups['memory']}/memory.limit_in_bytes": memory,
            f"/sys/fs/cgroup/memory{groups['memory']}/memory.memsw.limit_in_bytes?": memory,
            f"/sys/fs/cgroup/cpu{groups['cpu']}/cpu.cfs_quota_us?": str(round(cpus * period)) if cpus else "max",
            f"/sys/fs/cgroup/cpu{groups['cpu']}/cpu.shares?": str(shares),
        }
    return {
        f"/sys/fs/cgroup{groups['']}/memory.max": memory,
        f"/sys/fs/cgroup{groups['']}/memory.swap.max?": "0" if config.get("Memory") else "max",
        f"/sys/fs/cgroup{groups['']}/cpu.max": f"{round(cpus * period) if cpus else 'max'} {period}",
        f"/sys/fs/cgroup{groups['']}/cpu.weight?": OR.join(sorted(weights(shares))),
    }


def weights(shares: int) -> set[str]:
    """What a container's `cpu.weight` may be for its CPU shares: runc has changed how it reckons with 1.3.2, crun with
    1.23 (opencontainers/cgroups, ConvertCPUSharesToCgroupV2Value)."""
    exact = math.log2(shares)
    return {
        str(1 + (shares - 2) * 9999 // 262142),
        str(math.ceil(10 ** ((exact * exact + 125 * exact) / 612 - 7 / 34))),
    }


def groups_of(text: str) -> dict[str, str]:
    """The cgroups in /proc/<pid>/cgroup that carry a limit, by controller; under cgroup v2 the one, by `""`."""
    found: dict[str, str] = {}
    for line in text.splitlines():
        _, controllers, path = line.split(":", 2)
        found |= {name: path for name in controllers.split(",") if name in (*PLACED_BY, "")}
    return {name: path for name, path in found.items() if name} or found


def processes(places: Places) -> list[Process]:
    """Every process of the machine. Those that end meanwhile are left out."""
    found = []
    for folder in places.processes.iterdir():
        if not folder.name.isdigit():
            continue
        try:
            namespace = str((folder / "ns/pid").readlink())
            found.append(Process(int(folder.name), namespace, groups_of((folder / "cgroup").read_text())))
        except OSError:
            continue
    return found


# --- firewall ------------------------------------------------------------------------------------------------------


def listing(family: str, table: str, file: Path | None = None) -> str | None:
    """The table as nft prints it, without counters; None when there is none.

    With a `file`, the table that it makes: loaded into an empty network namespace by the same nft and kernel, so that
    both are in the one spelling and nothing on the host is touched.
    """
    show = ["nft", "--stateless", "list", "table", family, table]
    if file is None:
        tables = ask(["nft", "list", "tables", family], INSTALL_NFT)
        return ask(show, INSTALL_NFT) if f"table {family} {table}" in tables.splitlines() else None
    script = 'nft --file "$1" && shift && exec "$@"'
    return ask(["unshare", "--net", "sh", "-c", script, "sh", str(file), *show], f"correct {file}: make up ENV=host")


def statements(text: str) -> dict[str, list[str]]:
    """A listed table's statements by block (`chain input`, `set dev`); a set's elements are one statement each."""
    blocks: dict[str, list[str]] = {}
    block, whole = "", ""
    for line in text.splitlines():
        whole = f"{whole} {line.strip()}".strip()
        bare = re.sub(r'"[^"]*"', "", whole)
        opened = bare.count("{") - bare.count("}")
        if whole.endswith("{") and opened == 1 and re.match(r"(table|chain|set|map|flowtable|counter|ct|quota) ", bare):
            block = whole.removesuffix("{").strip()
            blocks[block], whole = [], ""
        elif whole == "}":
            block, whole = next(iter(blocks), ""), ""
        elif opened <= 0:
            if whole:
                blocks.setdefault(block, []).extend(split_elements(whole))
            whole = ""
    for name, found in blocks.items():
        if any(one.startswith("flags") and "dynamic" in one for one in found):
            # Such a set is filled by packets.
            blocks[name] = [one for one in found if not one.startswith("element ")]
    return blocks


def split_elements(statement: str) -> list[str]:
    """`elements = { a, b }` as one statement for each; any other as it is."""
    elements = re.fullmatch(r"elements = \{(.*)\}", statement)
    return [f"element {one.strip()}" for one in elements[1].split(",")] if elements else [statement]


def firewall(name: str, declared: str, observed: str | None) -> Iterator[Difference]:
    """Statements of the table that are missing or added; `name` is its family and name."""
    if observed is None:
        rules = sum(map(len, statements(declared).values()))
        expected = f"{rules} statements" if rules else "as it was deployed"
        yield Difference(HOST, "firewall table removed", f"nftables {name}", expected, ABSENT)
        return
    wanted, there = statements(declared), statements(observed)
    for block in dict.fromkeys([*wanted, *there]):
        where = f"nftables {name}, {block}"
        if block not in there:
            yield Difference(HOST, "firewall block removed", where, f"{len(wanted[block])} statements", ABSENT)
        elif block not in wanted:
            yield Difference(HOST, "firewall block added", where, ABSENT, f"{len(there[block])} statements")
        else:
            yield from block_(where, wanted[block], there[block])


def block_(where: str, wanted: Sequence[str], there: Sequence[str]) -> Iterator[Difference]:
    """Statements of one block, in their order: the first rule that matches decides."""
    matched = difflib.SequenceMatcher(None, wanted, there, autojunk=False)
    for _, start, end, other_start, other_end in matched.get_opcodes():
        if wanted[start:end] != there[other_start:other_end]:
            for statement in wanted[start:end]:
                yield Difference(HOST, "firewall statement removed", where, statement, ABSENT)
            for statement in there[other_start:other_end]:
                yield Difference(HOST, "firewall statement added", where, ABSENT, statement)


# --- the agent itself ----------------------------------------------------------------------------------------------


def agent(declared: Declared, places: Places) -> Iterator[Difference]:
    """Whether what looks at all this regularly is running: systemd's timers, or the watch process."""
    if not declared.host.get("agent"):
        return
    if (places.root / "run/systemd/system").is_dir():
        for verb in declared.host["agent"]["verbs"]:
            timer = f"bulkhead-{verb}.timer"
            shown = ask(["systemctl", "show", "--property=ActiveState", "--value", timer], "systemctl status").strip()
            if shown != "active":
                yield Difference(HOST, "timer", timer, "active", shown)
        return
    file = places.run / "watch.pid"
    if not watches(file, places):
        yield Difference(HOST, "watch process", str(file), "running", "not running; make up starts it")


def kept(declared: Declared, places: Places, now: float) -> Iterator[Difference]:
    """Whether keep has been running: its report is there and not old, however active its timer is.

    `now`: seconds since 1970. After a boot, a deploy and a start of the watch process it has time for its first run.
    """
    if "keep" not in (declared.host.get("agent") or {}).get("verbs", ()):
        return
    file, observed = places.state / "keep.json", ABSENT
    begun = [now - time.clock_gettime(time.CLOCK_BOOTTIME)]
    for started in (places.declared / "host.json", places.run / "watch.pid"):
        if started.exists():
            begun.append(started.stat().st_mtime)
    try:
        observed = str(json.loads(file.read_text())["at"])
        begun.append(datetime.fromisoformat(observed).timestamp())
    except (OSError, ValueError, KeyError, TypeError):
        pass  # not there, or another's
    if now - max(begun) > KEEP_SECONDS:
        yield Difference(HOST, "keep overdue", str(file), f"a run within {KEEP_SECONDS // 60} minutes", observed)


def watches(file: Path, places: Places) -> bool:
    """Whether the process that a pid file names is there and is the watch process."""
    try:
        pid = int(file.read_text())
        return b"watch" in (places.processes / str(pid) / "cmdline").read_bytes().split(b"\0")
    except (OSError, ValueError):
        return False


# --- looking -------------------------------------------------------------------------------------------------------


def read(places: Places) -> Declared:
    """What is declared. `Undecided` when the host's is missing, or a file is broken."""
    host = read_json(places.declared / "host.json")
    stacks = {path.stem: read_json(path) for path in sorted((places.declared / "stacks").glob("*.json"))}
    return Declared(host, stacks, places.declared / "firewall.nft" if host.get("firewall") else None)


def engine(kind: str, declared: Declared) -> list[Mapping[str, Any]]:
    """The engine's inspection of all its containers or networks."""
    socket = (declared.host.get("engine") or {}).get("socket") or "unix:///var/run/docker.sock"
    own = {"DOCKER_HOST": socket, "DOCKER_CONTEXT": ""}
    command = ["docker", kind, "ls", "--quiet", "--no-trunc", *(["--all"] if kind == "container" else [])]
    found: list[Mapping[str, Any]] = []
    # What goes between the list and the inspection makes the latter fail: such a look is taken again.
    for tries in range(3):
        identifiers = ask(command, START_ENGINE, own).split()
        try:
            found = json.loads(ask(["docker", kind, "inspect", *identifiers], START_ENGINE, own)) if identifiers else []
            break
        except Undecided:
            if tries == 2:
                raise
    return found


def look(places: Places) -> Look:
    """One look at everything. What cannot be read is undecided, and the rest is compared all the same."""
    declared = read(places)
    found = Look()

    def compare(kind: str, count: int, differences: Iterable[Difference]) -> None:
        try:
            found.differences += differences
            found.compared[kind] = found.compared.get(kind, 0) + count
        except Undecided as error:
            found.undecided.append(str(error))

    try:
        inspected = engine("container", declared)
        running = processes(places)
        compare("containers", len(inspected), containers(declared, inspected, running))
        compare("processes", len(running), placement(declared, inspected, running))
        compare("processes", 0, ceilings(declared, inspected, running, places))
        bridges = engine("network", declared)
        compare("networks", len(bridges), networks(declared, bridges))
    except Undecided as error:
        found.undecided.append(str(error))
    for environment, promised in declared.environments.items():
        wanted = promised.get("files") or {}
        compare("cgroup files", len(wanted), files(environment, wanted, places))
    if declared.firewall:
        compare("firewall", 1, firewall_(declared, declared.firewall))
    compare("agent", 1, agent(declared, places))
    compare("agent", 0, kept(declared, places, time.time()))
    listed_ = len(list((places.declared / "backup").glob("*.json")))
    if listed_:
        compare("environments' backups", listed_, backups(places))
    return found


def backups(places: Places) -> Iterator[Difference]:
    """Backups that are overdue, failed, or were not restored and checked for too long."""
    for job, what, known in backup.alarming(places):
        yield Difference(job.environment, f"backup {what}", f"volume {job.volume}", "backed up and verified", known)


def firewall_(declared: Declared, file: Path) -> Iterator[Difference]:
    family, table = declared.host["firewall"]["family"], declared.host["firewall"]["table"]
    there = listing(family, table)
    if file.exists():
        yield from firewall(f"{family} {table}", listing(family, table, file) or "", there)
        return
    yield Difference(HOST, "firewall's file removed", str(file), "the table as it was deployed", ABSENT)
    if there is None:
        yield from firewall(f"{family} {table}", "", there)


def settled(
    looks: Callable[[], Look], deploys: Callable[[], frozenset[str]], wait: Callable[[float], None] = time.sleep
) -> tuple[Look, frozenset[str]]:
    """What two looks agree on, without the stacks that are being deployed around them; these too.

    The second look is taken only when the first finds something.
    """
    under_way = deploys()
    first = looks()
    if first.differences:
        wait(SECOND_LOOK_SECONDS)
        second = looks()
        before = {difference.key for difference in first.differences}
        first = Look([one for one in second.differences if one.key in before], second.undecided, second.compared)
    under_way |= deploys()
    first.differences = [one for one in first.differences if not changing(one, under_way)]
    return first, under_way


def changing(one: Difference, under_way: frozenset[str]) -> bool:
    """Whether a deploy that is under way makes this difference; the host's writes the slices of all environments."""
    return one.environment in under_way or (HOST in under_way and one.what == SLICE_FILE)


def remembered(found: Sequence[Difference], before: Sequence[Mapping[str, str]], now: str) -> list[dict[str, str]]:
    """The differences with the time since when each is known."""
    since = {Difference(*(one[key] for key in Difference._fields)).key: one["since"] for one in before}
    return [{**one._asdict(), "since": since.get(one.key, now)} for one in found]


def metrics(report: Mapping[str, Any], environments: Iterable[str], at: float, seconds: float) -> str:
    """The report for Prometheus' text collector."""
    counts = {name: 0 for name in (HOST, *environments)}
    for one in report["differences"]:
        counts[one["environment"]] = counts.get(one["environment"], 0) + 1
    lines = [
        "# HELP bulkhead_verify_differences What differs from what was declared.",
        "# TYPE bulkhead_verify_differences gauge",
        *(f'bulkhead_verify_differences{{environment="{name}"}} {count}' for name, count in sorted(counts.items())),
        "# HELP bulkhead_verify_undecided What could not be compared.",
        "# TYPE bulkhead_verify_undecided gauge",
        f"bulkhead_verify_undecided {len(report['undecided'])}",
        "# HELP bulkhead_verify_last_run_timestamp_seconds When the last comparison ended.",
        "# TYPE bulkhead_verify_last_run_timestamp_seconds gauge",
        f"bulkhead_verify_last_run_timestamp_seconds {at:.0f}",
        "# HELP bulkhead_verify_duration_seconds How long it took.",
        "# TYPE bulkhead_verify_duration_seconds gauge",
        f"bulkhead_verify_duration_seconds {seconds:.3f}",
    ]
    return "\n".join(lines) + "\n"


def told(report: Mapping[str, Any]) -> list[str]:
    """The report as lines: one for each difference, or one that says that all is well."""
    lines = [
        f"{one['environment']}: {one['what']}: {one['where']}: expected {one['expected']}, "
        f"observed {one['observed']}, since {one['since']}"
        for one in report["differences"]
    ]
    lines += [f"undecided: {text}" for text in report["undecided"]]
    if not lines:
        counts = ", ".join(f"{count} {kind}" for kind, count in report["compared"].items())
        lines = [f"OK: as declared ({counts})"]
    if report["deploying"]:
        lines.append(f"left out, since they are being deployed: {', '.join(report['deploying'])}")
    return lines


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="the report for a program")
    parser.add_argument("--news", action="store_true", help="print only what is not as it was at the last run")


def run(args: argparse.Namespace, places: Places = Places()) -> int:  # noqa: B008 - frozen
    """Compares, writes the report and the metrics, prints. 0: as declared, 1: differences, 2: undecided."""
    places.run.mkdir(parents=True, exist_ok=True)
    with (places.run / "verify.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # two at once would forget each other's since
        started = time.time()
        report, before = verified(places)
    ended = time.time()
    environments = read_json(places.declared / "host.json")["environments"]
    write(places.state / "metrics/verify.prom", metrics(report, environments, ended, ended - started))
    if args.json:
        print(json.dumps(report, indent=2))
    elif not args.news or any(report[key] != before.get(key) for key in ("differences", "undecided", "deploying")):
        print("\n".join(told(report)), flush=True)
    return 1 if report["differences"] else 2 if report["undecided"] else 0


def verified(places: Places) -> tuple[dict[str, Any], dict[str, Any]]:
    """The report, written to `verify.json`, and the one that was there before."""
    file = places.state / "verify.json"
    try:
        before = json.loads(file.read_text())
        known = before["differences"]
        remembered([], known, "")
    except (OSError, ValueError, KeyError, TypeError):
        # There is none, or it is another version's: what was known since when is lost, and nothing else.
        before, known = {}, []
    found, under_way = settled(lambda: look(places), lambda: deploying(places))
    now = datetime.now(UTC).isoformat(timespec="seconds")
    report = {
        "at": now,
        "differences": remembered(found.differences, known, now),
        "undecided": found.undecided,
        "deploying": sorted(under_way),
        "compared": found.compared,
    }
    write(file, json.dumps(report, indent=2) + "\n")
    return report, before
