"""What the policy pack says of a stack: the JSON lines that it appends to the file named by BULKHEAD_VERDICTS.
Read without trust: a line that cannot be read, or a file that ends early, is said and never taken for a pass."""

import json
import re
from collections.abc import Iterable
from enum import StrEnum
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import ValidationError

from cli.previews import Preview
from cli.pulumi import ANSI
from settings.errors import Frozen

VARIABLE = "BULKHEAD_VERDICTS"

# What XML 1.0 cannot hold, and what a terminal would obey.
CONTROL = re.compile(r"[^\t\n\x20-\x7e\xa0-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


class Kind(StrEnum):
    """Verdicts, in the order in which a reader wants them."""

    VIOLATION = "violation"
    EXEMPT = "exempt"
    REMEDIATED = "remediated"
    PASS = "pass"  # noqa: S105 - no password


class Level(StrEnum):
    """`mandatory` stops a deploy; `remediate` is that of a rule which sets the property itself."""

    MANDATORY = "mandatory"
    ADVISORY = "advisory"
    REMEDIATE = "remediate"


class Exemption(Frozen, extra="ignore"):
    """Why a violation is accepted, by whom, and until which day."""

    reason: str
    owner: str
    expires: str


class Verdict(Frozen, extra="ignore"):
    """One rule's word on one resource. `path`: the property, as in `capabilities.adds[0]`, or empty."""

    stack: str
    rule: str
    family: str
    title: str
    references: tuple[str, ...] = ()
    level: Level
    verdict: Kind
    urn: str
    type: str
    resource: str
    path: str = ""
    message: str = ""
    exemption: Exemption | None = None

    @property
    def text(self) -> str:
        """The message, also of a verdict that comes without one."""
        by_pack = f"{self.name}: {self.path}: set by the policy pack"
        return self.message or (by_pack if self.verdict is Kind.REMEDIATED else f"{self.name}: {self.title}")

    @property
    def name(self) -> str:
        """The resource as messages name it: `dev-api-1 (Container)`."""
        return f"{self.resource} ({self.type.rpartition(':')[2]})"

    @property
    def stops(self) -> bool:
        """Whether it stops a deploy."""
        return self.verdict is Kind.VIOLATION and self.level is not Level.ADVISORY


class Told(NamedTuple):
    """What a file holds. `complete`: the pack has seen the whole stack. `fault`: what could not be read, or empty."""

    verdicts: tuple[Verdict, ...] = ()
    complete: bool = False
    fault: str = ""


class Finding(NamedTuple):
    """A verdict and where to change something: file (from the checkout, with slashes) and line."""

    verdict: Verdict
    file: str
    line: int


class Judged(NamedTuple):
    """One stack in the report. `failure`: why it proves nothing, or empty. `note`: what a reader has to know."""

    preview: Preview
    findings: tuple[Finding, ...]
    failure: str = ""
    note: str = ""

    @property
    def passed(self) -> bool:
        """Whether neither a violation nor a failure stands against a deploy."""
        return not self.failure and not any(one.verdict.stops for one in self.findings)

    def count(self, kind: Kind, advisory: bool = False) -> int:
        """Verdicts of a kind; of the violations either the advisory ones or the others."""
        verdicts = [one.verdict for one in self.findings if one.verdict.verdict is kind]
        return sum(kind is not Kind.VIOLATION or one.stops is not advisory for one in verdicts)


def clean(text: str) -> str:
    """Text without terminal codes, and without characters that a file of the report could not hold."""
    return CONTROL.sub("", ANSI.sub("", text))


def read(file: Path, stack: str) -> Told:
    """The verdicts in a file, without repetitions and in a reader's order. A missing file is an empty one."""
    lines = file.read_text(encoding="utf-8", errors="replace").split("\n") if file.exists() else []
    written = [line for line in lines if line.strip()]
    complete = bool(written) and _ends(written[-1], stack)
    found: list[Verdict] = []
    faults = []
    for number, line in enumerate(written[:-1] if complete else written, start=1):
        try:
            found.append(_verdict(line, stack))
        except (ValueError, ValidationError):
            faults.append(str(number))
    fault = f"The policy pack's verdicts on {stack} cannot be read: line {', '.join(faults)}." if faults else ""
    return Told(tuple(_ordered(found)), complete, fault)


def _ends(line: str, stack: str) -> bool:
    try:
        return bool(json.loads(line) == {"stack": stack, "complete": True})
    except ValueError:
        return False


def _verdict(line: str, stack: str) -> Verdict:
    verdict = Verdict.model_validate(_cleaned(json.loads(line)))
    if verdict.stack != stack:
        raise ValueError(f"about {verdict.stack}")
    return verdict


def _cleaned(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _cleaned(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_cleaned(inner) for inner in value]
    return clean(value) if isinstance(value, str) else value


def _ordered(found: Iterable[Verdict]) -> list[Verdict]:
    unique = {(one.rule, one.urn, one.path, one.message, one.verdict): one for one in found}
    kinds = list(Kind)
    return sorted(
        unique.values(),
        key=lambda one: (kinds.index(one.verdict), not one.stops, one.rule, one.urn, one.path, one.message),
    )
