"""`make backup`, `restore`, `drill`, `refresh-dev`, `prune`: what the host's agent does with backups, as it happens.
What would replace data asks first; all the work is in `host/backup.py` and `host/restore.py`."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from rich.console import Console

from cli import bucket
from cli.agent import Agent
from cli.deploy import confirmed
from cli.pulumi import PulumiError
from host import backup
from host.machine import Places
from host.restic import BackupError, Repository
from settings.backup import BucketTarget


def words(environments: Sequence[str] | None, service: str) -> list[str]:
    """The agent's options that choose jobs."""
    chosen = [word for name in environments or () for word in ("--environment", name)]
    return [*chosen, *(["--job", service] if service else [])]


def prune(
    environment: str,
    declared: Mapping[str, Any] | None,
    target: BucketTarget,
    variables: Mapping[str, str],
    console: Console,
) -> int:
    """Lets go of the snapshots in a bucket that no job keeps, with the caller's credentials and not the host's."""
    bucket.credentials(variables)
    if not declared:
        raise PulumiError(f"{environment} has no backups. Next step: declare one (x-bulkhead.backup), then make up")
    with TemporaryDirectory(prefix="bulkhead-") as folder:
        cache = Path(folder)
        own = Repository(target.repository(environment), declared["password"], cache, bucket.owner(variables))
        jobs = [
            job
            for job in backup.told(environment, declared, 0.0, Places(cache))
            if own.url in {one.url for one in job.repositories.values()}
        ]
        try:
            before = len(own.snapshots())
            for job in jobs:
                with console.status(f"{job.key}: letting go of what is not kept"):
                    backup.prune(job, own)
            backup.prune_states(own)
            console.print(f"{own.url}: {before} snapshots before, {len(own.snapshots())} now", highlight=False)
        except BackupError as error:
            raise PulumiError(str(error)) from None
    return 0


def restore(
    agent: Agent,
    environment: str,
    service: str,
    options: Sequence[str],
    variables: Mapping[str, str],
    ask: Callable[[str], str] | None,
    console: Console,
    *,
    in_place: bool,
) -> int:
    """Restores into a fresh volume and checks it; in place of the old one only if the environment's name is given."""
    if in_place:
        question = f"This stops services of {environment} and puts restored data in their place. Type its name"
        if not confirmed(environment, variables, ask, question):
            console.print(
                f"Not confirmed, so nothing was done. Next step: BULKHEAD_CONFIRM={environment}, or on a terminal"
            )
            return 1
        options = [*options, "--yes"]
    return agent.show("restore", *words([environment], service), *options)
