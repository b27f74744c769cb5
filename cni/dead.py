"""Attachments whose container is gone: addresses that nobody freed, configurations that nobody deleted.

Two ways here: the runtime says which attachments are valid (GC), or the range is full at ADD and we must judge by
ourselves. In the second case an attachment is dead only when that is certain:

- we added it, during an earlier boot of this machine: no network namespace outlives the kernel; or
- we added it, and the named network namespace that the runtime gave us no longer exists; or
- nobody knows who added it, its reservation is older than this boot, and its address does not answer on the bridge.
  (The file's age alone is not enough: a clock that is set after the boot makes young files look old.)
"""

from __future__ import annotations

import os
import time

from cni import attachments, delegate
from cni.errors import INVALID_CONFIG, CniError, DelegateError
from cni.host_local import Reservation, Store
from cni.netconf import delegate_conf, teardown_conf

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable
    from typing import Any

    from cni.attachments import Attachment
    from cni.verbs import Request

# One ADD needs one address; a few more spare the next ones the search, without making this one wait for hundreds.
ENOUGH = 16
_NAMED_NAMESPACES = ("/var/run/netns/", "/run/netns/")


def collect(request: Request) -> None:
    """GC: everything of this network that is not among the runtime's valid attachments is freed.

    What cannot be freed is left for the next time, and reported as an error once the rest is done.
    """
    conf = request.conf
    if conf.valid_attachments is None:
        raise CniError(INVALID_CONFIG, "cni.dev/valid-attachments missing: without it nothing may be collected")
    valid = {
        (str(entry.get("containerID")), str(entry.get("ifname")))
        for entry in conf.valid_attachments
        if isinstance(entry, dict)
    }
    containers = {container for container, _ in valid}
    failures = []
    for attachment in attachments.everything(conf.data_dir):
        if attachment.conf is not None and attachment.conf.get("name") != conf.name:
            continue  # another network's
        key = (attachment.container, attachment.ifname)
        if key in valid or (not attachment.ifname and attachment.container in containers):
            continue
        try:
            detach(request, attachment)
        except (CniError, DelegateError) as error:
            failures.append(f"{attachment.container}: {error}")
    if conf.ipam_type() == "host-local":
        Store(conf.ipam, conf.name).free(
            lambda held: (held.container, held.ifname) not in valid if held.ifname else held.container not in containers
        )
    _tell_delegate(request)
    if failures:
        raise CniError(INVALID_CONFIG, f"{len(failures)} attachments could not be freed", "; ".join(failures[:5]))


def detach(request: Request, attachment: Attachment) -> None:
    """The delegate's DEL for a container that is gone, then forget it."""
    made = attachment.delegate_conf() or teardown_conf(request.conf, None)
    environment = {
        **request.environment,
        "CNI_CONTAINERID": attachment.container,
        "CNI_IFNAME": attachment.ifname or str(attachment.mark().get("ifname") or "eth0"),
        "CNI_NETNS": "",
    }
    delegate.run("DEL", made, environment)
    attachment.remove()


def _tell_delegate(request: Request) -> None:
    """Hand GC on to a delegate that knows the verb; one that does not says so, and that is fine."""
    from cni import subnet_env

    conf = request.conf
    try:
        made = delegate_conf(conf, subnet_env.load(conf.subnet_file))
        made["cni.dev/valid-attachments"] = conf.valid_attachments
        delegate.run("GC", made, request.environment)
    except (CniError, DelegateError, ValueError):
        pass


def free_some(request: Request, made: dict[str, Any]) -> int:
    """The range is full: free addresses of attachments that are certainly dead; how many were freed."""
    ipam = made.get("ipam", {})
    if ipam.get("type") != "host-local":
        return 0
    store = Store(ipam, made["name"])
    known = {
        (found.container, str(found.mark().get("ifname"))): found
        for found in attachments.everything(request.conf.data_dir)
        if found.mark() and (found.conf or {}).get("name") == made["name"]
    }
    freed = 0
    unknown = []
    held = store.reservations()
    for reservation in held:
        attachment = known.pop((reservation.container, reservation.ifname), None)
        if attachment is None:
            if (reservation.container, reservation.ifname) != (request.container, request.ifname):
                unknown.append(reservation)
        elif freed < ENOUGH and is_dead(attachment.mark()):
            try:
                detach(request, attachment)
                freed += 1
            except (CniError, DelegateError) as error:
                os.write(2, f"flannel: cannot free {reservation.address}: {error}\n".encode())
    bridge = str(made.get("bridge") or "cni0") if made.get("type") == "bridge" else ""
    silent = {(item.container, item.ifname) for item in _silent(unknown, bridge)}
    return freed + store.free(lambda item: (item.container, item.ifname) in silent)


def is_dead(mark: dict[str, Any]) -> bool:
    """Whether the attachment that we made cannot exist any more."""
    boot = mark.get("bootID")
    if boot and (now := attachments.boot_id()) and boot != now:
        return True
    netns = str(mark.get("netns") or "")
    return netns.startswith(_NAMED_NAMESPACES) and not os.path.exists(netns)


def _silent(unknown: Iterable[Reservation], bridge: str) -> list[Reservation]:
    """Of reservations that nobody can account for: those older than this boot whose container does not answer."""
    boot = time.time() - time.clock_gettime(time.CLOCK_BOOTTIME)
    old = [item for item in unknown if item.time < boot]
    if not old or not bridge:
        return []
    from cni import neighbours

    answering = neighbours.answering([item.address for item in old], bridge)
    if answering is None:  # there is no such bridge: nobody can be attached to it
        return old
    alive = {(item.container, item.ifname) for item in old if item.address in answering}
    probed = {(item.container, item.ifname) for item in old if ":" not in item.address}
    # An IPv6 address is judged by the IPv4 address of the same container.
    return [item for item in old if (item.container, item.ifname) in probed - alive]
