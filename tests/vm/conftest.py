"""The server for all tests of this folder: booted once, prepared with `make bootstrap`, deployed to from a copy of this
checkout over ssh. It goes with everything on it, so nothing has to be taken down."""

import hashlib
import os
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from components.image import ImageArgs, build_command, content_hash
from engine import base_image, setup
from settings.ledger import LedgerSettings
from settings.project import read_environment, read_project
from tests.deployed import CHECKOUT, copied
from tests.e2e.conftest import Deployment
from tests.vm import image
from tests.vm.image import Say
from tests.vm.machine import Server, running, with_images

PROD, DEV = ENVIRONMENTS = "prod", "dev"
LEDGER: dict[str, Any] = {
    "bulkhead:system": {"cpus": "10%", "memory": "15%"},
    "bulkhead:environments": {
        PROD: {"tier": "protected", "subnet": "10.81.0.0/16", "reservations": {"cpus": "60%", "memory": "50%"}},
        DEV: {
            "tier": "best-effort",
            "subnet": "10.82.0.0/16",
            "limits": {"cpus": "100%", "memory": "30%", "pids": 1024},
        },
    },
}
# On an emulated CPU a healthcheck takes 3 s of it: with the shop's own intervals and dev's quotas the machine would do
# nothing else. And it is small: one of each service, without the worker.
SERVICES = ("web", "api", "db", "cache")
SMALLER: dict[str, Any] = {
    name: {"healthcheck": {"interval": "30s", "timeout": "60s", "retries": 5, "start_period": "1s"}}
    for name in SERVICES
} | {"worker": {"profiles": ["large"]}}
OVERLAYS: dict[str, Any] = {
    PROD: {"api": {"deploy": {"replicas": 1}}, "db": {"deploy": {"resources": {"limits": {"memory": "256M"}}}}},
    DEV: {name: {"deploy": {"resources": {"limits": {"cpus": "2"}}}} for name in SERVICES},
}


@pytest.fixture(scope="package")
def say(request: pytest.FixtureRequest) -> Say:
    """Progress, past pytest's capturing: booting takes a minute."""
    capture = request.config.pluginmanager.getplugin("capturemanager")

    def said(text: str) -> None:
        with capture.global_and_fixture_disabled():
            setup.say(text)

    return said


@pytest.fixture(scope="package")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The project that is deployed to the server."""
    return written(tmp_path_factory.mktemp("bulkhead"))


def written(folder: Path) -> Path:
    """A copy of this checkout with the two environments of the example, for a machine that is slow."""
    copied(folder)
    (folder / "vm.yaml").write_text(yaml.safe_dump({"services": SMALLER}))
    for name, services in OVERLAYS.items():
        (folder / f"vm.{name}.yaml").write_text(yaml.safe_dump({"services": services}))
        shop = ["examples/shop/compose.yaml", f"examples/shop/compose.{name}.yaml"]
        files = [*shop, "vm.yaml", f"vm.{name}.yaml"]
        (folder / f"Pulumi.{name}.yaml").write_text(yaml.safe_dump({"config": {"bulkhead:compose": files}}))
    return folder


def disk(project: Path, say: Say) -> image.Image:
    """What the server is booted from: Debian, with all images that the environments need on its engine."""
    return with_images(image.ensure(say), images(project, say), say)


def images(project: Path, say: Say) -> Path:
    """A tar of all images that the environments need, as `docker save` writes it: built here, by this engine."""
    wanted = dict(built(project))
    key = hashlib.sha256(" ".join(wanted).encode()).hexdigest()[:12]
    cache = setup.machine(CHECKOUT, os.environ).cache
    archive = cache / f"images-{key}.tar"
    if not archive.exists():
        there = {reference for reference in wanted if not docker("image", "inspect", reference, check=False)}
        for number, (reference, command) in enumerate(wanted.items(), start=1):
            if reference not in there:
                say(f"virtual machine: building {reference} ({number} of {len(wanted)})")
                docker(*command)
        part = archive.with_suffix(f".{os.getpid()}.part")
        docker("save", "--output", str(part), base_image.IMAGE, *wanted)
        part.rename(archive)
        if made := set(wanted) - there:
            docker("image", "rm", *made)
        for old in set(cache.glob("images-*")) - {archive}:
            old.unlink()
    return archive


def built(project: Path) -> Iterator[tuple[str, list[str]]]:
    """Each image that the deploy will look for, and the arguments of `docker` that build it."""
    ledger = LedgerSettings.read(project / "Pulumi.host.yaml")
    for name in ENVIRONMENTS:
        settings = read_environment(name, project)
        done = set()
        for key, service in sorted(read_project(settings, ledger).services.items()):
            if service.build and service.build.model_dump_json() not in done:
                done.add(service.build.model_dump_json())
                reference = f"bulkhead/{name}-{key}:{content_hash(service.build)}"
                tier = LEDGER["bulkhead:environments"][name]["tier"]
                args = ImageArgs(environment=name, tier=tier, service=key, cgroup_parent="", build=service.build)
                yield reference, build_command(reference, args, service.build, "")[1:]


def docker(*arguments: str, check: bool = True) -> int:
    """Docker on this machine; its exit code."""
    done = subprocess.run(
        ["docker", *arguments], env=os.environ | {"DOCKER_BUILDKIT": "0"}, capture_output=True, text=True, check=False
    )
    assert not (check and done.returncode), f"docker {' '.join(arguments)}: {done.stdout[-3000:]}{done.stderr[-3000:]}"
    return done.returncode


@pytest.fixture(scope="package")
def server(project: Path, say: Say) -> Iterator[Server]:
    """The booted server, with the images on it, as its provider hands it over: root, and nobody else."""
    # Not pytest's folder: the names of sockets may have 107 characters.
    image_ = disk(project, say)
    with tempfile.TemporaryDirectory(prefix="bulkhead-vm-") as folder, running(Path(folder), image_, say) as up:
        yield up


@pytest.fixture(scope="package")
def bootstrapped(server: Server, project: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Deployment, str]:
    """The copy, ready to deploy to the server as a user who is not root, and what `make bootstrap` said."""
    made = Deployment(project, tmp_path_factory.mktemp("state"), seconds=1800)
    made.environment = server.variables(made.environment)
    ledger = {"bulkhead:host": server.url(), **LEDGER}
    (project / "Pulumi.host.yaml").write_text(yaml.safe_dump({"config": ledger}, sort_keys=False))
    return made, made.done("bootstrap", HOST=server.url("root"), KEY=str(server.key))


@pytest.fixture(scope="package")
def up(bootstrapped: tuple[Deployment, str], say: Say) -> tuple[Deployment, str]:
    """Host, prod and dev on the server, and what `make up` said."""
    say("virtual machine: make up (some minutes)")
    return bootstrapped[0], bootstrapped[0].done("up")


@pytest.fixture(scope="package")
def deployed(up: tuple[Deployment, str]) -> Deployment:
    """Host, prod and dev on the server."""
    return up[0]


def outputs(deployment: Deployment) -> Mapping[str, Any]:
    """What the host stack promises each environment."""
    environments: Mapping[str, Any] = deployment.outputs("host")["environments"]
    return environments
