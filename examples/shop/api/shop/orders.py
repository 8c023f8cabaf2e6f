"""The statements that store, list and process orders."""

from collections.abc import Mapping
from typing import Any

from psycopg.types.json import Jsonb

from shop.catalogue import total_cents


def create(connection: Any, customer: str, items: list[dict[str, Any]]) -> dict[str, Any]:
    return _one(
        connection.execute(
            "INSERT INTO orders (customer, items) VALUES (%s, %s) RETURNING *", (customer, Jsonb(items))
        ).fetchone()
    )


def find(connection: Any, order_id: int) -> dict[str, Any] | None:
    row = connection.execute("SELECT * FROM orders WHERE id = %s", (order_id,)).fetchone()
    return _one(row) if row else None


def latest(connection: Any, limit: int) -> list[dict[str, Any]]:
    rows = connection.execute("SELECT * FROM orders ORDER BY id DESC LIMIT %s", (limit,)).fetchall()
    return [_one(row) for row in rows]


def process_next(connection: Any) -> int | None:
    """Processes the oldest new order that no other worker has in hand; its id, or None if there is none."""
    row = connection.execute(
        "SELECT id, items FROM orders WHERE status = 'new' ORDER BY id LIMIT 1 FOR UPDATE SKIP LOCKED"
    ).fetchone()
    if row is None:
        return None
    connection.execute(
        "UPDATE orders SET status = 'processed', total_cents = %s, processed_at = now() WHERE id = %s",
        (total_cents(row["items"]), row["id"]),
    )
    return int(row["id"])


def _one(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row as the API shows it: times in ISO 8601."""
    return {key: value.isoformat() if hasattr(value, "isoformat") else value for key, value in row.items()}
