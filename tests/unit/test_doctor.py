"""Doctor's lines: each check from what was read to status, words and remedy.
Folders like /sys are made in a temporary place; the machine itself is not asked."""

import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest
from rich.console import Console

from cli import doctor
from cli.doctor import Line, Status
from settings import host, machine
from settings.backup import DEFAULT_FOLDER
from settings.errors import SettingsError
from settings.host import Disk, HostFacts, Place
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


CONTROLLERS = frozenset({"cpu", "memory", "pids", "io"})
DISK = Disk(number="8:0", name="sda", size=10**12, schedulers=("mq-deadline",))
MEASURED = {"device": "8:0", "at": "2026-01-02T03:04:05+00:00", "read_bps": 500_000_000, "write_bps": 400_000_000}


def facts(**changed: object) -> HostFacts:
    """A machine that lacks nothing but what is changed."""
    lacking = {
        "controllers": CONTROLLERS,
        "device": DISK,
        "recursive_memory": True,
        "systemd": 252,
        "measured": MEASURED,
    }
    return FACTS.model_copy(update=lacking | changed)


def test_missing_controllers_are_required_except_io() -> None:
    lines = status(doctor.cgroups(facts(controllers=frozenset({"cpu", "memory"}))))
    assert lines["cgroup pids"] is Status.MISSING
    assert lines["cgroup io"] is Status.WARN
    assert lines["cgroup cpu"] is Status.OK


def test_v1_calls_the_io_controller_blkio() -> None:
    v1 = facts(cgroup_version=1, cgroup_driver="cgroupfs", controllers=frozenset({"cpu", "memory", "pids", "blkio"}))
    lines = status(doctor.cgroups(v1))
    assert set(lines.values()) == {Status.OK}
    assert "cgroup blkio" in lines


def test_a_driver_without_slices_is_missing() -> None:
    assert status(doctor.cgroups(facts(cgroup_driver="none")))["cgroup driver"] is Status.MISSING


def test_a_machine_that_cannot_be_read_is_said_to_be_unread() -> None:
    unread = facts(controllers=None, device=None)
    assert status(doctor.cgroups(unread))["cgroup controllers"] is Status.WARN
    (line,) = doctor.io_isolation(unread, None)
    assert line.found.startswith("not read")


IO_LEDGER = """\
config:
  bulkhead:environments:
    prod: {{tier: protected, subnet: 10.81.0.0/16, reservations: {{cpus: 50%, memory: 50%}}}}
    dev: {{tier: best-effort, subnet: 10.82.0.0/16, limits: {{memory: 20%{more}}}}}
"""


def io_ledger(tmp_path: Path, more: str = "") -> LedgerSettings:
    file = tmp_path / "Pulumi.host.yaml"
    file.write_text(IO_LEDGER.format(more=more))
    return LedgerSettings.read(file)


@pytest.mark.parametrize(
    ("changed", "expected", "words"),
    [
        ({}, Status.OK, "ceilings of 500 MB/s read and 400 MB/s written, measured 2026-01-02: dev 50%"),
        ({"device": DISK.model_copy(update={"schedulers": ("bfq",)})}, Status.OK, "by weights (bfq)"),
        ({"device": DISK.model_copy(update={"iocost": True})}, Status.OK, "by weights (iocost)"),
        ({"device": DISK.model_copy(update={"schedulers": ("bfq", "none")})}, Status.OK, "by ceilings"),
        ({"measured": None}, Status.WARN, "none yet; the next make up measures the disk"),
        ({"measured": MEASURED | {"device": "8:16"}}, Status.WARN, "none yet"),
        ({"device": None}, Status.WARN, "none: the engine's data is on no block device"),
        ({"controllers": frozenset({"cpu"})}, Status.WARN, "none: the kernel has no IO controller"),
        (
            {"cgroup_version": 1, "controllers": frozenset({"blkio"})},
            Status.WARN,
            "none: sda honours no weights, and slice units have no ceilings on cgroup v1",
        ),
        (
            {"cgroup_version": 1, "controllers": frozenset({"cpu"})},
            Status.WARN,
            "none: the kernel has no IO controller",
        ),
        (
            {
                "cgroup_version": 1,
                "controllers": frozenset({"blkio"}),
                "device": DISK.model_copy(update={"schedulers": ("bfq",)}),
            },
            Status.OK,
            "by weights (bfq)",
        ),
        (
            {"cgroup_version": 1, "cgroup_driver": "cgroupfs", "controllers": frozenset({"blkio"})},
            Status.WARN,
            "only direct IO and reads are held, not writes through the page cache",
        ),
    ],
)
def test_how_io_is_isolated_is_said(tmp_path: Path, changed: dict[str, object], expected: Status, words: str) -> None:
    (line,) = doctor.io_isolation(facts(**changed), io_ledger(tmp_path))
    assert line.status is expected
    assert words in line.found
    assert line.remedy or expected is Status.OK


def test_ceilings_that_leave_the_others_nothing_are_a_warning(tmp_path: Path) -> None:
    (line,) = doctor.io_isolation(facts(), io_ledger(tmp_path, ", io: 100%"))
    assert line.status is Status.WARN
    assert "dev 100%, which leaves the others nothing" in line.found
    assert line.remedy.startswith("Lower limits.io")


def test_the_idle_class_needs_a_recent_kernel_and_a_recent_systemd() -> None:
    assert doctor.cpu_class(facts()).status is Status.OK
    assert doctor.cpu_class(facts(kernel="5.15.0-91-generic")).status is Status.OK
    assert doctor.cpu_class(facts(kernel="5.14.21")).status is Status.WARN
    assert doctor.cpu_class(facts(systemd=249)).status is Status.WARN
    assert doctor.cpu_class(facts(systemd=0, cgroup_driver="cgroupfs")).status is Status.OK


def test_protection_that_stops_at_the_slice_is_a_warning() -> None:
    assert list(doctor.memory_protection(facts())) == []
    (line,) = doctor.memory_protection(facts(recursive_memory=False))
    assert "memory_recursiveprot" in line.remedy
    assert list(doctor.memory_protection(facts(recursive_memory=False, cgroup_version=1))) == []


def test_programs_that_could_be_killed_first_are_named_with_their_unit() -> None:
    engine, sshd = doctor.oom_scores({"sshd": -1000, "dockerd": 0})
    assert (engine.status, sshd.status) == (Status.WARN, Status.OK)
    assert "OOMScoreAdjust=-500" in engine.remedy
    assert "systemctl edit docker)" in engine.remedy


def test_a_best_effort_environment_without_a_disk_ceiling_is_a_warning(tmp_path: Path) -> None:
    (none,) = doctor.disk_ceilings(io_ledger(tmp_path))
    (limited,) = doctor.disk_ceilings(io_ledger(tmp_path, ", disk: 10%"))
    assert (none.status, limited.status) == (Status.WARN, Status.OK)
    assert (none.name, limited.name) == ("disk of dev", "disk of dev")


def test_swap_is_a_warning_and_its_absence_is_not() -> None:
    assert doctor.swap("MemTotal: 1 kB\nSwapTotal:       0 kB\n").status is Status.OK
    line = doctor.swap("SwapTotal:       2097152 kB\n")
    assert line.status is Status.WARN
    assert "2GiB" in line.found


@pytest.mark.parametrize(("free", "expected"), [(10 * GIB, Status.OK), (10 * GIB - 1, Status.WARN)])
def test_less_than_a_tenth_of_the_disk_free_is_a_warning(free: int, expected: Status) -> None:
    assert doctor.free_disk(FACTS.model_copy(update={"disk_free": free})).status is expected


def test_programs_that_the_host_lacks_are_named_with_their_package() -> None:
    assert list(doctor.host_programs(facts())) == []  # not read
    there = doctor.host_programs(facts(programs=frozenset({"nft", "restic"})))
    assert status(there) == {"nft on the host": Status.OK, "restic on the host": Status.OK}
    nft, restic = doctor.host_programs(facts(programs=frozenset()))
    assert (nft.status, restic.status) == (Status.MISSING, Status.WARN)
    assert "apt-get install nftables" in nft.remedy


@pytest.mark.parametrize(("count", "expected"), [(80, Status.OK), (81, Status.WARN)])
def test_a_table_of_connections_that_is_nearly_full_is_a_warning(count: int, expected: Status) -> None:
    (line,) = doctor.connections(facts(connections=(count, 100)))
    assert line.status is expected
    assert line.found.startswith(f"{count} of 100 tracked")
    assert ("nf_conntrack_max=200" in line.remedy) is (expected is Status.WARN)


@pytest.mark.parametrize(
    ("preemption", "expected"),
    [("full", Status.OK), ("voluntary", Status.OK), ("lazy", Status.WARN), ("none", Status.WARN)],
)
def test_a_kernel_that_dev_can_keep_busy_beyond_the_next_wake_up_is_a_warning(
    preemption: str, expected: Status
) -> None:
    (line,) = doctor.preemption(facts(preemption=preemption))
    assert line.status is expected
    assert ("preempt=full" in line.remedy) is (expected is Status.WARN)
    assert list(doctor.preemption(facts())) == []


def test_a_kernel_that_tracks_no_connections_has_no_line_of_them() -> None:
    assert list(doctor.connections(facts())) == []


def place(**changed: object) -> Place:
    """A folder that is there, on a disk of its own."""
    return Place(there=True, size=100 * GIB, free=50 * GIB, shared=False).model_copy(update=changed)


TARGETS = IO_LEDGER + "  bulkhead:backup: {{targets: {{disk: {{path: /srv/backup/}}, away: {{path: /mnt/away}}}}}}\n"


@pytest.mark.parametrize(
    ("changed", "expected", "words"),
    [
        ({}, Status.OK, "50GiB of 100GiB free for /srv/backup"),
        ({"free": 10 * GIB}, Status.OK, "10GiB of 100GiB"),
        ({"free": 10 * GIB - 1}, Status.WARN, "of 100GiB free"),
        ({"shared": True}, Status.WARN, "on the disk of the engine's data"),
        ({"there": False}, Status.WARN, "/srv/backup is not there"),
        ({"there": False, "shared": True}, Status.WARN, "on the disk of the engine's data"),
    ],
)
def test_a_folder_for_backups_is_on_a_disk_of_its_own_with_room(
    tmp_path: Path, changed: dict[str, object], expected: Status, words: str
) -> None:
    file = tmp_path / "Pulumi.host.yaml"
    file.write_text(TARGETS.format(more=""))
    ledger = LedgerSettings.read(file)
    assert doctor.folder_targets(ledger) == {"disk": "/srv/backup", "away": "/mnt/away"}
    (line,) = doctor.backup_folders(facts(folders={"/srv/backup": place(**changed)}), ledger)
    assert (line.name, line.status) == ("backup target disk", expected)
    assert words in line.found
    assert bool(line.remedy) is (expected is Status.WARN)


def test_what_a_buckets_endpoint_cannot_do_is_named_and_one_that_nobody_has_looked_at_too(tmp_path: Path) -> None:
    file, notes = tmp_path / "Pulumi.host.yaml", tmp_path / "buckets.json"
    there = "away: {endpoint: https://s3, bucket: acme, prefix: shop}"
    file.write_text(TARGETS.format(more="").replace("away: {path: /mnt/away}", there))
    ledger = LedgerSettings.read(file)
    (line,) = doctor.buckets(ledger, notes)
    assert (line.name, line.status) == ("backup target away", Status.WARN)
    assert "nobody has looked at bucket acme" in line.found
    for lacking, expected, words in (
        ({"lifecycle": "not supported by this endpoint"}, Status.WARN, "lifecycle: not supported by this endpoint"),
        ({}, Status.OK, "nothing was lacking on 2026-01-02"),
    ):
        notes.write_text(json.dumps({"https://s3/acme/shop": {"at": "2026-01-02", "lacking": lacking}}))
        (line,) = doctor.buckets(ledger, notes)
        assert line.status is expected
        assert words in line.found
    assert list(doctor.buckets(None, notes)) == []


@pytest.mark.parametrize("there", [True, False])
def test_the_folder_that_nobody_has_named_counts_once_it_is_used(tmp_path: Path, there: bool) -> None:
    asked = facts(folders={DEFAULT_FOLDER: place(there=there, shared=True)})
    assert len(list(doctor.backup_folders(asked, io_ledger(tmp_path)))) == there
    assert list(doctor.backup_folders(asked, None)) == []


def test_the_engines_machine_is_asked_about_the_folders_and_all_of_it_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "Pulumi.host.yaml").write_text(TARGETS.format(more=""))

    def asked(_: str | None, folders: Sequence[str]) -> HostFacts:
        return facts(
            address="ssh://me@box",
            programs=frozenset({"nft"}),
            connections=(1, 100),
            preemption="none",
            folders={path: place() for path in folders},
        )

    monkeypatch.setattr(host, "facts", asked)
    monkeypatch.setattr(doctor, "tools", lambda *_: [])
    told = status(doctor.examine(tmp_path))
    assert told["restic on the host"] is Status.WARN
    assert told["kernel preemption"] is Status.WARN
    assert {"nft on the host", "connections", "backup target disk", "backup target away", "free disk"} <= set(told)


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
  *"docker info"*df*boot_id*"python3 -"*) echo '{"ServerVersion": "28.3.3", "NCPU": 4, "MemTotal": 1024,
    "DockerRootDir": "/srv/docker", "CgroupDriver": "systemd", "CgroupVersion": "2", "KernelVersion": "6.1",
    "OperatingSystem": "Debian"}'; printf '1B-blocks Avail\\n 1000 400\\n'; echo 7f3a; {python} ;;
  *) exit 9 ;;
esac
"""


@pytest.mark.parametrize(("python", "read"), [("python3 - /", True), ("echo null", False)])
def test_a_remote_engine_is_asked_over_ssh(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, python: str, read: bool
) -> None:
    (tmp_path / "ssh").write_text(SSH.replace("{python}", python))
    (tmp_path / "ssh").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    facts = host.facts("ssh://me@box")
    assert facts.capacity() == {"cpus": 4, "memory": 1024, "disk": 1000}
    assert (facts.disk_free, facts.cgroup_driver, facts.cgroup_version) == (400, "systemd", 2)
    assert facts.boot == "7f3a"
    assert facts.controllers == (machine.controllers() if read else None)
    assert not facts.local


def test_a_remote_machine_is_asked_about_folders_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = f'printf %s "$*" > {tmp_path}/asked; python3 - / "{tmp_path}/a b"'
    (tmp_path / "ssh").write_text(SSH.replace("{python}", asked))
    (tmp_path / "ssh").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    found = host.facts("ssh://me@box", [f"{tmp_path}/a b"])
    assert (tmp_path / "asked").read_text().endswith(f" '{tmp_path}/a b' || echo null; }}")
    assert not found.folders[f"{tmp_path}/a b"].there
    assert found.programs is not None


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
