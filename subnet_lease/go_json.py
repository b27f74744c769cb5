"""JSON read as Go's encoding/json reads it, because flannel's files and keys were written for that.

Keys match without regard to case, at every level; the last duplicate wins, even if spelled differently; unknown keys
are allowed (and returned, for a warning); null leaves a plain value alone; "24" and 24.0 are no integers; anything
after the value is an error.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

Model = TypeVar("Model", bound=BaseModel)


def parse(text: str) -> Any:
    """Any JSON value; ValueError says where it stops being one."""
    try:
        value = _DECODER.decode(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error.msg} at line {error.lineno} column {error.colno}") from None
    except RecursionError:
        raise ValueError("not usable JSON: nested too deeply") from None
    return _without_surrogates(value) if "\\u" in text else value


def parse_object(text: str) -> dict[str, Any]:
    """A JSON object; ValueError for anything else."""
    value = parse(text)
    if not isinstance(value, dict):
        raise ValueError(f"must be a JSON object, is {describe(value)}")
    return value


def fold_key(key: str) -> str:
    """What two keys have in common when Go takes them for the same field."""
    return key.lower().replace("\u017f", "s")  # the long s is Go's only other surprise; the Kelvin sign lowers to k


def fold(pairs: Mapping[str, Any], names: Iterable[str]) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Rename keys to the spelling in ``names``; also the keys that match none, as they were spelled."""
    names = frozenset(names)
    if pairs.keys() <= names:  # as flannel and we spell them: thousands of leases at every start
        return dict(pairs), ()
    spelling = {fold_key(name): name for name in names}
    known: dict[str, Any] = {}
    unknown: list[str] = []
    for key, value in pairs.items():
        name = spelling.get(fold_key(key))
        if name is None:
            unknown.append(key)
        else:
            known[name] = value
    return known, tuple(unknown)


def decode_options(model: type[Model], options: Mapping[str, Any]) -> tuple[Model, tuple[str, ...]]:
    """Fill a pydantic model from a JSON object by Go's rules; also the unknown keys. ValueError: key, value and rule.

    The model's aliases are the spelling of the keys; a field without an alias goes by its own name. Types are strict:
    no text for a number, no fraction for an integer, no number for a boolean. null leaves the default.
    """
    names = [field.alias or name for name, field in model.model_fields.items()]
    known, unknown = fold(options, names)
    given = {name: value for name, value in known.items() if value is not None}
    try:
        return model.model_validate(given, strict=True, by_alias=True, by_name=True), unknown
    except ValidationError as error:
        raise ValueError(explain(error)) from None


def explain(error: ValidationError) -> str:
    """One line: every wrong key with its value and the rule it breaks."""
    parts = []
    for item in error.errors(include_url=False, include_context=False):
        key = ".".join(str(part) for part in item["loc"])
        rule = _rule(item["type"], item["msg"], quoted=isinstance(item["input"], str))
        parts.append(f"{key} {describe(item['input'])}: {rule}" if key else rule)
    return "; ".join(parts)


def _rule(kind: str, message: str, *, quoted: bool) -> str:
    """What pydantic says, in the words of one who writes JSON."""
    if kind == "int_type":
        return "must be a number without quotes" if quoted else "must be a whole number"
    if kind == "bool_type":
        return "must be true or false without quotes" if quoted else "must be true or false"
    if kind == "string_type":
        return "must be text in quotes"
    rule = message.removeprefix("Value error, ")
    return f"{rule[:1].lower()}{rule[1:]}".replace("input should be ", "must be ", 1)


def describe(value: Any) -> str:
    """A value as JSON, cut to what fits in a message."""
    try:
        text = json.dumps(value, ensure_ascii=True)
    except (TypeError, ValueError, RecursionError):
        text = ascii(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _last_wins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) == len(pairs):
        return result
    # A dict keeps a duplicate in its first place; Go lets the last one win also over other spellings between them.
    result = {}
    for key, value in pairs:
        result.pop(key, None)
        result[key] = value
    return result


def _no_constant(name: str) -> Any:
    raise ValueError(f"not JSON: {name}")


def _without_surrogates(value: Any) -> Any:
    """A lone surrogate can be neither printed nor stored; Go reads it as U+FFFD."""
    if isinstance(value, str):
        return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    if isinstance(value, list):
        return [_without_surrogates(item) for item in value]
    if isinstance(value, dict):
        return {_without_surrogates(key): _without_surrogates(item) for key, item in value.items()}
    return value


_DECODER = json.JSONDecoder(object_pairs_hook=_last_wins, parse_constant=_no_constant)
