"""The arms of the interference benchmark: the same shop and the same dev, held apart in different ways or not at all.
Two deployments stand ready, one by plain Compose and one by Bulkhead; whichever is not measured is paused."""

import shutil
import socket
import sys
import time
import urllib.request
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import docker
import yaml
from docker.errors import APIError, DockerException
from docker.models.containers import Container
from requests.exceptions import RequestException

from bench.interference_antagonists import Dev
from bench.interference_results import AGAIN, ALONE, DEV_ALONE
from components.image import BUILDKIT_IN_SLICES, ImageArgs, build_command
from settings.compose import Build
from settings.compose_cli import find_compose
from settings.ledger import Tier
from tests.bench.arms import BenchError, ran
from tests.deployed import LABEL, copied, groups, isolated, labelled, removed

PROD, DEV = ENVIRONMENTS = "interfere-prod", "interfere-dev"
PLAIN_PROD, PLAIN_DEV = PROJECTS = "interfere-plain-prod", "interfere-plain-dev"
COMPOSE_PROJECT = "com.docker.compose.project"
BUILT = "bulkhead.interference=build"
"""The label of what the image build antagonist leaves."""

LABELS = (
    *(f"{LABEL}={environment}" for environment in ENVIRONMENTS),
    *(f"{COMPOSE_PROJECT}={project}" for project in PROJECTS),
    BUILT,
)
DECLARED = Path("/etc/bulkhead/host.json")
"""Where a deployed host stack says what it promises; there is one for a machine."""

# The budgets are those that Pulumi.host.yaml comes with.
LEDGER: dict[str, Any] = {
    "bulkhead:system": {"cpus": "5%", "memory": "10%"},
    "bulkhead:environments": {
        PROD: {
            "tier": str(Tier.PROTECTED),
            "subnet": "10.96.0.0/16",
            "reservations": {"cpus": "60%", "memory": "50%"},
        },
        DEV: {
            "tier": str(Tier.BEST_EFFORT),
            "subnet": "10.97.0.0/16",
            "limits": {"cpus": "100%", "memory": "30%", "pids": 4096},
        },
    },
}
SHOP = ("examples/shop/compose.yaml", "examples/shop/compose.prod.yaml")
PLAIN_FILES: Mapping[str, Sequence[str]] = {
    PLAIN_PROD: (*SHOP, "examples/shop/compose.local.yaml"),
    PLAIN_DEV: ("bench/dev/compose.yaml",),
}
PERIOD = 100_000
"""CFS period in µs, which `deploy.resources.limits.cpus` is enforced in."""

LEAST_CPUS = 0.05
"""The smallest part of a partition that a service is given."""

QUICK = 0.1
"""Seconds: the shop is back when it answers faster than this, several times in a row."""

BACK_SECONDS = 15.0
FILES = "bulkhead.files"
PLAIN, BULKHEAD = "plain", "bulkhead"


@dataclass(frozen=True)
class Arm:
    """What stands against what. `place`: which deployment. `share`: prod's part of a static partition, if there is one.

    Another way of holding dev back (a governor) is one more deployment in `Workbench.deploy`, and one more row here.
    """

    name: str
    what: str
    place: str = PLAIN
    prod: bool = True
    dev: bool = True
    share: float | None = None


ARMS: Mapping[str, Arm] = {
    arm.name: arm
    for arm in (
        Arm(ALONE, "prod alone, by plain Compose", dev=False),
        Arm("unlimited", "prod and dev by plain Compose, without limits"),
        Arm("static-50", "plain Compose, deploy.resources: half of CPUs and memory each", share=0.50),
        Arm("static-75", "plain Compose, deploy.resources: three quarters for prod", share=0.75),
        Arm("bulkhead", "prod and dev by Bulkhead", place=BULKHEAD),
        Arm(AGAIN, "prod alone again, which should be no different", dev=False),
        Arm(DEV_ALONE, "dev alone, by plain Compose, without limits", prod=False),
    )
}


@dataclass
class Place:
    """One deployment: prod's containers and address, dev's."""

    shop: Mapping[str, Container]
    url: str
    dev: Dev
    paused: bool = False

    def pause(self) -> None:
        """Freezes prod: it does nothing, and no healthcheck of it runs."""
        if not self.paused:
            for container in self.shop.values():
                _frozen(container)
            self.paused = True

    def resume(self) -> None:
        if self.paused:
            for container in self.shop.values():
                container.unpause()
            self.paused = False


class Workbench:
    """Both deployments, in a folder of their own, and what is switched between the arms."""

    def __init__(self, folder: Path, engine: docker.DockerClient, cpus: int, memory: int) -> None:
        self._engine, self._cpus, self._memory = engine, cpus, memory
        self._copy, self._said = folder / "bulkhead", folder / "said.txt"
        self._copy.mkdir()
        (folder / "state").mkdir()
        self._variables = isolated(folder / "state") | {"PYTHONPATH": str(self._copy)}
        version = str(engine.version()["Version"])
        self._buildkit = str(int(int(version.split(".")[0]) >= BUILDKIT_IN_SLICES))
        self._share: float | None = None
        self._parts: Mapping[str, float] = {}
        self._deployed = False
        self.places: dict[str, Place] = {}

    # --- deploying

    def deploy(self) -> None:
        """Bulkhead's first; the plain one is built from the same layers."""
        copied(self._copy)
        for stack in ("prod", "dev"):
            (self._copy / f"Pulumi.{stack}.yaml").unlink(missing_ok=True)
        port, plain_port = free_ports(2)
        backups = {"bulkhead:backup": {"targets": {"disk": {"path": str(self._copy.parent / "backups")}}}}
        _write(self._copy / "Pulumi.host.yaml", {"config": LEDGER | backups})
        settings = {"bulkhead:compose": list(SHOP), "bulkhead:variables": {"SHOP_PORT": str(port)}}
        _write(self._copy / f"Pulumi.{PROD}.yaml", {"config": settings})
        _write(self._copy / f"Pulumi.{DEV}.yaml", {"config": {"bulkhead:compose": list(PLAIN_FILES[PLAIN_DEV])}})
        self._deployed = True
        self._cli("up")
        self.places[BULKHEAD] = Place(self._services(PROD), url(port), self._dev(self._services(DEV), DEV))
        self.places[BULKHEAD].pause()
        self._compose(PLAIN_PROD, *self._up(), SHOP_PORT=str(plain_port))
        self._compose(PLAIN_DEV, *self._up())
        self.places[PLAIN] = Place(self._project(PLAIN_PROD), url(plain_port), self._dev(self._project(PLAIN_DEV)))

    def _cli(self, *words: str, **variables: str) -> None:
        ran([sys.executable, "-m", "cli", *words], self._copy, self._variables | variables, self._said)

    def _compose(self, project: str, *words: str, **variables: str) -> None:
        """Compose, with the files of one of the plain projects. With the builder whose layers Bulkhead's build left."""
        files = [word for file in PLAIN_FILES[project] for word in ("--file", file)]
        command = [*find_compose(), "--project-name", project, *files, *words]
        ran(command, self._copy, self._variables | {"DOCKER_BUILDKIT": self._buildkit} | variables, self._said)

    def _up(self) -> tuple[str, ...]:
        secrets = self._copy / "examples/shop/secrets"
        secrets.mkdir(exist_ok=True)
        for name in ("db_password", "cache_password"):
            (secrets / name).write_text(f"{name}-of-the-benchmark\n")
        return ("up", "--detach", "--build", "--wait", "--wait-timeout", "180")

    def _of(self, environment: str) -> list[Container]:
        found = self._engine.containers.list(filters={"label": f"{LABEL}={environment}"})
        return [one for one in found if FILES not in one.labels]

    def _services(self, environment: str) -> dict[str, Container]:
        return _by_service(self._of(environment))

    def _project(self, project: str) -> dict[str, Container]:
        found = self._engine.containers.list(filters={"label": f"{COMPOSE_PROJECT}={project}"})
        return _by_service(found)

    def _dev(self, containers: Mapping[str, Container], environment: str | None = None) -> Dev:
        """Dev's containers, and how it builds: by Bulkhead's own command, or by `docker build`."""
        context = self._copy / "bench" / "dev" / "build"
        command = ["docker", "build", "--force-rm", str(context)]
        if environment is not None:
            parent = containers["load"].attrs["HostConfig"]["CgroupParent"]
            args = ImageArgs(environment, Tier.BEST_EFFORT, "build", parent)
            command = build_command("interfere-built", args, Build(context=str(context)), parent)
        label = ["--no-cache", "--label", BUILT]
        by = ["env", f"DOCKER_BUILDKIT={self._buildkit}"]
        return Dev(
            {service: str(one.id) for service, one in containers.items()}, [*by, *command[:2], *label, *command[2:]]
        )

    # --- switching

    def enter(self, arm: Arm) -> Place:
        """Makes an arm the one that stands: its shop resumed and answering, the other paused, its limits set."""
        place = self.places[arm.place]
        for other in self.places.values():
            if other is not place or not arm.prod:
                other.pause()
        if arm.place == PLAIN and arm.share != self._share:
            self._limit(arm.share)
        if arm.prod:
            place.resume()
        return place

    def used(self) -> dict[str, float]:
        """CPU time in seconds that each of prod's containers has used, by plain Compose."""
        shop = self.places[PLAIN].shop
        stats = {name: self._engine.api.stats(str(one.id), stream=False, one_shot=True) for name, one in shop.items()}
        return {name: float(one["cpu_stats"]["cpu_usage"]["total_usage"]) / 1e9 for name, one in stats.items()}

    def partition(self, used: Mapping[str, float]) -> None:
        """How prod's part of a static partition is cut: by the CPU that each container `used` at capacity."""
        total = sum(used.values()) or 1.0
        self._parts = {name: amount / total for name, amount in used.items()}

    def _limit(self, share: float | None) -> None:
        """What `deploy.resources.limits` of the plain deployment comes to, without starting containers anew.

        Each of prod's services has a limit of CPUs, all together prod's share; dev has the rest, and of the memory
        too. Prod keeps the memory limits of its compose file in every arm.
        """
        plain = self.places[PLAIN]
        for name, container in plain.shop.items():
            cpus = None if share is None else max(LEAST_CPUS, share * self._cpus * self._parts[name])
            container.update(cpu_period=PERIOD, cpu_quota=-1 if cpus is None else int(cpus * PERIOD))
        for identity in plain.dev.containers.values():
            memory = int((1 - (share or 0.0)) * self._memory)  # the engine cannot lift a limit, but all is none
            quota = -1 if share is None else int((1 - share) * self._cpus * PERIOD)
            self._engine.containers.get(identity).update(
                cpu_period=PERIOD, cpu_quota=quota, mem_limit=memory, memswap_limit=memory
            )
        self._share = share

    # --- removing

    def _layers(self) -> set[str]:
        """The untagged images that Docker's first builder has left below ours: they stay when ours go."""
        found: set[str] = set()
        for image in labelled(self._engine, LABELS)["images"]:
            while parent := image.attrs["Parent"]:
                image = self._engine.images.get(parent)
                if image.tags:
                    break
                found.add(str(image.id))
        return found

    def _forget(self, layers: Collection[str]) -> None:
        for image in self._engine.images.list(filters={"dangling": True}):
            if image.id in layers:
                self._engine.images.remove(str(image.id))

    def remove(self) -> list[str]:
        """Takes both down as a user would; what is left then goes by its label. Returns what went wrong on the way."""
        steps: list[Callable[[], object]] = [place.resume for place in self.places.values()]
        if self._deployed:
            steps += [partial(self._compose, project, "down", "--volumes", "--rmi", "local") for project in PROJECTS]
            steps.append(partial(self._cli, "down", BULKHEAD_CONFIRM=PROD))
        steps.append(partial(removed, self._engine, ENVIRONMENTS, LABELS[len(ENVIRONMENTS) :]))
        steps.append(partial(self._engine.images.prune, filters={"label": BUILT, "dangling": True}))
        layers = self._layers()
        steps.append(partial(self._forget, layers))
        wrong = []
        for step in steps:
            try:
                step()
            except (BenchError, DockerException, RequestException, OSError) as error:
                wrong.append(str(error))
        return wrong


def _frozen(container: Container) -> None:
    """Pauses a container. The kernel may not manage at once to freeze what is starting a process."""
    for pause in (0.1, 0.2, 0.4, 0.8, 1.6):
        try:
            container.pause()
        except APIError:
            time.sleep(pause)
        else:
            return
    container.pause()


def there(engine: docker.DockerClient) -> list[str]:
    """What the benchmark would take for its own, or disturb, by name."""
    found = [getattr(one, "name", one.id) for kind in labelled(engine, LABELS).values() for one in kind]
    found += [str(group) for environment in ENVIRONMENTS for group in groups(environment)]
    return found + ([str(DECLARED)] if DECLARED.exists() else [])


def back(address: str) -> bool:
    """Waits until the shop answers quickly again. False if it does not."""
    deadline, quick = time.monotonic() + BACK_SECONDS, 0
    while quick < 5 and time.monotonic() < deadline:
        started = time.monotonic()
        try:
            with urllib.request.urlopen(f"{address}/products", timeout=1) as answer:  # noqa: S310 - http, loopback
                answer.read()
            quick = quick + 1 if time.monotonic() - started < QUICK else 0
        except OSError:
            quick = 0
            time.sleep(0.1)
    return quick == 5


def oom_kills(container: Container) -> int:
    """Processes of a container that were killed for memory since its start."""
    container.reload()
    listed = Path(f"/proc/{container.attrs['State']['Pid']}/cgroup").read_text().splitlines()
    paths = {controllers: path for _, controllers, path in (line.split(":", 2) for line in listed)}
    if "memory" in paths:
        file = Path(f"/sys/fs/cgroup/memory{paths['memory']}/memory.oom_control")
    else:
        file = Path(f"/sys/fs/cgroup{paths['']}/memory.events")
    counted = dict(line.split() for line in file.read_text().splitlines())
    return int(counted.get("oom_kill", 0))


def url(port: int) -> str:
    return f"http://127.0.0.1:{port}"


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on now."""
    with ExitStack() as opened:
        sockets = [opened.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        return [one.getsockname()[1] for one in sockets]


def need_room(folder: Path, size: int) -> None:
    """BenchError unless the engine's disk has so many bytes free: what dev writes, twice, and images."""
    free = shutil.disk_usage(folder).free
    if free < size:
        raise BenchError(f"{folder} has {free / 2**30:.1f} GiB free, and the benchmark needs {size / 2**30:.0f} GiB")


def _service(container: Container) -> str:
    labels = container.labels
    return str(labels.get("bulkhead.service") or labels["com.docker.compose.service"])


def _by_service(containers: Sequence[Container]) -> dict[str, Container]:
    """Containers by service; the second of one is `api-2`."""
    found: dict[str, Container] = {}
    seen: dict[str, int] = {}
    for one in sorted(containers, key=lambda each: str(each.name)):
        key = _service(one)
        seen[key] = seen.get(key, 0) + 1
        found[key if seen[key] == 1 else f"{key}-{seen[key]}"] = one
    return found


def _write(file: Path, document: Mapping[str, Any]) -> None:
    file.write_text(yaml.safe_dump(dict(document), sort_keys=False))
