"""Wait for a state instead of sleeping for a guess."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from functools import cache
from typing import Final, TypeVar

T = TypeVar("T")

patience = 1.0
"""What a timeout is multiplied by that says when to give up, and promises nothing. The tests set it."""


class Promised(float):
    """Seconds within which users are promised a state. They are never multiplied; see ``clock``."""


class _Heart(threading.Thread):
    """Sleeps for a moment, again and again; what it oversleeps is time that this machine gave to nobody here."""

    BEAT: Final = 0.05

    def __init__(self) -> None:
        super().__init__(name="heart", daemon=True)
        self.stalled = 0.0
        self.start()

    def run(self) -> None:
        while True:
            began = time.monotonic()
            time.sleep(self.BEAT)
            late = time.monotonic() - began - self.BEAT
            if late > self.BEAT:
                self.stalled += late


@cache
def _heart() -> _Heart:
    return _Heart()


def clock() -> float:
    """Seconds as time.monotonic() counts them, less those for which the machine was seen to stand still."""
    return time.monotonic() - _heart().stalled


class NotYet(AssertionError):
    """What was awaited did not come true in time; the text says what it was and what was there instead."""


def wait_until(
    predicate: Callable[[], T],
    timeout: float = 10,
    message: str | Callable[[], str] = "the awaited state",
    interval: float = 0.02,
) -> T:
    """Ask until ``predicate`` answers with something true; that answer.

    ``timeout`` (times ``patience``, unless it is ``Promised``) and ``interval`` are seconds. An AssertionError, OSError
    or CommandFailed (a RuntimeError) inside the predicate means "not yet". NotYet holds the message, which may be a
    function that looks at the end state, and the predicate's last answer.
    """
    if not isinstance(timeout, Promised):
        timeout *= patience
    deadline = clock() + timeout
    while True:
        last: object
        try:
            answer = predicate()
            if answer:
                return answer
            last = answer
        except (AssertionError, OSError, RuntimeError) as error:
            last = error
        if clock() >= deadline and not _stood_still(deadline):
            text = message if isinstance(message, str) else message()
            raise NotYet(f"not within {timeout:g} s: {text} (last answer: {last!r})")
        time.sleep(interval)


def _stood_still(deadline: float) -> bool:
    """Whether it is not that late: after a stall, the heart may beat later than we look at the clock."""
    time.sleep(2 * _Heart.BEAT)
    return clock() - 2 * _Heart.BEAT < deadline
