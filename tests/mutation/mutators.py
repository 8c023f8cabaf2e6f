"""Small changes to the source of a rule module, each of which a fixture should notice.
Left alone is what no verdict depends on: message texts, docstrings, annotations, titles, references, descriptions."""

import ast
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

OPPOSITE: Final[Mapping[type[ast.cmpop], type[ast.cmpop]]] = {
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
    ast.Lt: ast.GtE,
    ast.GtE: ast.Lt,
    ast.Gt: ast.LtE,
    ast.LtE: ast.Gt,
}
NEXT_TO: Final[Mapping[type[ast.cmpop], type[ast.cmpop]]] = {
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
}
TEXTS: Final = frozenset({"id", "title", "references", "exemptable", "advised", "remedy"})
"""What a rule says about itself; who may be exempted or only advised is no matter of a verdict's fixtures."""

SHOWN: Final = frozenset({"Finding"})
"""Calls whose arguments are only shown."""

DESCRIBED: Final = frozenset({"Option", "listed", "number"})
"""Calls that make an option: only what holds without a config is a matter of verdicts."""

Collection = ast.Tuple | ast.List | ast.Set


@dataclass(frozen=True)
class Mutant:
    """One change. `key` of `survivors.toml`: module, function, original and mutated.

    `rule`: the id of the rule whose function was changed or deleted; empty for helpers and constants.
    `apply` changes the tree that it was found in, `undo` changes it back.
    """

    module: str
    function: str
    rule: str
    line: int
    description: str
    original: str
    mutated: str
    before: str = ""
    after: str = ""
    apply: Callable[[], None] = field(default=lambda: None, compare=False)
    undo: Callable[[], None] = field(default=lambda: None, compare=False)

    @property
    def key(self) -> tuple[str, str, str, str]:
        """What names the mutant whatever line it is on."""
        return self.module, self.function, self.original, self.mutated


def mutants(module: str, source: str, tree: ast.Module) -> Iterator[Mutant]:
    """Every mutant of a module, of which `tree` is the source's."""
    for index, statement in enumerate(tree.body):
        if isinstance(statement, ast.FunctionDef):
            yield from _Finder(module, source, statement.name, rule_id(statement)).function(tree, index, statement)
        elif isinstance(statement, ast.Assign | ast.AnnAssign) and statement.value is not None:
            target = statement.targets[0] if isinstance(statement, ast.Assign) else statement.target
            finder = _Finder(module, source, ast.unparse(target), "")
            yield from finder.expression(statement, "value", None, constants=True)


def rule_id(function: ast.FunctionDef) -> str:
    """The id of the rule that a function is; empty if it is none."""
    for decorator in function.decorator_list:
        if isinstance(decorator, ast.Call) and _called(decorator) == "rule":
            return next(str(ast.literal_eval(one.value)) for one in decorator.keywords if one.arg == "id")
    return ""


def _called(node: ast.Call) -> str:
    return node.func.id if isinstance(node.func, ast.Name) else getattr(node.func, "attr", "")


class _Finder:
    """Walks one statement of a module."""

    def __init__(self, module: str, source: str, function: str, rule: str) -> None:
        self._module, self._lines, self._function, self._rule = module, source.splitlines(), function, rule

    def function(self, tree: ast.Module, index: int, function: ast.FunctionDef) -> Iterator[Mutant]:
        """A function's mutants, of its decorator too."""
        if self._rule:
            deleted = ast.copy_location(ast.Pass(), function)
            yield self._mutant(tree, "body", index, deleted, "rule deleted", f"@rule {self._rule}", "pass")
        for decorator in function.decorator_list:
            if isinstance(decorator, ast.Call):
                yield from self._decorator(decorator)
        returns = isinstance(function.returns, ast.Name) and function.returns.id == "bool"
        yield from self._body(function, _only_shown(function), returns)

    def _decorator(self, call: ast.Call) -> Iterator[Mutant]:
        given = {keyword.arg: keyword for keyword in call.keywords}
        for keyword in call.keywords:
            if keyword.arg not in TEXTS | {"tiers"}:
                yield from self.expression(keyword, "value", None, constants=True)
        if "tiers" in given:
            keyword = given["tiers"]
            for tier in ("protected", "best-effort", "host"):
                changed = _parsed(f"{ast.unparse(keyword.value)} ^ {{{tier!r}}}")
                yield self._mutant(keyword, "value", None, changed, "applies in other tiers")
        else:
            for tier in ("protected", "best-effort", "host"):
                tiers = f"frozenset({{'protected', 'best-effort'}} ^ {{{tier!r}}})"
                keywords = [*call.keywords, ast.keyword("tiers", _parsed(tiers))]
                yield self._mutant(call, "keywords", None, keywords, "applies in other tiers", "no tiers", tiers)

    def _body(self, node: ast.AST, shown: frozenset[str], returns: bool) -> Iterator[Mutant]:
        for name in ("body", "orelse", "finalbody", "handlers"):
            block: Sequence[Any] = getattr(node, name, None) or ()
            for index, statement in enumerate(block):
                yield from self._statement(node, name, block, index, statement, shown, returns)

    def _statement(
        self,
        parent: ast.AST,
        name: str,
        block: Sequence[Any],
        index: int,
        statement: ast.AST,
        shown: frozenset[str],
        returns: bool,
    ) -> Iterator[Mutant]:
        if _droppable(block, index):
            dropped = ast.copy_location(ast.Pass(), statement)
            short = ast.unparse(statement)
            yield self._mutant(parent, name, index, dropped, "statement dropped", short, "pass")
        if isinstance(statement, ast.If | ast.While):
            yield from self.expression(statement, "test", None, boolean=True)
        elif isinstance(statement, ast.For):
            yield from self.expression(statement, "iter", None)
        elif isinstance(statement, ast.Return) and statement.value is not None:
            yield from self.expression(statement, "value", None, boolean=returns)
        elif isinstance(statement, ast.Assign | ast.AugAssign | ast.AnnAssign) and statement.value is not None:
            target = statement.targets[0] if isinstance(statement, ast.Assign) else statement.target
            if not (isinstance(target, ast.Name) and target.id in shown):
                yield from self.expression(statement, "value", None)
        elif isinstance(statement, ast.Expr) and not isinstance(statement.value, ast.Constant):
            yield from self.expression(statement, "value", None)
        yield from self._body(statement, shown, returns)

    def expression(
        self, parent: Any, name: str, index: int | None, boolean: bool = False, constants: bool = False
    ) -> Iterator[Mutant]:
        """The mutants of what stands at `parent.name`. `boolean`: only its truth counts."""
        node = getattr(parent, name) if index is None else getattr(parent, name)[index]
        if isinstance(node, ast.Call) and _called(node) in SHOWN:
            return
        seen = {ast.unparse(node)}
        for changed, description in self._changes(node, boolean, constants):
            if (text := ast.unparse(changed)) not in seen:
                seen.add(text)
                yield self._mutant(parent, name, index, changed, description)
        yield from self._inner(node, boolean, constants)

    def _changes(self, node: Any, boolean: bool, constants: bool) -> Iterator[tuple[ast.AST, str]]:
        if isinstance(node, ast.Compare):
            for at, operator in enumerate(node.ops):
                for table, description in ((OPPOSITE, "comparison turned round"), (NEXT_TO, "boundary moved")):
                    if type(operator) in table:
                        ops = [*node.ops[:at], table[type(operator)](), *node.ops[at + 1 :]]
                        yield ast.Compare(node.left, ops, node.comparators), description
        elif isinstance(node, ast.BoolOp):
            other = ast.And() if isinstance(node.op, ast.Or) else ast.Or()
            yield ast.BoolOp(other, node.values), "and and or swapped"
            for at in range(len(node.values) if boolean else 0):
                kept = [*node.values[:at], *node.values[at + 1 :]]
                yield kept[0] if len(kept) == 1 else ast.BoolOp(node.op, kept), "operand dropped"
        elif boolean and isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
            yield node.operand, "test turned round"
        elif boolean and not isinstance(node, ast.Constant):
            yield ast.UnaryOp(ast.Not(), node), "test turned round"
        elif isinstance(node, ast.Constant):
            yield from _other_constants(node.value)
        elif isinstance(node, ast.Dict):
            for at in range(len(node.keys)):
                keys, values = [*node.keys], [*node.values]
                del keys[at], values[at]
                yield ast.Dict(keys, values), "element dropped"
        if isinstance(node, Collection) and (constants or not boolean):
            for at in range(len(node.elts)):
                kept = [*node.elts[:at], *node.elts[at + 1 :]]
                empty = isinstance(node, ast.Set) and not kept
                yield _parsed("set()") if empty else _like(node, kept), "element dropped"

    def _inner(self, node: Any, boolean: bool, constants: bool) -> Iterator[Mutant]:
        if isinstance(node, ast.BoolOp):
            for at in range(len(node.values)):
                yield from self.expression(node, "values", at, boolean)
        elif isinstance(node, ast.UnaryOp):
            # `not x` for x is turned round already.
            yield from self.expression(node, "operand", None, isinstance(node.operand, ast.BoolOp))
        elif isinstance(node, ast.IfExp):
            yield from self.expression(node, "test", None, True)
            for name in ("body", "orelse"):
                yield from self.expression(node, name, None, boolean)
        elif isinstance(node, ast.GeneratorExp | ast.ListComp | ast.SetComp | ast.DictComp):
            yield from self._comprehension(node, boolean)
        elif isinstance(node, ast.Call):
            yield from self._call(node, constants)
        elif isinstance(node, ast.Subscript):
            yield from self.expression(node, "value", None)
            if not isinstance(node.slice, ast.Slice):
                yield from self.expression(node, "slice", None)
        else:
            for name, value in ast.iter_fields(node):
                if isinstance(value, ast.expr):
                    yield from self.expression(node, name, None, False, constants)
                elif isinstance(value, list):
                    for at, one in enumerate(value):
                        if isinstance(one, ast.expr):
                            yield from self.expression(node, name, at, False, constants)

    def _call(self, node: ast.Call, constants: bool) -> Iterator[Mutant]:
        called = _called(node)
        if called == "compile":
            yield from self._patterns(node)
        if called in DESCRIBED:
            at = 1 if called == "Option" else 0
            yield from self.expression(node, "args", at, False, constants)
            return
        if isinstance(node.func, ast.Attribute):
            yield from self.expression(node.func, "value", None)
        for at in range(len(node.args)):
            yield from self.expression(node, "args", at, False, constants)
        for keyword in node.keywords:
            yield from self.expression(keyword, "value", None)

    def _patterns(self, node: ast.Call) -> Iterator[Mutant]:
        pattern = node.args[0]
        if isinstance(pattern, ast.Constant) and isinstance(pattern.value, str):
            for text in without_alternatives(pattern.value):
                yield self._mutant(node, "args", 0, ast.Constant(text), "alternative dropped")

    def _comprehension(self, node: Any, boolean: bool) -> Iterator[Mutant]:
        # What `any`, `all` and `next` ask of each element is its truth; elsewhere the value counts.
        for name in ("key", "value") if isinstance(node, ast.DictComp) else ("elt",):
            yield from self.expression(node, name, None, boolean)
        for part in node.generators:
            yield from self.expression(part, "iter", None)
            for at in range(len(part.ifs)):
                yield from self.expression(part, "ifs", at, True)

    def _mutant(
        self,
        parent: Any,
        name: str,
        index: int | None,
        changed: Any,
        description: str,
        original: str = "",
        mutated: str = "",
    ) -> Mutant:
        old = getattr(parent, name) if index is None else getattr(parent, name)[index]

        def put(value: Any) -> None:
            if index is None:
                setattr(parent, name, value)
            else:
                getattr(parent, name)[index] = value

        line = getattr(old, "lineno", getattr(parent, "lineno", 0))
        original, mutated = original or ast.unparse(old), mutated or ast.unparse(changed)
        before, after = self._shown(old, original, mutated)
        return Mutant(
            self._module,
            self._function,
            self._rule,
            line,
            description,
            original,
            mutated,
            before,
            after,
            lambda: put(changed),
            lambda: put(old),
        )

    def _shown(self, old: Any, original: str, mutated: str) -> tuple[str, str]:
        """The source's line, before and after; the expressions themselves where they stand on several."""
        if isinstance(old, ast.expr) and old.lineno == old.end_lineno:
            line = self._lines[old.lineno - 1]
            raw = line.encode()
            found = raw[old.col_offset : old.end_col_offset].decode(errors="replace")
            if _same(found, original):
                changed = raw[: old.col_offset] + mutated.encode() + raw[old.end_col_offset :]
                return line.strip(), changed.decode().strip()
        return original, mutated


def _same(found: str, original: str) -> bool:
    try:
        return ast.unparse(_parsed(found)) == original
    except (SyntaxError, ValueError):
        return False


def _parsed(text: str) -> ast.expr:
    return ast.parse(text, mode="eval").body


def _like(node: Collection, kept: list[ast.expr]) -> ast.AST:
    return ast.Set(kept) if isinstance(node, ast.Set) else type(node)(kept, ast.Load())


def _other_constants(value: Any) -> Iterator[tuple[ast.AST, str]]:
    if isinstance(value, bool):
        yield ast.Constant(not value), "constant changed"
    elif isinstance(value, int | float):
        yield ast.Constant(value + 1), "constant changed"
        yield ast.Constant(value - 1), "constant changed"


def _droppable(block: Sequence[Any], index: int) -> bool:
    """Findings, and what leaves a loop, a check or the question open. A `return` after a finding only keeps it from
    being said again."""
    statement = block[index]
    if isinstance(statement, ast.Expr):
        return isinstance(statement.value, ast.Yield | ast.YieldFrom)
    said = index > 0 and _droppable(block, index - 1)
    if isinstance(statement, ast.Return):
        return statement.value is None and not said
    return (isinstance(statement, ast.Continue) and not said) or (
        isinstance(statement, ast.Raise) and "Undecided" in ast.unparse(statement)
    )


def _only_shown(function: ast.FunctionDef) -> frozenset[str]:
    """The local names that are read in messages only."""
    shown: set[str] = set()
    read: set[str] = set()

    def visit(node: ast.AST, message: bool) -> None:
        inside = message or (isinstance(node, ast.Call) and _called(node) in SHOWN)
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load):
            (shown if inside else read).add(node.id)
        for child in ast.iter_child_nodes(node):
            visit(child, inside)

    visit(function, False)
    return frozenset(shown - read)


def without_alternatives(pattern: str) -> Iterator[str]:
    """A regular expression without one of its alternatives, for each of them, in every group."""
    open_groups: list[tuple[int, list[int]]] = [(0, [])]
    groups: list[tuple[int, list[int], int]] = []
    at, in_set = 0, False
    while at < len(pattern):
        char = pattern[at]
        if char == "\\":
            at += 1
        elif in_set:
            in_set = char != "]"
        elif char == "[":
            in_set = True
        elif char == "(":
            start = at + 1
            while pattern[start : start + 1] == "?":
                start = next(place for place in range(start, len(pattern)) if pattern[place] in ":=!") + 1
            open_groups.append((start, []))
        elif char == "|":
            open_groups[-1][1].append(at)
        elif char == ")":
            start, found = open_groups.pop()
            groups.append((start, found, at))
        at += 1
    groups.append((*open_groups[0], len(pattern)))
    for start, found, end in groups:
        if found:
            starts, ends = [start, *(bar + 1 for bar in found)], [*found, end]
            parts = [pattern[one:other] for one, other in zip(starts, ends, strict=True)]
            for index in range(len(parts)):
                yield pattern[:start] + "|".join([*parts[:index], *parts[index + 1 :]]) + pattern[end:]
