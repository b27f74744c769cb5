"""NetworkPolicies that nothing enforces, announced (field problem 43).

An overlay carries packets; it does not enforce policies. A policy that selects pods on this node is therefore worth a
warning, once, in the log and as an Event on the policy, unless the operator runs an enforcer and leaves this off.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterable
from typing import Final

import structlog

from subnet_lease.kube_api import Api
from subnet_lease.kube_objects import Change, NetworkPolicy, Reference, Selector
from subnet_lease.kube_report import Events
from subnet_lease.kube_watch import ListWatch
from subnet_lease.store import StoreError, StoreStatus

SETTLE: Final = 2.0
"""Upper bound, in seconds, of the random wait before a new policy's pods are looked up: every node asks at once."""

RECHECK: Final = 300.0
"""Seconds between looks at policies that selected no pod here so far: pods come and go."""

_log = structlog.get_logger("kube")


class PolicyNotice:
    """Watches NetworkPolicies in two threads of its own, and speaks up about each that selects a pod here."""

    def __init__(self, api: Callable[[], Api], node: Callable[[], str], events: Events) -> None:
        self._api = api
        self._node = node
        self._events = events
        self._policies: dict[tuple[str, str], Selector] = {}
        self._announced: set[tuple[str, str]] = set()
        self._due: set[tuple[str, str]] = set()
        self._wake = threading.Event()
        self._closed = threading.Event()
        self._watch = ListWatch(api, NetworkPolicy, self, StoreStatus())
        self._thread = threading.Thread(target=self._run, name="kube-policy-notice", daemon=True)

    def start(self) -> None:
        self._watch.start()
        self._thread.start()

    def close(self) -> None:
        self._closed.set()
        self._wake.set()
        self._watch.close()

    def reopen(self) -> None:
        """Leave the present connection for a new one."""
        self._watch.reopen()

    def relisted(self, objects: Iterable[NetworkPolicy]) -> None:
        found = {_key(policy): policy.spec.pod_selector for policy in objects}
        self._due.update(key for key, selector in found.items() if self._policies.get(key) != selector)
        self._policies = found
        self._announced.intersection_update(found)
        self._wake.set()

    def changed(self, changes: list[Change[NetworkPolicy]]) -> None:
        for change in changes:
            key = _key(change.object)
            if change.type == "DELETED":
                self._policies.pop(key, None)
                self._announced.discard(key)
            else:
                self._policies[key] = change.object.spec.pod_selector
                self._due.add(key)
        self._wake.set()

    def _run(self) -> None:
        while True:
            if not self._wake.wait(RECHECK * random.uniform(0.8, 1.2)):
                self._due.update(list(self._policies))
            self._wake.clear()
            if self._closed.wait(random.uniform(0, SETTLE)):
                return
            while self._due and not self._closed.is_set():
                self._look(self._due.pop())

    def _look(self, key: tuple[str, str]) -> None:
        namespace, name = key
        selector = self._policies.get(key)
        if selector is None or key in self._announced:
            return
        try:
            if not self._api().selects_pods_on(self._node(), namespace, selector):
                return
        except StoreError as error:
            _log.info(
                "cannot tell which pods a NetworkPolicy selects", namespace=namespace, policy=name, error=str(error)
            )
            return
        self._announced.add(key)
        text = (
            "this NetworkPolicy selects pods, but nothing enforces it: flannel carries packets only;"
            " run kube-network-policies beside it (chart value netpol.enabled=true) or another policy engine"
        )
        _log.warning("a NetworkPolicy is not enforced", namespace=namespace, policy=name, remedy=text)
        about = Reference("networking.k8s.io/v1", "NetworkPolicy", name, namespace=namespace)
        self._events.create(about, "Warning", "NotEnforced", text, name=f"{name}.flannel-not-enforced")


def _key(policy: NetworkPolicy) -> tuple[str, str]:
    return policy.metadata.namespace, policy.metadata.name
