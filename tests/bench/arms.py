"""The ways to deploy the same containers that the benchmark compares, each as the commands a user would give.
All work in one temporary folder, with a ledger, a state and a Compose file of their own."""

import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from ipaddress import IPv4Network
from pathlib import Path
from typing import Any

import yaml

from cli.pulumi import ANSI, environment
from components.labels import label_inputs, labels
from components.service import Attachment, ServiceArgs, container_args
from settings import compose, host
from settings.compose_cli import find_compose
from settings.ledger import Tier, slice_name
from tests.deployed import LABEL, copied, isolated

ENVIRONMENT = "bench"
PLAIN, COMPOSE = f"{ENVIRONMENT}-plain", f"{ENVIRONMENT}-compose"
COMPOSE_LABEL = f"com.docker.compose.project={COMPOSE}"
LABELS = (f"{LABEL}={ENVIRONMENT}", COMPOSE_LABEL)
"""What the arms put on the engine carries one of these: the plain one takes over Bulkhead's."""

IMAGE = "debian:bookworm-slim"
NETWORK = "backend"
SUBNET = IPv4Network("10.94.0.0/16")
LEDGER: dict[str, Any] = {
    "bulkhead:system": {"cpus": "5%", "memory": "10%"},
    "bulkhead:environments": {
        ENVIRONMENT: {
            "tier": str(Tier.BEST_EFFORT),
            "subnet": str(SUBNET),
            "limits": {"cpus": "100%", "memory": "50%", "pids": 4096},
        }
    },
}
QUIET = ("--non-interactive", "--color", "never")
STOP_SECONDS = 60
SAID_LINES = 40


class BenchError(Exception):
    """A command of an arm failed; the text is the command and the end of what it said."""


@dataclass(frozen=True)
class Arm:
    """`deploy` given a second time is the no-op deploy. `preview` is None where there is none."""

    name: str
    folder: Path
    deploy: Sequence[str]
    destroy: Sequence[str]
    preview: Sequence[str] | None = None


class Workspace:
    """The temporary folder: the checkout's copy in `bulkhead`, the plain project in `plain`, the state in `state`."""

    def __init__(self, folder: Path) -> None:
        self.copy, self.plain = folder / "bulkhead", folder / "plain"
        self._said = folder / "said.txt"
        state = folder / "state"
        for made in (self.copy, self.plain, state):
            made.mkdir()
        copied(self.copy)
        # An explicit backend and passphrase: wherever the user is logged in, the benchmark is not.
        own = {"PULUMI_BACKEND_URL": f"file://{state}", "PULUMI_CONFIG_PASSPHRASE": ENVIRONMENT}
        self.variables = environment(isolated(state) | own, self.copy, Path.home())
        self._settings()

    def _settings(self) -> None:
        for stack in ("prod", "dev"):
            (self.copy / f"Pulumi.{stack}.yaml").unlink()
        _write(self.copy / "Pulumi.host.yaml", {"config": LEDGER})
        _write(self.copy / f"Pulumi.{ENVIRONMENT}.yaml", {"config": {"bulkhead:compose": ["bench.yaml"]}})
        project = yaml.safe_load((self.copy / "Pulumi.yaml").read_text())
        _write(self.plain / "Pulumi.yaml", project | {"name": PLAIN})
        (self.plain / ".venv").symlink_to(self.copy / ".venv")
        shutil.copy2(Path(__file__).with_name("plain.py"), self.plain / "__main__.py")

    def size(self, containers: int) -> None:
        """Writes what the arms read, so that the next commands are about this many containers."""
        file = self.copy / "bench.yaml"
        _write(file, compose_file(containers))
        project = compose.read([file], environment=ENVIRONMENT)
        parent = slice_name(ENVIRONMENT, host.facts().cgroup_driver)
        (self.plain / "resources.json").write_text(json.dumps(plain_resources(project, parent)))

    def stacks(self) -> None:
        """Makes the stacks and deploys the host one: slices are made once for a machine, not with each deploy."""
        for folder, stack in ((self.copy, "host"), (self.copy, ENVIRONMENT), (self.plain, ENVIRONMENT)):
            self.run(["pulumi", "stack", "init", stack, "--no-select", "--non-interactive"], folder)
        self.run(["pulumi", "up", "--yes", "--skip-preview", "--stack", "host", *QUIET], self.copy)

    def unstack(self) -> None:
        """Removes the slices again as the host stack made them (under systemd a unit, not a folder)."""
        self.run(["pulumi", "destroy", "--yes", "--skip-preview", "--stack", "host", *QUIET], self.copy)

    def arms(self) -> dict[str, Arm]:
        """The arms by name. `gated` is the deploy as `make up` does it: with a preview, and the policies in both."""
        stack = ("--stack", ENVIRONMENT, *QUIET)
        pack = ("--policy-pack", "policies")
        up, preview = ("pulumi", "up", "--yes", *stack), ("pulumi", "preview", *stack)
        destroy = ("pulumi", "destroy", "--yes", "--skip-preview", *stack)
        run = (*find_compose(), "--project-name", COMPOSE, "--file", "bench.yaml")
        found = (
            Arm("bulkhead", self.copy, (*up, "--skip-preview"), destroy, preview),
            Arm("plain", self.plain, (*up, "--skip-preview"), destroy, preview),
            Arm("compose", self.copy, (*run, "up", "--detach"), (*run, "down")),
            Arm("gated", self.copy, (*up, *pack), destroy, (*preview, *pack)),
        )
        return {arm.name: arm for arm in found}

    def run(self, command: Sequence[str], folder: Path) -> float:
        """The seconds that a command took. BenchError if it fails."""
        return ran(command, folder, self.variables, self._said)


def ran(command: Sequence[str], folder: Path, variables: Mapping[str, str], said: Path) -> float:
    """The seconds that a command took, in `folder`, with what it says in the file `said`. BenchError if it fails.

    It runs in a session of its own, so that Ctrl-C reaches this process only. The command then gets one interrupt, at
    which Pulumi ends in order (at a second one it would leave things half done), and is waited for.
    """
    with said.open("w") as output:
        started = time.monotonic()
        child = subprocess.Popen(
            command,
            cwd=folder,
            env=variables,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            code = child.wait()
        except BaseException:
            _ended(child)
            raise
        seconds = time.monotonic() - started
    if code:
        lines = ANSI.sub("", said.read_text(errors="replace")).splitlines()
        last = [line for line in lines if line.strip()][-SAID_LINES:]
        raise BenchError("\n".join([f"{' '.join(command)} (in {folder.name}) ended with code {code}:", *last]))
    return seconds


def _write(file: Path, document: Mapping[str, Any]) -> None:
    file.write_text(yaml.safe_dump(dict(document), sort_keys=False))


def _ended(child: subprocess.Popen[bytes]) -> None:
    child.send_signal(signal.SIGINT)
    try:
        child.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        os.killpg(child.pid, signal.SIGKILL)
        child.wait()


def compose_file(containers: int) -> dict[str, Any]:
    """So many services that only sleep, on one network; with network settings that all arms realise alike."""
    service = {
        "image": IMAGE,
        "command": ["sleep", "infinity"],
        "init": True,
        "stop_grace_period": "1s",
        "networks": [NETWORK],
        "deploy": {"resources": {"limits": {"memory": "16M"}}},
    }
    return {
        "services": {f"s{number:03}": service for number in range(1, containers + 1)},
        "networks": {NETWORK: {"internal": True, "ipam": {"config": [{"subnet": str(_first_subnet())}]}}},
    }


def _first_subnet() -> IPv4Network:
    return next(SUBNET.subnets(new_prefix=24))


def plain_resources(project: compose.Project, cgroup_parent: str) -> dict[str, Any]:
    """The arguments of `plain.build`: those that Bulkhead gives its containers, network and image, but for names."""
    network = f"{PLAIN}-{NETWORK}"

    def arguments(key: str, service: compose.Service) -> dict[str, Any]:
        attached = [Attachment(network)]
        return container_args(
            ServiceArgs(ENVIRONMENT, Tier.BEST_EFFORT, key, service, IMAGE, cgroup_parent, attachments=attached)
        )

    return {
        "image": IMAGE,
        "network": {
            "name": network,
            "driver": "bridge",
            "internal": True,
            "ipam_configs": [{"subnet": str(_first_subnet())}],
            "labels": label_inputs(labels(ENVIRONMENT, Tier.BEST_EFFORT)),
        },
        "containers": {f"{PLAIN}-{key}-1": arguments(key, service) for key, service in project.services.items()},
    }
