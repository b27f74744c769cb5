"""Read the daemon's subnet.env the way flannel's plugin reads it, with the same words for what is wrong with it."""

from __future__ import annotations

from cni.cidr import Cidr, parse

DEFAULT_PATH = "/run/flannel/subnet.env"


class SubnetEnv:
    """What the node leases. Subnets are networks (10.5.52.0/24); a family that is not in use is None."""

    __slots__ = ("ipmasq", "ipv6_networks", "ipv6_subnet", "mtu", "networks", "subnet")

    def __init__(self) -> None:
        self.networks: list[Cidr] = []
        self.ipv6_networks: list[Cidr] = []
        self.subnet: Cidr | None = None
        self.ipv6_subnet: Cidr | None = None
        self.mtu: int | None = None
        self.ipmasq: bool | None = None

    @property
    def subnets(self) -> list[Cidr]:
        return [subnet for subnet in (self.subnet, self.ipv6_subnet) if subnet is not None]

    def missing(self) -> list[str]:
        names = []
        if not self.networks and not self.ipv6_networks:
            names += ["FLANNEL_NETWORK", "FLANNEL_IPV6_NETWORK"]
        if not self.subnets:
            names += ["FLANNEL_SUBNET", "FLANNEL_IPV6_SUBNET"]
        if self.mtu is None:
            names.append("FLANNEL_MTU")
        if self.ipmasq is None:
            names.append("FLANNEL_IPMASQ")
        return names


def render_error(cause: str) -> str:
    """The sentence that flannel's users know and search for."""
    return f"failed to load flannel 'subnet.env' file: {cause}. Check the flannel pod log for this node."


def load(path: str) -> SubnetEnv:
    """The file's content; ValueError says what is wrong with it, as ``render_error`` spells it."""
    try:
        with open(path, "rb") as file:
            text = file.read().decode("utf-8", "replace")
    except OSError as error:
        raise ValueError(render_error(f"open {path}: {(error.strerror or str(error)).lower()}")) from None
    try:
        env = read(text)
    except ValueError as error:
        raise ValueError(render_error(str(error))) from None
    if missing := env.missing():
        raise ValueError(render_error(f"{path} is missing {', '.join(missing)}"))
    return env


def read(text: str) -> SubnetEnv:
    """Parse the text. Unknown lines are skipped; nothing is unquoted or trimmed. ValueError on a bad value."""
    env = SubnetEnv()
    for line in text.split("\n"):
        key, equals, value = line.removesuffix("\r").partition("=")
        if not key.startswith("FLANNEL_"):
            continue
        if not equals:
            raise ValueError(f"the line {key!r} has no value")
        if key == "FLANNEL_NETWORK":
            env.networks = [parse(item).network for item in value.split(",")]
        elif key == "FLANNEL_IPV6_NETWORK":
            env.ipv6_networks = [parse(item).network for item in value.split(",")]
        elif key == "FLANNEL_SUBNET":
            env.subnet = parse(value).network
        elif key == "FLANNEL_IPV6_SUBNET":
            env.ipv6_subnet = parse(value).network
        elif key == "FLANNEL_MTU":
            env.mtu = _parse_uint32(value)
        elif key == "FLANNEL_IPMASQ":
            env.ipmasq = value == "true"
    return env


def _parse_uint32(text: str) -> int:
    if not (text.isascii() and text.isdigit()):
        raise ValueError(f'strconv.ParseUint: parsing "{text}": invalid syntax')
    if int(text) >= 1 << 32:
        raise ValueError(f'strconv.ParseUint: parsing "{text}": value out of range')
    return int(text)
