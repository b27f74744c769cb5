"""``flannelctl docker-opts``: what flannel's mk-docker-opts.sh writes, with its options, for dockerd's command line."""

from __future__ import annotations

import argparse
import os
import shlex
import subprocess
from collections.abc import Mapping
from pathlib import Path

from cni.conflist import write_conflist as write_if_changed
from flanneld.ctl.output import FAILED, OK, Problem, note, put

DEFAULT_OUTPUT = "/run/docker_opts.env"
DEFAULT_KEY = "DOCKER_OPTS"
_PREFIX = "DOCKER_OPT_"


def register(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    from flanneld.options import DEFAULT_SUBNET_FILE

    parser = commands.add_parser(
        "docker-opts",
        help="write dockerd's options (--bip, --mtu, --ip-masq) for this node's subnet",
        description="Write dockerd's options for this node's subnet as an environment file, as flannel's "
        "mk-docker-opts.sh does. Without -i and -c both forms are written. The file is replaced only if it changes.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    subnet_file = os.environ.get("FLANNELD_SUBNET_FILE") or DEFAULT_SUBNET_FILE
    add(
        "-f", "--subnet-file", default=subnet_file, metavar="FILE", help="flanneld's subnet file (default: %(default)s)"
    )
    add("-d", "--output", default=DEFAULT_OUTPUT, metavar="FILE", help="the file to write (default: %(default)s)")
    add("-i", "--individual", action="store_true", help="one variable for each option: DOCKER_OPT_MTU=...")
    add("-c", "--combined", action="store_true", help="one variable for all: DOCKER_OPTS=...")
    add("-m", "--no-ip-masq", action="store_true", help="leave --ip-masq out (for a dockerd that lacks it)")
    add("-k", "--combined-key", default=DEFAULT_KEY, metavar="KEY", help="name of the combined variable (%(default)s)")
    add(
        "--on-change",
        metavar="COMMAND",
        help="run this (split as a shell would, without a shell) if the file existed and its content changed, "
        "e.g. 'systemctl --no-block try-restart docker.service'",
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    if not arguments.combined_key.isidentifier():
        raise Problem(f"-k {arguments.combined_key!r}: must be the name of a variable")
    values = read_shell_variables(Path(arguments.subnet_file))
    individual, combined = arguments.individual, arguments.combined
    if not individual and not combined:
        individual = combined = True
    text = render(
        docker_options(values, ip_masq=not arguments.no_ip_masq),
        individual=individual,
        combined_key=arguments.combined_key if combined else "",
        before=os.environ.get(arguments.combined_key, ""),
    )
    output = Path(arguments.output)
    existed = output.exists()
    try:
        changed = write_if_changed(output, text)
    except OSError as error:
        raise Problem(f"cannot write {output}: {error.strerror}", "run it with sudo, or choose another -d") from None
    put(f"{output}: {'written' if changed else 'unchanged'}")
    if changed and existed and arguments.on_change:
        return _tell(arguments.on_change)
    return OK


def _tell(command: str) -> int:
    try:
        done = subprocess.run(shlex.split(command), check=False)
    except (OSError, ValueError) as error:
        reason = f"cannot run it: {error.strerror}" if isinstance(error, OSError) else error
        raise Problem(f"--on-change {command!r}: {reason}", "give a program and its arguments") from None
    if done.returncode != 0:
        raise Problem(f"--on-change {command!r}: exit {done.returncode}", code=FAILED)
    return OK


def read_shell_variables(path: Path) -> dict[str, str]:
    """The FLANNEL_* variables of subnet.env. Where there is no file: none, as mk-docker-opts.sh has it."""
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except FileNotFoundError:
        note("warning", f"{path} does not exist: no subnet in it; start flanneld first")
        return {}
    except OSError as error:
        remedy = "run it with sudo" if isinstance(error, PermissionError) else ""
        raise Problem(f"cannot read {path}: {error.strerror}", remedy) from None
    found = {}
    for line in lines:
        key, equals, value = line.strip().removeprefix("export ").partition("=")
        if equals and key.startswith("FLANNEL_"):
            found[key] = value.strip().strip("\"'")
    return found


def docker_options(values: Mapping[str, str], *, ip_masq: bool = True) -> dict[str, str]:
    """The DOCKER_OPT_* variables. Docker masquerades exactly where flanneld does not."""
    options = {key: value for key, value in os.environ.items() if key.startswith(_PREFIX)}
    if subnet := values.get("FLANNEL_SUBNET"):
        options["DOCKER_OPT_BIP"] = f"--bip={subnet}"
    if mtu := values.get("FLANNEL_MTU"):
        options["DOCKER_OPT_MTU"] = f"--mtu={mtu}"
    masquerades = values.get("FLANNEL_IPMASQ")
    if masquerades and ip_masq:
        if masquerades not in ("true", "false"):
            raise Problem(f"Invalid value of FLANNEL_IPMASQ: {masquerades}", "it must be true or false")
        options["DOCKER_OPT_IPMASQ"] = f"--ip-masq={'false' if masquerades == 'true' else 'true'}"
    return options


def render(options: Mapping[str, str], *, individual: bool, combined_key: str, before: str = "") -> str:
    """The file, byte for byte as mk-docker-opts.sh writes it: sorted, and blanks around the combined options."""
    names = sorted(options)
    lines = [f'{name}="{options[name]}"' for name in names] if individual else []
    if combined_key:
        lines.append(f'{combined_key}="{before} ' + "".join(f"{options[name]} " for name in names) + '"')
    return "".join(f"{line}\n" for line in lines)
