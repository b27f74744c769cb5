"""etcd's own leases: the one that a subnet's key hangs on, and the short one of a node's sign of life."""

from __future__ import annotations

import json
from typing import Any, Final

import grpc
import structlog

from subnet_lease.etcd_connection import EtcdConnection
from subnet_lease.store import AccessDenied, StoreError

log = structlog.get_logger(__name__)

LEASE_TTL: Final = 24 * 3600
"""Seconds; flannel's."""
UP_TTL: Final = 30
"""Seconds after which a node that died no longer counts as alive."""


def revoke(client: Any, lease_id: int) -> None:
    try:
        client.revoke_lease(lease_id)
    except grpc.RpcError as error:
        if error.code() is not grpc.StatusCode.NOT_FOUND:
            raise


def keep_alive(connection: EtcdConnection, lease_id: int) -> int:
    """Renew an etcd lease; the seconds it has now, 0 or less when it is gone."""
    answers = connection.call("renew the lease", lambda client: list(client.refresh_lease(lease_id)))
    return answers[0].TTL if answers else 0


class Grant:
    """An etcd lease of 24 h, granted when it is first needed and handed back if nothing was attached to it."""

    def __init__(self, connection: EtcdConnection) -> None:
        self._connection = connection
        self._id = 0
        self.used = False

    @property
    def id(self) -> int:
        if not self._id:
            self._id = self._connection.call("obtain an etcd lease", lambda client: client.lease(LEASE_TTL).id)
        return self._id

    def drop_unused(self) -> None:
        if self._id and not self.used:
            try:
                self._connection.call("return an etcd lease", lambda client: revoke(client, self._id))
            except StoreError as error:
                log.debug("an unused etcd lease stays until it expires", error=str(error))


class SignOfLife:
    """Our own sign of life: a key on a short etcd lease, and those of others."""

    def __init__(self, connection: EtcdConnection, prefix: str, instance: str) -> None:
        self._connection = connection
        self._prefix = f"{prefix}/up/"
        self._instance = instance
        self._lease_id = 0
        self._name = ""
        self._denied = False

    def read(self, name: str) -> str | None:
        """The instance that says it owns this lease and runs, None when nobody does or we must not know."""
        try:
            return self.ask(name)
        except AccessDenied:
            return None  # told when we write ours

    def ask(self, name: str) -> str | None:
        """The instance that says it owns this lease and runs, None when nobody does. AccessDenied."""
        answer = self._connection.call("read a sign of life", lambda client: client.get_response(self._prefix + name))
        for kv in answer.kvs:
            try:
                return str(json.loads(kv.value)["Instance"])
            except (ValueError, KeyError, TypeError):
                return ""
        return None

    def names(self) -> frozenset[str]:
        """The leases whose owners give a sign of life."""
        answer = self._connection.call(
            "read the signs of life", lambda client: client.get_prefix_response(self._prefix, keys_only=True)
        )
        return frozenset(kv.key.decode("utf-8", "replace").removeprefix(self._prefix) for kv in answer.kvs)

    def hold(self, name: str, node: str) -> None:
        """Show that the owner of this lease runs; to be repeated within UP_TTL."""
        try:
            if self._name == name and self._lease_id and keep_alive(self._connection, self._lease_id) > 0:
                return
            self._put(name, node)
        except AccessDenied as error:
            if not self._denied:
                log.warning("a clone of this node could take its address unnoticed: no sign of life", error=str(error))
            self._denied = True

    def _put(self, name: str, node: str) -> None:
        self.drop()
        value = json.dumps({"Instance": self._instance, "Node": node}, separators=(",", ":"))
        lease_id = self._connection.call("obtain an etcd lease", lambda client: client.lease(UP_TTL).id)
        self._connection.call(
            "show a sign of life", lambda client: client.put(self._prefix + name, value, lease=lease_id)
        )
        self._lease_id, self._name = lease_id, name

    def drop(self) -> None:
        """Take the sign back: we are gone on purpose."""
        if self._lease_id:
            lease_id, self._lease_id, self._name = self._lease_id, 0, ""
            self._connection.call("take back the sign of life", lambda client: revoke(client, lease_id))
