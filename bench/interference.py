"""The interference benchmark: what dev's misbehaviour costs prod, without limits, with static ones, with Bulkhead.
`make bench-interference` takes five minutes after set-up; ARGS=--full measures everything, for the documentation."""

import argparse
import json
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import docker
import numpy as np
from docker.errors import DockerException
from requests.exceptions import RequestException
from rich.console import Console

from bench import interference_report as report
from bench.interference_antagonists import ANTAGONISTS, Antagonist, Bounds, FaultError, Running, meminfo
from bench.interference_arms import (
    ARMS,
    LABELS,
    Arm,
    Workbench,
    back,
    need_room,
    oom_kills,
    there,
)
from bench.interference_load import Generator, Ticks, shares
from bench.interference_results import ALONE, DEV_ALONE, RULES, reclaim, voided
from engine import build
from settings import host
from settings.errors import SettingsError
from tests.bench.__main__ import Progressing, machine, positive, terminated
from tests.bench.arms import BenchError

NONE = "none"
"""No antagonist: what an arm costs by itself."""

LOADS = (0.2, 0.4, 0.6, 0.8, 0.95)
LEAD = 1
"""Seconds that dev has the machine to itself before prod's load begins."""

CAPACITY_RUNS = 3
ROOM = 6 * 2**30
DOCS = Path("docs/research")
HERE = Path(".bulkhead/interference")


@dataclass(frozen=True)
class Mode:
    """What a run does where its options say nothing. `seconds`: of load in each arm. `minutes`: of measuring."""

    what: str
    loads: Sequence[float]
    antagonists: Sequence[str]
    seconds: int
    repetitions: int
    minutes: int | None
    output: Path = HERE


MODES = {
    "short": Mode("five minutes at 60 %% load (the default)", (0.6,), (NONE, *ANTAGONISTS), 3, 1, 5),
    "full": Mode(f"all loads, five times, into {DOCS}", LOADS, (NONE, *ANTAGONISTS), 5, 5, None, DOCS),
    "tiny": Mode("one block of one antagonist: does it run?", (0.6,), ("cpu",), 1, 1, None),
}
BY_HAND = (
    f"Remove the containers, networks and volumes with label {' or '.join(LABELS)} (docker ps -a --filter label=…; "
    "unpause them first), then what the host stack made, with `make down` of any checkout"
)


def options(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="make bench-interference ARGS='…'", description="What dev's misbehaviour costs prod."
    )
    modes = parser.add_mutually_exclusive_group()
    for name, mode in MODES.items():
        modes.add_argument(f"--{name}", dest="mode", action="store_const", const=name, help=mode.what)
    parser.add_argument("--minutes", type=positive, help="no new block after so many")
    parser.add_argument("--repetitions", type=positive, help="blocks of each antagonist and load")
    parser.add_argument("--seconds", type=positive, help="of load in each arm")
    parser.add_argument("--loads", type=listed(percentage), help="shares of prod's capacity, as 20,60,95")
    parser.add_argument("--antagonists", type=listed(antagonist), help=f"of {NONE}, {', '.join(ANTAGONISTS)}")
    parser.add_argument("--seed", type=int, default=1, help="of the random orders (default: 1)")
    parser.add_argument("--output", type=Path, help="folder for results, page and plots")
    parser.add_argument("--add", action="store_true", help="to the blocks that the output folder has already")
    parser.add_argument("--report", action="store_true", help="measure nothing; write page and plots anew")
    chosen = parser.parse_args(arguments)
    for name, value in vars(MODES[chosen.mode or "short"]).items():
        if getattr(chosen, name, None) is None:
            setattr(chosen, name, value)
    return chosen


def listed(one: Callable[[str], Any]) -> Callable[[str], tuple[Any, ...]]:
    """An option's value as several, separated by commas."""
    return lambda text: tuple(one(part) for part in text.split(","))


def percentage(text: str) -> float:
    if not 1 <= (number := int(text)) <= 100:
        raise argparse.ArgumentTypeError("from 1 to 100")
    return number / 100


def antagonist(text: str) -> str:
    if text not in (NONE, *ANTAGONISTS):
        raise argparse.ArgumentTypeError(f"one of {NONE}, {', '.join(ANTAGONISTS)}")
    return text


class Bench:
    """Everything that a measurement needs, once both deployments stand."""

    def __init__(self, workbench: Workbench, generator: Generator, bounds: Bounds, chosen: argparse.Namespace) -> None:
        self.workbench, self.generator, self.bounds, self.chosen = workbench, generator, bounds, chosen
        self.random = np.random.default_rng(chosen.seed)

    def capacity(self) -> float:
        """Good answers a second of prod alone, at most: the middle one of several runs, the first one unmeasured.

        Sees on the way what each of prod's containers uses, by which the static partitions are cut.
        """
        place = self.workbench.enter(ARMS[ALONE])
        self._settled(place.url)
        self.generator.capacity(place.url, self.chosen.seconds)
        before = self.workbench.used()
        found = [self.generator.capacity(place.url, self.chosen.seconds) for _ in range(CAPACITY_RUNS)]
        self.workbench.partition({name: after - before[name] for name, after in self.workbench.used().items()})
        if min(found) <= 0:
            raise BenchError(f"The shop at {place.url} answers nothing under load: see docker logs")
        return sorted(found)[CAPACITY_RUNS // 2]

    def block(self, name: str, load: float, capacity: float, step: Callable[[str], None]) -> dict[str, Any]:
        """All arms once, in random order, with one antagonist at one load."""
        against = ANTAGONISTS.get(name)
        rate = max(1, round(load * capacity))
        order = [str(one) for one in self.random.permutation([arm for arm in ARMS if against or arm != DEV_ALONE])]
        arms = {}
        for arm in order:
            step(f"{name} at {load:.0%} of prod's capacity: {arm}")
            arms[arm] = self.measured(ARMS[arm], against, rate)
        solo = arms[ALONE]
        for found in arms.values():
            if "slots" in found:
                found["reclaim"] = reclaim(found.pop("slots"), solo.get("p50", 0.0))
        return {
            "antagonist": name,
            "load": load,
            "rate": rate,
            "order": order,
            "arms": {arm: rounded(arms[arm]) for arm in ARMS if arm in arms},
            "void": voided(arms),
        }

    def measured(self, arm: Arm, against: Antagonist | None, rate: int) -> dict[str, Any]:
        """One arm: what prod's clients saw, what the machine did, what dev got done. `faults` void the block."""
        place = self.workbench.enter(arm)
        os.sync()  # what the arm before has left to be written is not this one's
        found: dict[str, Any] = {"faults": []}
        if arm.prod:
            self._settled(place.url)
        kills = {name: oom_kills(one) for name, one in place.shop.items()} if arm.prod else {}
        running: Running | None = None
        try:
            if arm.dev and against:
                running = against.start(place.dev, self.bounds, LEAD, self.chosen.seconds)
                running.begun()
            found |= self._loaded(place.url if arm.prod else None, rate)
            if running:
                found["work"] = running.work()
        except FaultError as fault:
            found["faults"].append(f"the antagonist {fault}")
        finally:
            if running:
                running.stop()
        if arm.prod:
            found["oom"] = sum(oom_kills(one) - kills[name] for name, one in place.shop.items())
            gone = [name for name, one in place.shop.items() if one.attrs["State"]["Status"] != "running"]
            found["faults"] += [f"{name} of prod does not run" for name in gone]
        return found

    def _loaded(self, address: str | None, rate: int) -> dict[str, Any]:
        """The machine's shares while prod is asked `rate` times a second, if there is an address, and the answers."""
        seconds = self.chosen.seconds
        before = Ticks.now()
        attack = self.generator.attack(address, rate, seconds) if address else None
        time.sleep(seconds)
        after = Ticks.now()
        busy, steal = shares(before, after)
        found = {"busy": busy, "steal": steal}
        if attack:
            attack.wait()
            found |= asdict(self.generator.seen(attack, rate, seconds))
            found["generator"] = attack.cpu / (seconds * self.bounds.cpus)
        return found

    def _settled(self, address: str) -> None:
        if not back(address):
            raise BenchError(f"The shop at {address} did not come back after an arm: see docker ps and docker logs")


def rounded(value: Any) -> Any:
    """Numbers with four digits that count: more would only fill the file."""
    if isinstance(value, dict):
        return {key: rounded(one) for key, one in value.items()}
    return float(f"{value:.4g}") if isinstance(value, float) else value


def schedule(chosen: argparse.Namespace, random: np.random.Generator) -> list[tuple[str, float]]:
    """Antagonists and loads of the blocks, each repetition in an order of its own."""
    every = [(name, load) for load in chosen.loads for name in chosen.antagonists]
    return [every[int(index)] for _ in range(chosen.repetitions) for index in random.permutation(len(every))]


def check(engine: docker.DockerClient) -> None:
    """BenchError where the benchmark would harm or remove what it has not made."""
    if found := there(engine):
        raise BenchError(
            f"There is something here already: {', '.join(found[:5])}. This benchmark loads the machine to its limits "
            f"and deploys a host stack of its own: run it where Bulkhead is not deployed (make down). If a benchmark "
            f"that was killed left it: {BY_HAND}"
        )


@contextmanager
def cleaned(engine: docker.DockerClient, console: Console) -> Iterator[Workbench]:
    """A workbench; at the end, however it comes, everything that it made is gone."""
    facts = host.facts()
    with tempfile.TemporaryDirectory(prefix="bulkhead-bench-") as folder:
        workbench = Workbench(Path(folder), engine, facts.cpus, facts.memory)
        try:
            yield workbench
        finally:
            ignored = [signal.signal(one, signal.SIG_IGN) for one in (signal.SIGINT, signal.SIGTERM)]
            console.print("Removing what the benchmark made")
            for wrong in workbench.remove():
                # What went wrong before goes on up, and says more.
                console.print(f"While removing: {wrong}", style="red", markup=False, soft_wrap=True)
            if left := there(engine):
                console.print(f"Still here: {', '.join(left)}. {BY_HAND}", style="red", markup=False, soft_wrap=True)
            for one, before in zip((signal.SIGINT, signal.SIGTERM), ignored, strict=True):
                signal.signal(one, before)


def measure(chosen: argparse.Namespace, engine: docker.DockerClient, console: Console, found: dict[str, Any]) -> None:
    """Fills `found`, block by block, so that an interrupt loses only the one that is under way."""
    memory = meminfo(Path("/proc/meminfo").read_text())
    with cleaned(engine, console) as workbench:
        need_room(Path(engine.info()["DockerRootDir"]), ROOM)
        vegeta = build.tool("vegeta", build.default_cache(), lambda text: console.print(text, highlight=False))
        found["machine"] = machine(engine)
        bounds = Bounds.of(found["machine"]["cpus"], memory)
        with tempfile.TemporaryDirectory(prefix="bulkhead-bench-load-") as folder:
            bench = Bench(workbench, Generator(vegeta, Path(folder)), bounds, chosen)
            blocks = schedule(chosen, bench.random)
            progress = Progressing(console, 2 + len(blocks) * len(ARMS))
            with progress.bar:
                progress.step("Deploying the shop and dev, by Bulkhead and by plain Compose (some minutes)")
                workbench.deploy()
                progress.step("Prod's capacity, alone")
                capacity = bench.capacity()
                found["capacity"].append(rounded(capacity))
                started = time.monotonic()
                for number, (name, load) in enumerate(blocks):
                    spent = time.monotonic() - started
                    if chosen.minutes and spent + spent / max(1, number) > 60 * chosen.minutes:
                        break
                    found["blocks"].append(bench.block(name, load, capacity, progress.step))


def about(chosen: argparse.Namespace) -> dict[str, Any]:
    """What has to be the same for blocks to be averaged."""
    arms = {name: arm.what for name, arm in ARMS.items()}
    return {"seconds": chosen.seconds, "lead": LEAD, "rules": asdict(RULES), "arms": arms}


def fresh(chosen: argparse.Namespace) -> dict[str, Any]:
    """Results without blocks yet."""
    return {"at": now(), "settings": about(chosen), "machine": {}, "capacity": [], "blocks": []}


def read(chosen: argparse.Namespace) -> dict[str, Any]:
    """The results in the output folder. BenchError if there are none, or not of the kind that is to be added."""
    file = chosen.output / report.RESULTS
    try:
        found: dict[str, Any] = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise BenchError(f"{file} cannot be read ({error}). Measure first, without --add and --report.") from None
    if chosen.add and found["settings"] != about(chosen):
        raise BenchError(f"{file} was measured with other settings. Give the same --seconds, or another --output.")
    return found


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def main() -> int:
    chosen = options()
    console = Console(stderr=True)
    signal.signal(signal.SIGTERM, terminated)
    code = 0
    try:
        found = read(chosen) if chosen.report or chosen.add else fresh(chosen)
        if not chosen.report:
            code = run(chosen, console, found)
    except (BenchError, SettingsError) as error:
        console.print(f"error: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
        return 1
    if not found["blocks"]:
        console.print("No block was measured: nothing is written.")
        return code or 1
    report.write(found, chosen.output)
    report.show(found, Console())
    console.print(f"Written to {chosen.output}", markup=False, highlight=False)
    return code


def run(chosen: argparse.Namespace, console: Console, found: dict[str, Any]) -> int:
    """Measures into `found`; the exit code. What was measured before an error or an interrupt stays."""
    if not host.facts().local:
        raise BenchError("The Docker engine is on another machine. The benchmark loads the local one only.")
    with closing(docker.from_env()) as engine:
        check(engine)
        try:
            measure(chosen, engine, console, found)
        except KeyboardInterrupt:
            console.print("Interrupted; what was made is removed again.")
            return 130
        except (BenchError, SettingsError, build.EngineError, DockerException, RequestException) as error:
            console.print(f"error: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
