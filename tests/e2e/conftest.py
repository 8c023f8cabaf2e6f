"""End to end: a copy of this checkout with a ledger and a state of its own, deployed with the real tools.

Environments are named `e2e-…`, so that a deployment of the user's on the same engine is never touched, and everything
with their labels is removed at the end, also when a test fails.
"""

import json
import secrets
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import docker
import pytest
import yaml

from cli.bucket import repository
from components import agent, firewall
from host.backup import RESTORE_LABEL
from host.bucket import State
from host.restore import KEPT
from tests.deployed import LABEL, copied, isolated, labelled, removed
from tests.s3 import Server, server

PROD, DEV, STAGING = ENVIRONMENTS = "e2e-prod", "e2e-dev", "e2e-staging"
PORTS = {PROD: "18080", DEV: "18081"}
LEDGER: dict[str, Any] = {
    "bulkhead:system": {"cpus": "5%", "memory": "10%"},
    "bulkhead:environments": {
        PROD: {
            "tier": "protected",
            "subnet": "10.91.0.0/16",
            "subnet6": "fd91::/48",
            "reservations": {"cpus": "60%", "memory": "50%"},
        },
        DEV: {
            "tier": "best-effort",
            "subnet": "10.92.0.0/16",
            "subnet6": "fd92::/48",
            "limits": {"cpus": "100%", "memory": "20%", "pids": 2048, "disk": "512MiB"},
        },
        STAGING: {
            "tier": "best-effort",
            "subnet": "10.93.0.0/16",
            "limits": {"cpus": "100%", "memory": "10%", "pids": 512},
        },
    },
}


LIVE = ("test_prove.py", "test_verify.py", "test_backup.py", "test_faults.py", "test_recover.py")
"""Modules that need a deployment with all its environments, and leave it as they find it; in the order they run in."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Runs LIVE modules last, so that nothing else is deployed while `live` is there.

    Nothing before LIVE stops the engine, which the corpus asks.
    """
    order = {Path(__file__).parent / name: number for number, name in enumerate(LIVE)}
    items.sort(key=lambda item: order.get(item.path, -1))


VOLUMES = ("db-data", "cache-data")
OVERLAY, MASK_FILE = "disk.yaml", "examples/shop/mask.sql"
MASK = "update people set name = 'person ' || id;\ndelete from letters;\n"


class Deployment:
    """A copy of the checkout, and the commands that a user gives in it; `seconds`: what each of them may take."""

    def __init__(self, folder: Path, state: Path, seconds: float = 900) -> None:
        self.folder, self.seconds = folder, seconds
        self.environment = isolated(state)

    def make(self, target: str, stack: str = "", args: str = "", **variables: str) -> subprocess.CompletedProcess[str]:
        """`make target ENV=stack ARGS=args`, with its output as text. Bounded, so that a hang is a failure."""
        words = ["make", "--no-print-directory", target]
        words += [f"{name}={value}" for name, value in (("ENV", stack), ("ARGS", args)) if value]
        return subprocess.run(
            words,
            cwd=self.folder,
            env=self.environment | variables,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=self.seconds,
            check=False,
        )

    def done(self, target: str, stack: str = "", args: str = "", **variables: str) -> str:
        """Like `make`, for what has to work."""
        ran = self.make(target, stack, args, **variables)
        assert ran.returncode == 0, ran.stdout[-6000:]
        return ran.stdout

    def outputs(self, stack: str) -> Any:
        """The stack's outputs as monitoring reads them."""
        return json.loads(self.done("pulumi", args=f"stack output --json --stack {stack}"))

    def settings(self, stack: str, **changed: Any) -> None:
        """Writes keys of `Pulumi.<stack>.yaml`, keeping the others."""
        path = self.folder / f"Pulumi.{stack}.yaml"
        document = yaml.safe_load(path.read_text()) if path.exists() else {"config": {}}
        document["config"] |= {f"bulkhead:{key}": value for key, value in changed.items()}
        path.write_text(yaml.safe_dump(document, sort_keys=False))


@pytest.fixture(scope="session")
def engine() -> docker.DockerClient:
    """The engine that the suite deploys to."""
    return docker.from_env()


def ours(engine: docker.DockerClient, environment: str | None = None) -> Mapping[str, list[Any]]:
    """Everything on the engine that carries a label of the suite's environments (or of one of them)."""
    names = [environment] if environment else ENVIRONMENTS
    return labelled(engine, [f"{LABEL}={name}" for name in names])


def running(engine: docker.DockerClient, environment: str) -> list[Any]:
    """The containers of the environment's services: not those that only carry files into a volume."""
    return [one for one in ours(engine, environment)["containers"] if "bulkhead.files" not in one.labels]


def in_bucket(made: Deployment, s3: Server) -> None:
    """Gives prod's backups a second target, as the getting-started page tells it: a bucket, a writer, their secrets."""
    bucket, writer = s3.target("live", lock="1d"), s3.user("live-writer")
    ledger = made.folder / "Pulumi.host.yaml"
    document = yaml.safe_load(ledger.read_text())
    targets = document["config"]["bulkhead:backup"]["targets"]
    targets["offsite"] = {"endpoint": bucket.endpoint, "bucket": bucket.bucket, "lock": "1d"}
    ledger.write_text(yaml.safe_dump(document, sort_keys=False))
    volumes = {name: {"x-bulkhead": {"backup": {"target": "disk"}}} for name in VOLUMES}
    volumes["db-data"]["x-bulkhead"]["refresh"] = {"environment": PROD, "mask": "mask.sql"}
    (made.folder / OVERLAY).write_text(yaml.safe_dump({"volumes": volumes}))
    (made.folder / MASK_FILE).write_text(MASK)
    made.settings(DEV, compose=["examples/shop/compose.yaml", "examples/shop/compose.dev.yaml", OVERLAY])
    key = secrets.token_hex(16)
    wanted = {"key": key, "offsite_key_id": writer.access, "offsite_secret_key": writer.secret}
    for name, value in wanted.items():
        made.done("pulumi", args=f"config set --stack {PROD} --secret --path 'bulkhead:secrets.backup_{name}' {value}")
    made.done("bucket", PROD, args=f"--principal writer={writer.access}", **s3.variables)
    # What a deploy would have asked for: its key is known here before it.
    made_there = repository(bucket, PROD, s3.variables, key)
    assert made_there.state is State.SET, made_there


@contextmanager
def project(tmp_path_factory: pytest.TempPathFactory, engine: docker.DockerClient) -> Iterator[Deployment]:
    """A project with host, e2e-prod and e2e-dev, not yet deployed; all of it is gone afterwards."""
    clear(engine)
    folder, state = tmp_path_factory.mktemp("bulkhead"), tmp_path_factory.mktemp("state")
    copied(folder)
    for stack in ("prod", "dev"):
        (folder / f"Pulumi.{stack}.yaml").unlink()
    made = Deployment(folder, state)
    backups = tmp_path_factory.mktemp("backups")
    ledger = LEDGER | {"bulkhead:backup": {"targets": {"disk": {"path": str(backups)}}}}
    (folder / "Pulumi.host.yaml").write_text(yaml.safe_dump({"config": ledger}, sort_keys=False))
    for stack, overlay in ((PROD, "prod"), (DEV, "dev")):
        made.settings(
            stack,
            compose=["examples/shop/compose.yaml", f"examples/shop/compose.{overlay}.yaml"],
            variables={"SHOP_PORT": PORTS[stack], "SHOP_DEV_PORT": PORTS[stack]},
        )
    try:
        yield made
    finally:
        clear(engine)


def clear(engine: docker.DockerClient) -> None:
    """Removes everything of the suite's from the engine, and what a run that was cut off has left of the host."""
    removed(engine, ENVIRONMENTS)
    for container in engine.containers.list(all=True, filters={"label": RESTORE_LABEL}):
        container.remove(force=True, v=True)
    for label in (RESTORE_LABEL, KEPT):
        for volume in engine.volumes.list(filters={"label": label}):
            if str(volume.attrs["Labels"][label]).startswith("e2e-"):
                volume.remove(force=True)
    for script in (agent.remove(), firewall.scripts("")[1]):
        subprocess.run(["/bin/sh", "-euc", script], check=False, capture_output=True)


@pytest.fixture(scope="module")
def deployment(tmp_path_factory: pytest.TempPathFactory, engine: docker.DockerClient) -> Iterator[Deployment]:
    """A project of the module's own, not yet deployed."""
    with project(tmp_path_factory, engine) as made:
        yield made


@pytest.fixture(scope="session")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A real S3 server."""
    with server(tmp_path_factory.mktemp("s3")) as running:
        yield running


@pytest.fixture(scope="session")
def live(tmp_path_factory: pytest.TempPathFactory, engine: docker.DockerClient, s3: Server) -> Iterator[Deployment]:
    """A deployed project, for tests that leave it as it was; deployed once for all of them.

    Prod's backups go to a folder and a bucket, dev's to a folder; dev may get masked copies of prod's.
    """
    with project(tmp_path_factory, engine) as made:
        in_bucket(made, s3)
        try:
            made.done("up")
            yield made
        finally:
            made.make("down", BULKHEAD_CONFIRM=PROD)
