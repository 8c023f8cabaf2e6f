"""The commands: which variables Pulumi gets, the order of stacks, what stops a deploy, what a destroy asks.
Pulumi is played by a recorder that answers as its CLI does."""

import errno
import io
import json
import os
import shutil
import stat
import subprocess
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from cli import agent, deploy, onhost, order, plan, previews, pulumi, recover
from cli.agent import Agent
from cli.order import Stacks
from cli.previews import Outcome
from cli.pulumi import Pulumi, PulumiError, Result
from settings import host
from settings.errors import SettingsError
from settings.ledger import LedgerSettings, Tier

GIB = 2**30

# The variables for the CLI.


@pytest.fixture
def root(tmp_path: Path) -> Path:
    folder = tmp_path / "checkout"
    folder.mkdir()
    (folder / "Pulumi.yaml").write_text("name: bulkhead\n")
    return folder


def login(folder: Path, current: str | None) -> None:
    folder.mkdir(parents=True)
    (folder / "credentials.json").write_text(json.dumps({"current": current}))


def variables(root: Path, **base: str) -> dict[str, str]:
    return pulumi.environment(base, root, root.parent / "home")


def test_without_any_choice_state_and_passphrase_are_in_the_state_folder(root: Path) -> None:
    wanted = variables(root, PATH="/bin")
    state = root.parent / "home" / ".local" / "state" / "bulkhead"
    assert wanted["PULUMI_BACKEND_URL"] == f"file://{state}/pulumi"
    assert wanted["PULUMI_CONFIG_PASSPHRASE_FILE"] == f"{state}/passphrase"
    assert wanted["PULUMI_HOME"] == f"{root}/.bulkhead/pulumi"
    assert wanted["PATH"] == f"{root}/.bulkhead/pulumi/bin:{root}/.venv/bin:/bin"
    assert wanted["PULUMI_SKIP_UPDATE_CHECK"] == "true"
    assert wanted["BULKHEAD_LEDGER"] == f"{root}/Pulumi.host.yaml"


def test_the_state_folder_follows_xdg(root: Path) -> None:
    assert variables(root, XDG_STATE_HOME="/s")["PULUMI_BACKEND_URL"] == "file:///s/bulkhead/pulumi"


def test_a_login_elsewhere_is_kept(root: Path) -> None:
    login(root.parent / "home" / ".pulumi", "s3://states")
    wanted = variables(root)
    assert "PULUMI_BACKEND_URL" not in wanted
    assert "PULUMI_CONFIG_PASSPHRASE_FILE" not in wanted
    assert wanted["PULUMI_CREDENTIALS_PATH"] == f"{root.parent}/home/.pulumi"


def test_a_login_under_the_user_s_own_pulumi_home_is_kept(root: Path) -> None:
    login(root.parent / "mine", "https://api.pulumi.com")
    wanted = variables(root, PULUMI_HOME=f"{root.parent}/mine")
    assert "PULUMI_BACKEND_URL" not in wanted
    assert wanted["PULUMI_CREDENTIALS_PATH"] == f"{root.parent}/mine"


@pytest.mark.parametrize("content", ['{"current": ""}', '{"current": null}', "[]", "broken"])
def test_a_logged_out_or_unreadable_login_is_none(root: Path, content: str) -> None:
    folder = root.parent / "home" / ".pulumi"
    folder.mkdir(parents=True)
    (folder / "credentials.json").write_text(content)
    assert variables(root)["PULUMI_BACKEND_URL"].startswith("file://")


def test_a_backend_that_the_user_sets_is_kept_even_if_logged_in(root: Path) -> None:
    login(root.parent / "home" / ".pulumi", "https://api.pulumi.com")
    wanted = variables(root, PULUMI_BACKEND_URL="file:///mine")
    assert wanted["PULUMI_BACKEND_URL"] == "file:///mine"
    assert wanted["PULUMI_CONFIG_PASSPHRASE_FILE"].endswith("/passphrase")


def test_a_shared_backend_gets_no_passphrase_of_this_machine(root: Path) -> None:
    assert "PULUMI_CONFIG_PASSPHRASE_FILE" not in variables(root, PULUMI_BACKEND_URL="s3://states")


def test_an_access_token_means_pulumi_s_own_service(root: Path) -> None:
    wanted = variables(root, PULUMI_ACCESS_TOKEN="pul-1")
    assert not {"PULUMI_BACKEND_URL", "PULUMI_CONFIG_PASSPHRASE_FILE"} & wanted.keys()


def test_the_backend_of_the_project_file_is_kept(root: Path) -> None:
    (root / "Pulumi.yaml").write_text("name: bulkhead\nbackend: {url: 'gs://states'}\n")
    assert not {"PULUMI_BACKEND_URL", "PULUMI_CONFIG_PASSPHRASE_FILE"} & variables(root).keys()


@pytest.mark.parametrize("name", ["PULUMI_CONFIG_PASSPHRASE", "PULUMI_CONFIG_PASSPHRASE_FILE"])
@pytest.mark.parametrize("value", ["mine", ""])
def test_a_passphrase_that_the_user_sets_is_kept_even_if_empty(root: Path, name: str, value: str) -> None:
    wanted = variables(root, **{name: value})
    chosen = {key: held for key, held in wanted.items() if key.startswith("PULUMI_CONFIG_PASSPHRASE")}
    assert chosen == {name: value}


# State and passphrase.


def test_the_passphrase_is_private_random_and_kept(root: Path) -> None:
    state = root.parent / "state"
    wanted = variables(root, XDG_STATE_HOME=str(state))
    pulumi.prepare(wanted, state / "bulkhead")
    file = state / "bulkhead" / "passphrase"
    first = file.read_text()
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert stat.S_IMODE(file.parent.stat().st_mode) == 0o700
    assert len(first) >= 43
    pulumi.prepare(wanted, state / "bulkhead")
    assert file.read_text() == first
    assert sorted(path.name for path in file.parent.iterdir()) == ["passphrase", "pulumi"]


def test_a_passphrase_that_another_run_wrote_first_counts(tmp_path: Path) -> None:
    (tmp_path / "passphrase").write_text("theirs")
    pulumi.write_passphrase(tmp_path / "passphrase")
    assert (tmp_path / "passphrase").read_text() == "theirs"
    assert [path.name for path in tmp_path.iterdir()] == ["passphrase"]


def test_a_lost_passphrase_is_not_replaced_while_stacks_need_it(root: Path) -> None:
    state = root.parent / "state"
    wanted = variables(root, XDG_STATE_HOME=str(state))
    pulumi.prepare(wanted, state / "bulkhead")
    stacks = state / "bulkhead" / "pulumi" / ".pulumi" / "stacks" / "bulkhead"
    stacks.mkdir(parents=True)
    (stacks / "prod.json").write_text("{}")
    (state / "bulkhead" / "passphrase").unlink()
    with pytest.raises(PulumiError, match="restore the file"):
        pulumi.prepare(wanted, state / "bulkhead")


def test_a_full_disk_for_the_state_is_said_before_anything_starts(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(root)._replace(free=2**20)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    wanted = variables(root, XDG_STATE_HOME=str(root.parent / "state"))
    with pytest.raises(PulumiError, match=r"disk is full.*XDG_STATE_HOME"):
        pulumi.prepare(wanted, root.parent / "state" / "bulkhead")
    assert not (root.parent / "state").exists()


def test_a_disk_that_fills_up_while_the_passphrase_is_written_leaves_no_half_file(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    state = root.parent / "state" / "bulkhead"
    with pytest.raises(PulumiError, match="disk is full"):
        pulumi.prepare(variables(root, XDG_STATE_HOME=str(state.parent)), state)
    assert [path.name for path in state.iterdir()] == ["pulumi"]


def test_a_state_folder_that_cannot_be_written_is_explained(root: Path) -> None:
    (root.parent / "state").write_text("a file in the way")
    with pytest.raises(PulumiError, match="cannot be written"):
        pulumi.prepare(variables(root, XDG_STATE_HOME=str(root.parent / "state")), root.parent / "state" / "bulkhead")


# The real class, with a stand-in program.


def stand_in(root: Path, script: str) -> Pulumi:
    program = root / ".bulkhead" / "pulumi" / "bin" / "pulumi"
    program.parent.mkdir(parents=True)
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    return Pulumi(root, variables(root, PATH=os.environ["PATH"]))


def test_stacks_are_listed_with_their_resources(root: Path) -> None:
    listed = '[{"name": "host", "resourceCount": 3}, {"name": "dev"}]'
    assert stand_in(root, f"echo '{listed}'").stacks() == {"host": 3, "dev": 0}


def test_output_and_exit_code_are_captured_and_the_checkout_is_named(root: Path) -> None:
    result = stand_in(root, 'echo "$@"; echo wrong >&2; exit 3').capture("preview")
    assert result == (3, f"--cwd {root} preview\nwrong\n")


def test_a_run_can_have_variables_of_its_own(root: Path) -> None:
    found = stand_in(root, 'echo "$BULKHEAD_VERDICTS$PULUMI_SKIP_UPDATE_CHECK"')
    assert found.capture("preview", variables={"BULKHEAD_VERDICTS": "/v "}).output == "/v true\n"
    assert found.capture("preview").output == "true\n"


def test_what_pulumi_says_of_a_full_disk_gets_the_next_step(root: Path) -> None:
    result = stand_in(root, "echo 'write prod.json: no space left on device'; exit 255").capture("up")
    assert "free some space" in result.output


def test_pulumi_that_is_not_installed_names_set_up(root: Path) -> None:
    with pytest.raises(PulumiError, match="make setup"):
        Pulumi(root, {"PATH": str(root)}).run("version")


def test_a_failing_query_raises_what_pulumi_says(root: Path) -> None:
    with pytest.raises(PulumiError, match="no stack named"):
        stand_in(root, "echo 'error: no stack named x' >&2; exit 255").resources("x")


# The order of stacks.

LEDGER = """\
config:
  bulkhead:environments:
    dev: {tier: best-effort, subnet: 10.82.0.0/16, limits: {memory: 30%}}
    prod: {tier: protected, subnet: 10.81.0.0/16, reservations: {cpus: 60%, memory: 50%}}
    staging: {tier: best-effort, subnet: 10.83.0.0/16, limits: {memory: 5%}}
"""


@pytest.fixture
def checkout(root: Path) -> Path:
    (root / "Pulumi.host.yaml").write_text(LEDGER)
    for name in ("dev", "prod"):
        (root / f"Pulumi.{name}.yaml").write_text("config: {}\n")
    return root


def test_host_is_first_and_protected_before_best_effort(checkout: Path) -> None:
    stacks = order.read(checkout)
    assert stacks.names == ("host", "prod", "dev")
    assert stacks.without_file == ("staging",)


def test_chosen_stacks_keep_the_deploy_order(checkout: Path) -> None:
    assert order.read(checkout, ["dev", "prod"]).names == ("prod", "dev")


def test_an_unknown_environment_is_an_error_with_a_suggestion(checkout: Path) -> None:
    with pytest.raises(SettingsError, match="Did you mean 'prod'"):
        order.read(checkout, ["prd"])


def test_a_chosen_environment_without_its_file_is_an_error(checkout: Path) -> None:
    with pytest.raises(SettingsError, match=r"Pulumi\.staging\.yaml"):
        order.read(checkout, ["staging"])


# What a preview says.

NO_CHANGES = "Resources:\n    12 unchanged\n"
CHANGES = (
    "Resources:\n    + 2 to create\n    ~ 1 to update\n    +-1 to replace\n    4 changes. 9 unchanged\n\n"
    "error: no changes were expected for preview but changes were proposed\n"
)
CHANGED = "2 to create, 1 to update, 1 to replace"
VIOLATION = (
    "Policies:\n    x bulkhead@v0.1.0 (local: policies)\n        - [mandatory]  prod-no-quota  (docker: web)\n"
    "          remove cpus\n\nResources:\n    + 2 to create\n"
)


def test_advice_on_a_stack_without_changes_is_shown(console: Console) -> None:
    advice = VIOLATION.partition("Resources")[0].replace("mandatory", "advisory")
    found = previews.classify("prod", Result(0, f"{advice}{NO_CHANGES}"))
    assert found.outcome is Outcome.UNCHANGED
    previews.unchanged(found, console)
    assert "prod: no changes" in shown(console)
    assert "[advisory]  prod-no-quota  (docker: web)\n          remove cpus" in shown(console)
    assert not previews.classify("prod", Result(0, NO_CHANGES)).advice


@pytest.mark.parametrize(
    ("code", "output", "outcome", "changes", "violations"),
    [
        (0, NO_CHANGES, Outcome.UNCHANGED, "", 0),
        (255, CHANGES, Outcome.CHANGED, CHANGED, 0),
        (255, VIOLATION, Outcome.FAILED, "2 to create", 1),
        (255, VIOLATION + CHANGES, Outcome.FAILED, "2 to create, 2 to create, 1 to update, 1 to replace", 1),
        (255, "error: broken", Outcome.FAILED, "", 0),
        (0, 'Outputs:\n  ~ endpoints: "a" => "b"\n\nResources:\n    12 unchanged\n', Outcome.CHANGED, "outputs", 0),
        (0, 'Outputs:\n    endpoints: "a"\n\nResources:\n    12 unchanged\n', Outcome.UNCHANGED, "", 0),
        (255, CHANGES.replace("+ 2", "\x1b[1m+\x1b[0m 2"), Outcome.CHANGED, CHANGED, 0),
    ],
)  # fmt: skip
def test_previews_are_told_apart(code: int, output: str, outcome: Outcome, changes: str, violations: int) -> None:
    preview = previews.classify("prod", Result(code, output))
    assert (preview.outcome, preview.changes, preview.violations) == (outcome, changes, violations)


def test_a_locked_stack_gets_the_command_that_unlocks_it() -> None:
    preview = previews.classify("prod", Result(255, "error: the stack is currently locked by 1 lock(s)"))
    assert "make pulumi ARGS='cancel --yes --stack NAME'" in preview.output


# up, preview and down.


class Recorder(Pulumi):
    """Answers previews from `says` (the last answer of a stack stays), and records what is run."""

    def __init__(self, deployed: Mapping[str, int], says: Mapping[str, Sequence[Result]], fails: str = "") -> None:
        super().__init__(Path("/checkout"), {})
        self.deployed, self.fails = deployed, fails
        self.says = {stack: list(answers) for stack, answers in says.items()}
        self.ran: list[str] = []
        self.created: list[str] = []
        self.previewed: list[str] = []
        self.state: Mapping[str, list[dict[str, Any]]] = {}

    def stacks(self) -> dict[str, int]:
        return dict(self.deployed)

    def create(self, stack: str) -> None:
        assert stack not in self.deployed
        self.created.append(stack)

    def run(self, *arguments: str) -> int:
        stack = arguments[arguments.index("--stack") + 1]
        self.ran.append(f"{arguments[0]} {stack}")
        self.arguments = arguments
        return int(stack == self.fails)

    def capture(self, *arguments: str, variables: Mapping[str, str] = {}) -> Result:  # noqa: ARG002
        stack = arguments[2]
        self.previewed.append(stack)
        self.arguments = arguments
        answers = self.says[stack]
        return answers.pop(0) if len(answers) > 1 else answers[0]

    def resources(self, stack: str) -> list[dict[str, Any]]:
        return self.state.get(stack, [])

    def outputs(self, stack: str) -> dict[str, Any]:
        return {"environment": stack}

    def secret(self, stack: str, output: str) -> Any:
        return {"password": f"key of {stack}", "jobs": {"data": {}}} if (stack, output) in self.secrets else None

    secrets: Collection[tuple[str, str]] = ()


class Host(Agent):
    """The agent of a host that is not there: it records what it is told, and its proof comes out as told."""

    def __init__(self, declared: Sequence[str] = (), proof: int = 0) -> None:
        super().__init__(None)
        self.known, self.proof = set(declared), proof
        self.told: list[str] = []
        self.jobs: dict[str, tuple[Mapping[str, Any] | None, bool]] = {}
        self.saved: list[tuple[str, str, bytes]] = []

    def declared(self) -> frozenset[str]:
        return frozenset(self.known)

    def declare(self, stack: str, outputs: Mapping[str, Any]) -> None:
        self.known.add(stack)
        self.told.append(f"declare {stack}: {outputs}")

    def entrust(self, stack: str, jobs: Mapping[str, Any] | None, *, held: bool = False) -> None:
        self.jobs[stack] = (jobs, held)

    def store(self, environment: str, name: str, data: bytes) -> str:
        self.saved.append((environment, name, data))
        return "saved"

    def forget(self, stack: str) -> None:
        self.told.append(f"forget {stack}")

    @contextmanager
    def deploying(self, stacks: Sequence[str]) -> Iterator[None]:
        self.told.append(f"deploying {' '.join(stacks)}")
        try:
            yield
        finally:
            self.told.append("deployed")

    def run(self, verb: str, *options: str) -> tuple[int, dict[str, Any]]:
        self.told.append(" ".join([verb, *options]))
        proof = {"source": "dev-web", "path": "host, TCP", "target": "10.81.0.1", "expected": "blocked", "ok": False}
        proofs = [proof | {"observed": "connected"}] * self.proof
        return self.proof, {"paths": 3, "unexpected": self.proof, "proofs": proofs}


def up(pulumi: Pulumi, stacks: Stacks, pack: Sequence[str], console: Console) -> int:
    return deploy.up(pulumi, stacks, pack, Host(), console)


TIERS = {"prod": Tier.PROTECTED, "dev": Tier.BEST_EFFORT}
ALL = Stacks(("host", "prod", "dev"), TIERS)
SAME, OTHER, BAD = Result(0, NO_CHANGES), Result(255, CHANGES), Result(255, VIOLATION)
DEPLOYED = {"host": 5, "prod": 9, "dev": 9}
PACK = ("--policy-pack", "pack")


@pytest.fixture
def console() -> Console:
    return Console(file=io.StringIO(), width=160)


def shown(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_up_with_nothing_to_change_runs_no_deploy(console: Console) -> None:
    recorder = Recorder(DEPLOYED, {"host": [SAME], "prod": [SAME], "dev": [SAME]})
    assert deploy.up(recorder, ALL, PACK, Host(), console) == 0
    assert recorder.ran == []
    assert sorted(recorder.previewed) == ["dev", "host", "prod"]


def test_up_deploys_only_what_differs(console: Console) -> None:
    recorder = Recorder(DEPLOYED, {"host": [SAME], "prod": [SAME], "dev": [OTHER]})
    assert deploy.up(recorder, ALL, PACK, Host(), console) == 0
    assert recorder.ran == ["up dev"]
    assert recorder.arguments[-2:] == PACK


def test_the_first_up_deploys_host_then_protected_then_the_rest(console: Console) -> None:
    recorder = Recorder({}, {})
    assert deploy.up(recorder, ALL, PACK, Host(), console) == 0
    assert recorder.ran == ["up host", "up prod", "up dev"]
    assert recorder.created == ["host", "prod", "dev"]


def test_a_changed_host_makes_the_environments_looked_at_again(console: Console) -> None:
    broken = Result(255, "error: the host stack promises nothing")
    recorder = Recorder(DEPLOYED, {"host": [OTHER], "prod": [SAME, OTHER], "dev": [broken, SAME]})
    assert deploy.up(recorder, ALL, PACK, Host(), console) == 0
    assert recorder.ran == ["up host", "up prod"]


def test_a_violation_stops_a_change_of_host_too(console: Console) -> None:
    recorder = Recorder(DEPLOYED, {"host": [OTHER], "prod": [SAME], "dev": [BAD]})
    assert deploy.up(recorder, ALL, PACK, Host(), console) == 1
    assert recorder.ran == []
    assert "nothing was changed" in shown(console)


def test_a_change_of_host_is_not_applied_by_the_way(console: Console) -> None:
    recorder = Recorder(DEPLOYED, {"host": [OTHER], "dev": [OTHER]})
    assert deploy.up(recorder, Stacks(("dev",), TIERS), PACK, Host(), console) == 1
    assert recorder.ran == []
    assert "make up ENV=host" in shown(console)


CONTAINER = {"type": deploy.CONTAINER, "urn": "urn::c", "custom": True, "id": "c"}
KEPT = {"type": deploy.VOLUME, "urn": "urn::v", "custom": True, "id": "v", "protect": True}


@pytest.mark.parametrize("command", [up, deploy.preview])
def test_a_deployed_environment_cannot_vanish_from_the_ledger(command: Any, console: Console) -> None:
    recorder = Recorder({**DEPLOYED, "gone": 3}, {name: [SAME] for name in ("host", "prod", "dev")})
    recorder.state = {"gone": [CONTAINER]}
    with pytest.raises(PulumiError, match=r"gone is deployed with 1 containers.*make down ENV=gone"):
        command(recorder, ALL, PACK, console)
    assert recorder.ran == []


@pytest.mark.parametrize("command", [up, deploy.preview])
def test_a_protected_environment_cannot_lose_its_tier_by_an_edit(command: Any, console: Console) -> None:
    recorder = Recorder(DEPLOYED, {name: [SAME] for name in ("host", "prod", "dev")})
    recorder.state = {"dev": [KEPT]}
    with pytest.raises(PulumiError, match=r"dev was deployed as protected.*BULKHEAD_CONFIRM=dev"):
        command(recorder, ALL, PACK, console)
    recorder.variables = {"BULKHEAD_CONFIRM": "dev"}
    assert command(recorder, ALL, PACK, console) == 0


def test_down_asks_for_the_name_of_what_was_deployed_as_protected(console: Console) -> None:
    recorder = Recorder(DEPLOYED, {})
    recorder.state = {"dev": [KEPT]}
    with pytest.raises(PulumiError, match=r"dev is protected.*BULKHEAD_CONFIRM=dev"):
        deploy.down(recorder, Stacks(("dev",), TIERS), {}, None, Host(), console)


def test_what_was_deployed_can_be_destroyed_whatever_the_checkout_has_of_it(checkout: Path) -> None:
    assert order.read(checkout, ["gone"], deployed=["gone"]).names == ("gone",)


def test_a_violation_in_one_environment_stops_all_before_anything_is_applied(console: Console) -> None:
    recorder = Recorder(DEPLOYED, {"host": [SAME], "prod": [OTHER], "dev": [BAD]})
    assert deploy.up(recorder, ALL, PACK, Host(), console) == 1
    assert recorder.ran == []
    assert "remove cpus" in shown(console)
    assert "nothing was changed" in shown(console)


def test_a_failing_host_stops_everything(console: Console) -> None:
    recorder = Recorder(DEPLOYED, {"host": [BAD], "prod": [SAME], "dev": [SAME]})
    assert deploy.up(recorder, ALL, PACK, Host(), console) == 1
    assert recorder.ran == []


def test_a_deploy_that_fails_stops_and_names_what_was_not_touched(console: Console) -> None:
    recorder = Recorder({}, {}, fails="prod")
    assert deploy.up(recorder, ALL, PACK, Host(), console) == 1
    assert recorder.ran == ["up host", "up prod"]
    assert "not touched: dev" in shown(console)


def test_up_of_one_environment_looks_at_host_too(console: Console) -> None:
    recorder = Recorder(DEPLOYED, {"host": [SAME], "dev": [OTHER]})
    assert deploy.up(recorder, Stacks(("dev",), TIERS), PACK, Host(), console) == 0
    assert recorder.ran == ["up dev"]


def test_the_host_is_told_what_was_deployed_and_the_proof_comes_last(console: Console) -> None:
    recorder = Recorder(DEPLOYED, {"host": [SAME], "prod": [SAME], "dev": [OTHER]})
    host = Host(declared=["prod", "dev"])
    assert deploy.up(recorder, ALL, PACK, host, console) == 0
    assert host.told[0] == "deploying host prod dev"
    assert host.told[-3:] == ["declare dev: {'environment': 'dev'}", "deployed", "prove"]


def test_the_host_is_told_also_without_a_change_since_a_plain_pulumi_up_tells_it_nothing(console: Console) -> None:
    host = Host(declared=["dev"])
    assert deploy.up(Recorder(DEPLOYED, {name: [SAME] for name in DEPLOYED}), ALL, PACK, host, console) == 0
    assert [line for line in host.told if line.startswith("declare")] == [
        "declare prod: {'environment': 'prod'}",
        "declare dev: {'environment': 'dev'}",
    ]


def test_the_host_is_told_the_backups_of_what_was_deployed(console: Console) -> None:
    recorder = Recorder(DEPLOYED, {"host": [SAME], "prod": [SAME], "dev": [OTHER]})
    recorder.secrets = {("prod", "backup_jobs")}
    host = Host()
    assert deploy.up(recorder, ALL, PACK, host, console) == 0
    jobs = {"password": "key of prod", "jobs": {"data": {}}}
    assert host.jobs == {"prod": (jobs, False), "dev": (None, False)}
    assert deploy.up(recorder, ALL, PACK, host, console, held=True) == 0
    assert host.jobs["prod"] == (jobs, True)


ONLY_PROD = """
config:
  bulkhead:capacity: {cpus: 4, memory: 8GiB, disk: 100GiB}
  bulkhead:environments:
    prod: {tier: protected, subnet: 10.81.0.0/16, reservations: {cpus: 2, memory: 4GiB}}
"""
WITH_MASK = """
services: {db: {image: postgres, volumes: [data:/data]}}
volumes: {data: {x-bulkhead: {refresh: {environment: prod, mask: mask.sql}}}}
"""


def with_state(tmp_path: Path, *secrets: tuple[str, str]) -> Recorder:
    """A deployment whose state is in a folder."""
    recorder = Recorder(DEPLOYED, {})
    recorder.secrets = secrets
    backend = tmp_path / "state/pulumi"
    (backend / ".pulumi/stacks/bulkhead").mkdir(parents=True)
    (backend / ".pulumi/stacks/bulkhead/prod.json").write_text("{}")
    (tmp_path / "state/passphrase").write_text("secret")
    (tmp_path / "checkout").mkdir()
    (tmp_path / "checkout/Pulumi.prod.yaml").write_text("config: {bulkhead:compose: [shop/compose.yaml]}\n")
    (tmp_path / "checkout/Pulumi.host.yaml").write_text(ONLY_PROD)
    (tmp_path / "checkout/shop").mkdir()
    (tmp_path / "checkout/shop/compose.yaml").write_text(WITH_MASK)
    (tmp_path / "checkout/shop/mask.sql").write_text("delete from people")
    recorder.root = tmp_path / "checkout"
    recorder.variables = {
        "PULUMI_BACKEND_URL": f"file://{backend}",
        "PULUMI_CONFIG_PASSPHRASE_FILE": str(tmp_path / "state/passphrase"),
    }
    return recorder


def test_settings_and_state_go_with_prods_backups_and_the_recovery_key_is_shown_once(
    tmp_path: Path, console: Console
) -> None:
    recorder, host = with_state(tmp_path, ("prod", "backup_jobs"), ("dev", "backup_jobs")), Host()
    recover.store(recorder, host, ALL, console)
    assert "key of prod" in shown(console)
    assert [(where, name) for where, name, _ in host.saved] == [("prod", "deployer")]
    only_dev = Host()
    recover.store(recorder, only_dev, ALL._replace(names=("host", "dev")), Console(file=io.StringIO()))
    assert [where for where, _, _ in only_dev.saved] == ["prod"]
    again = Console(file=io.StringIO(), width=200)
    recover.store(recorder, host, ALL, again)
    assert "key of" not in shown(again)
    assert len(host.saved) == 2

    root, backend = tmp_path / "new", tmp_path / "fresh/pulumi"
    root.mkdir()
    (root / "Pulumi.prod.yaml").write_text("the one that was here")
    recover.unpacked(host.saved[0][2], root, backend, {})
    assert (root / "Pulumi.prod.yaml").read_text() == "config: {bulkhead:compose: [shop/compose.yaml]}\n"
    assert (root / "shop/compose.yaml").read_text() == WITH_MASK
    assert (root / "shop/mask.sql").read_text() == "delete from people"
    assert (root / "Pulumi.prod.yaml.before-recover").read_text() == "the one that was here"
    recover.unpacked(host.saved[0][2], root, backend, {})  # what is the same stays as it is
    assert (root / "Pulumi.prod.yaml.before-recover").read_text() == "the one that was here"
    assert (backend / ".pulumi/stacks/bulkhead/prod.json").read_text() == "{}"
    passphrase = tmp_path / "fresh/passphrase"
    assert passphrase.read_text() == "secret"
    assert passphrase.stat().st_mode & 0o777 == 0o600


def test_without_a_backup_of_prod_there_is_no_place_for_the_state(tmp_path: Path, console: Console) -> None:
    host = Host()
    recover.store(with_state(tmp_path, ("dev", "backup_jobs")), host, ALL, console)
    assert host.saved == []


def test_a_host_without_environments_comes_up_and_has_nothing_to_prove(console: Console) -> None:
    host = Host()
    assert deploy.up(Recorder({}, {}), Stacks(("host",), TIERS), PACK, host, console) == 0
    assert "prove" not in host.told
    assert "no environment is deployed yet" in shown(console)


def test_after_a_deploy_that_failed_the_host_knows_what_came_before_it_and_nothing_is_proved(console: Console) -> None:
    host = Host()
    assert deploy.up(Recorder({}, {}, fails="dev"), ALL, PACK, host, console) == 1
    assert host.told == ["deploying host prod dev", "declare prod: {'environment': 'prod'}", "deployed"]


def test_a_proof_that_fails_fails_the_deploy_and_shows_the_path(console: Console) -> None:
    recorder = Recorder(DEPLOYED, {name: [SAME] for name in DEPLOYED})
    assert deploy.up(recorder, ALL, PACK, Host(proof=1), console) == 1
    assert "host, TCP" in shown(console)
    assert "1 unexpected" in shown(console)


def test_the_host_forgets_what_was_destroyed_and_its_own_agent_goes_with_it(console: Console) -> None:
    host = Host()
    assert deploy.down(Recorder(DEPLOYED, {}), ALL, {"BULKHEAD_CONFIRM": "prod"}, never, host, console) == 0
    assert host.told == [
        *("deploying dev", "forget dev", "deployed"),
        *("deploying prod", "forget prod", "deployed"),
    ]


@pytest.mark.parametrize(
    ("words", "created"),
    [
        (["config", "set", "--stack", "prod", "--secret", "x"], ["prod"]),
        (["config", "set", "-s", "prod", "x"], ["prod"]),
        (["config", "set", "--stack=prod", "x"], ["prod"]),
        (["config", "set", "--stack", "dev", "x"], []),
        (["config", "set", "--stack", "other", "x"], []),
        (["config", "set", "x"], []),
        (["stack", "output", "--stack", "prod"], []),
    ],
    ids=["long", "short", "with =", "there already", "no settings of that name", "no stack", "another command"],
)
def test_secrets_can_be_set_before_the_first_deploy(words: list[str], created: list[str], tmp_path: Path) -> None:
    (tmp_path / "Pulumi.prod.yaml").touch()
    (tmp_path / "Pulumi.dev.yaml").touch()
    pulumi = Recorder({"dev": 3}, {})
    pulumi.root = tmp_path
    deploy.ready(pulumi, words)
    assert pulumi.created == created


def answering(monkeypatch: pytest.MonkeyPatch, code: int = 0, out: str = "", said: str = "") -> Agent:
    """An agent on a host that answers every script like this."""
    done = subprocess.CompletedProcess([], code, out.encode(), said.encode())
    monkeypatch.setattr(onhost, "run", lambda *_, **__: done)
    return Agent("ssh://deploy@one")


def test_a_host_that_cannot_be_told_names_the_next_step(monkeypatch: pytest.MonkeyPatch) -> None:
    unreachable = answering(monkeypatch, 255, said="ssh: connect to host one port 22: Connection refused\n")
    for asked in (unreachable.declared, lambda: unreachable.declare("dev", {}), lambda: unreachable.forget("dev")):
        with pytest.raises(PulumiError, match=r"Connection refused. Next step: make doctor"):
            asked()
    with pytest.raises(PulumiError, match=r"prove: ssh: connect"):
        unreachable.run("prove")
    with pytest.raises(PulumiError, match=r"asked: exit code 1. Next step: make doctor"):
        answering(monkeypatch, 1).declared()
    with pytest.raises(PulumiError, match=r"verify: verify ended with code 137"):
        answering(monkeypatch, 137).run("verify")


@pytest.mark.parametrize("error", [subprocess.TimeoutExpired("ssh", 900), FileNotFoundError("no such file: sudo")])
def test_a_host_that_does_not_answer_is_no_traceback(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(onhost, "run", run)
    with pytest.raises(PulumiError, match=r"(timed out|sudo).*Next step: make doctor"):
        Agent(None).run("verify")


def test_what_the_host_knows_of_its_backups_is_asked_and_may_be_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    assert answering(monkeypatch, out='{"prod-db-data": {}}\n').backups() == '{"prod-db-data": {}}'
    assert answering(monkeypatch).backups() is None  # no agent there
    assert answering(monkeypatch, 255, said="Connection refused").backups() is None

    def run(*_: object, **__: object) -> None:
        raise subprocess.TimeoutExpired("ssh", 30)

    monkeypatch.setattr(onhost, "run", run)
    assert Agent(None).backups() is None


def shell(script: str, stdin: bytes | None, root: Path) -> subprocess.CompletedProcess[bytes]:
    """Runs a script for the host as the host does, with its folders below another one."""
    for folder in ("/etc/bulkhead", "/run/bulkhead", "/run/systemd", "/usr/local/lib"):
        script = script.replace(folder, f"{root}{folder}")
    return subprocess.run(["sh", "-euc", script], input=stdin, capture_output=True, check=False)


@pytest.fixture
def local(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Agent:
    """An agent of a host without any, whose folders are below `tmp_path`."""
    monkeypatch.setattr(onhost, "run", lambda _, script, *, stdin, **__: shell(script, stdin, tmp_path))
    return Agent(None)


def test_a_verb_of_a_host_without_an_agent_says_what_to_do(local: Agent) -> None:
    with pytest.raises(PulumiError, match=r"verify: the host stack is not deployed there. Next step: make up"):
        local.run("verify")


def test_what_was_declared_is_on_the_host_and_gone_when_it_is_forgotten(local: Agent, tmp_path: Path) -> None:
    assert local.declared() == frozenset()
    local.declare("dev", {"b": "it's", "a": [1]})
    local.declare("prod", {})
    assert local.declared() == {"dev", "prod"}
    file = tmp_path / "etc/bulkhead/stacks/dev.json"
    assert json.loads(file.read_text()) == {"a": [1], "b": "it's"}
    assert stat.S_IMODE(file.stat().st_mode) == 0o644
    local.forget("dev")
    local.forget("dev")
    assert local.declared() == {"prod"}


@pytest.mark.parametrize("fails", [False, True])
def test_stacks_are_marked_while_they_are_deployed_however_that_ends(fails: bool, local: Agent, tmp_path: Path) -> None:
    marks = tmp_path / "run/bulkhead/deploying"
    expected = pytest.raises(PulumiError) if fails else nullcontext()
    with expected, local.deploying(["host", "dev"]):
        assert {mark.name for mark in marks.iterdir()} == {"host", "dev"}
        if fails:
            raise PulumiError("no engine")
    assert not marks.exists()


def test_the_mark_of_another_deploy_stays(local: Agent, tmp_path: Path) -> None:
    with local.deploying(["prod"]):
        with local.deploying(["dev"]):
            pass
        assert [mark.name for mark in (tmp_path / "run/bulkhead/deploying").iterdir()] == ["prod"]


def test_after_a_deploy_what_looks_regularly_runs_also_when_it_had_been_stopped(local: Agent, tmp_path: Path) -> None:
    program = tmp_path / "usr/local/lib/bulkhead/host.pyz"
    program.parent.mkdir(parents=True)
    program.write_text(f"import sys\nopen('{tmp_path}/started', 'w').write(' '.join(sys.argv[1:]))\n")
    with local.deploying(["dev"]):
        assert not (tmp_path / "started").exists()
    assert (tmp_path / "started").read_text() == "watch --start"


REPORT: dict[str, Any] = {"differences": [], "undecided": [], "deploying": [], "compared": {"containers": 3}}
MOVED = {
    "environment": "dev",
    "what": "cgroup file",
    "where": "/sys/fs/cgroup/a/very/long/path/that/does/not/fit/into/eighty/columns/of/a/terminal/pids.max",
    "expected": "4096",
    "observed": "[red]max",
    "since": "2026-01-01T00:00:00+00:00",
}


def test_verify_shows_each_difference_in_words_that_can_be_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    report = REPORT | {"differences": [MOVED], "undecided": ["docker: no answer"], "deploying": ["prod"]}
    console = Console(file=io.StringIO(), width=60)
    assert agent.verify(answering(monkeypatch, 1, json.dumps(report)), console) == 1
    text = shown(console)
    for key in ("where", "expected", "observed", "since"):
        assert f"{key} " in text
        assert f" {MOVED[key]}\n" in text
    for part in (
        "dev: cgroup file\n",
        "undecided: docker: no answer",
        "being deployed: prod",
        "runbooks/differences.md",
    ):
        assert part in text
    assert "As declared" not in text


def test_verify_without_a_difference_is_one_line(console: Console, monkeypatch: pytest.MonkeyPatch) -> None:
    assert agent.verify(answering(monkeypatch, 0, json.dumps(REPORT)), console) == 0
    assert shown(console) == "As declared: 3 containers\n"


def test_the_firewall_s_counters_are_read_from_its_rules(monkeypatch: pytest.MonkeyPatch) -> None:
    rules = [
        {"table": {"name": "bulkhead"}},
        {"rule": {"chain": "from_dev", "comment": "to the host", "expr": [{"counter": {"packets": 3, "bytes": 180}}]}},
        {"rule": {"chain": "from_dev", "expr": [{"accept": None}]}},
    ]
    told = answering(monkeypatch, 0, json.dumps({"nftables": rules}))
    assert told.firewall() == [{"chain": "from_dev", "rule": "to the host", "packets": 3, "bytes": 180}]


def test_an_environment_without_a_settings_file_is_said(console: Console) -> None:
    recorder = Recorder({}, {})
    deploy.up(recorder, Stacks(("host",), TIERS, ("staging",)), PACK, Host(), console)
    assert "Pulumi.staging.yaml is missing" in shown(console)


def test_preview_goes_on_after_a_failure_and_sums_up(console: Console) -> None:
    recorder = Recorder(DEPLOYED, {"host": [SAME], "prod": [BAD], "dev": [OTHER]})
    assert deploy.preview(recorder, ALL, PACK, console) == 1
    assert sorted(recorder.previewed) == ["dev", "host", "prod"]
    assert "2 to create, 1 to update" in shown(console)
    assert recorder.ran == []


def test_preview_with_changes_is_no_failure_but_drift_is(console: Console) -> None:
    says = {"host": [SAME], "prod": [SAME], "dev": [OTHER]}
    assert deploy.preview(Recorder(DEPLOYED, says), ALL, PACK, console) == 0
    recorder = Recorder(DEPLOYED, says)
    assert deploy.preview(recorder, ALL, PACK, console, drift=True) == 1
    assert recorder.arguments[-1] == "--refresh"


def test_preview_of_an_environment_before_host_is_deployed_names_the_next_step(console: Console) -> None:
    recorder = Recorder({}, {"host": [OTHER]})
    assert deploy.preview(recorder, ALL, PACK, console) == 1
    assert recorder.previewed == ["host"]
    assert "Next step: make up" in shown(console)


def never(_: str) -> str:
    raise AssertionError("asked")


def test_down_destroys_in_reverse_order_and_keeps_protected_resources(console: Console) -> None:
    recorder = Recorder(DEPLOYED, {})
    assert deploy.down(recorder, ALL, {"BULKHEAD_CONFIRM": "prod"}, never, Host(), console) == 0
    assert recorder.ran == ["destroy dev", "destroy prod", "destroy host"]
    assert "--exclude-protected" in recorder.arguments


@pytest.mark.parametrize(
    ("variables", "ask", "expected"),
    [
        ({}, None, False),
        ({"BULKHEAD_CONFIRM": "prod"}, None, True),
        ({"BULKHEAD_CONFIRM": "prod, staging"}, None, True),
        ({"BULKHEAD_CONFIRM": "production"}, None, False),
        ({"BULKHEAD_CONFIRM": "yes"}, lambda _: "y", False),
        ({}, lambda _: "prod", True),
        ({}, lambda _: "", False),
    ],
)
def test_a_protected_environment_needs_its_name(
    variables: Mapping[str, str], ask: Callable[[str], str] | None, expected: bool
) -> None:
    assert deploy.confirmed("prod", variables, ask) is expected


def test_an_unconfirmed_protected_environment_keeps_everything_from_being_destroyed(console: Console) -> None:
    recorder = Recorder(DEPLOYED, {})
    with pytest.raises(PulumiError, match="BULKHEAD_CONFIRM=prod"):
        deploy.down(recorder, ALL, {}, lambda _: "no", Host(), console)
    assert recorder.ran == []


def test_a_best_effort_environment_is_destroyed_without_asking(console: Console) -> None:
    recorder = Recorder(DEPLOYED, {})
    assert deploy.down(recorder, Stacks(("dev",), TIERS), {}, never, Host(), console) == 0
    assert recorder.ran == ["destroy dev"]


def test_host_stays_while_an_environment_has_containers(console: Console) -> None:
    recorder = Recorder(DEPLOYED, {})
    recorder.state = {"dev": [{"type": deploy.CONTAINER}], "prod": [{"type": deploy.VOLUME}]}
    with pytest.raises(PulumiError, match="make down ENV=dev"):
        deploy.down(recorder, Stacks(("host",), TIERS), {}, never, Host(), console)
    assert recorder.ran == []
    recorder.state = {"prod": [{"type": deploy.VOLUME}]}  # what prod keeps needs no slice
    assert deploy.down(recorder, Stacks(("host",), TIERS), {}, never, Host(), console) == 0


def test_what_is_not_deployed_is_not_destroyed(console: Console) -> None:
    recorder = Recorder({"host": 0}, {})
    assert deploy.down(recorder, ALL, {}, never, Host(), console) == 0
    assert recorder.ran == []
    assert "Nothing is deployed" in shown(console)


def test_kept_volumes_are_named_with_the_way_to_delete_them() -> None:
    volume = {"type": deploy.VOLUME, "custom": True, "protect": True, "id": "prod-db-data", "urn": "a::b::db-data"}
    component = {"type": "bulkhead:index:Volume", "protect": True, "urn": "a::b::db"}
    text = deploy.remains("prod", [volume, component])
    assert "volume prod-db-data" in text
    assert "docker volume rm prod-db-data" in text
    assert "state unprotect --all --yes --stack prod" in text
    assert deploy.remains("dev", [{"type": "x", "custom": True}]) == "dev: nothing remains"


@pytest.mark.parametrize(
    ("given", "pack"), [({}, "/c/policies"), ({"POLICY_PACK": ""}, "/c/policies"), ({"POLICY_PACK": "/b"}, "/b")]
)
def test_the_policy_pack_can_come_from_elsewhere(given: Mapping[str, str], pack: str) -> None:
    assert deploy.policy_pack(Path("/c"), given) == ("--policy-pack", pack)


# plan.


def test_plan_shows_capacity_promises_and_what_is_free(checkout: Path) -> None:
    asked = {"cpus": 10, "memory": 100 * GIB, "disk": 1000 * GIB}
    ledger = LedgerSettings.read(checkout / "Pulumi.host.yaml").resolve(asked)
    console = Console(file=io.StringIO(), width=160)
    console.print(plan.table(ledger))
    rows = {line.split("│")[1].strip(): line.split("│") for line in shown(console).splitlines() if "│" in line}
    assert [cell.strip() for cell in rows["memory"][1:-1]] == [
        "memory", "100GiB", "-", "30GiB", "50GiB", "5GiB", "15GiB",
    ]  # fmt: skip
    assert rows["cpus"][5].strip() == "6 CPUs"


def test_the_engine_is_not_asked_if_the_ledger_declares_everything(
    checkout: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def asked(_: str | None) -> None:
        raise AssertionError("asked")

    declared = LEDGER.replace("config:\n", "config:\n  bulkhead:capacity: {cpus: 4, memory: 8GiB, disk: 1TB}\n")
    (checkout / "Pulumi.host.yaml").write_text(declared)
    monkeypatch.setattr(host, "facts", asked)
    assert plan.ledger(checkout).capacity.cpus == 4
