"""Bulkhead deploys from outside to a server as users have it, as a user who is not root; and what it set up there
survives what happens to servers: a reload of systemd, a restart of the engine, a reboot."""

import json
import re
import time
from collections.abc import Mapping
from itertools import product
from typing import Any

import pytest

from cli.agent import PROGRAM
from settings.ssh import DOOR
from tests.e2e.conftest import Deployment
from tests.vm.conftest import DEV, ENVIRONMENTS, PROD, SERVICES, outputs
from tests.vm.machine import DEPLOYER, Server

pytestmark = pytest.mark.vm

PAGE = 4096
CHANGES = {"installed", "written", "made", "added", "restarted", "enabled", "started"}
LIMITS = (
    *("cpu.weight", "cpu.idle", "cpu.max", "pids.max", "io.max"),
    *("memory.min", "memory.low", "memory.high", "memory.max", "memory.swap.max"),
)
HEALTH_SECONDS = 300
BACK_SECONDS = 120
REPORTED_SECONDS = 300
"""A period of the timer, and two looks of an emulated CPU."""
BACK_UP = f"python3 {PROGRAM} backup --environment {PROD} --job db"
LOCK = "/run/bulkhead/backup.lock"
TABLE = "nft --stateless list table inet bulkhead"

# Read in one go: a connection takes longer than all of it.
CONTAINERS = """
import json, subprocess
from pathlib import Path

def docker(*words):
    return subprocess.run(["docker", *words], stdout=subprocess.PIPE, check=True).stdout

ids = docker("ps", "--all", "--quiet", "--filter", "label=bulkhead.service").decode().split()
found = [
    {"id": one["Id"], "labels": one["Config"]["Labels"], "state": one["State"]}
    for one in (json.loads(docker("inspect", *ids)) if ids else ())
    if "bulkhead.files" not in one["Config"]["Labels"]  # a carrier of secrets never runs
]
for one in found:
    file = Path(f"/proc/{one['state']['Pid']}/cgroup")
    one["cgroup"] = file.read_text().strip().removeprefix("0::") if file.exists() else ""
print(json.dumps(found))
"""


def containers(server: Server) -> list[dict[str, Any]]:
    """The services' containers as the engine has them, with `cgroup`, the group of their first process."""
    found: list[dict[str, Any]] = json.loads(server.run("python3 -", stdin=CONTAINERS.encode()).stdout)
    return found


def healthy(server: Server) -> list[dict[str, Any]]:
    """The containers, once all of them say that they are healthy."""
    deadline = time.monotonic() + HEALTH_SECONDS
    while True:
        found = containers(server)
        there = [
            (one["labels"]["bulkhead.environment"], one["labels"]["bulkhead.service"])
            for one in found
            if one["state"].get("Health", {}).get("Status") == "healthy"
        ]
        if sorted(there) == sorted(product(ENVIRONMENTS, SERVICES)):
            return found
        assert time.monotonic() < deadline, there
        time.sleep(5)


def unit(server: Server, name: str, *properties: str) -> dict[str, str]:
    """Properties of a unit, as systemd has them in force."""
    shown = server.said(f"systemctl show {name} --property={','.join(properties)}")
    return dict(line.partition("=")[::2] for line in shown.splitlines())


def slices(server: Server) -> Mapping[str, str]:
    """Every limit of Bulkhead's slices and of the system's, as the kernel has it, by file."""
    listed = server.said(
        "cd /sys/fs/cgroup\n"
        "for group in system.slice bulkhead.slice bulkhead.slice/bulkhead-*.slice; do\n"
        f"  for file in {' '.join(LIMITS)}; do\n"
        '    [ ! -e $group/$file ] || echo "$group/$file:$(paste -sd " " $group/$file)"\n'
        "  done\n"
        "done"
    )
    return dict(line.partition(":")[::2] for line in listed.splitlines())


# --- the user who deploys


def test_bootstrap_prepares_the_server_and_a_second_run_changes_nothing(
    server: Server, bootstrapped: tuple[Deployment, str]
) -> None:
    deployment, said = bootstrapped
    assert "user deploy: made" in said
    assert f"{DOOR}: written" in said
    again = deployment.done("bootstrap", HOST=server.url("root"), KEY=str(server.key))
    assert not CHANGES & set(again.replace(",", " ").split()), again


def test_the_deployer_is_not_root_and_becomes_it_through_one_door_only(
    server: Server, bootstrapped: tuple[Deployment, str]
) -> None:
    def code(script: str, stdin: bytes = b"") -> int:
        return server.run(script, user=DEPLOYER, check=False, stdin=stdin).returncode

    assert server.said("id -un", DEPLOYER) == DEPLOYER
    for forbidden in ("id", "sh -c id", f"{DOOR} --help", f"/bin/sh {DOOR}"):
        assert code(f"sudo -n {forbidden}") != 0, forbidden
    assert server.run(f"sudo -n {DOOR}", user=DEPLOYER, stdin=b"id -u").stdout == "0\n"
    assert server.said("stat -c '%U %a' /etc/sudoers.d/bulkhead; visudo -cq && echo valid") == "root 440\nvalid"
    assert server.said(f"stat -c '%U %a' {DOOR}") == "root 755"


def test_what_went_through_the_door_is_in_the_journal(server: Server, bootstrapped: tuple[Deployment, str]) -> None:
    script = b"exit 5 # to be found again"
    sum_ = server.run("sha256sum", stdin=script).stdout.split()[0]
    assert server.run(f"LEAK=seen sudo -n {DOOR}", user=DEPLOYER, check=False, stdin=script).returncode == 5
    lines = server.said("journalctl --sync; journalctl --identifier=bulkhead-root --output=cat").splitlines()
    assert f"run sha256={sum_} bytes={len(script)} caller={DEPLOYER}" in lines
    assert f"end sha256={sum_} code=5" in lines
    environment = server.run(f"LEAK=seen sudo -n {DOOR}", user=DEPLOYER, stdin=b"env").stdout
    assert {line.partition("=")[0] for line in environment.splitlines()} == {"PATH", "HOME", "LANG", "PWD"}


# --- what a deploy sets up


def test_the_deploy_ends_with_a_proof(up: tuple[Deployment, str]) -> None:
    assert re.search(r"Proof: \d+ paths tried.*: 0 unexpected", up[1].replace("\n", " ")), up[1][-3000:]


def test_every_service_runs_in_its_environments_slice(server: Server, deployed: Deployment) -> None:
    for one in healthy(server):
        name = one["labels"]["bulkhead.environment"]
        assert one["cgroup"] == f"/bulkhead.slice/bulkhead-{name}.slice/docker-{one['id']}.scope"


def test_slices_are_units_with_what_the_ledger_promises(server: Server, deployed: Deployment) -> None:
    promised = outputs(deployed)
    reserved = promised[PROD]["budget"]["reservations"]["memory"] // PAGE * PAGE
    limits = promised[DEV]["budget"]["limits"]
    ceiling = limits["memory"] // PAGE * PAGE
    limited = ("CPUWeight", "CPUQuotaPerSecUSec", "MemoryMin", "MemoryLow", "MemoryMax", "TasksMax")
    # 60 % of the CPUs stand to the system's 10 % as the weight to systemd's 100.
    protected = {"CPUWeight": "600", "MemoryMin": str(reserved), "MemoryLow": str(reserved)}
    free = {"CPUQuotaPerSecUSec": "infinity", "MemoryMax": "infinity", "TasksMax": "infinity"}
    assert unit(server, f"bulkhead-{PROD}.slice", *limited) == protected | free
    assert unit(server, "bulkhead.slice", "CPUWeight", "MemoryMin", "MemoryLow") == protected
    dev = unit(server, f"bulkhead-{DEV}.slice", *limited, "MemorySwapMax")
    assert dev == {
        "CPUWeight": "idle",
        "CPUQuotaPerSecUSec": "infinity",
        "MemoryMin": "0",
        "MemoryLow": "0",
        "MemoryMax": str(ceiling),
        "MemorySwapMax": "0",
        "TasksMax": str(limits["pids"]),
    }
    kernel = slices(server)
    assert kernel[f"bulkhead.slice/bulkhead-{DEV}.slice/memory.max"] == str(ceiling)
    assert kernel[f"bulkhead.slice/bulkhead-{DEV}.slice/pids.max"] == str(limits["pids"])
    assert kernel[f"bulkhead.slice/bulkhead-{DEV}.slice/cpu.idle"] == "1"
    assert kernel[f"bulkhead.slice/bulkhead-{PROD}.slice/memory.min"] == str(reserved)
    assert int(kernel["system.slice/memory.low"]) > 0
    for name in ENVIRONMENTS:
        state = unit(server, f"bulkhead-{name}.slice", "ActiveState", "UnitFileState")
        assert state == {"ActiveState": "active", "UnitFileState": "enabled"}


# --- what it survives, in the order of how much is lost


def test_a_reload_of_systemd_changes_no_limit(server: Server, deployed: Deployment) -> None:
    before = slices(server)
    server.run("systemctl daemon-reload")
    assert slices(server) == before


def table(server: Server) -> str:
    """The firewall's table, without what it has counted."""
    return server.said(TABLE)


def test_a_change_by_hand_is_reported_by_the_timer(server: Server, deployed: Deployment) -> None:
    file = f"/sys/fs/cgroup/bulkhead.slice/bulkhead-{DEV}.slice/pids.max"
    before = server.said(f"cat {file}; echo 77 > {file}")
    deadline = time.monotonic() + REPORTED_SECONDS
    while f"bulkhead-{DEV}.slice/pids.max" not in server.said("cat /var/lib/bulkhead/verify.json"):
        assert time.monotonic() < deadline
        time.sleep(5)
    server.run(f"echo {before} > {file}")


def test_the_firewall_is_back_after_nftables_was_restarted_or_loaded_anew(server: Server, deployed: Deployment) -> None:
    """Both flush all tables. The engine's own come back with its next start, which is the next test."""
    before = table(server)
    for verb in ("restart", "reload"):
        server.run(f"systemctl {verb} nftables")  # and does not wait for what that entails
        deadline = time.monotonic() + BACK_SECONDS
        while server.run(TABLE, check=False).stdout.rstrip() != before:
            assert time.monotonic() < deadline, server.run(TABLE, check=False)
            time.sleep(1)


def test_a_restart_of_the_engine_stops_no_service_and_changes_no_limit(server: Server, deployed: Deployment) -> None:
    before, limits, rules = healthy(server), slices(server), table(server)
    server.run("systemctl restart docker")
    after = {one["id"]: one for one in healthy(server)}
    for one in before:
        assert after[one["id"]]["state"]["Pid"] == one["state"]["Pid"], one["labels"]["bulkhead.service"]
        assert after[one["id"]]["cgroup"] == one["cgroup"]
    assert slices(server) == limits
    assert table(server) == rules


@pytest.fixture(scope="module")
def rebooted(server: Server, deployed: Deployment) -> Mapping[str, str]:
    """The limits from before, with an order in prod's database, and the server back after a reboot in the middle of a
    backup."""
    order = '{"customer": "before-the-reboot", "items": [{"sku": "anchor", "quantity": 1}]}'
    server.run(f"{web(PROD)} --data '{order}' --header 'Content-Type: application/json' http://127.0.0.1:8080/orders")
    limits = slices(server)
    server.run(
        f"setsid {BACK_UP} >/dev/null 2>&1 &\nuntil grep -q backup {LOCK} 2>/dev/null; do sleep 0.2; done; sleep 5"
    )
    server.reboot()
    return limits


def web(environment: str) -> str:
    """Shell text: curl in the environment's front end."""
    filters = f"--filter label=bulkhead.environment={environment} --filter label=bulkhead.service=web"
    return f"docker exec $(docker ps -q {filters}) curl --silent --fail --max-time 60"


def test_after_a_reboot_every_service_is_back_in_its_slice_with_the_same_limits(
    server: Server, rebooted: Mapping[str, str]
) -> None:
    for one in healthy(server):
        name = one["labels"]["bulkhead.environment"]
        assert one["cgroup"] == f"/bulkhead.slice/bulkhead-{name}.slice/docker-{one['id']}.scope"
    assert slices(server) == rebooted


def test_after_a_reboot_prods_data_is_there(server: Server, rebooted: Mapping[str, str]) -> None:
    healthy(server)
    assert "before-the-reboot" in server.said(f"{web(PROD)} http://127.0.0.1:8080/orders")


def test_after_a_reboot_in_the_middle_of_a_backup_nothing_is_half_and_the_next_one_succeeds(
    server: Server, rebooted: Mapping[str, str]
) -> None:
    healthy(server)
    assert "new, snapshot" in server.run(BACK_UP, timeout=900).stdout
    key = server.said(
        f'python3 -c \'import json; print(json.load(open("/etc/bulkhead/backup/{PROD}.json"))["password"])\''
    )
    restic = f"RESTIC_PASSWORD={key} restic --quiet --repo /var/backups/bulkhead/{PROD}"
    server.run(f"{restic} check --read-data", timeout=900)
    # WAL is what comes last in a base backup, so one with it is whole.
    listed = json.loads(server.said(f"{restic} snapshots --json --tag job:db-data,kind:base"))
    for one in listed:
        server.run(f"{restic} dump {one['id']} /base.tar | tar -t -f - | grep -c ^pg_wal/0", timeout=900)
    assert listed


def test_after_a_reboot_the_firewall_was_in_force_before_the_engine_started(
    server: Server, rebooted: Mapping[str, str]
) -> None:
    started = "ExecMainExitTimestampMonotonic"
    firewall = unit(server, "bulkhead-firewall.service", "ActiveState", started)
    engine = unit(server, "docker.service", "InactiveExitTimestampMonotonic")
    assert firewall["ActiveState"] == "active"
    assert 0 < int(firewall[started]) < int(engine["InactiveExitTimestampMonotonic"])
    rules = server.said("nft list table inet bulkhead")
    assert 'drop comment "to an environment from outside"' in rules


def test_after_a_reboot_nothing_differs_from_what_was_deployed(
    server: Server, deployed: Deployment, rebooted: Mapping[str, str]
) -> None:
    """For Pulumi, whose `up` changes nothing and proves it all, and for the agent, which looks by itself again."""
    said = deployed.done("up")
    for stack in ("host", *ENVIRONMENTS):
        assert f"{stack}: no changes" in said
    assert ": 0 unexpected" in said
    assert "As declared" in deployed.done("verify")
    assert server.said("systemctl is-active bulkhead-verify.timer bulkhead-keep.timer") == "active\nactive"


# --- the world around the server


# A network namespace plays the internet and a cloud's metadata service.
WORLD = """
ip netns add world
ip link add world type veth peer name eth0 netns world
ip address add 192.0.2.1/30 dev world
ip link set world up
ip -n world address add 192.0.2.2/30 dev eth0
ip -n world link set eth0 up
ip -n world link set lo up
ip -n world route add default via 192.0.2.1
for address in 198.51.100.10 169.254.169.254; do
  ip -n world address add $address dev lo
  ip route add $address via 192.0.2.2 dev world
done
systemd-run --quiet --unit=world ip netns exec world python3 -m http.server 80
for address in 198.51.100.10 169.254.169.254; do
  tries=0
  until python3 -c "import socket; socket.create_connection(('$address', 80), 5)" 2>/dev/null; do
    tries=$((tries + 1))
    [ $tries -lt 20 ]
    sleep 1
  done
done
"""
INTERNET, METADATA = "198.51.100.10:80", "169.254.169.254:80"
PROVE = (
    f"python3 /usr/local/lib/bulkhead/host.pyz prove --json --environment {DEV} "
    f"--outward $(ip -o -4 address show to 10.0.2.0/24 | awk '{{ split($4, a, \"/\"); print a[1] }}') "
    f"--forbidden {METADATA} --allowed {INTERNET}"
)


def proved(server: Server) -> Mapping[tuple[str, str], bool]:
    """Of the host's own address, the internet and the metadata service, by network: whether it came as expected."""
    found: dict[tuple[str, str], bool] = {}
    for one in json.loads(server.run(PROVE, check=False, timeout=600).stdout)["proofs"]:
        for target in ("the host's own address", METADATA, INTERNET):
            if target in one["target"]:
                key = one["source"], target
                found[key] = found.get(key, True) and one["ok"]
    return found


@pytest.mark.slow  # three proofs of all paths: an emulated CPU takes two minutes for each
def test_dev_reaches_of_the_world_what_the_ledger_opens(server: Server, rebooted: Mapping[str, str]) -> None:
    server.run(WORLD)
    front, back = f"{DEV}-frontend", f"{DEV}-backend"
    own = "the host's own address"
    kept = {(front, own): True, (front, METADATA): True, (front, INTERNET): True}
    # An internal network has no way out at all, so what must be reached is not.
    internal = {(back, own): True, (back, METADATA): True, (back, INTERNET): False}
    assert proved(server) == kept | internal
    server.run("nft delete table inet bulkhead")
    opened = proved(server)
    assert (opened[front, own], opened[front, METADATA]) == (False, False)
    server.run("systemctl restart bulkhead-firewall")
    assert proved(server) == kept | internal


# --- the end


def test_down_leaves_only_prods_data(server: Server, deployed: Deployment, rebooted: Mapping[str, str]) -> None:
    deployed.done("down", BULKHEAD_CONFIRM=PROD)
    ours = "--filter label=bulkhead.environment"
    assert server.said(f"docker ps --all --quiet {ours}; docker network ls --quiet {ours}") == ""
    kept = server.said("docker volume ls --quiet --filter label=bulkhead.environment").split()
    assert sorted(kept) == [f"{PROD}-cache-data", f"{PROD}-db-data"]
    left = "ls -d /etc/bulkhead /usr/local/lib/bulkhead /var/lib/bulkhead /run/bulkhead /sys/fs/cgroup/bulkhead.slice"
    assert (
        server.said(f"{left} /etc/systemd/system/*bulkhead* /etc/systemd/system/*/*bulkhead* 2>/dev/null || true") == ""
    )
    assert server.run("nft list table inet bulkhead", check=False).returncode != 0
