"""Run the delegate (``bridge`` as a rule) with a configuration of our making."""

from __future__ import annotations

import os

from cni import jsontext
from cni.errors import INCOMPATIBLE_VERSION, INTERNAL, INVALID_CONFIG, CniError, DelegateError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

# 1.1.0 added verbs and no field that a delegate of ours must understand, so an older one can be spoken to in 1.0.0.
NEWEST, ONE_BEFORE = "1.1.0", "1.0.0"
_SIGPIPE = 13  # as in ``signal``, whose import takes too long


def find(plugin: str, search_path: str) -> str:
    """The plugin's file in CNI_PATH; CniError names what to install."""
    directories = [directory for directory in search_path.split(":") if directory]
    if not plugin or "/" in plugin:
        raise CniError(INVALID_CONFIG, f"invalid plugin name: {plugin}")
    for directory in directories:
        path = os.path.join(directory, plugin)
        if os.access(path, os.X_OK):
            return path
    raise CniError(
        INTERNAL,
        f'failed to find plugin "{plugin}" in path [{" ".join(directories)}]',
        "install the standard CNI plugins there (Debian: containernetworking-plugins; the kube-flannel DaemonSet "
        "installs them where the host has none)",
    )


def locate(conf: dict[str, Any], search_path: str) -> str:
    """The delegate's file; "" where it, or its host-local, is not installed and the built-in one can do its work.

    CniError, naming what to install, where nothing can.
    """
    try:
        path = find(str(conf.get("type", "")), search_path)
        if (ipam := conf.get("ipam", {}).get("type")) == "host-local":
            find(ipam, search_path)
        return path
    except CniError:
        from cni import builtin

        if not builtin.serves(conf):
            raise
        return ""


def run(
    command: str,
    conf: dict[str, Any],
    environment: dict[str, str],
    meanwhile: Callable[[], None] | None = None,
) -> bytes:
    """Have the delegate execute ``command``; what it printed. ``meanwhile`` runs while it works.

    DelegateError carries the delegate's own error object; CniError where it died without one.
    """
    plugin = str(conf.get("type", ""))
    path = locate(conf, environment.get("CNI_PATH", ""))
    if not path:
        from cni import builtin

        if meanwhile is not None:
            meanwhile()
        return builtin.run(command, conf, environment)
    try:
        return _call(path, plugin, command, conf, environment, meanwhile)
    except DelegateError as error:
        if error.error.get("code") != INCOMPATIBLE_VERSION or conf.get("cniVersion") != NEWEST:
            raise
    output = _call(path, plugin, command, _spoken(conf, ONE_BEFORE), environment, None)
    result = jsontext.loads(output) if output.strip() else None
    return jsontext.dumps({**result, "cniVersion": NEWEST}).encode() if isinstance(result, dict) else output


def _spoken(conf: dict[str, Any], version: str) -> dict[str, Any]:
    made = {**conf, "cniVersion": version}
    if isinstance(previous := conf.get("prevResult"), dict):
        made["prevResult"] = {**previous, "cniVersion": version}
    return made


def _call(
    path: str,
    plugin: str,
    command: str,
    conf: dict[str, Any],
    environment: dict[str, str],
    meanwhile: Callable[[], None] | None,
) -> bytes:
    # Files in memory instead of pipes: neither side can block the other, whatever the sizes.
    stdin, stdout = os.memfd_create("stdin"), os.memfd_create("stdout")
    try:
        os.write(stdin, jsontext.dumps(conf).encode())
        os.lseek(stdin, 0, os.SEEK_SET)
        try:
            child = os.posix_spawn(
                path,
                [path],
                {**environment, "CNI_COMMAND": command},
                file_actions=[(os.POSIX_SPAWN_DUP2, stdin, 0), (os.POSIX_SPAWN_DUP2, stdout, 1)],
                setsigdef=[_SIGPIPE],  # Python ignores it, and a child would inherit that
            )
        except OSError as error:
            raise CniError(INTERNAL, f"cannot run the delegate {path}: {error.strerror}") from None
        if meanwhile is not None:
            meanwhile()
        _, status = os.waitpid(child, 0)
        os.lseek(stdout, 0, os.SEEK_SET)
        output = b"".join(iter(lambda: os.read(stdout, 65536), b""))
    finally:
        os.close(stdin)
        os.close(stdout)
    exit_code = os.waitstatus_to_exitcode(status)
    if exit_code == 0:
        return output
    try:
        error_object = jsontext.loads(output)
    except ValueError:
        error_object = None
    if isinstance(error_object, dict) and "code" in error_object:
        raise DelegateError(output, error_object, exit_code)
    ended = f"exit status {exit_code}" if exit_code > 0 else f"killed by signal {-exit_code}"
    raise CniError(
        INTERNAL, f"the delegate {plugin} failed at {command}: {ended}", output.decode("utf-8", "replace").strip()
    )
