"""``flannelctl help``: of the whole, of one command, or of what all commands share."""

from __future__ import annotations

import argparse

from flanneld.ctl.output import OK, USAGE, Problem, put

STORE = "store"


def register(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "help",
        help="explain a command, or the flags that say where the network is kept (help store)",
        description="The help of a command, as COMMAND --help; the flags and variables that say where the network is kept.",
        allow_abbrev=False,
    )
    parser.add_argument("topic", nargs="*", metavar="COMMAND|store", help="default: the list of commands")
    parser.set_defaults(run=run, commands=commands)


def run(arguments: argparse.Namespace) -> int:
    if arguments.topic == [STORE]:
        put(store_help())
        return OK
    found, commands = arguments.parser, arguments.commands
    for word in arguments.topic:
        if commands is None or word not in commands.choices:
            topics = ", ".join((*arguments.commands.choices, STORE))
            raise Problem(f"there is no help for {' '.join(arguments.topic)}", f"choose one of: {topics}", USAGE)
        found = commands.choices[word]
        commands = next((a for a in found._actions if isinstance(a, argparse._SubParsersAction)), None)
    put(found.format_help().rstrip("\n"))
    return OK


def store_help() -> str:
    """The store's flags, for people: in one of the two spellings."""
    from flanneld.options import FLAGS

    parser = argparse.ArgumentParser(
        usage="flannelctl COMMAND [where the network is kept]",
        description="The same flags as flanneld's, before or after the command. Each can be a variable instead: "
        "--etcd-endpoints is FLANNELD_ETCD_ENDPOINTS; where both are given, the flag counts.",
        add_help=False,
    )
    group = parser.add_argument_group("where the network is kept")
    for flag in FLAGS:
        if flag.group == STORE:
            metavar = {"int": "N", "bool": "[BOOL]"}.get(flag.kind, "X")
            group.add_argument(f"--{flag.name}", metavar=metavar, help=flag.shown.replace("%", "%%"))
    return parser.format_help().rstrip("\n")
