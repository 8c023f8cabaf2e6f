"""What the interference benchmark found, as JSON, tables, a page and plots. Everything is made from the JSON alone,
so that the page can be written anew, and a test can see that it was not edited by hand."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from bench.interference_antagonists import ANTAGONISTS
from bench.interference_load import GRAIN
from bench.interference_results import (
    AGAIN,
    ALONE,
    DEV_ALONE,
    FEWEST,
    LEFT_TARGET,
    MET,
    MISSED,
    TARGET_LOAD,
    TARGETS,
    UNCERTIFIED,
    UNDECIDED,
    Block,
    Estimate,
    cells,
    estimates,
    of_cell,
    verdict,
)

RESULTS, PAGE = "interference.json", "interference.md"
BULKHEAD = "bulkhead"
ALL = "all together"
NOTHING = "-"

METRICS: Mapping[str, str] = {
    "throughput": "Prod's throughput, to prod alone",
    "p50": "Prod's median latency, to prod alone",
    "p99": "Prod's 99th percentile of latency, to prod alone",
    "errors": "Prod's errors, more than alone (share of requests)",
    "busy": "Utilisation: the machine's busy share",
    "work": "Dev's work, to dev alone",
    "sum": "Prod's throughput and dev's work together",
    "left": "Dev's work, to what prod alone left of the machine",
    "reclaim": "Seconds until prod is served as when alone",
    "lag": "How late the generator itself was (99th percentile, ms)",
    "steal": "Share of the CPU time that the hypervisor took",
}
DEVS = ("work", "sum", "left")
"""Metrics of dev's, which prod alone has not."""

PLOTTED = ("throughput", "p50", "p99", "busy")
LOG = ("p50", "p99")
COLUMNS_OF_PLOTS = 4

Cell = tuple[str, float, list[Block]]


def write(found: Mapping[str, Any], folder: Path) -> None:
    """JSON, page and plots into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = ",\n".join(json.dumps(block, separators=(",", ":")) for block in found["blocks"])
    head = json.dumps({key: value for key, value in found.items() if key != "blocks"}, indent=1)
    # A block a line: differences between two runs can be read.
    (folder / RESULTS).write_text(f'{head[:-2]},\n "blocks": [\n{lines}\n ]\n}}\n')
    (folder / PAGE).write_text(page(found))
    for metric in PLOTTED:
        plot(found, metric, folder / f"interference-{metric}.svg")


def rows(found: Mapping[str, Any]) -> list[Cell]:
    """Antagonist, load and blocks of each cell; of every load with several cells, also all together."""
    blocks = found["blocks"]
    listed: list[Cell] = []
    for load in sorted({load for _, load in cells(blocks)}):
        here = sorted((name for name, of in cells(blocks) if of == load), key=_place)
        listed += [(name, load, of_cell(blocks, name, load)) for name in here]
        if len(here) > 1:
            listed.append((ALL, load, of_cell(blocks, None, load)))
    return listed


def _place(antagonist: str) -> int:
    """Where the antagonist stands in its table; without one comes first."""
    return [None, *ANTAGONISTS].index(antagonist if antagonist in ANTAGONISTS else None)


def compared_arms(found: Mapping[str, Any], metric: str) -> list[str]:
    """The arms that a metric is shown of."""
    hidden = {ALONE, DEV_ALONE, *([AGAIN] if metric in DEVS else [])}
    return [arm for arm in found["settings"]["arms"] if arm not in hidden]


def grid(found: Mapping[str, Any], metric: str) -> tuple[list[str], list[list[str]]]:
    """A metric's table: its head, and a line for each cell."""
    arms = compared_arms(found, metric)
    lines = [
        [name, f"{load:.0%}", *(shown(estimates(blocks, arm)[metric], metric) for arm in arms), counted(blocks)]
        for name, load, blocks in rows(found)
        if metric not in DEVS or name not in ("none", ALL)
    ]
    return ["antagonist", "load", *arms, "blocks"], lines


def counted(blocks: Sequence[Block]) -> str:
    """How many blocks count, and how many were void."""
    void = sum(bool(block["void"]) for block in blocks)
    return f"{len(blocks) - void}" + (f" ({void} void)" if void else "")


def shown(estimate: Estimate | None, metric: str) -> str:
    """A mean and its interval."""
    if estimate is None:
        return NOTHING
    digits = 2 if metric != "errors" and max(abs(estimate.value), abs(estimate.high or 0)) < 10 else 1
    digits = 3 if metric in ("throughput", "errors", "steal") else digits
    value = f"{estimate.value:.{digits}f}"
    if estimate.low is None or estimate.high is None:
        return value
    return f"{value} [{estimate.low:.{digits}f}, {estimate.high:.{digits}f}]"


# --- against the target


def judged(found: Mapping[str, Any], arm: str = BULKHEAD) -> tuple[list[str], list[list[str]]]:
    """An arm against the targets: each antagonist over all the loads that they are set for, and all together."""
    counting = [block for block in found["blocks"] if block["load"] <= TARGET_LOAD]
    names = sorted(dict.fromkeys(block["antagonist"] for block in counting), key=_place)
    cases = [(name, [block for block in counting if block["antagonist"] == name]) for name in names]
    lines = []
    for name, blocks in [*cases, *([(ALL, counting)] if len(cases) > 1 else [])]:
        mine, again = estimates(blocks, arm), estimates(blocks, AGAIN)
        cells_ = [
            f"{shown(mine[key], key)}: {verdict(mine[key], again[key], target)}" for key, target in TARGETS.items()
        ]
        left, oom = mine["left"], mine["oom"]
        given = NOTHING if left is None or name == ALL else f"{shown(left, 'left')}: {left_verdict(left)}"
        killed = NOTHING if oom is None else f"{oom.value * oom.blocks:.0f}"
        lines.append([name, *cells_, given, killed, counted(blocks)])
    return ["antagonist", *TARGETS, "dev's of what is left", "prod killed for memory", "blocks"], lines


def left_verdict(left: Estimate) -> str:
    """Whether dev gets what it is to get of what prod leaves."""
    if left.low is None or left.high is None:
        return UNDECIDED
    if left.low >= LEFT_TARGET:
        return MET
    return MISSED if left.high < LEFT_TARGET else UNDECIDED


def noise(found: Mapping[str, Any]) -> list[str]:
    """What each load's A/A comparison says this host can certify."""
    told = []
    for name, load, blocks in rows(found):
        if name not in (ALL, *([] if _several(found, load) else [name])):
            continue
        again = estimates(blocks, AGAIN)
        parts = []
        for key, target in TARGETS.items():
            one = again[key]
            if one is None or one.spread is None:
                parts.append(f"{key} {shown(one, key)}: too few blocks")
                continue
            word = "can" if one.spread <= target.tolerance else "cannot"
            parts.append(f"{key} {shown(one, key)}: {word} certify ±{target.tolerance:.0%}")
        told.append(f"{load:.0%}: " + "; ".join(parts))
    return told


def _several(found: Mapping[str, Any], load: float) -> bool:
    return sum(of == load for _, of in cells(found["blocks"])) > 1


# --- on a terminal


def show(found: Mapping[str, Any], console: Console) -> None:
    """The tables that matter most, and what they come to."""
    for metric in ("throughput", "p50", "p99", "busy", "work", "reclaim"):
        head, lines = grid(found, metric)
        console.print(_table(METRICS[metric], head, lines))
    head, lines = judged(found)
    if lines:
        console.print(_table(f"{BULKHEAD} against the targets", head, lines))
    for line in noise(found):
        console.print(f"Prod alone, twice, at {line}", highlight=False)
    for line in voids(found["blocks"]):
        console.print(f"void: {line}", style="yellow", highlight=False)


def _table(title: str, head: Sequence[str], lines: Sequence[Sequence[str]]) -> Table:
    table = Table(title=title, title_justify="left")
    for number, word in enumerate(head):
        table.add_column(word, justify="left" if number == 0 else "right")
    for line in lines:
        table.add_row(*line, end_section=line[0] == ALL)
    return table


def voids(blocks: Sequence[Block]) -> list[str]:
    """Each block that does not count, and why."""
    return [
        f"{block['antagonist']} at {block['load']:.0%}: {'; '.join(block['void'])}" for block in blocks if block["void"]
    ]


# --- the page


def page(found: Mapping[str, Any]) -> str:
    """The whole page."""
    settings, machine, blocks = found["settings"], found["machine"], found["blocks"]
    told = {
        "date": found["at"][:10],
        "gib": f"{machine['memory'] / 2**30:.0f}",
        "capacity": " and ".join(f"{one:.0f}" for one in found["capacity"]),
        "highest": f"{TARGET_LOAD:.0%}",
        "throughput": f"{TARGETS['throughput'].bound:.0%}",
        "p50": f"{TARGETS['p50'].tolerance:.0%}",
        "p99": f"{TARGETS['p99'].tolerance:.0%}",
        "left": f"{LEFT_TARGET:.0%}",
        "fewest": FEWEST,
        "grain": 1000 * GRAIN,
        "lag": f"{settings['rules']['lag_ms']:g}",
        "unsent": f"{settings['rules']['unsent']:.0%}",
        "steal": f"{settings['rules']['steal']:.0%}",
        "met": MET,
        "missed": MISSED,
        "uncertified": UNCERTIFIED,
        "undecided": UNDECIDED,
    }
    arms = [[arm, what] for arm, what in settings["arms"].items()]
    antagonists = [[one.name, one.what, one.unit] for one in ANTAGONISTS.values()]
    text = [
        INTRODUCTION.format(**machine, **settings, **told),
        *_markdown(["arm", "what"], arms),
        "",
        *_markdown(["antagonist", "what dev does", "its work is counted in"], antagonists),
        "",
        "## What this host can certify",
        "Prod alone against prod alone:",
        *(f"- {line}" for line in noise(found)),
        "",
        JUDGEMENT.format(**told),
        *_markdown(*judged(found)),
        "",
        "## Results",
        *(line for metric in PLOTTED for line in (f"![{METRICS[metric]}](interference-{metric}.svg)", "")),
    ]
    for metric, title in METRICS.items():
        head, lines = grid(found, metric)
        if lines:
            text += [f"### {title}", *_markdown(head, lines), ""]
    void = [f"- {line}" for line in voids(blocks)] or [f"None of {len(blocks)}."]
    return "\n".join([*text, "## Void blocks", *void, "", AGAIN_BY_HAND])


INTRODUCTION = """\
# Interference: what dev's misbehaviour costs prod

<!-- Written by `make bench-interference ARGS=--full` from interference.json: do not edit. -->

Prod is the example shop under a constant rate of requests (Vegeta); dev does one thing at a time that hurts. Measured
{date} on {cpus} CPUs, {gib} GiB, kernel {kernel}, Docker {docker}, cgroup v{cgroup_version}. Prod's capacity alone is
{capacity} requests a second, and loads are shares of it.

## How
- A block is one antagonist at one load with every arm once, in random order. Numbers are ratios within a block,
  averaged over blocks, with 95 % intervals from bootstrapping blocks (bootstrap-t, from {fewest} blocks on).
- In each arm dev has the machine to itself for {lead} s, then prod is asked for {seconds} s. Latencies count from when
  a request was due (give or take the {grain:g} ms of the generator's timers). One that fails counts with at least its
  timeout.
- Both deployments of the shop have the same images and compose files. The one that is not measured is paused.
- Generator, shop and dev share the machine, as they would not in life. The generator has the highest priority, and its
  CPU time is part of the utilisation.
- Static partitions are the quotas of `deploy.resources.limits`. Prod's is cut by what each service used at capacity,
  which is better than a guess.
- A block is void if with prod alone the generator sent late (99th percentile above {lag} ms) or more than {steal} of
  the CPU time was stolen; if in any arm more than {unsent} of the requests were not sent, or the antagonist or prod did
  not run: set before measuring. Lateness and stolen time beside dev are part of what dev does to the machine: they have
  tables of their own, below.
- Prod alone is measured twice in each block (A/A). Where that interval is wider than a target, this host cannot
  certify it.
"""

JUDGEMENT = """\
## Bulkhead against the targets
At all loads up to {highest} together: throughput at least {throughput}, p50 within {p50}, p99 within {p99}, nothing of
prod killed for memory, and dev gets at least {left} of what prod leaves. *{met}*, *{missed}*: the whole interval lies
on that side, a miss also beyond the A/A interval. *{uncertified}*: the A/A interval is wider than the target.
*{undecided}*: neither. What one load alone comes to is in the tables below.
Work that is not bound by CPU can be more than what prod leaves of it.
"""

AGAIN_BY_HAND = """\
## Again
`make bench-interference` takes five minutes after set-up and writes to `.bulkhead/interference`. `ARGS=--full` writes
this page, `ARGS='--full --add'` adds blocks to it. It loads the machine to its limits: not where anything else runs.
"""


def _markdown(head: Sequence[str], lines: Sequence[Sequence[str]]) -> list[str]:
    return [
        f"| {' | '.join(head)} |",
        f"|{'---|' * len(head)}",
        *(f"| {' | '.join(line)} |" for line in lines),
    ]


# --- plots


def plot(found: Mapping[str, Any], metric: str, file: Path) -> None:
    """A metric by load, a panel for each antagonist and a line for each arm. The same bytes each time."""
    # Here, since it takes a second, and only who writes plots has it.
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    settings: Any = {"svg.hashsalt": "interference", "svg.fonttype": "none", "font.size": 8}
    listed = [name for name, _, _ in rows(found) if name != ALL]
    names = sorted(dict.fromkeys(listed), key=_place)
    lines = -(-len(names) // COLUMNS_OF_PLOTS)
    with pyplot.rc_context(settings):
        figure, panels = pyplot.subplots(
            lines,
            min(COLUMNS_OF_PLOTS, len(names)),
            figsize=(10, 2.2 * lines + 0.6),
            sharex=True,
            sharey=True,
            squeeze=False,
            layout="constrained",
        )
        for number, panel in enumerate(panels.flat):
            if number >= len(names):
                panel.set_visible(False)
                continue
            _panel(panel, found, names[number], metric)
        handles, labels = panels.flat[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
        figure.suptitle(METRICS[metric])
        figure.savefig(file, metadata={"Date": None})
        pyplot.close(figure)


def _panel(panel: Any, found: Mapping[str, Any], name: str, metric: str) -> None:
    for arm in compared_arms(found, metric):
        points = [
            (100 * load, one)
            for antagonist, load, blocks in rows(found)
            if antagonist == name and (one := estimates(blocks, arm)[metric])
        ]
        values = [one.value for _, one in points]
        below = [one.value - (one.value if one.low is None else one.low) for _, one in points]
        above = [(one.value if one.high is None else one.high) - one.value for _, one in points]
        style = "--" if arm == AGAIN else "-"
        panel.errorbar(
            [load for load, _ in points],
            values,
            yerr=[below, above],
            fmt=f"o{style}",
            markersize=3,
            label=arm,
            capsize=2,
        )
    panel.set_title(name)
    panel.set_xlabel("prod's load, % of its capacity")
    panel.grid(alpha=0.3)
    if metric in LOG:
        panel.set_yscale("log")
