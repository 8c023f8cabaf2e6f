"""Every rule against every kind of fixture, and against the pack without it.
A rule that has no fixture of a kind fails here, and so does a fixture that another rule answers."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from policies.registry import RULES
from policies.world import STACK, Resource, World, fields
from policies.world import UNKNOWN as UNDECIDED
from settings.ledger import Budget
from tests.policies.fixtures import DERIVED, FAIL, FIXTURES, WRITTEN, Case
from tests.policies.harness import LEDGER, SECRET, Given, Violation, run, secret

IDS = [rule.id for rule in RULES]


def derived(case: Case) -> Iterator[Case]:
    """The same case in the ways that must change nothing."""
    yield replace(case, kind="secret", resources=tuple(map(in_secret, case.resources)))
    yield replace(case, kind="permuted order", resources=tuple(map(backwards, reversed(case.resources))), value="")
    yield replace(
        case,
        kind="child of a component",
        resources=tuple(replace(one, parent="urn:pulumi:dev::bulkhead::x:y:Z::parent") for one in case.resources),
    )


def in_secret(one: Given) -> Given:
    """Every property is a secret, as is everything made from one."""
    return replace(one, props={key: secret(value) for key, value in one.props.items()})


def backwards(one: Given) -> Given:
    """Properties and lists in the opposite order."""
    return replace(one, props=dict(reversed([(key, reverse(value)) for key, value in one.props.items()])))


def reverse(value: Any) -> Any:
    return value[::-1] if isinstance(value, list) else value


CASES = [
    (rule_id, case) for rule_id, cases in FIXTURES.items() for written in cases for case in (written, *derived(written))
]


def titled(cases: list[tuple[str, Case]]) -> pytest.MarkDecorator:
    """Test parameters that are named in the fixtures' own words."""
    return pytest.mark.parametrize(
        ("rule_id", "case"), [pytest.param(*one, id=f"{one[0]}: {one[1].kind}: {one[1].says}") for one in cases]
    )


every_case = titled(CASES)
every_broken_case = titled([one for one in CASES if one[1].violates])


def judged(case: Case, folder: Path, without: str = "") -> list[Violation]:
    ledger = folder / "Pulumi.host.yaml"
    ledger.write_text(case.ledger)
    return run(case.stack, case.resources, ledger, [rule for rule in RULES if rule.id != without])


@pytest.mark.parametrize("rule_id", IDS)
def test_every_rule_has_fixtures_of_every_kind(rule_id: str) -> None:
    cases = FIXTURES.get(rule_id, ())
    assert {case.kind for case in cases} == WRITTEN
    assert {case.kind for written in cases for case in derived(written)} == DERIVED
    assert any(case.violates for case in cases if case.kind == FAIL)


def test_every_fixture_is_of_a_rule_and_no_id_is_taken_twice() -> None:
    assert sorted(FIXTURES) == sorted(set(IDS)) == sorted(IDS)


@every_case
def test_verdict(rule_id: str, case: Case, tmp_path: Path) -> None:
    found = [one for one in judged(case, tmp_path) if one.rule not in case.also]
    assert {one.rule for one in found} == ({rule_id} if case.violates else set())
    assert len(found) == len(set(found)), "said twice: alone and with the whole stack"
    assert {one.resource for one in found if one.rule == rule_id} == case.violates


@every_broken_case
def test_without_the_rule_nothing_objects(rule_id: str, case: Case, tmp_path: Path) -> None:
    assert {one.rule for one in judged(case, tmp_path, without=rule_id)} == case.also


@every_broken_case
def test_message_names_resource_value_consequence_and_fix(rule_id: str, case: Case, tmp_path: Path) -> None:
    for violation in judged(case, tmp_path):
        title, _, line = violation.message.partition("\n")
        assert title == next(rule.title for rule in RULES if rule.id == violation.rule)
        assert line.startswith(f"{violation.resource} (")
        what, _, fix = line.partition(". Fix: ")
        assert len(what.rsplit(": ", 1)[1]) > len("and that is why")
        assert fix.rstrip(".")
        assert "\n" not in line
        assert SECRET not in violation.message
    assert case.value in "\n".join(one.message for one in judged(case, tmp_path) if one.rule == rule_id)


@pytest.mark.parametrize("rule", RULES, ids=IDS)
def test_rule_says_where_it_comes_from_and_the_headline_has_no_exemption(rule: Any) -> None:
    assert rule.references
    assert rule.family in {"reservation", "reach", "hardening", "escape"}
    assert not rule.exemptable


@pytest.mark.parametrize("without", ["", "own-slice", "network-reach"])
def test_without_a_ledger_every_resource_is_refused_once(without: str, tmp_path: Path) -> None:
    case = next(case for case in FIXTURES["own-names"] if case.kind == "pass")
    found = judged(replace(case, ledger="config: ["), tmp_path, without=without)
    assert sorted(one.resource for one in found) == ["api", "backend", "bulkhead-dev", "data"]


def test_a_rule_that_fails_is_a_violation_without_the_error_s_text(tmp_path: Path) -> None:
    def broken(*_: object) -> Iterator[Any]:
        raise ValueError(SECRET)
        yield

    rule = next(rule for rule in RULES if rule.id == "privileged")
    ledger = tmp_path / "Pulumi.host.yaml"
    case = next(case for case in FIXTURES["privileged"] if case.kind == "pass")
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
    ledger = World.of(file).ledger
    prod = ledger.environments["prod"].model_copy(update={"reservations": reservations})
    world = World(lambda: ledger.model_copy(update={"environments": {**ledger.environments, "prod": prod}}))
    rule = next(rule for rule in RULES if rule.id == "protected-reservation")
    stack = Resource(STACK, "bulkhead-host", "urn:pulumi:host::bulkhead::pulumi:pulumi:Stack::bulkhead-host", {})
    assert ["prod.reservations" in message for message in rule.alone(stack, world)] == [True]
