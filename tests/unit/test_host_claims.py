"""Two daemons on one host: a device has one keeper, and each learns of the other's network."""

from __future__ import annotations

import os
import socket
import uuid
from collections.abc import Iterator
from ipaddress import ip_network

import pytest

from flanneld.host_claims import DeviceTaken, HostClaims


@pytest.fixture
def two() -> Iterator[tuple[HostClaims, HostClaims]]:
    claims = HostClaims(), HostClaims()
    yield claims
    for one in claims:
        one.close()


@pytest.fixture
def device() -> str:
    """A name that no other test run on this host has."""
    return f"flannel-{uuid.uuid4().hex}"


@pytest.mark.field_problem(44)
def test_a_device_has_one_keeper_who_is_named_and_may_give_it_back(two: tuple[HostClaims, HostClaims], device: str):
    red, blue = two
    red.take([device], [])
    red.take([device], [])
    with pytest.raises(DeviceTaken, match=rf"process {os.getpid()}\) keeps {device}"):
        blue.take([device, f"{device}-v6"], [])
    red.take([], [])
    blue.take([device, f"{device}-v6"], [])


@pytest.mark.field_problem(44)
def test_networks_of_others_are_seen_and_remembered(two: tuple[HostClaims, HostClaims], device: str):
    red, blue = two
    ours, theirs = ip_network("198.51.100.0/28"), ip_network(f"2001:db8:{device[8:12]}::/48")
    red.take([], [ours])
    blue.take([], [theirs])
    assert theirs in red.other_networks()
    assert ours not in red.other_networks()
    blue.close()
    assert theirs in red.other_networks(), "what it set up stands"
    red.take([], [theirs])
    assert theirs not in red.other_networks()


def test_many_questions_do_not_fill_the_queue(two: tuple[HostClaims, HostClaims], device: str):
    red, _ = two
    red.take([device], [])
    for _ in range(5):
        for _ in range(50):
            with pytest.raises(DeviceTaken):
                HostClaims().take([device], [])
        red.other_networks()


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root: becomes another user for a moment")
def test_a_user_s_claim_counts_for_nothing(two: tuple[HostClaims, HostClaims], device: str):
    red, _ = two
    network = f"2001:db8:{device[8:12]}:1::/64"
    held = []
    os.seteuid(65534)
    try:
        for name in (f"flanneld/device/{device}", f"flanneld/network/{network}"):
            claim = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            claim.bind(f"\0{name}")
            claim.listen()
            held.append(claim)
    finally:
        os.seteuid(0)
    red.take([device], [])
    assert ip_network(network) not in red.other_networks()
    for claim in held:
        claim.close()
