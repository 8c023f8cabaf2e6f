"""The interference benchmark's arithmetic: what an attack saw, ratios, rules that void a block, intervals, verdicts,
and that the page says what the results say."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bench import interference, interference_report
from bench.interference import NONE, options, rounded, schedule
from bench.interference_antagonists import (
    ANTAGONISTS,
    GIB,
    MEMORY_LEFT,
    MEMORY_SHARE,
    PROCESSES,
    Bounds,
    FaultError,
    fio_rate,
    flood_rate,
    meminfo,
    rate_of,
    stress_rate,
)
from bench.interference_arms import ARMS
from bench.interference_load import GRAIN, TIMEOUT, Seen, Ticks, seen, shares, target
from bench.interference_results import (
    AGAIN,
    ALONE,
    DEV_ALONE,
    FEWEST,
    MET,
    MISSED,
    RULES,
    TARGETS,
    UNCERTIFIED,
    UNDECIDED,
    Estimate,
    Target,
    bootstrap,
    bootstrap_ratio,
    cells,
    compared,
    estimates,
    of_cell,
    ratio,
    reclaim,
    verdict,
    voided,
)
from tests.deployed import CHECKOUT

# --- what an attack saw


def attacked(rate: float, latencies: list[float], lags: list[float] | None = None, bad: tuple[int, ...] = ()) -> Seen:
    """An attack whose requests all had these latencies and lags (s), those in `bad` without a good answer."""
    number = np.arange(len(latencies), dtype=float)
    sent = 100.0 + number / rate + np.array(lags or [0.0] * len(latencies))
    good = np.array([index not in bad for index in range(len(latencies))])
    return seen(sent, np.array(latencies), good, number, rate, len(latencies))


def test_latencies_are_of_the_answers() -> None:
    found = attacked(10, [0.010] * 50 + [0.030] * 50)
    assert (found.p50, found.p99) == pytest.approx((20, 30))
    assert found.errors == 0
    assert found.lag_p99 == pytest.approx(0, abs=1e-6)


def test_latency_counts_from_when_the_request_was_due() -> None:
    found = attacked(10, [0.010] * 10, [0.0, *[0.2] * 9])
    assert found.p50 == pytest.approx(210 - 1000 * GRAIN)
    assert found.lag_p99 == pytest.approx(200)
    assert attacked(10, [0.010] * 10, [0.0, *[GRAIN] * 9]).p50 == pytest.approx(10)


def test_the_order_in_which_answers_came_does_not_matter() -> None:
    number = np.array([2.0, 0.0, 1.0])
    found = seen(5 + number / 10, np.array([0.1, 0.2, 0.3]), np.array([True] * 3), number, 10, 3)
    assert found.lag_p99 == pytest.approx(0, abs=1e-6)
    assert found.p50 == pytest.approx(200)


def test_throughput_counts_good_answers_until_the_last_one() -> None:
    assert attacked(10, [0.0] * 100).throughput == pytest.approx(10)
    assert attacked(10, [0.0] * 100, bad=(3, 4)).throughput == pytest.approx(9.8)
    late = attacked(10, [0.0] * 99 + [5.1])  # due at 9.9 s, answered at 15 s
    assert late.throughput == pytest.approx(100 / 15)


def test_refusing_fast_is_not_being_fast() -> None:
    found = attacked(10, [0.001] * 10, bad=tuple(range(6)))
    assert found.errors == pytest.approx(0.6)
    assert found.p50 == pytest.approx(1000 * TIMEOUT)


def test_what_was_never_sent_is_told() -> None:
    number = np.arange(90, dtype=float)
    found = seen(number / 10, np.zeros(90), np.ones(90, dtype=bool), number, 10, 100)
    assert found.unsent == pytest.approx(0.1)


def test_an_attack_without_any_request_is_no_success() -> None:
    nothing = np.array([])
    found = seen(nothing, nothing, np.array([], dtype=bool), nothing, 10, 100)
    assert (found.throughput, found.errors, found.unsent) == (0, 1, 1)


def test_slots_are_by_due_time_and_cover_the_attack() -> None:
    found = attacked(8, [0.5] * 4 + [0.01] * 4, bad=(0,))  # one second
    assert [slot[0] for slot in found.slots] == [0, 0.25, 0.5, 0.75]
    assert found.slots[0][2] == 0.5
    assert found.slots[2][1] == pytest.approx(10)


def test_a_slot_in_which_nothing_was_due_has_no_median() -> None:
    assert attacked(2, [0.1] * 2).slots[1] == (0.25, None, 0.0)


def test_a_request_is_written_as_vegeta_reads_it() -> None:
    assert target("http://127.0.0.1:1", "GET", "/products", None) == {
        "method": "GET",
        "url": "http://127.0.0.1:1/products",
    }
    assert target("http://x", "PUT", "/cart/a", {"a": 1})["body"] == "eyJhIjogMX0="


# --- the machine


def test_waiting_for_the_disk_and_stolen_time_are_not_busy() -> None:
    #                  user nice system idle iowait irq softirq steal guest guest_nice
    before = Ticks.of([0, 0, 0, 0, 0, 0, 0, 0, 0, 0], 0.0)
    after = Ticks.of([10, 5, 10, 40, 20, 2, 3, 10, 10, 0], 1.0)
    assert shares(before, after) == pytest.approx((0.30, 0.10))


def test_the_kernel_is_read() -> None:
    one = Ticks.now()
    assert 0 < one.busy < one.total


def test_a_hog_leaves_memory_for_others() -> None:
    text = "MemTotal:       25165824 kB\nMemFree:         1 kB\nMemAvailable:   {} kB\n"
    roomy = Bounds.of(2, meminfo(text.format(24 * 2**20)))
    assert roomy.hog == int(MEMORY_SHARE * 24 * GIB)
    tight = Bounds.of(2, meminfo(text.format(8 * 2**20)))
    assert tight.hog == 8 * GIB - MEMORY_LEFT
    assert Bounds.of(2, meminfo(text.format(1))).hog > 0


def test_the_fork_bomb_is_bounded() -> None:
    assert 2 * PROCESSES < 2000


# --- dev's work


def test_stress_ng_counts_by_real_time() -> None:
    said = (
        "stress-ng: metrc: [14] stressor       bogo ops real time  usr time  sys time   bogo ops/s     bogo ops/s\n"
        "stress-ng: metrc: [14]                           (secs)    (secs)    (secs)   (real time) (usr+sys time)\n"
        "stress-ng: metrc: [14] cpu                3797      2.00      3.99      0.00      1895.57         951.71\n"
    )
    assert stress_rate(said) == pytest.approx(1898.5)
    with pytest.raises(ValueError, match="no metrics"):
        stress_rate("stress-ng: info: nothing")


def test_fio_counts_bytes_both_ways() -> None:
    job = {"read": {"io_bytes": 4000, "runtime": 2000}, "write": {"io_bytes": 0, "runtime": 0}}
    assert fio_rate(f"fio: a note\n{json.dumps({'jobs': [job]})}") == pytest.approx(2000)


def test_a_flood_counts_what_arrived() -> None:
    said = json.dumps({"end": {"sum": {"packets": 1000, "lost_packets": 250, "seconds": 3.0}}})
    assert flood_rate(said) == pytest.approx(250)


def test_whole_pieces_of_work_are_counted_from_one_end_to_another() -> None:
    assert rate_of([9.5, 11.5, 13.5, 15.5], 7.5, 10.0) == pytest.approx(0.5)  # not 3 pieces in 5.5 s
    assert rate_of([12.0], 8.0, 10.0) == pytest.approx(0.25)  # one that took four seconds
    with pytest.raises(FaultError, match="did no work"):
        rate_of([9.0], 8.0, 10.0)


# --- ratios and rules


def arm(**changed: Any) -> dict[str, Any]:
    usual = {"throughput": 100.0, "p50": 10.0, "p99": 50.0, "errors": 0.0, "busy": 0.5, "lag_p99": 1.0, "faults": []}
    return usual | changed


def block(antagonist: str = "cpu", load: float = 0.6, void: Sequence[str] = (), **arms: Any) -> dict[str, Any]:
    base = {ALONE: arm(), AGAIN: arm(), DEV_ALONE: {"busy": 1.0, "work": 40.0, "faults": []}}
    named = {name.replace("_", "-"): found for name, found in arms.items()}
    return {"antagonist": antagonist, "load": load, "arms": base | named, "void": list(void)}


def test_an_arm_is_compared_with_prod_and_dev_alone() -> None:
    found = compared(block(bulkhead=arm(throughput=99.0, p50=12.0, p99=100.0, errors=0.01, work=18.0)), "bulkhead")
    assert found["throughput"] == pytest.approx(0.99)
    assert found["p50"] == pytest.approx(1.2)
    assert found["p99"] == pytest.approx(2.0)
    assert found["errors"] == pytest.approx(0.01)
    assert found["work"] == pytest.approx(0.45)
    assert found["sum"] == pytest.approx(1.44)
    assert found["left"] == pytest.approx(0.9)  # prod alone left half of the machine


def test_without_an_antagonist_there_is_no_work() -> None:
    alone = block(bulkhead=arm())
    del alone["arms"][DEV_ALONE]
    found = compared(alone, "bulkhead")
    assert found["work"] is found["sum"] is found["left"] is None
    assert found["throughput"] == 1


@pytest.mark.parametrize(("found", "base"), [(None, 1.0), (1.0, None), (1.0, 0.0)])
def test_a_ratio_that_is_none(found: float | None, base: float | None) -> None:
    assert ratio(found, base) is None


def test_a_block_counts_as_long_as_it_keeps_the_rules() -> None:
    at_the_edge = arm(lag_p99=RULES.lag_ms, unsent=RULES.unsent, steal=RULES.steal)
    assert voided({ALONE: at_the_edge, DEV_ALONE: {"busy": 1.0}}) == []


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"lag_p99": RULES.lag_ms + 0.1}, "sent late"),
        ({"unsent": RULES.unsent + 0.001}, "not sent"),
        ({"steal": RULES.steal + 0.001}, "stolen"),
        ({"faults": ["the antagonist did no work"]}, "did no work"),
    ],
)
def test_one_arm_voids_the_block(changed: dict[str, Any], says: str) -> None:
    reasons = voided({ALONE: arm(), AGAIN: arm(**changed)})
    assert len(reasons) == 1
    assert reasons[0].startswith(f"{AGAIN}: ")
    assert says in reasons[0]


def test_what_dev_does_to_generator_and_hypervisor_is_a_result_and_no_fault() -> None:
    beside_dev = arm(lag_p99=10 * RULES.lag_ms, steal=10 * RULES.steal)
    assert voided({ALONE: arm(), "bulkhead": beside_dev}) == []
    assert voided({ALONE: arm(), "bulkhead": arm(unsent=2 * RULES.unsent)}) != []
    found = compared(block(bulkhead=beside_dev), "bulkhead")
    assert (found["lag"], found["steal"]) == (10 * RULES.lag_ms, 10 * RULES.steal)


# --- over blocks


@pytest.mark.parametrize("count", [FEWEST, 30])
def test_an_interval_covers_the_mean_as_often_as_it_says(count: int) -> None:
    random = np.random.default_rng(8)
    found = [bootstrap(random.normal(1.0, 0.1, count).tolist()) for _ in range(200)]
    covered = sum((one.low or 0) <= 1.0 <= (one.high or 0) for one in found)
    assert 183 <= covered <= 197  # 95 % of 200, give or take what 200 tries vary by


def test_few_blocks_have_no_interval() -> None:
    assert bootstrap([1.0, 2.0]) == Estimate(1.5, None, None, 2)
    assert bootstrap([1.0] * (FEWEST - 1)).spread is None
    assert bootstrap([1.0] * FEWEST) == Estimate(1, 1, 1, FEWEST)


def test_one_block_that_differs_from_equal_ones_widens_the_interval_to_its_side() -> None:
    found = bootstrap([0.0] * 4 + [1.0])
    assert found.low is not None
    assert found.high is not None
    assert found.low <= 0
    assert found.high >= 0.6


def test_the_same_blocks_give_the_same_interval() -> None:
    values = [0.9, 1.0, 1.2, 1.1]
    assert bootstrap(values) == bootstrap(values)


def test_half_and_double_cancel_out() -> None:
    assert bootstrap_ratio([0.5, 2.0]).value == pytest.approx(1)
    assert bootstrap_ratio([0.0, 1.0, 1.0]).value > 0


def test_void_blocks_do_not_count() -> None:
    blocks = [block(bulkhead=arm(p50=10.0)), block(bulkhead=arm(p50=999.0), void=("stolen",))]
    found = estimates(blocks, "bulkhead")["p50"]
    assert found is not None
    assert (found.value, found.blocks) == pytest.approx((1, 1))
    assert estimates([blocks[1]], "bulkhead")["p50"] is None


def test_a_reclaim_that_never_came_is_not_left_out_of_the_mean() -> None:
    blocks = [block(bulkhead=arm(reclaim=0.5)), block(bulkhead=arm(reclaim=None))]
    assert estimates(blocks, "bulkhead")["reclaim"] is None
    found = estimates(blocks[:1], "bulkhead")["reclaim"]
    assert found is not None
    assert found.value == 0.5


def test_cells_are_by_load() -> None:
    blocks = [block("sync", 0.6), block("cpu", 0.2), block("sync", 0.6), block("cpu", 0.6)]
    assert cells(blocks) == [("cpu", 0.2), ("sync", 0.6), ("cpu", 0.6)]
    assert len(of_cell(blocks, "sync", 0.6)) == 2
    assert len(of_cell(blocks, None, 0.6)) == 3


# --- verdicts

P50 = TARGETS["p50"]
QUIET, LOUD = Estimate(1.0, 0.99, 1.01, 9), Estimate(1.0, 0.8, 1.2, 9)


@pytest.mark.parametrize(
    ("low", "high", "again", "expected"),
    [
        (0.98, 1.02, QUIET, MET),
        (0.98, 1.03, QUIET, MET),
        (1.00, 1.06, QUIET, UNDECIDED),
        (1.04, 1.06, QUIET, MISSED),
        (0.98, 1.02, LOUD, UNCERTIFIED),
        (1.04, 1.06, LOUD, UNCERTIFIED),
        (3.00, 5.00, LOUD, MISSED),
    ],
)
def test_a_latency_against_its_target(low: float, high: float, again: Estimate, expected: str) -> None:
    assert verdict(Estimate((low + high) / 2, low, high, 9), again, P50) == expected


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [(0.99, 1.0, MET), (0.985, 0.995, UNDECIDED), (0.90, 0.95, MISSED)],
)
def test_a_throughput_against_its_target(low: float, high: float, expected: str) -> None:
    found = Estimate((low + high) / 2, low, high, 9)
    assert verdict(found, Estimate(1, 0.995, 1.005, 9), TARGETS["throughput"]) == expected


def test_nothing_is_decided_without_intervals() -> None:
    single = Estimate(5.0, None, None, 1)
    assert verdict(single, QUIET, P50) == UNDECIDED
    assert verdict(Estimate(1, 0.99, 1.01, 9), single, P50) == UNDECIDED
    assert verdict(None, QUIET, P50) == UNDECIDED


def test_the_tolerance_is_the_distance_from_equal() -> None:
    assert Target(0.99, higher_is_better=True).tolerance == pytest.approx(0.01)
    assert Target(1.10, higher_is_better=False).tolerance == pytest.approx(0.10)


def test_reclaim_is_the_first_of_two_good_slots() -> None:
    bad, good, slow, lost = (50.0, 1.0), (14.0, 1.0), (16.0, 1.0), (9.0, 0.9)
    assert reclaim([(0.0, *good), (0.25, *good)], 10) == 0.0
    assert reclaim([(0.0, *bad), (0.25, *good), (0.5, *slow), (0.75, *good), (1.0, *good)], 10) == 0.75
    assert reclaim([(0.0, *lost), (0.25, *good), (0.5, *good)], 10) == 0.25
    assert reclaim([(0.0, *bad), (0.25, *good)], 10) is None
    assert reclaim([(0.0, None, 0.0), (0.25, None, 0.0)], 10) is None


# --- the run


def test_the_short_mode_is_the_default_and_options_change_each_mode() -> None:
    short, full = options([]), options(["--full"])
    assert vars(short) | {"mode": None} == vars(options(["--short"])) | {"mode": None}
    assert (short.loads, short.minutes, short.repetitions, short.output) == ((0.6,), 5, 1, interference.HERE)
    assert (full.loads, full.minutes, full.repetitions, full.output) == (interference.LOADS, None, 5, interference.DOCS)
    assert set(full.antagonists) == {NONE, *ANTAGONISTS}
    assert schedule(options(["--tiny"]), np.random.default_rng(1)) == [("cpu", 0.6)]
    chosen = options(["--loads", "20,95", "--antagonists", "cpu,none", "--minutes", "9"])
    assert (chosen.loads, chosen.antagonists, chosen.minutes) == ((0.2, 0.95), ("cpu", "none"), 9)


@pytest.mark.parametrize("wrong", [["--loads", "120"], ["--antagonists", "cpus"], ["--seconds", "0"]])
def test_an_option_that_makes_no_sense_is_refused(wrong: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        options(wrong)
    assert "error: argument" in capsys.readouterr().err


def test_each_repetition_has_every_cell_once() -> None:
    chosen = options(["--loads", "20,60", "--antagonists", "cpu,sync", "--repetitions", "2"])
    planned = schedule(chosen, np.random.default_rng(1))
    every = {("cpu", 0.2), ("cpu", 0.6), ("sync", 0.2), ("sync", 0.6)}
    assert set(planned[:4]) == set(planned[4:]) == every
    assert len(planned) == 8


def test_numbers_are_rounded_and_the_rest_is_left() -> None:
    assert rounded({"a": {"b": 1.23456789}, "c": [1], "d": None, "e": "x"}) == {
        "a": {"b": 1.235},
        "c": [1],
        "d": None,
        "e": "x",
    }


# --- the page


def results(blocks: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "at": "2026-01-02T03:04:05+00:00",
        "settings": interference.about(options([])),
        "machine": {
            "cpus": 2,
            "memory": 24 * GIB,
            "kernel": "6.1",
            "docker": "20.10",
            "cgroup_version": 2,
            "load": 0.1,
        },
        "capacity": [123.4],
        "blocks": blocks,
    }


def every_arm(**changed: Any) -> dict[str, Any]:
    return {name.replace("-", "_"): arm(**changed) for name in ARMS if name not in (ALONE, AGAIN, DEV_ALONE)}


def test_the_page_has_each_cell_and_verdict(tmp_path: Path) -> None:
    blocks = [block("cpu", 0.6, **every_arm(p50=20.0, work=16.0, oom=0)) for _ in range(4)]
    blocks += [block("cpu", 0.2, **every_arm(p50=20.0, work=16.0, oom=0))]
    blocks += [block("sync", 0.6, **every_arm(work=16.0, oom=1)), block("sync", 0.6, ("alone: stolen",), **every_arm())]
    found = results(blocks)
    interference_report.write(found, tmp_path)
    text = (tmp_path / "interference.md").read_text()
    # Each load has too few blocks for an interval; against the targets they are taken together.
    assert "| cpu | 60% | 1.000 |" in text
    assert "| cpu | 1.000 [1.000, 1.000]: met | 2.00 [2.00, 2.00]: missed | 1.00 [1.00, 1.00]: met |" in text
    assert "0.80 [0.80, 0.80]: missed | 0 | 5 |" in text  # dev's of what is left: 0.4 of 0.5
    assert "| 1 | 1 (1 void) |" in text
    assert "- sync at 60%: alone: stolen" in text
    assert "all together" in text
    assert "can certify" in text
    for line in text.splitlines():
        assert not line.startswith("|") or line.count("|") >= 3
    assert json.loads((tmp_path / "interference.json").read_text()) == found
    for metric in interference_report.PLOTTED:
        assert f"(interference-{metric}.svg)" in text
        assert (tmp_path / f"interference-{metric}.svg").read_text().startswith("<?xml")


def test_the_same_results_make_the_same_files(tmp_path: Path) -> None:
    found = results([block("cpu", 0.6, **every_arm()), block(NONE, 0.2, **every_arm())])
    for folder in ("one", "two"):
        interference_report.write(found, tmp_path / folder)
    for file in sorted((tmp_path / "one").iterdir()):
        assert file.read_bytes() == (tmp_path / "two" / file.name).read_bytes(), file.name


def test_the_published_page_is_what_its_results_make() -> None:
    folder = CHECKOUT / interference.DOCS
    file = folder / interference_report.RESULTS
    if not file.exists():
        pytest.skip("nothing is published yet")
    assert (folder / interference_report.PAGE).read_text() == interference_report.page(json.loads(file.read_text()))
