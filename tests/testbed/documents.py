"""What in docs/ is written by a program: the table of flags, and the tests that pin each field problem.

``script/docs`` writes these parts; tests/unit/test_docs.py says when that is due. A part stands between two comments,
``<!-- NAME: written by script/docs -->`` and ``<!-- end of NAME -->``.
"""

from __future__ import annotations

import ast
import re
import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path

from flanneld.options import FLAGS, Flag

ROOT = Path(__file__).parents[2]
CONFIGURATION = ROOT / "docs" / "configuration.md"
FIELD_PROBLEMS = ROOT / "docs" / "field-problems.md"


def part(text: str, name: str) -> str:
    """What stands between the comments of a part, without the line breaks around it. LookupError: there is none."""
    found = re.search(f"{re.escape(_start(name))}\n(.*?)\n?{re.escape(_end(name))}", text, re.DOTALL)
    if found is None:
        raise LookupError(f"no part {name!r}: put {_start(name)} and {_end(name)} on lines of their own")
    return found[1]


def with_part(text: str, name: str, body: str) -> str:
    """The text with another body in that part."""
    old = f"{_start(name)}\n{part(text, name)}\n{_end(name)}"
    if old not in text:  # an empty part
        old = f"{_start(name)}\n{_end(name)}"
    return text.replace(old, f"{_start(name)}\n{body}\n{_end(name)}")


def _start(name: str) -> str:
    return f"<!-- {name}: written by script/docs -->"


def _end(name: str) -> str:
    return f"<!-- end of {name} -->"


def flag_table(group: str) -> str:
    """The flags of a group of ``flanneld.options``; a variable's name follows from the flag's."""
    rows = ["|Flag, variable|Default|Meaning|", "|-|-|-|"]
    return "\n".join(rows + [_flag_row(flag) for flag in FLAGS if flag.group == group])


def _flag_row(flag: Flag) -> str:
    name = f"`-{flag.name}`" if flag.name == "v" else f"`--{flag.name}`"
    meaning = flag.help.replace("|", "\\|")
    return f"|{name}<br>`{flag.variable}`|{_default(flag)}|{meaning}|"


def _default(flag: Flag) -> str:
    if flag.kind == "bool":
        return f"`{str(flag.default).lower()}`"
    if flag.default in ("", ()):
        return ""
    return "<br>".join(f"`{word}`" for word in str(flag.default).split(","))


def pinned(tests: Path = ROOT / "tests") -> Mapping[int, list[str]]:
    """For each field problem the tests that carry its number, as ``folder/file.py::test``; sorted."""
    found: dict[int, set[str]] = defaultdict(set)
    for file in sorted(tests.rglob("test_*.py")):
        name = str(file.relative_to(tests))
        for number, test in _markers(ast.parse(file.read_text())):
            found[number].add(f"{name}::{test}" if test else name)
    return {number: sorted(names) for number, names in sorted(found.items())}


def _markers(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """The numbers, and the function or class that carries each; "" for a whole module."""
    for node in tree.body:
        name = node.name if isinstance(node, ast.FunctionDef | ast.ClassDef) else ""
        marks = node.decorator_list if isinstance(node, ast.FunctionDef | ast.ClassDef) else [node]
        for call in (call for mark in marks for call in ast.walk(mark) if isinstance(call, ast.Call)):
            if isinstance(call.func, ast.Attribute) and call.func.attr == "field_problem":
                for argument in call.args:
                    yield int(ast.literal_eval(argument)), name
        if isinstance(node, ast.ClassDef):
            for number, inner in _markers(ast.Module(node.body, [])):
                yield number, f"{name}::{inner}" if inner else name


def pinned_list() -> str:
    """One line for each field problem: its number and its tests."""
    lines = []
    for number, names in pinned().items():
        by_file: dict[str, list[str]] = defaultdict(list)
        for name in names:
            file, _, test = name.partition("::")
            by_file[file].append(test)
        shown = "; ".join(
            f"`{file}`" + (": " + ", ".join(f"`{test}`" for test in tests) if all(tests) else "")
            for file, tests in by_file.items()
        )
        lines.append(f'* <a name="tests-{number}"></a>**{number}** {shown}')
    return "\n".join(lines)


def documents() -> dict[Path, str]:
    """Each document that has such parts, as it should be."""
    configuration = CONFIGURATION.read_text()
    for group in ("store", "flannel", "own"):
        configuration = with_part(configuration, f"flags-{group}", flag_table(group))
    problems = with_part(FIELD_PROBLEMS.read_text(), "tests", pinned_list())
    return {CONFIGURATION: configuration, FIELD_PROBLEMS: problems}


if __name__ == "__main__":
    for path, text in documents().items():
        if path.read_text() != text:
            path.write_text(text)
            sys.stdout.write(f"wrote {path.relative_to(ROOT)}\n")
