"""The HTTP API: parse the request, call orders or cache, answer in JSON. Routes are in the table at the end."""

import logging
import re
import socket
import time
from typing import Any, TypeAlias

import psycopg
from flask import Flask, Response, current_app, g, jsonify, request
from redis.exceptions import RedisError
from werkzeug.exceptions import HTTPException

from shop import cache, catalogue, database, orders
from shop.settings import Settings

log = logging.getLogger(__name__)

MAX_BODY = 64 * 1024  # bytes
MAX_LISTED = 200  # orders
MAX_ID = 2**63 - 1  # PostgreSQL's bigint
CART_ID = re.compile(r"[A-Za-z0-9-]{1,64}")

Answer: TypeAlias = "Response | tuple[Response, int]"


class Services:
    """What the handlers share; one per process, kept in `app.extensions`."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.pool = database.connect(settings, size=8)
        self.cache = cache.connect(settings)


def services() -> Services:
    found: Services = current_app.extensions["shop"]
    return found


def body() -> object:
    """The request's JSON, whatever its content type says; InvalidError if it is none."""
    try:
        return request.get_json(force=True)
    except HTTPException as error:
        if error.code == 413:
            raise
        raise catalogue.InvalidError("body: expected JSON") from error


def cart_key(cart_id: str) -> str:
    if not CART_ID.fullmatch(cart_id):
        raise catalogue.InvalidError("cart id: expected up to 64 letters, digits and dashes")
    return cart_id


def create_order() -> Answer:
    payload = body()
    customer, items = catalogue.parse_customer(payload), catalogue.parse_items(payload)
    with services().pool.connection() as connection:
        order = orders.create(connection, customer, items)
    cache.wake_worker(services().cache)
    log.info("order created", extra={"order": order["id"], "request_id": g.request_id})
    return jsonify(order), 201


def list_orders() -> Answer:
    limit = request.args.get("limit", default=50, type=int)
    with services().pool.connection() as connection:
        return jsonify(orders=orders.latest(connection, max(1, min(limit, MAX_LISTED))))


def get_order(order_id: int) -> Answer:
    with services().pool.connection() as connection:
        order = orders.find(connection, order_id) if order_id <= MAX_ID else None
    return jsonify(order) if order else (jsonify(error=f"order {order_id} not found"), 404)


def put_cart(cart_id: str) -> Answer:
    items = catalogue.parse_items(body())
    cache.put_cart(services().cache, cart_key(cart_id), items)
    return jsonify(id=cart_id, items=items)


def get_cart(cart_id: str) -> Answer:
    return jsonify(id=cart_id, items=cache.get_cart(services().cache, cart_key(cart_id)))


def delete_cart(cart_id: str) -> Answer:
    cache.delete_cart(services().cache, cart_key(cart_id))
    return Response(status=204)


def products() -> Answer:
    return jsonify(products=[{"sku": sku, "price_cents": price} for sku, price in catalogue.CATALOGUE.items()])


def healthz() -> Answer:
    """200 when both stores answer, else 503; says which one does not."""
    checks = {"db": check_database, "cache": services().cache.ping}
    failed = {}
    for name, check in checks.items():
        try:
            check()
        except (psycopg.Error, RedisError) as error:
            failed[name] = type(error).__name__
    if failed:
        log.warning("unhealthy", extra={"failed": failed})
        return jsonify(status="unhealthy", failed=failed), 503
    return jsonify(status="ok")


def check_database() -> None:
    pool = services().pool
    try:
        with pool.connection(timeout=2) as connection:
            connection.execute("SELECT 1")
    except psycopg.OperationalError:
        pool.check()  # connections that a restart of the database broke are replaced now, not one by one
        raise


def version() -> Answer:
    settings = services().settings
    return jsonify(version=settings.version, environment=settings.environment, instance=socket.gethostname())


def start_request() -> None:
    g.started = time.monotonic()
    g.request_id = request.headers.get("X-Request-Id", "-")


def log_request(response: Response) -> Response:
    level = logging.DEBUG if request.path == "/healthz" else logging.INFO
    fields = {
        "method": request.method,
        "path": request.path,
        "status": response.status_code,
        "ms": round((time.monotonic() - g.started) * 1000, 1),
        "request_id": g.request_id,
    }
    log.log(level, "request", extra=fields)
    return response


def answer_invalid(error: catalogue.InvalidError) -> Answer:
    return jsonify(error=str(error)), 400


def answer_http_error(error: HTTPException) -> Answer:
    return jsonify(error=error.description), error.code or 500


def answer_unavailable(error: Exception) -> Answer:
    log.error("store unavailable", extra={"error": str(error).strip(), "request_id": g.request_id})
    return jsonify(error="temporarily unavailable, try again"), 503


def answer_bug(error: Exception) -> Answer:
    log.exception("request failed", exc_info=error, extra={"request_id": g.request_id})
    return jsonify(error="internal error"), 500


ROUTES: tuple[tuple[str, str, Any], ...] = (
    ("POST", "/orders", create_order),
    ("GET", "/orders", list_orders),
    ("GET", "/orders/<int:order_id>", get_order),
    ("PUT", "/cart/<cart_id>", put_cart),
    ("GET", "/cart/<cart_id>", get_cart),
    ("DELETE", "/cart/<cart_id>", delete_cart),
    ("GET", "/products", products),
    ("GET", "/healthz", healthz),
    ("GET", "/version", version),
)
ERRORS: tuple[tuple[type[Exception], Any], ...] = (
    (catalogue.InvalidError, answer_invalid),
    (HTTPException, answer_http_error),
    (psycopg.OperationalError, answer_unavailable),
    (RedisError, answer_unavailable),
    (Exception, answer_bug),
)


def create_app() -> Flask:
    app = Flask("shop", static_folder=None)
    app.config["MAX_CONTENT_LENGTH"] = MAX_BODY
    app.extensions["shop"] = Services(Settings.read())
    app.before_request(start_request)
    app.after_request(log_request)
    for method, path, handler in ROUTES:
        app.add_url_rule(path, view_func=handler, methods=[method])
    for kind, answer in ERRORS:
        app.register_error_handler(kind, answer)
    return app
