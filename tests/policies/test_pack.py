"""The pack as a process: it starts from its own folder, finds its ledger, and serves every rule as mandatory.
What it imports is what every preview waits for."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc  # type: ignore[import-untyped]
import pytest
import yaml
from google.protobuf import empty_pb2  # type: ignore[import-untyped]
from pulumi.runtime.proto import analyzer_pb2, analyzer_pb2_grpc

from policies.registry import RULES
from tests.policies.harness import LEDGER, Given, container, struct, urn

CHECKOUT = Path(__file__).parents[2]
PACK = CHECKOUT / "policies"
HEAVY = {"pulumi_docker", "pulumi_command", "docker", "typer", "rich", "requests"}


@pytest.fixture
def analyzer(tmp_path: Path) -> Iterator[Any]:
    """A running pack, spoken to as the engine does."""
    ledger = tmp_path / "ledger.yaml"
    ledger.write_text(LEDGER)
    process = subprocess.Popen(
        [sys.executable, str(PACK)],
        cwd=PACK,
        env={**os.environ, "PYTHONPATH": str(CHECKOUT), "BULKHEAD_LEDGER": str(ledger)},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout
    with process, grpc.insecure_channel(f"127.0.0.1:{process.stdout.readline().strip()}") as channel:
        stub: Any = analyzer_pb2_grpc.AnalyzerStub(channel)
        yield stub
        process.kill()


def test_serves_every_rule_as_mandatory(analyzer: Any) -> None:
    info = analyzer.GetAnalyzerInfo(empty_pb2.Empty())
    assert info.name == "bulkhead"
    assert {policy.name for policy in info.policies} == {rule.id for rule in RULES}
    assert {policy.enforcementLevel for policy in info.policies} == {analyzer_pb2.MANDATORY}


def test_reads_the_ledger_that_it_is_given(analyzer: Any) -> None:
    def said(one: Given) -> set[str]:
        request = analyzer_pb2.AnalyzeRequest(
            type=one.type, name=one.name, urn=urn("dev-alice", one), properties=struct(one.props)
        )
        return {diagnostic.policyName for diagnostic in analyzer.Analyze(request).diagnostics}

    assert said(container("dev-alice")) == set()
    assert said(container("dev-alice", privileged=True)) == {"privileged"}


def test_imports_nothing_heavy() -> None:
    script = "import sys, policies.pack, policies.registry; print('\\n'.join(sys.modules))"
    loaded = subprocess.run([sys.executable, "-c", script], cwd=CHECKOUT, capture_output=True, text=True, check=True)
    assert not HEAVY & set(loaded.stdout.split())


def test_project_file_names_the_runtime() -> None:
    project = yaml.safe_load((PACK / "PulumiPolicy.yaml").read_text())
    assert project["runtime"] == {"name": "python", "options": {"toolchain": "pip", "virtualenv": "../.venv"}}
