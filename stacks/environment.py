"""An environment's stack: its compose files, built on what the host stack promises it."""

import os
from typing import Any

import pulumi
import pulumi_command as command
import pulumi_docker as docker

from components.environment import Environment, EnvironmentArgs, engine_name
from components.labels import ENVIRONMENT
from components.promises import Promises
from settings import compose, host
from settings.errors import SettingsError
from settings.ledger import LedgerSettings
from settings.project import check_ports, read_environment, read_project, root
from stacks.host import host_stack


def build() -> Environment:
    """The environment that the stack is named after. Returned so that a stack's own module can build on it."""
    name = pulumi.get_stack()
    ledger = LedgerSettings.read(root() / "Pulumi.host.yaml")
    promised = ledger.environment(name)
    settings = read_environment(name)
    project = read_project(settings)
    check_ports(ledger, project)
    check_images(project, ledger.host)
    check_volumes(project, ledger.host)
    secrets = pulumi.Config("bulkhead").get_secret_object("secrets") if settings.secret_names else None
    deployed = pulumi.StackReference("host", stack_name=host_stack())
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
                **os.environ,
                **settings.variables,
                **{key: compose.SECRET_PLACEHOLDER.format(name=key) for key in settings.secret_names},
            },
            secrets={} if secrets is None else {key: secrets[key] for key in settings.secret_names},
        ),
        opts=pulumi.ResourceOptions(providers=providers(project, ledger.host)),
    )
    pulumi.export("environment", name)
    pulumi.export("tier", str(promised.tier))
    pulumi.export("slice", {"cgroup_parent": mine["cgroup_parent"], "budget": mine["budget"]})
    pulumi.export("endpoints", environment.endpoints)
    pulumi.export("networks", environment.networks)
    pulumi.export("volumes", environment.volumes)
    pulumi.export("services", environment.services)
    return environment


def providers(project: compose.Project, address: str | None) -> list[pulumi.ProviderResource]:
    """The engine's provider, and the command provider where a secret or a salt has to be generated."""
    engine = docker.Provider("docker", host=host.address(address))
    return [engine, command.Provider("command")] if project.secrets or project.configs else [engine]


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
