"""What a rule is, and how one is put to a resource: first alone, then, where that leaves it open, with the whole stack.
A rule never meets an unknown value: it is resolved through dependencies first, and otherwise a violation."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from traceback import extract_tb
from typing import Final, NamedTuple

from policies.world import HOST, UNKNOWN, Field, Graph, Resource, World
from settings.errors import SettingsError
from settings.ledger import Environment, Ledger, Tier

ENVIRONMENTS: Final = frozenset({*Tier})
EVERYWHERE: Final = frozenset({*Tier, HOST})


@dataclass(frozen=True)
class Finding:
    """What is wrong with one value. `value` is as the message shows it: never of a variable, secret or script."""

    value: str
    consequence: str
    fix: str

    def message(self, resource: Resource, path: str) -> str:
        """One line: which resource, which value, what it leads to, what to do."""
        kind = resource.type.rpartition(":")[2]
        where = f"{resource.name} ({kind})" + (f": {path}" if path else "")
        return f"{where}: {self.value}: {self.consequence}. Fix: {self.fix}."


class Open:
    """The verdict of a check that needs the whole stack; `OPEN` is the only one."""


OPEN: Final = Open()


@dataclass(frozen=True)
class Subject:
    """What a check may look at beside its field. `graph` is None while the resource is judged alone."""

    resource: Resource
    world: World
    graph: Graph | None = None

    @property
    def ledger(self) -> Ledger:
        """The ledger; SettingsError when it cannot be read."""
        return self.world.ledger

    @property
    def own(self) -> Environment | None:
        """The environment that the resource's stack is; None for the host's."""
        return None if self.resource.stack == HOST else self.ledger.environment(self.resource.stack)


Check = Callable[[Field, Subject], Iterator[Finding | Open]]


@dataclass(frozen=True)
class Rule:
    """One rule of the pack.

    `reads`: which values of which resource types (`*` matches any) it judges, one at a time.
    `links`: for a pattern of `reads`, the types whose name stands for an unknown value that was made from them.
    `tiers`: the tiers of the stacks it applies to; the host's stack counts as the tier `host`.
    `references`: CIS Docker Benchmark 1.6.0 and Pod Security Standards ids, or the path it closes.
    """

    id: str
    family: str
    title: str
    references: tuple[str, ...]
    reads: Mapping[str, tuple[str, ...]]
    check: Check
    links: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    tiers: frozenset[str] = ENVIRONMENTS
    exemptable: bool = False

    def alone(self, resource: Resource, world: World) -> list[str]:
        """Messages that follow from the resource's inputs and the ledger. What stays open waits for `together`."""
        world.open.setdefault(self.id, set()).discard(resource.urn)
        messages = []
        for read, verdict in self._verdicts(Subject(resource, world)):
            if isinstance(verdict, Finding):
                messages.append(verdict.message(resource, read.field.path))
            else:
                world.open[self.id].add(resource.urn)
        return messages

    def together(self, world: World, graph: Graph) -> Iterator[tuple[str, str]]:
        """(URN, message) of everything that was left open, now with the whole stack. Still open is a violation."""
        for urn in sorted(world.open.get(self.id, ())):
            resource = world.seen[urn]
            for read, verdict in self._verdicts(Subject(resource, world)):
                if isinstance(verdict, Open):
                    for finding in self._closed(Subject(resource, world, graph), read):
                        yield urn, finding.message(resource, read.field.path)

    def _verdicts(self, subject: Subject) -> Iterator[tuple["_Read", Finding | Open]]:
        """Every verdict on every value that the rule reads of the resource."""
        try:
            for read in self._reads(subject.resource) if self._applies(subject) else ():
                unknown = read.field.value is UNKNOWN
                for verdict in [OPEN] if unknown else self._judged(read.field, subject):
                    yield read, verdict
        except SettingsError as error:
            # Every rule would say it of every resource; one of them does, always the same.
            if subject.world.told.setdefault(subject.resource.urn, self.id) == self.id:
                yield NOTHING, _no_ledger(error)

    def _applies(self, subject: Subject) -> bool:
        if not any(fnmatchcase(subject.resource.type, kind) for kind in self.reads):
            return False
        if self.tiers == EVERYWHERE:
            return True
        return (subject.own.tier if subject.own else HOST) in self.tiers

    def _reads(self, resource: Resource) -> Iterator["_Read"]:
        for kind, patterns in self.reads.items():
            if fnmatchcase(resource.type, kind):
                for pattern in patterns:
                    yield from (_Read(pattern, one) for one in resource.fields(pattern))
                if not patterns:
                    yield NOTHING

    def _judged(self, one: Field, subject: Subject) -> Sequence[Finding | Open]:
        try:
            return list(self.check(one, subject))
        except SettingsError:
            raise
        except Exception as error:  # fail closed, and without the error's text: it may carry a value
            place = extract_tb(error.__traceback__)[-1]
            return [
                Finding(
                    "cannot be judged",
                    f"the rule itself failed with {type(error).__name__} in {place.name}, line {place.lineno}",
                    "write the value in its usual form, and report this as a fault of the policy pack",
                )
            ]

    def _closed(self, subject: Subject, read: "_Read") -> Iterator[Finding]:
        """Findings on an open value, with the whole stack: on itself, or on everything it may turn out to be."""
        values = [read.field.value] if read.field.value is not UNKNOWN else self._candidates(subject, read)
        if not values:
            yield _unknown(self)
        for value in values:
            for verdict in self._judged(Field(read.field.path, value), subject):
                yield verdict if isinstance(verdict, Finding) else _unknown(self)

    def _candidates(self, subject: Subject, read: "_Read") -> list[str]:
        """What an unknown value can be: the names of the resources it was made from, if those tell it all."""
        links = self.links.get(read.pattern, {})
        assert subject.graph is not None  # noqa: S101 - `together` always has one
        sources = subject.graph.behind(subject.resource.urn, read.field.path)
        names = [(links.get(source.type), name.value) for source in sources for name in source.fields("name")]
        if any(template is None or not isinstance(name, str) for template, name in names):
            return []
        return [str(template).format(name) for template, name in names]


class _Read(NamedTuple):
    """A value, and the pattern of the rule that found it."""

    pattern: str
    field: Field


NOTHING: Final = _Read("", Field("", None))
"""What a rule reads that judges a resource as a whole."""


def _unknown(rule: Rule) -> Finding:
    return Finding(
        "not known at preview",
        f"it cannot be decided before the deploy whether this holds: {rule.title}",
        "give it an explicit value, or the name of a resource of this stack that has an explicit name",
    )


def _no_ledger(error: SettingsError) -> Finding:
    return Finding(
        error.file,
        "the ledger does not tell what this stack may do, so nothing in it can be allowed",
        "correct the ledger as the violation of protected-reservation says",
    )


def rule(
    *,
    id: str,
    title: str,
    references: tuple[str, ...],
    reads: Mapping[str, tuple[str, ...]],
    links: Mapping[str, Mapping[str, str]] | None = None,
    tiers: frozenset[str] = ENVIRONMENTS,
    exemptable: bool = False,
) -> Callable[[Check], Rule]:
    """Makes a check the rule `id` of the family that its module is named after."""

    def made(check: Check) -> Rule:
        family = check.__module__.rpartition(".")[2]
        return Rule(id, family, title, references, reads, check, links or {}, tiers, exemptable)

    return made
