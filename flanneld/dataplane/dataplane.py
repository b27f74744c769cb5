"""The dataplane that the reconciler is given: observe, apply, wait.

The kernel is looked at in full once; afterwards the mirror follows the kernel's messages and our acknowledged writes.
Where the kernel changes state without a word (routes of an interface that goes down or loses an address), the
interface concerned is looked at again.

Everything runs in the thread that made the object, in the network namespace of that moment, except ``wake``.
"""

from __future__ import annotations

import os
import select
import time
from collections.abc import Sequence
from itertools import groupby
from typing import Any, Literal

from backends.kernel_state import (
    Address,
    Change,
    Failure,
    FdbEntry,
    Key,
    Link,
    Neighbour,
    Observation,
    Route,
    RouteLookup,
    Scope,
    Sysctl,
)
from flanneld.dataplane.announce import Announcer
from flanneld.dataplane.follow import Follower
from flanneld.dataplane.handler import Answer, Handler
from flanneld.dataplane.look import Look
from flanneld.dataplane.mirror import with_settings_of
from flanneld.dataplane.netlink import MONITOR_BUFFER, Monitor, Netlink, own_changes_left_out
from flanneld.dataplane.sysctl import Sysctls
from flanneld.dataplane.view import View
from flanneld.dataplane.write import Writer

_RTNETLINK = frozenset({Address, FdbEntry, Neighbour, Route})


class Dataplane:
    """One host's kernel networking state. ``handlers`` take the records that rtnetlink does not know."""

    def __init__(self, handlers: Sequence[Handler] = (), *, monitor_buffer: int = MONITOR_BUFFER) -> None:
        self._handlers = tuple(handlers)
        self._answers = [Answer() for _ in self._handlers]
        self._made_links: list[dict[Key, Link]] = [{} for _ in self._handlers]
        """The Link records in these answers."""
        self._sysctls = Sysctls()
        self._sysctl_keys: set[Key] = set()
        self._netlink = Netlink()
        self._monitor = Monitor(own_changes_left_out(self._netlink.port_id), receive_buffer=monitor_buffer)
        self._view = View()
        self._follower = Follower(self._monitor, self._view)
        self._look = Look(self._netlink, self._follower, self._view)
        self._writer = Writer(self._netlink, self._follower, self._look, self._view)
        self._announcer = Announcer()
        self._closed = False
        self._wakeup = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)

    def observe(self, scope: Scope) -> Observation:
        """What is in the kernel now. ``state`` is live: valid until the next call of observe or apply.

        Raises OSError when the kernel cannot be asked.
        """
        self._view.limit_to(scope.devices, scope.networks, scope.marked_routes)
        fresh = self._look.refresh()
        self._announcer.follow(scope.sources, self._view.interfaces)
        mirror = self._view.mirror
        sysctls = self._sysctls.observe(scope.sysctls)
        for key in self._sysctl_keys | sysctls.keys():
            mirror.learn(key, sysctls.get(key))
        self._sysctl_keys = set(sysctls)
        self._ask_handlers(scope)
        changed = mirror.take_changed()
        return Observation(mirror.state, None if fresh else changed, self._view.interfaces.snapshot())

    def apply(self, changes: Sequence[Change]) -> list[Failure]:
        """Make the changes, in order; those that failed."""
        failures: list[Failure] = []
        for (handler, step), group in groupby(changes, self._route_of):
            run = list(group)
            if step == "link":
                failures += self._apply_links(handler, run)
            elif step == "sysctl":
                failures += self._apply_sysctls(run)
            elif handler is not None:
                failures += handler.apply(run)
            else:
                failures += self._writer.batch(run)
        return failures

    def lookup(self, address: str) -> RouteLookup | None:
        """How the kernel would reach this address; None if it would not."""
        return self._look.route_to(address)

    def default_routes(self, family: int) -> tuple[RouteLookup, ...]:
        """The default routes of the family (4 or 6), the one in use first."""
        return self._look.default_routes(family)

    def wait(self, timeout: float | None) -> None:
        """Until something that concerns us has changed, ``wake`` is called, or ``timeout`` (seconds) is over."""
        deadline = None if timeout is None else time.monotonic() + timeout
        poll = select.poll()
        poll.register(self._wakeup, select.POLLIN)
        poll.register(self._monitor, select.POLLIN)
        for handler in self._handlers:
            if (descriptor := handler.fileno()) is not None:
                poll.register(descriptor, select.POLLIN)
        while self._look.blind or not self._view.pending:
            left = None if deadline is None else max(0.0, deadline - time.monotonic())
            ready = {descriptor for descriptor, _ in poll.poll(None if left is None else left * 1000)}
            if self._wakeup in ready:
                os.eventfd_read(self._wakeup)
                return
            if not ready or ready - {self._monitor.fileno()}:
                return
            self._follower.drain()

    def wake(self) -> None:
        """End a ``wait``, the present one or the next. From any thread."""
        if not self._closed:
            os.eventfd_write(self._wakeup, 1)

    def invalidate(self) -> None:
        """Trust nothing that is remembered: the next observe looks at everything."""
        self._view.stale.everything = True
        for handler in self._handlers:
            handler.invalidate()

    def status(self) -> dict[str, Any]:
        """What handlers have to say about the devices that they make, by device name. From any thread."""
        told: dict[str, Any] = {}
        for handler in self._handlers:
            told |= getattr(handler, "status", dict)()
        return told

    def close(self) -> None:
        """Let go of sockets; the kernel keeps its state. Twice does no harm."""
        if self._closed:
            return
        self._closed = True
        for handler in self._handlers:
            handler.close()
        for part in (self._writer, self._view, self._monitor, self._netlink):
            part.close()
        os.close(self._wakeup)

    # --- handlers --------------------------------------------------------------------------------------------------

    def _route_of(self, change: Change) -> tuple[Handler | None, Literal["link", "sysctl", "handler", "netlink"]]:
        record = change.record
        if type(record) in _RTNETLINK:
            return None, "netlink"
        handler = next((handler for handler in self._handlers if handler.handles(record)), None)
        if isinstance(record, Link):
            return handler, "link"
        if isinstance(record, Sysctl):
            return None, "sysctl"
        return handler, "netlink" if handler is None else "handler"

    def _ask_handlers(self, scope: Scope) -> None:
        """Merge what the handlers see into the mirror; a Link of theirs gives its settings to rtnetlink's."""
        mirror, links = self._view.mirror, self._view.links
        for number, handler in enumerate(self._handlers):
            before, now = self._answers[number], handler.observe(scope, links)
            self._answers[number] = now
            made = self._made_links[number]
            for key in now.differences(before):
                record = now.get(key)
                if isinstance(record, Link):
                    made[key] = record
                elif record is None and key in made:
                    mirror.learn(key, links.get(made.pop(key).name))
                else:
                    mirror.learn(key, record)
            # At each pass: rtnetlink may have shown them again, without the settings that only the handler can read.
            for key, link in made.items():
                if link.name in links:
                    mirror.learn(key, with_settings_of(links[link.name], link))

    def _apply_links(self, handler: Handler | None, changes: Sequence[Change]) -> list[Failure]:
        failures: list[Failure] = []
        for change in changes:
            if handler is not None:
                refused = handler.apply([change])
                failures += refused
                if refused:
                    continue
            failure = self._writer.link(change, made_elsewhere=handler is not None)
            if failure is not None:
                failures.append(failure)
        return failures

    def _apply_sysctls(self, changes: Sequence[Change]) -> list[Failure]:
        failures: list[Failure] = []
        for change in changes:
            failure = self._sysctls.apply(change)
            if failure is not None:
                failures.append(failure)
            elif change.op == "put":
                self._view.mirror.know(change.record.key, change.record)
        return failures
