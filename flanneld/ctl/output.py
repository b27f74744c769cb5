"""How flannelctl speaks: tables and colour for people, JSON for programs, one sentence with a remedy for errors."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterable, Sequence
from typing import IO, TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

OK, FAILED, USAGE = 0, 1, 2
UNBOUNDED = 1_000_000
"""Columns of what is no terminal: more than any line has."""


class Problem(Exception):
    """What went wrong, and what to do next. Ends the command with ``code``."""

    def __init__(self, text: str, remedy: str = "", code: int = FAILED) -> None:
        super().__init__(text)
        self.text = text
        self.remedy = remedy
        self.code = code


def console(*, stderr: bool = False) -> Console:
    """A console that uses colour only on a terminal, and elsewhere never breaks or crops a line."""
    from rich.console import Console

    stream = sys.stderr if stderr else sys.stdout
    if stream.isatty():
        return Console(file=stream, highlight=False, emoji=False)
    plain = cast("IO[str]", Trimmed(stream))
    return Console(file=plain, highlight=False, emoji=False, width=UNBOUNDED, no_color=True, soft_wrap=True)


class Trimmed:
    """A stream without the spaces with which rich fills up lines."""

    def __init__(self, stream: IO[str]) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        return self._stream.write(re.sub(r" +$", "", text, flags=re.MULTILINE) if "\n" in text else text)

    def flush(self) -> None:
        self._stream.flush()


def table(columns: Sequence[str], rows: Iterable[Sequence[str]], title: str | None = None) -> Table:
    """A table without lines, as ip(8) and kubectl print theirs; cells are taken literally.

    On a terminal that is too narrow the widest column folds first, and nothing is cut off.
    """
    from rich.table import Table
    from rich.text import Text

    made = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold", title=title, title_justify="left")
    for column in columns:
        made.add_column(column, overflow="fold")
    for row in rows:
        made.add_row(*(Text(cell) for cell in row))
    return made


def put(text: str = "") -> None:
    """A line on standard output, as it is."""
    sys.stdout.write(text + "\n")


def put_json(value: Any) -> None:
    put(json.dumps(value, indent=2, ensure_ascii=False))


def note(kind: str, text: str) -> None:
    """A line on standard error: a warning, or what is being done."""
    where = console(stderr=True)
    where.print(f"[yellow]{kind}:[/yellow] ", end="")
    where.print(text, markup=False)


def show_problem(problem: Problem) -> None:
    where = console(stderr=True)
    where.print("[bold red]error:[/bold red] ", end="")
    where.print(problem.text, markup=False)
    if problem.remedy:
        where.print("[bold]next:[/bold]  ", end="")
        where.print(problem.remedy, markup=False)


def duration(seconds: float) -> str:
    """23h 41m, 12m 5s, 40s."""
    whole = int(seconds)
    hours, minutes = whole // 3600, whole % 3600 // 60
    if hours:
        return f"{hours}h {minutes}m"
    return f"{minutes}m {whole % 60}s" if minutes else f"{whole}s"
