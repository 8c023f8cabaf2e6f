"""What the shop sells, what a valid order of it is, and what that costs."""

from collections.abc import Mapping
from typing import Any

# Price per piece in cents.
CATALOGUE: Mapping[str, int] = {
    "anchor": 12_900,
    "buoy": 4_500,
    "compass": 7_950,
    "lantern": 3_200,
    "rope": 1_250,
}

MAX_LINES = 50
MAX_QUANTITY = 1_000
MAX_CUSTOMER = 100  # characters


class InvalidError(ValueError):
    """The request is not one the shop understands; the message says which field and why."""


def parse_items(payload: object) -> list[dict[str, Any]]:
    """The `items` of a request body: a list of `{"sku": …, "quantity": …}`. Raises InvalidError."""
    items = payload.get("items") if isinstance(payload, dict) else None
    if not isinstance(items, list) or not 1 <= len(items) <= MAX_LINES:
        raise InvalidError(f"items: expected a list of 1 to {MAX_LINES} entries")
    return [_parse_item(index, item) for index, item in enumerate(items)]


def _parse_item(index: int, item: object) -> dict[str, Any]:
    fields = item if isinstance(item, dict) else {}
    sku, quantity = fields.get("sku"), fields.get("quantity")
    if not isinstance(sku, str) or sku not in CATALOGUE:
        raise InvalidError(f"items[{index}].sku: expected one of {', '.join(CATALOGUE)}")
    # bool is an int to Python, but `true` pieces is no quantity.
    if isinstance(quantity, bool) or not isinstance(quantity, int) or not 1 <= quantity <= MAX_QUANTITY:
        raise InvalidError(f"items[{index}].quantity: expected a whole number from 1 to {MAX_QUANTITY}")
    return {"sku": sku, "quantity": quantity}


def parse_customer(payload: object) -> str:
    """The `customer` of a request body. Raises InvalidError."""
    customer = payload.get("customer") if isinstance(payload, dict) else None
    name = customer.strip() if isinstance(customer, str) else ""
    # What is not printable (NUL, half a surrogate pair) is nothing that PostgreSQL's text could hold either.
    if not name.isprintable() or not 1 <= len(name) <= MAX_CUSTOMER:
        raise InvalidError(f"customer: expected 1 to {MAX_CUSTOMER} printable characters")
    return name


def total_cents(items: list[dict[str, Any]]) -> int:
    return sum(CATALOGUE[item["sku"]] * item["quantity"] for item in items)
