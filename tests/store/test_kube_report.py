"""What KubeStore tells Kubernetes: a node's condition, and Events."""

from __future__ import annotations

from typing import Any

import pytest

from flanneld.lab.wait import wait_until
from subnet_lease.store import PodCidrMissing, StoreUnavailable
from tests.store.kube_values import REQUEST, Watcher
from tests.testbed.fake_kube import FakeKube


def network_unavailable(kube: Any, name: str = "n1") -> dict[str, str] | None:
    conditions = kube.node(name)["status"].get("conditions") or []
    return next((c for c in conditions if c["type"] == "NetworkUnavailable"), None)


def test_a_ready_node_is_reported_as_flannel_does_and_once(kube, make_store):
    kube.add_node("n1", "10.244.1.0/24")
    store = make_store(kube)
    store.report(True, ())
    store.report(True, ())
    found = network_unavailable(kube)
    assert found is not None
    assert (found["status"], found["reason"], found["message"]) == (
        "False",
        "FlannelIsUp",
        "Flannel is running on this node",
    )
    if isinstance(kube, FakeKube):
        assert kube.count("patch", "nodes/status") == 1
        assert any(c["type"] == "Ready" for c in kube.node("n1")["status"]["conditions"])


def test_a_report_that_failed_is_made_again_by_the_next_call(fake, make_store):
    fake.add_node("n1", "10.244.1.0/24")
    store = make_store(fake)
    fake.failing = 1
    with pytest.raises(StoreUnavailable):
        store.report(True, ())
    store.report(True, ())
    found = network_unavailable(fake)
    assert found is not None
    assert found["status"] == "False"


def test_a_broken_data_path_is_reported_after_a_while_and_taken_back_at_once(kube, make_store, monkeypatch):
    monkeypatch.setattr("subnet_lease.kube_report.BROKEN_AFTER", 0.5)
    kube.add_node("n1", "10.244.1.0/24")
    store = make_store(kube)
    store.report(True, ())
    store.report(False, ("device flannel.1 is missing",))
    found = network_unavailable(kube)
    assert found is not None
    assert found["status"] == "False"

    Watcher(store)  # which looks after it from now on

    def broken() -> bool:
        now = network_unavailable(kube)
        return now is not None and now["status"] == "True" and "flannel.1 is missing" in now["message"]

    wait_until(broken)
    store.report(True, ())
    found = network_unavailable(kube)
    assert found is not None
    assert found["status"] == "False"
    wait_until(lambda: kube.events("FlannelIsNotReady") and kube.events("FlannelIsUp"), message="both Events")


def test_a_condition_that_somebody_else_altered_is_written_again(fake, make_store):
    fake.add_node("n1", "10.244.1.0/24")
    store = make_store(fake)
    Watcher(store)
    store.report(True, ())
    fake.patch_node("n1", {"status": {"conditions": [{"type": "NetworkUnavailable", "status": "True", "reason": "X"}]}})

    def mended() -> bool:
        found = network_unavailable(fake)
        return found is not None and found["reason"] == "FlannelIsUp"

    wait_until(mended)


def test_conditions_are_left_alone_when_that_is_switched_off(fake, make_store):
    fake.add_node("n1", "10.244.1.0/24")
    make_store(fake, set_network_unavailable=False).report(True, ())
    assert network_unavailable(fake) is None


def test_events_that_may_not_be_created_stop_nothing(fake, make_store):
    fake.add_node("n1")
    fake.forbidden.add(("create", "events"))
    store = make_store(fake)
    with pytest.raises(PodCidrMissing):
        store.acquire(store.read_config(), REQUEST)


@pytest.mark.field_problem(43)
def test_a_policy_that_selects_a_pod_here_is_announced_once_and_others_are_not(kube, make_store):
    kube.add_node("n1", "10.244.1.0/24")
    kube.add_node("n2", "10.244.2.0/24")
    kube.add_pod("default", "web", "n1", {"app": "web"})
    kube.add_pod("default", "db", "n2", {"app": "db"})
    kube.add_policy("default", "elsewhere", {"matchLabels": {"app": "db"}})
    store = make_store(kube, policy_notice=True)
    Watcher(store)
    kube.add_policy("default", "deny-web", {"matchExpressions": [{"key": "app", "operator": "In", "values": ["web"]}]})
    wait_until(lambda: kube.events("NotEnforced"), 15)
    again = make_store(kube, policy_notice=True)
    Watcher(again)
    kube.add_policy("default", "deny-all", {})
    wait_until(lambda: len(kube.events("NotEnforced")) == 2, 15)
    names = sorted(event["involvedObject"]["name"] for event in kube.events("NotEnforced"))
    assert names == ["deny-all", "deny-web"]
