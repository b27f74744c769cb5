"""The CNI plugin's pure parts: subnet.env, configurations, addresses, JSON."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cni import cidr, jsontext, subnet_env
from cni.errors import CniError
from cni.netconf import NetConf, check_delegate, delegate_conf, teardown_conf

ENV = "FLANNEL_NETWORK=10.5.0.0/16\nFLANNEL_SUBNET=10.5.52.1/24\nFLANNEL_MTU=1450\nFLANNEL_IPMASQ=true\n"
DUAL = ENV + "FLANNEL_IPV6_NETWORK=fc00::/48\nFLANNEL_IPV6_SUBNET=fc00:0:0:34::1/64\n"


def conf(**fields: Any) -> NetConf:
    return NetConf({"cniVersion": "1.0.0", "name": "cbr0", "type": "flannel", **fields})


def test_defaults_are_injected_as_flannel_does() -> None:
    made = delegate_conf(conf(delegate={"hairpinMode": True, "isDefaultGateway": True}), subnet_env.read(ENV))
    assert made == {
        "name": "cbr0",
        "type": "bridge",
        "cniVersion": "1.0.0",
        "hairpinMode": True,
        "isDefaultGateway": True,
        "isGateway": True,
        "ipMasq": False,
        "mtu": 1450,
        "ipam": {
            "type": "host-local",
            "ranges": [[{"subnet": "10.5.52.0/24"}]],
            "routes": [{"dst": "10.5.0.0/16"}],
        },
    }


def test_what_the_user_wrote_wins_except_for_ranges() -> None:
    made = delegate_conf(
        conf(
            delegate={"type": "ipvlan", "mtu": 9000, "ipMasq": True},
            ipam={"type": "my-ipam", "ranges": [["mine"]], "routes": [{"dst": "0.0.0.0/0"}], "dataDir": "/x"},
            runtimeConfig={"portMappings": []} | {"mac": "02:00:00:00:00:01"},
        ),
        subnet_env.read(DUAL),
    )
    assert "isGateway" not in made
    assert (made["mtu"], made["ipMasq"], made["runtimeConfig"]["mac"]) == (9000, True, "02:00:00:00:00:01")
    assert made["ipam"] == {
        "type": "my-ipam",
        "dataDir": "/x",
        "ranges": [[{"subnet": "10.5.52.0/24"}], [{"subnet": "fc00:0:0:34::/64"}]],
        "routes": [{"dst": "0.0.0.0/0"}, {"dst": "10.5.0.0/16"}, {"dst": "fc00::/48"}],
    }


def test_somebody_masquerades() -> None:
    env = subnet_env.read(ENV.replace("IPMASQ=true", "IPMASQ=false"))
    assert delegate_conf(conf(), env)["ipMasq"] is True


def test_several_networks_in_one_line() -> None:
    env = subnet_env.read(ENV.replace("10.5.0.0/16", "10.5.0.0/16,10.6.1.2/16"))
    routes = delegate_conf(conf(), env)["ipam"]["routes"]
    assert routes == [{"dst": "10.5.0.0/16"}, {"dst": "10.6.0.0/16"}]


@pytest.mark.parametrize(
    ("delegate", "words"),
    [
        ({"type": 1}, "'delegate' dictionary, if present, must have (string) 'type' field"),
        ({"name": "x"}, "'delegate' dictionary must not have 'name' field, it'll be set by flannel"),
        ({"ipam": {}}, "'delegate' dictionary must not have 'ipam' field, it'll be set by flannel"),
    ],
)
def test_a_delegate_that_flannel_refuses(delegate: dict[str, Any], words: str) -> None:
    with pytest.raises(CniError, match=words.replace("(", r"\(").replace(")", r"\)")):
        check_delegate(conf(delegate=delegate))


@pytest.mark.parametrize("field", ["delegate", "ipam", "runtimeConfig", "subnetFile", "dataDir", "waitSeconds"])
def test_a_field_of_the_wrong_type_is_named(field: str) -> None:
    with pytest.raises(CniError, match=f"failed to load flannel netconf file: failed to load netconf: '{field}'"):
        conf(**{field: [True]})


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "is missing FLANNEL_NETWORK, FLANNEL_IPV6_NETWORK, FLANNEL_SUBNET, FLANNEL_IPV6_SUBNET, FLANNEL_MTU"),
        (ENV.replace("FLANNEL_MTU=1450\n", ""), "subnet.env is missing FLANNEL_MTU. Check the flannel pod log"),
        (ENV.replace("10.5.52.1/24", "10.5.52.1"), "invalid CIDR address: 10.5.52.1. Check"),
        (ENV.replace("1450", "big"), 'strconv.ParseUint: parsing "big": invalid syntax'),
        (ENV.replace("=1450", ""), "the line 'FLANNEL_MTU' has no value"),
    ],
)
def test_a_bad_subnet_file_is_explained_in_flannels_words(tmp_path: Any, text: str, words: str) -> None:
    path = tmp_path / "subnet.env"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"failed to load flannel 'subnet\.env' file: ") as caught:
        subnet_env.load(str(path))
    assert words in str(caught.value)


def test_a_missing_subnet_file_is_explained_in_flannels_words(tmp_path: Any) -> None:
    path = tmp_path / "subnet.env"
    with pytest.raises(ValueError) as caught:
        subnet_env.load(str(path))
    assert str(caught.value) == (
        f"failed to load flannel 'subnet.env' file: open {path}: no such file or directory. "
        "Check the flannel pod log for this node."
    )


def test_one_family_suffices_and_ipmasq_is_true_only_if_it_says_so() -> None:
    env = subnet_env.read(
        "# comment\nFLANNEL_IPV6_NETWORK=fc00::/48\nFLANNEL_IPV6_SUBNET=fc00:0:0:34::1/64\n"
        "FLANNEL_MTU=1450\nFLANNEL_IPMASQ=True\nSOMETHING=else\n"
    )
    assert env.missing() == []
    assert env.ipmasq is False


def test_teardown_without_anything_still_has_a_range() -> None:
    made = teardown_conf(conf(), None)
    assert made["ipam"]["ranges"] == [[{"subnet": "192.0.2.0/24"}]]
    made = teardown_conf(conf(prevResult={"ips": [{"address": "10.5.7.9/24"}, {"address": "fc00::9/64"}]}), None)
    assert made["ipam"]["ranges"] == [[{"subnet": "10.5.7.0/24"}], [{"subnet": "fc00::/64"}]]


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda children: st.lists(children) | st.dictionaries(st.text(), children),
    max_leaves=20,
)


@given(json_values)
def test_json_is_what_the_json_module_says(value: Any) -> None:
    assert json.loads(jsontext.dumps(value)) == value
    assert jsontext.loads(json.dumps(value, indent=2).encode()) == value


@given(st.binary(max_size=40))
def test_bad_json_is_a_value_error(data: bytes) -> None:
    try:
        expected = json.loads(data.decode("utf-8"))
    except (ValueError, RecursionError):
        with pytest.raises(ValueError):
            jsontext.loads(data)
    else:
        assert jsontext.loads(data) == expected or expected != expected  # noqa: PLR0124 - NaN


@given(st.ip_addresses(), st.data())
def test_cidr_agrees_with_ipaddress(address: Any, data: Any) -> None:
    import ipaddress

    prefix = data.draw(st.integers(0, address.max_prefixlen))
    interface = ipaddress.ip_interface(f"{address}/{prefix}")
    mine = cidr.parse(f"{address}/{prefix}")
    assert ipaddress.ip_network(str(mine.network)) == interface.network
    assert mine.network.holds(mine)


@pytest.mark.parametrize(
    "text", ["", "10.0.0.1", "10.0.0.1/33", "10.0.0/8", "10.0.0.1/+8", "::1/129", "x/1", "10.0.0.1/"]
)
def test_what_is_no_cidr(text: str) -> None:
    with pytest.raises(ValueError, match="invalid CIDR address: "):
        cidr.parse(text)
