"""Previews of the corpus: each case in a folder of its own beside one copy of the checkout, two at a time.
Nothing is deployed: the host stack's outputs are imported into an empty state, and images are tags of one that is
there."""

import json
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import docker
import yaml
from docker.utils import parse_repository_tag

from cli import verdicts
from cli.previews import AT_A_TIME
from cli.pulumi import Pulumi, environment, prepare
from cli.verdicts import Told
from settings.ledger import Ledger, LedgerSettings, slice_name
from settings.state import state_folder
from stacks.host import budget
from tests.deployed import copied, isolated
from tests.e2e.corpus.cases import DEV, HOST, PROD, STACKS, Case

STANDS_IN = "debian:bookworm-slim"
"""The image that is tagged with the names of all others: previews only ask whether an image is there."""

LEDGER: Mapping[str, Any] = {
    "bulkhead:capacity": {"cpus": 8, "memory": "16GiB", "disk": "200GiB"},
    "bulkhead:system": {"cpus": "5%", "memory": "10%"},
    "bulkhead:environments": {
        PROD: {"tier": "protected", "subnet": "10.86.0.0/16", "reservations": {"cpus": "60%", "memory": "50%"}},
        DEV: {
            "tier": "best-effort",
            "subnet": "10.87.0.0/16",
            "limits": {"cpus": "100%", "memory": "25%", "pids": 2048},
        },
    },
}

OWN_FILES = ("stacks", "Pulumi.yaml", "__main__.py")
"""What a case's folder has of its own; everything else of the checkout is a link."""


class Seen(NamedTuple):
    """What a preview came to: the CLI's exit code and text, and what the pack recorded."""

    code: int
    text: str
    told: Told


class Corpus:
    """A copy of the checkout with a state in which the host is deployed, and the folders of the cases."""

    def __init__(self, folder: Path) -> None:
        self._project, self._cases, state = folder / "project", folder / "cases", folder / "state"
        copied(self._project)
        for file in self._project.glob("Pulumi.*.yaml"):
            file.unlink()
        self._ledger(self._project, {})
        self._variables = environment(isolated(state), self._project, Path.home())
        prepare(self._variables, state_folder(isolated(state), Path.home()))
        pulumi = Pulumi(self._project, self._variables)
        for stack in STACKS.values():
            pulumi.create(stack)
        self._deploy_host(pulumi, folder / "host.json")

    def _deploy_host(self, pulumi: Pulumi, file: Path) -> None:
        """Imports a host stack that is nothing but its outputs."""
        document = json.loads(pulumi.capture("stack", "export", "--stack", HOST).output)
        kind = "pulumi:pulumi:Stack"
        ledger = LedgerSettings.read(self._project / "Pulumi.host.yaml").resolve({})
        document["deployment"]["resources"] = [
            {"urn": f"urn:pulumi:{HOST}::bulkhead::{kind}::bulkhead-{HOST}", "type": kind, "outputs": outputs(ledger)}
        ]
        file.write_text(json.dumps(document))
        done = pulumi.capture("stack", "import", "--stack", HOST, "--file", str(file))
        assert done.code == 0, done.output

    def preview(self, case: Case) -> Seen:
        """The case's folder, previewed with the pack and removed again."""
        folder = self._cases / case.name.replace("/", "-")
        self._write(folder, case)
        said = folder / "verdicts.jsonl"
        variables = {
            **self._variables,
            "BULKHEAD_LEDGER": str(folder / "Pulumi.host.yaml"),
            # The pack would import its rules from the checkout that the Python environment was made for.
            "PYTHONPATH": str(self._project),
            verdicts.VARIABLE: str(said),
        }
        ran = Pulumi(folder, variables).capture(
            *("preview", "--stack", case.stack, "--policy-pack", str(folder / "policies")),
            *("--non-interactive", "--color", "never"),
        )
        told = verdicts.read(said, case.stack)
        shutil.rmtree(folder)
        return Seen(ran.code, ran.plain, told)

    def _write(self, folder: Path, case: Case) -> None:
        folder.mkdir(parents=True)
        for path in self._project.iterdir():
            if path.name not in OWN_FILES and not path.name.startswith("Pulumi."):
                (folder / path.name).symlink_to(path)
        for name in OWN_FILES:
            copy = shutil.copytree if (self._project / name).is_dir() else shutil.copy2
            copy(self._project / name, folder / name)
        if case.program:
            (folder / "stacks" / f"{case.stack.replace('-', '_')}.py").write_text(case.program)
        for context in filter(None, ("app", case.also)):
            (folder / context).mkdir(parents=True)
            (folder / context / "Dockerfile").write_text(f"FROM {STANDS_IN}\n")
        self._ledger(folder, case.ledger)
        files = {"compose.yaml": case.compose, "change.yaml": case.change}
        written = {name: text for name, text in files.items() if text}
        for name, text in written.items():
            (folder / name).write_text(text)
        if case.stack != HOST:
            config = {"config": {"bulkhead:compose": list(written)}}
            (folder / f"Pulumi.{case.stack}.yaml").write_text(yaml.safe_dump(config))

    def _ledger(self, folder: Path, change: Mapping[str, Any]) -> None:
        text = yaml.safe_dump({"config": merged(LEDGER, change)}, sort_keys=False)
        (folder / "Pulumi.host.yaml").write_text(text)


def merged(base: Mapping[str, Any], change: Mapping[str, Any]) -> dict[str, Any]:
    """`base` with the keys of `change`, at every depth; null removes a key."""
    found = dict(base)
    for key, value in change.items():
        inner = found.get(key)
        found[key] = merged(inner, value) if isinstance(inner, Mapping) and isinstance(value, Mapping) else value
    return {key: value for key, value in found.items() if value is not None}


def outputs(ledger: Ledger) -> dict[str, Any]:
    """What the host stack would have put out for this ledger."""
    return {
        "capacity": ledger.capacity.model_dump(),
        "system": budget(ledger.system),
        "engine": {"version": "20.10.24", "cgroup_driver": "cgroupfs", "cgroup_version": 1},
        "environments": {
            name: {
                "tier": str(one.tier),
                "subnet": str(one.subnet),
                "cgroup_parent": slice_name(name, "cgroupfs"),
                "budget": {"reservations": budget(one.reservations), "limits": budget(one.limits)},
            }
            for name, one in ledger.environments.items()
        },
    }


@contextmanager
def tagged(images: Iterable[str]) -> Iterator[None]:
    """The images are there, as names of `STANDS_IN` that are gone afterwards. Others' images stay as they are."""
    with closing(docker.from_env()) as engine:
        base = engine.images.get(STANDS_IN)
        there = {tag for image in engine.images.list() for tag in image.tags}
        # As the engine spells them: without Docker Hub's own prefixes.
        names = {re.sub(r"^docker\.io/(?:library/)?", "", image) for image in images}
        assert all(parse_repository_tag(name)[1] for name in names), "a name without a tag"
        try:
            for name in sorted(names - there):
                assert base.tag(*parse_repository_tag(name))
            yield
        finally:
            kept = engine.images.get(str(base.id))
            for name in sorted(names & set(kept.tags) - {STANDS_IN}):
                engine.images.remove(name, noprune=True)


@contextmanager
def started(corpus: Corpus, chosen: Iterable[Case]) -> Iterator[dict[str, Future[Seen]]]:
    """The previews of the chosen cases, under way; what has not begun when the block ends never does."""
    with ThreadPoolExecutor(AT_A_TIME) as pool:
        try:
            yield {case.name: pool.submit(corpus.preview, case) for case in chosen}
        finally:
            pool.shutdown(cancel_futures=True)
