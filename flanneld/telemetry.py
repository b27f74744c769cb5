"""structlog and Prometheus: set up once, used everywhere."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterable
from typing import Any

import structlog
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector


def set_up_logging(format_: str, verbosity: int) -> None:
    """Readable lines on a terminal, JSON otherwise; to stderr. ``verbosity`` 2 and above adds the debug level."""
    console = format_ == "console" or (format_ == "auto" and sys.stderr.isatty())
    renderer: Any = (
        structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty(), exception_formatter=structlog.dev.plain_traceback)
        if console
        else structlog.processors.JSONRenderer()
    )
    structlog.configure(
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="%H:%M:%S" if console else "iso", utc=not console),
            structlog.processors.StackInfoRenderer(),
            *([] if console else [structlog.processors.format_exc_info]),
            renderer,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(logging.DEBUG if verbosity >= 2 else logging.INFO),
        logger_factory=structlog.WriteLoggerFactory(file=sys.stderr),
        cache_logger_on_first_use=True,
    )


class Metrics:
    """The daemon's metrics, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        make: dict[str, Any] = {"registry": self.registry, "namespace": "flanneld"}
        self.passes = Counter("reconcile_passes", "Passes of the reconciler", **make)
        self.seconds = Histogram(
            "reconcile_seconds",
            "Duration of a pass",
            buckets=(0.0005, 0.001, 0.005, 0.01, 0.05, 0.1, 0.5, 1, 5),
            **make,
        )
        self.changes = Counter("changes", "Changes made to the kernel", ("kind", "op"), **make)
        self.repairs = Counter("repairs", "Changes that undid what somebody else had done", ("kind",), **make)
        self.errors = Counter("errors", "Failures, by cause", ("cause",), **make)
        self.peers = Gauge("peers", "Peers with records in the kernel", **make)
        self.refused = Gauge("refused_peers", "Leases whose peers were refused; the log names them", **make)

    def collect_from(self, read: Callable[[], Iterable[Metric]]) -> None:
        """Have ``read`` called at each scrape."""

        class _Live(Collector):
            def collect(self) -> Iterable[Metric]:
                return read()

        self.registry.register(_Live())


def gauge(name: str, text: str, value: float | None) -> Iterable[Metric]:
    """A gauge of this moment, or nothing when there is no value."""
    if value is not None:
        yield GaugeMetricFamily(f"flanneld_{name}", text, value=value)


def labelled_counter(name: str, text: str, label: str, values: dict[str, int]) -> Metric:
    """A counter whose values somebody else keeps."""
    family = CounterMetricFamily(f"flanneld_{name}", text, labels=[label])
    for key, value in sorted(values.items()):
        family.add_metric([key], value)
    return family
