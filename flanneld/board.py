"""What the daemon's threads show each other: immutable values, each written by one thread.

A reader takes a value and works with it; nobody locks. Whoever writes wakes those who must look again.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

from flanneld.desired import Standing
from flanneld.underlay import View
from subnet_lease.lease import IPNetwork, Lease, LeaseSnapshot


class Board:
    """``view`` is written by the reconciler, ``snapshot`` by the watcher, ``standing`` and ``lease`` by the keeper."""

    def __init__(self) -> None:
        self.view: View | None = None
        self.other_networks: tuple[IPNetwork, ...] = ()
        """Those of other daemons on this host. Written by the reconciler."""
        self.snapshot: LeaseSnapshot | None = None
        self.standing: Standing | None = None
        self.lease: Lease | None = None
        self.refuse = ""
        """Why no container may get an address of our subnet: it is another node's now. Written by the keeper."""
        self.reload = False
        """SIGHUP: read everything again. Cleared by the keeper."""
        self.stopping = threading.Event()
        self.exit_code = 0
        self.wake_keeper: Callable[[], None] = lambda: None
        self.wake_reconciler: Callable[[], None] = lambda: None
        self.wake_main: Callable[[], None] = lambda: None

    def stop(self, exit_code: int = 0) -> None:
        """End the daemon; the network stays as it is."""
        self.exit_code = self.exit_code or exit_code
        self.stopping.set()
        self.wake_main()
        self.wake_keeper()
        self.wake_reconciler()
