"""Volume: a named volume of an environment; a protected environment's outlives its stack.

It does not back anything up: that is declared elsewhere, and a volume without it is policy's to refuse.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import pulumi
import pulumi_docker as docker

from components.labels import label_inputs, labels
from settings.ledger import Tier


@dataclass(frozen=True)
class VolumeArgs:
    """A volume. `name`: the engine's name for it. `driver_opts`: options of the `local` driver.

    `declared`: what policies are to know of it, as in `x-bulkhead`: `backup`, `refresh`, `ephemeral`, `exempt`.
    """

    name: pulumi.Input[str]
    environment: str
    tier: Tier
    driver_opts: Mapping[str, str] = field(default_factory=dict)
    labels: Mapping[str, str] = field(default_factory=dict)
    declared: Mapping[str, Any] = field(default_factory=dict)


class Volume(pulumi.ComponentResource):
    """A named volume, `protect`ed and retained when its environment is protected."""

    volume_name: pulumi.Output[str]

    def __init__(self, name: str, args: VolumeArgs, opts: pulumi.ResourceOptions | None = None) -> None:
        super().__init__("bulkhead:index:Volume", name, dict(args.declared), opts)
        keep = args.tier is Tier.PROTECTED
        volume = docker.Volume(
            f"{name}-data",
            name=args.name,
            driver="local",
            driver_opts=dict(args.driver_opts) or None,
            labels=label_inputs(args.labels, labels(args.environment, args.tier)),
            opts=pulumi.ResourceOptions(
                parent=self,
                protect=keep,
                retain_on_delete=keep,
                delete_before_replace=True,  # the name stays the same
                # The engine cannot relabel a volume: it would be deleted and made again, empty. That would also
                # happen at the moment when its environment becomes a protected one.
                ignore_changes=["labels"],
            ),
        )
        self.volume_name = volume.name
        self.register_outputs({"volume_name": self.volume_name})
