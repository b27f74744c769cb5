"""Pings as values: how many were sent, how many came back, how long they took, and when none came."""

from __future__ import annotations

import itertools
import os
import re
import signal
import subprocess
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

from flanneld.lab.netns import Namespace, end

_SUMMARY = re.compile(r"(\d+) packets transmitted, (\d+) received")
_RTT = re.compile(r"= ([\d.]+)/([\d.]+)/([\d.]+)/")
_REPLY = re.compile(r"^\[([\d.]+)\] .*icmp_seq=(\d+) .*time=([\d.]+) ms", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class PingResult:
    """``rtt_*`` are milliseconds, None when nothing came back. ``arrivals`` are (epoch seconds, sequence number)."""

    sent: int
    received: int
    rtt_min: float | None = None
    rtt_avg: float | None = None
    rtt_max: float | None = None
    arrivals: tuple[tuple[float, int], ...] = ()
    text: str = ""

    @property
    def lost(self) -> int:
        return self.sent - self.received

    @property
    def ok(self) -> bool:
        """Every packet came back."""
        return self.sent > 0 and self.lost == 0

    @property
    def longest_gap(self) -> float:
        """The longest time between two replies, in seconds."""
        times = [when for when, _ in self.arrivals]
        return max((b - a for a, b in itertools.pairwise(times)), default=0.0)


def parse_ping(text: str) -> PingResult:
    """Read the output of iputils ping; without a summary nothing was sent."""
    summary, rtt = _SUMMARY.search(text), _RTT.search(text)
    low, mean, high = (float(value) for value in rtt.groups()) if rtt else (None, None, None)
    return PingResult(
        sent=int(summary[1]) if summary else 0,
        received=int(summary[2]) if summary else 0,
        rtt_min=low,
        rtt_avg=mean,
        rtt_max=high,
        arrivals=tuple((float(when), int(seq)) for when, seq, _ in _REPLY.findall(text)),
        text=text,
    )


def ping(
    namespace: Namespace,
    target: str,
    *,
    count: int = 1,
    interval: float = 0.1,
    size: int = 56,
    dont_fragment: bool = False,
    wait: float = 1,
    source: str | None = None,
    fill: bytes = b"",
) -> PingResult:
    """Ping from a namespace. ``size`` is the payload in bytes (an IPv4 packet is 28 more); ``wait`` for each reply.

    ``fill``, of up to 16 bytes, is repeated as the payload, so that it can be looked for on the way.
    """
    argv = ["ping", "-n", "-D", "-c", str(count), "-i", f"{interval:g}", "-s", str(size), "-W", f"{wait:g}"]
    argv += ["-M", "do"] if dont_fragment else []
    argv += ["-I", source] if source else []
    argv += ["-p", fill.hex()] if fill else []
    return parse_ping(namespace.run([*argv, target], check=False, timeout=count * interval + wait + 10))


class PingStream:
    """A ping that runs beside the test, 100 a second by default. ``stop`` ends it and says what happened."""

    def __init__(self, namespace: Namespace, target: str, *, interval: float = 0.01, size: int = 56) -> None:
        handle, name = tempfile.mkstemp(prefix="flanneld-ping-")
        self._log = Path(name)
        argv = ["ping", "-n", "-D", "-i", f"{interval:g}", "-s", str(size), "-W", "1", target]
        with os.fdopen(handle, "wb") as out:
            self.process = subprocess.Popen(
                namespace.argv(argv),
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def replies(self) -> tuple[tuple[float, int], ...]:
        """The replies so far, as (epoch seconds, sequence number)."""
        return parse_ping(self._log.read_text()).arrivals

    def stop(self) -> PingResult:
        """End the ping as Ctrl-C does, so that it prints its summary. May be called once.

        Packets after the last one that was answered were still on their way; they count as not sent.
        """
        end(self.process, signal.SIGINT)
        text = self._log.read_text()
        self._log.unlink()
        result = parse_ping(text)
        last = max((number for _, number in result.arrivals), default=result.sent)
        return replace(result, sent=min(result.sent, last))

    def __enter__(self) -> PingStream:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            end(self.process, signal.SIGINT)
        self._log.unlink(missing_ok=True)
