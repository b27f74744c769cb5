"""Pure: desired against observed state, as ordered changes.

Additions come first, in the order of ``Kind``; removals last, in reverse. There is no other ordering rule.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

from backends.kernel_state import Change, KernelState, Key, Kind, Link, Record

Owned = Callable[[Record], bool]


def plan(desired: KernelState, observed: KernelState, owned: Owned, keys: Iterable[Key] | None = None) -> list[Change]:
    """The changes that make ``observed`` equal to ``desired``, empty when it is.

    ``keys`` limits the comparison to what may differ, so that one changed peer costs O(1); None compares everything.
    What is observed but not desired is removed only if ``owned`` says that it is ours.
    """
    if keys is None:
        keys = desired.keys() | observed.keys()
    puts: list[Change] = []
    removals: list[Change] = []
    doomed: set[str] = set()
    for key in keys:
        want, have = desired.get(key), observed.get(key)
        if want is None:
            if have is not None and owned(have):
                removals.append(Change("remove", have, have))
                if isinstance(have, Link):
                    doomed.add(have.name)
        elif have is None or not satisfied(want, have):
            puts.append(Change("put", want, have))
    # The kernel removes what stands on a device together with the device.
    removals = [c for c in removals if isinstance(c.record, Link) or device_of(c.record) not in doomed]
    puts.sort(key=_rank)
    removals.sort(key=_rank, reverse=True)
    return puts + removals


def satisfied(want: Record, have: Record) -> bool:
    """Whether ``have`` is what ``want`` asks for; a Link's None means "as it is"."""
    if want == have:
        return True
    if isinstance(want, Link) and isinstance(have, Link):
        asked: dict[str, Any] = {}
        if want.mac is None:
            asked["mac"] = have.mac
        if want.tx_checksum is None:
            asked["tx_checksum"] = have.tx_checksum
        return bool(asked) and dataclasses.replace(want, **asked) == have
    return False


def device_of(record: Record) -> str | None:
    """The device that a record stands on, None for one that stands on none."""
    return getattr(record, "dev", None)


def dependencies(change: Change) -> tuple[Key, ...]:
    """Keys without which an addition makes no sense: its device, a route's neighbour, a neighbour's FDB entry."""
    if change.op == "remove":
        return ()
    record = change.record
    kind, dev = record.kind, device_of(record)
    keys: tuple[Key, ...] = ((Kind.LINK, dev),) if dev is not None else ()
    if kind == Kind.NEIGHBOUR:
        keys += ((Kind.FDB, dev, getattr(record, "mac", None)),)
    elif kind == Kind.ROUTE and getattr(record, "via", None) is not None:
        keys += ((Kind.NEIGHBOUR, dev, getattr(record, "via", None)),)
    return keys


def _rank(change: Change) -> int:
    return change.record.kind
