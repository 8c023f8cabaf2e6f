"""Every rule against every kind of fixture, and against the pack without it.
A rule that has no fixture of a kind fails here, and so does a fixture that another rule answers."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from policies.registry import BY_ID, RULES
from policies.rule import ADVISED, ENVIRONMENTS, Level, Rule, Setting
from policies.server import Server
from policies.wire import UNKNOWN as UNDECIDED
from policies.world import CONTAINER, STACK, Resource, World, fields
from settings.ledger import Budget
from tests.policies.fixtures import CONFIG, FAIL, FIXTURES, PASS, WRITTEN, Case
from tests.policies.harness import (
    LEDGER,
    SECRET,
    TIERS,
    UNKNOWN,
    Given,
    Violation,
    as_input,
    attachable,
    component,
    container,
    network,
    run,
    secret,
)
from tests.policies.harness import urn as harness_urn

IDS = [rule.id for rule in RULES]
HEADLINE = {
    "protected-reservation",
    "own-slice",
    "protected-cpu-quota",
    "network-reach",
    "namespace-reach",
    "volume-reach",
    "engine-data",
    "engine-socket",
    "own-names",
    "own-subnet",
    "network-driver",
    "network-options",
    "address-reach",
    "image-owner",
    "build-reach",
    "engine-work",
    "real-time",
    "foreign-files",
    "refresh-masked",
    "stack-reference",
    "privileged",
    "unsupported-resource",
    "engine-command",
    "best-effort-command",
    "one-docker-host",
    "own-labels",
    "exemption",
}
"""Rules without which an environment is not kept apart: nobody can exempt them."""

DERIVED = frozenset(
    {
        "secret",
        "permuted order",
        "child of a component",
        "Output name",
        "replaced resource",
        "config override",
        "exemption valid",
        "exemption expired",
    }
)


def derived(case: Case) -> Iterator[Case]:
    """The same case in the ways that must change nothing, and in those that must change it in a known way."""
    yield replace(case, kind="secret", resources=tuple(map(in_secret, case.resources)))
    yield replace(case, kind="permuted order", resources=tuple(map(backwards, reversed(case.resources))), value="")
    yield replace(
        case,
        kind="child of a component",
        resources=(component("Outer", "outer"), *below("outer", case.resources)),
    )
    yield replace(case, kind="Output name", resources=by_output(case.stack, case.resources))
    yield replace(case, kind="replaced resource", twice=tuple(map(all_unknown, case.resources)))


def in_secret(one: Given) -> Given:
    """Every property is a secret, as is everything made from one."""
    if one.type.startswith("bulkhead:"):
        return one  # inputs of components are written in the program
    return replace(one, props={key: secret(value) for key, value in one.props.items()})


def backwards(one: Given) -> Given:
    """Properties and lists in the opposite order."""
    return replace(one, props=dict(reversed([(key, reverse(value)) for key, value in one.props.items()])))


def reverse(value: Any) -> Any:
    return value[::-1] if isinstance(value, list) else value


def below(parent: str, resources: Sequence[Given]) -> tuple[Given, ...]:
    """The resources as children of a component: those that have no parent yet, or whose parent is not there."""
    there = {one.name for one in resources}
    return tuple(one if one.parent in there else replace(one, parent=parent) for one in resources)


def by_output(stack: str, resources: Sequence[Given]) -> tuple[Given, ...]:
    """The usual network of every container is an Output of a network that the stack makes, not a name."""
    if not any(attachable(one, stack) for one in resources):
        return tuple(resources)
    made = replace(network(stack), name="made-first")
    return (
        *(
            replace(
                one,
                props={**one.props, "networksAdvanced": [{"name": UNKNOWN}]},
                after={**one.after, "networksAdvanced": [made.name]},
            )
            if attachable(one, stack)
            else one
            for one in resources
        ),
        made,
    )


def all_unknown(one: Given) -> Given:
    """An earlier version of a resource, of which nothing was known yet."""
    return replace(one, props=dict.fromkeys(one.props, UNKNOWN))


CASES = [
    (rule_id, case) for rule_id, cases in FIXTURES.items() for written in cases for case in (written, *derived(written))
]
BROKEN = [(rule_id, case) for rule_id, cases in FIXTURES.items() for case in cases if case.violates]


def titled(cases: Sequence[tuple[str, Case]]) -> pytest.MarkDecorator:
    """Test parameters that are named in the fixtures' own words."""
    return pytest.mark.parametrize(
        ("rule_id", "case"), [pytest.param(*one, id=f"{one[0]}: {one[1].kind}: {one[1].says}") for one in cases]
    )


@cache
def rules_without(without: str) -> tuple[Rule, ...]:
    return tuple(rule for rule in RULES if rule.id != without)


def judged(case: Case, folder: Path, rule_id: str = "", without: str = "", **options: Any) -> list[Violation]:
    """What the pack says to a case: `rule_id` is the rule that its options are of."""
    ledger = folder / "Pulumi.host.yaml"
    ledger.write_text(case.ledger)
    resources = tuple(located(one, folder) for one in case.resources)
    settings = options.pop("settings", {}) or setting_of(rule_id, case)
    twice = tuple(located(one, folder) for one in case.twice)
    found = run(case.stack, resources, ledger, rules_without(without), settings, twice=twice, **options)
    # What other rules advise beside it is not what the case is about.
    return [one for one in found if one.rule == rule_id or one.level == "mandatory"]


def setting_of(rule_id: str, case: Case) -> dict[str, Setting]:
    rule = BY_ID.get(rule_id)
    return {rule_id: Setting(rule.level, case.options)} if rule and case.options else {}


def located(one: Given, folder: Path) -> Given:
    """The resource with `{checkout}` in its values as the folder of the ledger."""
    if "{checkout}" not in json.dumps(dict(one.props)):
        return one
    return replace(one, props=json.loads(json.dumps(dict(one.props)).replace("{checkout}", str(folder))))


@pytest.mark.parametrize("rule_id", IDS)
def test_every_rule_has_fixtures_of_every_kind(rule_id: str) -> None:
    cases = FIXTURES.get(rule_id, ())
    options = BY_ID[rule_id].options.keys() - {ADVISED}
    wanted = WRITTEN | ({CONFIG} if options else set())
    assert {case.kind for case in cases} >= wanted
    assert {name for case in cases if case.kind == CONFIG for name in case.options} >= options
    # The last three kinds are tests of their own below, over every broken case.
    shown = {case.kind for written in cases for case in derived(written)}
    assert shown | {"config override", "exemption valid", "exemption expired"} == DERIVED
    assert any(case.violates for case in cases if case.kind == FAIL)
    assert any(not case.violates for case in cases if case.kind == PASS)


def test_every_fixture_is_of_a_rule_and_no_id_is_taken_twice() -> None:
    assert sorted(FIXTURES) == sorted(set(IDS)) == sorted(IDS)


@titled(CASES)
def test_verdict(rule_id: str, case: Case, tmp_path: Path) -> None:
    found = [one for one in judged(case, tmp_path, rule_id) if one.rule not in case.also - {rule_id}]
    assert {one.rule for one in found} == ({rule_id} if case.violates else set())
    assert len(found) == len(set(found)), "said twice: alone and with the whole stack"
    assert {one.resource for one in found if one.rule == rule_id} == case.violates
    assert {one.level for one in found} <= {"advisory" if case.advice else "mandatory"}


@titled(BROKEN)
def test_without_the_rule_nothing_objects(rule_id: str, case: Case, tmp_path: Path) -> None:
    assert {one.rule for one in judged(case, tmp_path, without=rule_id)} == case.also - {rule_id}


@titled(BROKEN)
def test_message_names_resource_value_consequence_and_fix(rule_id: str, case: Case, tmp_path: Path) -> None:
    found = judged(case, tmp_path, rule_id)
    for violation in found:
        title, _, line = violation.message.partition("\n")
        assert title == BY_ID[violation.rule].title
        assert line.startswith(f"{violation.resource} (")
        what, _, fix = line.partition(". Fix: ")
        assert len(what.rsplit(": ", 1)[1]) > len("and that is why")
        assert fix.rstrip(".")
        assert "\n" not in line
        assert SECRET not in violation.message
    assert case.value in "\n".join(one.message for one in found if one.rule == rule_id)


@titled(BROKEN)
def test_config_override(rule_id: str, case: Case, tmp_path: Path) -> None:
    rule = BY_ID[rule_id]

    def said(level: Level, **options: Any) -> set[str]:
        settings = {rule_id: Setting(level, {**case.options, **options})}
        return {one.level for one in judged(case, tmp_path, rule_id, settings=settings) if one.rule == rule_id}

    if rule.headline:
        assert said(Level.ADVISORY) == {"mandatory"}
    else:
        assert said(Level.ADVISORY) == {"advisory"}
        assert said(Level.DISABLED) == set()
        assert said(Level.MANDATORY, **{ADVISED: []}) == {"mandatory"}
        tier = TIERS.get(case.stack, "host")
        if tier in ENVIRONMENTS:
            assert said(Level.MANDATORY, **{ADVISED: [tier]}) == {"advisory"}


def exempted(rule_id: str, case: Case, expires: str) -> Case:
    """The case with an exemption of all that violates."""
    written = {"rule": rule_id, "reason": "the fixture asks for it, for a while", "owner": "ann", "expires": expires}
    if case.violates == {f"bulkhead-{case.stack}"}:
        # the environments that the fixtures take something from
        entries = [json.dumps({**written, "environment": name}) for name in ("prod", "old", "")]
        text = f"{case.ledger.rstrip()}\n  bulkhead:exempt: [{', '.join(entries)}]\n"
        return replace(case, ledger=text)
    return replace(
        case,
        resources=(component("Service", "exempted", exempt=[written]), *below("exempted", case.resources)),
    )


def accepts(rule: Rule, case: Case) -> bool:
    return TIERS.get(case.stack, "host") in rule.exemptable


@titled([one for one in BROKEN if one[0] != "exemption"])
def test_exemption_valid(rule_id: str, case: Case, tmp_path: Path) -> None:
    found = judged(exempted(rule_id, case, "2026-12-31"), tmp_path, rule_id)
    mine = [one for one in found if one.rule == rule_id]
    if accepts(BY_ID[rule_id], case):
        assert not mine
        assert "exemption" not in {one.rule for one in found}
    elif "Pulumi.host.yaml" not in case.value:  # a ledger that cannot be read has no exemptions either
        assert {one.resource for one in mine} == case.violates
        assert case.violates == {f"bulkhead-{case.stack}"} or "exemption" in {one.rule for one in found}


@titled([one for one in BROKEN if one[0] != "exemption"])
def test_exemption_expired(rule_id: str, case: Case, tmp_path: Path) -> None:
    found = judged(exempted(rule_id, case, "2026-06-14"), tmp_path, rule_id)
    mine = [one for one in found if one.rule == rule_id]
    assert {one.resource for one in mine} == case.violates
    if accepts(BY_ID[rule_id], case):
        assert all("expired on 2026-06-14" in one.message for one in mine)


@pytest.mark.parametrize("rule", RULES, ids=IDS)
def test_rule_says_where_it_comes_from_and_the_headline_has_no_exemption(rule: Rule) -> None:
    assert rule.references
    assert rule.check.__doc__
    assert rule.family in {"reservation", "reach", "hardening", "availability", "escape"}
    assert rule.headline is (rule.id in HEADLINE)


ONLY_PROTECTED = {
    "protected-cpu-quota",
    "service-reservations",
    "rollout-fits",
    "gateway-ports",
    "restart-policy",
    "graceful-stop",
    "image-digest",
    "volume-protected",
    "volume-backup",
    "backup-verified",
}
ONLY_BEST_EFFORT = {"public-ports", "best-effort-command", "build-reach", "engine-work", "real-time"}
NOT_THE_HOST = {
    "service-fits",
    "refresh-masked",
    "stack-reference",
    "drop-all-capabilities",
    "no-new-privileges",
    "non-root",
    "read-only-root",
    "memory-limit",
    "privileged-ports",
    "ulimits",
    "sshd",
    "secret-variables",
    "init",
    "healthcheck",
    "image-latest",
    "unsupported-resource",
    "engine-command",
    "own-labels",
}
"""The host's own containers are the system's: they are judged by what would let one out of it."""


@pytest.mark.parametrize("rule", RULES, ids=IDS)
def test_a_rule_applies_in_these_tiers_and_no_others(rule: Rule, tmp_path: Path) -> None:
    tiers = {"protected", "best-effort", "host"}
    if rule.id in ONLY_PROTECTED | ONLY_BEST_EFFORT | NOT_THE_HOST:
        tiers -= {"host"}
    if rule.id in ONLY_PROTECTED:
        tiers -= {"best-effort"}
    if rule.id in ONLY_BEST_EFFORT:
        tiers -= {"protected"}
    assert set(map(str, rule.tiers)) == tiers


@pytest.mark.parametrize("rule", [rule for rule in RULES if rule.remedy], ids=lambda rule: rule.id)
def test_remedy_sets_what_is_not_set_and_leaves_what_somebody_chose(rule: Rule, tmp_path: Path) -> None:
    unset: dict[str, Any] = {"capabilities": None, "securityOpts": None, "logOpts": None, "init": None}
    chosen: Mapping[str, dict[str, Any]] = {
        "net-raw": {"capabilities": {"adds": ["NET_RAW"], "drops": []}},
        "no-new-privileges": {"securityOpts": ["no-new-privileges:false"]},
        "log-rotation": {"logDriver": "vieux/x"},
        "init": {"init": False},
    }
    ledger = tmp_path / "Pulumi.host.yaml"
    ledger.write_text(LEDGER)
    case = next(case for case in FIXTURES[rule.id] if case.kind == PASS and case.resources[0].type == CONTAINER)
    plain = case.resources[0]
    remedied = run(case.stack, [plain.but(**unset)], ledger, [rule], remedy=True)
    assert remedied == []
    left = plain.but(**chosen[rule.id])
    assert {one.rule for one in run(case.stack, [left], ledger, [rule], remedy=True)} == (
        {rule.id} if rule.id != "init" else set()
    )
    server: Any = Server([rule], World.of(ledger))
    assert not server.Remediate(as_input(left, {left.name: harness_urn(case.stack, left)}), None).remediations
    for before, after in REMEDIED.get(rule.id, ()):
        assert rule.remedy
        assert rule.remedy(Resource(CONTAINER, "api", "", before, provider={})) == after


REMEDIED: Mapping[str, Sequence[tuple[Mapping[str, Any], Mapping[str, Any] | None]]] = {
    "net-raw": (
        ({}, {"capabilities": {"drops": ["CAP_NET_RAW"]}}),
        (
            {"capabilities": {"adds": ["CHOWN"], "drops": ["MKNOD"]}},
            {"capabilities": {"adds": ["CHOWN"], "drops": ["CAP_NET_RAW", "MKNOD"]}},
        ),
        ({"capabilities": [{"drops": ["MKNOD"]}]}, None),
    ),
    "no-new-privileges": (
        ({"securityOpts": ["label=level:s0"]}, {"securityOpts": ["label=level:s0", "no-new-privileges:true"]}),
    ),
    "log-rotation": (
        ({}, {"logOpts": {"max-size": "10m", "max-file": "3"}}),
        ({"logDriver": ""}, {"logOpts": {"max-size": "10m", "max-file": "3"}}),
        (
            {"logDriver": "json-file", "logOpts": {"max-file": "5", "tag": "x"}},
            {"logOpts": {"max-size": "10m", "max-file": "5", "tag": "x"}},
        ),
        ({"logDriver": "syslog"}, None),
        ({"logOpts": [{"max-file": "5"}]}, None),
    ),
}
"""Properties of a container before, and what the remedy sets; None where it leaves it to somebody."""


def test_remedies_keep_unknowns_and_secrets_as_they_are(tmp_path: Path) -> None:
    ledger = tmp_path / "Pulumi.host.yaml"
    ledger.write_text(LEDGER)
    one = container(
        "dev",
        init=None,
        logOpts=None,
        securityOpts=None,
        envs=secret([SECRET, UNKNOWN]),
        capabilities={"drops": ["MKNOD"], "adds": [UNKNOWN]},
    )
    request = as_input(one, {one.name: "urn:pulumi:dev::bulkhead::docker:index/container:Container::api"})
    server: Any = Server(RULES, World.of(ledger))
    remediations = server.Remediate(request, None).remediations
    assert [found.policyName for found in remediations] == ["net-raw", "no-new-privileges", "init", "log-rotation"]
    last = remediations[-1].properties
    assert last["envs"] == request.properties["envs"]
    assert last["init"] is True
    assert dict(last["logOpts"]) == {"max-size": "10m", "max-file": "3"}
    assert list(last["securityOpts"]) == ["no-new-privileges:true"]
    assert list(last["capabilities"]["drops"]) == ["CAP_NET_RAW", "MKNOD"]


def test_a_remedy_writes_no_secret_anew(tmp_path: Path) -> None:
    ledger = tmp_path / "Pulumi.host.yaml"
    ledger.write_text(LEDGER)
    one = container("dev", logOpts={"tag": secret(SECRET)}, securityOpts=secret([]))
    request = as_input(one, {one.name: "urn:pulumi:dev::bulkhead::docker:index/container:Container::api"})
    server: Any = Server(RULES, World.of(ledger))
    assert not server.Remediate(request, None).remediations


@pytest.mark.parametrize("without", ["", "own-slice"])
def test_without_a_ledger_every_resource_is_refused_once(without: str, tmp_path: Path) -> None:
    case = next(case for case in FIXTURES["own-names"] if case.kind == PASS)
    found = judged(replace(case, ledger="config: ["), tmp_path, without=without)
    assert {one.resource for one in found} >= {"api", "backend", "bulkhead-dev", "data"}
    assert len({one.resource for one in found}) == len(found)
    assert {one.level for one in found} == {"mandatory"}


def test_a_rule_that_fails_is_a_violation_without_the_error_s_text(tmp_path: Path) -> None:
    def broken(*_: object) -> Iterator[Any]:
        raise ValueError(SECRET)
        yield

    rule = BY_ID["privileged"]
    ledger = tmp_path / "Pulumi.host.yaml"
    case = next(case for case in FIXTURES["privileged"] if case.kind == PASS)
    ledger.write_text(case.ledger)
    found = run(case.stack, case.resources, ledger, [replace(rule, check=broken)])
    assert [one.rule for one in found] == ["privileged"]
    assert "ValueError" in found[0].message
    assert SECRET not in found[0].message


def test_a_block_where_a_value_belongs_is_not_read_as_one() -> None:
    assert [one.value for one in fields({"name": {"a": "b"}}, "name")] == [UNDECIDED]


@pytest.mark.parametrize("reservations", [None, Budget(cpus=4.0), Budget(memory=2**30), Budget(cpus=0.0, memory=0)])
def test_a_protected_environment_without_reservations_is_found_whoever_read_the_ledger(
    reservations: Budget | None, tmp_path: Path
) -> None:
    file = tmp_path / "Pulumi.host.yaml"
    file.write_text(LEDGER)
    world = World.of(file)
    prod = world.ledger.environments["prod"].model_copy(update={"reservations": reservations})
    changed = world.ledger.model_copy(update={"environments": {**world.ledger.environments, "prod": prod}})
    world.__dict__["ledger"] = changed
    stack = Resource(STACK, "bulkhead-host", "urn:pulumi:host::bulkhead::pulumi:pulumi:Stack::bulkhead-host", {})
    verdicts = BY_ID["protected-reservation"].alone(stack, world)
    assert ["prod.reservations" in verdict.message for verdict in verdicts] == [True]


def test_every_input_of_what_makes_containers_is_read_by_a_rule_or_known_to_be_harmless() -> None:
    resources = json.loads((Path(__file__).parents[2] / "engine/docker/testdata/pulumi_docker-5.2.0.json").read_text())
    inputs: Mapping[str, list[str]] = {name: list(paths) for name, paths in resources["resources"].items()}
    for name, kind in {"Container": CONTAINER}.items():
        top = {path.partition(".")[0] for path in inputs[name]}
        read = {word for rule in RULES for pattern in rule.reads.get(kind, ()) for word in [pattern.partition(".")[0]]}
        assert top - read - READ_AS_A_WHOLE - HARMLESS.keys() == set()
        assert not HARMLESS.keys() & read


READ_AS_A_WHOLE = {"capabilities", "securityOpts", "healthcheck", "stopTimeout", "destroyGraceSeconds", "logDriver"} | {
    "logOpts",
    "labels",
    "mustRun",
    "start",
    "cpuShares",
    "memoryReservation",
}
"""Read by rules that judge a container as a whole."""

HARMLESS = {
    "attach": "the deploy waits for its end",
    "containerReadRefreshTimeoutMilliseconds": "how long the provider waits",
    "cpuPeriod": "limits nothing without a quota",
    "deviceReadBps": "a ceiling",
    "deviceReadIops": "a ceiling",
    "deviceWriteBps": "a ceiling",
    "deviceWriteIops": "a ceiling",
    "dnsOpts": "the resolver's options, without an address",
    "dnsSearches": "suffixes of names",
    "domainname": "its own name",
    "groupAdds": "of its own user; files of the host are not mounted",
    "hostname": "its own name",
    "logs": "the provider keeps them",
    "maxRetryCount": "how often it is started again",
    "memorySwap": "the slice has its own ceiling",
    "platform": "which image is taken",
    "removeVolumes": "its anonymous ones",
    "rm": "removed when it ends",
    "shmSize": "counted as its memory",
    "stdinOpen": "its own input",
    "stopSignal": "to its own process",
    "storageOpts": "a ceiling of its own layer",
    "tmpfs": "counted as its memory",
    "tty": "its own terminal",
    "wait": "the deploy waits",
    "waitTimeout": "how long",
    "workingDir": "within it",
}
"""Inputs of a container that no rule reads, and why none needs to."""


@pytest.mark.parametrize(
    ("told", "warned"),
    [
        *((None, False), ("", False), ("{}", True), ("not JSON", True), ("[]", True), ('{"prod-data": "x"}', True)),
        ('{"prod-data": {"last_verified": "x"}}', True),
        ('{"prod-data": {"last_success": 4102444800, "last_verified": null}}', True),
        ('{"prod-data": {"last_verified": 4102444800}}', False),
    ],
    ids=[
        *("nobody asked", "nothing was answered", "nothing is known", "no JSON", "no object", "nothing of the volume"),
        *("no time", "backed up only", "verified"),
    ],
)
def test_without_an_answer_of_the_host_nothing_is_said_and_a_broken_one_is_a_warning(
    told: str | None, warned: bool, tmp_path: Path
) -> None:
    ledger = tmp_path / "Pulumi.host.yaml"
    ledger.write_text(LEDGER)
    server: Any = Server([BY_ID["backup-verified"]], World.of(ledger, told))
    job = component("BackupJob", "job", volume="prod-data")
    answer = server.Analyze(as_input(job, {"job": harness_urn("prod", job)}), None)
    assert bool(answer.diagnostics) is warned
