"""A host's networking state as the text that an operator would look at."""

from __future__ import annotations

import re

from flanneld.lab.hosts import Host

COMMANDS = {
    "link": "ip -d link show dev {dev}",
    "address": "ip addr show dev {dev}",
    "routes": "ip route show",
    "routes6": "ip -6 route show",
    "neighbours": "ip neigh show dev {dev} nud permanent",
    "fdb": "bridge fdb show dev {dev}",
    "iptables": "iptables-save",
    "nft": "nft list ruleset",
}

_VOLATILE = (
    (re.compile(r"\[\d+:\d+\]"), "[]"),
    (re.compile(r"^#.*$", re.MULTILINE), ""),
    (re.compile(r"^\d+: "), ""),
    (re.compile(r"\bqlen \d+|promiscuity \d+|allmulti \d+"), ""),
    (re.compile(r"packets \d+ bytes \d+"), ""),
)


def kernel_text(host: Host, dev: str = "flannel.1", only: tuple[str, ...] = tuple(COMMANDS)) -> dict[str, list[str]]:
    """Lines by kind, sorted where the kernel's order means nothing."""
    found = {}
    for kind in only:
        text = host.run(COMMANDS[kind].format(dev=dev), check=False)
        for pattern, by in _VOLATILE:
            text = pattern.sub(by, text)
        lines = [line.rstrip() for line in text.splitlines() if line.strip()]
        found[kind] = lines if kind in {"iptables", "nft"} else sorted(lines)
    return found


def metric(host: Host, name: str) -> float:
    """The sum of a metric of the host's daemon over its labels."""
    text = host.daemon.get("/metrics").text
    return sum(float(line.rsplit(" ", 1)[1]) for line in text.splitlines() if re.match(rf"{name}(\{{|\s)", line))
