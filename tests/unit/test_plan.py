"""The plan: for any two states it leads from one to the other, and never through a broken one."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from backends.kernel_state import FdbEntry, Kind, Link, Neighbour, Record, Route, Vxlan, state_of
from flanneld.plan import plan, satisfied
from tests.unit.model_kernel import ModelKernel

DEV = "flannel.1"
LINK = Link(DEV, Vxlan(1, "192.0.2.1", "eth0"), 1450, "02:00:00:00:00:01")


def peer(number: int, mac: int, public: int) -> list[Record]:
    base = f"10.1.{number}.0"
    lladdr = f"02:00:00:00:01:{mac:02x}"
    return [
        FdbEntry(DEV, lladdr, f"192.0.2.{public}"),
        Neighbour(DEV, base, lladdr),
        Route(f"{base}/24", DEV, via=base, onlink=True),
    ]


# MAC and address follow from the peer and a generation: two peers never share a MAC, a peer may change its own.
peers = st.dictionaries(st.integers(1, 40), st.integers(0, 2), max_size=12).map(
    lambda d: [r for n, g in d.items() for r in peer(n, n + 41 * g, 10 + n + 60 * g)]
)
states = peers.map(lambda records: state_of(LINK, *records)) | st.just(state_of())


def own(record: Record) -> bool:
    return True


@given(states, states)
def test_a_plan_leads_to_the_desired_state_and_then_is_empty(before, after):
    kernel = ModelKernel(dict(before))
    assert kernel.apply(plan(after, kernel.records, own)) == []
    assert kernel.records == dict(after)
    assert plan(after, kernel.records, own) == []


@given(states, states)
def test_no_prefix_of_a_plan_leaves_a_route_that_leads_nowhere(before, after):
    kernel = ModelKernel(dict(before))
    for change in plan(after, kernel.records, own):
        kernel.apply([change])
        for number in range(1, 41):
            assert kernel.where(f"10.1.{number}.9") != "broken"


@given(states, states)
def test_limiting_the_keys_to_those_that_differ_changes_nothing(before, after):
    keys = {k for k in before.keys() | after.keys() if before.get(k) != after.get(k)}
    assert plan(after, before, own, keys) == sorted_like(plan(after, before, own), plan(after, before, own, keys))


def sorted_like(changes, model):
    order = {c.record.key: i for i, c in enumerate(model)}
    return sorted(changes, key=lambda c: order[c.record.key])


@given(states)
def test_what_is_not_ours_is_never_removed(before):
    assert plan(state_of(), before, lambda record: False) == []


def test_additions_come_in_the_order_of_kinds_and_removals_in_reverse():
    after = state_of(LINK, *peer(1, 1, 11))
    assert [c.record.key[0] for c in plan(after, state_of(LINK), own)] == [Kind.FDB, Kind.NEIGHBOUR, Kind.ROUTE]
    assert [c.record.key[0] for c in plan(state_of(LINK), after, own)] == [Kind.ROUTE, Kind.NEIGHBOUR, Kind.FDB]


def test_what_stands_on_a_device_goes_with_the_device():
    changes = plan(state_of(), state_of(LINK, *peer(1, 1, 11)), own)
    assert [c.record for c in changes] == [LINK]


def test_a_link_that_leaves_mac_and_checksum_open_is_satisfied_by_any():
    want = Link(DEV, LINK.settings, 1450)
    have = Link(DEV, LINK.settings, 1450, "02:00:00:00:00:07", tx_checksum=True)
    assert satisfied(want, have)
    assert not satisfied(want, Link(DEV, LINK.settings, 1400, "02:00:00:00:00:07"))
