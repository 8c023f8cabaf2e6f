"""What the engine sends about a resource, as plain Python: unknowns become `UNKNOWN`, secrets the value that they hold.
The SDK's own proxies raise on unknowns, which turns a mandatory rule into an advisory message; see ADR 15."""

from enum import Enum
from typing import Any, Final

from pulumi_policy.deserialize import SPECIAL_SECRET_SIG, SPECIAL_SIG_KEY
from pulumi_policy.proxy import (
    UNKNOWN_ARCHIVE_VALUE,
    UNKNOWN_ARRAY_VALUE,
    UNKNOWN_ASSET_VALUE,
    UNKNOWN_BOOLEAN_VALUE,
    UNKNOWN_NUMBER_VALUE,
    UNKNOWN_OBJECT_VALUE,
    UNKNOWN_STRING_VALUE,
)


class Unknown(Enum):
    """The type of `UNKNOWN`, so that a type checker tells it from every value."""

    UNKNOWN = "unknown at preview"


UNKNOWN: Final = Unknown.UNKNOWN

SENTINELS: Final = frozenset(
    {
        UNKNOWN_ARCHIVE_VALUE,
        UNKNOWN_ARRAY_VALUE,
        UNKNOWN_ASSET_VALUE,
        UNKNOWN_BOOLEAN_VALUE,
        UNKNOWN_NUMBER_VALUE,
        UNKNOWN_OBJECT_VALUE,
        UNKNOWN_STRING_VALUE,
    }
)


def properties(struct: Any) -> dict[str, Any]:
    """A `google.protobuf.Struct` as a dict of str, float, bool, None, list, dict and UNKNOWN."""
    return {key: _value(value) for key, value in struct.fields.items()}


def raw(value: Any) -> Any:
    """The opposite of `properties`, of one value: unknowns as the engine spells them."""
    if isinstance(value, dict):
        return {key: raw(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [raw(inner) for inner in value]
    return UNKNOWN_STRING_VALUE if value is UNKNOWN else value


def marked(value: Any) -> bool:
    """Whether a value on the wire holds a secret, or an asset: what would be lost when it is written anew."""
    kind = value.WhichOneof("kind")
    if kind == "struct_value":
        inner = value.struct_value.fields
        return SPECIAL_SIG_KEY in inner or any(map(marked, inner.values()))
    return kind == "list_value" and any(map(marked, value.list_value.values))


def _value(value: Any) -> Any:
    kind = value.WhichOneof("kind")
    if kind == "string_value":
        text = value.string_value
        return UNKNOWN if text in SENTINELS else text
    if kind == "list_value":
        return [_value(one) for one in value.list_value.values]
    if kind == "struct_value":
        return _block(value.struct_value)
    return None if kind == "null_value" else getattr(value, kind)


def _block(struct: Any) -> Any:
    if SPECIAL_SIG_KEY not in struct.fields:
        return properties(struct)
    if struct.fields[SPECIAL_SIG_KEY].string_value == SPECIAL_SECRET_SIG:
        return _value(struct.fields["value"])
    return UNKNOWN  # assets, archives, resource references: no rule knows what they hold
