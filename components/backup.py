"""BackupJob: one volume's backup as the host's agent runs it: what is saved, when, where to, and how it is checked.

It starts nothing: the command line hands `declared`, which holds keys, to the host, where `host/backup.py` runs it.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pulumi

from components.secret import Secret, SecretArgs
from settings.backup import Backup, BucketTarget, FolderTarget
from settings.ledger import Tier

KEY_BYTES = 32


@dataclass(frozen=True)
class BackupJobArgs:
    """A backup of a volume. `volume`: the engine's name for it. `service`: whose container has it.

    `targets`: by name. `credentials`: of each target that needs some, as restic's variables.
    """

    environment: str
    volume: str
    service: str
    backup: Backup
    targets: Mapping[str, FolderTarget | BucketTarget]
    credentials: Mapping[str, Mapping[str, pulumi.Input[str]]]


class BackupJob(pulumi.ComponentResource):
    """A volume's backup. `declared` is what the host is told, a secret; `told` is what everybody may see of it."""

    declared: pulumi.Output[Mapping[str, Any]]
    told: dict[str, Any]

    def __init__(self, name: str, args: BackupJobArgs, opts: pulumi.ResourceOptions | None = None) -> None:
        self.told = {
            "volume": args.volume,
            "service": args.service,
            "engine": args.backup.engine,
            "schedule": args.backup.schedule,
            "targets": sorted(args.targets),
        }
        super().__init__("bulkhead:index:BackupJob", name, dict(self.told), opts)
        targets = {
            target: {
                "repository": where.repository(args.environment),
                "variables": args.credentials.get(target, {}),
                "append_only": isinstance(where, BucketTarget) and where.append_only,
            }
            for target, where in args.targets.items()
        }
        written = args.backup.model_dump(mode="json", exclude={"target", "schedule"})
        settings = {**written, **self.told, "schedule": args.backup.every, "at": args.backup.at}
        self.declared = pulumi.Output.secret(pulumi.Output.from_input({**settings, "targets": targets}))
        self.register_outputs(self.told)


class Backups(pulumi.ComponentResource):
    """All that the host is told of an environment's backups and masked copies: `document`, a secret.

    Its one input is a digest of it. The document is an output, and an output that changes alone, as when a key, a
    credential, a mask or a span is another one, is no change to the engine: nothing would be deployed.
    """

    document: pulumi.Output[dict[str, Any]]

    def __init__(self, name: str, document: Mapping[str, Any], opts: pulumi.ResourceOptions | None = None) -> None:
        self.document = pulumi.Output.secret(pulumi.Output.from_input(dict(document)))
        super().__init__("bulkhead:index:Backups", name, {"digest": self.document.apply(_digest)}, opts)
        self.register_outputs({})


def _digest(document: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()


def repository_key(name: str, tier: Tier, given: pulumi.Input[str] | None, opts: pulumi.ResourceOptions) -> Secret:
    """The key of an environment's repositories: given, or generated once. Whoever has it can read all its backups.

    What was generated stays where one is given later: it opens the repositories that were made with it.
    """
    return Secret(name, SecretArgs(tier=tier, value=given, generate=KEY_BYTES), opts=opts)
