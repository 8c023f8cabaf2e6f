"""What differs from what was declared is seen: each change is made by hand on the live deployment, reported by the
watch process within its period and by `make verify`, undone, and then nothing is reported any more."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import docker
import pytest

from tests.e2e.conftest import DEV, PROD, Deployment, running

pytestmark = pytest.mark.e2e

PROGRAM = "/usr/local/lib/bulkhead/host.pyz"
REPORT = Path("/var/lib/bulkhead/verify.json")
TABLE = ("inet", "bulkhead")
PERIOD = 10.0


def told() -> list[dict[str, str]]:
    """The differences of the last comparison, whoever made it."""
    found: list[dict[str, str]] = json.loads(REPORT.read_text())["differences"]
    return found


def within(seconds: float, check: Callable[[], bool]) -> bool:
    """Whether it becomes true in time."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if check():
            return True
        time.sleep(0.1)
    return check()


@pytest.fixture(scope="module")
def watch(live: Deployment, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A watch process with a short period instead of the deployed one, which is started again afterwards."""
    folder = tmp_path_factory.mktemp("watch")
    command = [sys.executable, PROGRAM, "watch"]
    subprocess.run([*command, "--stop"], check=True)
    own = [f"--period={PERIOD:g}", f"--log={folder / 'log'}"]
    process = subprocess.Popen([*command, "verify", "keep", *own])  # or keep is missed after some minutes
    try:
        yield
    finally:
        process.terminate()
        assert process.wait(timeout=30) == 0
        subprocess.run([*command, "--start"], check=True)


def container(engine: docker.DockerClient, environment: str, service: str) -> Any:
    """The (first) container of a service."""
    return next(one for one in running(engine, environment) if one.labels["bulkhead.service"] == service)


@contextmanager
def more_memory_by_docker_update(engine: docker.DockerClient) -> Iterator[tuple[str, ...]]:
    worker = container(engine, DEV, "worker")
    before = worker.attrs["HostConfig"]["Memory"]
    worker.update(mem_limit=before * 2, memswap_limit=before * 2)
    try:
        yield DEV, "memory limit in bytes", worker.name, str(before), str(before * 2)
    finally:
        worker.update(mem_limit=before, memswap_limit=before)


@contextmanager
def another_restart_policy_by_docker_update(engine: docker.DockerClient) -> Iterator[tuple[str, ...]]:
    api = container(engine, PROD, "api")
    api.update(restart_policy={"Name": "no"})
    try:
        yield PROD, "restart policy", api.name, "unless-stopped", "no"
    finally:
        api.update(restart_policy={"Name": "unless-stopped"})


@contextmanager
def written(file: Path, value: str) -> Iterator[None]:
    """A value in a cgroup file, and afterwards the one that was there."""
    before = file.read_text()
    file.write_text(value)
    try:
        yield
    finally:
        file.write_text(before)


@contextmanager
def a_raw_write_to_a_slice(_: docker.DockerClient) -> Iterator[tuple[str, ...]]:
    found = [Path(f"/sys/fs/cgroup/{name}") for name in (f"pids/bulkhead-{DEV}", f"bulkhead-{DEV}")]
    file = next(folder for folder in found if folder.is_dir()) / "pids.max"
    with written(file, "1777"):
        yield DEV, "cgroup file", str(file), "2048", "1777"


@contextmanager
def a_raw_write_to_a_containers_group(engine: docker.DockerClient) -> Iterator[tuple[str, ...]]:
    worker = container(engine, DEV, "worker")
    found = {path: f"/sys/fs/cgroup/{path}/bulkhead-{DEV}/{worker.id}" for path in ("memory", "")}
    file = Path(found["memory"]) / "memory.limit_in_bytes"
    file = file if file.exists() else Path(found[""]) / "memory.max"
    limit = worker.attrs["HostConfig"]["Memory"]
    with written(file, str(limit // 2)):
        yield DEV, "cgroup file of container", str(file), str(limit), str(limit // 2)


@contextmanager
def a_process_moved_out_of_its_slice(engine: docker.DockerClient) -> Iterator[tuple[str, ...]]:
    pid = str(container(engine, DEV, "worker").attrs["State"]["Pid"])
    line = next(
        line for line in Path(f"/proc/{pid}/cgroup").read_text().splitlines() if "memory" in line or "0:" in line
    )
    tree = "/sys/fs/cgroup/memory" if "memory" in line else "/sys/fs/cgroup"
    group = Path(f"{tree}{line.split(':')[2]}")
    (Path(tree) / "cgroup.procs").write_text(pid)
    try:
        yield DEV, "process outside its slice", f"/proc/{pid}/cgroup", f"bulkhead-{DEV}", "/"
    finally:
        (group / "cgroup.procs").write_text(pid)


def nft(*words: str, stdin: str | None = None) -> str:
    return subprocess.run(["nft", *words], input=stdin, capture_output=True, text=True, check=True).stdout


@contextmanager
def firewall_put_back() -> Iterator[None]:
    """The table as it was deployed, afterwards."""
    try:
        yield
    finally:
        nft("--file", "/etc/bulkhead/firewall.nft")


@contextmanager
def the_firewall_flushed(_: docker.DockerClient) -> Iterator[tuple[str, ...]]:
    with firewall_put_back():
        nft("flush", "table", *TABLE)
        yield "host", "firewall statement removed", "nftables inet bulkhead, chain sent", "jump from_", "not there"


@contextmanager
def the_firewalls_table_deleted(_: docker.DockerClient) -> Iterator[tuple[str, ...]]:
    with firewall_put_back():
        nft("delete", "table", *TABLE)
        yield "host", "firewall table removed", "nftables inet bulkhead", "statements", "not there"


@contextmanager
def a_rule_deleted(_: docker.DockerClient) -> Iterator[tuple[str, ...]]:
    listed = json.loads(nft("--json", "list", "table", *TABLE))["nftables"]
    rule = next(one["rule"] for one in listed if one.get("rule", {}).get("comment") == "to another environment")
    with firewall_put_back():
        nft("delete", "rule", *TABLE, rule["chain"], "handle", str(rule["handle"]))
        where = f"nftables inet bulkhead, chain {rule['chain']}"
        yield "host", "firewall statement removed", where, 'comment "to another environment"', "not there"


@contextmanager
def a_rule_added(_: docker.DockerClient) -> Iterator[tuple[str, ...]]:
    with firewall_put_back():
        nft("insert", "rule", *TABLE, "sent", "accept")
        yield "host", "firewall statement added", "nftables inet bulkhead, chain sent", "not there", "accept"


@contextmanager
def a_set_emptied(_: docker.DockerClient) -> Iterator[tuple[str, ...]]:
    with firewall_put_back():
        nft("flush", "set", *TABLE, "environments4")
        where = "nftables inet bulkhead, set environments4"
        yield "host", "firewall statement removed", where, "element 10.9", "not there"


@contextmanager
def a_container_started_outside(engine: docker.DockerClient) -> Iterator[tuple[str, ...]]:
    made = engine.containers.run(
        "debian:bookworm-slim", ["sleep", "600"], name="e2e-outside", network=f"{DEV}-backend", detach=True
    )
    try:
        yield DEV, "container that no deploy made", "e2e-outside", "not there", f"running, on its network {DEV}-backend"
    finally:
        made.remove(force=True)


@contextmanager
def a_container_moved_to_another_network(engine: docker.DockerClient) -> Iterator[tuple[str, ...]]:
    worker, other = container(engine, DEV, "worker"), engine.networks.get(f"{PROD}-backend")
    other.connect(worker)
    try:
        yield DEV, "networks of a container", worker.name, f"{DEV}-backend", f"{DEV}-backend, {PROD}-backend"
    finally:
        other.disconnect(worker)


@contextmanager
def a_container_stopped(engine: docker.DockerClient) -> Iterator[tuple[str, ...]]:
    worker = container(engine, DEV, "worker")
    worker.stop()
    try:
        yield DEV, "container state", worker.name, "running", "exited with code"
    finally:
        worker.start()


@contextmanager
def a_network_of_nobody(engine: docker.DockerClient) -> Iterator[tuple[str, ...]]:
    pool = docker.types.IPAMPool(subnet="10.92.255.0/24")
    made = engine.networks.create("e2e-outside", ipam=docker.types.IPAMConfig(pool_configs=[pool]))
    try:
        yield DEV, "network that no deploy made", "network e2e-outside", "not there", "10.92.255.0/24"
    finally:
        made.remove()


CHANGES = (
    more_memory_by_docker_update,
    another_restart_policy_by_docker_update,
    a_raw_write_to_a_slice,
    a_raw_write_to_a_containers_group,
    a_process_moved_out_of_its_slice,
    the_firewall_flushed,
    the_firewalls_table_deleted,
    a_rule_deleted,
    a_rule_added,
    a_set_emptied,
    a_container_started_outside,
    a_container_moved_to_another_network,
    a_container_stopped,
    a_network_of_nobody,
)


def test_a_fresh_deployment_is_as_declared(live: Deployment) -> None:
    assert "As declared" in live.done("verify")


def test_a_killed_watch_process_is_missed_and_comes_back_with_the_next_up(live: Deployment) -> None:
    if Path("/run/systemd/system").exists():
        pytest.skip("systemd's timers run here")
    before = int(Path("/run/bulkhead/watch.pid").read_text())
    os.kill(before, signal.SIGKILL)
    ran = live.make("verify")
    assert ran.returncode != 0
    assert "host: watch process" in ran.stdout
    live.done("up", "host")
    assert int(Path("/run/bulkhead/watch.pid").read_text()) != before
    assert "As declared" in live.done("verify")


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_change_by_hand_is_reported_within_a_period_and_no_longer_once_undone(
    change: Callable[[docker.DockerClient], Any], live: Deployment, watch: None, engine: docker.DockerClient
) -> None:
    assert within(PERIOD, lambda: not told()), told()
    with change(engine) as (environment, what, where, expected, observed):

        def reported(one: dict[str, str]) -> bool:
            return (
                one["environment"] == environment
                and one["what"].startswith(what)
                and all(word in one[key] for key, word in (("where", where), ("expected", expected)))
                and observed in one["observed"]
            )

        assert within(PERIOD, lambda: any(map(reported, told()))), told()
        since = next(one["since"] for one in told() if reported(one))
        ran = live.make("verify")
        assert ran.returncode != 0
        for text in (f"{environment}: {what}", where, expected, observed, f"since     {since}"):
            assert text in ran.stdout
        assert next(one["since"] for one in told() if reported(one)) == since
    assert within(PERIOD, lambda: not told()), told()


def test_a_firewall_whose_file_is_gone_too_is_written_again_as_the_runbook_says(live: Deployment) -> None:
    nft("delete", "table", *TABLE)
    Path("/etc/bulkhead/firewall.nft").unlink()
    ran = live.make("verify")
    assert ran.returncode != 0
    assert "host: firewall's file removed" in ran.stdout
    assert "host: firewall table removed" in ran.stdout
    live.done("pulumi", args="up --yes --stack host --replace **firewall-table-*")
    assert "As declared" in live.done("verify")


def test_metrics_tell_how_many_differences_there_are() -> None:
    text = Path("/var/lib/bulkhead/metrics/verify.prom").read_text()
    assert f'bulkhead_verify_differences{{environment="{DEV}"}} 0' in text
    assert "bulkhead_verify_last_run_timestamp_seconds " in text
