"""A lost key, and a lost host: everything of Bulkhead is destroyed, state and data with it, and comes back from the
bucket and a key. The last of all tests, since they leave nothing of the deployment that the others share."""

import json
import shutil
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import docker
import pytest
import yaml

from tests.deployed import copied
from tests.e2e.conftest import DEV, OVERLAY, PROD, VOLUMES, Deployment, clear, running
from tests.e2e.test_backup import redis, sql
from tests.e2e.test_deployment import eventually, healthy, http
from tests.s3 import Server

pytestmark = [pytest.mark.e2e, pytest.mark.slow]  # several deployments: eight minutes

CHECKSUM = "select count(*), md5(string_agg(o::text, ',' order by id)) from orders o"


def test_a_repository_of_another_key_is_opened_with_its_own_or_moved_away(live: Deployment) -> None:
    """docs/runbooks/lost-key.md."""

    def declared() -> Any:
        return json.loads(Path(f"/etc/bulkhead/backup/{DEV}.json").read_text())

    def with_key(key: str) -> None:
        live.done("pulumi", args=f"config set --stack {DEV} --secret --path 'bulkhead:secrets.backup_key' {key}")
        live.done("up", DEV)
        assert declared()["password"] == key

    own = declared()["password"]
    live.done("backup", DEV, SERVICE="db")
    repository = Path(declared()["jobs"]["db-data"]["targets"]["disk"]["repository"])
    before = {file for file in repository.rglob("*") if file.is_file()}
    with_key("another")
    failed = live.make("backup", DEV, SERVICE="db")
    assert failed.returncode != 0
    assert "docs/runbooks/lost-key.md" in failed.stdout
    assert before <= set(repository.rglob("*"))  # what another key made is not touched

    repository.rename(repository.with_name("lost"))
    live.done("backup", DEV, SERVICE="db", args="--anew")
    live.done("drill", DEV, SERVICE="db")

    shutil.rmtree(repository)
    repository.with_name("lost").rename(repository)
    with_key(own)
    live.done("backup", DEV, SERVICE="db")
    live.done("drill", DEV, SERVICE="db")


def test_a_lost_host_comes_back_from_its_backups_and_a_key(
    live: Deployment,
    engine: docker.DockerClient,
    s3: Server,
    tmp_path_factory: pytest.TempPathFactory,
    record_property: Callable[[str, object], None],
) -> None:
    http(PROD, "/orders", {"customer": "lost and found", "items": [{"sku": "anchor", "quantity": 1}]})
    redis(engine, PROD, "set", "cart:lost", "and found")
    live.done("backup", PROD)
    live.done("up", "host")  # the state of now is with the backups
    orders = sql(engine, PROD, CHECKSUM)
    assert not orders.startswith("0|")
    restorer = s3.user("live-restorer")
    live.done("bucket", PROD, args=f"--principal restorer={restorer.access}", **s3.variables)
    own = {"AWS_ACCESS_KEY_ID": restorer.access, "AWS_SECRET_ACCESS_KEY": restorer.secret}
    key = json.loads(Path(f"/etc/bulkhead/backup/{PROD}.json").read_text())["password"]
    targets = yaml.safe_load((live.folder / "Pulumi.host.yaml").read_text())["config"]["bulkhead:backup"]["targets"]

    clear(engine)
    shutil.rmtree(live.environment["XDG_STATE_HOME"] + "/bulkhead")
    shutil.rmtree(targets["disk"]["path"])
    for settings in live.folder.glob("Pulumi.*.yaml"):
        settings.unlink()
    assert not running(engine, PROD)

    folder = tmp_path_factory.mktemp("recovered")
    copied(folder)
    assert not (folder / OVERLAY).exists()  # it comes back with the settings that name it
    fresh = Deployment(folder, tmp_path_factory.mktemp("fresh"))
    source = f"s3:{s3.endpoint}/live"
    wrong = fresh.make("recover", PROD, FROM=source, RECOVERY_KEY="another", **own)
    assert wrong.returncode != 0
    assert "recovery key" in wrong.stdout
    began = time.monotonic()
    try:
        said = fresh.done("recover", PROD, FROM=source, RECOVERY_KEY=key, **own)
        record_property("seconds until the host was back", round(time.monotonic() - began))
        print(f"recovered in {time.monotonic() - began:.0f} s")
        assert "0 unexpected" in said
        for volume in VOLUMES:
            assert f"{DEV}/{volume}: it is not backed up to {source}" in said
        for name in (PROD, DEV):
            assert eventually(partial(healthy, engine, name), seconds=180), name
        assert sql(engine, PROD, CHECKSUM) == orders
        assert redis(engine, PROD, "get", "cart:lost") == "and found"
        assert not list(Path("/etc/bulkhead/backup").glob("*.held"))
        assert "As declared" in fresh.done("verify")
        again = fresh.make("recover", PROD, FROM=source, RECOVERY_KEY=key, **own)
        assert "nothing was done" in again.stdout
    finally:
        fresh.make("down", BULKHEAD_CONFIRM=PROD)
