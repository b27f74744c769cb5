"""The demo: several hosts on this machine, containers that reach each other, and damage that heals while you watch.

Everything is real: etcd, the kernel's VXLAN, flanneld, the CNI plugins. Only the hosts are network namespaces.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from ipaddress import IPv4Network

from rich.console import Console
from rich.live import Live
from rich.markup import escape

from flanneld.lab.capture import capture, decode_vxlan
from flanneld.lab.containers import CNI_PLUGINS, Container
from flanneld.lab.demo_view import (
    bar,
    explain_keep,
    folded,
    hosts_table,
    make_console,
    milliseconds,
    ping_cell,
    save_svg,
    table,
)
from flanneld.lab.faults import heal, peers_in_kernel, vxlan_faults
from flanneld.lab.hosts import Lab
from flanneld.lab.leave import leave
from flanneld.lab.throughput import iperf3
from flanneld.lab.wait import NotYet
from subnet_lease.network_config import parse_network_config, validate_for_allocation
from subnet_lease.store import ConfigInvalid

UNDERLAY = "172.30.0.0/24"
START = 30.0
"""Seconds within which every daemon must be ready; it takes one or two."""
NEEDED = {
    "etcd": "etcd-server",
    "ip": "iproute2",
    "bridge": "iproute2",
    "ping": "iputils-ping",
    "iperf3": "iperf3",
    "tcpdump": "tcpdump",
    "nsenter": "util-linux",
    "nft": "nftables",
    "hostname": "hostname",
    str(CNI_PLUGINS / "bridge"): "containernetworking-plugins",
}
"""Programs of the demo and the Debian packages that hold them; script/demo installs these."""


class CannotRun(Exception):
    """The demo cannot start here. The text names what is missing and the remedy."""


@dataclass(frozen=True, slots=True)
class DemoOptions:
    """``subnet`` is the cluster network; ``keep`` leaves everything running; ``save_svg`` is a picture of the run."""

    hosts: int = 3
    subnet: str = "10.5.0.0/16"
    nftables: bool = False
    keep: bool = False
    save_svg: str | None = None


def run_demo(options: DemoOptions) -> int:
    """Run it all; 0 if everything worked, 1 if anything did not, 130 after Ctrl-C."""
    network = preflight(options)
    for name in [name for name in os.environ if name.startswith("FLANNELD_")]:
        # The demo is the same for everybody, whatever this shell is set up for.
        del os.environ[name]
    console = make_console(record=bool(options.save_svg))
    signal.signal(signal.SIGTERM, _interrupt)
    signal.signal(signal.SIGHUP, _interrupt)
    began = time.monotonic()
    lab: Lab | None = None
    try:
        console.print("[bold]flanneld demo[/bold]: hosts as network namespaces, all else is real\n")
        lab = Lab(options.hosts, underlay=UNDERLAY)
        good = Demo(console, lab, options, network).run()
        if options.keep:
            explain_keep(console, lab)
            leave(lab)
            lab = None
        verdict = (
            "[bold green]everything worked[/bold green]" if good else "[bold red]something did not work[/bold red]"
        )
        console.print(f"{verdict} ({time.monotonic() - began:.0f} s)")
        return 0 if good else 1
    except KeyboardInterrupt:
        console.print("\n[yellow]interrupted[/yellow]; cleaning up")
        return 130
    except (NotYet, RuntimeError, OSError, ValueError, subprocess.SubprocessError) as error:
        console.print(f"[bold red]failed:[/bold red] {escape(str(error))}")
        return 1
    finally:
        if lab is not None:
            # A second Ctrl-C must not leave half of it behind.
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                signal.signal(number, signal.SIG_IGN)
            lab.close()
            console.print("[dim]removed: every namespace, process and file of this demo[/dim]")
        if options.save_svg:
            save_svg(console, options.save_svg)


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def preflight(options: DemoOptions) -> IPv4Network:
    """Check what can be known beforehand; the cluster network. CannotRun names what is wrong and the remedy."""
    if os.geteuid() != 0:
        raise CannotRun("the demo needs root for network namespaces; run: sudo script/demo")
    missing = sorted({package for program, package in NEEDED.items() if shutil.which(program) is None})
    if missing:
        raise CannotRun(f"programs are missing; on Debian run: apt-get install {' '.join(missing)}")
    try:
        network = IPv4Network(options.subnet)
    except ValueError as error:
        raise CannotRun(f"--subnet {options.subnet}: {error}; give a network such as 10.5.0.0/16") from None
    if network.overlaps(IPv4Network(UNDERLAY)):
        raise CannotRun(f"--subnet {options.subnet} overlaps the demo's underlay {UNDERLAY}; choose another")
    if not 2 <= options.hosts <= 20:
        raise CannotRun(f"--hosts {options.hosts}: choose 2 to 20")
    if (room := _room(network)) < options.hosts:
        raise CannotRun(f"--subnet {network} has room for {room} hosts, not for {options.hosts}; give a larger one")
    return network


def _room(network: IPv4Network) -> int:
    """How many subnets flannel's rules find in a network."""
    try:
        config = validate_for_allocation(parse_network_config(f'{{"Network":"{network}"}}'))
    except ConfigInvalid:
        return 0
    low, high = config.subnet_range_of(4)
    assert low is not None and high is not None
    return (int(high.network_address) - int(low.network_address)) // int(low.num_addresses) + 1


class Demo:
    """The steps, in order; each prints what it finds and says whether it was good."""

    def __init__(self, console: Console, lab: Lab, options: DemoOptions, network: IPv4Network) -> None:
        self.console = console
        self.lab = lab
        self.options = options
        self.network = network
        self.containers: list[Container] = []
        self._number = itertools.count(1)

    def run(self) -> bool:
        self.configure()
        self.start()
        self.attach()
        return all([self.matrix(), self.throughput(), self.packet(), self.damage()])

    @contextlib.contextmanager
    def step(self, title: str) -> Iterator[None]:
        self.console.print(f"[bold cyan]{next(self._number)}  {title}[/bold cyan]")
        yield
        self.console.print()

    def configure(self) -> None:
        config = f'{{"Network": "{self.network}"}}'  # the backend is vxlan unless another one is named
        if self.options.nftables:
            config = config[:-1] + ', "EnableNFTables": true}'
        with self.step("A network configuration in etcd"):
            self.console.print(f"[dim]$[/dim] flannelctl config set '{escape(config)}'")
            argv = [sys.executable, "-m", "flanneld.ctl.cli", "config", "set", config]
            output = self.lab.etcd_ns.run([*argv, f"--etcd-endpoints={self.lab.etcd.endpoint}"])
            self.console.print(escape(folded(output.strip())))

    def start(self) -> None:
        """flanneld on every host at once; the table lives until all are ready."""
        with self.step(f"flanneld on {len(self.lab.hosts)} hosts"):
            began = time.monotonic()
            daemons = self.lab.start_daemons("--ip-masq", wait=False)
            live = self.console.is_terminal and not self.options.save_svg
            with (
                Live(console=self.console, auto_refresh=False, transient=True)
                if live
                else contextlib.nullcontext() as view
            ):
                while time.monotonic() - began < START and all(daemon.running for daemon in daemons):
                    if view is not None:
                        view.update(hosts_table(self.lab.hosts), refresh=True)
                    if all(daemon.ready for daemon in daemons):
                        break
                    time.sleep(0.05)
            for daemon in daemons:
                if not daemon.ready:
                    raise NotYet(f"{daemon.host.name} is not ready after {START:.0f} s: {daemon.why_not()}")
            self.lab.wait_peers()
            self.console.print(hosts_table(self.lab.hosts))
            self.console.print(f"all ready after {time.monotonic() - began:.1f} s")

    def attach(self) -> None:
        with self.step("A container on each host's bridge, by the CNI plugins bridge and host-local"):
            with ThreadPoolExecutor(4) as pool:
                self.containers = list(pool.map(lambda host: host.container("c"), self.lab.hosts))
            for container in self.containers:
                mtu = container.subnet_env["FLANNEL_MTU"]
                self.console.print(f"{container.host.name}  container {container.address}  mtu {mtu}")

    def matrix(self) -> bool:
        """Everybody pings everybody."""
        with self.step("Ping matrix (average round trip of 3, ms)"):
            pairs = list(itertools.permutations(self.containers, 2))
            # A few one at a time: the point is the path, not how two processors share many pings.
            with ThreadPoolExecutor(1 if len(pairs) <= 12 else 8) as pool:
                answers = pool.map(lambda pair: pair[0].ping(pair[1], count=3, interval=0.02, wait=5), pairs)
                results = {(a.host.name, b.host.name): answer for (a, b), answer in zip(pairs, answers, strict=True)}
            made = table("from \\ to", *(c.host.name for c in self.containers))
            for a in self.containers:
                cells = [ping_cell(results.get((a.host.name, b.host.name))) for b in self.containers]
                made.add_row(f"{a.host.name} {a.address}", *cells)
            self.console.print(made)
            good = all(result.ok for result in results.values())
            self.console.print(
                f"{sum(r.received for r in results.values())} of {sum(r.sent for r in results.values())} answered"
            )
        return good

    def throughput(self) -> bool:
        first, second = self.lab.hosts[:2]
        with self.step("TCP throughput h1 to h2, overlay beside underlay (iperf3)"):
            under = iperf3(first.ns, second.ns, second.address, seconds=2)
            over = iperf3(self.containers[0].ns, self.containers[1].ns, self.containers[1].address, seconds=2)
            for name, value in (("underlay", under), ("overlay", over)):
                self.console.print(f"{name:9} {value / 1e9:5.2f} Gbit/s  [cyan]{bar(value / max(under, over))}[/cyan]")
        return under > 0 and over > 0

    def packet(self) -> bool:
        """One packet as it is on the underlay, decoded by scapy."""
        sender, receiver = self.containers[:2]
        with self.step("One packet of that ping on the underlay, decoded by scapy"):
            frames = capture(
                sender.host.ns, "eth0", f"udp port 8472 and src {sender.host.address}", lambda: sender.ping(receiver)
            )
            p = decode_vxlan(frames[0])
            self.console.print(f"outer Ethernet  {p.outer_macs[0]} > {p.outer_macs[1]}")
            self.console.print(f"outer IP        {p.outer[0]} > {p.outer[1]}")
            self.console.print(f"UDP             {p.source_port} > [bold]{p.port}[/bold]")
            self.console.print(f"VXLAN           VNI [bold]{p.vni}[/bold]")
            self.console.print(f"inner Ethernet  {p.inner_macs[0]} > {p.inner_macs[1]}")
            self.console.print(
                f"inner IP        [bold]{p.inner[0]} > {p.inner[1]}[/bold]  {p.inner_protocol}, {p.inner_length} bytes"
            )
        return p.port == 8472 and p.vni == 1 and p.inner == (sender.address, receiver.address)

    def damage(self) -> bool:
        """Take things away under a running ping, and let the kernel's own monitor say when they were back."""
        host, (sender, receiver) = self.lab.hosts[0], self.containers[:2]
        with self.step("Damage on h1 under a ping of 100 a second; the clock is ip -ts monitor"):
            subnet = str(IPv4Network(receiver.subnet_env["FLANNEL_SUBNET"], strict=False))
            target = next(peer for peer in peers_in_kernel(host) if peer.subnet == subnet)
            good = True
            for fault in vxlan_faults(host, target):
                self.console.print(f"[dim]$[/dim] {escape(fault.command)}")
                try:
                    result = heal(host, fault, sender, receiver)
                except NotYet as error:
                    good = False
                    self.console.print(f"{fault.title:16}  [bold red]never healed[/bold red]: {escape(str(error))}")
                    continue
                lost = f"{result.lost} of {result.sent} pings lost"
                took = f"{milliseconds(result.seconds):7}"
                self.console.print(f"{fault.title:16}  healed after [green]{took}[/green]  {lost}")
        return good
