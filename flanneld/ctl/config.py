"""``flannelctl config get|set|check``: the network configuration of a whole cluster."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flanneld.ctl.output import OK, Problem, note, put, put_json

if TYPE_CHECKING:
    from subnet_lease.lease import Lease
    from subnet_lease.network_config import NetworkConfig


EMPTY = "empty text is no configuration"
REMEDY = (
    """give a JSON object such as '{"Network": "10.5.0.0/16"}', the name of a file that holds one, or - for stdin"""
)


def register(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    from flanneld.ctl.access import add_connection

    parser = commands.add_parser("config", help="read, check and write the network configuration", allow_abbrev=False)
    verbs = parser.add_subparsers(dest="verb", metavar="get|set|check", required=True)

    get = verbs.add_parser("get", help="print the stored configuration", allow_abbrev=False)
    get.add_argument("--json", action="store_true", help="print it as it is understood, with every default filled in")
    add_connection(get)
    get.set_defaults(run=run_get)

    write = verbs.add_parser("set", help="check a configuration, then store it", allow_abbrev=False)
    write.add_argument("source", metavar="FILE|-|JSON", help="a file, - for standard input, or the JSON text itself")
    add_connection(write)
    write.set_defaults(run=run_set)

    check = verbs.add_parser("check", help="check a configuration without storing it", allow_abbrev=False)
    check.add_argument(
        "source", nargs="?", metavar="FILE|-|JSON", help="as for set; without it, the stored configuration is checked"
    )
    check.add_argument("--json", action="store_true", help="print it as it is understood, with every default filled in")
    add_connection(check)
    check.set_defaults(run=run_check)


def run_get(arguments: argparse.Namespace) -> int:
    from flanneld.ctl.access import open_access

    with open_access(arguments) as access:
        text, _ = access.config_text()
        if arguments.json:
            put_json(as_json(understood(text, access.config_name, etcd=access.allocates)))
        else:
            put(text.rstrip("\n"))
    return OK


def run_set(arguments: argparse.Namespace) -> int:
    from flanneld.ctl.access import open_access
    from subnet_lease.store import ConfigMissing

    text, name = read_source(arguments.source)
    config = understood(text, name)
    with open_access(arguments) as access:
        try:
            _, revision = access.config_text()
        except ConfigMissing:
            revision = 0
        _warn(config, access.leases())
        access.write_config(text, revision)
        put(f"stored in {access.config_name}: {summary(config)}")
    return OK


def run_check(arguments: argparse.Namespace) -> int:
    from flanneld.ctl.access import open_access, options_of

    leases: list[Lease] = []
    if arguments.source is not None:
        text, name = read_source(arguments.source)
        config = understood(text, name, etcd=not options_of(arguments).kube_subnet_mgr)
    else:
        with open_access(arguments) as access:
            text, _ = access.config_text()
            name, leases = access.config_name, access.leases()
            config = understood(text, name, etcd=access.allocates)
    _warn(config, leases)
    if arguments.json:
        put_json(as_json(config))
    else:
        put(f"{name}: good: {summary(config)}")
    return OK


def read_source(source: str) -> tuple[str, str]:
    """The text of a configuration and what to call it in messages."""
    if source.lstrip().startswith("{"):
        return source, "the given text"
    if source == "-":
        return sys.stdin.read(), "standard input"
    try:
        return Path(source).read_text(), source
    except (OSError, ValueError) as error:
        if not source.strip():
            raise Problem(EMPTY, REMEDY) from None
        if is_json(source):
            raise Problem(f"{source} is no configuration: that is a JSON object", REMEDY) from None
        reason = error.strerror if isinstance(error, OSError) else error
        raise Problem(f"cannot read {source}: {reason}", REMEDY) from None


def is_json(text: str) -> bool:
    from subnet_lease import go_json

    try:
        go_json.parse(text)
    except ValueError:
        return False
    return True


def understood(text: str, name: str, *, etcd: bool = True) -> NetworkConfig:
    """The configuration as every daemon will read it, its backend's options among it. Problem says what is wrong.

    With ``etcd``, the checks on subnet sizes and ranges are made, too; in Kubernetes subnets come from podCIDRs.
    """
    from backends.backend import BackendError
    from backends.registry import backend_class
    from subnet_lease.network_config import parse_network_config, validate_for_allocation
    from subnet_lease.store import ConfigInvalid

    if not text.strip():
        raise Problem(f"{name}: {EMPTY}", REMEDY)
    try:
        config = parse_network_config(text)
        config = validate_for_allocation(config) if etcd else config
        backend = backend_class(config.backend_type)(config.backend_options)
    except (ConfigInvalid, BackendError) as error:
        # What is wrong is often that a key is misspelt: Network "is missing" where there is a Netwrok.
        _warn_unread(_unread(text))
        raise Problem(f"{name}: {error}", "correct it and try again; nothing was changed") from None
    unknown = tuple(f"Backend.{key}" for key in getattr(backend, "unknown_options", ()))
    return dataclasses.replace(config, unknown_keys=(*config.unknown_keys, *unknown))


def _unread(text: str) -> list[str]:
    """The keys that nothing reads in a configuration with an error."""
    from backends.backend import BackendError
    from backends.registry import backend_class
    from subnet_lease import go_json
    from subnet_lease.network_config import parse_network_config
    from subnet_lease.store import ConfigInvalid

    found: list[str] = []
    with contextlib.suppress(ValueError):
        given = go_json.parse_object(text)
        for key in given:
            with contextlib.suppress(ConfigInvalid):  # it is read: that null is no value for it was noticed
                found += parse_network_config(json.dumps({key: None})).unknown_keys
        sections = [value for key, value in given.items() if go_json.fold_key(key) == "backend"]
        with contextlib.suppress(ConfigInvalid, BackendError, TypeError):
            config = parse_network_config(
                json.dumps({"Backend": {"Type": "vxlan", **sections[-1]}} if sections else {})
            )
            backend = backend_class(config.backend_type)(dict.fromkeys(config.backend_options))
            found += (f"Backend.{key}" for key in getattr(backend, "unknown_options", ()))
    return found


def _warn_unread(keys: Iterable[str]) -> None:
    for key in keys:
        note("warning", f"nothing reads the key {key}; is it misspelt?")


def _warn(config: NetworkConfig, leases: Iterable[Lease]) -> None:
    _warn_unread(config.unknown_keys)
    for text in contradictions(config, leases):
        note("warning", text)


def contradictions(config: NetworkConfig, leases: Iterable[Lease]) -> list[str]:
    """What existing leases say against a configuration, one sentence a kind, with up to three examples."""
    from subnet_lease.lease import FAMILIES

    outside: list[str] = []
    other_size: list[str] = []
    other_backend: list[str] = []
    for lease in leases:
        for family in FAMILIES:
            network, subnet = config.network_of(family), lease.subnet_of(family)
            if network is None or subnet is None:
                continue
            length = config.subnet_len if family == 4 else config.ipv6_subnet_len
            if subnet.version != network.version or not subnet.subnet_of(network):  # type: ignore[arg-type]
                outside.append(str(subnet))
            elif subnet.prefixlen != length:
                other_size.append(str(subnet))
        # udp and alloc write no BackendType (flannel's own habit), and neither does a reservation.
        kind = lease.attrs.backend_type
        if kind and kind != config.backend_type:
            other_backend.append(f"{lease.cidr} ({kind})")
    found = []
    if outside:
        found.append(
            f"{_some(outside)} lie outside the network: their nodes keep the old network and are not ready until each is"
            " drained and flanneld restarted there, which gives the lease up for one inside"
        )
    if other_size:
        found.append(f"{_some(other_size)} have another size than SubnetLen: they stay until their nodes give them up")
    if other_backend:
        found.append(
            f"{_some(other_backend)} use another backend than {config.backend_type}: nodes cannot reach each other"
            " until all have switched"
        )
    return found


def _some(names: list[str]) -> str:
    shown = ", ".join(names[:3])
    return f"{len(names)} lease(s) such as {shown}" if len(names) > 3 else f"lease(s) {shown}"


def summary(config: NetworkConfig) -> str:
    """One line: networks, subnet sizes, backend."""
    parts = []
    if config.network_of(4) is not None:
        parts.append(f"{config.network} in /{config.subnet_len} subnets")
    if config.network_of(6) is not None:
        parts.append(f"{config.ipv6_network} in /{config.ipv6_subnet_len} subnets")
    options = "".join(f", {key} {value}" for key, value in config.backend_options.items() if key.lower() != "psk")
    rules = ", nftables" if config.enable_nftables else ""
    return f"{' and '.join(parts)}, backend {config.backend_type}{options}{rules}"


def as_json(config: NetworkConfig) -> dict[str, Any]:
    """flannel's spelling, every default filled in, secrets as they are stored. Read again, it means the same."""
    value: dict[str, Any] = {
        "EnableIPv4": config.enable_ipv4,
        "EnableIPv6": config.enable_ipv6,
        "EnableNFTables": config.enable_nftables,
    }
    for family, word in ((4, ""), (6, "IPv6")):
        network = config.network_of(family)
        if network is None:
            continue
        value |= {f"{word}Network": str(network), f"{word}SubnetLen": config.subnet_len_of(family)}
        for key, end in zip(("SubnetMin", "SubnetMax"), config.subnet_range_of(family), strict=True):
            if end is not None:  # Kubernetes hands subnets out by itself
                value[f"{word}{key}"] = str(end.network_address)
    value["NonMasqueradeCIDRs"] = [str(network) for network in config.non_masquerade_cidrs]
    return value | {"Backend": {"Type": config.backend_type, **_all_options(config)}}


def _all_options(config: NetworkConfig) -> dict[str, Any]:
    """The backend's options with their defaults, where it keeps them in a model, and what nothing reads."""
    from pydantic import BaseModel

    from backends.registry import backend_class

    given = config.backend_options
    backend = backend_class(config.backend_type)(given)
    options = getattr(backend, "options", None)
    if not isinstance(options, BaseModel):
        return given
    return options.model_dump(mode="json", by_alias=True) | {key: given[key] for key in backend.unknown_options}
