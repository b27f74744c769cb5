"""What our chains and tables are called, so that flanneld's are taken over and two daemons on one host do not meet."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from typing import Final, Literal

Family = Literal[4, 6]
FAMILIES: Final[tuple[Family, Family]] = (4, 6)

_PLAIN: Final = re.compile(r"[A-Za-z0-9_.][A-Za-z0-9_.-]{0,11}")


@dataclass(frozen=True, slots=True)
class Names:
    """The names of one instance. "" is the first daemon of a host and has flannel's own names.

    iptables allows chain names of at most 28 characters (XT_EXTENSION_MAXNAMELEN in x_tables.h).
    """

    masq_chain: str
    forward_chain: str
    masq_comment: str
    forward_comment: str
    tables: tuple[str, str]

    def table(self, family: Family) -> str:
        """The nftables table of a family."""
        return self.tables[0] if family == 4 else self.tables[1]

    @property
    def chains(self) -> tuple[str, str]:
        return (self.masq_chain, self.forward_chain)

    @property
    def comments(self) -> tuple[str, str]:
        return (self.masq_comment, self.forward_comment)


def names_of(instance: str) -> Names:
    """The names of an instance. A name that is too long, or has letters that iptables refuses, is hashed."""
    if not instance:
        return Names(
            "FLANNEL-POSTRTG", "FLANNEL-FWD", "flanneld masq", "flanneld forward", ("flannel-ipv4", "flannel-ipv6")
        )
    short = instance if _PLAIN.fullmatch(instance) else hashlib.sha256(instance.encode()).hexdigest()[:12]
    return Names(
        f"FLANNEL-POSTRTG-{short}",
        f"FLANNEL-FWD-{short}",
        f"flanneld masq {short}",
        f"flanneld forward {short}",
        (f"flannel-ipv4-{short}", f"flannel-ipv6-{short}"),
    )
