"""Wait, within bounds, for a subnet that the node really leases; and name the cause when there is none."""

from __future__ import annotations

import time

from cni import daemon_status, subnet_env
from cni.cidr import parse
from cni.errors import TRY_AGAIN_LATER, CniError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from cni.daemon_status import DaemonStatus
    from cni.subnet_env import SubnetEnv

POLL_SECONDS = 0.1


def wait_for_subnet(subnet_file: str, seconds: float) -> SubnetEnv:
    """The node's subnet, as soon as it may be used; CniError ("try again later") with the cause after ``seconds``."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            return current_subnet(subnet_file)
        except CniError:
            if time.monotonic() >= deadline:
                raise
        time.sleep(POLL_SECONDS)


def current_subnet(subnet_file: str) -> SubnetEnv:
    """The node's subnet; CniError with the cause where no container may get an address now."""
    try:
        env = subnet_env.load(subnet_file)
    except ValueError as error:
        raise CniError(TRY_AGAIN_LATER, str(error), _why_missing(subnet_file)) from None
    status = daemon_status.read(subnet_file)
    if status is not None and (refusal := _refusal(env, status)):
        raise CniError(TRY_AGAIN_LATER, f"the subnet in {subnet_file} cannot be used: {refusal}", _reasons(status))
    return env


def _why_missing(subnet_file: str) -> str:
    """Why subnet.env is not there or not complete, as far as the daemon tells."""
    status = daemon_status.read(subnet_file)
    if status is not None:
        return f"flanneld runs but has no subnet yet: {_reasons(status) or 'it is starting'}"
    if daemon_status.is_alive(subnet_file):
        return "flanneld is starting"
    return (
        "flanneld is not running on this node; start it (systemctl start flanneld), or look at its pod: "
        "kubectl -n kube-flannel get pods -o wide"
    )


def _reasons(status: DaemonStatus) -> str:
    return "; ".join(status.reasons)


def _refusal(env: SubnetEnv, status: DaemonStatus) -> str:
    """Why the daemon forbids this subnet; "" where it does not."""
    if status.refuse:
        return status.refuse
    for found, leased in ((env.subnet, status.subnet), (env.ipv6_subnet, status.ipv6_subnet)):
        if leased is None:
            continue
        try:
            same = found is not None and parse(leased).network == found
        except ValueError:
            continue
        if not same:
            return f"it holds {found}, but the node now leases {leased}"
    return ""
