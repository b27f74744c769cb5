"""Pure: a regular expression as Go writes it, made into Python's; for --iface-regex.

Both descend from Perl. What interface expressions use differs in three points: Go has POSIX classes ([[:digit:]]) and
``\\z``, and its ``\\d``, ``\\w`` and ``\\s`` mean ASCII. What neither dialect shares with the other is refused by compile.
Go's syntax: https://pkg.go.dev/regexp/syntax
"""

from __future__ import annotations

import re

_CLASSES = {
    "alnum": "09AZaz",
    "alpha": "AZaz",
    "ascii": "\x00\x7f",
    "blank": "\t\t  ",
    "cntrl": "\x00\x1f\x7f\x7f",
    "digit": "09",
    "graph": "!~",
    "lower": "az",
    "print": " ~",
    "punct": "!/:@[`{~",
    "space": "\t\r  ",
    "upper": "AZ",
    "word": "09AZ__az",
    "xdigit": "09AFaf",
}
"""First and last character of each range, in order."""

_PIECE = re.compile(r"\\.|\[\^?\]?(?:\[:\^?\w+:\]|\\.|[^\]\\])*+\]|.", re.DOTALL)
"""An escaped character, a whole character class, or one character."""

_IN_CLASS = re.compile(r"\[:(?P<not>\^?)(?P<name>\w+):\]|\\.|[\[&~|]", re.DOTALL)


def compile_go(pattern: str) -> re.Pattern[str]:
    """The expression, ready for ``search``. ValueError says what is wrong with it."""
    try:
        return re.compile(_PIECE.sub(_piece, pattern), re.ASCII)
    except re.error as error:
        raise ValueError(str(error)) from None


def _piece(match: re.Match[str]) -> str:
    text = match[0]
    if text == "[":
        raise ValueError(f"missing ] after position {match.start()}")
    if text.startswith("["):
        return "[" + _IN_CLASS.sub(_piece_of_class, text[1:])
    return r"\Z" if text == r"\z" else text


def _piece_of_class(match: re.Match[str]) -> str:
    if match["name"] is not None:
        return _ranges(match["name"], negated=bool(match["not"]))
    # Python warns of these as they are: one day they may mean operations on sets.
    return match[0] if match[0].startswith("\\") else "\\" + match[0]


def _ranges(name: str, *, negated: bool) -> str:
    """The inside of a character class that means the POSIX class ``name``."""
    if name not in _CLASSES:
        raise ValueError(f"there is no character class [:{name}:]")
    ends = [ord(character) for character in _CLASSES[name]]
    if negated:
        # What lies between the ranges, before the first and after the last.
        ends = [0, *(end + step for end, step in zip(ends, [-1, 1] * len(ends), strict=False)), 0x10FFFF]
    pairs = zip(ends[::2], ends[1::2], strict=True)
    return "".join(rf"\U{first:08x}-\U{last:08x}" for first, last in pairs if first <= last)
