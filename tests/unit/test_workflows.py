"""The workflows: they only call make targets that exist, with the least permissions, on pinned actions."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
FILES = sorted((ROOT / ".github/workflows").glob("*.yml"))
TARGETS = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
HEREDOC = re.compile(r"<<(\w+)\n.*?^\1$", re.DOTALL | re.MULTILINE)
by_name = pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)


def workflow(file: Path) -> dict[Any, Any]:
    """The parsed file. YAML 1.1 reads the key `on` as true."""
    document: dict[Any, Any] = yaml.safe_load(file.read_text())
    return document


def jobs(file: Path) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = workflow(file)["jobs"]
    return found


def steps(file: Path) -> Iterator[dict[str, Any]]:
    for job in jobs(file).values():
        yield from job["steps"]


def commands(file: Path) -> list[str]:
    """Every command line of the `run` steps, without the text that is handed to it."""
    texts = [HEREDOC.sub("", step["run"]) for step in steps(file) if "run" in step]
    return [line.strip() for text in texts for line in text.splitlines() if line.strip()]


def test_there_is_one_for_each_of_preview_deploy_and_drift() -> None:
    assert [file.stem for file in FILES] == ["deploy", "drift", "preview"]


@by_name
def test_every_command_is_a_make_target_git_or_gh(file: Path) -> None:
    for command in commands(file):
        assert command.split()[0] in {"make", "git", "gh"}, command
        if command.startswith("make"):
            words = re.sub(r"-C \S+ ", "", command).split()
            assert words[1] in TARGETS, command


@by_name
def test_a_step_either_runs_or_uses_and_actions_are_pinned_to_a_commit(file: Path) -> None:
    for step in steps(file):
        assert ("run" in step) != ("uses" in step)
        assert "uses" not in step or re.fullmatch(r"[\w-]+/[\w-]+(/[\w-]+)?@[0-9a-f]{40}", step["uses"])
    assert len(re.findall(r"uses: .*@[0-9a-f]{40} # v\d", file.read_text())) == sum(
        "uses" in step for step in steps(file)
    )


@by_name
def test_nothing_is_permitted_but_what_a_job_names(file: Path) -> None:
    assert workflow(file)["permissions"] == {}
    for name, job in jobs(file).items():
        assert job["permissions"], name
        writes = [scope for scope, access in job["permissions"].items() if access == "write"]
        assert not writes or job["runs-on"] != ["self-hosted", "bulkhead"], f"{name}: writes where our code runs"
        assert job["timeout-minutes"] <= 60


@by_name
def test_a_failing_command_before_a_pipe_fails_its_step(file: Path) -> None:
    assert workflow(file)["defaults"]["run"]["shell"] == "bash"  # which Actions runs with pipefail


@by_name
def test_credentials_are_not_left_in_the_checkout_and_no_secret_is_named(file: Path) -> None:
    for step in steps(file):
        if step.get("uses", "").startswith("actions/checkout@"):
            assert step["with"]["persist-credentials"] is False
    assert "secrets." not in file.read_text()


def test_a_pull_request_is_judged_by_the_base_branchs_pack() -> None:
    file = ROOT / ".github/workflows/preview.yml"
    base = next(step for step in steps(file) if step.get("with", {}).get("path") == "base")
    assert base["with"]["ref"] == "${{ github.event.pull_request.base.sha }}"
    for target in (" preview ", " report "):
        judged = [command for command in commands(file) if target in command]
        assert len(judged) == 1
        assert 'POLICY_PACK="$GITHUB_WORKSPACE/base/policies"' in judged[0]
    assert "POLICY_CONFIG" not in file.read_text()  # the one beside that pack counts
    assert list(workflow(file)[True]) == ["pull_request"]


def test_violations_are_shown_by_a_job_that_runs_nothing_of_the_pull_request() -> None:
    job = jobs(ROOT / ".github/workflows/preview.yml")["annotate"]
    assert not any("run" in step or step["uses"].startswith("actions/checkout@") for step in job["steps"])
    assert job["permissions"]["security-events"] == "write"
    assert job["steps"][-1]["with"]["sarif_file"] == "report.sarif"


def test_a_fork_gets_no_preview() -> None:
    condition = jobs(ROOT / ".github/workflows/preview.yml")["preview"]["if"]
    assert condition == "github.event.pull_request.head.repo.full_name == github.repository"


def test_prod_is_deployed_last_and_only_after_approval() -> None:
    file = ROOT / ".github/workflows/deploy.yml"
    deploys = [command for command in commands(file) if command.startswith("make up")]
    assert deploys == ["make up ENV=host", "make up ENV=dev", "make up ENV=prod"]
    assert jobs(file)["prod"]["environment"] == "production"
    assert jobs(file)["prod"]["needs"] == "dev"
    assert workflow(file)["concurrency"] == {"group": "deploy", "cancel-in-progress": False}


def test_drift_is_looked_for_every_night() -> None:
    file = ROOT / ".github/workflows/drift.yml"
    assert re.fullmatch(r"\d+ \d+ \* \* \*", workflow(file)[True]["schedule"][0]["cron"])
    assert any(command.startswith("make drift ") for command in commands(file))
