"""Files that are written whole or not at all."""

import os
from pathlib import Path

import pytest

from sslkit.files import atomic_path, atomic_write, file_digest


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


@pytest.mark.parametrize("failing", [None, "fsync", "replace"])
def test_any_error_keeps_the_old_file(
    failing: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    path = tmp_path / "file"
    path.write_bytes(b"old")
    if failing is not None:
        monkeypatch.setattr(os, failing, stop)
    with pytest.raises(KeyboardInterrupt), atomic_write(path) as file:  # noqa: PT012
        file.write(b"new, half wri")
        file.flush()
        if failing is None:
            stop()
    assert (path.read_bytes(), names(tmp_path)) == (b"old", ["file"])


def test_writing_need_not_wait_for_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    waited: list[int] = []
    monkeypatch.setattr(os, "fsync", waited.append)
    for flush in (False, True):
        with atomic_write(tmp_path / "file", flush=flush) as file:
            file.write(b"content")
        assert ((tmp_path / "file").read_bytes(), bool(waited)) == (b"content", flush)


def test_processes_that_write_at_once_do_not_meet(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file"
    with atomic_write(path) as mine:
        mine.write(b"mine")
        with monkeypatch.context() as patch:
            patch.setattr(os, "getpid", lambda: -1)
            with atomic_write(path) as theirs:
                theirs.write(b"theirs, longer")
        assert path.read_bytes() == b"theirs, longer"
    assert (path.read_bytes(), names(tmp_path)) == (b"mine", ["file"])


def test_a_path_may_be_written_by_another_file_under_its_name(tmp_path: Path) -> None:
    """As safetensors does, which renames a file of its own."""
    path = tmp_path / "file"
    with atomic_path(path) as temporary:
        (tmp_path / "other").write_bytes(b"renamed")
        (tmp_path / "other").rename(temporary)
    assert (path.read_bytes(), names(tmp_path)) == (b"renamed", ["file"])


def test_digest_of_known_bytes(tmp_path: Path) -> None:
    path = tmp_path / "abc"
    path.write_bytes(b"abc")  # FIPS 180-4, the first example
    expected = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert file_digest(path) == expected
