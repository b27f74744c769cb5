"""flannelctl cni-conf: the conflist for hosts that go without the plugin."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cni.conflist import render_conflist, write_conflist
from flanneld.ctl.cli import main
from tests.testbed.cni import SUBNET_ENV


@pytest.fixture
def subnet_file(tmp_path: Path) -> Path:
    (tmp_path / "subnet.env").write_text(SUBNET_ENV)
    return tmp_path / "subnet.env"


def test_the_bridge_gets_the_subnet(subnet_file: Path) -> None:
    assert json.loads(render_conflist(subnet_file)) == {
        "name": "cbr0",
        "cniVersion": "0.3.1",
        "plugins": [
            {
                "type": "bridge",
                "hairpinMode": True,
                "isDefaultGateway": True,
                "ipMasq": False,
                "mtu": 1450,
                "isGateway": True,
                "ipam": {
                    "type": "host-local",
                    "ranges": [[{"subnet": "10.5.52.0/24"}]],
                    "routes": [{"dst": "10.5.0.0/16"}],
                },
            },
            {"type": "portmap", "capabilities": {"portMappings": True}},
        ],
    }


def test_a_template_keeps_what_is_not_ours(subnet_file: Path) -> None:
    template = {
        "name": "blue",
        "cniVersion": "1.0.0",
        "disableCheck": True,
        "plugins": [
            {"type": "flannel", "capabilities": {"mac": True}, "ipam": {"dataDir": "/d"}, "delegate": {"mtu": 9}},
            {"type": "bandwidth"},
        ],
    }
    made = json.loads(render_conflist(subnet_file, json.dumps(template)))
    assert (made["name"], made["disableCheck"], made["plugins"][1]) == ("blue", True, {"type": "bandwidth"})
    bridge = made["plugins"][0]
    assert (bridge["capabilities"], bridge["ipam"]["dataDir"], bridge["mtu"]) == ({"mac": True}, "/d", 9)


def test_a_single_plugins_conf_becomes_a_list(subnet_file: Path) -> None:
    made = json.loads(render_conflist(subnet_file, '{"name": "x", "cniVersion": "0.2.0", "type": "flannel"}'))
    assert (made["name"], made["cniVersion"], made["plugins"][0]["type"]) == ("x", "0.2.0", "bridge")


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{", "not JSON"),
        ("[]", "must be a JSON object"),
        ('{"name": "x"}', "no list of plugins"),
        ('{"name": "x", "plugins": []}', 'no plugin of type "flannel"'),
        ('{"plugins": [{"type": "flannel"}]}', "no name"),
        ('{"name": "x", "plugins": [{"type": "flannel", "delegate": {"ipam": {}}}]}', "must not have 'ipam'"),
        ('{"name": "x", "plugins": [{"type": "flannel", "delegate": 1}]}', "'delegate' must be an object"),
    ],
)
def test_bad_templates(subnet_file: Path, template: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        render_conflist(subnet_file, template)


def test_it_is_written_only_when_it_changes(subnet_file: Path, tmp_path: Path) -> None:
    target = tmp_path / "net.d" / "10-flannel.conflist"
    assert write_conflist(target, render_conflist(subnet_file))
    inode = target.stat().st_ino
    assert not write_conflist(target, render_conflist(subnet_file))
    assert target.stat().st_ino == inode
    assert oct(target.stat().st_mode & 0o777) == "0o644"
    assert [path.name for path in target.parent.iterdir()] == ["10-flannel.conflist"]


def test_the_command(subnet_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "out.conflist"
    assert main(["cni-conf", "--subnet-file", str(subnet_file)]) == 0
    printed = capsys.readouterr().out
    assert main(["cni-conf", "--subnet-file", str(subnet_file), "--output", str(target)]) == 0
    assert target.read_text() == printed
    assert "written" in capsys.readouterr().out
    assert main(["cni-conf", "--subnet-file", "/nowhere/subnet.env"]) == 1
    assert "No such file or directory" in capsys.readouterr().err


def test_without_a_subnet_file_it_is_said_what_is_to_be_started(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    missing = tmp_path / "subnet.env"
    assert main(["cni-conf", f"--subnet-file={missing}"]) == 1
    assert capsys.readouterr().err == (
        f"error: cannot read {missing}: No such file or directory\n"
        "next:  start flanneld first, or name its --subnet-file\n"
    )
