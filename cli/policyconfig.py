"""The policy config (`pulumi --policy-pack-config`), held to the pack's own schema before anything runs.
Pulumi takes a misspelt rule or property without a word, and the rule then stays as it was."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from settings.errors import Loc, SettingsError, did_you_mean, dotted, together
from settings.yamlfile import YamlFile

if TYPE_CHECKING:
    from jsonschema import ValidationError

NAME = "policy-config.json"
SCHEMA = "config.schema.json"
WORDS = {
    "array": "a list",
    "boolean": "true or false",
    "integer": "a whole number",
    "null": "null",
    "number": "a number",
    "object": "an object: {…}",
    "string": "text in quotes",
}


def find(pack: Path, root: Path, variables: Mapping[str, str]) -> Path | None:
    """POLICY_CONFIG, else `policy-config.json` beside the pack's folder, if it is there.

    Beside the pack and not in the checkout, so that whoever is judged by another branch's pack cannot relax it.
    """
    if named := variables.get("POLICY_CONFIG"):
        return root / named
    beside = pack.parent / NAME
    return beside if beside.exists() else None


def check(file: Path, pack: Path) -> None:
    """SettingsError for everything in a config that the pack does not know, with file, line, key, value and remedy."""
    from jsonschema import Draft202012Validator  # here, since most runs have no config

    if not (pack / SCHEMA).is_file():
        raise SettingsError(
            file=file.name,
            key="",
            problem=f"cannot be checked: the pack {pack} has no {SCHEMA}",
            remedy="Use a pack that has one, or no policy config.",
        )
    config = _parsed(file)
    document = YamlFile(file)  # JSON is YAML too: for the lines, and for keys that are written twice
    faults = [
        fault
        for error in Draft202012Validator(_parsed(pack / SCHEMA)).iter_errors(config)
        for meant in _meant(error)
        for fault in _faults(document, meant)
    ]
    if faults:
        raise together(faults)


def _parsed(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise SettingsError(
            file=str(file),
            key="POLICY_CONFIG",
            problem=error.strerror or "cannot be read",
            remedy="Correct the path, or unset the variable.",
        ) from None
    except UnicodeDecodeError as error:
        raise SettingsError(
            file=file.name, key="", problem=f"not UTF-8 text ({error.reason})", remedy="Save the file as UTF-8."
        ) from None
    except json.JSONDecodeError as error:
        raise SettingsError(
            file=f"{file.name}:{error.lineno}",
            key="",
            problem=f"not valid JSON: {error.msg}",
            remedy="Correct the line (commas, quotes and brackets are the usual causes; comments are not allowed).",
        ) from None


def _meant(error: "ValidationError") -> Iterator["ValidationError"]:
    """The faults behind a failed `anyOf`: those of the form that was meant, which the value's type tells."""
    forms: dict[str | int, list[ValidationError]] = {}
    for inner in error.context or ():
        forms.setdefault(inner.relative_schema_path[0], []).append(inner)
    meant = next((faults for faults in forms.values() if not any(map(_other_type, faults))), None)
    if meant is None:
        yield error
    else:
        for inner in meant:
            yield from _meant(inner)


def _other_type(error: "ValidationError") -> bool:
    if error.relative_path:
        return False
    return error.validator == "type" or (error.validator == "enum" and isinstance(error.instance, dict))


def _faults(document: YamlFile, error: "ValidationError") -> Iterator[SettingsError]:
    loc, value = tuple(error.absolute_path), cast(Any, error.instance)
    schema = dict(error.schema) if isinstance(error.schema, Mapping) else {}
    if error.validator == "additionalProperties":
        known = schema.get("properties", {})
        problem = f"{loc[0]} has no such property" if loc else "no such rule in the policy pack"
        for name in sorted(value.keys() - known.keys()):
            yield _fault(document, (*loc, name), value[name], problem, did_you_mean(name, known))
    elif error.validator == "enum":
        remedy = did_you_mean(str(value), map(str, schema["enum"]))
        yield _fault(document, loc, value, "not one of the allowed values", remedy)
    elif error.validator == "type":
        types = [schema["type"]] if isinstance(schema["type"], str) else schema["type"]
        remedy = " ".join([f"Write {' or '.join(WORDS[kind] for kind in types)}.", schema.get("description", "")])
        yield _fault(document, loc, value, "not of this type", remedy.strip())
    else:
        remedy = schema.get("description", f"The pack's {SCHEMA} says what is allowed.")
        yield _fault(document, loc, value, error.message, remedy)


def _fault(document: YamlFile, loc: Loc, value: object, problem: str, remedy: str) -> SettingsError:
    return SettingsError(file=document.at(loc), key=dotted(loc), value=value, problem=problem, remedy=remedy)
