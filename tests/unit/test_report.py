"""The report: what the pack's lines become, where violations are shown, and that silence never passes.
Pulumi is played by a recorder that writes verdicts as the pack does."""

import io
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import jsonschema
import pytest
from rich.console import Console

from cli import formats, locate, report, verdicts
from cli.order import Stacks
from cli.previews import Outcome, Preview
from cli.pulumi import Pulumi, PulumiError, Result
from cli.verdicts import Judged, Kind, Told
from settings.ledger import Tier

BASE = """\
services:
  api:
    image: shop/api
    cap_drop: [ALL]
    networks: [backend]
  db:
    build: ./db
    volumes:
      - db-data:/data
networks:
  backend:
    internal: true
volumes:
  db-data:
secrets:
  token: {external: true}
"""
OVER = """\
services:
  api:
    privileged: true
    networks: [backend, theirs]
    deploy:
      resources:
        limits: {memory: 64M}
networks:
  theirs: {external: true, name: prod-backend}
"""
LEDGER = """\
config:
  bulkhead:environments:
    prod: {tier: protected, subnet: 10.81.0.0/16, reservations: {cpus: 60%, memory: 50%}}
    dev: {tier: best-effort, subnet: 10.82.0.0/16, limits: {memory: 30%}}
"""


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A checkout with environment dev from two compose files."""
    (tmp_path / "Pulumi.yaml").write_text("name: bulkhead\n")
    (tmp_path / "Pulumi.host.yaml").write_text(LEDGER)
    (tmp_path / "Pulumi.dev.yaml").write_text(
        "config:\n  bulkhead:compose: [shop/compose.yaml, shop/compose.dev.yaml]\n"
    )
    (tmp_path / "shop").mkdir()
    (tmp_path / "shop" / "compose.yaml").write_text(BASE)
    (tmp_path / "shop" / "compose.dev.yaml").write_text(OVER)
    return tmp_path


# Where a resource is described.

OURS, DOCKER = "bulkhead:index:", {"Container": "container", "Network": "network", "Volume": "volume"}


def urn(chain: str, name: str, stack: str = "dev") -> str:
    """A URN with a chain of short type names: `Service$Container`; the last one may be the provider's."""
    types = chain.split("$")
    long = [
        f"docker:index/{DOCKER[kind]}:{kind}" if kind in DOCKER and (number or len(types) == 1) else OURS + kind
        for number, kind in enumerate(types)
    ]
    environment = [] if stack == "host" else [f"{OURS}Environment"]
    return f"urn:pulumi:{stack}::bulkhead::{'$'.join([*environment, *long])}::{name}"


@pytest.mark.parametrize(
    ("resource", "path", "place"),
    [
        # The last file that has the key.
        (urn("Service$Container", "dev-api-1"), "privileged", "shop/compose.dev.yaml:3"),
        (urn("Service$Container", "dev-api-1"), "networksAdvanced[1].name", "shop/compose.dev.yaml:4"),
        (urn("Service$Container", "dev-api-2"), "memory", "shop/compose.dev.yaml:7"),
        (urn("Service$Container", "dev-api-1"), "capabilities.drops[0]", "shop/compose.yaml:4"),
        (urn("Service$Container", "dev-api-1"), "image", "shop/compose.yaml:3"),
        (urn("Service$Container", "dev-db-1"), "image", "shop/compose.yaml:7"),
        (urn("Service$Container", "dev-db-1"), "volumes[0].hostPath", "shop/compose.yaml:8"),
        (urn("Service$Container", "dev-db-1"), "mounts[0]", "shop/compose.yaml:8"),
        # A nearer parent of the key, where the key itself is not written.
        (urn("Service$Container", "dev-api-1"), "cpuQuota", "shop/compose.dev.yaml:7"),
        # The service, where no file has the key, or no property is named.
        (urn("Service$Container", "dev-db-1"), "readOnly", "shop/compose.yaml:6"),
        (urn("Service$Container", "dev-db-1"), "", "shop/compose.yaml:6"),
        (urn("Service", "dev-db"), "", "shop/compose.yaml:6"),
        (urn("Service$Files$Volume", "dev-db-files-0"), "driver", "shop/compose.yaml:6"),
        (urn("Service$Files$Container", "dev-db-files-carrier"), "", "shop/compose.yaml:6"),
        (urn("Image$RemoteImage", "dev-api-pull"), "name", "shop/compose.yaml:3"),
        (urn("Image$RemoteImage", "dev-db-0123456789ab"), "build", "shop/compose.yaml:7"),
        # Networks, volumes, secrets.
        (urn("Network$Network", "dev-backend-bridge"), "internal", "shop/compose.yaml:12"),
        (urn("Volume$Volume", "dev-db-data-data"), "driverOpts", "shop/compose.yaml:14"),
        (urn("Secret$Command", "dev-token-generated"), "create", "shop/compose.yaml:16"),
        # Everything else is at the top of the stack's settings.
        (urn("Service$Container", "dev-gone-1"), "privileged", "Pulumi.dev.yaml:1"),
        (urn("Container", "by-hand"), "privileged", "Pulumi.dev.yaml:1"),
        ("urn:pulumi:dev::bulkhead::pulumi:pulumi:Stack::bulkhead-dev", "", "Pulumi.dev.yaml:1"),
        ("nonsense", "", "Pulumi.dev.yaml:1"),
        (urn("Slice$HostCommand$Command", "dev-cgroup-local", "host"), "create", "Pulumi.host.yaml:4"),
        ("urn:pulumi:host::bulkhead::pulumi:pulumi:Stack::bulkhead-host", "", "Pulumi.host.yaml:1"),
    ],
)  # fmt: skip
def test_a_resource_is_found_in_the_files_that_describe_it(root: Path, resource: str, path: str, place: str) -> None:
    stack = "host" if ":host::" in resource else "dev"
    file, line = locate.Locator(root, stack).place(resource, path)
    assert f"{file.relative_to(root)}:{line}" == place


def test_files_that_cannot_be_read_leave_the_top_of_the_settings(root: Path) -> None:
    (root / "shop" / "compose.dev.yaml").write_text("services: [")
    place = locate.Locator(root, "dev").place(urn("Service$Container", "dev-api-1"), "privileged")
    assert place == (root / "Pulumi.dev.yaml", 1)


@pytest.mark.parametrize(
    ("path", "keys"),
    [
        ("capabilities.adds[0]", ("cap_add",)),
        ("stopTimeout", ("stop_grace_period",)),
        ("usernsMode", ("userns_mode",)),
        ("readOnly, init", ("read_only",)),
        ("labels.bulkhead", ("labels",)),
        ("", ()),
    ],
)
def test_a_property_has_its_compose_key(path: str, keys: tuple[str, ...]) -> None:
    assert locate.compose_keys(path) == keys


# What the pack writes.

EXEMPTION = {"reason": "the vendor's agent needs it", "owner": "ops@example.org", "expires": "2027-01-31"}


def line(verdict: str = "violation", **changes: Any) -> dict[str, Any]:
    """One verdict as the pack writes it."""
    return {
        "stack": "dev",
        "rule": "privileged",
        "family": "hardening",
        "title": "no container is privileged",
        "references": ["CIS 5.5", "PSS baseline: Privileged Containers"],
        "level": "mandatory",
        "verdict": verdict,
        "urn": urn("Service$Container", "dev-api-1"),
        "type": "docker:index/container:Container",
        "resource": "dev-api-1",
        "path": "privileged",
        "message": "dev-api-1 (Container): privileged: true: it is root of the host. Fix: remove it.",
        "exemption": None,
        **changes,
    }


PASS = line("pass", rule="engine-socket", path="", message="", family="escape", title="nobody has the engine's socket")
ADVICE = line(level="advisory", rule="image-digest", path="image", message="dev-api-1 (Container): image: no digest")
EXEMPT = line("exempt", rule="read-only-root", path="readOnly", message="dev-api-1: writable", exemption=EXEMPTION)
REMEDIATED = line("remediated", rule="init", level="remediate", path="init", message="", title="an init reaps zombies")
COMPLETE = {"stack": "dev", "complete": True}


def lines(*written: Mapping[str, Any]) -> str:
    return "".join(f"{json.dumps(one)}\n" for one in written)


def told(tmp_path: Path, text: str) -> Told:
    (tmp_path / "dev.jsonl").write_text(text)
    return verdicts.read(tmp_path / "dev.jsonl", "dev")


def test_verdicts_are_read_once_and_the_worst_come_first(tmp_path: Path) -> None:
    found = told(tmp_path, lines(PASS, ADVICE, EXEMPT, REMEDIATED, line(), line(), COMPLETE))
    assert [one.rule for one in found.verdicts] == [
        "privileged", "image-digest", "read-only-root", "init", "engine-socket",
    ]  # fmt: skip
    assert (found.complete, found.fault) == (True, "")


def test_a_key_of_a_newer_pack_is_ignored(tmp_path: Path) -> None:
    assert len(told(tmp_path, lines(line(weight=3), COMPLETE)).verdicts) == 1


def test_a_missing_or_empty_file_tells_nothing(tmp_path: Path) -> None:
    assert verdicts.read(tmp_path / "none", "dev") == Told() == told(tmp_path, "")


@pytest.mark.parametrize(
    "broken",
    [
        '{"stack": "dev", "rule": "privi',
        "[]",
        "null",
        lines(line(verdict="perhaps")),
        lines(line(stack="prod")),
        lines({"stack": "prod", "complete": True}),
        lines({"stack": "dev", "complete": False}),
    ],
)
def test_a_line_that_cannot_be_read_is_said(tmp_path: Path, broken: str) -> None:
    found = told(tmp_path, lines(line()) + broken)
    assert found.fault == "The policy pack's verdicts on dev cannot be read: line 2."
    assert len(found.verdicts) == 1
    assert not found.complete


def test_terminal_codes_and_control_characters_are_taken_out(tmp_path: Path) -> None:
    found = told(tmp_path, lines(line(message="\x1b[31mred\x1b[0m\x00\x9b1m \ud800ü\tx\n[b]"), COMPLETE))
    assert found.verdicts[0].message == "red1m ü\tx\n[b]"


# What becomes of it.


def judged(root: Path, *written: Mapping[str, Any], outcome: Outcome = Outcome.UNCHANGED, output: str = "") -> Judged:
    return report.judged(Preview("dev", outcome, "", 0, output), told(root, lines(*written)), root)


@pytest.mark.parametrize(
    ("written", "outcome", "failure", "note", "passed"),
    [
        ([PASS, COMPLETE], Outcome.UNCHANGED, "", "", True),
        ([PASS, ADVICE, EXEMPT, REMEDIATED, COMPLETE], Outcome.CHANGED, "", "", True),
        ([line(), COMPLETE], Outcome.FAILED, "", "", False),
        # A violation of one resource ends the preview before the stack's analysis.
        ([line()], Outcome.FAILED, "", "rules that need the whole stack were not run for dev", False),
        ([PASS, ADVICE], Outcome.UNCHANGED, "rules that need the whole stack were not run for dev", "", False),
        ([], Outcome.UNCHANGED, f"the policy pack said nothing of dev. {report.WHY_SILENT}", "", False),
        ([], Outcome.FAILED, "error: red", "", False),
        ([PASS], Outcome.FAILED, "error: red", "rules that need the whole stack were not run for dev", False),
        ([PASS, COMPLETE], Outcome.FAILED, "error: red", "", False),
        # A mandatory violation counts also where Pulumi let it pass.
        ([line(), COMPLETE], Outcome.UNCHANGED, "", "", False),
    ],
)  # fmt: skip
def test_only_a_stack_of_which_all_is_known_passes(
    root: Path, written: Sequence[Mapping[str, Any]], outcome: Outcome, failure: str, note: str, passed: bool
) -> None:
    one = judged(root, *written, outcome=outcome, output="\x1b[1merror\x1b[0m: red\n")
    assert (one.failure, one.note, one.passed) == (failure, note, passed)


def test_verdicts_that_cannot_be_read_are_a_failure(root: Path) -> None:
    assert "line 2" in judged(root, PASS, {}, COMPLETE).failure


EVERYTHING = (line(), ADVICE, EXEMPT, REMEDIATED, PASS, COMPLETE)


def test_the_text_says_all_of_it(root: Path) -> None:
    assert (
        formats.text([judged(root, *EVERYTHING, outcome=Outcome.FAILED)])
        == """\
dev: preview failed
  violations 1, advisories 1, exempt 1, remediated 1, passed 1

  violation: privileged: no container is privileged [CIS 5.5; PSS baseline: Privileged Containers]
    shop/compose.dev.yaml:3
    dev-api-1 (Container): privileged: true: it is root of the host. Fix: remove it.

  advisory: image-digest: no container is privileged [CIS 5.5; PSS baseline: Privileged Containers]
    shop/compose.yaml:3
    dev-api-1 (Container): image: no digest

  exempt: read-only-root: no container is privileged [CIS 5.5; PSS baseline: Privileged Containers]
    shop/compose.dev.yaml:2
    dev-api-1: writable
    exempt until 2027-01-31 (ops@example.org): the vendor's agent needs it

  remediated: init: an init reaps zombies [CIS 5.5; PSS baseline: Privileged Containers]
    shop/compose.dev.yaml:2
    dev-api-1 (Container): init: set by the policy pack

  pass: engine-socket: dev-api-1 (Container)
"""
    )


def test_the_text_says_why_a_stack_proves_nothing(root: Path) -> None:
    one = judged(root, PASS, outcome=Outcome.FAILED, output="error: a\nerror: b\n")
    said = formats.text([one])
    assert "  failed: error: a\n  failed: error: b\n" in said
    assert "  note: rules that need the whole stack were not run for dev\n" in said


def test_the_json_has_every_verdict_with_its_place(root: Path) -> None:
    document = json.loads(formats.as_json([judged(root, *EVERYTHING)]))
    assert document["passed"] is False
    (stack,) = document["stacks"]
    assert stack["counts"] == {"violations": 1, "advisories": 1, "exempt": 1, "remediated": 1, "passed": 1}
    assert stack["verdicts"][0] == {**line(), "file": "shop/compose.dev.yaml", "line": 3}
    assert [one["verdict"] for one in stack["verdicts"]] == ["violation", *map(str, Kind)]


# JUnit.


def parsed(*stacks: Judged) -> ElementTree.Element:
    return ElementTree.fromstring(formats.junit(stacks))  # noqa: S314 - our own text


def case(root: ElementTree.Element, rule: str) -> ElementTree.Element:
    return next(one for one in root.iter("testcase") if one.get("classname", "").endswith(f".{rule}"))


def test_junit_has_a_case_for_each_rule_and_resource(root: Path) -> None:
    suites = parsed(judged(root, *EVERYTHING))
    (suite,) = suites
    counts = {"tests": "6", "failures": "1", "errors": "0", "skipped": "1"}
    assert dict(suite.items()) == {"name": "dev", **counts}
    assert dict(suites.items()) == {"name": "bulkhead", **counts}
    assert [(one.get("classname"), one.get("name")) for one in suite] == [
        ("bulkhead.preview", "dev"),
        ("bulkhead.hardening.privileged", "dev-api-1 (Container)"),
        ("bulkhead.hardening.image-digest", "dev-api-1 (Container)"),
        ("bulkhead.hardening.read-only-root", "dev-api-1 (Container)"),
        ("bulkhead.hardening.init", "dev-api-1 (Container)"),
        ("bulkhead.escape.engine-socket", "dev-api-1 (Container)"),
    ]
    failure = case(suites, "privileged").find("failure")
    assert failure is not None
    assert failure.get("message", "").startswith("violation: shop/compose.dev.yaml:3: dev-api-1 (Container)")
    skipped = case(suites, "read-only-root").find("skipped")
    assert skipped is not None
    reason = "exempt until 2027-01-31 (ops@example.org): the vendor's agent needs it"
    assert skipped.get("message") == reason
    for rule, said in (("image-digest", "advisory: "), ("read-only-root", "exempt: "), ("init", "remediated: ")):
        assert (case(suites, rule).findtext("system-out") or "").startswith(said)
    assert list(case(suites, "engine-socket")) == []


def test_several_violations_of_a_rule_and_resource_are_one_case(root: Path) -> None:
    suites = parsed(judged(root, line(), line(path="init", message="another"), COMPLETE))
    failure = case(suites, "privileged").find("failure")
    assert failure is not None
    assert len((failure.text or "").splitlines()) == 2
    assert suites.get("tests") == "2"


def test_junit_shows_a_stack_that_proves_nothing_as_an_error(root: Path) -> None:
    suites = parsed(judged(root))
    assert suites.get("errors") == "1"
    assert case(suites, "preview").find("error") is not None


# SARIF.

TEXT = {
    "type": "object",
    "required": ["text"],
    "properties": {"text": {"type": "string", "minLength": 1}},
    "additionalProperties": False,
}
PROPERTIES = {"type": "object", "properties": {"tags": {"type": "array", "uniqueItems": True}}}
LEVEL = {"enum": ["none", "note", "warning", "error"]}


def closed(required: Sequence[str], **properties: Any) -> dict[str, Any]:
    """An object with these properties and no others, as every object of SARIF but the property bags is."""
    return {"type": "object", "required": list(required), "properties": properties, "additionalProperties": False}


def some(items: Mapping[str, Any], least: int = 0) -> dict[str, Any]:
    return {"type": "array", "items": items, "minItems": least}


SARIF = closed(
    ["version", "runs"],
    **{"$schema": {"const": "https://json.schemastore.org/sarif-2.1.0.json"}},
    version={"const": "2.1.0"},
    runs=some(
        closed(
            ["tool", "results"],
            tool=closed(
                ["driver"],
                driver=closed(
                    ["name"],
                    name={"const": "bulkhead"},
                    version={"type": "string"},
                    rules=some(
                        closed(
                            ["id", "shortDescription", "fullDescription", "help"],
                            id={"type": "string"},
                            shortDescription=TEXT,
                            fullDescription=TEXT,
                            help=TEXT,
                            properties=PROPERTIES,
                        )
                    ),
                ),
            ),
            invocations=some(
                closed(
                    ["executionSuccessful"],
                    executionSuccessful={"type": "boolean"},
                    toolExecutionNotifications=some(closed(["message"], level=LEVEL, message=TEXT)),
                )
            ),
            results=some(
                closed(
                    ["ruleId", "message", "locations", "partialFingerprints"],
                    ruleId={"type": "string"},
                    ruleIndex={"type": "integer", "minimum": 0},
                    level=LEVEL,
                    message=TEXT,
                    locations=some(
                        closed(
                            ["physicalLocation"],
                            physicalLocation=closed(
                                ["artifactLocation", "region"],
                                artifactLocation=closed(
                                    ["uri", "uriBaseId"],
                                    uri={"type": "string", "pattern": r"^[^/\s][^\s]*$"},
                                    uriBaseId={"const": "%SRCROOT%"},
                                ),
                                region=closed(["startLine"], startLine={"type": "integer", "minimum": 1}),
                            ),
                            logicalLocations=some(
                                closed(
                                    [],
                                    name={"type": "string"},
                                    fullyQualifiedName={"type": "string"},
                                    kind={"type": "string"},
                                )
                            ),
                        ),
                        least=1,
                    ),
                    partialFingerprints={"type": "object", "additionalProperties": {"type": "string"}},
                    suppressions=some(
                        closed(
                            ["kind"],
                            kind={"enum": ["inSource", "external"]},
                            status={"enum": ["accepted", "underReview", "rejected"]},
                            justification={"type": "string"},
                            properties=PROPERTIES,
                        )
                    ),
                    properties=PROPERTIES,
                )
            ),
        ),
        least=1,
    ),
)
"""The part of SARIF 2.1.0's schema that the report uses."""


def run(*stacks: Judged) -> dict[str, Any]:
    document = json.loads(formats.sarif(stacks))
    jsonschema.Draft202012Validator(SARIF).validate(document)
    found: dict[str, Any] = document["runs"][0]
    return found


def test_sarif_shows_what_a_reviewer_has_to_see(root: Path) -> None:
    found = run(judged(root, *EVERYTHING))
    rules = found["tool"]["driver"]["rules"]
    assert [one["id"] for one in rules] == ["engine-socket", "image-digest", "init", "privileged", "read-only-root"]
    assert rules[3]["shortDescription"]["text"] == "no container is privileged"
    assert rules[3]["properties"]["tags"] == ["CIS 5.5", "PSS baseline: Privileged Containers", "hardening"]
    results = found["results"]
    assert [(one["ruleId"], one["level"]) for one in results] == [
        ("privileged", "error"),
        ("image-digest", "warning"),
        ("read-only-root", "error"),
        ("init", "note"),
    ]
    assert all(rules[one["ruleIndex"]]["id"] == one["ruleId"] for one in results)
    assert results[0]["locations"][0]["physicalLocation"] == {
        "artifactLocation": {"uri": "shop/compose.dev.yaml", "uriBaseId": "%SRCROOT%"},
        "region": {"startLine": 3},
    }
    assert found["invocations"] == [{"executionSuccessful": True, "toolExecutionNotifications": []}]


def test_an_exemption_suppresses_and_says_who_and_until_when(root: Path) -> None:
    results = run(judged(root, *EVERYTHING))["results"]
    assert [one["suppressions"] for one in results if one["ruleId"] != "read-only-root"] == [[], [], []]
    assert results[2]["suppressions"] == [
        {
            "kind": "inSource",
            "status": "accepted",
            "justification": "the vendor's agent needs it",
            "properties": {"owner": "ops@example.org", "expires": "2027-01-31"},
        }
    ]


def fingerprints(one: Judged) -> list[str]:
    return [result["partialFingerprints"]["primaryLocationLineHash"] for result in run(one)["results"]]


def test_a_violation_is_recognised_when_its_line_or_wording_changes(root: Path) -> None:
    before = fingerprints(judged(root, line(), COMPLETE))
    file = root / "shop" / "compose.dev.yaml"
    file.write_text(f"# A comment.\n{file.read_text()}")
    assert fingerprints(judged(root, line(message="Other words."), COMPLETE)) == before
    assert fingerprints(judged(root, line(path="init"), COMPLETE)) != before


def test_two_violations_of_one_property_are_two(root: Path) -> None:
    one, other = fingerprints(judged(root, line(), line(message="Another."), COMPLETE))
    assert re.fullmatch(r"[0-9a-f]{16}:1", one)
    assert other == f"{one[:-1]}2"


def test_a_failed_preview_is_no_successful_execution(root: Path) -> None:
    (found,) = run(judged(root, PASS, outcome=Outcome.FAILED, output="error: red"))["invocations"]
    assert found["executionSuccessful"] is False
    assert [one["level"] for one in found["toolExecutionNotifications"]] == ["error", "note"]


def test_a_file_outside_the_checkout_or_with_spaces_is_still_a_uri(root: Path) -> None:
    one = judged(root, line(), COMPLETE)
    places = ("/srv/other/compose.yaml", "my shop/compose.yaml")
    moved = one._replace(findings=tuple(one.findings[0]._replace(file=file) for file in places))
    results = json.loads(formats.sarif([moved]))["runs"][0]["results"]
    assert [result["locations"][0]["physicalLocation"]["artifactLocation"] for result in results] == [
        {"uri": "file:///srv/other/compose.yaml"},
        {"uri": "my%20shop/compose.yaml", "uriBaseId": "%SRCROOT%"},
    ]


# The command.


class Recorder(Pulumi):
    """Answers previews, and writes what the pack says of each stack to the file that the preview is given."""

    def __init__(self, root: Path, says: Mapping[str, tuple[int, str]], host: int = 5) -> None:
        super().__init__(root, {})
        self.says, self.host = says, host
        self.files: dict[str, str] = {}
        self.arguments: tuple[str, ...] = ()

    def stacks(self) -> dict[str, int]:
        return {"host": self.host, "dev": self.host}

    def resources(self, stack: str) -> list[dict[str, Any]]:  # noqa: ARG002 - the class's signature
        return []

    def capture(self, *arguments: str, variables: Mapping[str, str] = {}) -> Result:
        stack, self.arguments = arguments[2], arguments
        self.files[stack] = variables["BULKHEAD_VERDICTS"]
        code, said = self.says[stack]
        Path(self.files[stack]).write_text(said)
        return Result(code, "Resources:\n    12 unchanged\n" if not code else "\x1b[31merror: preview failed\x1b[0m\n")


BOTH = Stacks(("host", "dev"), {"dev": Tier.BEST_EFFORT})
HOST = (0, lines({"stack": "host", "complete": True}))
FILES = ["junit.xml", "report.json", "report.sarif", "report.txt"]


@pytest.fixture
def console() -> Console:
    return Console(file=io.StringIO(), width=160)


def shown(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def written(root: Path, recorder: Recorder, console: Console) -> int:
    return report.write(recorder, BOTH, ("--policy-pack", "pack"), root / "out" / "report", console)


def test_a_stack_with_advice_only_passes_and_all_forms_are_written(root: Path, console: Console) -> None:
    recorder = Recorder(root, {"host": HOST, "dev": (0, lines(PASS, ADVICE, EXEMPT, COMPLETE))})
    assert written(root, recorder, console) == 0
    assert sorted(path.name for path in (root / "out" / "report").iterdir()) == FILES
    assert recorder.arguments[3:5] == ("--policy-pack", "pack")
    assert recorder.files["host"] != recorder.files["dev"]
    assert not Path(recorder.files["dev"]).exists()
    row = next(line for line in shown(console).splitlines() if line.startswith("│ dev"))
    assert [cell.strip() for cell in row.split("│")[1:-1]] == ["dev", "passed", "0", "1", "1", "0", "1"]


def test_a_violation_fails_and_is_shown_at_its_place(root: Path, console: Console) -> None:
    recorder = Recorder(root, {"host": HOST, "dev": (255, lines(line()))})
    assert written(root, recorder, console) == 1
    assert "shop/compose.dev.yaml:3: violation: privileged: dev-api-1 (Container)" in shown(console)
    assert "dev: rules that need the whole stack were not run for dev" in shown(console)


@pytest.mark.parametrize("says", [(0, ""), (0, lines(PASS)), (255, ""), (255, lines(PASS, COMPLETE))])
def test_silence_and_failure_never_pass(root: Path, console: Console, says: tuple[int, str]) -> None:
    assert written(root, Recorder(root, {"host": HOST, "dev": says}), console) == 1


def test_environments_that_wait_for_the_host_fail_with_the_next_step(root: Path, console: Console) -> None:
    assert written(root, Recorder(root, {"host": HOST}, host=0), console) == 1
    document = json.loads((root / "out" / "report" / "report.json").read_text())
    assert [one["passed"] for one in document["stacks"]] == [True, False]
    assert "Next step: make up" in document["stacks"][1]["failure"]


def test_no_form_holds_terminal_codes(root: Path, console: Console) -> None:
    coloured = line(message="\x1b[1mbold\x1b[0m", path="\x1b[1mprivileged\x1b[0m", resource="dev-\x1b[1mapi\x1b[0m-1")
    recorder = Recorder(root, {"host": (255, ""), "dev": (255, lines(coloured))})
    assert written(root, recorder, console) == 1
    for name in FILES:
        text = (root / "out" / "report" / name).read_text()
        assert "\x1b" not in text
        assert "u001b" not in text
        assert "preview failed" in text
    assert "\x1b[1mbold" not in shown(console)


def test_a_report_that_is_cut_off_leaves_no_older_one(root: Path, console: Console) -> None:
    good = {"host": HOST, "dev": (0, lines(PASS, COMPLETE))}
    assert written(root, Recorder(root, good), console) == 0
    with pytest.raises(KeyError):
        written(root, Recorder(root, {"host": HOST}), console)
    assert list((root / "out" / "report").iterdir()) == []


def test_a_folder_that_cannot_be_written_names_the_option(root: Path, console: Console) -> None:
    (root / "out").write_text("a file in the way")
    with pytest.raises(PulumiError, match=r"cannot be written.*--output"):
        written(root, Recorder(root, {}), console)
