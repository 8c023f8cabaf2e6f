"""The pack as the engine starts it; nothing imports this module.
The ledger is `BULKHEAD_LEDGER`, or `Pulumi.host.yaml` beside the pack; verdicts go to `BULKHEAD_VERDICTS`, if set."""

import os
from pathlib import Path

from policies.registry import RULES
from policies.server import Server, recorder, serve
from policies.world import World

BESIDE = Path(__file__).resolve().parent.parent / "Pulumi.host.yaml"

serve(
    Server(
        RULES,
        World.of(Path(os.environ.get("BULKHEAD_LEDGER") or BESIDE)),
        recorder(os.environ.get("BULKHEAD_VERDICTS")),
    )
)
