"""keep: OOM scores, v1 throttles and disk ceilings, on folders that look like /proc and /sys/fs/cgroup.
The engine is a script that keeps containers' states in files; the real one is in tests/e2e/test_slices.py."""

import argparse
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from host import keep
from host.machine import Places

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


def test_a_throttle_that_is_right_is_not_written_again_and_one_of_before_goes(places: Places) -> None:
    slice_ = group(places, "blkio/bulkhead-dev")
    declared = {f"/sys/fs/cgroup/blkio/bulkhead-dev/{throttle(slice_).name}": "254:0 100"}
    file = throttle(group(places, "blkio/bulkhead-dev/1", 1))
    file.write_text("254:0 100\n")
    keep.spread(declared, [slice_], places)
    assert file.read_text() == "254:0 100\n"
    assert keep.spread({}, [slice_], places) == 0
    assert file.read_text() == "254:0 0"


def container(identifier: str, status: str = "running", **more: Any) -> dict[str, Any]:
    made = {
        "Id": identifier,
        "State": {"Status": status},
        "Config": {"Labels": {keep.LABEL: "dev"}},
        "HostConfig": {"CgroupParent": "/bulkhead-dev"},
    }
    return made | more


class Engine:
    """The containers of `docker pause` and `unpause`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *identifiers: str) -> None:
        self.states = dict.fromkeys(identifiers, "running")
        monkeypatch.setattr(keep, "_each", self.each)

    def each(self, verb: str, identifiers: Any) -> None:
        self.states |= dict.fromkeys(identifiers, {"pause": "paused", "unpause": "running"}[verb])

    def hold(self, size: int, before: Mapping[str, Any], *, now: float, deploys: bool = False) -> dict[str, Any]:
        containers = [container(identifier, status) for identifier, status in self.states.items()]
        return keep.hold(100, size, containers, before, deploys, now)


def test_over_its_ceiling_an_environment_is_paused_and_goes_on_below(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(monkeypatch, "a", "b")
    assert engine.hold(100, {}, now=0)["state"] == "below"
    over = engine.hold(101, {}, now=0)
    assert over == {"state": "paused", "paused": ["a", "b"], "released_until": 0.0}
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


def test_an_environments_containers_are_those_with_its_label_and_those_in_its_slice() -> None:
    build = container("build", Config={"Labels": None})
    prod = container("prod", Config={"Labels": {keep.LABEL: "prod"}}, HostConfig={"CgroupParent": "/bulkhead-prod"})
    moved = container("moved", HostConfig={"CgroupParent": ""})
    found = keep.members("dev", "/bulkhead-dev", [build, prod, moved])
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
    monkeypatch.setattr(keep, "written_to", lambda *_: [])
    sizes = iter((101, 100))
    monkeypatch.setattr(keep, "used", lambda _: next(sizes))
    assert run(places) == 1
    assert (dev.read_text(), prod.read_text()) == ("1000", "0\n")
    report = json.loads((places.state / "keep.json").read_text())
    assert report["environments"]["dev"]["disk"]["state"] == "paused"
    assert report["environments"]["prod"]["disk"] is None  # a protected environment is never paused
    assert 'bulkhead_keep_disk_paused{environment="dev"} 1' in (places.state / "metrics/keep.prom").read_text()
    assert capsys.readouterr().out.startswith("PAUSED dev: ")
    assert run(places, "--news") == 0
    assert engine.states == {"a": "running"}
    assert "PAUSED" not in capsys.readouterr().out


def test_news_are_told_once(
    places: Places, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    declared(places, dev={**DEV, "disk": None})
    run(places, "--news")
    capsys.readouterr()
    assert run(places, "--news") == 0
    assert capsys.readouterr().out == ""


def test_without_an_engine_scores_are_kept_and_what_is_paused_is_remembered(
    places: Places, monkeypatch: pytest.MonkeyPatch
) -> None:
    declared(places, dev=DEV)
    group(places, "memory/bulkhead-dev", 1)
    score = process(places, 1, 0)
    before = {"state": "paused", "paused": ["a"], "used": 101, "ceiling": 100}
    places.state.mkdir(parents=True)
    (places.state / "keep.json").write_text(json.dumps({"environments": {"dev": {"disk": before}}}))
    monkeypatch.setenv("PATH", str(places.root))
    assert run(places, "--json") == 2
    assert score.read_text() == "1000"
    report = json.loads((places.state / "keep.json").read_text())
    assert report["environments"]["dev"]["disk"] == before
    assert "docker" in report["undecided"][0]
