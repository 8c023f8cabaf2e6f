"""The PostgreSQL connection pool and the schema, brought up to date by whichever replica comes first."""

import logging
from typing import Any

from psycopg.conninfo import make_conninfo
from psycopg.rows import dict_row
from psycopg_pool import ConnectionPool

from shop.settings import Settings

log = logging.getLogger(__name__)

WAIT_SECONDS = 15.0  # for the database at start; then the process ends and its restart policy tries again
LOCK = 5_110_001  # any number, the same in every replica: who holds it migrates, the others wait

# In order, each run once; never edit one that has been released, add another.
MIGRATIONS = (
    """
    CREATE TABLE orders (
        id           bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
        customer     text NOT NULL,
        items        jsonb NOT NULL,
        status       text NOT NULL DEFAULT 'new' CHECK (status IN ('new', 'processed')),
        total_cents  bigint,
        created_at   timestamptz NOT NULL DEFAULT now(),
        processed_at timestamptz
    )
    """,
    "CREATE INDEX orders_new ON orders (id) WHERE status = 'new'",
)


def connect(settings: Settings, size: int) -> Any:
    """An open pool of up to `size` connections to a database whose schema is up to date.

    Raises psycopg_pool.PoolTimeout when the database does not answer within WAIT_SECONDS.
    """
    conninfo = make_conninfo(
        host=settings.db_host,
        dbname="shop",
        user="shop",
        password=settings.db_password,
        connect_timeout=3,
        application_name="shop",
    )
    pool = ConnectionPool(
        conninfo,
        min_size=1,
        max_size=size,
        timeout=5,
        reconnect_timeout=WAIT_SECONDS,  # short, since its pauses double; the next request starts afresh
        kwargs={"row_factory": dict_row},
        open=False,
    )
    pool.open(wait=True, timeout=WAIT_SECONDS)
    migrate(pool)
    return pool


def migrate(pool: Any) -> None:
    """Runs the migrations that this database lacks, in one transaction, one replica at a time."""
    with pool.connection() as connection:
        connection.execute("SELECT pg_advisory_xact_lock(%s)", (LOCK,))
        connection.execute("CREATE TABLE IF NOT EXISTS schema_version (version integer PRIMARY KEY)")
        done = connection.execute("SELECT count(*) AS versions FROM schema_version").fetchone()["versions"]
        for version, statement in enumerate(MIGRATIONS[done:], start=done + 1):
            connection.execute(statement)
            connection.execute("INSERT INTO schema_version VALUES (%s)", (version,))
            log.info("schema migrated", extra={"version": version})
