"""The network configuration: what flannel accepts, what it refuses, and what is said about it."""

from __future__ import annotations

import json
from ipaddress import IPv4Network, IPv6Network
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, ConfigDict, Field

from subnet_lease import go_json
from subnet_lease.network_config import NetworkConfig, parse_network_config, validate_for_allocation
from subnet_lease.store import ConfigInvalid


def parse(**keys: Any) -> NetworkConfig:
    return parse_network_config(json.dumps(keys))


def allocatable(**keys: Any) -> NetworkConfig:
    return validate_for_allocation(parse(**keys))


def refusal(text: str) -> str:
    with pytest.raises(ConfigInvalid) as error:
        validate_for_allocation(parse_network_config(text))
    return str(error.value)


def test_flannels_documented_example() -> None:
    config = validate_for_allocation(
        parse_network_config(
            """{
                "Network": "10.0.0.0/8", "SubnetLen": 20, "SubnetMin": "10.10.0.0", "SubnetMax": "10.99.0.0",
                "Backend": {"Type": "udp", "Port": 7890}
            }"""
        )
    )
    assert config.network == IPv4Network("10.0.0.0/8")
    assert (config.subnet_min, config.subnet_max) == (IPv4Network("10.10.0.0/20"), IPv4Network("10.99.0.0/20"))
    assert (config.backend_type, config.backend_options) == ("udp", {"Port": 7890})
    assert config.unknown_keys == ()


@pytest.mark.field_problem(37)
def test_an_absent_backend_means_vxlan() -> None:
    config = allocatable(Network="10.5.0.0/16")
    assert (config.backend_type, config.backend_options) == ("vxlan", {})


@pytest.mark.parametrize("backend", [None, {}, {"Type": ""}, {"Type": None}, {"VNI": 1}])
def test_a_backend_without_a_type_is_refused_as_flannel_does(backend: object) -> None:
    assert "Backend.Type" in refusal(json.dumps({"Network": "10.5.0.0/16", "Backend": backend}))


def test_keys_match_in_any_case_and_the_last_duplicate_wins() -> None:
    config = parse_network_config(
        '{"network":"10.1.0.0/16","NETWORK":"10.2.0.0/16","Network":"10.3.0.0/16","nETWORK":"10.4.0.0/16",'
        '"backend":{"TYPE":"VXLAN","type":"Host-GW","vni":3}}'
    )
    assert config.network == IPv4Network("10.4.0.0/16")
    assert (config.backend_type, config.backend_options) == ("host-gw", {"vni": 3})


def test_of_exact_duplicates_the_last_wins_also_over_other_spellings_between_them() -> None:
    assert parse_network_config('{"SubnetLen":24,"subnetlen":25,"SubnetLen":26}').subnet_len == 26


def test_host_bits_are_masked() -> None:
    assert parse(Network="10.5.1.2/16", IPv6Network="fc00:5::1/48").network == IPv4Network("10.5.0.0/16")
    assert parse(IPv6Network="fc00:5::1/48").ipv6_network == IPv6Network("fc00:5::/48")


def test_k3s_spelling_of_a_family_that_is_off() -> None:
    config = allocatable(Network="10.5.0.0/16", IPv6Network="::/0", EnableIPv6=False)
    assert config.ipv6_network is None
    assert allocatable(EnableIPv4=False, EnableIPv6=True, Network="0.0.0.0/0", IPv6Network="fc00::/48").network is None
    assert "IPv6Network" in refusal('{"Network":"10.5.0.0/16","IPv6Network":"::/0","EnableIPv6":true}')


def test_unknown_keys_are_named() -> None:
    config = parse(Network="10.5.0.0/16", Netwrok="10.6.0.0/16", Backend={"Type": "vxlan", "VNII": 1})
    assert config.unknown_keys == ("Netwrok",)
    assert config.backend_options == {"VNII": 1}  # the backend tells of its own


def test_null_leaves_plain_values_alone_and_is_an_error_for_networks() -> None:
    config = parse(Network="10.5.0.0/16", SubnetLen=None, EnableIPv6=None, IPv6SubnetMin=None)
    assert (config.subnet_len, config.enable_ipv6) == (0, False)
    assert "Network null" in refusal('{"Network":null}')
    assert "SubnetMin null" in refusal('{"Network":"10.5.0.0/16","SubnetMin":null}')


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "not JSON"),
        ('{"Network":"10.5.0.0/16"} x', "Extra data"),
        ('{"Network":"10.5.0.0/16"}{}', "Extra data"),
        ("[]", "must be a JSON object"),
        ('{"Network":"10.5.0.0/16","SubnetLen":"24"}', 'SubnetLen "24"'),
        ('{"Network":"10.5.0.0/16","SubnetLen":24.0}', "SubnetLen 24.0"),
        ('{"Network":"10.5.0.0/16","SubnetLen":true}', "SubnetLen true"),
        ('{"Network":"10.5.0.0/16","SubnetLen":-1}', "SubnetLen -1"),
        ('{"Network":"10.5.0.0/16","SubnetLen":31}', "SubnetLen 31: must be at most 30"),
        ('{"Network":"10.5.0.0/16","SubnetLen":17}', "must be 18 or more"),
        ('{"Network":"10.5.0.0/29"}', "Network 10.5.0.0/29: too small, the longest useful prefix is /28"),
        ('{"Network":"10.5.0.0"}', 'Network "10.5.0.0": must be an IPv4 network'),
        ('{"Network":"10.5.0.0/255.255.0.0"}', "must be an IPv4 network"),
        ('{"Network":"fc00::/48"}', "must be an IPv4 network"),
        ('{"Network":10}', "Network 10"),
        ("{}", "Network is missing"),
        ('{"Network":"10.5.0.0/16","SubnetMin":"10.6.0.0"}', "SubnetMin 10.6.0.0: not inside Network 10.5.0.0/16"),
        ('{"Network":"10.5.0.0/16","SubnetMax":"10.5.3.128"}', "SubnetMax 10.5.3.128: not on a boundary"),
        ('{"Network":"10.5.0.0/16","SubnetMin":"10.5.9.0","SubnetMax":"10.5.3.0"}', "is above SubnetMax"),
        ('{"Network":"10.5.0.0/16","EnableIPv6":true}', "IPv6Network is missing"),
        ('{"Network":"10.5.0.0/16","EnableIPv6":true,"IPv6Network":"fc00::/125"}', "longest useful prefix is /124"),
        (
            '{"Network":"10.5.0.0/16","EnableIPv6":true,"IPv6Network":"fc00::/48","IPv6SubnetLen":127}',
            "IPv6SubnetLen 127: must be at most 126",
        ),
        ('{"Network":"10.5.0.0/16","EnableIPv6":"yes"}', 'EnableIPv6 "yes"'),
        ('{"EnableIPv4":false,"Network":"10.5.0.0/16"}', "EnableIPv4 and EnableIPv6 are both false"),
        ('{"Network":"10.5.0.0/16","Backend":"vxlan"}', 'Backend "vxlan": must be an object'),
        ('{"Network":"10.5.0.0/16","Backend":{"Type":7}}', "Backend.Type 7"),
        ('{"Network":"10.5.0.0/16","NonMasqueradeCIDRs":"10.0.0.0/8"}', "NonMasqueradeCIDRs"),
        ('{"Network":"10.5.0.0/16","NonMasqueradeCIDRs":["10.0.0.1"]}', "NonMasqueradeCIDRs"),
        ("[" * 100_000, "nested too deeply"),
        ('{"Network":NaN}', "NaN"),
    ],
)
def test_refusals_name_key_value_and_rule(text: str, words: str) -> None:
    message = refusal(text)
    assert words in message
    assert message.startswith("network configuration: ")
    assert "\n" not in message


@pytest.mark.parametrize(
    ("network", "length", "low", "high"),
    [
        ("10.5.0.0/16", 24, "10.5.1.0/24", "10.5.255.0/24"),
        ("10.5.0.0/22", 24, "10.5.1.0/24", "10.5.3.0/24"),
        ("10.5.0.0/23", 25, "10.5.0.128/25", "10.5.1.128/25"),
        ("10.5.0.0/28", 30, "10.5.0.4/30", "10.5.0.12/30"),
        ("10.0.0.0/8", 24, "10.0.1.0/24", "10.255.255.0/24"),
    ],
)
def test_defaults_of_length_and_range(network: str, length: int, low: str, high: str) -> None:
    config = allocatable(Network=network)
    assert (config.subnet_len, str(config.subnet_min), str(config.subnet_max)) == (length, low, high)


@pytest.mark.parametrize(
    ("network", "length", "low", "high"),
    [
        ("fc00:5::/48", 64, "fc00:5:0:1::/64", "fc00:5:0:ffff::/64"),
        ("fc00:5::/63", 65, "fc00:5:0:0:8000::/65", "fc00:5:0:1:8000::/65"),
        ("fc00:5::/124", 126, "fc00:5::4/126", "fc00:5::c/126"),
    ],
)
def test_defaults_of_ipv6(network: str, length: int, low: str, high: str) -> None:
    config = allocatable(EnableIPv4=False, EnableIPv6=True, IPv6Network=network)
    assert (config.ipv6_subnet_len, str(config.ipv6_subnet_min), str(config.ipv6_subnet_max)) == (length, low, high)


@pytest.mark.field_problem(40)
def test_destinations_that_are_not_masqueraded() -> None:
    config = parse(Network="10.5.0.0/16", NonMasqueradeCIDRs=["192.168.1.7/16", "fd00::/8"])
    assert config.non_masquerade_cidrs == (IPv4Network("192.168.0.0/16"), IPv6Network("fd00::/8"))
    assert config.unknown_keys == ()


@given(st.text() | st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(
        st.sampled_from(["Network", "network", "SubnetLen", "subnetMin", "Backend", "Type", "EnableIPv6", "x"]),
        inner, max_size=5,
    ),
).map(json.dumps))  # fmt: skip
def test_garbage_is_refused_in_one_way_only(text: str) -> None:
    try:
        validate_for_allocation(parse_network_config(text))
    except ConfigInvalid as error:
        str(error).encode()


class Options(BaseModel):
    model_config = ConfigDict(frozen=True)

    vni: int = Field(default=1, alias="VNI", ge=1, le=0xFFFFFF)
    direct_routing: bool = Field(default=False, alias="DirectRouting")
    Port: int = 0


def test_backend_options_follow_the_same_rules() -> None:
    options, unknown = go_json.decode_options(
        Options, {"vni": 1, "VNI": 3, "directrouting": True, "Vin": 1, "port": None}
    )
    assert (options.vni, options.direct_routing, options.Port, unknown) == (3, True, 0, ("Vin",))


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"vni": "3"}, 'VNI "3": must be a number without quotes'),
        ({"VNI": 3.0}, "VNI 3.0: must be a whole number"),
        ({"VNI": 0}, "VNI 0: must be greater than or equal to 1"),
        ({"DirectRouting": 1}, "DirectRouting 1: must be true or false"),
        ({"DirectRouting": "true"}, 'DirectRouting "true": must be true or false without quotes'),
        ({"VNI": True}, "VNI true: must be a whole number"),
    ],
)
def test_wrong_backend_options_name_key_value_and_rule(given: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words.replace(".", r"\.")) as error:
        go_json.decode_options(Options, given)
    assert type(error.value) is ValueError


def test_lone_surrogates_become_printable() -> None:
    assert go_json.parse('{"a":["\\ud800", {"\\udfff":"\\ud83d\\ude00"}]}') == {"a": ["\ufffd", {"\ufffd": "😀"}]}
