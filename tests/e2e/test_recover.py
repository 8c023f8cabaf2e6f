"""A lost host: everything of Bulkhead is destroyed, state and data with it, and comes back from the bucket and a key.
The last of all tests, since it leaves nothing of the deployment that the others share."""

import json
import shutil
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import docker
import pytest
import yaml

from tests.deployed import copied
from tests.e2e.conftest import DEV, MASK_FILE, OVERLAY, PROD, VOLUMES, Deployment, clear, running
from tests.e2e.test_backup import redis, sql
from tests.e2e.test_deployment import eventually, healthy, http
from tests.s3 import Server

pytestmark = [pytest.mark.e2e, pytest.mark.slow]  # a host is destroyed and built anew: five minutes

CHECKSUM = "select count(*), md5(string_agg(o::text, ',' order by id)) from orders o"


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
    for name in (OVERLAY, MASK_FILE):  # which a user's own checkout has
        shutil.copy(live.folder / name, folder / name)
    fresh = Deployment(folder, tmp_path_factory.mktemp("fresh"))
    source = f"s3:{s3.endpoint}/live"
    wrong = fresh.make("recover", PROD, FROM=source, RECOVERY_KEY="another", **s3.variables)
    assert wrong.returncode != 0
    assert "recovery key" in wrong.stdout
    began = time.monotonic()
    try:
        said = fresh.done("recover", PROD, FROM=source, RECOVERY_KEY=key, **s3.variables)
        record_property("seconds until the host was back", round(time.monotonic() - began))
        print(f"recovered in {time.monotonic() - began:.0f} s")
        assert "0 unexpected" in said
        for volume in VOLUMES:
            assert f"{DEV}/{volume}: it is not backed up to {source}" in said
        for name in (PROD, DEV):
            assert eventually(partial(healthy, engine, name), seconds=180), name
        assert sql(engine, PROD, CHECKSUM) == orders
        assert redis(engine, PROD, "get", "cart:lost") == "and found"
        assert "held" not in json.loads(Path(f"/etc/bulkhead/backup/{PROD}.json").read_text())
        assert "As declared" in fresh.done("verify")
        again = fresh.make("recover", PROD, FROM=source, RECOVERY_KEY=key, **s3.variables)
        assert "nothing was done" in again.stdout
    finally:
        fresh.make("down", BULKHEAD_CONFIRM=PROD)
