"""keep: OOM scores, v1 throttles and disk ceilings, on folders that look like /proc and /sys/fs/cgroup.
The engine's answers are made up; the real one is in tests/e2e/test_slices.py."""

import argparse
import errno
import fcntl
import json
import os
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from host import keep
from host.machine import Places, Undecided

V1 = {"cgroup_driver": "cgroupfs", "cgroup_version": 1}
V2 = {"cgroup_driver": "cgroupfs", "cgroup_version": 2}
UNITS = {"cgroup_driver": "systemd", "cgroup_version": 2}


def group(places: Places, path: str, *processes: int) -> Path:
    folder = places.cgroups / path
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "cgroup.procs").write_text("".join(f"{one}\n" for one in processes))
    return folder


def process(places: Places, number: int, score: int) -> Path:
    file = places.processes / str(number) / "oom_score_adj"
    file.parent.mkdir(parents=True)
    file.write_text(f"{score}\n")
    return file


@pytest.fixture
def places(tmp_path: Path) -> Places:
    return Places(tmp_path)


def test_an_environments_groups_are_found_however_the_driver_spells_them(places: Places) -> None:
    for path in ("cpu/bulkhead-dev", "memory/bulkhead-dev", "memory/bulkhead-prod", "cpuset"):
        group(places, path)
    assert keep.folders(V1, "/bulkhead-dev", places) == [
        places.cgroups / "cpu/bulkhead-dev",
        places.cgroups / "memory/bulkhead-dev",
    ]
    assert keep.folders(V2, "/bulkhead-dev", places) == []
    nested = group(places, "bulkhead.slice/bulkhead-dev.slice")
    assert keep.folders(UNITS, "bulkhead-dev.slice", places) == [nested]


def test_scores_are_raised_and_never_lowered(places: Places) -> None:
    slice_ = group(places, "bulkhead-dev", 1)
    group(places, "bulkhead-dev/container", 2, 3, 4)
    files = [process(places, number, score) for number, score in ((1, 0), (2, -500), (3, 1000))]
    assert keep.raise_scores([slice_], 500, places) == (4, 2)  # the fourth has ended
    assert [file.read_text().strip() for file in files] == ["500", "500", "1000"]
    assert keep.raise_scores([slice_], 500, places) == (4, 0)


def test_processes_of_other_environments_are_left_alone(places: Places) -> None:
    slice_ = group(places, "bulkhead-dev", 1)
    group(places, "bulkhead-dev2", 2)
    process(places, 1, 0)
    other = process(places, 2, 0)
    keep.raise_scores([slice_], 1000, places)
    assert other.read_text() == "0\n"


def test_processes_that_start_meanwhile_are_found_by_looking_again(
    places: Places, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = [process(places, number, 0) for number in (1, 2)]
    seen = iter([{1}, {1, 2}, {1, 2}])
    monkeypatch.setattr(keep, "processes", lambda _: next(seen))
    assert keep.raise_scores([], 1000, places) == (2, 2)
    assert [file.read_text() for file in files] == ["1000", "1000"]


def test_the_engine_is_protected_by_its_pid_file_and_nothing_that_only_has_its_name(places: Places) -> None:
    engine, other = process(places, 7, 0), process(places, 8, 0)
    (places.processes / "8" / "comm").write_text("dockerd\n")
    (places.root / "run").mkdir()
    (places.root / "run/docker.pid").write_text("7")
    assert keep.guard(places) == {"run/docker.pid": -500}
    assert (engine.read_text(), other.read_text()) == ("-500", "0\n")
    engine.write_text("-999\n")
    assert keep.guard(places) == {"run/docker.pid": -999}
    assert engine.read_text() == "-999\n"


def throttle(folder: Path, name: str = "write_bps") -> Path:
    file = folder / f"blkio.throttle.{name}_device"
    file.write_text("")
    return file


def test_a_throttle_is_divided_among_the_groups_with_processes(places: Places) -> None:
    slice_ = group(places, "blkio/bulkhead-dev")
    declared = {f"/sys/fs/cgroup/blkio/bulkhead-dev/{throttle(slice_).name}": "254:0 100"}
    busy = [throttle(group(places, f"blkio/bulkhead-dev/{number}", number)) for number in (1, 2, 3)]
    idle = throttle(group(places, "blkio/bulkhead-dev/4"))
    assert keep.spread(declared, [slice_], places) == 3
    assert [file.read_text() for file in busy] == ["254:0 33"] * 3
    assert idle.read_text() == ""


def test_a_build_one_group_deeper_has_its_part_too(places: Places) -> None:
    """BuildKit's groups are `<slice>/buildkit/<id>`, and a throttle does not hold below its own group."""
    slice_ = group(places, "blkio/bulkhead-dev", 9)  # the slice's own file holds for this one
    declared = {f"/sys/fs/cgroup/blkio/bulkhead-dev/{throttle(slice_).name}": "254:0 100"}
    container = throttle(group(places, "blkio/bulkhead-dev/container", 1))
    between = throttle(group(places, "blkio/bulkhead-dev/buildkit"))
    build = throttle(group(places, "blkio/bulkhead-dev/buildkit/id", 2))
    assert keep.spread(declared, [slice_], places) == 2
    assert (container.read_text(), build.read_text()) == ("254:0 50", "254:0 50")
    assert between.read_text() == ""


def test_a_throttle_that_is_right_is_not_written_again_and_one_of_before_goes(places: Places) -> None:
    slice_ = group(places, "blkio/bulkhead-dev")
    declared = {f"/sys/fs/cgroup/blkio/bulkhead-dev/{throttle(slice_).name}": "254:0 100"}
    file = throttle(group(places, "blkio/bulkhead-dev/1", 1))
    file.write_text("254:0 100\n")
    keep.spread(declared, [slice_], places)
    assert file.read_text() == "254:0 100\n"
    assert keep.spread({}, [slice_], places) == 0
    assert file.read_text() == "254:0 0"


@pytest.mark.parametrize(("engine", "groups", "written"), [(V1, 1, "254:0 100"), (V2, 0, "")])
def test_only_on_v1_throttles_are_written_since_on_v2_the_slices_own_holds_for_all_below(
    places: Places, engine: Mapping[str, Any], groups: int, written: str
) -> None:
    tree = "blkio/" if engine is V1 else ""
    file = throttle(group(places, f"{tree}bulkhead-dev"))
    inner = throttle(group(places, f"{tree}bulkhead-dev/container", 1))
    files = {f"/sys/fs/cgroup/{tree}bulkhead-dev/{file.name}": "254:0 100"}
    declared(places, engine, dev={**DEV, "disk": None, "files": files})
    assert run(places) == 0
    report = json.loads((places.state / "keep.json").read_text())
    assert report["environments"]["dev"]["throttled_groups"] == groups
    assert inner.read_text() == written


def container(identifier: str, status: str = "running", **more: Any) -> dict[str, Any]:
    made = {
        "Id": identifier,
        "Name": f"/{identifier}",
        "State": {"Status": status},
        "Config": {"Labels": {keep.LABEL: "dev"}},
        "HostConfig": {"CgroupParent": "/bulkhead-dev"},
    }
    return made | more


class Engine:
    """The containers of `docker pause` and `unpause`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *identifiers: str) -> None:
        self.states = dict.fromkeys(identifiers, "running")
        self.boots = 0
        monkeypatch.setattr(keep, "_each", self.each)

    def each(self, verb: str, identifiers: Any) -> set[str]:
        self.states |= dict.fromkeys(identifiers, {"pause": "paused", "unpause": "running"}[verb])
        return set(identifiers)

    def hold(self, size: int, before: Mapping[str, Any], *, now: float, deploys: bool = False) -> dict[str, Any]:
        containers = [
            container(identifier, State={"Status": status, "StartedAt": f"boot {self.boots}"})
            for identifier, status in self.states.items()
        ]
        return keep.hold(size > 100, containers, before, deploys, now)


def test_over_its_ceiling_an_environment_is_paused_and_goes_on_below(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(monkeypatch, "a", "b")
    assert engine.hold(100, {}, now=0)["state"] == "below"
    over = engine.hold(101, {}, now=0)
    started = {"a": "boot 0", "b": "boot 0"}
    assert over == {"state": "paused", "paused": ["a", "b"], "started": started, "released_until": 0.0}
    assert set(engine.states.values()) == {"paused"}
    below = engine.hold(100, over, now=1)
    assert (below["state"], below["paused"]) == ("below", [])
    assert set(engine.states.values()) == {"running"}


def test_what_starts_later_is_paused_too(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(monkeypatch, "a")
    over = engine.hold(101, {}, now=0)
    engine.states["b"] = "running"
    assert engine.hold(101, over, now=1)["paused"] == ["a", "b"]
    assert engine.states == {"a": "paused", "b": "paused"}


def test_what_the_user_paused_stays_paused(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(monkeypatch, "a", "b")
    engine.states["a"] = "paused"
    over = engine.hold(101, {}, now=0)
    assert over["paused"] == ["b"]
    engine.hold(50, over, now=1)
    assert engine.states == {"a": "paused", "b": "running"}


def test_a_user_who_unpauses_has_time_to_remove_something(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(monkeypatch, "a", "b")
    over = engine.hold(101, {}, now=0)
    engine.states["a"] = "running"
    released = engine.hold(101, over, now=10)
    assert (released["state"], released["paused"]) == ("released", ["b"])
    assert engine.states == {"a": "running", "b": "paused"}
    assert engine.hold(101, released, now=10 + keep.GRACE_SECONDS - 1)["state"] == "released"
    again = engine.hold(101, released, now=10 + keep.GRACE_SECONDS)
    assert again["state"] == "paused"
    assert set(engine.states.values()) == {"paused"}


def test_what_a_reboot_has_started_again_is_paused_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody has let it go on: else dev would write for a quarter of an hour after each restart of the engine."""
    engine = Engine(monkeypatch, "a", "b")
    over = engine.hold(101, {}, now=0)
    engine.states, engine.boots = dict.fromkeys("ab", "running"), 1
    again = engine.hold(101, over, now=1)
    assert (again["state"], again["paused"]) == ("paused", ["a", "b"])


def test_a_service_that_says_it_is_a_probe_is_held_all_the_same() -> None:
    both = container("a", Config={"Labels": {keep.LABEL: "dev", keep.PROBE: "me"}})
    probe = container("b", Config={"Labels": {keep.PROBE: "4f3a"}})
    other = container("c", Config={"Labels": {}})
    assert [one["Id"] for one in keep.members("dev", "/bulkhead-dev", [both, probe, other])] == ["a", "c"]


def test_released_and_then_below_everything_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(monkeypatch, "a", "b")
    over = engine.hold(101, {}, now=0)
    engine.states["a"] = "running"
    assert engine.hold(99, engine.hold(101, over, now=10), now=20)["state"] == "below"
    assert set(engine.states.values()) == {"running"}


def test_a_deploy_is_not_stopped_in_the_middle(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(monkeypatch, "a")
    assert engine.hold(101, {}, now=0, deploys=True)["state"] == "released"
    assert engine.hold(101, {}, now=1)["state"] == "paused"


def test_what_fills_the_disk_is_counted_once(tmp_path: Path) -> None:
    (tmp_path / "volume").mkdir()
    (tmp_path / "volume" / "data").write_bytes(b"x" * 2**20)
    os.link(tmp_path / "volume" / "data", tmp_path / "volume" / "again")
    with (tmp_path / "volume" / "sparse").open("wb") as sparse:
        sparse.truncate(2**30)
    paths = {str(tmp_path / "volume"), str(tmp_path / "volume" / "data"), str(tmp_path / "gone")}
    assert 2**20 <= keep.used(paths) < 2**20 + 2**17
    assert keep.used([]) == keep.used(["/nowhere"]) == 0
    assert keep.used(paths, unit="--inodes") == 3  # the folder, the file with two names, the sparse one


def holding(places: Places, number: int, *files: int, kind: str = "task/1/fd") -> None:
    """A process that has these descriptors of ours, under names as /proc tells them of files that are deleted."""
    (places.processes / str(number) / kind).mkdir(parents=True, exist_ok=True)
    for file in files:
        name = places.root / f"{file}{keep.DELETED}"
        if not name.is_symlink():
            name.symlink_to(f"/proc/self/fd/{file}")
        (places.processes / str(number) / kind / str(file)).symlink_to(name)


@pytest.fixture
def nameless(tmp_path: Path) -> Iterator[int]:
    """A deleted file of 1 MiB that is still open."""
    with tempfile.TemporaryFile(dir=tmp_path) as file:
        file.write(b"x" * 2**20)
        file.flush()
        yield file.fileno()


@pytest.mark.parametrize("kind", ["task/1/fd", "task/2/fd", "map_files"])
def test_a_deleted_file_that_is_still_open_counts_once(places: Places, nameless: int, kind: str) -> None:
    holding(places, 7, nameless, kind=kind)
    holding(places, 8, nameless)
    folders = [str(places.root)]
    assert keep.used(folders) < 2**20
    assert keep.deleted([7], folders, places) == 2**20
    assert keep.deleted([7, 8, 9], folders, places) == 2**20  # the last has ended
    assert keep.deleted([9], folders, places) == 0


def test_what_has_a_name_or_is_in_memory_or_on_another_disk_is_no_deleted_file_of_it(
    places: Places, nameless: int
) -> None:
    (places.root / f"named{keep.DELETED}").write_bytes(b"x" * 2**20)
    with (
        (places.root / f"named{keep.DELETED}").open() as named,
        tempfile.TemporaryFile(dir="/dev/shm") as shared,
        os.fdopen(os.memfd_create("memory"), "wb") as memory,
    ):
        for file in (shared, memory):
            file.write(b"x" * 2**20)
            file.flush()
        holding(places, 7, named.fileno(), shared.fileno(), memory.fileno())
        assert keep.deleted([7], [str(places.root)], places) == 0
        holding(places, 8, nameless)
        assert keep.deleted([8], ["/dev/shm"], places) == 0


def test_a_deleted_file_of_a_containers_own_layer_is_known_by_the_size_of_the_disk_below_it(
    places: Places, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An overlay has a st_dev of its own, and tells the size of the disk that its upper folder is on."""
    below = os.statvfs(places.root)
    monkeypatch.setattr(os, "statvfs", lambda _: below)
    with tempfile.TemporaryFile(dir="/dev/shm") as file:
        file.write(b"x" * 2**20)
        file.flush()
        holding(places, 7, file.fileno())
        assert keep.deleted([7], [str(places.root)], places) == 2**20


def test_a_deleted_file_of_a_volume_is_known_by_its_disk_where_a_quota_tells_the_folder_another_size(
    places: Places, nameless: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    below = os.statvfs(places.root)
    quota = os.statvfs_result((*below[:2], below.f_blocks // 2, *below[3:]))
    monkeypatch.setattr(os, "statvfs", lambda path: quota if path == str(places.root) else below)
    holding(places, 7, nameless)
    assert keep.deleted([7], [str(places.root)], places) == 2**20


def test_a_folder_whose_file_system_tells_no_size_makes_no_memory_count(
    places: Places, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As that of memfd tells none."""
    none = os.statvfs_result((4096, 4096, *[0] * 8))
    monkeypatch.setattr(os, "statvfs", lambda _: none)
    with os.fdopen(os.memfd_create("memory"), "wb") as memory:
        memory.write(b"x" * 2**20)
        memory.flush()
        holding(places, 7, memory.fileno())
        assert keep.deleted([7], [str(places.root)], places) == 0
    assert keep.inodes([str(places.root)], 100) == (0, 0)


def test_a_file_too_deep_to_be_told_is_looked_at_and_one_that_is_told_to_have_a_name_is_not(
    places: Places, nameless: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server of such a one may not answer."""
    holding(places, 7, nameless)
    (link,) = (places.processes / "7/task/1/fd").iterdir()

    def deep(_: Path) -> Path:
        raise OSError(errno.ENAMETOOLONG, "File name too long")

    with monkeypatch.context() as patched:
        patched.setattr(Path, "readlink", deep)
        assert keep.deleted([7], [str(places.root)], places) == 2**20
    link.unlink()
    link.symlink_to(f"/proc/self/fd/{nameless}")
    assert keep.deleted([7], [str(places.root)], places) == 0


def test_many_open_files_hold_up_no_more_than_many_files(places: Places, nameless: int) -> None:
    holding(places, 7, nameless)
    with pytest.raises(subprocess.TimeoutExpired):
        keep.deleted([7], [str(places.root)], places, 0)


def file_systems(monkeypatch: pytest.MonkeyPatch, *totals: tuple[Path, int, int]) -> None:
    """Disks of 1000 blocks of 4 KiB: a folder of each, how many inodes it has, and how many of them are in use."""
    devices = {str(folder): number for number, (folder, _, _) in enumerate(totals)}

    def statvfs(path: str) -> os.statvfs_result:
        _, count, inside = totals[devices[path]]
        return os.statvfs_result((4096, 4096, 1000, 500, 500, count, count - inside, count - inside, 0, 255))

    def disks(paths: Iterable[str]) -> dict[int, list[str]]:
        return {devices[path]: [path] for path in paths if path in devices}

    monkeypatch.setattr(os, "statvfs", statvfs)
    monkeypatch.setattr(keep, "disks", disks)


def test_a_share_of_the_disk_is_the_same_share_of_its_inodes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(9):
        (tmp_path / str(number)).touch()
    ceiling = 100 * 4096
    file_systems(monkeypatch, (tmp_path, 80, 70))
    assert keep.inodes([str(tmp_path)], ceiling) == (10, 8)
    assert keep.inodes([str(tmp_path)], 2**40) == (70, 80)  # never more than there are
    file_systems(monkeypatch, (tmp_path, 0, 0))  # made as needed
    assert keep.inodes([str(tmp_path)], ceiling) == (0, 0)
    assert keep.inodes(["/nowhere"], ceiling) == (0, 0)


def test_inodes_are_counted_only_where_the_disk_has_more_than_the_share_in_use(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file_systems(monkeypatch, (tmp_path, 800, 80))
    monkeypatch.setattr(keep, "used", lambda *_: pytest.fail("counted"))
    assert keep.inodes([str(tmp_path)], 100 * 4096) == (80, 80)


def test_of_several_disks_the_one_with_the_least_left_of_the_share_tells(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small, large, needed = (tmp_path / name for name in ("small", "large", "as needed"))
    for folder in (small, large, needed):
        folder.mkdir()
        (folder / "file").touch()
    file_systems(monkeypatch, (small, 30, 20), (large, 8000, 7000), (needed, 0, 0))
    assert keep.inodes(map(str, (small, large, needed)), 100 * 4096) == (2, 3)


@pytest.fixture
def docker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder: `docker a b …` answers what its file `a-b` says, and fails where there is none; `asked` has all."""
    folder = tmp_path / "engine"
    folder.mkdir()
    (folder / "docker").write_text(f'#!/bin/sh\necho "$*" >> {folder}/asked\nexec cat "{folder}/$1-$2"\n')
    (folder / "docker").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    return folder


def test_volumes_layers_and_logs_count_and_what_is_on_no_disk_of_the_engine_does_not(docker: Path) -> None:
    (docker / "volume-ls").write_text("data\nmemory\n")
    volumes = [{"Mountpoint": "/v/data", "Options": None}, {"Mountpoint": "/v/memory", "Options": {"type": "tmpfs"}}]
    (docker / "volume-inspect").write_text(json.dumps(volumes))
    mounts = [
        {"Type": "volume", "Driver": "local", "Source": "/v/unnamed"},
        {"Type": "volume", "Driver": "nfs", "Source": "/elsewhere"},
        {"Type": "bind", "Source": "/home"},
        {"Type": "bind", "Source": str(docker), "RW": True},
        {"Type": "bind", "Source": str(docker / "volume-ls"), "RW": True},
    ]
    full = container("a", Mounts=mounts, GraphDriver={"Data": {"UpperDir": "/l/diff"}}, LogPath="/c/a/a-json.log")
    bare = container("b", Mounts=None, GraphDriver={"Data": None}, LogPath="", HostnamePath="/c/b/hostname")
    assert keep.written_to("dev", [full, bare], Places(docker)) == (
        {
            *("/v/data", "/v/unnamed", "/l/diff", "/c/a"),
            "/c/b",  # its driver has a log there too, and tells nobody
            str(docker),
        },
        [],
    )
    asked = (docker / "asked").read_text().splitlines()
    assert asked == [
        "volume ls --quiet --filter label=bulkhead.environment=dev",
        "volume inspect data memory",
    ]


MOUNTED = """\
1 0 0:40 / / rw - overlay overlay rw,lowerdir=/l/first,upperdir=/l/first/fs,workdir=/l/first/work
2 1 0:41 / / rw master:9 - overlay overlay rw,lowerdir=/l/1/fs:/l/2/fs,upperdir=/l/a\\040b/3/fs,workdir=/l/3/work
3 2 0:5 / /proc rw - proc proc rw
4 2 0:42 / /merged rw - overlay overlay rw,lowerdir=/x,upperdir=/other,workdir=/y
"""


def mounted(places: Places, number: int, mounts: str) -> dict[str, Any]:
    """A container of an engine that does not tell its layers."""
    (places.processes / str(number)).mkdir(parents=True)
    (places.processes / str(number) / "mountinfo").write_text(mounts)
    return container(f"c{number}", State={"Status": "running", "Pid": number})


def test_a_layer_that_the_engine_does_not_tell_is_what_is_mounted_on_the_containers_root(places: Places) -> None:
    assert keep.layer(mounted(places, 7, MOUNTED), places) == {"/l/a b/3/fs"}


def test_a_container_whose_layer_is_not_found_is_told_with_the_next_step(docker: Path) -> None:
    (docker / "volume-ls").touch()
    places = Places(docker)
    one = mounted(places, 7, "1 0 8:1 /vfs/dir/c / rw - ext4 /dev/sda1 rw\n")
    paths, (unknown,) = keep.written_to("dev", [one], places)
    assert paths == set()
    assert unknown.startswith("c7: the folder of its own layer is not known")
    assert "Next step: read_only: true" in unknown


def test_a_container_that_writes_nothing_there_or_has_ended_has_no_layer_to_be_found(places: Places) -> None:
    one = mounted(places, 7, "1 0 8:1 /vfs/dir/c / rw - ext4 /dev/sda1 rw\n")
    one["HostConfig"]["ReadonlyRootfs"] = True
    assert keep.layer(one, places) == set()
    assert keep.layer(container("c9", State={"Status": "exited", "Pid": 0}), places) == set()


def test_an_engine_without_containers_is_not_asked_about_any(docker: Path) -> None:
    (docker / "ps---all").write_text("")
    assert keep.inspected() == []


def test_a_container_that_ends_between_list_and_question_is_asked_around_once(
    docker: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (docker / "ps---all").write_text("a\n")
    failures = 1

    def inspect(*_: object) -> list[dict[str, Any]]:
        nonlocal failures
        failures -= 1
        if failures >= 0:
            raise Undecided("gone")
        return [container("a")]

    monkeypatch.setattr(keep, "inspect", inspect)
    assert keep.inspected() == [container("a")]
    failures = 2
    with pytest.raises(Undecided):
        keep.inspected()


def test_one_container_that_cannot_be_paused_keeps_no_other_from_it(docker: Path) -> None:
    (docker / "pause-b").touch()
    containers = [container("b"), container("a")]
    held = keep.hold(True, containers, {}, False, 0)
    assert held["paused"] == ["b"]  # so that the other is not taken for one that somebody has let go on
    assert keep.hold(True, [container("a"), container("b", "paused")], held, False, 1)["state"] == "paused"
    assert (docker / "asked").read_text() == "pause a\npause b\npause a\n"


def counts(size: int, files: int = 0, share: int = 0) -> dict[str, int]:
    return {"used": size, "deleted": 0, "inodes": files, "inodes_ceiling": share}


def test_files_are_counted_when_it_is_due(monkeypatch: pytest.MonkeyPatch, places: Places) -> None:
    """For each second that it took, not for DU_SHARE more. Sooner while it is over, after a new ceiling, and when so
    much has been written to the disk, or so many files made, by whomever, that it may be over."""
    now, counted, size, filled, files = 1000.0, 0, 50, 700, 9000

    def count(*_: object) -> dict[str, int]:
        nonlocal now, counted
        counted += 1
        now += 2
        return counts(size, 300, 400)

    monkeypatch.setattr(time, "time", lambda: now)
    monkeypatch.setattr(keep, "written_to", lambda *_: ([], []))
    monkeypatch.setattr(keep, "counted", count)
    monkeypatch.setattr(keep, "on_disks", lambda _: (filled, files))

    def at(then: float, before: Mapping[str, Any], ceiling: int = 100) -> dict[str, Any]:
        nonlocal now
        now = then
        return keep.disk("dev", {"disk": ceiling, "cgroup_parent": "/bulkhead-dev"}, [], [], before, False, places, 200)

    first = at(1000, {})
    assert (first["used"], first["seconds"], first["state"], first["since"]) == (50, 2, "below", 1002)
    assert at(1000 + 2 * keep.DU_SHARE - 1, first)["used"] == 50
    assert counted == 1
    assert at(1001, first, ceiling=101)["ceiling"] == 101
    assert counted == 2

    filled = 750
    assert at(1003, first)["disk_used"] == 700
    assert counted == 2
    filled = 751
    assert at(1001, first)["disk_used"] == 700
    assert counted == 2
    first = at(1003, first)
    assert (counted, first["disk_used"], first["counted_at"]) == (3, 751, 1003)
    at(1006, first)
    assert counted == 3

    files = 9100
    assert at(1006, first)["disk_inodes"] == 9000
    files = 9101
    assert at(1004, first)["disk_inodes"] == 9000
    assert counted == 3
    first = at(1006, first)
    assert (counted, first["disk_inodes"], first["inodes"], first["inodes_ceiling"]) == (4, 9101, 300, 400)

    size = 101
    over = at(1006 + 2 * keep.DU_SHARE, first)
    assert (counted, over["used"], over["state"], over["since"]) == (5, 101, "paused", 1048)
    still = at(1047, over)
    assert (counted, still["since"]) == (5, 1048)
    at(1048, over)
    assert counted == 6


def test_a_disk_counts_once_however_many_folders_are_on_it(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    whole, files = keep.on_disks([str(tmp_path)])
    assert whole > 0
    again = keep.on_disks([str(tmp_path), str(tmp_path / "b"), str(tmp_path / "gone")])
    assert again[0] == pytest.approx(whole, rel=0.01)
    assert again[1] == pytest.approx(files, rel=0.01)


def test_an_environments_containers_are_those_with_its_label_and_those_in_its_slice() -> None:
    build = container("build", Config={"Labels": None})
    prod = container("prod", Config={"Labels": {keep.LABEL: "prod"}}, HostConfig={"CgroupParent": "/bulkhead-prod"})
    moved = container("moved", HostConfig={"CgroupParent": ""})
    prober = container("prober", Config={"Labels": {keep.PROBE: "mark"}})  # it proves walls, and is waited for
    found = keep.members("dev", "/bulkhead-dev", [build, prod, moved, prober])
    assert [one["Id"] for one in found] == ["build", "moved"]


def declared(places: Places, engine: Mapping[str, Any] = V1, **environments: Mapping[str, Any]) -> None:
    places.declared.mkdir(parents=True)
    document = {"version": 1, "engine": engine, "environments": environments}
    (places.declared / "host.json").write_text(json.dumps(document))


DEV = {"tier": "best-effort", "cgroup_parent": "/bulkhead-dev", "files": {}, "oom_score_adj": 1000, "disk": 100}
PROD = {"tier": "protected", "cgroup_parent": "/bulkhead-prod", "files": {}, "oom_score_adj": 0, "disk": 100}


def run(places: Places, *words: str) -> int:
    parser = argparse.ArgumentParser()
    keep.add_arguments(parser)
    return keep.run(parser.parse_args(words), places)


def test_a_run_is_told_in_the_report_and_the_metrics(
    places: Places, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    declared(places, dev=DEV, prod=PROD)
    for name in ("dev", "prod"):
        group(places, f"memory/bulkhead-{name}/inner", 1 if name == "dev" else 2)
    dev, prod = process(places, 1, 0), process(places, 2, 0)
    engine = Engine(monkeypatch, "a")
    monkeypatch.setattr(keep, "inspected", lambda: [container(name, state) for name, state in engine.states.items()])
    monkeypatch.setattr(keep, "written_to", lambda *_: ([], []))
    found = iter((counts(101, 7, 9), counts(100, 10, 9), counts(100, 9, 9)))
    monkeypatch.setattr(keep, "counted", lambda *_: next(found))
    assert run(places) == 1
    assert (dev.read_text(), prod.read_text()) == ("1000", "0\n")
    report = json.loads((places.state / "keep.json").read_text())
    assert report["environments"]["dev"]["disk"]["state"] == "paused"
    assert report["environments"]["prod"]["disk"] is None  # a protected environment is never paused
    shown = (places.state / "metrics/keep.prom").read_text()
    assert "# TYPE bulkhead_keep_disk_paused gauge\n" in shown
    assert "# TYPE bulkhead_keep_undecided gauge\n" in shown
    values = dict(line.rsplit(" ", 1) for line in shown.splitlines() if not line.startswith("#"))
    values.pop("bulkhead_keep_last_run_timestamp_seconds")
    assert values == {
        'bulkhead_keep_disk_bytes{environment="dev"}': "101",
        'bulkhead_keep_disk_limit_bytes{environment="dev"}': "100",
        'bulkhead_keep_disk_inodes{environment="dev"}': "7",
        'bulkhead_keep_disk_inodes_limit{environment="dev"}': "9",
        'bulkhead_keep_disk_paused{environment="dev"}': "1",
        'bulkhead_keep_disk_over{environment="dev"}': "1",
        'bulkhead_keep_scored_processes{environment="dev"}': "1",
        'bulkhead_keep_scored_processes{environment="prod"}': "0",
        "bulkhead_keep_undecided": "0",
    }
    assert capsys.readouterr().out.startswith("PAUSED dev: 0.00 GiB on the disk, over its ceiling of 0.00 GiB: 1 con")
    assert run(places) == 1
    assert engine.states == {"a": "paused"}
    assert capsys.readouterr().out.startswith(
        "PAUSED dev: 10 files on the disk, over its share of 9 of the disk's inodes:"
    )
    assert run(places, "--news") == 0
    assert engine.states == {"a": "running"}
    told = capsys.readouterr().out
    assert told.startswith("dev: 1 processes scored (0 new), 0.00 GiB of 0.00 GiB on the disk\n")


def test_news_are_told_once(
    places: Places, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    declared(places, dev={**DEV, "disk": None})
    for words, told in ((["--news"], True), (["--news"], False), ([], True)):
        assert run(places, *words) == 0
        assert bool(capsys.readouterr().out) == told


def test_what_is_wrong_is_told_first() -> None:
    over = {"state": "released", "used": 3 * 2**30, "deleted": 2**30, "ceiling": 2**30, "paused": []}
    report = {
        "environments": {"dev": {"processes": 2, "scores_raised": 1, "disk": over}},
        "engine_scores": {"run/docker.pid": -499, "run/containerd.pid": -500},
        "undecided": ["no answer"],
    }
    first, second, third, *_ = keep.told(report)
    assert first.startswith(
        "OVER dev: 3.00 GiB on the disk (1.00 GiB deleted and still open), over its ceiling of 1.00"
    )
    assert second == "undecided: no answer"
    assert third.startswith("the engine (run/docker.pid) has OOM score -499")
    assert "containerd" not in "".join(keep.told(report))


def test_a_second_run_waits_for_the_first(places: Places) -> None:
    """It would take what the first paused for the user's doing."""
    declared(places, dev={**DEV, "disk": None})
    places.run.mkdir(parents=True)
    with (places.run / "keep.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        second = threading.Thread(target=run, args=(places,))
        second.start()
        second.join(0.3)
        assert not (places.state / "keep.json").exists()
    second.join(10)
    assert (places.state / "keep.json").exists()


@pytest.mark.parametrize("change", [{"disk": None}, {"tier": "protected"}])
def test_an_environment_whose_ceiling_is_taken_away_goes_on(
    places: Places, monkeypatch: pytest.MonkeyPatch, change: Mapping[str, Any]
) -> None:
    engine = Engine(monkeypatch, "a", "b", "of another")
    engine.states |= {"a": "paused", "of another": "paused"}
    declared(places, dev={**DEV, **change})
    before = {"state": "paused", "paused": ["a", "b"], "used": 101, "ceiling": 100}
    places.state.mkdir(parents=True)
    (places.state / "keep.json").write_text(json.dumps({"environments": {"dev": {"disk": before}}}))

    monkeypatch.setenv("PATH", str(places.root))  # no engine yet: it has to be known at the next run
    assert run(places) == 2
    assert engine.states["a"] == "paused"

    monkeypatch.setattr(keep, "inspected", lambda: [container(name, state) for name, state in engine.states.items()])
    assert run(places) == 0
    assert engine.states == {"a": "running", "b": "running", "of another": "paused"}
    assert json.loads((places.state / "keep.json").read_text())["environments"]["dev"]["disk"] is None


def test_an_environment_that_goes_on_stays_so_whatever_is_undecided_of_another(
    places: Places, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or what the user pauses in it later would be let go on at each run."""
    engine = Engine(monkeypatch, "a")
    engine.states["a"] = "paused"
    declared(places, dev={**DEV, "disk": None}, other={**DEV, "cgroup_parent": "/bulkhead-other"})
    before = {"state": "paused", "paused": ["a"], "used": 101, "ceiling": 100}
    places.state.mkdir(parents=True)
    (places.state / "keep.json").write_text(json.dumps({"environments": {"dev": {"disk": before}}}))
    monkeypatch.setattr(keep, "inspected", lambda: [container(name, state) for name, state in engine.states.items()])
    monkeypatch.setattr(keep, "written_to", lambda *_: ([], ["c1: its layer. Next step: find it"]))
    monkeypatch.setattr(keep, "counted", lambda *_: counts(7))
    assert run(places) == 2
    assert engine.states == {"a": "running"}
    assert json.loads((places.state / "keep.json").read_text())["environments"]["dev"]["disk"] is None


def test_files_that_take_too_long_to_count_are_told_and_hold_up_nobody_else(
    places: Places, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    declared(places, dev=DEV, other={**DEV, "cgroup_parent": "/bulkhead-other"})

    def count(_: int, __: object, paths: str, ___: Places, seconds: float) -> dict[str, int]:
        assert seconds == keep.DU_SECONDS / 2  # both within what the unit has
        if paths == "dev":
            raise subprocess.TimeoutExpired("du", seconds)
        return counts(7)

    monkeypatch.setattr(keep, "inspected", list)
    monkeypatch.setattr(keep, "written_to", lambda name, *_: (name, ["c1: its layer. Next step: find it"]))
    monkeypatch.setattr(keep, "on_disks", lambda _: (0, 0))
    monkeypatch.setattr(keep, "counted", count)
    assert run(places) == 2
    told = capsys.readouterr().out
    assert "undecided: dev: its files could not be counted within 100 s" in told
    assert "undecided: other: c1: its layer. Next step: find it\n" in told
    found = json.loads((places.state / "keep.json").read_text())["environments"]
    assert (found["dev"]["disk"], found["other"]["disk"]["used"]) == (None, 7)


def test_all_that_counts_is_counted_within_one_time_limit(places: Places, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files, what has no name any more of all processes of the slice, and inodes."""
    now = 0.0

    def took(answer: Any) -> Any:
        def answered(*words: Any) -> Any:
            nonlocal now
            asked.append(words)
            now += 10
            return answer

        return answered

    asked: list[Any] = []
    slice_ = group(places, "bulkhead-dev", 1)
    group(places, "bulkhead-dev/container", 2)
    monkeypatch.setattr(time, "monotonic", lambda: now)
    for name, answer in (("used", 5), ("deleted", 3), ("inodes", (7, 9))):
        monkeypatch.setattr(keep, name, took(answer))
    found = keep.counted(100, [slice_], ["/v"], places, 50)
    assert found == {"used": 8, "deleted": 3, "inodes": 7, "inodes_ceiling": 9}
    assert asked == [(["/v"], 50), ({1, 2}, ["/v"], places, 40), (["/v"], 100, 30)]


def test_without_an_engine_scores_are_kept_and_what_is_paused_is_remembered(
    places: Places, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    declared(places, dev=DEV)
    group(places, "memory/bulkhead-dev", 1)
    score = process(places, 1, 0)
    before = {"state": "paused", "paused": ["a"], "used": 101, "ceiling": 100}
    places.state.mkdir(parents=True)
    (places.state / "keep.json").write_text(json.dumps({"environments": {"dev": {"disk": before}}}))
    monkeypatch.setenv("PATH", str(places.root))
    assert run(places, "--json") == 2
    assert json.loads(capsys.readouterr().out) == json.loads((places.state / "keep.json").read_text())
    assert score.read_text() == "1000"
    report = json.loads((places.state / "keep.json").read_text())
    assert report["environments"]["dev"]["disk"] == before
    assert "docker" in report["undecided"][0]
