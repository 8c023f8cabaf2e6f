"""The proof on a real deployment: no path is open; and each path, opened on purpose, turns it red.
What is opened is closed again at once, also when a test fails."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import docker
import pytest

from host.machine import Places
from host.prove import Named, Options, Proof, disks, prove
from tests.e2e.conftest import DEV, PORTS, PROD, Deployment, running

pytestmark = pytest.mark.e2e

FIREWALL = Path("/etc/bulkhead/firewall.nft")
WORLD = f"bh{os.getpid()}-world"
INTERNET, METADATA = "198.51.100.10", "169.254.169.254"
# Each of these is a violation of a policy, and opens one kind of path.
PRIVILEGED = (
    "--cap-add=SYS_ADMIN",
    "--security-opt=seccomp=unconfined",
    "--security-opt=apparmor=unconfined",
    "--device-cgroup-rule=b *:* rwm",
    "--pid=host",
    "--volume=/var/run/docker.sock:/var/run/docker.sock",
    "--volume=/sys/fs/cgroup:/sys/fs/cgroup",
)


def tried(*extra: str, ceilings: bool = False, named: Named | None = None) -> list[Proof]:
    """A proof from dev."""
    return prove(Places(), Options(named or Named(), ceilings, (DEV,), extra))


def red(proofs: Sequence[Proof]) -> set[str]:
    """The paths on which something came that was not expected."""
    return {one.path for one in proofs if not one.ok}


def shell(script: str) -> None:
    subprocess.run(["/bin/sh", "-euc", script], check=True, capture_output=True)


@contextmanager
def opened(script: str, close: str) -> Iterator[None]:
    """Something opened by hand, and closed again."""
    try:
        shell(script)
        yield
    finally:
        shell(close)


NO_TABLE = ("nft delete table inet bulkhead", f"nft --file {FIREWALL}")


def test_every_path_is_tried_and_none_is_open(live: Deployment) -> None:
    """Through the command that a user gives, with the ceilings."""
    shown = live.done("prove")
    assert ": 0 unexpected" in shown
    proofs = json.loads(Path("/var/lib/bulkhead/prove.json").read_text())["proofs"]
    assert {(one["path"], one["expected"]) for one in proofs} == {
        *((f"{what}, {kind}", "blocked") for what in ("container", "host") for kind in ("TCP", "UDP", "ICMP")),
        *((f"container, {kind}", "works") for kind in ("TCP", "UDP", "ICMP")),
        ("name of a container", "blocked"),
        ("name of a container", "works"),
        ("name of a service", "works"),
        ("any packet", "blocked"),
        ("any packet", "works"),
        ("forged sender", "blocked"),
        ("engine's socket", "blocked"),
        ("file of the host's kernel", "blocked"),
        ("disk of the host", "blocked"),
        ("mount", "blocked"),
        ("processes of the host", "blocked"),
        ("processes", "blocked"),
        ("memory", "blocked"),
    }
    assert {one["environment"] for one in proofs} == {PROD, DEV}
    targets = {one["target"] for one in proofs if one["source"] == f"{DEV}-frontend" and one["path"] == "host, TCP"}
    # The four ways to a published port: its own gateway, the engine's bridge, and those of both of prod's networks.
    for way in ("its own network", "bridge", f"{PROD}-frontend", f"{PROD}-backend"):
        assert any(f"({way}), port {PORTS[PROD]}" in target for target in targets), way


def test_it_is_the_last_step_of_a_deploy_which_fails_with_it(live: Deployment) -> None:
    assert "Proof: " in live.done("up", DEV)
    with opened(*NO_TABLE):
        failed = live.make("up", DEV)
    assert failed.returncode != 0
    assert "Paths that did not come as expected" in failed.stdout


def test_gateways_and_forged_senders_turn_it_red_without_the_firewall(live: Deployment) -> None:
    with opened(*NO_TABLE):
        proofs = tried()
    assert {"host, TCP", "host, UDP", "host, ICMP", "forged sender"} <= red(proofs)
    wrong = [one for one in proofs if not one.ok and one.source == f"{DEV}-frontend" and one.path == "host, TCP"]
    for way in ("its own network", "bridge", f"{PROD}-frontend", f"{PROD}-backend"):
        assert [one for one in wrong if f"({way}), port {PORTS[PROD]}" in one.target], way


def test_container_addresses_turn_it_red_where_the_engine_forwards(live: Deployment) -> None:
    accept = "FORWARD -s 10.92.0.0/16 -d 10.91.0.0/16 -j ACCEPT"
    back = "FORWARD -s 10.91.0.0/16 -d 10.92.0.0/16 -j ACCEPT"
    forwarded = (
        f"{NO_TABLE[0]}; iptables -I {accept}; iptables -I {back}",
        f"iptables -D {accept} || true; iptables -D {back} || true; {NO_TABLE[1]}",
    )
    with opened(*forwarded):
        wrong = red(tried())
    assert {"container, TCP", "container, UDP", "container, ICMP", "any packet"} <= wrong


def test_ipv6_turns_it_red_without_the_firewall(live: Deployment, engine: docker.DockerClient) -> None:
    made = []
    try:
        for name, four, six in (
            (DEV, "10.92.250.0/24", "fd92:0:0:9::/64"),
            (PROD, "10.91.250.0/24", "fd91:0:0:9::/64"),
        ):
            pools = [docker.types.IPAMPool(subnet=four), docker.types.IPAMPool(subnet=six)]
            labels = {"bulkhead.environment": name}
            ipam = docker.types.IPAMConfig(pool_configs=pools)
            made.append(engine.networks.create(f"{name}-six", enable_ipv6=True, ipam=ipam, labels=labels))
        assert not [one for one in tried() if not one.ok]
        with opened(*NO_TABLE):
            wrong = [one for one in tried() if not one.ok and "fd91:" in one.target and one.source == f"{DEV}-six"]
    finally:
        for network in made:
            network.remove()
    assert {"host, TCP", "host, UDP", "host, ICMP", "container, TCP", "container, ICMP"} <= {one.path for one in wrong}


def test_a_container_of_prod_on_a_network_of_dev_turns_it_red(live: Deployment, engine: docker.DockerClient) -> None:
    database = next(one for one in running(engine, PROD) if one.labels["bulkhead.service"] == "db")
    network = engine.networks.list(names=[f"{DEV}-backend"])[0]
    network.connect(database, aliases=["prod-database"])
    try:
        wrong = red(tried())
    finally:
        network.disconnect(database)
    assert {"container, TCP", "container, ICMP", "name of a container"} <= wrong


def test_a_privileged_container_turns_it_red(live: Deployment) -> None:
    proofs = tried(*PRIVILEGED)
    wrong = {"engine's socket", "file of the host's kernel", "mount", "processes of the host"}
    if any(readable(Path("/dev") / Path(f"/sys/dev/block/{one}:{two}").resolve().name) for one, two in disks()):
        wrong |= {"disk of the host"}  # a machine may keep its disks even from root
    assert wrong <= red(proofs)


def readable(disk: Path) -> bool:
    try:
        os.close(os.open(disk, os.O_RDONLY))
    except OSError:
        return False
    return True


def test_ceilings_that_were_raised_turn_it_red(live: Deployment) -> None:
    declared = json.loads(Path("/etc/bulkhead/host.json").read_text())["environments"][DEV]["files"]
    limits = {path: value for path, value in declared.items() if path.rpartition("/")[2] in CEILINGS}
    assert limits
    raised = "\n".join(f"echo {CEILINGS[path.rpartition('/')[2]]} > {path}" for path in reversed(limits))
    with opened(raised, "\n".join(f"echo {value} > {path}" for path, value in limits.items())):
        wrong = red(tried(ceilings=True))
    assert {"processes", "memory"} <= wrong


CEILINGS = {
    "memory.limit_in_bytes": "-1",
    "memory.memsw.limit_in_bytes": "-1",
    "memory.max": "max",
    "memory.high": "max",
    "pids.max": "max",
}


def test_a_host_where_nothing_works_cannot_pass(live: Deployment) -> None:
    mute = "table bridge bulkhead_test { chain cut { type filter hook forward priority 0; policy drop; }; }"
    with opened(f"nft '{mute}'", "nft delete table bridge bulkhead_test"):
        wrong = {one.path for one in tried() if one.expected == "works" and not one.ok}
    assert {"container, TCP", "container, UDP", "container, ICMP", "any packet"} <= wrong
    wrong = {one.path for one in tried("--volume=/dev/null:/etc/resolv.conf") if one.expected == "works" and not one.ok}
    assert wrong == {"name of a container", "name of a service"}


@pytest.fixture
def world() -> Iterator[None]:
    """A host beyond ours that plays the internet and the cloud's metadata service: a network namespace."""
    listen = "import socket\ns = socket.create_server(('', 8080))\nprint('up', flush=True)\nwhile True: s.accept()"
    served: subprocess.Popen[bytes] | None = None
    try:
        shell(
            f"ip netns add {WORLD}; ip link add bhworld type veth peer name eth0 netns {WORLD}\n"
            f"ip address add 192.0.2.1/30 dev bhworld; ip link set bhworld up\n"
            f"ip -n {WORLD} address add 192.0.2.2/30 dev eth0; ip -n {WORLD} link set eth0 up\n"
            f"ip -n {WORLD} link set lo up; ip -n {WORLD} route add default via 192.0.2.1\n"
            + "".join(
                f"ip -n {WORLD} address add {one} dev lo; ip route add {one} via 192.0.2.2 dev bhworld\n"
                for one in (INTERNET, METADATA)
            )
        )
        served = subprocess.Popen(["ip", "netns", "exec", WORLD, sys.executable, "-c", listen], stdout=subprocess.PIPE)
        assert served.stdout is not None
        assert served.stdout.readline() == b"up\n"
        yield
    finally:
        if served is not None:
            served.kill()
            served.communicate()
        with suppress(subprocess.CalledProcessError):
            shell(f"ip link delete bhworld; ip netns delete {WORLD}")


def test_egress_is_as_the_ledger_says_and_metadata_is_never_reached(live: Deployment, world: None) -> None:
    named = Named(forbidden=(f"{METADATA}:8080",), allowed=(f"{INTERNET}:8080",))
    proofs = [one for one in tried(named=named) if one.path.startswith("named target")]
    # A network that is internal has no way out at all.
    internal = {one.source for one in proofs if one.target == f"{INTERNET}:8080" and not one.ok}
    assert internal == {f"{DEV}-backend"}
    assert {one.target for one in proofs if not one.ok} == {f"{INTERNET}:8080"}
    assert {one.path for one in proofs} == {"named target, TCP", "named target, UDP", "named target, ICMP"}
    with opened(*NO_TABLE):
        wrong = [one for one in tried(named=named) if not one.ok and METADATA in one.target]
    assert {one.path for one in wrong} == {"named target, TCP", "named target, UDP", "named target, ICMP"}
