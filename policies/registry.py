"""Every rule of the pack, in the order of the families.
A rule is registered by standing in its family's module."""

from typing import Final

from policies import availability, escape, hardening, reach, reservation
from policies.rule import Rule

FAMILIES: Final = (reservation, reach, hardening, availability, escape)

RULES: Final = tuple(found for family in FAMILIES for found in vars(family).values() if isinstance(found, Rule))

BY_ID: Final = {rule.id: rule for rule in RULES}
