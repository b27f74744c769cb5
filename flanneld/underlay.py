"""Pure: which interface and addresses carry the tunnels (flannel's pkg/ipmatch/match.go, with reasons).

Order: --iface by name or address (then also loopback: routed hosts have their address there), --iface-regex against
addresses, then names, --iface-can-reach, a local --public-ip, the default route's interface, and at last (without a
default route) the only candidate there is.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from ipaddress import ip_address, ip_interface

from backends.backend import Underlay
from backends.kernel_state import Interface, InterfaceAddress, RouteLookup, is_flannel_device
from flanneld.go_regex import compile_go
from subnet_lease.lease import Family, IPAddress, IPNetwork

LINK_SCOPE = 253
"""RT_SCOPE_LINK (include/uapi/linux/rtnetlink.h)."""

_NOT_UNDERLAY = re.compile(r"(cni|docker|veth|cali|br-|virbr|kube-|nodelocaldns|lxc|podman)")


class UnderlayError(Exception):
    """No interface fits. The text lists those seen, why each was passed over, and what to do."""


@dataclass(frozen=True, slots=True)
class View:
    """What the kernel says of this host: its interfaces, its default routes (the one in use first), its way to
    --iface-can-reach."""

    interfaces: tuple[Interface, ...] = ()
    default: Mapping[Family, tuple[RouteLookup, ...]] = field(default_factory=dict)
    reach: RouteLookup | None = None


@dataclass(frozen=True, slots=True)
class Choice:
    """What the operator asked for, from the flags and the store's hints."""

    families: tuple[Family, ...]
    iface: tuple[str, ...] = ()
    iface_regex: tuple[str, ...] = ()
    can_reach: str = ""
    public: Mapping[Family, IPAddress] = field(default_factory=dict)
    current: str = ""
    """The interface in use: a default route that moves (a VPN comes up) does not move the tunnels while it serves."""


def choose_underlay(view: View, choice: Choice) -> Underlay:
    """The interface, its address for each family, and the published addresses. Raises UnderlayError."""
    interface, preferred = _choose_interface(view, choice)
    local: dict[Family, IPAddress] = {}
    for family in choice.families:
        named = preferred if preferred is not None and preferred.version == family else None
        address = named or best_address(interface, family, choice.public.get(family))
        if address is None:
            raise UnderlayError(
                f"interface {interface.name} has no usable IPv{family} address;"
                f" add one, choose another with --iface, or turn EnableIPv{family} off\n{_seen(view, choice)}"
            )
        local[family] = address
    return Underlay(
        name=interface.name,
        mtu=_mtu(view, choice, interface),
        local=local,
        public={family: choice.public.get(family, local[family]) for family in choice.families},
        prefixes=_prefixes(interface),
        pinned=frozenset(f for f in choice.families if _leads_elsewhere(view.default.get(f, ()), interface.name)),
        ways_out=_ways_out(view, interface, local),
        index=interface.index,
        loopback=interface.loopback,
    )


def _mtu(view: View, choice: Choice, interface: Interface) -> int:
    """The interface's; of loopback, which has room for anything, that of the interfaces by which packets leave."""
    if not interface.loopback:
        return interface.mtu
    ways = {view.default[f][0].dev for f in choice.families if view.default.get(f)}
    outward = [i for i in view.interfaces if i.up and not i.loopback and not _for_containers(i)]
    leaving = [i for i in outward if i.name in ways] or outward
    return min((i.mtu for i in leaving), default=interface.mtu)


def _leads_elsewhere(routes: tuple[RouteLookup, ...], name: str) -> bool:
    """Whether an interface has a default route of its own, but not the one in use."""
    return bool(routes) and routes[0].dev != name and any(route.dev == name for route in routes)


def _ways_out(view: View, interface: Interface, local: Mapping[Family, IPAddress]) -> dict[Family, RouteLookup | None]:
    """What ``Underlay.ways_out`` says. The kernel sends from a route's own source address, else from one of its device's.

    The routes of the interface's own networks have their own source addresses, too, whatever the default route's is.
    Another interface's default route is left as it is: answers to this one's address come in here, and wireguard-go then
    sends by the interface by which it was answered, where there is no way to the peer.
    """
    found: dict[Family, RouteLookup | None] = {}
    for family, address in local.items():
        used = next(iter(view.default.get(family, ())), None)
        own = next((route for route in view.default.get(family, ()) if route.dev == interface.name), None)
        if interface.loopback:
            way, by_itself = used, used is None or used.src == str(address)
        else:
            chosen = own is None or (own is used and own.src in (None, str(address)))
            way, by_itself = own, chosen and _sources(interface, family) <= {address}
        if not by_itself:
            found[family] = way
    return found


def _sources(interface: Interface, family: Family) -> set[IPAddress]:
    """The addresses of an interface that the kernel may take as the source of a packet that leaves the link.

    In IPv4 that is one whose network holds the gateway (inet_select_addr), so no VIP of /32 where there are networks.
    """
    found = [ip_interface(address.address) for address in interface.addresses if not address.secondary]
    found = [address for address in found if address.version == family and not address.is_link_local]
    networks = [address for address in found if family == 4 and address.network.prefixlen < 32]
    return {address.ip for address in networks or found}


def best_address(interface: Interface, family: Family, wanted: IPAddress | None = None) -> IPAddress | None:
    """``wanted`` if the interface has it, else global before link-local, permanent before not, lasting before temporary.

    127.0.0.0/8 and ::1 only where the interface is loopback and has nothing else.
    """
    usable = [(ip_interface(a.address).ip, a) for a in interface.addresses if not a.deprecated]
    usable = [(ip, a) for ip, a in usable if ip.version == family and not ip.is_multicast]
    usable = [(ip, a) for ip, a in usable if interface.loopback or not ip.is_loopback]
    if any(ip == wanted for ip, _ in usable):
        return wanted
    usable.sort(key=lambda pair: _badness(pair[0], pair[1]))
    return usable[0][0] if usable else None


def _badness(ip: IPAddress, address: InterfaceAddress) -> tuple[bool, ...]:
    return (
        ip.is_loopback,
        ip.is_link_local or address.scope >= LINK_SCOPE,
        not address.permanent,
        address.temporary,
        address.secondary,
    )


def _prefixes(interface: Interface) -> tuple[IPNetwork, ...]:
    networks = (ip_interface(a.address).network for a in interface.addresses)
    return tuple(
        n
        for n in networks
        if n.prefixlen < n.max_prefixlen and not n.network_address.is_link_local and not n.is_loopback
    )


def _choose_interface(view: View, choice: Choice) -> tuple[Interface, IPAddress | None]:
    """The interface, and the address by which the operator named it, if so."""
    candidates = [i for i in view.interfaces if i.up and not i.loopback]
    if choice.iface or choice.iface_regex:
        loopback = [i for i in view.interfaces if i.up and i.loopback]
        for wanted in choice.iface:
            for interface in (*candidates, *loopback):
                address = _as_address(wanted)
                if interface.name == wanted or (address is not None and address in _addresses(interface)):
                    return interface, address
        for pattern in choice.iface_regex:
            found = _match_regex(pattern, candidates)
            if found is not None:
                return found
        asked = [f"--iface={x}" for x in choice.iface] + [f"--iface-regex={x}" for x in choice.iface_regex]
        raise UnderlayError(f"no interface matches {', '.join(asked)}\n{_seen(view, choice)}")
    if choice.can_reach:
        if view.reach is None or view.reach.dev == "lo":
            raise UnderlayError(
                f"--iface-can-reach={choice.can_reach}: no route to it; add one or use --iface\n{_seen(view, choice)}"
            )
        source = _as_address(view.reach.src) if view.reach.src else None
        return _by_name(view, choice, view.reach.dev), source
    for interface in candidates:
        for ip in choice.public.values():
            if ip in _addresses(interface):
                return interface, ip
    return _by_default_route(view, choice, candidates), None


def _match_regex(pattern: str, candidates: Iterable[Interface]) -> tuple[Interface, IPAddress | None] | None:
    expression = compile_go(pattern)
    for interface in candidates:
        for address in _addresses(interface):
            if expression.search(str(address)):
                return interface, address
    for interface in candidates:
        if expression.search(interface.name):
            return interface, None
    return None


def _by_default_route(view: View, choice: Choice, candidates: list[Interface]) -> Interface:
    current = next((i for i in candidates if i.name == choice.current), None)
    if current is not None and _passed_over(current, choice) is None:
        return current
    names = {view.default[f][0].dev for f in choice.families if view.default.get(f)}
    if len(names) == 1:
        return _by_name(view, choice, names.pop())
    if len(names) > 1:
        # Dual stack with two uplinks: an interface that has addresses of both families settles it.
        for name in sorted(names):
            interface = _by_name(view, choice, name)
            if all(best_address(interface, f) for f in choice.families):
                return interface
        raise UnderlayError(
            f"the default routes of IPv4 and IPv6 use different interfaces ({', '.join(sorted(names))});"
            f" choose one with --iface\n{_seen(view, choice)}"
        )
    fitting = [i for i in candidates if _passed_over(i, choice) is None]
    if len(fitting) == 1:
        return fitting[0]
    raise UnderlayError(
        "no default route, and "
        + ("more than one interface could carry the tunnels" if fitting else "no interface can carry the tunnels")
        + f"; choose one with --iface\n{_seen(view, choice)}"
    )


def _by_name(view: View, choice: Choice, name: str) -> Interface:
    for interface in view.interfaces:
        if interface.name == name:
            return interface
    raise UnderlayError(f"interface {name} is gone\n{_seen(view, choice)}")


def _passed_over(interface: Interface, choice: Choice) -> str | None:
    """Why an interface is no candidate by itself, None if it is one."""
    if interface.loopback:
        return "loopback"
    if not interface.up:
        return "down"
    if _for_containers(interface):
        return "carries containers, not hosts"
    lacking = [f"IPv{f}" for f in choice.families if best_address(interface, f) is None]
    return f"no {' and no '.join(lacking)} address" if lacking else None


def _for_containers(interface: Interface) -> bool:
    named = is_flannel_device(interface.name) or _NOT_UNDERLAY.match(interface.name)
    return bool(named or interface.kind == "bridge")


def _seen(view: View, choice: Choice) -> str:
    lines = []
    for interface in view.interfaces:
        addresses = ", ".join(a.address for a in interface.addresses) or "no address"
        reason = _passed_over(interface, choice) or "usable with --iface=" + interface.name
        lines.append(f"  {interface.name} ({addresses}): {reason}")
    return "interfaces seen:\n" + "\n".join(lines) if lines else "no interfaces seen"


def _addresses(interface: Interface) -> list[IPAddress]:
    return [ip_interface(a.address).ip for a in interface.addresses]


def _as_address(text: str) -> IPAddress | None:
    try:
        return ip_address(text)
    except ValueError:
        return None
