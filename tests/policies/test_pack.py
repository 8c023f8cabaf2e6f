"""The pack as a process: it starts from its own folder, finds its ledger, and serves every rule as mandatory.
What it imports is what every preview waits for."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc  # type: ignore[import-untyped]
import pytest
import yaml
from google.protobuf import empty_pb2  # type: ignore[import-untyped]
from pulumi.runtime.proto import analyzer_pb2, analyzer_pb2_grpc

from policies.registry import RULES
from policies.server import Server
from policies.world import World
from tests.policies import document
from tests.policies.harness import (
    LEDGER,
    SECRET,
    UNKNOWN,
    Given,
    as_input,
    as_output,
    component,
    container,
    network,
    urn,
)

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


def test_serves_every_rule(analyzer: Any) -> None:
    info = analyzer.GetAnalyzerInfo(empty_pb2.Empty())
    assert info.name == "bulkhead"
    assert {policy.name for policy in info.policies} == {rule.id for rule in RULES}
    levels = {policy.name: policy.enforcementLevel for policy in info.policies}
    remedied = {name for name, level in levels.items() if level == analyzer_pb2.REMEDIATE}
    assert remedied == {"net-raw", "no-new-privileges", "log-rotation", "init"}
    assert {levels[name] for name in levels.keys() - remedied} == {analyzer_pb2.MANDATORY}


def said(analyzer: Any, one: Given) -> set[str]:
    """The rules that object to a resource of dev-alice."""
    request = as_input(one, {one.name: urn("dev-alice", one)})
    return {diagnostic.policyName for diagnostic in analyzer.Analyze(request).diagnostics}


def test_reads_the_ledger_that_it_is_given(analyzer: Any) -> None:
    assert said(analyzer, container("dev-alice")) == set()
    assert said(analyzer, container("dev-alice", privileged=True)) == {"privileged"}


def configured(analyzer: Any, name: str, level: int = analyzer_pb2.MANDATORY, **options: Any) -> str:
    """What the pack answers to a policy config; empty when it takes it."""
    request = analyzer_pb2.ConfigureAnalyzerRequest()
    request.policyConfig[name].enforcementLevel = level
    request.policyConfig[name].properties.update(options)
    try:
        analyzer.Configure(request)
    except grpc.RpcError as error:
        return str(error.details())
    return ""


def test_takes_levels_and_options_from_a_config(analyzer: Any) -> None:
    assert configured(analyzer, "devices", allow=["/dev/dri/*"]) == ""
    assert said(analyzer, container("dev-alice", devices=[{"hostPath": "/dev/dri/card0"}])) == set()
    assert configured(analyzer, "devices", analyzer_pb2.DISABLED) == ""
    assert said(analyzer, container("dev-alice", devices=[{"hostPath": "/dev/sda"}])) == set()


@pytest.mark.parametrize(
    ("name", "level", "options", "expected"),
    [
        ("devises", analyzer_pb2.MANDATORY, {}, "devises: no such rule. Did you mean 'devices'?"),
        ("devices", analyzer_pb2.MANDATORY, {"alow": []}, "devices.alow: no such option. Did you mean 'allow'?"),
        ("privileged", analyzer_pb2.MANDATORY, {"allow": []}, "privileged.allow: no such option. It has none."),
        ("privileged", analyzer_pb2.DISABLED, {}, "privileged: disabled: this rule is always mandatory"),
        ("network-reach", analyzer_pb2.ADVISORY, {}, "network-reach: advisory: this rule is always mandatory"),
    ],
)
def test_refuses_a_config_that_cannot_be_meant(
    name: str, level: int, options: dict[str, Any], expected: str, analyzer: Any
) -> None:
    assert expected in configured(analyzer, name, level, **options)


def test_tells_every_verdict_to_the_report(tmp_path: Path) -> None:
    ledger = tmp_path / "Pulumi.host.yaml"
    ledger.write_text(LEDGER)
    told: list[Mapping[str, Any]] = []
    server: Any = Server(RULES, World.of(ledger), told.append)
    exempt = {
        "rule": "read-only-root",
        "reason": "it writes into its own folder",
        "owner": "a",
        "expires": "2999-01-01",
    }
    above = component("Service", "service", exempt=[exempt])
    one = replace(container("prod", readOnly=False, init=None, restart="no", envs=[f"X={SECRET}"]), parent="service")
    urns = {given.name: urn("prod", given) for given in (above, one)}
    for given in (above, one):
        server.Remediate(as_input(given, urns), None)
        server.Analyze(as_input(given, urns), None)
    server.AnalyzeStack(analyzer_pb2.AnalyzeStackRequest(), None)
    by = {(line["rule"], line["verdict"]) for line in told if "rule" in line}
    assert {("read-only-root", "exempt"), ("init", "remediated"), ("restart-policy", "violation")} <= by
    assert ("privileged", "pass") in by
    assert ("network-reach", "violation") not in by
    assert told[-1] == {"stack": "prod", "complete": True}
    assert SECRET not in str(told)
    exempted = next(line for line in told if line.get("verdict") == "exempt")
    assert exempted["exemption"] == {"reason": exempt["reason"], "owner": "a", "expires": "2999-01-01"}


def test_tells_of_a_pass_that_only_the_whole_stack_decided(tmp_path: Path) -> None:
    ledger = tmp_path / "Pulumi.host.yaml"
    ledger.write_text(LEDGER)
    told: list[Mapping[str, Any]] = []
    server: Any = Server(RULES, World.of(ledger), told.append)
    made = network("prod")
    one = replace(container("prod", networksAdvanced=[{"name": UNKNOWN}]), after={"networksAdvanced": [made.name]})
    urns = {given.name: urn("prod", given) for given in (made, one)}
    for given in (made, one):
        server.Analyze(as_input(given, urns), None)
    verdicts = [line for line in told if line["rule"] == "network-reach" and line["urn"] == urns[one.name]]
    assert verdicts == [], "open: the network's name is not known yet"
    server.AnalyzeStack(analyzer_pb2.AnalyzeStackRequest(resources=[as_output(made, urns), as_output(one, urns)]), None)
    (verdict,) = (line for line in told if line.get("rule") == "network-reach" and line["urn"] == urns[one.name])
    assert verdict["verdict"] == "pass"


@pytest.mark.parametrize(("file", "text"), [(document.DOCUMENT, document.document), (document.SCHEMA, document.schema)])
def test_what_is_written_from_the_rules_is_current(file: Path, text: Callable[[], str]) -> None:
    assert file.read_text() == text(), "run: make policy-docs"


def test_no_example_in_the_documentation_holds_a_secret() -> None:
    assert SECRET not in document.document()


def test_imports_nothing_heavy() -> None:
    script = "import sys, policies.server, policies.registry; print('\\n'.join(sys.modules))"
    loaded = subprocess.run([sys.executable, "-c", script], cwd=CHECKOUT, capture_output=True, text=True, check=True)
    assert not HEAVY & set(loaded.stdout.split())


def test_project_file_names_the_runtime() -> None:
    project = yaml.safe_load((PACK / "PulumiPolicy.yaml").read_text())
    assert project["runtime"] == {"name": "python", "options": {"toolchain": "pip", "virtualenv": "../.venv"}}
