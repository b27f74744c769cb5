"""The command ``flanneld``."""

from __future__ import annotations

import gc
import sys
from collections.abc import Sequence
from importlib.metadata import version

# structlog imports rich where it is installed, for its tracebacks: 5 MB and 0.2 s that the daemon has no use for.
_hide_rich = "rich" not in sys.modules
if _hide_rich:
    sys.modules["rich"] = None  # type: ignore[assignment]
import structlog  # noqa: E402

if _hide_rich:
    del sys.modules["rich"]

from flanneld.options import parse  # noqa: E402
from flanneld.telemetry import set_up_logging  # noqa: E402


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, set up the log, run. Exit codes: 0 stopped, 1 cannot work, 2 bad usage."""
    # Thousands of long-lived leases and records make the collector's default schedule a quarter of the start-up time;
    # there are hardly any cycles to find.
    gc.set_threshold(100_000, 50, 100)
    options, warnings = parse(sys.argv[1:] if argv is None else argv)
    if options.version:
        print(f"flanneld {version('flanneld')}")  # noqa: T201 - asked for
        return 0
    set_up_logging(options.log_format, options.v)
    log = structlog.get_logger("flanneld")
    for warning in warnings:
        log.warning(warning)
    # Imported late, so that --version, --help and a bad flag cost nothing.
    from flanneld.daemon import run
    from subnet_lease.store import StoreError

    try:
        return run(options)
    except StoreError as error:
        log.error(str(error))
        return 1


if __name__ == "__main__":
    sys.exit(main())
