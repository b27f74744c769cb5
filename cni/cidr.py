"""An address with its prefix length. ``ipaddress`` would do the same for a fifth of our time."""

from __future__ import annotations

from _socket import AF_INET, AF_INET6, inet_ntop, inet_pton


class Cidr:
    """``packed`` holds the address as written (10.5.52.1 of 10.5.52.1/24), host bits and all."""

    __slots__ = ("packed", "prefix")

    def __init__(self, packed: bytes, prefix: int) -> None:
        self.packed = packed
        self.prefix = prefix

    @property
    def family(self) -> int:
        return 4 if len(self.packed) == 4 else 6

    @property
    def address(self) -> str:
        return inet_ntop(AF_INET if len(self.packed) == 4 else AF_INET6, self.packed)

    @property
    def network(self) -> Cidr:
        """The same prefix without host bits."""
        bits = len(self.packed) * 8
        mask = ((1 << self.prefix) - 1) << (bits - self.prefix)
        return Cidr((int.from_bytes(self.packed, "big") & mask).to_bytes(len(self.packed), "big"), self.prefix)

    @property
    def first_host(self) -> Cidr:
        """The address that flannel and host-local give to the bridge: the network's base plus one."""
        base = int.from_bytes(self.network.packed, "big") + 1
        return Cidr(base.to_bytes(len(self.packed), "big"), self.prefix)

    def holds(self, other: Cidr) -> bool:
        """Whether ``other``'s address lies inside this network."""
        return len(self.packed) == len(other.packed) and Cidr(other.packed, self.prefix).network == self.network

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Cidr) and (self.packed, self.prefix) == (other.packed, other.prefix)

    def __hash__(self) -> int:
        return hash((self.packed, self.prefix))

    def __str__(self) -> str:
        return f"{self.address}/{self.prefix}"

    def __repr__(self) -> str:
        return f"Cidr({str(self)!r})"


def parse(text: str) -> Cidr:
    """Read ``10.5.52.1/24`` or ``fc00::1/64``; ValueError in the words of Go's net.ParseCIDR."""
    address, slash, length = text.partition("/")
    try:
        packed = inet_pton(AF_INET6 if ":" in address else AF_INET, address)
    except OSError:
        packed = b""
    if not packed or not slash or not (length.isascii() and length.isdigit()) or int(length) > len(packed) * 8:
        raise ValueError(f"invalid CIDR address: {text}")
    return Cidr(packed, int(length))
