"""Wait for a state instead of sleeping for a guess."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")

patience = 1.0
"""What every timeout is multiplied by, for a machine that does something else meanwhile. The tests set it."""


class NotYet(AssertionError):
    """What was awaited did not come true in time; the text says what it was and what was there instead."""


def wait_until(
    predicate: Callable[[], T],
    timeout: float = 10,
    message: str | Callable[[], str] = "the awaited state",
    interval: float = 0.02,
) -> T:
    """Ask until ``predicate`` answers with something true; that answer.

    ``timeout`` (times ``patience``) and ``interval`` are seconds. An AssertionError, OSError or CommandFailed (a RuntimeError) inside the
    predicate means "not yet". NotYet holds the message, which may be a function that looks at the end state, and the
    predicate's last answer.
    """
    timeout *= patience
    deadline = time.monotonic() + timeout
    while True:
        last: object
        try:
            answer = predicate()
            if answer:
                return answer
            last = answer
        except (AssertionError, OSError, RuntimeError) as error:
            last = error
        if time.monotonic() >= deadline:
            text = message if isinstance(message, str) else message()
            raise NotYet(f"not within {timeout:g} s: {text} (last answer: {last!r})")
        time.sleep(interval)
