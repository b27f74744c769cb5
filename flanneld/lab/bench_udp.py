"""How fast the udp tunnel is beside a plain C loop and the bare underlay, in the same run.

    sudo .venv/bin/python -m flanneld.lab.bench_udp [--seconds 3] [--rounds 3] [--json]

The carriers take turns, so that a busy neighbour of this machine slows all of them; what counts is the ratio of the
medians. CPU is what the two carrier processes used, without the kernel's work on behalf of others.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final, cast

from flanneld.lab.ping import ping
from flanneld.lab.throughput import iperf3
from flanneld.lab.udp_hosts import Carrier, TunnelHost, compile_reference, tunnel, two_hosts
from flanneld.lab.wait import wait_until

CARRIERS: Final = ("underlay", "c", "worker", "worker without offloads")


@dataclass(frozen=True, slots=True)
class Sample:
    """One round of one carrier: Gbit/s of one TCP stream, CPU seconds a gigabyte, microseconds of a 64-byte ping."""

    carrier: str
    gbit: float
    cpu_per_gigabyte: float
    ping_us: float


def measure(a: TunnelHost, b: TunnelHost, carrier: str, target: str, seconds: float) -> Sample:
    wait_until(lambda: ping(a.namespace, target).ok, 20, f"{carrier} carries packets")
    pings = ping(a.namespace, target, count=200, interval=0.005)
    before = a.cpu_seconds() + b.cpu_seconds()
    bits = iperf3(a.namespace, b.namespace, target, seconds=seconds)
    cpu = a.cpu_seconds() + b.cpu_seconds() - before
    return Sample(carrier, bits / 1e9, cpu / (bits / 8e9 * seconds), _median_rtt(pings.text) * 1000)


def _median_rtt(text: str) -> float:
    """Milliseconds; the median, since one late wake-up on a busy machine spoils a mean."""
    times = [float(line.split("time=")[1].split()[0]) for line in text.splitlines() if "time=" in line]
    return statistics.median(times) if times else float("nan")


def run(seconds: float = 3, rounds: int = 3, carriers: tuple[str, ...] = CARRIERS) -> list[Sample]:
    """All carriers, in turns."""
    samples = []
    with tempfile.TemporaryDirectory() as folder, two_hosts() as (a, b):
        reference = compile_reference(Path(folder)) if "c" in carriers else None
        for _ in range(rounds):
            for carrier in carriers:
                if carrier == "underlay":
                    samples.append(measure(a, b, carrier, b.underlay, seconds))
                    continue
                with tunnel(a, b, cast(Carrier, carrier), reference):
                    samples.append(measure(a, b, carrier, b.address, seconds))
    return samples


def median(samples: list[Sample], carrier: str, value: Callable[[Sample], float]) -> float:
    return statistics.median(value(sample) for sample in samples if sample.carrier == carrier)


def table(samples: list[Sample]) -> str:
    """Medians, as Markdown."""
    lines = ["|carrier|TCP, Gbit/s|carriers' CPU, s/GB|ping of 64 bytes, µs|", "|-|-|-|-|"]
    for carrier in dict.fromkeys(sample.carrier for sample in samples):
        gbit = median(samples, carrier, lambda s: s.gbit)
        cpu = median(samples, carrier, lambda s: s.cpu_per_gigabyte)
        rtt = median(samples, carrier, lambda s: s.ping_us)
        lines.append(f"|{carrier}|{gbit:.2f}|{cpu:.1f}|{rtt:.0f}|")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(prog="flanneld.lab.bench_udp")
    parser.add_argument("--seconds", type=float, default=3)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--carriers", default=",".join(CARRIERS))
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    samples = run(given.seconds, given.rounds, tuple(given.carriers.split(",")))
    print(json.dumps([asdict(sample) for sample in samples]) if given.json else table(samples))
    carriers = {sample.carrier for sample in samples}
    if not given.json and {"c", "worker"} <= carriers:
        ratio = median(samples, "worker", lambda s: s.gbit) / median(samples, "c", lambda s: s.gbit)
        print(f"\nThe worker carries {ratio:.2f} times what the C loop carries.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
