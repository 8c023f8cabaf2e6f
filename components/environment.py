"""Environment: all networks, volumes, secrets, images and services of one environment, from its compose files.

Images come first: a build that fails leaves what runs as it is. It makes no slice: the host stack does, and gives
the environment its `cgroup_parent`.
"""

import hashlib
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from ipaddress import IPv4Network
from pathlib import Path
from typing import Any

import pulumi

from components.files import File
from components.image import Image, ImageArgs
from components.labels import declared
from components.network import Network, NetworkArgs
from components.secret import Secret, SecretArgs
from components.service import MIB, Attachment, Service, ServiceArgs, cpus, shares
from components.volume import Volume, VolumeArgs
from settings import compose
from settings.errors import SettingsError
from settings.ledger import Tier
from settings.project import ANY_ADDRESS, LOOPBACK, host_address

# Bits that a network's prefix is longer than its environment's: a /16 holds 256 networks of 254 hosts.
NETWORK_BITS = 8
LONGEST_PREFIX = 28
SECRETS_FOLDER = "/run/secrets"
COMPLETED = "service_completed_successfully"
SECRET = re.compile(compose.SECRET_PLACEHOLDER.format(name="([^:]*)"))


@dataclass(frozen=True)
class EnvironmentArgs:
    """One environment.

    `project`: its compose files, read. `subnet`: the range that its networks are cut from. `cgroup_parent`: its
    slice, as the host stack gives it. `secrets`: values by name, for `external` secrets and for variables.
    `cgroup_version`, `host`: the host's, see `components.service` and `components.image`.
    `variables`: where secrets and configs with an `environment` take their values. `reads`: what policies are to know
    of the files that its Compose files name (`settings.reads.declared`).
    """

    project: compose.Project
    tier: Tier
    subnet: IPv4Network
    cgroup_parent: pulumi.Input[str]
    cgroup_version: pulumi.Input[int] = 1
    host: str | None = None
    secrets: Mapping[str, pulumi.Input[str]] = field(default_factory=dict)
    variables: Mapping[str, str] = field(default_factory=lambda: dict(os.environ))
    reads: Mapping[str, Mapping[str, str]] = field(default_factory=dict)


class Environment(pulumi.ComponentResource):
    """Everything of one environment.

    Outputs: `endpoints` (list of service, address, port, target, protocol), `networks` (name to subnet and
    whether internal), `volumes` (names), `services` (name to container ids, image, health, and what `checked` tells).
    """

    endpoints: list[dict[str, str | int | None]]
    networks: dict[str, dict[str, str | bool | None]]
    volumes: list[str]
    services: pulumi.Output[dict[str, object]]

    def __init__(self, name: str, args: EnvironmentArgs, opts: pulumi.ResourceOptions | None = None) -> None:
        told = {"reads": {key: dict(one) for key, one in args.reads.items()}} if args.reads else None
        super().__init__("bulkhead:index:Environment", name, told, opts)
        self._name, self._args = name, args
        project = args.project
        for note in (*project.notes, *notes(project, args.tier)):
            pulumi.log.info(note, self)
        images = self._images()
        after_images = pulumi.ResourceOptions(parent=self, depends_on=list(set(images.values())))
        networks, self.networks = self._networks(after_images)
        volumes = self._volumes(list(set(images.values())))
        secrets = self._secrets()
        built: dict[str, Service] = {}
        for key in project.order():
            built[key] = self._service(key, images[key], networks, volumes, secrets, built)
        self.endpoints = endpoints(project, args.tier)
        self.volumes = sorted(engine_name(name, key, volume) for key, volume in project.volumes.items())
        self.services = pulumi.Output.all(
            **{
                key: pulumi.Output.all(
                    containers=service.container_ids,
                    health=service.health,
                    image={
                        "name": images[key].reference,
                        "id": images[key].image_id,
                        "digest": images[key].digest,
                    },
                    **checked(name, key, project),
                )
                for key, service in built.items()
            }
        )
        self.register_outputs(
            {
                "endpoints": self.endpoints,
                "networks": self.networks,
                "volumes": self.volumes,
                "services": self.services,
            }
        )

    def _images(self) -> dict[str, Image]:
        """The image of each service; services with the same build share one."""
        made: dict[str, Image] = {}
        found: dict[str, Image] = {}
        services = sorted(self._args.project.services.items())
        sources = {
            key: service.build.model_dump_json() if service.build else f"image {service.image}"
            for key, service in services
        }
        for key, service in services:
            source = sources[key]
            if source not in made:
                made[source] = Image(
                    f"{self._name}-{key}",
                    ImageArgs(
                        environment=self._name,
                        tier=self._args.tier,
                        service=key,
                        cgroup_parent=self._args.cgroup_parent,
                        image=None if service.build else service.image,
                        build=service.build,
                        host=self._args.host,
                        # It is one image: who may run it by its tag for one service may for the other.
                        exempt=[
                            one.model_dump(mode="json")
                            for other, sharing in services
                            if sources[other] == source
                            for one in sharing.x_bulkhead.exempt
                        ],
                    ),
                    opts=pulumi.ResourceOptions(parent=self),
                )
            found[key] = made[source]
        return found

    def _networks(
        self, opts: pulumi.ResourceOptions
    ) -> tuple[dict[str, pulumi.Input[str]], dict[str, dict[str, str | bool | None]]]:
        """The engine's name of each network by its compose key, and what the outputs say of each."""
        project = self._args.project
        subnets = allocate(self._args.subnet, project.networks)
        names: dict[str, pulumi.Input[str]] = {}
        told: dict[str, dict[str, str | bool | None]] = {}
        for key, network in sorted(project.networks.items()):
            engine = engine_name(self._name, key, network)
            names[key] = engine
            if network.external:
                told[engine] = {"subnet": None, "internal": None, "external": True}
                continue
            internal = is_internal(key, project)
            names[key] = Network(
                f"{self._name}-{key}",
                NetworkArgs(
                    name=engine,
                    environment=self._name,
                    tier=self._args.tier,
                    subnet=str(subnets[key]),
                    internal=internal,
                    labels=network.labels,
                    declared=declared(network.x_bulkhead),
                ),
                opts=opts,
            ).network_name
            told[engine] = {"subnet": str(subnets[key]), "internal": internal, "external": False}
        return names, told

    def _volumes(self, images: Sequence[Image]) -> dict[str, pulumi.Input[str]]:
        """The engine's name of each volume by its compose key.

        Volumes wait for the images too, but do not depend on them: what a protected resource depends on is kept
        with it when everything else is destroyed.
        """

        async def after_images(name: str) -> str:
            for image in images:
                await image.image_id.future()
            return name

        names: dict[str, pulumi.Input[str]] = {}
        for key, volume in sorted(self._args.project.volumes.items()):
            engine = engine_name(self._name, key, volume)
            if volume.external:
                names[key] = engine
                continue
            names[key] = Volume(
                f"{self._name}-{key}",
                VolumeArgs(
                    name=pulumi.Output.from_input(after_images(engine)),
                    environment=self._name,
                    tier=self._args.tier,
                    driver_opts=volume.driver_opts,
                    labels=volume.labels,
                    declared=declared(volume.x_bulkhead),
                ),
                opts=pulumi.ResourceOptions(parent=self),
            ).volume_name
        return names

    def _secrets(self) -> dict[str, pulumi.Output[str]]:
        """The value of each secret by its compose key."""
        found: dict[str, pulumi.Output[str]] = {}
        for key, secret in sorted(self._args.project.secrets.items()):
            value, generate = self._secret_source(key, secret)
            found[key] = Secret(
                f"{self._name}-{key}",
                SecretArgs(tier=self._args.tier, value=value, generate=generate),
                opts=pulumi.ResourceOptions(parent=self),
            ).value
        return found

    def _secret_source(self, key: str, secret: compose.Secret) -> tuple[pulumi.Input[str] | None, int | None]:
        """Where a secret comes from: a file, a variable of the deployer's, the stack's config, or generated."""
        name = secret.name or key
        if secret.file is not None:
            return text_of(Path(secret.file), f"secrets.{key}.file"), None
        if secret.environment is not None:
            if secret.environment not in self._args.variables:
                raise self._no_secret(key, secret.environment, f"Set {secret.environment} for the deploy.")
            return self._revealed(self._args.variables[secret.environment]), None
        if name in self._args.secrets:
            return self._args.secrets[name], None
        if secret.x_bulkhead.generate is not None:
            return None, secret.x_bulkhead.generate
        raise self._no_secret(
            key,
            name,
            f"Set it: make pulumi ARGS=\"config set --stack {self._name} --secret --path 'bulkhead:secrets.{name}'\"; "
            "or let it be generated once: x-bulkhead: {generate: 32}.",
        )

    def _no_secret(self, key: str, name: str, remedy: str) -> SettingsError:
        return SettingsError(
            file=", ".join(self._args.project.files),
            key=f"secrets.{key}",
            value=name,
            problem="this secret has no value",
            remedy=remedy,
        )

    def _service(
        self,
        key: str,
        image: Image,
        networks: Mapping[str, pulumi.Input[str]],
        volumes: Mapping[str, pulumi.Input[str]],
        secrets: Mapping[str, pulumi.Output[str]],
        built: Mapping[str, Service],
    ) -> Service:
        """One service, after the services it depends on."""
        project = self._args.project
        service = project.services[key]
        return Service(
            f"{self._name}-{key}",
            ServiceArgs(
                environment=self._name,
                tier=self._args.tier,
                key=key,
                service=service,
                image_id=image.image_id,
                cgroup_parent=self._args.cgroup_parent,
                cgroup_version=self._args.cgroup_version,
                host=self._args.host,
                siblings=list(project.services),
                attachments=[
                    Attachment(networks[network], attachment.aliases, attachment.ipv4_address)
                    for network, attachment in sorted(service.networks.items())
                ],
                volumes=volumes,
                files=[
                    *(secret_file(grant, secrets[grant.source]) for grant in service.secrets),
                    *(
                        granted(grant, grant.target or f"/{grant.source}", self._content(project.configs[grant.source]))
                        for grant in service.configs
                    ),
                ],
                variables={
                    name: self._revealed(value) for name, value in service.environment.items() if value is not None
                },
                modes=modes(service, built),
                runs_to_completion=awaited(key, project),
            ),
            opts=pulumi.ResourceOptions(
                parent=self,
                depends_on=[
                    built[other].completed or built[other] for other in sorted(service.depends_on) if other in built
                ],
            ),
        )

    def _content(self, config: compose.Config) -> pulumi.Input[str]:
        """What a config holds: a file's text, a variable's value, or what is written in place."""
        if config.file is not None:
            return text_of(Path(config.file), "configs.file")
        if config.environment is not None:
            return self._revealed(self._args.variables[config.environment])
        return config.content or ""

    def _revealed(self, value: str) -> pulumi.Input[str]:
        """A variable's value with the secrets that it names put in; secret then itself."""
        pieces = SECRET.split(value)
        if len(pieces) == 1:
            return value
        return pulumi.Output.concat(
            *(self._args.secrets[piece] if odd % 2 else piece for odd, piece in enumerate(pieces))
        )


def text_of(path: Path, key: str) -> str:
    """A file's text. Raises `SettingsError` when it cannot be read, or is not text."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(
            file=path.name,
            key=key,
            value=str(path),
            problem=f"cannot be read as text: {error}",
            remedy="Correct the path; what is not text belongs in the image or in a volume.",
        ) from None


def engine_name(environment: str, key: str, item: compose.Network | compose.Volume) -> str:
    """The engine's name of a network or volume: the one that the user wrote, else `prod-backend`."""
    if item.name is not None:
        return item.name
    return key if item.external else f"{environment}-{key}"


def is_internal(key: str, project: compose.Project) -> bool:
    """Whether a network has no way out: unless a service on it publishes a port, or the user opens it."""
    network = project.networks[key]
    if network.internal:
        return True
    publishes = any(key in service.networks and service.ports for service in project.services.values())
    return not publishes and not network.x_bulkhead.egress


def allocate(subnet: IPv4Network, networks: Mapping[str, compose.Network]) -> dict[str, IPv4Network]:
    """A range for each network that names none, from the environment's.

    A network keeps its range when others come and go: its name decides the slot, and only where two names want
    the same one does the later in the alphabet take the next free. Raises `SettingsError` when they do not fit.
    """
    given = {key: IPv4Network(network.subnet) for key, network in networks.items() if network.subnet is not None}
    for key, range_ in given.items():
        if not range_.subnet_of(subnet):
            raise SettingsError(
                file="compose",
                key=f"networks.{key}.ipam.config",
                value=str(range_),
                problem=f"outside the environment's range {subnet}",
                remedy="Write a range inside it, or none: Bulkhead then chooses one.",
            )
    slots = list(subnet.subnets(new_prefix=max(subnet.prefixlen, min(subnet.prefixlen + NETWORK_BITS, LONGEST_PREFIX))))
    free = [slot for slot in slots if not any(slot.overlaps(taken) for taken in given.values())]
    wanting = sorted(key for key, network in networks.items() if key not in given and not network.external)
    if len(wanting) > len(free):
        raise SettingsError(
            file="Pulumi.host.yaml",
            key="subnet",
            value=str(subnet),
            problem=f"has room for {len(free)} networks, and {len(wanting)} are asked for",
            remedy="Give the environment a larger private range, a /16 for example.",
        )
    found = dict(given)
    for key in wanting:
        start = int.from_bytes(hashlib.sha256(key.encode()).digest()[:4]) % len(slots)
        probe = (slots[(start + step) % len(slots)] for step in range(len(slots)))
        found[key] = next(slot for slot in probe if not any(slot.overlaps(taken) for taken in found.values()))
    return found


def modes(service: compose.Service, built: Mapping[str, Service]) -> dict[str, pulumi.Input[str]]:
    """Network, pid and ipc modes; `service:x` as the container of that service of this environment."""
    written = {"network": service.network_mode, "pid": service.pid, "ipc": service.ipc}
    found: dict[str, pulumi.Input[str]] = {}
    for kind, mode in written.items():
        if mode is None:
            continue
        other = mode.removeprefix("service:")
        found[kind] = mode if other == mode else pulumi.Output.concat("container:", built[other].container_ids[0])
    return found


def awaited(key: str, project: compose.Project) -> bool:
    """Whether another service waits for this one's successful end."""
    return any(
        dependency.condition == COMPLETED
        for service in project.services.values()
        for other, dependency in service.depends_on.items()
        if other == key
    )


def checked(environment: str, key: str, project: compose.Project) -> dict[str, Any]:
    """What is compared of a service's containers on the host, as the engine shows it: networks, limits, how it ends.

    `memory` in bytes; None is no limit. `completes`: it is as it should be once it has ended well.
    """
    service = project.services[key]
    limit, reserved = service.deploy.resources.limits, service.deploy.resources.reservations
    own = [service.network_mode] if service.network_mode in ("none", "host", "bridge") else []
    return {
        "networks": sorted(
            [*own, *(engine_name(environment, name, project.networks[name]) for name in service.networks)]
        ),
        "memory": None if limit.memory is None else limit.memory // MIB * MIB,
        "cpus": None if limit.cpus is None else float(cpus(limit.cpus)),
        "cpu_shares": None if reserved.cpus is None else shares(reserved.cpus),
        "restart": service.restart or "no",
        "completes": awaited(key, project),
    }


def secret_file(grant: compose.FileGrant, value: pulumi.Output[str]) -> File:
    """A secret as a file; a bare target is a name below /run/secrets, as Compose has it."""
    target = grant.target or grant.source
    return granted(grant, target if target.startswith("/") else f"{SECRETS_FOLDER}/{target}", value)


def granted(grant: compose.FileGrant, target: str, content: pulumi.Input[str]) -> File:
    """A file with the owner and mode of its grant."""
    return File(
        target,
        content,
        mode="0444" if grant.mode is None else f"{grant.mode:04o}",
        uid=grant.uid,
        gid=grant.gid,
    )


def endpoints(project: compose.Project, tier: Tier) -> list[dict[str, str | int | None]]:
    """Where each published port answers, in service order."""
    return [
        {
            "service": key,
            "address": host_address(port, tier) or ANY_ADDRESS,
            "port": port.published,
            "target": port.target,
            "protocol": port.protocol,
        }
        for key, service in sorted(project.services.items())
        for port in service.ports
    ]


def notes(project: compose.Project, tier: Tier) -> list[str]:
    """What Bulkhead does differently from plain Compose for this project, so that nobody is surprised."""
    told = [
        f"network {key}: internal, no way out, since no service on it publishes a port "
        "(x-bulkhead: {egress: true} on the network opens it)"
        for key, network in sorted(project.networks.items())
        if not network.external and not network.internal and is_internal(key, project)
    ]
    if tier is not Tier.PROTECTED:
        told += [
            f"service {key}: port {port.target} is published on {LOOPBACK} only, as the environment is {tier}"
            for key, service in sorted(project.services.items())
            for port in service.ports
            if port.host_ip is None
        ]
    return told
