"""Tar headers that lie, and names with dots."""

import io
import re
import tarfile

import pytest
from PIL import Image

from sslkit.data.shards import TarShards
from sslkit.data.shards.headers import DamagedTar, walk_headers
from sslkit.data.shards.members import read_members


def png():
    file = io.BytesIO()
    Image.new("RGB", (8, 8)).save(file, "PNG")
    return file.getvalue()


def header(name, size, kind=b"0"):
    """A header with a size of base 256, which may be negative."""
    info = tarfile.TarInfo(name)
    info.type = kind
    block = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    block[124:136] = bytes([0xFF if size < 0 else 0x80]) + (size % 2**88).to_bytes(11, "big")
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def member(name, content, kind=b"0"):
    return header(name, len(content), kind) + content + b"\0" * (-len(content) % 512)


def shard(path, *parts):
    path.write_bytes(b"".join(parts) + b"\0" * 1024)
    return path


class FewReads(io.BytesIO):
    """A file that is not read for ever."""

    reads = 0

    def read(self, *count):
        self.reads += 1
        assert self.reads < 100
        return super().read(*count)


def record(key, value):
    for length in range(200):
        line = f"{length} {key}={value}\n".encode()
        if len(line) == length:
            return line
    raise AssertionError


@pytest.mark.parametrize(
    ("parts", "reason"),
    [
        ([header("b.png", -512)], "'b.png', has the size -512"),
        ([header("b.png", -(10**18))], "has the size -10"),
        ([header("b.png", 10**18)], "the file ends inside b.png"),
        ([member("x", record("size", "-512"), b"x"), header("b.png", 0)], "not a number"),
        ([member("x", record("size", "9" * 30), b"x"), header("b.png", 0)], "not a number"),
        ([member("x", record("size", str(10**18)), b"x"), header("b.png", 0)], "ends inside"),
        ([header("x", -512, b"x")], "has the size -512"),
        ([header("x", 10**15, b"x")], "extended header of 1000000000000000 bytes"),
        ([header("x", 10**15, b"g")], "extended header"),
        ([header("x", -512, b"L")], "has the size -512"),
        ([header("x", 10**15, b"L")], "extended header"),
        ([member("x", b"99999999 path=a\n", b"x")], "broken pax records"),
        ([member("x", b"no record", b"x")], "broken pax records"),
        ([header("b.png", -512, b"S")], "has the size -512"),
        ([b"\1" * 512], "no tar header at byte 1024"),
    ],
)
def test_a_header_that_lies_ends_the_shard(tmp_path, parts, reason):
    path = shard(tmp_path / "a.tar", member("a.png", png()), *parts)
    file = FewReads(path.read_bytes())
    with pytest.raises(DamagedTar, match=re.escape(reason)):
        list(walk_headers(file, len(file.getvalue())))
    found = read_members(path)
    assert (len(found), found.names[0]) == (1, "a.png")
    assert reason in found.damage


@pytest.mark.parametrize("style", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_what_tarfile_writes(tmp_path, style):
    names = ["a.png", "./b/c.PNG", "d" * 90 + "/" + "e" * 90 + ".png", "sub.dir/f.png", "._a.png"]
    names += [] if style == tarfile.USTAR_FORMAT else ["ä" * 120 + ".png"]
    with tarfile.open(tmp_path / "a.tar", "w", format=style) as tar:
        for name in names:
            info = tarfile.TarInfo(name)
            info.size = len(png())
            tar.addfile(info, io.BytesIO(png()))
    found = read_members(tmp_path / "a.tar")
    with tarfile.open(tmp_path / "a.tar") as tar:
        expected = {info.name: (info.offset_data, info.size) for info in tar}
    assert found.damage is None
    assert {found.names[i]: (found.offsets[i], found.sizes[i]) for i in range(len(found))} == {
        name: place for name, place in expected.items() if name != "._a.png"
    }


def test_names_with_dots(tmp_path):
    members = {
        "22.05.png": png(),
        "22.06.png": png(),
        "22.05.cls": b"4",
        "22.cls": b"3",
        "7.mask.png": png(),
        "7.png": png(),
        "7.cls": b"1",
        "v1.2/8.jpg.png": png(),
    }
    path = shard(tmp_path / "a.tar", *(member(name, data) for name, data in members.items()))
    with pytest.warns(RuntimeWarning) as caught:
        images = TarShards(path)
    assert [images.name(i).partition(":")[2] for i in range(4)] == [
        *("22.05.png", "22.06.png", "7.png", "v1.2/8.jpg.png")
    ]
    assert [images[i][1] for i in range(4)] == [4, 3, 1, -1]
    (warning,) = caught
    assert "3 images have more than one dot" in str(warning.message)
    assert "such as 22.05.png" in str(warning.message)
    assert "1 images are passed over, as their names say that they are" in str(warning.message)


def test_links_are_told(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for kind in (tarfile.LNKTYPE, tarfile.SYMTYPE):
            info = tarfile.TarInfo("link.png")
            info.type, info.linkname = kind, "/etc/passwd"
            tar.addfile(info)
    with (
        pytest.warns(RuntimeWarning, match="2 images are passed over, as they are links"),
        pytest.raises(FileNotFoundError, match=r"links or sparse files, such as link.png"),
    ):
        TarShards(tmp_path / "a.tar")


@pytest.mark.parametrize("count", [-1, 10**12, 1.5, True, "3"])
def test_an_index_that_lies(tmp_path, count):
    import json

    shard(tmp_path / "a.tar", member("a.png", png()))
    index = {"shardlist": [{"url": "a.tar", "nsamples": count}]}
    (tmp_path / "shards.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"shards.json' is not an index .*nsamples is"):
        TarShards(tmp_path / "a.tar")
    index["shardlist"][0]["nsamples"] = 10**6  # more than the file has room for: it is read
    (tmp_path / "shards.json").write_text(json.dumps(index))
    assert len(TarShards(tmp_path / "a.tar")) == 1
