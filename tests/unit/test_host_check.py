"""What keeps packets from flowing, or from flowing where they should, is named with its remedy."""

from __future__ import annotations

from pathlib import Path

import pytest

from flanneld.dataplane.host_check import host_warnings, route_warning


def test_forwarding_that_is_off_is_named_for_each_family(tmp_path: Path) -> None:
    for name, value in (("ipv4/ip_forward", "0\n"), ("ipv6/conf/all/forwarding", "1\n")):
        path = tmp_path / "net" / name
        path.parent.mkdir(parents=True)
        path.write_text(value)
    (warning,) = host_warnings((4, 6), iptables=False, proc_sys=tmp_path)
    assert "IPv4" in warning and "sysctl -w net.ipv4.ip_forward=1" in warning


@pytest.mark.field_problem(34)
@pytest.mark.parametrize(
    ("backend", "pinned", "said"), [("wireguard", True, 1), ("wireguard", False, 0), ("vxlan", True, 0)]
)
def test_a_tunnel_that_cannot_follow_the_chosen_interface_is_named(backend: str, pinned: bool, said: int) -> None:
    found = route_warning(backend, "eth1", pinned)
    assert len(found) == said
    assert all("eth1" in text and "metric" in text for text in found)
