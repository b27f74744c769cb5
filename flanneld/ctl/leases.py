"""``flannelctl leases``: who has which subnet."""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from flanneld.ctl.output import OK, Problem, console, duration, note, put, put_json, table
from subnet_lease.persistent_map import PersistentMap

if TYPE_CHECKING:
    from flanneld.ctl.access import Access
    from subnet_lease.etcd_admin import Stray
    from subnet_lease.lease import Lease

COLUMNS = ("SUBNET", "NODE", "PUBLIC IP", "BACKEND", "VTEP", "EXPIRES")


def register(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    from flanneld.ctl.access import add_connection

    parser = commands.add_parser("leases", help="list the leases: subnets and their nodes", allow_abbrev=False)
    parser.add_argument("--json", action="store_true", help="JSON; with --watch, one line for each change")
    parser.add_argument("--watch", action="store_true", help="keep looking: a live table, or one line for each change")
    parser.add_argument(
        "--no-expiry", action="store_true", help="do not ask when each lease expires (one call for each)"
    )
    add_connection(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    from flanneld.ctl.access import open_access

    with open_access(arguments) as access:
        if arguments.watch:
            with contextlib.suppress(KeyboardInterrupt):
                _watch(access, as_json=arguments.json)
            return OK
        leases, strays = access.leases_and_strays()
        leases.sort(key=order)
        expiry = {} if arguments.no_expiry else expiries(access, leases)
        if arguments.json:
            put_json([*(describe(lease, expiry.get(lease.key)) for lease in leases), *map(describe_stray, strays)])
            return OK
        if leases:
            console().print(table(COLUMNS, [row(lease, expiry.get(lease.key)) for lease in leases]))
        else:
            put(f"no leases under {access.leases_name}; start flanneld on a host to get the first")
        if strays:
            put("\nno leases, though they stand among them; no node reads them:")
        for stray in strays:
            put(f"  {stray.key}: {stray.error}\n    {stray.remove}")
    return OK


def expiries(access: Access, leases: Sequence[Lease]) -> dict[str, float | None]:
    """Seconds until each lease expires, by key. Only one by one can they be asked for; so several at a time are."""
    with ThreadPoolExecutor(16) as pool:
        return dict(zip((lease.key for lease in leases), pool.map(access.ttl, leases), strict=True))


def order(lease: Lease) -> tuple[int, int]:
    """By number, not by text: 10.5.9.0 before 10.5.10.0."""
    subnet, subnet6 = lease.subnet, lease.ipv6_subnet
    return (int(subnet.network_address) if subnet else 0, int(subnet6.network_address) if subnet6 else 0)


def vtep(lease: Lease) -> str:
    """What peers encapsulate to, besides the address: the VTEP's MAC or the WireGuard key."""
    for data in (lease.attrs.backend_data, lease.attrs.backend_v6_data):
        if isinstance(data, Mapping):
            for key in ("VtepMAC", "PublicKey"):
                if isinstance(data.get(key), str):
                    return str(data[key])
    return "-"


def row(lease: Lease, ttl: float | None) -> tuple[str, ...]:
    attrs = lease.attrs
    return (
        ", ".join(str(s) for s in (lease.subnet, lease.ipv6_subnet) if s is not None),
        attrs.node.name if attrs.node and attrs.node.name else "unreadable" if lease.unreadable else "-",
        ", ".join(str(a) for a in (attrs.public_ip, attrs.public_ipv6) if a is not None) or "-",
        attrs.backend_type or "-",
        vtep(lease),
        _expiry(lease, ttl),
    )


def _watched(lease: Lease) -> tuple[str, ...]:
    """A row without the expiry, for which a watch does not ask."""
    return row(lease, None)[:-1]


def _expiry(lease: Lease, ttl: float | None) -> str:
    if lease.reservation:
        return "reservation"
    if ttl is not None:
        return f"in {duration(ttl)}"
    return "never" if lease.unreadable and not lease.store_ref else "-"


def describe(lease: Lease, ttl: float | None) -> dict[str, Any]:
    """One lease for programs; ``expires_in`` is seconds, null for what never expires or when it was not asked."""
    attrs = lease.attrs
    return {
        "subnet": str(lease.subnet) if lease.subnet else None,
        "ipv6_subnet": str(lease.ipv6_subnet) if lease.ipv6_subnet else None,
        "node": attrs.node.name if attrs.node else None,
        "public_ip": str(attrs.public_ip) if attrs.public_ip else None,
        "public_ipv6": str(attrs.public_ipv6) if attrs.public_ipv6 else None,
        "backend_type": attrs.backend_type or None,
        "backend_data": attrs.backend_data,
        "backend_v6_data": attrs.backend_v6_data,
        "reservation": lease.reservation,
        "unreadable": lease.unreadable,
        "expires_in": None if ttl is None else int(ttl),
        "revision": lease.revision,
    }


def describe_stray(stray: Stray) -> dict[str, Any]:
    """A key that is no lease, as a lease of which nothing is known, and why it is none."""
    from subnet_lease.lease import Lease, LeaseAttrs

    nothing = {**describe(Lease(None, None, LeaseAttrs()), None), "revision": None}
    return {**nothing, "key": stray.key, "error": stray.error, "to_remove_it": stray.remove}


def _say_what_is_missing(access: Access) -> None:
    """Without a configuration no node gets a lease, and whoever watches would wait for ever not knowing for what."""
    from flanneld.ctl.config import understood
    from subnet_lease.store import ConfigMissing, StoreError

    try:
        understood(access.config_text()[0], access.config_name, etcd=access.allocates)
    except (ConfigMissing, Problem) as error:
        note("waiting", f"no node gets a lease yet: {error}")
    except StoreError:
        return  # the watch tells, and outlasts it


def _watch(access: Access, *, as_json: bool) -> None:
    _say_what_is_missing(access)
    if sys.stdout.isatty() and not as_json:
        from rich.live import Live

        with Live(console=console(), auto_refresh=False) as live:
            for snapshot in access.watch():
                leases = sorted(snapshot.leases.values(), key=order)
                live.update(table(COLUMNS[:-1], [_watched(lease) for lease in leases]), refresh=True)
        return
    before: PersistentMap[str, Lease] = PersistentMap()
    for snapshot in access.watch():
        for change, lease in changes(before, snapshot.leases):
            _put_change(change, lease, as_json=as_json)
        before = snapshot.leases
        sys.stdout.flush()


def changes(before: PersistentMap[str, Lease], now: PersistentMap[str, Lease]) -> list[tuple[str, Lease]]:
    """("added" | "changed" | "removed", lease) from one snapshot to the next."""
    news = sorted(now.differences(before))
    found = [("removed", before[key]) for key in news if key not in now]
    for key in news:
        old, lease = before.get(key), now.get(key)
        if lease is not None and old is None:
            found.append(("added", lease))
        elif lease is not None and old is not None and old.attrs != lease.attrs:
            found.append(("changed", lease))
    return found


def _put_change(change: str, lease: Lease, *, as_json: bool) -> None:
    if as_json:
        import json

        put(json.dumps({"change": change, **describe(lease, None)}))
    else:
        put(f"{change:8}" + "  ".join(_watched(lease)))
