"""The backup benchmark: what a backup costs prod's clients, and how fast it is beside pg_basebackup and restic alone.
`make bench-backup` takes half an hour; what it finds is a ratio in one run, in docs/research/backup.md.

Both ways begin with an empty repository that is there, a checkpoint at once, the same pipe, the same weights, and
nothing that is still being written. Ours also counts rows, brings WAL and forgets; what it restores is started,
recovered, counted and on the disk. So each is compared twice: as a whole, and the phase that does what the other does.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import docker
import numpy as np
import yaml
from docker.errors import DockerException, NotFound
from docker.models.containers import Container
from rich.console import Console
from rich.table import Table

from bench.interference_arms import DECLARED, SHOP, free_ports, need_room, url
from bench.interference_load import Generator
from bench.interference_results import bootstrap_ratio
from cli.agent import BACKUPS, PROGRAM
from engine import build
from host.backup import LOWEST, State, jobs
from host.engines import OUR_SLOT, Postgres, mountpoint, of_service
from host.machine import Places
from host.restic import BackupError, Repository
from settings import host
from settings.backup import Backup
from settings.errors import SettingsError
from tests.bench.__main__ import Progressing, machine, positive, terminated
from tests.bench.arms import BenchError, ran
from tests.deployed import copied, isolated, removed

PROD = "backup-prod"
LEDGER: Mapping[str, Any] = {
    "bulkhead:system": {"cpus": "5%", "memory": "10%"},
    "bulkhead:environments": {
        PROD: {"tier": "protected", "subnet": "10.98.0.0/16", "reservations": {"cpus": "60%", "memory": "50%"}}
    },
}
JOB, SERVICE, VOLUME = "db-data", "db", f"{PROD}-db-data"
LOAD = 0.4
"""Share of prod's capacity at which its clients ask."""
FILL = r"""
\set ON_ERROR_STOP on
create table filler as
select g, (select string_agg(encode(sha512((g * 8 + i)::text::bytea), 'hex'), '') from generate_series(1, 8) i) as text
from generate_series(1, {rows}) g;
vacuum (freeze, analyze) filler;
"""
"""Vacuumed: with checksums, whoever reads a page first writes it to the WAL, and a backup would have it twice."""
ROW_BYTES = 1120
"""What a row of `filler` takes up on the disk. Hexadecimal digits: half as dense as what cannot be compressed."""
TARGET = 0.95
DOCS = Path("docs/research")
RATE = (Backup(engine="postgres", schedule="daily").rate or 0) // 2**20
ARMS: Mapping[str, Sequence[str] | None] = {
    "no backup": None,
    "scheduled backup": ["--rate", str(RATE)],
    "backup by hand": [],
}
"""What goes on meanwhile: the options of a backup. A scheduled one has a ceiling; this is the one of who sets none."""
RUNS = {"backup": "first backup", "again": "second backup", "restore": "restore"}


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="make bench-backup ARGS='…'", description="What backups cost, and how fast.")
    parser.add_argument("--gigabytes", type=positive, default=2, help="in prod's database (default: 2)")
    parser.add_argument("--pairs", type=positive, default=8, help="of load with and without a backup (default: 8)")
    parser.add_argument("--seconds", type=positive, default=20, help="of load in each (default: 20)")
    parser.add_argument("--rounds", type=positive, default=3, help="of each way to back up and restore (default: 3)")
    parser.add_argument("--output", type=Path, default=DOCS, help=f"folder for results and page (default: {DOCS})")
    return parser.parse_args()


class Bench:
    """The shop as prod, with backups into a folder that no schedule starts."""

    def __init__(self, folder: Path, engine: docker.DockerClient, chosen: argparse.Namespace) -> None:
        self.folder, self.engine, self.chosen = folder, engine, chosen
        self._copy, self._said = folder / "bulkhead", folder / "said.txt"
        for name in ("bulkhead", "state", "backups", "load"):
            (folder / name).mkdir()
        self._variables = isolated(folder / "state") | {"PYTHONPATH": str(self._copy)}
        (port,) = free_ports(1)
        self.url = url(port)
        self._deployed = False

    def deploy(self) -> None:
        """Host and prod; what would start backups by itself is stopped."""
        copied(self._copy)
        targets = {"targets": {"disk": {"path": str(self.folder / "backups")}}}
        self._write("host", {**LEDGER, "bulkhead:backup": targets})
        self._write(PROD, {"bulkhead:compose": list(SHOP), "bulkhead:variables": {"SHOP_PORT": str(port_of(self.url))}})
        for stack in ("prod", "dev"):
            (self._copy / f"Pulumi.{stack}.yaml").unlink(missing_ok=True)
        self._deployed = True
        ran([sys.executable, "-m", "cli", "up"], self._copy, self._variables, self._said)
        self.agent("watch", "--stop")
        self.agent("backup", "--stop")

    def _write(self, stack: str, config: Mapping[str, Any]) -> None:
        (self._copy / f"Pulumi.{stack}.yaml").write_text(yaml.safe_dump({"config": dict(config)}, sort_keys=False))

    def fill(self) -> None:
        """So many gigabytes of rows, and a backup to begin with."""
        server = self.server()
        filled = server.script(FILL.format(rows=self.chosen.gigabytes * 10**9 // ROW_BYTES), "shop")
        if filled.returncode:
            raise BenchError(f"filling the database: {filled.stderr[-500:]}")
        # Of the WAL of all that nothing is kept.
        server.query(f"select pg_drop_replication_slot(slot_name) {OUR_SLOT}")
        server.query("checkpoint")
        self.agent("backup", "--environment", PROD, "--job", JOB)

    def container(self) -> Container:
        return self.engine.containers.get(of_service(PROD, VOLUME, SERVICE).id)

    def server(self) -> Postgres:
        return Postgres.of(of_service(PROD, VOLUME, SERVICE), VOLUME, None, Places())

    def agent(self, *words: str) -> float:
        """Runs a verb of the host's agent: seconds. BenchError where it fails."""
        began = time.monotonic()
        done = subprocess.run([sys.executable, PROGRAM, *words], capture_output=True, text=True, check=False)
        if done.returncode:
            raise BenchError(f"{' '.join(words)}: {done.stdout[-1500:]}{done.stderr[-1500:]}")
        return time.monotonic() - began

    # --- what prod's clients feel

    def loaded(self, generator: Generator, rate: int, words: Sequence[str] | None) -> dict[str, float]:
        """What clients see for some seconds, while one backup with these options follows another, or none runs."""
        seconds = self.chosen.seconds
        attack = generator.attack(self.url, rate, seconds)
        until, backups = time.monotonic() + seconds, 0
        command = [*LOWEST, sys.executable, PROGRAM, "backup", "--environment", PROD, "--job", JOB]
        command += words or ()
        while words is not None and time.monotonic() < until:
            backups += 1
            child = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            try:
                child.wait(max(0.1, until - time.monotonic()))
            except subprocess.TimeoutExpired:
                self.agent("backup", "--stop")
                child.wait()
        attack.wait()
        seen = generator.seen(attack, rate, seconds)
        return {
            "throughput": seen.throughput, "p50": seen.p50, "p99": seen.p99, "errors": seen.errors, "backups": backups,
        }  # fmt: skip

    # --- how fast

    def into(self, name: str) -> Repository:
        """Prod's job goes into an empty repository of that name from now on, without the WAL of earlier backups."""
        file = Path(BACKUPS) / f"{PROD}.json"
        declared = json.loads(file.read_text())
        repository = str(self.folder / "backups" / name)
        for job in declared["jobs"].values():
            for target in job["targets"].values():
                target["repository"] = repository
        file.write_text(json.dumps(declared))
        shutil.rmtree(Places().state / "backup" / PROD / JOB / "wal", ignore_errors=True)
        made = Repository(repository, declared["password"], self.folder / "cache" / name)
        made.init()
        return made

    def phases(self) -> dict[str, float]:
        """What the last run says of how long it took."""
        last = (Places().state / "backup/records.jsonl").read_text().splitlines()[-1]
        return dict(json.loads(last)["phases"])

    def ours(self, number: int) -> dict[str, Any]:
        """`make backup` and `make restore` of the database, as the agent does them."""
        repository = self.into(f"ours-{number}")
        found: dict[str, Any] = {"phases": {}}
        (job,) = jobs(Places(), [PROD], [JOB])
        for run in ("backup", "again"):
            found[run] = self.agent("backup", "--environment", PROD, "--job", JOB)
            known = State(Places()).known(job)
            found["phases"][run] = self.phases() | {"WAL": known["wal_seconds"]}
        found |= {"added": known["added"], "size": known["size"]}
        volume = f"{PROD}-bench-{number}"
        try:
            found["restore"] = self.agent("restore", "--environment", PROD, "--job", JOB, "--to", volume)
            found["phases"]["restore"] = self.phases()
        finally:
            with suppress(NotFound):
                self.engine.volumes.get(volume).remove()
        shutil.rmtree(repository.url)
        return found

    def plain(self, number: int) -> dict[str, float]:
        """pg_basebackup into restic, and out of it into a folder on the engine's disk, which is synced as a server
        would do: nothing is checked."""
        folder = self.folder / "backups" / f"plain-{number}"
        repository = Repository(str(folder), "key", self.folder / "cache" / f"plain-{number}")
        repository.init()
        began = time.monotonic()
        saved = repository.save_stream(self.server().base(hurry=True), "base.tar", ["plain"], 3600)
        found = {"backup": time.monotonic() - began}
        began = time.monotonic()
        piped(self.server().base(hurry=True), {}, ["dd", "of=/dev/null", "bs=1M"])
        found["pg_basebackup"] = time.monotonic() - began
        there = mountpoint(VOLUME).parent.parent / f"{PROD}-plain-{number}"
        there.mkdir()
        try:
            began = time.monotonic()
            piped(repository.dump(saved.id, "/base.tar"), repository.environment, ["tar", "-xC", str(there)])
            found["unpack"] = time.monotonic() - began
            subprocess.run(["sync", "--file-system", str(there)], check=True)
            found["restore"] = time.monotonic() - began
        finally:
            shutil.rmtree(there)
            shutil.rmtree(folder)
        return found

    def remove(self) -> list[str]:
        """Takes all of it down; what went wrong on the way."""
        wrong = []
        steps: list[Callable[[], object]] = []
        if self._deployed:
            down = [sys.executable, "-m", "cli", "down"]
            steps.append(lambda: ran(down, self._copy, self._variables | {"BULKHEAD_CONFIRM": PROD}, self._said))
        steps.append(lambda: removed(self.engine, [PROD]))
        for step in steps:
            try:
                step()
            except (BenchError, DockerException, OSError) as error:
                wrong.append(str(error))
        return wrong


def port_of(address: str) -> int:
    return int(address.rpartition(":")[2])


def piped(source: Sequence[str], variables: Mapping[str, str], sink: Sequence[str]) -> None:
    """Runs `source | sink`. BenchError where one fails."""
    with subprocess.Popen(source, env={**os.environ, **variables}, stdout=subprocess.PIPE) as first:
        second = subprocess.run(sink, stdin=first.stdout, capture_output=True, check=False)
    if first.returncode or second.returncode:
        raise BenchError(f"{source[0]} … | {sink[0]}: {first.returncode}, {second.stderr.decode()[-500:]}")


@contextmanager
def cleaned(engine: docker.DockerClient, console: Console, chosen: argparse.Namespace) -> Iterator[Bench]:
    """The bench; at the end, however it comes, all that it made is gone. On the engine's disk, since it is large."""
    if DECLARED.exists():
        raise BenchError("Bulkhead is deployed here, and this benchmark deploys a host stack of its own: make down")
    with tempfile.TemporaryDirectory(prefix="bulkhead-bench-", dir="/var/tmp") as folder:
        bench = Bench(Path(folder), engine, chosen)
        try:
            yield bench
        finally:
            console.print("Removing what the benchmark made")
            for wrong in bench.remove():
                console.print(f"While removing: {wrong}", style="red", markup=False, soft_wrap=True)


def measure(chosen: argparse.Namespace, engine: docker.DockerClient, console: Console) -> dict[str, Any]:
    """All numbers of one run."""
    random = np.random.default_rng(1)
    vegeta = build.tool("vegeta", build.default_cache(), lambda text: console.print(text, highlight=False))
    with cleaned(engine, console, chosen) as bench:
        need_room(bench.folder, chosen.gigabytes * 6 * 10**9)
        generator = Generator(vegeta, bench.folder / "load")
        progress = Progressing(console, 3 + len(ARMS) * chosen.pairs + 2 * chosen.rounds)
        about = machine(engine)
        with progress.bar:
            progress.step("Deploying the shop (some minutes)")
            bench.deploy()
            progress.step(f"Filling the database with {chosen.gigabytes} GB, and a first backup")
            bench.fill()
            progress.step("Prod's capacity")
            generator.capacity(bench.url, 5)
            capacity = generator.capacity(bench.url, 10)
            rate = max(1, round(LOAD * capacity))
            pairs = []
            for number in range(chosen.pairs):
                pair = {}
                for arm in random.permutation(list(ARMS)):
                    progress.step(f"Load {number + 1} of {chosen.pairs}: {arm}")
                    pair[str(arm)] = bench.loaded(generator, rate, ARMS[arm])
                    time.sleep(3)
                pairs.append(pair)
            rounds = []
            for number in range(chosen.rounds):
                one = {}
                for name in random.permutation(["ours", "plain"]):
                    progress.step(f"Throughput {number + 1} of {chosen.rounds}: {name}")
                    os.sync()  # of what the one before has written
                    one[str(name)] = bench.ours(number) if name == "ours" else bench.plain(number)
                rounds.append(one)
    now = datetime.now(UTC).isoformat(timespec="seconds")
    return {"at": now, "machine": about, "capacity": capacity, "rate": rate, "pairs": pairs, "rounds": rounds}


def ratios(found: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """What was compared, the ratio with its interval, and what is wanted."""
    lines = []
    quiet, *busy = ARMS
    for arm in busy:
        for key in ("throughput", "p50", "p99"):
            values = [pair[arm][key] / pair[quiet][key] for pair in found["pairs"]]
            lines.append((f"prod's {key} during a {arm}, to without", interval(values), ""))
    speed = {key: [one["plain"][key] / one["ours"][key] for one in found["rounds"]] for key in ("backup", "restore")}
    again = [one["ours"]["again"] / one["ours"]["backup"] for one in found["rounds"]]
    added = [one["ours"]["added"] / one["ours"]["size"] for one in found["rounds"]]
    alone = [one["plain"]["pg_basebackup"] / one["ours"]["backup"] for one in found["rounds"]]
    save = [one["plain"]["backup"] / one["ours"]["phases"]["backup"]["save"] for one in found["rounds"]]
    unpack = [one["plain"]["unpack"] / one["ours"]["phases"]["restore"]["unpack"] for one in found["rounds"]]
    return [
        *lines,
        ("backup's throughput, to pg_basebackup into restic", interval(speed["backup"]), f"at least {TARGET}"),
        ("the same while it saves", interval(save), f"at least {TARGET}"),
        ("backup's throughput, to pg_basebackup into nothing", interval(alone), ""),
        (
            "restore's throughput, checks and recovery included, to restic into tar",
            interval(speed["restore"]),
            f"at least {TARGET}",
        ),
        ("the same while it unpacks, nothing synced", interval(unpack), f"at least {TARGET}"),
        ("time of a second backup of the same data, to the first", interval(again), ""),
        ("bytes that a second backup of the same data adds, to all", interval(added), ""),
    ]


def phases(found: Mapping[str, Any]) -> list[tuple[str, str, str, str]]:
    """How long each phase took in its middle round, in seconds, of a first and a second backup and a restore."""
    rounds = [one["ours"]["phases"] for one in found["rounds"]]
    middle = len(rounds) // 2
    names = dict.fromkeys(name for one in rounds for run in RUNS for name in one[run])

    def took(run: str, name: str) -> str:
        values = sorted(one[run][name] for one in rounds if name in one[run])
        return f"{values[middle]:.1f}" if len(values) > middle else ""

    first, second, third = RUNS
    return [(name, took(first, name), took(second, name), took(third, name)) for name in names]


def interval(values: Sequence[float]) -> str:
    """A geometric mean with its 95 % interval; without one where there are too few."""
    found = bootstrap_ratio(values)
    between = "" if found.low is None else f" [{found.low:.3g}, {found.high:.3g}]"
    return f"{found.value:.3g}{between} ({found.blocks})"


def page(found: Mapping[str, Any]) -> str:
    """docs/research/backup.md."""
    about, size = found["machine"], found["rounds"][0]["ours"]["size"]
    middle = len(found["rounds"]) // 2
    ours = {key: sorted(one["ours"][key] for one in found["rounds"])[middle] for key in ("backup", "restore", "again")}
    return f"""\
# What backups cost
Measured by `make bench-backup` on {found["at"][:10]}: {about["cpus"]} CPUs, {about["memory"] / 2**30:.0f} GiB, Docker
{about["docker"]}, cgroup v{about["cgroup_version"]}; the example shop with {size / 1e9:.1f} GB in its database, asked
{found["rate"]} times a second ({LOAD:.0%} of its capacity). Ratios in one run, with 95 % intervals where there are
enough blocks; their number in brackets. A scheduled backup reads {RATE} MiB a second at most, one by hand all it can.
Both go to the disk on which the database is, one after the other, each with a checkpoint at once.

| compared | ratio | wanted |
|---|---|---|
{chr(10).join(f"| {what} | {ratio} | {wanted} |" for what, ratio, wanted in ratios(found))}

Here that was {ours["backup"]:.0f} s for a backup ({size / 1e6 / ours["backup"]:.0f} MB/s), {ours["again"]:.0f} s for a
second one, {ours["restore"]:.0f} s for a restore until the database had answered and its rows were counted.

| phase, in seconds | {" | ".join(RUNS.values())} |
|---|---|---|---|
{chr(10).join(f"| {' | '.join(line)} |" for line in phases(found))}
"""


def main() -> int:
    chosen = options()
    console = Console(stderr=True)
    signal.signal(signal.SIGTERM, terminated)
    try:
        if not host.facts().local:
            raise BenchError("The Docker engine is on another machine. The benchmark loads the local one only.")
        with closing(docker.from_env()) as engine:
            found = measure(chosen, engine, console)
    except (BenchError, BackupError, SettingsError, DockerException) as error:
        console.print(f"error: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
        return 1
    except KeyboardInterrupt:
        console.print("Interrupted; everything is removed again.")
        return 130
    (chosen.output / "backup.json").write_text(json.dumps(found, indent=1) + "\n")
    (chosen.output / "backup.md").write_text(page(found))
    for columns, lines in (
        (("compared", "ratio", "wanted"), ratios(found)),
        (("phase, in seconds", *RUNS.values()), phases(found)),
    ):
        table = Table(*columns)
        for line in lines:
            table.add_row(*line)
        Console().print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
