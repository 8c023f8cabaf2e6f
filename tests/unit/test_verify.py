"""What `verify` says of declarations and inspections, of nft listings, cgroup files and processes; when it says it."""

import argparse
import ast
import json
import os
import time
from collections.abc import Callable, Sequence
from copy import deepcopy
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from host import verify
from host.__main__ import main
from host.machine import DEPLOY_SECONDS, Places, Undecided, deploying
from host.verify import ABSENT, Declared, Difference, Look, Process

WEB, DB, JOB, STRANGER = (digit * 64 for digit in "abcd")
MIB = 2**20


def service(identifier: str, **changed: Any) -> dict[str, Any]:
    """A service of the outputs."""
    return {
        "containers": [identifier],
        "networks": ["dev-backend"],
        "memory": 64 * MIB,
        "cpus": 0.5,
        "cpu_shares": None,
        "restart": "unless-stopped",
        "completes": False,
    } | changed


DECLARED = Declared(
    host={
        "environments": {
            "prod": {"subnet": "10.81.0.0/16", "cgroup_parent": "/bulkhead-prod", "files": {}},
            "dev": {"subnet": "10.82.0.0/16", "subnet6": "fd82::/48", "cgroup_parent": "/bulkhead-dev", "files": {}},
        }
    },
    stacks={
        "prod": {
            "slice": {"cgroup_parent": "/bulkhead-prod"},
            "networks": {"prod-backend": {"subnet": "10.81.1.0/24", "internal": True, "external": False}},
            "volumes": ["prod-db-data"],
            "services": {"db": service(DB, networks=["prod-backend"], memory=None, cpus=None)},
        },
        "dev": {
            "slice": {"cgroup_parent": "/bulkhead-dev"},
            "networks": {"dev-backend": {"subnet": "10.82.1.0/24", "internal": True, "external": False}},
            "volumes": [],
            "services": {"web": service(WEB), "job": service(JOB, completes=True, restart="no")},
        },
    },
)


def container(identifier: str, name: str, environment: str, **config: Any) -> dict[str, Any]:
    """A running container as the engine's inspection has it."""
    limits = {} if environment == "prod" else {"Memory": 64 * MIB, "NanoCpus": 500_000_000}
    return {
        "Id": identifier,
        "Name": f"/{name}",
        "Created": "2026-01-01T00:00:00.123456789Z",
        "State": {"Status": "running", "Pid": 100 + ord(identifier[0]), "ExitCode": 0},
        "Config": {"Labels": {"bulkhead.environment": environment}},
        "Mounts": [],
        "NetworkSettings": {"Networks": {f"{environment}-backend": {}}},
        "HostConfig": {
            "CgroupParent": f"/bulkhead-{environment}",
            "NetworkMode": "default",
            "RestartPolicy": {"Name": "unless-stopped"},
            "PidsLimit": None,
        }
        | limits
        | config,
    }


def all_well() -> list[dict[str, Any]]:
    job = container(JOB, "dev-job", "dev", RestartPolicy={"Name": "no"})
    job["State"] = {"Status": "exited", "Pid": 0, "ExitCode": 0}
    return [container(DB, "prod-db", "prod"), container(WEB, "dev-web", "dev"), job]


def test_what_is_as_declared_is_not_mentioned() -> None:
    assert list(verify.containers(DECLARED, all_well())) == []


def put(*path: str, value: Any) -> Callable[[dict[str, Any]], None]:
    """A change of one field of an inspection."""

    def change(inspected: dict[str, Any]) -> None:
        for key in path[:-1]:
            inspected = inspected[key]
        inspected[path[-1]] = value

    return change


BY_HAND: dict[str, tuple[Callable[[dict[str, Any]], None], str, str, str]] = {
    "memory": (put("HostConfig", "Memory", value=128 * MIB), "memory limit in bytes", str(64 * MIB), str(128 * MIB)),
    "no memory limit": (put("HostConfig", "Memory", value=0), "memory limit in bytes", str(64 * MIB), "none"),
    "cpus": (put("HostConfig", "NanoCpus", value=1_500_000_000), "CPU limit", "0.5", "1.5"),
    "a quota instead": (
        lambda one: one["HostConfig"].update(NanoCpus=0, CpuQuota=25_000, CpuPeriod=100_000),
        "CPU limit",
        "0.5",
        "0.25",
    ),
    "shares": (put("HostConfig", "CpuShares", value=4096), "CPU shares", "none", "4096"),
    "pids": (put("HostConfig", "PidsLimit", value=10), "process limit", "none", "10"),
    "cpuset": (put("HostConfig", "CpusetCpus", value="0"), "CPU set", "none", "0"),
    "IO": (put("HostConfig", "BlkioWeight", value=10), "IO weight", "none", "10"),
    "restart": (put("HostConfig", "RestartPolicy", value={"Name": "no"}), "restart policy", "unless-stopped", "no"),
    "slice": (put("HostConfig", "CgroupParent", value="/x"), "slice of a container", "/bulkhead-dev", "/x"),
    "no slice": (put("HostConfig", "CgroupParent", value=""), "slice of a container", "/bulkhead-dev", "none"),
    "one network more": (
        put("NetworkSettings", "Networks", value={"dev-backend": {}, "prod-backend": {}}),
        "networks of a container",
        "dev-backend",
        "dev-backend, prod-backend",
    ),
    "no network": (put("NetworkSettings", "Networks", value={}), "networks of a container", "dev-backend", "none"),
    "stopped": (
        put("State", value={"Status": "exited", "ExitCode": 137, "Pid": 0}),
        "container state",
        "running",
        "exited with code 137",
    ),
    "ended well": (
        put("State", value={"Status": "exited", "ExitCode": 0, "Pid": 0}),
        "container state",
        "running",
        "exited with code 0",
    ),
    "paused": (put("State", "Status", value="paused"), "container state", "running", "paused"),
}


@pytest.mark.parametrize("change", BY_HAND)
def test_a_container_changed_by_hand_is_one_difference(change: str) -> None:
    made, what, expected, observed = BY_HAND[change]
    inspected = all_well()
    made(inspected[1])
    where = f"container dev-web ({WEB[:12]})"
    assert list(verify.containers(DECLARED, inspected)) == [Difference("dev", what, where, expected, observed)]


def test_a_removed_container_is_missed() -> None:
    (found,) = verify.containers(DECLARED, all_well()[1:])
    assert found == Difference("prod", "container removed", f"service db, container {DB[:12]}", "running", ABSENT)


@pytest.mark.parametrize(
    ("status", "code", "well"), [("running", 0, True), ("exited", 0, True), ("exited", 1, False), ("paused", 0, False)]
)
def test_a_service_that_others_wait_for_may_have_ended_well(status: str, code: int, well: bool) -> None:
    inspected = all_well()
    inspected[2]["State"] |= {"Status": status, "ExitCode": code}
    assert (list(verify.containers(DECLARED, inspected)) == []) is well


def test_what_restarts_on_failure_may_end_well_and_its_count_is_not_the_policys_name() -> None:
    declared = deepcopy(DECLARED)
    declared.stacks["dev"]["services"]["web"]["restart"] = "on-failure:3"
    inspected = all_well()
    inspected[1]["HostConfig"]["RestartPolicy"] = {"Name": "on-failure", "MaximumRetryCount": 3}
    inspected[1]["State"] |= {"Status": "exited", "ExitCode": 0}
    assert list(verify.containers(declared, inspected)) == []


def stranger(**changed: Any) -> dict[str, Any]:
    """A container of nobody that touches nothing."""
    one = container(STRANGER, "stranger", "dev", CgroupParent="", Memory=0, NanoCpus=0)
    one["Config"]["Labels"] = {}
    one["NetworkSettings"]["Networks"] = {"bridge": {}}
    for key, value in changed.items():
        one[key] |= value
    return one


TOUCHING: dict[str, tuple[dict[str, Any], str, str]] = {
    "a label": ({"Config": {"Labels": {"bulkhead.environment": "prod"}}}, "prod", "labelled bulkhead.environment=prod"),
    "a network": (
        {"NetworkSettings": {"Networks": {"dev-backend": {}, "bridge": {}}}},
        "dev",
        "on its network dev-backend",
    ),
    "a slice": ({"HostConfig": {"CgroupParent": "/bulkhead-dev"}}, "dev", "in its slice /bulkhead-dev"),
    "a group below a slice": ({"HostConfig": {"CgroupParent": "/bulkhead-prod/x"}}, "prod", "in its slice"),
    "a network namespace": ({"HostConfig": {"NetworkMode": f"container:{DB}"}}, "prod", "with the NetworkMode of"),
    "a pid namespace": ({"HostConfig": {"PidMode": f"container:{WEB}"}}, "dev", "with the PidMode of"),
}


@pytest.mark.parametrize("how", TOUCHING)
def test_a_container_that_no_deploy_made_is_told_when_it_touches_an_environment(how: str) -> None:
    changed, environment, observed = TOUCHING[how]
    (found,) = verify.containers(DECLARED, [*all_well(), stranger(**changed)])
    assert found[:2] == (environment, "container that no deploy made")
    assert found.observed.startswith(f"running, {observed}")


def test_a_container_of_nobody_is_the_same_difference_whatever_state_it_is_in() -> None:
    """One that restarts over and over is in another at each look."""
    one = stranger(HostConfig={"CgroupParent": "/bulkhead-dev"})
    (first,) = verify.containers(DECLARED, [*all_well(), one])
    (second,) = verify.containers(DECLARED, [*all_well(), {**one, "State": {**one["State"], "Status": "restarting"}}])
    assert second.observed == "restarting, in its slice /bulkhead-dev"
    assert second.key == first.key
    (other,) = verify.containers(DECLARED, [*all_well(), stranger(HostConfig={"CgroupParent": "/bulkhead-prod/x"})])
    assert other.key != first.key


def test_a_volume_of_prod_in_a_container_of_nobody_is_told() -> None:
    one = stranger()
    one["Mounts"] = [{"Type": "volume", "Name": "prod-db-data"}]
    (found,) = verify.containers(DECLARED, [*all_well(), one])
    assert found.observed == "running, with its volume prod-db-data"


def test_where_it_really_runs_counts_not_only_where_it_asked_to() -> None:
    one = stranger(HostConfig={"CgroupParent": "bulkhead-dev-x.slice"})
    declared = deepcopy(DECLARED)
    declared.environments["dev"]["cgroup_parent"] = "bulkhead-dev.slice"  # type: ignore[index]
    groups = {"": f"/bulkhead.slice/bulkhead-dev.slice/bulkhead-dev-x.slice/docker-{STRANGER}.scope"}
    processes = [Process(one["State"]["Pid"], "pid:[9]", groups)]
    (found,) = verify.containers(declared, [*all_well(), one], processes)
    assert "in its slice bulkhead-dev.slice" in found.observed


def test_a_container_that_touches_nothing_of_ours_is_nobodys_business() -> None:
    assert list(verify.containers(DECLARED, [*all_well(), stranger()])) == []
    assert (
        list(verify.containers(DECLARED, [*all_well(), stranger(HostConfig={"CgroupParent": "/bulkhead-dev2"})])) == []
    )


def test_a_network_that_others_made_is_theirs_to_be_on() -> None:
    declared = deepcopy(DECLARED)
    declared.stacks["dev"]["networks"]["proxy"] = {"subnet": None, "internal": None, "external": True}
    inspected = [*all_well(), stranger(NetworkSettings={"Networks": {"proxy": {}}})]
    inspected[1]["NetworkSettings"]["Networks"]["proxy"] = {}
    declared.stacks["dev"]["services"]["web"]["networks"].append("proxy")
    assert list(verify.containers(declared, inspected)) == []


@pytest.mark.parametrize(
    ("subnet", "tier", "well"),
    [
        ("10.82.7.0/24", "best-effort", True),
        ("fd82:0:0:7::/64", "best-effort", True),
        ("172.18.0.0/16", "best-effort", False),
        ("10.82.0.0/15", "best-effort", False),
        ("172.18.0.0/16", "protected", True),
    ],
)
def test_an_external_network_of_dev_is_within_its_range(subnet: str, tier: str, well: bool) -> None:
    """Else the firewall does not know that what comes from there is dev's, and lets it reach the host."""
    host = {"environments": {"dev": {**DECLARED.environments["dev"], "tier": tier}}}
    networks = {"dev-shared": {"subnet": None, "internal": None, "external": True}}
    declared = Declared(host=host, stacks={"dev": {**DECLARED.stacks["dev"], "networks": networks}})
    shared = {"Name": "dev-shared", "Internal": False, "IPAM": {"Config": [{"Subnet": subnet}]}}
    found = [one for one in verify.networks(declared, [shared]) if one.where == "network dev-shared"]
    told = ("dev", "range of an external network", "network dev-shared", "within 10.82.0.0/16 or fd82::/48", subnet)
    assert found == ([] if well else [told])


def test_a_carrier_of_files_is_ours_only_while_it_was_never_started() -> None:
    carrier = stranger(Config={"Labels": {"bulkhead.environment": "dev", "bulkhead.files": "1"}})
    carrier["State"]["Status"] = "created"
    assert list(verify.containers(DECLARED, [*all_well(), carrier])) == []
    carrier["State"]["Status"] = "running"
    assert len(list(verify.containers(DECLARED, [*all_well(), carrier]))) == 1


@pytest.mark.parametrize(("minutes", "told"), [(0, 0), (14, 0), (16, 1), (600, 1)])
def test_a_probe_of_the_prover_is_left_out_no_longer_than_a_proof_takes(minutes: int, told: int) -> None:
    probe = stranger(Config={"Labels": {"bulkhead.probe": "1", "bulkhead.environment": "dev"}})
    probe["Created"] = (datetime.now(UTC) - timedelta(minutes=minutes)).isoformat().replace("+00:00", "Z")
    assert len(list(verify.containers(DECLARED, [*all_well(), probe]))) == told


# Networks.


def network(name: str, subnet: str, internal: bool = True, label: str = "") -> dict[str, Any]:
    labels = {"bulkhead.environment": label} if label else {}
    return {"Name": name, "Internal": internal, "Labels": labels, "IPAM": {"Config": [{"Subnet": subnet}]}}


BRIDGES = (network("dev-backend", "10.82.1.0/24"), network("prod-backend", "10.81.1.0/24"))


MADE = "network that no deploy made"
BY_OTHERS: tuple[tuple[Sequence[Any], tuple[str, ...] | None], ...] = (
    (BRIDGES, None),
    ((*BRIDGES, network("bridge", "172.17.0.0/16", internal=False)), None),
    (BRIDGES[:1], ("prod", "network removed", "network prod-backend", "10.81.1.0/24", ABSENT)),
    (
        (network("dev-backend", "10.82.1.0/24", internal=False), BRIDGES[1]),
        ("dev", "a network's way out", "network dev-backend", "internal", "open"),
    ),
    (
        (network("dev-backend", "10.82.9.0/24"), BRIDGES[1]),
        ("dev", "subnet of a network", "network dev-backend", "10.82.1.0/24", "10.82.9.0/24"),
    ),
    (
        (*BRIDGES, network("own", "10.82.200.0/24")),
        ("dev", MADE, "network own", ABSENT, "10.82.200.0/24, within its range 10.82.0.0/16"),
    ),
    (
        (*BRIDGES, network("wide", "10.80.0.0/12")),
        ("prod", MADE, "network wide", ABSENT, "10.80.0.0/12, within its range 10.81.0.0/16"),
    ),
    (
        (*BRIDGES, network("six", "fd82:0:0:1::/64")),
        ("dev", MADE, "network six", ABSENT, "fd82:0:0:1::/64, within its range fd82::/48"),
    ),
    (
        (*BRIDGES, network("named", "192.168.5.0/24", label="dev")),
        ("dev", MADE, "network named", ABSENT, "labelled bulkhead.environment=dev"),
    ),
)


@pytest.mark.parametrize(("bridges", "found"), BY_OTHERS)
def test_networks_are_where_and_as_declared(bridges: Sequence[Any], found: tuple[str, ...] | None) -> None:
    assert list(verify.networks(DECLARED, bridges)) == ([] if found is None else [found])


# cgroups.


@pytest.mark.parametrize(
    ("expected", "observed", "same"),
    [
        ("1024", "1024", True),
        ("1024", "1023", False),
        ("-1", "9223372036854771712", True),
        ("max", "-1", True),
        ("max", "1024", False),
        ("max 100000", "max 100000", True),
        ("50000 100000", "max 100000", False),
        ("8:0 rbps=1 wbps=max", "8:0  rbps=1 wbps=max", True),
        ("", "0", False),
    ],
)
def test_a_cgroup_files_content_has_several_spellings(expected: str, observed: str, same: bool) -> None:
    assert verify.same(expected, observed) is same


def test_a_changed_or_missing_cgroup_file_is_named(tmp_path: Path) -> None:
    group = tmp_path / "sys/fs/cgroup/pids/bulkhead-dev"
    group.mkdir(parents=True)
    (group / "pids.max").write_text("77\n")
    wanted = {f"/sys/fs/cgroup/pids/bulkhead-dev/{name}": "4096" for name in ("pids.max", "gone", "optional?")}
    found = list(verify.files("dev", wanted, Places(tmp_path)))
    assert [(Path(one.where).name, one.expected, one.observed) for one in found] == [
        ("pids.max", "4096", "77"),
        ("gone", "4096", "No such file or directory"),
    ]


V1 = """\
12:cpuset:/
8:pids:/bulkhead-dev/{0}
4:memory:/bulkhead-dev/{0}
2:cpu,cpuacct:/bulkhead-dev/{0}
1:name=systemd:/elsewhere
0::/elsewhere
"""


def test_groups_are_those_that_carry_a_limit() -> None:
    assert verify.groups_of(V1.format("x")) == dict.fromkeys(("pids", "memory", "cpu"), "/bulkhead-dev/x")
    v2 = "/bulkhead.slice/bulkhead-dev.slice/docker-x.scope"
    assert verify.groups_of(f"0::{v2}\n") == {"": v2}


def placed(*processes: Process) -> list[tuple[str, str]]:
    return [(one.environment, one.what) for one in verify.placement(DECLARED, all_well(), processes)]


def test_every_process_of_a_container_is_in_its_slice_not_only_the_first() -> None:
    inspected = {one["Id"]: one["State"]["Pid"] for one in all_well()}
    host = Process(1, "pid:[1]", {"memory": "/"})
    first = Process(inspected[WEB], "pid:[2]", {"memory": f"/bulkhead-dev/{WEB}"})
    child = Process(900, "pid:[2]", {"memory": f"/bulkhead-dev/{WEB}", "cpu": f"/bulkhead-dev/{WEB}"})
    assert placed(host, first, child) == []
    moved = [("dev", "process outside its slice")]
    assert placed(host, first, child._replace(groups={"memory": f"/bulkhead-dev/{WEB}", "cpu": "/"})) == moved
    assert placed(host, first._replace(groups={"memory": f"/bulkhead-prod/{WEB}"}), child) == moved


def test_a_process_put_into_a_slice_past_the_engine_is_told() -> None:
    host = Process(1, "pid:[1]", {"memory": "/"})
    intruder = Process(901, "pid:[1]", {"memory": "/", "cpu": "/bulkhead-prod"})
    assert placed(host, intruder) == [("prod", "process that no container has")]
    assert placed(host, intruder._replace(groups={"cpu": "/bulkhead-prod2"})) == []


def test_a_containers_own_files_show_the_limits_that_the_engine_shows() -> None:
    config = {"Memory": 64 * MIB, "NanoCpus": 500_000_000, "CpuShares": 256}
    assert verify.container_files(config, {"memory": "/m", "cpu": "/c", "pids": "/p"}) == {
        "/sys/fs/cgroup/memory/m/memory.limit_in_bytes": str(64 * MIB),
        "/sys/fs/cgroup/memory/m/memory.memsw.limit_in_bytes?": str(64 * MIB),
        "/sys/fs/cgroup/cpu/c/cpu.cfs_quota_us?": "50000",
        "/sys/fs/cgroup/cpu/c/cpu.shares?": "256",
    }
    assert verify.container_files({}, {"": "/g"}) == {
        "/sys/fs/cgroup/g/memory.max": "max",
        "/sys/fs/cgroup/g/memory.swap.max?": "max",
        "/sys/fs/cgroup/g/cpu.max": "max 100000",
        "/sys/fs/cgroup/g/cpu.weight?": "100 or 39",
    }
    assert verify.container_files(config, {"": "/g"})["/sys/fs/cgroup/g/memory.swap.max?"] == "0"


@pytest.mark.parametrize(("shares", "weights"), [(2, {"1"}), (262144, {"10000"}), (1024, {"39", "100"})])
def test_a_weight_is_reckoned_from_shares_as_either_runtime_does(shares: int, weights: set[str]) -> None:
    assert verify.weights(shares) == weights
    assert verify.same("39 or 100", "100\n")
    assert not verify.same("39 or 100", "50\n")


def test_a_limit_written_past_the_engine_is_told_with_its_file(tmp_path: Path) -> None:
    inspected = all_well()
    pid = inspected[1]["State"]["Pid"]
    group = tmp_path / "sys/fs/cgroup/bulkhead-dev" / WEB
    group.mkdir(parents=True)
    (group / "memory.max").write_text(f"{64 * MIB}\n")
    (group / "cpu.max").write_text("50000 100000\n")
    running = [Process(pid, "pid:[2]", {"": f"/bulkhead-dev/{WEB}"})]
    assert list(verify.ceilings(DECLARED, inspected, running, Places(tmp_path))) == []
    (group / "cpu.max").write_text("max 100000\n")
    (found,) = verify.ceilings(DECLARED, inspected, running, Places(tmp_path))
    what = f"cgroup file of container dev-web ({WEB[:12]})"
    assert found == Difference("dev", what, f"/sys/fs/cgroup/bulkhead-dev/{WEB}/cpu.max", "50000 100000", "max 100000")


def test_the_limits_of_a_process_that_was_moved_are_those_of_another_group(tmp_path: Path) -> None:
    inspected = all_well()
    moved = Process(inspected[1]["State"]["Pid"], "pid:[2]", {"memory": "/", "cpu": f"/bulkhead-dev/{WEB}"})
    assert list(verify.ceilings(DECLARED, inspected, [moved], Places(tmp_path))) == []


def test_processes_are_read_with_their_namespace_and_those_that_have_ended_are_left_out(tmp_path: Path) -> None:
    process = tmp_path / "proc/77"
    (process / "ns").mkdir(parents=True)
    (process / "ns/pid").symlink_to("pid:[4026532000]")
    (process / "cgroup").write_text("0::/bulkhead-dev/x\n")
    (tmp_path / "proc/78").mkdir()
    (tmp_path / "proc/meminfo").touch()
    assert verify.processes(Places(tmp_path)) == [Process(77, "pid:[4026532000]", {"": "/bulkhead-dev/x"})]


# Firewall: as `nft --stateless list table` prints it.

TABLE = """\
table inet bulkhead {
    comment "{ not a block }"
    set environments4 {
        type ipv4_addr
        flags interval
        elements = { 10.81.0.0/16, 10.82.0.0/16,
            10.83.0.0/16 }
    }

    set seen {
        type ipv4_addr
        flags dynamic,timeout
        elements = { 10.9.9.9 }
    }

    chain sent {
        type filter hook prerouting priority mangle; policy accept;
        ct direction reply accept
        ip saddr 10.82.0.0/16 meta l4proto { tcp, udp } jump from_dev
        ip daddr @environments4 counter drop comment "to an environment {"
    }
}
"""


def test_a_listing_becomes_statements_by_block() -> None:
    found = verify.statements(TABLE)
    assert found["set environments4"][2:] == [
        "element 10.81.0.0/16",
        "element 10.82.0.0/16",
        "element 10.83.0.0/16",
    ]
    assert found["set seen"] == ["type ipv4_addr", "flags dynamic,timeout"]
    assert found["chain sent"][1:] == [
        "ct direction reply accept",
        "ip saddr 10.82.0.0/16 meta l4proto { tcp, udp } jump from_dev",
        'ip daddr @environments4 counter drop comment "to an environment {"',
    ]
    assert found["table inet bulkhead"] == ['comment "{ not a block }"']


FIREWALLS: dict[str, tuple[str | None, list[tuple[str, str, str, str]]]] = {
    "the same": (TABLE, []),
    "what packets filled": (TABLE.replace("10.9.9.9", "10.9.9.8"), []),
    "no table": (None, [("firewall table removed", "nftables inet bulkhead", "12 statements", ABSENT)]),
    "a rule less": (
        TABLE.replace("        ct direction reply accept\n", ""),
        [("firewall statement removed", "chain sent", "ct direction reply accept", ABSENT)],
    ),
    "a rule more": (
        TABLE.replace("        ct direction", "        accept\n        ct direction"),
        [("firewall statement added", "chain sent", ABSENT, "accept")],
    ),
    "another policy": (
        TABLE.replace("policy accept", "policy drop"),
        [
            (
                "firewall statement removed",
                "chain sent",
                "type filter hook prerouting priority mangle; policy accept;",
                ABSENT,
            ),
            (
                "firewall statement added",
                "chain sent",
                ABSENT,
                "type filter hook prerouting priority mangle; policy drop;",
            ),
        ],
    ),
    "asleep": (
        TABLE.replace('    comment "{ not', '    flags dormant\n    comment "{ not'),
        [("firewall statement added", "table inet bulkhead", ABSENT, "flags dormant")],
    ),
    "an element less": (
        TABLE.replace(" 10.82.0.0/16,\n", "\n"),
        [("firewall statement removed", "set environments4", "element 10.82.0.0/16", ABSENT)],
    ),
    "a set emptied": (
        TABLE.replace("        elements = { 10.81.0.0/16, 10.82.0.0/16,\n            10.83.0.0/16 }\n", ""),
        [
            ("firewall statement removed", "set environments4", f"element 10.8{number}.0.0/16", ABSENT)
            for number in (1, 2, 3)
        ],
    ),
    "all flushed": (
        "table inet bulkhead {\n\tchain sent {\n\t}\n}\n",
        [
            ("firewall statement removed", "table inet bulkhead", 'comment "{ not a block }"', ABSENT),
            ("firewall block removed", "set environments4", "5 statements", ABSENT),
            ("firewall block removed", "set seen", "2 statements", ABSENT),
            *(
                ("firewall statement removed", "chain sent", rule, ABSENT)
                for rule in (
                    "type filter hook prerouting priority mangle; policy accept;",
                    "ct direction reply accept",
                    "ip saddr 10.82.0.0/16 meta l4proto { tcp, udp } jump from_dev",
                    'ip daddr @environments4 counter drop comment "to an environment {"',
                )
            ),
        ],
    ),
    "a chain more": (
        TABLE.replace("    chain sent", "    chain open {\n        accept\n    }\n\n    chain sent"),
        [("firewall block added", "chain open", ABSENT, "1 statements")],
    ),
}


@pytest.mark.parametrize("change", FIREWALLS)
def test_a_missing_an_added_and_a_changed_statement_are_seen(change: str) -> None:
    observed, expected = FIREWALLS[change]
    found = list(verify.firewall("inet bulkhead", TABLE, observed))
    assert all(one.environment == "host" for one in found)
    assert [(one.what, one.where.rpartition(", ")[2], one.expected, one.observed) for one in found] == expected


def test_two_rules_in_the_other_order_are_a_difference() -> None:
    first, second = (
        "        ct direction reply accept\n",
        "        ip saddr 10.82.0.0/16 meta l4proto { tcp, udp } jump from_dev\n",
    )
    assert list(verify.firewall("inet bulkhead", TABLE, TABLE.replace(first + second, second + first)))


@pytest.mark.parametrize(
    ("table", "found"),
    [
        (TABLE, ["firewall's file removed"]),  # what it should be cannot be told, and that it is there can
        (None, ["firewall's file removed", "firewall table removed"]),
    ],
)
def test_the_firewalls_file_is_missed_too(
    table: str | None, found: Sequence[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    declared = Declared({"firewall": {"family": "inet", "table": "bulkhead"}, "environments": {}}, {})
    monkeypatch.setattr(verify, "listing", lambda *_: table)
    assert [one.what for one in verify.firewall_(declared, tmp_path / "firewall.nft")] == found


# What looks regularly.

LOOKING = Declared({"environments": {}, "agent": {"verbs": ["verify", "keep"]}}, {})


@pytest.mark.parametrize(
    ("pid", "command", "there"),
    [
        ("41", "python3\0/usr/local/lib/bulkhead/host.pyz\0watch\0--period=60\0", True),
        ("41", "python3\0/srv/watches.py\0", False),  # another process, which has got its pid
        ("42", "", False),
        ("", "", False),
    ],
)
def test_a_watch_process_that_does_not_run_is_missed(pid: str, command: str, there: bool, tmp_path: Path) -> None:
    places = Places(tmp_path)
    (tmp_path / "proc/41").mkdir(parents=True)
    (tmp_path / "proc/41/cmdline").write_text(command)
    assert [one.what for one in verify.agent(LOOKING, places)] == ["watch process"]
    places.run.mkdir(parents=True)
    (places.run / "watch.pid").write_text(pid)
    assert [one.what for one in verify.agent(LOOKING, places)] == ([] if there else ["watch process"])


def test_a_timer_that_does_not_run_is_missed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "run/systemd/system").mkdir(parents=True)
    monkeypatch.setattr(verify, "ask", lambda command, _: "inactive\n" if "keep" in command[-1] else "active\n")
    (found,) = verify.agent(LOOKING, Places(tmp_path))
    assert found == Difference("host", "timer", "bulkhead-keep.timer", "active", "inactive")


def test_a_host_that_was_deployed_without_an_agent_misses_none(tmp_path: Path) -> None:
    assert list(verify.agent(DECLARED, Places(tmp_path))) == []


@pytest.fixture
def keeps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Places:
    """A host on which keep last ran at NOW, and everything else is older."""
    places = Places(tmp_path)
    for file in (places.declared / "host.json", places.run / "watch.pid", places.state / "keep.json"):
        file.parent.mkdir(parents=True)
        file.touch()
        os.utime(file, (NOW - 86400,) * 2)
    at = datetime.fromtimestamp(NOW, UTC).isoformat(timespec="seconds")
    (places.state / "keep.json").write_text(json.dumps({"at": at}))
    monkeypatch.setattr(time, "clock_gettime", lambda _: 86400.0)
    return places


NOW = 1_800_000_000.0
LATE = NOW + verify.KEEP_SECONDS + 1


def test_a_keep_that_does_not_run_is_missed_however_active_its_timer_is(keeps: Places) -> None:
    assert list(verify.kept(LOOKING, keeps, LATE - 1)) == []
    (found,) = verify.kept(LOOKING, keeps, LATE)
    file = str(keeps.state / "keep.json")
    assert found == ("host", "keep overdue", file, "a run within 10 minutes", "2027-01-15T08:00:00+00:00")


@pytest.mark.parametrize("text", [None, "", "[]", "{}", '{"at": 1}'])
def test_a_keep_that_has_never_run_is_missed(keeps: Places, text: str | None) -> None:
    file = keeps.state / "keep.json"
    file.unlink() if text is None else file.write_text(text)
    (found,) = verify.kept(LOOKING, keeps, NOW)
    assert found.what == "keep overdue"


@pytest.mark.parametrize("begun", ["etc/bulkhead/host.json", "run/bulkhead/watch.pid"])
def test_after_a_deploy_or_a_start_of_the_watch_process_keep_has_time_for_its_first_run(
    keeps: Places, begun: str
) -> None:
    os.utime(keeps.root / begun, (LATE, LATE))
    assert list(verify.kept(LOOKING, keeps, LATE + verify.KEEP_SECONDS)) == []
    assert len(list(verify.kept(LOOKING, keeps, LATE + verify.KEEP_SECONDS + 1))) == 1


def test_after_a_boot_keep_has_time_for_its_first_run(keeps: Places, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "clock_gettime", lambda _: 30.0)
    assert list(verify.kept(LOOKING, keeps, LATE)) == []


def test_where_no_keep_was_deployed_none_is_missed(keeps: Places) -> None:
    for host in ({}, {"agent": {"verbs": ["verify"]}}):
        assert list(verify.kept(Declared({"environments": {}, **host}, {}), keeps, LATE)) == []


# When a difference counts.

A = Difference("dev", "container state", "container x", "running", "restarting")
B = Difference("host", "cgroup file", "/sys/x", "1", "2")


def settle(*looks: Sequence[Difference], marks: Sequence[str] = ()) -> tuple[list[Difference], int]:
    """What counts of these looks, and how many were taken."""
    left = list(looks)
    found, _ = verify.settled(lambda: Look(list(left.pop(0))), lambda: frozenset(marks), lambda _: None)
    return found.differences, len(looks) - len(left)


def test_without_a_difference_one_look_is_enough() -> None:
    assert settle([]) == ([], 1)


def test_what_a_second_look_does_not_find_is_not_told() -> None:
    assert settle([A, B], [B]) == ([B], 2)
    assert settle([A], [B]) == ([], 2)


def test_a_state_that_wavers_is_told_as_it_is_now() -> None:
    now = A._replace(observed="exited with code 1")
    assert settle([A], [now]) == ([now], 2)


def test_what_is_being_deployed_is_left_out_and_everything_else_is_not() -> None:
    assert settle([A, B], [A, B], marks=["dev"]) == ([B], 2)


def test_a_deploy_of_the_host_changes_the_slices_of_all_environments_and_nothing_else_of_theirs() -> None:
    slice_file = Difference("dev", "cgroup file", "/sys/fs/cgroup/bulkhead-dev/pids.max", "1", "2")
    containers_file = slice_file._replace(what="cgroup file of container x")
    found = [A, B, slice_file, containers_file]
    assert settle(found, found, marks=["host"]) == ([A, containers_file], 2)
    assert settle(found, found, marks=["prod"]) == (found, 2)


def test_a_deploy_that_ends_between_the_looks_is_left_out_too() -> None:
    marks = iter([frozenset({"dev"}), frozenset[str]()])
    found, under_way = verify.settled(lambda: Look([A]), lambda: next(marks), lambda _: None)
    assert not found.differences
    assert under_way == {"dev"}


def test_a_mark_that_was_left_behind_ends(tmp_path: Path) -> None:
    places = Places(tmp_path)
    assert deploying(places) == frozenset()
    (places.run / "deploying").mkdir(parents=True)
    for name, age in (("dev", 60), ("prod", DEPLOY_SECONDS + 1)):
        mark = places.run / "deploying" / name
        mark.touch()
        os.utime(mark, (time.time() - age,) * 2)
    assert deploying(places) == {"dev"}


def test_since_is_when_it_was_first_seen_also_when_its_value_wavers() -> None:
    first = verify.remembered([A, B], [], "monday")
    assert {one["since"] for one in first} == {"monday"}
    later = verify.remembered([A._replace(observed="exited"), B], first[:1], "tuesday")
    assert [one["since"] for one in later] == ["monday", "tuesday"]


def test_metrics_count_by_environment_also_what_is_none() -> None:
    found = verify.remembered([A, B, A._replace(where="container y")], [], "monday")
    text = verify.metrics({"differences": found, "undecided": ["nft"]}, ["prod", "dev"], 1_800_000_000.4, 1.23456)
    values = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    assert values == {
        'bulkhead_verify_differences{environment="dev"}': "2",
        'bulkhead_verify_differences{environment="host"}': "1",
        'bulkhead_verify_differences{environment="prod"}': "0",
        "bulkhead_verify_undecided": "1",
        "bulkhead_verify_last_run_timestamp_seconds": "1800000000",
        "bulkhead_verify_duration_seconds": "1.235",
    }
    assert text.count("# TYPE ") == text.count("# HELP ") == len({name.partition("{")[0] for name in values})


@pytest.mark.parametrize("there", [None, "", "[]", "{}", '{"differences": [{"what": "of another version"}]}'])
def test_a_report_that_cannot_be_read_costs_only_what_it_knew(
    there: str | None, host: Places, capsys: pytest.CaptureFixture[str]
) -> None:
    if there is not None:
        host.state.mkdir(parents=True)
        (host.state / "verify.json").write_text(there)
    (host.cgroups / "bulkhead-dev/pids.max").write_text("99\n")
    code, text = ran(host, capsys)
    assert code == 1
    assert "observed 99" in text


def test_what_is_being_deployed_is_said(host: Places, capsys: pytest.CaptureFixture[str]) -> None:
    (host.run / "deploying").mkdir(parents=True)
    (host.run / "deploying/dev").touch()
    (host.cgroups / "bulkhead-dev/pids.max").write_text("99\n")
    code, text = ran(host, capsys)
    assert code == 0
    assert text.splitlines()[-1] == "left out, since they are being deployed: dev"


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Places:
    """A host with one cgroup file declared, and an engine with nothing on it."""
    places = Places(tmp_path)
    (places.declared / "stacks").mkdir(parents=True)
    wanted = {"/sys/fs/cgroup/bulkhead-dev/pids.max": "10"}
    declared = {"environments": {"dev": {"subnet": "10.82.0.0/16", "cgroup_parent": "/bulkhead-dev", "files": wanted}}}
    (places.declared / "host.json").write_text(json.dumps(declared))
    (tmp_path / "sys/fs/cgroup/bulkhead-dev").mkdir(parents=True)
    (tmp_path / "sys/fs/cgroup/bulkhead-dev/pids.max").write_text("10\n")
    places.processes.mkdir()
    monkeypatch.setattr(verify, "engine", lambda *_: [])
    monkeypatch.setattr(verify, "SECOND_LOOK_SECONDS", 0.0)
    return places


def ran(
    places: Places, capsys: pytest.CaptureFixture[str], *, json: bool = False, news: bool = False
) -> tuple[int, str]:
    """Exit code and output of `verify`."""
    code = verify.run(argparse.Namespace(json=json, news=news), places)
    return code, capsys.readouterr().out


def test_all_well_is_one_line(host: Places, capsys: pytest.CaptureFixture[str]) -> None:
    code, text = ran(host, capsys)
    assert code == 0
    assert len(text.splitlines()) == 1
    assert text.startswith("OK: as declared (")
    assert json.loads((host.state / "verify.json").read_text())["differences"] == []


def test_a_difference_is_printed_written_and_counted_and_news_only_once(
    host: Places, capsys: pytest.CaptureFixture[str]
) -> None:
    file = host.cgroups / "bulkhead-dev/pids.max"
    assert ran(host, capsys, news=True)[1].startswith("OK")
    assert ran(host, capsys, news=True) == (0, "")
    file.write_text("99\n")
    code, text = ran(host, capsys, news=True)
    assert code == 1
    assert text.startswith("dev: cgroup file: /sys/fs/cgroup/bulkhead-dev/pids.max: expected 10, observed 99, since 20")
    assert ran(host, capsys, news=True) == (1, "")
    report = json.loads(ran(host, capsys, json=True)[1])
    assert report == json.loads((host.state / "verify.json").read_text())
    assert report["differences"][0]["observed"] == "99"
    metrics = (host.state / "metrics/verify.prom").read_text()
    assert 'bulkhead_verify_differences{environment="dev"} 1\n' in metrics
    assert 'bulkhead_verify_differences{environment="host"} 0\n' in metrics
    file.write_text("10\n")
    assert ran(host, capsys, news=True)[1].startswith("OK")


def test_a_keep_that_is_overdue_is_told(
    host: Places, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = host.declared / "host.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"agent": {"verbs": ["keep"]}}))
    os.utime(file, (0, 0))
    monkeypatch.setattr(time, "clock_gettime", lambda _: 86400.0)
    assert "host: keep overdue: " in ran(host, capsys)[1]


def test_an_engine_that_does_not_answer_is_undecided_and_the_rest_is_compared(
    host: Places, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def silent(*_: object) -> Any:
        raise Undecided("docker container ls: no answer. Next step: start Docker")

    monkeypatch.setattr(verify, "engine", silent)
    assert ran(host, capsys) == (2, "undecided: docker container ls: no answer. Next step: start Docker\n")
    (host.cgroups / "bulkhead-dev/pids.max").write_text("99\n")
    assert ran(host, capsys)[0] == 1


def test_a_container_that_goes_between_the_list_and_the_inspection_is_asked_for_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    answers: list[str | None] = [f"{WEB}\n{DB}\n", None, f"{DB}\n", json.dumps([{"Id": DB}])]

    def answer(*_: object) -> str:
        if (said := answers.pop(0)) is None:
            raise Undecided("no such container")
        return said

    monkeypatch.setattr(verify, "ask", answer)
    assert verify.engine("container", DECLARED) == [{"Id": DB}]
    answers += [f"{WEB}\n", None] * 3
    with pytest.raises(Undecided, match="no such container"):
        verify.engine("container", DECLARED)


def test_a_host_without_a_declaration_is_undecided(tmp_path: Path) -> None:
    with pytest.raises(Undecided, match=r"host\.json.*make up"):
        verify.read(Places(tmp_path))


# What to do about it.


def test_the_runbook_says_what_to_do_about_each_kind_of_difference() -> None:
    kinds = {limit.what for limit in verify.LIMITS} | {verify.SLICE_FILE, "undecided", "subnet of a network"}
    for node in ast.walk(ast.parse(Path(verify.__file__).read_text())):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "Difference":
            kinds |= {str(one.value) for one in node.args[1:2] if isinstance(one, ast.Constant)}
    page = (Path(__file__).parents[2] / "docs/runbooks/differences.md").read_text()
    rows = "\n".join(line.split("|")[1] for line in page.splitlines() if line.startswith("| "))
    assert len(kinds) > 20
    assert not [kind for kind in kinds if kind not in rows]


# The command line.


def test_an_unknown_verb_and_a_broken_host_are_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["frobnicate"])
    assert "invalid choice: 'frobnicate'" in capsys.readouterr().err
