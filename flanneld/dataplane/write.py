"""Changes into the kernel by rtnetlink: routes, neighbours, forwarding entries and addresses in batches, links singly."""

from __future__ import annotations

import errno
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Final

from backends.kernel_state import (
    Address,
    Change,
    Failure,
    FdbEntry,
    Firewall,
    Ipip,
    Link,
    Neighbour,
    Record,
    Route,
    Uplink,
    Vxlan,
)
from flanneld.dataplane import links as link_wire
from flanneld.dataplane import modules, rare
from flanneld.dataplane.follow import Follower
from flanneld.dataplane.links import RawLink
from flanneld.dataplane.look import Look
from flanneld.dataplane.netlink import Message, Netlink, NetlinkError
from flanneld.dataplane.view import View
from flanneld.dataplane.wire import (
    NLM_F_CREATE,
    NLM_F_EXCL,
    NLM_F_REPLACE,
    RTM_DELADDR,
    RTM_DELLINK,
    RTM_DELNEIGH,
    RTM_DELROUTE,
    RTM_NEWADDR,
    RTM_NEWLINK,
    RTM_NEWNEIGH,
    RTM_NEWROUTE,
    family_of,
    fdb_body,
    neighbour_body,
    route_body,
)

GONE: Final = frozenset({errno.ENOENT, errno.ESRCH, errno.ENODEV, errno.ENXIO, errno.EADDRNOTAVAIL})
"""What the kernel says of a removal whose object is not there any more."""
SLICE: Final = 2000
"""Changes between two looks at the monitor."""
_PUT: Final = NLM_F_CREATE | NLM_F_REPLACE


class Writer:
    """Writes, and lets the mirror know what was acknowledged."""

    def __init__(self, netlink: Netlink, follower: Follower, look: Look, view: View) -> None:
        self._netlink = netlink
        self._follower = follower
        self._look = look
        self._view = view
        self._ethtool = link_wire.Ethtool()

    def close(self) -> None:
        self._ethtool.close()

    # --- routes, neighbours, forwarding entries, addresses ---------------------------------------------------------

    def batch(self, changes: Sequence[Change]) -> list[Failure]:
        """Make the changes in order, whatever becomes of each; those that failed.

        The monitor is read in between: its buffer must not fill with messages about all this, and what it says of a
        removal has to be known before the same key is put again.
        """
        failures: list[Failure] = []
        for _, group in groupby(changes, lambda change: change.op):
            run = list(group)
            for first in range(0, len(run), SLICE):
                self._follower.drain()
                failures += self._slice(run[first : first + SLICE])
        self._follower.drain()
        return failures

    def _slice(self, changes: Sequence[Change]) -> list[Failure]:
        failures: list[Failure] = []
        sent: list[Change] = []
        requests: list[Message] = []
        own = self._view.interfaces.networks() if any(isinstance(c.record, Route) for c in changes) else {}
        for change in changes:
            if change.op == "put" and (there := _replaces(change.record, own)) is not None:
                failures.append(
                    Failure(
                        change,
                        "EEXIST",
                        f"{describe(change)}: {there} has that network itself. If nobody needs it there (a bridge that an"
                        f" earlier lease left?), remove it: ip link del {there}; else give one of the two another network",
                    )
                )
                continue
            try:
                request = self._message(change)
            except (ValueError, OSError) as error:  # an address that is none
                failures.append(Failure(change, "EINVAL", f"{describe(change)}: {error}"))
                continue
            if request is not None:
                sent.append(change)
                requests.append(request)
            elif change.op == "put":
                dev = getattr(change.record, "dev", None)
                if self._view.interfaces.index(dev or "") is not None:
                    dev = getattr(change.record, "via", None)
                failures.append(Failure(change, "ENODEV", f"{describe(change)}: there is no interface {dev}"))
            else:
                self._view.mirror.know(change.record.key, None)
        try:
            answers = self._netlink.batch(requests)
        except OSError as error:  # what became of each is unknown: look again
            self._view.stale.everything = True
            cause = errno.errorcode.get(error.errno or 0, "netlink")
            return failures + [Failure(change, cause, f"{describe(change)}: netlink: {error}") for change in sent]
        for change, answer in zip(sent, answers, strict=True):
            blocked = answer is not None and _is_in_its_own_way(change, answer)
            refusal = self._remove_and_put(change, answer) if blocked else answer
            if refusal is None or (change.op == "remove" and refusal.errno in GONE):
                self._done(change)
            else:
                failures.append(Failure(change, refusal.name, f"{describe(change)}: {refusal}{remedy(refusal)}"))
        return failures

    def _done(self, change: Change) -> None:
        record = change.record
        self._view.mirror.know(record.key, record if change.op == "put" else None)
        if isinstance(record, Address):
            self._view.own_address(record, there=change.op == "put")
        elif change.op == "remove" and record.key in self._view.doubled:
            self._view.stale.families.add(family_of(str(record.key[1])))  # another one takes its place

    def _remove_and_put(self, change: Change, refusal: NetlinkError | None) -> NetlinkError | None:
        assert change.previous is not None
        requests = [self._message(Change("remove", change.previous)), self._message(change)]
        if None in requests:
            return refusal
        _, refused = self._netlink.batch([request for request in requests if request])
        if refused is not None:
            self._view.mirror.learn(change.record.key, None)
        return refused

    def _message(self, change: Change) -> Message | None:
        """None where the interface is not there."""
        record, put = change.record, change.op == "put"
        assert isinstance(record, (Route, Neighbour, FdbEntry, Address))
        index = self._view.interfaces.index(record.dev) if record.dev is not None else None
        if isinstance(record, Route):
            if index is None and record.dev is not None:
                return None
            return (
                (RTM_NEWROUTE, _PUT, route_body(record, index))
                if put
                else (RTM_DELROUTE, 0, route_body(record, index, remove=True))
            )
        if index is None:
            return None
        if isinstance(record, Address):
            return (RTM_NEWADDR if put else RTM_DELADDR), (_PUT if put else 0), rare.address_body(record.address, index)
        if isinstance(record, Neighbour):
            body = neighbour_body(record, index)
        else:
            via = self._view.interfaces.index(record.via) if record.via is not None else None
            if put and via is None and record.via is not None:
                return None
            body = fdb_body(record, index, via, remove=not put)
        return (RTM_NEWNEIGH, _PUT, body) if put else (RTM_DELNEIGH, 0, body)

    # --- links -----------------------------------------------------------------------------------------------------

    def link(self, change: Change, *, made_elsewhere: bool) -> Failure | None:
        """Make, alter or remove a device. ``made_elsewhere``: a handler has made it; MTU, MAC and up are left to do."""
        link = change.record
        assert isinstance(link, Link)
        self._follower.drain()
        try:
            standing = self._look.look_at(link.name)
            if change.op == "remove":
                self._delete(standing)
                return None
            self._make(link, standing, made_elsewhere)
            if link.tx_checksum is not None and self._ethtool.tx_checksum(link.name) != link.tx_checksum:
                self._ethtool.set_tx_checksum(link.name, link.tx_checksum)
        except NetlinkError as error:
            return Failure(change, error.name, f"{describe(change)}: {error}{self._link_remedy(link, error)}")
        except modules.ModuleMissing as error:
            return Failure(change, "module", f"{describe(change)}: {error}")
        except OSError as error:
            cause = errno.errorcode.get(error.errno or 0, "OSError")
            return Failure(change, cause, f"{describe(change)}: {error.strerror}")
        finally:
            self._see(link.name)
        return None

    def _make(self, link: Link, standing: RawLink | None, made_elsewhere: bool) -> None:
        names = self._view.interfaces.names
        if standing is not None:
            self._refuse_other_kind(link, standing)
            settings = link.settings if made_elsewhere else link_wire.settings_of(standing, names.get)
            seen = Link(link.name, settings, standing.mtu, standing.mac, standing.up)
            if link_wire.alterable(link, settings) and self._change_settings(link, seen, standing.index):
                self._alter(link, seen, standing.index)
                return
            self._delete(standing)
        elif made_elsewhere:
            raise NetlinkError(errno.ENODEV, "it was made and is gone again")
        if not isinstance(link.settings, (Vxlan, Ipip)):
            raise NetlinkError(errno.EOPNOTSUPP, f"nothing here makes a device with {link.settings!r}")
        body = link_wire.create_body(link, self._underlay(link))
        try:
            self._netlink.request(RTM_NEWLINK, NLM_F_CREATE | NLM_F_EXCL, body)
        except NetlinkError as error:
            if error.errno != errno.EOPNOTSUPP:
                raise
            modules.load("vxlan" if isinstance(link.settings, Vxlan) else "ipip")
            self._netlink.request(RTM_NEWLINK, NLM_F_CREATE | NLM_F_EXCL, body)

    def _refuse_other_kind(self, link: Link, standing: RawLink) -> None:
        """A device of that name that no flannel made is its owner's to remove."""
        wanted = {Vxlan: "vxlan", Ipip: "ipip"}.get(type(link.settings))
        if wanted is not None and standing.kind != wanted:
            kind = standing.kind or "hardware"
            raise NetlinkError(
                errno.EEXIST,
                f"a device of that name is there, but its kind is {kind}, not {wanted}. "
                f"Rename or remove it: ip link del {link.name}",
            )

    def _change_settings(self, link: Link, seen: Link, index: int) -> bool:
        """On the standing device; False if the kernel cannot after all and a new one is needed."""
        if link.settings == seen.settings or not isinstance(link.settings, Vxlan):
            return True
        self._view.look_again(index)
        try:
            self._netlink.request(RTM_NEWLINK, 0, link_wire.settings_body(link.settings, index, self._underlay(link)))
        except NetlinkError as error:
            if error.errno in (errno.EOPNOTSUPP, errno.EINVAL):
                return False
            raise
        return True

    def _alter(self, link: Link, seen: Link, index: int) -> None:
        """MAC, MTU and up, each of them whatever becomes of the others; the first refusal is raised."""
        bodies = link_wire.alter_bodies(link, seen, index)
        if not bodies:
            return
        self._view.look_again(index)
        refusals = [error for error in self._netlink.batch([(RTM_NEWLINK, 0, body) for body in bodies]) if error]
        if refusals:
            raise refusals[0]

    def _underlay(self, link: Link) -> int:
        assert isinstance(link.settings, (Vxlan, Ipip))
        if not link.settings.underlay:
            return 0
        index = self._view.interfaces.index(link.settings.underlay)
        if index is None:
            raise NetlinkError(errno.ENODEV, f"there is no interface {link.settings.underlay} to carry it")
        return index

    def _delete(self, standing: RawLink | None) -> None:
        if standing is None:
            return
        try:
            self._netlink.request(RTM_DELLINK, 0, link_wire.index_body(standing.index))
        except NetlinkError as error:
            if error.errno not in GONE:
                raise
        self._view.forget_link(standing.index)

    def _see(self, name: str) -> None:
        """Take the device as it is now into the mirror, so that what follows in this pass finds it."""
        try:
            now = self._look.look_at(name)
        except OSError:
            self._view.stale.everything = True
            return
        if now is not None:
            self._view.take_link(now)
            self._view.own_write(name)

    def _link_remedy(self, link: Link, error: NetlinkError) -> str:
        settings = link.settings
        if error.errno == errno.EPERM:
            return ". Run as root, or with CAP_NET_ADMIN"
        if isinstance(settings, Vxlan):
            if error.errno in (errno.EEXIST, errno.EADDRINUSE) and "its kind is" not in error.hint:
                rival = self._rival(link.name, settings)
                return f". {rival or 'Another device or program'} uses VNI {settings.vni} or UDP port {settings.port}; choose another VNI or Port, or remove it"
            if error.errno in (errno.EINVAL, errno.ERANGE):
                overhead = 70 if ":" in settings.local else 50
                under = self._view.interfaces.by_name(settings.underlay)
                if under is not None and link.mtu > under.mtu - overhead:
                    return f". An MTU of {link.mtu} does not fit {under.name} (MTU {under.mtu}): at most {under.mtu - overhead}"
        return ""

    def _rival(self, name: str, settings: Vxlan) -> str | None:
        """Another vxlan device with the same VNI. One of the other address family is in nobody's way."""
        table = self._view.interfaces
        for raw in table.links.values():
            other = link_wire.settings_of(raw, table.names.get)
            if raw.name == name or not isinstance(other, Vxlan) or other.vni != settings.vni:
                continue
            if not other.local or (":" in other.local) == (":" in settings.local):
                return f"Device {raw.name}"
        return None


def _replaces(record: Record, own: Mapping[str, str]) -> str | None:
    """The interface whose connected route (``own``, by CIDR) the kernel would give up for this one."""
    # IPv6's connected routes have a metric of their own, and stay beside ours.
    if not isinstance(record, Route) or record.metric or ":" in record.dst:
        return None
    dev = own.get(record.dst)
    return dev if dev != record.dev else None


def _is_in_its_own_way(change: Change, refusal: NetlinkError) -> bool:
    """IPv6 refuses an onlink gateway that it would reach over another interface, be it by the very route to replace.

    (The gateway is the subnet's own base address.) So a route that moves to our device has to go before it comes.
    """
    record, previous = change.record, change.previous
    return (
        refusal.errno == errno.EINVAL
        and change.op == "put"
        and isinstance(record, Route)
        and isinstance(previous, Route)
        and record.onlink
        and ":" in record.dst
        and previous.dev != record.dev
    )


def describe(change: Change) -> str:
    """The change in a few words: "route 10.5.3.0/24 via 10.5.3.0 dev flannel.1"."""
    record = change.record
    verb = "" if change.op == "put" else "remove "
    if isinstance(record, Route):
        via = f" via {record.via}" if record.via else ""
        dev = f" dev {record.dev}" if record.dev else ""
        kind = "" if record.type == "unicast" else f"{record.type} "
        return f"{verb}{kind}route {record.dst}{via}{dev}"
    if isinstance(record, Neighbour):
        return f"{verb}neighbour {record.dst} lladdr {record.mac} dev {record.dev}"
    if isinstance(record, FdbEntry):
        via = f" via {record.via}" if record.via else ""
        return f"{verb}forwarding entry {record.mac} dst {record.dst}{via} dev {record.dev}"
    if isinstance(record, Address):
        return f"{verb}address {record.address} dev {record.dev}"
    if isinstance(record, Link):
        return f"{verb}device {record.name} (MTU {record.mtu})"
    if isinstance(record, Uplink):
        return f"{verb}policy routing of IPv{record.family} for {record.tunnel}"
    if isinstance(record, Firewall):
        return f"{verb}{record.mode} rules of IPv{record.family}"
    return f"{verb}{record.kind.name.lower()} {record.key[1]}"


def remedy(error: NetlinkError) -> str:
    if error.errno == errno.EPERM:
        return ". Run as root, or with CAP_NET_ADMIN"
    if error.errno in (errno.ENOBUFS, errno.ENOMEM):
        return ". The kernel is out of room: see net.ipv4.neigh.default.gc_thresh3 and net.ipv6.route.max_size"
    if error.errno in (errno.ENETUNREACH, errno.EHOSTUNREACH):
        return ". Its gateway is not reachable directly: is the interface up, does it have its address?"
    if error.errno == errno.ENETDOWN:
        return ". The interface is down"
    return ""
