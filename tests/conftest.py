"""Settings for all tests."""

from __future__ import annotations

import os

import pytest
from hypothesis import HealthCheck, settings

from flanneld.lab import wait

# For limits that only say when to give up; promised times (wait.Promised) are held whatever stands here.
wait.patience = float(os.environ.get("TEST_PATIENCE", "4"))

# A shared machine stalls now and then; what a property costs is judged by the whole run's time limit.
settings.register_profile("default", deadline=None, max_examples=60, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("default")

NEEDS_ROOT = ("tests/kernel/", "tests/store/", "tests/system/")


def pytest_collection_modifyitems(items):
    """Everything but unit tests makes namespaces or servers and needs root; say so instead of failing oddly."""
    if os.geteuid() == 0:
        return
    for item in items:
        if any(part in str(item.path) for part in NEEDS_ROOT):
            item.add_marker(pytest.mark.skip(reason="needs root: sudo script/test"))
