"""The messages that pyroute2 encodes: loaded while something else goes on, without getting in its way."""

from __future__ import annotations

import subprocess
import sys

MEANWHILE = """
import sys, threading, time
from flanneld.dataplane import rare
sys.setswitchinterval(1e-5)
thread = threading.Thread(target=rare.prepare)
thread.start()
time.sleep(float(sys.argv[1]))
assert rare.link_body([("IFLA_IFNAME", "flannel.1")])
assert rare.address_body("10.5.7.0/32", 1)
thread.join()
"""


def test_a_message_that_is_wanted_while_pyroute2_is_being_loaded_waits_for_it() -> None:
    # Python ends circular imports of two threads with _DeadlockError in one of them.
    for late in ("0", "0.01", "0.03", "0.06", "0.1", "0.15"):
        done = subprocess.run(
            [sys.executable, "-c", MEANWHILE, late], capture_output=True, text=True, timeout=60, check=False
        )
        assert (done.returncode, done.stderr) == (0, ""), f"{late} s into the load"
