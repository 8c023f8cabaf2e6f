"""The agent on the host, as the commands use it: what a deploy declared is put there, and its verbs are run.
What they find comes back as JSON and is shown here; see `host/` for what they do."""

import json
import shlex
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from cli import onhost
from cli.pulumi import PulumiError
from settings.ledger import LedgerSettings

PROGRAM = "/usr/local/lib/bulkhead/host.pyz"
LOOKS = (
    "if [ -d /run/systemd/system ]; then\n"
    "  for timer in /etc/systemd/system/bulkhead-*.timer; do\n"
    '    [ ! -e "$timer" ] || systemctl start "${timer##*/}"\n'
    "  done\n"
    f"elif [ -e {PROGRAM} ]; then\n  python3 {PROGRAM} watch --start\nfi\n"
)
"""Starts what looks regularly, where it has been stopped: Pulumi sees no change that would make it do so."""
DEPLOYED = f"[ -e {PROGRAM} ] || {{ echo 'the host stack is not deployed there. Next step: make up' >&2; exit 2; }}\n"
"""Ends a script where there is no agent."""
STACKS = "/etc/bulkhead/stacks"
BACKUPS = "/etc/bulkhead/backup"
MARKS = "/run/bulkhead/deploying"
SECONDS = 900.0
ASK_SECONDS = 30.0
SHOWN_PATHS = 40
DIFFERENCES = "docs/runbooks/differences.md says what to do about each"
TABLE = ("inet", "bulkhead")  # components.firewall


class Agent:
    """The agent of the engine's host; `address` as in the ledger."""

    def __init__(self, address: str | None) -> None:
        self._address = address

    @classmethod
    def of(cls, root: Path) -> "Agent":
        """The agent of the host that the checkout's ledger names."""
        return cls(LedgerSettings.read(root / "Pulumi.host.yaml").host)

    def declared(self) -> frozenset[str]:
        """The environments whose outputs are on the host."""
        listed = self._root(f"ls {STACKS} 2>/dev/null || true")
        return frozenset(name.removesuffix(".json") for name in listed.split() if name.endswith(".json"))

    def declare(self, stack: str, outputs: Mapping[str, Any]) -> None:
        """Puts a stack's outputs on the host, where its agent compares them with what runs."""
        file = f"{STACKS}/{stack}.json"
        script = f"umask 022\nmkdir -p {STACKS}\ncat > {file}.new\nmv {file}.new {file}\n"
        self._root(script, json.dumps(outputs, indent=1, sort_keys=True).encode())

    def entrust(self, stack: str, jobs: Mapping[str, Any] | None, *, held: bool = False) -> None:
        """Puts a stack's backup jobs, which hold keys, where only root on the host reads them; None takes them away.

        The file is left alone where it says the same: its time is when the jobs began. `held`: none runs by schedule
        from now on, until `release`; a later deploy does not change that.
        """
        file = f"{BACKUPS}/{stack}.json"
        if jobs is None:
            self._root(f"rm -f {file} {BACKUPS}/{stack}.held")
            return
        hold = f"touch {BACKUPS}/{stack}.held\n" if held else ""  # first, so that nothing runs in between
        script = (
            f"umask 077\nmkdir -p {BACKUPS}\n{hold}cat > {file}.new\n"
            f"if cmp -s {file}.new {file}; then rm {file}.new; else mv {file}.new {file}; fi\n"
        )
        self._root(script, json.dumps(jobs, indent=1, sort_keys=True).encode())

    def release(self, stack: str) -> None:
        """The stack's data is there: it is backed up by schedule again."""
        self._root(f"rm -f {BACKUPS}/{stack}.held")

    def store(self, environment: str, name: str, data: bytes) -> str:
        """Saves data, as a file of this name, with the backups of an environment. What the agent says of it."""
        options = shlex.join(["backup", "--environment", environment, "--store", name])
        return self._root(f"umask 077\nexec python3 {PROGRAM} {options}\n", data).strip()

    def backups(self) -> str | None:
        """When each volume's backup last succeeded, and when a restore of it was last checked, as JSON by volume
        (`settings.backup.last_known`); None where the host cannot be asked."""
        script = f"[ ! -e {PROGRAM} ] || exec python3 {PROGRAM} backup --last\n"
        try:
            done = onhost.run(self._address, script, timeout=ASK_SECONDS)
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.decode(errors="replace").strip() or None if done.returncode == 0 else None

    def forget(self, stack: str) -> None:
        """Takes a destroyed stack's outputs away, and its backup jobs; what is backed up stays."""
        self._root(f"rm -f {STACKS}/{stack}.json {BACKUPS}/{stack}.json {BACKUPS}/{stack}.held")

    def show(self, verb: str, *options: str, variables: Mapping[str, str] = {}) -> int:
        """Runs a verb, with further environment `variables`, and shows what it says as it comes. Its exit code."""
        exported = "".join(f"export {name}={shlex.quote(value)}\n" for name, value in variables.items())
        script = f"{DEPLOYED}{exported}exec {shlex.join(['python3', '-u', PROGRAM, verb, *options])}\n"
        try:
            return onhost.shown(self._address, script)
        except OSError as error:
            raise PulumiError(f"The host could not be asked: {error}. Next step: make doctor") from None

    @contextmanager
    def deploying(self, stacks: Sequence[str]) -> Iterator[None]:
        """Tells the agent which stacks are about to differ, so that it reports none of it; sees that it runs then."""
        marks = " ".join(f"{MARKS}/{shlex.quote(stack)}" for stack in stacks)
        self._root(f"mkdir -p {MARKS}\ntouch {marks}\n")
        try:
            yield
        finally:
            self._root(f"rm -f {marks}\nrmdir {MARKS} {MARKS.rpartition('/')[0]} 2>/dev/null || true\n{LOOKS}")

    def run(self, verb: str, *options: str) -> tuple[int, dict[str, Any]]:
        """Exit code and result of a verb. PulumiError where it could not do its work."""
        words = shlex.join(["python3", PROGRAM, verb, "--json", *options])
        done = self._ran(f"{DEPLOYED}{words}\n")
        try:
            return done.returncode, dict(json.loads(done.stdout))
        except ValueError:
            said = done.stderr.decode(errors="replace").strip() or f"{verb} ended with code {done.returncode}"
            raise PulumiError(f"{verb}: {said}") from None

    def firewall(self) -> list[dict[str, Any]]:
        """The rules of the table that count, in order: chain, comment, packets, bytes."""
        family, table = TABLE
        listed = json.loads(self._root(f"nft --json list table {family} {table}"))
        found = []
        for rule in (one["rule"] for one in listed["nftables"] if "rule" in one):
            for counter in (part["counter"] for part in rule["expr"] if isinstance(part.get("counter"), dict)):
                found.append({"chain": rule["chain"], "rule": rule.get("comment", ""), **counter})
        return found

    def _root(self, script: str, stdin: bytes | None = None) -> str:
        done = self._ran(script, stdin)
        if done.returncode:
            said = done.stderr.decode(errors="replace").strip() or f"exit code {done.returncode}"
            raise PulumiError(f"The host could not be told or asked: {said}. Next step: make doctor")
        return done.stdout.decode(errors="replace")

    def _ran(self, script: str, stdin: bytes | None = None) -> subprocess.CompletedProcess[bytes]:
        try:
            return onhost.run(self._address, script, stdin=stdin, timeout=SECONDS)
        except (OSError, subprocess.TimeoutExpired) as error:
            raise PulumiError(f"The host could not be told or asked: {error}. Next step: make doctor") from None


def verify(agent: Agent, console: Console) -> int:
    """Shows what differs from what was declared; the exit code is the agent's."""
    with console.status("comparing what is declared with the host"):
        code, report = agent.run("verify")
    if report["differences"]:
        console.print("Different from what was declared:", style="red")
        for one in report["differences"]:
            console.print(f"{one['environment']}: {one['what']}", markup=False, highlight=False, soft_wrap=True)
            # Not in a table, which would fold what has to be copied.
            for key in ("where", "expected", "observed", "since"):
                console.print(f"  {key:<9} {one[key]}", markup=False, highlight=False, soft_wrap=True)
        console.print(f"Next step: {DIFFERENCES}", soft_wrap=True)
    for text in report["undecided"]:
        console.print(f"undecided: {text}", style="red", markup=False, highlight=False)
    if report["deploying"]:
        console.print(f"left out, since they are being deployed: {', '.join(report['deploying'])}")
    if code == 0:
        counts = ", ".join(f"{count} {kind}" for kind, count in report["compared"].items())
        console.print(f"As declared: {counts}", highlight=False)
    return code


def prove(agent: Agent, console: Console, options: Sequence[str] = ()) -> int:
    """Shows every path that did not come as expected; the exit code is the prover's."""
    with console.status("trying every way between the environments and to the host"):
        code, result = agent.run("prove", *options)
    wrong = [one for one in result["proofs"] if not one["ok"]]
    if wrong:
        table = Table(title="Paths that did not come as expected", title_justify="left")
        for column in ("from", "path", "target", "expected", "observed"):
            table.add_column(column, overflow="fold")
        for one in wrong[:SHOWN_PATHS]:
            table.add_row(one["source"], one["path"], one["target"], one["expected"], one["observed"])
        console.print(table, markup=False)
        if len(wrong) > SHOWN_PATHS:
            console.print(f"and {len(wrong) - SHOWN_PATHS} more: /var/lib/bulkhead/prove.json on the host")
        console.print(
            f"Next step: make verify names what differs on the host; {DIFFERENCES}", style="red", soft_wrap=True
        )
    must_fail = sum(one["expected"] == "blocked" for one in result["proofs"])
    console.print(
        f"Proof: {result['paths']} paths tried, {must_fail} must fail, {result['paths'] - must_fail} must work: "
        f"{result['unexpected']} unexpected",
        style="red" if wrong else "green",
        highlight=False,
    )
    return code


def show_firewall(agent: Agent, console: Console) -> int:
    """The counters of the firewall's rules."""
    table = Table(title="Firewall: what was dropped", title_justify="left")
    for column in ("chain", "rule", "packets", "bytes"):
        table.add_column(column)
    for one in agent.firewall():
        table.add_row(one["chain"], one["rule"], str(one["packets"]), str(one["bytes"]))
    console.print(table)
    return 0
