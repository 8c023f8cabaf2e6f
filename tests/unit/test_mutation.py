"""The mutation run itself: which changes it makes to a rule, that it reports what nothing notices, and that it
notices a rule that is gone."""

import ast
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from policies import hardening
from tests.mutation.__main__ import SURVIVED, Fixtures, Result, accounts, name_of, report, run, source_of
from tests.mutation.mutators import Mutant, mutants, without_alternatives
from tests.policies import test_rules

SAMPLE = '''
"""Text."""
KNOWN = frozenset({"a", "b"})

@rule(id="sample", title="no mutant here", references=("nor here",), reads={X: ("one", "two")}, tiers=EVERYWHERE)
def sample(field: Field, about: Subject) -> Iterator[Finding]:
    """Nor here."""
    shown = "with" if field.path == "x" else "without"
    if field.value > 3 and not about.own:
        yield Finding("no" if field.value else "mutants", f"{shown}", "here")

def helper(name: str) -> bool:
    return name in KNOWN or name.startswith("c")
'''


def of_sample() -> list[Mutant]:
    return list(mutants("sample", SAMPLE, ast.parse(SAMPLE)))


def changed(line: str) -> set[str]:
    """What becomes of a line of the sample."""
    return {one.after for one in of_sample() if one.before == line}


def test_what_is_made_of_a_condition() -> None:
    assert changed("if field.value > 3 and not about.own:") == {
        "if field.value > 3 or not about.own:",
        "if field.value > 3:",
        "if not about.own:",
        "if field.value <= 3 and not about.own:",
        "if field.value >= 3 and not about.own:",
        "if field.value > 4 and not about.own:",
        "if field.value > 2 and not about.own:",
        "if field.value > 3 and about.own:",
    }
    assert changed('return name in KNOWN or name.startswith("c")') == {
        "return name in KNOWN and name.startswith('c')",
        "return name in KNOWN",
        "return name.startswith('c')",
        'return name not in KNOWN or name.startswith("c")',
        "return name in KNOWN or not name.startswith('c')",
    }


def test_what_is_made_of_constants_and_of_the_rule_itself() -> None:
    assert changed('KNOWN = frozenset({"a", "b"})') == {"KNOWN = frozenset({'b'})", "KNOWN = frozenset({'a'})"}
    rule = {(one.original, one.mutated) for one in of_sample() if one.rule == "sample"}
    assert ("@rule sample", "pass") in rule
    assert ("('one', 'two')", "('one',)") in rule
    assert ("EVERYWHERE", "EVERYWHERE ^ {'host'}") in rule


def test_findings_are_dropped_and_texts_left_alone() -> None:
    assert [one.original[:13] for one in of_sample() if one.description == "statement dropped"] == ["yield Finding"]
    assert not [one for one in of_sample() if "mutant" in one.original and one.description != "statement dropped"]
    assert not [one for one in of_sample() if "field.path" in one.original]


def test_a_mutant_is_undone() -> None:
    tree = ast.parse(SAMPLE)
    before = ast.unparse(tree)
    for mutant in mutants("sample", SAMPLE, tree):
        mutant.apply()
        assert ast.unparse(tree) != before
        compile(ast.fix_missing_locations(tree), "sample", "exec")
        mutant.undo()
        assert ast.unparse(tree) == before


def test_alternatives_of_a_regular_expression() -> None:
    assert list(without_alternatives(r"a[|]\||b(?:c|d)e")) == [
        r"a[|]\||b(?:d)e",
        r"a[|]\||b(?:c)e",
        "b(?:c|d)e",
        r"a[|]\|",
    ]
    assert list(without_alternatives("abc")) == []


def test_a_survivor_is_reported_unless_it_is_accounted_for(capsys: pytest.CaptureFixture[str]) -> None:
    mutant = of_sample()[0]
    lives = [Result(mutant, SURVIVED)]
    assert len(report(lives, {}, whole=True)) == 1
    assert f"policies/sample.py:{mutant.line}: " in capsys.readouterr().out
    assert report(lives, {mutant.key: "for a reason"}, whole=True) == []
    dies = [Result(mutant, "a fixture")]
    assert report(dies, {}, whole=True) == []
    assert "no longer" in report(dies, {mutant.key: "for a reason"}, whole=True)[0]
    assert "no longer" in report([], {mutant.key: "for a reason"}, whole=True)[0]
    assert report([], {mutant.key: "for a reason"}, whole=False) == []


def test_an_account_needs_a_reason(tmp_path: Path) -> None:
    file = tmp_path / "survivors.toml"
    file.write_text("[[survivor]]\nmodule = 'm'\nfunction = 'f'\noriginal = 'a'\nmutated = 'b'\nreason = ' '\n")
    with pytest.raises(ValueError, match="without a reason"):
        accounts(file)
    file.write_text(file.read_text().replace("' '", "'equal'"))
    assert accounts(file) == {("m", "f", "a", "b"): "equal"}


def privileged() -> tuple[dict[str, Any], Mutant]:
    """The module that a rule is in, and the mutant without the rule."""
    tree = ast.parse(source_of(hardening))
    found = mutants(name_of(hardening), source_of(hardening), tree)
    gone = next(one for one in found if one.rule == "privileged" and one.description == "rule deleted")
    return {"hardening": (hardening, tree)}, gone


def test_a_deleted_rule_is_noticed_and_one_that_changes_nothing_survives(tmp_path: Path) -> None:
    trees, gone = privileged()
    check = Fixtures(tmp_path, [case for case in test_rules.CASES if case[0] == "privileged"])
    same = replace(gone, apply=lambda: None)
    noticed = {one.mutant is gone: one.noticed for one in run([gone, same], trees, check)}
    assert noticed[False] == SURVIVED
    assert noticed[True].startswith("privileged: ")


def test_a_mutant_that_fails_or_does_not_end_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.mutation.__main__.SECONDS", 0.2)
    trees, gone = privileged()

    def endless(_: Mutant) -> str:
        while True:
            pass

    def failing(_: Mutant) -> str:
        raise KeyError("x")

    assert [one.noticed for one in run([gone], trees, endless)] == ["it takes too long"]
    assert [one.noticed for one in run([gone], trees, failing)] == ["KeyError: 'x'"]
