"""How much goes through between two namespaces, as iperf3 measures it."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

from flanneld.lab.netns import Namespace, end
from flanneld.lab.wait import wait_until


def iperf3(
    client: Namespace, server: Namespace, address: str, *, seconds: float = 2, extra: tuple[str, ...] = ()
) -> float:
    """TCP throughput from client to server in bit/s, as the receiver counted it."""
    with tempfile.TemporaryDirectory(prefix="flanneld-iperf3-") as directory:
        log = Path(directory, "server.log")
        process = server.start(["iperf3", "-s", "-1", "-B", address, "--forceflush"], log=log)
        try:
            wait_until(lambda: "Server listening" in log.read_text(), 10, lambda: f"iperf3 -s: {log.read_text()}")
            argv = ["iperf3", "-c", address, "-t", f"{seconds:g}", "-J", *extra]
            answer = json.loads(client.run(argv, check=False, timeout=seconds + 30))
        finally:
            end(process)
    if "error" in answer:
        raise RuntimeError(f"iperf3 from {client.label} to {address}: {answer['error']}")
    return float(answer["end"]["sum_received"]["bits_per_second"])
