"""The corpus as typed data, and the page of documentation that shows a part of it."""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml

from settings.errors import Frozen

HERE = Path(__file__).parent
PROD, DEV, HOST = "corpus-prod", "corpus-dev", "host"
STACKS: Mapping[str, str] = {"prod": PROD, "dev": DEV, "host": HOST}
BASE = "base.yaml"

Entry = TypeVar("Entry", bound=Frozen)

UNBREAKABLE: Mapping[str, str] = {
    "backup-verified": "advice, on what the host knows: tests/e2e/test_backup.py",
    "init": "advice everywhere, and set by the pack itself",
    "net-raw": "dropped by the pack itself, unless NET_RAW is added, which is added-capabilities' to refuse",
}
"""Rules that no single change breaks, and why."""

_IMAGE = re.compile(r"^\s*(?:- )?image:\s*(\S+?)\s*$|[{,]\s*image:\s*\"?([^\s\",}]+)", re.MULTILINE)


class Change(Frozen):
    """An entry of bad.yaml or good.yaml, as bad.yaml's first lines describe it."""

    stack: Literal["prod", "dev", "host"]
    compose: str = ""
    program: str = ""
    ledger: Mapping[str, Any] = {}
    also: str = ""
    exempt: frozenset[str] = frozenset()
    remediated: frozenset[str] = frozenset()


class Documented(Frozen):
    """An entry of world.yaml, as its first lines describe it. `refused`: the reason by rule."""

    what: str
    refused: Mapping[str, str] = {}
    unread: str = ""
    why: str = ""


class Case(Frozen):
    """One program, and what is to be said of it: exactly these mandatory rules, exemptions and remedies.

    `unread`: a word of the error that ends the preview before any rule of a service is asked; None where none does.
    `exempt` counts where nothing is refused; `remediated` is None where nothing is said about it.
    """

    name: str
    stack: str
    compose: str
    change: str = ""
    program: str = ""
    ledger: Mapping[str, Any] = {}
    also: str = ""
    rules: frozenset[str] = frozenset()
    exempt: frozenset[str] = frozenset()
    remediated: frozenset[str] | None = None
    unread: str | None = None

    @property
    def images(self) -> set[str]:
        """The images that the compose files name."""
        return {one or other for one, other in _IMAGE.findall(f"{self.compose}\n{self.change}")}


def cases() -> dict[str, Case]:
    """Every case of the corpus by its name: `bad/privileged`, `good/prod-base`, `world/wordpress`."""
    return {case.name: case for case in (*_bad(), *_good(), *_world())}


def _bad() -> Iterator[Case]:
    for rule, change in _read("bad", Change).items():
        yield _case(f"bad/{rule}", change, rules=frozenset({rule}))


def _good() -> Iterator[Case]:
    for name, change in _read("good", Change).items():
        yield _case(f"good/{name}", change, remediated=change.remediated)


def _case(name: str, change: Change, **expected: Any) -> Case:
    return Case(
        name=name,
        stack=STACKS[change.stack],
        compose=(HERE / BASE).read_text(),
        change=change.compose,
        program=(HERE / "programs" / f"{change.program}.py").read_text() if change.program else "",
        ledger=change.ledger,
        also=change.also,
        exempt=change.exempt,
        **expected,
    )


def _world() -> Iterator[Case]:
    for name, entry in documented().items():
        yield Case(
            name=f"world/{name}",
            stack=DEV,
            compose=(HERE / "world" / f"{name}.yaml").read_text(),
            rules=frozenset(entry.refused),
            unread=entry.unread or None,
        )


def documented() -> dict[str, Documented]:
    """The entries of world.yaml."""
    return _read("world", Documented)


def _read(name: str, model: type[Entry]) -> dict[str, Entry]:
    document = yaml.safe_load((HERE / f"{name}.yaml").read_text())
    return {key: model.model_validate(value) for key, value in document.items()}


def page() -> str:
    """docs/research/compose-corpus.md."""
    entries = sorted(documented().items())
    passing = sum(not entry.refused and not entry.unread for _, entry in entries)
    rows = "\n".join(
        f"| [{name}](../../tests/e2e/corpus/world/{name}.yaml) | {entry.what} | {_verdict(entry)} | {_reasons(entry)} |"
        for name, entry in entries
    )
    return PAGE.format(files=len(entries), passing=passing, rest=len(entries) - passing, rows=rows)


def _verdict(entry: Documented) -> str:
    if entry.unread:
        return "not read"
    return "refused" if entry.refused else "passes"


def _reasons(entry: Documented) -> str:
    if entry.unread:
        return f"`{entry.unread}`: {entry.why}"
    return "<br>".join(f"`{rule}`: {why}" for rule, why in sorted(entry.refused.items()))


PAGE = """# Compose files as people run them

{files} Compose files of the kinds people run, condensed to what the rules look at: about ten were compared with the
file that their project publishes, the others follow its documentation. Each is previewed with Pulumi and the policy
pack in a best-effort environment (`tests/e2e/test_corpus.py`). {passing} pass as they are; {rest} are
refused, each for the rules below and no other. Restricted rules (root, writable root file system, no limits, passwords
in variables, tags) are advice there, so they are not listed.

Most refusals are of `host-path`. Data belongs in a named volume, or in `/srv/<environment>`; a folder of the checkout
can be mounted read-only (`:ro`). Agents that look at the whole machine belong in the host stack, or are exempted
where their rule accepts that.

| file | what it is | verdict in dev | rules, and why that is right |
|---|---|---|---|
{rows}
"""
