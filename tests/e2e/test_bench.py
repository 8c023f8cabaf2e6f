"""The benchmark runs through on the real engine, writes what it measured, and leaves nothing, also when interrupted."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import docker
import pytest

from tests.bench.arms import ENVIRONMENT, LABELS
from tests.deployed import CHECKOUT, groups, labelled

pytestmark = [pytest.mark.e2e, pytest.mark.slow]  # runs the benchmark itself: more than three minutes

ARMS = {"bulkhead", "plain", "compose", "gated"}
PHASES = {"fresh", "no-op", "destroy"}


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """`make bench ARGS=--quick` under way, with a folder for temporary files of its own; ended at the end."""
    (tmp_path / "temporary").mkdir()
    with subprocess.Popen(
        [sys.executable, "-m", "tests.bench", "--quick", "--json", str(tmp_path / "made" / "bench.json")],
        cwd=CHECKOUT,
        env=os.environ | {"TMPDIR": str(tmp_path / "temporary")},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        try:
            yield process
        finally:
            process.terminate()


def nothing_is_left(engine: docker.DockerClient, folder: Path) -> bool:
    return not (
        any(labelled(engine, LABELS).values()) or groups(ENVIRONMENT) or list((folder / "temporary").glob("bulkhead-*"))
    )


def test_numbers_of_every_arm_are_written_and_nothing_is_left(
    bench: subprocess.Popen[str], tmp_path: Path, engine: docker.DockerClient
) -> None:
    said, _ = bench.communicate(timeout=600)
    assert bench.returncode == 0, said[-4000:]
    found = json.loads((tmp_path / "made" / "bench.json").read_text())
    deploy, preview = found["deploy"], found["preview"]
    assert deploy["seconds"].keys() == ARMS
    assert deploy["ratios"].keys() == {
        f"{arm}/{base}" for arm in ("bulkhead", "gated") for base in ("plain", "compose")
    }
    for measured in (*deploy["seconds"].values(), *deploy["ratios"].values()):
        assert measured.keys() == PHASES
    for measured in (*preview["seconds"].values(), *preview["ratios"].values()):
        assert measured.keys() == {"10"}
    assert preview["seconds"].keys() == ARMS - {"compose"}
    assert all(one["median"] > 0 for arm in deploy["seconds"].values() for one in arm.values())
    assert "bulkhead ÷ plain" in said
    assert nothing_is_left(engine, tmp_path)


def test_an_interrupt_in_the_middle_of_a_deploy_leaves_nothing(
    bench: subprocess.Popen[str], tmp_path: Path, engine: docker.DockerClient
) -> None:
    deadline = time.monotonic() + 120
    while not labelled(engine, LABELS)["containers"]:
        assert bench.poll() is None, bench.communicate()[0][-4000:]
        assert time.monotonic() < deadline
        time.sleep(0.2)
    bench.send_signal(signal.SIGINT)
    said, _ = bench.communicate(timeout=120)
    assert bench.returncode == 130, said[-4000:]
    assert nothing_is_left(engine, tmp_path)
