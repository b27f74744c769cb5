"""Flags and environment, with flannel's names, and a few of our own.

One table (``FLAGS``) is the source of the command line, of the FLANNELD_* variables and of the table in
docs/configuration.md (a test compares them). Go's spelling is understood: ``-x`` and ``--x``, ``--x=v`` and ``--x v``,
booleans bare or with a value.
"""

from __future__ import annotations

import argparse
import difflib
import ipaddress
import os
import re
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from ipaddress import IPv4Address, IPv6Address
from pathlib import Path
from typing import Any, Literal

from flanneld.go_regex import compile_go
from flanneld.usage import Parser

DEFAULT_PREFIX = "/coreos.com/network"
DEFAULT_SUBNET_FILE = "/run/flannel/subnet.env"


class UsageError(Exception):
    """The command line cannot be used; exit code 2."""


@dataclass(frozen=True, slots=True)
class Flag:
    """One flag. ``group`` is "store" for what flannelctl shares, "flannel" or "own"."""

    name: str
    kind: Literal["text", "bool", "int", "list", "ignored"]
    default: Any
    help: str
    group: Literal["store", "flannel", "own"] = "flannel"

    @property
    def attribute(self) -> str:
        return self.name.replace("-", "_")

    @property
    def shown(self) -> str:
        """The help with the default."""
        return self.help + ("" if self.default in ("", (), False) else f" (default: {str(self.default).lower()})")

    @property
    def variable(self) -> str:
        return "FLANNELD_" + self.name.upper().replace("-", "_").replace(".", "_")


FLAGS: tuple[Flag, ...] = (
    Flag(
        "etcd-endpoints",
        "text",
        "http://127.0.0.1:4001,http://127.0.0.1:2379",
        "comma-separated etcd endpoints; the next is tried when one fails",
        "store",
    ),
    Flag("etcd-prefix", "text", DEFAULT_PREFIX, "etcd prefix of this network", "store"),
    Flag("etcd-keyfile", "text", "", "client key for etcd (PEM file)", "store"),
    Flag("etcd-certfile", "text", "", "client certificate for etcd (PEM file)", "store"),
    Flag("etcd-cafile", "text", "", "certificate authority that signed etcd's certificate (PEM file)", "store"),
    Flag("etcd-username", "text", "", "etcd user", "store"),
    Flag("etcd-password", "text", "", "etcd password; never logged", "store"),
    Flag("kube-subnet-mgr", "bool", False, "take leases from the Kubernetes API instead of etcd", "store"),
    Flag("kube-api-url", "text", "", "Kubernetes API server; default: in-cluster or the kubeconfig's", "store"),
    Flag("kubeconfig-file", "text", "", "kubeconfig with credentials; default: in-cluster", "store"),
    Flag("kube-annotation-prefix", "text", "flannel.alpha.coreos.com", "prefix of the node annotations", "store"),
    Flag(
        "net-config-path",
        "text",
        "/etc/kube-flannel/net-conf.json",
        "network configuration file (with --kube-subnet-mgr)",
        "store",
    ),
    Flag("iface", "list", (), "interface, by name or address, for traffic between hosts; repeatable, first match wins"),
    Flag("iface-regex", "list", (), "regular expression for the interface's address or name; repeatable, in order"),
    Flag("iface-can-reach", "text", "", "use the interface from which this address is reached"),
    Flag("subnet-file", "text", DEFAULT_SUBNET_FILE, "where the subnet and MTU are written for CNI and Docker"),
    Flag("public-ip", "text", "", "IPv4 address that other hosts send to, if not the interface's own (NAT)"),
    Flag("public-ipv6", "text", "", "IPv6 address that other hosts send to, if not the interface's own"),
    Flag(
        "subnet-lease-renew-margin",
        "int",
        60,
        "minutes before a lease's end by which it must be renewed (1 to 1439)",
        "store",
    ),
    Flag("ip-masq", "bool", False, "masquerade traffic that leaves the pod network"),
    Flag("ip-masq-fully-random-disable", "bool", False, "masquerade without fully random source ports"),
    Flag("ip-blackhole-route", "bool", False, "add a blackhole route for this node's own subnet"),
    Flag("iptables-resync", "int", 5, "seconds between looks at the firewall rules"),
    Flag("iptables-forward-rules", "bool", True, "accept forwarded traffic of the pod network"),
    Flag("healthz-ip", "text", "0.0.0.0", "address for /healthz, /readyz, /metrics and /status"),
    Flag("healthz-port", "int", 0, "port for /healthz, /readyz, /metrics and /status; 0: off"),
    Flag("set-node-network-unavailable", "bool", True, "report NetworkUnavailable to Kubernetes"),
    Flag("version", "bool", False, "print the version and exit"),
    Flag("v", "int", 0, "log level, 0 to 10 as in flannel; 2 and above log every change to the kernel"),
    Flag("vmodule", "ignored", "", "accepted for flannel's sake, without effect"),
    Flag("log_backtrace_at", "ignored", "", "accepted for flannel's sake, without effect"),
    Flag("node-name", "text", "", "this node's name; default: NODE_NAME, else the hostname", "store"),
    Flag("log-format", "text", "auto", "auto (readable on a terminal, else JSON), console or json", "own"),
    Flag("resync", "int", 300, "seconds between full looks at the kernel, beneath the event-driven repair", "own"),
    Flag(
        "wireguard-key-file",
        "text",
        "",
        "WireGuard private key; default: WIREGUARD_KEY_FILE, else /run/flannel/wgkey",
        "own",
    ),
    Flag("cni-conf", "text", "", "write a CNI conflist for the bridge plugin here, so that no shim is needed", "own"),
    Flag(
        "network-policy-notice",
        "bool",
        False,
        "announce NetworkPolicies that nothing enforces (Kubernetes only)",
        "own",
    ),
)


@dataclass(frozen=True, slots=True)
class Options:
    """The flags' values, by flag name with underscores; checked."""

    etcd_endpoints: str
    etcd_prefix: str
    etcd_keyfile: str
    etcd_certfile: str
    etcd_cafile: str
    etcd_username: str
    etcd_password: str
    kube_subnet_mgr: bool
    kube_api_url: str
    kubeconfig_file: str
    kube_annotation_prefix: str
    net_config_path: str
    iface: tuple[str, ...]
    iface_regex: tuple[str, ...]
    iface_can_reach: str
    subnet_file: str
    public_ip: str
    public_ipv6: str
    subnet_lease_renew_margin: int
    ip_masq: bool
    ip_masq_fully_random_disable: bool
    ip_blackhole_route: bool
    iptables_resync: int
    iptables_forward_rules: bool
    healthz_ip: str
    healthz_port: int
    set_node_network_unavailable: bool
    version: bool
    v: int
    vmodule: str
    log_backtrace_at: str
    node_name: str
    log_format: str
    resync: int
    wireguard_key_file: str
    cni_conf: str
    network_policy_notice: bool

    @property
    def instance(self) -> str:
        """The name that keeps a second daemon's rules apart; "" for the one with the default subnet file."""
        if self.subnet_file == DEFAULT_SUBNET_FILE:
            return ""
        path = Path(self.subnet_file)
        word = path.parent.name if path.name == "subnet.env" else path.stem
        return "" if word == "flannel" else re.sub(r"[^A-Za-z0-9]+", "", word)[:12]

    def redacted(self) -> dict[str, Any]:
        """For the log: what differs from the defaults, never a password."""
        shown = {f.attribute: getattr(self, f.attribute) for f in FLAGS}
        if shown["etcd_password"]:
            shown["etcd_password"] = "(hidden)"
        for name in ("etcd_endpoints", "kube_api_url"):
            shown[name] = _without_password(shown[name])
        return {f.attribute: shown[f.attribute] for f in FLAGS if shown[f.attribute] != f.default}


def _without_password(urls: str) -> str:
    """All between the first scheme and the last "@" is hidden: a password may hold a slash, a comma or an "@"."""
    hidden, at, shown = urls.rpartition("@")
    scheme = re.match(r"\w+://", hidden)
    return f"{scheme[0] if scheme else ''}(hidden)@{shown}" if at else urls


def go_bool(text: str) -> bool:
    """What Go's strconv.ParseBool takes."""
    if text in {"1", "t", "T", "true", "TRUE", "True"}:
        return True
    if text in {"0", "f", "F", "false", "FALSE", "False"}:
        return False
    raise argparse.ArgumentTypeError(f"{text!r} is not a boolean; write true or false")


def whole_number(text: str) -> int:
    """A decimal integer, or a Go duration in whole seconds such as 5s (for --iptables-resync)."""
    match = re.fullmatch(r"([+-]?\d+)s?", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number")
    return int(match.group(1))


_TYPES: dict[str, Callable[[str], Any]] = {"text": str, "bool": go_bool, "int": whole_number, "ignored": str}


def add_arguments(
    parser: argparse.ArgumentParser,
    groups: Sequence[str] = ("store", "flannel", "own"),
    *,
    hidden: bool = False,
    one_dash: bool = True,
) -> None:
    """Add the flags of these groups, in both of Go's spellings.

    ``hidden``: --help does not show them, and what is not given leaves no trace in the namespace. Without ``one_dash``,
    in one spelling: argparse would take a subcommand's -k for the beginning of -kube-api-url.
    """
    for flag in FLAGS:
        if flag.group not in groups:
            continue
        names = [f"--{flag.name}", *([f"-{flag.name}"] if one_dash else [])]
        if flag.name == "v":
            names = ["-v", "--v"]
        common: dict[str, Any] = {"dest": flag.attribute, "default": None, "help": flag.shown.replace("%", "%%")}
        if hidden:
            common |= {"default": argparse.SUPPRESS, "help": argparse.SUPPRESS}
        if flag.kind == "bool":
            parser.add_argument(*names, nargs="?", const=True, type=go_bool, metavar="BOOL", **common)
        elif flag.kind == "list":
            parser.add_argument(*names, action="append", metavar="X", **common)
        else:
            metavar = "N" if flag.kind == "int" else "X"
            parser.add_argument(*names, type=_TYPES[flag.kind], metavar=metavar, **common)


def add_store_arguments(parser: argparse.ArgumentParser, *, one_dash: bool = True) -> None:
    """Add what is needed to reach the store; for flannelctl, whose --help has other things to say."""
    add_arguments(parser, ("store",), hidden=True, one_dash=one_dash)


def from_namespace(
    found: argparse.Namespace, environment: Mapping[str, str] | None = None
) -> tuple[Options, tuple[str, ...]]:
    """Options from parsed flags, then the environment, then defaults; and warnings about unusable variables.

    A variable counts only if its flag was not given and its value is not empty; a bad one is a warning, not an error,
    as in flannel (pkg/flagutil/env.go).
    """
    env = os.environ if environment is None else environment
    values: dict[str, Any] = {}
    warnings: list[str] = []
    for flag in FLAGS:
        given = getattr(found, flag.attribute, None)
        if given is not None:
            # An empty item stems from an empty variable in a manifest; flannel takes it for none, too.
            values[flag.attribute] = tuple(filter(None, given)) if flag.kind == "list" else given
            continue
        values[flag.attribute] = flag.default
        text = env.get(flag.variable, "")
        if text:
            try:
                values[flag.attribute] = (text,) if flag.kind == "list" else _TYPES[flag.kind](text)
            except argparse.ArgumentTypeError as error:
                warnings.append(f"{flag.variable}: {error}; using the default {flag.default!r}")
    values["node_name"] = values["node_name"] or env.get("NODE_NAME", "")
    if not values["node_name"] and not values["kube_subnet_mgr"]:
        values["node_name"] = socket.gethostname()
    values["wireguard_key_file"] = values["wireguard_key_file"] or env.get("WIREGUARD_KEY_FILE", "")
    depth = env.get("EVENT_QUEUE_DEPTH", "")
    if depth and not depth.isdecimal():
        raise UsageError(f"EVENT_QUEUE_DEPTH={depth!r} is not a whole number; unset it (it has no effect here)")
    options = Options(**{f.name: values[f.name] for f in fields(Options)})
    _check(options)
    return options, tuple(warnings)


def parse(argv: Sequence[str], environment: Mapping[str, str] | None = None) -> tuple[Options, tuple[str, ...]]:
    """Parse flanneld's command line. Exits with 2 on an unknown flag, as argparse does."""
    parser = Parser(
        prog="flanneld",
        description="Give this host a subnet and reach the containers of all others.",
        allow_abbrev=False,
    )
    add_arguments(parser)
    try:
        options, warnings = from_namespace(parser.parse_args(argv), environment)
    except UsageError as error:
        parser.error(str(error))
    return options, (*warnings, *without_effect(options, os.environ if environment is None else environment))


def without_effect(options: Options, environment: Mapping[str, str]) -> Iterator[str]:
    """What somebody wrote and nothing reads: misspelt variables, TLS files for endpoints without TLS."""
    known = {flag.variable for flag in FLAGS}
    for name in sorted(environment):
        # Kubernetes gives every pod FLANNELD_SERVICE_HOST, FLANNELD_PORT … where a Service is called so.
        if name in known or not name.startswith("FLANNELD_") or name.startswith(("FLANNELD_SERVICE_", "FLANNELD_PORT")):
            continue
        close = difflib.get_close_matches(name, known, 1)
        yield f"{name} is no variable that flanneld reads" + (f"; did you mean {close[0]}?" if close else "")
    files = {"keyfile": options.etcd_keyfile, "certfile": options.etcd_certfile, "cafile": options.etcd_cafile}
    given = [f"--etcd-{name}" for name, value in files.items() if value]
    if given and not options.kube_subnet_mgr and "https://" not in options.etcd_endpoints:
        yield f"{' and '.join(given)} have no effect: no endpoint of --etcd-endpoints begins with https://"


def _check(options: Options) -> None:
    if "@" in options.etcd_endpoints and not options.kube_subnet_mgr:
        # Before anybody splits it at the commas: one of them may stand in a password.
        raise UsageError(
            f"--etcd-endpoints={_without_password(options.etcd_endpoints)}: name and password do not belong into it;"
            " use --etcd-username and --etcd-password"
        )
    if not Path(options.subnet_file).name or options.subnet_file.endswith("/") or os.path.isdir(options.subnet_file):  # noqa: PTH112 - Path's raises where we may not look
        raise UsageError(f"--subnet-file={options.subnet_file}: must name a file, such as {DEFAULT_SUBNET_FILE}")
    if not 1 <= options.subnet_lease_renew_margin <= 1439:
        raise UsageError(
            f"--subnet-lease-renew-margin={options.subnet_lease_renew_margin}: must be 1 to 1439 minutes"
            " (a lease lasts 24 hours)"
        )
    if options.iptables_resync < 1:
        raise UsageError(f"--iptables-resync={options.iptables_resync}: must be at least 1 second")
    if options.resync < 1:
        raise UsageError(f"--resync={options.resync}: must be at least 1 second")
    if options.healthz_ip not in {"", "localhost"}:
        try:
            ipaddress.ip_address(options.healthz_ip)
        except ValueError:
            raise UsageError(f"--healthz-ip={options.healthz_ip}: not an IP address") from None
    if not 0 <= options.healthz_port <= 65535:
        raise UsageError(f"--healthz-port={options.healthz_port}: not a port")
    if options.log_format not in {"auto", "console", "json"}:
        raise UsageError(f"--log-format={options.log_format}: must be auto, console or json")
    _check_address("--public-ip", options.public_ip, IPv4Address)
    _check_address("--public-ipv6", options.public_ipv6, IPv6Address)
    if options.iface_can_reach:
        try:
            ipaddress.ip_address(options.iface_can_reach)
        except ValueError:
            raise UsageError(f"--iface-can-reach={options.iface_can_reach}: not an IP address") from None
    for pattern in options.iface_regex:
        try:
            compile_go(pattern)
        except ValueError as error:
            raise UsageError(f"--iface-regex={pattern}: {error}") from None


def _check_address(flag: str, text: str, kind: type[IPv4Address] | type[IPv6Address]) -> None:
    if text:
        try:
            kind(text)
        except ValueError:
            raise UsageError(f"{flag}={text}: not an {kind.__name__[:4]} address") from None
