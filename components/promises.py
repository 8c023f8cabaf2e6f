"""Promises: what the host stack has put out, as an input that policies see. It makes nothing.

The engine shows policies no resource that is only read, so a stack reference by itself tells them nothing.
"""

from collections.abc import Mapping
from typing import Any

import pulumi

SHOWN = ("capacity", "environments", "firewall")


class Promises(pulumi.ComponentResource):
    """The machine and its environments' budgets, `outputs` of the host stack; every stack shows them, also host."""

    def __init__(
        self, name: str, outputs: pulumi.Input[Mapping[str, Any]], opts: pulumi.ResourceOptions | None = None
    ) -> None:
        shown_ = pulumi.Output.from_input(outputs).apply(shown)
        super().__init__("bulkhead:index:Promises", name, {"outputs": shown_}, opts)
        self.register_outputs({})


def shown(outputs: Mapping[str, Any] | None) -> dict[str, Any]:
    """Of a stack's outputs, those that policies judge by. Empty before its first deploy."""
    return {key: outputs[key] for key in SHOWN if key in outputs} if outputs else {}
