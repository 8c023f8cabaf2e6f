"""Prove: tries every way from each environment to the others and to the host, from throwaway containers of its own.
A line of the result is a path that was really tried: expected, observed. What must work is tried as well."""

import argparse
import concurrent.futures
import hashlib
import io
import ipaddress
import json
import os
import pkgutil
import re
import secrets
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import Any

from host import probe
from host.machine import Places, Undecided, ask, read_json, write

LABEL = "bulkhead.probe"
ENVIRONMENT, SERVICE = "bulkhead.environment", "bulkhead.service"
REPOSITORY = "bulkhead/probe"
PYTHON = Path("/usr/bin/python3")
ENGINE = "see that the engine answers: docker info"
SECONDS = 300
LISTENS_SECONDS = 30
AT_A_TIME = min(8, 2 * (os.cpu_count() or 1))  # starting a container takes CPU: more only wait for each other
PORTS_AT_MOST = 1024  # of one address: a quarter of a minute, if all are blocked. More are told as not tried
CLOSED = 9  # discard: nothing listens there, so a refusal shows that the packet arrived

BLOCKED, WORKS = "blocked", "works"
STOPPED = re.compile(
    r"no answer|unreachable|denied|not there|not found|not seen|only its own|.*refused \(EAGAIN\)|.*killed"
)
NOT_TRIED = "not tried: the probe did not say"
TOO_MANY = "not tried: too many listen there. Next step: stop what opened them, then make prove"
PASSED = re.compile(r"connected|answered|resolved")

# Open for writing, they are a way out of the container: a program of the container's that the host runs, the host's
# switches, the limits of the group it is in.
OUT_OF_CONTAINER = (
    "/proc/sys/kernel/core_pattern",
    "/proc/sysrq-trigger",
    "/proc/sys/kernel/modprobe",
    "/sys/kernel/uevent_helper",
    "/sys/fs/cgroup/memory/memory.limit_in_bytes",
    "/sys/fs/cgroup/memory/release_agent",
    "/sys/fs/cgroup/pids/pids.max",
    "/sys/fs/cgroup/cpu/cpu.shares",
    "/sys/fs/cgroup/cpu/cpu.cfs_quota_us",
    "/sys/fs/cgroup/memory.max",
    "/sys/fs/cgroup/cgroup.procs",
    "/sys/fs/cgroup/cpu.max",
)
SOCKETS = (
    "/var/run/docker.sock",
    "/run/docker.sock",
    "/run/containerd/containerd.sock",
    "/proc/1/root/run/docker.sock",
)
MOUNTS = ("cgroup", "cgroup2", "proc", "debugfs")


@dataclass(frozen=True)
class Proof:
    """One path that was tried. `expected`: blocked or works. `observed`: as the kernel said it."""

    environment: str
    source: str
    path: str
    target: str
    expected: str
    observed: str

    @property
    def ok(self) -> bool:
        """Whether it came as expected. What is neither a passage nor a stop is unexpected, whatever was hoped for."""
        return bool((PASSED if self.expected == WORKS else STOPPED).match(self.observed))


@dataclass(frozen=True)
class Way:
    """A path to be tried from one network; one without a `kind` is told and not tried."""

    path: str
    target: str
    kind: str
    given: Mapping[str, Any]
    expected: str = BLOCKED
    foreign: tuple[str, ...] = ()  # of a name: the addresses that it must not lead to


@dataclass(frozen=True)
class Network:
    """A network of an environment, with the prober's two containers in it: one tries, one listens."""

    environment: str
    name: str
    gateways: tuple[str, ...]
    sender: str
    listener: str
    listens: tuple[str, ...] = ()  # the listener's addresses


@dataclass(frozen=True)
class Container:
    """A running container of an environment: its addresses, names, and what listens in it."""

    environment: str
    name: str
    names: tuple[str, ...]
    addresses: tuple[str, ...]
    tcp: tuple[int, ...]
    udp: tuple[int, ...]
    networks: tuple[str, ...]


@dataclass(frozen=True)
class Named:
    """Targets that only the user may name: `outward` addresses of the host, `forbidden` and `allowed` address:port."""

    outward: tuple[str, ...] = ()
    forbidden: tuple[str, ...] = ()
    allowed: tuple[str, ...] = ()


@dataclass(frozen=True)
class Options:
    """`extra`: more words for `docker run` of the probes; tests open ways with it. `ceilings`: try those as well."""

    named: Named = field(default_factory=Named)
    ceilings: bool = False
    environments: tuple[str, ...] = ()
    extra: tuple[str, ...] = ()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `prove`."""
    parser.add_argument("--json", action="store_true", help="print every path as JSON")
    parser.add_argument("--all", action="store_true", help="print every path, not only the unexpected ones")
    parser.add_argument("--ceilings", action="store_true", help="also run into the limits of processes and memory")
    parser.add_argument("--environment", action="append", default=[], help="from this one only (may be repeated)")
    parser.add_argument(
        "--outward", action="append", default=[], metavar="ADDRESS", help="an address of the host's own"
    )
    parser.add_argument("--forbidden", action="append", default=[], metavar="ADDRESS:PORT", help="must not be reached")
    parser.add_argument("--allowed", action="append", default=[], metavar="ADDRESS:PORT", help="must be reached")


def run(args: argparse.Namespace) -> int:
    """0: every path as expected. 1: at least one was not."""
    named = Named(tuple(args.outward), tuple(args.forbidden), tuple(args.allowed))
    places = Places()
    proofs = prove(places, Options(named, args.ceilings, tuple(args.environment)))
    wrong = [one for one in proofs if not one.ok]
    result = {
        "paths": len(proofs),
        "unexpected": len(wrong),
        "proofs": [{**asdict(one), "ok": one.ok} for one in proofs],
    }
    write(places.state / "prove.json", json.dumps(result, indent=1) + "\n")
    if args.json:
        print(json.dumps(result))
    else:
        print_table(proofs if args.all else wrong)
        blocked = sum(one.expected == BLOCKED for one in proofs)
        works = len(proofs) - blocked
        print(f"{len(proofs)} paths tried: {blocked} must fail, {works} must work; {len(wrong)} unexpected")
    return 1 if wrong else 0


def print_table(proofs: Sequence[Proof]) -> None:
    """Source, path, target, expected, observed; in columns as wide as they need."""
    rows = [
        ("from", "path", "target", "expected", "observed"),
        *((one.source, one.path, one.target, one.expected, one.observed) for one in proofs),
    ]
    if not proofs:
        return
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        print("  ".join(word.ljust(width) for word, width in zip(row, widths, strict=True)).rstrip())


def prove(places: Places, options: Options) -> list[Proof]:
    """Every path, tried. `Undecided` when there is nothing to try from, or the engine does not answer."""
    document = read_json(places.declared / "host.json")
    declared = document["environments"]
    chosen = [name for name in declared if not options.environments or name in options.environments]
    with probes(declared, options) as (networks, untried):
        sources = [one for one in networks if one.environment in chosen]
        if not sources and not untried:
            raise Undecided("no network of an environment is there to try from. Next step: make up")
        running = containers(declared)
        host = Host.of(networks)
        if document.get("outward"):
            named = replace(options.named, outward=(*options.named.outward, *host.own))
            options = replace(options, named=named)
        with concurrent.futures.ThreadPoolExecutor(AT_A_TIME) as pool:
            made = pool.map(lambda one: tried(one, networks, running, host, declared, options), sources)
            proofs = [*(one for one in untried if one.environment in chosen), *(one for found in made for one in found)]
            proofs += arrivals(networks, chosen)
        if options.ceilings:
            # From any of its networks: the ceilings are of the whole environment.
            for name, source in {one.environment: one for one in sources}.items():
                proofs += ceilings(name, declared[name], source)
    return proofs


# --- What is there -------------------------------------------------------------------------------------------


def docker(*words: str) -> str:
    """Output of a `docker` command. A busy engine takes its time to start a container."""
    return ask(["docker", *words], ENGINE, seconds=SECONDS)


def inspected(kind: str, names: Sequence[str]) -> list[dict[str, Any]]:
    """What the engine says of these, which may have gone in the meantime."""
    if not names:
        return []
    done = subprocess.run(["docker", kind, "inspect", *names], capture_output=True, text=True, timeout=60, check=False)
    return list(json.loads(done.stdout or "[]"))


def listed(*words: str) -> list[str]:
    """Ids that a `docker … --quiet` command prints."""
    return docker(*words, "--quiet").split()


def containers(declared: Mapping[str, Any]) -> list[Container]:
    """Every running container of the environments. The probes have no environment's label."""
    found = []
    for one in inspected("container", listed("ps", "--filter", f"label={ENVIRONMENT}")):
        labels = one["Config"]["Labels"]
        if labels.get(ENVIRONMENT) not in declared:
            continue
        attached = one["NetworkSettings"]["Networks"]
        listening = sockets(Path(f"/proc/{one['State']['Pid']}/net"))
        found.append(
            Container(
                environment=labels[ENVIRONMENT],
                name=one["Name"].lstrip("/"),
                names=tuple(
                    sorted(
                        {one["Name"].lstrip("/")}
                        | {alias for net in attached.values() for alias in net["Aliases"] or ()}
                    )
                ),
                addresses=tuple(addresses(attached.values())),
                tcp=ports("tcp", listening),
                udp=ports("udp", listening),
                networks=tuple(attached),
            )
        )
    return found


def ports(kind: str, listening: Iterable[tuple[str, str, int]]) -> tuple[int, ...]:
    """The ports of TCP or UDP among sockets, on whatever address they listen."""
    return tuple(sorted({port for one, _, port in listening if one == kind}))


def addresses(attached: Iterable[Mapping[str, Any]]) -> Iterator[str]:
    """The addresses of a container's attachments."""
    for net in attached:
        for key in ("IPAddress", "GlobalIPv6Address"):
            if net.get(key):
                yield str(net[key])


def sockets(folder: Path) -> set[tuple[str, str, int]]:
    """(tcp or udp, address, port) of every listening socket of a network namespace."""
    found = set()
    for kind, listening in (("tcp", "0A"), ("udp", "07")):
        for version in ("", "6"):
            try:
                lines = (folder / f"{kind}{version}").read_text().splitlines()[1:]
            except OSError:  # the container has just ended, or there is no IPv6
                continue
            for line in lines:
                words = line.split()
                address, _, port = words[1].partition(":")
                if words[3] == listening:
                    found.add((kind, _address(address), int(port, 16)))
    return found


def _address(text: str) -> str:
    """An address of /proc/net: words of four bytes, each in the machine's order."""
    words = [bytes.fromhex(text[at : at + 8])[::-1] for at in range(0, len(text), 8)]
    return str(ipaddress.ip_address(b"".join(words)))


@dataclass(frozen=True)
class Host:
    """The host's side: gateway addresses of every bridge, what listens on the host, and its `own` other addresses."""

    gateways: Mapping[str, str]  # address to the network's name
    tcp: tuple[int, ...]
    udp: tuple[int, ...]
    own: tuple[str, ...] = ()

    @classmethod
    def of(cls, ours: Sequence[Network]) -> "Host":
        """All bridges of the engine, also of nobody's networks."""
        gateways: dict[str, str] = {}
        interfaces = json.loads(ask(["ip", "-json", "address", "show"], "apt-get install iproute2"))
        for network in inspected("network", listed("network", "ls", "--filter", "driver=bridge")):
            gateways |= dict.fromkeys(bridge_addresses(network, interfaces), network["Name"])
        gateways |= {gateway: one.name for one in ours for gateway in one.gateways}
        listening = sockets(Path("/proc/net"))
        # What listens on the host's loopback only is tried too: a gateway must not lead there either.
        shown = [info for one in interfaces for info in one["addr_info"] if info.get("scope") == "global"]
        own = tuple(dict.fromkeys(info["local"] for info in shown if info["local"] not in gateways))
        return cls(gateways, ports("tcp", listening), ports("udp", listening), own)


def told_gateways(network: Mapping[str, Any]) -> list[str]:
    """The host's addresses on a network, as far as the engine tells them of the network itself."""
    return [pool["Gateway"].partition("/")[0] for pool in network["IPAM"]["Config"] or () if pool.get("Gateway")]


def bridge_addresses(network: Mapping[str, Any], interfaces: Sequence[Mapping[str, Any]]) -> list[str]:
    """The host's addresses on a network's bridge. `interfaces`: as `ip -json address` shows them.

    From both, since Docker 20.10 shows no gateway of its own bridge until it has been restarted once (measured).
    """
    options = network.get("Options") or {}
    bridge = options.get("com.docker.network.bridge.name") or f"br-{network['Id'][:12]}"
    found = told_gateways(network)
    for one in interfaces:
        if one.get("ifname") == bridge:
            found += [info["local"] for info in one["addr_info"] if info.get("scope") == "global"]
    return list(dict.fromkeys(found))


# --- The throwaway containers --------------------------------------------------------------------------------


def image() -> str:
    """An image of the host's own Python and the probe, made on the host: it needs neither a registry nor a network."""
    files = sorted(set(_python_files()))
    source = pkgutil.get_data("host", "probe.py") or b""
    digest = hashlib.sha256(source)
    for file in files:
        digest.update(f"{file}\0{file.stat().st_size}\0".encode())
    name = f"{REPOSITORY}:{digest.hexdigest()[:12]}"
    there = subprocess.run(["docker", "image", "inspect", name], capture_output=True, timeout=60, check=False)
    if there.returncode == 0:
        return name
    print("making the image of the probes from this host's Python", file=sys.stderr)
    packed = io.BytesIO()
    # Links are followed: with /lib merged into /usr/lib, a link's target has another name than the linker knows.
    with tarfile.open(fileobj=packed, mode="w", dereference=True) as tar:
        for file in files:
            tar.add(file, recursive=False)
        entry = tarfile.TarInfo("probe.py")
        entry.size, entry.mode = len(source), 0o444
        tar.addfile(entry, io.BytesIO(source))
        for folder in ("tmp", "proc", "sys", "dev", "etc"):
            entry = tarfile.TarInfo(folder)
            entry.type, entry.mode = tarfile.DIRTYPE, 0o755
            tar.addfile(entry)
    label = f"LABEL {LABEL}=image"
    made = subprocess.run(
        ["docker", "import", "--change", label, "-", name],
        input=packed.getvalue(),
        capture_output=True,
        timeout=SECONDS,
        check=False,
    )
    if made.returncode:
        raise Undecided(f"docker import: {made.stderr.decode(errors='replace').strip()}. Next step: {ENGINE}")
    return name


def _python_files() -> Iterator[Path]:
    """The interpreter, the libraries that it is linked to, and its standard library without tests and caches."""
    binary = PYTHON.resolve()
    if not binary.is_file():
        raise Undecided(f"{PYTHON} is not there. Next step: apt-get install python3, or your distribution's package")
    yield PYTHON
    library = Path(f"/usr/lib/{binary.name}")
    extensions = list(library.glob("lib-dynload/*.so"))
    for linked in (binary, *extensions):
        shown = subprocess.run(["ldd", str(linked)], capture_output=True, text=True, timeout=60, check=False).stdout
        for word in re.findall(r"(/\S+)", shown):
            yield Path(word)
    for one in library.rglob("*"):
        if one.is_file() and one.suffix in (".py", ".so") and not {"test", "tests", "idlelib"} & set(one.parts):
            yield one


@contextmanager
def probes(declared: Mapping[str, Any], options: Options) -> Iterator[tuple[list[Network], list[Proof]]]:
    """Two containers in every network of every environment, in its slice; they are gone afterwards.

    Where they cannot be started, as in one that is at its limit of processes, is told as what should have worked: one
    environment does not keep the others from being proved.
    """
    mark = secrets.token_hex(4)
    try:
        wanted = [
            one
            for one in inspected("network", listed("network", "ls", "--filter", f"label={ENVIRONMENT}"))
            if one["Labels"].get(ENVIRONMENT) in declared
        ]
        made = image()
        with concurrent.futures.ThreadPoolExecutor(AT_A_TIME) as pool:
            begun = list(pool.map(lambda one: _started(one, declared, made, mark, options), wanted))
        yield [one for one in begun if isinstance(one, Network)], [one for one in begun if isinstance(one, Proof)]
    finally:
        left = subprocess.run(
            ["docker", "ps", "--all", "--quiet", "--filter", f"label={LABEL}={mark}"],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        ).stdout.split()
        if left:
            subprocess.run(["docker", "rm", "--force", *left], capture_output=True, timeout=SECONDS, check=False)


def _started(
    network: Mapping[str, Any], declared: Mapping[str, Any], made: str, mark: str, options: Options
) -> Network | Proof:
    try:
        return _probing(network, declared, made, mark, options)
    except (Undecided, subprocess.TimeoutExpired) as error:
        environment = network["Labels"][ENVIRONMENT]
        return Proof(environment, network["Name"], "probe", "starts in its slice", WORKS, f"not tried: {error}")


def _probing(
    network: Mapping[str, Any], declared: Mapping[str, Any], made: str, mark: str, options: Options
) -> Network:
    environment = network["Labels"][ENVIRONMENT]
    ids = {}
    for role in ("listener", "sender"):
        ids[role] = docker(
            *(
                "run",
                "--detach",
                "--label",
                f"{LABEL}={mark}",
                "--name",
                f"bulkhead-probe-{mark}-{network['Name']}-{role}",
            ),
            *("--network", network["Id"], "--network-alias", f"bulkhead-probe-{role}"),
            *("--cgroup-parent", declared[environment]["cgroup_parent"], "--oom-score-adj", "1000"),
            *options.extra,
            *(made, str(PYTHON), "-ESs", "/probe.py", "listen"),
        ).strip()
    (listener,) = inspected("container", [ids["listener"]])
    _listens(ids["listener"])
    gateways = told_gateways(network)
    attached = listener["NetworkSettings"]["Networks"].values()
    gateways += [net[key] for net in attached for key in ("Gateway", "IPv6Gateway") if net.get(key)]
    return Network(
        environment=environment,
        name=network["Name"],
        gateways=tuple(dict.fromkeys(gateways)),
        sender=ids["sender"],
        listener=ids["listener"],
        listens=tuple(addresses(attached)),
    )


def _listens(listener: str) -> None:
    """Waits until a listener answers: what comes before that is refused, and no proof of anything."""
    deadline = time.monotonic() + LISTENS_SECONDS
    while True:
        try:
            seen(listener)
            return
        except Undecided:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.1)


def seen(listener: str) -> str:
    """What a listener has seen, as JSON."""
    return docker("exec", listener, str(PYTHON), "-ESs", "/probe.py", "seen")


def asked(container: str, wanted: Sequence[Mapping[str, Any]]) -> list[str]:
    """What came of attempts that a probe makes: of each that it is not tried, where the probe does not say."""
    command = ["docker", "exec", "--interactive", container, str(PYTHON), "-ESs", "/probe.py", "attempt"]
    try:
        done = subprocess.run(
            command, input=json.dumps(list(wanted)), capture_output=True, text=True, timeout=SECONDS, check=False
        )
        found = [str(one) for one in json.loads(done.stdout)]
    except (ValueError, subprocess.TimeoutExpired):
        found = []
    return found if len(found) == len(wanted) else [NOT_TRIED] * len(wanted)


# --- The paths -----------------------------------------------------------------------------------------------


def token(sender: Network, receiver: Network) -> str:
    """What a packet between two networks carries, so that a listener knows whose it is."""
    return hashlib.sha256(f"{sender.sender} {receiver.listener}".encode()).hexdigest()[:16]


def tried(
    source: Network,
    networks: Sequence[Network],
    running: Sequence[Container],
    host: Host,
    declared: Mapping[str, Any],
    options: Options,
) -> list[Proof]:
    """Everything that is tried from one network."""
    wanted = [
        *within(source, running),
        *to_others(source, networks, running),
        *to_host(source, host, declared, options.named),
        *out_of_container(),
        *to_named(options.named),
    ]
    results = iter(asked(source.sender, [{"kind": one.kind, "with": dict(one.given)} for one in wanted if one.kind]))
    return [
        Proof(
            source.environment,
            source.name,
            one.path,
            one.target,
            one.expected,
            _said(one, next(results)) if one.kind else TOO_MANY,
        )
        for one in wanted
    ]


def _said(path: Way, result: str) -> str:
    """A name that both environments have leads each to its own container, and that is no way to the other's."""
    found = set(result.removeprefix("resolved ").split())
    if path.foreign and result.startswith("resolved ") and not found & set(path.foreign):
        return f"not found (its own: {' '.join(sorted(found))})"
    return result


def within(source: Network, running: Sequence[Container]) -> Iterator[Way]:
    """What must work: another container of the same network, by name and address, and the services there."""
    yield Way("name of a container", "bulkhead-probe-listener", "name", {"of": "bulkhead-probe-listener"}, WORKS)
    for address in source.listens:
        target = f"{address} in {source.name}"
        yield Way("container, TCP", f"{target}, port {probe.PORT}", "tcp", {"to": address, "port": probe.PORT}, WORKS)
        if ":" not in address:
            given = {"to": address, "port": probe.PORT, "token": token(source, source)}
            yield Way("container, UDP", f"{target}, port {probe.PORT}", "udp", given, WORKS)
        yield Way("container, ICMP", target, "icmp", {"to": address, "token": token(source, source)}, WORKS)
    for one in running:
        if one.environment == source.environment and source.name in one.networks:
            yield Way("name of a service", one.name, "name", {"of": one.name}, WORKS)


def to_others(source: Network, networks: Sequence[Network], running: Sequence[Container]) -> Iterator[Way]:
    """Containers of every other environment by address and name, and forged senders."""
    for one in running:
        if one.environment == source.environment:
            continue
        for address in one.addresses:
            yield from to_address("container", f"{one.name} ({address})", address, one)
        for name in one.names:
            yield Way(
                "name of a container", f"{name} of {one.environment}", "name", {"of": name}, foreign=one.addresses
            )
    for other in networks:
        if other.environment == source.environment:
            continue
        for address in other.listens:
            target = f"{other.name} ({address})"
            mark = token(source, other)
            yield Way("container, TCP", f"{target}, port {probe.PORT}", "tcp", {"to": address, "port": probe.PORT})
            given = {"to": address, "port": probe.PORT, "token": mark}
            yield Way("container, UDP", f"{target}, port {probe.PORT}", "udp", given)
            yield Way("container, ICMP", target, "icmp", {"to": address, "token": mark})


def to_address(what: str, target: str, address: str, listening: Container | Host) -> Iterator[Way]:
    """What listens at an address, a closed port, ICMP."""
    for protocol, found, token in (("tcp", listening.tcp, {}), ("udp", listening.udp, {"token": "x"})):
        path = f"{what}, {protocol.upper()}"
        for port in (*found[:PORTS_AT_MOST], CLOSED):
            yield Way(path, f"{target}, port {port}", protocol, {"to": address, "port": port, **token})
        if found[PORTS_AT_MOST:]:
            yield Way(path, f"{target}, {len(found) - PORTS_AT_MOST} more ports", "", {})
    yield Way(f"{what}, ICMP", target, "icmp", {"to": address, "token": "x"})


def to_host(source: Network, host: Host, declared: Mapping[str, Any], named: Named) -> Iterator[Way]:
    """The host by the gateway address of every bridge: what listens there, a closed port, UDP, ICMP, IPv6.

    A protected environment may talk to the host, so of it only the gateways of others' networks are no way: what is
    published there by best-effort environments is on loopback, which policy sees to.
    """
    if declared[source.environment]["tier"] == "protected":
        return
    targets = {**host.gateways, **dict.fromkeys(named.outward, "the host's own address")}
    for address, network in sorted(targets.items()):
        whose = "its own network" if address in source.gateways else network
        yield from to_address("host", f"{address} ({whose})", address, host)


def out_of_container() -> Iterator[Way]:
    """The engine's socket, the kernel's switches, the limits of its own group, the host's disks and processes."""
    for path in SOCKETS:
        yield Way("engine's socket", path, "unix", {"path": path})
    for path in OUT_OF_CONTAINER:
        yield Way("file of the host's kernel", path, "write", {"path": path})
    for major, minor in sorted(disks()):
        yield Way("disk of the host", f"{major}:{minor}", "device", {"major": major, "minor": minor})
    for kind in MOUNTS:
        yield Way("mount", kind, "mount", {"kind": kind})
    yield Way("processes of the host", "/proc", "processes", {})


def disks() -> set[tuple[int, int]]:
    """Numbers of the block devices that hold the host's file systems."""
    found = set()
    for file in Path("/sys/class/block").glob("*/dev"):
        if not file.parent.name.startswith(("loop", "ram", "zram")):
            major, _, minor = file.read_text().strip().partition(":")
            found.add((int(major), int(minor)))
    return found


def to_named(named: Named) -> Iterator[Way]:
    """Targets that the user named: the prober itself knows of no address beyond the host."""
    for one, expected in (*product(named.forbidden, [BLOCKED]), *product(named.allowed, [WORKS])):
        address, _, port = one.rpartition(":")
        given = {"to": address.strip("[]"), "port": int(port)}
        yield Way("named target, TCP", one, "tcp", given, expected)
        if expected == BLOCKED:
            yield Way("named target, UDP", one, "udp", {**given, "token": "x"})
            yield Way("named target, ICMP", address, "icmp", {"to": given["to"], "token": "x"})


def arrivals(networks: Sequence[Network], chosen: Sequence[str]) -> Iterator[Proof]:
    """Packets with a forged sender, and what each listener saw of other environments: nothing may have come."""
    pairs = [
        (source, other)
        for source, other in product(networks, networks)
        if source.environment in chosen and source.environment != other.environment
    ]
    forged: dict[tuple[str, str], str] = {}
    for source in networks:
        mine = [(one, other) for one, other in pairs if one is source]
        wanted = [
            {"kind": "forged", "with": {"sender": sender, "to": to, "token": f"f{token(source, other)}"}}
            for _, other in mine
            for to in other.listens
            if ":" not in to
            # Somebody of that network, and somebody of no environment: either may be believed over there.
            for sender in (_neighbour(to), "192.0.2.1")
        ]
        results = asked(source.sender, wanted) if wanted else []
        sent = [result for result in results if result == "sent"]
        for one, other in mine:
            forged[one.sender, other.listener] = "" if sent or not results else results[0]
    seen = {one.listener: heard(one) for one in networks}
    for source, other in pairs:
        mark = token(source, other)
        came = sorted({f"{kind} from {sender}" for kind, sender, _, found in seen[other.listener] if found == mark})
        arrived = f"arrived: {', '.join(came)}" if came else "not seen"
        yield Proof(source.environment, source.name, "any packet", f"listener in {other.name}", BLOCKED, arrived)
        came = sorted(
            {f"{kind} from {sender}" for kind, sender, _, found in seen[other.listener] if found == f"f{mark}"}
        )
        refused = forged[source.sender, other.listener]
        arrived = f"arrived: {', '.join(came)}" if came else refused or "not seen"
        yield Proof(source.environment, source.name, "forged sender", f"listener in {other.name}", BLOCKED, arrived)
    for source in networks:
        if source.environment in chosen:
            mark = token(source, source)
            arrived = "answered" if any(found == mark for *_, found in seen[source.listener]) else "not seen"
            yield Proof(source.environment, source.name, "any packet", f"listener in {source.name}", WORKS, arrived)


def _neighbour(address: str) -> str:
    return str(ipaddress.IPv4Address((int(ipaddress.IPv4Address(address)) & ~0xFF) | 0xFA))


def heard(network: Network) -> list[tuple[str, str, int, str]]:
    """What a listener has seen."""
    found = json.loads(seen(network.listener))
    return [(str(kind), str(sender), int(port), str(token)) for kind, sender, port, token in found]


def ceilings(name: str, declared: Mapping[str, Any], source: Network) -> Iterator[Proof]:
    """The environment's limits of processes and memory, by running into them: the probe is killed first."""
    limits = (declared.get("budget") or {}).get("limits") or {}
    if limits.get("pids"):
        most = int(limits["pids"]) + 16
        (result,) = asked(source.sender, [{"kind": "fork", "with": {"most": most}}])
        yield Proof(name, source.name, "processes", f"more than {limits['pids']}", BLOCKED, result)
    if limits.get("memory"):
        most = int(limits["memory"]) + 64 * 2**20
        (result,) = asked(source.sender, [{"kind": "memory", "with": {"most": most}}])
        yield Proof(name, source.name, "memory", f"more than {int(limits['memory']) // 2**20} MiB", BLOCKED, result)
