"""Promises: what the host stack has put out, as an input that policies see. It makes nothing.

The engine shows policies no resource that is only read, so a stack reference by itself tells them nothing.
"""

from typing import Any

import pulumi

SHOWN = ("capacity", "environments", "firewall")


class Promises(pulumi.ComponentResource):
    """The deployed machine and its environments' budgets: every stack shows them, the host's own too."""

    def __init__(self, name: str, deployed: pulumi.StackReference, opts: pulumi.ResourceOptions | None = None) -> None:
        super().__init__("bulkhead:index:Promises", name, {"outputs": deployed.outputs.apply(shown)}, opts)
        self.register_outputs({})


def shown(outputs: Any) -> dict[str, Any]:
    """Of a stack's outputs, those that policies judge by. Empty before its first deploy."""
    return {key: outputs[key] for key in SHOWN if key in (outputs or {})}
