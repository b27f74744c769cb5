"""What is logged of a condition, and how often."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from flanneld.status import WAITING, Health, item, write_status_file


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


def away(detail: str) -> dict[str, str]:
    return {"reason": f"etcd cannot be reached: {detail}", "fault": "unavailable"}


@pytest.mark.parametrize("first", ["lease", "store"])
def test_one_fault_that_two_meet_is_one_line_one_reason_and_one_end(first: str) -> None:
    health = Health()
    second = {"lease": "store", "store": "lease"}[first]
    with capture_logs() as logs:
        health.set(first, **away("refused"))
        health.set(second, **away("no route"))
        health.set(first, **away("no answer"))
        shown = [reason for reason in health.reasons if "etcd" in reason]
        assert shown == [f"lease: {health.reason('lease')}"]
        health.set(first, None)
        assert lines(logs) == [("error", "etcd cannot be reached: refused")], "the second still suffers from it"
        assert f"{second}: etcd cannot be reached: no route" in health.reasons
        health.set(second, None)
    assert lines(logs) == [("error", "etcd cannot be reached: refused"), ("info", "recovered")]


def test_another_fault_of_the_second_is_another_line_and_reason() -> None:
    health = Health()
    with capture_logs() as logs:
        health.set("lease", **away("refused"))
        health.set("store", "etcd denies to watch", fault="denied")
        assert [reason.partition(":")[0] for reason in health.reasons] == ["lease", "store", "kernel"]
        health.set("lease", None)
        health.set("store", **away("refused"))
        health.set("lease", **away("refused"))
        health.set("store", "etcd denies to watch", fault="denied")
        health.set("lease", None)
        health.set("store", None)
    assert lines(logs) == [
        ("error", "etcd cannot be reached: refused"),
        ("error", "etcd denies to watch"),
        ("info", "recovered"),
        ("error", "etcd cannot be reached: refused"),
        ("error", "etcd denies to watch"),
        ("info", "recovered"),
        ("info", "recovered"),
    ]


def test_what_leaves_the_packets_alone_makes_a_node_unready_but_not_broken() -> None:
    health = Health()
    for condition in WAITING:
        health.set(condition, None)
    health.set("stored_config", "bad")
    health.set("store", "gone")
    assert not health.ready
    assert health.broken() == ()
    health.set("kernel", "no room")
    health.set("lease", "lost")
    assert health.broken() == ("lease: lost", "kernel: no room")
    assert health.broken("lease") == ("kernel: no room",)


def test_every_change_is_told_to_whoever_writes_the_status_file() -> None:
    told = []
    health = Health(lambda: told.append(health.reason("store")))
    health.set("store", "a", quiet=True)
    health.set("store", "b", fault="x")
    health.set("store", None)
    assert told == ["a", "b", None]


def test_the_status_file_is_replaced_at_once_readable_by_all_and_uses_up_what_a_crash_left(tmp_path: Path) -> None:
    path = tmp_path / "run" / "flanneld-status.json"
    write_status_file(path, {"ready": False})
    (path.parent / ".flanneld-status.json.tmp").write_text("half")
    (path.parent / ".flanneld-status.json.tmp").chmod(0o600)
    write_status_file(path, {"ready": True})
    assert path.read_text() == '{"ready":true}\n'
    assert stat.S_IMODE(path.stat().st_mode) == 0o644
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_the_status_file_is_not_written_through_a_link_that_somebody_planted(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("theirs")
    path = tmp_path / "flanneld-status.json"
    path.with_name(".flanneld-status.json.tmp").symlink_to(victim)
    with pytest.raises(OSError):
        write_status_file(path, {"ready": True})
    assert victim.read_text() == "theirs"
    write_status_file(path, {"ready": True})
    assert victim.read_text() == "theirs"


def test_further_lines_of_a_reason_do_not_look_like_reasons() -> None:
    assert item("lease: no lease yet") == "- lease: no lease yet"
    assert item("underlay: no match\ninterfaces seen:\n  eth0: usable") == (
        "- underlay: no match\n  interfaces seen:\n    eth0: usable"
    )
