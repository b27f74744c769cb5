"""What the tests wait with: promised times are held, and a machine that stood still is not held against anybody."""

from __future__ import annotations

import threading
import time

import pytest

from flanneld.lab import wait
from flanneld.lab.wait import NotYet, Promised, clock, wait_until


def test_patience_is_for_limits_and_not_for_promises(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wait, "patience", 3.0)
    with pytest.raises(NotYet, match=r"not within 0\.05 s: the promise \(last answer: 0\)"):
        wait_until(lambda: 0, Promised(0.05), "the promise")
    began = time.monotonic()
    with pytest.raises(NotYet, match=r"not within 0\.3 s: the limit"):
        wait_until(lambda: 0, 0.1, "the limit")
    assert time.monotonic() - began >= 0.3


def test_a_stall_that_the_heart_has_seen_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    before = clock()
    monkeypatch.setattr(wait._heart(), "stalled", wait._heart().stalled + 30)
    assert clock() < before - 20
    answers = iter([0, 0, 0, 1])
    assert wait_until(lambda: next(answers), Promised(5)) == 1


def test_a_stall_that_the_heart_sees_after_us_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    heart = wait._heart()
    assert not wait._stood_still(clock() - 0.05)
    beat = threading.Timer(0.02, lambda: monkeypatch.setattr(heart, "stalled", heart.stalled + 1))
    beat.start()
    assert wait._stood_still(clock() - 0.05)
    beat.join()
