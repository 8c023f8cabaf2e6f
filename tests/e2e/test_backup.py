"""Backups on a real deployment: taken by their schedule, restored to a chosen second, checked by drills, and loud when
something is wrong with them. Damage is done to dev's only, and undone."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import docker
import pytest

from host.engines import OUR_BASES, Postgres, of_service
from host.machine import Places
from host.restic import Repository
from tests.e2e.conftest import DEV, PROD, Deployment
from tests.e2e.test_deployment import eventually, healthy
from tests.e2e.test_verify import PROGRAM, container
from tests.s3 import Server

pytestmark = pytest.mark.e2e

STATE = Path("/var/lib/bulkhead/backup/state.json")
WAL = STATE.with_name(f"wal-{PROD}.json")
JOBS = Path("/etc/bulkhead/backup")
ORDERS = """
create table if not exists written (id serial primary key, at timestamptz not null);
create or replace procedure write_orders(seconds float) language plpgsql as $$
declare until timestamptz := clock_timestamp() + seconds * interval '1 second';
begin
  while clock_timestamp() < until loop
    insert into written (at) values (clock_timestamp());
    commit;
    perform pg_sleep(0.004);
  end loop;
end $$;
"""


def known(job: str) -> dict[str, Any]:
    """What the host knows of a job."""
    found: dict[str, Any] = json.loads(STATE.read_text()).get(job, {})
    return found


def sql(engine: docker.DockerClient, environment: str, text: str) -> str:
    """What the shop's database answers, one row a line."""
    words = ["psql", "-h", "/tmp", "-d", "shop", "-XAtq", "-v", "ON_ERROR_STOP=1", "-c", text]
    code, output = container(engine, environment, "db").exec_run(words)
    assert code == 0, output
    return str(output.decode().strip())


def bases(environment: str, job: str) -> list[list[str]]:
    """The files in each base backup that is in an environment's folder, read to its end."""
    declared = json.loads((JOBS / f"{environment}.json").read_text())
    url = declared["jobs"][job]["targets"]["disk"]["repository"]
    there = Repository(url, declared["password"], Path("/var/lib/bulkhead/backup/cache"))
    script = '"$@" | tar -t -f -'
    return [
        subprocess.run(
            ["bash", "-o", "pipefail", "-c", script, "sh", *there.dump(one.id, "/base.tar")],
            env=there.environment, stdout=subprocess.PIPE, text=True, check=True
        ).stdout.splitlines()
        for one in there.snapshots(f"job:{job}", "kind:base")
    ]  # fmt: skip


def redis(engine: docker.DockerClient, environment: str, *words: str) -> str:
    """What the shop's cache answers."""
    script = 'REDISCLI_AUTH=$(cat "$REDIS_PASSWORD_FILE") exec redis-cli "$@"'
    code, output = container(engine, environment, "cache").exec_run(["sh", "-c", script, "sh", *words])
    assert code == 0, output
    return str(output.decode().strip())


def agent(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, PROGRAM, *words], capture_output=True, text=True, check=False, timeout=600)


@pytest.fixture(scope="module", autouse=True)
def backed_up(live: Deployment) -> None:
    """Every job has run once, by itself: that is what a deploy starts."""
    jobs = [f"{name}/{volume}" for name in (PROD, DEV) for volume in ("db-data", "cache-data")]
    assert eventually(lambda: STATE.exists() and all(known(job).get("last_success") for job in jobs), seconds=300), (
        STATE.read_text() if STATE.exists() else "nothing ran"
    )


@contextmanager
def nothing_else_runs() -> Iterator[None]:
    """Without the watch process, which would start jobs of its own."""
    command = [sys.executable, PROGRAM, "watch"]
    subprocess.run([*command, "--stop"], check=True)
    assert eventually(lambda: "another" not in agent("backup", "--due").stderr, seconds=60)
    try:
        yield
    finally:
        subprocess.run([*command, "--start"], check=True)


def test_only_root_reads_the_keys_and_each_environment_has_its_own(live: Deployment) -> None:
    declared = {name: json.loads((JOBS / f"{name}.json").read_text()) for name in (PROD, DEV)}
    assert declared[PROD]["password"] != declared[DEV]["password"]
    assert {oct(path.stat().st_mode & 0o777) for path in (JOBS, *JOBS.iterdir())} == {"0o700", "0o600"}
    shown = live.outputs(PROD)
    assert shown["backups"]["db-data"]["engine"] == "postgres"
    assert declared[PROD]["password"] not in json.dumps(shown)
    repository = declared[PROD]["jobs"]["db-data"]["targets"]["disk"]["repository"]
    refused = subprocess.run(
        ["restic", "-r", repository, "--no-lock", "snapshots"],
        env={**os.environ, "RESTIC_PASSWORD": declared[DEV]["password"]},
        capture_output=True,
        text=True,
        check=False,
    )
    assert "wrong password" in refused.stderr


def test_a_second_backup_of_the_same_data_takes_next_to_nothing(live: Deployment) -> None:
    assert "snapshot" in live.done("backup", DEV, SERVICE="cache")
    first = known(f"{DEV}/cache-data")
    live.done("backup", DEV, SERVICE="cache")
    second = known(f"{DEV}/cache-data")
    assert second["snapshot"] != first["snapshot"]
    assert second["added"] < max(second["size"], 20_000)
    listed = live.done("backup", DEV, args="--list")
    assert {first["snapshot"][:8], second["snapshot"][:8]} <= set(re.findall(r"\b[0-9a-f]{8}\b", listed))


def test_a_database_comes_back_as_it_was_at_a_chosen_second(
    live: Deployment, engine: docker.DockerClient, record_property: Callable[[str, object], None]
) -> None:
    """While it is written to, up to 200 times a second: exactly what was committed before it, row by row."""
    sql(engine, DEV, ORDERS)
    live.done("backup", DEV, SERVICE="db")
    sql(engine, DEV, "call write_orders(4)")
    chosen = datetime.now(UTC)
    sql(engine, DEV, "call write_orders(4)")
    middle = chosen.timestamp() - 2.0
    at = datetime.fromtimestamp(middle, UTC).isoformat()
    written = [
        (int(number), float(moment))
        for number, _, moment in (
            line.partition("|")
            for line in sql(engine, DEV, "select id, extract(epoch from at) from written order by id").splitlines()
        )
    ]
    record_property("commits a second", len(written) / 8)
    assert len(written) > 40
    live.done("backup", DEV, SERVICE="db")
    refused = live.make("restore", DEV, SERVICE="db", AT=at, YES="1", BULKHEAD_CONFIRM=DEV)
    assert refused.returncode != 0
    assert "LOSE_NEWER=1" in refused.stdout
    volume = re.search(r"restored into (\S+)", refused.stdout)
    assert volume
    engine.volumes.get(volume[1]).remove()
    unconfirmed = live.make("restore", DEV, SERVICE="db", AT=at, YES="1", LOSE_NEWER="1")
    assert unconfirmed.returncode != 0
    assert "Not confirmed" in unconfirmed.stdout

    said = live.done("restore", DEV, SERVICE="db", AT=at, YES="1", LOSE_NEWER="1", BULKHEAD_CONFIRM=DEV)
    kept = re.search(r"kept as (\S+?),", said)
    assert kept
    assert eventually(partial(healthy, engine, DEV), seconds=180)
    there = {int(number) for number in sql(engine, DEV, "select id from written").splitlines()}
    # A row was committed before the next one was written; between the two nobody can tell.
    following = [*(moment for _, moment in written[1:]), float("inf")]
    must = {number for (number, _), after in zip(written, following, strict=True) if after <= middle}
    must_not = {number for number, moment in written if moment > middle}
    assert must <= there
    assert not must_not & there
    assert 0 < len(must) < len(written)

    assert "removed" in live.done("restore", RELEASE=kept[1])
    with pytest.raises(docker.errors.NotFound):
        engine.volumes.get(kept[1])
    # Another history has begun, so it is backed up anew, and can be restored from there too.
    live.done("backup", DEV, SERVICE="db")
    live.done("drill", DEV, SERVICE="db")


def test_wal_is_archived_while_a_base_backup_goes_on_which_has_all_that_it_needs_at_its_end(
    live: Deployment, engine: docker.DockerClient
) -> None:
    slot = "select restart_lsn from pg_replication_slots"

    def archived() -> None:
        """As it is done each minute."""
        noted = json.loads(WAL.read_text())
        noted[f"{PROD}/db-data"]["wal_at"] = 0
        WAL.write_text(json.dumps(noted))
        done = agent("backup", "--wal", "--environment", PROD)
        assert done.returncode == 0, done.stdout
        assert json.loads(WAL.read_text())[f"{PROD}/db-data"]["wal_at"] > time.time() - 60

    with nothing_else_runs():
        live.done("backup", PROD, SERVICE="db")
        server = Postgres.of(of_service(PROD, f"{PROD}-db-data", "db"), f"{PROD}-db-data", None, Places())
        before = sql(engine, PROD, slot)
        slow = subprocess.Popen([*server.base(hurry=True), "--max-rate=2M"], stdout=subprocess.DEVNULL)
        try:
            assert eventually(lambda: sql(engine, PROD, f"select count(*) {OUR_BASES}") == "1", seconds=30)
            segment = sql(engine, PROD, "select pg_walfile_name(pg_current_wal_lsn())")
            sql(engine, PROD, "create table meanwhile as select 1 as row; select pg_switch_wal(); checkpoint")
            archived()
            assert (WAL.parent / PROD / "db-data/wal" / segment).exists()
            assert slow.poll() is None
            assert sql(engine, PROD, slot) == before
            assert slow.wait(120) == 0
        finally:
            slow.kill()
            slow.wait()
        archived()
        assert sql(engine, PROD, slot) != before
        sql(engine, PROD, "drop table meanwhile")


def test_a_snapshot_comes_back_as_it_was_and_a_second_after_which_nothing_was_written_too(
    live: Deployment, engine: docker.DockerClient
) -> None:
    sql(engine, DEV, "create table quiet as select 1 as row")
    live.done("backup", DEV, SERVICE="db")
    named = known(f"{DEV}/db-data")["snapshot"][:8]
    sql(engine, DEV, "insert into quiet values (2)")
    time.sleep(1.5)
    chosen = datetime.now(UTC).isoformat()
    time.sleep(1.5)
    live.done("backup", DEV, SERVICE="db")
    made = f"{DEV}-made-by-hand"
    for at, rows in ((named, 1), (chosen, 2)):
        said = live.done("restore", DEV, SERVICE="db", AT=at, TO=made)
        assert f'"shop.public.quiet": {rows}' in said
        taken = live.make("restore", DEV, SERVICE="db", TO=made)
        assert taken.returncode != 0
        assert f"volume {made} is there already" in taken.stdout
        engine.volumes.get(made).remove()
    early = live.make("restore", DEV, SERVICE="db", AT="2999-01-01", TO=made)
    assert early.returncode != 0
    assert "make backup brings the newest" in early.stdout
    sql(engine, DEV, "drop table quiet")


def test_a_second_in_which_a_base_backup_went_on_and_clients_wrote_comes_back_from_the_one_before(
    live: Deployment, engine: docker.DockerClient
) -> None:
    """A base backup of a large database takes hours, and is of use only from its end on."""
    sql(engine, DEV, ORDERS)
    live.done("backup", DEV, SERVICE="db")
    under_way = f"select count(*) {OUR_BASES}"
    with nothing_else_runs():
        slow = subprocess.Popen([sys.executable, PROGRAM, *f"backup --environment {DEV} --job db --rate 2".split()])
        try:
            assert eventually(lambda: sql(engine, DEV, under_way) == "1", seconds=60)
            sql(engine, DEV, "call write_orders(3)")
            chosen = time.time()
            sql(engine, DEV, "call write_orders(3)")
            assert sql(engine, DEV, under_way) == "1"
            assert slow.wait(300) == 0
        finally:
            slow.kill()
            slow.wait()
    moments = sql(engine, DEV, "select extract(epoch from at) from written").splitlines()
    least = sum(float(moment) <= chosen for moment in moments) - 1
    at, made = datetime.fromtimestamp(chosen, UTC).isoformat(), f"{DEV}-made-by-hand"
    said = live.done("restore", DEV, SERVICE="db", AT=at, TO=made)
    engine.volumes.get(made).remove()
    assert "still went on then: from the one before" in said
    rows = re.search(r'"shop.public.written": (\d+)', said)
    assert rows
    # Between two rows nobody can tell when the first one was committed.
    assert least <= int(rows[1]) <= least + 1
    assert least > 40


def test_redis_comes_back_with_every_key_also_where_it_appends(live: Deployment, engine: docker.DockerClient) -> None:
    redis(engine, DEV, "set", "cart:e2e:100", "value")
    redis(engine, DEV, "eval", "for i=1,500 do redis.call('set', 'many:'..i, i) end return 1", "0")
    live.done("backup", DEV, SERVICE="cache")
    before = {key: redis(engine, DEV, "get", key) for key in ("cart:e2e:100", "many:1", "many:500")}
    redis(engine, DEV, "flushall")
    said = live.done("restore", DEV, SERVICE="cache", YES="1", LOSE_NEWER="1", BULKHEAD_CONFIRM=DEV)
    kept = re.search(r"kept as (\S+?),", said)
    assert kept
    assert eventually(partial(healthy, engine, DEV), seconds=180)
    assert {key: redis(engine, DEV, "get", key) for key in before} == before
    live.done("restore", RELEASE=kept[1])


def test_the_host_only_adds_to_the_bucket_and_the_pruner_lets_go(live: Deployment, s3: Server) -> None:
    again = live.done("bucket", PROD, **s3.variables)
    assert "Nothing changed" in again
    assert f"/live/{PROD}" in again  # the repository, opened with the environment's own key

    def bases(target: str) -> int:
        listed = live.done("backup", PROD, args="--list").splitlines()
        return sum(line.startswith(f"{PROD}/cache-data  {target}  ") and line.endswith("base") for line in listed)

    for _ in range(3):
        live.done("backup", PROD, SERVICE="cache")
    assert bases("disk") == 2
    before = bases("offsite")
    assert before > 2
    refused = live.make("prune", PROD)
    assert refused.returncode != 0
    assert "AWS_ACCESS_KEY_ID" in refused.stdout
    pruner = s3.user("live-pruner")
    live.done("bucket", PROD, args=f"--principal pruner={pruner.access}", **s3.variables)
    own = {"AWS_ACCESS_KEY_ID": pruner.access, "AWS_SECRET_ACCESS_KEY": pruner.secret}
    assert "snapshots before" in live.done("prune", PROD, **own)
    assert bases("offsite") == 2
    # What was let go of is still there as older versions, for as long as the lifecycle keeps them.
    assert "objects brought back" in live.done("bucket", PROD, args="--bring-back", **s3.variables)
    assert bases("offsite") == before
    live.done("prune", PROD, **own)
    policies = live.done("bucket", PROD, args="--policies")
    assert all(f'"{role}": {{' in policies for role in ("writer", "pruner", "restorer"))


def test_a_drill_restores_all_of_prod_checks_it_and_leaves_nothing(
    live: Deployment, engine: docker.DockerClient
) -> None:
    """From both targets. Before it a preview warns that no backup of prod's is known to come back, afterwards not."""
    warning = "no restore of its backup was checked in the last 8 days"
    assert warning in live.done("preview", PROD)
    containers = {one.id for one in engine.containers.list(all=True)}
    volumes = {one.id for one in engine.volumes.list()}
    said = live.done("drill", PROD)
    assert said.count("verified: back in") == 2
    for target in ("disk", "offsite"):
        assert said.count(f"restoring the newest backup from {target}") == 2
    assert warning not in live.done("preview", PROD)
    for volume in ("db-data", "cache-data"):
        job = known(f"{PROD}/{volume}")
        assert job["last_verified"]
        assert job["rto"] > 0
    assert {one.id for one in engine.containers.list(all=True)} == containers
    assert {one.id for one in engine.volumes.list()} == volumes
    # What a deploy puts out of it is no change to a preview.
    told = agent("backup", "--last", "--environment", PROD).stdout
    live.done("pulumi", args=f"up --yes --skip-preview --stack {PROD}", BULKHEAD_BACKUPS=told)
    when = live.outputs(PROD)["backups"]["db-data"]["when_deployed"]
    assert when == {key: int(known(f"{PROD}/db-data")[key]) for key in ("last_success", "last_verified")}
    assert "no changes" in live.done("preview", PROD)
    metrics = Path("/var/lib/bulkhead/metrics/backup.prom").read_text()
    assert f'bulkhead_backup_last_verified_timestamp_seconds{{environment="{PROD}",job="db-data"}} 1' in metrics


def test_dev_gets_a_masked_copy_of_prods_data_and_keeps_its_own_passwords(
    live: Deployment, engine: docker.DockerClient
) -> None:
    """Its services are healthy with it: they log in as before. A mask that fails leaves dev as it was."""
    sql(engine, PROD, "create table if not exists people (id int, name text)")
    sql(engine, PROD, "insert into people values (1, 'Ada Lovelace'), (2, 'Charles Babbage')")
    sql(
        engine,
        PROD,
        "create table if not exists letters as select 'Dear Mr. Babbage' as text from generate_series(1, 9)",
    )
    sql(engine, PROD, "analyze people, letters")
    live.done("backup", PROD, SERVICE="db")
    volumes = {one.id for one in engine.volumes.list()}
    unconfirmed = live.make("refresh-dev", DEV, YES="1")
    assert unconfirmed.returncode != 0
    assert "Not confirmed" in unconfirmed.stdout

    file = JOBS / f"{DEV}.json"
    before = file.read_text()
    try:
        file.write_text(before.replace("update people", "update nobody"))
        failed = live.make("refresh-dev", DEV, YES="1", BULKHEAD_CONFIRM=DEV)
    finally:
        file.write_text(before)
    assert failed.returncode != 0
    assert "the mask failed in shop, so nothing was replaced" in failed.stdout
    assert {one.id for one in engine.volumes.list()} == volumes

    said = live.done("refresh-dev", DEV, YES="1", BULKHEAD_CONFIRM=DEV)
    assert eventually(partial(healthy, engine, DEV), seconds=180)
    assert sql(engine, DEV, "select name from people order by id").splitlines() == ["person 1", "person 2"]
    assert sql(engine, PROD, "select name from people order by id").startswith("Ada")
    # Dev owns the files too: nothing of it is in dead rows, statistics or WAL, nor what prod logs in with.
    verifiers = sql(engine, PROD, "select rolpassword from pg_authid where rolpassword is not null").splitlines()
    files = list(Path(engine.volumes.get(f"{DEV}-db-data").attrs["Mountpoint"]).rglob("*"))
    assert len(files) > 500
    for secret in ("Ada Lovelace", "Dear Mr.", *verifiers):
        assert not [file for file in files if file.is_file() and secret.encode() in file.read_bytes()]
    kept = re.search(r"kept as (\S+?),", said)
    assert kept
    live.done("restore", RELEASE=kept[1])
    live.done("backup", DEV, SERVICE="db")


def test_damage_in_a_repository_is_found_by_the_drill_and_turns_verify_red(live: Deployment) -> None:
    """And docs/runbooks/drill.md: a new repository in place of the damaged one."""
    with nothing_else_runs():
        declared = json.loads((JOBS / f"{DEV}.json").read_text())
        repository = Path(declared["jobs"]["db-data"]["targets"]["disk"]["repository"])
        damaged = repository.with_name("damaged")
        packs = [path for path in (repository / "data").rglob("*") if path.is_file()]
        before = {path: path.read_bytes() for path in packs}
        try:
            for path, content in before.items():
                path.chmod(0o600)
                path.write_bytes(content[:100] + bytes([content[100] ^ 1]) + content[101:])
            failed = live.make("drill", DEV, SERVICE="db")
            assert failed.returncode != 0
            assert "DRILL FAILED" in failed.stdout
            red = live.make("verify")
            assert red.returncode != 0
            assert f"{DEV}: backup drill failed" in red.stdout
            repository.rename(damaged)
            gone = live.make("backup", DEV, SERVICE="db")
            assert gone.returncode != 0
            assert "the repository was there, and is gone" in gone.stdout
            live.done("backup", DEV, SERVICE="db", args="--anew")
            live.done("drill", DEV, SERVICE="db")
        finally:
            if damaged.exists():
                shutil.rmtree(repository, ignore_errors=True)
                damaged.rename(repository)
            for path, content in before.items():
                path.write_bytes(content)
    assert f"{DEV}: backup" not in live.make("verify").stdout


def test_a_run_that_is_killed_leaves_no_half_backup_and_the_next_one_succeeds(
    live: Deployment, engine: docker.DockerClient
) -> None:
    with nothing_else_runs():
        for wait in (0.5, 1.0, 2.0, 3.0, 4.0):
            before = live.done("backup", DEV, args="--list")
            run = subprocess.Popen(
                [sys.executable, PROGRAM, "backup", "--environment", DEV, "--job", "db"],
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            time.sleep(wait)
            os.killpg(run.pid, signal.SIGKILL)
            run.communicate()
            after = live.done("backup", DEV, args="--list")
            new = set(after.splitlines()) - set(before.splitlines())
            assert all("base" in line or "wal" in line for line in new)
        for names in bases(DEV, "db-data"):  # WAL is what comes last, so one with it is whole
            assert "global/pg_control" in names
            assert [name for name in names if name.startswith("pg_wal/0")]
        live.done("backup", DEV, SERVICE="db")
        live.done("drill", DEV, SERVICE="db")


def test_of_two_runs_at_once_the_second_waits_and_says_for_whom(live: Deployment) -> None:
    with nothing_else_runs():
        first = subprocess.Popen([sys.executable, PROGRAM, "backup", "--environment", DEV], stdout=subprocess.PIPE)
        try:
            time.sleep(0.5)
            second = live.make("backup", DEV)
            assert second.returncode == 0
            assert f"waiting for backup, process {first.pid}" in second.stdout
        finally:
            first.communicate(timeout=300)
        assert first.returncode == 0


def test_a_target_that_is_away_is_loud_and_nothing_is_lost(live: Deployment, engine: docker.DockerClient) -> None:
    with nothing_else_runs():
        declared = json.loads((JOBS / f"{DEV}.json").read_text())
        repository = Path(declared["jobs"]["db-data"]["targets"]["disk"]["repository"])
        away = repository.with_name("away")
        repository.rename(away)
        repository.write_text("no folder")
        try:
            failed = live.make("backup", DEV, SERVICE="db")
            assert failed.returncode != 0
            assert "FAILED" in failed.stdout
            red = live.make("verify")
            assert f"{DEV}: backup failed" in red.stdout
        finally:
            repository.unlink()
            away.rename(repository)
        live.done("backup", DEV, SERVICE="db")
    assert f"{DEV}: backup failed" not in live.make("verify").stdout
