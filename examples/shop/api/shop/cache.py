"""Redis: the carts, and the channel on which the API wakes the worker."""

import json
import logging
from typing import Any

from redis import Redis
from redis.backoff import NoBackoff
from redis.exceptions import ConnectionError, RedisError, TimeoutError
from redis.retry import Retry

from shop.settings import Settings

log = logging.getLogger(__name__)

CART_SECONDS = 7 * 24 * 3600
NEW_ORDERS = "orders:new"


def connect(settings: Settings) -> Any:
    """A client that connects on first use, and once more when the server has been restarted."""
    return Redis(
        host=settings.cache_host,
        password=settings.cache_password,
        decode_responses=True,
        socket_timeout=3,
        socket_connect_timeout=3,
        retry=Retry(NoBackoff(), 1),
        retry_on_error=[ConnectionError, TimeoutError],
    )


def put_cart(client: Any, cart_id: str, items: list[dict[str, Any]]) -> None:
    client.set(f"cart:{cart_id}", json.dumps(items), ex=CART_SECONDS)


def get_cart(client: Any, cart_id: str) -> list[dict[str, Any]]:
    """The cart's items; a cart that nobody filled is empty."""
    items: list[dict[str, Any]] = json.loads(client.get(f"cart:{cart_id}") or "[]")
    return items


def delete_cart(client: Any, cart_id: str) -> None:
    client.delete(f"cart:{cart_id}")


def wake_worker(client: Any) -> None:
    """Best effort: the order is already stored, and the worker looks by itself now and then."""
    try:
        client.publish(NEW_ORDERS, "")
    except RedisError as error:
        log.warning("worker not woken", extra={"error": str(error)})
