"""Kernel records as JSON and back, for /status/desired and ``flannelctl status --diff``. Secrets never leave: they are
left empty, and ``without_secrets`` makes what is compared with them equally empty.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Final

from backends.kernel_state import Firewall, Link, LinkSettings, Record, Route, Rule, Uplink, Wireguard, WireguardPeer

_RECORDS: Final[dict[str, Any]] = {kind.__name__: kind for kind in Record.__args__}
_SETTINGS: Final[dict[str, Any]] = {kind.__name__: kind for kind in LinkSettings.__args__}


def without_secrets(record: Record) -> Record:
    """The record with its keys emptied."""
    if isinstance(record, Link) and isinstance(record.settings, Wireguard):
        return dataclasses.replace(record, settings=dataclasses.replace(record.settings, private_key=""))
    if isinstance(record, WireguardPeer):
        return dataclasses.replace(record, preshared_key=None)
    return record


def to_json(record: Record) -> dict[str, Any]:
    """A JSON object; ``record`` names the kind, ``of`` that of a link's settings."""
    record = without_secrets(record)
    value = {"record": type(record).__name__, **dataclasses.asdict(record)}
    if isinstance(record, Link):
        value["settings"] = {"of": type(record.settings).__name__, **value["settings"]}
    return value


def from_json(value: dict[str, Any]) -> Record:
    """The record of ``to_json``. ValueError for what is none (a daemon of another version)."""
    try:
        fields = {key: _tuples(item) for key, item in value.items() if key != "record"}
        kind = _RECORDS[value["record"]]
        if kind is Link:
            settings = dict(value["settings"])
            fields["settings"] = _SETTINGS[settings.pop("of")](**settings)
        elif kind is Firewall:
            fields["rules"] = tuple(Rule(**rule) for rule in value["rules"])
        elif kind is Uplink:
            fields["routes"] = tuple(Route(**route) for route in value["routes"])
        record: Record = kind(**fields)
    except (KeyError, TypeError) as error:
        raise ValueError(f"not a record that this version knows: {value!r} ({error})") from None
    return record


def _tuples(value: Any) -> Any:
    return tuple(_tuples(item) for item in value) if isinstance(value, list | tuple) else value
