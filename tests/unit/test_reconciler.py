"""The reconciler: triggers coalesce, failures do not spread, repairs are told from changes."""

from __future__ import annotations

from dataclasses import replace

from backends.kernel_state import FdbEntry, Interface, Kind, Neighbour, Route, Scope, state_of
from flanneld.reconciler import PassResult, Reconciler, Wanted
from tests.unit.model_kernel import ModelKernel
from tests.unit.test_plan import DEV, LINK, peer


class World:
    def __init__(self, *records):
        self.kernel = ModelKernel()
        self.state = dict(state_of(LINK, *records))
        self.changed = None
        self.known = True
        self.now = 100.0
        self.reports: list[PassResult] = []
        self.reconciler = Reconciler(self.kernel, self.wanted, self.reports.append, clock=lambda: self.now)

    def wanted(self, observed):
        if not self.known:
            return None
        changed, self.changed = self.changed, frozenset()
        return Wanted(self.state, Scope(frozenset({DEV})), changed, lambda record: True)

    def want(self, *records):
        for record in records:
            self.state[record.key] = record
        self.changed = frozenset(self.changed or ()) | {r.key for r in records}

    def run(self):
        return self.reconciler.one_pass()


def settled(*records):
    world = World(*records)
    world.run()
    assert world.kernel.records == world.state
    world.run()
    world.kernel.writes.clear()
    return world


def test_nothing_is_touched_before_the_desired_state_is_known():
    world = World()
    world.kernel.records = dict(state_of(*peer(9, 9, 19)))
    world.known = False
    assert world.run() == PassResult()
    assert world.kernel.writes == []


def test_a_second_pass_writes_nothing():
    world = settled(*peer(1, 1, 11))
    assert world.run().changes == ()
    assert world.kernel.writes == []


def test_one_changed_peer_costs_its_own_records_only():
    world = settled(*(r for n in range(1, 30) for r in peer(n, n, 10 + n)))
    world.want(*peer(3, 3, 99))
    result = world.run()
    assert [c.record for c in result.changes] == [FdbEntry(DEV, "02:00:00:00:01:03", "192.0.2.99")]
    assert result.repairs == ()
    assert not result.full


def test_what_somebody_else_changed_is_put_back_and_counted_as_a_repair():
    world = settled(*peer(1, 1, 11))
    route = Route("10.1.1.0/24", DEV, via="10.1.1.0", onlink=True)
    world.kernel.interfere(route.key, None)
    result = world.run()
    assert [c.record for c in result.repairs] == [route]
    assert world.kernel.records == world.state


def test_what_nobody_heard_of_is_found_when_everything_is_to_be_looked_at():
    world = settled(*peer(1, 1, 11))
    route = Route("10.1.1.0/24", DEV, via="10.1.1.0", onlink=True)
    passes = iter([False, True, False, True])
    del world.kernel.records[route.key]
    world.reconciler.run(lambda: next(passes))
    assert world.reports[-1].changes == ()
    woken = world.kernel.woken
    world.reconciler.look_at_everything()
    assert world.kernel.woken == woken + 1
    world.reconciler.run(lambda: next(passes))
    assert [c.record for c in world.reports[-1].changes] == [route]


def test_a_failure_skips_what_depends_on_it_and_nothing_else():
    world = World(*peer(1, 1, 11), *peer(2, 2, 12))
    world.kernel.refuse = {(Kind.FDB, DEV, "02:00:00:00:01:01")}
    result = world.run()
    assert len(result.failures) == 1
    assert result.skipped == 2
    assert not result.complete
    assert world.kernel.where("10.1.1.5") is None
    assert world.kernel.where("10.1.2.5") == "192.0.2.12"


def test_a_failure_is_tried_again_after_a_while_and_heals():
    world = settled()
    world.kernel.refuse = {(Kind.FDB, DEV, "02:00:00:00:01:01")}
    world.want(*peer(1, 1, 11))
    world.run()
    world.kernel.refuse = set()
    world.run()
    assert world.kernel.where("10.1.1.5") is None, "not before the retry interval"
    world.now += 1.0
    assert world.run().complete
    assert world.kernel.where("10.1.1.5") == "192.0.2.11"


def test_a_device_that_comes_back_ends_the_wait():
    world = settled()
    world.kernel.refuse = {(Kind.FDB, DEV, "02:00:00:00:01:01")}
    world.want(*peer(1, 1, 11))
    world.run()
    world.kernel.refuse = set()
    world.kernel.interfere(LINK.key, None)
    assert not world.run().complete, "what was written to a device is looked at once more"
    assert world.run().complete
    assert world.kernel.where("10.1.1.5") == "192.0.2.11"


def test_a_strangers_device_that_goes_ends_the_wait():
    world = settled()
    world.kernel.refuse = {(Kind.FDB, DEV, "02:00:00:00:01:01")}
    world.want(*peer(1, 1, 11))
    world.run()
    world.kernel.refuse = set()
    world.now += 0.05
    world.kernel.interfaces = (Interface("veth0", 8, mtu=1500, up=True),)
    assert not world.run().changes, "a moment ago it failed"
    world.reconciler._progress.retry_at, world.reconciler._progress.retry_in = world.now + 5, 5.0
    world.now += 1.5
    world.kernel.interfaces = (Interface("rival0", 9, mtu=1500, up=True),)
    assert world.run().changes
    assert world.kernel.where("10.1.1.5") == "192.0.2.11"


def test_what_never_reads_back_as_written_is_a_fight_and_keeps_nobody_from_being_ready():
    world = World()
    apply = world.kernel.apply

    def otherwise(changes):
        failures = apply(changes)
        world.kernel.interfere(LINK.key, replace(LINK, mtu=LINK.mtu - 1))
        return failures

    world.kernel.apply = otherwise
    assert not world.run().complete, "the second look comes first"
    results = [world.run() for _ in range(6)]
    assert all(result.complete and len(result.repairs) == 1 for result in results)
    assert world.reconciler._progress.repair_streak > 3, "the brake"


def test_news_does_not_wait_for_a_failure_elsewhere():
    world = settled(*peer(1, 1, 11))
    world.kernel.refuse = {(Kind.FDB, DEV, "02:00:00:00:01:02")}
    world.want(*peer(2, 2, 12))
    world.run()
    world.want(*peer(3, 3, 13))
    world.run()
    assert world.kernel.where("10.1.3.5") == "192.0.2.13"


def test_a_kernel_that_cannot_be_seen_is_reported_and_looked_at_again():
    world = settled(*peer(1, 1, 11))

    def blind(scope):
        raise OSError(105, "No buffer space available")

    observe, world.kernel.observe = world.kernel.observe, blind
    assert "cannot look at the kernel" in world.run().blind
    world.kernel.observe = observe
    world.kernel.records.pop(Neighbour(DEV, "10.1.1.0", "").key)
    assert world.run().full
    assert world.kernel.records == world.state
