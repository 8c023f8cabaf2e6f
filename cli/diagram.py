"""A picture of what is deployed, from the stacks' outputs: the host's budgets, and every environment within its walls.
`render` is pure, `write` runs Graphviz. Which service is on which network is not in the outputs, so it is not drawn."""

import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from html import escape
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import graphviz

from cli.pulumi import PulumiError
from settings.ledger import Budget, Capacity, Environment, Ledger, Row, Tier, shown

HOST = "host"
FONT = "Helvetica,Arial,sans-serif"
TEXT, FAINT, LINE = "#1f2933", "#66727f", "#c3ccd5"
SYSTEM, FREE = "#8d99a6", "#f3f5f7"
ACROSS = 3  # services, networks or volumes in one row of an environment
ABREAST = 2  # environments in one row of the host
CELL, WIDE = 132, 424  # widths in points; two environments side by side make a picture of 1200 px
BAR = 690  # points of the host's whole capacity
GAP = "\N{NO-BREAK SPACE}"  # ends a piece of text before another one: plain spaces are swallowed there
LONGEST = 24  # characters of a name that fit a cell


class Colours(NamedTuple):
    """One tier's: walls and bars, the environment's ground, small text on it."""

    wall: str
    ground: str
    text: str


COLOURS = {
    Tier.PROTECTED: Colours("#1d5c96", "#edf4fb", "#174a79"),
    Tier.BEST_EFFORT: Colours("#c27a0e", "#fdf5e8", "#83520a"),
}
HEALTH = {"healthy": ("#1a7f37", "●"), "unchecked": (FAINT, "○")}


def render(outputs: Mapping[str, Any]) -> graphviz.Digraph:
    """The picture of `outputs`: outputs by stack, as docs/outputs.schema.json describes them.

    `host` must be among them. An environment that only the host stack knows is drawn as not deployed.
    """
    picture = graphviz.Digraph(
        "bulkhead",
        graph_attr={"rankdir": "TB", "fontname": FONT, "bgcolor": "white", "pad": "0.15", "nodesep": "0.25"}
        | {"ranksep": "0.16", "tooltip": "What is deployed"},
        node_attr={"shape": "plain", "fontname": FONT, "fontsize": "10", "fontcolor": TEXT},
        edge_attr={"style": "invis"},
    )
    ledger = promised(outputs[HOST])
    chains: list[list[str]] = []
    with picture.subgraph(name="cluster_host") as box:
        box.attr(label="", style="rounded", color=TEXT, penwidth="1.5", margin="14")
        box.node("host", label=machine(outputs[HOST], ledger))
        for number, environment in enumerate(ledger.environments.values()):
            told = outputs.get(environment.name)
            with box.subgraph(name=f"cluster_{number}") as walls:
                chains.append(draw(walls, f"e{number}", environment, outputs[HOST], told))
    for number, chain in enumerate(chains):
        # From the host's corners: that is what keeps the first environment on the left.
        above = f"host:{'sw' if number == 0 else 'se'}" if number < ABREAST else chains[number - ABREAST][-1]
        for upper, lower in pairwise([above, *chain]):
            picture.edge(upper, lower, weight="1" if upper.startswith("host") else "100")
    picture.node("legend", label=legend())
    for chain in chains[-ABREAST:]:
        picture.edge(chain[-1], "legend")
    return picture


def write(outputs: Mapping[str, Any], path: Path) -> None:
    """Writes the picture as SVG. `PulumiError` when Graphviz's `dot` is missing or fails."""
    if shutil.which("dot") is None:
        raise PulumiError(
            "Graphviz's `dot` is not installed, and it draws the picture. "
            "Next step: apt-get install graphviz, then run the same command again"
        )
    try:
        drawn = render(outputs).pipe(format="svg", encoding="utf-8", quiet=True)
    except graphviz.CalledProcessError as error:
        raise PulumiError(f"dot could not draw the picture: {error}") from None
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(drawn, encoding="utf-8")


def promised(told: Mapping[str, Any]) -> Ledger:
    """The host stack's outputs as the ledger that they were made from, in its order of tiers."""
    environments = [
        Environment(
            name=name,
            tier=Tier(one["tier"]),
            subnet=one["subnet"],
            reservations=_budget(one["budget"].get("reservations")),
            limits=_budget(one["budget"].get("limits")),
        )
        for name, one in told["environments"].items()
    ]
    ordered = sorted(environments, key=lambda one: (one.tier is not Tier.PROTECTED, one.name))
    return Ledger(
        file="",
        host=None,
        capacity=Capacity(**told["capacity"]),
        system=Budget(**told["system"]),
        environments={one.name: one for one in ordered},
    )


def _budget(amounts: Mapping[str, Any] | None) -> Budget | None:
    return None if amounts is None else Budget(**amounts)


def machine(told: Mapping[str, Any], ledger: Ledger) -> str:
    """The host's name plate: what it has, and a bar of promises for each resource that has any."""
    engine = told["engine"]
    capacity = ", ".join(shown(name, getattr(ledger.capacity, name)) for name in ("cpus", "memory", "disk"))
    group = f"cgroup v{engine['cgroup_version']}, {engine['cgroup_driver']} driver"
    about = small(f"{capacity}, Docker {engine['version']}, {group}")
    title = bold(f"Docker host{2 * GAP}", 14) + about
    bars = [bar(row, ledger) for row in ledger.rows() if row.system or any(row.promised.values())]
    return table([[cell(title, ALIGN="LEFT")], *([cell(one)] for one in bars)], CELLSPACING="2")


def bar(row: Row, ledger: Ledger) -> str:
    """One resource's capacity to scale: the system's share, each promise, and what nobody is promised."""
    parts = [("system", row.system, SYSTEM, "white")]
    for name, amount in row.promised.items():
        environment = ledger.environments[name]
        word = "reserved" if environment.tier is Tier.PROTECTED else "limit"
        parts.append((f"{name} {word}", amount, COLOURS[environment.tier].wall, "white"))
    parts.append(("not promised", row.free, FREE, FAINT))
    segments = [
        cell(
            font(fitting(name, shown(row.resource, amount), width), text, 9),
            BGCOLOR=colour,
            WIDTH=str(width),
            HEIGHT="20",
            FIXEDSIZE="TRUE",
        )
        for name, amount, colour, text in parts
        if amount > 0 and (width := round(BAR * amount / row.capacity)) > 0
    ]
    label = cell(small(f"{row.resource} "), WIDTH="56", ALIGN="RIGHT")
    return table([[label, *segments]], CELLSPACING="1")


def fitting(name: str, amount: str, width: int) -> str:
    """The longest of `name amount`, the amount, nothing that a segment of that many points has room for."""
    texts = (f"{name} {amount}", amount, "")
    return next(text for text in texts if 6.2 * len(text) <= width - 4 or not text)


def draw(
    walls: graphviz.Digraph, key: str, environment: Environment, host: Mapping[str, Any], told: Mapping[str, Any] | None
) -> list[str]:
    """One environment into its cluster; the nodes from top to bottom, which the caller chains."""
    colours = COLOURS[environment.tier]
    walls.attr(
        label="", style="rounded,filled", color=colours.wall, fillcolor=colours.ground, penwidth="3", margin="10"
    )
    parent = host["environments"][environment.name]["cgroup_parent"]
    walls.node(f"{key}_head", label=plate(environment, parent, told is not None))
    if told is None:
        return [f"{key}_head"]
    chain = [f"{key}_head"]
    published = sorted({one["service"] for one in told["endpoints"]})
    if published:
        chain.append(f"{key}_ports")
        walls.node(chain[-1], label=doors(told["endpoints"], published, colours))
    for part, label in contents(told, environment, published).items():
        chain.append(f"{key}_{part}")
        walls.node(chain[-1], label=label)
    for number in range(len(published)):
        walls.edge(
            f"{key}_ports:d{number}:s",
            f"{key}_services:s{number}:n",
            style="solid",
            color=colours.wall,
            penwidth="1.6",
            arrowsize="0.7",
            constraint="false",
        )
    return chain


def plate(environment: Environment, parent: str, deployed: bool) -> str:
    """An environment's heading: name, tier, slice, range and budget."""
    colours = COLOURS[environment.tier]
    name = bold(environment.name + 2 * GAP, 16, colours.wall)
    tier = font(f"{environment.tier}{'' if deployed else ', not deployed'}", colours.text)
    budgets = [
        f"{word} {amounts(budget)}"
        for word, budget in (("reserved", environment.reservations), ("at most", environment.limits))
        if budget is not None
    ]
    lines = [f"slice {parent}, addresses {environment.subnet}", *budgets]
    heading = cell(name + tier, ALIGN="LEFT", WIDTH=str(WIDE))
    return table([[heading], *([cell(small(line), ALIGN="LEFT")] for line in lines)], CELLPADDING="2")


def amounts(budget: Budget) -> str:
    """`7.2 CPUs, 8GiB memory, 4096 processes`."""
    parts = [
        "" if budget.cpus is None else shown("cpus", budget.cpus),
        "" if budget.memory is None else f"{shown('memory', budget.memory)} memory",
        "" if budget.disk is None else f"{shown('disk', budget.disk)} disk",
        "" if budget.pids is None else f"{budget.pids} processes",
    ]
    return ", ".join(part for part in parts if part)


def doors(endpoints: Sequence[Mapping[str, Any]], order: Sequence[str], colours: Colours) -> str:
    """The published ports, one coloured tag for each service, in the order of the services below them."""
    tags = [
        cell(
            "<BR/>".join(font(address(one), "white") for one in endpoints if one["service"] == name),
            PORT=f"d{number}",
            BGCOLOR=colours.wall,
            CELLPADDING="4",
            WIDTH=str(CELL),
        )
        for number, name in enumerate(order)
    ]
    return table(rows_of(tags), CELLSPACING="5")


def address(endpoint: Mapping[str, Any]) -> str:
    """`127.0.0.1:8080`, with the protocol where it is not TCP, and the container's port where the engine picks."""
    port = endpoint.get("port") or f"*→{endpoint['target']}"
    host = f"[{endpoint['address']}]" if ":" in endpoint["address"] else endpoint["address"]
    return f"{host}:{port}" + ("" if endpoint["protocol"] == "tcp" else f"/{endpoint['protocol']}")


def contents(told: Mapping[str, Any], environment: Environment, published: Sequence[str]) -> dict[str, str]:
    """Services (published ones first, beside their ports), networks and volumes as one table each."""
    order = sorted(told["services"], key=lambda name: (name not in published, name))
    services = [service(name, told["services"][name], f"s{number}") for number, name in enumerate(order)]
    networks = [network(name, one) for name, one in sorted(told["networks"].items())]
    kept = ["kept by make down"] if environment.tier is Tier.PROTECTED else []
    volumes = [box(name, kept, BORDER="1", HEIGHT="32", SIDES="LRB") for name in told["volumes"]]
    named = {"services": services, "networks": networks, "volumes": volumes}
    return {part: section(part, cells) for part, cells in named.items() if cells}


def service(name: str, told: Mapping[str, Any], port: str) -> str:
    """A service: replicas, health, image."""
    colour, dot = HEALTH[told["health"]]
    replicas = len(told["containers"])
    many = f", {replicas} replicas" if replicas != 1 else ""
    health = font(f"{dot} {told['health']}{many}", colour)
    lines = [bold(cut(name), 11), health, small(cut(told["image"]["name"].split("/")[-1]), 8)]
    inner = "<BR/>".join(lines)
    return cell(inner, PORT=port, BORDER="1", BGCOLOR="white", CELLPADDING="5", WIDTH=str(CELL))


def network(name: str, told: Mapping[str, Any]) -> str:
    """A network: solid when nothing leaves it, dashed when it has a way out."""
    if told["external"]:
        return box(name, ["made by another party"], BORDER="1", COLOR=FAINT, STYLE="dotted")
    inside = told["internal"]
    exits, style = ("internal", "solid") if inside else ("has a way out", "dashed")
    return box(name, [told["subnet"], exits], BORDER="1", COLOR=FAINT, STYLE=style)


def box(name: str, lines: Iterable[str], **attributes: str) -> str:
    """A cell with a name and small lines below it."""
    text = "<BR/>".join([font(cut(name), TEXT), *(small(line, 9) for line in lines)])
    return cell(text, BGCOLOR="white", CELLPADDING="4", WIDTH=str(CELL), **attributes)


def section(title: str, cells: Sequence[str]) -> str:
    """A captioned grid of cells."""
    caption = cell(small(title, 9), COLSPAN=str(ACROSS), ALIGN="LEFT", BORDER="0")
    return table([[caption], *rows_of(cells)], CELLSPACING="5")


def legend() -> str:
    """What colours and lines mean."""
    tiers = [
        font(f"■{GAP}", COLOURS[tier].wall) + small(f"{tier}: {meaning}")
        for tier, meaning in (
            (Tier.PROTECTED, "has reservations, may burst"),
            (Tier.BEST_EFFORT, "has limits, gives way"),
        )
    ]
    health = [font(f"{dot}{GAP}", colour) + small(name) for name, (colour, dot) in HEALTH.items()]
    system = font(f"■{GAP}", SYSTEM) + small("the system's share")
    return table([[cell(one) for one in [system, *tiers, *health]]], CELLSPACING="12")


def rows_of(cells: Sequence[str]) -> Iterator[list[str]]:
    """The cells in rows, the last one filled up so that columns keep their width."""
    for start in range(0, len(cells), ACROSS):
        row = list(cells[start : start + ACROSS])
        yield row + [cell("", BORDER="0", WIDTH=str(CELL))] * (ACROSS - len(row))


def table(rows: Iterable[Iterable[str]], **attributes: str) -> str:
    """An HTML-like table without a frame, as a label."""
    set_ = {"BORDER": "0", "CELLBORDER": "0", "CELLSPACING": "0", "CELLPADDING": "0", "COLOR": LINE} | attributes
    body = "".join(f"<TR>{''.join(row)}</TR>" for row in rows)
    return f"<<TABLE {_written(set_)}>{body}</TABLE>>"


def cell(content: str, **attributes: str) -> str:
    """One cell; `content` is markup, or a label that `table` made."""
    inner = content[1:-1] if content.startswith("<<") else content
    return f"<TD {_written(attributes)}>{inner}</TD>" if attributes else f"<TD>{inner}</TD>"


def _written(attributes: Mapping[str, str]) -> str:
    return " ".join(f'{name}="{value}"' for name, value in attributes.items())


def font(text: str, colour: str, points: int = 10) -> str:
    """Text in a colour and a size; nothing for no text, since Graphviz refuses an empty element."""
    return f'<FONT COLOR="{colour}" POINT-SIZE="{points}">{escape(text)}</FONT>' if text else ""


def bold(text: str, points: int, colour: str = TEXT) -> str:
    """A name that stands out."""
    return f"<B>{font(text, colour, points)}</B>"


def small(text: str, points: int = 10) -> str:
    """What is said about it."""
    return font(text, FAINT, points)


def cut(name: str) -> str:
    """A name that fits a cell, with an ellipsis where it is longer."""
    return name if len(name) <= LONGEST else f"{name[: LONGEST - 1]}…"
