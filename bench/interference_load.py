"""The load on prod: Vegeta at a constant rate against the shop's published port, and what came back.
Latencies count from when a request was due, so that a shop that stalls does not hide the requests it kept waiting."""

import base64
import csv
import json
import os
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

TIMEOUT = 3.0
"""Seconds that a request may take. A failed one counts with at least this latency: refusing fast is not being fast."""

GRAIN = 0.001
"""Seconds by which the generator's timers may be late (epoll counts in ms): requests come a little irregularly, and
none of that is waiting."""

SLOT = 0.25
"""Seconds of a slot of `Seen.slots`."""

CONNECTIONS = 16
"""Connections that ask without a pause when the capacity is measured."""

FIRST: Sequence[Sequence[str]] = (("chrt", "--fifo", "1"), ("nice", "-n", "-20"))
"""What puts the generator before all else, the best first: a user's browser does not wait for the server's CPU either.
Niceness alone counts only among the processes of a session, where the kernel groups them (autogroup)."""

ORDER = {"customer": "Benchmark", "items": [{"sku": "rope", "quantity": 3}, {"sku": "buoy", "quantity": 1}]}
CART = {"items": [{"sku": "lantern", "quantity": 2}]}
# A shop's traffic: mostly looking, some filling of carts, one order in ten.
MIX: Sequence[tuple[str, str, Any]] = (
    ("GET", "/products", None),
    ("GET", "/", None),
    ("GET", "/cart/a", None),
    ("GET", "/orders/1", None),
    ("GET", "/products", None),
    ("PUT", "/cart/a", CART),
    ("GET", "/orders?limit=10", None),
    ("GET", "/products", None),
    ("GET", "/cart/b", None),
    ("POST", "/orders", ORDER),
)

Numbers = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Seen:
    """What one attack saw, as its client.

    `throughput`: answered requests a second, until the last answer. `p50`, `p99`: ms from when a request was due.
    `errors`: share without a good answer. `lag_p99`: ms that requests were sent late. `unsent`: share of the due
    requests that were never sent. `slots`: start in seconds, median latency in ms, share answered; by due time.
    """

    throughput: float
    p50: float
    p99: float
    errors: float
    lag_p99: float
    unsent: float
    slots: tuple[tuple[float, float | None, float], ...]


def seen(sent: Numbers, latency: Numbers, good: npt.NDArray[np.bool_], number: Numbers, rate: float, due: int) -> Seen:
    """What an attack of `due` requests at `rate` a second saw.

    Of each request: when it was `sent` (s, any clock), its `latency` from then (s), whether the answer was `good`, its
    `number` from 0.
    """
    if not len(sent):
        return Seen(0.0, 1000 * TIMEOUT, 1000 * TIMEOUT, 1.0, 0.0, 1.0, ())
    began = float((sent - number / rate).min())
    intended = began + number / rate
    lag = sent - intended
    answered = np.maximum(lag - GRAIN, 0) + latency
    waited = np.where(good, answered, np.maximum(answered, TIMEOUT))
    end = float((intended + answered)[good].max() - began) if good.any() else 0.0
    p50, p99 = np.percentile(waited, [50, 99])
    return Seen(
        throughput=float(good.sum()) / max(end, due / rate),
        p50=1000 * float(p50),
        p99=1000 * float(p99),
        errors=1 - float(good.mean()),
        lag_p99=1000 * float(np.percentile(lag, 99)),
        unsent=max(0.0, 1 - len(sent) / due),
        slots=tuple(slots(number / rate, waited, good, due / rate)),
    )


def slots(due: Numbers, waited: Numbers, good: npt.NDArray[np.bool_], seconds: float) -> list[Any]:
    """Median latency (ms) and share answered of each `SLOT`; a slot in which nothing was due has no median."""
    found: list[Any] = []
    for begin in np.arange(0, seconds - SLOT / 2, SLOT):
        inside = (due >= begin) & (due < begin + SLOT)
        if inside.any():
            found.append((float(begin), 1000 * float(np.median(waited[inside])), float(good[inside].mean())))
        else:
            found.append((float(begin), None, 0.0))
    return found


class Generator:
    """Vegeta, with what it asks for in a folder of its own."""

    def __init__(self, vegeta: Path, folder: Path) -> None:
        self._vegeta, self._folder = vegeta, folder
        self._first = next((words for words in FIRST if _runs([*words, "true"])), ())

    def capacity(self, url: str, seconds: int) -> float:
        """Good answers a second when `CONNECTIONS` ask without a pause."""
        attack = Attack(self._start(url, ["-rate", "0", "-max-workers", str(CONNECTIONS)], seconds), self._file)
        attack.wait()
        rows = self._rows(attack.file)
        return sum(row[1].startswith("2") for row in rows) / seconds

    def attack(self, url: str, rate: int, seconds: int) -> "Attack":
        """Begins to ask, `rate` times a second for so many seconds, however long the answers take."""
        return Attack(self._start(url, ["-rate", f"{rate}/1s"], seconds), self._file)

    def seen(self, attack: "Attack", rate: int, seconds: int) -> Seen:
        """What an attack that has ended saw."""
        rows = self._rows(attack.file)
        columns = np.array([(float(row[0]), float(row[2]), float(row[8])) for row in rows]).reshape(-1, 3)
        good = np.array([row[1][:1] in ("2", "3") for row in rows], dtype=bool)
        # Nanoseconds since 1970 have more digits than a float keeps: count from the first.
        first = min((int(row[0]) for row in rows), default=0)
        sent = np.array([(int(row[0]) - first) / 1e9 for row in rows])
        return seen(sent, columns[:, 1] / 1e9, good, columns[:, 2], rate, rate * seconds)

    @property
    def _file(self) -> Path:
        return self._folder / "results.bin"

    def _start(self, url: str, options: Sequence[str], seconds: int) -> subprocess.Popen[bytes]:
        targets = self._folder / "targets.json"
        targets.write_text("".join(f"{json.dumps(target(url, *request))}\n" for request in MIX))
        return subprocess.Popen(
            [
                *self._first,
                *(str(self._vegeta), "attack", "-format", "json", "-targets", str(targets), "-output", str(self._file)),
                *("-duration", f"{seconds}s", "-timeout", f"{TIMEOUT}s", "-max-body", "0", *options),
            ],
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )

    def _rows(self, file: Path) -> list[list[str]]:
        done = subprocess.run(
            [str(self._vegeta), "encode", "-to", "csv", str(file)], stdout=subprocess.PIPE, text=True, check=True
        )
        return list(csv.reader(done.stdout.splitlines()))


def _runs(command: Sequence[str]) -> bool:
    try:
        return subprocess.run(command, capture_output=True, check=False).returncode == 0
    except OSError:
        return False


def target(url: str, method: str, path: str, body: Any) -> dict[str, Any]:
    """A request as Vegeta's JSON format has it."""
    made: dict[str, Any] = {"method": method, "url": url + path}
    if body is not None:
        made["body"] = base64.b64encode(json.dumps(body).encode()).decode()
        made["header"] = {"Content-Type": ["application/json"]}
    return made


class Attack:
    """Vegeta under way. `cpu`: seconds of CPU it took, once it has ended."""

    def __init__(self, process: subprocess.Popen[bytes], file: Path) -> None:
        self.file, self.cpu = file, 0.0
        self._process = process

    def wait(self) -> None:
        """Until the last answer or its timeout."""
        try:
            _, status, used = os.wait4(self._process.pid, 0)
        except BaseException:
            self._process.kill()
            self._process.wait()
            raise
        self._process.returncode = os.waitstatus_to_exitcode(status)
        self.cpu = used.ru_utime + used.ru_stime
        if self._process.returncode:
            raise RuntimeError(f"vegeta ended with code {self._process.returncode}")


# --- the machine


@dataclass(frozen=True)
class Ticks:
    """CPU time of the machine since its start, in clock ticks, and when it was read (s, monotonic)."""

    busy: int
    steal: int
    total: int
    at: float

    @classmethod
    def now(cls) -> "Ticks":
        """Of `/proc/stat`. Busy is user, nice, system and interrupts: waiting for the disk is no work."""
        with Path("/proc/stat").open() as file:
            fields = [int(field) for field in file.readline().split()[1:]]
        return cls.of(fields, time.monotonic())

    @classmethod
    def of(cls, fields: Sequence[int], at: float) -> "Ticks":
        """`fields` in the order of proc(5): user nice system idle iowait irq softirq steal (guests are in user)."""
        user, nice, system, idle, iowait, irq, softirq, steal = fields[:8]
        busy = user + nice + system + irq + softirq
        return cls(busy, steal, busy + idle + iowait + steal, at)


def shares(before: Ticks, after: Ticks) -> tuple[float, float]:
    """The machine's busy and stolen shares of the CPU time in between."""
    total = max(1, after.total - before.total)
    return (after.busy - before.busy) / total, (after.steal - before.steal) / total
