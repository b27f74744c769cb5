"""The objects of the fake API server, their history, and what selects, merges and pages them."""

from __future__ import annotations

import base64
import copy
import json
import threading
import time
import uuid
from typing import Any

Object = dict[str, Any]

# plural -> (API group, kind, namespaced)
KINDS = {
    "nodes": ("", "Node", False),
    "pods": ("", "Pod", True),
    "events": ("", "Event", True),
    "networkpolicies": ("networking.k8s.io", "NetworkPolicy", True),
}


class ApiFailure(Exception):
    """An answer with a Status object."""

    def __init__(self, code: int, reason: str, message: str) -> None:
        super().__init__(message)
        self.status = {
            "kind": "Status",
            "apiVersion": "v1",
            "metadata": {},
            "status": "Failure",
            "message": message,
            "reason": reason,
            "code": code,
        }


class Store:
    """The objects, their history, and one version that counts writes. Everything under one condition variable."""

    def __init__(self) -> None:
        self.moved = threading.Condition()
        self.version = 1000
        self.oldest = 1000
        self.objects: dict[str, dict[tuple[str, str], Object]] = {plural: {} for plural in KINDS}
        self.history: list[tuple[int, str, str, Object]] = []
        self._pages: dict[str, list[Object]] = {}

    def write(self, change: str, plural: str, obj: Object) -> Object:
        """Record ADDED, MODIFIED or DELETED; call with ``moved`` held."""
        self.version += 1
        obj["metadata"]["resourceVersion"] = str(self.version)
        key = (obj["metadata"].get("namespace", ""), obj["metadata"]["name"])
        if change == "DELETED":
            self.objects[plural].pop(key, None)
        else:
            self.objects[plural][key] = obj
        self.history.append((self.version, change, plural, obj))
        self.moved.notify_all()
        return obj

    def create(self, plural: str, obj: Object) -> Object:
        group, kind, namespaced = KINDS[plural]
        metadata = obj.setdefault("metadata", {})
        key = (metadata.get("namespace", "") if namespaced else "", metadata["name"])
        with self.moved:
            if key in self.objects[plural]:
                raise ApiFailure(409, "AlreadyExists", f'{plural} "{key[1]}" already exists')
            obj = {"apiVersion": f"{group}/v1" if group else "v1", "kind": kind, **copy.deepcopy(obj)}
            obj["metadata"].setdefault("uid", str(uuid.uuid4()))
            obj["metadata"].setdefault("creationTimestamp", time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()))
            return self.write("ADDED", plural, obj)

    def get(self, plural: str, namespace: str, name: str) -> Object:
        with self.moved:
            found = self.objects[plural].get((namespace, name))
        if found is None:
            raise ApiFailure(404, "NotFound", f'{plural} "{name}" not found')
        return found

    def patch(self, plural: str, namespace: str, name: str, patch: Object, *, strategic: bool, status: bool) -> Object:
        with self.moved:
            before = self.get(plural, namespace, name)
            wanted = patch.get("metadata", {}).get("resourceVersion")
            if wanted is not None and wanted != before["metadata"]["resourceVersion"]:
                raise ApiFailure(
                    409,
                    "Conflict",
                    f'Operation cannot be fulfilled on {plural} "{name}": the object has been modified; please apply'
                    " your changes to the latest version and try again",
                )
            if status:
                # The status subresource takes metadata and status; spec stays as it is.
                patch = {key: value for key, value in patch.items() if key != "spec"}
            after = _merge(before, patch, strategic=strategic)
            after["metadata"]["resourceVersion"] = before["metadata"]["resourceVersion"]
            return before if after == before else self.write("MODIFIED", plural, after)

    def delete(self, plural: str, namespace: str, name: str) -> Object:
        with self.moved:
            return self.write("DELETED", plural, copy.deepcopy(self.get(plural, namespace, name)))

    def page(self, plural: str, namespace: str, query: dict[str, str]) -> Object:
        """One page of a list. The continue token names a version and a position; the version may be compacted away."""
        group, kind, _ = KINDS[plural]
        limit = int(query.get("limit", "0"))
        with self.moved:
            if token := query.get("continue"):
                version, start = json.loads(base64.b64decode(token))
                if version < self.oldest or str(version) not in self._pages:
                    raise ApiFailure(410, "Expired", "The provided continue parameter is too old")
                items = self._pages[str(version)]
            else:
                version, start = self.version, 0
                items = [
                    obj
                    for key, obj in sorted(self.objects[plural].items())
                    if (not namespace or key[0] == namespace) and selected(obj, query)
                ]
                if limit:
                    self._pages[str(version)] = items
        chosen = items[start : start + limit] if limit else items
        metadata: Object = {"resourceVersion": str(version)}
        if limit and start + limit < len(items):
            metadata["continue"] = base64.b64encode(json.dumps([version, start + limit]).encode()).decode()
            metadata["remainingItemCount"] = len(items) - start - limit
        return {
            "kind": f"{kind}List",
            "apiVersion": f"{group}/v1" if group else "v1",
            "metadata": metadata,
            "items": chosen,
        }

    def compact(self) -> None:
        """Forget all history, as etcd's compaction does: older watches and continue tokens get 410."""
        with self.moved:
            self.oldest = self.version
            self.history.clear()
            self._pages.clear()

    def restore(self, version: int) -> None:
        """Let the version go backwards, as after restoring etcd from a backup."""
        with self.moved:
            self.version = self.oldest = version
            self.history.clear()
            for objects in self.objects.values():
                for obj in objects.values():
                    obj["metadata"]["resourceVersion"] = str(version)
            self.moved.notify_all()


def selected(obj: Object, query: dict[str, str]) -> bool:
    labels = obj["metadata"].get("labels") or {}
    for term in _terms(query.get("labelSelector", "")):
        if not _matches(term, labels):
            return False
    for term in _terms(query.get("fieldSelector", "")):
        path, _, value = term.partition("=")
        found: Any = obj
        for word in path.split("."):
            found = (found or {}).get(word)
        if (found or "") != value:
            return False
    return True


def _terms(selector: str) -> list[str]:
    """Split at the commas that are not inside parentheses."""
    terms, depth, word = [], 0, ""
    for letter in selector:
        depth += (letter == "(") - (letter == ")")
        if letter == "," and not depth:
            terms.append(word)
            word = ""
        else:
            word += letter
    return [term for term in [*terms, word] if term]


def _matches(term: str, labels: dict[str, str]) -> bool:
    for operator in (" notin ", " in "):
        if operator in term:
            key, _, rest = term.partition(operator)
            return (labels.get(key) in rest.strip("() ").split(",")) is (operator == " in ")
    if "=" in term:
        key, _, value = term.partition("=")
        return labels.get(key) == value
    return term[1:] not in labels if term.startswith("!") else term in labels


def _merge(before: Any, patch: Any, *, strategic: bool, path: tuple[str, ...] = ()) -> Any:
    """RFC 7386; in a strategic merge, a node's conditions are merged by their type."""
    if strategic and path == ("status", "conditions") and isinstance(patch, list):
        merged = {item["type"]: item for item in before or []}
        for item in patch:
            merged[item["type"]] = {**merged.get(item["type"], {}), **item}
        return list(merged.values())
    if not isinstance(patch, dict):
        return copy.deepcopy(patch)
    result = dict(before) if isinstance(before, dict) else {}
    for key, value in patch.items():
        if value is None:
            result.pop(key, None)
        else:
            result[key] = _merge(result.get(key), value, strategic=strategic, path=(*path, key))
    return result
