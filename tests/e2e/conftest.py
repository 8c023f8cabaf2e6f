"""End to end: a copy of this checkout with a ledger and a state of its own, deployed with the real tools.

Environments are named `e2e-…`, so that a deployment of the user's on the same engine is never touched, and everything
with their labels is removed at the end, also when a test fails.
"""

import json
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import docker
import pytest
import yaml

from components import agent, firewall
from tests.deployed import LABEL, copied, isolated, labelled, removed

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


LIVE = ("test_prove.py", "test_verify.py", "test_faults.py")
"""Modules that need a deployment with all its environments, and leave it as they find it; in the order they run in."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Runs LIVE modules last, so that nothing else is deployed while `live` is there."""
    order = {Path(__file__).parent / name: number for number, name in enumerate(LIVE)}
    items.sort(key=lambda item: order.get(item.path, -1))


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


@contextmanager
def project(tmp_path_factory: pytest.TempPathFactory, engine: docker.DockerClient) -> Iterator[Deployment]:
    """A project with host, e2e-prod and e2e-dev, not yet deployed; all of it is gone afterwards."""
    removed(engine, ENVIRONMENTS)
    folder, state = tmp_path_factory.mktemp("bulkhead"), tmp_path_factory.mktemp("state")
    copied(folder)
    for stack in ("prod", "dev"):
        (folder / f"Pulumi.{stack}.yaml").unlink()
    made = Deployment(folder, state)
    (folder / "Pulumi.host.yaml").write_text(yaml.safe_dump({"config": LEDGER}, sort_keys=False))
    for stack, overlay in ((PROD, "prod"), (DEV, "dev")):
        made.settings(
            stack,
            compose=["examples/shop/compose.yaml", f"examples/shop/compose.{overlay}.yaml"],
            variables={"SHOP_PORT": PORTS[stack], "SHOP_DEV_PORT": PORTS[stack]},
        )
    try:
        yield made
    finally:
        removed(engine, ENVIRONMENTS)
        for script in (agent.remove(), firewall.scripts("")[1]):  # what a run that was cut off has left of the host
            subprocess.run(["/bin/sh", "-euc", script], check=False, capture_output=True)


@pytest.fixture(scope="module")
def deployment(tmp_path_factory: pytest.TempPathFactory, engine: docker.DockerClient) -> Iterator[Deployment]:
    """A project of the module's own, not yet deployed."""
    with project(tmp_path_factory, engine) as made:
        yield made


@pytest.fixture(scope="session")
def live(tmp_path_factory: pytest.TempPathFactory, engine: docker.DockerClient) -> Iterator[Deployment]:
    """A deployed project, for tests that leave it as it was; deployed once for all of them."""
    with project(tmp_path_factory, engine) as made:
        try:
            made.done("up")
            yield made
        finally:
            made.make("down", BULKHEAD_CONFIRM=PROD)
