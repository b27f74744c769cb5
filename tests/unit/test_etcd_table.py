"""The fold from etcd's events to snapshots, against a plain dictionary."""

from __future__ import annotations

import subprocess
from types import SimpleNamespace
from typing import Any

import pytest
import structlog
from hypothesis import given
from hypothesis import strategies as st

from subnet_lease.etcd_table import PUT, LeaseReader, SnapshotTable
from subnet_lease.store import StoreStatus
from tests.testbed import counted

CONFIG = b'{"Network":"10.5.0.0/16"}'


def pair(key: str, value: bytes, revision: int) -> Any:
    return SimpleNamespace(key=f"/net/{key}".encode(), value=value, mod_revision=revision, lease=7)


def table(held: frozenset[str] = frozenset()) -> SnapshotTable:
    made = SnapshotTable("/net", StoreStatus(), lambda: held, LeaseReader())
    made.replace([pair("config", CONFIG, 1)], 1)
    return made


def value(number: int | None) -> bytes:
    return b"not JSON" if number is None else b'{"PublicIP":"192.168.0.%d"}' % number


steps = st.lists(
    st.tuples(st.sampled_from(["put", "delete", "list"]), st.integers(1, 4), st.none() | st.integers(1, 9)), max_size=40
)


@given(steps)
def test_events_and_lists_give_what_etcd_holds_and_bad_values_withdraw_nothing(
    script: list[tuple[str, int, int | None]],
) -> None:
    folded = table()
    held: dict[str, tuple[bytes, int]] = {}  # what etcd has
    expected: dict[str, int] = {}  # the last good value of each key that etcd has
    revision = 1
    for verb, number, ip in script:
        revision += 1
        key = f"10.5.{number}.0-24"
        before = folded.snapshot()
        if verb == "put":
            held[key] = (value(ip), revision)
            if ip is not None:
                expected[key] = ip
            told = folded.apply([SimpleNamespace(type=PUT, kv=pair(f"subnets/{key}", value(ip), revision))])
        elif verb == "delete":
            held.pop(key, None)
            expected.pop(key, None)
            told = folded.apply([SimpleNamespace(type=1, kv=pair(f"subnets/{key}", b"", revision))])
        else:
            listed = [pair(f"subnets/{name}", *entry) for name, entry in held.items()]
            told = folded.replace([pair("config", CONFIG, 1), *listed], revision)
        after = folded.snapshot()
        assert before is not None
        assert after is not None
        assert {name: int(lease.attrs.public_ip or 0) & 0xFF for name, lease in after.leases.items()} == expected
        same = {name: id(lease) for name, lease in before.leases.items()} == {
            name: id(lease) for name, lease in after.leases.items()
        }
        assert told is not same  # a reader is told exactly when something changed
        assert after.revision == revision


def test_a_foreign_prefix_beside_ours_is_not_ours() -> None:
    folded = table()
    assert not folded.apply([SimpleNamespace(type=PUT, kv=pair("subnets-old/10.5.1.0-24", value(1), 2))])
    assert folded.leases == {}


def test_after_a_wipe_a_new_owner_replaces_the_lease_that_was_kept() -> None:
    folded = table(held=frozenset({"10.5.1.0-24"}))
    keys = ("10.5.1.0-24", "10.5.2.0-24", "10.5.3.0-24")
    folded.apply([SimpleNamespace(type=PUT, kv=pair(f"subnets/{key}", value(n), 10 + n)) for n, key in enumerate(keys)])
    assert folded.replace([], 3)  # the revision went back: another history
    assert set(folded.leases) == set(keys[1:])  # ours is seen to be gone
    assert folded.next_expiry is not None
    # Another node takes half of what one of them had, another the same subnet with new attributes.
    assert folded.apply([SimpleNamespace(type=PUT, kv=pair("subnets/10.5.2.0-25", value(8), 4))])
    assert folded.apply([SimpleNamespace(type=PUT, kv=pair("subnets/10.5.3.0-24", value(9), 5))])
    assert set(folded.leases) == {"10.5.2.0-25", "10.5.3.0-24"}
    assert folded.next_expiry is None


def test_after_a_wipe_each_node_that_comes_back_costs_the_same_among_many() -> None:
    def cost(count: int) -> int:
        folded = table()
        keys = [f"10.5.{n >> 4}.{n % 16 * 16}-28" for n in range(count)]
        folded.apply([SimpleNamespace(type=PUT, kv=pair(f"subnets/{key}", value(1), 10)) for key in keys])
        folded.replace([], 3)
        assert len(folded.leases) == count

        def come_back() -> None:
            folded.apply([SimpleNamespace(type=PUT, kv=pair(f"subnets/{keys[7]}", value(2), 4))])
            folded.expire()
            assert folded.next_expiry is not None

        return counted.steps(come_back)

    assert cost(2000) < cost(20) + 500


def test_a_change_of_the_configuration_does_not_say_that_the_leases_are_known_up_to_there() -> None:
    folded = table()
    folded.apply([SimpleNamespace(type=PUT, kv=pair("config", b'{"Network":"10.5.0.0/16","SubnetLen":25}', 9))])
    assert (folded.revision, folded.config_revision) == (1, 9)
    assert folded.apply([SimpleNamespace(type=PUT, kv=pair("subnets/10.5.1.0-24", value(1), 8))])
    assert (folded.revision, folded.config_revision) == (8, 9)


@pytest.mark.field_problem(5)
@pytest.mark.parametrize("key", ["10.5.1.0-24&fc00:0:0:1::-64", "fo o", "it's"])
def test_what_removes_an_unreadable_key_removes_that_key_alone(key: str) -> None:
    """Pasted as it is: & would end the command, and a second word would be the end of a range."""
    with structlog.testing.capture_logs() as logs:
        table().apply([SimpleNamespace(type=PUT, kv=pair(f"subnets/{key}", value(None), 2))])
    (told,) = logs
    shown = subprocess.run(["sh", "-c", f"printf '<%s>' {told['to_remove_it']}"], capture_output=True, check=True)
    assert shown.stdout.decode() == f"<etcdctl><del></net/subnets/{key}>"
