"""A command line that is wrong is told so in two lines: argparse would put the whole usage before the one that counts."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NoReturn


class Parser(argparse.ArgumentParser):
    """argparse's parser; the parsers of its subcommands are of this class, too."""

    def parse_args(self, args: Iterable[str] | None = None, namespace: Any = None) -> Any:
        """As argparse, with the flags that were most likely meant."""
        words = sys.argv[1:] if args is None else list(args)
        found, rest = self.parse_known_args(words, namespace)
        if rest:
            _named(self, words).error(
                f"unrecognized arguments: {' '.join(rest)}{_meant(rest, list(_flags(self, words)))}"
            )
        return found

    def error(self, message: str) -> NoReturn:
        if wrong := re.search(r"invalid choice: '(.*?)' \(choose from (.*)\)$", message):
            choices = [choice.strip("' ") for choice in wrong[2].split(",")]
            message = f"{wrong[1]!r} is none of {', '.join(choices)}{_meant([wrong[1]], choices, prefix='')}"
        self.exit(2, f"{self.prog}: error: {message}\nsee {self.prog} --help\n")


def _named(parser: argparse.ArgumentParser, words: Sequence[str]) -> argparse.ArgumentParser:
    """The parser of the command that the command line names: its --help is the one to read."""
    for word in words:
        commands = next((a for a in parser._actions if isinstance(a, argparse._SubParsersAction)), None)
        if commands is not None and word in commands.choices:
            parser = commands.choices[word]
    return parser


def _flags(parser: argparse.ArgumentParser, words: Sequence[str]) -> Iterator[str]:
    """The flags of this parser and of the commands that the command line names."""
    for action in parser._actions:  # argparse tells nobody its flags
        yield from action.option_strings
        if isinstance(action, argparse._SubParsersAction):
            for name in action.choices.keys() & set(words):
                yield from _flags(action.choices[name], words)


def _meant(unknown: Sequence[str], known: Sequence[str], prefix: str = "--") -> str:
    """ "; did you mean …?" for words with this prefix that are nearly known ones; "" where none is near."""
    from difflib import get_close_matches

    near: list[str] = []
    for word in unknown:
        if word.startswith(prefix):
            near += get_close_matches(word.partition("=")[0], known, 1, 0.8 if prefix else 0.6)
    return f"; did you mean {' '.join(dict.fromkeys(near))}?" if near else ""
