"""What this host's kernel has otherwise than its daemon wants it: the daemon's own plan, made but not applied."""

from __future__ import annotations

import argparse
import dataclasses
import os
from ipaddress import ip_network
from typing import Any

from backends.kernel_state import Change, Firewall, Kind, Record, Scope, Sysctl, WireguardPeer
from flanneld.ctl.node import DEFAULT_PORT, ask, own_place, place
from flanneld.ctl.output import Problem
from flanneld.dataplane.assemble import make_dataplane
from flanneld.ownership import ownership
from flanneld.plan import plan
from flanneld.record_json import from_json, without_secrets
from flanneld.wanted import describe

UNSEEN = frozenset({Kind.HOOK})
"""Only the daemon knows which commands have run."""


def find_drift(arguments: argparse.Namespace, status: dict[str, Any]) -> list[str]:
    """One line for each difference: ``+`` is missing, ``~`` is otherwise, ``-`` is ours and left over."""
    if os.geteuid() != 0:
        raise Problem("--diff needs root: it reads firewall rules and forwarding entries", "run it with sudo")
    if not status.get("running"):
        other = f"; {status['problem']}" if status.get("unheard") == "other" else ""
        raise Problem(f"flanneld does not run here, so nobody knows what should be{other}", "start it, then look again")
    _refuse_unheard(arguments, status)
    where = place(arguments, status)
    assert where is not None, "it has answered there"
    try:
        wanted = ask(where, "/status/desired")
        desired = [from_json(value) for value in wanted["records"]]
    except OSError as error:
        reason = error.strerror or "no answer in time"
        raise Problem(
            f"flanneld does not say on {where} what it wants: {reason}",
            "see whether it runs, and try again",
        ) from None
    except (ValueError, KeyError, TypeError) as error:
        raise Problem(
            f"the daemon does not say what it wants: {error}",
            "give its --healthz-port; daemon and flannelctl must be of one version",
        ) from None
    if not desired:
        raise Problem("the daemon does not know yet what should be", "see why: flannelctl status")
    scope = Scope(
        devices=frozenset(wanted["devices"]),
        networks=tuple(wanted["networks"]),
        instance=wanted["instance"],
        firewall=tuple(record for record in desired if isinstance(record, Firewall)),
        sysctls=tuple(record.path for record in desired if isinstance(record, Sysctl)),
    )
    return [line(change) for change in differences(desired, scope)]


def _refuse_unheard(arguments: argparse.Namespace, status: dict[str, Any]) -> None:
    """Only the daemon whose status is shown knows what should be here; Problem says why it was not heard."""
    match status.get("unheard"):
        case None:
            return
        case "hangs":
            raise Problem(f"flanneld {status['problem']}")
        case "refused":
            port = arguments.healthz_port or DEFAULT_PORT
            raise Problem(
                f"flanneld runs without --healthz-port, or not with {port}: {status['problem']}",
                f"start it with --healthz-port={port}, or give its own here",
            )
        case "mute":
            raise Problem(
                f"{status['problem']}, so nobody can ask it what should be",
                f"start it with --healthz-port={DEFAULT_PORT}",
            )
        case _:
            raise Problem(status["problem"], own_place(status))


def differences(desired: list[Record], scope: Scope) -> list[Change]:
    """The plan from this host's kernel to the desired records."""
    wanted = {record.key: record for record in desired if record.key[0] not in UNSEEN}
    dataplane = make_dataplane()
    try:
        observation = dataplane.observe(scope)
        observed = {
            key: _comparable(record, wanted.get(key))
            for key, record in observation.state.items()
            if key[0] not in UNSEEN
        }
    finally:
        dataplane.close()
    owned = ownership(observation.interfaces, [ip_network(text) for text in scope.networks], scope.devices)
    return plan(wanted, observed, owned)


def _comparable(record: Record, wanted: Record | None) -> Record:
    """Without secrets, and with a WireGuard peer where it should be: where it roamed to is the daemon's to judge."""
    record = without_secrets(record)
    if isinstance(record, WireguardPeer) and isinstance(wanted, WireguardPeer):
        return dataclasses.replace(record, endpoint=wanted.endpoint)
    return record


def line(change: Change) -> str:
    sign = "-" if change.op == "remove" else "+" if change.previous is None else "~"
    kind = Kind(int(change.record.key[0] or 0)).name.lower()
    was = f" (is: {describe(change.previous)})" if sign == "~" and change.previous is not None else ""
    return f"{sign} {kind} {describe(change.record)}{was}"
