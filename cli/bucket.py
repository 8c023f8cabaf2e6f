"""`bucket`: makes or checks the bucket of a backup target, and prints the policies of those who use it.
host/bucket.py does it; it is loaded only here, since it needs boto3."""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import date
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from host.machine import Undecided
from host.restic import BackupError, Repository
from settings.backup import BackupSettings, BucketTarget
from settings.errors import SettingsError, did_you_mean
from settings.ledger import LedgerSettings

if TYPE_CHECKING:
    from host.bucket import Credentials, Feature, Role

KEY = "bulkhead:backup.targets"
NOTES = "buckets.json"
"""In the folder of this user's state."""
OWN = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")
COLOURS = {"set": "green", "as it was": "green", "not supported by this endpoint": "yellow", "failed": "red"}


def read(root: Path, environment: str, name: str | None) -> BucketTarget:
    """A target of the checkout's ledger. SettingsError where it, or the environment, is not in there."""
    ledger = LedgerSettings.read(root / "Pulumi.host.yaml")
    ledger.environment(environment)
    return chosen(ledger.backup, name, ledger.file)


def chosen(backup: BackupSettings, name: str | None, file: str) -> BucketTarget:
    """The target `name`, or the only bucket that there is."""
    buckets = {key: one for key, one in backup.targets.items() if isinstance(one, BucketTarget)}
    if name is None and len(buckets) == 1:
        return next(iter(buckets.values()))
    if name in buckets:
        return buckets[name]
    if not buckets:
        remedy = "Write one, as in `offsite: {endpoint: https://…, bucket: …, lock: 14d}`."
    else:
        remedy = did_you_mean(name, buckets) if name else f"Name one with --target: {', '.join(sorted(buckets))}."
    problem = "lists no such bucket" if name else "lists several buckets" if buckets else "lists no bucket"
    raise SettingsError(file=file, key=KEY if name is None else f"{KEY}.{name}", problem=problem, remedy=remedy)


def policies(target: BucketTarget, environment: str, principals: Sequence[str]) -> str:
    """The documents of the three roles as JSON, by role."""
    from host import bucket

    given = grants(principals)
    return json.dumps(
        {role: bucket.policy(target, environment, role, given.get(role, ())) for role in bucket.Role}, indent=2
    )


def ensure(
    target: BucketTarget,
    environment: str,
    variables: Mapping[str, str],
    principals: Sequence[str],
    key: str | None,
    console: Console,
    *,
    compliance: bool,
    note: Path | None = None,
) -> int:
    """Makes or checks the bucket and the repository in it, and shows how they stand. 1 if backups lack something that
    they rely on. `key`: the environment's, of its repositories; None before its first deploy. `note`: the file in which
    what is lacking is noted for `make doctor` (`noted`)."""
    from host import bucket

    given = grants(principals)
    with asking(target, "looking at", console):
        features = bucket.ensure(target, environment, credentials(variables), compliance=compliance, principals=given)
        features.append(repository(target, environment, variables, key))
    console.print(table(features))
    if note:
        short = (bucket.State.UNSUPPORTED, bucket.State.FAILED)
        lacking = {one.name: str(one.state) for one in features if one.state in short}
        known = noted(note) | {"/".join(target.place): {"at": f"{date.today()}", "lacking": lacking}}
        note.parent.mkdir(parents=True, exist_ok=True)
        note.write_text(json.dumps(known, indent=1) + "\n")
    changed = sum(one.state is bucket.State.SET for one in features)
    console.print(f"{changed} of {len(features)} changed." if changed else "Nothing changed.", highlight=False)
    return int(any(one.lacking for one in features))


def noted(file: Path) -> dict[str, dict[str, Any]]:
    """What was lacking when each bucket was last looked at from here, by its place: `at`, a date, and `lacking`, how it
    stands by feature."""
    try:
        found: dict[str, dict[str, Any]] = json.loads(file.read_text())
    except (OSError, ValueError):
        return {}
    return found


@contextmanager
def asking(target: BucketTarget, doing: str, console: Console) -> Iterator[None]:
    """Says what is going on; what the endpoint does not decide is an error that names the bucket."""
    try:
        with console.status(f"{doing} {target.bucket}"):
            yield
    except Undecided as error:
        raise SettingsError(file="", key=f"bucket {target.bucket}", problem=str(error), remedy="") from None


def bring_back(target: BucketTarget, environment: str, variables: Mapping[str, str], console: Console) -> int:
    """Undoes what was deleted or overwritten in an environment's repository; see docs/runbooks/ransomware.md."""
    from host import bucket

    with asking(target, "reading the versions in", console):
        done = bucket.brought_back(target, environment, credentials(variables))
    console.print(
        f"{done.brought_back} objects brought back, {done.hidden} that restic did not write hidden, {done.kept} left "
        f"alone. Next step: new credentials for {environment}, then make drill ENV={environment}",
        highlight=False,
        soft_wrap=True,
    )
    return 0


def repository(target: BucketTarget, environment: str, variables: Mapping[str, str], key: str | None) -> "Feature":
    """The environment's repository, made where there is none: restic then asks for the bucket as a whole, which none of
    the roles may."""
    from host.bucket import Feature, State

    if key is None:
        return Feature(
            "repository", State.NOT_ASKED, f"{environment} has no key yet; next step: make up, then this again"
        )
    with TemporaryDirectory(prefix="bulkhead-") as cache:
        found = Repository(target.repository(environment), key, Path(cache), owner(variables))
        try:
            if found.there():
                return Feature("repository", State.KEPT, found.url)
            found.init()
        except BackupError as error:
            return Feature("repository", State.FAILED, str(error))
    return Feature("repository", State.SET, f"{found.url}, with the key of {environment}")


def owner(variables: Mapping[str, str]) -> dict[str, str]:
    """The credentials of this command's caller, as restic's variables."""
    return {name: variables[name] for name in (*OWN, "AWS_SESSION_TOKEN") if variables.get(name)}


def credentials(variables: Mapping[str, str]) -> "Credentials":
    """The bucket owner's, as AWS's own tools name them. SettingsError if one is not set."""
    from host.bucket import Credentials

    for name in OWN:
        if not variables.get(name):
            raise SettingsError(
                file="",
                key=name,
                problem="not set",
                remedy="Export the bucket owner's AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, for this command only: "
                "backups run with others.",
            )
    return Credentials(
        variables["AWS_ACCESS_KEY_ID"], variables["AWS_SECRET_ACCESS_KEY"], variables.get("AWS_SESSION_TOKEN")
    )


def grants(principals: Sequence[str]) -> "dict[Role, list[str]]":
    """`writer=arn:…` by role. SettingsError for anything else."""
    from host.bucket import Role

    given: dict[Role, list[str]] = {}
    for written in principals:
        role, _, principal = written.partition("=")
        if role not in list(Role) or not principal:
            raise SettingsError(
                file="",
                key="--principal",
                value=written,
                problem="not ROLE=PRINCIPAL",
                remedy=f"Write it like writer=arn:aws:iam::123456789012:user/backup; roles: {', '.join(Role)}.",
            )
        given.setdefault(Role(role), []).append(principal)
    return given


def table(features: "Iterable[Feature]") -> Table:
    """One row for each feature."""
    shown = Table()
    for column in ("feature", "state", "note"):
        shown.add_column(column, overflow="fold")
    for name, state, note in features:
        shown.add_row(name, Text(state, style=COLOURS.get(state, "")), Text(note))
    return shown
