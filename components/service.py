"""Service: the containers of one compose service, hardened, in their environment's slice.

`container_args` is the whole mapping from Compose to the engine, as a plain function: hardening must not depend on
transforms or hooks, which neither mocks nor other callers would run. It builds no image and makes no network.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pulumi
import pulumi_docker as docker

from components.files import File, Files, FilesArgs, uploads
from components.labels import declared, label_inputs, labels
from settings import host
from settings.ledger import Tier
from settings.model import Healthcheck, Mount, seconds
from settings.model import Service as ComposeService
from settings.project import host_address

MIB = 1024 * 1024
# What the engine's default set gives beyond what ordinary images use at start (chown, drop to a user, low ports).
# NET_RAW allows ARP spoofing within a bridge (CIS Docker Benchmark 5.4). `cap_add` brings one back.
DROPPED_CAPABILITIES = ("AUDIT_WRITE", "MKNOD", "NET_RAW", "SETFCAP", "SETPCAP", "SYS_CHROOT")
NO_NEW_PRIVILEGES = "no-new-privileges"
# Compose's default between the stop signal and the kill, in seconds.
STOP_GRACE = 10
# The provider records a change of healthcheck, init, mounts or tmpfs as an update and leaves the container as it is.
# The others are replaced by it already; they stand here so that a later provider cannot start to do the same.
NEVER_UPDATED = (
    "capabilities",
    "devices",
    "healthcheck",
    "hosts",
    "init",
    "labels",
    "mounts",
    "networks_advanced",
    "ports",
    "tmpfs",
    "ulimits",
    "uploads",
    "volumes",
)
# Without rotation one chatty container fills the disk that all environments share.
LOG_OPTIONS = {"max-size": "10m", "max-file": "3"}
# Docker's own defaults of a healthcheck.
HEALTH_INTERVAL, HEALTH_TIMEOUT, HEALTH_RETRIES = "30s", "30s", 3


@dataclass(frozen=True)
class Attachment:
    """One network of a service: the engine's name for it, and the names the service answers to there."""

    network: pulumi.Input[str]
    aliases: Sequence[str] = ()
    ipv4_address: str | None = None


@dataclass(frozen=True)
class ServiceArgs:
    """One service; `key` is its name in the compose file.

    `image_id`: an id or a digest. `cgroup_parent`: the environment's slice. `volumes`: the engine's names of the
    volumes that the service's mounts name. `variables`: the container's environment. `modes`: `network`, `pid` and
    `ipc` modes where the service sets them. `runs_to_completion`: others wait for its successful end.
    `cgroup_version`: of the host: a memory reservation protects under 2 and harms under 1. `host`: the engine's
    address, where a container that does not become healthy is stopped. `siblings`: the environment's services: a
    container of one that is no longer among them gives up its volume and its port before a new one takes them.
    """

    environment: str
    tier: Tier
    key: str
    service: ComposeService
    image_id: pulumi.Input[str]
    cgroup_parent: pulumi.Input[str]
    attachments: Sequence[Attachment] = ()
    volumes: Mapping[str, pulumi.Input[str]] = field(default_factory=dict)
    files: Sequence[File] = ()
    variables: Mapping[str, pulumi.Input[str]] = field(default_factory=dict)
    modes: Mapping[str, pulumi.Input[str]] = field(default_factory=dict)
    runs_to_completion: bool = False
    cgroup_version: pulumi.Input[int] = 1
    host: str | None = None
    siblings: Collection[str] = ()


class Service(pulumi.ComponentResource):
    """A service's containers, `{name}-1` to `{name}-N`, each with a random suffix of the engine's side."""

    container_ids: pulumi.Output[list[str]]
    health: str
    completed: pulumi.Output[pulumi.Resource] | None = None

    def __init__(self, name: str, args: ServiceArgs, opts: pulumi.ResourceOptions | None = None) -> None:
        super().__init__("bulkhead:index:Service", name, declared(args.service.x_bulkhead), opts)
        files = self._files(name, args)
        failed = pulumi.ErrorHook(f"{name}-failed", lambda failure: stop_failed(failure, args))
        kwargs = container_args(args, files.mounts if files else ())
        alone = pulumi.ResourceHook(f"{name}-alone", lambda new: stop_departed(new.new_inputs or {}, args))
        containers = [
            docker.Container(
                f"{name}-{number}",
                **kwargs,
                opts=pulumi.ResourceOptions(
                    parent=self,
                    depends_on=[files] if files else [],
                    delete_before_replace=not starts_first(args.service),
                    replace_on_changes=list(NEVER_UPDATED),
                    hooks=pulumi.ResourceHookBinding(
                        before_create=[] if starts_first(args.service) or not args.siblings else [alone],
                        on_error=[failed],
                    ),
                ),
            )
            for number in range(1, args.service.deploy.replicas + 1)
        ]
        self.container_ids = pulumi.Output.all(*[container.id for container in containers])
        self.health = "healthy" if kwargs.get("wait") else "unchecked"
        if args.runs_to_completion:
            ends = [pulumi.Output.all(container.exit_code, container.urn) for container in containers]
            self.completed = pulumi.Output.all(*ends).apply(lambda known: self._succeeded(name, known))
        self.register_outputs({"container_ids": self.container_ids, "health": self.health})

    def _files(self, name: str, args: ServiceArgs) -> Files | None:
        """The files of a service with a read-only root; None where they can be uploaded."""
        if not args.files or not args.service.read_only:
            return None
        files = FilesArgs(args.environment, args.tier, args.key, args.image_id, args.cgroup_parent, args.files)
        return Files(f"{name}-files", files, opts=pulumi.ResourceOptions(parent=self))

    def _succeeded(self, name: str, ends: Sequence[Sequence[Any]]) -> pulumi.Resource:
        """This service, once its containers have ended well. Raises `pulumi.RunError` when one has not."""
        for code, urn in ends:
            if code:
                raise pulumi.RunError(
                    f"{name}: ended with exit code {code:g}, and other services wait for its success "
                    f"(depends_on: service_completed_successfully). Read its output with docker logs, correct it and "
                    f"deploy again; to run it again as it is: make pulumi ARGS='state taint --yes --stack "
                    f"{pulumi.get_stack()} {urn}'"
                )
        return self


def stop_failed(failure: pulumi.ErrorHookArgs, args: ServiceArgs) -> bool:
    """Stops a new container that failed, and tells why it did. False: the deploy does not try again.

    The new one answers to the service's name from its start. Left running beside the old one, it would get half of
    the requests although it is not healthy.
    """
    name = (failure.new_inputs or {}).get("name")
    if failure.failed_operation != "create" or not isinstance(name, str):
        return False
    if ended := host.stop_failed(name, args.host):
        before = "What ran before it still does." if starts_first(args.service) else "What ran before it is gone."
        pulumi.log.error(
            f"{name} did not become healthy and was stopped. {before} Fix: correct the service and deploy again. "
            f"Its healthcheck said: {ended.health or 'nothing'}\nIts last output:\n{ended.log}"
        )
    return False


def stop_departed(new: Mapping[str, Any], args: ServiceArgs) -> None:
    """Stops what a renamed or removed service left on the volumes and ports of a new container (its inputs).

    Pulumi deletes what vanished from the program after it has made what is new: a database that was renamed would
    run twice on the same files for that long.
    """
    stopped = host.stop_departed(
        labels(args.environment, args.tier),
        args.siblings,
        [volume["volumeName"] for volume in new.get("volumes") or () if volume.get("volumeName")],
        [int(port["external"]) for port in new.get("ports") or () if port.get("external")],
        args.host,
    )
    for container in stopped:
        pulumi.log.info(f"{container}: stopped, since {args.key} takes over its volume or port")


def starts_first(service: ComposeService) -> bool:
    """Whether a new container starts before the old one stops: `deploy.update_config.order`, else where it is safe.

    Not safe: two containers on one host port (the second cannot start) or writing to one volume (a database's two
    servers on the same files destroy them).
    """
    if service.deploy.update_config.order is not None:
        return service.deploy.update_config.order == "start-first"
    publishes = any(port.published for port in service.ports)
    writes = any(mount.type != "tmpfs" and not mount.read_only for mount in service.volumes)
    return not publishes and not writes and not service.network_mode


def container_args(args: ServiceArgs, file_mounts: Sequence[dict[str, Any]] = ()) -> dict[str, Any]:
    """Arguments of `pulumi_docker.Container` for one service. Keys whose value is Compose's default are left out.

    `file_mounts`: the volumes that hold the service's files where its root is read-only (`components.files`).
    """
    service = args.service
    grace = STOP_GRACE if service.stop_grace_period is None else round(service.stop_grace_period)
    one_shot = args.runs_to_completion
    resources = {
        "image": args.image_id,
        "cgroup_parent": args.cgroup_parent,
        "command": list_or_none(service.command),
        "entrypoints": list_or_none(service.entrypoint),
        "envs": environment_list(args.variables),
        "labels": label_inputs(service.labels, labels(args.environment, args.tier, args.key)),
        "hostname": service.hostname,
        "user": service.user,
        "working_dir": service.working_dir,
        "read_only": service.read_only or None,
        "privileged": service.privileged or None,
        "init": service.init,
        "stdin_open": service.stdin_open or None,
        "tty": service.tty or None,
        "platform": service.platform,
        "runtime": service.runtime,
        "shm_size": None if service.shm_size is None else service.shm_size // MIB,
        "sysctls": dict(service.sysctls) or None,
        "dns": list_or_none(service.dns),
        "hosts": [entry.model_dump() for entry in service.extra_hosts] or None,
        "ulimits": [
            {"name": name, "soft": limit.soft, "hard": limit.hard} for name, limit in sorted(service.ulimits.items())
        ]
        or None,
        "devices": [
            {
                "host_path": device.source,
                "container_path": device.target or device.source,
                "permissions": device.permissions,
            }
            for device in service.devices
        ]
        or None,
        "tmpfs": tmpfs(service) or None,
        "stop_signal": service.stop_signal,
        "stop_timeout": grace,
        # Without it the provider kills at once when it deletes a container.
        "destroy_grace_seconds": grace,
        "log_driver": service.logging.driver if service.logging else "json-file",
        "log_opts": log_options(service),
        "capabilities": capabilities(service),
        "security_opts": security_options(service),
        "volumes": [*volumes(args), *file_mounts] or None,
        "mounts": mounts(args) or None,
        "uploads": (uploads(args.files) or None) if not service.read_only else None,
        "ports": ports(args) or None,
        "network_mode": args.modes.get("network"),
        "pid_mode": args.modes.get("pid"),
        "ipc_mode": args.modes.get("ipc"),
        "networks_advanced": networks(args) or None,
        # A one-shot is done when it has ended; to the provider it is a container that need not run.
        "must_run": False if one_shot else None,
        "attach": True if one_shot else None,
    }
    resources |= limits(args) | health(service.healthcheck, one_shot) | restart(service.restart)
    return {key: value for key, value in resources.items() if value is not None}


def list_or_none(items: Sequence[str] | None) -> list[str] | None:
    """A list for the provider, and None for what the user did not write."""
    return None if items is None or not items else list(items)


def environment_list(variables: Mapping[str, pulumi.Input[str]]) -> pulumi.Input[Sequence[str]] | None:
    """`NAME=value` in name order; secret when one of the values is."""
    if not variables:
        return None
    return pulumi.Output.all(**variables).apply(lambda known: [f"{name}={known[name]}" for name in sorted(known)])


def capabilities(service: ComposeService) -> dict[str, list[str]]:
    """Added and dropped capabilities, in the engine's spelling so that a refresh finds no difference."""
    adds = {spelled(name) for name in service.cap_add}
    drops = {spelled(name) for name in service.cap_drop}
    if "ALL" not in drops:
        drops |= {spelled(name) for name in DROPPED_CAPABILITIES} - adds
    return {"adds": sorted(adds), "drops": sorted(drops)}


def spelled(capability: str) -> str:
    """`net_raw` as `CAP_NET_RAW`; `ALL` stays."""
    name = capability.upper().removeprefix("CAP_")
    return name if name == "ALL" else f"CAP_{name}"


def security_options(service: ComposeService) -> list[str]:
    """The service's own options, and no-new-privileges unless it says otherwise (CIS Docker Benchmark 5.26)."""
    options = [
        option.replace("=", ":", 1) if option.startswith(NO_NEW_PRIVILEGES) else option
        for option in service.security_opt
    ]
    if any(option.startswith(NO_NEW_PRIVILEGES) for option in options):
        return sorted(options)
    return sorted([*options, f"{NO_NEW_PRIVILEGES}:true"])


def log_options(service: ComposeService) -> dict[str, str] | None:
    """The service's own logging options; rotation where it names none of the file drivers' own."""
    if service.logging is not None and (
        service.logging.options or service.logging.driver not in ("json-file", "local")
    ):
        return dict(service.logging.options) or None
    return dict(LOG_OPTIONS)


def tmpfs(service: ComposeService) -> dict[str, str]:
    """Memory file systems by path, with their mount options."""
    found = {path: options for path, _, options in (entry.partition(":") for entry in service.tmpfs)}
    for mount in service.volumes:
        if mount.type == "tmpfs":
            options = {"size": mount.tmpfs_size, "mode": mount.tmpfs_mode and f"{mount.tmpfs_mode:o}"}
            found[mount.target] = ",".join(f"{key}={value}" for key, value in options.items() if value is not None)
    return found


def volumes(args: ServiceArgs) -> list[dict[str, Any]]:
    """Named volumes and binds in the engine's short form, which makes a bind's host path where there is none."""
    return [
        ({"host_path": mount.source} if mount.type == "bind" else {"volume_name": args.volumes[mount.source or ""]})
        | {"container_path": mount.target}
        | ({"read_only": True} if mount.read_only else {})
        for mount in args.service.volumes
        if mount.type != "tmpfs" and not long_form(mount)
    ]


def mounts(args: ServiceArgs) -> list[dict[str, Any]]:
    """Mounts with options that only the engine's long form has."""
    found = []
    for mount in filter(long_form, args.service.volumes):
        bind = mount.type == "bind"
        options = {"propagation": mount.propagation} if bind else {"no_copy": mount.nocopy, "subpath": mount.subpath}
        written = {key: value for key, value in options.items() if value}
        found.append(
            {
                "type": mount.type,
                "source": mount.source if bind else args.volumes[mount.source or ""],
                "target": mount.target,
            }
            | ({"read_only": True} if mount.read_only else {})
            | ({f"{mount.type}_options": written} if written else {})
        )
    return found


def long_form(mount: Mount) -> bool:
    """Whether a mount needs the engine's long form."""
    if mount.type == "bind":
        return mount.propagation is not None or not mount.create_host_path
    return mount.type == "volume" and (mount.nocopy or mount.subpath is not None)


def ports(args: ServiceArgs) -> list[dict[str, Any]]:
    """Published ports. In a best-effort environment one without an address is on loopback only."""
    return [
        {"internal": port.target, "protocol": port.protocol}
        | ({"external": port.published} if port.published else {})
        | ({"ip": ip} if (ip := host_address(port, args.tier)) else {})
        for port in args.service.ports
    ]


def networks(args: ServiceArgs) -> list[dict[str, Any]]:
    """Attachments, with the service's name among the aliases: containers have random names."""
    return [
        {"name": attachment.network, "aliases": sorted({args.key, *attachment.aliases})}
        | ({"ipv4_address": attachment.ipv4_address} if attachment.ipv4_address else {})
        for attachment in args.attachments
    ]


def limits(args: ServiceArgs) -> dict[str, Any]:
    """Ceilings and reservations of one container.

    Swap is set equal to memory: without it every run shows a difference, and swapping would turn a memory limit
    into an IO storm. A CPU reservation is a weight within the environment's slice. Memory is in MiB, rounded down.
    """
    limit, reserved = args.service.deploy.resources.limits, args.service.deploy.resources.reservations
    found: dict[str, Any] = {}
    if limit.memory is not None:
        found |= {"memory": limit.memory // MIB, "memory_swap": limit.memory // MIB}
    if limit.cpus is not None:
        found["cpus"] = cpus(limit.cpus)
    if reserved.cpus is not None:
        found["cpu_shares"] = shares(reserved.cpus)
    if (memory := reserved.memory) is not None:
        found["memory_reservation"] = pulumi.Output.from_input(args.cgroup_version).apply(
            lambda version: memory // MIB if version == 2 else 0
        )
    return found


def cpus(limit: float) -> str:
    """A CPU limit as the provider reads it back from the engine: any other text for it, such as `2` for `2.0`, would
    replace the container at every deploy.

    The provider's helpers.go (nanoInt64ToDecimalString) gives one decimal to what has nine zeros: it reads 0.05 as 0.1.
    What it cannot read is raised by a ten-thousandth of a CPU, until it can.
    """
    nano = round(limit * 1e9)
    while True:
        text = f"{nano // 10**9}.{nano % 10**9:09d}"
        # Half a tenth goes away from zero, as in Go.
        read = f"{(nano + 50_000_000) // 10**8 / 10:.1f}" if text.count("0") == 9 else text.rstrip("0")
        if round(float(read) * 1e9) == nano:
            return read
        nano += 100_000


def shares(cpus: float) -> int:
    """A CPU reservation as a weight among the containers of its environment; 2 is the kernel's smallest."""
    return max(2, round(1024 * cpus))


def health(check: Healthcheck | None, one_shot: bool) -> dict[str, Any]:
    """The healthcheck, and a deploy that waits for it: an unhealthy new container never replaces a healthy one."""
    if check is None:
        return {}
    if check.disable:
        return {"healthcheck": {"tests": ["NONE"]}}
    written = {
        "tests": None if check.test is None else list(check.test),
        "interval": check.interval,
        "timeout": check.timeout,
        "start_period": check.start_period,
        "start_interval": check.start_interval,
        "retries": check.retries,
    }
    found: dict[str, Any] = {"healthcheck": {key: value for key, value in written.items() if value is not None}}
    return found if one_shot else found | {"wait": True, "wait_timeout": health_timeout(check)}


def health_timeout(check: Healthcheck) -> int:
    """Seconds after which a container that is not healthy has had every chance that its own check gives it."""
    interval = seconds(check.interval or HEALTH_INTERVAL)
    timeout = seconds(check.timeout or HEALTH_TIMEOUT)
    retries = HEALTH_RETRIES if check.retries is None else check.retries
    return round(seconds(check.start_period or "0s") + (interval + timeout) * (retries + 1)) + 10


def restart(policy: str | None) -> dict[str, Any]:
    """The restart policy; `on-failure:N` carries its count."""
    if policy is None:
        return {}
    name, _, count = policy.partition(":")
    return {"restart": name} | ({"max_retry_count": int(count)} if count else {})
