"""Device: how fast the disk under the engine's data is, measured once on the host (host/device.py) and kept there.

It makes no ceiling: `components.slice` takes shares of what is measured here.
"""

import json
import shlex
from collections.abc import Mapping
from pathlib import Path

import pulumi

from components.host_command import HostCommand, HostCommandArgs
from settings.host import HostFacts

PROGRAM = Path(__file__).parents[1] / "host" / "device.py"
CACHE = "/var/lib/bulkhead/device.json"
SPEEDS = ("read_bps", "write_bps", "read_iops", "write_iops")


class Device(pulumi.ComponentResource):
    """`speed`: bytes and operations a second (SPEEDS); None where there is nothing to measure, or it failed."""

    speed: pulumi.Output[Mapping[str, int] | None]

    def __init__(self, name: str, facts: HostFacts, opts: pulumi.ResourceOptions | None = None) -> None:
        super().__init__("bulkhead:index:Device", name, None, opts)
        self.speed = pulumi.Output.from_input(None)
        # Weights divide what there is at any moment; ceilings need to know how much that is.
        if facts.io == "throttle":
            command = HostCommand(
                f"{name}-speed",
                HostCommandArgs(
                    host=facts.address,
                    create=script(facts),
                    delete=f"rm -f {CACHE}\nrmdir {Path(CACHE).parent} || true\n",
                ),
                opts=pulumi.ResourceOptions(parent=self),
            )
            self.speed = command.stdout.apply(speed)
        self.register_outputs({"speed": self.speed})


def script(facts: HostFacts) -> str:
    """Runs the measuring program on the host; a few seconds the first time, then it only prints what it kept."""
    if facts.device is None:
        raise ValueError("there is no device to measure")
    words = shlex.join(["python3", "-", facts.data_root, facts.device.number, str(facts.device.size)])
    return f"{words} <<'PROGRAM'\n{PROGRAM.read_text()}PROGRAM\n"


def speed(printed: str | None) -> Mapping[str, int] | None:
    """What the program printed, as speeds; None with a warning in the deploy's output where it gave a reason."""
    try:
        told = json.loads(printed or "{}")
    except ValueError:
        raise pulumi.RunError(
            f"The host's python3 printed no measurement of the disk, but: {printed}. "
            "See that it runs there without printing anything of its own: python3 -c pass"
        ) from None
    if "why" in told:
        pulumi.log.warn(f"IO is not isolated: {told['why']}")
    return {name: int(told[name]) for name in SPEEDS} if all(name in told for name in SPEEDS) else None
