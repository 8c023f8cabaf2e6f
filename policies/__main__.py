"""Serves the pack to Pulumi. Constructing `PolicyPack` blocks, so nothing imports this module.
The ledger is `BULKHEAD_LEDGER`, or `Pulumi.host.yaml` beside the folder of the pack."""

import os
from pathlib import Path

from pulumi_policy import EnforcementLevel, PolicyPack

from policies.pack import policies
from policies.registry import RULES
from policies.world import World

BESIDE = Path(__file__).resolve().parent.parent / "Pulumi.host.yaml"

PolicyPack(
    name="bulkhead",
    policies=policies(RULES, World.of(Path(os.environ.get("BULKHEAD_LEDGER") or BESIDE))),
    enforcement_level=EnforcementLevel.MANDATORY,
)
