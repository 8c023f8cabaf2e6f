"""The report in its four forms: text for people, JSON for programs, JUnit for test viewers, SARIF for code scanning.
Pure functions of what was judged; the same verdicts give the same bytes, so that reports can be compared."""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from importlib import metadata
from itertools import groupby
from pathlib import PurePosixPath
from typing import Any
from urllib.parse import quote
from xml.etree import ElementTree

from cli.verdicts import Finding, Judged, Kind, Level, Verdict, clean

NAME = "bulkhead"
SARIF_SCHEMA = "https://json.schemastore.org/sarif-2.1.0.json"
ROOT = "%SRCROOT%"
SARIF_LEVELS = {Level.MANDATORY: "error", Level.REMEDIATE: "error", Level.ADVISORY: "warning"}


def counts(of: Judged) -> dict[str, int]:
    """Verdicts of a stack by kind, advisory violations apart."""
    return {
        "violations": of.count(Kind.VIOLATION),
        "advisories": of.count(Kind.VIOLATION, advisory=True),
        "exempt": of.count(Kind.EXEMPT),
        "remediated": of.count(Kind.REMEDIATED),
        "passed": of.count(Kind.PASS),
    }


def label(verdict: Verdict) -> str:
    """`violation`, `advisory`, `exempt` or `remediated`."""
    advisory = verdict.verdict is Kind.VIOLATION and not verdict.stops
    return "advisory" if advisory else str(verdict.verdict)


def accepted(verdict: Verdict) -> str:
    """Why a violation is accepted, by whom and until when; empty without an exemption."""
    one = verdict.exemption
    return f"exempt until {one.expires} ({one.owner}): {one.reason}" if one else ""


# --- Text -----------------------------------------------------------------------------------------------------


def text(report: Sequence[Judged]) -> str:
    """For people: what is wrong first, what passed last."""
    return "\n".join(line for one in report for line in _stack(one))


def _stack(one: Judged) -> Iterator[str]:
    preview = one.preview
    changes = f" ({preview.changes})" if preview.changes else ""
    yield f"{preview.stack}: preview {preview.outcome}{changes}"
    yield f"  {', '.join(f'{name} {count}' for name, count in counts(one).items())}"
    yield from (f"  note: {line}" for line in one.note.splitlines())
    yield from (f"  failed: {line}" for line in one.failure.splitlines())
    yield ""
    for finding in one.findings:
        if finding.verdict.verdict is not Kind.PASS:
            yield from _paragraph(finding)
    passes = [finding.verdict for finding in one.findings if finding.verdict.verdict is Kind.PASS]
    for rule, verdicts in groupby(passes, key=lambda verdict: verdict.rule):
        yield f"  pass: {rule}: {', '.join(verdict.name for verdict in verdicts)}"
    yield from [""] if passes else []


def _paragraph(finding: Finding) -> Iterator[str]:
    verdict = finding.verdict
    references = f" [{'; '.join(verdict.references)}]" if verdict.references else ""
    yield f"  {label(verdict)}: {verdict.rule}: {verdict.title}{references}"
    yield f"    {finding.file}:{finding.line}"
    yield from (f"    {line}" for line in [*verdict.text.splitlines(), accepted(verdict)] if line)
    yield ""


# --- JSON -----------------------------------------------------------------------------------------------------


def as_json(report: Sequence[Judged]) -> str:
    """For programs: every verdict as the pack gave it, with file and line."""
    return _dumped({"passed": all(one.passed for one in report), "stacks": [_stack_object(one) for one in report]})


def _stack_object(one: Judged) -> dict[str, Any]:
    return {
        "stack": one.preview.stack,
        "passed": one.passed,
        "preview": {"outcome": str(one.preview.outcome), "changes": one.preview.changes},
        "failure": one.failure,
        "note": one.note,
        "counts": counts(one),
        "verdicts": [
            {**finding.verdict.model_dump(mode="json"), "file": finding.file, "line": finding.line}
            for finding in one.findings
        ],
    }


def _dumped(document: dict[str, Any]) -> str:
    return json.dumps(document, indent=2, ensure_ascii=False) + "\n"


# --- JUnit ----------------------------------------------------------------------------------------------------


def junit(report: Sequence[Judged]) -> str:
    """For test viewers: a suite for each stack, a case for each rule and resource, and one for the preview itself."""
    root = ElementTree.Element("testsuites", name=NAME)
    for one in report:
        suite = ElementTree.SubElement(root, "testsuite", name=one.preview.stack)
        _preview_case(suite, one)
        cases: dict[tuple[str, str], list[Finding]] = {}
        for finding in one.findings:
            cases.setdefault((finding.verdict.rule, finding.verdict.urn), []).append(finding)
        for findings in cases.values():
            _case(suite, findings)
        _count(suite)
    _count(root)
    ElementTree.indent(root)
    return f'<?xml version="1.0" encoding="UTF-8"?>\n{ElementTree.tostring(root, encoding="unicode")}\n'


def _preview_case(suite: ElementTree.Element, one: Judged) -> None:
    case = ElementTree.SubElement(suite, "testcase", classname=f"{NAME}.preview", name=one.preview.stack)
    if one.failure:
        _element(case, "error", one.failure)
    if one.note:
        ElementTree.SubElement(case, "system-out").text = one.note


def _case(suite: ElementTree.Element, findings: Sequence[Finding]) -> None:
    verdict = findings[0].verdict
    case = ElementTree.SubElement(
        suite, "testcase", classname=f"{NAME}.{verdict.family}.{verdict.rule}", name=verdict.name
    )
    stopping = [_line(one) for one in findings if one.verdict.stops]
    exempt = [accepted(one.verdict) for one in findings if one.verdict.verdict is Kind.EXEMPT]
    rest = [_line(one) for one in findings if not one.verdict.stops and one.verdict.verdict is not Kind.PASS]
    if stopping:
        _element(case, "failure", "\n".join(stopping))
    elif exempt:
        ElementTree.SubElement(case, "skipped", message="\n".join(exempt))
    if rest:
        ElementTree.SubElement(case, "system-out").text = "\n".join(rest)


def _line(finding: Finding) -> str:
    reason = f" ({accepted(finding.verdict)})" if finding.verdict.exemption else ""
    return f"{label(finding.verdict)}: {finding.file}:{finding.line}: {finding.verdict.text}{reason}"


def _element(case: ElementTree.Element, tag: str, said: str) -> None:
    first, *_ = said.splitlines()
    ElementTree.SubElement(case, tag, message=first).text = said


def _count(suite: ElementTree.Element) -> None:
    for name, tag in (("tests", "testcase"), ("failures", "failure"), ("errors", "error"), ("skipped", "skipped")):
        suite.set(name, str(len(list(suite.iter(tag)))))


# --- SARIF ----------------------------------------------------------------------------------------------------


def sarif(report: Sequence[Judged]) -> str:
    """For code scanning, SARIF 2.1.0: what a reviewer has to see in place. What passed is left out of the results."""
    verdicts = [finding.verdict for one in report for finding in one.findings]
    rules = {verdict.rule: verdict for verdict in sorted(verdicts, key=lambda verdict: verdict.rule)}
    ids = list(rules)
    seen: Counter[str] = Counter()
    results = [
        _result(finding, ids.index(finding.verdict.rule), seen)
        for one in report
        for finding in one.findings
        if finding.verdict.verdict is not Kind.PASS
    ]
    driver = {"name": NAME, "version": metadata.version(NAME), "rules": [_rule(verdict) for verdict in rules.values()]}
    run = {
        "tool": {"driver": driver},
        "invocations": [
            {
                "executionSuccessful": not any(one.failure for one in report),
                "toolExecutionNotifications": list(_notifications(report)),
            }
        ],
        "results": results,
    }
    return _dumped({"$schema": SARIF_SCHEMA, "version": "2.1.0", "runs": [run]})


def _rule(verdict: Verdict) -> dict[str, Any]:
    # Code scanning shows neither a rule nor its results without a help text.
    references = "; ".join(verdict.references)
    return {
        "id": verdict.rule,
        "shortDescription": {"text": verdict.title},
        "fullDescription": {"text": f"{verdict.title} ({references})" if references else verdict.title},
        "help": {"text": f"Family {verdict.family}. {references}".strip()},
        "properties": {"tags": [*verdict.references, verdict.family]},
    }


def _result(finding: Finding, index: int, seen: Counter[str]) -> dict[str, Any]:
    verdict = finding.verdict
    return {
        "ruleId": verdict.rule,
        "ruleIndex": index,
        "level": "note" if verdict.verdict is Kind.REMEDIATED else SARIF_LEVELS[verdict.level],
        "message": {"text": verdict.text},
        "locations": [
            {
                "physicalLocation": {
                    "artifactLocation": _artifact(finding.file),
                    "region": {"startLine": finding.line},
                },
                "logicalLocations": [{"name": verdict.resource, "fullyQualifiedName": verdict.urn, "kind": "resource"}],
            }
        ],
        "partialFingerprints": {"primaryLocationLineHash": fingerprint(verdict, seen)},
        "suppressions": list(_suppressions(verdict)),  # of a run's results either all have it or none, says SARIF
        "properties": {"stack": verdict.stack, "path": verdict.path, "verdict": str(verdict.verdict)},
    }


def _artifact(file: str) -> dict[str, str]:
    if PurePosixPath(file).is_absolute():
        return {"uri": PurePosixPath(file).as_uri()}
    return {"uri": quote(file), "uriBaseId": ROOT}


def fingerprint(verdict: Verdict, seen: Counter[str]) -> str:
    """What stays the same while a violation does: of rule, resource and property, not of the line or the wording.

    `seen` numbers those that are the same. Under the one key that code scanning compares, in the form of its own.
    """
    what = hashlib.sha256("\0".join([verdict.rule, verdict.urn, verdict.path]).encode()).hexdigest()[:16]
    seen[what] += 1
    return f"{what}:{seen[what]}"


def _suppressions(verdict: Verdict) -> Iterator[dict[str, Any]]:
    if verdict.exemption:
        yield {
            "kind": "inSource",
            "status": "accepted",
            "justification": verdict.exemption.reason,
            "properties": {"owner": verdict.exemption.owner, "expires": verdict.exemption.expires},
        }


def _notifications(report: Iterable[Judged]) -> Iterator[dict[str, Any]]:
    for one in report:
        for level, said in (("error", one.failure), ("note", one.note)):
            if said:
                yield {"level": level, "message": {"text": clean(f"{one.preview.stack}: {said}")}}
