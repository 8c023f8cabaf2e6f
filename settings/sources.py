"""The compose files as written, with those they include or extend, to say in which file and line a key stands.
Compose's own output has lost that: it is one merged document."""

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from settings.errors import Loc
from settings.yamlfile import Loader, YamlFile

EXTENSION = "x-bulkhead"

_VARIABLE = re.compile(r"(?<!\$)\$\{?([A-Za-z_][A-Za-z0-9_]*)", re.ASCII)

UNRESOLVED = "$"
"""A path with it is not known: it was read from the file, which Compose had not interpolated."""

_REMOTE = re.compile(r"[$:@]|^github\.com/")
"""A reference with a variable, or one that Compose may take for a repository or an artifact, whatever is here."""

_REPLACES = frozenset({"!reset", "!override"})
"""Tags of a later file that take away what earlier ones say."""

CONFIDENTIAL = frozenset({"environment", "args", "labels", "content"})
"""Keys whose values a message must not repeat."""


class Sources:
    """Where keys stand, over all files. Later files override earlier ones, so they are looked at first.

    `may_extend` is false if no file mentions `x-bulkhead`, and all files that matter are known.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        found: dict[Path, YamlFile] = {}
        self._named = _merged([path.resolve() for path in paths], paths[0].resolve().parent, found, ())
        self._files = list(reversed(found.values()))
        self.names = ", ".join(path.name for path in paths)
        unknown = any(UNRESOLVED in path for _, path in self._named.references())
        self.may_extend = unknown or any(EXTENSION in file.text for file in self._files)

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

    def variable_files(self, home: str) -> Iterator[tuple[str, str]]:
        """(key, path) of each file of variables or labels, and of each reference to a file that is not known here.

        Compose reads them and leaves no trace of them in its output. `home`: the folder that it puts in place of `~`.
        """
        for key, path in self._named.others:
            yield key, path
        for name, files in self._named.services.items():
            for key, path in files:
                whole = os.path.normpath(f"{home}/{path[1:]}") if path.startswith("~") else path
                yield f"services.{name}.{key}", whole

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
    """Compose's `!reset` is no value, and any other tag of its own is only for merging."""


def _tagged(loader: Any, suffix: str, node: yaml.Node) -> object:
    if suffix == "reset":
        return None
    if isinstance(node, yaml.MappingNode):
        return loader.construct_mapping(node, deep=True)
    if isinstance(node, yaml.SequenceNode):
        return loader.construct_sequence(node, deep=True)
    return loader.construct_scalar(node)


_Tolerant.add_multi_constructor("!", _tagged)
for _kind in ("bool", "int", "float", "timestamp"):  # a service may be called `on`
    _Tolerant.add_constructor(f"tag:yaml.org,2002:{_kind}", lambda loader, node: loader.construct_scalar(node))
# Compose takes it for text, also where it names a key or a file.
_Tolerant.add_constructor(
    "tag:yaml.org,2002:binary", lambda loader, node: loader.construct_yaml_binary(node).decode(errors="replace")
)


class _Named(NamedTuple):
    """What files name: by service, and for all. Both are (key, path), with `~` as written."""

    services: dict[str, list[tuple[str, str]]]
    others: list[tuple[str, str]]

    def references(self) -> Iterator[tuple[str, str]]:
        """Those to further Compose files."""
        named = [*self.others, *(one for files in self.services.values() for one in files)]
        return (one for one in named if one[0] in ("include", "extends.file"))


def _merged(paths: Sequence[Path], folder: Path, found: dict[Path, YamlFile], trail: tuple[Path, ...]) -> _Named:
    """What these files name, merged in this order. `folder`: the project directory, where relative paths begin.

    `found` gets every file, an included one before the one that includes it. `trail`: the files that lead here.
    """
    merged = _Named({}, [])
    for path in paths:
        if path in trail:
            continue  # Compose refuses it
        file = YamlFile(path.resolve())
        document = _mapping(file.construct(_Tolerant))
        own = _Named({}, [])
        for entry in _listed(document.get("include")):
            included = _included(_mapping(entry) or {"path": entry}, folder, found, (*trail, path))
            own.others.extend(included.others)
            own.services.update({name: own.services.get(name, []) + files for name, files in included.services.items()})
        services = _mapping(document.get("services"))
        for name in services:
            own.services.setdefault(name, []).extend(_service(file, services, name, folder, found, ()))
        for name, files in merged.services.items():
            kept = [one for one in files if not _replaced(file, ("services", name, one[0]))]
            own.services[name] = kept + own.services.get(name, [])
        merged = _Named(own.services, merged.others + own.others)
        found.setdefault(file.path, file)
    return merged


def _included(entry: Mapping[str, Any], folder: Path, found: dict[Path, YamlFile], trail: tuple[Path, ...]) -> _Named:
    """What the project names that an entry of `include` adds, and the variables that Compose reads for it."""
    references = _listed(entry.get("path"))
    paths = [_followed(one, folder) for one in references]
    known = [path for path in paths if path is not None]
    others = [("include", _unknown(one)) for one, path in zip(references, paths, strict=True) if path is None]
    inner = known[0].parent if known else folder
    if entry.get("project_directory"):
        inner = _path(entry["project_directory"], folder)
    variables = [_path(one, folder) for one in _listed(entry.get("env_file"))]
    beside = inner / ".env"
    if not variables and (UNRESOLVED in str(beside) or beside.is_file()):
        variables = [beside]  # Compose reads it unasked
    named = _merged(known, inner, found, trail)
    return _Named(named.services, [*others, *(("include.env_file", str(one)) for one in variables), *named.others])


def _service(
    file: YamlFile,
    services: Mapping[str, Any],
    name: str,
    folder: Path,
    found: dict[Path, YamlFile],
    trail: tuple[tuple[Path, str], ...],
) -> Iterator[tuple[str, str]]:
    """What a service of a file names, and the services that it extends. Compose does not look at what the files of
    these include."""
    service = _mapping(services.get(name))
    if (file.path, name) in trail:
        return  # Compose refuses it
    further = (*trail, (file.path, name))
    extends = service.get("extends")
    base, reference = str(_mapping(extends).get("service", extends)), _mapping(extends).get("file")
    path = None if reference is None else _followed(reference, folder)
    inherited: list[tuple[str, str]] = []
    if reference is not None and path is None:
        yield "extends.file", _unknown(reference)
    elif path is not None:
        other = YamlFile(path.resolve())
        theirs = _mapping(_mapping(other.construct(_Tolerant)).get("services"))
        inherited = [*_service(other, theirs, base, path.parent, found, further)]
        found.setdefault(other.path, other)
    elif extends is not None:
        inherited = [*_service(file, services, base, folder, found, further)]
    for key, one in inherited:
        if file.tag(("services", name, key)) not in _REPLACES:
            yield key, one
    for key in ("env_file", "label_file"):
        for entry in _listed(service.get(key)):
            written = _mapping(entry).get("path", entry)
            home = isinstance(written, str) and written.startswith("~")  # in no other path does Compose see it
            yield key, str(written if home else _path(written, folder))


def _replaced(file: YamlFile, loc: Loc) -> bool:
    return any(file.tag(loc[:length]) in _REPLACES for length in range(1, len(loc) + 1))


def _followed(reference: object, folder: Path) -> Path | None:
    """The local file that a reference leads to; None if Compose may take another one, or there is none."""
    path = _path(reference, folder)
    return None if _REMOTE.search(str(reference)) or not path.is_file() else path


def _unknown(reference: object) -> str:
    return str(reference) if UNRESOLVED in str(reference) else f"{UNRESOLVED}({reference})"


def _path(written: object, folder: Path) -> Path:
    """As Compose makes it whole: `..` goes back in the path, whatever a link in it leads to."""
    return Path(os.path.normpath(folder / (written if isinstance(written, str) else _unknown(written))))


def _mapping(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _listed(value: object) -> list[Any]:
    return value if isinstance(value, list) else [] if value is None else [value]
