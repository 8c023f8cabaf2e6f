"""Prod is asked for pages at a constant rate while something of dev's breaks: no request of prod's fails.
Every fault is bounded in time and size, is seen to have happened, and is over at the end."""

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import docker
import pytest
from docker.models.containers import Container

from bench.interference_load import ORDER, Generator, Seen
from engine import build, dockerd, setup
from tests.e2e.conftest import DEV, LEDGER, PORTS, PROD, Deployment, running
from tests.e2e.test_deployment import eventually, healthy, http
from tests.e2e.test_verify import PROGRAM, container

pytestmark = pytest.mark.e2e

RATE, SECONDS = 20, 12
URL = f"http://127.0.0.1:{PORTS[PROD]}"
WITHIN = SECONDS - 4
"""Seconds that a fault goes on, while prod is asked."""


@pytest.fixture(scope="module")
def generator(live: Deployment) -> Iterator[Generator]:
    """The load on prod."""
    vegeta = build.tool("vegeta", build.default_cache(), setup.say)
    assert has_order(PROD, http(PROD, "/orders", ORDER)["id"])  # one of the requests asks for the first order
    with tempfile.TemporaryDirectory(prefix="bulkhead-faults-") as folder:
        yield Generator(vegeta, Path(folder))


@contextmanager
def under_load(generator: Generator, seconds: int = SECONDS) -> Iterator[list[Seen]]:
    """Prod under load while the body runs; what its clients saw, afterwards."""
    found: list[Seen] = []
    attack = generator.attack(URL, RATE, seconds)
    try:
        time.sleep(1)
        yield found
    finally:
        attack.wait()
    found.append(generator.seen(attack, RATE, seconds))


def unharmed(found: list[Seen]) -> None:
    """Every request that was due was sent, and got a good answer."""
    (seen,) = found
    assert (seen.errors, seen.unsent) == (0, 0), seen


@pytest.fixture(autouse=True)
def back_again(live: Deployment, engine: docker.DockerClient) -> Iterator[None]:
    """Both environments are healthy before and after each fault, and nothing but dev was touched."""
    assert live.folder
    before = {one.id: pid(one) for one in running(engine, PROD)}
    yield
    for name in (PROD, DEV):
        assert eventually(partial(healthy, engine, name), seconds=180), name
    assert {one.id: pid(one) for one in running(engine, PROD)} == before


def has_order(environment: str, number: int) -> bool:
    """Whether an order that was placed here is there."""
    return bool(http(environment, f"/orders/{number}")["customer"] == ORDER["customer"])


def pid(one: Container) -> int:
    """Of the container's first process: another one after a restart."""
    one.reload()
    return int(one.attrs["State"]["Pid"])


@contextmanager
def unlimited(engine: docker.DockerClient, *command: str) -> Iterator[Container]:
    """A container in dev's slice, not yet started, with no limit of its own: it meets the whole environment's."""
    like = container(engine, DEV, "worker")
    parent = like.attrs["HostConfig"]["CgroupParent"]
    made = engine.containers.create(
        like.image, ["timeout", "60", *command], cgroup_parent=parent, network_mode="none", name="e2e-fault"
    )
    try:
        yield made
    finally:
        made.remove(force=True, v=True)


def test_nothing_of_dev_breaks(generator: Generator) -> None:
    with under_load(generator) as found:
        pass
    unharmed(found)


BOMB = "bomb() { bomb | bomb & }; bomb; exec sleep 50"


def test_a_fork_bomb_in_dev(generator: Generator, engine: docker.DockerClient) -> None:
    with unlimited(engine, "sh", "-c", BOMB) as bomb:
        with under_load(generator) as found:
            bomb.start()
            time.sleep(WITHIN)
            bomb.kill()
        said = bomb.logs().decode(errors="replace")
    assert "Cannot fork" in said
    unharmed(found)


HOG = """
held = []
while True:
    held.append(bytearray(b"x") * (1 << 24))
"""


def test_a_memory_hog_in_dev_until_it_is_killed(generator: Generator, engine: docker.DockerClient) -> None:
    with unlimited(engine, "python3", "-c", HOG) as hog, under_load(generator) as found:
        hog.start()
        ended = hog.wait(timeout=90)["StatusCode"]
    assert ended == 128 + signal.SIGKILL
    unharmed(found)


def test_dev_fills_its_disk(generator: Generator, engine: docker.DockerClient) -> None:
    """Up to its ceiling; then it waits (`docker pause`) until there is room again."""
    ceiling = int(LEDGER["bulkhead:environments"][DEV]["limits"]["disk"].removesuffix("MiB"))
    stopped = False
    database, file = container(engine, DEV, "db"), "/var/lib/postgresql/data/fill"
    keep, told = [sys.executable, PROGRAM, "keep"], ""

    def paused() -> bool:
        nonlocal told
        told = subprocess.run([*keep, "--json"], check=False, capture_output=True, text=True).stdout
        database.reload()
        return bool(database.status == "paused")

    try:
        with under_load(generator, 2 * SECONDS) as found:
            filled = database.exec_run(["dd", "if=/dev/zero", f"of={file}", "bs=1M", f"count={ceiling + 16}"])
            stopped = eventually(paused, seconds=60)
    finally:
        if stopped:
            database.unpause()
        database.exec_run(["rm", "-f", file])
        assert eventually(lambda: not subprocess.run(keep, check=False, capture_output=True).returncode)
    assert filled.exit_code == 0, filled.output
    assert stopped, told
    unharmed(found)


def test_a_container_of_dev_restarts_over_and_over(generator: Generator, engine: docker.DockerClient) -> None:
    worker, restarts = container(engine, DEV, "worker"), 0
    with under_load(generator) as found:
        end = time.monotonic() + WITHIN
        while time.monotonic() < end:
            worker.restart(timeout=0)
            restarts += 1
    assert restarts > 2
    unharmed(found)


def test_all_of_dev_is_killed(generator: Generator, engine: docker.DockerClient) -> None:
    killed = running(engine, DEV)
    with under_load(generator) as found:
        for one in killed:
            one.kill()
        time.sleep(WITHIN / 2)
        for one in killed:
            one.start()
    unharmed(found)


def test_what_looks_regularly_is_killed(generator: Generator) -> None:
    if Path("/run/systemd/system").exists():
        pytest.skip("systemd's timers run here, which no signal ends")
    watch = int(Path("/run/bulkhead/watch.pid").read_text())
    try:
        with under_load(generator) as found:
            os.kill(watch, signal.SIGKILL)
    finally:
        subprocess.run([sys.executable, PROGRAM, "watch", "--start"], check=True)
    unharmed(found)


@pytest.mark.parametrize("ended", [signal.SIGTERM, signal.SIGKILL], ids=["stopped", "killed"])
def test_the_engine_ends_and_starts_again(
    ended: signal.Signals,
    live: Deployment,
    generator: Generator,
    engine: docker.DockerClient,
    record_property: Callable[[str, object], None],
) -> None:
    """Containers go on (live-restore), and are asked on their own address. Published ports on loopback are the engine's
    own processes (docker-proxy), which go with it: what their clients see is recorded."""
    state = Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local/state")
    engine_pid = dockerd.runs(state / "bulkhead/engine/dockerd.pid", "dockerd")
    if engine_pid is None:
        pytest.skip("set-up did not start this engine, so it is not ours to restart")
    assert engine.info()["LiveRestoreEnabled"]
    placed = {name: http(name, "/orders", ORDER)["id"] for name in (PROD, DEV)}
    with under_load(generator, 2 * SECONDS) as found:
        os.kill(engine_pid, ended)
        assert eventually(lambda: not Path(f"/proc/{engine_pid}").exists())
        live.done("engine-start", XDG_STATE_HOME=str(state))
    record_property("share of prod's requests that failed while the engine was away", found[0].errors)
    print(f"engine {ended.name}: {found[0].errors:.1%} of prod's requests failed")
    with under_load(generator) as after:
        pass
    unharmed(after)
    for name, number in placed.items():
        assert eventually(partial(has_order, name, number)), name
