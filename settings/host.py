"""What the Docker engine says about its machine: the one place that asks it, for the ledger, `plan` and `doctor`.
A local engine is asked over its socket, an `ssh://` one through ssh and the Docker client installed there."""

import json
import os
import shutil
import socket
import subprocess
from collections.abc import Collection, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import docker
from docker.errors import DockerException, ImageNotFound
from requests.exceptions import RequestException

from settings.errors import Frozen, SettingsError

DEFAULT_HOST = "unix:///var/run/docker.sock"
CONNECT_SECONDS = 2
ANSWER_SECONDS = 10
REGISTRY_SECONDS = 30
STOP_SECONDS = 300  # longer than any grace period that a service may ask for
SERVICE_LABEL = "bulkhead.service"
LOG_LINES = 20


class HostFacts(Frozen):
    """The machine of an engine. `memory`, `disk`, `disk_free` in bytes, of the file system that holds `data_root`."""

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


def facts(docker_host: str | None = None) -> HostFacts:
    """Ask the engine at `address(docker_host)`; at most 2 s to connect and 10 s for an answer.

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
        info, (disk, disk_free) = ask(url)
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
        )
    except (KeyError, TypeError, ValueError):
        raise _error(url, "what answers there is not a Docker engine", "Stop it, or name another.") from None


def _ask_socket(url: str) -> tuple[Mapping[str, Any], tuple[int, int]]:
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
    usage = shutil.disk_usage(_existing(Path(info["DockerRootDir"])))
    return info, (usage.total, usage.free)


def _existing(folder: Path) -> Path:
    """The folder, or what stands above it: a user who is not root may not see Docker's own."""
    return next(path for path in (folder, *folder.parents) if os.access(path, os.F_OK))


def _ask_ssh(url: str) -> tuple[Mapping[str, Any], tuple[int, int]]:
    info = json.loads(_ssh(url, ["docker", "info", "--format", "'{{json .}}'"]))
    if info.get("ServerErrors"):
        raise _error(url, "; ".join(info["ServerErrors"]), "Start Docker there, and allow this user to use it.")
    blocks = _ssh(url, ["df", "--block-size=1", "--output=size,avail", info["DockerRootDir"]])
    total, free = blocks.split("\n")[1].split()
    return info, (int(total), int(free))


def _ssh(url: str, command: Sequence[str]) -> str:
    # BatchMode: a password prompt in the middle of a deploy would hang it.
    options = ["-o", "BatchMode=yes", "-o", f"ConnectTimeout={CONNECT_SECONDS}"]
    try:
        asked = subprocess.run(
            ["ssh", *options, url, "--", *command],
            capture_output=True,
            text=True,
            timeout=ANSWER_SECONDS,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise _error(url, str(error), f"See that this works: ssh {url} docker info") from None
    if asked.returncode:
        problem = asked.stderr.strip() or f"ssh ended with code {asked.returncode}"
        raise _error(url, problem, f"See that this works: ssh {url} docker info")
    return asked.stdout


def _error(url: str, problem: str, remedy: str) -> SettingsError:
    return SettingsError(file="Docker engine", key="address", value=url, problem=problem, remedy=remedy)


class Ended(Frozen):
    """A container that was stopped: what its healthcheck and its log said last."""

    name: str
    health: str
    log: str


def stop_failed(name: str, docker_host: str | None = None) -> Ended | None:
    """Stops a container that did not become healthy, so that no name of a service leads to it any more.

    None if it is not there, or the engine does not answer, or is on another machine (which has to be asked by hand).
    """
    url = address(docker_host)
    if not url.startswith("unix://"):
        return None
    try:
        with closing(docker.DockerClient(base_url=url, version="auto", timeout=REGISTRY_SECONDS)) as client:
            container = client.containers.get(name)
            checks = (container.attrs["State"].get("Health") or {}).get("Log") or [{}]
            log = container.logs(tail=LOG_LINES).decode(errors="replace")
            container.stop()
    except (DockerException, RequestException):
        return None
    return Ended(name=name, health=str(checks[-1].get("Output", "")).strip(), log=log.strip())


def foreign_volumes(names: Sequence[str], labels: Mapping[str, str], docker_host: str | None = None) -> list[str]:
    """Of these volumes, those that the engine has already, without the labels that would make them ours.

    Empty when the engine does not answer or is on another machine, as with `missing_images`.
    """
    url = address(docker_host)
    if not names or not url.startswith("unix://"):
        return []
    try:
        with closing(docker.DockerClient(base_url=url, version="auto", timeout=ANSWER_SECONDS)) as client:
            there = {volume.name: volume.attrs.get("Labels") or {} for volume in client.volumes.list()}
    except (DockerException, RequestException):
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

    Returns their names. Raises `SettingsError` when the engine of this machine cannot be asked.
    """
    url = address(docker_host)
    if not url.startswith("unix://"):
        return []
    stopped = []
    try:
        with closing(docker.DockerClient(base_url=url, version="auto", timeout=STOP_SECONDS)) as client:
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
    except (DockerException, RequestException) as error:
        raise _error(url, f"what holds the volumes cannot be asked ({error})", "Run `make doctor`.") from None
    return stopped


def missing_images(images: Sequence[str], docker_host: str | None = None) -> dict[str, str]:
    """Of these image references, those that neither the engine nor its registry has, with the registry's reason.

    Empty when the engine does not answer or is on another machine: a preview may run where it cannot be reached,
    and `up` will say so.
    """
    url = address(docker_host)
    if not url.startswith("unix://"):
        return {}
    try:
        client = docker.DockerClient(base_url=url, version="auto", timeout=REGISTRY_SECONDS)
    except (DockerException, RequestException):
        return {}
    missing = {}
    with closing(client):
        for image in images:
            try:
                client.images.get(image)
            except ImageNotFound:
                try:
                    client.images.get_registry_data(image)
                except (DockerException, RequestException) as error:
                    missing[image] = getattr(error, "explanation", None) or str(error)
    return missing
