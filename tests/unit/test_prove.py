"""The prover's judgements, without a machine: which observations are a stop, which a passage, and what is tried.
That each path is really tried, and really turns red when it is open, is shown on a deployment (e2e)."""

import json
import socket
import struct
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from host import probe, prove
from host.machine import Places, Undecided
from host.prove import (
    BLOCKED,
    WORKS,
    Container,
    Host,
    Named,
    Network,
    Proof,
    Way,
    _said,
    bridge_addresses,
    sockets,
    to_host,
    to_others,
    within,
)

DEV = Network("dev", "dev-backend", ("10.82.1.1",), "s1", "l1", ("10.82.1.9",))
PROD = Network("prod", "prod-backend", ("10.81.1.1",), "s2", "l2", ("10.81.1.9",))
DECLARED = {"dev": {"tier": "best-effort"}, "prod": {"tier": "protected"}}
DATABASE = Container("prod", "prod-db-1", ("db", "prod-db-1"), ("10.81.1.3",), (5432,), (), ("prod-backend",))
API = Container("dev", "dev-api-1", ("api",), ("10.82.1.4",), (8000,), (), ("dev-backend",))
HOST = Host({"10.82.1.1": "dev-backend", "10.81.1.1": "prod-backend", "172.17.0.1": "bridge"}, (22, 8080), (53,))


def proof(expected: str, observed: str) -> Proof:
    return Proof("dev", "dev-backend", "a path", "a target", expected, observed)


@pytest.mark.parametrize(
    "observed", ["no answer", "unreachable (ENETUNREACH)", "denied (EPERM)", "not there", "not found", "not seen"]
)
def test_what_stopped_is_as_expected_of_a_boundary_and_not_of_what_must_work(observed: str) -> None:
    assert proof(BLOCKED, observed).ok
    assert not proof(WORKS, observed).ok


@pytest.mark.parametrize("observed", ["connected", "answered", "resolved 10.81.1.3"])
def test_what_passed_is_not_expected_of_a_boundary(observed: str) -> None:
    assert not proof(BLOCKED, observed).ok
    assert proof(WORKS, observed).ok


@pytest.mark.parametrize(
    "observed", ["refused", "opened", "mounted", "sent", "others'", "arrived: udp", "", "whatever"]
)
def test_a_refusal_has_arrived_and_what_nobody_foresaw_counts_as_open(observed: str) -> None:
    assert not proof(BLOCKED, observed).ok
    assert not proof(WORKS, observed).ok


@pytest.mark.parametrize(
    ("observed", "ok"),
    [
        ("4047 processes and then refused (EAGAIN)", True),
        ("4112 processes", False),
        ("7048 MiB and then killed", True),
        ("7300 MiB", False),
    ],
)
def test_a_ceiling_holds_where_the_kernel_refused_or_killed(observed: str, ok: bool) -> None:
    assert proof(BLOCKED, observed).ok is ok


def test_a_name_that_both_have_leads_to_ones_own_only() -> None:
    way = Way("name of a container", "db of prod", "name", {"of": "db"}, foreign=("10.81.1.3",))
    assert _said(way, "resolved 10.82.1.7").startswith("not found")
    assert _said(way, "resolved 10.81.1.3 10.82.1.7") == "resolved 10.81.1.3 10.82.1.7"
    assert _said(way, "not found") == "not found"


def test_others_are_tried_by_address_name_open_and_closed_ports() -> None:
    tried = {(way.path, way.target) for way in to_others(DEV, [DEV, PROD], [DATABASE, API])}
    assert {
        ("container, TCP", "prod-db-1 (10.81.1.3), port 5432"),
        ("container, TCP", "prod-db-1 (10.81.1.3), port 9"),
        ("container, UDP", "prod-db-1 (10.81.1.3), port 9"),
        ("container, ICMP", "prod-db-1 (10.81.1.3)"),
        ("name of a container", "db of prod"),
        ("container, UDP", "prod-backend (10.81.1.9), port 7007"),
    } <= tried
    assert not [target for _, target in tried if "dev-api" in target]


def test_the_host_is_tried_by_every_gateway_and_port_and_named_addresses_only() -> None:
    tried = {(way.path, way.target) for way in to_host(DEV, HOST, DECLARED, Named(outward=("192.0.2.1",)))}
    for gateway in ("10.82.1.1 (its own network)", "10.81.1.1 (prod-backend)", "172.17.0.1 (bridge)"):
        assert {("host, TCP", f"{gateway}, port {port}") for port in (22, 8080, 9)} <= tried
        assert {("host, UDP", f"{gateway}, port {port}") for port in (53, 9)} <= tried
        assert ("host, ICMP", gateway) in tried
    assert ("host, ICMP", "192.0.2.1 (the host's own address)") in tried
    assert not [target for _, target in (way[:2] for way in tried) if "192.0.2" in target and "host" not in target]
    assert list(to_host(PROD, HOST, DECLARED, Named())) == []


@pytest.mark.parametrize("protocol", ["tcp", "udp"])
def test_ports_beyond_what_is_tried_of_one_address_are_told_and_never_as_expected(
    protocol: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    many: dict[str, Any] = {protocol: tuple(range(10, prove.PORTS_AT_MOST + 13))}
    wanted: list[Any] = []

    def asked(_: str, given: list[Any]) -> list[str]:
        wanted.extend(given)
        return ["no answer"] * len(given)

    monkeypatch.setattr(prove, "asked", asked)
    monkeypatch.setattr(prove, "out_of_container", lambda: [])
    host = replace(HOST, gateways={"10.82.1.1": "dev-backend"}, **many)
    proofs = prove.tried(DEV, [DEV, PROD], [replace(DATABASE, **many)], host, DECLARED, prove.Options())
    left = {(one.path, one.target): one for one in proofs if one.observed == prove.TOO_MANY}
    assert set(left) == {
        (f"container, {protocol.upper()}", "prod-db-1 (10.81.1.3), 3 more ports"),
        (f"host, {protocol.upper()}", "10.82.1.1 (its own network), 3 more ports"),
    }
    assert not any(one.ok for one in left.values())
    assert len(wanted) == len(proofs) - 2
    tried = [one["with"]["port"] for one in wanted if one["kind"] == protocol and one["with"]["to"] == "10.81.1.3"]
    assert tried == [*many[protocol][: prove.PORTS_AT_MOST], prove.CLOSED]


def test_all_that_listens_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is too much is told where it is tried, not left out where it is found."""
    many = range(1, 2 * prove.PORTS_AT_MOST)
    monkeypatch.setattr(prove, "sockets", lambda _: {(kind, "::", port) for kind in ("tcp", "udp") for port in many})
    monkeypatch.setattr(prove, "ask", lambda *_: "[]")
    monkeypatch.setattr(prove, "listed", lambda *_: ["id"])
    monkeypatch.setattr(prove, "inspected", lambda *_: [])
    host = Host.of([])
    labels = {"Labels": {prove.ENVIRONMENT: "dev"}}
    told = {"Name": "/dev-api-1", "Config": labels, "NetworkSettings": {"Networks": {}}, "State": {"Pid": 1}}
    monkeypatch.setattr(prove, "inspected", lambda *_: [told])
    (container,) = prove.containers(DECLARED)
    assert host.tcp == host.udp == container.tcp == container.udp == tuple(many)


INTERFACES = [
    {
        "ifname": "eth0",
        "addr_info": [{"local": "203.0.113.7", "scope": "global"}, {"local": "fe80::1", "scope": "link"}],
    },
    {"ifname": "lo", "addr_info": [{"local": "127.0.0.1", "scope": "host"}]},
    {"ifname": "br-0123456789ab", "addr_info": [{"local": "10.82.1.1", "scope": "global"}]},
]


@pytest.mark.parametrize(
    ("document", "expected"),
    [({"outward": True}, ("192.0.2.1", "203.0.113.7")), ({"outward": False}, ("192.0.2.1",)), ({}, ("192.0.2.1",))],
)
def test_the_hosts_outward_addresses_are_tried_where_the_ledger_says_so(
    document: dict[str, Any], expected: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[tuple[str, ...]] = []

    def tried(*words: Any) -> list[Proof]:
        given.append(words[-1].named.outward)
        return []

    @contextmanager
    def probes(*_: object) -> Iterator[tuple[list[Network], list[Proof]]]:
        yield [DEV], []

    monkeypatch.setattr(prove, "read_json", lambda _: {"environments": DECLARED, **document})
    monkeypatch.setattr(prove, "ask", lambda *_: json.dumps(INTERFACES))
    for name, value in (("probes", probes), ("tried", tried), ("arrivals", lambda *_: [])):
        monkeypatch.setattr(prove, name, value)
    for name in ("containers", "listed", "inspected"):
        monkeypatch.setattr(prove, name, lambda *_: [])
    prove.prove(Places(tmp_path), prove.Options(Named(outward=("192.0.2.1",))))
    assert given == [expected]


def test_what_must_work_is_tried_in_every_network() -> None:
    ways = list(within(DEV, [DATABASE, API]))
    assert {way.expected for way in ways} == {WORKS}
    assert {(way.path, way.target) for way in ways} >= {
        ("container, TCP", "10.82.1.9 in dev-backend, port 7007"),
        ("container, ICMP", "10.82.1.9 in dev-backend"),
        ("name of a service", "dev-api-1"),
    }


def test_listening_sockets_are_read_as_the_kernel_writes_them(tmp_path: Path) -> None:
    head = "  sl  local_address rem_address   st\n"
    (tmp_path / "tcp").write_text(head + "   0: 0100007F:1F90 00000000:0000 0A\n   1: 0100007F:1F91 0100007F:0016 01\n")
    (tmp_path / "tcp6").write_text(head + "   0: 00000000000000000000000001000000:0016 0:0 0A\n")
    (tmp_path / "udp").write_text(head + "   0: 00000000:0035 00000000:0000 07\n")
    assert sockets(tmp_path) == {("tcp", "127.0.0.1", 8080), ("tcp", "::1", 22), ("udp", "0.0.0.0", 53)}


def test_the_probe_tells_a_refusal_from_silence_and_from_success() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        assert probe.tcp("127.0.0.1", port) == "connected"
    assert probe.tcp("127.0.0.1", port) == "refused"
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as silent:
        silent.bind(("127.0.0.1", 0))
        assert probe.udp("127.0.0.1", silent.getsockname()[1], "x") == "no answer"
    assert probe.name("no-such-name.invalid") == "not found"
    assert probe.write("/nowhere/at/all") == "not there"
    assert probe.unix("/nowhere/at/all") == "not there"


def test_the_listener_reads_protocol_sender_port_and_token_of_a_packet() -> None:
    body = struct.pack("!HHHH", 1, 7007, 8, 0) + probe.TOKEN + b"abc"
    packet = struct.pack("!BBHHHBBH4s4s", 0x45, 0, 0, 0, 0, 64, probe.UDP, 0, socket.inet_aton("10.1.2.3"), b"\0" * 4)
    assert probe._read(packet + body) == ("udp", "10.1.2.3", 7007, "abc")
    six = struct.pack("!IHBB", 6 << 28, 0, probe.TCP, 64) + socket.inet_pton(socket.AF_INET6, "fd00::1") + b"\0" * 16
    assert probe._read(six + struct.pack("!HH", 1, 80)) == ("tcp", "fd00::1", 80, "")


def test_attempts_come_back_in_their_order() -> None:
    wanted = [
        {"kind": "write", "with": {"path": "/nowhere/at/all"}},
        {"kind": "fork", "with": {"most": 2}},
        {"kind": "name", "with": {"of": "no-such-name.invalid"}},
    ]
    assert probe.attempt(wanted) == ["not there", "2 processes", "not found"]


@pytest.mark.parametrize(
    ("network", "found"),
    [
        ({"Options": {"com.docker.network.bridge.name": "docker0"}, "IPAM": {"Config": [{}]}}, ["172.17.0.1"]),
        ({"Options": None, "IPAM": {"Config": [{"Gateway": "10.81.1.1/24"}]}}, ["10.81.1.1", "10.81.1.9"]),
        ({"IPAM": {"Config": None}}, ["10.81.1.1", "10.81.1.9"]),
    ],
    ids=["the engine's own bridge, of which it tells no gateway", "both are told", "the interface tells"],
)
def test_the_hosts_addresses_on_a_bridge_are_found_whether_or_not_the_engine_tells_them(
    network: dict[str, Any], found: list[str]
) -> None:
    def interface(name: str, *addresses: str) -> dict[str, Any]:
        shown = [{"local": one, "scope": "global"} for one in addresses]
        return {"ifname": name, "addr_info": [*shown, {"local": "fe80::1", "scope": "link"}]}

    interfaces = [interface("docker0", "172.17.0.1"), interface("br-0123456789ab", "10.81.1.1", "10.81.1.9")]
    assert bridge_addresses({"Id": "0123456789abcdef", **network}, interfaces) == found


# One environment does not keep the others from being proved.


@pytest.mark.parametrize("answer", ["", "[]", "no JSON"])
def test_what_a_probe_does_not_say_was_not_tried_and_is_never_as_expected(
    monkeypatch: pytest.MonkeyPatch, answer: str
) -> None:
    def run(*_: object, **__: object) -> subprocess.CompletedProcess[str]:
        if answer:
            return subprocess.CompletedProcess([], 1, answer, "")
        raise subprocess.TimeoutExpired("docker", 300)

    monkeypatch.setattr(subprocess, "run", run)
    found = prove.asked("sender", [{"kind": "tcp"}, {"kind": "udp"}])
    assert found == [prove.NOT_TRIED] * 2
    for expected in (prove.BLOCKED, prove.WORKS):
        assert not prove.Proof("dev", "dev-net", "container, TCP", "prod", expected, found[0]).ok


def test_an_environment_in_which_no_probe_starts_is_told_and_the_others_are_proved(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As at its limit of processes."""
    networks = [{"Id": name, "Name": f"{name}-net", "Labels": {prove.ENVIRONMENT: name}} for name in ("dev", "prod")]

    def probing(network: Mapping[str, Any], *_: object) -> prove.Network:
        if network["Id"] == "dev":
            raise Undecided("docker: pids limit reached: killed")
        return prove.Network("prod", "prod-net", (), "sender", "listener", ())

    monkeypatch.setattr(prove, "listed", lambda *_: [])
    monkeypatch.setattr(prove, "inspected", lambda *_: networks)
    monkeypatch.setattr(prove, "image", lambda: "image")
    monkeypatch.setattr(prove, "_probing", probing)
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: subprocess.CompletedProcess([], 0, "", ""))
    with prove.probes({"dev": {}, "prod": {}}, prove.Options(prove.Named((), (), ()))) as (there, untried):
        assert [one.name for one in there] == ["prod-net"]
        (told,) = untried
        assert (told.environment, told.ok) == ("dev", False)
        assert "pids limit" in told.observed
