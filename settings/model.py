"""Compose files as typed models: Compose's own keys in Compose's own names, resolved to bytes, seconds and paths.
What is not a field here is not carried over: `remedies.py` says what to write instead."""

import graphlib
import itertools
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, field_validator, model_validator

from settings.backup import Backup, Refresh
from settings.errors import Frozen, Loc, SettingsError
from settings.exemption import Exemption
from settings.remedies import REMEDIES, RESOLVED

_DURATION = re.compile(r"(\d+(?:\.\d+)?)(ns|us|µs|ms|s|m|h)")
_SECONDS = {"ns": 1e-9, "us": 1e-6, "µs": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}


def seconds(duration: str) -> float:
    """Seconds of a Go duration as Compose prints it: `1m30s` is 90.0."""
    if _DURATION.sub("", duration):
        raise ValueError(f"{duration!r} is not a duration; write one like 10s or 1m30s")
    return sum(float(number) * _SECONDS[unit] for number, unit in _DURATION.findall(duration))


def _port(published: object) -> object:
    if isinstance(published, str) and "-" in published:
        raise ValueError("a range leaves the choice of port to the engine; publish one port per entry")
    return published or None


def _flat(value: Any, *sections: str) -> Any:
    """Keys of nested `sections` become `section.key`, so that one that is not carried over is named as written."""
    if not isinstance(value, dict):
        return value
    nested = {f"{section}.{key}": inner for section in sections for key, inner in (value.get(section) or {}).items()}
    return {key: inner for key, inner in value.items() if key not in sections} | nested


Words = tuple[str, ...]
Text = Annotated[str, BeforeValidator(lambda value: str(value) if isinstance(value, int | float) else value)]
Seconds = Annotated[float, BeforeValidator(lambda value: seconds(value) if isinstance(value, str) else value)]


class NetworkAttachment(Frozen):
    """A service on a network. `aliases` are Compose's own and `container_name`, not the service's name."""

    aliases: Words = ()
    ipv4_address: str | None = None


class Mount(Frozen):
    """One mount. `source`: key of a named volume, or a host path (bind); sizes in bytes, modes as integers."""

    type: Literal["bind", "volume", "tmpfs"]
    target: str
    source: str | None = None
    read_only: bool = False
    create_host_path: Annotated[bool, Field(alias="bind.create_host_path")] = False
    propagation: Annotated[str | None, Field(alias="bind.propagation")] = None
    nocopy: Annotated[bool, Field(alias="volume.nocopy")] = False
    subpath: Annotated[str | None, Field(alias="volume.subpath")] = None
    tmpfs_size: Annotated[int | None, Field(alias="tmpfs.size")] = None
    tmpfs_mode: Annotated[int | None, Field(alias="tmpfs.mode")] = None

    @model_validator(mode="before")
    @classmethod
    def _nested(cls, value: Any) -> Any:
        return _flat(value, "bind", "volume", "tmpfs")

    @model_validator(mode="after")
    def _source_is_known(self) -> "Mount":
        if self.type == "volume" and self.source is None:
            raise ValueError(
                "an anonymous volume loses its data with the container; "
                f"name it, as in data:{self.target}, or use a tmpfs"
            )
        return self


class Port(Frozen):
    """A container port; `published` on the host, or `None` for a port the engine picks."""

    @model_validator(mode="before")
    @classmethod
    def _without_mode(cls, value: Any) -> Any:
        # ingress and host mean the same where there is one host
        return {key: inner for key, inner in value.items() if key != "mode"} if isinstance(value, dict) else value

    target: int
    published: Annotated[int | None, BeforeValidator(_port)] = None
    host_ip: str | None = None
    protocol: Literal["tcp", "udp", "sctp"] = "tcp"


class Dependency(Frozen):
    """Wait for another service until `condition` holds."""

    condition: Literal["service_started", "service_healthy", "service_completed_successfully"]
    required: bool = True
    restart: bool = False


class Healthcheck(Frozen):
    """Durations in Docker's own spelling (`1m30s`), as the engine prints them."""

    test: Words | None = None
    interval: str | None = None
    timeout: str | None = None
    retries: int | None = None
    start_period: str | None = None
    start_interval: str | None = None
    disable: bool = False


class Resource(Frozen):
    """One side of `deploy.resources`: CPUs, bytes."""

    cpus: float | None = None
    memory: int | None = None


class Resources(Frozen):
    """What a service is promised, and what it may not exceed."""

    limits: Resource = Resource()
    reservations: Resource = Resource()


class UpdateConfig(Frozen):
    """Whether a replaced container stops before or after the new one starts."""

    order: Literal["start-first", "stop-first"] | None = None


class Deploy(Frozen):
    """Replicas, resources and the order of replacement."""

    @model_validator(mode="before")
    @classmethod
    def _without_defaults(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        plain: tuple[tuple[str, object], ...] = (("placement", {}), ("mode", "replicated"))
        return {key: inner for key, inner in value.items() if (key, inner) not in plain}

    replicas: Annotated[int, Field(ge=0)] = 1
    resources: Resources = Resources()
    update_config: UpdateConfig = UpdateConfig()


class Build(Frozen):
    """An image built here. `context` is an absolute path of this machine; `dockerfile` relative to it."""

    context: str
    dockerfile: str = "Dockerfile"
    args: Mapping[str, Text] = {}
    target: str | None = None

    @model_validator(mode="after")
    def _exists(self) -> "Build":
        context = Path(self.context)
        if not context.is_absolute():
            raise ValueError("the build context is not a local folder; check the repository out and name its folder")
        if not context.is_dir():
            raise ValueError(f"the build context {self.context} does not exist; correct the path")
        if not (context / self.dockerfile).is_file():
            raise ValueError(f"{context / self.dockerfile} does not exist; correct context or dockerfile")
        return self


class FileGrant(Frozen):
    """A secret or config as a file of the container; `mode` as an integer (0o400), ids as written."""

    source: str
    target: str | None = None
    uid: str | None = None
    gid: str | None = None
    mode: int | None = None

    @field_validator("mode", mode="before")
    @classmethod
    def _octal(cls, mode: object) -> object:
        return int(mode, 8) if isinstance(mode, str) else mode


class Ulimit(Frozen):
    """A soft and a hard limit of setrlimit(2)."""

    soft: int
    hard: int

    @model_validator(mode="before")
    @classmethod
    def _both(cls, value: Any) -> Any:
        return {"soft": value, "hard": value} if isinstance(value, int | str) else value


class Device(Frozen):
    """A device of the host made visible in the container."""

    source: str
    target: str | None = None
    permissions: str = "rwm"


class Logging(Frozen):
    """The engine's log driver and its options."""

    driver: str | None = None
    options: Mapping[str, Text] = {}


class ExtraHost(Frozen):
    """A line of the container's /etc/hosts."""

    host: str
    ip: str

    @model_validator(mode="before")
    @classmethod
    def _as_compose_prints(cls, value: Any) -> Any:
        host, _, address = value.partition("=") if isinstance(value, str) else ("", "", "")
        return {"host": host, "ip": address} if host else value


class NoExtension(Frozen):
    """`x-bulkhead` where no key of it is supported yet."""


class ServiceExtension(Frozen):
    """`x-bulkhead` of a service. `exempt`: policy rules that it need not keep, and why."""

    exempt: tuple[Exemption, ...] = ()


class NetworkExtension(Frozen):
    """`x-bulkhead` of a network. `egress`: its services may reach out of the host."""

    egress: bool = False
    exempt: tuple[Exemption, ...] = ()


class VolumeExtension(Frozen):
    """`x-bulkhead` of a volume. `ephemeral`: nobody would miss what is in it, so it is not backed up."""

    backup: Backup | None = None
    refresh: Refresh | None = None
    ephemeral: bool = False
    exempt: tuple[Exemption, ...] = ()

    @model_validator(mode="after")
    def _one_or_the_other(self) -> "VolumeExtension":
        if self.backup is not None and self.ephemeral:
            raise ValueError("both a backup and ephemeral; decide whether its data may be lost, and keep one of them")
        return self


class SecretExtension(Frozen):
    """`x-bulkhead` of a secret. `generate`: make it once, from this many random bytes."""

    generate: Annotated[int, Field(ge=16, le=1024)] | None = None


class Service(Frozen):
    """One service: Compose's keys in Compose's names. Sizes in bytes, `stop_grace_period` in seconds."""

    image: str | None = None
    build: Build | None = None
    command: Words | None = None
    entrypoint: Words | None = None
    environment: Mapping[str, Text] = {}
    ports: tuple[Port, ...] = ()
    expose: Words = ()
    networks: Mapping[str, NetworkAttachment] = {}
    volumes: tuple[Mount, ...] = ()
    tmpfs: Words = ()
    depends_on: Mapping[str, Dependency] = {}
    healthcheck: Healthcheck | None = None
    deploy: Deploy = Deploy()
    restart: Annotated[str, Field(pattern=r"^(no|always|unless-stopped|on-failure(:\d+)?)$")] | None = None
    user: str | None = None
    working_dir: str | None = None
    read_only: bool = False
    cap_add: Words = ()
    cap_drop: Words = ()
    security_opt: Words = ()
    stop_signal: str | None = None
    stop_grace_period: Seconds | None = None
    labels: Mapping[str, Text] = {}
    secrets: tuple[FileGrant, ...] = ()
    configs: tuple[FileGrant, ...] = ()
    ulimits: Mapping[str, Ulimit] = {}
    sysctls: Mapping[str, Text] = {}
    init: bool | None = None
    logging: Logging | None = None
    extra_hosts: tuple[ExtraHost, ...] = ()
    dns: Words = ()
    hostname: str | None = None
    shm_size: int | None = None
    devices: tuple[Device, ...] = ()
    platform: str | None = None
    runtime: str | None = None
    stdin_open: bool = False
    tty: bool = False
    network_mode: str | None = None
    pid: str | None = None
    ipc: str | None = None
    privileged: bool = False
    x_bulkhead: ServiceExtension = ServiceExtension()


_NETWORK_DEFAULTS = (("enable_ipv4", True), ("enable_ipv6", False))


class Network(Frozen):
    """A network of the project. `name` only if the user wrote one: other names are derived by the deploy."""

    name: str | None = None
    external: bool = False
    internal: bool = False
    driver: Literal["bridge"] = "bridge"
    subnet: str | None = None
    labels: Mapping[str, Text] = {}
    x_bulkhead: NetworkExtension = NetworkExtension()

    @model_validator(mode="before")
    @classmethod
    def _one_pool(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        value = _flat(value, "ipam")
        pools = value.pop("ipam.config", [])
        if len(pools) > 1:
            raise ValueError("several address pools; write one subnet, or none")
        plain = {key: inner for key, inner in value.items() if (key, inner) not in _NETWORK_DEFAULTS}
        for key, inner in (pools[0] if pools else {}).items():
            plain["subnet" if key == "subnet" else f"ipam.config.{key}"] = inner
        return plain


class Volume(Frozen):
    """A named volume. `driver_opts` are carried for policy to judge: a local volume can bind any host path."""

    name: str | None = None
    external: bool = False
    driver: Literal["local"] = "local"
    driver_opts: Mapping[str, Text] = {}
    labels: Mapping[str, Text] = {}
    x_bulkhead: VolumeExtension = VolumeExtension()


class Secret(Frozen):
    """A secret from a `file` (absolute path), an `environment` variable, or `external` (Pulumi's own)."""

    name: str | None = None
    file: str | None = None
    environment: str | None = None
    external: bool = False
    x_bulkhead: SecretExtension = SecretExtension()

    @model_validator(mode="after")
    def _generated_is_external(self) -> "Secret":
        if self.x_bulkhead.generate is not None and not self.external:
            raise ValueError("a generated secret has no other source; write external: true beside it")
        return self


class Config(Frozen):
    """A config from a `file` (absolute path), an `environment` variable, or its `content`."""

    name: str | None = None
    file: str | None = None
    environment: str | None = None
    content: str | None = None
    x_bulkhead: NoExtension = NoExtension()


class Project(Frozen):
    """An environment's services and what they share, from one or several compose files.

    `variable_files`: (key, path) of each env_file and label_file, whose content Compose has put into the services, also
    of services that no profile enables; and of each file that is included or extended and not known.

    >>> project = read([Path("compose.yaml"), Path("compose.prod.yaml")], environment="prod")
    >>> project.order()
    ['db', 'api', 'web']
    """

    environment: str
    files: tuple[str, ...]
    services: Mapping[str, Service]
    networks: Mapping[str, Network] = {}
    volumes: Mapping[str, Volume] = {}
    secrets: Mapping[str, Secret] = {}
    configs: Mapping[str, Config] = {}
    notes: tuple[str, ...] = ()
    variable_files: tuple[tuple[str, str], ...] = ()

    def order(self) -> list[str]:
        """Services so that each stands after those it depends on; ties by name. SettingsError names a cycle."""
        before = {name: sorted(self.waits_for(name)) for name in sorted(self.services)}
        sorter = graphlib.TopologicalSorter(before)
        try:
            sorter.prepare()
        except graphlib.CycleError as error:
            cycle = list(reversed(error.args[1]))
            raise SettingsError(
                file=", ".join(self.files),
                service=cycle[0],
                key="depends_on",
                value=" -> ".join(cycle),
                problem="services wait for each other",
                remedy="Remove one of these dependencies.",
            ) from None
        found: list[str] = []
        while sorter.is_active():
            ready = sorted(sorter.get_ready())
            found += ready
            sorter.done(*ready)
        return found

    def waits_for(self, name: str) -> Iterator[str]:
        """The services that must stand before `name`: its depends_on, and those whose namespaces it joins."""
        service = self.services[name]
        joined = [mode.removeprefix("service:") for mode in _joined(service) if mode.startswith("service:")]
        return (other for other in {*service.depends_on, *joined} if other in self.services)


def _joined(service: Service) -> Iterator[str]:
    return (mode for mode in (service.network_mode, service.pid, service.ipc) if mode)


_MODELS: Mapping[str, type[Frozen]] = {
    "service": Service,
    "service.build": Build,
    "service.depends_on": Dependency,
    "service.deploy": Deploy,
    "service.deploy.resources": Resources,
    "service.deploy.resources.limits": Resource,
    "service.deploy.resources.reservations": Resource,
    "service.deploy.update_config": UpdateConfig,
    "service.devices": Device,
    "service.healthcheck": Healthcheck,
    "service.logging": Logging,
    "service.networks": NetworkAttachment,
    "service.ports": Port,
    "service.secrets": FileGrant,
    "service.configs": FileGrant,
    "service.ulimits": Ulimit,
    "service.volumes": Mount,
    "network": Network,
    "volume": Volume,
    "secret": Secret,
    "config": Config,
}
"""The model of each mapping of a compose file, by its path without names: `service.networks` is an attachment."""

# Keys that validators above rewrite: container_name becomes an alias, ipam a subnet, mode has one meaning.
_REWRITTEN: Mapping[str, frozenset[str]] = {
    "service": RESOLVED | {"container_name"},
    "service.deploy": frozenset({"mode"}),
    "service.ports": frozenset({"mode"}),
    "service.volumes": frozenset({"bind", "volume", "tmpfs"}),
    "network": frozenset({"ipam"}),
    "network.ipam": frozenset({"config"}),
    "network.ipam.config": frozenset({"subnet"}),
}
_SECTIONS = ("services", "networks", "volumes", "secrets", "configs")
_NAMED = frozenset({"networks", "depends_on", "ulimits"})


def kind(loc: Loc) -> str:
    """A path without the user's own names: `service.networks.aliases` for `services.api.networks.web.aliases`."""
    if not loc or loc[0] not in _SECTIONS:
        return ".".join(str(part) for part in loc)
    words = [str(loc[0])[:-1]]
    for before, part in itertools.pairwise(loc[1:]):
        if isinstance(part, str) and not (before in _NAMED and loc[0] == "services"):
            words.append(part)
    return ".".join(words)


def carried(path: str) -> frozenset[str]:
    """The keys that Bulkhead carries over below `path`, as `kind` writes it."""
    parent, _, section = path.rpartition(".")
    nested = {name.removeprefix(f"{section}.") for name in _written(parent) if name.startswith(f"{section}.")}
    return _REWRITTEN.get(path, frozenset()) | nested | {name for name in _written(path) if "." not in name}


def _written(path: str) -> frozenset[str]:
    """The keys of a model as users write them."""
    model = _MODELS.get(path)
    names = {field.alias or name for name, field in model.model_fields.items()} if model else set()
    return frozenset("x-bulkhead" if name == "x_bulkhead" else name for name in names)


def known_keys(loc: Loc) -> frozenset[str]:
    """The keys of the Compose schema below `loc`, carried over or not, for suggestions."""
    path = kind(loc)
    if not path:
        return frozenset(_SECTIONS)
    refused = {key.removeprefix(f"{path}.") for key in REMEDIES if key.startswith(f"{path}.")}
    return carried(path) | {key for key in refused if "." not in key}
