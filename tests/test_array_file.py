"""Array files that are damaged, or lie."""

import io
import os
import zipfile

import numpy as np
import pytest

from sslkit.data import open_source
from sslkit.data.array_file import NpzFile

IMAGES = np.random.default_rng(0).integers(0, 256, (12, 5, 6, 3), np.uint8)


def npy(header, data=b""):
    text = header.encode().ljust(117) + b"\n"
    return b"\x93NUMPY\1\0" + len(text).to_bytes(2, "little") + text + data


def write_npz(path, content, name="images.npy", compression=zipfile.ZIP_DEFLATED):
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr(name, content)
    return path


HUGE = "{'descr': '|u1', 'fortran_order': False, 'shape': (1000000, 1000, 1000, 3), }"


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (npy(HUGE), r"3000000000000 bytes, but the archive has 0"),
        (npy(HUGE.replace("3)", "-3)")), "bytes"),
        (npy("{'descr': '|O', 'fortran_order': False, 'shape': (2,), }", b"cos"), "objects"),
        (npy("no header"), "header"),
        (b"no array", "magic"),
        (b"", "magic|EOF"),
    ],
)
def test_an_array_of_a_npz(tmp_path, content, reason):
    path = write_npz(tmp_path / "a.npz", content)
    with pytest.raises(ValueError, match=rf"cannot open the array file .*a.npz:images: .*{reason}"):
        open_source(path)


def test_a_zip_that_unfolds_to_gigabytes(tmp_path, monkeypatch):
    monkeypatch.setattr("sslkit.data.array_file._MAX_BYTES", 10_000)
    np.savez_compressed(tmp_path / "a.npz", images=np.zeros((100, 100, 100), np.uint8))
    with pytest.raises(ValueError, match=r"unfolds to 1000000 bytes, more than the limit of"):
        open_source(tmp_path / "a.npz")
    np.savez_compressed(tmp_path / "b.npz", images=IMAGES)
    assert len(open_source(tmp_path / "b.npz", test_fraction=0)) == 12


@pytest.mark.parametrize("compressed", [False, True])
def test_every_damaged_byte_is_an_error_or_a_pixel(tmp_path, compressed):
    file = io.BytesIO()
    (np.savez_compressed if compressed else np.savez)(file, images=IMAGES)
    content = file.getvalue()
    path, named = tmp_path / "a.npz", []
    for at in range(0, len(content), 7):
        for damaged in (content[:at], content[:at] + b"\xff" + content[at + 1 :]):
            path.write_bytes(damaged)
            try:
                open_source(path, test_fraction=0)
            except ValueError as error:
                named.append("a.npz" in str(error))
    assert all(named)


def test_other_files(tmp_path):
    np.savez(tmp_path / "a.npz", images=IMAGES)
    os.rename(tmp_path / "a.npz", tmp_path / "b.npy")
    with pytest.raises(ValueError, match=r"b.npy: it is a .npz archive"):
        open_source(tmp_path / "b.npy")
    np.save(tmp_path / "c.npy", IMAGES)
    os.rename(tmp_path / "c.npy", tmp_path / "c.npz")
    with pytest.raises(ValueError, match=r"c.npz: BadZipFile"):
        open_source(tmp_path / "c.npz")
    np.save(tmp_path / "d.npy", np.asfortranarray(IMAGES))
    assert np.array_equal(
        open_source(tmp_path / "d.npy", test_fraction=0)[3][0].permute(1, 2, 0), IMAGES[3]
    )


def test_looking_for_an_array_does_not_read_it(tmp_path):
    path = write_npz(tmp_path / "a.npz", b"broken")
    with NpzFile(path) as arrays:
        assert "images" in arrays
        assert arrays.get("labels") is None
