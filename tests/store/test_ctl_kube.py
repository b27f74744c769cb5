"""flannelctl's commands where Kubernetes holds the leases."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from flanneld.ctl.cli import main
from tests.testbed.fake_kube import FakeKube

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def kube() -> Iterator[FakeKube]:
    with FakeKube() as server:
        server.add_peer("worker-b", "10.244.2.0/24", "192.0.2.2", "02:00:00:00:00:02")
        server.add_peer("worker-a", "10.244.1.0/24", "192.0.2.1", "02:00:00:00:00:01")
        yield server


@pytest.fixture
def ctl(kube: FakeKube, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    file = tmp_path / "net-conf.json"
    file.write_text('{"Network": "10.244.0.0/16", "Backend": {"Type": "vxlan"}}')
    monkeypatch.setenv("FLANNELD_KUBE_SUBNET_MGR", "true")
    monkeypatch.setenv("FLANNELD_KUBE_API_URL", kube.url)
    monkeypatch.setenv("FLANNELD_NET_CONFIG_PATH", str(file))

    def run(*words: str) -> tuple[int, str, str]:
        code = main(words)
        shown = capsys.readouterr()
        return code, shown.out, shown.err

    return run


def test_leases_are_the_nodes(ctl: Run) -> None:
    code, out, err = ctl("leases")
    assert code == 0, err
    rows = [line.split() for line in out.splitlines()[1:]]
    assert [row[:5] for row in rows] == [
        ["10.244.1.0/24", "worker-a", "192.0.2.1", "vxlan", "02:00:00:00:00:01"],
        ["10.244.2.0/24", "worker-b", "192.0.2.2", "vxlan", "02:00:00:00:00:02"],
    ]
    assert [entry["node"] for entry in json.loads(ctl("leases", "--json")[1])] == ["worker-a", "worker-b"]


def test_the_configuration_is_a_file(ctl: Run) -> None:
    assert "10.244.0.0/16" in ctl("config", "get")[1]
    assert ctl("config", "check")[0] == 0
    code, _, err = ctl("config", "get", "--net-config-path=/nonexistent/net-conf.json")
    assert code == 1 and "kube-flannel-cfg" in err


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["config", "set", '{"Network": "10.244.0.0/16"}'], "kubectl -n kube-flannel edit configmap"),
        (["reserve", "10.244.7.0/24", "--node", "a"], "podCIDR"),
        (["release", "10.244.2.0/24", "--force"], "kubectl delete node"),
    ],
)
def test_what_kubernetes_decides_is_refused_with_the_way_to_do_it(ctl: Run, words: list[str], text: str) -> None:
    code, _, err = ctl(*words)
    assert code == 1
    assert text in err


def test_an_api_that_does_not_answer_is_named(ctl: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flanneld.ctl.access.KUBE_WAIT", 1.0)
    code, _, err = ctl("leases", "--kube-api-url=http://127.0.0.1:1")
    assert code == 1
    assert "showed no nodes within 1 s" in err and "--kube-api-url" in err
