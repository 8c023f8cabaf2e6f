"""Backups as the agent runs them, of the files of a throwaway container's volume: they are quiet meanwhile, come back
as they were, and a target that fails is told in the state, the alarms and the metrics. Nothing is deployed."""

import argparse
import hashlib
import json
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import docker
import pytest
from docker.models.containers import Container

from cli import bucket as command
from host import backup, engines, restore
from host.backup import Job, State
from host.machine import Places
from host.restic import BackupError, Repository
from tests.deployed import removed
from tests.e2e.test_bucket import small, states
from tests.e2e.test_deployment import eventually
from tests.s3 import Server, server

pytestmark = pytest.mark.e2e

DAY = 86400.0
NAME = "e2e-runs"
RESTORED = f"{backup.RESTORE_LABEL}={NAME}/letters"
IMAGE = "debian:bookworm-slim"
FILES = """
cd /data
mkdir -p letters/deep
head -c 3000000 /dev/urandom > letters/deep/large
echo 'Dear Ada' > 'letters/with space'
ln -s deep/large letters/link
chown -R 1234:4321 letters
chmod 640 'letters/with space'
echo idle > state
exec sleep 600
"""


@pytest.fixture
def container(engine: docker.DockerClient) -> Iterator[Container]:
    """A service's container with a volume of files."""
    removed(engine, [NAME], [RESTORED])  # of a run that was cut off
    try:
        engine.volumes.create(f"{NAME}-letters", labels={engines.LABEL: NAME})
        made: Container = engine.containers.run(
            IMAGE,
            ["sh", "-euc", FILES],
            detach=True,
            init=True,
            name=NAME,
            labels={engines.LABEL: NAME, engines.SERVICE: "post"},
            volumes={f"{NAME}-letters": {"bind": "/data", "mode": "rw"}},
            network_mode="none",
        )
        assert eventually(lambda: inside(made, "cat", "/data/state") == "idle", seconds=30)
        yield made
    finally:
        removed(engine, [NAME], [RESTORED])


def inside(container: Container, *words: str) -> str:
    output = container.exec_run(list(words)).output
    assert isinstance(output, bytes)
    return output.decode().strip()


def job(folder: Path, *repositories: Repository, **declared: Any) -> Job:
    """The volume's backup, with what the agent keeps of it in a folder of the test's own."""
    places = Places(folder)
    places.declared.mkdir(parents=True, exist_ok=True)
    (places.declared / "host.json").write_text(json.dumps({"environments": {}}))
    one = {"volume": f"{NAME}-letters", "service": "post", "engine": "files", "schedule": DAY, "at": None}
    settings = {**one, "retain": {"last": 2}, **declared}
    targets = {f"target{number}": repository for number, repository in enumerate(repositories)}
    return Job(NAME, "letters", settings, targets, time.time(), 8 * DAY, 7 * DAY, places)


def alarms(one: Job, state: State) -> dict[str, str]:
    return dict(backup.alarms(one, state.known(one), time.time()))


def tree(folder: Path) -> dict[str, tuple[int, int, int, str]]:
    """Mode, owner, group and content of everything in a folder."""
    found = {}
    for path in sorted(folder.rglob("*")):
        known = path.lstat()
        content = bytes(path.readlink()) if path.is_symlink() else path.read_bytes() if path.is_file() else b""
        found[str(path.relative_to(folder))] = (
            known.st_mode, known.st_uid, known.st_gid, hashlib.sha256(content).hexdigest()
        )  # fmt: skip
    return found


def test_files_are_quiet_while_they_are_saved_and_come_back_as_they_were_then(
    container: Container, engine: docker.DockerClient, tmp_path: Path
) -> None:
    repository = Repository(str(tmp_path / "backup"), "key", tmp_path / "cache")
    quiet = {"before": "echo quiet > /data/state", "after": "echo busy > /data/state"}
    one = job(tmp_path, repository, **quiet, verify="test -s /data/letters/deep/large")
    state = State(one.places)
    source = engines.mountpoint(one.volume)
    assert backup.back_up(one, state, print, hurry=True)
    assert inside(container, "cat", "/data/state") == "busy"
    was = tree(source) | {"state": (*tree(source)["state"][:3], hashlib.sha256(b"quiet\n").hexdigest())}
    inside(container, "rm", "-r", "/data/letters")

    restored = restore.restored(one, repository, "latest", f"{NAME}-again", print)
    assert tree(engines.mountpoint(restored.volume)) == was
    assert restored.found["files"] == 4
    changed = replace(one, declared={**one.declared, "verify": "test -e /data/missing"})
    with pytest.raises(BackupError, match="not as it was: the command of verify ended with 1"):
        restore.restored(changed, repository, "latest", f"{NAME}-third", print)
    assert not engine.volumes.list(filters={"name": f"{NAME}-third"})


def test_a_command_before_that_fails_is_no_backup_and_the_one_after_runs_all_the_same(
    container: Container, tmp_path: Path
) -> None:
    repository = Repository(str(tmp_path / "backup"), "key", tmp_path / "cache")
    quiet = {"before": "echo half > /data/state; exit 3", "after": "echo busy > /data/state"}
    one = job(tmp_path, repository, **quiet)
    state = State(one.places)
    assert not backup.back_up(one, state, print, hurry=True)
    assert inside(container, "cat", "/data/state") == "busy"
    assert set(alarms(one, state)) == {"failed"}
    assert not (tmp_path / "backup").exists()


def test_one_file_is_found_and_brought_back(
    container: Container, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    repository = Repository(str(tmp_path / "backup"), "key", tmp_path / "cache")
    one = job(tmp_path, repository)
    assert backup.back_up(one, State(one.places), print, hurry=True)
    inside(container, "rm", "/data/letters/with space")
    words = {"target": "", "at": "", "as_caller": False, "to": str(tmp_path), "find": "", "file": ""}

    def asked(**given: str) -> str:
        capsys.readouterr()
        assert restore.searched(one, argparse.Namespace(**words | given)) == 0
        return capsys.readouterr().out

    assert asked(find="*space").split(maxsplit=1)[1].strip() == "/letters/with space"
    asked(file="/letters/with space")
    assert (tmp_path / "with space").read_text() == "Dear Ada\n"
    with pytest.raises(BackupError, match="missing"):
        asked(file="/letters/missing")
    assert not (tmp_path / "missing").exists()


def test_a_bucket_that_is_away_or_refuses_is_told_until_it_takes_backups_again_and_the_folder_has_them(
    container: Container, tmp_path: Path
) -> None:
    folder = Repository(str(tmp_path / "backup"), "key", tmp_path / "cache")

    def seen(one: Job, state: State) -> tuple[bool, str, str]:
        """Whether it succeeded, the alarm, and how many failures the metrics tell."""
        well = backup.back_up(one, state, print, hurry=True)
        state.save([one])
        metrics = (one.places.state / "metrics/backup.prom").read_text()
        failures = next(line for line in metrics.splitlines() if line.startswith("bulkhead_backup_failures{"))
        return well, alarms(one, state).get("failed", ""), failures.rpartition(" ")[2]

    with server(tmp_path / "s3") as s3:
        bucket = made_in(s3, tmp_path)
        one = job(tmp_path, folder, bucket)
        state = State(one.places)
        assert seen(one, state) == (True, "", "0")
    well, told, failures = seen(one, state)
    assert (well, failures) == (False, "1")
    assert "does not answer" in told
    assert len(folder.snapshots()) == 2  # the one that succeeded, and this one
    with server(tmp_path / "s3", again=s3):
        revoked = replace(bucket, variables={**bucket.variables, "AWS_SECRET_ACCESS_KEY": "revoked"})
        well, told, failures = seen(job(tmp_path, folder, revoked), state)
        assert (well, failures) == (False, "2")
        assert "backup_<target>_key_id" in told
        assert seen(one, state) == (True, "", "0")
        assert len(bucket.snapshots()) == 2
    records = [json.loads(line) for line in (one.places.state / "backup/records.jsonl").read_text().splitlines()]
    assert ["error" in record for record in records] == [False, True, True, False]


def made_in(s3: Server, tmp_path: Path) -> Repository:
    """The repository in a bucket, as its owner has made it."""
    target = s3.target("runs")
    states(target, NAME, s3.owner)
    command.repository(target, NAME, s3.variables, "key")
    return Repository(target.repository(NAME), "key", tmp_path / "cache", s3.variables)


def test_a_full_disk_fails_this_backup_loudly_and_leaves_the_one_before(container: Container, tmp_path: Path) -> None:
    with small(tmp_path / "small", 8) as disk:
        there = Repository(str(disk / "backup"), "key", tmp_path / "cache")
        one = job(tmp_path, there)
        state = State(one.places)
        assert backup.back_up(one, state, print, hurry=True)
        (kept,) = there.snapshots()
        inside(container, "sh", "-c", "head -c 9000000 /dev/urandom > /data/more")
        assert not backup.back_up(one, state, print, hurry=True)
        assert "make room" in alarms(one, state)["failed"]
        assert [one.id for one in there.snapshots()] == [kept.id]
        restored = restore.restored(one, there, "latest", f"{NAME}-again", print)
        assert restored.found["files"] == 4
