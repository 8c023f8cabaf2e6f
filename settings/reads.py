"""What a deploy reads on the machine where it runs: variables and files that Compose files name, and whose they are.
The deployer may read prod's secrets; what dev's Compose file names must not."""

import os
import posixpath
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from settings.errors import SettingsError
from settings.ledger import EnvironmentShares, Tier
from settings.model import Build, Project
from settings.sources import UNRESOLVED
from settings.state import state_folder

NEEDED = ("PATH", "HOME", "TMPDIR", "LANG", "LC_ALL", "DOCKER_CONFIG")
"""What Compose itself needs; nothing of it is a secret."""

STATE = ".bulkhead"
"""The folder of the checkout with our tools, where Pulumi may have credentials and somebody may keep its state."""


class Read(NamedTuple):
    """A file or folder that `key` of a Compose file names. `secret`: what is in it may be confidential."""

    key: str
    path: Path
    secret: bool = False
    build: Build | None = None


def inherited(variables: Mapping[str, str], promised: EnvironmentShares) -> dict[str, str]:
    """The deployer's variables that an environment may read: of a best-effort one only those that the ledger names."""
    if promised.tier is Tier.PROTECTED:
        return dict(variables)
    return {name: value for name, value in variables.items() if name in (*NEEDED, *promised.inherit)}


def reads(project: Project, *, idle: bool = False) -> Iterator[Read]:
    """Every file and folder of the deployer's machine that a project's deploy opens, and bind mounts of it. `idle`:
    also the variables of services that no profile enables."""
    for key, secret in sorted(project.secrets.items()):
        if secret.file is not None:
            yield Read(f"secrets.{key}.file", Path(secret.file), secret=True)
    for key, config in sorted(project.configs.items()):
        if config.file is not None:
            yield Read(f"configs.{key}.file", Path(config.file))
    for key, path in project.variable_files:
        section, _, rest = key.partition(".")
        if idle or section != "services" or any(rest.startswith(f"{name}.") for name in project.services):
            yield Read(key, Path(path), secret=True)
    beside = Path(project.files[0]).parent / ".env"
    if beside.is_file():
        yield Read(beside.name, beside, secret=True)  # Compose reads it unasked
    for key, service in sorted(project.services.items()):
        if service.build is not None:
            context = Path(service.build.context)
            yield Read(f"services.{key}.build.context", context, build=service.build)
            yield Read(f"services.{key}.build.dockerfile", context / service.build.dockerfile)
        for mount in service.volumes:
            if mount.type == "bind" and mount.source:
                yield Read(f"services.{key}.volumes", Path(mount.source))
    for key, volume in sorted(project.volumes.items()):
        refresh = volume.x_bulkhead.refresh
        if refresh is not None and refresh.mask:
            yield Read(f"volumes.{key}.x-bulkhead.refresh.mask", Path(project.files[0]).parent / refresh.mask)


def declared(
    project: Project, protected: Mapping[str, Project | SettingsError], folder: Path
) -> dict[str, dict[str, str]]:
    """What `project` reads, for policies, by the key that names it: `path` (relative where it is in `folder`, the
    checkout), and `owner`, the protected environment whose secret is there, empty if none's.

    `protected`: the other protected environments. Where one's Compose files cannot be read, any confidential file may
    be its own: `unreadable` says why they cannot.
    """
    theirs = {
        one.path.resolve(): name
        for name, other in protected.items()
        if isinstance(other, Project)
        for one in reads(other, idle=True)
        if one.secret
    }
    for state in (folder / STATE, state_folder(os.environ, Path.home())):
        theirs |= {state.resolve(): name for name in protected}
    broken = {name: other.message for name, other in sorted(protected.items()) if isinstance(other, SettingsError)}
    unknown = next(iter(broken), "")
    found: dict[str, dict[str, str]] = {}
    for one in reads(project):
        path = one.path.resolve()
        owner = _owner(one, path, theirs)
        if one.key.endswith(".volumes") and not owner:
            continue  # policies judge the mount itself
        shown = one.path if UNRESOLVED in str(one.path) else path
        same = sum(key.partition("[")[0] == one.key for key in found)
        found[f"{one.key}[{same}]" if same else one.key] = {
            "path": str(shown.relative_to(folder) if shown.is_relative_to(folder) else shown),
            "owner": owner or (unknown if one.secret else ""),
            **({"unreadable": broken[unknown]} if unknown and one.secret and not owner else {}),
        }
    return found


def _owner(one: Read, path: Path, theirs: Mapping[Path, str]) -> str:
    """Whose secret reading `path` reads: the same, around it, or in it where a build does not leave it out."""
    for secret, name in theirs.items():
        if path.is_relative_to(secret):
            return name
        if secret.is_relative_to(path):
            build = one.build
            if build is None or (secret.exists() and not left_out(build, secret.relative_to(path))):
                return name
    return ""


def ignores(build: Build) -> list[Path]:
    """The files that may say what is left out of a build's context: BuildKit takes `<Dockerfile>.dockerignore` where
    there is one, the first builder never does."""
    context = Path(build.context)
    beside = context / f"{build.dockerfile}.dockerignore"
    return [context / ".dockerignore", *([beside] if beside.is_file() else [])]


def left_out(build: Build, path: Path) -> bool:
    """Whether no builder gets a file or folder of a build's context, nor anything in it, for certain.

    Only plain paths and `*` are taken to leave something out: libraries and builders differ in the rest (letters' case,
    ends of lines, `**`, sets of letters), and what one of them sends, the image has.
    """
    # The Dockerfile is sent whatever is left out: by its name as one more pattern, which may fit to other files too.
    return all(_leaves_out([*_patterns(file), f"!{build.dockerfile}"], path.as_posix()) for file in ignores(build))


def _patterns(file: Path) -> list[str]:
    if not file.is_file():
        return []
    lines = file.read_bytes().removeprefix(b"\xef\xbb\xbf").decode(errors="replace").split("\n")
    stripped = (line.strip(" \t\r") for line in lines if not line.startswith("#"))
    return [line for line in stripped if line]


def _leaves_out(patterns: Sequence[str], path: str) -> bool:
    out = False
    for written in patterns:
        pattern = written.removeprefix("!").strip(" \t")
        exception, plain = written.startswith("!"), posixpath.normpath(pattern).lstrip("/")
        if pattern in ("*", "**"):
            out = not exception
        elif exception and (not _PLAIN.fullmatch(plain) or _within(path, plain) or _within(plain, path)):
            out = False
        elif not exception and _PLAIN.fullmatch(plain) and _within(path, plain):
            out = True
    return out


def _within(path: str, folder: str) -> bool:
    return path == folder or path.startswith(f"{folder}/")


_ODD = re.compile(r"\[[!^\]]|\\")
_PLAIN = re.compile(r"(?!\.\.)[\w./@+,=~ -]+", re.ASCII)


def sent(build: Build) -> Sequence[str]:
    """The files of a build's context that the engine gets, relative to it: all but what .dockerignore leaves out.

    Sets of letters to leave out and escapes docker-py takes otherwise than the engine: with these nothing is left out.
    """
    from docker.utils.build import exclude_paths  # here, since previews without a build need not load it

    found: set[str] = set()
    for file in ignores(build):
        patterns = []
        for line in _patterns(file):
            if not _ODD.search(line):
                patterns.append(line)
            elif line.startswith("!"):
                patterns.append("!**")
        found.update(exclude_paths(build.context, patterns, dockerfile=build.dockerfile))
    return sorted(found)
