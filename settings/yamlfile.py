"""YAML files with the line of every key, so that an error can say `Pulumi.host.yaml:7`.
Syntax errors and duplicate keys (which PyYAML lets pass) become a SettingsError."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from settings.errors import Loc, SettingsError

Loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
"""libyaml where PyYAML was built with it (ten times as fast); both read the same language."""


class YamlFile:
    """One file: `path`, `name` as messages show it, `text`, `data` (plain values), `lines` (1-based, per key path)."""

    def __init__(self, path: Path) -> None:
        self.path, self.name, self.text = path, path.name, _text(path)
        self._root = _compose(self.name, self.text)
        self.lines: dict[Loc, int] = dict(_lines(self._root, (), self.name, set())) if self._root else {}

    @property
    def data(self) -> Any:
        """The document as plain values."""
        return self.construct(Loader)

    def construct(self, loader: Any) -> Any:
        """The document as `loader` builds it; an unknown tag is a SettingsError."""
        try:
            return loader("").construct_document(self._root) if self._root else None
        except yaml.YAMLError as error:
            raise _syntax_error(self.name, error) from None

    def scalar(self, loc: Loc) -> str | None:
        """The plain value at `loc` as it is written; None if there is none, or a list or mapping."""
        node = self._node(loc)
        return str(node.value) if isinstance(node, yaml.ScalarNode) else None

    def tag(self, loc: Loc) -> str | None:
        """The tag of the value at `loc`, such as `!override`; None if it is not written, or only merged in."""
        node = self._node(loc)
        return node.tag if node else None

    def _node(self, loc: Loc) -> yaml.Node | None:
        node = self._root
        for part in loc:
            if isinstance(node, yaml.MappingNode):
                node = next((value for key, value in node.value if key.value == part), None)
            elif isinstance(node, yaml.SequenceNode) and isinstance(part, int) and part < len(node.value):
                node = node.value[part]
            else:
                return None
        return node

    def at(self, loc: Loc) -> str:
        """`name:line` of the key at `loc`, or of its nearest written parent; the bare name if none is written."""
        for length in range(len(loc), 0, -1):
            if loc[:length] in self.lines:
                return f"{self.name}:{self.lines[loc[:length]]}"
        return self.name


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise SettingsError(
            file=path.name, key="", problem=f"not UTF-8 text ({error.reason})", remedy="Save the file as UTF-8."
        ) from None
    except OSError as error:
        raise SettingsError(
            file=str(path), key="", problem=error.strerror or "cannot be read", remedy="Check the path."
        ) from None


def _compose(name: str, text: str) -> yaml.Node | None:
    try:
        return yaml.compose(text, Loader=Loader)
    except yaml.YAMLError as error:
        raise _syntax_error(name, error) from None


def _syntax_error(name: str, error: yaml.YAMLError) -> SettingsError:
    mark = getattr(error, "problem_mark", None)
    what = getattr(error, "problem", None) or str(error)
    return SettingsError(
        file=f"{name}:{mark.line + 1}" if mark else name,
        key="",
        problem=f"not valid YAML: {what}",
        remedy="Correct the line (indentation, quotes and brackets are the usual causes).",
    )


def _lines(node: yaml.Node, loc: Loc, name: str, seen: set[int]) -> Iterator[tuple[Loc, int]]:
    if id(node) in seen:  # an alias: its keys are known where the anchor stands; also ends recursive ones
        return
    seen.add(id(node))
    if isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            yield (*loc, index), item.start_mark.line + 1
            yield from _lines(item, (*loc, index), name, seen)
    if isinstance(node, yaml.MappingNode):
        words: set[str] = set()
        for key, value in node.value:
            word, line = str(key.value), key.start_mark.line + 1
            if word in words and word != "<<":
                raise SettingsError(
                    file=f"{name}:{line}",
                    key=word,
                    problem="written twice in the same mapping",
                    remedy="Keep one: YAML would silently take the last.",
                )
            words.add(word)
            yield (*loc, word), line
            yield from _lines(value, (*loc, word), name, seen)
