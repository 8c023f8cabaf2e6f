"""Compose files as typed models, read through Compose itself (interpolation, merging, extends, include, profiles).
A key that is not carried over is an error naming file, service and key: nothing is dropped silently."""

import os
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from settings.compose_cli import find_compose, render
from settings.errors import Loc, SettingsError, did_you_mean, dotted, faults, sentence, together
from settings.model import (
    Build,
    Config,
    Dependency,
    Deploy,
    Device,
    ExtraHost,
    FileGrant,
    Healthcheck,
    Logging,
    Mount,
    Network,
    NetworkAttachment,
    Port,
    Project,
    Resource,
    Resources,
    Secret,
    Service,
    Ulimit,
    UpdateConfig,
    Volume,
    kind,
    known_keys,
)
from settings.remedies import LOST, REMEDIES
from settings.sources import CONFIDENTIAL, EXTENSION, Sources

__all__ = [
    "SECRET_PLACEHOLDER",
    "Build",
    "Config",
    "Dependency",
    "Deploy",
    "Device",
    "ExtraHost",
    "FileGrant",
    "Healthcheck",
    "Logging",
    "Mount",
    "Network",
    "NetworkAttachment",
    "Port",
    "Project",
    "Resource",
    "Resources",
    "Secret",
    "Service",
    "Ulimit",
    "UpdateConfig",
    "Volume",
    "find_compose",
    "project_name",
    "read",
]

SECRET_PLACEHOLDER = "bulkhead-secret:{name}:"  # noqa: S105 - not a secret, what stands in for one
"""What Compose gets as the value of a secret variable; the deploy puts the decrypted value in its place."""

_PLACEHOLDER = re.compile(r"bulkhead-secret:([^:]*):")
_INHERIT = "set it under bulkhead:variables, or name it in the environment's inherit in Pulumi.host.yaml"
_SECTIONS = ("services", "networks", "volumes", "secrets", "configs")


def project_name(environment: str) -> str:
    """Compose's project name of an environment: the prefix of every name that Compose derives."""
    return f"bulkhead-{environment}"


def read(
    files: Sequence[Path],
    *,
    environment: str,
    profiles: Sequence[str] = (),
    variables: Mapping[str, str] = {},
    secrets: Iterable[str] = (),
    inherited: Mapping[str, str] = os.environ,
) -> Project:
    """Reads and merges compose files as Compose does, and validates the result.

    `variables` are for interpolation, before those of the process (`inherited`: the ones that may be read) and of the
    `.env` file beside the first compose file. `secrets` are names of secret variables: they become placeholders,
    allowed in `environment` only. SettingsError for anything that cannot be carried over, with file, line, service and
    key.
    """
    sources = Sources(files)
    given = {**variables, **{name: SECRET_PLACEHOLDER.format(name=name) for name in secrets}}
    hidden = os.environ.keys() - inherited.keys() - given.keys()
    rendered = render(
        sources,
        files,
        project=project_name(environment),
        profiles=profiles,
        variables=given,
        inherited=inherited,
    )
    model = rendered.model
    found = [
        *_unset_variables(rendered.unset, sources, hidden),
        *_misplaced_extensions(rendered.extensions, sources),
        *_misplaced_secrets(model, (), sources),
        *_lost_keys(model, sources),
        *_unknown_sections(model, sources),
    ]
    try:
        project = Project.model_validate(
            {
                "environment": environment,
                "files": tuple(str(file) for file in files),
                "notes": (*_notes(model), *_unread(hidden & sources.interpolated() - set(rendered.unset))),
                "variable_files": tuple(
                    sorted(set(sources.variable_files({**inherited, **given}.get("HOME") or "$HOME")))
                ),
                **{
                    section: {
                        name: _adapted(section, name, entry or {}, rendered.extensions, environment, model)
                        for name, entry in sorted(model.get(section, {}).items())
                    }
                    for section in _SECTIONS
                },
            }
        )
    except ValidationError as error:
        found += faults(error, lambda *fault: _translated(sources, *fault))
        raise together(found) from None
    found += _shared_ports(project, sources)
    if found:
        raise together(found)
    project.order()
    return project


def _adapted(
    section: str,
    name: str,
    entry: Mapping[str, Any],
    extensions: Mapping[Loc, Any],
    environment: str,
    model: Mapping[str, Any],
) -> dict[str, Any]:
    """One entry of Compose's output as the model takes it."""
    plain = {key: value for key, value in entry.items() if value is not None}
    extension = extensions.get((section, name))
    if extension is not None:
        plain["x_bulkhead"] = extension
    if section == "services":
        return _adapted_service(plain, model)
    derived = name if plain.get("external") else f"{project_name(environment)}_{name}"
    if plain.get("name") == derived:
        del plain["name"]
    return plain


def _adapted_service(plain: dict[str, Any], model: Mapping[str, Any]) -> dict[str, Any]:
    plain.pop("profiles", None)
    alias = plain.pop("container_name", None)
    plain["environment"] = {name: value for name, value in plain.get("environment", {}).items() if value is not None}
    plain["depends_on"] = {
        name: dependency
        for name, dependency in plain.get("depends_on", {}).items()
        if name in model["services"] or dependency.get("required", True)
    }
    plain["networks"] = {
        name: {**(attachment or {}), "aliases": _with(alias, (attachment or {}).get("aliases", []))}
        for name, attachment in plain.get("networks", {}).items()
    }
    for key, folder in (("secrets", "/run/secrets/"), ("configs", "/")):
        plain[key] = [
            {**grant, "target": str(Path(folder, grant.get("target") or grant["source"]))}
            for grant in plain.get(key, [])
        ]
    return plain


def _with(alias: str | None, aliases: Sequence[str]) -> list[str]:
    return [*aliases, *([alias] if alias and alias not in aliases else [])]


def _notes(model: Mapping[str, Any]) -> Iterator[str]:
    for name, service in sorted(model.get("services", {}).items()):
        if alias := service.get("container_name"):
            became = "became a network alias" if service.get("networks") else "is left out, as there is no network"
            yield (
                f"service {name}: container_name {alias!r} {became}: containers are named by the deploy, "
                "so that a new one can start before the old one stops"
            )
        for variable, value in sorted(service.get("environment", {}).items()):
            if value is None:
                yield f"service {name}: environment.{variable} has no value here and is left unset"


def _unread(names: Iterable[str]) -> Iterator[str]:
    for name in sorted(names):
        yield f"variable {name} is set here, and not read: {_INHERIT}"


def _unset_variables(names: Sequence[str], sources: Sources, hidden: Collection[str]) -> Iterator[SettingsError]:
    for name in names:
        problem = "the variable has no value, and Compose would put nothing in its place"
        remedy = f"Set it under bulkhead:variables or in the environment, or write ${{{name}:-default}}."
        if name in hidden:
            problem = "the variable is set where the deploy runs, but a best-effort environment does not read it"
            remedy = sentence(_INHERIT)
        place = sources.mentions(rf"(?<!\$)\$\{{?{re.escape(name)}\b")
        yield SettingsError(file=place, key=f"${{{name}}}", problem=problem, remedy=remedy)


def _misplaced_extensions(extensions: Mapping[Loc, Any], sources: Sources) -> Iterator[SettingsError]:
    for loc in extensions:
        if len(loc) != 2 or loc[0] not in _SECTIONS:
            remedy = "Write it in a network (egress) or a secret (generate)."
            yield _fault(sources, (*loc, EXTENSION), "not read at this place", remedy)


def _misplaced_secrets(value: Any, loc: Loc, sources: Sources) -> Iterator[SettingsError]:
    if len(loc) > 3 and loc[0] == "services" and loc[2] == "environment":
        return
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _misplaced_secrets(key, loc, sources)
            yield from _misplaced_secrets(inner, (*loc, key), sources)
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            yield from _misplaced_secrets(inner, (*loc, index), sources)
    elif isinstance(value, str) and (secret := _PLACEHOLDER.search(value)):
        yield _fault(
            sources,
            loc,
            f"the secret {secret[1]} would be readable in the plan and on the engine",
            "Use it as a value in environment, or mount it as a file under secrets.",
        )


def _lost_keys(model: Mapping[str, Any], sources: Sources) -> Iterator[SettingsError]:
    for loc in sources.written():
        if kind(loc) in LOST and loc[1] in model.get(str(loc[0]), {}):
            yield _not_carried(sources, loc)


def _unknown_sections(model: Mapping[str, Any], sources: Sources) -> Iterator[SettingsError]:
    for key in sorted(model.keys() - {"name", *_SECTIONS}):
        if not key.startswith("x-"):  # other tools' extensions and YAML templates; ours is looked at apart
            yield _not_carried(sources, (key,))


def _shared_ports(project: Project, sources: Sources) -> Iterator[SettingsError]:
    for name, service in project.services.items():
        for index, port in enumerate(service.ports):
            if port.published is not None and service.deploy.replicas > 1:
                yield _fault(
                    sources,
                    ("services", name, "ports", index),
                    f"{service.deploy.replicas} replicas cannot publish the same port of the host",
                    "Publish it from one service in front of them, or set deploy.replicas to 1.",
                    port.published,
                )


def _translated(sources: Sources, loc: Loc, fault: str, message: str, value: Any) -> SettingsError:
    """One of pydantic's faults with the place of the key in the user's files."""
    if fault == "extra_forbidden" or kind(loc) in REMEDIES:
        return _not_carried(sources, loc, value)
    problem, _, remedy = message.partition("; ")
    return _fault(sources, loc, problem, sentence(remedy), value)


_EXTENSION_REMEDIES = {
    "services": "A service's x-bulkhead has exempt: a list of {rule, reason, owner, expires}.",
    "networks": "A network's x-bulkhead has egress: true or false.",
    "volumes": "A volume's x-bulkhead has backup: {engine, schedule}, ephemeral: true, or exempt.",
    "secrets": "A secret's x-bulkhead has generate: a number of bytes.",
}


def _not_carried(sources: Sources, loc: Loc, value: Any = None) -> SettingsError:
    if "x_bulkhead" in loc:
        return _fault(sources, loc, "not supported", _EXTENSION_REMEDIES.get(str(loc[0]), "Remove the key."), value)
    if remedy := REMEDIES.get(kind(loc)):
        return _fault(sources, loc, "not carried over", remedy, value)
    return _fault(sources, loc, "unknown key", did_you_mean(str(loc[-1]), known_keys(loc[:-1])), value)


def _fault(sources: Sources, loc: Loc, problem: str, remedy: str, value: Any = None) -> SettingsError:
    """An error at `loc`; its value is shown if it is plain and cannot be confidential."""
    written = tuple(EXTENSION if part == "x_bulkhead" else part for part in loc)
    service = str(loc[1]) if loc[0] == "services" and len(loc) > 1 else None
    shown = isinstance(value, str | int | float) and not CONFIDENTIAL.intersection(loc)
    return SettingsError(
        file=sources.at(written),
        service=service,
        key=dotted(written[2:] if service else written),
        problem=problem,
        remedy=remedy,
        **({"value": value} if shown else {}),
    )
