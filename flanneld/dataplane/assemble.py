"""The dataplane with its handlers.

All but the firewall's are made when the first record or device asks for them: most hosts never need them, and memory
is counted.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from backends.kernel_state import (
    Change,
    Failure,
    Foreign,
    Hook,
    Link,
    Record,
    Scope,
    Tun,
    UdpPeer,
    Wireguard,
    WireguardPeer,
    is_flannel_device,
)
from flanneld.dataplane import rare
from flanneld.dataplane.dataplane import Dataplane
from flanneld.dataplane.handler import Answer, Handler
from flanneld.dataplane.netfilter import Netfilter
from flanneld.dataplane.uplink import UplinkHandler


class Lazy:
    """A handler that is made when ``asks`` says that a record, or a device that stands, needs it."""

    def __init__(self, asks: Callable[[Record], bool], make: Callable[[], Handler]) -> None:
        self._asks = asks
        self._make = make
        self.made: Handler | None = None
        self._nothing = Answer()

    def _for(self, record: Record) -> Handler | None:
        if self.made is None and self._asks(record):
            self.made = self._make()
        return self.made

    def handles(self, record: Record) -> bool:
        handler = self._for(record)
        return handler is not None and handler.handles(record)

    def observe(self, scope: Scope, links: Mapping[str, Link]) -> Answer:
        if self.made is None:
            for link in links.values():
                self._for(link)
        return self._nothing if self.made is None else self.made.observe(scope, links)

    def apply(self, changes: Sequence[Change]) -> list[Failure]:
        assert self.made is not None, "handles() comes first"
        return self.made.apply(changes)

    def status(self) -> dict[str, Any]:
        return {} if self.made is None else dict(getattr(self.made, "status", dict)())

    def fileno(self) -> int | None:
        return None if self.made is None else self.made.fileno()

    def invalidate(self) -> None:
        if self.made is not None:
            self.made.invalidate()

    def close(self) -> None:
        if self.made is not None:
            self.made.close()


def make_dataplane(hooks_file: Path | None = None, netfilter: Netfilter | None = None) -> Dataplane:
    """For this thread and its network namespace. ``hooks_file`` remembers which commands have run."""
    wireguard = Lazy(_asks_wireguard, _wireguard)

    def way_out_changed() -> None:
        getattr(wireguard.made, "forget_sources", lambda: None)()

    handlers: list[Handler] = [
        netfilter or Netfilter(),
        UplinkHandler(way_out_changed),
        wireguard,
        Lazy(_asks_udp, _udp),
    ]
    if hooks_file is not None:
        remembered = hooks_file
        hooks = Lazy(lambda record: isinstance(record, Hook), lambda: _hooks(remembered))
        if remembered.exists():
            hooks.made = _hooks(remembered)
        handlers.append(hooks)
    return Dataplane(handlers)


def prepare_for_first_start(dataplane: Dataplane) -> None:
    """Where no device of flannel's stands, one will be made: load what that takes while the store is being asked."""
    if not any(is_flannel_device(interface.name) for interface in dataplane.observe(Scope()).interfaces):
        threading.Thread(target=rare.prepare, name="prepare", daemon=True).start()


def _asks_wireguard(record: Record) -> bool:
    if isinstance(record, Link):
        return isinstance(record.settings, Wireguard) or record.name.startswith("flannel-wg")
    return isinstance(record, WireguardPeer)


def _wireguard() -> Handler:
    from flanneld.dataplane.wireguard import WireguardHandler

    return WireguardHandler()


def _asks_udp(record: Record) -> bool:
    if isinstance(record, Link):
        # wireguard-go's devices are TUN devices, too.
        tun = record.settings == Foreign("tun") and not record.name.startswith("flannel-wg")
        return tun or isinstance(record.settings, Tun)
    return isinstance(record, UdpPeer)


def _udp() -> Handler:
    from flanneld.dataplane.udp import UdpHandler

    return UdpHandler()


def _hooks(path: Path) -> Handler:
    from flanneld.dataplane.hooks import HookHandler

    return HookHandler(path)
