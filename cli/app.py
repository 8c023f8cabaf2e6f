"""The commands and their options; each calls one function elsewhere and returns its exit code.
`make help` lists the targets that call them."""

import json
import os
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from cli import agent, bootstrap, deploy, diagram, doctor, order, plan, report
from cli.pulumi import Pulumi, PulumiError

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


@app.command()
def up(environments: Environments = None) -> None:
    """Deploy what differs: host first, then protected environments, then the others."""
    stacks = order.read(ROOT, environments or ())
    pack = deploy.policy_pack(ROOT, os.environ)
    raise typer.Exit(deploy.up(Pulumi.of(ROOT), stacks, pack, agent.Agent.of(ROOT), console))


@app.command()
def preview(
    environments: Environments = None,
    drift: Annotated[bool, typer.Option(help="Compare with the engine too; fail on any difference.")] = False,
) -> None:
    """Show what would change, through the policies. Fails if a stack's preview does."""
    stacks = order.read(ROOT, environments or ())
    pack = deploy.policy_pack(ROOT, os.environ)
    raise typer.Exit(deploy.preview(Pulumi.of(ROOT), stacks, pack, console, drift=drift))


@app.command(name="report")
def write_report(
    environments: Environments = None,
    output: Annotated[Path, typer.Option(metavar="FOLDER", help="The folder to write to.")] = REPORT,
) -> None:
    """Every verdict of the policies as text, JSON, JUnit and SARIF. Fails on a violation or a failed preview."""
    stacks = order.read(ROOT, environments or ())
    pack = deploy.policy_pack(ROOT, os.environ)
    raise typer.Exit(report.write(Pulumi.of(ROOT), stacks, pack, output, console))


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
    raise typer.Exit(Pulumi.of(ROOT).run(*context.args))
