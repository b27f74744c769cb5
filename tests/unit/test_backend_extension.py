"""extension: which commands with which environment and input."""

from __future__ import annotations

import pytest

from backends.backend import BackendError, PeerRefused, Published
from backends.extension import Extension
from backends.kernel_state import Hook
from tests.unit.backend_values import host, lease, underlay

COMMANDS = {
    "PreStartupCommand": "pre",
    "PostStartupCommand": "post",
    "SubnetAddCommand": "add",
    "SubnetRemoveCommand": "remove",
    "ShutdownCommand": "shutdown",
}


def test_the_host_s_hook_has_our_own_values() -> None:
    (hook,) = Extension(COMMANDS).host_state(host(v6=True))
    assert (hook.add, hook.remove, hook.stdin) == ("post", "shutdown", "")
    assert dict(hook.environment) == {
        "NETWORK": "10.5.0.0/16",
        "IPV6NETWORK": "fc00::/48",
        "SUBNET": "10.5.1.0/24",
        "IPV6SUBNET": "fc00:0:0:1::/64",
        "PUBLIC_IP": "192.168.64.2",
        "PUBLIC_IPV6": "2001:db8:64::2",
    }


def test_a_peer_s_hook_has_the_peer_s_values_and_its_data_as_input() -> None:
    (hook,) = Extension(COMMANDS).peer_state(host(), lease(backend_type="extension", data="two\nlines"))
    assert hook == Hook(
        "peer 10.5.2.0-24",
        "add",
        "remove",
        (
            ("NETWORK", "10.5.0.0/16"),
            ("IPV6NETWORK", ""),
            ("SUBNET", "10.5.2.0/24"),
            ("IPV6SUBNET", ""),
            ("PUBLIC_IP", "192.168.64.3"),
            ("PUBLIC_IPV6", ""),
        ),
        "two\nlines\n",
    )


def test_without_data_the_input_is_an_empty_line_and_v6_data_serves_too() -> None:
    (hook,) = Extension(COMMANDS).peer_state(host(), lease())
    assert hook.stdin == "\n"
    (hook,) = Extension(COMMANDS).peer_state(host(v4=False, v6=True), lease(v4=False, v6=True, v6_data="six"))
    assert hook.stdin == "six\n"


def test_data_that_is_no_text_is_refused() -> None:
    with pytest.raises(PeerRefused, match=r"10\.5\.2\.0/24"):
        Extension(COMMANDS).peer_state(host(), lease(data={"VNI": 1}))


def test_the_startup_output_is_published_as_text_in_each_family() -> None:
    facts = {"startup_output": "c6:d2:32:6f:8f:44"}
    assert Extension(COMMANDS).published(host(facts=facts)) == Published("extension", facts["startup_output"])
    both = Extension(COMMANDS).published(host(v6=True, facts=facts))
    assert both == Published("extension", facts["startup_output"], facts["startup_output"])
    assert Extension({}).published(host()) == Published("extension")


def test_without_commands_there_are_no_hooks() -> None:
    assert Extension({}).host_state(host()) == Extension({}).peer_state(host(), lease()) == ()
    assert Extension({}).startup_command == ""
    assert Extension({}).mtu(underlay(mtu=1234), (4,)) == 1234


def test_wrong_and_unknown_options() -> None:
    with pytest.raises(BackendError, match=r"^extension backend: SubnetAddCommand \[\]"):
        Extension({"SubnetAddCommand": []})
    assert Extension({"subnetaddcommand": "x", "Shell": "zsh"}).unknown_options == ("Shell",)
    assert not Extension({}).accepts(lease())
