"""JSON in and out without the ``json`` package, whose import (it needs ``re``) costs half of our time.

The C scanner behind ``json`` does the reading. Where an interpreter lacks it, ``json`` itself takes over.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any


class _Strict:
    """What the scanner asks of its context (json.JSONDecoder has the same attributes)."""

    strict = True
    object_hook = None
    object_pairs_hook = None
    parse_float = float
    parse_int = int
    parse_constant = float


try:
    from _json import encode_basestring_ascii as _quote
    from _json import make_scanner

    _scan = make_scanner(_Strict)  # type: ignore[arg-type]
except (ImportError, AttributeError):  # not CPython, or one whose scanner asks for more
    import json

    def loads(data: bytes) -> Any:
        """The value that ``data`` spells; ValueError where it spells none."""
        return json.loads(data)

    def dumps(value: Any) -> str:
        """``value`` on one line, without spaces."""
        return json.dumps(value, separators=(",", ":"))

else:

    def loads(data: bytes) -> Any:
        """The value that ``data`` spells; ValueError where it spells none."""
        text = data.decode("utf-8").strip(" \t\r\n")
        try:
            value, end = _scan(text, 0)
        except StopIteration:
            raise ValueError("unexpected end of JSON input" if not text else "this is not JSON") from None
        except SystemError:
            # The scanner wants to raise json's own error, and json was not imported.
            raise ValueError("this is not JSON, or it ends too early") from None
        if end != len(text):
            raise ValueError(f"unexpected data after the JSON value, at character {end}")
        return value

    def dumps(value: Any) -> str:
        """``value`` on one line, without spaces."""
        if isinstance(value, str):
            return _quote(value)
        if value is None or isinstance(value, bool):
            return {None: "null", True: "true", False: "false"}[value]
        if isinstance(value, dict):
            return "{" + ",".join(f"{_quote(str(key))}:{dumps(item)}" for key, item in value.items()) + "}"
        if isinstance(value, list | tuple):
            return "[" + ",".join(dumps(item) for item in value) + "]"
        if isinstance(value, int | float):
            return repr(value)
        raise TypeError(f"not JSON: {value!r}")
