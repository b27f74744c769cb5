"""subnet.env: what the daemon tells the container runtimes of this host (flannel: pkg/subnet/subnet.go).

    FLANNEL_NETWORK=10.5.0.0/16
    FLANNEL_SUBNET=10.5.52.1/24
    FLANNEL_MTU=1450
    FLANNEL_IPMASQ=true

Standard library only, and little of it: the CNI plugin imports this for every container.
"""

from __future__ import annotations

import os
import re
from contextlib import suppress
from dataclasses import dataclass
from ipaddress import IPv4Network, IPv6Network

_LINE = re.compile(r"(?:export\s+)?([A-Za-z_][A-Za-z0-9_.]*)\s*[=:](.*)", re.ASCII)


@dataclass(frozen=True, slots=True)
class SubnetFile:
    """This node's subnets, the networks they are part of, the MTU in bytes (0: not given), and who masquerades.

    ``ip_masq`` is true where the daemon masquerades, so that the runtime must not.
    """

    network: IPv4Network | None = None
    subnet: IPv4Network | None = None
    ipv6_network: IPv6Network | None = None
    ipv6_subnet: IPv6Network | None = None
    mtu: int = 0
    ip_masq: bool = False


def render(content: SubnetFile) -> str:
    """The file's text: flannel's order, a family's lines only if it has a subnet, the subnet as its first host."""
    lines = []
    for word, network, subnet in (
        ("", content.network, content.subnet),
        ("IPV6_", content.ipv6_network, content.ipv6_subnet),
    ):
        if network is not None and subnet is not None:
            lines.append(f"FLANNEL_{word}NETWORK={network}")
            lines.append(f"FLANNEL_{word}SUBNET={subnet.network_address + 1}/{subnet.prefixlen}")
    lines.append(f"FLANNEL_MTU={content.mtu}")
    lines.append(f"FLANNEL_IPMASQ={'true' if content.ip_masq else 'false'}")
    return "\n".join(lines) + "\n"


def parse(text: str) -> SubnetFile:
    """Read it by dotenv's rules, as flannel's daemon does. Other keys are ignored; ValueError names key and value."""
    values = _dotenv(text)

    def network(key: str, kind: type[IPv4Network] | type[IPv6Network]) -> IPv4Network | IPv6Network | None:
        # With several cluster networks flannel writes a list; the first is the one that counts.
        value = values.get(key, "").partition(",")[0].strip()
        try:
            return kind(value, strict=False) if value else None
        except ValueError:
            raise ValueError(f"{key} {value!a}: must be an IPv{6 if kind is IPv6Network else 4} network") from None

    mtu = values.get("FLANNEL_MTU", "0")
    if not re.fullmatch(r"[0-9]{1,9}", mtu):
        raise ValueError(f"FLANNEL_MTU {mtu!a}: must be a number of bytes")
    v4, v4_subnet = network("FLANNEL_NETWORK", IPv4Network), network("FLANNEL_SUBNET", IPv4Network)
    v6, v6_subnet = network("FLANNEL_IPV6_NETWORK", IPv6Network), network("FLANNEL_IPV6_SUBNET", IPv6Network)
    assert not isinstance(v4, IPv6Network) and not isinstance(v4_subnet, IPv6Network)
    assert not isinstance(v6, IPv4Network) and not isinstance(v6_subnet, IPv4Network)
    return SubnetFile(v4, v4_subnet, v6, v6_subnet, int(mtu), values.get("FLANNEL_IPMASQ") == "true")


def _dotenv(text: str) -> dict[str, str]:
    values = {}
    for number, raw in enumerate(text.splitlines(), 1):
        line = raw.strip()
        if not line or line.startswith("#"):
            continue
        parts = _LINE.fullmatch(line)
        if parts is None:
            raise ValueError(f"line {number} {line[:80]!a}: must look like KEY=value")
        value = parts[2].strip()
        if len(value) >= 2 and value[0] in "'\"" and value.find(value[0], 1) > 0:
            value = value[1 : value.find(value[0], 1)]
        else:
            value = re.split(r"(?:^|\s)#", value, maxsplit=1)[0].strip()
        values[parts[1]] = value
    return values


def read(path: str | os.PathLike[str]) -> SubnetFile | None:
    """The file's content, None where there is no file. ValueError: it is there, and wrong; OSError: unreadable."""
    try:
        with open(path, encoding="utf-8", errors="replace") as file:  # noqa: PTH123 - pathlib costs the plugin 5 ms
            text = file.read()
    except (FileNotFoundError, NotADirectoryError):
        return None
    try:
        return parse(text)
    except ValueError as error:
        raise ValueError(f"{os.fspath(path)}: {error}") from None


def write(path: str | os.PathLike[str], content: SubnetFile) -> bool:
    """Put it in place in one step, readable by everyone; false if it was there already, and nothing was written."""
    path = os.fspath(path)
    text = render(content)
    with suppress(OSError, ValueError), open(path, encoding="utf-8") as file:  # noqa: PTH123
        if file.read() == text:
            return False
    directory = os.path.dirname(path) or "."  # noqa: PTH120
    _make_directory(directory)
    # One name, so that a writer that was killed here leaves nothing that the next one does not use up.
    temporary = f"{path}.tmp"
    try:
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
        with os.fdopen(os.open(temporary, flags, 0o644), "w", encoding="utf-8") as file:
            os.fchmod(file.fileno(), 0o644)  # whatever the umask
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.rename(temporary, path)  # noqa: PTH104
    except BaseException:
        with suppress(OSError):
            os.unlink(temporary)  # noqa: PTH108
        raise
    return True


def _make_directory(directory: str) -> None:
    if os.path.isdir(directory):  # noqa: PTH112
        return
    parent = os.path.dirname(directory)  # noqa: PTH120
    if parent and parent != directory:
        _make_directory(parent)
    with suppress(FileExistsError):
        os.mkdir(directory)  # noqa: PTH102
        os.chmod(directory, 0o755)  # noqa: PTH101
