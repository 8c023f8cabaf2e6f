"""The firewall's table in the kernel: a host, containers and the world around it, all network namespaces of our own.
Without the table every path here is open; with it only those that the ledger opens."""

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from ipaddress import IPv4Network, IPv6Network, ip_network
from pathlib import Path
from typing import Any

import pytest

from cli.agent import Agent
from components.firewall import CONNECTIONS, ruleset
from host import verify
from settings.ledger import Egress, Environment, Tier
from tests.deployed import CHECKOUT

pytestmark = pytest.mark.e2e

MARK = f"bh{os.getpid()}"
HOST, WORLD, NEIGHBOUR = f"{MARK}-host", f"{MARK}-world", f"{MARK}-neighbour"
PORT, DNS, CLOSED = 8080, 53, 9
RESOLVER = "the host's name server"
WORLD_ADDRESSES = {
    "internet": "198.51.100.10",
    "internet, IPv6": "2001:db8::10",
    "private network": "192.168.77.5",
    RESOLVER: "192.168.77.53",
    "metadata": "169.254.169.254",
    "metadata of Azure": "168.63.129.16",
    "metadata of Oracle": "192.0.0.192",
    "unique local IPv6": "fd00:ec2::254",
}
CONTAINERS = {
    "dev": ("dev-x", "10.92.1.{}", "fd92::{}"),  # a name that dev has chosen, as policy lets it
    "prod": ("br-prod", "10.91.1.{}", "fd91::{}"),
    "staging": ("br-stag", "10.93.1.{}", None),
    "build": ("docker0", "172.17.0.{}", None),
    "stranger": ("br-other", "10.77.1.{}", None),
}
SUBNET = IPv4Network("10.92.0.0/16")
SUBNETS = {
    "dev": ("10.92.0.0/16", "fd92::/48"),
    "prod": ("10.91.0.0/16", "fd91::/48"),
    "staging": ("10.93.0.0/16", None),
}


def ip(*words: str, where: str = "") -> None:
    """`ip`, in a namespace."""
    subprocess.run(["ip", *(["-netns", where] if where else []), *words], check=True, capture_output=True)


def inside(namespace: str, *words: str, stdin: str = "") -> str:
    """A command's output in a namespace."""
    done = subprocess.run(
        ["ip", "netns", "exec", namespace, *words],
        input=stdin,
        capture_output=True,
        text=True,
        check=True,
        cwd=CHECKOUT,
    )
    return done.stdout


@pytest.fixture(scope="module")
def network() -> Iterator[None]:
    """The namespaces, with a listener in each; all of it is gone afterwards."""
    spaces = [HOST, WORLD, NEIGHBOUR, *(f"{MARK}-{name}" for name in CONTAINERS)]
    listeners: list[subprocess.Popen[bytes]] = []
    try:
        for space in spaces:
            ip("netns", "add", space)
            ip("link", "set", "lo", "up", where=space)
        _wired()
        for space in spaces:
            command = ["ip", "netns", "exec", space, sys.executable, "-c", LISTENER, str(PORT), str(DNS)]
            listeners.append(subprocess.Popen(command, cwd=CHECKOUT, stdout=subprocess.PIPE))
        for listener in listeners:
            assert listener.stdout is not None
            assert listener.stdout.readline() == b"ready\n"
        time.sleep(2)  # IPv6 looks for duplicates of its addresses first
        yield
    finally:
        for listener in listeners:
            listener.kill()
            listener.communicate()
        for space in spaces:
            with suppress(subprocess.CalledProcessError):
                ip("netns", "delete", space)


LISTENER = """
import socket, sys, threading
def tcp(port):
    server = socket.create_server(("::", int(port)), family=socket.AF_INET6, dualstack_ipv6=True)
    while True:
        server.accept()[0].close()
def udp(port):
    server = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)
    server.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_RECVPKTINFO, 1)
    server.bind(("::", int(port)))
    while True:
        said, told, _, sender = server.recvmsg(1500, 64)
        server.sendmsg([said], told, 0, sender)  # from the address that was asked
for port in sys.argv[1:]:
    for serve in (tcp, udp):
        threading.Thread(target=serve, args=(port,), daemon=True).start()
print("ready", flush=True)
threading.Event().wait()
"""


def _wired() -> None:
    for setting in ("net.ipv4.ip_forward=1", "net.ipv6.conf.all.forwarding=1", "net.ipv4.conf.all.rp_filter=0"):
        inside(HOST, "sysctl", "-qw", setting)
    for name, (bridge, four, six) in CONTAINERS.items():
        space = f"{MARK}-{name}"
        ip("link", "add", bridge, "type", "bridge", where=HOST)
        ip("link", "add", f"v-{name}", "type", "veth", "peer", "name", "eth0", "netns", space, where=HOST)
        ip("link", "set", f"v-{name}", "master", bridge, "up", where=HOST)
        ip("link", "set", bridge, "up", where=HOST)
        ip("link", "set", "eth0", "up", where=space)
        for form, length in ((four, "24"), (six, "64")):
            if form:
                ip("address", "add", f"{form.format(1)}/{length}", "dev", bridge, where=HOST)
                ip("address", "add", f"{form.format(2)}/{length}", "dev", "eth0", where=space)
                ip("route", "add", "default", "via", form.format(1), where=space)
    # Another container of dev's, on the same bridge.
    ip("link", "add", "v-neighbour", "type", "veth", "peer", "name", "eth0", "netns", NEIGHBOUR, where=HOST)
    ip("link", "set", "v-neighbour", "master", "dev-x", "up", where=HOST)
    ip("link", "set", "eth0", "up", where=NEIGHBOUR)
    ip("address", "add", "10.92.1.3/24", "dev", "eth0", where=NEIGHBOUR)
    ip("link", "add", "eth0", "type", "veth", "peer", "name", "eth0", "netns", WORLD, where=HOST)
    for space, own in (
        (HOST, ("192.0.2.1/24", "2001:db8:ffff::1/64")),
        (WORLD, ("192.0.2.2/24", "2001:db8:ffff::2/64")),
    ):
        ip("link", "set", "eth0", "up", where=space)
        for address in own:
            ip("address", "add", address, "dev", "eth0", where=space)
    for address in WORLD_ADDRESSES.values():
        ip("address", "add", address, "dev", "lo", where=WORLD)
    for there, here in ((WORLD, "192.0.2.1"), (HOST, "192.0.2.2")):
        ip("route", "add", "default", "via", here, where=there)
    for there, here in ((WORLD, "2001:db8:ffff::1"), (HOST, "2001:db8:ffff::2")):
        ip("route", "add", "default", "via", here, where=there)


def loaded(egress: Mapping[str, Egress | None] | None, connections: int = CONNECTIONS) -> None:
    """Loads the table of three environments, of which these have such an egress; none for None."""
    inside(HOST, "nft", "flush", "ruleset")
    if egress is None:
        return
    environments = [
        Environment(
            name=name,
            tier=Tier.PROTECTED if name == "prod" else Tier.BEST_EFFORT,
            subnet=IPv4Network(four),
            subnet6=None if six is None else IPv6Network(six),
            egress=egress.get(name),
        )
        for name, (four, six) in SUBNETS.items()
    ]
    resolver = f"elements = {{ {WORLD_ADDRESSES[RESOLVER]} }};"
    text = ruleset(environments, connections).replace("@RESOLVERS4@", resolver).replace("@RESOLVERS6@", "")
    inside(HOST, "nft", "--file", "-", stdin=text)


def targets(source: str) -> dict[str, tuple[str, int]]:
    """Everywhere that a container may try to go: address and port by what it is."""
    found = {name: (address, PORT) for name, address in WORLD_ADDRESSES.items()}
    found[f"{RESOLVER}, DNS"] = (WORLD_ADDRESSES[RESOLVER], DNS)
    found["the host's own address"] = ("192.0.2.1", PORT)
    for name, (_, four, six) in CONTAINERS.items():
        found[f"gateway of {name}"] = (four.format(1), PORT)
        if name != source:
            found[f"container of {name}"] = (four.format(2), PORT)
        if six and CONTAINERS[source][2]:
            found[f"gateway of {name}, IPv6"] = (six.format(1), PORT)
            if name != source:
                found[f"container of {name}, IPv6"] = (six.format(2), PORT)
    if CONTAINERS[source][2] is None:
        found = {name: to for name, to in found.items() if ":" not in to[0]}
    return found


def reached(source: str) -> set[str]:
    """What a container really reaches: a refusal has come from there too."""
    wanted = targets(source)
    attempts: list[dict[str, Any]] = [
        {"kind": "tcp", "with": {"to": address, "port": port}} for address, port in wanted.values()
    ]
    script = "import json, sys; from host.probe import attempt; print(json.dumps(attempt(json.load(sys.stdin))))"
    said = json.loads(inside(f"{MARK}-{source}", sys.executable, "-c", script, stdin=json.dumps(attempts)))
    return {name for name, result in zip(wanted, said, strict=True) if result in ("connected", "refused")}


def dropped(chain: str, rule: str) -> int:
    """Packets that the rules of a chain with this comment have dropped, as `make firewall` shows them."""
    here = Agent(None)
    here._root = partial(inside, HOST, "sh", "-c")  # type: ignore[method-assign]
    return sum(one["packets"] for one in here.firewall() if (one["chain"], one["rule"]) == (chain, rule))


def link_local(namespace: str, interface: str) -> str:
    """The link-local address of an interface, as who is on the same link through its `eth0` writes it."""
    shown = json.loads(inside(namespace, "ip", "-json", "address", "show", "dev", interface))
    return next(f"{info['local']}%eth0" for info in shown[0]["addr_info"] if info["scope"] == "link")


def answered(source: str, to: str, flows: int, port: int = PORT) -> list[int]:
    """Which of so many flows are answered: of each a datagram, and at the end another one of those that were."""
    script = """
import socket, sys
flows = []
for number in range(int(sys.argv[3])):
    one = socket.socket(socket.AF_INET6 if ":" in sys.argv[1] else socket.AF_INET, socket.SOCK_DGRAM)
    one.connect(socket.getaddrinfo(*sys.argv[1:3], type=socket.SOCK_DGRAM)[0][4])
    one.settimeout(0.5)
    flows.append((number, one))
for asked in range(2):
    for number, one in list(flows):
        try:
            one.send(b"x")
            one.recv(10)
        except OSError:
            flows.remove((number, one))
print(*(number for number, _ in flows))
"""
    said = inside(f"{MARK}-{source}", sys.executable, "-c", script, to, str(port), str(flows))
    return [int(one) for one in said.split()]


def world(*names: str) -> set[str]:
    return set(names)


OUTSIDE = world(*WORLD_ADDRESSES, f"{RESOLVER}, DNS")
PUBLIC = world("internet", "internet, IPv6", f"{RESOLVER}, DNS")


@pytest.mark.parametrize("source", CONTAINERS)
def test_without_the_table_everything_is_reached(source: str, network: None) -> None:
    loaded(None)
    assert reached(source) == set(targets(source))


@pytest.mark.parametrize(
    ("egress", "expected"),
    [
        (("internet",), PUBLIC),
        (("none",), set()),
        ((ip_network("192.168.77.0/28"),), world("private network", f"{RESOLVER}, DNS")),
        (("internet", ip_network("192.168.77.0/28")), PUBLIC | world("private network")),
        (
            (ip_network("169.254.0.0/16"), ip_network("2001:db8::/64")),
            world("internet, IPv6", f"{RESOLVER}, DNS"),
        ),
    ],
    ids=["internet", "none", "a private network", "internet and a private network", "link-local is never opened"],
)
def test_a_best_effort_environment_reaches_what_its_egress_says_and_nothing_of_the_host_or_of_others(
    egress: Sequence[Any], expected: set[str], network: None
) -> None:
    loaded({"dev": tuple(egress), "staging": ("internet",)})
    assert reached("dev") == expected


def test_an_environment_without_ipv6_and_two_best_effort_ones_are_kept_apart_too(network: None) -> None:
    loaded({"dev": ("internet",), "staging": ("internet",)})
    assert reached("staging") == {name for name in PUBLIC if "IPv6" not in name}


def test_a_protected_environment_reaches_all_but_other_environments(network: None) -> None:
    loaded({"dev": ("internet",), "staging": ("internet",)})
    closed = {f"container of {name}{six}" for name in ("dev", "staging") for six in ("", ", IPv6")}
    # The gateways of others' networks are in their ranges.
    closed |= {f"gateway of {name}{six}" for name in ("dev", "staging") for six in ("", ", IPv6")}
    assert reached("prod") == set(targets("prod")) - closed


def test_builds_reach_what_they_build_from_and_nothing_of_the_host_or_of_an_environment(network: None) -> None:
    loaded({"dev": ("internet",), "staging": ("internet",)})
    assert reached("build") == {
        "internet",
        "private network",
        "the host's name server",
        f"{RESOLVER}, DNS",
    } | {"container of stranger"}


def test_containers_of_nobody_reach_no_environment(network: None) -> None:
    loaded({"dev": ("internet",), "staging": ("internet",)})
    closed = {f"{what} of {name}" for what in ("container", "gateway") for name in SUBNETS}
    assert reached("stranger") == set(targets("stranger")) - closed


def test_the_host_reaches_its_containers_and_they_answer(network: None) -> None:
    loaded({"dev": ("none",), "staging": ("internet",)})
    script = "import socket, sys; [socket.create_connection((to, int(sys.argv[1])), 2).close() for to in sys.argv[2:]]"
    inside(HOST, sys.executable, "-c", script, str(PORT), "10.92.1.2", "10.91.1.2", "fd92::2")


def test_a_forged_sender_is_dropped(network: None) -> None:
    loaded({"dev": ("internet",), "staging": ("internet",)})
    script = "from host.probe import forged; print(forged('10.91.1.77', '10.91.1.2', 'x'))"
    assert inside(f"{MARK}-dev", sys.executable, "-c", script).strip() == "sent"
    assert dropped("sent", "forged sender") >= 2


def test_a_sender_of_no_environment_is_forged_too_where_containers_are(network: None) -> None:
    """IPv6 needs no privilege for it: a socket may be bound to any address (IPV6_FREEBIND)."""
    loaded({"dev": ("internet",), "staging": ("internet",)})
    script = """
import socket
from host.probe import forged
print(forged("203.0.113.7", "10.92.1.1", "x"))
one = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)
one.setsockopt(socket.IPPROTO_IPV6, 78, 1)
one.bind(("2001:db8:bad::1", 0))
one.sendto(b"x", ("fd92::1", 8080))
"""
    assert inside(f"{MARK}-dev", sys.executable, "-c", script).strip() == "sent"
    assert dropped("sent", "forged sender") == 3


@pytest.mark.parametrize("source", ["dev", "prod"], ids=["named by dev", "named by the engine"])
def test_the_host_is_not_reached_by_its_link_local_address(source: str, network: None) -> None:
    host = link_local(HOST, CONTAINERS[source][0])
    loaded(None)
    assert answered(source, host, 1) == [0]
    loaded({"dev": ("internet",), "staging": ("internet",)})
    assert answered(source, host, 1) == []
    assert dropped("arrived", "link-local IPv6 to the host") == 1


# Of so small a table each share is of 96: 6 connections open, 12 new ones at once.
SMALL, OPEN, AT_ONCE = 768, 6, 12


@pytest.mark.parametrize(
    ("source", "to", "port", "chain"),
    [
        ("dev", WORLD_ADDRESSES["internet"], PORT, "dev"),
        ("dev", WORLD_ADDRESSES["internet, IPv6"], PORT, "dev"),
        ("dev", WORLD_ADDRESSES[RESOLVER], DNS, "dev"),
        ("dev", WORLD_ADDRESSES["private network"], PORT, "dev"),
        ("dev", "link-local", PORT, "link_local"),
        ("build", WORLD_ADDRESSES["internet"], PORT, "default_bridge"),
        ("build", WORLD_ADDRESSES[RESOLVER], DNS, "default_bridge"),
    ],
    ids=["internet", "IPv6", "DNS", "a listed network", "link-local", "builds", "DNS of builds"],
)
def test_connections_beyond_an_environments_share_are_dropped_and_those_within_it_go_on(
    source: str, to: str, port: int, chain: str, network: None
) -> None:
    loaded({"dev": ("internet", ip_network("192.168.77.0/28")), "staging": ("internet",)}, SMALL)
    before = inside(HOST, "nft", "--stateless", "list", "table", "inet", "bulkhead")
    to = link_local(NEIGHBOUR, "eth0") if to == "link-local" else to
    assert answered(source, to, OPEN + 2, port) == list(range(OPEN))
    assert dropped(f"tracked_of_{chain}", "too many open connections") == 2
    # It is counted without a change of the table, which the agent compares.
    after = inside(HOST, "nft", "--stateless", "list", "table", "inet", "bulkhead")
    assert not list(verify.firewall("inet bulkhead", before, after))


def test_a_share_is_of_all_that_an_environment_opens_and_of_nobody_else(network: None) -> None:
    loaded({"dev": ("internet",), "staging": ("internet",)}, SMALL)
    assert len(answered("dev", WORLD_ADDRESSES["internet"], OPEN // 2)) == OPEN // 2
    assert len(answered("dev", WORLD_ADDRESSES["internet, IPv6"], OPEN // 2)) == OPEN // 2
    for to in (WORLD_ADDRESSES["internet"], WORLD_ADDRESSES["internet, IPv6"]):
        assert answered("dev", to, 1) == []
    for others in ("staging", "build"):
        assert len(answered(others, WORLD_ADDRESSES["internet"], OPEN)) == OPEN
    assert len(answered("prod", WORLD_ADDRESSES["internet"], 2 * AT_ONCE)) == 2 * AT_ONCE


def test_between_services_of_one_environment_nothing_is_tracked_nor_held_up(network: None) -> None:
    loaded({"dev": ("internet",), "staging": ("internet",)}, SMALL)
    tracked = Path("/proc/sys/net/netfilter/nf_conntrack_count")
    before = int(inside(HOST, "cat", str(tracked)))
    assert len(answered("dev", "10.92.1.3", 2 * AT_ONCE)) == 2 * AT_ONCE
    assert int(inside(HOST, "cat", str(tracked))) <= before
    assert dropped("tracked_of_dev", "too many open connections") == 0


def test_connections_that_are_closed_again_at_once_have_a_rate(network: None) -> None:
    """They stay in the kernel's table for a while, where `ct count` does not see them."""
    loaded({"dev": ("internet",), "staging": ("internet",)}, SMALL)
    script = """
import sys, time
from host.probe import tcp
print(*(time.sleep(0.02) or tcp(sys.argv[1], int(sys.argv[2])) for _ in range(int(sys.argv[3]))), sep="\\n")
"""
    to = (WORLD_ADDRESSES["internet"], str(CLOSED), str(AT_ONCE + 3))
    said = inside(f"{MARK}-dev", sys.executable, "-c", script, *to).splitlines()
    assert said[:AT_ONCE] == ["refused"] * AT_ONCE
    assert "no answer" in said[AT_ONCE:]  # one more may pass each second
    assert dropped("tracked_of_dev", "too many new connections") >= 1
    assert dropped("tracked_of_dev", "too many open connections") == 0


SEND = """
import socket, sys
one = None
for number in range(int(sys.argv[3])):
    one = socket.socket(socket.AF_INET, socket.SOCK_DGRAM) if number == 0 or sys.argv[4] == "new" else one
    one.sendto(b"x", (sys.argv[1], int(sys.argv[2])))
"""


def test_what_is_sent_to_many_is_counted_too_and_a_stream_that_nobody_answers_once(network: None) -> None:
    loaded({"dev": ("internet",), "staging": ("internet",)}, SMALL)
    stream = (WORLD_ADDRESSES["internet"], str(CLOSED), str(2 * AT_ONCE), "same")
    inside(f"{MARK}-dev", sys.executable, "-c", SEND, *stream)
    assert dropped("tracked_of_dev", "too many new connections") == 0
    inside(f"{MARK}-dev", sys.executable, "-c", SEND, "239.1.2.3", str(PORT), str(OPEN + 1), "new")
    assert dropped("tracked_of_dev", "too many open connections") == 2


def test_an_environment_may_have_any_name(network: None) -> None:
    """A bridge's name has 15 bytes at most, an environment's 31."""
    named = {"a" * length: IPv4Network(f"10.{length}.0.0/16") for length in (1, 13, 14, 15, 31)}
    text = ruleset([Environment(name=name, tier=Tier.BEST_EFFORT, subnet=subnet) for name, subnet in named.items()])
    inside(HOST, "nft", "--check", "--file", "-", stdin=text.replace("@RESOLVERS4@", "").replace("@RESOLVERS6@", ""))
    assert {one for one in re.findall('iifname "(a.*?)"', text)} == {"a-*", "a" * 13 + "-*", "a" * 14 + "-"}


@pytest.mark.parametrize("connections", [CONNECTIONS, 262_144, 1_000_000])
@pytest.mark.parametrize("others", [0, 1, 5])
def test_all_shares_together_are_below_half_of_the_hosts_table(connections: int, others: int) -> None:
    names = ["dev", *(f"other-{number}" for number in range(others))]
    text = ruleset([Environment(name=name, tier=Tier.BEST_EFFORT, subnet=SUBNET) for name in names], connections)
    limits = re.findall(r"rate over (\d+)/second burst (\d+) packets.*\n.*count over (\d+) ", text)
    assert len(limits) == len(names) + 2
    assert sum(120 * int(rate) + int(burst) + int(most) for rate, burst, most in limits) < connections // 2
    assert all(int(most) <= 4096 for *_, most in limits)


def test_the_table_replaces_itself_as_one_and_touches_no_other(network: None) -> None:
    loaded({"dev": ("internet",)})
    inside(HOST, "nft", "add", "table", "inet", "somebody_elses")
    text = ruleset([Environment(name="dev", tier=Tier.BEST_EFFORT, subnet=SUBNET)])
    inside(HOST, "nft", "--file", "-", stdin=text.replace("@RESOLVERS4@", "").replace("@RESOLVERS6@", ""))
    inside(HOST, "nft", "--file", "-", stdin=text.replace("@RESOLVERS4@", "").replace("@RESOLVERS6@", ""))
    assert inside(HOST, "nft", "list", "tables").split("\n")[:-1] == [
        "table inet somebody_elses",
        "table inet bulkhead",
    ]


def test_the_file_of_a_host_names_its_own_name_servers(tmp_path: Path, network: None) -> None:
    from components import firewall

    create, delete = firewall.scripts(ruleset([Environment(name="dev", tier=Tier.BEST_EFFORT, subnet=SUBNET)]))
    file = tmp_path / "firewall.nft"
    redirected = [
        script.replace(firewall.FILE, str(file)).replace("/run/systemd/system", "/nowhere")
        for script in (create, delete)
    ]
    (tmp_path / "resolv.conf").write_text(
        "nameserver 127.0.0.53\nnameserver 192.168.77.53\nnameserver fd00::53\nnameserver fe80::1%eth0\n"
    )
    script = (
        redirected[0]
        .replace("/etc/resolv.conf", str(tmp_path / "resolv.conf"))
        .replace("mkdir -p /etc/bulkhead", "true")
    )
    inside(HOST, "nft", "flush", "ruleset")
    inside(HOST, "sh", "-eu", "-c", script)
    assert "elements = { 192.168.77.53 };" in file.read_text()
    assert "elements = { fd00::53 };" in file.read_text()
    assert "table inet bulkhead" in inside(HOST, "nft", "list", "tables")
    # The kernel's module may be missing: nothing goes on without it, and what was in force stays.
    nft = tmp_path / "nft"
    nft.write_text("#!/bin/sh\n! grep 'ct count' \"$3\" >&2\n")
    nft.chmod(0o755)
    refused = subprocess.run(
        ["sh", "-eu", "-c", f"PATH={tmp_path}:$PATH\n{script}"], capture_output=True, text=True, check=False
    )
    assert refused.returncode != 0
    assert "modprobe -a nft_connlimit" in refused.stderr
    assert "table inet bulkhead" in inside(HOST, "nft", "list", "tables")
    inside(HOST, "sh", "-eu", "-c", redirected[1])
    assert not file.exists()
    assert inside(HOST, "nft", "list", "tables") == ""
