"""flannelctl docker-opts: the files that mk-docker-opts.sh writes."""

from __future__ import annotations

from pathlib import Path

import pytest

from flanneld.ctl.cli import main

SUBNET_ENV = "FLANNEL_NETWORK=10.5.0.0/16\nFLANNEL_SUBNET=10.5.52.1/24\nFLANNEL_MTU=1450\nFLANNEL_IPMASQ=true\n"

BIP, MASQ, MTU = "--bip=10.5.52.1/24", "--ip-masq=false", "--mtu=1450"
INDIVIDUAL = f'DOCKER_OPT_BIP="{BIP}"\nDOCKER_OPT_IPMASQ="{MASQ}"\nDOCKER_OPT_MTU="{MTU}"\n'
COMBINED = f'DOCKER_OPTS=" {BIP} {MASQ} {MTU} "\n'


@pytest.fixture
def call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> object:
    monkeypatch.delenv("DOCKER_OPTS", raising=False)
    (tmp_path / "subnet.env").write_text(SUBNET_ENV)

    def docker_opts(*flags: str) -> tuple[int, str]:
        output = tmp_path / "docker_opts.env"
        code = main(["docker-opts", "-f", str(tmp_path / "subnet.env"), "-d", str(output), *flags])
        return code, output.read_text() if output.exists() else ""

    return docker_opts


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        ("", INDIVIDUAL + COMBINED),
        ("-i", INDIVIDUAL),
        ("-c", COMBINED),
        ("-ic", INDIVIDUAL + COMBINED),
        ("--individual --combined", INDIVIDUAL + COMBINED),
        ("-c -m", f'DOCKER_OPTS=" {BIP} {MTU} "\n'),
        ("-c -k DOCKER_NETWORK_OPTIONS", COMBINED.replace("DOCKER_OPTS", "DOCKER_NETWORK_OPTIONS")),
    ],
)
def test_writes_what_mk_docker_opts_writes(call, flags: str, text: str) -> None:
    assert call(*flags.split()) == (0, text)


@pytest.mark.parametrize(("daemon", "docker"), [("true", "false"), ("false", "true")])
def test_docker_masquerades_where_flanneld_does_not(call, tmp_path: Path, daemon: str, docker: str) -> None:
    (tmp_path / "subnet.env").write_text(SUBNET_ENV.replace("IPMASQ=true", f"IPMASQ={daemon}"))
    assert f"--ip-masq={docker}" in call("-c")[1]


def test_options_of_the_environment_are_kept(call, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DOCKER_OPTS", "--debug")
    monkeypatch.setenv("DOCKER_OPT_LOG", "--log-level=warn")
    assert call("-c") == (0, f'DOCKER_OPTS="--debug {BIP} {MASQ} --log-level=warn {MTU} "\n')


def test_without_a_subnet_file_there_are_no_options(call, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "subnet.env").unlink()
    assert call() == (0, 'DOCKER_OPTS=" "\n')
    missing = f"{tmp_path}/subnet.env does not exist: no subnet in it; start flanneld first"
    assert capsys.readouterr().err == f"warning: {missing}\n"


def test_bad_values(call, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "subnet.env").write_text(SUBNET_ENV.replace("IPMASQ=true", "IPMASQ=maybe"))
    assert call()[0] == 1
    assert "Invalid value of FLANNEL_IPMASQ: maybe" in capsys.readouterr().err
    assert call("-k", "not a name")[0] == 1
    assert call("-d", "/proc/nothing/here")[0] == 1


@pytest.mark.field_problem(36)
def test_the_hook_fires_only_when_values_changed(call, tmp_path: Path) -> None:
    fired = tmp_path / "fired"
    hook = ("--on-change", f"touch {fired}")
    call(*hook)
    assert not fired.exists()  # Docker has not been started with other values
    call(*hook)
    assert not fired.exists()  # nothing changed
    before = (tmp_path / "docker_opts.env").stat()
    call(*hook)
    assert (tmp_path / "docker_opts.env").stat().st_ino == before.st_ino
    (tmp_path / "subnet.env").write_text(SUBNET_ENV.replace("10.5.52.1", "10.5.53.1"))
    assert call(*hook)[0] == 0
    assert fired.exists()


def test_a_hook_that_fails_is_an_error(call, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    call()
    (tmp_path / "subnet.env").write_text(SUBNET_ENV.replace("1450", "1400"))
    assert call("--on-change", "false")[0] == 1
    assert "--on-change 'false': exit 1" in capsys.readouterr().err
    (tmp_path / "subnet.env").write_text(SUBNET_ENV)
    assert call("--on-change", "/absent/program")[0] == 1
    error = capsys.readouterr().err
    assert "--on-change '/absent/program': cannot run it: No such file or directory" in error
