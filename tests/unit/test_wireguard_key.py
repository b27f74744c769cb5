"""The WireGuard key file: made once, kept through a reboot, 0400, never shown."""

from __future__ import annotations

import stat
from base64 import b64decode, b64encode
from pathlib import Path

import pytest
import structlog
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from hypothesis import given
from hypothesis import strategies as st

from backends.backend import BackendError
from flanneld import wireguard_key
from flanneld.wireguard_key import KeyUnusable, clamped, load_or_make, load_or_make_key, public_key

PRIVATE = clamped(b"\1" * 32)
PUBLIC = "pOCSkrZRwni5dyxWn1+puxPZBrRqtoyd+dwrRAn4ogk="  # wg pubkey


@pytest.fixture
def paths(tmp_path: Path) -> tuple[Path, Path]:
    return tmp_path / "run" / "flannel" / "wgkey", tmp_path / "var" / "flannel" / "wgkey"


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_a_new_key_is_kept_in_both_places_for_the_owner_alone(paths: tuple[Path, Path]) -> None:
    key = load_or_make(None, *paths)
    assert key.made
    assert not key.warnings
    for path in paths:
        assert path.read_text() == key.private
        assert mode(path) == 0o400
        assert [entry.name for entry in path.parent.iterdir()] == ["wgkey"], "no temporary file stays"
    assert key.public == public_key(key.private)


@pytest.mark.field_problem(32)
def test_the_key_survives_a_reboot(paths: tuple[Path, Path]) -> None:
    run, kept = paths
    before = load_or_make(None, run, kept)
    run.unlink()
    run.parent.rmdir()
    after = load_or_make(None, run, kept)
    assert (after.private, after.made) == (before.private, False)
    assert run.read_text() == before.private, "flanneld, taking over, finds the same key"


def test_flanneld_s_key_is_taken_over_and_then_survives_too(paths: tuple[Path, Path]) -> None:
    run, kept = paths
    kept.parent.mkdir(parents=True)
    kept.write_text(clamped(b"\7" * 32))
    run.parent.mkdir(parents=True)
    run.write_text(PRIVATE)
    run.chmod(0o400)
    key = load_or_make(None, run, kept)
    assert (key.private, key.public, key.path, key.made) == (PRIVATE, PUBLIC, run, False)
    assert kept.read_text() == PRIVATE
    assert mode(kept) == 0o400


def test_the_operator_s_path_stands_alone(tmp_path: Path, paths: tuple[Path, Path]) -> None:
    own = tmp_path / "secrets" / "key"
    key = load_or_make(str(own), *paths)
    assert own.read_text() == key.private
    assert not any(path.exists() for path in paths)
    assert load_or_make(str(own), *paths).private == key.private


def test_a_kept_file_is_not_rewritten(paths: tuple[Path, Path]) -> None:
    load_or_make(None, *paths)
    before = [path.stat() for path in paths]
    load_or_make(None, *paths)
    assert [(s.st_ino, s.st_mtime_ns) for s in before] == [
        (s.st_ino, s.st_mtime_ns) for s in (path.stat() for path in paths)
    ]


def test_a_readable_key_is_tightened_and_said(paths: tuple[Path, Path]) -> None:
    load_or_make(None, *paths)
    paths[0].chmod(0o644)
    key = load_or_make(None, *paths)
    assert mode(paths[0]) == 0o400
    assert "mode 0644" in key.warnings[0]
    assert key.private not in repr(key)


@pytest.mark.parametrize("text", ["", "hello", b64encode(b"short").decode(), "\0" * 44, "ü" * 44])
def test_a_damaged_file_is_never_replaced(tmp_path: Path, text: str) -> None:
    path = tmp_path / "wgkey"
    path.write_text(text)
    with pytest.raises(KeyUnusable, match="does not hold a WireGuard key"):
        load_or_make(str(path))
    assert path.read_text() == text


def test_one_place_that_cannot_be_written_is_a_warning_and_both_are_an_error(tmp_path: Path) -> None:
    wall = tmp_path / "wall"
    wall.write_text("a file where a folder should be")
    run = tmp_path / "run" / "wgkey"
    key = load_or_make(None, run, wall / "wgkey")
    assert key.path == run
    assert "will not survive a reboot" in key.warnings[0]
    with pytest.raises(BackendError, match="cannot be kept"):
        load_or_make(None, wall / "a" / "wgkey", wall / "b" / "wgkey")


def test_what_is_logged_shows_no_private_key(tmp_path: Path) -> None:
    path = tmp_path / "wgkey"
    with structlog.testing.capture_logs() as lines:
        private, public = load_or_make_key(str(path))
        path.chmod(0o640)
        load_or_make_key(str(path))
    assert len(lines) == 2
    assert private not in repr(lines)
    assert public in repr(lines)


def test_the_public_key_is_wg_s() -> None:
    assert public_key(PRIVATE) == PUBLIC


def test_a_missing_library_is_named_and_the_key_is_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wireguard_key, "DERIVE", "import no_such_library_here")
    with pytest.raises(KeyUnusable, match=r"No module named 'no_such_library_here'.*pip install") as error:
        public_key(PRIVATE)
    assert PRIVATE not in str(error.value)


@given(st.binary(min_size=32, max_size=32))
def test_clamping_keeps_the_public_key_and_is_done_once(raw: bytes) -> None:
    text = clamped(raw)
    kept, given = (X25519PrivateKey.from_private_bytes(key).public_key() for key in (b64decode(text), raw))
    assert kept.public_bytes_raw() == given.public_bytes_raw()
    assert clamped(b64decode(text)) == text
