"""What dev does to prod: one row of ANTAGONISTS each, bounded in memory, processes, disk and time, with a counter.
The counter is dev's work: units a second while prod is under load."""

import json
import os
import re
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

GIB = 2**30
MEMORY_SHARE = 0.6
MEMORY_LEFT = 3 * GIB
"""A hog leaves at least this much: what else runs on the machine is not the benchmark's to kill."""

PROCESSES = 500
"""Forking parents, each with one child at a time: at most twice as many processes, far below 2000."""

WRITES, SYNCED = "1g", "512m"
"""Files that are written over and over: 1.5 GiB of disk at most. The file that is streamed is all hole."""

FILE = "/scratch/load"
GRACE = 15
"""Seconds after its time at which an antagonist is killed whatever it does."""

MEASURED = "measured"
"""A line of this begins the part that counts."""


class FaultError(Exception):
    """An antagonist did not do its work, so that the block says nothing."""


@dataclass(frozen=True)
class Bounds:
    """What this machine allows. `hog`: bytes of anonymous memory. `stream`: bytes of the file that is streamed."""

    cpus: int
    hog: int
    stream: int

    @classmethod
    def of(cls, cpus: int, meminfo: Mapping[str, int]) -> "Bounds":
        """`meminfo`: bytes by name, of proc(5)."""
        total, available = meminfo["MemTotal"], meminfo["MemAvailable"]
        hog = max(GIB // 4, min(int(MEMORY_SHARE * total), available - MEMORY_LEFT))
        return cls(cpus, hog, 2 * total)


def meminfo(text: str) -> dict[str, int]:
    """`/proc/meminfo` in bytes."""
    return {name: int(number) * 1024 for name, number in re.findall(r"^(\w+):\s+(\d+) kB$", text, re.MULTILINE)}


@dataclass(frozen=True)
class Dev:
    """Dev's containers in one arm, by service, and how an image is built there."""

    containers: Mapping[str, str]
    build: Sequence[str]


class Running:
    """An antagonist under way. `begun` waits until the part that counts begins; `work` until it has ended."""

    def begun(self) -> None:
        raise NotImplementedError

    def work(self) -> float:
        """Units a second. FaultError if there were none."""
        raise NotImplementedError

    def stop(self) -> None:
        """Ends it, whatever it does. What it left in a container goes with the container."""
        raise NotImplementedError


class InContainer(Running):
    """A shell script in dev's `load` container, which prints `MEASURED` and, at the end, what it has done."""

    def __init__(self, container: str, script: str, seconds: int, read: Callable[[str], float]) -> None:
        self._read = read
        self._before = ""
        self._process = subprocess.Popen(
            ["docker", "exec", container, "timeout", "--kill-after=1", str(seconds + GRACE), "sh", "-c", script],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def begun(self) -> None:
        for line in self._process.stdout or ():
            if line.strip() == MEASURED:
                return
            self._before += line
        raise FaultError(f"ended before it began: {self._before.strip()[-300:]}")

    def work(self) -> float:
        said, _ = self._process.communicate()
        try:
            rate = self._read(said)
        except (ValueError, KeyError, AttributeError) as error:
            raise FaultError(f"said nothing about its work ({error!r}): {said.strip()[-300:]}") from None
        if rate <= 0:
            raise FaultError("did no work")
        return rate

    def stop(self) -> None:
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        if self._process.stdout:
            self._process.stdout.close()


class Repeated(Running):
    """Commands of the host's engine, one after the other, until the time is over: how many a second."""

    def __init__(self, command: Sequence[str], lead: int, seconds: int) -> None:
        self._command = command
        self._lead, self._seconds = lead, seconds
        self._stopped = threading.Event()
        self._done: list[float] = []
        self._failed = ""
        self._child: subprocess.Popen[str] | None = None
        self._thread = threading.Thread(target=self._run)
        self._started = time.monotonic()
        self._thread.start()

    def _run(self) -> None:
        environment = os.environ | {"DOCKER_CLI_HINTS": "false"}
        while not self._stopped.is_set() and time.monotonic() < self._started + self._lead + self._seconds:
            self._child = subprocess.Popen(
                self._command,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                start_new_session=True,
            )
            said, _ = self._child.communicate()
            if self._child.returncode and not self._stopped.is_set():
                self._failed = said.strip()[-300:]
                return
            self._done.append(time.monotonic())

    def begun(self) -> None:
        time.sleep(max(0.0, self._started + self._lead - time.monotonic()))

    def work(self) -> float:
        self._thread.join(self._lead + self._seconds + GRACE)
        if self._thread.is_alive():
            self.stop()
        if self._failed:
            raise FaultError(f"{' '.join(self._command[:2])} failed: {self._failed}")
        return rate_of(self._done, self._started, self._started + self._lead)

    def stop(self) -> None:
        self._stopped.set()
        if self._child is not None and self._child.poll() is None:
            os.killpg(self._child.pid, signal.SIGKILL)
        self._thread.join()


def rate_of(done: Sequence[float], started: float, begin: float) -> float:
    """How many a second were done after `begin`, by the times at which each was, one after the other from `started`.

    Whole pieces of work in a short time: counting those within it would be off by up to one, so it is counted from the
    last end before `begin` to the last of all.
    """
    before = [one for one in done if one <= begin]
    after = [one for one in done if one > begin]
    if not after:
        raise FaultError("did no work")
    return len(after) / (after[-1] - (before[-1] if before else started))


@dataclass(frozen=True)
class Antagonist:
    """`unit`: what its work is counted in. `start(dev, bounds, lead, seconds)`: begins `lead` seconds before the part
    that counts, so that prod's load meets a dev that has had the machine to itself."""

    name: str
    what: str
    unit: str
    start: Callable[[Dev, Bounds, int, int], Running]


# --- in a container


def stress(options: str, before: str = ":") -> Callable[[Dev, Bounds, int, int], Running]:
    """stress-ng with these options, after the command `before`; `{…}` in both are `Bounds`.

    It runs twice, since it counts over a whole run.
    """

    def start(dev: Dev, bounds: Bounds, lead: int, seconds: int) -> Running:
        script = (
            f"{before}; stress-ng {options} --timeout {lead}s --quiet; echo {MEASURED}; "
            f"stress-ng {options} --timeout {seconds}s --metrics-brief"
        ).format(cpus=bounds.cpus, many=4 * bounds.cpus, half=bounds.hog // 2 // 1024, processes=PROCESSES)
        return InContainer(dev.containers["load"], script, lead + seconds, stress_rate)

    return start


def stress_rate(said: str) -> float:
    """Bogus operations a second of real time, from `--metrics-brief`."""
    found = re.search(r"metrc: \[\d+\] \S+\s+(\d+)\s+([\d.]+)", said)
    if found is None:
        raise ValueError("no metrics")
    return int(found[1]) / float(found[2])


def fio(options: str, size: str) -> Callable[[Dev, Bounds, int, int], Running]:
    """fio with these options on a file of this size; `{…}` in both are `Bounds`. It leaves out its own lead.

    The file is new each time: pages that are in the cache already, or blocks that are written already, would make an
    arm's work depend on the arms before it.
    """

    def start(dev: Dev, bounds: Bounds, lead: int, seconds: int) -> Running:
        script = (
            f"rm -f {FILE}; truncate --size={size} {FILE}; (sleep {lead}; echo {MEASURED}) & "
            f"fio --name=load --ioengine=psync --time_based --ramp_time={lead} --runtime={seconds} "
            f"--output-format=json --filename={FILE} --size={size} {options}; wait; rm -f {FILE}"
        ).format(stream=bounds.stream)
        return InContainer(dev.containers["load"], script, lead + seconds, fio_rate)

    return start


def fio_rate(said: str) -> float:
    """Bytes a second, read and written."""
    job = json.loads(said[said.index("{") :])["jobs"][0]
    ways = [job[way] for way in ("read", "write") if job[way]["runtime"]]
    return float(sum(1000 * one["io_bytes"] / one["runtime"] for one in ways))


def flood(dev: Dev, _: Bounds, lead: int, seconds: int) -> Running:
    """The smallest packets, as fast as they go, from `load` to `peer` over dev's own bridge."""
    server = ["docker", "exec", "--detach", dev.containers["peer"]]
    subprocess.run([*server, "timeout", str(lead + seconds + GRACE), "iperf3", "--server", "--one-off"], check=True)
    script = (
        f"sleep 0.3; (sleep {lead}; echo {MEASURED}) & "
        f"iperf3 --client peer --udp --bitrate 0 --length 64 --omit {lead} --time {seconds} --json; wait"
    )
    return InContainer(dev.containers["load"], script, lead + seconds, flood_rate)


def flood_rate(said: str) -> float:
    """Packets a second that arrived."""
    found = json.loads(said[said.index("{") :])["end"]["sum"]
    return float((found["packets"] - found["lost_packets"]) / found["seconds"])


# --- by the engine


def builds(dev: Dev, _: Bounds, lead: int, seconds: int) -> Running:
    return Repeated(dev.build, lead, seconds)


def restarts(dev: Dev, _: Bounds, lead: int, seconds: int) -> Running:
    return Repeated(("docker", "restart", "--time", "0", dev.containers["spare"]), lead, seconds)


BUILD = Path(__file__).with_name("dev") / "build"

ANTAGONISTS: Mapping[str, Antagonist] = {
    one.name: one
    for one in (
        Antagonist(
            "cpu",
            "one spinning process for each core",
            "operations",
            stress("--cpu {cpus} --cpu-method matrixprod"),
        ),
        Antagonist(
            "cpu-4x",
            "four spinning processes for each core",
            "operations",
            stress("--cpu {many} --cpu-method matrixprod"),
        ),
        Antagonist(
            "memory",
            f"two processes that fill {MEMORY_SHARE:.0%} of the memory, let go and begin again",
            "pieces of 16 MiB",
            stress("--bigheap 2 --bigheap-growth 16m", before="ulimit -v {half}"),
        ),
        Antagonist(
            "stream",
            "a file twice the memory's size (all hole) read through the page cache",
            "bytes",
            fio("--rw=read --bs=1m --direct=0 --invalidate=0", "{stream}"),
        ),
        Antagonist(
            "writes",
            f"buffered writes, over and over in a file of {WRITES}",
            "bytes",
            fio("--rw=write --bs=256k --direct=0", WRITES),
        ),
        Antagonist(
            "sync",
            f"direct writes of 16 KiB at random in a file of {SYNCED}, with fsync after each",
            "bytes",
            fio("--rw=randwrite --bs=16k --direct=1 --fsync=1", SYNCED),
        ),
        Antagonist(
            "forks",
            f"{PROCESSES} processes that fork without a pause",
            "forks",
            stress("--fork {processes} --fork-max 1"),
        ),
        Antagonist("flood", "packets of 64 bytes between two containers, as fast as they go", "packets", flood),
        Antagonist("build", "an image build without a cache, again and again", "builds", builds),
        Antagonist("restart", "a container that is restarted again and again", "restarts", restarts),
    )
}
