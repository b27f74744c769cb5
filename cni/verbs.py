"""The plugin's verbs. Each takes the request and answers with what to print; CniError and DelegateError otherwise."""

from __future__ import annotations

import os

from cni import attachments, delegate, jsontext, readiness
from cni.errors import (
    INTERNAL,
    INVALID_CONFIG,
    LIMITED_CONNECTIVITY,
    UNAVAILABLE,
    CniError,
    DelegateError,
)
from cni.netconf import NetConf, check_delegate, delegate_conf, teardown_conf

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from cni.subnet_env import SubnetEnv


class Request:
    """One call: the CNI_* environment and the configuration from standard input."""

    __slots__ = ("conf", "environment")

    def __init__(self, environment: dict[str, str], document: dict[str, Any]) -> None:
        self.environment = environment
        self.conf = NetConf(document)

    @property
    def container(self) -> str:
        return self.environment.get("CNI_CONTAINERID", "")

    @property
    def ifname(self) -> str:
        return self.environment.get("CNI_IFNAME", "")

    @property
    def netns(self) -> str:
        return self.environment.get("CNI_NETNS", "")


def add(request: Request) -> bytes:
    """Attach the container; the delegate's result."""
    conf = request.conf
    check_delegate(conf)
    env = readiness.wait_for_subnet(conf.subnet_file, conf.wait_seconds)
    made = delegate_conf(conf, env)
    delegate.locate(made, request.environment.get("CNI_PATH", ""))
    _prepare_bridge(made, env)
    stored = attachments.save(conf.data_dir, request.container, request.ifname, request.netns, made)
    try:
        return delegate.run("ADD", made, request.environment, meanwhile=lambda: os.fsync(stored))
    except (CniError, DelegateError) as error:
        if not _is_range_full(error):
            raise
        from cni import dead

        if not dead.free_some(request, made):
            raise
        _undo(request, made)
        _prepare_bridge(made, env)
        return delegate.run("ADD", made, request.environment)
    finally:
        os.close(stored)


def _prepare_bridge(made: dict[str, Any], env: SubnetEnv) -> None:
    if made["type"] == "bridge" and (made.get("isGateway") or made.get("isDefaultGateway")):
        from cni import bridge

        bridge.make_room(str(made.get("bridge") or bridge.DEFAULT_NAME), env, force=bool(made.get("forceAddress")))


def _is_range_full(error: CniError | DelegateError) -> bool:
    details = error.details if isinstance(error, CniError) else error.error.get("details")
    return "no IP addresses available in range" in f"{error} {details}"


def _undo(request: Request, made: dict[str, Any]) -> None:
    """Take back what the failed ADD left in the container: the delegate will not add the interface twice."""
    try:
        delegate.run("DEL", made, request.environment)
    except (CniError, DelegateError):
        pass  # the ADD that follows says what is wrong


def delete(request: Request) -> bytes:
    """Detach the container. What ADD stored is forgotten only after the delegate has done its part."""
    conf = request.conf
    found = attachments.find(conf.data_dir, request.container, request.ifname)
    made = found.delegate_conf() if found is not None else None
    if made is None:
        # Lost or damaged: addresses must be freed all the same.
        made = teardown_conf(conf, _subnet_or_none(conf))
        made.setdefault("runtimeConfig", conf.runtime_config)
    if conf.prev_result is not None and conf.cni_version not in ("", "0.1.0", "0.2.0", "0.3.0", "0.3.1"):
        made["prevResult"] = conf.prev_result
    try:
        delegate.run("DEL", made, request.environment)
    except (CniError, DelegateError) as error:
        if found is not None:
            raise
        # Nothing tells that this container was ever ours; DEL of something unknown succeeds.
        os.write(2, f"flannel: DEL without a stored configuration: {error}\n".encode())
    if found is not None:
        found.remove()
    return b""


def _subnet_or_none(conf: NetConf) -> SubnetEnv | None:
    from cni import subnet_env

    try:
        return subnet_env.load(conf.subnet_file)
    except ValueError:
        return None


def check(request: Request) -> bytes:
    """The attachment is as ADD left it: known to us, inside the node's subnet, and well in the delegate's eyes."""
    conf = request.conf
    if conf.prev_result is None:
        raise CniError(INVALID_CONFIG, "Required prevResult missing")
    found = attachments.find(conf.data_dir, request.container, request.ifname)
    made = found.delegate_conf() if found is not None else None
    if made is None:
        raise CniError(
            INTERNAL,
            f"no stored configuration for interface {request.ifname} of container {request.container} "
            f"in {conf.data_dir}",
            "it was not added by this plugin, or the directory was emptied; restart the container",
        )
    _check_addresses(conf, made)
    made["cniVersion"] = conf.cni_version
    made["prevResult"] = _with_gateways(conf.prev_result)
    delegate.run("CHECK", made, request.environment)
    return b""


def _check_addresses(conf: NetConf, made: dict[str, Any]) -> None:
    """The addresses that the runtime remembers lie in the ranges that ADD handed out."""
    from cni.cidr import parse

    try:
        ranges = [parse(item["subnet"]) for group in made["ipam"]["ranges"] for item in group]
        addresses = [parse(entry["address"]) for entry in (conf.prev_result or {}).get("ips", [])]
    except (KeyError, TypeError, ValueError) as error:
        raise CniError(INVALID_CONFIG, f"prevResult or the stored configuration cannot be read: {error}") from None
    for address in addresses:
        if not any(subnet.holds(address) for subnet in ranges):
            raise CniError(INTERNAL, f"the container's address {address} is not in {', '.join(map(str, ranges))}")


def _with_gateways(result: dict[str, Any]) -> dict[str, Any]:
    """The same result, each route with the gateway that it got.

    "No gateway" in a result means the address's own, yet bridge's CHECK looks for a route that has none.
    """
    gateways = {":" in gateway: gateway for entry in result.get("ips", []) if (gateway := entry.get("gateway"))}
    routes = []
    for route in result.get("routes") or []:
        gateway = route.get("gw") or gateways.get(":" in str(route.get("dst")))
        routes.append({**route, "gw": gateway} if gateway else route)
    return {**result, "routes": routes}


def status(request: Request) -> bytes:
    """Whether an ADD would succeed now (50 where not), and whether the data path stands (51 where not).

    A daemon that is gone, or cut off from its datastore, is no reason to say no: the data path stands without it,
    and a node that reports not-ready loses its services.
    """
    from cni import daemon_status

    conf = request.conf
    check_delegate(conf)
    try:
        env = readiness.current_subnet(conf.subnet_file)
        if search_path := request.environment.get("CNI_PATH", ""):
            delegate.locate(delegate_conf(conf, env), search_path)
    except CniError as error:
        raise CniError(UNAVAILABLE, error.msg, error.details) from None
    found = daemon_status.read(conf.subnet_file)
    if found is not None and found.degraded:
        raise CniError(LIMITED_CONNECTIVITY, "containers on this node may not reach other nodes", found.degraded)
    return b""


def collect_garbage(request: Request) -> bytes:
    """Free what belongs to attachments that the runtime no longer has."""
    from cni import dead

    dead.collect(request)
    return b""


def version() -> bytes:
    return jsontext.dumps({"cniVersion": SUPPORTED[-1], "supportedVersions": list(SUPPORTED)}).encode()


SUPPORTED = ("0.1.0", "0.2.0", "0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0")


class Verb:
    """What the specification asks of a call before it is made."""

    __slots__ = ("required", "run", "since")

    def __init__(self, run: Callable[[Request], bytes], required: tuple[str, ...], since: str = "0.1.0") -> None:
        self.run = run
        self.required = required
        self.since = since


VERBS = {
    "ADD": Verb(add, ("CNI_CONTAINERID", "CNI_NETNS", "CNI_IFNAME", "CNI_PATH")),
    "DEL": Verb(delete, ("CNI_CONTAINERID", "CNI_IFNAME", "CNI_PATH")),
    "CHECK": Verb(check, ("CNI_CONTAINERID", "CNI_NETNS", "CNI_IFNAME", "CNI_PATH"), since="0.4.0"),
    "STATUS": Verb(status, (), since="1.1.0"),
    "GC": Verb(collect_garbage, ("CNI_PATH",), since="1.1.0"),
}
