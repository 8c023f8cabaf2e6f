"""The worker: processes new orders, woken by the API, and looks by itself in case a wake-up was lost."""

import logging
import logging.config
import signal
import time
from pathlib import Path
from typing import Any

import psycopg
from redis.exceptions import RedisError

from shop import cache, database, logs, orders
from shop.settings import Settings

log = logging.getLogger("shop.worker")

HEARTBEAT = Path("/tmp/heartbeat")  # noqa: S108 - a tmpfs of this container; its age is the health check
PATIENCE = 1.0  # seconds to wait for a wake-up, so also the longest that a stop takes while idle
SWEEP = 5.0  # seconds between looks without a wake-up


class Stop:
    """Set by SIGTERM and SIGINT: the order in hand is finished, then the worker ends."""

    def __init__(self) -> None:
        self.asked = False
        signal.signal(signal.SIGTERM, self._ask)
        signal.signal(signal.SIGINT, self._ask)

    def _ask(self, _signal: int, _frame: object) -> None:
        self.asked = True


def process_all(pool: Any, stop: Stop) -> None:
    """Every new order, one transaction each."""
    while not stop.asked:
        with pool.connection() as connection:
            order_id = orders.process_next(connection)
        if order_id is None:
            return
        log.info("order processed", extra={"order": order_id})


def wait_for_orders(channel: Any) -> bool:
    """True when the API has woken us; a lost Redis only makes the worker slower."""
    try:
        return channel.get_message(timeout=PATIENCE) is not None
    except RedisError as error:
        log.warning("no wake-ups", extra={"error": str(error)})
        time.sleep(PATIENCE)
        return False


def main() -> None:
    settings = Settings.read()
    logging.config.dictConfig(logs.configuration(settings.log_level))
    stop = Stop()
    pool = database.connect(settings, size=2)
    channel = cache.connect(settings).pubsub(ignore_subscribe_messages=False)
    channel.subscribe(cache.NEW_ORDERS)
    log.info("worker started", extra={"version": settings.version})
    next_sweep = 0.0
    while not stop.asked:
        woken = wait_for_orders(channel)
        try:
            if woken or time.monotonic() >= next_sweep:
                process_all(pool, stop)
                next_sweep = time.monotonic() + SWEEP
                HEARTBEAT.touch()
        except psycopg.OperationalError as error:
            log.error("database unavailable", extra={"error": str(error).strip()})
    pool.close()
    log.info("worker stopped")


if __name__ == "__main__":
    main()
