"""The one loop that makes the kernel equal to the desired state; the only caller of ``apply``.

A trigger carries no data: it only says "look again". Guarantees:

* After the last trigger there is at least one pass that began later than it.
* Passes begin at least ``Intervals.minimum`` seconds apart, so that a burst of triggers costs one pass.
* A change that failed is tried again after ``retry`` seconds, doubling up to ``retry_limit``; each try looks anew, and
  what else happens meanwhile does not wait for it.
* Without triggers there is a look at least every ``tick`` seconds, a full one every ``resync`` seconds.
* A failed change does not stop others; what depends on it is skipped in this pass.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

from backends.kernel_state import (
    Change,
    Failure,
    Interface,
    KernelState,
    Key,
    Kind,
    Observation,
    Scope,
)
from flanneld.plan import Owned, dependencies, plan

BULK = (Kind.FDB, Kind.NEIGHBOUR, Kind.ROUTE)


class Dataplane(Protocol):
    """The kernel, as the reconciler sees it. All but ``wake`` are called from the reconciler's thread."""

    def observe(self, scope: Scope) -> Observation: ...
    def apply(self, changes: Sequence[Change]) -> list[Failure]: ...
    def wait(self, timeout: float | None) -> None: ...
    def wake(self) -> None: ...
    def invalidate(self) -> None: ...


@dataclass(frozen=True, slots=True)
class Wanted:
    """The answer to "what should be?": ``changed`` are keys that differ from the last answer, None for all."""

    state: KernelState
    scope: Scope
    changed: frozenset[Key] | None
    owned: Owned
    again_at: float | None = None
    """When the answer will be another one by itself, on the reconciler's clock."""


@dataclass(frozen=True, slots=True)
class Intervals:
    """Seconds."""

    minimum: float = 0.003
    retry: float = 0.1
    retry_limit: float = 5.0
    tick: float = 5.0
    resync: float = 300.0
    strangers: float = 1.0
    """Between a failure and a try because another device came or went."""
    fight: float = 0.25
    """Pause after a pass of nothing but repairs, if the passes before it were the same: somebody writes against us."""


@dataclass(frozen=True, slots=True)
class PassResult:
    """What one pass did. ``changes`` succeeded; ``repairs``, among them, are those that nobody had asked for."""

    changes: tuple[Change, ...] = ()
    repairs: tuple[Change, ...] = ()
    failures: tuple[Failure, ...] = ()
    skipped: int = 0
    seconds: float = 0.0
    blind: str = ""
    """Why the kernel could not be observed, "" when it could."""
    complete: bool = False
    """Whether a desired state was known and is now true, as far as a look after the last write tells."""
    full: bool = False


@dataclass(slots=True)
class _Progress:
    scope: Scope = field(default_factory=Scope)
    dirty: set[Key] | None = None
    """Keys that may differ; None: all."""
    failed: set[Key] = field(default_factory=set)
    """Keys whose change failed or was skipped; they wait for ``retry_at``."""
    retry_at: float = 0.0
    retry_in: float = 0.0
    next_resync: float = 0.0
    again_at: float | None = None
    interfaces: tuple[Interface, ...] = ()
    """As last seen."""
    repair_streak: int = 0
    settled: bool = False
    """Whether the desired state has been true once: from then on, unasked changes are repairs."""


class Reconciler:
    """``wanted`` is asked at each pass, in this thread; None means "not known yet": then nothing is touched."""

    def __init__(
        self,
        dataplane: Dataplane,
        wanted: Callable[[Observation], Wanted | None],
        report: Callable[[PassResult], None],
        intervals: Intervals = Intervals(),
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._dataplane = dataplane
        self._wanted = wanted
        self._report = report
        self._intervals = intervals
        self._clock = clock
        self._progress = _Progress()
        self._everything = False

    def trigger(self) -> None:
        """Look again soon. From any thread."""
        self._dataplane.wake()

    def look_at_everything(self) -> None:
        """As after ``resync`` seconds, but now. From any thread."""
        self._everything = True
        self._dataplane.wake()

    def run(self, stopped: Callable[[], bool]) -> None:
        """Passes until ``stopped``; wake it with ``trigger``."""
        progress = self._progress
        progress.next_resync = self._clock() + self._intervals.resync
        while not stopped():
            began = self._clock()
            if began >= progress.next_resync or self._everything:
                self._everything = False
                self._dataplane.invalidate()
                progress.next_resync = began + self._intervals.resync
            self.one_pass()
            self._dataplane.wait(self._timeout())
            # Let a burst gather, and do not spin where somebody writes against us.
            fight = progress.repair_streak > 3
            spent = self._clock() - began
            time.sleep(max(0.0, (self._intervals.fight if fight else self._intervals.minimum) - spent))

    def one_pass(self) -> PassResult:
        """Observe, ask, plan, apply, report."""
        began = self._clock()
        result = self._attempt(began)
        result = replace(result, seconds=self._clock() - began)
        self._schedule_retry(result)
        only_repairs = bool(result.repairs) and len(result.repairs) == len(result.changes)
        self._progress.repair_streak = self._progress.repair_streak + 1 if only_repairs else 0
        self._report(result)
        return result

    def _schedule_retry(self, result: PassResult) -> None:
        progress = self._progress
        if result.failures or result.blind:
            progress.retry_in = min((progress.retry_in or self._intervals.retry / 2) * 2, self._intervals.retry_limit)
            progress.retry_at = self._clock() + progress.retry_in
        elif not progress.failed:
            progress.retry_in = 0.0

    def _timeout(self) -> float:
        """Seconds until the next look that nothing triggers."""
        progress, now = self._progress, self._clock()
        due = [now + self._intervals.tick, progress.next_resync]
        if progress.retry_in:
            due.append(progress.retry_at)
        if progress.again_at is not None:
            due.append(progress.again_at)
        return max(0.0, min(due) - now)

    def _attempt(self, now: float) -> PassResult:
        progress = self._progress
        try:
            observed = self._dataplane.observe(progress.scope)
            wanted = self._wanted(observed)
            if wanted is None:
                progress.dirty = None
                return PassResult()
            if wanted.scope != progress.scope:
                progress.scope = wanted.scope
                observed = self._dataplane.observe(wanted.scope)
        except OSError as error:
            progress.dirty = None
            return PassResult(blind=f"cannot look at the kernel: {error}")
        progress.again_at = wanted.again_at
        keys = self._keys(observed, wanted, now)
        changes = plan(wanted.state, observed.state, wanted.owned, keys) if keys is None or keys else []
        failures, skipped = self._apply(changes)
        unfinished = {f.change.record.key for f in failures} | skipped
        progress.failed = unfinished | (progress.failed - (keys if keys is not None else progress.failed))
        # What was written is looked at once more: the kernel, or a tool, may have understood it otherwise. Entries by
        # the thousand are left out: each has its acknowledgement, and what they became is told by the monitor.
        before, progress.dirty = (
            progress.dirty,
            {c.record.key for c in changes if c.record.kind not in BULK} - unfinished,
        )
        if progress.dirty:
            self._dataplane.wake()
        done = tuple(c for c in changes if c.record.key not in unfinished) if unfinished else tuple(changes)
        repairs: tuple[Change, ...] = ()
        if progress.settled and wanted.changed is not None:
            repairs = tuple(c for c in done if c.record.key not in wanted.changed)
        # Unless it is written pass after pass, against somebody or something: that must not keep the node from its work.
        complete = not progress.failed and not progress.dirty - (before or set())
        progress.settled = progress.settled or not progress.failed
        return PassResult(
            changes=done,
            repairs=repairs,
            failures=tuple(failures),
            skipped=len(skipped),
            complete=complete,
            full=keys is None,
        )

    def _keys(self, observed: Observation, wanted: Wanted, now: float) -> set[Key] | None:
        """The keys to compare, None for all."""
        progress = self._progress
        moved, progress.interfaces = observed.interfaces is not progress.interfaces, observed.interfaces
        if progress.dirty is None or observed.changed is None or wanted.changed is None:
            return None
        keys = progress.dirty | observed.changed | wanted.changed
        # A device that came or went is often why something failed a moment ago. A stranger's, too, but those of
        # containers come and go all the time.
        moved = moved and now >= progress.retry_at - progress.retry_in + self._intervals.strangers
        if now >= progress.retry_at or moved or any(key[0] == Kind.LINK for key in keys):
            keys |= progress.failed
        return keys

    def _apply(self, changes: Sequence[Change]) -> tuple[list[Failure], set[Key]]:
        """Apply kind by kind, skipping what depends on a failure."""
        failures: list[Failure] = []
        failed: set[Key] = set()
        skipped: set[Key] = set()
        start = 0
        while start < len(changes):
            end = start
            stage = (changes[start].op, changes[start].record.kind)
            while end < len(changes) and (changes[end].op, changes[end].record.kind) == stage:
                end += 1
            batch = changes[start:end]
            if failed:
                kept = [c for c in batch if failed.isdisjoint(dependencies(c))]
                left = {c.record.key for c in batch} - {c.record.key for c in kept}
                skipped |= left
                failed |= left
                batch = kept
            news = self._dataplane.apply(batch) if batch else []
            failures += news
            failed |= {f.change.record.key for f in news}
            start = end
        return failures, skipped
