"""Changes the rules one small step at a time, and tells which changes no fixture notices.
`python -m tests.mutation [--module reach] [--rule ID] [--json FILE]`; fails on a survivor that is not accounted for."""

import argparse
import ast
import json
import multiprocessing
import os
import sys
import tempfile
import time
import tomllib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from multiprocessing.connection import Connection, wait
from pathlib import Path
from types import ModuleType
from typing import Any, Final
from unittest.mock import patch

from policies import availability, escape, hardening, hostpath, reach, registry, reservation
from policies.world import World
from settings.errors import SettingsError
from settings.ledger import Budget, Ledger, LedgerSettings
from tests.mutation.mutators import Mutant, mutants, rule_id
from tests.policies import harness, test_rules
from tests.policies.fixtures import FIXTURES

CHECKOUT: Final = Path(__file__).parents[2]
ACCOUNTED: Final = Path(__file__).with_name("survivors.toml")

MODULES: Final = (hostpath, reservation, reach, hardening, availability, escape)
"""What is changed, in the order in which they import each other."""

WORKERS: Final = 2
SECONDS: Final = 20.0
"""How long a mutant may take; one that takes longer is noticed."""

SURVIVED: Final = "survived"

Check = Callable[[Mutant], str]
"""Says what noticed a mutant that stands in place of its module, or `SURVIVED`."""


@dataclass(frozen=True)
class Result:
    """What became of a mutant: what noticed it, or `SURVIVED`."""

    mutant: Mutant
    noticed: str

    @property
    def survived(self) -> bool:
        """Whether nothing noticed it."""
        return self.noticed == SURVIVED


def main(arguments: Sequence[str]) -> int:
    """The exit code: 1 if a survivor is not accounted for, or an account is out of date."""
    options = parsed(arguments)
    begin = time.monotonic()
    cache_ledgers()
    trees = {name_of(module): (module, tree_of(module)) for module in MODULES}
    # In memory where there is such a place: every case writes its ledger.
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as folder:
        check = Fixtures(Path(folder))
        broken = check.broken()
        if broken:
            print("\n".join(["These fixtures do not hold as it is, and are left out:", *broken]))
            check = Fixtures(Path(folder), check.holding(broken))
        chosen = [
            mutant
            for name, (module, tree) in trees.items()
            if options.module in (None, name)
            for mutant in mutants(name, source_of(module), tree)
            if options.rule in (None, mutant.rule)
        ]
        results = list(run(chosen, trees, check))
    whole = options.module is None and options.rule is None
    problems = report(results, accounts(ACCOUNTED), whole)
    if options.json:
        options.json.write_text(json.dumps([as_json(one) for one in results], indent=1) + "\n")
    print(f"{time.monotonic() - begin:.0f} s")
    return 1 if problems or broken else 0


def parsed(arguments: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.mutation", description=__doc__)
    parser.add_argument("--module", choices=[name_of(module) for module in MODULES], help="this module only")
    parser.add_argument("--rule", choices=[rule.id for rule in registry.RULES], help="this rule's function only")
    parser.add_argument("--json", type=Path, help="write every mutant and what noticed it")
    return parser.parse_args(arguments)


def name_of(module: ModuleType) -> str:
    """`reach` of `policies.reach`."""
    return module.__name__.rpartition(".")[2]


def source_of(module: ModuleType) -> str:
    """A module's text."""
    return Path(str(module.__file__)).read_text()


def tree_of(module: ModuleType) -> ast.Module:
    """A module's syntax tree, which mutants change in place."""
    return ast.parse(source_of(module))


def cache_ledgers() -> None:
    """Reads and resolves a ledger once, however many stacks are judged by it."""
    read, resolve = LedgerSettings.read, LedgerSettings.resolve
    known: dict[tuple[Path, str], LedgerSettings] = {}
    resolved: dict[tuple[int, tuple[tuple[str, float], ...]], Ledger] = {}

    def cached(file: Path) -> LedgerSettings:
        key = file, file.read_text()
        if key not in known:
            known[key] = read(file)
        return known[key]

    def cached_resolve(settings: LedgerSettings, asked: Mapping[str, float]) -> Ledger:
        key = id(settings), tuple(asked.items())  # `known` keeps settings alive, and with them their ids
        if key not in resolved:
            resolved[key] = resolve(settings, asked)
        return resolved[key]

    LedgerSettings.read = cached  # type: ignore[method-assign,assignment]
    LedgerSettings.resolve = cached_resolve  # type: ignore[method-assign,assignment]


class Fixtures:
    """The fixtures as a check of the rules that depend on what was changed: their own first, then the written ones
    of the others. What no verdict shows is left to the tests of remedies and of ledgers."""

    def __init__(self, folder: Path, cases: Sequence[tuple[str, Any]] | None = None) -> None:
        self._above = folder
        self._cases = test_rules.CASES if cases is None else cases
        self._written = {id(case) for cases in FIXTURES.values() for case in cases}
        self._depending = depending()
        self._failed = frozenset(self._failing(frozenset(self._ids())))

    @property
    def _folder(self) -> Path:
        """A folder for the ledgers of this process: others judge at the same time."""
        folder = self._above / str(os.getpid())
        folder.mkdir(exist_ok=True)
        return folder

    def broken(self) -> list[str]:
        """The fixtures that do not hold without any mutant."""
        rules = frozenset(rule.id for rule in registry.RULES)
        context = multiprocessing.get_context("fork")
        with context.Pool(WORKERS) as pool:
            parts = [(self._cases[start::WORKERS], rules) for start in range(WORKERS)]
            found = [noticed for part in pool.starmap(self._all_noticed, parts) for noticed in part]
        return [*found, *sorted(self._failed)]

    def holding(self, broken: Sequence[str]) -> list[tuple[str, Any]]:
        """The cases but those that `broken` names."""
        return [one for one in self._cases if not any(text.startswith(_titled(*one)) for text in broken)]

    def _all_noticed(self, cases: Sequence[tuple[str, Any]], rules: frozenset[str]) -> list[str]:
        return [noticed for case in cases if (noticed := self._noticed(*case, rules))]

    def __call__(self, mutant: Mutant) -> str:
        """The fixture or test that notices a mutant."""
        every = frozenset(rule.id for rule in registry.RULES)
        rules = self._depending.get((mutant.module, mutant.function)) or every
        written = [one for one in self._cases if id(one[1]) in self._written]
        own = [one for one in self._cases if one[0] in rules]
        ordered = [
            *(one for one in written if one[0] in rules),
            *(one for one in written if one[0] not in rules),
            *(one for one in own if id(one[1]) not in self._written),
        ]
        for check, cases in ((self._noticed, ordered), (self._unsaid, own)):
            for judged_by, case in cases:
                if noticed := check(judged_by, case, rules):
                    return noticed
        return self._further(rules)

    def _noticed(self, rule_id: str, case: Any, rules: frozenset[str]) -> str:
        """As `test_verdict`, of these rules. Without a ledger any rule may be the one that says so."""
        expected = {rule_id} & rules if case.violates else set()
        if not readable(case.ledger, self._folder):
            rules, expected = frozenset(self._ids()), ({rule_id} if case.violates else set())
        try:
            found = [one for one in self._judged(rule_id, case, rules) if one.rule not in case.also]
        except Exception as error:
            return f"{_titled(rule_id, case)}: {type(error).__name__}"
        right = (
            {one.rule for one in found} == expected
            and len(found) == len(set(found))
            and {one.resource for one in found if one.rule == rule_id} == (case.violates if expected else set())
            and {one.level for one in found} <= {"advisory" if case.advice else "mandatory"}
        )
        return "" if right else _titled(rule_id, case)

    def _ids(self) -> list[str]:
        return [rule.id for rule in registry.RULES]

    def _judged(self, rule_id: str, case: Any, rules: frozenset[str]) -> list[harness.Violation]:
        chosen = tuple(rule for rule in registry.RULES if rule.id in rules)
        with patch.object(test_rules, "rules_without", lambda _without: chosen):
            return test_rules.judged(case, self._folder, rule_id=rule_id)

    def _unsaid(self, rule_id: str, case: Any, rules: frozenset[str]) -> str:
        """Whether a message lacks the value that the fixture asks for."""
        if not case.violates:
            return ""
        said = "\n".join(one.message for one in self._judged(rule_id, case, rules) if one.rule == rule_id)
        return "" if case.value in said else f"{_titled(rule_id, case)}: message without {case.value!r}"

    def _further(self, rules: frozenset[str]) -> str:
        """The first of the further tests that held before and does not any more."""
        return next((name for name in self._failing(rules) if name not in self._failed), SURVIVED)

    def _failing(self, rules: frozenset[str]) -> Iterator[str]:
        for name, arguments in further(rules):
            test: Any = getattr(test_rules, name)
            try:
                test(*arguments, self._folder)
            except Exception:
                yield name


TIERED: Final = "test_a_rule_applies_in_these_tiers_and_no_others"
REMEDIES: Final = "test_remedy_sets_what_is_not_set_and_leaves_what_somebody_chose"
REMEDIED: Final = "test_remedies_keep_unknowns_and_secrets_as_they_are"
UNRESERVED: Final = "test_a_protected_environment_without_reservations_is_found_whoever_read_the_ledger"


def further(rules: frozenset[str]) -> Iterator[tuple[str, list[Any]]]:
    """The tests beside the fixtures that notice what these rules do, with their arguments."""
    yield from ((TIERED, [rule]) for rule in registry.RULES if rule.id in rules)
    remedied = [rule for rule in registry.RULES if rule.remedy and rule.id in rules]
    yield from ((REMEDIES, [rule]) for rule in remedied)
    if remedied:
        yield REMEDIED, []
    if "protected-reservation" in rules:
        budgets = (None, Budget(cpus=4.0), Budget(memory=2**30), Budget(cpus=0.0, memory=0))
        yield from ((UNRESERVED, [budget]) for budget in budgets)


def _titled(rule_id: str, case: Any) -> str:
    return f"{rule_id}: {case.kind}: {case.says}"


@cache
def readable(text: str, folder: Path) -> bool:
    """Whether a ledger can be read and adds up."""
    file = folder / "Pulumi.host.yaml"
    file.write_text(text)
    try:
        World.of(file).ledger  # noqa: B018 - read for the error
    except SettingsError:
        return False
    return True


def depending() -> Mapping[tuple[str, str], frozenset[str]]:
    """For each function and constant of a module, the rules whose verdict it may change."""
    uses: dict[tuple[str, str], set[tuple[str, str]]] = {}
    rules: dict[tuple[str, str], str] = {}
    for module in MODULES:
        here, known = name_of(module), {}
        for statement in tree_of(module).body:
            if isinstance(statement, ast.ImportFrom):
                origin = str(statement.module).rpartition(".")[2]
                known.update({alias.asname or alias.name: (origin, alias.name) for alias in statement.names})
            for name in defined(statement):
                read = {node.id for node in ast.walk(statement) if isinstance(node, ast.Name)}
                uses[here, name] = {known.get(one, (here, one)) for one in read}
            if isinstance(statement, ast.FunctionDef) and (found := rule_id(statement)):
                rules[here, statement.name] = found
    reached: dict[tuple[str, str], set[str]] = {}
    for place, found in rules.items():
        waiting, seen = [place], {place}
        while waiting:
            one = waiting.pop()
            reached.setdefault(one, set()).add(found)
            fresh = uses.get(one, set()) - seen
            seen |= fresh
            waiting += fresh
    return {place: frozenset(found) for place, found in reached.items()}


def defined(statement: ast.stmt) -> list[str]:
    """The names that a statement of a module gives."""
    if isinstance(statement, ast.FunctionDef):
        return [statement.name]
    if isinstance(statement, ast.Assign):
        return [ast.unparse(target) for target in statement.targets]
    return [ast.unparse(statement.target)] if isinstance(statement, ast.AnnAssign) else []


Trees = Mapping[str, tuple[ModuleType, ast.Module]]


def run(chosen: Sequence[Mutant], trees: Trees, check: Check) -> Iterator[Result]:
    """Every mutant in a process of its own, a few at a time; in the order in which they end."""
    for module in (*MODULES, registry):
        code_of(module)  # here, so that no process of a mutant has to
    context = multiprocessing.get_context("fork")
    waiting = list(reversed(chosen))
    running: dict[Connection, tuple[Any, Mutant, float]] = {}
    while waiting or running:
        while waiting and len(running) < WORKERS:
            mutant = waiting.pop()
            ours, theirs = context.Pipe(duplex=False)
            process = context.Process(target=judge, args=(mutant, trees, check, theirs), daemon=True)
            process.start()
            theirs.close()
            running[ours] = process, mutant, time.monotonic() + SECONDS
        ready = wait(list(running), timeout=min(end for _, _, end in running.values()) - time.monotonic())
        for ours in list(running):
            process, mutant, end = running[ours]
            if ours in ready or time.monotonic() > end:
                noticed = "it takes too long"
                if ours in ready:
                    noticed = "it fails"
                    with suppress(EOFError):
                        noticed = ours.recv()
                process.kill()
                process.join()
                ours.close()
                del running[ours]
                yield Result(mutant, noticed)


def judge(mutant: Mutant, trees: Trees, check: Check, answer: Connection) -> None:
    """In the process of one mutant: puts it in place, and tells what noticed it."""
    try:
        mutant.apply()
        install(trees, mutant.module)
        noticed = check(mutant)
    except Exception as error:
        noticed = f"{type(error).__name__}: {error}"
    answer.send(noticed)


def install(trees: Trees, changed: str) -> None:
    """Runs the changed module's tree in its place, and all that import from it, for everybody who has taken rules."""
    taken = registry.RULES, registry.BY_ID
    for module in (*MODULES, registry):
        if name_of(module) == changed:
            tree = ast.fix_missing_locations(trees[changed][1])
            refill(module, compile(tree, str(module.__file__), "exec"))
        else:
            refill(module, code_of(module))
    for module in (harness, test_rules):
        for name, value in vars(module).items():
            for old, new in zip(taken, (registry.RULES, registry.BY_ID), strict=True):
                if value is old:
                    setattr(module, name, new)
    defaults = harness.run.__defaults__ or ()
    harness.run.__defaults__ = tuple(registry.RULES if one is taken[0] else one for one in defaults)


@cache
def code_of(module: ModuleType) -> Any:
    """An unchanged module, compiled."""
    return compile(source_of(module), str(module.__file__), "exec")


def refill(module: ModuleType, code: Any) -> None:
    """Runs code in place of what a module holds."""
    for name in [name for name in vars(module) if not name.startswith("__")]:
        delattr(module, name)
    exec(code, vars(module))  # noqa: S102 - our own source


def accounts(file: Path) -> Mapping[tuple[str, str, str, str], str]:
    """The survivors that are known, and why each may survive. ValueError for one without a reason."""
    found = {}
    for entry in tomllib.loads(file.read_text()).get("survivor", []) if file.exists() else []:
        if not str(entry.get("reason", "")).strip():
            raise ValueError(f"{file.name}: an entry without a reason: {entry}")
        found[entry["module"], entry["function"], entry["original"], entry["mutated"]] = entry["reason"]
    return found


def report(results: Iterable[Result], known: Mapping[tuple[str, str, str, str], str], whole: bool) -> list[str]:
    """Prints what survived, and the counts; returns what must not be. `whole`: nothing was left out of the run."""
    results = sorted(results, key=lambda one: (one.mutant.module, one.mutant.line))
    survivors = [one.mutant for one in results if one.survived]
    problems = [described(mutant) for mutant in survivors if mutant.key not in known]
    living, met = {mutant.key for mutant in survivors}, {one.mutant.key for one in results}
    problems += [
        f"survivors.toml: survives no longer: {' | '.join(key)}"
        for key in known
        if key not in living and (whole or key in met)
    ]
    for problem in problems:
        print(problem)
    counts = Counter(one.mutant.module for one in results)
    alive = Counter(mutant.module for mutant in survivors)
    excused = Counter(mutant.module for mutant in survivors if mutant.key in known)
    for module, count in counts.items():
        print(
            f"{module}: {count} mutants, {count - alive[module]} noticed, {alive[module]} survived, "
            f"{excused[module]} of them accounted for"
        )
    return problems


def described(mutant: Mutant) -> str:
    """A survivor, as one looks it up."""
    return (
        f"policies/{mutant.module}.py:{mutant.line}: {mutant.function}: {mutant.description}\n"
        f"  - {mutant.before}\n  + {mutant.after}\n    ({mutant.original}  ->  {mutant.mutated})"
    )


def as_json(result: Result) -> dict[str, Any]:
    """A result for tools."""
    names = ("module", "function", "rule", "line", "description", "original", "mutated")
    return {**{name: getattr(result.mutant, name) for name in names}, "noticed": result.noticed}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
