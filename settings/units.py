"""Quantities as users write them: byte sizes with units, decimal CPU counts, percentages of a capacity.
Arithmetic is exact (whole bytes, whole billionths of a CPU), so promises that sum to 100 % fit."""

import math
import re
from decimal import Decimal, InvalidOperation
from fractions import Fraction

NANO = 10**9
"""CPUs are counted in billionths, as Docker's NanoCpus does."""

UNITS = {
    "": 1,
    "B": 1,
    **{f"{letter}B": 1000**power for power, letter in enumerate("kMGT", start=1)},
    "KB": 1000,
    **{f"{letter}iB": 1024**power for power, letter in enumerate("KMGT", start=1)},
}
"""Decimal units (MB) are powers of 1000, binary ones (MiB) of 1024, as IEC 80000-13 has it."""

_QUANTITY = re.compile(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", re.ASCII)
_PERCENT = re.compile(r"(\d+(?:\.\d+)?)\s*%", re.ASCII)


class Percent:
    """A share of a capacity, more than 0 and at most 100."""

    def __init__(self, value: Decimal) -> None:
        if not 0 < value <= 100:
            raise ValueError(f"{value} % is not a share of the machine; write more than 0 and at most 100 %")
        self.value = value

    def of(self, capacity: int) -> int:
        """The share in whole units, rounded down: shares that sum to 100 % never exceed the capacity."""
        return math.floor(Fraction(self.value) * capacity / 100)

    def __str__(self) -> str:
        return f"{self.value}%"

    def __repr__(self) -> str:
        return f"Percent({str(self)!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Percent) and self.value == other.value

    def __hash__(self) -> int:
        return hash(self.value)


def parse_percent(written: object) -> Percent | None:
    """`"60%"` as a `Percent`; `None` if it is not written as a percentage."""
    match = _PERCENT.fullmatch(written.strip()) if isinstance(written, str) else None
    return Percent(Decimal(match[1])) if match else None


def parse_bytes(written: object) -> int:
    """Bytes of `16GiB`, `512 MB` or `1048576`. ValueError for anything else, zero or a fraction of a byte."""
    if isinstance(written, bool) or not isinstance(written, str | int):
        raise ValueError("not a size; write a number with a unit, such as 512MiB, 16GiB or 1TB")
    match = _QUANTITY.fullmatch(str(written).strip())
    if match is None:
        raise ValueError("not a size; write a number with a unit, such as 512MiB, 16GiB or 1TB")
    if match[2] not in UNITS:
        known = ", ".join(unit for unit in UNITS if unit)
        raise ValueError(f"unknown unit {match[2]!r}; use one of {known}, or plain bytes")
    size = Fraction(match[1]) * UNITS[match[2]]
    if size <= 0 or size.denominator != 1:
        raise ValueError("not a whole number of bytes above 0")
    return int(size)


def parse_cpus(written: object) -> int:
    """Billionths of a CPU of `12`, `0.5` or `"1.5"`. ValueError for anything else, or zero."""
    problem = "not a number of CPUs; write a decimal such as 12 or 0.5"
    if isinstance(written, bool) or not isinstance(written, str | int | float):
        raise ValueError(problem)
    try:
        cpus = Decimal(str(written).strip())
    except InvalidOperation:
        raise ValueError(problem) from None
    if not cpus.is_finite() or cpus <= 0:
        raise ValueError("a number of CPUs must be above 0")
    nano = Fraction(cpus) * NANO
    if nano.denominator != 1:
        raise ValueError("finer than a billionth of a CPU")
    return int(nano)


def format_bytes(size: int) -> str:
    """The shortest exact spelling: `16GiB`, `500MB`, else plain bytes. `parse_bytes` reads it back."""
    exact = [
        (size // factor, unit)
        for unit, factor in UNITS.items()
        if unit not in {"B", "KB"} and size and size % factor == 0
    ]
    number, unit = min(exact, default=(size, ""))
    return f"{number}{unit}"
