"""The programs that write firewalls: where they are, what they can do, and running them.

A missing one is looked for again each time, so that installing it heals a running daemon.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from typing import Final, Literal

from flanneld.dataplane.netfilter_names import Family

Variant = Literal["nft", "legacy"]
VARIANTS: Final[tuple[Variant, Variant]] = ("nft", "legacy")

_SBIN: Final = "/usr/sbin:/sbin:/usr/local/sbin"
_TIMEOUT: Final = 60.0
"""Seconds after which a program is ended. iptables waits for its lock for LOCK_SECONDS of them."""
LOCK_SECONDS: Final = 20
RESTORE_WAITS: Final = (1, 6, 2)
"""The iptables release in which iptables-restore learned --wait, and MASQUERADE --random-fully."""


class ToolMissing(Exception):
    """A program is not installed. The text names it and its Debian package."""


class ToolFailed(Exception):
    """A program refused. The text holds the command and what it said; ``cause`` is one word."""

    def __init__(self, cause: str, message: str) -> None:
        super().__init__(message)
        self.cause = cause


@dataclass(frozen=True, slots=True)
class Iptables:
    """One installed iptables: its commands' common prefix is ``iptables`` or ``iptables-legacy`` and so on."""

    prefix: str
    family: Family
    variant: Variant
    version: tuple[int, ...]

    @property
    def random_fully(self) -> bool:
        return self.version >= RESTORE_WAITS

    def save(self) -> str:
        return run([f"{self.prefix}-save"])

    def restore(self, text: str) -> None:
        wait = [f"--wait={LOCK_SECONDS}"] if self.version >= RESTORE_WAITS else []
        run([f"{self.prefix}-restore", "--noflush", *wait], text)


class Tools:
    """Finds programs and remembers them."""

    def __init__(self) -> None:
        self._iptables: dict[Family, Iptables] = {}

    def nft(self) -> str:
        """Raises ToolMissing."""
        if which("nft") is None:
            raise ToolMissing(
                "nft was not found: install the Debian package nftables, "
                "or set EnableNFTables to false in the network configuration"
            )
        return "nft"

    def iptables(self, family: Family) -> Iptables:
        """What ``iptables`` (``ip6tables``) is on this host. Raises ToolMissing, ToolFailed."""
        prefix = "iptables" if family == 4 else "ip6tables"
        known = self._iptables.get(family)
        if known is None:
            if not _has_pair(prefix):
                raise ToolMissing(
                    f"{prefix}-restore was not found: install the Debian package iptables, "
                    "or set EnableNFTables to true in the network configuration"
                )
            known = self._iptables[family] = _identify(prefix, family)
        return known

    def other_iptables(self, than: Iptables) -> Iptables | None:
        """The variant that is installed beside this one; both have the same version."""
        variant: Variant = "legacy" if than.variant == "nft" else "nft"
        prefix = f"{'iptables' if than.family == 4 else 'ip6tables'}-{variant}"
        return Iptables(prefix, than.family, variant, than.version) if _has_pair(prefix) else None


def _has_pair(prefix: str) -> bool:
    return all(which(f"{prefix}-{verb}") for verb in ("save", "restore"))


def _identify(prefix: str, family: Family) -> Iptables:
    """``iptables v1.8.9 (nf_tables)``; releases before 1.8 say no variant and are legacy."""
    text = run([f"{prefix}-restore", "--version"])
    number = re.search(r"v(\d+(?:\.\d+)*)", text)
    version = tuple(int(part) for part in number[1].split(".")) if number else (0,)
    return Iptables(prefix, family, "nft" if "nf_tables" in text else "legacy", version)


def which(program: str) -> str | None:
    return shutil.which(program, path=search_path())


def search_path() -> str:
    """PATH, and the sbin directories that a daemon's PATH may lack."""
    return f"{os.environ.get('PATH', '')}:{_SBIN}"


def run(argv: list[str], stdin: str = "") -> str:
    """Run a program; its standard output. Raises ToolMissing, ToolFailed."""
    path = which(argv[0])
    if path is None:
        raise ToolMissing(f"{argv[0]} was not found")
    command = " ".join(argv)
    try:
        done = subprocess.run(
            [path, *argv[1:]],
            input=stdin,
            capture_output=True,
            text=True,
            timeout=_TIMEOUT,
            check=False,
            env={**os.environ, "LC_ALL": "C"},
        )
    except subprocess.TimeoutExpired:
        raise ToolFailed("timeout", f"{command} did not end within {_TIMEOUT:.0f} seconds") from None
    except OSError as error:
        raise ToolFailed("exec", f"{command} could not be started: {error}") from None
    if done.returncode != 0:
        said = " ".join((done.stderr or done.stdout).split())
        cause = "locked" if "xtables lock" in said else "refused"
        raise ToolFailed(cause, f"{command} failed with exit code {done.returncode}: {said}")
    return done.stdout
