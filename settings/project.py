"""The checkout and one environment's settings (`Pulumi.<environment>.yaml`): which compose files, with which variables.
Also what only all environments together can tell: a port of the host that two of them publish."""

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError, field_validator, model_validator

from settings.backup import Backup, BucketTarget
from settings.compose import Port, Project, read
from settings.errors import Frozen, Loc, SettingsError, did_you_mean, dotted, faults, sentence, together
from settings.ledger import VARIABLE, Ledger, LedgerSettings, Tier
from settings.reads import declared, inherited
from settings.yamlfile import YamlFile

REPOSITORY_KEY = "backup_key"
"""The secret that is the key of an environment's backups, where it is given and not generated."""

PublishedPort = tuple[str, int, str]
"""Host address, port, protocol."""

ANY_ADDRESS = "0.0.0.0"  # noqa: S104 - what Compose publishes on when no address is written
LOOPBACK = "127.0.0.1"

_KEYS = ("compose", "profiles", "variables", "secrets")


class EnvironmentSettings(Frozen):
    """What `Pulumi.<name>.yaml` says. `compose` are absolute paths; of secrets only the names are read."""

    name: str
    compose: tuple[Path, ...]
    profiles: tuple[str, ...] = ()
    variables: Mapping[str, str] = {}
    secret_names: frozenset[str] = frozenset()

    @field_validator("compose", "profiles", mode="before")
    @classmethod
    def _list(cls, written: object) -> object:
        if not isinstance(written, list):
            raise ValueError("not a list; write it like [compose.yaml]")
        return tuple(written)

    @field_validator("variables", mode="before")
    @classmethod
    def _plain_text(cls, written: object) -> object:
        if not isinstance(written, dict):
            raise ValueError("not a mapping; write it like {LOG_LEVEL: info}")
        for name, value in written.items():
            if not VARIABLE.fullmatch(str(name)):
                raise ValueError(f"{name!r} is not a variable name; use letters, digits and underscores")
            if str(name).startswith("COMPOSE_"):
                raise ValueError(f"{name} would be an option of Compose, such as a file to read; use another name")
            if isinstance(value, dict | list) or value is None:
                raise ValueError(f"{name} is not plain text; a secret belongs under bulkhead:secrets")
        return {str(name): _as_compose_reads(value) for name, value in written.items()}

    @field_validator("secret_names", mode="before")
    @classmethod
    def _encrypted(cls, written: object) -> object:
        if not isinstance(written, dict):
            return written
        if isinstance(written.get("secure"), str):
            raise ValueError(
                "encrypted as a whole, so its names cannot be read; set each secret with "
                "`make pulumi ARGS=\"config set --secret --path 'bulkhead:secrets.NAME'\"`"
            )
        for name, value in written.items():
            if not (isinstance(value, dict) and set(value) == {"secure"}):
                raise ValueError(
                    f"{name} is not encrypted; set it with "
                    f"`make pulumi ARGS=\"config set --secret --path 'bulkhead:secrets.{name}'\"`"
                )
        return frozenset(map(str, written))

    @model_validator(mode="after")
    def _one_source_per_name(self) -> "EnvironmentSettings":
        if both := sorted(self.variables.keys() & self.secret_names):
            raise ValueError(f"{both[0]} is a variable and a secret; keep it in bulkhead:secrets only")
        return self


def _as_compose_reads(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def root() -> Path:
    """The checkout: BULKHEAD_PROJECT, else the nearest folder upwards with a Pulumi.yaml. SettingsError if none."""
    named = os.environ.get("BULKHEAD_PROJECT")
    here = Path(named) if named else Path.cwd()
    for folder in [here] if named else [here, *here.parents]:
        if (folder / "Pulumi.yaml").is_file():
            return folder.resolve()
    raise SettingsError(
        file=str(here),
        key="Pulumi.yaml",
        problem="not found: this is not a Bulkhead project",
        remedy="Change into the project's folder, or set BULKHEAD_PROJECT to it.",
    )


def read_environment(name: str, folder: Path | None = None) -> EnvironmentSettings:
    """Reads `Pulumi.<name>.yaml` of the checkout. SettingsError names file, line, key and remedy."""
    folder = folder or root()
    path = folder / f"Pulumi.{name}.yaml"
    if not path.is_file():
        raise SettingsError(
            file=path.name,
            key="bulkhead:compose",
            problem="the file does not exist",
            remedy="Create it with `config: {bulkhead:compose: [compose.yaml]}`, naming its compose files.",
        )
    document = YamlFile(path)
    data = document.data
    config = data.get("config") if isinstance(data, dict) else None
    ours = {
        str(key).removeprefix("bulkhead:"): value
        for key, value in (config.items() if isinstance(config, dict) else ())
        if str(key).startswith("bulkhead:")
    }
    known = [f"bulkhead:{key}" for key in _KEYS]
    unknown = [f"bulkhead:{key}" for key in ours if key not in _KEYS]
    if unknown:
        raise together([_fault(document, key, "unknown key", did_you_mean(key, known)) for key in unknown])
    if not ours.get("compose"):
        raise _fault(document, "bulkhead:compose", "missing", "Name the environment's compose files: [compose.yaml].")
    try:
        settings = EnvironmentSettings(
            name=name, **{"secret_names" if key == "secrets" else key: value for key, value in ours.items()}
        )
    except ValidationError as error:
        raise together(faults(error, lambda *fault: _translated(document, *fault))) from None
    paths = [(folder / written).resolve() for written in settings.compose]
    missing = [written for written, file in zip(settings.compose, paths, strict=True) if not file.is_file()]
    if missing:
        raise _fault(document, "bulkhead:compose", f"{missing[0]} does not exist", f"Paths are relative to {folder}.")
    return settings.model_copy(update={"compose": tuple(paths)})


def _fault(document: YamlFile, key: str, problem: str, remedy: str) -> SettingsError:
    return SettingsError(file=document.at(("config", key)), key=key, problem=problem, remedy=remedy)


def _translated(document: YamlFile, loc: Loc, _kind: str, message: str, _value: Any) -> SettingsError:
    problem, _, remedy = message.partition("; ")
    field = "secrets" if loc[:1] == ("secret_names",) else loc[0] if loc else "variables"
    written = (f"bulkhead:{field}", *loc[1:])
    return SettingsError(
        file=document.at(("config", *written)),
        key=dotted(written),
        problem=problem,
        remedy=sentence(remedy),
    )


def read_project(settings: EnvironmentSettings, ledger: LedgerSettings) -> Project:
    """The environment's compose project. SettingsError also for a secret or config that has no value anywhere."""
    inherits = inherited(os.environ, ledger.environment(settings.name))
    project = read(
        settings.compose,
        environment=settings.name,
        profiles=settings.profiles,
        variables=settings.variables,
        secrets=settings.secret_names,
        inherited=inherits,
    )
    missing = [*_missing_secrets(project, settings), *_missing_variables(project, settings, inherits)]
    if missing:
        raise together(missing)
    return project


def _missing_secrets(project: Project, settings: EnvironmentSettings) -> Iterable[SettingsError]:
    for key, secret in project.secrets.items():
        name = secret.name or key
        if secret.external and secret.x_bulkhead.generate is None and name not in settings.secret_names:
            problem = f"the compose files take secret {key!r} from here"
            yield _unset(name, settings, problem, ", or let it be made once with x-bulkhead: {generate: 32}")


def _unset(name: str, settings: EnvironmentSettings, problem: str, otherwise: str = "") -> SettingsError:
    """A secret of the environment that has no value. `otherwise`: what else could be done."""
    return SettingsError(
        file=f"Pulumi.{settings.name}.yaml",
        key=f"bulkhead:secrets.{name}",
        problem=f"missing: {problem}",
        remedy=f'Set it with `make pulumi ARGS="config set --stack {settings.name} --secret --path '
        f"'bulkhead:secrets.{name}'\"`{otherwise}.",
    )


def _missing_variables(
    project: Project, settings: EnvironmentSettings, inherits: Iterable[str]
) -> Iterable[SettingsError]:
    known = {*settings.variables, *settings.secret_names, *inherits}
    for section, entries in (("secrets", project.secrets), ("configs", project.configs)):
        for key, entry in entries.items():
            if entry.environment and entry.environment not in known:
                yield SettingsError(
                    file=", ".join(path.name for path in settings.compose),
                    key=f"{section}.{key}.environment",
                    value=entry.environment,
                    problem="the variable has no value",
                    remedy="Set it under bulkhead:secrets or bulkhead:variables.",
                )


def refreshed(
    project: Project, ledger: LedgerSettings, settings: EnvironmentSettings
) -> Mapping[str, Mapping[str, str]]:
    """The volumes that can get a copy of real data, by their compose key: `environment` it comes from, `mask` as SQL.

    SettingsError for a mask that cannot be read, and for an environment that is not a protected one of the ledger. A
    volume without a mask is policy's to refuse, and is left out.
    """
    found = {}
    protected = [name for name, one in ledger.environments.items() if one.tier is Tier.PROTECTED]
    for key, volume in sorted(project.volumes.items()):
        refresh = volume.x_bulkhead.refresh
        if refresh is None or refresh.mask is None:
            continue
        where, files = f"volumes.{key}.x-bulkhead.refresh", ", ".join(path.name for path in settings.compose)
        if refresh.environment not in protected:
            problem, remedy = "no protected environment", did_you_mean(refresh.environment, protected)
            value = refresh.environment
            raise SettingsError(file=files, key=f"{where}.environment", value=value, problem=problem, remedy=remedy)
        file = settings.compose[0].parent / refresh.mask
        try:
            found[key] = {"environment": refresh.environment, "mask": file.read_text()}
        except (OSError, UnicodeDecodeError) as error:
            problem = f"{file} cannot be read: {error}"
            remedy = "Name a file of SQL, relative to the folder of the first Compose file."
            value = refresh.mask
            raise SettingsError(file=files, key=f"{where}.mask", value=value, problem=problem, remedy=remedy) from None
    return found


def credentials(target: str) -> Mapping[str, str]:
    """The names of the secrets that hold a bucket's credentials, by the variables that restic wants."""
    stem = f"backup_{target.replace('-', '_')}"
    return {"AWS_ACCESS_KEY_ID": f"{stem}_key_id", "AWS_SECRET_ACCESS_KEY": f"{stem}_secret_key"}


def backed_up(
    project: Project, ledger: LedgerSettings, settings: EnvironmentSettings
) -> Mapping[str, tuple[Backup, str]]:
    """The volumes with a backup, by their compose key, and the service whose container each is taken through.

    SettingsError for a target that the ledger does not have, one without credentials, and a volume of no service or of
    several of which none is named.
    """
    found: dict[str, tuple[Backup, str]] = {}
    faulty: list[SettingsError] = []
    files = ", ".join(Path(file).name for file in project.files)
    for key, volume in sorted(project.volumes.items()):
        backup = volume.x_bulkhead.backup
        if backup is None:
            continue
        where = f"volumes.{key}.x-bulkhead.backup"
        having = [name for name, one in sorted(project.services.items()) if key in {m.source for m in one.volumes}]
        service = backup.service or (having[0] if len(having) == 1 else None)
        if service not in having:
            faulty.append(
                SettingsError(
                    file=files,
                    key=f"{where}.service",
                    problem=f"{len(having)} services have this volume, and it is taken through one of them",
                    remedy=f"Name one of them: {', '.join(having) or 'none has it'}.",
                )
            )
            continue
        for target in backup.target or sorted(ledger.backup.targets):
            if target not in ledger.backup.targets:
                remedy = did_you_mean(target, ledger.backup.targets)
                faulty.append(
                    SettingsError(
                        file=files, key=f"{where}.target", value=target, problem="no such target", remedy=remedy
                    )
                )
            elif isinstance(ledger.backup.targets[target], BucketTarget):
                wanted = set(credentials(target).values()) - set(settings.secret_names)
                faulty += [_unset(one, settings, f"backups go to target {target}") for one in sorted(wanted)]
        found[key] = (backup, str(service))
    if faulty:
        raise together(faulty)
    return found


def host_address(port: Port, tier: Tier) -> str | None:
    """The address of the host a port is bound to; `None`: all.

    A best-effort environment that names none stays on loopback: published on all addresses, it would be open
    to the world before anyone decided so.
    """
    return port.host_ip or (LOOPBACK if tier is Tier.BEST_EFFORT else None)


def published_ports(projects: Sequence[Project], ledger: Ledger | LedgerSettings) -> Mapping[PublishedPort, str]:
    """Who publishes what: (address, port, protocol) to `environment/service`.

    SettingsError if two publish the same; a port on all addresses meets that port on any address.
    """
    taken: dict[PublishedPort, str] = {}
    for project in projects:
        tier = ledger.environment(project.environment).tier
        for name, service in project.services.items():
            for port in service.ports:
                if port.published is None:
                    continue
                here = (host_address(port, tier) or ANY_ADDRESS, port.published, port.protocol)
                owner = f"{project.environment}/{name}"
                if other := next((taken[there] for there in taken if _meets(here, there)), None):
                    raise SettingsError(
                        file=", ".join(Path(file).name for file in project.files),
                        service=name,
                        key="ports",
                        value=f"{here[0]}:{port.published}/{port.protocol}",
                        problem=f"{owner} publishes the same port of the host as {other}",
                        remedy="Publish another port, or write different addresses in front of the ports.",
                    )
                taken[here] = owner
    return taken


def _meets(one: PublishedPort, other: PublishedPort) -> bool:
    every = {ANY_ADDRESS, "::"}
    return one[1:] == other[1:] and (one[0] == other[0] or bool(every & {one[0], other[0]}))


def others(name: str, ledger: LedgerSettings, folder: Path | None = None) -> dict[str, Project | SettingsError]:
    """The projects of the ledger's other environments that have settings here; why, for one that cannot be read."""
    folder = folder or root()
    found: dict[str, Project | SettingsError] = {}
    for other in ledger.environments:
        if other != name and (folder / f"Pulumi.{other}.yaml").is_file():
            try:
                found[other] = read_project(read_environment(other, folder), ledger)
            except SettingsError as error:
                found[other] = error
    return found


def check_ports(
    ledger: Ledger | LedgerSettings, project: Project, beside: Iterable[Project | SettingsError]
) -> Mapping[PublishedPort, str]:
    """`published_ports` of `project`, each time beside one other environment.

    The others' own errors are left to their own deploys: a broken compose file of dev, or a port that dev and
    staging both publish, must not keep prod from being deployed.
    """
    for other in beside:
        if isinstance(other, SettingsError):
            continue
        try:
            published_ports([other], ledger)
        except SettingsError:
            continue
        published_ports([other, project], ledger)
    return published_ports([project], ledger)


def foreign_reads(
    project: Project, ledger: LedgerSettings, beside: Mapping[str, Project | SettingsError], folder: Path | None = None
) -> dict[str, dict[str, str]]:
    """What the project's deploy reads on this machine, for policies (`settings.reads`)."""
    protected = {name: one for name, one in beside.items() if ledger.environment(name).tier is Tier.PROTECTED}
    return declared(project, protected, folder or root())
