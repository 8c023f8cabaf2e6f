"""Writes docs/policies.md and policies/config.schema.json from the rules, with examples from their fixtures.
`make policy-docs` runs it; a test fails when what is committed is not what it would write."""

import json
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from policies.registry import FAMILIES, RULES
from policies.rule import ADVISED, ENVIRONMENTS, EVERYWHERE, Rule
from policies.server import config_schema
from tests.policies.fixtures import FAIL, FIXTURES, PASS, Case
from tests.policies.harness import SECRET, Given, container, network, run, volume

CHECKOUT = Path(__file__).parents[2]
DOCUMENT = CHECKOUT / "docs" / "policies.md"
SCHEMA = CHECKOUT / "policies" / "config.schema.json"

HEAD = """# Policies

Written by `make policy-docs` from the rules in `policies/` and their fixtures in `tests/policies/fixtures/`: each
example below is a test. {count} rules in {families} families; references are to the CIS Docker Benchmark 1.6.0, to the
Kubernetes Pod Security Standards (PSS), or to the path that a rule closes.

A rule is judged on each resource before it is created, also with `--skip-preview`, and where it needs the whole stack,
at the end of the preview. What is not known at preview is a violation, unless it follows from what it was made of.

**Exempting.** A rule with *exemptable* below is exempted for a service, network or volume in its Compose file; for the
ledger in `bulkhead:exempt`, with `environment` beside. All other rules accept none.
```yaml
services:
  web:
    x-bulkhead:
      exempt:
        - {{rule: non-root, reason: the image opens port 80 as root, owner: ann@example.com, expires: 2027-01-31}}
```
An exemption that has expired, or that a rule does not accept, is a violation itself. `make report` lists all that hold.

**Configuring.** Levels and options are set in `policy-config.json` (or the file that `POLICY_CONFIG` names), which is
checked against [config.schema.json](../policies/config.schema.json) before anything runs; the pack refuses misspelt
names too when it is used with `pulumi --policy-pack-config`. Rules that accept no exemption cannot be relaxed.
```json
{{"image-latest": "mandatory", "graceful-stop": {{"drain": 30}}, "non-root": {{"advisoryTiers": []}}}}
```

**Not decided.** The engine shows no policy a resource that is only read (`Network.get`, `StackReference`): a value made
from one is unknown, and so refused; a reference to another stack is seen only where something is made from it, by the
name that the program gives it. It shows none of `retain_on_delete` either. Of an image, only its name is known: what
user, health check or programs it brings is not. Links that somebody made on the host are not seen.
"""


def document() -> str:
    """The text of docs/policies.md."""
    return "\n".join([HEAD.format(count=len(RULES), families=len(FAMILIES)), *_index(), *map(_section, RULES)])


def schema() -> str:
    """The text of policies/config.schema.json."""
    return json.dumps(config_schema(RULES), indent=2) + "\n"


def _index() -> Iterator[str]:
    yield "| rule | family | what must hold | level | exemptable |\n|---|---|---|---|---|"
    for rule in RULES:
        exemptable = "no" if rule.headline else _tiers(rule.exemptable)
        yield f"| [{rule.id}](#{rule.id}) | {rule.family} | {rule.title} | {_level(rule)} | {exemptable} |"
    yield ""


def _level(rule: Rule) -> str:
    advised = rule.defaults.get(ADVISED) or []
    levels = "advisory" if set(advised) >= ENVIRONMENTS else f"mandatory ({_tiers(rule.tiers)})"
    if advised and set(advised) < ENVIRONMENTS:
        levels = f"mandatory, advisory in {_tiers(advised)}"
    return f"corrected by itself, else {levels}" if rule.remedy else levels


def _tiers(tiers: Any) -> str:
    return "everywhere" if set(tiers) == EVERYWHERE else ", ".join(sorted(map(str, tiers)))


def _section(rule: Rule) -> str:
    fails = next(case for case in FIXTURES[rule.id] if case.kind == FAIL and case.violates)
    passes = next(case for case in FIXTURES[rule.id] if case.kind == PASS)
    options = [
        f"- `{name}` (default `{json.dumps(option.default)}`): {option.schema.get('description', '')}"
        for name, option in rule.options.items()
    ]
    return "\n".join(
        [
            f"## {rule.id}",
            f"{rule.title[:1].upper()}{rule.title[1:]}. {' '.join((rule.check.__doc__ or '').split())}",
            "",
            f"*{rule.family}; {_level(rule)}; {'; '.join(rule.references)}*",
            *(["", *options] if options else []),
            "",
            f"Fails, in {fails.stack} ({fails.says}):",
            _example(fails),
            "What it says, and how to fix it:",
            f"```text\n{_said(rule, fails)}\n```",
            f"Passes, in {passes.stack} ({passes.says}):",
            _example(passes),
        ]
    )


def _example(case: Case) -> str:
    """What the case changes, as YAML: properties of resources, or the ledger."""
    shown = {one.name: _changes(one, case.stack) for one in case.resources}
    text = yaml.safe_dump(shown, sort_keys=False, width=100, allow_unicode=True) if any(shown.values()) else ""
    if not case.resources:
        text = case.ledger.strip() + "\n"
    text = text.replace(SECRET, "…")  # in tests a value that no message may show
    return f"```yaml\n{text or '{}  # the minimal valid resource' + chr(10)}```"


def _changes(one: Given, stack: str) -> dict[str, Any]:
    """The properties in which a resource differs from the minimal valid one."""
    for plain in (container(stack), network(stack), volume(stack)):
        if one.type == plain.type:
            gone = {key: "(not set)" for key in plain.props if key not in one.props}
            return {key: value for key, value in one.props.items() if plain.props.get(key) != value} | gone
    return {"type": one.type, **one.props}


def _said(rule: Rule, case: Case) -> str:
    with tempfile.TemporaryDirectory() as folder:
        ledger = Path(folder) / "Pulumi.host.yaml"
        ledger.write_text(case.ledger)
        found = run(case.stack, case.resources, ledger, [rule])
    return "\n".join(dict.fromkeys(one.message.partition("\n")[2] for one in found))


def main() -> int:
    DOCUMENT.write_text(document())
    SCHEMA.write_text(schema())
    print(f"Written: {DOCUMENT.relative_to(CHECKOUT)}, {SCHEMA.relative_to(CHECKOUT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
