"""The composition root: makes the parts, starts their threads, and ends them. Nothing imports it but cli.

Threads: *reconciler* (the only one that touches the kernel), *watcher* (snapshots from the store), *keeper* (our
lease), *http*, and the main thread, which waits for signals and feeds systemd's watchdog.
"""

from __future__ import annotations

import os
import queue
import signal
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import Any

import structlog
from prometheus_client import generate_latest
from prometheus_client.core import Metric

from cni.daemon_status import hold_lock
from flanneld.board import Board
from flanneld.dataplane.assemble import make_dataplane, prepare_for_first_start
from flanneld.dataplane.dataplane import Dataplane
from flanneld.dataplane.host_check import host_warnings
from flanneld.dataplane.netfilter import Netfilter
from flanneld.desired import Standing
from flanneld.http import Answer, HealthServer, as_json, text
from flanneld.lease_keeper import LeaseKeeper
from flanneld.notify import notify, watchdog_interval
from flanneld.open_store import open_store
from flanneld.options import Options
from flanneld.outputs import Outputs
from flanneld.reconciler import Intervals, Reconciler
from flanneld.record_json import to_json
from flanneld.startup_command import hooks_file
from flanneld.status import Health, item
from flanneld.telemetry import Metrics, gauge, labelled_counter
from flanneld.wanted import WantedState
from subnet_lease.store import ConfigMissing, LeaseStore, StoreError

log = structlog.get_logger("flanneld")

LOOP_STALL = 45.0
"""Seconds without a turn of the reconciler after which /healthz says that the daemon hangs."""

HOST_CHECK_INTERVAL = 60.0
"""Seconds between looks at the host's forwarding and bridge settings."""

REPORT_INTERVAL = 2.0
"""Seconds between looks at whether the store must be told of our health."""

TICK = 4.0
"""Seconds between looks that nothing triggers: what the kernel changes without a message is mended within five."""

WATCH_STALL = 60.0
"""Seconds without a sign of life from the store after which this node is no longer ready."""


class Daemon:
    """One flanneld. ``run`` returns the exit code."""

    def __init__(self, options: Options) -> None:
        self.options = options
        self.board = Board()
        self.health = Health(self._health_changed)
        self.metrics = Metrics()
        self.store: LeaseStore = open_store(options)
        self.keeper = LeaseKeeper(
            options, self.store, self.board, self.health, lambda cause: self.metrics.errors.labels(cause).inc()
        )
        self.outputs = Outputs(options, self.board, self.health)
        self.wanted: WantedState | None = None
        self.reconciler: Reconciler | None = None
        self.dataplane: Dataplane | None = None
        self._netfilter: Netfilter | None = None
        self._next_host_check = 0.0
        self._server: HealthServer | None = None
        self._signals: queue.SimpleQueue[int | None] = queue.SimpleQueue()
        self.metrics.collect_from(self._live_metrics)

    def run(self) -> int:
        """Serve until a signal or a fault that nothing can heal."""
        self._install_signals()
        if self.options.healthz_port:
            try:
                self._server = self._serve()
            except OSError as error:
                log.error(
                    f"cannot listen on --healthz-ip={self.options.healthz_ip} --healthz-port="
                    f"{self.options.healthz_port}: {error.strerror}; choose another address or port"
                )
                return 1
        bodies = {"reconciler": self._reconcile, "watcher": self._watch, "keeper": self.keeper.run}
        if self.options.kube_subnet_mgr and self.options.set_node_network_unavailable:
            bodies["reporter"] = self._report
        threads = [
            threading.Thread(target=self._guard, args=(name, body), name=name, daemon=True)
            for name, body in bodies.items()
        ]
        for thread in threads:
            thread.start()
        self._wait()
        log.info("stopping; the network stays as it is")
        notify("STOPPING=1")
        self.store.close()
        for thread in threads:
            thread.join(timeout=3)
        self.outputs.stopped()
        if self._server is not None:
            self._server.close()
        return self.board.exit_code

    # threads

    def _guard(self, name: str, body: Callable[[], None]) -> None:
        try:
            body()
        except Exception:
            log.exception("a part of the daemon failed; stopping so that it can be restarted", part=name)
            self.board.stop(1)

    def _reconcile(self) -> None:
        self._netfilter = Netfilter()
        dataplane = self.dataplane = make_dataplane(hooks_file(self.options.subnet_file), self._netfilter)
        prepare_for_first_start(dataplane)
        try:
            self.wanted = WantedState(
                self.board, self.health, self.metrics, dataplane, self.options.iface_can_reach, self._data_path_stands
            )
            intervals = Intervals(tick=min(TICK, self.options.iptables_resync), resync=self.options.resync)
            self.reconciler = Reconciler(dataplane, self.wanted.wanted, self.wanted.report, intervals)
            self.board.wake_reconciler = self.reconciler.trigger
            self.reconciler.run(self.board.stopping.is_set)
        finally:
            dataplane.close()

    def _watch(self) -> None:
        for snapshot in self.store.watch():
            before = self.board.snapshot
            self.board.snapshot = snapshot
            self.board.wake_reconciler()
            lease = self.board.lease
            if (
                before is None
                or lease is None
                or (before.config, before.hints) != (snapshot.config, snapshot.hints)
                or before.leases.get(lease.key) is not snapshot.leases.get(lease.key)
            ):
                self.board.wake_keeper()
            if self.board.stopping.is_set():
                return

    def _wait(self) -> None:
        """The main thread's life: signals, the watchdog, and the store's condition once a second."""
        interval = watchdog_interval()
        pause = 1.0 if interval is None else min(1.0, interval)
        next_sign = 0.0
        while not self.board.stopping.is_set():
            with suppress(queue.Empty):
                self._on_signal(self._signals.get(timeout=pause))
            self._judge_store()
            now = time.monotonic()
            if interval is not None and now >= next_sign and self._alive():
                notify("WATCHDOG=1")
                next_sign = now + interval

    # health

    def _judge_store(self) -> None:
        status = self.store.status
        age = self._watch_age()
        failure = status.failure
        if failure is not None:
            # What is wrong with the configuration, the keeper tells, who reads it to claim a lease.
            theirs = isinstance(failure, ConfigMissing)
            told = theirs and self.health.reason("config") is not None
            self.health.set("store", None if told else str(failure), fault=failure.fault, quiet=theirs)
        elif age is not None and age > WATCH_STALL:
            self.health.set("store", f"no sign of life from the store for {WATCH_STALL:.0f} s")
        else:
            self.health.set("store", None)
        self.health.set("stored_config", status.config_error)

    def _watch_age(self) -> float | None:
        """Seconds since the last sign of life from the store, None before the first."""
        last = self.store.status.last_contact
        return None if last is None else time.monotonic() - last

    def _alive(self) -> bool:
        return time.monotonic() - self.health.beat < LOOP_STALL

    def _data_path_stands(self, standing: Standing) -> None:
        """After each pass that left nothing to do: tell CNI and Docker (from the reconciler's thread)."""
        self.outputs.data_path_stands(standing)
        self._look_for_obstacles(standing)

    def _look_for_obstacles(self, standing: Standing) -> None:
        """What may keep packets from flowing although all that we want stands."""
        if self._netfilter is not None:
            self.health.warn("firewall", self._netfilter.blocking)
        now = time.monotonic()
        if now >= self._next_host_check:
            self._next_host_check = now + HOST_CHECK_INTERVAL
            iptables = any(wanted.mode == "iptables" for wanted in standing.firewalls)
            self.health.warn("host", host_warnings(standing.host.families, iptables=iptables))

    def _health_changed(self) -> None:
        reasons = self.health.reasons
        self.outputs.write_status()
        if not reasons:
            lease = self.board.lease
            subnet = (lease.subnet or lease.ipv6_subnet) if lease else None
            notify("READY=1", f"STATUS=ready, subnet {subnet}")
        else:
            notify(f"STATUS=not ready: {reasons[0].splitlines()[0]}")

    def _report(self) -> None:
        """Tell the store whether the data path stands; what could not be told is told again (NetworkUnavailable)."""
        told: tuple[bool, tuple[str, ...]] | None = None
        while not self.board.stopping.wait(REPORT_INTERVAL):
            # A lease that cannot be renewed breaks nothing, until the subnet is another node's.
            stands = self.board.standing is not None and not self.board.refuse
            broken = self.health.broken("lease") if stands else self.health.broken()
            news = (not broken, broken)
            if news == told:
                continue
            try:
                self.store.report(*news)
                told = news
            except StoreError as error:
                self.metrics.errors.labels(error.cause).inc()
                log.debug("could not report to the store", error=str(error))

    # http

    def _serve(self) -> HealthServer:
        routes = {
            "/healthz": self._healthz,
            "/readyz": self._readyz,
            "/metrics": lambda: (200, "text/plain; version=0.0.4", generate_latest(self.metrics.registry)),
            "/status": lambda: as_json(self.status()),
            "/status/desired": self._desired,
        }
        return HealthServer(self.options.healthz_ip, self.options.healthz_port, routes)

    def _healthz(self) -> Answer:
        if self._alive():
            return text(200, "flanneld is running")
        return text(503, f"flanneld hangs: no turn of the reconciler for {LOOP_STALL:.0f} s")

    def _readyz(self) -> Answer:
        self._judge_store()
        if self.health.ready:
            warnings = (item(f"warning: {warning}") for warning in self.health.warnings)
            return text(200, "\n".join(("flanneld is ready", *warnings)))
        return text(503, "flanneld is not ready yet\n" + "".join(f"{item(reason)}\n" for reason in self.health.reasons))

    def _desired(self) -> Answer:
        """What should be in the kernel, and where to look for it, for ``flannelctl status --diff``."""
        desired = self.wanted.desired if self.wanted else None
        if desired is None:
            return as_json({"records": [], "devices": [], "networks": [], "instance": ""})
        scope = desired.scope
        return as_json(
            {
                "records": [to_json(record) for record in list(desired.state.values())],
                "devices": sorted(scope.devices),
                "networks": list(scope.networks),
                "instance": scope.instance,
            }
        )

    def status(self) -> dict[str, Any]:
        """Everything about this node, for /status and flannelctl."""
        age = self._watch_age()
        return {
            **self.outputs.summary(),
            "warnings": list(self.health.warnings),
            "peers": self.wanted.desired.peers if self.wanted and self.wanted.desired else 0,
            "refused": dict(self.wanted.desired.refused) if self.wanted and self.wanted.desired else {},
            "last_pass": self.wanted.last_pass if self.wanted else {},
            "tunnels": self.dataplane.status() if self.dataplane else {},
            "watch_age": None if age is None else round(age, 3),
            "store_errors": self.store.status.errors,
        }

    def _live_metrics(self) -> Iterable[Metric]:
        yield from gauge("ready", "1 while this node is ready", float(self.health.ready))
        yield from gauge("watch_age_seconds", "Since the last sign of life from the store", self._watch_age())
        yield from gauge("warnings", "Things an operator should look at; /readyz names them", len(self.health.warnings))
        yield from gauge("lease_age_seconds", "Since our lease was last proven alive", self.keeper.lease_age())
        yield labelled_counter("store_errors", "Failures of the store, by cause", "cause", self.store.status.errors)
        standing = self.board.standing
        if standing is not None and standing.backend.name == "udp":
            from flanneld.dataplane.udp import UdpHandler

            yield labelled_counter(
                "udp_tunnel", "What the udp tunnel carried and dropped", "what", UdpHandler.counters()
            )

    # signals

    def _install_signals(self) -> None:
        def note(number: int, _: object) -> None:
            # A handler runs in the midst of anything, perhaps inside a lock that it would want itself; a SimpleQueue
            # is the one thing that it may touch.
            if self.board.stopping.is_set() and number != signal.SIGHUP:
                os._exit(0)
            self._signals.put(number)

        self.board.wake_main = lambda: self._signals.put(None)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, note)

    def _on_signal(self, number: int | None) -> None:
        if number == signal.SIGHUP:
            log.info("reading everything again (SIGHUP)")
            self.board.reload = True
            self.board.wake_keeper()
            if self.reconciler is not None:
                self.reconciler.look_at_everything()
        elif number is not None:
            self.board.stop()


def run(options: Options) -> int:
    """Check what can be checked before any thread starts, then serve."""
    if os.geteuid() != 0:
        log.error("flanneld must run as root: it makes network devices and routes (sudo flanneld …)")
        return 1
    try:
        lock = hold_lock(options.subnet_file)
    except BlockingIOError:
        log.error(f"another flanneld runs with {options.subnet_file}; stop it, or give this one its own --subnet-file")
        return 1
    except OSError as error:
        log.error(f"cannot write beside {options.subnet_file}: {error.strerror}; mend that, or choose --subnet-file")
        return 1
    log.info("flanneld starting", **options.redacted())
    try:
        return Daemon(options).run()
    finally:
        os.close(lock)
