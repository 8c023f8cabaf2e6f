"""Runs Compose's `config` command: where it is, with which environment, and what its output and warnings mean.
No engine is needed: `config` only reads files."""

import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from settings.errors import Loc, SettingsError, did_you_mean, dotted
from settings.model import known_keys
from settings.sources import EXTENSION, Sources
from settings.yamlfile import Loader

OLDEST = (2, 20)
"""`include` and `depends_on.required` came with Compose 2.20."""

TIMEOUT = 60.0
"""Seconds for one run; it takes a tenth of one."""


CHECKOUT = Path(__file__).resolve().parent.parent


class Rendered(NamedTuple):
    """Compose's output: the `model` (its JSON), the `x-bulkhead` mappings (JSON omits them), variables unset."""

    model: dict[str, Any]
    extensions: Mapping[Loc, Any]
    unset: tuple[str, ...]


def find_compose() -> list[str]:
    """The command that runs Compose: the project's own, else the one of the Docker CLI. SettingsError if none."""
    home = os.environ.get("PULUMI_HOME")
    for folder in ([Path(home)] if home else []) + [CHECKOUT / ".bulkhead" / "pulumi"]:
        binary = folder / "bin" / "docker-compose"
        if os.access(binary, os.X_OK):
            return [str(binary)]
    if shutil.which("docker") and _version(["docker", "compose"]) >= OLDEST:
        return ["docker", "compose"]
    raise SettingsError(
        file="Compose",
        key="docker-compose",
        problem="not installed, or older than 2.20",
        remedy="Run `make setup`, which builds it into the project.",
    )


def _version(command: Sequence[str]) -> tuple[int, ...]:
    try:
        answer = subprocess.run(
            [*command, "version", "--short"], capture_output=True, text=True, timeout=TIMEOUT, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return ()
    match = re.match(r"v?(\d+)\.(\d+)", answer.stdout)
    return (int(match[1]), int(match[2])) if match and answer.returncode == 0 else ()


def render(
    sources: Sources,
    files: Sequence[Path],
    *,
    project: str,
    profiles: Sequence[str],
    variables: Mapping[str, str],
    inherited: Mapping[str, str],
) -> Rendered:
    """The merged, interpolated, normalised model of `files`, with `inherited` as the process's own variables.

    SettingsError with the place of what Compose refuses.
    """
    command = [
        *find_compose(),
        *("--ansi", "never", "--project-name", project),
        *(word for profile in profiles for word in ("--profile", profile)),
        *(word for file in files for word in ("--file", str(file))),
        "config",
    ]
    environment = {name: value for name, value in inherited.items() if not name.startswith("COMPOSE_")}
    environment |= variables
    text, warnings = _run([*command, "--format", "json"], environment, sources)
    extensions: Mapping[Loc, Any] = {}
    if sources.may_extend:
        rendered, _ = _run([*command, "--format", "yaml"], environment, sources)
        root = yaml.compose(rendered, Loader=Loader)
        extensions = dict(_extensions(root, ())) if root else {}
    return Rendered(json.loads(text), extensions, tuple(dict.fromkeys(_UNSET.findall(warnings))))


def _run(command: Sequence[str], environment: Mapping[str, str], sources: Sources) -> tuple[str, str]:
    try:
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=TIMEOUT, check=False, encoding="utf-8"
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise SettingsError(
            file=sources.names,
            key="",
            problem=f"{command[0]} did not run: {error}",
            remedy="Run `make setup` to install Compose again.",
        ) from None
    if done.returncode:
        raise refusal(done.stderr, sources)
    # `config` doubles every dollar sign of its output, so that it could be read as a compose file again.
    return done.stdout.replace("$$", "$"), done.stderr


def _extensions(node: yaml.Node, loc: Loc) -> Iterator[tuple[Loc, Any]]:
    if isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            yield from _extensions(item, (*loc, index))
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            if key.value == EXTENSION:
                yield loc, Loader("").construct_document(value)
            elif not (len(loc) == 0 and key.value.startswith("x-")):  # other tools' own, and YAML templates
                yield from _extensions(value, (*loc, key.value))


_UNSET = re.compile(r'The \\?"([^"\\]+)\\?" variable is not set')
_WARNING = re.compile(r"^time=.* level=\w+ .*$", re.MULTILINE)
_NOISE = re.compile(r": invalid compose project|\n\ngoroutine [\s\S]*")
_SECTION = "(?:services|networks|volumes|secrets|configs)"


class Refusal(NamedTuple):
    """What Compose says (a pattern), and what we say; `{}` fields are the pattern's groups."""

    pattern: re.Pattern[str]
    key: str = ""
    problem: str = "{why}"
    remedy: str = "Correct the value."


REFUSALS = (
    Refusal(
        re.compile(r'service "(?P<service>.+)" refers to undefined (build )?(?P<kind>\w+) (?P<value>\S+)'),
        "{kind}s",
        "no such {kind}",
        "Define it under the top-level {kind}s:, or correct the name.",
    ),
    Refusal(
        re.compile(r'service "(?P<service>.+)" depends on undefined service "?(?P<value>[^"]+)"?'),
        "depends_on",
        "no such service, or its profile is not enabled",
        "Correct the name, enable the profile, or write required: false.",
    ),
    Refusal(
        re.compile(r"dependency cycle detected: (?P<cycle>.+)"),
        "depends_on",
        "services wait for each other",
        "Remove one of these dependencies.",
    ),
    Refusal(
        re.compile(r'service "(?P<service>.+)" has neither an image nor a build context specified'),
        "image",
        "neither image nor build",
        "Name an image, or the folder to build one from.",
    ),
    Refusal(
        re.compile(r"env file (?P<missing>.+) not found:"),
        "env_file",
        "{missing} does not exist",
        "Correct the path.",
    ),
    Refusal(
        re.compile(
            r"while interpolating (?P<place>\S+): "
            r"required variable (?P<variable>\S+) is missing a value: (?P<why>.*)"
        ),
        "",
        "variable {variable} has no value: {why}",
        "Set it under bulkhead:variables, or in the environment.",
    ),
    Refusal(
        re.compile(r"validating \S+: (?P<place>\S+) Additional property (?P<unknown>\S+) is not allowed"),
        "",
        "unknown key",
        "",
    ),
    Refusal(re.compile(r"error decoding '(?P<place>[^']+)': (?P<why>.+)")),
    Refusal(re.compile(r"while interpolating (?P<place>\S+): failed to cast to expected type: (?P<why>.+)")),
    Refusal(
        re.compile(r"invalid interpolation format for (?P<place>\S+)\."),
        problem="not a variable that Compose can read",
        remedy="Write ${{NAME}} or ${{NAME:-default}}, and $$ for a dollar sign.",
    ),
    # Whatever else names a key, in front of its sentence or within it.
    Refusal(re.compile(rf"^(?:validating \S+: )?(?P<place>{_SECTION}(?:\.\S*[\w\]])?):? (?:(?P=place) )?(?P<why>.+)")),
    Refusal(re.compile(rf"(?P<why>.*?\b(?P<place>{_SECTION}\.[\w.\[\]-]*[\w\]]).*)")),
)


def refusal(stderr: str, sources: Sources) -> SettingsError:
    """Compose's error text as ours, with the place of the key where the text names it."""
    text = " ".join(_NOISE.sub("", _WARNING.sub("", stderr)).split())
    for known in REFUSALS:
        match = known.pattern.search(text)
        if match:
            return _placed(known, {name: value or "" for name, value in match.groupdict().items()}, sources)
    return SettingsError(
        file=sources.names,
        key="",
        problem=f"Compose refuses it: {text or 'without a reason'}",
        remedy="Correct the file.",
    )


def _placed(known: Refusal, said: dict[str, str], sources: Sources) -> SettingsError:
    place = re.sub(r"\.?\[([^\]]*)\]", r".\1", said.get("place", "")).replace("(root)", "").strip(".")
    loc: Loc = tuple(int(part) if part.isdigit() else part for part in place.split(".") if part)
    service = said.get("service") or (str(loc[1]) if loc[:1] == ("services",) and len(loc) > 1 else None)
    if said.get("service"):
        loc = ("services", said["service"], known.key.format(**said))
    remedy = known.remedy.format(**said)
    if unknown := said.get("unknown"):
        remedy = did_you_mean(unknown, known_keys(loc))
        loc = (*loc, unknown)
    if cycle := said.get("cycle"):
        said["value"] = _from_smallest(cycle)
        loc = ("services", said["value"].split(" -> ")[0], known.key)
        service = str(loc[1])
    # What stands under a misspelt key is not shown: it may be a password.
    value = said.get("value", None if "unknown" in said else sources.scalar(loc))
    return SettingsError(
        file=sources.mentions(re.escape(Path(said["missing"]).name)) if "missing" in said else sources.at(loc),
        service=service,
        key=dotted(loc[2:] if service else loc) or known.key,
        problem=known.problem.format(**said),
        remedy=remedy,
        **({"value": value} if value is not None else {}),
    )


def _from_smallest(cycle: str) -> str:
    """`a -> b -> a` however Compose turns it: which service it starts from is chance."""
    names = cycle.split(" -> ")[:-1]
    first = names.index(min(names))
    return " -> ".join([*names[first:], *names[:first], names[first]])
