"""subnet.env: text, rules of reading, and how it is put in place."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from ipaddress import IPv4Network, IPv6Network
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from subnet_lease.subnet_file import SubnetFile, parse, read, render, write

V4 = SubnetFile(IPv4Network("10.5.0.0/16"), IPv4Network("10.5.52.0/24"), mtu=1450, ip_masq=True)
DUAL = SubnetFile(V4.network, V4.subnet, IPv6Network("fc00:5::/48"), IPv6Network("fc00:5:0:34::/64"), 1430, False)


def test_text_is_flannels() -> None:
    assert render(V4) == (
        "FLANNEL_NETWORK=10.5.0.0/16\nFLANNEL_SUBNET=10.5.52.1/24\nFLANNEL_MTU=1450\nFLANNEL_IPMASQ=true\n"
    )
    assert render(DUAL) == (
        "FLANNEL_NETWORK=10.5.0.0/16\nFLANNEL_SUBNET=10.5.52.1/24\n"
        "FLANNEL_IPV6_NETWORK=fc00:5::/48\nFLANNEL_IPV6_SUBNET=fc00:5:0:34::1/64\n"
        "FLANNEL_MTU=1430\nFLANNEL_IPMASQ=false\n"
    )
    v6 = SubnetFile(ipv6_network=DUAL.ipv6_network, ipv6_subnet=DUAL.ipv6_subnet, mtu=1430)
    assert render(v6).startswith("FLANNEL_IPV6_NETWORK=")


@pytest.mark.parametrize(
    "text",
    [
        "FLANNEL_NETWORK='10.5.0.0/16'\nexport FLANNEL_SUBNET=\"10.5.52.1/24\" # ours\n# no\n\nFLANNEL_MTU = 1450\n"
        "FLANNEL_IPMASQ: true\r\nOTHER=x",
        "FLANNEL_NETWORK=10.9.0.0/16\nFLANNEL_NETWORK=10.5.0.0/16,10.6.0.0/16\nFLANNEL_SUBNET=10.5.52.1/24\n"
        "FLANNEL_MTU=1450 # bytes\nFLANNEL_IPMASQ=true",
    ],
)
def test_dotenv_rules(text: str) -> None:
    assert parse(text) == V4


def test_an_empty_file_says_nothing() -> None:
    assert parse("") == SubnetFile()
    assert not parse("FLANNEL_IPMASQ=yes\n").ip_masq


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("FLANNEL_SUBNET", "line 1"),
        ("\n=x", "line 2"),
        ("FLANNEL_SUBNET=10.5.52.1/33", "FLANNEL_SUBNET '10.5.52.1/33'"),
        ("FLANNEL_IPV6_NETWORK=10.5.0.0/16", "IPv6 network"),
        ("FLANNEL_MTU=big", "FLANNEL_MTU 'big'"),
        ("FLANNEL_MTU=-1", "FLANNEL_MTU"),
    ],
)
def test_refusals(text: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        parse(text)


networks4 = st.tuples(st.integers(0, 2**32 - 1), st.integers(1, 30)).map(lambda pair: IPv4Network(pair, strict=False))
networks6 = st.tuples(st.integers(0, 2**128 - 1), st.integers(1, 126)).map(lambda p: IPv6Network(p, strict=False))


@given(st.none() | st.tuples(networks4, networks4), st.none() | st.tuples(networks6, networks6), st.integers(0, 65535),
       st.booleans())  # fmt: skip
def test_every_file_reads_back(
    v4: tuple[IPv4Network, IPv4Network] | None, v6: tuple[IPv6Network, IPv6Network] | None, mtu: int, masq: bool
) -> None:
    content = SubnetFile(*(v4 or (None, None)), *(v6 or (None, None)), mtu, masq)
    assert parse(render(content)) == content


@given(st.text() | st.lists(st.sampled_from(["FLANNEL_", "NETWORK", "SUBNET", "MTU", "=", "'", '"', "#", "\n", " ",
                                             "10.5.0.0/16", "1", "::/0", ","])).map("".join))  # fmt: skip
def test_garbage_raises_nothing_but_value_error(text: str) -> None:
    try:
        parse(text)
    except ValueError as error:
        str(error).encode()


def test_written_in_one_step_for_everyone_to_read(tmp_path: Path) -> None:
    path = tmp_path / "run" / "flannel" / "subnet.env"
    old = os.umask(0o077)
    try:
        assert write(path, V4)
    finally:
        os.umask(old)
    assert stat.S_IMODE(path.stat().st_mode) == 0o644
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o755
    assert read(path) == V4
    assert list(path.parent.iterdir()) == [path]


def test_nothing_is_written_when_nothing_changed(tmp_path: Path) -> None:
    path = tmp_path / "subnet.env"
    assert write(path, V4)
    before = path.stat()
    assert not write(path, V4)
    assert (path.stat().st_ino, path.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    assert write(path, DUAL)
    assert read(path) == DUAL


def test_missing_and_malformed_files(tmp_path: Path) -> None:
    assert read(tmp_path / "no" / "subnet.env") is None
    path = tmp_path / "subnet.env"
    path.write_bytes(b"FLANNEL_MTU=\xff\n")
    with pytest.raises(ValueError, match=str(path)):
        read(path)
    assert write(path, V4)  # garbage is replaced


def test_a_failed_write_leaves_the_old_file_and_no_litter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "subnet.env"
    write(path, V4)

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write(path, DUAL)
    assert read(path) == V4
    assert list(tmp_path.iterdir()) == [path]


def test_the_cni_plugin_can_import_it_without_anything_else() -> None:
    code = "import sys; import subnet_lease.subnet_file; print(*sorted(m for m in sys.modules if 'pydantic' in m))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""
