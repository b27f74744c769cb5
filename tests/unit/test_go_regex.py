"""Go's regular expressions in Python; what each should find is Go's documentation (pkg.go.dev/regexp/syntax)."""

from __future__ import annotations

import re
import string

import pytest

from flanneld.go_regex import compile_go

PRINTABLE = {chr(code) for code in range(0x20, 0x7F)}
SETS = {
    "alpha": set(string.ascii_letters),
    "digit": set(string.digits),
    "alnum": set(string.ascii_letters + string.digits),
    "upper": set(string.ascii_uppercase),
    "lower": set(string.ascii_lowercase),
    "space": set(" \t\n\v\f\r"),
    "punct": set(string.punctuation),
    "xdigit": set(string.hexdigits),
    "word": set(string.ascii_letters + string.digits + "_"),
    "graph": PRINTABLE - {" "},
    "print": PRINTABLE,
    "blank": set(" \t"),
    "cntrl": {chr(code) for code in (*range(0x20), 0x7F)},
    "ascii": {chr(code) for code in range(0x80)},
}
TRIED = [chr(code) for code in range(0x180)] + ["\U0010ffff"]


@pytest.mark.parametrize("name", SETS)
def test_a_posix_class_and_its_negation(name: str) -> None:
    assert {c for c in TRIED if compile_go(f"[[:{name}:]]").search(c)} == SETS[name]
    assert {c for c in TRIED if compile_go(f"[[:^{name}:]]").search(c)} == set(TRIED) - SETS[name]
    assert {c for c in TRIED if compile_go(f"[^[:{name}:]]").search(c)} == set(TRIED) - SETS[name]


@pytest.mark.parametrize(
    ("pattern", "found", "not_found"),
    [
        (r"^eth[[:digit:]]+\z", "eth10", "eth1x"),
        (r"^(en|eth)[[:alnum:]_.-]+$", "enp1s0.100", "wlan0"),
        ("[[:digit:][:upper:]]z", "7z", "az"),
        ("[]a]b", "]b", "[b"),
        ("[^]a]b", "xb", "]b"),
        ("[[a]b", "[b", "xb"),
        ("[a&&~~||b]1", "&1", "c1"),
        ("[:digit:]1", "t1", "51"),
        (r"[\]x]1", "]1", r"\1"),
        (r"\[[[:digit:]]\]", "[5]", "5"),
        (r"\\z", "\\z", "z"),
        (r"^\d$", "5", "\u0665"),
        (r"192\.168\.", "192.168.7.1", "192x168"),
    ],
)
def test_what_an_expression_finds(pattern: str, found: str, not_found: str) -> None:
    expression = compile_go(pattern)
    assert expression.search(found)
    assert not expression.search(not_found)


@pytest.mark.parametrize("pattern", ["(", "[[:digit:]", "[", r"\pL", r"\Qa\E", "a**", "[[:nothing:]]", "[z-a]", "\\"])
def test_what_cannot_be_understood_is_refused(pattern: str) -> None:
    with pytest.raises(ValueError, match=r"\w") as refused:
        compile_go(pattern)
    assert not isinstance(refused.value, re.error)
