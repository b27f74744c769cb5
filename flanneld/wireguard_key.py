"""This node's WireGuard key: found, or made once and kept.

flannel keeps its key in /run/flannel/wgkey, which a reboot empties: the node comes back with another key, and its peers
keep the old one (field problem 32). That path stays the first, so that a key of flanneld's is taken over and flanneld
takes ours; a copy below /var/lib survives the reboot. A path given by the operator (WIREGUARD_KEY_FILE) stands alone.
"""

from __future__ import annotations

import contextlib
import os
import stat
import subprocess
import sys
import tempfile
from base64 import b64decode, b64encode
from binascii import Error as Base64Error
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import structlog

from backends.backend import BackendError

log = structlog.get_logger("flanneld")

RUN_KEY: Final = Path("/run/flannel/wgkey")
"""flannel's path."""

KEPT_KEY: Final = Path("/var/lib/flannel/wgkey")
"""Our copy, which survives a reboot."""

KEY_BYTES: Final = 32

DERIVE_SECONDS: Final = 60

DERIVE: Final = """
import sys
from base64 import b64decode, b64encode
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
private = X25519PrivateKey.from_private_bytes(b64decode(sys.stdin.read()))
print(b64encode(private.public_key().public_bytes_raw()).decode())
"""


class KeyUnusable(BackendError):
    """The key can be neither read nor made. The text names the file and the remedy, never the key."""


@dataclass(frozen=True, slots=True)
class WireguardKey:
    """``private`` and ``public`` in base64: the facts "wireguard_key" and "wireguard_public_key".

    ``warnings`` are sentences for the log; ``made`` says that the key is new, and peers will learn it from the lease.
    """

    private: str = field(repr=False)
    public: str
    path: Path
    made: bool = False
    warnings: tuple[str, ...] = ()


def load_or_make_key(key_file: str) -> tuple[str, str]:
    """The private and the public key of this node; what is amiss with the files is logged. Raises KeyUnusable."""
    key = load_or_make(key_file)
    for warning in key.warnings:
        log.warning(warning)
    if key.made:
        log.info("WireGuard key made", file=str(key.path), public_key=key.public)
    return key.private, key.public


def load_or_make(key_file: str | None, run_key: Path = RUN_KEY, kept_key: Path = KEPT_KEY) -> WireguardKey:
    """The key of this node. ``key_file`` is WIREGUARD_KEY_FILE, None or "" if unset. Raises KeyUnusable."""
    paths = (Path(key_file),) if key_file else (run_key, kept_key)
    warnings: list[str] = []
    found = next((path for path in paths if _exists(path)), None)
    private = _read(found) if found else clamped(os.urandom(KEY_BYTES))
    public = public_key(private)  # before anything is written: a file that nobody can use helps nobody
    if found:
        warnings += _tighten(found)
    written = [found] if found else []
    for path in paths:
        if path == found or (_exists(path) and _read_or_none(path) == private):
            continue
        try:
            _write(path, private)
        except OSError as error:
            warnings.append(_unwritable(path, error, alone=len(paths) == 1))
        else:
            written.append(path)
    if not written:
        raise KeyUnusable(f"the new WireGuard key cannot be kept: {'; '.join(warnings)}")
    return WireguardKey(private, public, written[0], made=found is None, warnings=tuple(warnings))


def clamped(raw: bytes) -> str:
    """The key as WireGuard itself keeps it (RFC 7748, section 5), in base64: what is read back is what was set."""
    first, middle, last = raw[0] & 248, raw[1:31], raw[31] & 127 | 64
    return b64encode(bytes([first, *middle, last])).decode()


def public_key(private: str) -> str:
    """The public key that belongs to a private one (Curve25519), both in base64. Raises KeyUnusable.

    Another process computes it, once a start: the library would take 9 MB of ours for good. The key goes in as its
    standard input, which nobody else sees.
    """
    try:
        done = subprocess.run(
            [sys.executable, "-P", "-c", DERIVE],
            input=private,
            capture_output=True,
            text=True,
            timeout=DERIVE_SECONDS,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise KeyUnusable(f"cannot derive the public WireGuard key: {type(error).__name__}") from None
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise KeyUnusable(
            f"cannot derive the public WireGuard key: {lines[-1]}; the wireguard backend needs the Python package "
            "cryptography: pip install 'flanneld[wireguard]'"
        )
    return done.stdout.strip()


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError as error:
        raise KeyUnusable(f"cannot look for the WireGuard key {path}: {error.strerror}") from error


def _read(path: Path) -> str:
    """The key in the file, checked; KeyUnusable rather than a new key in place of one that peers may rely on."""
    try:
        text = path.read_text(encoding="ascii", errors="replace").strip()
    except OSError as error:
        raise KeyUnusable(f"cannot read the WireGuard key {path}: {error.strerror}") from error
    try:
        raw = b64decode(text, validate=True)
    except (Base64Error, ValueError):
        raw = b""
    if len(raw) != KEY_BYTES:
        raise KeyUnusable(
            f"{path} does not hold a WireGuard key (32 bytes in base64); restore it, or delete it to have a new one made"
        )
    return clamped(raw)


def _read_or_none(path: Path) -> str | None:
    try:
        return _read(path)
    except KeyUnusable:
        return None


def _tighten(path: Path) -> list[str]:
    """Take away everybody's permission but the owner's; a sentence if others could have read the key."""
    try:
        mode = stat.S_IMODE(path.stat().st_mode)
        if mode & 0o077:
            path.chmod(0o400)
            return [f"{path} could be read by others (mode {mode:04o}); it is 0400 now, consider a new key"]
    except OSError as error:
        return [f"{path}: permissions cannot be checked: {error.strerror}"]
    return []


def _write(path: Path, private: str) -> None:
    """Whole or not at all, 0400 from the first byte, and on the disk before anybody relies on it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(descriptor, "w", encoding="ascii") as file:
            os.fchmod(descriptor, 0o400)
            file.write(private)  # flannel writes no newline either
            file.flush()
            os.fsync(descriptor)
        Path(name).rename(path)
    except OSError:
        with contextlib.suppress(OSError):
            Path(name).unlink()
        raise
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _unwritable(path: Path, error: OSError, *, alone: bool) -> str:
    survives = (
        "" if alone else ", so it will not survive " + ("a reboot" if path != RUN_KEY else "a return to flanneld")
    )
    return f"the WireGuard key cannot be written to {path} ({error.strerror}){survives}"
