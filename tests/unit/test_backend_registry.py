"""The registry and the backend that does nothing."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from backends.alloc import Alloc
from backends.backend import BackendError, Published
from backends.host_gw import HostGw
from backends.registry import backend_class, known_backends
from tests.unit.backend_values import host, lease, underlay

BUILT_IN = ("alloc", "extension", "host-gw", "ipip", "udp", "vxlan", "wireguard")


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in which a test can install a distribution."""
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def install(where: Path, distribution: str, entry_points: str, **modules: str) -> None:
    info = where / f"{distribution.replace('-', '_')}-1.2.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.2\n")
    (info / "entry_points.txt").write_text(f"[flanneld.backends]\n{entry_points}\n")
    for name, text in modules.items():
        (where / f"{name}.py").write_text(text)


def test_the_built_in_backends_are_known() -> None:
    assert set(BUILT_IN) <= set(known_backends())


@pytest.mark.parametrize("name", BUILT_IN)
def test_every_built_in_backend_loads(name: str) -> None:
    backend = backend_class(name)({})
    assert backend.name == name
    assert backend.unknown_options == ()


def test_names_are_found_in_any_case() -> None:
    assert backend_class("Host-GW") is HostGw


def test_only_the_chosen_backend_is_imported(packages: Path) -> None:
    install(packages, "flanneld-bystander", "bystander = bystander_module:X", bystander_module="raise RuntimeError")
    backend_class("alloc")
    assert "bystander" in known_backends()
    assert "bystander_module" not in sys.modules


def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(BackendError, match=r"'vxlam' is not known here; known: .*alloc, .*vxlan"):
        backend_class("vxlam")


def test_a_broken_package_is_named(packages: Path) -> None:
    install(packages, "flanneld-broken", "broken = broken_backend:X", broken_backend="import no_such_module_here")
    with pytest.raises(BackendError, match=r"package flanneld-broken 1\.2.*no_such_module_here"):
        backend_class("broken")


def test_what_is_no_backend_is_refused_by_name(packages: Path) -> None:
    install(packages, "flanneld-half", "half = half_backend:Half", half_backend="class Half:\n    name = 'half'\n")
    with pytest.raises(BackendError, match=r"package flanneld-half 1\.2: half_backend:Half has no needs, mtu"):
        backend_class("half")


def test_two_packages_that_claim_one_name_are_both_named(packages: Path) -> None:
    install(packages, "flanneld-impostor", "vxlan = impostor:Vxlan", impostor="Vxlan = 1")
    with pytest.raises(BackendError, match=r"flanneld-impostor.*uninstall"):
        backend_class("vxlan")


def test_alloc_holds_a_lease_and_nothing_else() -> None:
    alloc = Alloc({"What": 1})
    assert alloc.published(host()) == Published("")
    assert alloc.mtu(underlay(mtu=1400), (4,)) == 1400
    assert not alloc.accepts(lease(backend_type=""))
    assert tuple(alloc.host_state(host())) == tuple(alloc.peer_state(host(), lease())) == ()
    assert alloc.unknown_options == ("What",)
