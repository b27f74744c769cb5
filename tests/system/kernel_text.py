"""A host's networking state as the text that an operator would look at."""

from __future__ import annotations

import re

from flanneld.lab.hosts import Host

COMMANDS = {
    "link": "ip -d link show dev {dev}",
    "address": "ip -o addr show dev {dev}",
    "sysctl": "sysctl net/ipv6/conf/{dev}/accept_ra",
    "routes": "ip route show",
    "routes6": "ip -6 route show",
    "neighbours": "ip neigh show dev {dev} nud permanent",
    "fdb": "bridge fdb show dev {dev}",
    "iptables": "iptables-save",
    "ip6tables": "ip6tables-save",
    "nft": "nft list ruleset",
}
_ORDERED = {"iptables", "ip6tables"}

_VOLATILE = (
    (re.compile(r"\[\d+:\d+\]"), "[]"),
    (re.compile(r"^#.*$", re.MULTILINE), ""),
    (re.compile(r"^\d+: ", re.MULTILINE), ""),
    (re.compile(r"\bqlen \d+|promiscuity \d+|allmulti \d+"), ""),
    (re.compile(r"packets \d+ bytes \d+"), ""),
    (re.compile(r"^.*inet6 fe80:.*$", re.MULTILINE), ""),
    # What a TUN device is called before it has ever lost its carrier, and after.
    (re.compile(r"\bstate (UP|UNKNOWN)\b"), "state UP"),
)
_OF_IPTABLES = re.compile(r"table ip6? (filter|mangle|nat|raw|security) ")


def kernel_text(host: Host, *devs: str, only: tuple[str, ...] = tuple(COMMANDS)) -> dict[str, list[str]]:
    """Lines by kind, sorted where the kernel's order means nothing; of devices, flannel.1 unless others are named."""
    found = {}
    for kind in only:
        command = COMMANDS[kind]
        commands = [command.format(dev=dev) for dev in devs or ("flannel.1",)] if "{dev}" in command else [command]
        lines = [line for each in commands for line in _lines(host.run(each, check=False))]
        found[kind] = lines if kind in _ORDERED else _by_table(lines) if kind == "nft" else sorted(lines)
    return found


def _lines(text: str) -> list[str]:
    for pattern, by in _VOLATILE:
        text = pattern.sub(by, text)
    return [line.rstrip() for line in text.splitlines() if line.strip()]


def _by_table(lines: list[str]) -> list[str]:
    """Within a table the order counts; tables stand in the order in which they were made.

    Those of iptables are left out: iptables-save has them, and how nft(8) shows them depends on their order.
    """
    tables: list[list[str]] = []
    for line in lines:
        if line.startswith("table ") or not tables:
            tables.append([])
        tables[-1].append(line)
    return [line for table in sorted(tables) if not _OF_IPTABLES.match(table[0]) for line in table]


def difference(before: dict[str, list[str]], after: dict[str, list[str]]) -> str:
    return "; ".join(
        f"{kind} lacks {[x for x in lines if x not in after[kind]]} has {[x for x in after[kind] if x not in lines]}"
        for kind, lines in before.items()
        if lines != after[kind]
    )


def metric(host: Host, name: str) -> float:
    """The sum of a metric of the host's daemon over its labels."""
    text = host.daemon.get("/metrics").text
    return sum(float(line.rsplit(" ", 1)[1]) for line in text.splitlines() if re.match(rf"{name}(\{{|\s)", line))
