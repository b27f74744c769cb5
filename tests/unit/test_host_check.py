"""What keeps packets from flowing is named with its remedy."""

from __future__ import annotations

from pathlib import Path

from flanneld.dataplane.host_check import host_warnings


def test_forwarding_that_is_off_is_named_for_each_family(tmp_path: Path) -> None:
    for name, value in (("ipv4/ip_forward", "0\n"), ("ipv6/conf/all/forwarding", "1\n")):
        path = tmp_path / "net" / name
        path.parent.mkdir(parents=True)
        path.write_text(value)
    (warning,) = host_warnings((4, 6), iptables=False, proc_sys=tmp_path)
    assert "IPv4" in warning and "sysctl -w net.ipv4.ip_forward=1" in warning
