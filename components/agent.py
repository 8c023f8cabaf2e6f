"""Agent: the programs of `host/` on the Docker host, what they compare it with, and what starts them regularly.

One file, `/usr/local/lib/bulkhead/host.pyz`, run by systemd's timers, or by its own watch process where there is no
systemd. The outputs of environments' stacks, which it also reads, are put beside `host.json` by the command line.
"""

import base64
import io
import json
import lzma
import textwrap
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pulumi

from components.host_command import HostCommand, HostCommandArgs
from settings.host import HostFacts
from settings.ledger import INTERNET, NO_EGRESS, Environment, Ledger, Tier

LIBRARY = "/usr/local/lib/bulkhead"
PROGRAM = f"{LIBRARY}/host.pyz"
DECLARED = "/etc/bulkhead"
STATE = "/var/lib/bulkhead"
RUN = "/run/bulkhead"
UNITS = "/etc/systemd/system"
NOT_ON_HOST = {"bucket.py"}
"""Runs where deploys do, and needs more than Python's own library."""
VERBS = {"verify": ("verify", "--news"), "keep": ("keep", "--news"), "backup": ("backup", "--due")}
"""What runs regularly, and its arguments."""
LONG = {"backup"}
"""What may take hours, and gives way to everything else meanwhile."""
GIVES_WAY = "TimeoutStartSec=infinity\nNice=19\nIOSchedulingClass=idle\nCPUWeight=idle\nIOWeight=1\n"
LIMIT = "TimeoutStartSec=300\n"
EVERY_SECONDS = 50
"""So that what happens just after a look, and is looked at twice, is reported within a minute."""
PATH = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin\nexport PATH\n"
"""The machine's own programs: a deploy has its Python environment in front, which may go any day."""
LARGEST_SCRIPT = 120 * 1024
"""The kernel takes 128 KiB in one argument."""


@dataclass(frozen=True)
class AgentArgs:
    """`sources`: the folder `host/`. `declared`: the content of host.json, see `declaration`. `facts`: the host's."""

    sources: Path
    declared: pulumi.Input[Mapping[str, Any]]
    facts: HostFacts


class Agent(pulumi.ComponentResource):
    """The agent on the host. Depend it on all that it compares, so that it goes first and comes last."""

    def __init__(self, name: str, args: AgentArgs, opts: pulumi.ResourceOptions | None = None) -> None:
        super().__init__("bulkhead:index:Agent", name, None, opts)
        archive = zipapp(args.sources)
        create = pulumi.Output.from_input(args.declared).apply(lambda declared: install(archive, declared))
        HostCommand(
            f"{name}-program",
            HostCommandArgs(
                host=args.facts.address,
                create=create,
                delete=remove(),
                # A process that was started by hand is gone after a reboot, so a new boot makes the next deploy
                # start it.
                environment={} if args.facts.systemd else {"BOOT_ID": args.facts.boot},
            ),
            opts=pulumi.ResourceOptions(parent=self),
        )
        self.register_outputs({})


def declaration(
    ledger: Ledger,
    facts: HostFacts,
    firewall: Mapping[str, Any],
    slices: Mapping[str, tuple[str, Mapping[str, str]]],
    oom_score_adj: Mapping[Tier, int],
) -> dict[str, Any]:
    """What host.json says. `slices`: the cgroup parent of each environment, and the files that its slice shows."""
    return {
        "version": 1,
        "engine": {
            "version": facts.server_version,
            "cgroup_driver": facts.cgroup_driver,
            "cgroup_version": facts.cgroup_version,
            "data_root": facts.data_root,
        }
        | ({"socket": facts.address} if facts.local else {}),
        "agent": {"verbs": list(VERBS)},
        "outward": ledger.outward,
        "environments": {
            name: {
                "tier": str(one.tier),
                "subnet": str(one.subnet),
                "subnet6": None if one.subnet6 is None else str(one.subnet6),
                "cgroup_parent": slices[name][0],
                "budget": {
                    kind: None if share is None else share.model_dump()
                    for kind, share in (("reservations", one.reservations), ("limits", one.limits))
                },
                "files": dict(slices[name][1]),
                "egress": egress(one),
                "oom_score_adj": oom_score_adj[one.tier],
                "disk": None if one.limits is None else one.limits.disk,
            }
            for name, one in ledger.environments.items()
        },
        "firewall": {key: firewall[key] for key in ("family", "table", "environments")},
    }


def egress(environment: Environment) -> str | list[str] | None:
    """Where an environment may open connections to: `none`, `internet`, or a list; None where nothing is closed."""
    if environment.egress is None:
        return None
    words = [str(one) for one in environment.egress]
    return words[0] if words in ([NO_EGRESS], [INTERNET]) else words


def zipapp(sources: Path) -> bytes:
    """The package `host` as a zip file that python3 runs; the same bytes for the same sources, on any machine.

    Not compressed: what zlib makes of the same input depends on its version.
    """
    main = "import sys\n\nfrom host.__main__ import main\n\nsys.exit(main(sys.argv[1:]))\n"
    files = [path for path in sources.glob("*.py") if path.name not in NOT_ON_HOST]
    content = {"__main__.py": main} | {f"host/{path.name}": path.read_text() for path in files}
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_STORED) as file:
        for name, text in sorted(content.items()):
            file.writestr(zipfile.ZipInfo(name), text)  # dated 1980
    return archive.getvalue()


def install(archive: bytes, declared: Mapping[str, Any]) -> str:
    """Shell text that puts program and declaration in place and (re)starts what runs them. Safe to run twice."""
    # Base 85 takes a sixteenth less room than base 64, and has neither a quote nor a blank.
    packed = textwrap.fill(base64.b85encode(lzma.compress(archive, preset=9)).decode(), 120, break_on_hyphens=False)
    unpack = (
        'import base64, lzma, sys; packed = b"".join(sys.stdin.buffer.read().split()); '
        "sys.stdout.buffer.write(lzma.decompress(base64.b85decode(packed)))"
    )
    document = json.dumps(declared, indent=1, sort_keys=True)
    script = (
        f"{PATH}"
        "command -v python3 >/dev/null || { echo 'python3 is not installed: apt-get install python3' >&2; exit 1; }\n"
        "umask 022\n"
        f"mkdir -p {LIBRARY} {DECLARED}/stacks {STATE}/metrics {RUN}\n"
        f"cat > {DECLARED}/host.json.new <<'DECLARED'\n{document}\nDECLARED\n"
        f"mv {DECLARED}/host.json.new {DECLARED}/host.json\n"
        # Stopped before the program changes: Python reads modules from the file as it needs them.
        f"{stop()}"
        f"python3 -c '{unpack}' > {PROGRAM}.new <<'PROGRAM'\n{packed}\nPROGRAM\n"
        f"mv {PROGRAM}.new {PROGRAM}\n"
        "if [ -d /run/systemd/system ]; then\n"
        + "".join(f"cat > {UNITS}/{name} <<'UNIT'\n{text}UNIT\n" for name, text in units().items())
        + f"systemctl daemon-reload\nsystemctl enable --quiet --now {' '.join(timers())}\n"
        f"else\npython3 {PROGRAM} watch --start\nfi\n"
    )
    if len(script) > LARGEST_SCRIPT:
        raise ValueError(f"the agent's script has {len(script)} bytes, and the kernel takes {LARGEST_SCRIPT}")
    return script


def stop() -> str:
    """Shell text that stops what an earlier deploy has started."""
    return (
        "if [ -d /run/systemd/system ]; then\n"
        f"  for timer in {' '.join(timers())}; do\n"
        f'    [ ! -e {UNITS}/"$timer" ] || systemctl disable --quiet --now "$timer"\n'
        "  done\n"
        f"elif [ -e {PROGRAM} ]; then\n  python3 {PROGRAM} watch --stop\nfi\n"
    )


def remove() -> str:
    """Shell text that removes all that the agent has and wrote; folders stay where others keep something in them."""
    return (
        f"{PATH}{stop()}"
        # What takes long goes on when only its timer stops, or its program changes.
        "if [ -d /run/systemd/system ]; then\n"
        f"  systemctl stop {' '.join(f'bulkhead-{verb}.service' for verb in LONG)} 2>/dev/null || true\n"
        f"elif [ -e {PROGRAM} ]; then\n  python3 {PROGRAM} backup --stop || true\nfi\n"
        f"rm -rf {LIBRARY} {DECLARED}/host.json {DECLARED}/stacks {DECLARED}/backup {RUN}\n"
        f"rm -rf {STATE}/metrics {STATE}/backup\n"
        f"rm -f {STATE}/verify.json {STATE}/keep.json {STATE}/prove.json {STATE}/watch.log {STATE}/watch.log.1\n"
        "if [ -d /run/systemd/system ]; then\n"
        f"  rm -f {' '.join(f'{UNITS}/{name}' for name in units())}\n  systemctl daemon-reload\nfi\n"
        f"for folder in {DECLARED} {STATE}; do\n"
        '  [ ! -d "$folder" ] || rmdir --ignore-fail-on-non-empty "$folder"\n'
        "done\n"
    )


def timers() -> Sequence[str]:
    return [f"bulkhead-{verb}.timer" for verb in VERBS]


def units() -> Mapping[str, str]:
    """systemd's units by file name: a service and a timer for each verb."""
    found = {}
    for verb, arguments in VERBS.items():
        found[f"bulkhead-{verb}.service"] = (
            f"[Unit]\nDescription=Bulkhead: {verb}\nAfter=docker.service\n"
            f"[Service]\nType=oneshot\nExecStart=/usr/bin/python3 {PROGRAM} {' '.join(arguments)}\n"
            # A difference is news in the journal and a metric, not a unit that failed.
            f"SuccessExitStatus=1\n{GIVES_WAY if verb in LONG else LIMIT}"
        )
        found[f"bulkhead-{verb}.timer"] = (
            f"[Unit]\nDescription=Bulkhead: {verb} regularly\n"
            f"[Timer]\nOnActiveSec=1\nOnBootSec={EVERY_SECONDS}\nOnUnitActiveSec={EVERY_SECONDS}\nAccuracySec=1\n"
            "[Install]\nWantedBy=timers.target\n"
        )
    return found
