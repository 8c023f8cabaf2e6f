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

from bench.interference_load import Generator, Seen
from engine import build, dockerd, setup
from tests.e2e.conftest import DEV, LEDGER, PORTS, PROD, Deployment, running
from tests.e2e.test_deployment import eventually, healthy
from tests.e2e.test_verify import PROGRAM, container

pytestmark = pytest.mark.e2e

RATE, SECONDS = 20, 12
URL = f"http://127.0.0.1:{PORTS[PROD]}"
WITHIN = SECONDS - 4
"""Seconds that a fault goes on, while prod is asked."""


@pytest.fixture(scope="module")
def generator() -> Iterator[Generator]:
    """The load on prod."""
    vegeta = build.tool("vegeta", build.default_cache(), setup.say)
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


def pid(one: Container) -> int:
    """Of the container's first process: another one after a restart."""
    one.reload()
    return int(one.attrs["State"]["Pid"])


def inside(one: Container, program: str, *arguments: str) -> str:
    """A Python program in a container of dev's, as somebody who broke into it would run one."""
    done = one.exec_run(["timeout", "--kill-after=1", str(SECONDS), "python3", "-c", program, *arguments])
    assert isinstance(done.output, bytes)
    return done.output.decode(errors="replace")


def test_nothing_of_dev_breaks(generator: Generator) -> None:
    with under_load(generator) as found:
        pass
    unharmed(found)


BOMB = """
import os, sys, time
end, denied = time.monotonic() + float(sys.argv[1]), 0
while time.monotonic() < end:
    try:
        os.fork()
    except OSError as error:
        denied = error.errno
        time.sleep(0.01)
print(denied)
os._exit(0)
"""


def test_a_fork_bomb_in_dev(generator: Generator, engine: docker.DockerClient) -> None:
    with under_load(generator) as found:
        said = inside(container(engine, DEV, "worker"), BOMB, str(WITHIN))
    assert "11" in said.split()  # EAGAIN
    unharmed(found)


HOG = """
held = []
while True:
    held.append(bytes(1 << 24))
    held[-1] = bytearray(held[-1])
"""


def test_a_memory_hog_in_dev_until_it_is_killed(generator: Generator, engine: docker.DockerClient) -> None:
    """It has no limit of its own, so that it meets the whole environment's."""
    image = container(engine, DEV, "worker").image
    parent = container(engine, DEV, "worker").attrs["HostConfig"]["CgroupParent"]
    hog = engine.containers.create(
        image, ["timeout", "60", "python3", "-c", HOG], cgroup_parent=parent, network_mode="none", name="e2e-hog"
    )
    try:
        with under_load(generator) as found:
            hog.start()
            ended = hog.wait(timeout=90)["StatusCode"]
    finally:
        hog.remove(force=True, v=True)
    assert ended == 128 + signal.SIGKILL
    unharmed(found)


FILL = """
import os, sys
with open("/tmp/fill", "wb") as file:
    for _ in range(int(sys.argv[1])):
        file.write(bytes(1 << 20))
"""


def test_dev_fills_its_disk(generator: Generator, engine: docker.DockerClient) -> None:
    """Up to its ceiling; then it waits (`docker pause`) until there is room again."""
    ceiling = int(LEDGER["bulkhead:environments"][DEV]["limits"]["disk"].removesuffix("MiB"))
    worker = container(engine, DEV, "worker")
    keep = [sys.executable, PROGRAM, "keep"]
    try:
        with under_load(generator, 2 * SECONDS) as found:
            inside(worker, FILL, str(ceiling + 16))
            subprocess.run(keep, check=False, capture_output=True)
            worker.reload()
            state = worker.status
    finally:
        if worker.status == "paused":
            worker.unpause()
        worker.exec_run(["rm", "-f", "/tmp/fill"])
        subprocess.run(keep, check=True, capture_output=True)
    assert state == "paused"
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


def test_the_engine_restarts_with_live_restore(
    live: Deployment, generator: Generator, engine: docker.DockerClient, record_property: Callable[[str, object], None]
) -> None:
    """Containers go on, and are asked on their own address. Published ports on loopback are the engine's own processes
    (docker-proxy), which go with it: what their clients see is recorded."""
    state = Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local/state")
    engine_pid = dockerd.runs(state / "bulkhead/engine/dockerd.pid", "dockerd")
    if engine_pid is None:
        pytest.skip("set-up did not start this engine, so it is not ours to restart")
    assert engine.info()["LiveRestoreEnabled"]
    with under_load(generator, 2 * SECONDS) as found:
        os.kill(engine_pid, signal.SIGTERM)
        assert eventually(lambda: not Path(f"/proc/{engine_pid}").exists())
        live.done("engine-start", XDG_STATE_HOME=str(state))
    record_property("share of prod's requests that failed while the engine restarted", found[0].errors)
    print(f"engine restart: {found[0].errors:.1%} of prod's requests failed")
    with under_load(generator) as after:
        pass
    unharmed(after)
