"""An environment's stack: its compose files, built on what the host stack promises it."""

import os
from collections.abc import Mapping
from typing import Any

import pulumi
import pulumi_command as command
import pulumi_docker as docker

from components.backup import BackupJob, BackupJobArgs, Backups, repository_key
from components.environment import Environment, EnvironmentArgs, engine_name
from components.labels import ENVIRONMENT
from components.promises import Promises
from components.secret import Secret
from settings import compose, host
from settings.backup import LAST, LAST_KNOWN, BucketTarget, last_known
from settings.errors import SettingsError
from settings.ledger import LedgerSettings
from settings.project import (
    REPOSITORY_KEY,
    EnvironmentSettings,
    backed_up,
    check_ports,
    credentials,
    foreign_reads,
    others,
    read_environment,
    read_project,
    refreshed,
    root,
)
from settings.reads import inherited
from stacks.host import stack_of


def build() -> Environment:
    """The environment that the stack is named after. Returned so that a stack's own module can build on it."""
    name = pulumi.get_stack()
    ledger = LedgerSettings.read(root() / "Pulumi.host.yaml")
    promised = ledger.environment(name)
    settings = read_environment(name)
    project = read_project(settings, ledger)
    beside = others(name, ledger)
    check_ports(ledger, project, beside.values())
    check_images(project, ledger.host)
    check_volumes(project, ledger.host)
    secrets = pulumi.Config("bulkhead").get_secret_object("secrets") if settings.secret_names else None
    given = pulumi.ResourceOptions(providers=providers(project, ledger.host))
    deployed = pulumi.StackReference("host", stack_name=stack_of("host"))
    Promises("promises", deployed.outputs)
    engine = deployed.require_output("engine")
    mine = deployed.require_output("environments").apply(lambda environments: promise(environments, name))
    environment = Environment(
        name,
        EnvironmentArgs(
            project=project,
            tier=promised.tier,
            subnet=promised.subnet,
            cgroup_parent=mine["cgroup_parent"],
            cgroup_version=engine["cgroup_version"],
            host=ledger.host,
            variables={
                **inherited(os.environ, promised),
                **settings.variables,
                **{key: compose.SECRET_PLACEHOLDER.format(name=key) for key in settings.secret_names},
            },
            reads=foreign_reads(project, ledger, beside),
            secrets={} if secrets is None else {key: secrets[key] for key in settings.secret_names},
        ),
        opts=given,
    )
    jobs, key = backups(name, settings, project, ledger, secrets, given)
    pulumi.export("environment", name)
    pulumi.export("tier", str(promised.tier))
    pulumi.export("slice", {"cgroup_parent": mine["cgroup_parent"], "budget": mine["budget"]})
    pulumi.export("endpoints", environment.endpoints)
    pulumi.export("networks", environment.networks)
    pulumi.export("volumes", environment.volumes)
    pulumi.export("services", environment.services)
    pulumi.export("backups", told_of(jobs))
    refresh = {
        volume: {**told, "volume": engine_name(name, volume, project.volumes[volume])}
        for volume, told in refreshed(project, ledger, settings).items()
    }
    if jobs or refresh:
        declared = pulumi.Output.all(**{volume: job.declared for volume, job in jobs.items()})
        within = {"verified_within": ledger.backup.verified_within, "drill": ledger.backup.drill, "refresh": refresh}
        told = {**within, "password": key.value if key else "", "jobs": declared}
        pulumi.export("backup_jobs", Backups(f"{name}-backups", told, given).document)
    return environment


def backups(
    name: str,
    settings: EnvironmentSettings,
    project: compose.Project,
    ledger: LedgerSettings,
    secrets: pulumi.Output[Any] | None,
    opts: pulumi.ResourceOptions,
) -> tuple[dict[str, BackupJob], Secret | None]:
    """The job of each volume that declares a backup, by its compose key, and the key of their repositories."""
    found = backed_up(project, ledger, settings)
    jobs = {
        key: BackupJob(
            f"{name}-{key}-backup",
            BackupJobArgs(
                environment=name,
                volume=engine_name(name, key, project.volumes[key]),
                service=service,
                backup=backup,
                targets=ledger.backup.of(backup),
                credentials={
                    target: {variable: secrets[secret] for variable, secret in credentials(target).items()}
                    for target, where in ledger.backup.of(backup).items()
                    if isinstance(where, BucketTarget) and secrets is not None
                },
            ),
            opts=opts,
        )
        for key, (backup, service) in found.items()
    }
    if not jobs:
        return {}, None
    given = secrets[REPOSITORY_KEY] if secrets is not None and REPOSITORY_KEY in settings.secret_names else None
    return jobs, repository_key(f"{name}-backup-key", ledger.environment(name).tier, given, opts)


def told_of(jobs: Mapping[str, BackupJob]) -> pulumi.Input[dict[str, Any]]:
    """What everybody may see of each backup, by compose key; `when_deployed` is what the host knew of it then.

    A preview puts out what is deployed: after each backup there would be changes that nobody has made.
    """
    if not jobs:
        return {}
    known = {} if pulumi.runtime.is_dry_run() else last_known(os.environ.get(LAST_KNOWN, ""))
    deployed = pulumi.StackReference("deployed", stack_name=stack_of(pulumi.get_stack()))

    def told(before: Mapping[str, Any] | None) -> dict[str, Any]:
        there = before or {}
        return {
            key: {**job.told, "when_deployed": when_deployed(known.get(job.told["volume"]), there.get(key, {}))}
            for key, job in jobs.items()
        }

    # By its name: all outputs together are a secret, since one of them is.
    return deployed.get_output("backups").apply(told)


def when_deployed(known: Mapping[str, float] | None, deployed: Mapping[str, Any]) -> dict[str, int]:
    """Those of `LAST` that there are, in seconds since 1970; as `deployed` where the host told nothing."""
    there = deployed.get("when_deployed") or {} if known is None else known
    return {key: int(there[key]) for key in LAST if key in there}


def providers(project: compose.Project, address: str | None) -> list[pulumi.ProviderResource]:
    """The engine's provider, and the command provider where a secret or a salt has to be generated."""
    engine = docker.Provider("docker", host=host.address(address))
    generated = project.secrets or project.configs or any(one.x_bulkhead.backup for one in project.volumes.values())
    return [engine, command.Provider("command")] if generated else [engine]


def promise(environments: dict[str, Any], name: str) -> dict[str, Any]:
    """What the deployed host stack promises this environment. Raises `pulumi.RunError` when it does not know it."""
    if name not in environments:
        raise pulumi.RunError(
            f"The host stack promises nothing to environment {name}: it knows {', '.join(sorted(environments))}. "
            "Deploy the ledger first: make up ENV=host"
        )
    return dict(environments[name])


def check_volumes(project: compose.Project, address: str | None) -> None:
    """Raises `SettingsError` for a volume that somebody else has made already.

    The engine would hand it out without a word, and `make down` would delete it with everything in it.
    """
    names = {
        engine_name(project.environment, key, volume): key
        for key, volume in project.volumes.items()
        if not volume.external
    }
    for name in host.foreign_volumes(sorted(names), {ENVIRONMENT: project.environment}, address):
        raise SettingsError(
            file=", ".join(project.files),
            key=f"volumes.{names[name]}",
            value=name,
            problem="this volume is there already, and not of this environment",
            remedy="Write external: true beside its name to use it as it is, or give the new one another name.",
        )


def check_images(project: compose.Project, address: str | None) -> None:
    """Raises `SettingsError` for an image that neither the engine nor its registry has.

    Found at preview, it costs nothing; found halfway through `up`, it leaves half an environment.
    """
    wanted = {
        service.image: key for key, service in project.services.items() if service.build is None and service.image
    }
    for image, reason in host.missing_images(sorted(wanted), address).items():
        raise SettingsError(
            file=", ".join(project.files),
            service=wanted[image],
            key="image",
            value=image,
            problem=f"no such image: {reason}",
            remedy="Check name and tag, log in to its registry on the host, or build it (build:).",
        )
