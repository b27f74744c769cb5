"""Which peer a packet goes to, and who may send to us."""

from __future__ import annotations

import socket
from collections import Counter
from collections.abc import Iterable
from ipaddress import IPv4Network
from typing import Any

Hop = tuple[str, int]
"""A peer's public address and UDP port, as the socket module spells it."""


class PeerTable:
    """Subnets and the peers that hold them. A lookup costs one dictionary access for each prefix length in use."""

    def __init__(self) -> None:
        self._by_mask: dict[int, dict[int, Hop]] = {}
        self.senders: Counter[Hop] = Counter()
        """The addresses and ports that peers send from: no other may."""
        self._subnets: dict[str, Hop] = {}
        self.lookups: list[tuple[int, dict[int, Hop]]] = []
        """Netmasks, longest first, and the networks of that length."""

    def put(self, subnet: str, hop: Hop) -> None:
        """Packets for ``subnet`` (CIDR) go to ``hop``. ValueError names what is not an address."""
        network = IPv4Network(subnet)
        socket.inet_pton(socket.AF_INET, hop[0])
        self.remove(subnet)
        self._subnets[subnet] = hop
        self._by_mask.setdefault(int(network.netmask), {})[int(network.network_address)] = hop
        self.senders[hop] += 1
        self._rank()

    def remove(self, subnet: str) -> None:
        """Forget ``subnet``; one that is not there is fine."""
        hop = self._subnets.pop(subnet, None)
        if hop is None:
            return
        network = IPv4Network(subnet)
        mask = int(network.netmask)
        del self._by_mask[mask][int(network.network_address)]
        if not self._by_mask[mask]:
            del self._by_mask[mask]
            self._rank()
        self.senders[hop] -= 1
        if not self.senders[hop]:
            del self.senders[hop]

    def update(self, put: Iterable[Any], remove: Iterable[str]) -> None:
        for subnet in remove:
            self.remove(subnet)
        for subnet, address, port in put:
            self.put(subnet, (address, port))

    def next_hop(self, address: int) -> Hop | None:
        """The peer with the longest subnet that contains ``address``."""
        for mask, table in self.lookups:
            hop = table.get(address & mask)
            if hop is not None:
                return hop
        return None

    def entries(self) -> list[tuple[str, str, int]]:
        return [(subnet, *hop) for subnet, hop in self._subnets.items()]

    def _rank(self) -> None:
        self.lookups = sorted(self._by_mask.items(), reverse=True)
