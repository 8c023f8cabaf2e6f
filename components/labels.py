"""Labels: the names under which everything of Bulkhead is found on the engine again.

Monitoring, `make down` and the policy pack recognise a resource by these, never by guessing from its name.
"""

from collections.abc import Mapping
from typing import Any

import pulumi

from settings.errors import Frozen
from settings.host import SERVICE_LABEL

ENVIRONMENT = "bulkhead.environment"
TIER = "bulkhead.tier"
SERVICE = SERVICE_LABEL
FILES = "bulkhead.files"


def labels(environment: str, tier: str, service: str | None = None) -> dict[str, str]:
    """The labels of one resource: its environment, its tier and, where it applies, its service."""
    own = {ENVIRONMENT: environment, TIER: str(tier)}
    return own if service is None else own | {SERVICE: service}


def label_inputs(*sets: Mapping[str, pulumi.Input[str]]) -> list[Any]:
    """Label sets merged (a later set wins) in the list form of docker resources, in a stable order.

    Untyped, since each docker resource declares a class of its own for the same pair.
    """
    merged: dict[str, pulumi.Input[str]] = {}
    for one in sets:
        merged |= one
    return [{"label": label, "value": value} for label, value in sorted(merged.items())]


def declared(extension: Frozen) -> dict[str, Any]:
    """What is written in an `x-bulkhead`, as inputs of a component: there policies read it. Defaults are left out."""
    return extension.model_dump(mode="json", exclude_defaults=True)
