"""The dataplane with its handlers. Each is imported only when the backend in use can need it: memory is counted."""

from __future__ import annotations

from flanneld.dataplane.dataplane import Dataplane
from flanneld.dataplane.netfilter import Netfilter


def make_dataplane(netfilter: Netfilter | None = None) -> Dataplane:
    """For this thread and its network namespace."""
    return Dataplane([netfilter or Netfilter()])
