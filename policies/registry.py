"""Every rule of the pack, in the order of the families.
A rule is registered by standing in its family's module."""

from typing import Final

from policies import escape, hardening, reach, reservation
from policies.rule import Rule

RULES: Final = tuple(
    found
    for family in (reservation, reach, hardening, escape)
    for found in vars(family).values()
    if isinstance(found, Rule)
)
