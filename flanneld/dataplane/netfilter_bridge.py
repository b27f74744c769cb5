"""br_netfilter: without it, packets that a bridge hands from container to container never meet iptables.

kube-proxy's and Docker's translations then fail between containers of one host. flanneld exits in that case; a pod
network that works but for that is better than none, so here it is a warning.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Final

from flanneld.dataplane import modules
from flanneld.dataplane.netfilter_names import Family

_SETTING: Final[dict[Family, str]] = {4: "bridge-nf-call-iptables", 6: "bridge-nf-call-ip6tables"}


def bridge_warnings(families: Iterable[Family], proc_sys: Path = Path("/proc/sys")) -> tuple[str, ...]:
    """What is wrong with br_netfilter, after an attempt to load it. Empty is good."""
    settings = [proc_sys / "net/bridge" / _SETTING[family] for family in families]
    why = ""
    if not all(setting.exists() for setting in settings):
        try:
            modules.load("br_netfilter")
        except modules.ModuleMissing as missing:
            why = f": {missing}"
    return tuple(
        f"{setting} does not exist, so packets between containers of this host bypass iptables{why}"
        for setting in settings
        if not setting.exists()
    )
