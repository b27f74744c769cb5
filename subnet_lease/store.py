"""The LeaseStore protocol: what the daemon asks of etcd or of Kubernetes, and the errors it may hear.

Verbs block and raise a StoreError; none of them retries for longer than one call. How often to try again is the
daemon's business (``StoreError.transient``), what to do with what is read is nobody's here.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from ipaddress import IPv4Network, IPv6Network
from typing import ClassVar, Protocol

import structlog

from subnet_lease.lease import IPNetwork, Lease, LeaseAttrs, LeaseSnapshot, NodeHints, NodeIdentity
from subnet_lease.network_config import NetworkConfig

log = structlog.get_logger("flanneld")


class StoreError(Exception):
    """A call to the store failed. The text names the thing and the remedy; ``cause`` is one word for the metric."""

    cause: ClassVar[str] = "store"
    transient: ClassVar[bool] = True

    @property
    def fault(self) -> str:
        """What tells this fault from another one: the same for as long as it lasts, whoever meets it."""
        return str(self)


class StoreUnavailable(StoreError):
    """Nobody answered, or no leader: wait and try again."""

    cause = "unavailable"

    @property
    def fault(self) -> str:
        return self.cause  # the system's word for it varies from try to try


class AccessDenied(StoreError):
    """Wrong password, no permission, or a certificate that was refused. An operator may mend it while we wait."""

    cause = "access_denied"


class ConfigMissing(StoreError):
    """The network configuration is not there yet."""

    cause = "config_missing"

    @property
    def fault(self) -> str:
        return self.cause


class ConfigInvalid(StoreError):
    """The network configuration cannot be used; the text names key, value and rule."""

    cause = "config_invalid"


class PodCidrMissing(StoreError):
    """The Kubernetes node has no podCIDR yet."""

    cause = "pod_cidr_missing"


class NodeMissing(StoreError):
    """Kubernetes has no such node, or not yet: kubelet registers it."""

    cause = "node_missing"


class OutOfSubnets(StoreError):
    """Every subnet of the network is leased."""

    cause = "out_of_subnets"


class AddressInUse(StoreError):
    """Another live node holds a lease with our public IP (field problem 10)."""

    cause = "address_in_use"


class LeaseLost(StoreError):
    """Our lease is gone or someone else's; acquire again."""

    cause = "lease_lost"


class SubnetTaken(StoreError):
    """The subnet that we must keep now belongs to another node (field problem 13)."""

    cause = "subnet_taken"


class SetupError(StoreError):
    """Nothing will heal this: an unreadable certificate, a malformed endpoint."""

    cause = "setup"
    transient = False


@dataclass(frozen=True, slots=True)
class LeaseRequest:
    """What a node wants.

    ``previous`` are the subnets that it had (from subnet.env), preferred while free. With ``keep`` set, nothing but
    exactly those subnets will do: a node whose data path stands never changes its subnet by itself. ``avoid`` are the
    networks of the hosts, whose addresses no container may have.
    """

    identity: NodeIdentity
    attrs: LeaseAttrs
    previous: tuple[IPv4Network | None, IPv6Network | None] = (None, None)
    keep: bool = False
    avoid: tuple[IPNetwork, ...] = ()


def write_config(prefix: str) -> str:
    """The command that stores a configuration where etcd's keys begin with ``prefix``."""
    where = "" if prefix == "/coreos.com/network" else f" --etcd-prefix={prefix}"
    return f"""flannelctl config set{where} '{{"Network":"10.5.0.0/16"}}'"""


def unused(problem: str) -> str:
    """What ``StoreStatus.config_error`` says."""
    return f"the stored network configuration is not used, the last good one stays: {problem}"


class StoreStatus:
    """How the connection fares; written by the store's threads, read by /readyz and /metrics in others."""

    def __init__(self) -> None:
        self.last_contact: float | None = None
        """time.monotonic() of the last proof that the watch is alive, None before the first."""
        self.failure: StoreError | None = None
        """What the watch fails with now, None while it is well."""
        self.config_error: str | None = None
        """Why the configuration that is stored now is not the one in use, None while it is."""
        self._errors: Counter[str] = Counter()

    @property
    def errors(self) -> dict[str, int]:
        """Failures so far, by cause; bad keys count under bad_key."""
        return dict(self._errors)

    def alive(self) -> None:
        """The watch has just been heard of."""
        self.last_contact = time.monotonic()
        if self.failure is not None:
            self.failure = None
            log.debug("the watch on the store works again")

    def failed(self, error: StoreError) -> None:
        """Count a failure of the watch. The daemon tells it, if nobody else meets the same fault (flanneld/status.py)."""
        self.count(error.cause)
        if self.failure is None or error.fault != self.failure.fault:
            log.debug("the watch on the store fails; what was last known stays in use", error=str(error))
        self.failure = error

    def count(self, cause: str) -> None:
        """Count what does not end the watch."""
        self._errors[cause] += 1


class LeaseStore(Protocol):
    """What the daemon asks. Implementations: ``subnet_lease.etcd``, ``subnet_lease.kube``."""

    @property
    def status(self) -> StoreStatus: ...

    def read_config(self) -> NetworkConfig:
        """Read and validate the network configuration."""

    def hints(self) -> NodeHints:
        """What the store says about this node's addresses."""

    def find_own(self, request: LeaseRequest) -> Lease | None:
        """The lease that this node would be given back, without claiming it: its VTEP MAC is ours (ADR on identity)."""

    def acquire(self, config: NetworkConfig, request: LeaseRequest) -> Lease:
        """Claim a lease by compare-and-swap, or take our own back, publishing ``request.attrs``."""

    def renew(self, lease: Lease) -> float:
        """Keep the lease alive without rewriting it; seconds until it must be renewed again. LeaseLost if it is gone."""

    def publish(self, lease: Lease, attrs: LeaseAttrs) -> Lease:
        """Rewrite the attributes of our lease if it is still the revision that we read; else LeaseLost."""

    def release(self, lease: Lease) -> None:
        """Give the subnet back."""

    def watch(self) -> Iterator[LeaseSnapshot]:
        """Complete snapshots, the first one at once, until ``close``. Survives everything; never raises."""

    def reconnect(self) -> None:
        """Leave all connections for new ones, which start at this host's address of today and use certificates and
        credentials as they are on disk; files that cannot be read are logged, and what was read before stays in use."""

    def report(self, ready: bool, reasons: tuple[str, ...]) -> None:
        """Tell the store whether this node's data path works (Kubernetes' NetworkUnavailable); etcd: nothing."""

    def close(self) -> None:
        """End ``watch`` and drop the connection. The lease stays."""
