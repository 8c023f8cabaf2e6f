"""Slices on the real kernel and engine: a throwaway one is made by a deploy's own scripts, and containers in it try to
take more than they may. Nothing is deployed; all of it is gone afterwards, also when a test fails."""

import argparse
import itertools
import json
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from ipaddress import IPv4Network
from pathlib import Path
from typing import Any

import docker
import pytest
from docker.models.containers import Container

from components.slice import OOM_SCORE_ADJ, SliceArgs, effective_files, scripts
from host import keep
from host.machine import Places, write
from settings import host
from settings.ledger import Budget, Capacity, Environment, Ledger, Tier, slice_name
from tests.e2e.test_deployment import eventually

pytestmark = pytest.mark.e2e

MIB = 2**20
NAME = "e2e-slices"
IMAGE = "debian:bookworm-slim"
MEMORY, PIDS, DISK = 64 * MIB, 64, 24 * MIB
SPEED = {"read_bps": 10**9, "write_bps": 8_000_000, "read_iops": 10**6, "write_iops": 10**6}
"""Made up, and small, so that a ceiling of half of it is seen within seconds."""
ATTEMPTS = 300
BLOCKS = 24

Start = Callable[..., Container]


@dataclass(frozen=True)
class Elsewhere(Places):
    """The real kernel, with declarations and reports of this test's own."""

    folder: Path = Path("/nowhere")

    @property
    def declared(self) -> Path:
        return self.folder / "etc"

    @property
    def state(self) -> Path:
        return self.folder / "state"

    @property
    def run(self) -> Path:
        return self.folder / "run"


def arguments(tier: Tier) -> SliceArgs:
    """The slice as an environment of the tier would have it on this machine."""
    facts = host.facts()
    reserved = Budget(cpus=facts.cpus / 2, memory=MEMORY) if tier is Tier.PROTECTED else None
    limits = Budget(cpus=facts.cpus, memory=MEMORY, pids=PIDS, disk=DISK, io=0.5) if reserved is None else None
    one = Environment(name=NAME, tier=tier, subnet=IPv4Network("10.99.0.0/16"), reservations=reserved, limits=limits)
    ledger = Ledger(
        file="Pulumi.host.yaml",
        host=None,
        capacity=Capacity(cpus=facts.cpus, memory=facts.memory, disk=facts.disk),
        system=Budget(cpus=facts.cpus / 10),
        environments={NAME: one},
    )
    return SliceArgs(one, ledger, facts)


def shell(script: str) -> None:
    ran = subprocess.run(["sh", "-euc", script], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr


@pytest.fixture
def slice_() -> Iterator[SliceArgs]:
    """A best-effort slice, as a deploy makes it."""
    args = arguments(Tier.BEST_EFFORT)
    create, delete = scripts(args, SPEED)
    try:
        shell(create)
        yield args
    finally:
        shell(delete)


@pytest.fixture
def start(engine: docker.DockerClient, slice_: SliceArgs) -> Iterator[Start]:
    """Starts a container in the slice, or outside of it."""
    parent = slice_name(NAME, slice_.facts.cgroup_driver)
    numbers = itertools.count()

    def run(command: str, *, inside: bool = True, **more: Any) -> Container:
        labels = {keep.LABEL: NAME} if inside else {}
        container: Container = engine.containers.run(
            IMAGE,
            ["sh", "-c", command],
            detach=True,
            init=True,
            name=f"{NAME}-{next(numbers)}",
            labels=labels,
            cgroup_parent=parent if inside else None,
            network_mode="none",
            **more,
        )
        return container

    remove(engine)  # of a run that was cut off
    engine.volumes.create(NAME, labels={keep.LABEL: NAME})
    try:
        yield run
    finally:
        remove(engine)


def remove(engine: docker.DockerClient) -> None:
    """Every container and volume of these tests, also one that was made and did not start."""
    for container in engine.containers.list(all=True, filters={"name": f"^/?{NAME}-"}):
        container.remove(force=True, v=True)
    for volume in engine.volumes.list(filters={"name": f"^{NAME}$"}):
        volume.remove(force=True)


@pytest.fixture
def places(tmp_path: Path, slice_: SliceArgs) -> Places:
    """Where keep finds the slice declared as the host stack declares it."""
    found = Elsewhere(folder=tmp_path)
    declare(found, slice_, DISK)
    return found


def declare(places: Places, args: SliceArgs, disk: int) -> None:
    one = {
        "tier": str(args.environment.tier),
        "cgroup_parent": slice_name(NAME, args.facts.cgroup_driver),
        "files": effective_files(args, SPEED),
        "oom_score_adj": OOM_SCORE_ADJ[args.environment.tier],
        "disk": disk,
    }
    engine = {"cgroup_driver": args.facts.cgroup_driver, "cgroup_version": args.facts.cgroup_version}
    write(places.declared / "host.json", json.dumps({"version": 1, "engine": engine, "environments": {NAME: one}}))


def kept(places: Places) -> int:
    return keep.run(argparse.Namespace(json=False, news=False), places)


def _may_lower_scores() -> bool:
    """Whether this process has CAP_SYS_RESOURCE (capability 24): root on a host has, root in a sandbox may not."""
    status = Path("/proc/self/status").read_text()
    effective = next(line.split()[1] for line in status.splitlines() if line.startswith("CapEff:"))
    return bool(int(effective, 16) >> 24 & 1)


def score(container: Container) -> int:
    container.reload()
    return int(Path(f"/proc/{container.attrs['State']['Pid']}/oom_score_adj").read_text())


def shown(args: SliceArgs) -> dict[str, str]:
    """The slice's files that are foretold, as the kernel shows them."""
    return {path: Path(path).read_text().strip() for path in effective_files(args, SPEED)}


def test_the_kernel_shows_what_is_foretold_also_after_a_change_of_tier_and_back(slice_: SliceArgs) -> None:
    def same(args: SliceArgs) -> None:
        unlimited = str((2**63 - 1) // 4096 * 4096)  # how v1 shows -1
        found = {path: "-1" if value == unlimited else value for path, value in shown(args).items()}
        assert found == effective_files(args, SPEED)

    protected = arguments(Tier.PROTECTED)
    same(slice_)
    for args in (protected, protected, slice_, slice_):
        shell(scripts(args, SPEED)[0])
        same(args)


def test_a_memory_hog_is_killed_within_its_slice_and_nobody_else_is(start: Start) -> None:
    bystander, hog = start("sleep 60", inside=False), start("tail /dev/zero")
    assert hog.wait(timeout=30)["StatusCode"] == 137
    bystander.reload()
    assert bystander.status == "running"


def test_a_fork_bomb_ends_at_the_slices_ceiling(start: Start, slice_: SliceArgs) -> None:
    bomb = start(f"for i in $(seq {ATTEMPTS}); do sleep 20 & done; wait")
    end = time.monotonic() + 15
    most = 0
    while time.monotonic() < end and b"fork" not in bomb.logs():
        groups = keep.folders(_engine(slice_), slice_name(NAME, slice_.facts.cgroup_driver), Places())
        most = max(most, len(keep.processes(groups)))
        time.sleep(0.1)
    assert b"Cannot fork" in bomb.logs()
    assert 0 < most <= PIDS


def _engine(args: SliceArgs) -> dict[str, Any]:
    return {"cgroup_driver": args.facts.cgroup_driver, "cgroup_version": args.facts.cgroup_version}


def test_processes_of_the_slice_are_the_first_to_go_when_the_machine_is_out_of_memory(
    start: Start, places: Places
) -> None:
    bystander, inside = start("sleep 60", inside=False), start("sleep 60 & sleep 60")
    # A container has started before its shell has: init, the shell and its two.
    assert eventually(lambda: len(inside.top()["Processes"]) >= 4, seconds=30)
    assert (score(bystander), score(inside)) == (0, 0)
    assert kept(places) == 0
    assert (score(bystander), score(inside)) == (0, 1000)
    assert score(start("sleep 60", inside=False)) == 0  # and what starts from now on, whatever the engine itself has
    report = json.loads((places.state / "keep.json").read_text())
    assert report["environments"][NAME]["processes"] == len(inside.top()["Processes"])
    if _may_lower_scores():
        assert max(report["engine_scores"].values(), default=keep.ENGINE_SCORE) <= keep.ENGINE_SCORE


def test_direct_writes_keep_to_the_slices_share_of_the_disks_speed(
    start: Start, places: Places, slice_: SliceArgs
) -> None:
    if slice_.facts.io != "throttle":
        pytest.skip("weights divide this machine's IO")
    # Two containers, of which one is idle: on cgroup v1 each has its part of the ceiling, on v2 they share it.
    container, _ = start("sleep 60"), start("sleep 60")
    kept(places)
    parts = 2 if slice_.facts.cgroup_version == 1 else 1
    free, took = written_in(start("sleep 60", inside=False)), written_in(container)
    least = BLOCKS * 2**18 / (SPEED["write_bps"] * 0.5 / parts)
    assert took > max(0.85 * least, 3 * free)
    assert took < 3 * least + free  # and it is the ceiling that was declared


def written_in(container: Container) -> float:
    """Seconds of a direct write."""
    begin = time.monotonic()
    code, said = container.exec_run(["dd", "if=/dev/zero", "of=/trial", "bs=256k", f"count={BLOCKS}", "oflag=direct"])
    assert code == 0, said
    return time.monotonic() - begin


def test_over_its_disk_ceiling_an_environment_waits_and_goes_on_when_it_is_below(
    start: Start, places: Places, capsys: pytest.CaptureFixture[str]
) -> None:
    fill = (
        f"head -c {DISK + MIB} /dev/zero > /data/big; while :; do head -c 65536 /dev/zero >> /data/big; sleep 0.1; done"
    )
    writer = start(fill, volumes={NAME: {"bind": "/data", "mode": "rw"}})
    data = Path(docker.from_env().volumes.get(NAME).attrs["Mountpoint"]) / "big"
    _until(lambda: data.exists() and data.stat().st_size > DISK + MIB)

    assert kept(places) == 1
    size = data.stat().st_size
    assert "PAUSED" in capsys.readouterr().out
    assert _status(writer) == "paused"
    time.sleep(1)
    assert data.stat().st_size == size
    assert kept(places) == 1  # and it stays so
    assert _status(writer) == "paused"

    writer.unpause()  # as a user does to remove something
    assert kept(places) == 1
    assert _status(writer) == "running"
    assert writer.exec_run(["truncate", "-s", "0", "/data/big"])[0] == 0
    _until(lambda: kept(places) == 0)
    assert _status(writer) == "running"

    writer.exec_run(["sh", "-c", f"head -c {DISK + MIB} /dev/zero > /data/more"])
    _until(lambda: kept(places) == 1)
    assert _status(writer) == "paused"
    (data.parent / "more").unlink()
    data.write_bytes(b"")
    _until(lambda: kept(places) == 0)
    assert _status(writer) == "running"


def _status(container: Container) -> str:
    container.reload()
    return str(container.status)


def _until(true: Callable[[], bool], seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it did not come about"
        time.sleep(0.2)
