"""What gRPC says of a connection that failed, in words that name the remedy.

tests/store/test_etcd_tls.py and test_etcd_access.py provoke it.

gRPC has one code for all of it (UNAVAILABLE) and tells the reason in a text of its own, which changes now and then: what
is not recognised is shown as it is.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

from subnet_lease.etcd_tls import TlsFiles
from subnet_lease.store import AccessDenied, StoreError, StoreUnavailable

CHECK: Final = "check that it runs and that --etcd-endpoints names it"


class Unreachable(StoreUnavailable):
    """Nobody listens there. It says less than any other failure: where there was one of those, that is told instead."""


class UnknownName(Unreachable):
    """A name without an address: that does not go by itself, so it is told rather than that nobody listens elsewhere."""


@dataclass(frozen=True, slots=True)
class Circumstances:
    """What the sentences name: the endpoint that failed, all that were tried, and the TLS files in use."""

    at: str
    tried: str
    tls: TlsFiles

    @property
    def host(self) -> str:
        return re.sub(r"^https?://|:\d+/?$", "", self.at)

    def fill(self, sentence: str) -> str:
        return sentence.format(
            at=self.at,
            host=self.host,
            authority=f"--etcd-cafile {self.tls.cafile}" if self.tls.cafile else "one of the system's authorities",
            wish=(
                f"it may not accept the client certificate --etcd-certfile {self.tls.certfile} (another authority's, or expired)"
                if self.tls.certfile
                else "it may want a client certificate (--etcd-certfile, --etcd-keyfile)"
            ),
        )


_NOT_ETCD: Final = (StoreUnavailable, "what answers at {at} is not etcd; correct --etcd-endpoints")
_TLS_CLOSED: Final = (AccessDenied, "etcd at {at} closed the TLS connection: {wish}")
_NO_TLS: Final = (
    StoreUnavailable,
    "etcd at {at} does not answer with TLS: does it speak http? Then write http:// in --etcd-endpoints. If not, it hangs",
)
_PLAIN_CLOSED: Final = (
    StoreUnavailable,
    "etcd at {at} closes the connection at once: does it speak https? Then write https:// in --etcd-endpoints",
)
_RENEW: Final = "renew it, or set the clock of this host"

_SENTENCES: Final[tuple[tuple[str, tuple[type[StoreError], str]], ...]] = (
    ("certificate has expired", (AccessDenied, "etcd's certificate at {at} has expired; " + _RENEW)),
    ("certificate is not yet valid", (AccessDenied, "etcd's certificate at {at} is not valid yet; " + _RENEW)),
    (
        "CERTIFICATE_VERIFY_FAILED",
        (
            AccessDenied,
            "etcd's certificate at {at} is not signed by {authority}; name who did sign it with --etcd-cafile",
        ),
    ),
    (
        "Hostname Verification Check failed",
        (AccessDenied, "etcd's certificate does not name {host}; use a name that it holds in --etcd-endpoints"),
    ),
    ("Unwrap failed", _TLS_CLOSED),
    ("Handshake read failed", _NO_TLS),
    ("Failed parsing HTTP/2", _NOT_ETCD),
)
"""What gRPC's text holds, and what that means; the first that fits counts."""

_NEVER_UP: Final = "failed to connect to all addresses; last error: "
_REASONS: Final = (
    re.compile(r"Failed to connect to remote host: (?:getsockopt\(SO_ERROR\): )?(.*)"),
    re.compile(r"connect failed: .* error: (.*)"),
    re.compile(r"\w+: ipv[46]:\S+ (?:socket: )?(.*)"),
)
_UNKNOWN_NAME: Final = re.compile(r"errors resolving (\S+):\d+: .*: ([^:\]]+)")


def explain(detail: str, where: Circumstances) -> StoreError | None:
    """The error for a connection that could not be had; None for what etcd itself said, or for one that broke later."""
    if "http2 header with status" in detail:
        return _error(_NOT_ETCD, where)
    if "etcdserver: no leader" in detail:
        return StoreUnavailable(f"etcd at {where.tried} has no leader: most of its members are away; start them again")
    if unknown := _UNKNOWN_NAME.match(detail):
        return unknown_name(unknown[1], unknown[2], where.tried)
    if not detail.startswith(_NEVER_UP):
        return None
    reason = detail.removeprefix(_NEVER_UP)
    for part, meaning in _SENTENCES:
        if part in reason:
            return _error(meaning, where)
    if "Connection reset" in reason:  # an etcd that is being killed does that, too
        return _unreachable("connection reset", where)
    if "Socket closed" in reason:
        return _error(_TLS_CLOSED if where.at.startswith("https") else _PLAIN_CLOSED, where)
    return _unreachable(_system_word(reason), where)


def _error(meaning: tuple[type[StoreError], str], where: Circumstances) -> StoreError:
    kind, sentence = meaning
    return kind(where.fill(sentence))


def _unreachable(reason: str, where: Circumstances) -> Unreachable:
    return Unreachable(f"etcd at {where.tried} cannot be reached: {reason}; {CHECK}")


def unknown_name(host: str, reason: str, tried: str) -> UnknownName:
    """The error for an endpoint whose name has no address."""
    return UnknownName(
        f"etcd at {tried} cannot be reached: the name {host} cannot be resolved ({reason}); correct it in"
        " --etcd-endpoints, or mend this host's name resolution (/etc/resolv.conf, /etc/hosts)"
    )


def silent(what: str, tried: str, detail: str) -> StoreUnavailable:
    """The error for everything else."""
    if "Stream removed" in detail or "Socket closed" in detail or "recvmsg:" in detail:
        detail = "the connection broke"
    return StoreUnavailable(f"etcd at {tried} does not answer ({what}): {short(detail)}; {CHECK}")


def _system_word(reason: str) -> str:
    """``connection refused`` out of gRPC's ``UNKNOWN: ipv4:10.0.0.1:2379: Failed to connect to …: Connection refused``."""
    for expression in _REASONS:
        if match := expression.search(reason):
            reason = match[1]
            break
    if "handshaker shutdown" in reason or "timed out before" in reason:
        return "no answer"
    # gRPC shows a byte too many of its memory here and there.
    reason = short("".join(c if c.isprintable() and c.isascii() else " " for c in reason))
    return reason[:1].lower() + reason[1:]


def short(detail: str) -> str:
    """On one line, and no longer than an error may be."""
    text = " ".join(detail.split())
    return text if len(text) <= 300 else text[:297] + "..."
