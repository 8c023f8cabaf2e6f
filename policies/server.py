"""Serves the rules to the engine over its protocol for analyzers: one reading of a resource for all rules.
Why not the SDK's PolicyPack: unknowns, levels by tier, and time; see ADR 15."""

import json
import sys
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any, NoReturn

import grpc  # type: ignore[import-untyped]
from google.protobuf import empty_pb2, json_format, struct_pb2  # type: ignore[import-untyped]
from pulumi.runtime.proto import analyzer_pb2, plugin_pb2
from pulumi.runtime.proto.analyzer_pb2_grpc import AnalyzerServicer, add_AnalyzerServicer_to_server

from policies.rule import Level, Rule, Setting, Verdict
from policies.wire import marked, properties, raw
from policies.world import Graph, Resource, World
from settings.errors import SettingsError, did_you_mean

NAME = "bulkhead"
VERSION = version(NAME)
LEVELS: Mapping[Level, Any] = {level: analyzer_pb2.EnforcementLevel.Value(level.name) for level in Level}
MESSAGE_BYTES = 400 * 2**20
"""What the SDK allows too: the stack's analysis is one message."""


class ConfigError(Exception):
    """A policy config that names what is not there, or relaxes what cannot be relaxed."""


class Server(AnalyzerServicer):
    """One run of the engine over one stack. Requests come one at a time (see `serve`), so nothing is locked.

    `record`: takes one JSON-serialisable verdict after the other, for the report.
    """

    def __init__(
        self, rules: Sequence[Rule], world: World, record: Callable[[Mapping[str, Any]], None] | None = None
    ) -> None:
        self._rules, self._world, self._record = rules, world, record
        self._settings: Mapping[str, Setting] = {}
        self._stack = ""
        self._said: set[tuple[str, str]] = set()  # (rule, URN) of every verdict that is no pass

    def GetPluginInfo(self, _request: Any, _context: Any) -> Any:
        """The version of the package."""
        return plugin_pb2.PluginInfo(version=VERSION)

    def GetAnalyzerInfo(self, _request: Any, _context: Any) -> Any:
        """Every rule, as a policy of resources and one of the stack."""
        info = analyzer_pb2.AnalyzerInfo(name=NAME, version=VERSION, supportsConfig=True)
        for rule in self._rules:
            for kind in (analyzer_pb2.POLICY_TYPE_RESOURCE, analyzer_pb2.POLICY_TYPE_STACK):
                policy = info.policies.add(
                    name=rule.id, description=rule.title, enforcementLevel=LEVELS[rule.level], policy_type=kind
                )
                policy.tags.extend([rule.family, *rule.references])
                if rule.options:
                    schemas = {name: _with_default(option) for name, option in rule.options.items()}
                    policy.configSchema.properties.update(schemas)
        return info

    def Configure(self, request: Any, context: Any) -> Any:
        """Takes the levels and options of a policy config; ends the run for one that cannot be meant."""
        try:
            self._settings = settings_of(request.policyConfig, self._rules)
        except ConfigError as error:
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))
        return empty_pb2.Empty()

    def ConfigureStack(self, _request: Any, _context: Any) -> Any:
        """Nothing to take over: a resource's URN names its stack."""
        return analyzer_pb2.AnalyzerStackConfigureResponse()

    def Cancel(self, _request: Any, _context: Any) -> Any:
        """Nothing to end: no request takes long."""
        return empty_pb2.Empty()

    def Remediate(self, request: Any, _context: Any) -> Any:
        """Properties that rules set by themselves; unknowns and secrets of the resource stay what they are."""
        response = analyzer_pb2.RemediateResponse()
        resource = resource_of(request)
        for rule in self._rules:
            setting = self._settings.get(rule.id)
            if (setting.level if setting else rule.level) is not Level.REMEDIATE or rule.remedy is None:
                continue
            if not rule.broken(resource, self._world, setting):
                continue
            changes = rule.remedy(resource) or {}
            # A secret that is written anew would be one no more: then the violation stands.
            secret = any(key in request.properties and marked(request.properties.fields[key]) for key in changes)
            if changes and not secret:
                made = struct_pb2.Struct()
                made.CopyFrom(response.remediations[-1].properties if response.remediations else request.properties)
                made.update(raw(dict(changes)))
                response.remediations.add(
                    policyName=rule.id,
                    policyPackName=NAME,
                    policyPackVersion=VERSION,
                    description=rule.title,
                    properties=made,
                )
                self._tell(rule, resource, {"verdict": "remediated", "level": rule.level, "path": ", ".join(changes)})
                resource = Resource(**{**vars(resource), "props": {**resource.props, **changes}})
        return response

    def Analyze(self, request: Any, _context: Any) -> Any:
        """What one resource breaks; mandatory violations block it."""
        resource = resource_of(request)
        self._stack = resource.stack
        self._world.seen[resource.urn] = resource
        self._world.told.pop(resource.urn, None)
        return self._answer(
            verdict
            for rule in self._enabled()
            for verdict in self._or_pass(rule, resource, rule.alone(resource, self._world, self._settings.get(rule.id)))
        )

    def AnalyzeStack(self, request: Any, _context: Any) -> Any:
        """What only the whole stack decides."""
        graph = Graph(self._world, list(request.resources))
        response = self._answer(
            verdict
            for rule in self._enabled()
            for verdict in rule.together(self._world, graph, self._settings.get(rule.id))
        )
        if self._record:
            for rule in self._enabled():
                for urn in sorted(self._world.open.get(rule.id, ())):
                    if (rule.id, urn) not in self._said:
                        self._tell(rule, self._world.seen[urn], {"verdict": "pass", "level": rule.level})
            self._record({"stack": self._stack, "complete": True})
        return response

    def _enabled(self) -> Iterable[Rule]:
        for rule in self._rules:
            setting = self._settings.get(rule.id)
            if setting is None or setting.level is not Level.DISABLED:
                yield rule

    def _or_pass(self, rule: Rule, resource: Resource, verdicts: Sequence[Verdict]) -> Sequence[Verdict]:
        """The same verdicts; for the report, that there were none although the rule is about this resource."""
        if self._record and not verdicts and resource.urn not in self._world.open.get(rule.id, ()):
            with suppress(SettingsError):
                if rule.applies(resource, self._world):
                    self._tell(rule, resource, {"verdict": "pass", "level": rule.level})
        return verdicts

    def _answer(self, verdicts: Iterable[Verdict]) -> Any:
        response = analyzer_pb2.AnalyzeResponse()
        for verdict in {(one.rule.id, one.resource.urn, one.message): one for one in verdicts}.values():
            exemption = verdict.exemption
            self._said.add((verdict.rule.id, verdict.resource.urn))
            self._tell(
                verdict.rule,
                verdict.resource,
                {
                    "verdict": "exempt" if exemption else "violation",
                    "level": verdict.level,
                    "path": verdict.path,
                    "message": verdict.message,
                    "exemption": exemption
                    and exemption.model_dump(mode="json", include={"reason", "owner", "expires"}),
                },
            )
            if exemption is None:
                response.diagnostics.add(
                    policyName=verdict.rule.id,
                    policyPackName=NAME,
                    policyPackVersion=VERSION,
                    description=verdict.rule.title,
                    message=f"{verdict.rule.title}\n{verdict.message}",
                    urn=verdict.resource.urn,
                    enforcementLevel=LEVELS[verdict.level],
                )
        return response

    def _tell(self, rule: Rule, resource: Resource, verdict: Mapping[str, Any]) -> None:
        if self._record:
            about = {
                "stack": resource.stack,
                "rule": rule.id,
                "family": rule.family,
                "title": rule.title,
                "references": list(rule.references),
                "urn": resource.urn,
                "type": resource.type,
                "resource": resource.name,
            }
            self._record({**about, "path": "", "message": "", "exemption": None, **verdict})


def resource_of(request: Any) -> Resource:
    """The resource of an AnalyzeRequest."""
    options = request.options
    return Resource(
        type=request.type,
        name=request.name,
        urn=request.urn,
        props=properties(request.properties),
        parent=options.parent,
        provider=properties(request.provider.properties) if request.HasField("provider") else None,
        protect=options.protect,
        delete_before_replace=options.deleteBeforeReplace if options.deleteBeforeReplaceDefined else None,
    )


def settings_of(config: Mapping[str, Any], rules: Sequence[Rule]) -> dict[str, Setting]:
    """The setting of each rule. The engine gives every rule's, with defaults filled in, and passes on what it
    does not know without a word.

    ConfigError for an unknown rule or option, and for a headline rule below mandatory.
    """
    known = {rule.id: rule for rule in rules}
    found = {}
    for name in config:
        if name == "all":
            continue
        if name not in known:
            raise ConfigError(f"policy config: {name}: no such rule. {did_you_mean(name, known)}")
        rule = known[name]
        options = json_format.MessageToDict(config[name].properties)
        for option in options:
            if option not in rule.options:
                hint = did_you_mean(option, rule.options) or "It has none."
                raise ConfigError(f"policy config: {name}.{option}: no such option. {hint}")
        level = Level(analyzer_pb2.EnforcementLevel.Name(config[name].enforcementLevel).lower())
        if rule.headline and level not in (Level.MANDATORY, Level.REMEDIATE):
            raise ConfigError(
                f"policy config: {name}: {level}: this rule is always mandatory: without it an environment is not kept "
                "apart. Remove the line; where it says so of all rules, name those that you mean"
            )
        found[name] = Setting(level, options)
    return found


def config_schema(rules: Sequence[Rule]) -> dict[str, Any]:
    """The JSON schema of a policy config file, as `pulumi --policy-pack-config` takes it."""
    level = {"enum": [str(one) for one in Level]}
    always = {"enum": [str(Level.MANDATORY)]}
    entries = {}
    for rule in rules:
        levels = always if rule.headline else level
        options = {name: _with_default(option) for name, option in rule.options.items()}
        entries[rule.id] = {
            "description": rule.title,
            "anyOf": [
                levels,
                {
                    "type": "object",
                    "properties": {"enforcementLevel": levels, **options},
                    "additionalProperties": False,
                },
            ],
        }
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "Policy config of Bulkhead",
        "type": "object",
        "properties": {"all": {"description": "every rule; cannot relax the headline ones", **always}, **entries},
        "additionalProperties": False,
    }


def _with_default(option: Any) -> dict[str, Any]:
    return {**option.schema, "default": option.default}


def recorder(path: str | None) -> Callable[[Mapping[str, Any]], None] | None:
    """Appends verdicts to a file as JSON lines; None where no file is wanted."""
    if not path:
        return None
    file = Path(path).open("a", encoding="utf-8", buffering=1)  # noqa: SIM115 - open as long as the pack runs
    return lambda verdict: print(json.dumps(verdict), file=file)


def serve(server: Server) -> NoReturn:
    """Answers the engine on a port of loopback, which it reads from standard output, until the engine ends us."""
    # One at a time: the rules' answers depend on what was registered before.
    listener = grpc.server(
        ThreadPoolExecutor(max_workers=1),
        options=[("grpc.max_receive_message_length", MESSAGE_BYTES), ("grpc.max_send_message_length", MESSAGE_BYTES)],
    )
    add_AnalyzerServicer_to_server(server, listener)
    port = listener.add_insecure_port("127.0.0.1:0")
    listener.start()
    print(port, flush=True)
    try:
        threading.Event().wait()
    except KeyboardInterrupt:
        listener.stop(0)
    sys.exit(0)
