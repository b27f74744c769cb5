"""A command line that is wrong is told so in two lines: argparse would put the whole usage before the one that counts."""

from __future__ import annotations

import argparse
from typing import NoReturn


class Parser(argparse.ArgumentParser):
    """argparse's parser; the parsers of its subcommands are of this class, too."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\nsee {self.prog} --help\n")
