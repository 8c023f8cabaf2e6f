"""What a rule is, and how one is put to a resource: first alone, then, where that leaves it open, with the whole stack.
A rule never meets an unknown value: it is resolved through dependencies first, and otherwise a violation."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from fnmatch import fnmatchcase
from traceback import extract_tb
from typing import Any, Final, NamedTuple

from pydantic import ValidationError

from policies.hostpath import normal
from policies.wire import UNKNOWN
from policies.world import HOST, OURS, STACK, Field, Graph, Resource, World
from settings.errors import SettingsError
from settings.exemption import Exemption
from settings.ledger import Environment, Ledger, Tier

ENVIRONMENTS: Final = frozenset({*Tier})
EVERYWHERE: Final = frozenset({*Tier, HOST})
PROTECTED: Final = frozenset({Tier.PROTECTED})
BEST_EFFORT: Final = frozenset({Tier.BEST_EFFORT})
NOBODY: Final[frozenset[str]] = frozenset()

ADVISED = "advisoryTiers"
"""The option of a rule that is only advice in some tiers."""


class Level(StrEnum):
    """CrossGuard's enforcement levels."""

    ADVISORY = "advisory"
    MANDATORY = "mandatory"
    REMEDIATE = "remediate"
    DISABLED = "disabled"


@dataclass(frozen=True)
class Finding:
    """What is wrong with one value. `value` is as the message shows it: never of a variable, secret or script.

    `at`: the property, where the rule judged more than the one value that it was given. `environment`: whose
    promise it is about, where the rule judged the ledger.
    """

    value: str
    consequence: str
    fix: str
    at: str = ""
    environment: str = ""

    def message(self, resource: Resource, path: str) -> str:
        """One line: which resource, which value, what it leads to, what to do."""
        kind = resource.type.rpartition(":")[2]
        where = f"{resource.name} ({kind})" + (f": {path}" if path else "")
        return f"{where}: {self.value}: {self.consequence}. Fix: {self.fix}."


class Open:
    """The verdict of a check that needs the whole stack; `OPEN` is the only one."""


OPEN: Final = Open()


class UndecidedError(Exception):
    """A check met a value that is not known yet; the frame takes it as `OPEN`."""


@dataclass(frozen=True)
class Option:
    """One property of a rule in a policy config file: its JSON schema and what holds without it."""

    schema: Mapping[str, Any]
    default: Any


def listed(default: Sequence[Any], about: str) -> Option:
    """An option that is a list of texts."""
    return Option({"type": "array", "items": {"type": "string"}, "description": about}, list(default))


def number(default: float, about: str, minimum: float = 0) -> Option:
    """An option that is a number."""
    return Option({"type": "number", "minimum": minimum, "description": about}, default)


@dataclass(frozen=True)
class Setting:
    """How a policy config file has one rule: its level, and the options that it sets."""

    level: Level
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Subject:
    """What a check may look at beside its field. `graph` is None while the resource is judged alone."""

    resource: Resource
    world: World
    options: Mapping[str, Any] = field(default_factory=dict)
    graph: Graph | None = None

    @property
    def ledger(self) -> Ledger:
        """The ledger; SettingsError when it cannot be read."""
        return self.world.ledger

    @property
    def own(self) -> Environment | None:
        """The environment that the resource's stack is; None for the host's."""
        return None if self.resource.stack == HOST else self.ledger.environment(self.resource.stack)

    @property
    def tier(self) -> str:
        """The tier of the stack; `host` for the host's."""
        return self.own.tier if self.own else HOST

    @property
    def others(self) -> list[Environment]:
        """Every other environment of the ledger."""
        return [one for one in self.ledger.environments.values() if one != self.own]

    def folder(self, written: str) -> str:
        """A folder of an option, normalised: `{environment}` is the stack's name, `{checkout}` the ledger's folder."""
        checkout = str(self.world.settings.folder)
        return normal(written.replace("{environment}", self.resource.stack).replace("{checkout}", checkout))

    def all(self, pattern: str) -> list[Any]:
        """The values at a pattern, without unset ones. UndecidedError if one is unknown."""
        found = [value for _, value in self.resource.fields(pattern)]
        if UNKNOWN in found:
            raise UndecidedError
        return [value for value in found if value is not None]

    def one(self, name: str) -> Any:
        """The value of a property, None if it is unset. UndecidedError if it is unknown."""
        return next(iter(self.all(name)), None)

    def whole(self) -> Graph:
        """The graph. UndecidedError while the resource is judged alone."""
        if self.graph is None:
            raise UndecidedError
        return self.graph

    def measured(self) -> Ledger:
        """The ledger in absolute amounts. UndecidedError while nobody has said what the machine has."""
        ledger = self.world.measured()
        if ledger is None:
            raise UndecidedError
        return ledger


Check = Callable[[Field, Subject], Iterable[Finding | Open]]
Remedy = Callable[[Resource], Mapping[str, Any] | None]


class Verdict(NamedTuple):
    """What the pack says about one resource. `exemption` is set where one takes the violation away."""

    rule: "Rule"
    resource: Resource
    path: str
    message: str
    level: Level
    exemption: Exemption | None = None


@dataclass(frozen=True)
class Rule:
    """One rule of the pack.

    `reads`: which values of which resource types (`*` matches any) it judges, one at a time; no value: the whole.
    `links`: for a pattern of `reads`, the types whose name stands for an unknown value that was made from them.
    `tiers`: the tiers of the stacks it applies to; the host's stack counts as the tier `host`.
    `references`: CIS Docker Benchmark 1.6.0 and Pod Security Standards ids, or the path it closes.
    `exemptable`: the tiers in which an exemption is accepted. None: it is a headline rule, which can neither be
    exempted nor relaxed by a policy config. `remedy`: the properties that make a resource keep it, by wire name.
    """

    id: str
    family: str
    title: str
    references: tuple[str, ...]
    reads: Mapping[str, tuple[str, ...]]
    check: Check
    links: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    tiers: frozenset[str] = ENVIRONMENTS
    exemptable: frozenset[str] = NOBODY
    options: Mapping[str, Option] = field(default_factory=dict)
    remedy: Remedy | None = None

    @property
    def headline(self) -> bool:
        """Whether neither exemption nor config can take it away."""
        return not self.exemptable

    @property
    def level(self) -> Level:
        """The level without a config."""
        return Level.REMEDIATE if self.remedy else Level.MANDATORY

    @property
    def defaults(self) -> dict[str, Any]:
        """Its options without a config."""
        return {name: option.default for name, option in self.options.items()}

    def alone(self, resource: Resource, world: World, setting: Setting | None = None) -> list[Verdict]:
        """What follows from the resource's inputs and the ledger. What stays open waits for `together`."""
        waiting = world.open.setdefault(self.id, set())
        waiting.discard(resource.urn)
        if not self._matches(resource):
            return []
        verdicts = []
        subject = self._subject(resource, world, setting)
        for read, verdict in self._verdicts(subject):
            if isinstance(verdict, Finding):
                verdicts.append(self._said(verdict, read, subject, setting))
            else:
                waiting.add(resource.urn)
        return verdicts

    def broken(self, resource: Resource, world: World, setting: Setting | None = None) -> bool:
        """Whether the resource by itself breaks it for certain, and no exemption holds: then a remedy is wanted."""
        if not self._matches(resource):
            return False
        subject = self._subject(resource, world, setting)
        findings = (found for _, found in self._verdicts(subject) if isinstance(found, Finding))
        return any(self._exempted(subject, found.environment)[0] is None for found in findings)

    def together(self, world: World, graph: Graph, setting: Setting | None = None) -> Iterator[Verdict]:
        """What everything that was left open comes to, now with the whole stack. Still open is a violation."""
        for urn in sorted(world.open.get(self.id, ())):
            subject = self._subject(world.seen[urn], world, setting)
            with_all = self._subject(world.seen[urn], world, setting, graph)
            for read, verdict in self._verdicts(subject):
                if isinstance(verdict, Open):
                    for finding in self._closed(with_all, read):
                        yield self._said(finding, read, with_all, setting)

    def applies(self, resource: Resource, world: World) -> bool:
        """Whether the rule is about such a resource, in such a stack."""
        return self._matches(resource) and self._in_tier(Subject(resource, world))

    def _subject(
        self, resource: Resource, world: World, setting: Setting | None, graph: Graph | None = None
    ) -> Subject:
        return Subject(resource, world, self.defaults | dict(setting.options if setting else {}), graph)

    def _said(self, finding: Finding, read: "_Read", subject: Subject, setting: Setting | None) -> Verdict:
        path = finding.at or read.field.path
        message = finding.message(subject.resource, path)
        exemption, objection = self._exempted(subject, finding.environment)
        if objection:
            message = f"{message.removesuffix('.')}. Its exemption does not count: {objection}."
        return Verdict(self, subject.resource, path, message, self._level(subject, setting), exemption)

    def _level(self, subject: Subject, setting: Setting | None) -> Level:
        if self.headline:
            return Level.MANDATORY
        level = setting.level if setting else self.level
        try:
            advised = subject.tier in subject.options.get(ADVISED, ())
        except SettingsError:
            advised = False
        # What a remedy leaves as it is, is mandatory, as in the SDK.
        return Level.ADVISORY if advised or level is Level.ADVISORY else Level.MANDATORY

    def _exempted(self, subject: Subject, environment: str) -> tuple[Exemption | None, str]:
        """The exemption that holds for the resource, or why the one that is there does not."""
        objection = ""
        for written in exemptions(subject.resource, subject.world):
            if not isinstance(written, Mapping) or written.get("rule") != self.id:
                continue
            if written.get("environment", environment) != environment:
                continue
            try:
                found = accepted(written, self, subject)
            except SettingsError:  # a stack that the ledger does not know has no tier
                continue
            if isinstance(found, Exemption):
                return found, ""
            objection = found
        return None, objection

    def _verdicts(self, subject: Subject) -> Iterator[tuple["_Read", Finding | Open]]:
        """Every verdict on every value that the rule reads of the resource."""
        try:
            for read in self._reads(subject.resource) if self._in_tier(subject) else ():
                unknown = read.field.value is UNKNOWN
                for verdict in [OPEN] if unknown else self._judged(read.field, subject):
                    yield read, verdict
        except SettingsError as error:
            # Of the stack, protected-reservation says it; a component makes nothing by itself.
            if subject.resource.provider is None:
                return
            # Every rule would say it of every resource; one of them does, always the same.
            if subject.world.told.setdefault(subject.resource.urn, self.id) == self.id:
                yield NOTHING, _no_ledger(error)

    def _matches(self, resource: Resource) -> bool:
        return any(kind == resource.type or fnmatchcase(resource.type, kind) for kind in self.reads)

    def _in_tier(self, subject: Subject) -> bool:
        return self.tiers == EVERYWHERE or subject.tier in self.tiers

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
        except UndecidedError:
            return [OPEN]
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
            try:
                verdicts = self._judged(Field(read.field.path, value), subject)
            except SettingsError:  # said of the resource already, or of the stack by protected-reservation
                verdicts = []
            yield from (verdict if isinstance(verdict, Finding) else _unknown(self) for verdict in verdicts)

    def _candidates(self, subject: Subject, read: "_Read") -> list[str]:
        """What an unknown value can be: the names of the resources it was made from, if those tell it all."""
        links = self.links.get(read.pattern, {})
        sources = subject.whole().behind(subject.resource.urn, read.field.path)
        names = [(links.get(source.type), name.value) for source in sources for name in source.fields("name")]
        if any(template is None or not isinstance(name, str) for template, name in names):
            return []
        return [str(template).format(name) for template, name in names]


def exemptions(resource: Resource, world: World) -> list[Any]:
    """Everything written to exempt a resource: by the components above it, and in the ledger where it is the stack."""
    if resource.type == STACK:
        try:
            return [one.model_dump(mode="json") for one in world.settings.exempt]
        except SettingsError:
            return []
    components = (one for one in (resource, *world.above(resource)) if one.type.startswith(OURS))
    lists = (one.props.get("exempt") for one in components)
    return [exemption for written in lists if isinstance(written, list) for exemption in written]


def accepted(written: Mapping[str, Any], rule: Rule, subject: Subject) -> Exemption | str:
    """The exemption, or why it does not count for this rule and resource on this day."""
    try:
        fields = {key: value for key, value in written.items() if key in Exemption.model_fields}
        exemption = Exemption.model_validate(fields)
    except ValidationError:
        return "it needs rule, reason, owner and expires (a date)"
    if subject.tier not in rule.exemptable:
        return f"{rule.id} accepts none" + ("" if rule.headline else f" in a {subject.tier} environment")
    if exemption.expires < subject.world.today:
        return f"it expired on {exemption.expires}; renew it with its owner ({exemption.owner}), or keep the rule"
    return exemption


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
    exemptable: frozenset[str] = NOBODY,
    advised: frozenset[str] = NOBODY,
    options: Mapping[str, Option] | None = None,
    remedy: Remedy | None = None,
) -> Callable[[Check], Rule]:
    """Makes a check the rule `id` of the family that its module is named after.

    `advised`: the tiers in which it is advice; a policy config can name others (`advisoryTiers`).
    """
    tiered = {
        ADVISED: Option(
            {
                "type": "array",
                "items": {"type": "string", "enum": [str(tier) for tier in Tier]},
                "description": "Tiers in which a violation is advice and does not stop a deploy.",
            },
            sorted(advised),
        )
    }

    def made(check: Check) -> Rule:
        family = check.__module__.rpartition(".")[2]
        own = {**(options or {}), **(tiered if exemptable else {})}
        return Rule(id, family, title, references, reads, check, links or {}, tiers, exemptable, own, remedy)

    return made
