"""Backups without a database: when a job is due, what alarms, what a restore refuses, what the settings refuse.
That data comes back is shown on a deployment (tests/e2e/test_backup.py)."""

import argparse
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath
from types import SimpleNamespace
from typing import Any, NoReturn

import pytest
from pydantic import ValidationError

from host import backup, engines, restic, restore
from host.backup import Job, Phases, State
from host.machine import Places
from host.restic import BackupError, Repository, Snapshot
from settings.backup import Backup, BackupSettings, BucketTarget, parse_span
from settings.errors import SettingsError

DAY = 86400.0
NOW = 1_800_000_000.0


@pytest.fixture(autouse=True)
def nothing_is_swept(monkeypatch: pytest.MonkeyPatch) -> Callable[[Sequence[Job]], None]:
    """What the engine of this machine runs is nobody's here. Returns what would sweep."""
    real = restore.swept
    monkeypatch.setattr(restore, "swept", lambda _: None)
    return real


def job(places: Places = Places(), **declared: Any) -> Job:  # noqa: B008 - frozen
    settings = {"volume": "prod-db-data", "service": "db", "engine": "postgres", "schedule": DAY, "at": None} | declared
    return Job("prod", "db-data", settings, {}, NOW - DAY, 8 * DAY, 7 * DAY, places)


def fine(**known: Any) -> dict[str, Any]:
    """What is known of a job that ran an hour ago and was verified."""
    return {"failures": 0, "last_success": NOW - 3600, "last_verified": NOW - 3600, "wal_at": NOW - 60} | known


# --- when


def test_a_job_that_never_ran_is_due_at_once() -> None:
    assert backup.due_at(job(), {"failures": 0}, NOW) == 0


def test_a_job_is_due_a_period_after_the_last_a_little_early_and_always_by_the_same() -> None:
    due = backup.due_at(job(), fine(), NOW)
    assert NOW - 3600 + 0.9 * DAY <= due <= NOW - 3600 + DAY
    assert due == backup.due_at(job(), fine(), NOW)


@pytest.mark.parametrize("hour", [0, 3, 12, 23])
def test_a_time_of_the_day_is_kept_whatever_the_last_run_took(hour: int) -> None:
    daily = job(at=hour * 60 + 30)
    due = datetime.fromtimestamp(backup.due_at(daily, fine(), NOW))
    assert (due.hour, due.minute) == (hour, 30)
    assert 0.5 * DAY <= due.timestamp() - (NOW - 3600) <= 1.5 * DAY


@pytest.mark.parametrize(("failures", "pause"), [(1, 60), (2, 120), (5, 960), (50, 3600)])
def test_a_job_that_failed_is_tried_again_with_growing_pauses(failures: int, pause: float) -> None:
    assert backup.due_at(job(), fine(failures=failures, last_attempt=NOW), NOW) == NOW + pause


def test_a_gap_makes_a_new_backup_due_at_once() -> None:
    assert backup.due_at(job(), fine(wanted=True), NOW) == 0


@pytest.mark.parametrize(
    ("known", "due"),
    [
        ({"failures": 0}, float("inf")),
        ({"last_success": NOW}, NOW + backup.DRILL_AFTER),
        ({"last_success": NOW, "last_verified": NOW}, NOW + 7 * DAY),
        ({"last_success": NOW, "drill_error": "x", "drill_at": NOW}, NOW + backup.LONGEST_PAUSE),
    ],
    ids=["nothing to restore", "an hour after the first", "a week after the last", "an hour after one that failed"],
)
def test_when_a_job_is_drilled(known: Mapping[str, Any], due: float) -> None:
    assert backup.drill_due_at(job(), known, NOW) == due


# --- alarms


def alarms(one: Job, known: Mapping[str, Any]) -> set[str]:
    return {what for what, _ in backup.alarms(one, known, NOW)}


def test_a_job_that_runs_and_is_verified_alarms_nobody() -> None:
    assert alarms(job(), fine()) == set()


@pytest.mark.parametrize(
    ("known", "alarm"),
    [
        ({"last_success": NOW - 1.6 * DAY}, "overdue"),
        ({"failures": 2, "error": "full"}, "failed"),
        ({"shrunk": "from 9 to 1 bytes"}, "shrunk"),
        ({"gap": "WAL is missing", "gap_at": NOW - 60}, "gap"),
        ({"unpruned": "99 backups"}, "not pruned"),
        ({"wal_error": "no space"}, "WAL failed"),
        ({"wal_at": NOW - 3600}, "WAL overdue"),
        ({"last_verified": NOW - 8.1 * DAY}, "not verified"),
        ({"drill_error": "lost a table"}, "drill failed"),
        ({"last_success": NOW + 3600}, "clock"),
        ({"last_verified": NOW + 3600}, "clock"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_somebody_has_to_look_at(known: dict[str, Any], alarm: str) -> None:
    assert alarms(job(), fine(**known)) == {alarm}


def test_what_was_noted_before_the_clock_was_set_back_keeps_nothing_from_running_and_is_told() -> None:
    """By an hour or by years: else nothing would be backed up until it is that time again."""
    for ahead in (3600.0, 1000 * DAY):
        noted = fine(**dict.fromkeys(("last_success", "wal_at", "last_verified"), NOW + ahead))
        assert backup.due_at(job(), noted, NOW) <= NOW
        assert backup.wal_due_at(noted, NOW) <= NOW
        assert backup.drill_due_at(job(), noted, NOW) <= NOW
        assert backup.due_at(job(), fine(failures=1, last_attempt=NOW + ahead), NOW) <= NOW
        assert alarms(job(), noted) == {"clock", "WAL overdue"}
    moved = fine(last_success=NOW + 5, wal_at=NOW + 5)  # as a time server does
    assert backup.due_at(job(), moved, NOW) > NOW
    assert backup.wal_due_at(moved, NOW) > NOW
    assert alarms(job(), moved) == set()


def test_a_database_that_was_emptied_alarms_until_its_rows_are_back_or_somebody_says_that_this_is_the_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its files are as large as before. Meanwhile no older backup is let go of."""
    pruned: list[float] = []
    amounts: list[tuple[int, dict[str, int | None]]] = []

    def take(*_: object) -> Snapshot:
        size, rows = amounts[0]
        return replace(snapshot("a", NOW), size=size, facts={"rows": rows})

    places = Places(tmp_path)
    one = replace(job(places, retain={}), repositories={"disk": repository()})
    monkeypatch.setitem(backup.TAKE, "postgres", take)
    monkeypatch.setattr(backup, "prune", lambda *_: pruned.append(NOW))
    monkeypatch.setattr(backup, "wal_meanwhile", lambda _: nullcontext())
    state = State(places)

    def shrunk(size: int, **rows: int | None) -> str | None:
        amounts[:] = [(size, rows)]
        pruned.clear()
        assert backup.back_up(one, state, print, hurry=False)
        told = state.known(one)["shrunk"]
        assert bool(told) != bool(pruned)
        return None if told is None else str(told)

    assert shrunk(1000, orders=90, jobs=10, large=None) is None
    assert shrunk(1000, orders=89, jobs=0, large=7) is None  # a queue is empty now and then
    emptied = shrunk(1000, orders=0, jobs=9, large=7)
    assert emptied is not None
    assert emptied.startswith("from 96 to 16 rows since")
    assert "make backup ENV=prod ARGS=--anew" in emptied
    assert shrunk(1000, orders=0, jobs=9, large=7) is not None  # also when it was so the day before
    assert shrunk(1000, jobs=9, large=7) is not None  # a table that is gone has no rows
    assert shrunk(1000, orders=80, jobs=9, large=None) is None
    assert "from 1000 to 499 bytes" in str(shrunk(499, orders=80, jobs=9))
    assert shrunk(1000, orders=None, jobs=9) is None  # what could not be counted is no loss
    backup.begun_anew(one, state)  # restored, on purpose
    assert shrunk(10, orders=1) is None


def test_a_job_that_was_never_scheduled_is_overdue_and_not_verified_in_time() -> None:
    """No run has left a word: the time of its declaration counts."""
    forgotten = replace(job(), since=NOW - 9 * DAY)
    assert alarms(forgotten, {"failures": 0}) == {"overdue", "not verified", "WAL overdue"}
    assert alarms(replace(forgotten, since=NOW - 60), {"failures": 0}) == set()


def declared(places: Places, **changed: Any) -> None:
    one = {"volume": "v", "service": "db", "engine": "files", "schedule": 60, "at": None, "targets": {}, **changed}
    file = places.declared / "backup/dev.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    document = {"password": "p", "verified_within": 100, "drill": 50, "jobs": {"data": one}}
    file.write_text(json.dumps(document))


def test_alarms_come_from_what_is_declared_and_what_is_known(tmp_path: Path) -> None:
    places = Places(tmp_path)
    declared(places)
    assert list(backup.alarming(places)) == []
    os.utime(places.declared / "backup/dev.json", (0, 0))
    assert {what for _, what, _ in backup.alarming(places)} == {"overdue", "not verified"}


def test_when_each_volume_was_backed_up_and_verified_is_told_as_json(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    places = Places(tmp_path)
    declared(places)
    words = argparse.ArgumentParser()
    backup.add_arguments(words)
    for success, verified in ((None, None), (NOW - 5, NOW)):
        assert backup.run(words.parse_args(["--last"]), places) == 0
        assert json.loads(capsys.readouterr().out) == {"v": {"last_success": success, "last_verified": verified}}
        state = State(places)
        state.of(*backup.jobs(places)).update(last_success=NOW - 5, last_verified=NOW)
        state.save([])


def test_a_job_without_a_target_fails_loudly_and_is_recorded(tmp_path: Path) -> None:
    places = Places(tmp_path)
    declared(places)
    (one,) = backup.jobs(places)
    state, said = State(places), list[str]()
    assert not backup.back_up(one, state, said.append, hurry=True)
    state.save([one])
    assert "no target" in said[-1]
    assert State(places).of(one)["failures"] == 1
    (record,) = map(json.loads, (places.state / "backup/records.jsonl").read_text().splitlines())
    assert record["kind"] == "backup"
    assert "no target" in record["error"]
    assert (
        'bulkhead_backup_failures{environment="dev",job="data"} 1' in (places.state / "metrics/backup.prom").read_text()
    )


def test_a_bucket_that_nobody_prunes_is_told_and_one_that_the_host_prunes_is_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(backup, "WAL_UNPRUNED", 4)
    one = job(retain={"last": 2, "daily": None, "weekly": 1})
    bases, wal = [snapshot("a", NOW)] * 6, [snapshot("b", NOW, "wal")] * 4

    def told(found: Sequence[Snapshot], *, append_only: bool = True) -> str:
        made = repository(*found)
        object.__setattr__(made, "append_only", append_only)
        return backup.unpruned(one, [made]) or ""

    assert told([*bases, *wal]) == ""
    much = "7 backups in /srv/backup/prod, and 4 times WAL; at most 3 backups are to be kept"
    assert told([*bases, *wal, bases[0]]) == much
    assert "and 5 times WAL" in told([*bases, *wal, wal[0]])
    assert told([*bases, *wal, bases[0]], append_only=False) == ""


def test_what_a_backup_finds_unpruned_is_an_alarm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    places = Places(tmp_path)
    declared(places)
    (one,) = backup.jobs(places)
    state = State(places)
    monkeypatch.setattr(backup, "saved", lambda *_, **__: snapshot("a", NOW))
    monkeypatch.setattr(backup, "unpruned", lambda *_: "99 backups")
    assert backup.back_up(one, state, print, hurry=True)
    assert ("not pruned", "99 backups") in backup.alarms(one, state.of(one), time.time())


def records(places: Places) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (places.state / "backup/records.jsonl").read_text().splitlines()]


def test_a_phase_goes_on_until_the_next_and_adds_to_what_it_took_before(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([100.0, 101.0, 103.0, 106.0, 110.0])
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    phases = Phases("server")
    for name in ("save", "server", "forget"):
        phases.begin(name)
    assert phases.ended() == {"server": 4.0, "save": 2.0, "forget": 4.0}


def test_a_record_says_how_long_each_phase_took_also_of_a_run_that_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "volume").mkdir()
    target = {"repository": str(tmp_path / "target"), "variables": {}, "append_only": False}
    places = Places(tmp_path)
    declared(places, targets={"disk": target}, retain={"last": 1})
    monkeypatch.setattr(engines, "mountpoint", lambda _: tmp_path / "volume")
    (one,) = backup.jobs(places)
    assert backup.back_up(one, State(places), print, hurry=True)
    (tmp_path / "volume").rmdir()
    assert not backup.back_up(one, State(places), print, hurry=True)
    good, failed = records(places)
    assert set(good["phases"]) == {"server", "save", "forget"}
    assert sum(good["phases"].values()) == pytest.approx(good["end"] - good["start"], abs=0.5)
    assert set(failed["phases"]) == {"server", "save"}


@pytest.mark.parametrize(
    ("asked", "phases"), [((), {"stop"}), (("--to=v",), {"stop"}), (("--yes",), {"stop", "exchange"})]
)
def test_a_restore_is_recorded_with_its_phases_whether_it_is_put_in_place_or_not(
    asked: Sequence[str], phases: set[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    places = Places(tmp_path)
    one = replace(job(places), repositories={"disk": repository()})
    done = restore.Restored(one, "fresh", snapshot("a", NOW), NOW, Phases("stop"))
    monkeypatch.setattr(restore, "restored", lambda *_: done)
    monkeypatch.setattr(restore, "newer", lambda *_: "")
    monkeypatch.setattr(restore, "swapped", lambda *_: "kept")
    parser = argparse.ArgumentParser()
    restore.add_arguments(parser)
    assert restore.put_back(one, parser.parse_args(asked), State(places), places) == 0
    (record,) = records(places)
    assert (record["kind"], set(record["phases"])) == ("restore", phases)
    assert ("volume" in record) == ("--yes" not in asked)


def test_a_drill_is_recorded_with_its_phases_the_check_of_the_repository_among_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    places = Places(tmp_path)
    one = replace(job(places), repositories={"disk": repository()})
    done = restore.Restored(one, "fresh", snapshot("a", NOW), NOW, Phases("stop"))
    monkeypatch.setattr(restore, "restored", lambda *_: done)
    monkeypatch.setattr(restore, "ask", lambda *_: "")
    monkeypatch.setattr(Repository, "call", lambda *_, **__: "")
    assert restore.drilled(one, State(places), print)
    (record,) = records(places)
    assert set(record["disk"]["phases"]) == {"stop", "check"}


def test_drills_read_all_of_a_repository_in_turn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A random part of it each time would leave damage in an older backup unseen for months."""
    places = Places(tmp_path)
    parts: list[str] = []
    one = replace(job(places), repositories={"disk": repository()})

    def call(_: Repository, verb: str, *words: str, **__: object) -> str:
        parts.extend(word.partition("=")[2] for word in words if verb == "check")
        return ""

    monkeypatch.setattr(
        restore, "restored", lambda *_: restore.Restored(one, "v", snapshot("a", NOW), NOW, Phases("stop"))
    )
    monkeypatch.setattr(restore, "ask", lambda *_: "")
    monkeypatch.setattr(Repository, "call", call)
    state = State(places)
    for _ in range(11):
        assert restore.drilled(one, state, print)
    assert parts == [*(f"{part}/10" for part in range(1, 11)), "1/10"]


@pytest.mark.parametrize("saved", [True, False])
def test_a_drill_that_finds_fewer_rows_sees_whether_they_were_deleted_since_or_never_saved(
    saved: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    places, asked = Places(tmp_path), []
    one = replace(job(places), repositories={"disk": repository()})
    done = restore.Restored(one, "v", snapshot("a", NOW), NOW, Phases("stop"), {"fewer": ["table orders: 0 rows"]})

    def restored(_job: Job, _repository: object, at: str, *_: object) -> restore.Restored:
        asked.append(at)
        if at != "latest" and not saved:
            raise BackupError("restored, and not as it was: table orders: 0 rows")
        return done

    monkeypatch.setattr(restore, "restored", restored)
    monkeypatch.setattr(restore, "ask", lambda *_: "")
    monkeypatch.setattr(Repository, "call", lambda *_, **__: "")
    state = State(places)
    assert restore.drilled(one, state, print) is saved
    assert asked == ["latest", done.snapshot.id]
    assert bool(state.of(one).get("drill_error")) is not saved


def test_a_job_is_called_by_its_volume_or_its_service_and_another_name_is_an_error(tmp_path: Path) -> None:
    places = Places(tmp_path)
    declared(places)
    for name in ("data", "v", "db"):
        assert [one.name for one in backup.jobs(places, ["dev"], [name])] == ["data"]
    with pytest.raises(BackupError, match="dev/data"):
        backup.jobs(places, ["dev"], ["other"])


def test_a_job_that_cannot_even_be_noted_does_not_keep_the_others_from_being_backed_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As when the state's disk is full: the exit code is one that the unit does not take for a run that was told of."""
    places, done = Places(tmp_path), []
    declared(places)
    (places.declared / "backup/prod.json").write_text((places.declared / "backup/dev.json").read_text())

    def worked(job: Job, *_: object) -> bool:
        done.append(job.environment)
        if job.environment == "dev":
            raise OSError(errno.ENOSPC, "No space left on device")
        return True

    monkeypatch.setattr(backup, "worked", worked)
    asked = argparse.ArgumentParser()
    backup.add_arguments(asked)
    assert backup.run(asked.parse_args([]), places) == 2
    assert sorted(done) == ["dev", "prod"]
    assert "dev/data: FAILED, and could not be noted" in capsys.readouterr().err


def test_the_second_run_is_told_who_is_at_it(tmp_path: Path) -> None:
    places = Places(tmp_path)
    with backup.alone(places, "drill") as first, backup.alone(places, "backup") as second:
        assert (first, second) == (True, False)
        assert f"drill, process {os.getpid()}" in backup.holder(places)
    with backup.alone(places, "backup") as again:
        assert again


def test_a_run_that_goes_on_is_ended_and_waited_for(tmp_path: Path) -> None:
    places = Places(tmp_path)
    assert backup.stop(places) == 0
    program = (
        "import signal, sys, time; from pathlib import Path; from host import backup; from host.machine import Places\n"
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))\n"
        "with backup.alone(Places(Path(sys.argv[1])), 'drill'): print('up', flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", program, str(tmp_path)], stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == b"up\n"
        assert backup.stop(places) == 0
        assert child.wait(timeout=30) == 143


def test_an_environment_whose_data_is_yet_to_come_is_not_backed_up_by_schedule(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    places = Places(tmp_path)
    declared(places)
    mark = places.declared / "backup/dev.held"
    due = argparse.ArgumentParser()
    backup.add_arguments(due)
    mark.touch()
    assert backup.run(due.parse_args(["--due"]), places) == 0
    assert capsys.readouterr().out == ""
    assert "held" in {what for _, what, _ in backup.alarming(places)}
    mark.unlink()
    assert backup.run(due.parse_args(["--due"]), places) == 1
    assert "no target" in capsys.readouterr().out


def test_data_that_is_yet_to_come_back_is_backed_up_when_somebody_says_that_this_is_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    places = Places(tmp_path)
    declared(places)
    mark = places.declared / "backup/dev.held"
    mark.touch()
    (places.declared / "backup/prod.json").write_text((places.declared / "backup/dev.json").read_text())
    order: list[str] = []

    def worked(job: Job, *_: object) -> bool:
        order.append(job.environment)
        return True

    monkeypatch.setattr(backup, "worked", worked)
    asked = argparse.ArgumentParser()
    backup.add_arguments(asked)
    assert backup.run(asked.parse_args([]), places) == 1
    assert order == ["prod"]
    assert "make restore for each volume" in capsys.readouterr().err
    assert mark.exists()
    assert backup.run(asked.parse_args(["--anew"]), places) == 1
    assert "name the environment" in capsys.readouterr().err
    assert mark.exists()
    assert backup.run(asked.parse_args(["--anew", "--environment", "dev"]), places) == 0
    assert not mark.exists()
    assert "held" not in {what for _, what, _ in backup.alarming(places)}


def test_protected_environments_are_backed_up_first_and_a_job_that_fails_stops_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    places = Places(tmp_path)
    declared(places)
    file = places.declared / "backup/dev.json"
    file.with_name("prod.json").write_text(file.read_text())
    environments = {"dev": {"tier": "best-effort"}, "prod": {"tier": "protected"}}
    (places.declared / "host.json").write_text(json.dumps({"environments": environments}))
    order: list[str] = []

    def saved(job: Job, *_: object, **__: bool) -> Snapshot:
        order.append(job.environment)
        if job.environment == "prod":
            raise IndexError("an odd answer")
        return snapshot("a", NOW)

    monkeypatch.setattr(backup, "saved", saved)
    monkeypatch.setattr(backup, "unpruned", lambda *_: None)
    asked = argparse.ArgumentParser()
    backup.add_arguments(asked)
    assert backup.run(asked.parse_args([]), places) == 1
    assert order == ["prod", "dev"]
    told = {job.environment: known for job, what, known in backup.alarming(places) if what == "failed"}
    assert told == {"prod": "1 times: IndexError: an odd answer"}


def test_a_repository_that_was_there_and_is_gone_is_not_begun_anew_by_itself(tmp_path: Path) -> None:
    """Its disk is not mounted: what would be backed up to is the folder below."""
    source = tmp_path / "source"
    source.mkdir()
    target = {"repository": str(tmp_path / "target"), "variables": {}, "append_only": False}
    places = Places(tmp_path)
    declared(places, targets={"disk": target})
    (one,) = backup.jobs(places)
    (repository,) = one.targets
    repository.save_folder(source, ["job:j"])
    away = tmp_path / "away"
    Path(repository.url).rename(away)
    for _ in range(2):
        with pytest.raises(BackupError, match="make backup ENV=… ARGS=--anew"):
            repository.save_folder(source, ["job:j"])
    assert not Path(repository.url).exists()
    assert repository.mark
    repository.mark.unlink()
    repository.save_folder(source, ["job:j"])
    Path(repository.url, "config").unlink()
    (tmp_path / "second").mkdir()
    second = replace(repository, url=str(tmp_path / "second"), mark=None)
    second.copy_from(replace(repository, url=str(away)))  # which is made by that
    assert len(second.snapshots()) == 1


def test_what_is_stored_beside_the_backups_comes_back_and_the_newest_ten_are_kept(
    real: Repository, tmp_path: Path
) -> None:
    places = Places(tmp_path)
    one = replace(job(places), repositories={"disk": real})
    for number in range(11):
        assert backup.stored([one], "deployer", f"state {number}".encode(), places) == 0
    found = real.snapshots("job:deployer", "kind:state")
    assert len(found) == 10
    command = real.dump(found[-1].id, "/deployer.tar.gz")
    assert subprocess.run(command, env=real.environment, capture_output=True, check=True).stdout == b"state 10"


# --- PostgreSQL's WAL


@pytest.mark.parametrize(
    ("segment", "after"),
    [
        ("000000010000000000000001", "000000010000000000000002"),
        ("0000000100000000000000FF", "000000010000000100000000"),
        ("00000002000000FE000000FF", "00000002000000FF00000000"),
    ],
)
def test_the_segment_after_a_segment(segment: str, after: str) -> None:
    assert engines.following(segment) == after


def test_of_wal_only_what_a_base_backup_can_need_is_brought_back(real: Repository, tmp_path: Path) -> None:
    spool, numbers = tmp_path / "wal", (0x0, 0x1E, 0x1F, 0x20, 0xFF, 0x1_0000_001F, 0x2_0000_0000)
    spool.mkdir()
    for number in numbers:
        for timeline in (1, 2):
            (spool / f"{timeline:08X}{number:016X}").touch()
    for name in ("00000002.history", "00000001000000000000001E.partial", "000000020000000200000001.partial"):
        (spool / name).touch()
    wal = real.save_folder(spool, ["job:j"])

    def brought(*only: str) -> set[str]:
        there = tmp_path / f"there-{len(only)}"
        there.mkdir()
        real.restore(wal.id, there, only)
        return {path.name for path in there.rglob("*") if path.is_file()}

    every = {path.name for path in spool.iterdir()}
    assert brought() == every
    wanted = brought(*engines.since("00000001000000000000001F"))
    assert wanted == {name for name in every if name.endswith(".history") or name[8:24] >= f"{0x1F:016X}"}
    assert brought(*engines.since("0000000200000001FFFFFFFF")) == {
        "00000002.history", "000000020000000200000001.partial", *(f"{one:08X}{numbers[-1]:016X}" for one in (1, 2)),
    }  # fmt: skip


@pytest.mark.parametrize(
    "segment", ["00000001000000000000001F", None]
)  # None: of a base backup from before it was known
def test_a_restore_asks_for_wal_from_the_segment_that_its_base_backup_knows(
    segment: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Sequence[str]] = []

    def brought(_: Repository, __: str, ___: Path, only: Sequence[str] = ()) -> None:
        asked.append(only)

    monkeypatch.setattr(Repository, "restore", brought)
    monkeypatch.setattr(Repository, "size", lambda *_: 0)
    monkeypatch.setattr(restore, "mountpoint", lambda _: tmp_path)
    monkeypatch.setattr(restore, "recovery", lambda *_: nullcontext())
    monkeypatch.setattr(restore, "asked_postgres", lambda *_: {"problems": []})
    for step in ("template", "same_version", "unpack"):
        monkeypatch.setattr(restore, step, lambda *_: None)
    base = replace(snapshot("aaaa", NOW), facts={"at": NOW, **({"segment": segment} if segment else {})})
    kept, one = repository(base, snapshot("b", NOW + 50, "wal")), job(Places(tmp_path))
    restore.restore_postgres(one, kept, base, None, "fresh", Phases("prepare"), print)
    assert asked == [engines.since(segment) if segment else ()]


def test_a_base_backup_knows_the_segment_of_wal_that_it_begins_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mounts = [{"Name": "v", "Destination": "/data"}]
    monkeypatch.setattr(engines.Container, "said", lambda *_, **__: "150004|00000001000000000000001F\n")
    server = postgres({"Id": "x", "Mounts": mounts}, "/data/15", tmp_path)
    facts = server.facts()
    assert (facts["version"], facts["segment"], facts["inside"]) == (150004, "00000001000000000000001F", "15")


def test_a_file_is_copied_once_and_again_when_it_was_written_to(tmp_path: Path) -> None:
    source, target = tmp_path / "wal", tmp_path / "copy"
    source.write_bytes(b"one")
    folder = os.open(tmp_path, os.O_RDONLY)
    try:
        assert engines.copied_from(folder, "wal", target) == 1
        assert engines.copied_from(folder, "wal", target) == 0
        source.write_bytes(b"two")
        os.utime(source, ns=(1, 1))
        assert engines.copied_from(folder, "wal", target) == 1
        assert target.read_bytes() == b"two"
    finally:
        os.close(folder)


def test_no_link_in_a_volume_leads_root_to_a_file_of_the_host(tmp_path: Path) -> None:
    volume, secret = tmp_path / "volume", tmp_path / "secret"
    (volume / "15").mkdir(parents=True)
    secret.mkdir()
    (volume / "15/pg_wal").symlink_to(secret)
    with pytest.raises(BackupError, match="a link is in its path"), engines.opened(volume, volume / "15/pg_wal"):
        pass
    (volume / "15/pg_wal").unlink()
    (volume / "15/pg_wal").mkdir()
    (volume / "15/pg_wal/000000010000000000000001").symlink_to("/etc/hostname")
    with engines.opened(volume, volume / "15/pg_wal") as folder, pytest.raises(BackupError, match="symbolic links"):
        engines.copied_from(folder, "000000010000000000000001", tmp_path / "copy")


def test_what_is_no_file_holds_up_nothing_and_a_file_is_read_only_as_far_as_it_should_be_long(tmp_path: Path) -> None:
    """Who runs in an environment owns what is in its volumes: a pipe there would be waited for without end."""
    os.mkfifo(tmp_path / "00000002.history")
    os.mkfifo(tmp_path / "postmaster.pid")
    with engines.opened(tmp_path, tmp_path) as folder, pytest.raises(BackupError, match="not a file"):
        engines.copied_from(folder, "00000002.history", tmp_path / "copy")
    with pytest.raises(BackupError, match="not a file"):
        engines.read_inside(tmp_path, tmp_path / "postmaster.pid")
    (tmp_path / "postmaster.pid").unlink()
    (tmp_path / "postmaster.pid").symlink_to("/etc/passwd")
    with pytest.raises(BackupError, match="symbolic links"):
        engines.read_inside(tmp_path, tmp_path / "postmaster.pid")
    (tmp_path / "long").write_text("x" * 10_000)
    assert len(engines.read_inside(tmp_path, tmp_path / "long")) == 4096
    with pytest.raises(BackupError, match="No such file"):
        engines.read_inside(tmp_path, tmp_path / "gone")


def test_redis_keys_are_those_of_all_databases() -> None:
    told = "# Keyspace\r\ndb0:keys=12,expires=3,avg_ttl=0\r\ndb3:keys=1,expires=0,avg_ttl=0\r\n"
    assert engines.keys(told) == {"keys": 13, "expires": 3}
    assert engines.keys("# Keyspace\r\n") == {"keys": 0, "expires": 0}


def test_what_a_redis_has_read_is_counted_with_what_had_expired_by_then_where_it_tells() -> None:
    told = "loading:0\r\nrdb_last_load_keys_expired:5\r\nrdb_last_load_keys_loaded:12\r\naof_enabled:0\r\n"
    assert engines.loaded(told) == 17
    assert engines.loaded("loading:0\r\n") is None  # before version 7


def counts(told: str, error: str = "", code: int = 0) -> tuple[list[str], Callable[[], dict[str, int | None]]]:
    """A server with two databases, of which one has tables: the scripts that it gets, and what counts its rows."""
    scripts: list[str] = []

    def script(text: str, database: str) -> "subprocess.CompletedProcess[str]":
        scripts.append(text)
        return subprocess.CompletedProcess([], code, told if database == "shop" else "", error)

    return scripts, lambda: engines.counted(lambda _: "postgres\nshop\n", script, 10)


def test_the_rows_of_all_tables_are_counted_by_one_client_for_each_database() -> None:
    told = "table|public.orders\ntable|public.a|b\ntable|public.big\nrows|public.a|b|2\nrows|public.orders|1000\n"
    late = "psql:<stdin>:12: FEHLER:  57014: storniere Anfrage wegen Zeitüberschreitung\nORT:  ProcessInterrupts\n"
    scripts, count = counts(told, late)
    assert count() == {"shop.public.orders": 1000, "shop.public.a|b": 2, "shop.public.big": None}
    assert len(scripts) == 2
    assert "set statement_timeout = '10s'" in scripts[0]
    assert "select ''rows'', %L, count(*) from %I.%I" in scripts[0]


@pytest.mark.parametrize(
    ("told", "error", "code"),
    [
        ("table|public.gone\n", "ERROR:  42P01: relation does not exist", 0),
        ("", "ERROR:  57014: canceling statement due to user request", 3),
        ("table|public.a\nrows|public.a|1\n", "the connection to the server was lost", 2),
    ],
)
def test_tables_that_could_not_be_counted_for_another_reason_than_time_are_an_error(
    told: str, error: str, code: int
) -> None:
    with pytest.raises(BackupError, match=error):
        counts(told, error, code)[1]()


def test_a_script_is_read_by_a_command_in_a_container_which_does_not_go_on_for_ever(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(engines.Container, "command", lambda _, *words, **__: list(words))
    container = engines.Container({"Id": "x"})
    assert container.typed("select 1", "cat").stdout == "select 1"
    with pytest.raises(BackupError, match="no answer within"):
        container.typed("", "sleep", "60", seconds=0.1)


def postgres(inspected: Mapping[str, Any] = {"Id": "x"}, data: str = "", folder: Path = Path()) -> engines.Postgres:
    """A server in a container, with its cluster there and on the host."""
    container = engines.Container(inspected)
    return engines.Postgres(container, "v", PurePosixPath("/bin"), 1, PurePosixPath(data), folder, "/tmp", 1, (), "u")


class Server:
    """A PostgreSQL server whose WAL is archived: `new` files at the next time. `given_up`: what it may keep at most."""

    def __init__(self) -> None:
        self.new, self.identity, self.given_up = 1, "1", list[int]()
        self.folder, self.with_base = Path("/"), list[int]()

    def cluster(self) -> str:
        return self.identity

    def hold(self) -> None:
        """It does."""

    def position(self) -> str:
        return "0/1"

    def archive(self, spool: Path) -> tuple[int, bool]:
        spool.mkdir(parents=True, exist_ok=True)
        copied, self.new = self.new, 0
        for _ in range(copied):
            (spool / f"{len(list(spool.iterdir())):024X}").write_text("wal")
        return copied, False

    def let_go(self, most: int, with_base: int) -> None:
        self.given_up.append(most)
        self.with_base.append(with_base)


@pytest.mark.parametrize("ends", [BackupError("the target is full"), SystemExit(143)], ids=str)
def test_a_base_backup_that_nobody_reads_any_more_is_ended_in_its_server_too(
    ends: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What runs in a container outlives the `docker exec` that has started it, also that of a run that was killed."""
    asked: list[str] = []

    def query(_: object, sql: str, __: str = "") -> str:
        asked.append(sql)
        return ""

    def save_stream(_: Repository, command: Sequence[str], *__: object) -> Snapshot:
        asked.append(" ".join(command))
        raise ends

    server = postgres()
    monkeypatch.setattr(engines.Postgres, "query", query)
    monkeypatch.setattr(engines.Postgres, "facts", lambda _: {})
    monkeypatch.setattr(engines.Postgres, "of", lambda *_: server)
    monkeypatch.setattr(Job, "container", lambda _: server.container)
    monkeypatch.setattr(Job, "wal", False)
    monkeypatch.setattr(backup, "history", lambda *_: ("1", False))
    monkeypatch.setattr(Repository, "save_stream", save_stream)
    with pytest.raises(type(ends)):
        backup.take_postgres(job(Places(tmp_path)), repository(), False, Phases("server"))
    assert asked[0].startswith("select pg_terminate_backend(pid)")
    started, ended = asked[-2:]
    assert f"application_name={engines.BASE}" in started
    assert ended.startswith("select pg_terminate_backend(pid)")
    assert ended.endswith(f"= '{engines.BASE}'")


class Taken(Repository):
    """A repository that counts what it was given; `away`: it takes nothing."""

    away: bool
    times: int

    def save_folder(self, _folder: Path, _tags: Sequence[str], _seconds: float = 0) -> Snapshot:
        if self.away:
            raise BackupError("the target does not answer")
        object.__setattr__(self, "times", self.times + 1)
        return snapshot("a", NOW, "wal")


def taken(name: str, *, away: bool = False) -> Taken:
    made = Taken(f"/srv/{name}", "key", Path("/nowhere"))
    object.__setattr__(made, "away", away)
    object.__setattr__(made, "times", 0)
    return made


@pytest.fixture
def archiving(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Server, Callable[..., bool]]:
    """A server, and what archives its WAL into these repositories, with all that is known of the job in `.known`."""
    server, places = Server(), Places(tmp_path)
    monkeypatch.setattr(Job, "container", lambda _: None)
    monkeypatch.setattr(engines.Postgres, "of", lambda *_: server)

    def archive(*targets: Repository) -> bool:
        one = replace(job(places), repositories={target.url: target for target in targets})
        state = State(places)
        try:
            return backup.archive(one, state, print)
        finally:
            state.save([one])

    return server, archive


def known(tmp_path: Path) -> dict[str, Any]:
    return State(Places(tmp_path)).known(job())


def test_wal_that_a_target_did_not_take_goes_there_later_also_when_nothing_is_new(
    archiving: tuple[Server, Callable[..., bool]], tmp_path: Path
) -> None:
    server, archive = archiving
    here, there = taken("here"), taken("there", away=True)
    assert not archive(here, there)
    assert (here.times, known(tmp_path)["unsaved"]) == (1, ["/srv/there"])
    assert not archive(here, there)
    assert "does not answer" in known(tmp_path)["wal_error"]
    object.__setattr__(there, "away", False)
    assert archive(here, there)
    assert (here.times, there.times, known(tmp_path)["unsaved"]) == (1, 1, [])
    assert archive(here, there)
    assert (here.times, there.times) == (1, 1)
    assert server.given_up == [backup.SLOT_BYTES] * 4


def test_wal_is_archived_again_and_again_while_a_long_run_goes_on_and_no_longer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told, places = tmp_path / "told", Places(tmp_path)
    both = [replace(job(places), environment="prod"), replace(job(places), environment="dev")]
    monkeypatch.setattr(backup, "jobs", lambda _: [*both, *both, replace(job(places, engine="files"), environment="x")])
    monkeypatch.setattr(backup, "WAL_SECONDS", 0.05)
    monkeypatch.setattr(backup, "program", lambda: ["sh", "-c", f'echo "$@" >> {told}', "sh"])
    with backup.wal_meanwhile(places):
        until(lambda: told.exists() and len(told.read_text().splitlines()) > 3)
    after = told.read_text()
    assert set(after.splitlines()) == {f"backup --wal --environment {name}" for name in ("prod", "dev")}
    time.sleep(0.3)
    assert told.read_text() == after


def test_a_server_that_answers_slowly_holds_up_its_own_wal_only_and_no_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told, places = tmp_path / "told", Places(tmp_path)
    monkeypatch.setattr(backup, "jobs", lambda _: [replace(job(places), environment=name) for name in ("dev", "prod")])
    monkeypatch.setattr(backup, "WAL_SECONDS", 0.05)
    script = f'echo "$4" >> {told}; if [ "$4" = dev ]; then exec sleep 60; fi'
    monkeypatch.setattr(backup, "program", lambda: ["sh", "-c", script, "sh"])
    began = time.monotonic()
    with backup.wal_meanwhile(places):
        until(lambda: told.exists() and told.read_text().count("prod") > 2)
    assert told.read_text().count("dev") == 1
    assert time.monotonic() - began < 30


def test_wal_alone_is_archived_where_it_is_due_and_nobody_is_at_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    places, done = Places(tmp_path), list[str]()

    def archive(one: Job, *_: Any) -> bool:
        done.append(one.key)
        return True

    monkeypatch.setattr(backup, "archive", archive)
    monkeypatch.setattr(backup, "deploying", lambda _: frozenset({"eu"}))
    every = [replace(job(places), environment=name) for name in ("prod", "late", "eu", "files", "busy")]
    every[3] = replace(every[3], declared={**every[3].declared, "engine": "files"})
    state = State(places)
    state.note_wal(every[1], wal_at=time.time())
    with backup.between_wal(every[4], "prune"):
        assert backup.behind(every, state, every, places)
    assert done == ["prod/db-data"]


def test_what_wants_a_repository_for_itself_and_the_archiving_of_wal_wait_for_each_other(
    archiving: tuple[Server, Callable[..., bool]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, archive = archiving
    monkeypatch.setattr(backup, "WAIT_SECONDS", 0.3)
    with backup.between_wal(job(Places(tmp_path)), "prune"):
        assert not archive(taken("here"))
        assert "wal_error" not in known(tmp_path)  # whoever holds it says what is wrong
        with pytest.raises(BackupError, match="prune, process"), backup.between_wal(job(Places(tmp_path)), "check"):
            pass
    assert archive(taken("here"))


def test_a_run_that_is_cut_off_after_the_copy_knows_what_it_has_not_saved(
    archiving: tuple[Server, Callable[..., bool]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server, archive = archiving

    def killed(_: Path) -> tuple[int, bool]:
        raise SystemExit(143)

    monkeypatch.setattr(server, "archive", killed)
    with pytest.raises(SystemExit):
        archive(taken("here"))
    assert known(tmp_path)["unsaved"] == ["/srv/here"]


def test_another_cluster_in_the_volume_is_another_history(
    archiving: tuple[Server, Callable[..., bool]], tmp_path: Path
) -> None:
    server, archive = archiving
    assert archive(taken("here"))
    assert not backup.gap(known(tmp_path))
    server.identity, server.new = "2", 1
    assert archive(taken("here"))
    assert "another cluster" in backup.gap(known(tmp_path))
    assert (
        backup.due_at(job(), known(tmp_path) | {"last_success": NOW - 60}, NOW) > NOW
    )  # a base backup later than that
    assert len(list(job(Places(tmp_path)).folder.glob("wal-*"))) == 1
    assert len(list(job(Places(tmp_path)).spool.iterdir())) == 1
    backup.begun_anew(job(Places(tmp_path)), State(Places(tmp_path)))
    server.identity, server.new = "3", 1
    assert archive(taken("here"))  # restored from another's backup: no surprise
    assert len(list(job(Places(tmp_path)).spool.iterdir())) == 1


def test_wal_that_no_target_takes_does_not_fill_the_disk(
    archiving: tuple[Server, Callable[..., bool]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server, archive = archiving
    monkeypatch.setattr(backup, "full", lambda _: True)
    assert archive(taken("here"))
    assert archive(taken("here"))
    assert job(Places(tmp_path)).spool.exists()  # a target takes it all
    at, server.new = known(tmp_path)["wal_at"], 1
    assert not archive(taken("here", away=True))
    assert job(Places(tmp_path)).spool.exists()
    assert not archive(taken("here", away=True))
    assert not job(Places(tmp_path)).spool.exists()
    assert (known(tmp_path)["wal_at"], backup.due_at(job(), known(tmp_path), NOW)) == (at, 0)
    assert "no target has taken WAL" in known(tmp_path)["wal_error"]


def test_dev_cannot_fill_the_disk_with_what_it_calls_wal(
    archiving: tuple[Server, Callable[..., bool]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, archive = archiving
    monkeypatch.setattr(backup, "full", lambda _: True)
    assert archive(taken("here"))
    monkeypatch.setattr(backup, "best_effort", lambda _: frozenset({"prod"}))
    assert not archive(taken("here"))
    assert not job(Places(tmp_path)).spool.exists()


@pytest.mark.parametrize(("free", "most"), [(100 * 2**30, 50 * 2**30), (2**30, backup.SLOT_BYTES)])
def test_what_a_base_backup_needs_is_given_up_before_it_fills_prods_disk(
    free: int, most: int, archiving: tuple[Server, Callable[..., bool]], monkeypatch: pytest.MonkeyPatch
) -> None:
    server, archive = archiving
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(200 * 2**30, 0, free))
    archive(taken("here"))
    assert (server.given_up, server.with_base) == ([backup.SLOT_BYTES], [most])


@pytest.mark.parametrize(("lag", "asked"), [("", ["> 9", "> 7"]), ("1", ["> 9", "terminate", "> 0"])])
def test_the_slot_is_given_up_with_the_base_backup_that_needs_it_only_beyond_the_higher_limit(
    lag: str, asked: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []

    def query(_: object, sql: str, __: str = "") -> str:
        said.append(sql)
        return lag

    server = postgres()
    monkeypatch.setattr(engines.Postgres, "query", query)
    server.let_go(7, 9)
    assert len(said) == len(asked)
    assert all(word in sql for word, sql in zip(asked, said, strict=True))
    assert "pg_drop_replication_slot" in said[-1]
    assert (engines.NO_BASE in said[-1]) is not bool(lag)


def test_what_is_too_large_for_a_segment_of_wal_is_not_copied(tmp_path: Path) -> None:
    name = "000000010000000000000001"
    (tmp_path / name).touch()
    os.truncate(tmp_path / name, engines.SEGMENT_MOST + 1)
    with (
        engines.opened(tmp_path, tmp_path) as folder,
        pytest.raises(BackupError, match="one of WAL's files"),
    ):
        engines.copied_from(folder, name, tmp_path / "copy")
    assert not (tmp_path / "copy").exists()


def test_what_comes_to_a_file_while_it_is_copied_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = "000000010000000000000001"
    (tmp_path / name).write_bytes(b"x" * 100)
    size, sizes = os.fstat, list[int]()

    def grows(descriptor: int) -> os.stat_result:
        found = size(descriptor)
        sizes.append(found.st_size)
        with (tmp_path / name).open("ab") as file:
            file.write(b"y" * 100)
        return found

    with engines.opened(tmp_path, tmp_path) as folder, monkeypatch.context() as changed:
        changed.setattr(os, "fstat", grows)
        engines.copied_from(folder, name, tmp_path / "copy")
    assert (tmp_path / "copy").stat().st_size == sizes[-1] < (tmp_path / name).stat().st_size


def test_more_wal_at_once_than_a_server_may_keep_is_not_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    volume, spool = tmp_path / "volume", tmp_path / "spool"
    (volume / "pg_wal").mkdir(parents=True)
    (volume / "pg_wal/00000002.history").touch()
    for number in range(1, 6):
        (volume / f"pg_wal/00000001{number:016X}").write_bytes(b"x" * 10)
    server = postgres(folder=volume)
    monkeypatch.setattr(engines, "mountpoint", lambda _: volume)
    monkeypatch.setattr(engines.Postgres, "query", lambda *_: f"00000001{1:016X}|00000001{5:016X}")
    monkeypatch.setattr(engines, "MOST", 25)
    with pytest.raises(BackupError, match="at once"):
        server.archive(spool)
    assert len(list(spool.iterdir())) == 3
    monkeypatch.setattr(engines, "MOST", 25 * 2**30)
    assert server.archive(spool) == (3, False)  # with the history, and what of the last there is
    (volume / "pg_wal/00000003.history").touch()
    os.truncate(volume / "pg_wal/00000003.history", engines.HISTORY_MOST + 1)
    with pytest.raises(BackupError, match="at most 1048576"):
        server.archive(spool)


@pytest.mark.parametrize(
    ("words", "rate"),
    [(["--due"], 5 * 2**20), ([], 0), (["--rate", "3"], 3 * 2**20), (["--due", "--rate", "3"], 3 * 2**20)],
    ids=["scheduled", "by hand", "by hand, slowly", "scheduled, slowly"],
)
def test_a_scheduled_backup_has_the_ceiling_that_is_declared_and_one_by_hand_what_is_asked_for(
    words: list[str], rate: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    places, seen = Places(tmp_path), list[tuple[bool, int]]()
    declared(places, rate=5 * 2**20, engine="files")

    def saved(_: Job, __: Phases, *, hurry: bool, rate: int) -> Snapshot:
        seen.append((hurry, rate))
        return snapshot("a", NOW)

    monkeypatch.setattr(backup, "saved", saved)
    monkeypatch.setattr(backup, "unpruned", lambda *_: None)
    asked = argparse.ArgumentParser()
    backup.add_arguments(asked)
    backup.run(asked.parse_args(words), places)
    assert seen == [("--due" not in words, rate)]


@pytest.mark.parametrize(
    ("rate", "size", "every", "found"),
    [
        (32 * 2**20, None, DAY, 32 * 2**20),
        (32 * 2**20, 10**9, DAY, 32 * 2**20),
        (32 * 2**20, 10**13, DAY, round(10**13 / (6 * 3600))),
        (2**20, 10**9, 600, round(10**9 / 300)),
        (None, 10**13, DAY, 0),
    ],
)
def test_a_ceiling_gives_way_where_the_backup_would_not_be_done_in_time(
    rate: int | None, size: int | None, every: int, found: int
) -> None:
    assert backup.ceiling(job(rate=rate, schedule=every), {"size": size}) == found


def test_a_ceiling_holds_for_what_is_read_and_for_what_is_stored(monkeypatch: pytest.MonkeyPatch) -> None:
    slow = Repository("/srv/here", "key", Path("/nowhere"), rate=3 * 2**20)
    assert "--limit-upload=3072" in slow._backup("data", tags=[])
    assert not [word for word in replace(slow, rate=0)._backup("data", tags=[]) if "limit" in word]
    copied: list[Repository] = []
    monkeypatch.setattr(Repository, "call", lambda one, *_, **__: copied.append(one))
    slow.copy_from(Repository("/srv/there", "key", Path("/nowhere")), "a")
    assert [one.rate for one in copied] == [slow.rate]
    server = postgres()
    assert "--max-rate=3072" in server.base(hurry=True, rate=slow.rate)
    assert not [word for word in server.base(hurry=True) if "rate" in word]
    given: list[Repository] = []

    def take(_: Job, to: Repository, *__: object) -> Snapshot:
        given.append(to)
        return snapshot("a", NOW)

    monkeypatch.setattr(backup, "TAKE", {"postgres": take})
    monkeypatch.setattr(backup, "prune", lambda *_: None)
    backup.saved(replace(job(), repositories={"disk": replace(slow, rate=0)}), Phases("server"), hurry=False, rate=7)
    assert [one.rate for one in given] == [7]


@pytest.mark.parametrize(("free", "held", "full"), [(0.05, 3, True), (0.05, 1, False), (0.2, 3, False)])
def test_wal_on_the_host_is_too_much_where_it_takes_the_last_of_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, free: float, held: int, full: bool
) -> None:
    monkeypatch.setattr(backup, "SLOT_BYTES", 2)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(1000, 0, int(1000 * free)))
    (tmp_path / "segment").write_bytes(b"x" * held)
    assert backup.full(tmp_path) is full


# --- what a restore chooses and refuses


class Listed(Repository):
    """A repository that lists what it is given."""

    found: list[Snapshot]

    def snapshots(self, *tags: str) -> list[Snapshot]:
        kinds = [tag for tag in tags if tag.startswith("kind:")]
        return [one for one in self.found if not kinds or f"kind:{one.kind}" in kinds]


def repository(*found: Snapshot) -> Listed:
    made = Listed("/srv/backup/prod", "key", Path("/nowhere"))
    object.__setattr__(made, "found", list(found))
    return made


def snapshot(name: str, at: float, kind: str = "base") -> Snapshot:
    position = {"position": f"0/{int(at):X}"} if kind == "wal" else {}
    return Snapshot(name * 8, datetime.fromtimestamp(at, UTC), kind, {"at": at, **position})


def test_the_newest_wal_is_what_goes_furthest_whatever_the_clock_said() -> None:
    early, late = snapshot("e", NOW, "wal"), snapshot("f", NOW + 3600, "wal")
    further = replace(early, facts={**early.facts, "position": "1/0"})  # saved after the clock was set back
    assert restore.wal_for(job(), repository(further, late), snapshot("a", NOW - DAY), None) == further


def test_a_second_inside_of_a_base_backup_is_brought_back_from_the_one_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[str] = []

    def restore_(_job: Job, _repository: object, base: Snapshot, until: float | None, *_: object) -> restore.Restored:
        made.append(base.id[0])
        if base.id[0] != "a":
            raise restore.TooEarly("it still went on")
        return restore.Restored(job(), "v", base, until or 0, Phases("prepare"), {"problems": []})

    monkeypatch.setitem(restore.RESTORE, "postgres", restore_)
    monkeypatch.setattr(restore, "volume_made", lambda *_: nullcontext())

    def of(name: str, at: float, history: str = "1") -> Snapshot:
        return replace(snapshot(name, at), facts={"at": at, "history": history})

    bases = [of("a", NOW), of("d", NOW + 50, "another cluster"), of("b", NOW + 100), of("c", NOW + 200)]
    at = datetime.fromtimestamp(NOW + 210, UTC).isoformat()
    assert restore.restored(job(Places(tmp_path)), repository(*bases), at, "v", print).snapshot == bases[0]
    assert made == ["c", "b", "a"]
    with pytest.raises(restore.TooEarly):
        restore.restored(job(Places(tmp_path)), repository(*bases[1:]), at, "v", print)


def test_a_time_takes_the_backup_before_it_and_wal_that_goes_beyond_it() -> None:
    kept = repository(
        snapshot("aaaa", NOW), snapshot("bbbb", NOW + 100), *(snapshot("c", NOW + one, "wal") for one in (50, 150, 200))
    )
    at = datetime.fromtimestamp(NOW + 120, UTC).isoformat()
    found, until = restore.chosen(job(), kept, at)
    assert found.facts["at"] == NOW + 100
    assert until == NOW + 120
    wal = restore.wal_for(job(), kept, found, until)
    assert wal is not None
    assert restore.wal_for(job(), kept, found, None) == kept.found[-1]
    with pytest.raises(BackupError, match="Next step: make backup"):
        restore.wal_for(job(), kept, found, NOW + 201)
    with pytest.raises(BackupError, match="has not come yet"):
        restore.wal_for(job(), repository(), found, NOW)
    assert wal.facts["at"] == NOW + 150
    latest, until = restore.chosen(job(), kept, "latest")
    assert (latest.facts["at"], until) == (NOW + 100, None)
    by_name, until = restore.chosen(job(), kept, "aaaa")
    assert (by_name.facts["at"], until) == (NOW, NOW)  # as it was: without WAL


def test_wal_of_another_history_is_no_continuation_of_a_base_backup() -> None:
    """Of a cluster that was made anew after a loss: its WAL goes beyond the time that is wanted, and knows nothing."""

    def of(one: Snapshot, history: str) -> Snapshot:
        return replace(one, facts={**one.facts, "history": history})

    base = of(snapshot("aaaa", NOW), "1-1")
    kept = repository(base, of(snapshot("b", NOW + 50, "wal"), "1-1"), of(snapshot("c", NOW + 90, "wal"), "2-1"))
    found = restore.wal_for(job(), kept, base, NOW + 50)
    assert found is not None
    assert found.id[0] == "b"
    assert restore.wal_for(job(), kept, base, None) == found
    with pytest.raises(BackupError, match="WAL in /srv/backup/prod goes up to"):
        restore.wal_for(job(), kept, base, NOW + 60)


@pytest.mark.parametrize(
    ("at", "said"),
    [("yesterday", "neither a time"), ("2001-01-01", "before the oldest"), ("ffff", "neither a time")],
)
def test_what_cannot_be_restored_is_said_with_what_can(at: str, said: str) -> None:
    with pytest.raises(BackupError, match=said):
        restore.chosen(job(), repository(snapshot("aaaa", NOW)), at)


def test_without_any_snapshot_the_next_step_is_a_backup() -> None:
    with pytest.raises(BackupError, match="make backup"):
        restore.chosen(job(), repository(), "latest")


def test_a_table_that_came_back_smaller_or_not_at_all_is_lost() -> None:
    before = {"shop.orders": 1000, "shop.items": 5, "shop.big": None, "shop.gone": 1}
    assert restore.lost(before, {"shop.orders": 990, "shop.items": 5, "shop.big": 0, "shop.gone": 2}) == []
    assert restore.lost({"shop.slow": 5}, {"shop.slow": None}) == []  # it takes too long to count now
    found = restore.lost(before, {"shop.orders": 989, "shop.items": 4, "shop.big": 0})
    assert [line.split(":")[0] for line in found] == ["table shop.orders", "table shop.items", "table shop.gone"]


def test_a_restore_that_would_fill_the_disk_is_refused(tmp_path: Path) -> None:
    restore.need_room(tmp_path / "not/there/yet", 1)
    with pytest.raises(BackupError, match="GiB are needed"):
        restore.need_room(tmp_path, 2**60)


def test_what_was_written_since_would_be_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(restore, "mountpoint", lambda _: tmp_path)
    (tmp_path / "file").write_text("data")
    os.utime(tmp_path / "file", (NOW, NOW))
    assert restore.newer(job(), NOW) == ""
    assert "60 s after" in restore.newer(job(), NOW - 60)


class Volumes:
    """Volumes as folders, and a service of one: what the engine is asked, and where it ends."""

    def __init__(self, root: Path) -> None:
        self.root, self.asked, self.ends_at = root, list[str](), ""
        for name in ("v", "fresh"):
            self.at(name).mkdir(parents=True)
            (self.at(name) / "data").write_text(name)

    def at(self, name: str) -> Path:
        return self.root / name / "_data"

    def ask(self, command: Sequence[str], *_: object, **__: object) -> str:
        words = " ".join(command)
        self.asked.append(words)
        if self.ends_at and words.startswith(self.ends_at):
            self.ends_at = ""
            raise SystemExit(143)
        if words.startswith("docker volume create"):
            self.at(command[-1]).mkdir(parents=True)
        if words.startswith("docker volume rm"):
            shutil.rmtree(self.at(command[-1]).parent)
        return "web\n" if words.startswith("docker ps") else ""


@pytest.fixture
def volumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Volumes:
    made = Volumes(tmp_path / "volumes")
    monkeypatch.setattr(restore, "ask", made.ask)
    monkeypatch.setattr(restore, "mountpoint", made.at)
    service = engines.Container({"Id": "web", "Name": "/web"})
    monkeypatch.setattr(engines, "containers", lambda *_: [service])
    monkeypatch.setattr(restore, "healthy", lambda _: None)
    return made


def exchange(places: Places, said: Callable[[str], None] = print) -> str:
    one = replace(job(places), declared={**job(places).declared, "volume": "v"})
    done = restore.Restored(one, "fresh", snapshot("a", NOW), NOW, Phases("prepare"))
    return restore.swapped(done, State(places), said)


def test_a_restored_volume_takes_the_place_of_the_old_one_which_is_kept(volumes: Volumes, tmp_path: Path) -> None:
    places = Places(tmp_path)
    kept = exchange(places)
    assert (volumes.at("v") / "data").read_text() == "fresh"
    assert (volumes.at(kept) / "data").read_text() == "v"
    assert not volumes.at("fresh").exists()
    assert State(places).of(job())["wanted"]
    assert restore.interrupted(places) == []
    assert [line.split(" ")[1] for line in volumes.asked] == ["volume", "stop", "start", "volume"]


def test_what_does_not_run_with_the_restored_data_gets_the_old_back_though_nobody_listens_any_more(
    volumes: Volumes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def sick(_: object) -> None:
        raise BackupError("not healthy")

    monkeypatch.setattr(restore, "healthy", sick)
    with pytest.raises(BackupError, match="The old data is in place again"):
        exchange(Places(tmp_path))
    assert (volumes.at("v") / "data").read_text() == "v"
    assert (volumes.at("fresh") / "data").read_text() == "fresh"
    assert volumes.asked[-2:] == ["docker start web", volumes.asked[-1]]
    assert restore.interrupted(Places(tmp_path)) == []


@pytest.mark.parametrize("point", ["docker stop", "there.rmdir", "here.rename", "fresh.rename", "docker start"])
def test_an_exchange_that_is_cut_off_at_any_point_is_undone_by_the_next_run(
    volumes: Volumes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, point: str
) -> None:
    """As by SIGKILL or a reboot: nothing of the run's own puts it right."""
    places, real = Places(tmp_path), restore.exchanged

    def cut_off(here: Path, fresh: Path, there: Path) -> None:
        steps = {
            "there.rmdir": there.rmdir,
            "here.rename": lambda: here.rename(there),
            "fresh.rename": lambda: fresh.rename(here),
        }
        for name, step in steps.items():
            step()
            if name == point:
                raise SystemExit(137)

    if "." in point:
        monkeypatch.setattr(restore, "exchanged", cut_off)
    volumes.ends_at = point
    put_right = restore.undone
    monkeypatch.setattr(restore, "undone", lambda _: None)
    with pytest.raises(BackupError):
        exchange(places)
    monkeypatch.setattr(restore, "undone", put_right)
    monkeypatch.setattr(restore, "exchanged", real)
    assert len(restore.interrupted(places)) == 1
    due = argparse.ArgumentParser()
    backup.add_arguments(due)
    assert backup.run(due.parse_args(["--due"]), places) == 0
    assert restore.interrupted(places) == []
    assert (volumes.at("v") / "data").read_text() == "v"
    assert (volumes.at("fresh") / "data").read_text() == "fresh"
    assert {path.parent.name for path in volumes.root.glob("*/_data")} == {"v", "fresh"}
    assert "docker start web" in volumes.asked


def test_an_exchange_that_cannot_be_undone_stands_in_nobody_elses_way(
    volumes: Volumes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    places = Places(tmp_path)
    intent = places.state / "backup/prod/db-data/exchange.json"
    intent.parent.mkdir(parents=True)
    gone = {name: str(tmp_path / name) for name in ("here", "fresh", "there")}
    intent.write_text(json.dumps({**gone, "ids": ["web"], "kept": "kept", "old": 1}))
    assert not restore.put_right(places)
    assert f"Next step: {intent} says which folders are which" in capsys.readouterr().out
    due = argparse.ArgumentParser()
    backup.add_arguments(due)
    declared(places)
    assert backup.run(due.parse_args(["--due"]), places) == 1
    assert State(places).of(*backup.jobs(places))["failures"] == 1  # tried, without a target
    assert volumes.asked


def test_nobody_ends_an_exchange_in_the_middle(
    volumes: Volumes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(restore, "healthy", lambda _: os.kill(os.getpid(), signal.SIGTERM))
    before = signal.getsignal(signal.SIGTERM)
    assert exchange(Places(tmp_path))
    assert signal.getsignal(signal.SIGTERM) == before


# --- what unpacks


def ending(monkeypatch: pytest.MonkeyPatch, code: str, log: str) -> None:
    """The container that unpacks ends with this."""
    monkeypatch.setattr(restore, "mountpoint", lambda _: Path("/nowhere"))
    monkeypatch.setattr(restore, "progress", lambda *_: nullcontext())
    monkeypatch.setattr(restore, "in_volume", lambda *_, **__: [])
    monkeypatch.setattr(restore, "started", lambda _: nullcontext(engines.Container({"Id": "x"})))
    monkeypatch.setattr(restore, "taken", lambda *_: nullcontext(1))
    monkeypatch.setattr(restore, "ask", lambda *_, **__: f"{code}\n")
    monkeypatch.setattr(restore, "last_words", lambda _: log)


@pytest.mark.parametrize(
    ("restic_says", "code", "told"),
    [
        ("Fatal: the target is away", "2", "the target is away"),
        ("Fatal: write: broken pipe", "2", "unpacking ended with 2: no space"),
        ("Fatal: write: broken pipe", "0", "broken pipe"),
        (None, "2", "unpacking ended with 2: no space"),
        (None, "0", None),
    ],
)
def test_what_went_wrong_first_is_what_is_told_of_an_unpacking(
    restic_says: str | None, code: str, told: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ending(monkeypatch, code, "no space")
    error = BackupError(restic_says) if restic_says else None
    monkeypatch.setattr(restore, "dumped", lambda *_: error)
    one = job(Places(tmp_path))
    with pytest.raises(BackupError, match=told) if told else nullcontext():
        restore.unpack(one, repository(), snapshot("a", NOW), 1, "v", print)
    assert list(one.folder.iterdir()) == []


def test_an_image_that_never_begins_to_unpack_holds_up_nobody_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    os.mkfifo(tmp_path / "pipe")
    monkeypatch.setattr(restore, "HEALTHY_SECONDS", 0.2)
    monkeypatch.setattr(restore, "alive", lambda *_: None)
    monkeypatch.setattr(restore, "last_words", lambda _: "zzz")
    with (
        pytest.raises(BackupError, match=r"has not begun within 0\.2 s: zzz"),
        restore.taken(tmp_path / "pipe", engines.Container({"Id": "x"})),
    ):
        pass


def test_one_that_has_ended_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    os.mkfifo(tmp_path / "pipe")

    def alive(_: object, what: str) -> None:
        raise BackupError(f"{what} ended with 1")

    monkeypatch.setattr(restore, "alive", alive)
    container = engines.Container({"Id": "x"})
    with pytest.raises(BackupError, match="unpacking ended"), restore.taken(tmp_path / "pipe", container):
        pass


def test_a_base_backup_that_nobody_takes_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(restore, "UNPACK_SECONDS", 0.2)
    monkeypatch.setattr(Repository, "dump", lambda *_: ["sleep", "60"])
    found = restore.dumped(repository(), snapshot("a", NOW), "/base.tar", 1)
    assert found is not None
    assert "not unpacked within 0.2 s" in str(found)


def test_what_is_not_masked_yet_is_in_a_volume_that_only_its_own_environment_could_name(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    names: list[str] = []

    def restored(_job: Job, _repository: object, _at: str, volume: str, _say: object) -> NoReturn:
        names.append(volume)
        raise BackupError("no further")

    monkeypatch.setattr(Job, "container", lambda _: None)
    monkeypatch.setattr(engines.Postgres, "of", lambda *_: SimpleNamespace(query=lambda _: ""))
    monkeypatch.setattr(restore, "source", lambda *_: None)
    monkeypatch.setattr(restore, "restored", restored)
    with pytest.raises(BackupError, match="no further"):
        restore.refreshed(job(), job(volume="dev-db-data"), "select 1", print)
    (name,) = names
    assert name.startswith("prod-db-data-unmasked-")
    assert restore.PASSING.search(name)


def test_what_a_killed_run_left_is_removed_and_what_somebody_keeps_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, nothing_is_swept: Callable[[Sequence[Job]], None]
) -> None:
    asked: list[str] = []
    gone = ["prod-db-data-drill-20260102-030405-77", "prod-db-data-unmasked-20260102-030405-77"]
    volumes = [*gone, "prod-db-data-restore-20260102-030405", "dev-db-data-refresh-20260102-030405", "made-by-hand"]

    def ask(command: Sequence[str], *_: object) -> str:
        asked.append(" ".join(command))
        return "4f3a\n" if command[1] == "ps" else "\n".join(volumes) if "ls" in command else ""

    monkeypatch.setattr(restore, "ask", ask)
    one = job(Places(tmp_path))
    for name in ("unpack-x", "restore-7/wal", "wal"):
        (one.folder / name).mkdir(parents=True)
    nothing_is_swept([one])
    assert [path.name for path in one.folder.iterdir()] == ["wal"]
    assert [words for words in asked if " rm " in words] == [
        "docker rm --force --volumes 4f3a",
        *(f"docker volume rm --force {name}" for name in gone),
    ]
    assert all("bulkhead.restore" in words for words in asked if " ps " in words or " ls " in words)


# --- restic


def test_facts_travel_in_a_tag_that_restic_does_not_split() -> None:
    facts = {"rows": {"shop.public.orders": 3}, "at": NOW, "argv": ["-c", "a=b,c"]}
    listed = {"id": "f" * 64, "time": "2026-11-25T10:00:00.123456789Z", "paths": ["/base.tar"]}
    made = restic._snapshot(listed | {"tags": restic.tags("db-data", "base", facts)})
    assert (made.kind, made.facts) == ("base", facts)
    assert all("," not in tag for tag in restic.tags("db-data", "base", facts))
    assert made.at == datetime(2026, 11, 25, 10, 0, 0, 123456, UTC)


@pytest.fixture
def real(tmp_path: Path) -> Repository:
    """A real repository in a folder."""
    return Repository(str(tmp_path / "repository"), "key", tmp_path / "cache")


def snapshots(one: Repository) -> list[Snapshot]:
    """Those in a repository, and none where there is no repository."""
    return one.snapshots() if Path(one.url, "config").exists() else []


def test_a_stream_is_saved_and_comes_back(real: Repository) -> None:
    saved = real.save_stream(["printf", "all of it"], "base.tar", restic.tags("j", "base", {"at": 1}), 30)
    assert (saved.size, saved.facts) == (9, {"at": 1})
    done = subprocess.run(real.dump(saved.id, "/base.tar"), env=real.environment, capture_output=True, check=True)
    assert done.stdout == b"all of it"
    assert real.size(saved.id) == 9


def test_a_lock_of_a_run_that_was_killed_stands_in_nobodys_way(real: Repository, tmp_path: Path) -> None:
    real.save_stream(["printf", "one"], "base.tar", ["job:j"], 30)
    run = subprocess.Popen(["restic", "backup", "--stdin"], env=real.environment, stdin=subprocess.PIPE)
    locks = tmp_path / "repository/locks"
    until(lambda: bool(list(locks.iterdir())))
    run.kill()
    run.communicate()
    assert list(locks.iterdir())
    real.forget({"last": 1}, "job:j")  # wants the repository for itself
    assert len(real.snapshots()) == 1


def test_half_a_stream_never_becomes_a_snapshot(real: Repository) -> None:
    """restic itself takes the end of its input for the end of the file."""
    with pytest.raises(BackupError, match="broken in the middle"):
        real.save_stream(
            ["sh", "-c", "printf half; sleep 1; echo broken in the middle >&2; exit 1"], "base.tar", ["job:j"], 30
        )
    assert snapshots(real) == []


def test_half_a_stream_is_no_snapshot_either_when_the_agent_is_killed_and_what_feeds_it_fails_later(
    real: Repository, tmp_path: Path
) -> None:
    real.init()
    begun, go_on = tmp_path / "begun", tmp_path / "go-on"
    feeding = f"printf half; touch {begun}; while [ ! -e {go_on} ]; do sleep 0.1; done; exit 1"
    program = (
        "import sys; from pathlib import Path; from host.restic import Repository; "
        "Repository(sys.argv[1], 'key', Path(sys.argv[2])).save_stream(['sh', '-c', sys.argv[3]], 'x', ['job:j'], 60)"
    )
    agent = subprocess.Popen([sys.executable, "-c", program, real.url, str(real.cache), feeding])
    until(begun.exists)
    until(lambda: bool(list(Path(real.url, "locks").iterdir())))
    agent.kill()
    agent.wait()
    go_on.touch()
    until(lambda: not at_work(real))
    assert snapshots(real) == []


def until(true: Callable[[], bool]) -> None:
    """Waits for it, at most half a minute."""
    deadline = time.monotonic() + 30
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def at_work(one: Repository) -> list[str]:
    """The processes that work on a repository; what has ended has no environment any more."""
    return [str(path) for path in Path("/proc").glob("[0-9]*/environ") if one.url.encode() in told(path)]


def told(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""


def test_a_command_that_hangs_is_ended_and_leaves_no_snapshot(real: Repository) -> None:
    began = time.monotonic()
    with pytest.raises(BackupError, match="did not end within 1 s"):
        real.save_stream(["sh", "-c", "printf half; exec sleep 60"], "base.tar", ["job:j"], 1)
    assert time.monotonic() - began < 30
    assert snapshots(real) == []


def test_nothing_is_read_for_a_repository_that_is_not_there(real: Repository, tmp_path: Path) -> None:
    """A base backup that goes into nothing reads all of a database, and first waits for its checkpoint."""
    mark, ran = tmp_path / "mark", tmp_path / "ran"
    one, command = replace(real, mark=mark), ["sh", "-c", f"echo >> {ran}; printf all"]
    one.save_stream(command, "base.tar", ["job:j"], 30)
    assert ran.read_text() == "\n"
    assert mark.exists()
    shutil.rmtree(one.url)
    with pytest.raises(BackupError, match="was there, and is gone"):
        one.save_stream(command, "base.tar", ["job:j"], 30)


def test_what_feeds_a_restic_that_has_ended_ends_too_though_it_writes_nothing(real: Repository) -> None:
    real.init()
    began = time.monotonic()
    with pytest.raises(BackupError, match=r"lost-key\.md"):
        replace(real, password="another").save_stream(["sleep", "60"], "base.tar", ["job:j"], 100)
    assert time.monotonic() - began < 30


def test_a_folder_comes_back_and_unchanged_data_adds_next_to_nothing(real: Repository, tmp_path: Path) -> None:
    source, there = tmp_path / "source", tmp_path / "there"
    (source / "deep").mkdir(parents=True)
    (source / "deep/file").write_bytes(os.urandom(200_000))
    source.chmod(0o2775)
    first = real.save_folder(source, restic.tags("j", "base", {"at": 1}))
    second = real.save_folder(source, restic.tags("j", "base", {"at": 2}))
    assert first.added >= 200_000
    assert second.added < 10_000
    there.mkdir()
    real.restore(second.id, there)
    assert (there / "source/deep/file").read_bytes() == (source / "deep/file").read_bytes()
    assert (there / "source").stat().st_mode == source.stat().st_mode
    assert list(real.files(second.id)) == ["/source/deep/file"]


def test_an_empty_folder_is_backed_up_too(real: Repository, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert real.save_folder(tmp_path / "empty", ["job:j"]).size == 0


RESTIC = """#!/bin/sh
echo "$*" >> {asked}
case "$*" in
  *"backup --json"*)
    yes '{{"message_type":"status"}}' | head -n 30000
    echo '{{"message_type":"summary","snapshot_id":"abc","total_bytes_processed":1,"data_added":1}}'
    echo '{{"message_type":"error","error":{{}},"during":"archival","item":"{item}"}}' >&2
    exit 3;;
  *snapshots*) echo '[{{"id":"abc0123","time":"2026-11-25T10:00:00Z"}},{{"id":"def","time":"2026-11-25T10:00:00Z"}}]';;
esac
"""


@pytest.fixture
def restic_that_misses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """A restic that says so much while it runs that a full pipe would hold it, and could not read one file."""

    def made(item: str) -> Path:
        asked, program = tmp_path / "asked", tmp_path / "bin/restic"
        program.parent.mkdir()
        program.write_text(RESTIC.format(asked=asked, item=item))
        program.chmod(0o755)
        monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
        return asked

    return made


def test_files_that_are_removed_meanwhile_make_no_backup_incomplete(
    real: Repository, tmp_path: Path, restic_that_misses: Callable[[str], Path]
) -> None:
    restic_that_misses(f"/{tmp_path.name}/gone")
    assert real.save_folder(tmp_path, ["job:j"]).id == "abc"
    assert len(real.snapshots()) == 2


@pytest.mark.parametrize("append_only", [False, True])
def test_a_snapshot_with_holes_is_no_backup_and_is_never_chosen(
    real: Repository, tmp_path: Path, restic_that_misses: Callable[[str], Path], append_only: bool
) -> None:
    (tmp_path / "there").touch()
    asked = restic_that_misses(str(tmp_path / "there"))
    one = replace(real, append_only=append_only)
    with pytest.raises(BackupError, match="restic backup"):
        one.save_folder(tmp_path, ["job:j"])
    assert f"forget {'' if append_only else '--prune '}abc" in asked.read_text()
    assert [found.id for found in one.snapshots()] == ["def"]


def test_a_target_that_never_answers_holds_up_nobody_for_ever(
    real: Repository, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "bin/restic"
    program.parent.mkdir()
    program.write_text("#!/bin/sh\ncat >/dev/null\nexec sleep 60\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    with pytest.raises(BackupError, match=r"not done within 0\.3 s"):
        real.save_folder(tmp_path, ["job:j"], 0.3)
    with pytest.raises(BackupError, match="not done within 1 s"):
        real.save_stream(["printf", "all"], "base.tar", ["job:j"], 1)


def test_a_long_stream_does_not_wait_for_somebody_to_read_what_restic_says(
    real: Repository, restic_that_misses: Callable[[str], Path]
) -> None:
    asked = restic_that_misses("gone")
    with pytest.raises(BackupError, match="restic backup"):  # which is incomplete, as a stream never is
        real.save_stream(["head", "-c", "1000000", "/dev/zero"], "base.tar", ["job:j"], 30)
    assert asked.read_text().startswith("--quiet backup")


def test_another_key_opens_nothing_and_the_error_says_what_to_do(real: Repository) -> None:
    real.save_stream(["printf", "one"], "base.tar", ["job:j"], 30)
    with pytest.raises(BackupError, match=r"lost-key\.md"):
        replace(real, password="another").snapshots()


def test_flipped_bytes_are_found(real: Repository, tmp_path: Path) -> None:
    real.save_stream(["head", "-c", "100000", "/dev/zero"], "base.tar", ["job:j"], 30)
    real.check()
    for pack in (tmp_path / "repository/data").rglob("*"):
        if pack.is_file():
            content = bytearray(pack.read_bytes())
            content[10] ^= 1
            pack.chmod(0o600)
            pack.write_bytes(content)
    with pytest.raises(BackupError, match="restic check"):
        real.check()


def test_only_the_newest_are_kept(real: Repository) -> None:
    for number in range(4):
        real.save_stream(["printf", str(number)], "base.tar", ["job:j", "kind:base"], 30)
    kept, gone = real.forget({"last": 2, "daily": None}, "job:j", "kind:base")
    assert (kept, gone) == (real.snapshots("job:j"), True)
    assert len(kept) == 2
    assert real.forget({"last": 2, "daily": None}, "job:j", "kind:base") == (kept, False)
    assert real.forget({"last": 2}, "job:another") == ([], False)


def test_data_is_let_go_of_once_and_only_after_snapshots_were(
    real: Repository, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pruning reads the whole index, and writes what is half used anew: of all steps the dearest in a large bucket."""
    asked: list[str] = []
    call = Repository.call

    def packs() -> list[Path]:
        return [path for path in (tmp_path / "repository/data").rglob("*") if path.is_file()]

    def heard(one: Repository, *words: str, **options: float) -> str:
        asked.append(words[0])
        return call(one, *words, **options)

    for number in range(4):
        real.save_stream(["printf", str(number)], "base.tar", ["job:db-data", "kind:base"], 30)
        real.save_stream(["printf", f"wal {number}"], "wal", ["job:db-data", "kind:wal"], 30)
    before = len(packs())
    monkeypatch.setattr(Repository, "call", heard)
    backup.prune(job(Places(tmp_path), retain={"last": 4}), replace(real, append_only=True))
    assert asked == []
    backup.prune(job(Places(tmp_path), retain={"last": 4}), real)  # which is more WAL than is kept
    backup.prune(job(Places(tmp_path), retain={"last": 3}), real)
    backup.prune(job(Places(tmp_path), retain={"last": 3}), real)
    backup.prune(job(Places(tmp_path), retain={"last": 2}), real)
    assert asked == [*["forget", "forget", "prune"] * 2, "forget", "forget", "forget", "prune"]
    assert len(packs()) < before
    real.check()
    monkeypatch.setattr(backup, "WAIT_SECONDS", 0.3)
    asked.clear()
    with backup.between_wal(job(Places(tmp_path)), "WAL"):
        backup.prune(job(Places(tmp_path), retain={"last": 1}), real)  # the next run does; this one was a backup
    assert asked == []


# --- settings


@pytest.mark.parametrize(
    ("written", "seconds"), [("daily", 86400), ("hourly", 3600), ("15m", 900), ("6 h", 21600), ("2w", 1209600)]
)
def test_spans_of_time(written: str, seconds: int) -> None:
    assert parse_span(written) == seconds


@pytest.mark.parametrize("written", ["", "0h", "5", "soon", "25:00", 5, None])
def test_what_is_no_schedule_is_an_error_that_shows_some(written: object) -> None:
    with pytest.raises(ValidationError, match="daily"):
        Backup.model_validate({"engine": "files", "schedule": written})


@pytest.mark.parametrize(("written", "rate"), [({}, 32 * 2**20), ({"rate": "5MiB"}, 5 * 2**20), ({"rate": None}, None)])
def test_a_ceiling_is_a_size_or_none(written: dict[str, Any], rate: int | None) -> None:
    assert Backup.model_validate({"engine": "files", "schedule": "daily", **written}).rate == rate


def test_a_time_of_the_day_is_a_daily_schedule() -> None:
    nightly = Backup(engine="files", schedule="03:15")
    assert (nightly.every, nightly.at) == (86400, 195)
    assert Backup(engine="files", schedule="6h").at is None


@pytest.mark.parametrize(
    "written",
    [
        {"engine": "redis", "mode": "dump"},
        {"engine": "files", "database": "shop"},
        {"engine": "postgres", "before": "sync"},
        {"engine": "postgres", "retain": {"daily": 0}},
        {"engine": "mysql"},
        {"engine": "files", "rate": "100KB"},
        {"engine": "files", "rate": "fast"},
        {"engine": "files", "taget": "x"},
    ],
    ids=str,
)
def test_what_an_engine_does_not_know_is_refused(written: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        Backup.model_validate({"schedule": "daily", **written})


@pytest.mark.parametrize(
    ("target", "said"),
    [
        ({}, "neither a folder nor a bucket"),
        ({"path": "relative"}, "path"),
        ({"endpoint": "http://s3.example.com", "bucket": "acme"}, "in the clear"),
        ({"endpoint": "s3.example.com", "bucket": "acme"}, "not an endpoint"),
        ({"endpoint": "https://s3.example.com", "bucket": "Acme"}, "not a bucket's name"),
    ],
    ids=str,
)
def test_a_target_that_cannot_be_one_is_refused(target: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        BackupSettings.model_validate({"targets": {"offsite": target}})


@pytest.mark.parametrize(
    "targets",
    [
        {"a": {"path": "/srv/backup"}, "b": {"path": "/srv/backup/"}},
        {"a": {"path": "/srv/backup"}, "b": {"path": "/srv/backup/prod"}},
        {"a": {"path": "/srv/backup/x"}, "b": {"path": "/srv/other/../backup"}},
        {"a": {"endpoint": "https://s3", "bucket": "acme"}, "b": {"endpoint": "https://s3/", "bucket": "acme"}},
        {
            "a": {"endpoint": "https://s3", "bucket": "acme", "prefix": "one/prod"},
            "b": {"endpoint": "https://s3", "bucket": "acme", "prefix": "/one/"},
        },
    ],
    ids=["the same folder", "a folder in it", "by another way", "the same bucket", "a prefix in it"],
)
def test_no_target_is_inside_another(targets: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match="is inside"):
        BackupSettings.model_validate({"targets": targets})


def test_targets_side_by_side_are_two() -> None:
    bucket = {"endpoint": "https://s3", "bucket": "acme"}
    targets = {"a": {"path": "/srv/b"}, "b": {"path": "/srv/backup"}, "c": bucket | {"prefix": "x"}}
    assert len(BackupSettings.model_validate({"targets": targets | {"d": bucket | {"prefix": "xy"}}}).targets) == 4


def test_folders_come_before_buckets_and_what_the_host_cannot_delete_it_leaves() -> None:
    targets = {
        "a": {"repository": "s3:https://s3/acme/prod", "variables": {"AWS_ACCESS_KEY_ID": "x"}, "append_only": True},
        "b": {"repository": "/srv/backup/prod", "variables": {}, "append_only": False},
    }
    one = {"volume": "v", "service": "db", "engine": "files", "schedule": 60, "targets": targets}
    document = {"password": "p", "verified_within": 100, "drill": 50, "jobs": {"data": one}}
    (made,) = backup.told("prod", document, NOW, Places())
    assert [(one.in_bucket, one.append_only) for one in made.targets] == [(False, False), (True, True)]


@pytest.mark.parametrize(
    ("answers", "refused"),
    [({}, False), ({"dir": "/data/../../etc"}, True), ({"dir": "/etc"}, True), ({"dbfilename": "../x"}, True)],
    ids=str,
)
def test_a_restore_writes_only_into_the_volume_whatever_a_server_says(
    answers: dict[str, str], refused: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    told = {"dir": "/data", "dbfilename": "dump.rdb", "appendonly": "no", "appendfilename": "a", "appenddirname": "b"}
    inspected = {"Id": "x", "Mounts": [{"Name": "v", "Destination": "/data"}], "Config": {}}

    def said(_: engines.Redis, *words: str) -> str:
        return f"name\n{(told | answers)[words[2]]}" if words[0] == "config" else "redis_version:7.0.1 \n"

    monkeypatch.setattr(engines.Redis, "said", said)
    monkeypatch.setattr(engines, "mountpoint", lambda _: tmp_path)
    server = engines.Redis(engines.Container(inspected))
    if refused:
        with pytest.raises(BackupError, match="not in volume v"):
            server.facts("v")
    else:
        assert server.facts("v")["inside"] == "."


def test_each_environment_has_a_repository_of_its_own() -> None:
    bucket = BucketTarget(endpoint="https://s3.example.com", bucket="acme", prefix="/box/one/")
    assert bucket.repository("prod") == "s3:https://s3.example.com/acme/box/one/prod"
    folder = BackupSettings.model_validate({"targets": {"disk": {"path": "/srv/backup/"}}}).targets["disk"]
    assert folder.repository("dev") == "/srv/backup/dev"


def test_an_error_of_the_settings_names_file_and_key(tmp_path: Path) -> None:
    from settings.ledger import LedgerSettings

    ledger = tmp_path / "Pulumi.host.yaml"
    ledger.write_text(
        "config:\n"
        "  bulkhead:environments: {prod: {tier: protected, subnet: 10.81.0.0/16}}\n"
        "  bulkhead:backup: {targets: {offsite: {endpoint: 'http://s3.example.com', bucket: acme}}}\n"
    )
    with pytest.raises(SettingsError) as error:
        LedgerSettings.read(ledger)
    assert "Pulumi.host.yaml" in str(error.value)
    assert "in the clear" in str(error.value)
