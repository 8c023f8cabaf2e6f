"""The commands and their options; each calls one function elsewhere and returns its exit code.
`make help` lists the targets that call them."""

import json
import os
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from cli import agent, backups, bootstrap, bucket, deploy, diagram, doctor, order, plan, report
from cli import recover as recovery
from cli.pulumi import Pulumi, PulumiError
from settings.backup import LAST_KNOWN
from settings.state import state_folder

ROOT = Path(__file__).resolve().parent.parent
REPORT = ROOT / ".bulkhead" / "report"

app = typer.Typer(
    help="Production and development on one Docker host, watertight.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
console = Console()

Environments = Annotated[
    list[str] | None,
    typer.Argument(metavar="[ENV]...", help="Environments, or host. All of the ledger if none is named."),
]


def judged(stacks: order.Stacks) -> Pulumi:
    """Pulumi, with what the host knows of its backups, which policies judge and stacks put out."""
    pulumi = Pulumi.of(ROOT)
    if stacks.environments:
        with console.status("asking the host about its backups"):
            known = agent.Agent.of(ROOT).backups()
        pulumi.variables = {**pulumi.variables, **({LAST_KNOWN: known} if known else {})}
    return pulumi


@app.command()
def up(environments: Environments = None) -> None:
    """Deploy what differs: host first, then protected environments, then the others."""
    stacks = order.read(ROOT, environments or ())
    pack = deploy.policy_pack(ROOT, os.environ)
    pulumi, host = judged(stacks), agent.Agent.of(ROOT)
    code = deploy.up(pulumi, stacks, pack, host, console)
    recovery.store(pulumi, host, stacks, console)  # also after a failure: the state has changed
    raise typer.Exit(code)


@app.command()
def preview(
    environments: Environments = None,
    drift: Annotated[bool, typer.Option(help="Compare with the engine too; fail on any difference.")] = False,
) -> None:
    """Show what would change, through the policies. Fails if a stack's preview does."""
    stacks = order.read(ROOT, environments or ())
    pack = deploy.policy_pack(ROOT, os.environ)
    raise typer.Exit(deploy.preview(judged(stacks), stacks, pack, console, drift=drift))


@app.command(name="report")
def write_report(
    environments: Environments = None,
    output: Annotated[Path, typer.Option(metavar="FOLDER", help="The folder to write to.")] = REPORT,
) -> None:
    """Every verdict of the policies as text, JSON, JUnit and SARIF. Fails on a violation or a failed preview."""
    stacks = order.read(ROOT, environments or ())
    pack = deploy.policy_pack(ROOT, os.environ)
    raise typer.Exit(report.write(judged(stacks), stacks, pack, output, console))


@app.command()
def down(environments: Environments = None) -> None:
    """Destroy, in reverse order. Protected volumes stay; a protected environment's name must be typed."""
    pulumi = Pulumi.of(ROOT)
    stacks = order.read(ROOT, environments or (), [name for name, resources in pulumi.stacks().items() if resources])
    ask = typer.prompt if sys.stdin.isatty() else None
    raise typer.Exit(deploy.down(pulumi, stacks, os.environ, ask, agent.Agent.of(ROOT), console))


@app.command()
def verify() -> None:
    """Compare what was declared with the engine, the cgroups and the firewall. Fails on any difference."""
    raise typer.Exit(agent.verify(agent.Agent.of(ROOT), console))


@app.command()
def prove(
    environments: Environments = None,
    ceilings: Annotated[bool, typer.Option(help="Also run into the limits of processes and memory.")] = True,
    outward: Annotated[list[str] | None, typer.Option(metavar="ADDRESS", help="An address of the host's own.")] = None,
    forbidden: Annotated[
        list[str] | None, typer.Option(metavar="ADDRESS:PORT", help="What best-effort environments must not reach.")
    ] = None,
    allowed: Annotated[list[str] | None, typer.Option(metavar="ADDRESS:PORT", help="What must be reached.")] = None,
) -> None:
    """Try every way from each environment to the others and to the host. Fails if one is open, or what must work does
    not. No address beyond the host is tried unless it is named."""
    named = (
        ("environment", environments),
        ("outward", outward),
        ("forbidden", forbidden),
        ("allowed", allowed),
    )
    options = [word for name, values in named for value in values or () for word in (f"--{name}", value)]
    options += ["--ceilings"] if ceilings else []
    raise typer.Exit(agent.prove(agent.Agent.of(ROOT), console, options))


@app.command(name="firewall")
def show_firewall() -> None:
    """The firewall's rules with what each has dropped."""
    raise typer.Exit(agent.show_firewall(agent.Agent.of(ROOT), console))


Service = Annotated[str, typer.Option(help="One volume or service only.")]
Target = Annotated[str, typer.Option(help="From this target; else the first.")]


@app.command()
def backup(
    environments: Environments = None,
    service: Service = "",
    show: Annotated[bool, typer.Option("--list", help="List the snapshots instead.")] = False,
    anew: Annotated[
        bool, typer.Option("--anew", help="This is the data: also after a recovery, and where a repository is gone.")
    ] = False,
) -> None:
    """Back up now, whatever the schedule says: all volumes that declare it, or one."""
    flags = [flag for flag, given in (("--list", show), ("--anew", anew)) if given]
    options = [*backups.words(environments, service), *flags]
    raise typer.Exit(agent.Agent.of(ROOT).show("backup", *options))


@app.command()
def drill(environments: Environments = None, service: Service = "") -> None:
    """Restore the newest backups into volumes that are thrown away, and check them. Fails if one is not all there."""
    raise typer.Exit(agent.Agent.of(ROOT).show("restore", "--drill", *backups.words(environments, service)))


@app.command()
def prune(
    environment: Annotated[str, typer.Argument(metavar="ENV", help="Whose snapshots.")],
    target: Annotated[str | None, typer.Option(metavar="NAME", help="A bucket of the ledger's targets.")] = None,
) -> None:
    """Let go of old snapshots in a bucket, where the host's credentials cannot: with AWS_ACCESS_KEY_ID and
    AWS_SECRET_ACCESS_KEY of the pruner."""
    where = bucket.read(ROOT, environment, target)
    jobs = Pulumi.of(ROOT).secret(environment, deploy.JOBS)
    raise typer.Exit(backups.prune(environment, jobs, where, os.environ, console))


@app.command()
def restore(
    environment: Annotated[str, typer.Argument(help="The environment.")] = "",
    service: Service = "",
    at: Annotated[str, typer.Option(help="A time (2026-11-25 14:00:05), or a snapshot.")] = "latest",
    target: Target = "",
    to: Annotated[str, typer.Option(help="Into a new volume of this name, and leave it there.")] = "",
    in_place: Annotated[bool, typer.Option("--yes", help="Put it in place of what is there.")] = False,
    lose_newer: Annotated[bool, typer.Option(help="Also where that was written to since.")] = False,
    release: Annotated[str, typer.Option(help="Remove a volume that an earlier restore kept.")] = "",
    find: Annotated[str, typer.Option(metavar="PATTERN", help="List a snapshot's files instead.")] = "",
    file: Annotated[str, typer.Option(metavar="PATH", help="Bring back one file, into the folder --to.")] = "",
) -> None:
    """Restore a volume into a fresh one, check it there, and on request put it in place; what was there is kept."""
    values = {"at": at, "target": target, "to": to, "release": release, "find": find, "file": file}
    options = [word for name, value in values.items() if value for word in (f"--{name}", value)]
    options += ["--lose-newer"] if lose_newer else []
    ask = typer.prompt if sys.stdin.isatty() else None
    host = agent.Agent.of(ROOT)
    if release:
        raise typer.Exit(host.show("restore", *options))
    raise typer.Exit(backups.restore(host, environment, service, options, os.environ, ask, console, in_place=in_place))


@app.command(name="refresh-dev")
def refresh_dev(
    environment: Annotated[str, typer.Argument(help="The environment that gets the copy.")] = "dev",
    service: Service = "",
    in_place: Annotated[bool, typer.Option("--yes", help="Put it in place of what is there.")] = False,
) -> None:
    """Give dev a masked copy of prod's data, from the newest backup; what was there is kept."""
    ask = typer.prompt if sys.stdin.isatty() else None
    host = agent.Agent.of(ROOT)
    raise typer.Exit(
        backups.restore(host, environment, service, ["--refresh"], os.environ, ask, console, in_place=in_place)
    )


@app.command()
def recover(
    source: Annotated[str, typer.Option("--from", metavar="TARGET", help="Folder, or s3:https://server/bucket.")] = "",
    environment: Annotated[str, typer.Option(help="The protected environment that the recovery key is of.")] = "prod",
) -> None:
    """Bring a lost host back from its backups, on a fresh machine. The recovery key is asked for, or RECOVERY_KEY."""
    key = os.environ.get("RECOVERY_KEY") or (
        typer.prompt("Recovery key", hide_input=True) if sys.stdin.isatty() else ""
    )
    if not source or not key:
        raise PulumiError("Both are needed: FROM=/srv/backup (or s3:https://server/bucket), and RECOVERY_KEY=…")
    raise typer.Exit(recovery.recover(ROOT, source, environment, key, console))


@app.command(name="plan")
def show_plan() -> None:
    """The ledger in absolute amounts: capacity, promised, free."""
    console.print(plan.table(plan.ledger(ROOT)))


@app.command(name="doctor")
def show_doctor(
    as_json: Annotated[bool, typer.Option("--json", help="The same lines for a program.")] = False,
) -> None:
    """What a deploy needs and what is there, line by line. Fails only if something required is missing."""
    lines = doctor.examine(ROOT)
    if as_json:
        print(json.dumps([line._asdict() for line in lines], indent=2))
    else:
        console.print(doctor.table(lines))
    raise typer.Exit(doctor.exit_code(lines))


@app.command(name="bootstrap")
def prepare_server(
    host: Annotated[str, typer.Argument(metavar="HOST", help="The server: ssh://root@server[:port].")] = "",
    deployer: Annotated[str, typer.Option(help="The user who will deploy.")] = bootstrap.DEPLOYER,
    key: Annotated[Path | None, typer.Option(metavar="FILE", help="The deployer's public key; else yours.")] = None,
) -> None:
    """Make a bare Debian server one to deploy to: packages, a user who is not root, one door to root."""
    bootstrap.checked(host, deployer)
    raise typer.Exit(bootstrap.bootstrap(host, deployer, bootstrap.public_key(key, Path.home()), console))


@app.command(name="bucket")
def make_bucket(
    environment: Annotated[str, typer.Argument(metavar="ENV", help="Whose backups go there.")],
    target: Annotated[str | None, typer.Option(metavar="NAME", help="A bucket of the ledger's targets.")] = None,
    policies: Annotated[bool, typer.Option("--policies", help="Only print the roles' policies, as JSON.")] = False,
    compliance: Annotated[
        bool, typer.Option("--compliance", help="A lock that nobody can lift or shorten, you included.")
    ] = False,
    principal: Annotated[
        list[str] | None,
        typer.Option(metavar="ROLE=PRINCIPAL", help="Who gets the policy of writer, pruner, restorer."),
    ] = None,
    bring_back: Annotated[
        bool, typer.Option("--bring-back", help="Undo what was deleted or overwritten in the environment's repository.")
    ] = False,
) -> None:
    """Make the bucket of a backup target, or check it: versions, lock, lifecycle, who may do what."""
    where = bucket.read(ROOT, environment, target)
    if bring_back:
        raise typer.Exit(bucket.bring_back(where, environment, os.environ, console))
    if policies:
        print(bucket.policies(where, environment, principal or ()))
        return
    pulumi = Pulumi.of(ROOT)
    jobs = pulumi.secret(environment, deploy.JOBS) if environment in pulumi.stacks() else None
    key = jobs["password"] if jobs else None
    raise typer.Exit(
        bucket.ensure(
            where,
            environment,
            os.environ,
            principal or (),
            key,
            console,
            compliance=compliance,
            note=state_folder(os.environ, Path.home()) / bucket.NOTES,
        )
    )


@app.command(name="diagram")
def draw_diagram(
    path: Annotated[Path, typer.Argument(help="The SVG file to write.")] = ROOT / ".bulkhead" / "diagram.svg",
) -> None:
    """A picture of what is deployed: environments, networks and budgets, from the stacks' outputs."""
    pulumi = Pulumi.of(ROOT)
    deployed = [name for name, resources in pulumi.stacks().items() if resources]
    if order.HOST not in deployed:
        raise PulumiError("Nothing is deployed, so there is nothing to draw. Next step: make up")
    told = {name: pulumi.outputs(name) for name in order.read(ROOT).names if name in deployed}
    diagram.write({name: outputs for name, outputs in told.items() if outputs}, path)
    console.print(f"Written: {path}", highlight=False)


@app.command(
    name="pulumi", context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}
)
def passthrough(context: typer.Context) -> None:
    """Pulumi itself, with this checkout's tools, backend and passphrase: `pulumi config set …`."""
    pulumi = Pulumi.of(ROOT)
    deploy.ready(pulumi, context.args)
    raise typer.Exit(pulumi.run(*context.args))
