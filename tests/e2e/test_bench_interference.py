"""The interference benchmark on the real engine: interrupted in its third block, it writes what the first two measured
and leaves nothing. Shapes only: how fast anything is depends on what else the machine does."""

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

from bench.interference_arms import ARMS, DECLARED, there
from bench.interference_report import PAGE, PLOTTED, RESULTS
from bench.interference_results import AGAIN, ALONE, DEV_ALONE
from tests.deployed import CHECKOUT

pytestmark = [pytest.mark.e2e, pytest.mark.interference]

OURS = ("e2e-", "bench", "interfere-")
THIRD_BLOCK = f"[{2 + 2 * len(ARMS) + 1}/"


class Run:
    """The benchmark under way, and what it has said so far."""

    def __init__(self, folder: Path) -> None:
        self.folder, self._said = folder, folder / "said"
        (folder / "temporary").mkdir()
        options = ["--tiny", "--repetitions", "3", "--output", str(folder / "made")]
        with self._said.open("w") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "bench.interference", *options],
                cwd=CHECKOUT,
                env=os.environ | {"TMPDIR": str(folder / "temporary")},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
            )

    @property
    def said(self) -> str:
        return self._said.read_text()

    def until(self, words: str, seconds: float) -> None:
        """Waits until it has said `words`."""
        deadline = time.monotonic() + seconds
        while words not in self.said:
            assert self.process.poll() is None, self.said
            assert time.monotonic() < deadline, self.said
            time.sleep(0.1)


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Run]:
    if DECLARED.exists() and all(name.startswith(OURS) for name in json.loads(DECLARED.read_text())["environments"]):
        DECLARED.unlink()  # of a suite that was killed: the benchmark would not start beside it
    under_way = Run(tmp_path)
    try:
        yield under_way
    finally:
        under_way.process.terminate()
        under_way.process.wait(300)


def test_what_was_measured_before_an_interrupt_is_written_and_nothing_is_left(
    run: Run, engine: docker.DockerClient
) -> None:
    run.until(THIRD_BLOCK, 900)
    run.process.send_signal(signal.SIGINT)
    assert run.process.wait(300) == 130, run.said
    assert "removed again" in run.said
    assert "Still here" not in run.said
    assert there(engine) == []
    assert not list((run.folder / "temporary").glob("bulkhead-*"))

    found = json.loads((run.folder / "made" / RESULTS).read_text())
    assert found["capacity"][0] > 0
    assert len(found["blocks"]) == 2
    for block in found["blocks"]:
        assert (block["antagonist"], block["load"]) == ("cpu", 0.6)
        assert sorted(block["order"]) == sorted(ARMS)
        for name, arm in block["arms"].items():
            assert 0 < arm["busy"] <= 1
            assert arm["faults"] == []
            assert ("work" in arm) == (name not in (ALONE, AGAIN))
            assert ("p50" in arm) == (name != DEV_ALONE)
            if name != DEV_ALONE:
                assert 0 < arm["throughput"] <= 1.1 * block["rate"]
                assert 0 < arm["p50"] <= arm["p99"]
                assert arm["oom"] == 0
    page = (run.folder / "made" / PAGE).read_text()
    assert "| cpu | 60% |" in page
    assert all((run.folder / "made" / f"interference-{metric}.svg").exists() for metric in PLOTTED)
