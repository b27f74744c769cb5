"""How long the kernel was without something: measured by ip(8)'s own monitor, not by us.

``ip -ts monitor`` prints every change that the kernel announces, with the time at which it heard of it. The time from
"Deleted X" to the line that brings X back is how long the host was without it. (An FDB entry appears there as a
neighbour whose address is the remote VTEP's: ``172.30.0.12 dev flannel.1 lladdr … NOARP PERMANENT``.)
"""

from __future__ import annotations

import datetime
import re
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from flanneld.lab.netns import Namespace, end
from flanneld.lab.wait import wait_until

_LINE = re.compile(r"^\[([0-9T:.\-]+)\]\s*(?:\[\w+\])?(Deleted )?(.*)$")
_PROBE = "192.0.2.255"


@dataclass(frozen=True, slots=True)
class KernelEvent:
    """``when`` is epoch seconds; ``text`` is the object as ip(8) prints it."""

    when: float
    deleted: bool
    text: str


def parse_events(text: str) -> list[KernelEvent]:
    """The output of ``ip -ts monitor``; continuation lines are skipped."""
    events = []
    for line in text.splitlines():
        match = _LINE.match(line)
        if match:
            when = datetime.datetime.fromisoformat(match[1]).astimezone().timestamp()
            events.append(KernelEvent(when, match[2] is not None, match[3].strip()))
    return events


class KernelMonitor:
    """What the kernel of a namespace announces about links, addresses, neighbours, FDB entries and routes."""

    def __init__(self, namespace: Namespace) -> None:
        self._directory = tempfile.TemporaryDirectory(prefix="flanneld-monitor-")
        self._log = Path(self._directory.name, "events")
        self._process = namespace.start("ip -ts monitor link address neigh route", log=self._log)

        def heard() -> bool:
            namespace.run(f"ip route add blackhole {_PROBE}/32")
            namespace.run(f"ip route del blackhole {_PROBE}/32")
            return _PROBE in self._log.read_text()

        try:
            wait_until(heard, 5, lambda: f"ip monitor to listen: {self._log.read_text()}")
        except BaseException:
            self.close()
            raise

    def events(self) -> list[KernelEvent]:
        return [event for event in parse_events(self._log.read_text()) if _PROBE not in event.text]

    def close(self) -> None:
        end(self._process)
        self._directory.cleanup()

    def __enter__(self) -> KernelMonitor:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def healed_after(events: Sequence[KernelEvent], gone: str, back: Sequence[str]) -> float | None:
    """Seconds from the first "Deleted ``gone``" until every one of ``back`` was there to stay; None while some is not.

    ``gone`` and ``back`` are regular expressions for the beginning of the line. What came back before the last thing
    was deleted does not count: a device goes in steps, and takes with it what was put on it meanwhile.
    """
    deleted = [e for e in events if e.deleted and any(re.match(one, e.text) for one in (gone, *back))]
    lost = next((e.when for e in deleted if re.match(gone, e.text)), None)
    if lost is None:
        return None
    returned = [
        next((e.when for e in events if not e.deleted and e.when >= deleted[-1].when and re.match(one, e.text)), None)
        for one in back
    ]
    seen = [when for when in returned if when is not None]
    return max(seen) - lost if len(seen) == len(back) else None


def time_to_heal(
    namespace: Namespace, gone: str, back: Sequence[str], break_it: Callable[[], object], *, timeout: float = 20
) -> float:
    """Break something and measure with ``healed_after``; NotYet names what never came back."""
    with KernelMonitor(namespace) as monitor:
        break_it()

        def missing() -> str:
            events = monitor.events()
            absent = [one for one in back if healed_after(events, gone, [one]) is None]
            return f"back in the kernel of {namespace.label}: {', '.join(absent)}"

        wait_until(lambda: healed_after(monitor.events(), gone, back) is not None, timeout, missing, interval=0.01)
        found = healed_after(monitor.events(), gone, back)
        assert found is not None
        return found
