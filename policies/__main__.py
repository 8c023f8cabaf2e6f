"""The pack as the engine starts it; nothing imports this module.
The ledger is `BULKHEAD_LEDGER`, or `Pulumi.host.yaml` beside the pack; verdicts go to `BULKHEAD_VERDICTS`, if set;
what the host knows of its backups is `BULKHEAD_BACKUPS`, if a command has asked it."""

import os
from pathlib import Path

from policies.registry import RULES
from policies.server import Server, recorder, serve
from policies.world import World
from settings.backup import LAST_KNOWN

BESIDE = Path(__file__).resolve().parent.parent / "Pulumi.host.yaml"

serve(
    Server(
        RULES,
        World.of(Path(os.environ.get("BULKHEAD_LEDGER") or BESIDE), os.environ.get(LAST_KNOWN)),
        recorder(os.environ.get("BULKHEAD_VERDICTS")),
    )
)
