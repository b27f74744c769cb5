"""All benchmarks, and docs/benchmarks.md with its picture: ``sudo script/bench [--write] [PART …]``.

Parts: kernel, scale, udp, throughput. Nothing here asserts a time; each figure stands beside a reference that was
measured in the same run.
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from flanneld.lab import bench_kernel, bench_scale, bench_throughput, bench_udp
from flanneld.lab.bench_plot import bars
from flanneld.lab.bench_throughput import Row

DOCS = Path(__file__).parents[2] / "docs"
INTRODUCTION = """# Benchmarks

Written by `sudo script/bench --write`; it measures and asserts nothing. Hosts are network namespaces on one machine, so
a "wire" is a veth pair and both ends share the cores: **compare within a table, not with other machines**.

|machine| |
|-|-|
"""


def machine() -> str:
    """The machine as a Markdown table body."""
    model = next(
        (line.split(":", 1)[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line),
        platform.machine(),
    )  # fmt: skip
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    load = "{:.1f} {:.1f} {:.1f}".format(*os.getloadavg())
    rows = {
        "processor": f"{os.cpu_count()} × {model}",
        "memory": f"{memory:.0f} GiB",
        "kernel": platform.release().split("-")[0],
        "Python": platform.python_version(),
        "date": time.strftime("%Y-%m-%d"),
        "load average before the run": load,
    }
    return "".join(f"|{what}|{value}|\n" for what, value in rows.items())


def kernel() -> str:
    result = bench_kernel.measure()
    parts = (
        ("`ip -batch` and `bridge -batch`, the same entries", result.reference),
        ("flanneld: pack, send, match every acknowledgement", result.apply),
        ("flanneld: look at everything anew, as at a restart", result.look),
        ("flanneld: remove all", result.remove),
    )
    rows = "".join(f"|{what}|{t.wall:.3f} s|{t.user:.3f} s|{t.system:.3f} s|\n" for what, t in parts)
    return (
        f"## Programming the kernel: {result.peers} peers, {3 * result.peers} entries\n\n"
        f"Medians of {result.rounds} rounds, taken in turns.\n\n|work|clock|user|system|\n|-|-|-|-|\n{rows}"
    )


FLANNEL = {
    "process start to ready, 5000 leases in etcd": "6.0 s",
    "resident memory at 5000 peers": "49 MB",
}
"""flannel v0.20.2 built from source, on a machine of the same kind, another day."""


def scale() -> str:
    result = bench_scale.measure()
    rows = "".join(
        f"|{what}|{value}|{FLANNEL.get(what, '')}|\n" for what, value in [*result.rows(), *bench_scale.host_gw()]
    )
    return (
        f"## The daemon at {result.peers} peers\n\nOne host, a real etcd, vxlan except where it says host-gw. The last column is an earlier figure for"
        f" flannel v0.20.2 on a machine of the same kind; this script does not measure it.\n\n|what|flanneld|flannel|\n|-|-|-|\n{rows}"
    )


def udp() -> str:
    samples = bench_udp.run(seconds=3, rounds=3)
    return (
        "## The udp backend's tunnel\n\nOne TCP stream, and a 64-byte ping. The C loop is the plain one-packet-per-system-"
        "call program that flannel's proxy is; it is compiled for the run (`flanneld/lab/udp_reference.c`).\n\n"
        + bench_udp.table(samples)
    )


def throughput() -> str:
    hosts, containers = bench_throughput.between_hosts(), bench_throughput.between_containers()
    picture = DOCS / "images" / "throughput.svg"
    picture.write_text(bars([(row.what, row.rate / 1e9) for row in containers], "Gbit/s, one TCP stream"))
    manual = next(row for row in hosts if row.what.startswith("VXLAN device"))
    return (
        "## Throughput and round trips\n\nHost to host, beside a VXLAN device made by hand with ip(8) on the same hosts."
        " Medians of rounds taken in turns; the round trip is the mean of 200 pings. Single rounds of one path differ by half\non a shared machine.\n\n"
        + _table(hosts, manual)
        + "\nContainer to container through each backend, beside the plain underlay of the same run. Containers add a"
        " bridge and a veth at each end.\n\n"
        + _table(containers, None)
        + "\n![Throughput by backend](images/throughput.svg)\n"
    )


def _table(rows: Sequence[Row], reference: Row | None) -> str:
    head = "|path|TCP|of the reference|round trip|\n|-|-|-|-|\n" if reference else "|path|TCP|round trip|\n|-|-|-|\n"
    lines = []
    for row in rows:
        share = f"{row.rate / reference.rate * 100:.0f} %|" if reference else ""
        lines.append(f"|{row.what}|{row.rate / 1e9:.2f} Gbit/s|{share}{row.rtt:.0f} µs|\n")
    return head + "".join(lines)


PARTS: dict[str, Callable[[], str]] = {"kernel": kernel, "scale": scale, "udp": udp, "throughput": throughput}


def main() -> int:
    parser = argparse.ArgumentParser(description="Measure flanneld on this machine; asserts nothing.")
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"which: {', '.join(PARTS)}; default all")
    parser.add_argument("--write", action="store_true", help="write docs/benchmarks.md and its picture")
    arguments = parser.parse_args()
    unknown = set(arguments.parts) - set(PARTS)
    if unknown:
        parser.error(f"there is no part {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
    if os.geteuid() != 0:
        parser.error("network namespaces need root: sudo script/bench")
    texts = [INTRODUCTION + machine()]
    for name in arguments.parts or PARTS:
        print(f"measuring: {name} …", file=sys.stderr)
        texts.append(PARTS[name]())
        print(texts[-1])
    if arguments.write:
        (DOCS / "benchmarks.md").write_text("\n".join(texts))
    return 0


if __name__ == "__main__":
    sys.exit(main())
