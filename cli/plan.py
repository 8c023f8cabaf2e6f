"""`plan`: the ledger as a table, in absolute amounts: capacity, the system's share, promises, what is free.
The engine is asked only for the capacities that the ledger leaves open."""

from pathlib import Path

from rich.table import Table

from settings import host
from settings.ledger import Ledger, LedgerSettings, shown


def ledger(root: Path) -> Ledger:
    """The checkout's ledger, resolved. SettingsError if it promises too much, or the engine is needed and silent."""
    written = LedgerSettings.read(root / "Pulumi.host.yaml")
    return written.resolve(host.facts(written.host).capacity() if written.missing_capacity else {})


def table(of: Ledger) -> Table:
    """One row for each resource. CPUs of a best-effort environment are not promised: it uses what is idle."""
    columns = ["resource", "capacity", "system", *of.environments, "free"]
    plan = Table(title="Promised of the machine", title_justify="left")
    for column in columns:
        plan.add_column(column, justify="left" if column == "resource" else "right")
    for row in of.rows():
        promised = [_amount(row.resource, row.promised[name]) for name in of.environments]
        plan.add_row(
            row.resource,
            shown(row.resource, row.capacity),
            _amount(row.resource, row.system),
            *promised,
            _amount(row.resource, row.free),
        )
    pids = [getattr(environment.limits, "pids", None) for environment in of.environments.values()]
    plan.add_row("pids (limit)", "", "", *(str(count or "-") for count in pids), "")
    return plan


def _amount(resource: str, amount: float) -> str:
    return shown(resource, amount) if amount else "-"
