"""How flannelctl reaches the network's store: with flanneld's own flags and environment."""

from __future__ import annotations

import argparse
import dataclasses
import os
import queue
import sys
import threading
from collections.abc import Iterator, MutableMapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, Self

from flanneld.ctl.output import Problem, note

if TYPE_CHECKING:
    from flanneld.options import Options
    from subnet_lease.etcd_admin import Stray
    from subnet_lease.lease import Lease, LeaseSnapshot
    from subnet_lease.store import LeaseStore

STORE_HELP = (
    "--etcd-endpoints, --kube-subnet-mgr and others, the same flags and FLANNELD_* variables as flanneld's; "
    "all of them: flannelctl help store"
)
KUBE_WAIT = 10.0
"""Seconds in which the Kubernetes API must show the nodes."""


class Access(Protocol):
    """What the commands need. ``subnet_lease.etcd_admin.EtcdAdmin`` says what each does and raises.

    ``allocates``: subnets are handed out from the configuration, and not by Kubernetes.
    """

    allocates: bool

    @property
    def config_name(self) -> str: ...
    @property
    def leases_name(self) -> str: ...
    def config_text(self) -> tuple[str, int]: ...
    def write_config(self, text: str, revision: int, /) -> None: ...
    def leases(self) -> list[Lease]: ...
    def leases_and_strays(self) -> tuple[list[Lease], list[Stray]]: ...
    def ttl(self, lease: Lease, /) -> float | None: ...
    def lives(self, lease: Lease, /) -> bool: ...
    def watch(self) -> Iterator[LeaseSnapshot]: ...
    def reserve(self, lease: Lease, /) -> None: ...
    def remove(self, lease: Lease, /) -> None: ...
    def __enter__(self) -> Self: ...
    def __exit__(self, *_: object) -> None: ...


def add_connection(parser: argparse.ArgumentParser, *, one_dash: bool = True) -> None:
    """The flags that say where the store is; flanneld's, and its environment counts, too. ``help store`` shows them."""
    from flanneld.options import add_store_arguments

    parser.add_argument_group("where the network is kept", STORE_HELP)
    add_store_arguments(parser, one_dash=one_dash)


def options_of(arguments: argparse.Namespace) -> Options:
    """The flags, the environment and the defaults; says which variables are unusable, and which nobody reads."""
    from flanneld.options import from_namespace, without_effect

    options, warnings = from_namespace(arguments)
    for text in (*warnings, *without_effect(options, os.environ)):
        note("warning", text)
    return options


def open_access(arguments: argparse.Namespace) -> Access:
    """The store that the flags name; it connects when it is first asked."""
    options = options_of(arguments)
    if getattr(arguments, "own_process", False):
        _log_to_stderr()
    if options.kube_subnet_mgr:
        return KubeAccess(options)
    from subnet_lease.etcd_admin import EtcdAdmin
    from subnet_lease.etcd_connection import CALL_TIMEOUT, EtcdConnection

    connection = EtcdConnection(
        options.etcd_endpoints.split(","),
        keyfile=options.etcd_keyfile,
        certfile=options.etcd_certfile,
        cafile=options.etcd_cafile,
        username=options.etcd_username,
        password=options.etcd_password,
        scope=options.etcd_prefix,
        connect_timeout=CALL_TIMEOUT,  # a command asks once
    )
    return EtcdAdmin(connection, options.etcd_prefix)


def _log_to_stderr() -> None:
    """What the stores log must never mix with what a command prints."""
    import structlog

    def render(_logger: object, level: str, event: MutableMapping[str, Any]) -> str:
        level = "note" if level in ("debug", "info") else level
        details = "; ".join(f"{key} {value}" for key, value in event.items() if key not in ("event", "error"))
        return f"{level}: {event['event']}{': ' if 'error' in event else ''}{event.get('error', '')}" + (
            f" ({details})" if details else ""
        )

    structlog.configure(processors=[render], logger_factory=structlog.PrintLoggerFactory(sys.stderr))


class KubeAccess:
    """Kubernetes: the configuration is a file (a ConfigMap), and a lease is a node's podCIDR with its annotations."""

    allocates = False
    leases_name = "the cluster's nodes"

    def __init__(self, options: Options) -> None:
        self._options = options
        self.config_name = options.net_config_path
        self._store: LeaseStore | None = None

    def config_text(self) -> tuple[str, int]:
        try:
            return Path(self.config_name).read_text(), 0
        except OSError as error:
            raise Problem(
                f"cannot read {self.config_name}: {error.strerror}",
                "name the file with --net-config-path; in the cluster it is net-conf.json in the ConfigMap"
                " kube-flannel-cfg",
            ) from None

    def leases(self) -> list[Lease]:
        return [lease for _, lease in sorted(self._first().leases.items())]

    def leases_and_strays(self) -> tuple[list[Lease], list[Stray]]:
        return self.leases(), []

    def ttl(self, _lease: Lease, /) -> float | None:
        return None

    def lives(self, _lease: Lease, /) -> bool:
        raise _not_here()

    def watch(self) -> Iterator[LeaseSnapshot]:
        from flanneld.open_store import open_store

        # A node's daemon must know which node it is; whoever only looks need not be one.
        self._store = open_store(dataclasses.replace(self._options, node_name=self._options.node_name or "flannelctl"))
        return self._store.watch()

    def _first(self) -> LeaseSnapshot:
        answers: queue.SimpleQueue[LeaseSnapshot] = queue.SimpleQueue()
        snapshots = self.watch()

        def take_one() -> None:
            for snapshot in snapshots:
                answers.put(snapshot)
                return

        # The watch waits for ever, which is right for a daemon and wrong for a person.
        threading.Thread(target=take_one, daemon=True).start()
        try:
            return answers.get(timeout=KUBE_WAIT)
        except queue.Empty:
            assert self._store is not None
            reason = self._store.status.failure or "no answer"
            raise Problem(
                f"the Kubernetes API showed no nodes within {KUBE_WAIT:.0f} s: {reason}",
                "check --kube-api-url and --kubeconfig-file, and that flanneld runs on a node",
            ) from None

    def write_config(self, _text: str, _revision: int, /) -> None:
        raise Problem(
            "with Kubernetes the configuration is net-conf.json in the ConfigMap kube-flannel-cfg",
            "kubectl -n kube-flannel edit configmap kube-flannel-cfg, then restart the daemons",
        )

    def reserve(self, _lease: Lease, /) -> None:
        raise _not_here()

    def remove(self, _lease: Lease, /) -> None:
        raise _not_here()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._store is not None:
            self._store.close()


def _not_here() -> Problem:
    return Problem(
        "with Kubernetes a node's subnet is its podCIDR, which the cluster gives and takes",
        "delete the node (kubectl delete node NAME) to free its subnet",
    )
