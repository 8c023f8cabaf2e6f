"""Exemptions from a policy rule: `x-bulkhead.exempt` of a compose file, `bulkhead:exempt` of the ledger.
Which rules accept one, and whether it has expired, is the policy pack's to judge."""

from datetime import date
from typing import Annotated

from pydantic import BeforeValidator, Field

from settings.errors import Frozen

MIN_REASON = 15


def _reasoned(reason: object) -> object:
    if not isinstance(reason, str) or len(reason.strip()) < MIN_REASON:
        raise ValueError(
            f"a reason of at least {MIN_REASON} characters is needed; write why the rule cannot be kept here"
        )
    return reason


def _day(written: object) -> object:
    if isinstance(written, date):
        return written
    try:
        # A date without quotes in a stack's settings comes back from Pulumi, once it has written the file anew, as a
        # point in time: `2027-01-31 00:00:00 +0000 UTC`.
        day = written.removesuffix(" 00:00:00 +0000 UTC") if isinstance(written, str) else ""
        return date.fromisoformat(day)
    except ValueError:
        raise ValueError("not a date; write the last day on which it holds, as in 2027-01-31") from None


class Exemption(Frozen):
    """One exemption. `rule`: the rule's id. `owner`: who answers for it. `expires`: the last day on which it holds."""

    rule: Annotated[str, Field(pattern=r"^[a-z][a-z-]*[a-z]$")]
    reason: Annotated[str, BeforeValidator(_reasoned)]
    owner: Annotated[str, Field(min_length=1)]
    expires: Annotated[date, BeforeValidator(_day)]


class LedgerExemption(Exemption):
    """An exemption of a whole environment, for the rules that judge the ledger itself."""

    environment: str
