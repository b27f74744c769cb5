"""Keys and values as flannel writes and reads them, byte for byte."""

from __future__ import annotations

import json
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from subnet_lease.lease import LeaseAttrs, NodeIdentity, subnet_key
from subnet_lease.lease_wire import decode_attrs, encode_attrs, go_dumps, parse_subnet_key

VXLAN = LeaseAttrs(
    public_ip=IPv4Address("192.168.64.3"),
    backend_type="vxlan",
    backend_data={"VNI": 1, "VtepMAC": "c6:d2:32:6f:8f:44"},
)


@pytest.mark.parametrize(
    ("attrs", "text"),
    [
        (
            VXLAN,
            '{"PublicIP":"192.168.64.3","PublicIPv6":null,"BackendType":"vxlan",'
            '"BackendData":{"VNI":1,"VtepMAC":"c6:d2:32:6f:8f:44"}}',
        ),
        (
            LeaseAttrs(
                public_ip=IPv4Address("192.168.64.3"),
                public_ipv6=IPv6Address("FC00::0:3"),
                backend_type="vxlan",
                backend_data={"VNI": 1},
                backend_v6_data={"VNI": 1},
                node=NodeIdentity("n", "m", "a:b"),
            ),
            '{"PublicIP":"192.168.64.3","PublicIPv6":"fc00::3","BackendType":"vxlan","BackendData":{"VNI":1},'
            '"BackendV6Data":{"VNI":1},"Node":{"Name":"n","MachineID":"m","MAC":"a:b"}}',
        ),
        (
            LeaseAttrs(IPv4Address("1.2.3.4"), backend_type="vxlan", node=NodeIdentity("n"), behind_nat=(4,)),
            '{"PublicIP":"1.2.3.4","PublicIPv6":null,"BackendType":"vxlan",'
            '"Node":{"Name":"n","MachineID":"","MAC":"","BehindNAT":true}}',
        ),
        *(
            (
                LeaseAttrs(IPv4Address("1.2.3.4"), IPv6Address("fc00::3"), node=NodeIdentity("n"), behind_nat=families),
                '{"PublicIP":"1.2.3.4","PublicIPv6":"fc00::3",'
                f'"Node":{{"Name":"n","MachineID":"","MAC":"","BehindNAT":true{more}}}}}',
            )
            for families, more in (((4,), ',"BehindNATFamily":4'), ((6,), ',"BehindNATFamily":6'), ((4, 6), ""))
        ),
        (LeaseAttrs(), '{"PublicIP":"0.0.0.0","PublicIPv6":null}'),
        (LeaseAttrs(public_ip=IPv4Address("1.2.3.4"), backend_type="udp"), '{"PublicIP":"1.2.3.4","PublicIPv6":null}'),
        (
            LeaseAttrs(public_ip=IPv4Address("1.2.3.4"), backend_type="alloc"),
            '{"PublicIP":"1.2.3.4","PublicIPv6":null}',
        ),
        (
            LeaseAttrs(backend_type="extension", backend_data="a<b>&\u2028ü\n"),
            '{"PublicIP":"0.0.0.0","PublicIPv6":null,"BackendType":"extension",'
            '"BackendData":"a\\u003cb\\u003e\\u0026\\u2028ü\\n"}',
        ),
    ],
)
def test_values_are_spelled_as_flannel_spells_them(attrs: LeaseAttrs, text: str) -> None:
    assert encode_attrs(attrs) == text
    assert decode_attrs(text).behind_nat == attrs.behind_nat


@pytest.mark.parametrize(
    ("said", "families"),
    [
        ('"BehindNAT":true', (4, 6)),  # also what the first version wrote, which knew no families
        ('"BehindNAT":true,"BehindNATFamily":4', (4,)),
        ('"BehindNAT":true,"BehindNATFamily":6', (6,)),
        ('"BehindNAT":true,"BehindNATFamily":"4"', (4, 6)),
        ('"BehindNAT":true,"BehindNATFamily":[4]', (4, 6)),
        ('"BehindNATFamily":4', ()),
        ('"BehindNAT":false', ()),
        ('"BehindNAT":"true"', ()),
        ('"BehindNAT":1', ()),
    ],
)
def test_who_is_behind_nat_says_so_beside_its_name(said: str, families: tuple[int, ...]) -> None:
    attrs = decode_attrs(f'{{"PublicIP":"1.2.3.4","PublicIPv6":"fc00::3","Node":{{"Name":"n",{said}}}}}')
    assert attrs.node == NodeIdentity("n") and attrs.behind_nat == families


def test_values_are_read_by_gos_rules() -> None:
    attrs = decode_attrs(
        ' {"publicip":"1.1.1.1","PUBLICIP":"192.168.64.3","PublicIPv6":null,"backendTYPE":"vxlan","Extra":[1],'
        '"BackendData": {"VNI":1, "VtepMAC":"c6:d2:32:6f:8f:44"}} '
    )
    assert attrs == VXLAN


def test_a_lease_without_ipv4() -> None:
    assert decode_attrs('{"PublicIP":"0.0.0.0","PublicIPv6":"fc00::3"}') == LeaseAttrs(
        public_ipv6=IPv6Address("fc00::3")
    )
    assert decode_attrs("{}") == LeaseAttrs()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "not JSON"),
        ("null", "must be a JSON object"),
        ('{"PublicIP":null}', "PublicIP null"),
        ('{"PublicIP":"fc00::1"}', "PublicIP"),
        ('{"PublicIP":"1.2.3"}', 'PublicIP "1.2.3"'),
        ('{"PublicIP":"1.2.3.04"}', "PublicIP"),
        ('{"PublicIP":"1.2.3.256"}', "PublicIP"),
        ('{"PublicIP":16909060}', "PublicIP"),
        ('{"PublicIP":"224.0.0.1"}', "multicast"),
        ('{"PublicIP":"255.255.255.255"}', "broadcast"),
        ('{"PublicIP":"1.2.3.4","PublicIPv6":"ff02::1"}', "multicast"),
        ('{"PublicIP":"1.2.3.4","PublicIPv6":"1.2.3.4"}', "PublicIPv6"),
        ('{"PublicIP":"1.2.3.4","PublicIPv6":"fe80::1%eth0"}', "PublicIPv6"),
        ('{"PublicIP":"1.2.3.4","BackendType":7}', "BackendType 7"),
        ('{"PublicIP":"1.2.3.4"} trailing', "Extra data"),
        ('{"PublicIP":"1.2.3.4","BackendData":{"VNI":NaN}}', "NaN"),
    ],
)
def test_values_that_cannot_be(text: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        decode_attrs(text)


@pytest.mark.parametrize("node", ["null", '"x"', "[]", "{}", '{"Name":7}', '{"Name":"","MAC":""}'])
def test_a_node_key_of_somebody_else_is_no_identity(node: str) -> None:
    assert decode_attrs(f'{{"PublicIP":"1.2.3.4","Node":{node}}}').node is None


@pytest.mark.parametrize(
    ("key", "v4", "v6"),
    [
        ("10.5.52.0-24", "10.5.52.0/24", None),
        ("10.5.52.0-24&fc00:0:0:34::-64", "10.5.52.0/24", "fc00:0:0:34::/64"),
        ("0.0.0.0-0&fc00:0:0:34::-64", None, "fc00:0:0:34::/64"),
        ("10.5.52.4-31", "10.5.52.4/31", None),
    ],
)
def test_keys(key: str, v4: str | None, v6: str | None) -> None:
    subnets = (IPv4Network(v4) if v4 else None, IPv6Network(v6) if v6 else None)
    assert parse_subnet_key(key) == subnets
    assert subnet_key(*subnets) == key


@pytest.mark.parametrize(
    "key",
    [
        "", "foo", "10.5.52.0", "10.5.52.0/24", "10.5.52.1-24", "10.5.52.0-32", "10.5.52.0-0", "10.5.300.0-24",
        "10.5.052.0-24", "10.5.52.0-024", "10.5.52.0-24&", "10.5.52.0-24&fc00::1-64", "10.5.52.0-24&fc00::-128",
        "10.5.52.0-24&FC00::-64", "10.5.52.0-24&fc00:0000::-64", "0.0.0.0-0", "10.5.52.0-24 ", "x10.5.52.0-24",
        "10.5.52.0-24\n", "10.5.52.٠-24", "10.5.52.0-24/sub",
    ],
)  # fmt: skip
def test_keys_that_cannot_be(key: str) -> None:
    with pytest.raises(ValueError, match="key "):
        parse_subnet_key(key)


v4_networks = st.tuples(st.integers(0, 2**32 - 1), st.integers(1, 31)).map(lambda pair: IPv4Network(pair, strict=False))
v6_networks = st.tuples(st.integers(0, 2**128 - 1), st.integers(1, 127)).map(
    lambda pair: IPv6Network(pair, strict=False)
)


@given(st.none() | v4_networks, st.none() | v6_networks)
def test_every_key_reads_back(v4: IPv4Network | None, v6: IPv6Network | None) -> None:
    if v4 is None and v6 is None:
        return
    assert parse_subnet_key(subnet_key(v4, v6)) == (v4, v6)


texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
json_values = st.recursive(
    st.booleans() | st.integers(-(2**53), 2**53) | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
)
attrs_values = st.builds(
    LeaseAttrs,
    public_ip=st.none() | st.integers(1, 0xDFFFFFFF).map(IPv4Address),
    public_ipv6=st.none() | st.integers(1, 2**120).map(IPv6Address),
    backend_type=st.sampled_from(["", "vxlan", "host-gw", "wireguard", "Ü<&>"]),
    backend_data=st.none() | json_values,
    backend_v6_data=st.none() | json_values,
    node=st.none() | st.builds(NodeIdentity, texts.filter(bool), texts, texts),
)


@given(attrs_values)
def test_every_value_reads_back(attrs: LeaseAttrs) -> None:
    text = encode_attrs(attrs)
    assert decode_attrs(text) == attrs
    assert not set("<>&\u2028\u2029") & set(text)
    assert list(json.loads(text))[:2] == ["PublicIP", "PublicIPv6"]


@given(st.text() | json_values.map(json.dumps) | st.dictionaries(
    st.sampled_from(["PublicIP", "publicip", "PublicIPv6", "BackendType", "BackendData", "Node"]), json_values
).map(json.dumps))  # fmt: skip
def test_garbage_values_raise_nothing_but_value_error(text: str) -> None:
    try:
        decode_attrs(text)
    except ValueError as error:
        str(error).encode()


@given(st.text(max_size=30) | st.from_regex(r"[0-9.]{1,16}-[0-9]{1,3}(&[0-9a-f:]{1,30}-[0-9]{1,3})?", fullmatch=True))
def test_garbage_keys_raise_nothing_but_value_error(key: str) -> None:
    try:
        subnets = parse_subnet_key(key)
    except ValueError as error:
        str(error).encode()
    else:
        assert subnet_key(*subnets) == key


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_json_cannot_say_is_not_written(value: Any) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        go_dumps(value)
