"""The command line of flannelctl. Exit codes: 0 done, 1 failed, 2 wrong usage."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import os
import sys
from collections.abc import Sequence
from typing import Final

from flanneld.ctl.output import FAILED, USAGE, Problem, put, show_problem
from flanneld.usage import Parser

COMMANDS: Final = (
    "config",
    "leases",
    "reserve",
    "release",
    "status",
    "doctor",
    "cleanup",
    "docker_opts",
    "cni_conf",
    "demo",
    "help",
)
"""Modules of this package, in the order of --help. Each has ``register(commands)``, which sets ``run``."""


def build_parser() -> argparse.ArgumentParser:
    """The whole command line."""
    from flanneld.ctl.access import add_connection

    parser = Parser(
        prog="flannelctl",
        description="Look at and steer a flannel network: its configuration, its leases, and this node.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="print the version and exit")
    add_connection(parser, one_dash=False)  # before the command they mean the same as after it
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name in COMMANDS:
        if importlib.util.find_spec(f"flanneld.ctl.{name}"):
            importlib.import_module(f"flanneld.ctl.{name}").register(commands)
    parser.set_defaults(parser=parser)  # for help
    return parser


class _Version(argparse.Action):
    """As flanneld --version; looked up only if somebody asks."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        from importlib.metadata import version

        put(f"{parser.prog} {version('flanneld')}")
        parser.exit()


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; its exit code."""
    parser = build_parser()
    if not (sys.argv[1:] if argv is None else argv):
        parser.print_help(sys.stderr)
        return USAGE
    arguments = parser.parse_args(argv)
    # Only a process of our own may change how the whole process logs.
    arguments.own_process = argv is None
    try:
        code: int = arguments.run(arguments)
        sys.stdout.flush()
        return code
    except Problem as problem:
        show_problem(problem)
        return problem.code
    except BrokenPipeError:
        # The reader (head, less) has gone; Python must not complain about it again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    except KeyboardInterrupt:
        return 128 + 2
    except Exception as error:
        known = _explain(error)
        if known is None:
            raise
        show_problem(known)
        return known.code


def _explain(error: Exception) -> Problem | None:
    """Errors of the rooms below, whose text already names the thing and the remedy; None for our own mistakes."""
    from flanneld.options import UsageError
    from subnet_lease.store import StoreError

    if isinstance(error, UsageError):
        return Problem(str(error), "see flannelctl COMMAND --help", USAGE)
    if isinstance(error, StoreError):
        return Problem(str(error))
    return None


if __name__ == "__main__":
    sys.exit(main())
