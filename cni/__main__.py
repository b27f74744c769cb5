"""Verb in, delegate run, result out: the program that a container runtime calls as ``flannel``."""

from __future__ import annotations

import os

from cni import jsontext
from cni.errors import (
    DECODING_FAILURE,
    INCOMPATIBLE_VERSION,
    INTERNAL,
    INVALID_CONFIG,
    INVALID_ENVIRONMENT,
    CniError,
    DelegateError,
)
from cni.verbs import SUPPORTED, VERBS, Request, Verb, version

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

ABOUT = "CNI plugin flannel: gives containers an address of this node's subnet, through a delegate such as bridge\n"


def main() -> int:
    """Answer one call; the exit code."""
    environment = dict(os.environ)
    command = environment.get("CNI_COMMAND", "")
    if not command:
        os.write(2, f"{ABOUT}CNI protocol versions supported: {', '.join(SUPPORTED)}\n".encode())
        return 0
    cni_version = SUPPORTED[0]
    try:
        if command == "VERSION":
            return _answer(version())
        verb = VERBS.get(command)
        if verb is None:
            raise CniError(INVALID_ENVIRONMENT, f"unknown CNI_COMMAND: {command}")
        _check_environment(verb, environment)
        document = _read_document()
        cni_version = document.get("cniVersion") or SUPPORTED[0]
        _check_version(command, verb, cni_version)
        return _answer(verb.run(Request(environment, document)))
    except DelegateError as error:
        _answer(error.output)
        return error.exit_code if error.exit_code > 0 else 1
    except CniError as error:
        return _fail(cni_version, error)
    except Exception as error:  # noqa: BLE001 - the runtime shows what stands on stdout, and nothing else
        return _fail(cni_version, CniError(INTERNAL, f"flannel plugin: {type(error).__name__}: {error}"))


def _check_environment(verb: Verb, environment: dict[str, str]) -> None:
    missing = [name for name in verb.required if not environment.get(name)]
    if missing:
        raise CniError(INVALID_ENVIRONMENT, f"required env variables [{','.join(missing)}] missing")
    if "CNI_CONTAINERID" in verb.required and not _is_identifier(environment["CNI_CONTAINERID"]):
        raise CniError(INVALID_ENVIRONMENT, "invalid characters in containerID", environment["CNI_CONTAINERID"])
    ifname = environment.get("CNI_IFNAME", "")
    bad_name = len(ifname) > 15 or ifname in (".", "..") or any(c in "/:" or c.isspace() for c in ifname)
    if "CNI_IFNAME" in verb.required and bad_name:
        raise CniError(INVALID_ENVIRONMENT, f"invalid interface name: {ifname!r}")


def _is_identifier(text: str) -> bool:
    """Letters and digits, after the first also ``_.-``: what may be a file's name (specification, "Parameters")."""
    rest = text.replace("_", "").replace(".", "").replace("-", "")
    return text.isascii() and text[:1].isalnum() and (not rest or rest.isalnum())


def _read_document() -> dict[str, Any]:
    data = b"".join(iter(lambda: os.read(0, 65536), b""))
    try:
        document = jsontext.loads(data)
    except (ValueError, RecursionError) as error:
        raise CniError(DECODING_FAILURE, f"error unmarshall network config: {error}") from None
    if not isinstance(document, dict):
        raise CniError(DECODING_FAILURE, "error unmarshall network config: this is not a JSON object")
    name = document.get("name")
    if not name:
        raise CniError(INVALID_CONFIG, "missing network name")
    if not isinstance(name, str) or not _is_identifier(name):
        raise CniError(INVALID_CONFIG, "invalid characters found in network name", str(name))
    return document


def _check_version(command: str, verb: Verb, cni_version: object) -> None:
    if cni_version not in SUPPORTED:
        raise CniError(
            INCOMPATIBLE_VERSION,
            "incompatible CNI versions",
            f'config is "{cni_version}", plugin supports {jsontext.dumps(SUPPORTED)}',
        )
    if SUPPORTED.index(cni_version) < SUPPORTED.index(verb.since):
        raise CniError(INCOMPATIBLE_VERSION, f"config version does not allow {command}")


def _answer(output: bytes) -> int:
    while output:
        output = output[os.write(1, output) :]
    return 0


def _fail(cni_version: object, error: CniError) -> int:
    spoken = cni_version if isinstance(cni_version, str) else SUPPORTED[0]
    answer = {"cniVersion": spoken, "code": error.code, "msg": error.msg}
    if error.details:
        answer["details"] = error.details
    _answer(jsontext.dumps(answer).encode() + b"\n")
    return 1


if __name__ == "__main__":
    # Nothing is left to flush or to close: skip the interpreter's farewell.
    os._exit(main())
