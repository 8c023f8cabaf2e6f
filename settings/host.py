"""What the Docker engine says about its machine: the one place that asks it, for the ledger, `plan` and `doctor`.
A local engine is asked over its socket, an `ssh://` one through ssh and the Docker client installed there."""

import json
import os
import re
import shlex
import shutil
import socket
import subprocess
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

import docker
from docker.errors import DockerException, ImageNotFound
from requests.exceptions import RequestException

from settings import machine, ssh
from settings.errors import Frozen, SettingsError

BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
DEFAULT_HOST = "unix:///var/run/docker.sock"
CONNECT_SECONDS = 2
ANSWER_SECONDS = 10
REMOTE_SECONDS = 60  # an ssh handshake, and Docker's client over there
REGISTRY_SECONDS = 30
STOP_SECONDS = 300  # longer than any grace period that a service may ask for
SERVICE_LABEL = "bulkhead.service"
LOG_LINES = 20


class Disk(Frozen):
    """The device that the engine's data is on; see `settings.machine.read` for the fields."""

    number: str
    name: str
    size: int
    schedulers: tuple[str, ...]
    iocost: bool = False

    @property
    def weights(self) -> Literal["iocost", "bfq", ""]:
        """What honours IO weights there; a weight does nothing, without a word, under any other scheduler."""
        return "iocost" if self.iocost else "bfq" if self.schedulers == ("bfq",) else ""


class Place(Frozen):
    """A folder on the engine's machine; see `settings.machine.place` for the fields."""

    there: bool
    size: int
    free: int
    shared: bool


class HostFacts(Frozen):
    """The machine of an engine. `memory`, `disk`, `disk_free` in bytes, of the file system that holds `data_root`.

    `systemd`: the version that runs the machine, 0 without. `device`: None where the data is on no block device.
    `recursive_memory`: memory protection of a cgroup reaches the groups below it (mount option, cgroup v2).
    `controllers` None: the machine could not be read (it has no python3), so `device` is None as well.
    """

    address: str
    server_version: str
    cpus: int
    memory: int
    disk: int
    disk_free: int
    data_root: str
    cgroup_driver: str
    cgroup_version: int
    security_options: tuple[str, ...]
    live_restore: bool
    kernel: str
    system: str
    boot: str = ""
    """The kernel's id of the machine's current boot: groups that were made by hand are gone with it."""
    systemd: int = 0
    controllers: frozenset[str] | None = None
    recursive_memory: bool = False
    device: Disk | None = None
    swap_limit: bool = True
    """The kernel counts swap, so that memory and swap together can have a ceiling."""
    scores: Mapping[str, int] = {}
    """OOM scores of the programs that have to outlive everything else."""
    measured: Mapping[str, Any] | None = None
    """What host/device.py measured of the disk, and when; None before the first deploy."""
    programs: frozenset[str] | None = None
    """Those of `settings.machine.PROGRAMS` that are installed; None: the machine could not be read."""
    connections: tuple[int, int] | None = None
    """How many the kernel tracks there, of all environments, and how many it can; None where it tracks none."""
    preemption: str = ""
    """How the kernel's own work is interrupted, see `settings.machine.preemption`."""
    folders: Mapping[str, Place] = {}
    """Those that were asked for."""

    @property
    def io(self) -> Literal["iocost", "bfq", "throttle", ""]:
        """How IO can be divided there: by weights, by ceilings on best-effort, or not at all.

        On cgroup v1 a ceiling does not reach the groups below its own, where the containers are. `host/keep.py` writes
        theirs, but the groups of units are systemd's.
        """
        controller = "io" if self.cgroup_version == 2 else "blkio"
        if self.device is None or controller not in (self.controllers or ()):
            return ""
        return self.device.weights or ("" if self.ceilings_stop_at_units else "throttle")

    @property
    def ceilings_stop_at_units(self) -> bool:
        """Ceilings on IO would hold for nothing in a slice: units on cgroup v1."""
        return self.cgroup_version == 1 and self.cgroup_driver == "systemd"

    @property
    def cpu_idle(self) -> bool:
        """A whole cgroup can be of the idle class: `cpu.idle` is in Linux since 5.15, `CPUWeight=idle` in systemd
        since 252."""
        kernel = tuple(int(part) for part in re.findall(r"\d+", self.kernel)[:2])
        return kernel >= (5, 15) and (self.cgroup_driver != "systemd" or self.systemd >= 252)

    @property
    def local(self) -> bool:
        """The engine runs on this machine, so its files under /sys and /proc can be read."""
        return self.address.startswith("unix://")

    def capacity(self) -> dict[str, float | int]:
        """What `LedgerSettings.resolve` asks for: CPUs, and bytes of memory and disk."""
        return {"cpus": self.cpus, "memory": self.memory, "disk": self.disk}


def address(host: str | None) -> str:
    """The engine's address: the ledger's `bulkhead:host`, else DOCKER_HOST, else the local socket."""
    return host or os.environ.get("DOCKER_HOST") or DEFAULT_HOST


def facts(docker_host: str | None = None, folders: Sequence[str] = ()) -> HostFacts:
    """Ask the engine at `address(docker_host)`; at most 2 s to connect and 10 s for an answer (15 and 60 s over ssh).

    `folders`: of its machine, to be looked at too.
    SettingsError with the next step if it does not answer, or is reached in a way that is not supported.
    """
    url = address(docker_host)
    ask = {"unix": _ask_socket, "ssh": _ask_ssh}.get(urlsplit(url).scheme)
    if ask is None:
        raise _error(
            url,
            "only unix:// and ssh:// addresses are supported, since host commands run there too",
            "Use ssh://user@machine for an engine elsewhere.",
        )
    try:
        info, (disk, disk_free), boot, read = ask(url, folders)
        return HostFacts(
            address=url,
            server_version=info["ServerVersion"],
            cpus=info["NCPU"],
            memory=info["MemTotal"],
            disk=disk,
            disk_free=disk_free,
            data_root=info["DockerRootDir"],
            cgroup_driver=info["CgroupDriver"],
            cgroup_version=int(info.get("CgroupVersion") or 1),
            security_options=tuple(info.get("SecurityOptions") or ()),
            live_restore=bool(info.get("LiveRestoreEnabled")),
            kernel=info["KernelVersion"],
            system=info["OperatingSystem"],
            boot=boot,
            systemd=read.get("systemd", 0),
            controllers=read.get("controllers"),
            recursive_memory=read.get("recursive_memory", False),
            device=read.get("disk"),
            swap_limit=bool(info.get("SwapLimit")),
            scores=read.get("scores", {}),
            measured=read.get("measured"),
            programs=read.get("programs"),
            connections=read.get("connections"),
            preemption=read.get("preemption", ""),
            folders=read.get("folders", {}),
        )
    except (KeyError, TypeError, ValueError):
        raise _error(url, "what answers there is not a Docker engine", "Stop it, or name another.") from None


Answer = tuple[Mapping[str, Any], tuple[int, int], str, Mapping[str, Any]]
"""What the engine says of itself; size and free bytes below its data root; the id of the machine's boot; what
`settings.machine` reads there (empty where there is no python3)."""


def _ask_socket(url: str, folders: Sequence[str]) -> Answer:
    path = url.removeprefix("unix://")
    start = "Run `make up` (or `make engine-start`), which starts it."
    try:
        # docker-py knows one time limit only: a socket that accepts nobody is found out here.
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
            probe.settimeout(CONNECT_SECONDS)
            probe.connect(path)
        client = docker.APIClient(base_url=url, version="auto", timeout=ANSWER_SECONDS)
        try:
            info = client.info()
        finally:
            client.close()
    except PermissionError:
        group = "Run as root, or join the group: sudo usermod -aG docker $USER, then log in again."
        raise _error(url, "this user may not talk to the engine", group) from None
    except (OSError, DockerException, RequestException) as error:
        raise _error(url, f"the Docker engine does not answer ({error})", start) from None
    data_root = Path(info["DockerRootDir"])
    usage = shutil.disk_usage(machine.existing(data_root))
    return info, (usage.total, usage.free), BOOT_ID.read_text().strip(), machine.read(data_root, map(Path, folders))


def _ask_ssh(url: str, folders: Sequence[str]) -> Answer:
    # One connection for all of it: its handshake takes longer than the rest.
    root = '"$(docker info --format "{{.DockerRootDir}}")"'
    df = f"df --block-size=1 --output=size,avail {root}"
    read = f"python3 - {root} {shlex.join(folders)} || echo null"  # doctor says what is missing there
    asked = _ssh(
        url,
        f"docker info --format '{{{{json .}}}}' && {df} && cat {BOOT_ID} && {{ {read}; }}",
        Path(machine.__file__).read_text(),
    )
    info, end = json.JSONDecoder().raw_decode(asked)
    if info.get("ServerErrors"):
        raise _error(url, "; ".join(info["ServerErrors"]), "Start Docker there, and allow this user to use it.")
    _, blocks, boot, read_there = asked[end:].strip().split("\n")
    total, free = blocks.split()
    return info, (int(total), int(free)), boot.strip(), json.loads(read_there) or {}


def _ssh(url: str, command: str, stdin: str) -> str:
    try:
        asked = subprocess.run(
            ssh.command(url, command),
            input=stdin,
            capture_output=True,
            text=True,
            timeout=REMOTE_SECONDS,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise _error(url, str(error), f"See that this works: ssh {url} docker info") from None
    if asked.returncode:
        problem = asked.stderr.strip() or f"ssh ended with code {asked.returncode}"
        raise _error(url, problem, f"See that this works: ssh {url} docker info")
    return asked.stdout


@contextmanager
def engine(docker_host: str | None = None, seconds: int = ANSWER_SECONDS) -> Iterator[docker.DockerClient]:
    """A client of the engine at `address(docker_host)`, also of one on another machine; `seconds` for each answer.

    DockerException, RequestException or OSError when it does not answer (`NO_ANSWER`).
    """
    url = address(docker_host)
    if ssh.is_remote(url):
        with ssh.engine_socket(url) as forwarded, engine(forwarded, seconds + REMOTE_SECONDS) as client:
            yield client
        return
    client = docker.DockerClient(base_url=url, version="auto", timeout=seconds)
    try:
        yield client
    finally:
        client.close()


NO_ANSWER = (DockerException, RequestException, OSError)


def _error(url: str, problem: str, remedy: str) -> SettingsError:
    return SettingsError(file="Docker engine", key="address", value=url, problem=problem, remedy=remedy)


class Ended(Frozen):
    """A container that was stopped: what its healthcheck and its log said last."""

    name: str
    health: str
    log: str


def stop_failed(name: str, docker_host: str | None = None) -> Ended | None:
    """Stops a container that did not become healthy, so that no name of a service leads to it any more.

    None if it is not there, or the engine does not answer.
    """
    try:
        with engine(docker_host, REGISTRY_SECONDS) as client:
            container = client.containers.get(name)
            checks = (container.attrs["State"].get("Health") or {}).get("Log") or [{}]
            log = container.logs(tail=LOG_LINES).decode(errors="replace")
            container.stop()
    except NO_ANSWER:
        return None
    return Ended(name=name, health=str(checks[-1].get("Output", "")).strip(), log=log.strip())


def foreign_volumes(names: Sequence[str], labels: Mapping[str, str], docker_host: str | None = None) -> list[str]:
    """Of these volumes, those that the engine has already, without the labels that would make them ours.

    Empty when the engine does not answer, as with `missing_images`.
    """
    if not names:
        return []
    try:
        with engine(docker_host) as client:
            there = {volume.name: volume.attrs.get("Labels") or {} for volume in client.volumes.list()}
    except NO_ANSWER:
        return []
    return [name for name in names if name in there and not labels.items() <= there[name].items()]


def stop_departed(
    labels: Mapping[str, str],
    kept: Collection[str],
    volumes: Collection[str],
    ports: Collection[int],
    docker_host: str | None = None,
) -> list[str]:
    """Stops containers with `labels` of services that are not `kept`, where they hold one of the volumes or ports.

    Returns their names. Raises `SettingsError` when the engine cannot be asked.
    """
    stopped = []
    try:
        with engine(docker_host, STOP_SECONDS) as client:
            for container in client.containers.list(filters={"label": [f"{key}={one}" for key, one in labels.items()]}):
                held = {mount.get("Name") for mount in container.attrs["Mounts"] if mount.get("RW")} & set(volumes)
                bound = {
                    int(one["HostPort"])
                    for found in (container.attrs["HostConfig"].get("PortBindings") or {}).values()
                    for one in found or ()
                    if one.get("HostPort")
                } & set(ports)
                if container.labels.get(SERVICE_LABEL) not in kept and (held or bound):
                    container.stop(timeout=container.attrs["Config"].get("StopTimeout") or 10)
                    stopped.append(str(container.name))
    except NO_ANSWER as error:
        problem = f"what holds the volumes cannot be asked ({error})"
        raise _error(address(docker_host), problem, "Run `make doctor`.") from None
    return stopped


def missing_images(images: Sequence[str], docker_host: str | None = None) -> dict[str, str]:
    """Of these image references, those that neither the engine nor its registry has, with the registry's reason.

    Empty when the engine does not answer: a preview may run where it cannot be reached, and `up` will say so.
    """
    missing: dict[str, str] = {}
    if not images:
        return missing
    try:
        with engine(docker_host, REGISTRY_SECONDS) as client:
            for image in images:
                try:
                    client.images.get(image)
                except ImageNotFound:
                    try:
                        client.images.get_registry_data(image)
                    except (DockerException, RequestException) as error:
                        missing[image] = getattr(error, "explanation", None) or str(error)
    except NO_ANSWER:
        return {}
    return missing
