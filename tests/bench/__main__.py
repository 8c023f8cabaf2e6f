"""Runs the benchmark: the arms in turn, so that whatever else the machine does meets all of them; then removes all.
Prints tables and writes them as JSON. Seconds differ from machine to machine; the ratios of one run are the result."""

import argparse
import json
import os
import signal
import statistics
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import docker
from docker.errors import DockerException
from requests.exceptions import RequestException
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from settings import host
from settings.errors import SettingsError
from tests.bench.arms import COMPOSE_LABEL, ENVIRONMENT, LABELS, Arm, BenchError, Workspace
from tests.deployed import groups, labelled, removed

TARGET = 1.1
"""A deploy with Bulkhead's components against the same resources in a plain program."""

PHASES = ("fresh", "no-op", "destroy")
BASES = ("plain", "compose")
GROWTH = (100, 400)
"""Growth is linear if time per container at the second size is no more than at the first."""

LINEAR = 1.1
"""The most that it may be above, as other load on the machine never quite averages out."""

BY_HAND = (
    f"Remove the containers and networks with label {' or '.join(LABELS)} (docker ps -a --filter label=…), "
    f"then the cgroups: find /sys/fs/cgroup -depth -type d -path '*/bulkhead-{ENVIRONMENT}*' -delete"
)

Times = dict[str, dict[str, list[float]]]
"""Seconds of each round, by arm and then by phase, or by number of containers."""


class Progressing:
    """What is under way, on stderr: a bar on a terminal, else a line for each step."""

    def __init__(self, console: Console, steps: int) -> None:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        self.bar = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
        self._console, self._steps, self._done = console, steps, 0
        self._task = self.bar.add_task("", total=steps)

    def step(self, what: str) -> None:
        """The next step begins."""
        self.bar.update(self._task, description=what, completed=self._done)
        self._done += 1
        if not self._console.is_terminal:
            self._console.print(f"[{self._done}/{self._steps}] {what}", markup=False, highlight=False)


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="make bench ARGS='…'", description="Deploys and previews, as ratios.")
    parser.add_argument("--rounds", type=positive, default=3, help="deploys of each arm (default: 3)")
    parser.add_argument("--quick", action="store_true", help="1 round of 5 containers, previews of 10: does it run?")
    parser.add_argument("--json", type=Path, default=Path(".bulkhead/bench.json"), help="where the numbers are written")
    return parser.parse_args()


def positive(text: str) -> int:
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError("at least 1")
    return number


def deploys(workspace: Workspace, arms: Sequence[Arm], rounds: int, progress: Progressing) -> Times:
    """Fresh deploy, no-op deploy and destroy of each arm in each round; another arm is first in each round."""
    times: Times = {arm.name: {phase: [] for phase in PHASES} for arm in arms}
    for number in range(rounds):
        for arm in in_turn(arms, number):
            for phase, command in zip(PHASES, (arm.deploy, arm.deploy, arm.destroy), strict=True):
                progress.step(f"round {number + 1} of {rounds}: {arm.name}, {phase}")
                times[arm.name][phase].append(workspace.run(command, arm.folder))
    return times


def previews(
    workspace: Workspace, arms: Sequence[Arm], sizes: Sequence[int], rounds: int, progress: Progressing
) -> Times:
    """A preview of nothing deployed yet, for each size and arm in each round."""
    times: Times = {arm.name: {str(size): [] for size in sizes} for arm in arms}
    for number in range(rounds):
        for size in sizes:
            workspace.size(size)
            for arm in in_turn(arms, number):
                progress.step(f"round {number + 1} of {rounds}: {arm.name}, preview of {size} containers")
                times[arm.name][str(size)].append(workspace.run(arm.preview or (), arm.folder))
    return times


def in_turn(arms: Sequence[Arm], number: int) -> list[Arm]:
    first = number % len(arms)
    return [*arms[first:], *arms[:first]]


def summary(seconds: Sequence[float]) -> dict[str, Any]:
    return {
        "rounds": [round(one, 3) for one in seconds],
        "median": round(statistics.median(seconds), 3),
        "min": round(min(seconds), 3),
        "max": round(max(seconds), 3),
    }


def summaries(times: Times) -> dict[str, Any]:
    """Median and spread, and the ratios to each base round by round: what slowed one round slowed both."""
    ratios = {
        f"{arm}/{base}": {
            key: summary([one / other for one, other in zip(rounds, times[base][key], strict=True)])
            for key, rounds in keys.items()
        }
        for base in BASES
        if base in times
        for arm, keys in times.items()
        if arm not in BASES
    }
    seconds = {arm: {key: summary(rounds) for key, rounds in keys.items()} for arm, keys in times.items()}
    return {"seconds": seconds, "ratios": ratios}


def growth(seconds: Mapping[str, Mapping[str, Mapping[str, float]]]) -> dict[str, float]:
    """By arm: time per container at the larger size of `GROWTH` to that at the smaller. Empty if not measured."""
    few, many = GROWTH
    return {
        arm: round((sizes[str(many)]["median"] / many) / (sizes[str(few)]["median"] / few), 3)
        for arm, sizes in seconds.items()
        if str(few) in sizes and str(many) in sizes
    }


def table(title: str, measured: Mapping[str, Any], label: str, containers: int | None = None) -> Table:
    """Seconds of each arm as median (min to max), then the ratios. `containers`: None where they are the columns."""
    columns = list(next(iter(measured["seconds"].values())))
    shown = Table(title=title, title_justify="left")
    shown.add_column(label)
    for column in columns:
        shown.add_column(f"{column}, s" if containers else f"{column} containers, s", justify="right")
    for arm, keys in measured["seconds"].items():
        cells = [spread(value) for value in keys.values()]
        if not containers:
            each = [f"{1000 * value['median'] / int(key):.0f} ms each" for key, value in keys.items()]
            cells = [f"{cell}\n{one}" for cell, one in zip(cells, each, strict=True)]
        shown.add_row(arm, *cells)
    shown.add_section()
    for pair, keys in measured["ratios"].items():
        shown.add_row(pair.replace("/", " ÷ "), *(spread(value) for value in keys.values()))
    return shown


def spread(value: Mapping[str, Any]) -> str:
    if len(value["rounds"]) == 1:
        return f"{value['median']:.2f}"
    return f"{value['median']:.2f} ({value['min']:.2f} to {value['max']:.2f})"


def report(found: Mapping[str, Any], console: Console) -> None:
    """The tables, and what they come to against the target."""
    deploy, preview = found["deploy"], found["preview"]
    console.print(table(f"Deploy of {found['containers']} containers", deploy, "arm", found["containers"]))
    console.print(table("Preview", preview, "arm"))
    console.print(
        "bulkhead and plain: pulumi up --skip-preview. gated: bulkhead with preview and policies, as make up does it. "
        "The host stack is deployed beforehand.",
        style="dim",
    )
    for phase in ("fresh", "no-op"):
        ratio = deploy["ratios"]["bulkhead/plain"][phase]["median"]
        met = "[green]met[/]" if ratio <= TARGET else "[red]missed[/]"
        console.print(f"bulkhead ÷ plain, {phase}: {ratio:.2f} (target {TARGET}): {met}")
    for arm, ratio in found["growth"].items():
        grows = "[green]linear[/]" if ratio <= LINEAR else "[red]more than linear[/]"
        console.print(
            f"{arm}: a container in a preview of {GROWTH[1]} takes {ratio:.2f} of one of {GROWTH[0]}: {grows}"
        )


def machine(engine: docker.DockerClient) -> dict[str, Any]:
    """What the seconds depend on; `load` is of the last minute, as the run begins."""
    facts = host.facts()
    return {
        "cpus": facts.cpus,
        "memory": facts.memory,
        "kernel": facts.kernel,
        "docker": facts.server_version,
        "cgroup_version": facts.cgroup_version,
        "load": os.getloadavg()[0],
        "other_containers": len(engine.containers.list()),
    }


def check(engine: docker.DockerClient) -> None:
    """BenchError where the benchmark would remove what it has not made."""
    there = [getattr(one, "name", one.id) for kind in labelled(engine, LABELS).values() for one in kind]
    there += [str(group) for group in groups(ENVIRONMENT)]
    if there:
        raise BenchError(
            f"An environment {ENVIRONMENT} is there already: {', '.join(there[:5])}. All of it would be removed at "
            f"the end. If a benchmark that was killed left it: {BY_HAND}"
        )


@contextmanager
def cleaned(engine: docker.DockerClient, console: Console) -> Iterator[Path]:
    """A temporary folder; at the end, however it comes, that and everything of ours on the engine is gone."""
    with tempfile.TemporaryDirectory(prefix="bulkhead-bench-") as folder:
        try:
            yield Path(folder)
        finally:
            ignored = [signal.signal(one, signal.SIG_IGN) for one in (signal.SIGINT, signal.SIGTERM)]
            try:
                with console.status("Removing what the benchmark made"):
                    removed(engine, [ENVIRONMENT], [COMPOSE_LABEL])
            except (DockerException, RequestException, OSError) as error:
                # What went wrong before goes on up, and says more.
                console.print(f"Not all is removed ({error}). {BY_HAND}", style="red", markup=False, soft_wrap=True)
            for one, before in zip((signal.SIGINT, signal.SIGTERM), ignored, strict=True):
                signal.signal(one, before)


def measure(chosen: argparse.Namespace, engine: docker.DockerClient, console: Console) -> dict[str, Any]:
    """All numbers of one run."""
    containers, sizes = (5, (10,)) if chosen.quick else (20, (10, *GROWTH))
    rounds = 1 if chosen.quick else chosen.rounds
    preview_rounds = min(rounds, 2)  # at 400 containers one takes most of a minute
    about = machine(engine)
    with cleaned(engine, console) as folder:
        workspace = Workspace(folder)
        arms = workspace.arms()
        shown = [arm for arm in arms.values() if arm.preview]
        steps = 1 + len(shown) + rounds * len(arms) * len(PHASES) + preview_rounds * len(sizes) * len(shown)
        progress = Progressing(console, steps)
        with progress.bar:
            progress.step("host stack")
            workspace.stacks()
            workspace.size(containers)
            for arm in shown:
                progress.step(f"{arm.name}: once unmeasured, so that Python's byte code is there")
                workspace.run(arm.preview or (), arm.folder)
            deploy = summaries(deploys(workspace, list(arms.values()), rounds, progress))
            preview = summaries(previews(workspace, shown, sizes, preview_rounds, progress))
            workspace.unstack()
    return {
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": about,
        "containers": containers,
        "target": TARGET,
        "deploy": deploy,
        "preview": preview,
        "growth": growth(preview["seconds"]),
    }


def terminated(number: int, frame: FrameType | None) -> NoReturn:
    sys.exit(128 + number)


def main() -> int:
    chosen = options()
    console = Console(stderr=True)
    signal.signal(signal.SIGTERM, terminated)
    try:
        if not host.facts().local:
            raise BenchError("The Docker engine is on another machine. The benchmark loads the local one only.")
        with closing(docker.from_env()) as engine:
            check(engine)
            found = measure(chosen, engine, console)
    except (BenchError, SettingsError) as error:
        console.print(f"error: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
        return 1
    except KeyboardInterrupt:
        console.print("Interrupted; everything is removed again.")
        return 130
    chosen.json.parent.mkdir(parents=True, exist_ok=True)
    chosen.json.write_text(json.dumps(found, indent=2) + "\n")
    report(found, Console())
    console.print(f"Written to {chosen.json}", markup=False, highlight=False)
    return 0


if __name__ == "__main__":
    sys.exit(main())
