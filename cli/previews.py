"""Previews of several stacks at a time: run captured, classified, and summed up in a table.
Reads Pulumi's own summary, since its JSON output leaves policy violations out."""

import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from enum import StrEnum
from typing import NamedTuple

from rich.console import Console
from rich.table import Table

from cli.pulumi import Pulumi, Result, hint

AT_A_TIME = 2  # a preview keeps one core busy with Python and half of one with the CLI
LOG_SECONDS = 10.0  # between progress lines where there is no terminal

_CHANGE = re.compile(r"^\s+(?:[+~-]+\s*|\+-\s*)(\d+) (to [\w-]+|[\w-]+d)\s*$", re.MULTILINE)
_MANDATORY = re.compile(r"^\s+- \[mandatory\]", re.MULTILINE)
_ADVICE = re.compile(r"^ +- \[advisory\].*\n(?: {9,}(?!- ).*\n)*", re.MULTILINE)
_OUTPUT_CHANGE = re.compile(r"^Outputs:\n(?:\s{2,}.*\n)*?\s{2}[+~-]\s", re.MULTILINE)
_NOT_EXPECTED = re.compile(r"no changes were expected.* but changes were proposed")


class Outcome(StrEnum):
    UNCHANGED = "no changes"
    CHANGED = "changes"
    FAILED = "failed"


class Preview(NamedTuple):
    """One stack's preview. `changes` as in `2 to create`; `violations` counts mandatory ones; `advice` are the others
    of one without changes, whose output nobody sees."""

    stack: str
    outcome: Outcome
    changes: str
    violations: int
    output: str
    advice: str = ""


def classify(stack: str, result: Result) -> Preview:
    """What a preview says. With `--expect-no-changes` its exit code does not tell changes from failures."""
    text = result.plain
    changes = ", ".join(f"{number} {what}" for number, what in _CHANGE.findall(text))
    violations = len(_MANDATORY.findall(text))
    if result.code and (violations or not _NOT_EXPECTED.search(text)):
        return Preview(stack, Outcome.FAILED, changes, violations, result.output + hint(text))
    if not result.code and not changes and not _OUTPUT_CHANGE.search(text):
        return Preview(stack, Outcome.UNCHANGED, "", 0, result.output, "".join(_ADVICE.findall(text)))
    return Preview(stack, Outcome.CHANGED, changes or "outputs", 0, result.output)


def run(
    pulumi: Pulumi,
    stacks: Sequence[str],
    pack: Sequence[str],
    console: Console,
    options: Sequence[str] = (),
    variables: Mapping[str, Mapping[str, str]] = {},
) -> dict[str, Preview]:
    """Preview the stacks, some at a time, with a progress line. Nothing on the engine changes.

    `pack`: the options that name the policy pack. `variables`: further ones for Pulumi, by stack.
    """
    colour = "always" if console.is_terminal else "never"
    arguments = (*pack, "--non-interactive", "--color", colour, *options)

    def one(stack: str) -> Preview:
        more = variables.get(stack, {})
        return classify(stack, pulumi.capture("preview", "--stack", stack, *arguments, variables=more))

    return concurrently({stack: lambda stack=stack: one(stack) for stack in stacks}, console)  # type: ignore[misc]


def concurrently(work: Mapping[str, Callable[[], Preview]], console: Console) -> dict[str, Preview]:
    """Results by name, in the order of `work`; a line says what is under way and since when."""
    if not work:
        return {}
    with ThreadPoolExecutor(AT_A_TIME) as pool:
        futures = {pool.submit(task): name for name, task in work.items()}
        _wait(futures, console)
        done = {name: future.result() for future, name in futures.items()}
    return {name: done[name] for name in work}


def _wait(futures: Mapping[Future[Preview], str], console: Console) -> None:
    started = said = time.monotonic()
    pending: Iterable[Future[Preview]] = futures.keys()
    with console.status("") as status:
        while pending:
            names = ", ".join(futures[future] for future in futures if future in set(pending))
            seconds = time.monotonic() - started
            line = f"Previewing {names}: {seconds:.0f} s"
            status.update(line)
            if not console.is_terminal and time.monotonic() - said >= LOG_SECONDS:
                said = time.monotonic()
                console.print(line)
            pending = wait(pending, timeout=0.5, return_when=FIRST_COMPLETED).not_done


def show(preview: Preview, console: Console) -> None:
    """The preview as Pulumi printed it, under the stack's name."""
    console.rule(f"{preview.stack}: {preview.outcome}", align="left")
    console.file.write(preview.output.rstrip() + "\n")
    console.file.flush()


def unchanged(preview: Preview, console: Console) -> None:
    """Says that a stack has no changes, and what the policies advise all the same."""
    console.print(f"{preview.stack}: no changes")
    console.print(preview.advice, end="", style="yellow", markup=False, highlight=False, soft_wrap=True)


def table(previews: Iterable[Preview]) -> Table:
    """One row for each stack: changes and violations."""
    summary = Table(title="Preview", title_justify="left")
    for column in ("stack", "result", "changes", "violations"):
        summary.add_column(column)
    style = {Outcome.UNCHANGED: "green", Outcome.CHANGED: "yellow", Outcome.FAILED: "red"}
    for preview in previews:
        result = f"[{style[preview.outcome]}]{preview.outcome}[/]"
        summary.add_row(preview.stack, result, preview.changes or "-", str(preview.violations))
    return summary
