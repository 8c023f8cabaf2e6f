"""From measurements to statements: ratios within a block, rules that void one, intervals over blocks, verdicts.
Pure arithmetic: no clock, no engine, no files."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

ALONE, AGAIN, DEV_ALONE = "alone", "alone-again", "dev-alone"
"""The arms that the others are compared with: prod alone, prod alone again (A/A), dev alone."""

RESAMPLES = 10_000
FEWEST = 5
"""Blocks below which no interval is given: of fewer none is honest (resampled means of three cover 75 %, not 95 %)."""

SEED = 20
SMALLEST = 1e-3
"""A ratio below this counts as this: logarithms are averaged."""

Measurement = Mapping[str, Any]
"""What one arm of one block measured; see `bench.interference_load.Seen` and `bench.interference.measured`."""

Block = Mapping[str, Any]
"""`antagonist`, `load` (share of the solo capacity), `arms`: measurements by arm's name, `void`: list of reasons."""


# --- rules, fixed before anything is measured


@dataclass(frozen=True)
class Rules:
    """When a block does not count. They are about the measuring, not about what was found.

    `lag_ms`: the generator's own 99th percentile of being late. `steal`: share of CPU time that the hypervisor gave to
    others. Both are asked of prod alone: beside dev they are part of what dev does to a machine that all share, and
    are reported. `unsent`: share of requests that the generator never got to send, in any arm.
    """

    lag_ms: float = 5.0
    unsent: float = 0.01
    steal: float = 0.02


RULES = Rules()


def voided(arms: Mapping[str, Measurement], rules: Rules = RULES) -> list[str]:
    """Why a block does not count; empty if it does. One bad arm voids the block, since all are compared within it."""
    reasons = []
    for name, found in arms.items():
        if name in (ALONE, AGAIN) and found.get("lag_p99", 0.0) > rules.lag_ms:
            reasons.append(f"{name}: requests were sent late (p99 {found['lag_p99']:.1f} ms)")
        if found.get("unsent", 0.0) > rules.unsent:
            reasons.append(f"{name}: {found['unsent']:.1%} of the requests were not sent")
        if name in (ALONE, AGAIN) and found.get("steal", 0.0) > rules.steal:
            reasons.append(f"{name}: {found['steal']:.1%} of the CPU time was stolen")
        reasons += [f"{name}: {what}" for what in found.get("faults", ())]
    return reasons


# --- from a block to ratios


def ratio(found: float | None, base: float | None) -> float | None:
    """`found` to `base`; None where one of them is missing or there is nothing to divide by."""
    if found is None or not base:
        return None
    return found / base


def compared(block: Block, arm: str) -> dict[str, float | None]:
    """An arm of a block against prod alone and dev alone in the same block.

    `throughput`, `p50`, `p99`: ratios. `errors`: difference of shares. `busy`: share of the machine. `work`: dev's to
    dev alone. `sum`: throughput and work. `left`: dev's work to what prod alone left of the machine. `reclaim`:
    seconds. `oom`: processes of prod killed for memory. `lag`: ms that the generator was late (99th percentile).
    `steal`: share of CPU time.
    """
    arms = block["arms"]
    found, alone = arms[arm], arms.get(ALONE, {})
    work = ratio(found.get("work"), arms.get(DEV_ALONE, {}).get("work"))
    throughput = ratio(found.get("throughput"), alone.get("throughput"))
    left = None if work is None or "busy" not in alone else ratio(work, 1 - alone["busy"])
    errors = None if "errors" not in found or "errors" not in alone else found["errors"] - alone["errors"]
    return {
        "throughput": throughput,
        "p50": ratio(found.get("p50"), alone.get("p50")),
        "p99": ratio(found.get("p99"), alone.get("p99")),
        "errors": errors,
        "busy": found.get("busy"),
        "work": work,
        "sum": None if work is None or throughput is None else throughput + work,
        "left": left,
        "reclaim": found.get("reclaim"),
        "oom": found.get("oom"),
        "lag": found.get("lag_p99"),
        "steal": found.get("steal"),
    }


# --- over blocks


@dataclass(frozen=True)
class Estimate:
    """A mean over blocks, with its bootstrap 95 % interval where there are enough of them."""

    value: float
    low: float | None
    high: float | None
    blocks: int

    @property
    def spread(self) -> float | None:
        """How far the interval reaches from 1: what a ratio of equals may be off by. None without an interval."""
        return None if self.low is None or self.high is None else max(abs(self.low - 1), abs(self.high - 1))


def bootstrap(values: Sequence[float], seed: int = SEED) -> Estimate:
    """The mean with its 95 % interval, by bootstrap-t (Efron and Tibshirani 1993, chapter 12).

    Percentiles of resampled means alone are too close together where blocks are few. They are the least that is
    reported, though: where most blocks are equal, many resamples have no spread to scale by.
    """
    sample = np.asarray(values, dtype=float)
    count, mean, spread = len(sample), float(sample.mean()), float(sample.std())
    if count < FEWEST:
        return Estimate(mean, None, None, count)
    drawn = sample[np.random.default_rng(seed).integers(0, count, size=(RESAMPLES, count))]
    means, spreads = drawn.mean(axis=1), drawn.std(axis=1)
    low, high = np.percentile(means, [2.5, 97.5])
    if (some := spreads > 0).any():
        left, right = np.percentile((means[some] - mean) / spreads[some], [2.5, 97.5])
        low, high = min(low, mean - right * spread), max(high, mean - left * spread)
    return Estimate(mean, float(low), float(high), count)


def bootstrap_ratio(values: Sequence[float], seed: int = SEED) -> Estimate:
    """The geometric mean: half as fast and twice as fast cancel out."""
    logs = bootstrap(np.log(np.maximum(values, SMALLEST)).tolist(), seed)
    low, high = (None if one is None else float(np.exp(one)) for one in (logs.low, logs.high))
    return Estimate(float(np.exp(logs.value)), low, high, logs.blocks)


METHODS: Mapping[str, Callable[[Sequence[float]], Estimate]] = {
    "throughput": bootstrap_ratio,
    "p50": bootstrap_ratio,
    "p99": bootstrap_ratio,
    "errors": bootstrap,
    "busy": bootstrap,
    "work": bootstrap,
    "sum": bootstrap,
    "left": bootstrap,
    "reclaim": bootstrap,
    "oom": bootstrap,
    "lag": bootstrap,
    "steal": bootstrap,
}


def estimates(blocks: Iterable[Block], arm: str) -> dict[str, Estimate | None]:
    """Each number of `compared` over the blocks that count. None where no block has it.

    `reclaim` only where every block reached it: a mean without those that never did would flatter.
    """
    counted = [compared(block, arm) for block in blocks if not block["void"] and arm in block["arms"]]
    found: dict[str, Estimate | None] = {}
    for key, method in METHODS.items():
        values = [one[key] for one in counted]
        there = [value for value in values if value is not None]
        complete = key != "reclaim" or len(there) == len(values)
        found[key] = method(there) if there and complete else None
    return found


def cells(blocks: Sequence[Block]) -> list[tuple[str, float]]:
    """The (antagonist, load) pairs, in the order in which they first came, by load."""
    return sorted(dict.fromkeys((block["antagonist"], block["load"]) for block in blocks), key=lambda cell: cell[1])


def of_cell(blocks: Sequence[Block], antagonist: str | None, load: float) -> list[Block]:
    """The blocks of a cell; of a load if `antagonist` is None."""
    return [block for block in blocks if block["load"] == load and antagonist in (None, block["antagonist"])]


# --- against the target


@dataclass(frozen=True)
class Target:
    """What prod may lose: `bound` on the ratio, which is better when it is higher or lower."""

    bound: float
    higher_is_better: bool

    @property
    def tolerance(self) -> float:
        """The distance from 1: an A/A interval has to be narrower for the host to decide about it."""
        return abs(self.bound - 1)


TARGETS: Mapping[str, Target] = {
    "throughput": Target(0.99, higher_is_better=True),
    "p50": Target(1.03, higher_is_better=False),
    "p99": Target(1.10, higher_is_better=False),
}
LEFT_TARGET = 0.90
"""Dev gets at least this share of what prod leaves."""

TARGET_LOAD = 0.60
"""The highest load, as a share of prod's capacity, that the targets are set for."""

MET, MISSED, UNDECIDED, UNCERTIFIED = "met", "missed", "undecided", "cannot certify"


def verdict(found: Estimate | None, again: Estimate | None, target: Target) -> str:
    """Whether a ratio meets its target, as far as this host can tell.

    `again` is the A/A estimate of the same blocks. Where equals differ by more than the target allows, the host cannot
    certify it; a miss that is larger than that noise is still one.
    """
    if found is None or found.low is None or found.high is None or again is None or again.spread is None:
        return UNDECIDED
    allowed = max(target.tolerance, again.spread)
    best, worst = (found.high, found.low) if target.higher_is_better else (found.low, found.high)
    beyond = 1 - best if target.higher_is_better else best - 1
    if beyond > allowed:
        return MISSED
    if again.spread > target.tolerance:
        return UNCERTIFIED
    within = worst >= target.bound if target.higher_is_better else worst <= target.bound
    return MET if within else UNDECIDED


# --- reclaim


def reclaim(slots: Sequence[tuple[float, float | None, float]], solo_p50: float) -> float | None:
    """Seconds from the start of prod's load until it is served as when alone, and stays so for two slots.

    `slots`: (start in seconds, median latency in ms or None where nothing was asked, share answered) in order. Served:
    95 % answered, and a median of at most 1.5 times prod's alone. None if that never comes.
    """
    good = [median is not None and answered >= SERVED and median <= SLOWER * solo_p50 for _, median, answered in slots]
    return next((slots[number][0] for number, pair in enumerate(pairwise(good)) if all(pair)), None)


SERVED, SLOWER = 0.95, 1.5
