"""The agent as it is shipped: one file that runs with Python's own library, a script that installs it and can be run
again, and one that takes it away."""

import ast
import io
import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from components import agent
from components.agent import EVERY_SECONDS, LARGEST_SCRIPT, NOT_ON_HOST, VERBS, install, remove, units, zipapp
from host.__main__ import VERBS as ALL_VERBS

ROOT = Path(__file__).parents[2]
SOURCES = ROOT / "host"
DECLARED = {"version": 1, "environments": {"dev": {"files": {"/sys/fs/cgroup/x": "it's $1 `x` \\n"}}}}


def test_the_program_is_the_same_bytes_each_time_and_however_the_sources_are_dated(tmp_path: Path) -> None:
    copy = tmp_path / "host"
    shutil.copytree(SOURCES, copy, copy_function=shutil.copyfile, ignore=shutil.ignore_patterns("__pycache__"))
    for file in copy.iterdir():
        file.chmod(0o600)
        os.utime(file, (0, 1_000_000_000))
    assert zipapp(copy) == zipapp(SOURCES)


@pytest.mark.parametrize("verb", ["", *ALL_VERBS])
def test_the_program_runs_alone(verb: str, tmp_path: Path) -> None:
    program = tmp_path / "host.pyz"
    program.write_bytes(zipapp(SOURCES))
    # -I: neither this folder nor what pip has installed; -S: no site-packages of the interpreter's either.
    command = [sys.executable, "-I", "-S", str(program), *([verb] if verb else []), "--help"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("usage: host.pyz")


def test_the_program_imports_pythons_own_library_and_itself() -> None:
    for file in (path for path in SOURCES.glob("*.py") if path.name not in NOT_ON_HOST):
        for node in ast.walk(ast.parse(file.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            for name in names:
                assert name.partition(".")[0] in sys.stdlib_module_names | {"host"}, f"{file.name}: {name}"


def test_the_script_fits_into_one_argument_with_room_to_spare() -> None:
    assert len(install(zipapp(SOURCES), {})) < LARGEST_SCRIPT * 3 // 4


def test_a_script_that_does_not_fit_is_refused_before_the_kernel_does() -> None:
    with pytest.raises(ValueError, match="the kernel takes"):
        install(os.urandom(LARGEST_SCRIPT), {})


@pytest.mark.parametrize("script", [install(zipapp(SOURCES), DECLARED), remove()], ids=["install", "remove"])
def test_the_scripts_are_posix_shell(script: str) -> None:
    done = subprocess.run(["sh", "-n"], input=script, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


# The scripts run for real, in a folder of their own: with a program that only notes how it is started.


class Machine:
    """A host's folders below `root`. `notes`: each start of the agent or systemctl, with its arguments."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.root, self.notes = root, root / "notes"
        self.systemd = root / "run/systemd/system"
        for name in ("LIBRARY", "PROGRAM", "DECLARED", "STATE", "RUN", "UNITS"):
            monkeypatch.setattr(agent, name, f"{root}{getattr(agent, name)}")
        programs = root / "bin"
        programs.mkdir(parents=True)
        (root / "etc/systemd/system").mkdir(parents=True)
        systemctl = programs / "systemctl"
        systemctl.write_text(f'#!/bin/sh\necho "systemctl $*" >> {self.notes}\n')
        systemctl.chmod(0o755)
        monkeypatch.setattr(agent, "PATH", f"PATH={programs}:$PATH\nexport PATH\n")
        sources = root / "sources"
        sources.mkdir()
        (sources / "__init__.py").touch()
        note = f"open({str(self.notes)!r}, 'a').write(' '.join(arguments) + '\\n')"
        (sources / "__main__.py").write_text(f"def main(arguments):\n    {note}\n    return 0\n")
        self.archive = zipapp(sources)

    def run(self, script: str) -> list[str]:
        """Runs a script; what it started."""
        self.notes.write_text("")
        own = script.replace("/run/systemd/system", str(self.systemd))
        done = subprocess.run(["sh", "-euc", own], capture_output=True, text=True, check=False)
        assert (done.returncode, done.stderr) == (0, "")
        return self.notes.read_text().splitlines()

    def files(self) -> dict[str, bytes]:
        """What is on the machine by path, without what this test has put there."""
        ours = (self.root / folder for folder in ("etc", "usr", "var", "run/bulkhead"))
        found = [path for folder in ours if folder.exists() for path in folder.rglob("*") if path.is_file()]
        return {str(path.relative_to(self.root)): path.read_bytes() for path in found}


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    return Machine(tmp_path, monkeypatch)


def test_without_systemd_the_watch_process_is_stopped_before_its_program_changes_and_started_again(
    machine: Machine,
) -> None:
    script = install(machine.archive, DECLARED)
    assert machine.run(script) == ["watch --start"]
    there = machine.files()
    assert set(there) == {"etc/bulkhead/host.json", "usr/local/lib/bulkhead/host.pyz"}
    assert json.loads(there["etc/bulkhead/host.json"]) == DECLARED
    assert there["usr/local/lib/bulkhead/host.pyz"] == machine.archive
    assert machine.run(script) == ["watch --stop", "watch --start"]
    assert machine.files() == there


def test_with_systemd_timers_are_written_and_enabled(machine: Machine) -> None:
    machine.systemd.mkdir(parents=True)
    script = install(machine.archive, DECLARED)
    enabled = "systemctl enable --quiet --now bulkhead-verify.timer bulkhead-keep.timer bulkhead-backup.timer"
    assert machine.run(script) == ["systemctl daemon-reload", enabled]
    there = machine.files()
    assert {f"etc/systemd/system/{name}" for name in units()} < set(there)
    stopped = [f"systemctl disable --quiet --now bulkhead-{verb}.timer" for verb in VERBS]
    assert machine.run(script) == [*stopped, "systemctl daemon-reload", enabled]
    assert machine.files() == there


@pytest.mark.parametrize("systemd", [False, True])
def test_all_that_is_installed_and_found_is_removed_and_nothing_of_others(systemd: bool, machine: Machine) -> None:
    if systemd:
        machine.systemd.mkdir(parents=True)
    others = machine.root / "etc/bulkhead/firewall.nft"
    others.parent.mkdir(parents=True)
    others.write_text("table inet bulkhead { }\n")
    before = machine.files()
    machine.run(install(machine.archive, DECLARED))
    for name in ("verify.json", "keep.json", "prove.json", "watch.log", "metrics/verify.prom"):
        (machine.root / "var/lib/bulkhead" / name).touch()
    (machine.root / "etc/bulkhead/stacks/dev.json").touch()
    started = machine.run(remove())
    assert ("systemctl daemon-reload" in started) is systemd
    assert ("watch --stop" in started) is not systemd
    assert machine.files() == before
    assert not (machine.root / "var/lib/bulkhead").exists()
    others.unlink()
    machine.run(remove())
    assert not others.parent.exists()


def test_a_host_without_python_says_what_to_install(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agent, "PATH", f"PATH={machine.root}/nowhere\nexport PATH\n")
    script = install(machine.archive, DECLARED)
    done = subprocess.run(["sh", "-euc", script], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (1, "python3 is not installed: apt-get install python3\n")
    assert machine.files() == {}


# systemd's units.


def test_each_verb_has_a_service_and_a_timer_that_keeps_the_period_of_a_minute() -> None:
    assert set(units()) == {f"bulkhead-{verb}.{kind}" for verb in VERBS for kind in ("service", "timer")}
    for verb, arguments in VERBS.items():
        service, timer = units()[f"bulkhead-{verb}.service"], units()[f"bulkhead-{verb}.timer"]
        assert f"ExecStart=/usr/bin/python3 {agent.PROGRAM} {' '.join(arguments)}\n" in service
        assert f"OnUnitActiveSec={EVERY_SECONDS}\n" in timer
        assert "AccuracySec=1\n" in timer
    assert EVERY_SECONDS < 60


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="no systemd-analyze here")
def test_systemd_understands_the_units(tmp_path: Path) -> None:
    program = tmp_path / "host.pyz"
    program.touch()
    for name, text in units().items():
        # It looks for programs too, and Debian's python3 may not be here.
        own = text.replace("/usr/bin/python3", sys.executable)
        (tmp_path / name).write_text(own)
    command = ["systemd-analyze", "verify", "--man=no", *(str(tmp_path / name) for name in units())]
    done = subprocess.run(
        command, env=os.environ | {"SYSTEMD_UNIT_PATH": f"{tmp_path}:"}, capture_output=True, text=True
    )
    said = [line for line in done.stderr.splitlines() if "bulkhead" in line]
    assert said == []


def test_the_archive_holds_every_module_that_a_verb_loads() -> None:
    with zipfile.ZipFile(io.BytesIO(zipapp(SOURCES))) as archive:
        assert {f"host/{verb}.py" for verb in ALL_VERBS} < set(archive.namelist())
