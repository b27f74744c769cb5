"""The mode without the plugin: the bridge's configuration with this node's subnet, straight in the runtime's conflist.

For ``flannelctl cni-conf`` and the daemon; not part of the plugin.
"""

from __future__ import annotations

import copy
import json
import os
import tempfile
from pathlib import Path
from typing import Any

from cni import jsontext, subnet_env
from cni.errors import CniError
from cni.netconf import NetConf, check_delegate, delegate_conf

DEFAULT_TEMPLATE: dict[str, Any] = {
    "name": "cbr0",
    "cniVersion": "0.3.1",
    "plugins": [
        {"type": "flannel", "delegate": {"hairpinMode": True, "isDefaultGateway": True}},
        {"type": "portmap", "capabilities": {"portMappings": True}},
    ],
}
"""flannel's own conflist (kube-flannel.yml)."""

_OURS = {"type", "subnetFile", "dataDir", "delegate", "ipam", "waitSeconds"}


def render_conflist(subnet_file: str | os.PathLike[str], template: str | None = None) -> str:
    """The conflist's text: ``template`` (default: flannel's) with each ``flannel`` plugin replaced by its delegate.

    ValueError says what is wrong with the subnet file or the template.
    """
    env = subnet_env.load(os.fspath(subnet_file))
    conflist = copy.deepcopy(DEFAULT_TEMPLATE) if template is None else _parse(template)
    conflist["plugins"] = [
        _delegate(plugin, conflist, env) if plugin.get("type") == "flannel" else plugin
        for plugin in conflist["plugins"]
    ]
    return json.dumps(conflist, indent=2) + "\n"


def _parse(template: str) -> dict[str, Any]:
    try:
        found = jsontext.loads(template.encode())
    except ValueError as error:
        raise ValueError(f"the conflist template is not JSON: {error}") from None
    if not isinstance(found, dict):
        raise ValueError("the conflist template must be a JSON object")
    if "plugins" not in found and found.get("type"):  # a .conf with one plugin
        shared = {key: found.pop(key) for key in ("name", "cniVersion") if key in found}
        found = {**shared, "plugins": [found]}
    plugins = found.get("plugins")
    if not isinstance(plugins, list) or not all(isinstance(plugin, dict) for plugin in plugins):
        raise ValueError("the conflist template has no list of plugins")
    if not any(plugin.get("type") == "flannel" for plugin in plugins):
        raise ValueError('the conflist template has no plugin of type "flannel" to replace')
    if not isinstance(found.get("name"), str) or not found["name"]:
        raise ValueError("the conflist template has no name")
    return found


def _delegate(plugin: dict[str, Any], conflist: dict[str, Any], env: subnet_env.SubnetEnv) -> dict[str, Any]:
    try:
        conf = NetConf({**plugin, "name": conflist["name"]})
        check_delegate(conf)
    except CniError as error:
        raise ValueError(error.msg) from None
    made = delegate_conf(conf, env)
    del made["name"]  # the runtime adds the conflist's
    rest = {key: value for key, value in plugin.items() if key not in _OURS}  # capabilities, args
    return {"type": made.pop("type"), **made, **rest}


def write_conflist(path: str | os.PathLike[str], text: str) -> bool:
    """Put it in place in one step; false where it stood there already and nothing was written."""
    target = Path(path)
    try:
        if target.read_text(encoding="utf-8") == text:
            return False
    except (OSError, UnicodeDecodeError):
        pass
    target.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
    # Runtimes read every *.conflist in the directory: the temporary name must not end so.
    descriptor, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.", suffix=".tmp")
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fchmod(file.fileno(), 0o644)
            os.fsync(file.fileno())
        Path(temporary).replace(target)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    return True
