"""Which stacks a command works on, and in which order: host first, then protected before best-effort.
Read from the ledger; the engine is not asked."""

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from settings.errors import SettingsError, did_you_mean
from settings.ledger import LedgerSettings, Tier

HOST = "host"


class Stacks(NamedTuple):
    """`names` in deploy order; `tiers` of all environments; `without_file` are in the ledger but have no settings."""

    names: tuple[str, ...]
    tiers: Mapping[str, Tier]
    without_file: tuple[str, ...] = ()

    @property
    def environments(self) -> tuple[str, ...]:
        return tuple(name for name in self.names if name != HOST)


def read(root: Path, chosen: Sequence[str] = (), deployed: Collection[str] = ()) -> Stacks:
    """The stacks of the checkout's ledger, or the `chosen` ones of them, in deploy order.

    `deployed` ones count too, last, whatever the checkout has of them: what was deployed can always be destroyed.
    SettingsError for a name that the ledger does not have, or an environment that is chosen without a settings file.
    """
    ledger = LedgerSettings.read(root / "Pulumi.host.yaml")
    tiers = {name: written.tier for name, written in ledger.environments.items()}
    for name in chosen:
        if name in deployed:
            continue
        if name != HOST and name not in tiers:
            raise SettingsError(
                file=ledger.file,
                key="bulkhead:environments",
                value=name,
                problem="no such environment in the ledger",
                remedy=did_you_mean(name, [HOST, *tiers]),
            )
        if not (root / f"Pulumi.{name}.yaml").exists():
            raise SettingsError(
                file=f"Pulumi.{name}.yaml",
                key="bulkhead:compose",
                problem=f"the ledger has environment {name}, but this file is missing",
                remedy="Write it with the list of its compose files under config.",
            )
    ordered = sorted(
        tiers, key=lambda name: tiers[name] is not Tier.PROTECTED
    )  # keeps the ledger's order within a tier
    others = sorted(set(deployed) - {HOST, *tiers})
    names = [name for name in (HOST, *ordered, *others) if not chosen or name in chosen]
    there = tuple(name for name in names if name in deployed or (root / f"Pulumi.{name}.yaml").exists())
    return Stacks(there, tiers, tuple(name for name in names if name not in there))
