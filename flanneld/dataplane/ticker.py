"""A clock for a handler that must look at something by itself now and then."""

from __future__ import annotations

import os
import threading


class Ticker:
    """A descriptor that becomes readable every so many seconds; its thread starts with the first ``run``."""

    def __init__(self, seconds: float) -> None:
        self._seconds = self._current = seconds
        self._fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def run(self, at_least: float) -> None:
        """Tick; from now on no faster than every ``at_least`` seconds."""
        self._current = max(self._seconds, at_least)
        if self._thread is None:
            self._thread = threading.Thread(target=self._beat, name="ticker", daemon=True)
            self._thread.start()

    def fileno(self) -> int:
        return self._fd

    def ticked(self) -> bool:
        """Whether it ticked since the last question."""
        try:
            os.eventfd_read(self._fd)
        except BlockingIOError:
            return False
        return True

    def close(self) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
        os.close(self._fd)

    def _beat(self) -> None:
        while not self._stop.wait(self._current):
            os.eventfd_write(self._fd, 1)
