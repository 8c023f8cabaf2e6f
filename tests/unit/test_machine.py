"""What a host's /sys, /proc and mounts say, read from folders that look like them, and by the file alone as it is sent.
Folders like /sys are made in a temporary place."""

import gzip
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from unittest.mock import ANY

import pytest

from settings import machine
from settings.host import HostFacts


def test_controllers_are_read_from_both_versions(tmp_path: Path) -> None:
    for name in ("cpu,cpuacct", "memory"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "cgroup.procs").touch()
    assert machine.controllers(tmp_path) == {"cpu", "cpuacct", "memory"}
    (tmp_path / "cgroup.controllers").write_text("cpuset cpu io memory pids\n")
    assert machine.controllers(tmp_path) == {"cpuset", "cpu", "io", "memory", "pids"}


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
    assert machine.disks(tmp_path, tmp_path) == [disk]
    assert machine.scheduler(disk) == "bfq"


def test_the_disks_under_a_logical_volume_are_found(tmp_path: Path) -> None:
    disks = [block(tmp_path, name, number=number) for name, number in (("sda", "8:0"), ("sdb", "8:16"))]
    volume = tmp_path / "devices" / "dm-0"
    (volume / "slaves").mkdir(parents=True)
    for disk in disks:
        (volume / "slaves" / disk.name).symlink_to(disk)
    link(tmp_path, tmp_path, volume)
    assert sorted(machine.disks(tmp_path, tmp_path)) == disks


def test_a_file_system_without_a_device_has_no_disk(tmp_path: Path) -> None:
    assert machine.disks(tmp_path, tmp_path) == []


def test_iocost_is_on_only_for_its_own_disk(tmp_path: Path) -> None:
    (tmp_path / "io.cost.qos").write_text("8:16 enable=1 ctrl=auto\n8:0 enable=0\n")
    sda, sdb = (block(tmp_path, name, number=number) for name, number in (("sda", "8:0"), ("sdb", "8:16")))
    assert [machine.iocost(disk, tmp_path) for disk in (sda, sdb)] == [False, True]


def test_of_a_partition_the_whole_disk_is_throttled_and_a_logical_volume_itself(tmp_path: Path) -> None:
    disk = block(tmp_path, "sda", number="8:0")
    (disk / "sda1").mkdir()
    (disk / "sda1" / "partition").write_text("1")
    link(tmp_path, tmp_path, disk / "sda1")
    assert machine.whole(tmp_path, tmp_path) == disk
    volume = block(tmp_path, "dm-0", number="253:0")
    (volume / "slaves").mkdir()
    (volume / "slaves" / "sda").symlink_to(disk)
    next((tmp_path / "dev" / "block").iterdir()).unlink()
    (tmp_path / "dev" / "block").rmdir()
    (tmp_path / "dev").rmdir()
    link(tmp_path, tmp_path, volume)
    assert machine.whole(tmp_path, tmp_path) == volume
    assert machine.disks(tmp_path, tmp_path) == [disk]


def test_the_options_of_the_mount_that_is_seen_are_read(tmp_path: Path) -> None:
    mounts = tmp_path / "mounts"
    mounts.write_text(
        "/dev/sda1 / ext4 rw 0 0\n"
        "/dev/sdb /var/lib/docker xfs rw,noquota 0 0\n"
        "/dev/sdc /var/lib/docker ext4 rw,prjquota 0 0\n"
        "/dev/sdd /mnt/a\\040b ext4 ro 0 0\n"
    )
    assert machine.options(Path("/var/lib/docker"), mounts) == {"rw", "prjquota"}
    assert machine.options(Path("/mnt/a b"), mounts) == {"ro"}
    assert machine.options(Path("/elsewhere"), mounts) == set()


def process(proc: Path, number: int, name: str, score: int) -> None:
    folder = proc / str(number)
    folder.mkdir()
    (folder / "comm").write_text(f"{name}\n")
    (folder / "oom_score_adj").write_text(f"{score}\n")


def test_a_sessions_sshd_does_not_count_as_unprotected(tmp_path: Path) -> None:
    process(tmp_path, 10, "sshd", -1000)
    process(tmp_path, 11, "sshd", 0)
    process(tmp_path, 20, "dockerd", -500)
    process(tmp_path, 30, "postgres", 0)
    (tmp_path / "40").mkdir()
    assert machine.scores(tmp_path) == {"sshd": -1000, "dockerd": -500}


def test_the_connections_that_the_kernel_tracks_are_read_where_it_does(tmp_path: Path) -> None:
    assert machine.connections(tmp_path) is None
    (tmp_path / "nf_conntrack_count").write_text("27\n")
    (tmp_path / "nf_conntrack_max").write_text("262144\n")
    assert machine.connections(tmp_path) == [27, 262144]


def test_programs_are_found_that_the_users_own_path_has_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "PROGRAMS", ("of-the-user", "ldconfig", "of-nobody"))
    (tmp_path / "of-the-user").touch(0o755)
    assert machine.programs(str(tmp_path)) == ["of-the-user", "ldconfig"]


def test_a_place_is_what_a_folder_would_be_made_in(tmp_path: Path) -> None:
    room = shutil.disk_usage(tmp_path)
    there = machine.place(tmp_path, tmp_path / "data", tmp_path)
    assert (there["there"], there["size"], there["shared"]) == (True, room.total, True)
    assert machine.place(tmp_path / "a/b", tmp_path, tmp_path) == {**there, "there": False, "free": ANY}


@pytest.mark.parametrize("shared", [True, False])
def test_two_file_systems_may_be_on_one_disk(tmp_path: Path, shared: bool) -> None:
    data = Path("/dev/shm")
    link(tmp_path, tmp_path, block(tmp_path, "sda", number="8:0"))
    number = data.stat().st_dev
    other = tmp_path / "devices/sda" if shared else block(tmp_path, "sdb", number="8:16")
    (tmp_path / "dev/block" / f"{os.major(number)}:{os.minor(number)}").symlink_to(other)
    assert machine.place(tmp_path, data, tmp_path)["shared"] is shared


@pytest.mark.parametrize(
    ("built", "line", "found"),
    [
        (["PREEMPT_NONE", "PREEMPT_DYNAMIC", "PREEMPTION"], "quiet", "none"),
        (["PREEMPT_NONE", "PREEMPT_DYNAMIC"], "quiet preempt=full", "full"),
        (["PREEMPT_NONE", "PREEMPT_DYNAMIC"], "preempt=full preempt=voluntary x", "voluntary"),
        (["PREEMPT_NONE"], "preempt=full", "none"),
        (["PREEMPT_VOLUNTARY"], "nopreempt=full", "voluntary"),
        (["PREEMPT_LAZY"], "", "lazy"),
        (["PREEMPT", "PREEMPTION"], "", "full"),
        (["PREEMPT", "PREEMPT_RT"], "", "full"),
        ([], "", ""),
    ],
)
@pytest.mark.parametrize("packed", [True, False])
def test_how_the_kernel_is_interrupted_is_as_built_or_as_its_command_line_says(
    built: list[str], line: str, found: str, packed: bool, tmp_path: Path
) -> None:
    config = "# CONFIG_PREEMPT_X is not set\n" + "".join(f"CONFIG_{name}=y\n" for name in built)
    (tmp_path / "cmdline").write_text(f"{line}\n")
    if packed:
        (tmp_path / "config.gz").write_bytes(gzip.compress(config.encode()))
    else:
        (tmp_path / "config-6.1").write_text(config)
    assert machine.preemption(tmp_path, tmp_path, "6.1") == found


def test_a_kernel_that_tells_nothing_of_itself_is_not_judged(tmp_path: Path) -> None:
    assert machine.preemption(tmp_path, tmp_path, "6.1") == ""


@pytest.mark.parametrize("text", ["", "{", "[]"])
def test_a_measurement_that_cannot_be_read_is_none(tmp_path: Path, text: str) -> None:
    (tmp_path / "device.json").write_text(text)
    assert machine.measured(tmp_path / "device.json") is None
    assert machine.measured(tmp_path / "none") is None


def test_the_file_alone_prints_what_the_facts_take() -> None:
    source = Path(machine.__file__).read_text()
    alone = [sys.executable, "-I", "-", "/var/lib/docker", "/proc/a b"]
    told = json.loads(subprocess.run(alone, input=source, capture_output=True, text=True, check=True).stdout)
    read = machine.read(Path("/var/lib/docker"), [Path("/proc/a b")])
    wavers = {"connections": None}
    assert told | wavers == read | wavers
    assert list(told["folders"]) == ["/proc/a b"]
    assert set(told) - {"disk"} <= set(HostFacts.model_fields)
