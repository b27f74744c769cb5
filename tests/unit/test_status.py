"""What is logged of a condition, and how often."""

from __future__ import annotations

import pytest
from structlog.testing import capture_logs

from flanneld.status import WAITING, Health


def lines(logs) -> list[tuple[str, str]]:
    return [(line["log_level"], line["event"]) for line in logs]


def test_a_fault_that_lasts_is_one_line_and_its_end_another() -> None:
    health = Health()
    with capture_logs() as logs:
        health.set("kernel", "no room")
        health.set("kernel", "no room")
        health.set("kernel", None)
        health.set("kernel", None)
    assert lines(logs) == [("error", "no room"), ("info", "recovered")]


def test_a_text_that_varies_while_the_fault_lasts_is_shown_but_not_logged_again() -> None:
    health = Health()
    with capture_logs() as logs:
        for detail in ("refused", "no route", "refused"):
            health.set("lease", f"etcd does not answer: {detail}", fault="unavailable")
        assert "lease: etcd does not answer: refused" in health.reasons
        health.set("lease", "permission denied", fault="access_denied")
    assert lines(logs) == [("error", "etcd does not answer: refused"), ("error", "permission denied")]


@pytest.mark.parametrize("condition", sorted(WAITING))
def test_waiting_is_a_reason_but_no_event(condition: str) -> None:
    health = Health()
    with capture_logs() as logs:
        health.set(condition, None)
        health.set(condition, WAITING[condition])
        assert not health.ready
        health.set(condition, None)
    assert not logs


def test_what_somebody_else_logs_is_not_logged_twice() -> None:
    health = Health()
    with capture_logs() as logs:
        health.set("store", "gone", quiet=True)
        assert "store: gone" in health.reasons
        health.set("store", None)
    assert not logs


def test_every_change_is_told_to_whoever_writes_the_status_file() -> None:
    told = []
    health = Health(lambda: told.append(health.reason("store")))
    health.set("store", "a", quiet=True)
    health.set("store", "b", fault="x")
    health.set("store", None)
    assert told == ["a", "b", None]
