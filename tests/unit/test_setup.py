"""Set-up: what is missing, what is said, and the Docker engine that a killed one must not keep from starting.
A stand-in `dockerd` in a temporary folder plays the engine; nothing here touches the machine's own."""

import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from engine import dockerd, setup
from engine.dockerd import EngineError, Places
from engine.setup import Machine, Pip, SetupError, Step

DEAD = 2**22 + 1  # above the kernel's highest pid

STAND_IN = """\
#!/bin/bash
exec -a dockerd {python} -c '
import http.server, json, socket, time
class Server(http.server.HTTPServer):
    address_family = socket.AF_UNIX
    def server_bind(self): self.socket.bind(self.server_address)
class Engine(http.server.BaseHTTPRequestHandler):
    def address_string(self): return ""
    def do_GET(self):
        about = json.dumps(dict(Version="1.2.3", Components=[dict(Name="Engine")])).encode()
        body = b"OK" if self.path == "/_ping" else about
        self.send_response(200); self.send_header("Content-Length", str(len(body))); self.end_headers()
        self.wfile.write(body)
server = Server("{socket}", Engine)
time.sleep({restoring})
server.serve_forever()
' "$@"
"""


@pytest.fixture
def places(tmp_path: Path) -> Places:
    return Places(
        own=tmp_path / "own",
        socket=tmp_path / "docker.sock",
        pid_file=tmp_path / "docker.pid",
        exec_root=tmp_path / "exec",
        data_root=tmp_path / "data",
        options=(f"--data-root={tmp_path / 'data'}",),
    )


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    return folder


def write_program(file: Path, text: str) -> None:
    file.write_text(text)
    file.chmod(0o755)


@pytest.fixture
def stand_in(path: Path, places: Places) -> Iterator[Places]:
    write_program(path / "dockerd", STAND_IN.format(python=sys.executable, socket=places.socket, restoring=0))
    yield places
    dockerd.stop(places, lambda _: None)


class Server(HTTPServer):
    address_family = socket.AF_UNIX

    def server_bind(self) -> None:
        self.socket.bind(self.server_address)


def answering(file: Path, ping: bytes, version: bytes) -> Server:
    class Handler(BaseHTTPRequestHandler):
        def address_string(self) -> str:
            return ""

        def log_message(self, format: str, *args: object) -> None:
            pass

        def do_GET(self) -> None:
            body = ping if self.path == "/_ping" else version
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    server = Server(str(file), Handler)  # type: ignore[arg-type]
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server


# What answers at a socket.


def test_no_socket_and_a_socket_nobody_listens_on_are_no_engine(places: Places) -> None:
    assert dockerd.version(places.socket) is None
    leave_socket(places.socket)
    assert dockerd.version(places.socket) is None


@pytest.mark.parametrize(
    ("ping", "version"),
    [
        (b"nope", b"{}"),
        (b"OK", b'{"Version": "5.0", "Components": [{"Name": "Podman Engine"}]}'),
        (b"OK", b"<html>"),
        (b"OK", b"[]"),
    ],
)
def test_what_answers_but_is_no_docker_engine_is_an_error(places: Places, ping: bytes, version: bytes) -> None:
    with answering(places.socket, ping, version) as server:
        with pytest.raises(EngineError, match=r"is not a Docker engine.*DOCKER_HOST"):
            dockerd.version(places.socket)
        server.shutdown()


def test_a_silent_listener_is_an_error_and_no_second_engine_is_started(
    stand_in: Places, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dockerd, "CONNECT_SECONDS", 0.1)
    with socket.socket(socket.AF_UNIX) as silent:
        silent.bind(str(stand_in.socket))
        silent.listen()
        with pytest.raises(EngineError, match="gives no answer"):
            dockerd.start(stand_in, lambda _: None)
    assert not stand_in.own_pid.exists()
    assert dockerd.engines(stand_in.data_root) == []


# What a killed engine leaves behind.


def leave_socket(file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind(str(file))


@pytest.mark.parametrize(
    "pid", [str(DEAD), str(os.getpid()), "", "not a number"], ids=["dead", "another program's", "empty", "no number"]
)
def test_a_pid_file_of_no_living_engine_is_left_over(places: Places, pid: str) -> None:
    places.pid_file.write_text(pid)
    containerd = places.exec_root / "containerd" / "containerd.pid"
    containerd.parent.mkdir(parents=True)
    containerd.write_text(pid)
    assert dockerd.leftovers(places) == [places.pid_file, containerd]


def test_sockets_are_left_over_only_if_nobody_listens(places: Places) -> None:
    folder = places.exec_root / "containerd"
    leave_socket(places.socket)
    leave_socket(folder / "containerd.sock")
    assert dockerd.leftovers(places) == [places.socket, folder / "containerd.sock"]
    (folder / "containerd.sock").unlink()
    with socket.socket(socket.AF_UNIX) as alive:
        alive.bind(str(folder / "containerd.sock"))
        alive.listen()
        assert dockerd.leftovers(places) == [places.socket]


def test_nothing_is_left_over_where_no_engine_ran(places: Places) -> None:
    assert dockerd.leftovers(places) == []


def test_start_clears_what_a_killed_engine_left_and_says_so(stand_in: Places) -> None:
    stand_in.pid_file.write_text(str(DEAD))
    leave_socket(stand_in.socket)
    said: list[str] = []
    dockerd.start(stand_in, said.append)
    assert dockerd.version(stand_in.socket) == "1.2.3"
    assert any(str(stand_in.pid_file) in line for line in said)
    assert not stand_in.pid_file.exists()


def test_start_after_a_kill_works_again(stand_in: Places) -> None:
    dockerd.start(stand_in, lambda _: None)
    (pid,) = dockerd.engines(stand_in.data_root)
    os.kill(pid, 9)
    os.waitpid(pid, 0)
    dockerd.start(stand_in, lambda _: None)
    assert dockerd.version(stand_in.socket) == "1.2.3"


def test_an_engine_that_listens_before_it_answers_is_given_time(
    stand_in: Places, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dockerd, "CONNECT_SECONDS", 0.1)
    write_program(path / "dockerd", STAND_IN.format(python=sys.executable, socket=stand_in.socket, restoring=0.8))
    dockerd.start(stand_in, lambda _: None)
    assert dockerd.version(stand_in.socket) == "1.2.3"


def test_a_folder_in_the_socket_s_place_is_explained(stand_in: Places) -> None:
    stand_in.socket.mkdir()
    with pytest.raises(EngineError, match="rmdir"):
        dockerd.start(stand_in, lambda _: None)


# Start and stop.


def test_start_twice_is_one_engine_in_a_session_of_its_own(stand_in: Places) -> None:
    dockerd.start(stand_in, lambda _: None)
    dockerd.start(stand_in, lambda _: None)
    (pid,) = dockerd.engines(stand_in.data_root)
    assert stand_in.own_pid.read_text() == f"{pid}\n"
    assert os.getsid(pid) == pid  # so it outlives the terminal and make


def test_an_engine_that_is_starting_is_waited_for(stand_in: Places) -> None:
    dockerd.start(stand_in, lambda _: None)
    (pid,) = dockerd.engines(stand_in.data_root)
    hidden = stand_in.socket.rename(stand_in.socket.with_suffix(".hidden"))
    threading.Timer(0.3, lambda: hidden.rename(stand_in.socket)).start()
    said: list[str] = []
    dockerd.start(stand_in, said.append)
    assert dockerd.engines(stand_in.data_root) == [pid]
    assert "waiting" in said[0]


def test_an_engine_that_fails_shows_the_end_of_its_log_and_leaves_nothing(path: Path, places: Places) -> None:
    write_program(path / "dockerd", "#!/bin/sh\necho 'iptables: no such chain' >&2\nexit 1\n")
    with pytest.raises(EngineError, match=r"ended while starting(.|\n)*iptables: no such chain"):
        dockerd.start(places, lambda _: None)
    assert not places.own_pid.exists()


def test_an_engine_that_never_answers_is_ended_after_the_time_limit(
    path: Path, places: Places, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dockerd, "START_SECONDS", 0.5)
    write_program(path / "dockerd", "#!/bin/bash\nexec -a dockerd sleep 60\n")
    started = time.monotonic()
    with pytest.raises(EngineError, match="does not answer after"):
        dockerd.start(places, lambda _: None)
    assert time.monotonic() - started < 5
    assert not places.own_pid.exists()


def test_stop_ends_the_engine_that_was_started(stand_in: Places) -> None:
    dockerd.start(stand_in, lambda _: None)
    (pid,) = dockerd.engines(stand_in.data_root)
    dockerd.stop(stand_in, lambda _: None)
    assert dockerd.program(pid) == ""
    assert not stand_in.own_pid.exists()


def test_stop_leaves_a_process_alone_that_is_no_engine(places: Places) -> None:
    places.own.mkdir()
    with subprocess.Popen(["sleep", "60"]) as other:
        places.own_pid.write_text(str(other.pid))
        said: list[str] = []
        dockerd.stop(places, said.append)
        assert other.poll() is None
        other.kill()
    assert "nothing to stop" in said[0]


# The machine, as variables and ledger describe it.


@pytest.mark.parametrize(
    ("ledger", "variables", "host"),
    [
        ("", {}, "unix:///var/run/docker.sock"),
        ("", {"DOCKER_HOST": "unix:///tmp/d.sock"}, "unix:///tmp/d.sock"),
        ("config:\n  bulkhead:host: ssh://me@box # there\n", {"DOCKER_HOST": "unix:///x"}, "ssh://me@box"),
        ('config:\n  "bulkhead:host": "ssh://me@box"\n', {}, "ssh://me@box"),
        ("config:\n  # bulkhead:host: ssh://me@box\n", {}, "unix:///var/run/docker.sock"),
    ],
)
def test_docker_host_is_the_ledger_s_then_the_user_s_then_local(
    tmp_path: Path, ledger: str, variables: dict[str, str], host: str
) -> None:
    (tmp_path / "Pulumi.host.yaml").write_text(ledger)
    assert setup.machine(tmp_path, {"HOME": "/home/u", **variables}).docker_host == host


def test_xdg_folders_are_respected(tmp_path: Path) -> None:
    here = setup.machine(tmp_path, {"HOME": "/home/u", "XDG_CACHE_HOME": "/c", "XDG_STATE_HOME": "/s"})
    assert (here.cache, here.state) == (Path("/c/bulkhead"), Path("/s/bulkhead"))


def at(root: Path, host: str = "unix:///var/run/docker.sock") -> Machine:
    return Machine(root=root, cache=root / "cache", state=root / "state", docker_host=host)


def test_an_engine_elsewhere_is_never_installed_or_started(tmp_path: Path) -> None:
    with pytest.raises(SetupError, match=r"unset that to use"):
        setup.docker_install(at(tmp_path, f"unix://{tmp_path}/none.sock"))


def test_services_outlive_a_restart_of_the_engine_and_a_users_own_settings_are_kept(tmp_path: Path) -> None:
    places = Places(own=tmp_path, settings=tmp_path / "docker" / "daemon.json")
    said: list[str] = []
    dockerd.keep_containers(places, said.append)
    assert json.loads(places.settings.read_text()) == {"live-restore": True}
    assert "live-restore" in said[0]
    places.settings.write_text("{}")
    dockerd.keep_containers(places, said.append)
    assert places.settings.read_text() == "{}"
    assert len(said) == 1


def test_a_silent_remote_engine_is_explained(tmp_path: Path, path: Path) -> None:
    write_program(path / "ssh", "#!/bin/sh\necho 'connection refused' >&2\nexit 1\n")
    with pytest.raises(SetupError, match=r"connection refused(.|\n)*Nothing is installed on another machine"):
        setup.docker_missing(at(tmp_path, "ssh://me@box"))
    write_program(path / "ssh", "#!/bin/sh\nexit 0\n")
    assert setup.docker_missing(at(tmp_path, "ssh://me@box")) is None


def test_an_engine_over_tcp_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SetupError, match=r"only unix:// and ssh://"):
        setup.docker_missing(at(tmp_path, "tcp://box:2375"))


# Steps.


def test_a_step_says_what_it_installs_before_it_does_and_nothing_the_second_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    there: list[bool] = []

    def missing(_: Machine) -> str | None:
        return None if there else "2 things"

    def install(_: Machine) -> None:
        events.append("installed")
        there.append(True)

    monkeypatch.setattr(setup, "STEPS", {"one": Step("One", missing, install)})
    monkeypatch.setattr(setup, "say", events.append)
    for _ in range(2):
        setup.set_up(["one"], at(tmp_path))
    assert events == ["One: 2 things", "installed"]


def test_pip_runs_again_only_if_its_file_changed_or_the_checkout_moved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[list[object]] = []
    monkeypatch.setattr(setup, "run", lambda command, _: calls.append(command))
    monkeypatch.setattr(setup, "need_space", lambda *_: None)
    root = tmp_path / "checkout"
    (root / ".venv" / "bin").mkdir(parents=True)
    (root / ".venv" / "bin" / "python").touch()
    (root / "requirements.txt").write_text("a==1\n")
    pip = Pip("packages", "requirements.txt", ("--requirement",))
    assert "requirements.txt" in (pip.missing(at(root)) or "")
    pip.install(at(root))
    assert calls[0][-2:] == ["--requirement", f"{root}/requirements.txt"]
    assert pip.missing(at(root)) is None
    (root / "requirements.txt").write_text("a==2\n")
    assert pip.missing(at(root))
    pip.install(at(root))
    moved = root.rename(tmp_path / "moved")
    assert pip.missing(at(moved))


def test_a_failed_pip_run_is_repeated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise SetupError("no network")

    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    (tmp_path / ".venv" / "bin" / "python").touch()
    pip = Pip("packages", "requirements.txt", ("--requirement",))
    monkeypatch.setattr(setup, "run", fail)
    with pytest.raises(SetupError):
        pip.install(at(tmp_path))
    assert pip.missing(at(tmp_path))


def test_a_virtual_environment_is_whole_or_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def half(command: list[object], what: str) -> None:
        (tmp_path / ".venv" / "bin").mkdir(parents=True)
        raise SetupError("cut off")

    monkeypatch.setattr(setup, "run", half)
    with pytest.raises(SetupError):
        setup.make_venv(at(tmp_path))
    assert not (tmp_path / ".venv").exists()


@pytest.mark.parametrize(
    ("tool", "user", "message"),
    [
        (None, 0, "not a Debian machine"),
        ("/usr/bin/apt-get", 1000, "sudo apt-get install docker.io"),
    ],
)
def test_no_debian_and_no_root_name_the_next_step(
    monkeypatch: pytest.MonkeyPatch, tool: str | None, user: int, message: str
) -> None:
    monkeypatch.setattr(shutil, "which", lambda *_, **__: tool)
    monkeypatch.setattr(os, "geteuid", lambda: user)
    with pytest.raises(SetupError, match=message):
        setup.apt_install("docker.io")


def test_no_disk_names_folder_needed_and_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=2**30)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(SetupError, match=r"needs 2.0 GiB in .* 1.0 GiB are free"):
        setup.need_space(tmp_path / "not" / "yet", 2 * 2**30, "It")


@pytest.mark.parametrize(
    ("output", "next_step"),
    [
        ("OSError: [Errno 28] No space left on device", "disk is full"),
        ("SSLError CERTIFICATE_VERIFY_FAILED No matching distribution found", "PIP_CERT"),
        ("Temporary failure in name resolution", "check the network"),
        ("SyntaxError", "See the lines above"),
    ],
)
def test_a_failed_command_shows_its_last_lines_and_the_next_step(output: str, next_step: str) -> None:
    with pytest.raises(SetupError) as failed:
        setup.run([sys.executable, "-c", f"print({output!r}); raise SystemExit(1)"], "It")
    assert output in str(failed.value)
    assert next_step in str(failed.value)


def test_pulumi_is_set_up_again_if_a_source_changed_or_a_tool_is_gone(tmp_path: Path, path: Path) -> None:
    here = at(tmp_path)
    (tmp_path / "engine" / "cli").mkdir(parents=True)
    (tmp_path / "engine" / "cli" / "go.mod").write_text("module cli\n")
    here.pulumi_home.mkdir(parents=True)
    for name in ("pulumi", "pulumi-language-python"):
        write_program(path / name, "#!/bin/sh\n")
    file, wanted = setup._pulumi_stamp(here)
    assert setup.pulumi_missing(here)
    file.write_text(wanted)
    assert setup.pulumi_missing(here) is None
    copy = tmp_path / "copy"
    shutil.copytree(tmp_path / "engine", copy / "engine")
    (copy / ".bulkhead").symlink_to(tmp_path / ".bulkhead")
    assert setup.pulumi_missing(at(copy)) is None
    (tmp_path / "engine" / "cli" / "go.mod").write_text("module other\n")
    assert setup.pulumi_missing(here)


# The base image.


def test_the_base_image_is_needed_only_if_a_dockerfile_of_a_listed_project_starts_from_it(tmp_path: Path) -> None:
    shop = tmp_path / "examples" / "shop"
    (shop / "api").mkdir(parents=True)
    (shop / "api" / "Dockerfile").write_text("# FROM debian:bookworm-slim\nFROM scratch\n")
    (tmp_path / "Pulumi.prod.yaml").write_text("config:\n  bulkhead:compose: [examples/shop/compose.yaml]\n")
    assert not setup.uses_base_image(tmp_path)
    (shop / "api" / "Dockerfile").write_text("FROM debian:bookworm-slim AS build\n")
    assert setup.uses_base_image(tmp_path)
    (tmp_path / "Pulumi.prod.yaml").unlink()
    assert not setup.uses_base_image(tmp_path)


# The command line.


def test_an_unknown_command_shows_the_known_ones(capsys: pytest.CaptureFixture[str]) -> None:
    assert setup.main(["nope"]) == 2
    assert "engine-start" in capsys.readouterr().err


def test_errors_end_with_exit_code_1_and_one_message(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object) -> None:
        raise SetupError("No. Next step: do it.")

    monkeypatch.setattr(setup, "set_up", fail)
    assert setup.main(["up"]) == 1
    assert capsys.readouterr().err == "Set-up stopped: No. Next step: do it.\n"


def test_every_command_s_steps_exist() -> None:
    assert {step for steps in setup.COMMANDS.values() for step in steps} <= setup.STEPS.keys()
