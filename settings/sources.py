"""The compose files as written, with those they include or extend, to say in which file and line a key stands.
Compose's own output has lost that: it is one merged document."""

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from settings.errors import Loc
from settings.yamlfile import Loader, YamlFile

EXTENSION = "x-bulkhead"

_VARIABLE = re.compile(r"(?<!\$)\$\{?([A-Za-z_][A-Za-z0-9_]*)", re.ASCII)

CONFIDENTIAL = frozenset({"environment", "args", "labels", "content"})
"""Keys whose values a message must not repeat."""


class Sources:
    """Where keys stand, over all files. Later files override earlier ones, so they are looked at first.

    `may_extend` is false if no file mentions `x-bulkhead`, and all files that matter are known.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        found: dict[Path, YamlFile] = {}
        known = [_collect(path.resolve(), found) for path in paths]
        self._files = list(reversed(found.values()))
        self.names = ", ".join(path.name for path in paths)
        self.may_extend = not all(known) or any(EXTENSION in file.text for file in self._files)

    def at(self, loc: Loc) -> str:
        """`file:line` of the key at `loc`, or of the nearest parent that is written somewhere."""
        found = self.find(loc)
        return f"{found[0].name}:{found[1]}" if found else self.names

    def find(self, loc: Loc) -> tuple[Path, int] | None:
        """File and line of the key at `loc`, or of the nearest parent that is written somewhere; None if none is."""
        keys = loc[: next((index for index, part in enumerate(loc) if isinstance(part, int)), len(loc))]
        if len(keys) < len(loc) and sum(keys in file.lines for file in self._files) == 1:
            keys = loc  # one file holds the whole list, so merging has not moved its entries
        for length in range(len(keys), 0, -1):
            for file in self._files:
                if keys[:length] in file.lines:
                    return file.path, file.lines[keys[:length]]
        return None

    def scalar(self, loc: Loc) -> str | None:
        """The value at `loc` as the last file that has it writes it; None for one that may be confidential."""
        if CONFIDENTIAL & set(loc):
            return None
        return next((value for file in self._files if (value := file.scalar(loc)) is not None), None)

    def written(self) -> set[Loc]:
        """The path of every key, over all files."""
        return {loc for file in self._files for loc in file.lines}

    def variable_files(self) -> Iterator[tuple[str, str]]:
        """(key, path) of each `env_file` and `label_file` as written, from the folder of the file that names it.

        Compose reads them and leaves no trace of them in its output.
        """
        for file in self._files:
            document = file.construct(_Tolerant)
            services = document.get("services") if isinstance(document, Mapping) else None
            for name, service in services.items() if isinstance(services, Mapping) else ():
                for key in ("env_file", "label_file"):
                    written = service.get(key) if isinstance(service, Mapping) else None
                    for one in written if isinstance(written, list) else [written]:
                        path = one.get("path") if isinstance(one, Mapping) else one
                        if path is not None:
                            yield f"services.{name}.{key}", str(file.path.parent / str(path))

    def interpolated(self) -> set[str]:
        """The names of all variables that the files put in: `$NAME`, `${NAME}`, `${NAME:-default}`."""
        return {name for file in self._files for name in _VARIABLE.findall(file.text)}

    def mentions(self, pattern: str) -> str:
        """`file:line` of the first line that a regular expression matches."""
        for file in reversed(self._files):
            for number, line in enumerate(file.text.splitlines(), start=1):
                if re.search(pattern, line):
                    return f"{file.name}:{number}"
        return self.names


class _Tolerant(Loader):  # type: ignore[misc]
    """Compose's `!reset` and `!override` are for Compose; their values are of no interest here."""


_Tolerant.add_multi_constructor("!", lambda _loader, _suffix, _node: None)


def _collect(path: Path, found: dict[Path, YamlFile]) -> bool:
    """Reads `path` and the files it refers to; false if one of them is not a local file we can name."""
    if path in found:
        return True
    file = YamlFile(path)
    known = []
    document = file.construct(_Tolerant)
    for other in _referenced(document) if isinstance(document, Mapping) else ():
        target = (path.parent / other).resolve()
        known.append(target.is_file() and _collect(target, found))
    found[path] = file
    return all(known)


def _referenced(document: Mapping[str, Any]) -> Iterator[str]:
    for entry in document.get("include") or ():
        yield from _words(entry.get("path") if isinstance(entry, Mapping) else entry)
    services = document.get("services")
    for service in services.values() if isinstance(services, Mapping) else ():
        extends = service.get("extends") if isinstance(service, Mapping) else None
        yield from _words(extends.get("file") if isinstance(extends, Mapping) else None)


def _words(value: object) -> Iterator[str]:
    for word in value if isinstance(value, list) else [value]:
        if isinstance(word, str):
            yield word
