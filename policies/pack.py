"""Rules as CrossGuard policies. Each is a resource policy, which blocks creation, and a stack policy of the same name
for what one resource leaves open."""

from collections.abc import Iterable

from pulumi_policy import (
    EnforcementLevel,
    Policy,
    ReportViolation,
    ResourceValidationArgs,
    ResourceValidationPolicy,
    StackValidationArgs,
    StackValidationPolicy,
)

from policies.rule import Rule
from policies.world import Graph, Resource, World


def policies(rules: Iterable[Rule], world: World) -> list[Policy]:
    """Both policies of every rule, all mandatory."""
    return [policy for rule in rules for policy in (_alone(rule, world), _together(rule, world))]


def _alone(rule: Rule, world: World) -> Policy:
    def validate(args: ResourceValidationArgs, report: ReportViolation) -> None:
        resource = Resource(args.resource_type, args.name, args.urn, args.props)
        world.seen[args.urn] = resource
        for message in rule.alone(resource, world):
            report(message, args.urn)

    return ResourceValidationPolicy(rule.id, rule.title, validate, EnforcementLevel.MANDATORY)


def _together(rule: Rule, world: World) -> Policy:
    def validate(args: StackValidationArgs, report: ReportViolation) -> None:
        for urn, message in rule.together(world, Graph(world, args.resources)):
            report(message, urn)

    return StackValidationPolicy(rule.id, rule.title, validate, EnforcementLevel.MANDATORY)
