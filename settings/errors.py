"""The one error of this package, and the one translation of pydantic's errors into it.
A message names the file (with its line), the key, the value and the remedy, so that a user can act on it."""

import difflib
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

Loc = tuple[str | int, ...]
"""Path to a key from the top of a file: `("services", "api", "ports", 0)`."""

_UNSET: Any = object()
_LONGEST_VALUE = 80  # characters of a value that a message repeats


class Frozen(BaseModel):
    """Base of every model here: immutable, and an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", arbitrary_types_allowed=True, populate_by_name=True)


class SettingsError(Exception):
    """Bad input. `file` (`compose.yaml:12`), `service`, `key`, `value`, `problem`, `remedy`.

    `str()` is one line per fault. `others` holds the further faults of the same file, so that one run
    shows everything that has to change.
    """

    def __init__(
        self,
        *,
        file: str,
        key: str,
        problem: str,
        remedy: str,
        value: object = _UNSET,
        service: str | None = None,
    ) -> None:
        self.file, self.service, self.key = file, service, key
        self.value = None if value is _UNSET else value
        self.problem, self.remedy = problem, remedy
        self.others: tuple[SettingsError, ...] = ()
        parts = [
            file,
            f"service {service}" if service else "",
            key,
            "" if value is _UNSET else _shown(value),
            f"{problem}. {remedy}" if remedy else problem,
        ]
        self.message = ": ".join(part for part in parts if part)
        super().__init__(self.message)

    def __str__(self) -> str:
        return "\n".join([self.message, *(other.message for other in self.others)])


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= _LONGEST_VALUE else f"{text[: _LONGEST_VALUE - 3]}..."


def together(errors: Sequence[SettingsError]) -> SettingsError:
    """One error for several (at least one), in the order of files and lines."""
    first, *rest = sorted(errors, key=_place)
    first.others = tuple(rest)
    return first


def _place(error: SettingsError) -> tuple[str, int]:
    name, _, line = error.file.rpartition(":")
    return (name, int(line)) if line.isdigit() else (error.file, 0)


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """`Did you mean 'memory'?`, or the list of what is known when nothing is close."""
    names = sorted(known)
    close = difflib.get_close_matches(word, names, n=1)
    if close:
        return f"Did you mean {close[0]!r}?"
    return f"Known: {', '.join(names)}." if names else ""


def dotted(loc: Iterable[str | int]) -> str:
    """`ports[0].target` for `("ports", 0, "target")`."""
    return re.sub(r"\.\[", "[", ".".join(f"[{part}]" if isinstance(part, int) else part for part in loc))


def faults(error: ValidationError, one: Callable[[Loc, str, str, Any], SettingsError | None]) -> list[SettingsError]:
    """Every fault of a pydantic error through `one(loc, type, message, value)`; `None` leaves a fault out."""
    found = (
        one(fault["loc"], fault["type"], _WORDS.get(fault["type"]) or _plain(fault["msg"]), fault["input"])
        for fault in error.errors(include_url=False, include_context=False)
    )
    return [fault for fault in found if fault is not None]


_NOT_A_MAPPING = "not a mapping; write {key: value}"
_NOT_WHOLE = "not a whole number; write digits only"
_WORDS = {
    "missing": "missing; add the key",
    "model_type": _NOT_A_MAPPING,
    "dict_type": _NOT_A_MAPPING,
    "mapping_type": _NOT_A_MAPPING,
    "string_type": "not text; put it in quotes",
    "path_type": "not text; put it in quotes",
    "frozen_set_type": _NOT_A_MAPPING,
    "int_type": _NOT_WHOLE,
    "int_parsing": _NOT_WHOLE,
    "int_from_float": _NOT_WHOLE,
    "bool_type": "neither true nor false; write one of them",
    "bool_parsing": "neither true nor false; write one of them",
}
"""Pydantic's types of fault in our words: what is wrong; what to do."""


def _plain(message: str) -> str:
    """Pydantic's message as a clause."""
    message = message.removeprefix("Value error, ").rstrip(".")
    return f"must be{message.removeprefix('Input should be')}" if message.startswith("Input should be") else message


def sentence(clause: str) -> str:
    """`Write it so.` for `write it so`."""
    return f"{clause[:1].upper()}{clause[1:]}." if clause else ""
