"""What is wrong at the moment, and what this node is: the source of /readyz, /status and the status file.

A condition is a name with a reason, or no reason when all is well. Setting one logs each transition once, so that a
fault that lasts is one line, and its end another; also where two conditions have one fault: when etcd is away, neither
the lease can be renewed nor the watch go on.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import structlog

log = structlog.get_logger("flanneld")

CONDITIONS = ("config", "stored_config", "underlay", "lease", "store", "devices", "kernel", "subnet_file")
"""In the order in which they are shown: the first is most often the cause of those after it."""

CONTROL_PLANE = ("config", "stored_config", "store")
"""What makes a node unready but leaves its packets alone. Kubernetes is not told of these: one bad ConfigMap would
otherwise keep pods from every node of the cluster."""

WAITING = {
    "lease": "no lease yet",
    "kernel": "the kernel has not been programmed yet",
}


class Health:
    """The conditions. Any thread may set or read them."""

    def __init__(self, on_change: Callable[[], None] = lambda: None) -> None:
        self._lock = threading.Lock()
        self._reasons: dict[str, str] = dict(WAITING)
        self._started = time.monotonic()
        self._faults: dict[str, str] = {}
        self._told: dict[str, str] = {}
        """The faults that are in the log, by the condition that put them there."""
        self._logged: dict[str, tuple[str, str]] = {}
        """Condition and text of the line that told of a fault."""
        self._warnings: dict[str, tuple[str, ...]] = {}
        self.on_change = on_change
        self.beat = time.monotonic()
        """time.monotonic() of the reconciler's last turn: proof that the loop lives."""

    def set(self, condition: str, reason: str | None, *, fault: str = "", quiet: bool = False) -> None:
        """Record the state of a condition; None means that all is well.

        ``fault`` is for a reason whose text varies while it lasts (an error with the system's last word in it): it is
        logged again only when the fault is another one. ``quiet``: somebody else logs it.
        """
        with self._lock:
            before = self._reasons.get(condition)
            if before == reason:
                return
            self._faults.pop(condition, None)
            told = self._told.pop(condition, None)
            if reason is None:
                del self._reasons[condition]
            else:
                self._reasons[condition] = reason
                if reason != WAITING.get(condition):
                    self._faults[condition] = fault or reason
            now = self._faults.get(condition)
            if now is not None and not quiet and now not in self._told.values():
                self._told[condition] = now
            news = self._told.get(condition) not in (None, told)
            ended = told is not None and told != now and not self._hand_on(told)
            if news:
                self._logged[self._told[condition]] = (condition, str(reason))
            teller = self._logged.pop(told, (condition, before)) if ended and told is not None else (condition, before)
        if news:
            log.error(reason, condition=condition)
        elif ended and reason is None:
            # In the words of the line that it ends, whichever condition had the fault last.
            log.info("recovered", condition=teller[0], was=teller[1])
        self.on_change()

    def _hand_on(self, fault: str) -> bool:
        """Whether another condition has this fault, too; its end is told when that one is over."""
        heir = next((name for name, its in self._faults.items() if its == fault), None)
        if heir is not None:
            self._told[heir] = fault
        return heir is not None

    def warn(self, topic: str, texts: tuple[str, ...]) -> None:
        """What an operator should know though the network stands; each text is logged once. () takes them back."""
        with self._lock:
            before = self._warnings.get(topic, ())
            self._warnings[topic] = texts
        for text in texts:
            if text not in before:
                log.warning(text, topic=topic)

    @property
    def warnings(self) -> tuple[str, ...]:
        with self._lock:
            return tuple(text for texts in self._warnings.values() for text in texts)

    def reason(self, condition: str) -> str | None:
        with self._lock:
            return self._reasons.get(condition)

    @property
    def reasons(self) -> tuple[str, ...]:
        """Why this node is not ready, in order of cause, each fault once; empty when it is."""
        return self._shown(CONDITIONS)

    def broken(self, *spared: str) -> tuple[str, ...]:
        """Why packets may not flow, whatever else is wrong: without the control plane's conditions, and ``spared``."""
        return self._shown(name for name in CONDITIONS if name not in (*CONTROL_PLANE, *spared))

    def _shown(self, conditions: Iterable[str]) -> tuple[str, ...]:
        shown: dict[str, str] = {}
        with self._lock:
            for name in conditions:
                if name in self._reasons:
                    reason = self._reasons[name]
                    shown.setdefault(self._faults.get(name, reason), f"{name}: {reason}")
        return tuple(shown.values())

    @property
    def ready(self) -> bool:
        return not self.reasons


def item(text: str) -> str:
    """A reason or a warning in a list for people; further lines of it are indented, so that none looks like the next."""
    return "- " + text.replace("\n", "\n  ")


def write_status_file(path: Path, status: dict[str, Any]) -> None:
    """Replace the file that the CNI plugin and flannelctl read (format: docs/cni.md), readable by all."""
    path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
    # One name, so that a daemon that was killed here leaves nothing that its successor does not use up.
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
        with os.fdopen(os.open(temporary, flags, 0o644), "w") as file:
            os.fchmod(file.fileno(), 0o644)
            json.dump(status, file, separators=(",", ":"))
            file.write("\n")
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
