"""The example shop's own rules: what a valid order is, what it costs, what its logs and settings look like.

Only the modules that need neither Flask nor a database; the rest is used by the end-to-end tests.
"""

import json
import logging
import sys
from pathlib import Path

import pytest

# The example is an application of its own, not one of this project's packages.
sys.path.append(str(Path(__file__).parents[2] / "examples/shop/api"))

from shop import catalogue, logs
from shop.settings import Settings

ROPE = {"sku": "rope", "quantity": 2}


def test_valid_order_is_taken_over_and_costs_price_times_quantity() -> None:
    items = catalogue.parse_items({"items": [ROPE, {"sku": "buoy", "quantity": 1, "colour": "red"}]})
    assert items == [ROPE, {"sku": "buoy", "quantity": 1}]
    assert catalogue.total_cents(items) == 2 * 1_250 + 4_500


@pytest.mark.parametrize(
    ("payload", "field"),
    [
        (None, "items"),
        ([], "items"),
        ({}, "items"),
        ({"items": {}}, "items"),
        ({"items": []}, "items"),
        ({"items": [ROPE] * 51}, "items"),
        ({"items": ["rope"]}, "items[0].sku"),
        ({"items": [ROPE, {"sku": "gold", "quantity": 1}]}, "items[1].sku"),
        ({"items": [{"sku": ["rope"], "quantity": 1}]}, "items[0].sku"),
        ({"items": [{"sku": "rope"}]}, "items[0].quantity"),
        ({"items": [{"sku": "rope", "quantity": 0}]}, "items[0].quantity"),
        ({"items": [{"sku": "rope", "quantity": 1_001}]}, "items[0].quantity"),
        ({"items": [{"sku": "rope", "quantity": 1.5}]}, "items[0].quantity"),
        ({"items": [{"sku": "rope", "quantity": True}]}, "items[0].quantity"),
    ],
)
def test_invalid_items_are_refused_by_field(payload: object, field: str) -> None:
    with pytest.raises(catalogue.InvalidError) as refusal:
        catalogue.parse_items(payload)
    assert str(refusal.value).startswith(f"{field}:")


@pytest.mark.parametrize("customer", [None, 7, "", "  ", "x" * 101, "nul\0", "half a pair \ud800", "two\nlines"])
def test_invalid_customer_is_refused(customer: object) -> None:
    with pytest.raises(catalogue.InvalidError, match=r"^customer:"):
        catalogue.parse_customer({"customer": customer})


def test_customer_is_trimmed() -> None:
    assert catalogue.parse_customer({"customer": "  Ada Löwe "}) == "Ada Löwe"


def test_log_line_is_json_with_extra_fields() -> None:
    record = logging.makeLogRecord({"msg": "order %s", "args": ("created",), "name": "shop", "order": 7})
    line = json.loads(logs.JsonFormatter().format(record))
    assert line["message"] == "order created"
    assert line["order"] == 7
    assert line["time"].endswith("Z")


def test_passwords_come_from_files_and_stay_out_of_repr(tmp_path: Path) -> None:
    secret = tmp_path / "password"
    secret.write_text("s3cret word\n")
    settings = Settings.read({"DB_PASSWORD_FILE": str(secret), "CACHE_PASSWORD_FILE": str(secret)})
    assert settings.db_password == settings.cache_password == "s3cret word"
    assert "s3cret" not in repr(settings)


def test_missing_password_file_is_named() -> None:
    with pytest.raises(KeyError, match="DB_PASSWORD_FILE"):
        Settings.read({})
