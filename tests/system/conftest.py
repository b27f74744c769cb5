"""Fixtures for tests with several hosts. Asking for ``make_lab`` is how a test says that it needs root."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from flanneld.lab.hosts import Lab


@pytest.fixture
def make_lab(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Lab]]:
    """A factory of labs (arguments: see ``Lab``); all are gone after the test."""
    for name in [name for name in os.environ if name.startswith("FLANNELD_")]:
        monkeypatch.delenv(name)
    if os.geteuid() != 0:
        pytest.skip("needs root: network namespaces")
    with contextlib.ExitStack() as stack:

        def make(hosts: int = 3, **options: Any) -> Lab:
            return stack.enter_context(Lab(hosts, **options))

        yield make


@pytest.fixture
def lab(make_lab: Callable[..., Lab]) -> Lab:
    """Three hosts and an etcd, with the default network configuration and no daemons yet."""
    lab = make_lab(3)
    lab.set_config()
    return lab
