"""Of every backend and family: whatever is removed, altered or added comes right by itself, whole and soon."""

from __future__ import annotations

import pytest

from flanneld.lab.wait import NotYet, Promised, wait_until
from tests.system.backend_cases import Running, params, running_case
from tests.system.damage import Damage, damages
from tests.system.kernel_text import difference, kernel_text

PROMISE = Promised(5)
"""Seconds."""

DIRECT_PROMISE = Promised(1)
LOOK_PROMISE = Promised(PROMISE + 1)
"""For what the kernel does not tell: the daemon looks every five seconds."""


@pytest.mark.field_problem(1)
@pytest.mark.field_problem(2)
@pytest.mark.field_problem(3)
@pytest.mark.field_problem(6)
@pytest.mark.field_problem(19)
@pytest.mark.field_problem(23)
@pytest.mark.parametrize("name", params())
def test_whatever_happens_to_it_comes_right(name: str) -> None:
    """All damages to one pair of hosts, one after the other: each ends when all is as it was."""
    with running_case(name) as running:
        wrong = {}
        for what, damage in damages(running.case).items():
            try:
                check(running, damage, promised(what))
            except NotYet as error:
                wrong[what] = str(error)
        assert not wrong, "\n".join(f"{what}: {text}" for what, text in wrong.items())


def promised(what: str) -> float:
    if "direct route" in what:
        return DIRECT_PROMISE
    return LOOK_PROMISE if "sysctl" in what else PROMISE


def check(running: Running, damage: Damage, seconds: float) -> None:
    host, devices = running.host, set(running.case.devices.values()) or {"eth0"}
    before = kernel_text(host, *devices)
    damage(host)
    wait_until(
        lambda: kernel_text(host, *devices) == before,
        seconds,
        lambda: f"{difference(before, kernel_text(host, *devices))}\n{host.daemon.output(5)}",
    )
    wait_until(lambda: host.daemon.ready, PROMISE, "ready again")
    running.ping_all(PROMISE)
