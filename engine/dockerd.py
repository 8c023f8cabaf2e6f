"""The Docker engine of this machine: does one answer, what did a killed one leave, start and stop it by hand.
Standard library only. It never starts a second engine, and never stops one that it did not start."""

from __future__ import annotations

import fcntl
import http.client
import json
import os
import shutil
import signal
import socket
import stat
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

CONNECT_SECONDS = 2.0
START_SECONDS = 120.0  # an engine with hundreds of containers restores them before it answers
STOP_SECONDS = 40.0  # dockerd gives containers 15 s to stop before it kills them
FIREWALL = Path("/etc/bulkhead/firewall.nft")  # written by components.firewall
LOG_LINES = 15  # of the engine's log, shown when it does not start

Say = Callable[[str], None]


class EngineError(Exception):
    """The engine cannot be used or started; the text names the cause and the next step."""


class SilentError(EngineError):
    """Something listens, but does not answer in time: an engine listens before it has restored its containers."""


@dataclass(frozen=True)
class Places:
    """Where an engine keeps what. The defaults are dockerd's own; tests and private engines pass others.

    `own` is Bulkhead's folder for the pid and the log of an engine that it started; `options` go to dockerd.
    """

    own: Path
    socket: Path = Path("/var/run/docker.sock")
    pid_file: Path = Path("/var/run/docker.pid")
    exec_root: Path = Path("/var/run/docker")
    data_root: Path = Path("/var/lib/docker")
    settings: Path = Path("/etc/docker/daemon.json")
    options: tuple[str, ...] = ()

    @property
    def own_pid(self) -> Path:
        return self.own / "dockerd.pid"

    @property
    def log(self) -> Path:
        return self.own / "dockerd.log"


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: Path) -> None:
        super().__init__("localhost", timeout=CONNECT_SECONDS)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(str(self._path))


def get(path: Path, resource: str) -> tuple[int, bytes]:
    """Status and body of `GET resource` over the unix socket at `path`. OSError or HTTPException if that fails."""
    connection = _UnixConnection(path)
    try:
        connection.request("GET", resource)
        answer = connection.getresponse()
        return answer.status, answer.read()
    finally:
        connection.close()


def version(path: Path) -> str | None:
    """Version of the Docker engine answering at the socket; None where nothing listens.

    SilentError if nothing is answered in time, EngineError if it is not a Docker engine or may not be asked.
    """
    try:
        status, body = get(path, "/_ping")
        if (status, body) == (200, b"OK"):
            status, body = get(path, "/version")
            about = json.loads(body)
            names = [part.get("Name") for part in about.get("Components", [])]
            if status == 200 and "Engine" in names:
                return str(about["Version"])
    except PermissionError:
        raise EngineError(
            f"{path}: this user may not talk to the Docker engine. "
            "Run as root, or join the group: sudo usermod -aG docker $USER, then log in again."
        ) from None
    except (FileNotFoundError, ConnectionRefusedError):
        return None
    except TimeoutError:
        raise SilentError(
            f"{path}: something listens but gives no answer within {CONNECT_SECONDS:g} s. "
            "See what holds it with: ss -xlp | grep docker.sock, and restart it."
        ) from None
    except (OSError, http.client.HTTPException, ValueError, AttributeError, KeyError):
        pass
    raise EngineError(
        f"{path}: what answers here is not a Docker engine. See what listens with: ss -xlp | grep {path.name}, "
        "stop it, or point DOCKER_HOST at the engine to use."
    )


def answers(path: Path) -> bool:
    """Whether a Docker engine answers at the socket by now. EngineError as in `version`, but not for a silent one."""
    try:
        return version(path) is not None
    except SilentError:
        return False


def program(pid: int) -> str:
    """Name of the running program of `pid`, from its command line; "" if there is none (or a zombie)."""
    try:
        first = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0", 1)[0]
    except OSError:
        return ""
    return Path(os.fsdecode(first)).name


def _pid_in(file: Path) -> int | None:
    try:
        return int(file.read_text().strip())
    except (OSError, ValueError):
        return None


def runs(file: Path, name: str) -> int | None:
    """The pid in `file` if that process is alive and is `name`: a pid of a killed engine may be reused by another."""
    pid = _pid_in(file)
    return pid if pid is not None and program(pid) == name else None


def engines(data_root: Path) -> list[int]:
    """Pids of every dockerd on this machine (not of those inside containers) that uses `data_root`."""
    here = _pid_namespace("self")
    pids = (int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit())
    return [
        pid
        for pid in pids
        if program(pid) == "dockerd" and _pid_namespace(pid) == here and _data_root(pid) == data_root
    ]


def _pid_namespace(pid: int | str) -> str:
    try:
        return str(Path(f"/proc/{pid}/ns/pid").readlink())
    except OSError:
        return ""


def _data_root(pid: int) -> Path:
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().decode().split("\0")
    except OSError:
        return Path()
    for word, after in zip(words, [*words[1:], ""], strict=True):
        if word.startswith(("--data-root=", "-g=")):
            return Path(word.split("=", 1)[1])
        if word in {"--data-root", "-g"}:
            return Path(after)
    return Path("/var/lib/docker")


def leftovers(places: Places) -> list[Path]:
    """What a killed engine left that would stop the next one: pid files of the dead, sockets nobody listens on."""
    containerd = places.exec_root / "containerd"
    stale = [
        file
        for file, name in ((places.pid_file, "dockerd"), (containerd / "containerd.pid", "containerd"))
        if file.exists() and runs(file, name) is None
    ]
    sockets = [places.socket, *sorted(containerd.glob("*.sock*"))]
    return stale + [file for file in sockets if _is_socket(file) and not _listened(file)]


def _is_socket(file: Path) -> bool:
    try:
        return stat.S_ISSOCK(file.stat().st_mode)
    except OSError:
        return False


def _listened(file: Path) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(CONNECT_SECONDS)
        try:
            probe.connect(str(file))
        except ConnectionRefusedError:
            return False
        except OSError:
            pass
    return True


def keep_containers(places: Places, say: Say) -> None:
    """Turns live-restore on, unless the user has settings of their own.

    Without it an engine that comes back after a crash first stops the containers that it finds running, takes that
    for a wish of the user's (moby: HasBeenManuallyStopped), and leaves `restart: unless-stopped` services stopped.
    """
    if not places.settings.exists():
        say(f"Writing {places.settings}: live-restore, so that services outlive a restart of the engine")
        places.settings.parent.mkdir(parents=True, exist_ok=True)
        places.settings.write_text('{"live-restore": true}\n')


def start(places: Places, say: Say) -> None:
    """Start dockerd by hand and wait until it answers; nothing to do if one answers already.

    It outlives the caller (own session, output to a log). EngineError with the end of the log if it does not come up.
    """
    places.own.mkdir(parents=True, exist_ok=True, mode=0o700)
    with _alone(places.own / "lock"):
        if answers(places.socket):
            return
        running = engines(places.data_root)
        if running:
            say(f"A Docker engine is running (pid {running[0]}) but does not answer yet: waiting for it")
            _await(places, lambda: program(running[0]) == "dockerd")
            return
        version(places.socket)  # raises if something else than an engine of ours holds the socket
        if places.socket.is_dir():
            raise EngineError(
                f"{places.socket} is a folder (a container once bound a socket that was not there). "
                f"Remove it: rmdir {places.socket}"
            )
        for file in leftovers(places):
            say(f"Removing {file}: left behind by an engine that was killed")
            file.unlink(missing_ok=True)
        shut(say)
        child = _spawn(places)
        places.own_pid.write_text(f"{child.pid}\n")
        try:
            _await(places, lambda: child.poll() is None)
        except EngineError:
            _end(child.pid, lambda: child.poll() is None)
            places.own_pid.unlink(missing_ok=True)
            raise


@contextmanager
def _alone(lock: Path) -> Iterator[None]:
    """Two set-ups at the same time must not start two engines."""
    with lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def shut(say: Say, file: Path = FIREWALL) -> None:
    """Loads the firewall that the last deploy wrote, before the first container starts, as systemd does elsewhere."""
    if not file.is_file():
        return
    loaded = subprocess.run(["nft", "--file", str(file)], capture_output=True, text=True, check=False)
    if loaded.returncode:
        # Prod goes on without it rather than not at all; the agent reports it every minute.
        say(f"THE FIREWALL IS NOT LOADED ({loaded.stderr.strip()}). Next step: make up ENV=host, then make verify")


def _spawn(places: Places) -> subprocess.Popen[bytes]:
    dockerd = shutil.which("dockerd", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/local/sbin:/sbin")
    if dockerd is None:
        raise EngineError("dockerd is not installed. On Debian: apt-get install docker.io")
    # dockerd looks for containerd, runc and iptables on PATH, and the latter is in sbin.
    environment = os.environ | {"PATH": f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"}
    with places.log.open("ab") as log:
        return subprocess.Popen(
            [dockerd, *places.options],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            cwd="/",
            env=environment,
            start_new_session=True,
        )


def _await(places: Places, alive: Callable[[], bool]) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        if answers(places.socket):
            return
        if not alive():
            raise EngineError(f"The Docker engine ended while starting. {_log_end(places.log)}")
        time.sleep(0.2)
    raise EngineError(f"The Docker engine does not answer after {START_SECONDS:g} s. {_log_end(places.log)}")


def _log_end(log: Path) -> str:
    try:
        lines: Sequence[str] = log.read_text(errors="replace").splitlines()[-LOG_LINES:]
    except OSError:
        lines = ()
    return "\n".join([f"The end of {log}:", *(f"  {line}" for line in lines)])


def stop(places: Places, say: Say) -> None:
    """Stop the engine that `start` started, and no other. EngineError if it will not end.

    Containers go on where its settings have live-restore, else they stop with it.
    """
    pid = runs(places.own_pid, "dockerd")
    if pid is None:
        places.own_pid.unlink(missing_ok=True)
        say("No Docker engine that Bulkhead started is running: nothing to stop")
        return
    say(f"Stopping the Docker engine (pid {pid})")
    if not _end(pid, lambda: program(pid) == "dockerd"):
        raise EngineError(f"dockerd (pid {pid}) does not end within {STOP_SECONDS:g} s. See {places.log}")
    places.own_pid.unlink(missing_ok=True)


def _end(pid: int, alive: Callable[[], bool]) -> bool:
    """Ask the process to end and wait; True once it is gone."""
    deadline = time.monotonic() + STOP_SECONDS
    if alive():
        os.kill(pid, signal.SIGTERM)
    while alive() and time.monotonic() < deadline:
        time.sleep(0.1)
    return not alive()
