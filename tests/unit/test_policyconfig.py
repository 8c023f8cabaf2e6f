"""The policy config: which file counts, and every way in which it can be wrong, before Pulumi would let it pass.
One case per fault: a file in, the exact message out."""

import json
from pathlib import Path
from typing import Any

import pytest

from cli import deploy, policyconfig
from settings.errors import SettingsError

LEVELS = {"enum": ["advisory", "mandatory", "remediate", "disabled"]}


def rule(**options: Any) -> dict[str, Any]:
    """A rule's entry as the pack generates it."""
    known = {"enforcementLevel": LEVELS, **options}
    return {"anyOf": [LEVELS, {"type": "object", "properties": known, "additionalProperties": False}]}


SCHEMA = {
    "$schema": "https://json-schema.org/draft/2020-12/schema",
    "type": "object",
    "properties": {
        "all": {"enum": ["mandatory"]},
        "privileged": rule(),
        "memory-limit": rule(
            largest={"type": "integer", "minimum": 1, "description": "MiB that one container may have."},
            tiers={"type": "array", "items": {"enum": ["protected", "best-effort"]}},
        ),
    },
    "additionalProperties": False,
}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A checkout whose pack has a schema."""
    (tmp_path / "policies").mkdir()
    (tmp_path / "policies" / "config.schema.json").write_text(json.dumps(SCHEMA))
    return tmp_path


def written(root: Path, text: str) -> Path:
    file = root / "policy-config.json"
    file.write_text(text)
    return file


def message(root: Path, text: str) -> str:
    with pytest.raises(SettingsError) as caught:
        policyconfig.check(written(root, text), root / "policies")
    return str(caught.value)


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"all": "mandatory", "privileged": "advisory"},
        {"memory-limit": {"enforcementLevel": "disabled", "largest": 512, "tiers": ["protected"]}},
        {"memory-limit": {"largest": 1}},
    ],
)
def test_what_the_pack_knows_is_accepted(root: Path, config: dict[str, Any]) -> None:
    policyconfig.check(written(root, json.dumps(config)), root / "policies")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            '{\n  "priviledged": "off"\n}',
            "policy-config.json:2: priviledged: 'off': no such rule in the policy pack. Did you mean 'privileged'?",
        ),
        (
            '{\n  "memory-limit": {\n    "larges": 5\n  }\n}',
            "policy-config.json:3: memory-limit.larges: 5: memory-limit has no such property. Did you mean 'largest'?",
        ),
        (
            '{"memory-limit": {"largest": "512"}}',
            "policy-config.json:1: memory-limit.largest: '512': not of this type. Write a whole number. "
            "MiB that one container may have.",
        ),
        (
            '{"memory-limit": {"largest": 0}}',
            "policy-config.json:1: memory-limit.largest: 0: 0 is less than the minimum of 1. "
            "MiB that one container may have.",
        ),
        (
            '{"memory-limit": {"tiers": ["protected", "besteffort"]}}',
            "policy-config.json:1: memory-limit.tiers[1]: 'besteffort': not one of the allowed values. "
            "Did you mean 'best-effort'?",
        ),
        (
            '{"privileged": "mandatry"}',
            "policy-config.json:1: privileged: 'mandatry': not one of the allowed values. Did you mean 'mandatory'?",
        ),
        (
            '{"privileged": {"enforcementLevel": "mandatry"}}',
            "policy-config.json:1: privileged.enforcementLevel: 'mandatry': not one of the allowed values. "
            "Did you mean 'mandatory'?",
        ),
        (
            '{"all": "disabled"}',
            "policy-config.json:1: all: 'disabled': not one of the allowed values. Known: mandatory.",
        ),
        (
            '{"privileged": 3}',
            "policy-config.json:1: privileged: 3: not one of the allowed values. "
            "Known: advisory, disabled, mandatory, remediate.",
        ),
        (
            '["privileged"]',
            "policy-config.json: ['privileged']: not of this type. Write an object: {…}.",
        ),
        (
            '{\n  "privileged" "advisory"\n}',
            "policy-config.json:2: not valid JSON: Expecting ':' delimiter. Correct the line "
            "(commas, quotes and brackets are the usual causes; comments are not allowed).",
        ),
        (
            '{"all": "mandatory",\n "privileged": "mandatory",\n "privileged": "disabled"}',
            "policy-config.json:3: privileged: written twice in the same mapping. "
            "Keep one: YAML would silently take the last.",
        ),
    ],
)  # fmt: skip
def test_a_fault_is_named_with_its_place_and_remedy(root: Path, text: str, said: str) -> None:
    assert message(root, text) == said


def test_all_faults_are_said_at_once_in_the_order_of_the_file(root: Path) -> None:
    said = message(root, '{\n"memory-limit": {"largest": true},\n"nothing": "advisory",\n"all": "off"\n}')
    assert [line.split(": ")[:2] for line in said.splitlines()] == [
        ["policy-config.json:2", "memory-limit.largest"],
        ["policy-config.json:3", "nothing"],
        ["policy-config.json:4", "all"],
    ]


def test_tabs_are_allowed_as_json_allows_them(root: Path) -> None:
    assert message(root, '{\n\t"privilegd": "advisory"\n}').startswith("policy-config.json:2: privilegd: 'advisory'")


def test_a_pack_without_a_schema_takes_no_config(root: Path) -> None:
    (root / "policies" / "config.schema.json").unlink()
    assert "has no config.schema.json" in message(root, "{}")


# Which file counts.


def test_a_config_beside_the_pack_goes_with_it(root: Path) -> None:
    pack = ("--policy-pack", f"{root}/policies")
    assert deploy.policy_pack(root, {}) == pack
    file = written(root, "{}")
    assert deploy.policy_pack(root, {}) == (*pack, "--policy-pack-config", str(file))


def test_another_pack_comes_with_its_own_config_or_none(root: Path) -> None:
    written(root, '{"privileged": "disabled"}')
    base = root / "base" / "policies"
    base.mkdir(parents=True)
    pack = deploy.policy_pack(root, {"POLICY_PACK": str(base)})
    assert pack == ("--policy-pack", str(base))


def test_a_config_that_is_named_must_be_there_and_fit(root: Path) -> None:
    with pytest.raises(SettingsError, match=r"strict\.json: POLICY_CONFIG: No such file.*Correct the path"):
        deploy.policy_pack(root, {"POLICY_CONFIG": "strict.json"})
    (root / "strict.json").write_text('{"privileged": "mandatory"}')
    assert deploy.policy_pack(root, {"POLICY_CONFIG": "strict.json"})[-1] == f"{root}/strict.json"
    (root / "strict.json").write_text('{"privilege": "mandatory"}')
    with pytest.raises(SettingsError, match="Did you mean 'privileged'"):
        deploy.policy_pack(root, {"POLICY_CONFIG": "strict.json"})
