"""Doctor's lines: each check from what was read to status, words and remedy.
Folders like /sys are made in a temporary place; the machine itself is not asked."""

import os
import shutil
from pathlib import Path

import pytest
from rich.console import Console

from cli import doctor
from cli.doctor import Line, Status
from settings import host
from settings.errors import SettingsError
from settings.host import HostFacts
from settings.ledger import LedgerSettings

GIB = 2**30
FACTS = HostFacts(
    address="unix:///var/run/docker.sock",
    server_version="28.3.3",
    cpus=4,
    memory=16 * GIB,
    disk=100 * GIB,
    disk_free=50 * GIB,
    data_root="/var/lib/docker",
    cgroup_driver="systemd",
    cgroup_version=2,
    security_options=(),
    live_restore=True,
    kernel="6.1",
    system="Debian",
)


@pytest.mark.parametrize(
    ("version", "known_bad"),
    [
        ("20.10.24+dfsg1", ["CVE-2025-54410"]),
        ("25.0.12", ["CVE-2025-54410"]),
        ("25.0.13", []),
        ("26.0.0-rc1", ["CVE-2025-54410"]),
        ("27.5.1", ["CVE-2025-54410"]),
        ("28.0.0", []),
        ("28.1.1", []),
        ("28.2.0", ["CVE-2025-54388"]),
        ("28.3.2", ["CVE-2025-54388"]),
        ("28.3.3", []),
        ("29.0.1", []),
    ],
)
def test_known_bad_versions_are_named_where_firewalld_runs(version: str, known_bad: list[str]) -> None:
    lines = list(doctor.engine_version(version, firewalld=True))
    warned = [line for line in lines if line.status is Status.WARN]
    assert [name for line in warned for name in known_bad if name in line.found] == known_bad
    assert all("Update Docker" in line.remedy for line in warned)
    assert len(lines) == max(1, len(known_bad))


def test_a_known_bad_version_without_firewalld_is_ok_and_unseen_is_a_warning() -> None:
    (without,) = doctor.engine_version("20.10.24", firewalld=False)
    (unseen,) = doctor.engine_version("20.10.24", firewalld=None)
    assert (without.status, unseen.status) == (Status.OK, Status.WARN)


@pytest.mark.parametrize(
    ("text", "version"),
    [("20.10.24+dfsg1", (20, 10, 24)), ("v3.259.0", (3, 259, 0)), ("2.35", (2, 35, 0)), ("none", ())],
)
def test_versions_are_read(text: str, version: tuple[int, ...]) -> None:
    assert doctor.version_of(text) == version


def status(lines: object) -> dict[str, Status]:
    return {line.name: line.status for line in lines}  # type: ignore[attr-defined]


def test_missing_controllers_are_required_except_io() -> None:
    lines = status(doctor.cgroups(FACTS, frozenset({"cpu", "memory"})))
    assert lines["cgroup pids"] is Status.MISSING
    assert lines["cgroup io"] is Status.WARN
    assert lines["cgroup cpu"] is Status.OK


def test_v1_calls_the_io_controller_blkio() -> None:
    facts = FACTS.model_copy(update={"cgroup_version": 1, "cgroup_driver": "cgroupfs"})
    lines = status(doctor.cgroups(facts, frozenset({"cpu", "memory", "pids", "blkio"})))
    assert set(lines.values()) == {Status.OK}
    assert "cgroup blkio" in lines


def test_a_driver_without_slices_is_missing() -> None:
    facts = FACTS.model_copy(update={"cgroup_driver": "none"})
    assert status(doctor.cgroups(facts, frozenset()))["cgroup driver"] is Status.MISSING


def test_controllers_of_another_machine_are_said_to_be_unread() -> None:
    assert status(doctor.cgroups(FACTS, None))["cgroup controllers"] is Status.WARN


def test_controllers_are_read_from_both_versions(tmp_path: Path) -> None:
    for name in ("cpu,cpuacct", "memory"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "cgroup.procs").touch()
    assert doctor.controllers(tmp_path) == {"cpu", "cpuacct", "memory"}
    (tmp_path / "cgroup.controllers").write_text("cpuset cpu io memory pids\n")
    assert doctor.controllers(tmp_path) == {"cpuset", "cpu", "io", "memory", "pids"}


@pytest.mark.parametrize(
    ("scheduler", "iocost", "expected"),
    [
        ("bfq", False, Status.OK),
        ("none", True, Status.OK),
        ("mq-deadline", False, Status.WARN),
        ("none", False, Status.WARN),
        (None, False, Status.WARN),
    ],
)
def test_io_weights_need_bfq_or_iocost(scheduler: str | None, iocost: bool, expected: Status) -> None:
    line = doctor.io_weights("sda", scheduler, iocost)
    assert line.status is expected
    assert ("no effect" in line.found) == (expected is Status.WARN)


def block(sys: Path, name: str, *, number: str, active: str = "[none] bfq") -> Path:
    disk = sys / "devices" / name
    (disk / "queue").mkdir(parents=True)
    (disk / "queue" / "scheduler").write_text(active)
    (disk / "dev").write_text(number)
    return disk


def link(sys: Path, folder: Path, device: Path) -> None:
    number = folder.stat().st_dev
    (sys / "dev" / "block").mkdir(parents=True)
    (sys / "dev" / "block" / f"{os.major(number)}:{os.minor(number)}").symlink_to(device)


def test_the_disk_of_a_partition_is_found(tmp_path: Path) -> None:
    disk = block(tmp_path, "sda", number="8:0", active="none [bfq]")
    (disk / "sda1").mkdir()
    (disk / "sda1" / "partition").write_text("1")
    link(tmp_path, tmp_path, disk / "sda1")
    assert doctor.disks(tmp_path, tmp_path) == [disk]
    assert doctor.scheduler(disk) == "bfq"


def test_the_disks_under_a_logical_volume_are_found(tmp_path: Path) -> None:
    disks = [block(tmp_path, name, number=number) for name, number in (("sda", "8:0"), ("sdb", "8:16"))]
    volume = tmp_path / "devices" / "dm-0"
    (volume / "slaves").mkdir(parents=True)
    for disk in disks:
        (volume / "slaves" / disk.name).symlink_to(disk)
    link(tmp_path, tmp_path, volume)
    assert sorted(doctor.disks(tmp_path, tmp_path)) == disks


def test_a_file_system_without_a_device_has_no_disk(tmp_path: Path) -> None:
    assert doctor.disks(tmp_path, tmp_path) == []


def test_iocost_is_on_only_for_its_own_disk(tmp_path: Path) -> None:
    (tmp_path / "io.cost.qos").write_text("8:16 enable=1 ctrl=auto\n8:0 enable=0\n")
    sda, sdb = (block(tmp_path, name, number=number) for name, number in (("sda", "8:0"), ("sdb", "8:16")))
    assert [doctor.iocost(disk, tmp_path) for disk in (sda, sdb)] == [False, True]


def test_swap_is_a_warning_and_its_absence_is_not() -> None:
    assert doctor.swap("MemTotal: 1 kB\nSwapTotal:       0 kB\n").status is Status.OK
    line = doctor.swap("SwapTotal:       2097152 kB\n")
    assert line.status is Status.WARN
    assert "2GiB" in line.found


@pytest.mark.parametrize(("free", "expected"), [(10 * GIB, Status.OK), (10 * GIB - 1, Status.WARN)])
def test_less_than_a_tenth_of_the_disk_free_is_a_warning(free: int, expected: Status) -> None:
    assert doctor.free_disk(FACTS.model_copy(update={"disk_free": free})).status is expected


@pytest.mark.parametrize(
    ("mode", "expected"), [(0o600, Status.OK), (0o640, Status.WARN), (0o604, Status.WARN), (0o400, Status.OK)]
)
def test_a_passphrase_that_others_can_read_is_a_warning(tmp_path: Path, mode: int, expected: Status) -> None:
    file = tmp_path / "passphrase"
    file.touch()
    file.chmod(mode)
    lines = doctor.state(
        {"PULUMI_BACKEND_URL": f"file://{tmp_path}", "PULUMI_CONFIG_PASSPHRASE_FILE": str(file)}, tmp_path
    )
    assert status(lines) == {"state": Status.OK, "passphrase": expected}


def test_a_passphrase_file_that_is_not_there_matters_only_if_it_is_not_ours(tmp_path: Path) -> None:
    variables = {"PULUMI_CONFIG_PASSPHRASE_FILE": str(tmp_path / "passphrase")}
    assert status(doctor.state(variables, tmp_path))["passphrase"] is Status.OK
    assert status(doctor.state(variables, tmp_path / "elsewhere"))["passphrase"] is Status.MISSING


def test_a_full_disk_for_the_state_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=2**20)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    lines = status(doctor.state({"PULUMI_BACKEND_URL": f"file://{tmp_path}/new"}, tmp_path))
    assert lines["state"] is Status.MISSING


LEDGER = """\
config:
  bulkhead:capacity: {capacity}
  bulkhead:environments:
    prod: {{tier: protected, subnet: 10.81.0.0/16, reservations: {{cpus: 60%, memory: {memory}}}}}
"""


@pytest.mark.parametrize(
    ("capacity", "memory", "expected"),
    [
        ("{}", "50%", Status.OK),
        ("{memory: 32GiB}", "50%", Status.WARN),
        ("{}", "17GiB", Status.MISSING),
    ],
)
def test_capacity_is_compared_with_the_ledger(tmp_path: Path, capacity: str, memory: str, expected: Status) -> None:
    file = tmp_path / "Pulumi.host.yaml"
    file.write_text(LEDGER.format(capacity=capacity, memory=memory))
    lines = list(doctor.capacity(LedgerSettings.read(file), FACTS))
    assert expected in {line.status for line in lines}
    assert doctor.exit_code(lines) == (expected is Status.MISSING)


def test_tools_that_are_not_there_name_set_up(tmp_path: Path) -> None:
    variables = {"PATH": str(tmp_path), "PULUMI_HOME": str(tmp_path)}
    lines = list(doctor.tools(tmp_path, variables))
    absent = {line.name for line in lines if line.status is Status.MISSING}
    required = {"pulumi", "Python language host", "plugin docker", "plugin command", "Python environment"}
    assert required <= absent
    assert all("make setup" in line.remedy for line in lines if line.status is Status.MISSING)


def test_an_old_pulumi_is_missing(tmp_path: Path) -> None:
    (tmp_path / "pulumi").write_text("#!/bin/sh\necho v3.199.0\n")
    (tmp_path / "pulumi").chmod(0o755)
    lines = doctor.tools(tmp_path, {"PATH": f"{tmp_path}:/bin:/usr/bin", "PULUMI_HOME": str(tmp_path)})
    assert status(lines)["pulumi"] is Status.MISSING


def test_only_what_is_required_fails() -> None:
    assert doctor.exit_code([Line("a", Status.OK, ""), Line("b", Status.WARN, "", "do")]) == 0
    assert doctor.exit_code([Line("a", Status.MISSING, "")]) == 1


def test_the_table_shows_remedies_and_takes_brackets_as_text() -> None:
    console = Console(width=200)
    with console.capture() as captured:
        console.print(doctor.table([Line("x", Status.WARN, "[Errno 2] gone", "Do [this].")]))
    assert "[Errno 2] gone" in captured.get()
    assert "→ Do [this]." in captured.get()


# What the engine's machine is asked, and how a silent one is explained.


def test_the_address_is_the_ledger_s_then_the_user_s_then_local(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DOCKER_HOST", "unix:///tmp/other.sock")
    assert host.address("ssh://me@box") == "ssh://me@box"
    assert host.address(None) == "unix:///tmp/other.sock"
    monkeypatch.delenv("DOCKER_HOST")
    assert host.address(None) == "unix:///var/run/docker.sock"


@pytest.mark.parametrize(
    ("address", "message"),
    [("unix:///nowhere/docker.sock", "make engine-start"), ("tcp://box:2375", "Use ssh://user@machine")],
)
def test_an_engine_that_cannot_be_asked_names_the_next_step(address: str, message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        host.facts(address)


SSH = """\
#!/bin/sh
case "$*" in
  *"docker info"*df*boot_id) echo '{"ServerVersion": "28.3.3", "NCPU": 4, "MemTotal": 1024,
    "DockerRootDir": "/srv/docker", "CgroupDriver": "systemd", "CgroupVersion": "2", "KernelVersion": "6.1",
    "OperatingSystem": "Debian"}'; printf '1B-blocks Avail\\n 1000 400\\n'; echo 7f3a ;;
  *) exit 9 ;;
esac
"""


def test_a_remote_engine_is_asked_over_ssh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "ssh").write_text(SSH)
    (tmp_path / "ssh").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    facts = host.facts("ssh://me@box")
    assert facts.capacity() == {"cpus": 4, "memory": 1024, "disk": 1000}
    assert (facts.disk_free, facts.cgroup_driver, facts.cgroup_version) == (400, "systemd", 2)
    assert facts.boot == "7f3a"
    assert not facts.local


def test_a_remote_machine_that_does_not_answer_is_explained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "ssh").write_text("#!/bin/sh\necho 'Permission denied (publickey).' >&2\nexit 255\n")
    (tmp_path / "ssh").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    with pytest.raises(SettingsError, match=r"Permission denied.*ssh ssh://me@box docker info"):
        host.facts("ssh://me@box")


def test_an_engine_that_takes_its_services_down_with_it_is_a_warning() -> None:
    assert doctor.live_restore(FACTS).status is Status.OK
    line = doctor.live_restore(FACTS.model_copy(update={"live_restore": False}))
    assert (line.status, "daemon.json" in line.remedy) == (Status.WARN, True)
