"""Lost host: what a deploy needs is put with prod's backups after each `up`; `make recover` builds the host from it.

That is Pulumi's state with its passphrase, the settings, and the Compose files and masks that they name. The key of
prod's repositories opens it, so that one key brings everything back: the recovery key, which is shown once.
"""

import io
import os
import subprocess
import tarfile
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from rich.console import Console

from cli import deploy, order
from cli.agent import Agent
from cli.order import HOST, Stacks
from cli.pulumi import Pulumi, PulumiError, backend_folder
from settings.errors import SettingsError
from settings.ledger import LedgerSettings, Tier
from settings.project import read_environment, read_project

STATE = "deployer"
"""What its snapshots are called, beside those of prod's volumes."""
SETTINGS = "Pulumi.*.yaml"
RECOVERED = "The settings that were here are beside them as *.before-recover"


def packed(root: Path, backend: Path, passphrase: Path | None) -> bytes:
    """A tar file of the settings and what they name, Pulumi's state and its passphrase."""
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w:gz") as tar:
        for file in sorted(root.glob(SETTINGS)):
            tar.add(file, f"settings/{file.name}")
        for file in sorted(set(named(root))):
            tar.add(file, f"settings/{file.relative_to(root)}")
        tar.add(backend, "state")
        if passphrase and passphrase.exists():
            tar.add(passphrase, "passphrase")
    return archive.getvalue()


def named(root: Path) -> Iterator[Path]:
    """The files of the checkout that settings name: Compose files, masks, the policies' config. What cannot be read
    has failed the deploy already, and does not keep the state from being stored."""
    if (config := root / "policy-config.json").exists():
        yield config
    with suppress(SettingsError):
        ledger = LedgerSettings.read(root / f"Pulumi.{HOST}.yaml")
        for name in ledger.environments:
            with suppress(SettingsError):
                settings = read_environment(name, root)
                volumes = read_project(settings, ledger).volumes.values()
                masks = [one.x_bulkhead.refresh.mask for one in volumes if one.x_bulkhead.refresh]
                files = [*settings.compose, *(settings.compose[0].parent / mask for mask in masks if mask)]
                yield from (file for file in files if file.is_file() and file.is_relative_to(root))


def store(pulumi: Pulumi, agent: Agent, stacks: Stacks, console: Console) -> None:
    """Puts what a deploy needs with the backups of a protected environment, and shows the recovery key the first time.

    State in another backend than a folder outlives the host by itself.
    """
    backend = backend_folder(pulumi.variables.get("PULUMI_BACKEND_URL", ""))
    if backend is None:
        return
    passphrase = pulumi.variables.get("PULUMI_CONFIG_PASSPHRASE_FILE")
    known = pulumi.stacks()
    # Of all protected environments, whichever were deployed just now: the state is that of all.
    names = [name for name, tier in stacks.tiers.items() if tier is Tier.PROTECTED and known.get(name)]
    found = {name: jobs for name in names if (jobs := pulumi.secret(name, deploy.JOBS))}
    archive = packed(pulumi.root, backend, Path(passphrase) if passphrase else None) if found else b""
    for name, jobs in found.items():
        shown = backend.parent / f"recovery-key-of-{name}-was-shown"
        if not shown.exists():
            console.print(
                f"RECOVERY KEY of {name}: {jobs['password']}\nWrite it down, and keep it somewhere else: with it, and "
                "only with it, make recover brings everything back when this host is lost. It is not shown again.",
                style="bold yellow",
                markup=False,
                highlight=False,
                soft_wrap=True,
            )
            shown.touch(mode=0o600)
        said = agent.store(name, STATE, archive)
        console.print(f"{name}: {said}", highlight=False)


def recover(root: Path, source: str, environment: str, key: str, console: Console) -> int:
    """Brings a lost host back from a repository: settings, state, host, environments, their data, proof.

    `source`: the target's folder or `s3:` address, without the environment. PulumiError where there is state already.
    """
    variables = Pulumi.of(root).variables
    backend = backend_folder(variables.get("PULUMI_BACKEND_URL", ""))
    if backend is None:
        raise PulumiError("Pulumi's state is not in a folder, so it is not lost. Next step: make up, then make restore")
    if any(backend.glob(".pulumi/stacks/**/*.json")):
        raise PulumiError(
            f"{backend} has stacks, and nothing is to be lost: nothing was done. "
            "Next step: move it away, or set XDG_STATE_HOME to another folder"
        )
    with console.status("fetching the newest state"):
        unpacked(fetched(f"{source.rstrip('/')}/{environment}", key), root, backend, variables)
    console.print(f"Settings and state are here. {RECOVERED}", highlight=False)
    pulumi, agent = Pulumi.of(root), Agent.of(root)
    # The old host's commands count as done in its state, and it has no data: it is built anew from the ledger.
    if HOST in pulumi.stacks():
        pulumi.capture("stack", "rm", HOST, "--force", "--yes", "--preserve-config")
    stacks = order.read(root)
    pack = deploy.policy_pack(root, os.environ)
    # First, since the environments' states refer to its outputs.
    if code := deploy.up(pulumi, order.read(root, [HOST]), pack, agent, console, held=True):
        return code
    for name in stacks.environments:
        if pulumi.run("refresh", "--yes", "--stack", name):
            raise PulumiError(
                f"{name}: its state could not be compared with the engine. Next step: see the error above"
            )
    # What must be there comes back first: nothing that is wrong with another environment is in its way.
    failed = []
    for tier in (Tier.PROTECTED, Tier.BEST_EFFORT):
        names = [name for name in stacks.environments if stacks.tiers[name] is tier]
        if names and deploy.up(pulumi, order.read(root, names), pack, agent, console, held=True):
            failed += names
            continue
        for name in names:
            if not restored(pulumi, agent, name, source, console):
                failed.append(name)
    if failed:
        console.print(
            f"Not recovered: {', '.join(failed)}. Nor backed up by schedule, until there is data again. "
            "Next step: see the errors above; then make up, make restore for each volume, and "
            "make backup ENV=… ARGS=--anew",
            style="red",
            highlight=False,
        )
        return 1
    console.print(f"Recovered: {', '.join(stacks.environments)}. Next step: make verify", highlight=False)
    return 0


def restored(pulumi: Pulumi, agent: Agent, name: str, source: str, console: Console) -> bool:
    """Whether all volumes of an environment that are in `source` are back; from then on they are backed up again.

    A bucket is read with the caller's credentials: those in the settings may be what somebody has stolen.
    """
    own = (
        {key: value for key, value in os.environ.items() if key.startswith("AWS_")} if source.startswith("s3:") else {}
    )
    jobs = pulumi.secret(name, deploy.JOBS)
    for volume, job in jobs["jobs"].items() if jobs else ():
        console.rule(f"{name}/{volume}", align="left")
        target = held_in(job, f"{source.rstrip('/')}/{name}")
        if target is None:
            console.print(f"{name}/{volume}: it is not backed up to {source}, so it stays empty", style="yellow")
            continue
        options = [
            "--environment",
            name,
            "--job",
            volume,
            "--target",
            target,
            "--yes",
            "--lose-newer",
            "--release-kept",
        ]
        if agent.show("restore", *options, *(["--as-caller"] if own else []), variables=own):
            return False
    agent.release(name)
    return True


def held_in(job: Mapping[str, Any], repository: str) -> str | None:
    """The target of a job that is this repository: the others may be lost with the host."""
    return next((name for name, where in job["targets"].items() if where["repository"] == repository), None)


def fetched(repository: str, key: str) -> bytes:
    """The newest tar file of `packed` in a repository; credentials of a bucket are taken from the environment."""
    own = {"RESTIC_REPOSITORY": repository, "RESTIC_PASSWORD": key}
    with tempfile.TemporaryDirectory(prefix="bulkhead-") as cache:
        done = subprocess.run(
            ["restic", "--quiet", "--no-lock", "dump", "--tag", f"job:{STATE}", "latest", f"/{STATE}.tar.gz"],
            env={**os.environ, **own, "RESTIC_CACHE_DIR": cache},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            check=False,
        )
    if done.returncode:
        said = done.stderr.decode(errors="replace").strip()
        raise PulumiError(
            f"{repository}: {said}. Next step: see that FROM and the recovery key are right, and that "
            "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY are set for a bucket"
        )
    return done.stdout


def unpacked(archive: bytes, root: Path, backend: Path, variables: Mapping[str, str]) -> None:
    """Puts settings, state and passphrase in their places; settings that were there are kept beside them."""
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar, tempfile.TemporaryDirectory(prefix="bulkhead-") as folder:
        # `filter="data"` by hand: Debian 12's Python does not have it yet.
        for member in tar.getmembers():
            if (
                not (member.isfile() or member.isdir())
                or ".." in Path(member.name).parts
                or member.name.startswith("/")
            ):
                raise PulumiError(f"{member.name} is nothing that was saved here. Next step: another snapshot")
            tar.extract(member, folder)
        for file in sorted(path for path in Path(folder, "settings").rglob("*") if path.is_file()):
            there = root / file.relative_to(Path(folder, "settings"))
            if there.exists() and there.read_bytes() == file.read_bytes():
                continue
            if there.exists():
                there.replace(there.with_name(f"{there.name}.before-recover"))
            there.parent.mkdir(parents=True, exist_ok=True)
            there.write_bytes(file.read_bytes())
        moved(Path(folder, "state"), backend)
        passphrase = Path(folder, "passphrase")
        if passphrase.exists():
            target = Path(variables.get("PULUMI_CONFIG_PASSPHRASE_FILE") or backend.parent / "passphrase")
            target.write_bytes(passphrase.read_bytes())
            target.chmod(0o600)


def moved(source: Path, target: Path) -> None:
    """Copies a folder's content into another."""
    for file in source.rglob("*"):
        there = target / file.relative_to(source)
        if file.is_dir():
            there.mkdir(parents=True, exist_ok=True, mode=0o700)
        else:
            there.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            there.write_bytes(file.read_bytes())
            there.chmod(0o600)
