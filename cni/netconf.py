"""From the network's configuration and the node's subnet to the delegate's configuration. Pure."""

from __future__ import annotations

from cni import subnet_env
from cni.errors import INTERNAL, INVALID_CONFIG, CniError
from cni.subnet_env import SubnetEnv

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

DEFAULT_DATA_DIR = "/var/lib/cni/flannel"
DEFAULT_WAIT_SECONDS = 10.0
LONGEST_WAIT_SECONDS = 120.0


class NetConf:
    """The plugin's own configuration: flannel's fields, and ``waitSeconds``."""

    __slots__ = (
        "cni_version", "data_dir", "delegate", "ipam", "name", "prev_result", "runtime_config", "subnet_file",
        "valid_attachments", "wait_seconds",
    )  # fmt: skip

    def __init__(self, document: dict[str, Any]) -> None:
        """CniError (invalid configuration) names the first field that has the wrong type."""
        self.cni_version: str = _field(document, "cniVersion", str, "")
        self.name: str = _field(document, "name", str, "")
        self.subnet_file: str = _field(document, "subnetFile", str, "") or subnet_env.DEFAULT_PATH
        self.data_dir: str = _field(document, "dataDir", str, "") or DEFAULT_DATA_DIR
        self.delegate: dict[str, Any] = _field(document, "delegate", dict, {})
        self.ipam: dict[str, Any] = _field(document, "ipam", dict, {})
        self.runtime_config: dict[str, Any] = _field(document, "runtimeConfig", dict, {})
        self.prev_result: dict[str, Any] | None = _field(document, "prevResult", dict, None)
        self.valid_attachments: list[Any] | None = _field(document, "cni.dev/valid-attachments", list, None)
        wait: float = _field(document, "waitSeconds", (int, float), DEFAULT_WAIT_SECONDS)
        self.wait_seconds = min(max(float(wait), 0.0), LONGEST_WAIT_SECONDS)

    def delegate_type(self) -> str:
        return str(self.delegate.get("type", "bridge"))

    def ipam_type(self) -> str:
        return str(self.ipam.get("type", "host-local"))


def _field(document: dict[str, Any], name: str, kind: Any, default: Any) -> Any:
    value = document.get(name)
    if value is None:
        return default
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        wanted = {str: "a string", dict: "an object", list: "a list"}.get(kind, "a number")
        raise CniError(
            INVALID_CONFIG, f"failed to load flannel netconf file: failed to load netconf: {name!r} must be {wanted}"
        )
    return value


def check_delegate(conf: NetConf) -> None:
    """Refuse what flannel's plugin refuses in ``delegate``, in its words."""
    problem = ""
    if "type" in conf.delegate and not isinstance(conf.delegate["type"], str):
        problem = "'delegate' dictionary, if present, must have (string) 'type' field"
    elif "name" in conf.delegate:
        problem = "'delegate' dictionary must not have 'name' field, it'll be set by flannel"
    elif "ipam" in conf.delegate:
        problem = "'delegate' dictionary must not have 'ipam' field, it'll be set by flannel"
    elif not isinstance(conf.ipam.get("routes", []), list | None):
        problem = "failed to assemble Delegate IPAM: failed to read IPAM routes: 'ipam.routes' must be a list"
    if problem:
        raise CniError(INTERNAL, problem)


def delegate_conf(conf: NetConf, env: SubnetEnv) -> dict[str, Any]:
    """The delegate's whole configuration: what the user wrote wins, except for name, ranges and cniVersion."""
    made: dict[str, Any] = dict(conf.delegate)
    if conf.runtime_config:
        made["runtimeConfig"] = conf.runtime_config
    made["name"] = conf.name
    made.setdefault("type", "bridge")
    # Somebody must masquerade: the daemon (FLANNEL_IPMASQ=true) or the delegate.
    made.setdefault("ipMasq", not env.ipmasq)
    made.setdefault("mtu", env.mtu)
    if made["type"] == "bridge":
        made.setdefault("isGateway", True)
    if conf.cni_version:
        made["cniVersion"] = conf.cni_version
    ipam = dict(conf.ipam)
    ipam.setdefault("type", "host-local")
    ipam["ranges"] = [[{"subnet": str(subnet)}] for subnet in env.subnets]
    networks = env.networks + env.ipv6_networks
    ipam["routes"] = [*(conf.ipam.get("routes") or []), *({"dst": str(network)} for network in networks)]
    made["ipam"] = ipam
    return made


def teardown_conf(conf: NetConf, env: SubnetEnv | None) -> dict[str, Any]:
    """A configuration that is good enough for the delegate's DEL when the one that ADD used is lost.

    host-local frees by container and interface whatever the range, so any valid range will do: the node's, else that
    of the addresses which the runtime remembers, else one from the documentation prefix.
    """
    if env is None:
        env = SubnetEnv()
        env.mtu, env.ipmasq = 0, True
        for entry in (conf.prev_result or {}).get("ips", []):
            _adopt(env, str(entry.get("address", "")) if isinstance(entry, dict) else "")
        if not env.subnets:
            _adopt(env, "192.0.2.0/24")
    return delegate_conf(conf, env)


def _adopt(env: SubnetEnv, text: str) -> None:
    from cni.cidr import parse

    try:
        subnet = parse(text).network
    except ValueError:
        return
    if subnet.family == 4:
        env.subnet = subnet
    else:
        env.ipv6_subnet = subnet
