"""docs/backends.md says what the code does: options, defaults, devices; its example is short and is a backend."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from pydantic import BaseModel

from backends.backend import BackendError
from backends.extension import ExtensionOptions
from backends.ipip import IpipOptions
from backends.registry import backend_class, known_backends
from backends.udp import UdpOptions
from backends.vxlan import VxlanOptions
from backends.wireguard import WireguardOptions

DOC = (Path(__file__).parents[2] / "docs" / "backends.md").read_text()
MODELS: dict[str, type[BaseModel] | None] = {
    "vxlan": VxlanOptions,
    "host-gw": None,
    "wireguard": WireguardOptions,
    "ipip": IpipOptions,
    "udp": UdpOptions,
    "alloc": None,
    "extension": ExtensionOptions,
}


def section(name: str) -> str:
    return DOC.split(f"\n## {name}\n")[1].split("\n## ")[0]


def blocks(language: str, text: str = DOC) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("name", MODELS)
def test_the_option_table_is_the_code_s(name: str) -> None:
    rows = re.findall(r"^\|`(\w+)`\|`([^`]*)`\|", section(name), re.MULTILINE)
    model = MODELS[name]
    fields = model.model_fields if model else {}
    assert dict(rows) == {key: json.dumps(field.default) for key, field in fields.items()}


def test_every_backend_has_a_section_and_a_row() -> None:
    for name in MODELS:
        assert name in known_backends()
        assert f"|[`{name}`](#{name})|" in DOC


def test_the_configurations_shown_are_accepted() -> None:
    for text in blocks("json"):
        config = json.loads(text)["Backend"]
        backend = backend_class(config.pop("Type"))(config)
        assert backend.unknown_options == ()


def test_the_example_is_short() -> None:
    example = blocks("toml") + blocks("python")
    assert len(example) == 2
    assert sum(len(text.splitlines()) for text in example) < 60


def test_the_example_refuses_what_it_cannot_use() -> None:
    names: dict[str, type] = {}
    exec(compile(blocks("python")[0], "example", "exec"), names)
    for wrong in ({}, {"Router": "nowhere"}):
        with pytest.raises(BackendError, match="give the router's address"):
            names["Router"](wrong)
    assert names["Router"]({"Router": "192.0.2.1", "Via": 1}).unknown_options == ("Via",)
