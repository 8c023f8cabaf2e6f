"""`report`: every stack's preview through the policy pack, and all that the pack said of it, as files for other tools.
Fails closed: a stack on which the pack said nothing, or not all, has not passed."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from rich.console import Console
from rich.table import Table

from cli import deploy, formats, previews, verdicts
from cli.locate import Locator
from cli.order import Stacks
from cli.previews import Outcome, Preview
from cli.pulumi import Pulumi, PulumiError
from cli.verdicts import Finding, Judged, Kind, Told

FILES: Mapping[str, Callable[[Sequence[Judged]], str]] = {
    "report.txt": formats.text,
    "report.json": formats.as_json,
    "junit.xml": formats.junit,
    "report.sarif": formats.sarif,
}
WHY_SILENT = "BULKHEAD_VERDICTS names where it should; a pack that is older than this command does not know it"


def write(pulumi: Pulumi, stacks: Stacks, pack: Sequence[str], folder: Path, console: Console) -> int:
    """Preview every stack as `preview` does, and write the pack's verdicts to the files in `folder`.

    1 if a mandatory rule is violated, a preview fails, or the pack has not said all; else 0. PulumiError if the
    folder cannot be written.
    """
    _emptied(folder)  # so that a run that is cut off leaves no older report to be taken for its own
    report = judge(pulumi, stacks, pack, console)
    for name, form in FILES.items():
        (folder / name).write_text(form(report), encoding="utf-8")
    for one in report:
        _show(one, console)
    console.print(table(report))
    console.print(f"Written: {', '.join(str(folder / name) for name in FILES)}", highlight=False, soft_wrap=True)
    return int(not all(one.passed for one in report))


def _emptied(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name in FILES:
            (folder / name).unlink(missing_ok=True)
    except OSError as error:
        raise PulumiError(
            f"Report folder {folder}: cannot be written ({error.strerror}). Next step: name another with --output"
        ) from None


def judge(pulumi: Pulumi, stacks: Stacks, pack: Sequence[str], console: Console) -> list[Judged]:
    """What the pack says of every stack, in deploy order. Nothing on the engine changes."""
    with TemporaryDirectory(prefix="bulkhead-verdicts-") as folder:
        files = {name: Path(folder) / f"{name}.jsonl" for name in stacks.names}
        variables = {name: {verdicts.VARIABLE: str(file)} for name, file in files.items()}
        found = deploy.previewed(pulumi, stacks, pack, console, variables=variables)
        told = {name: verdicts.read(file, name) for name, file in files.items()}
    return [judged(found[name], told[name], pulumi.root) for name in stacks.names]


def judged(preview: Preview, told: Told, root: Path) -> Judged:
    """One stack: its verdicts with their places in the checkout, and whether they are all there is to say."""
    locator = Locator(root, preview.stack)
    findings = tuple(_found(verdict, locator, root) for verdict in told.verdicts)
    stopped = any(verdict.stops for verdict in told.verdicts)
    incomplete = f"rules that need the whole stack were not run for {preview.stack}"
    failure = told.fault or ("" if stopped else _failure(preview, told, incomplete))
    note = told.verdicts and not told.complete and failure != incomplete
    return Judged(preview, findings, failure, incomplete if note else "")


def _failure(preview: Preview, told: Told, incomplete: str) -> str:
    """Why a stack without a violation has not passed all the same; empty if it has."""
    if preview.outcome is Outcome.FAILED:
        return verdicts.clean(preview.output).strip() or "the preview failed and said nothing"
    if told.complete:
        return ""
    return incomplete if told.verdicts else f"the policy pack said nothing of {preview.stack}. {WHY_SILENT}"


def _found(verdict: verdicts.Verdict, locator: Locator, root: Path) -> Finding:
    path, line = locator.place(verdict.urn, verdict.path)
    return Finding(verdict, path.relative_to(root).as_posix() if path.is_relative_to(root) else str(path), line)


def _show(one: Judged, console: Console) -> None:
    stack = one.preview.stack
    if one.failure and one.preview.outcome is Outcome.FAILED:
        previews.show(one.preview, console)
    elif one.failure:
        _say(f"{stack}: {one.failure}", "red", console)
    if one.note:
        _say(f"{stack}: {one.note}", "yellow", console)
    for finding in one.findings:
        if finding.verdict.verdict is Kind.VIOLATION:
            line = f"{finding.file}:{finding.line}: {formats.label(finding.verdict)}: {finding.verdict.rule}: "
            _say(line + finding.verdict.text, "red" if finding.verdict.stops else "yellow", console)


def _say(text: str, style: str, console: Console) -> None:
    console.print(text, style=style, markup=False, highlight=False, soft_wrap=True)


def table(report: Iterable[Judged]) -> Table:
    """One row for each stack: its preview and the number of verdicts by kind."""
    summary = Table(title="Report", title_justify="left")
    for column in ("stack", "result", "violations", "advisories", "exempt", "remediated", "passed"):
        summary.add_column(column)
    for one in report:
        result = "[green]passed[/]" if one.passed else "[red]failed[/]"
        summary.add_row(one.preview.stack, result, *(str(count) for count in formats.counts(one).values()))
    return summary
