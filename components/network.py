"""Network: one bridge of an environment, in the environment's subnet, without a way out unless asked for.

It makes no firewall rule: what keeps other environments from a published port is the host stack's business.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import pulumi
import pulumi_docker as docker

from components.labels import label_inputs, labels
from settings.ledger import Tier


@dataclass(frozen=True)
class NetworkArgs:
    """A bridge. `name`: the engine's name for it, explicit so that policy knows it at preview.

    `subnet`: CIDR inside the environment's own. `internal`: no route out of the bridge (the default).
    `declared`: what policies are to know of it, as in `x-bulkhead`: `exempt`.
    """

    name: str
    environment: str
    tier: Tier
    subnet: str
    internal: bool = True
    labels: Mapping[str, str] = field(default_factory=dict)
    declared: Mapping[str, Any] = field(default_factory=dict)


class Network(pulumi.ComponentResource):
    """A bridge network. `network_name` is known only once the bridge is there, so users of it wait."""

    network_name: pulumi.Output[str]
    subnet: str

    def __init__(self, name: str, args: NetworkArgs, opts: pulumi.ResourceOptions | None = None) -> None:
        super().__init__("bulkhead:index:Network", name, dict(args.declared), opts)
        network = docker.Network(
            f"{name}-bridge",
            name=args.name,
            driver="bridge",
            internal=args.internal,
            ipam_configs=[{"subnet": args.subnet}],
            labels=label_inputs(args.labels, labels(args.environment, args.tier)),
            # Two bridges cannot share a name or a subnet, so a changed one has to go before the new one comes.
            opts=pulumi.ResourceOptions(parent=self, delete_before_replace=True),
        )
        self.network_name = network.name
        self.subnet = args.subnet
        self.register_outputs({"network_name": self.network_name, "subnet": args.subnet})
