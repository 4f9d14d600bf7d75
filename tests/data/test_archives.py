"""An archive reads as its folder would; a cut or damaged one is an error, never a smaller set."""

import io
import os
import pickle
import signal
import tarfile
import zipfile

import numpy as np
import pytest
from PIL import Image

from collapse_probe.data.images import batches, open_data
from collapse_probe.data.preprocessing import from_timm_config
from collapse_probe.errors import DataError

PREPROCESS = from_timm_config({"input_size": (3, 16, 16)})


def picture(value=0, kind="PNG"):
    stream = io.BytesIO()
    Image.new("RGB", (8, 6), (value, 0, 0)).save(stream, kind)
    return stream.getvalue()


def member(name, content=b"", kind=tarfile.REGTYPE, target="", **settings):
    info = tarfile.TarInfo(name)
    info.size, info.type, info.linkname = len(content), kind, target
    for key, value in settings.items():
        setattr(info, key, value)
    return info, content


def tarred(path, members, mode="w", **settings):
    with tarfile.open(path, mode, **settings) as tar:
        for info, content in members:
            tar.addfile(info, io.BytesIO(content))
    return path


@pytest.fixture
def eight(tmp_path):
    return tarred(tmp_path / "t.tar", [member(f"{i}.png", picture(i)) for i in range(8)], format=tarfile.USTAR_FORMAT)


def offsets(path):
    with tarfile.open(path) as tar:
        return [info.offset for info in tar]


def test_a_tar_cut_at_any_byte_is_an_error(eight, tmp_path):
    content, starts = eight.read_bytes(), offsets(eight)
    end = starts[-1] + 512 + 512
    assert len(open_data(eight)) == 8
    cuts = [1, 511, 512, starts[3], starts[3] + 100, starts[3] + 512, starts[3] + 600, starts[7] + 513, end, end + 100]
    for cut in cuts:
        (tmp_path / "cut.tar").write_bytes(content[:cut])
        with pytest.raises(DataError, match="as an uncompressed tar"):
            open_data(tmp_path / "cut.tar")
    (tmp_path / "cut.tar").write_bytes(content[: end + 512])  # one block of the end mark is left
    assert len(open_data(tmp_path / "cut.tar")) == 8


@pytest.mark.parametrize("at", [0, 100, 124, 148, 156, 300])
def test_a_damaged_header_is_an_error_wherever_it_stands(eight, tmp_path, at):
    for start in offsets(eight):
        content = bytearray(eight.read_bytes())
        content[start + at] ^= 0xFF
        (tmp_path / "bad.tar").write_bytes(content)
        with pytest.raises(DataError, match="as an uncompressed tar"):
            open_data(tmp_path / "bad.tar")


def test_bytes_behind_the_end_are_said_and_a_second_archive_is_an_error(eight, tmp_path):
    (tmp_path / "more.tar").write_bytes(eight.read_bytes() + b"garbage")
    images = open_data(tmp_path / "more.tar")
    assert len(images) == 8
    assert images.left_out.counts == {"bytes behind the end mark of a tar": 1}
    (tmp_path / "twice.tar").write_bytes(eight.read_bytes() * 2)
    with pytest.raises(DataError, match="another archive begins behind its end mark"):
        open_data(tmp_path / "twice.tar")


def test_a_member_that_looks_like_the_end_mark_is_an_error(eight, tmp_path):
    content = bytearray(eight.read_bytes())
    start = offsets(eight)[3]
    for more in (b"", b"x"):  # in its place, and all that follows a byte later
        (tmp_path / "bad.tar").write_bytes(content[:start] + bytes(1024) + b"pixels" * 200 + more + content[start + 512 :])
        with pytest.raises(DataError, match="or a damaged member looks like that mark"):
            open_data(tmp_path / "bad.tar")


def test_files_that_the_list_of_a_zip_does_not_name_are_counted(tmp_path):
    parts = []
    for count in (2, 3):
        with zipfile.ZipFile(tmp_path / "t.zip", "w") as archive:
            for i in range(count):
                archive.writestr(f"é{i}.png", picture(i))
        parts.append((tmp_path / "t.zip").read_bytes())
        assert open_data(tmp_path / "t.zip").left_out.counts == {}
    (tmp_path / "t.zip").write_bytes(b"".join(parts))
    images = open_data(tmp_path / "t.zip")
    assert len(images) == 3
    assert images.left_out.counts == {"a file in the zip that its list of files does not name": 2}


def test_a_file_in_a_zip_whose_damaged_name_is_a_folders_is_counted(tmp_path):
    with zipfile.ZipFile(tmp_path / "t.zip", "w") as archive:
        archive.mkdir("empty")
        archive.writestr("cat/0.png", picture(0))
        archive.writestr("cat/1.png", picture(1))
    content = (tmp_path / "t.zip").read_bytes()
    at = content.rindex(b"1.png")
    (tmp_path / "t.zip").write_bytes(content[:at] + b"\0" + content[at + 1 :])
    images = open_data(tmp_path / "t.zip")
    assert images.names == ["cat/0.png"]
    assert images.left_out.counts == {"a folder by its name, with the bytes of a file: its name is damaged": 1}


def test_a_damaged_tar_inside_is_an_error(eight, tmp_path):
    inner = eight.read_bytes()
    path = tarred(tmp_path / "outer.tar", [member("a.tar", inner), member("b.tar", inner[:3000])])
    with pytest.raises(DataError, match="as an uncompressed tar"):
        open_data(path)


@pytest.mark.parametrize("size", [-512, -1024])
def test_a_negative_size_ends(tmp_path, size):
    def stop(*_):
        pytest.fail("the archive is read for ever")

    content = bytearray(tarred(tmp_path / "t.tar", [member("a.png", picture()), member("b.png", picture())]).read_bytes())
    start = offsets(tmp_path / "t.tar")[1]
    content[start + 124 : start + 136] = tarfile.itn(size, 12, tarfile.GNU_FORMAT)
    content[start + 148 : start + 156] = b" " * 8
    content[start + 148 : start + 155] = b"%06o\0" % sum(content[start : start + 512])
    (tmp_path / "bad.tar").write_bytes(content)
    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(20)
    try:
        with pytest.raises(DataError, match="as an uncompressed tar"):
            open_data(tmp_path / "bad.tar")
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def test_links_inside_are_followed_or_counted(tmp_path):
    members = [
        member("cat/0.png", picture(10)),
        member("objects/3f", picture(20)),
        member("cat/hard.png", kind=tarfile.LNKTYPE, target="cat/0.png"),
        member("cat/soft.png", kind=tarfile.SYMTYPE, target="0.png"),
        member("dog/1.png", kind=tarfile.SYMTYPE, target="../cat/elsewhere.png"),
        member("dog/2.png", kind=tarfile.SYMTYPE, target="../out/../.hid/4a"),
        member(".hid/4a", picture(30)),
        member("dog/folder", kind=tarfile.SYMTYPE, target="../cat"),
        member("dog/circle.png", kind=tarfile.SYMTYPE, target="circle.png"),
        member("dog/pipe.png", kind=tarfile.FIFOTYPE),
    ]
    images = open_data(tarred(tmp_path / "t.tar", members))
    assert images.names == ["cat/0.png", "cat/hard.png", "dog/2.png", "objects/3f"]
    assert [images[i].getpixel((0, 0))[0] for i in range(4)] == [10, 10, 30, 20]
    assert dict(images.left_out.entries()) == {
        "cat/soft.png": "a link to a file that is read already",
        "dog/1.png": "a link to nothing in the archive",
        "dog/circle.png": "a link to nothing in the archive",
        "dog/folder": "a link to a folder that is read already",
        "dog/pipe.png": "no regular file, but a pipe, a socket or a device",
        ".hid/4a": "hidden, or the operating system's own",
    }


def test_names_are_only_names(tmp_path):
    names = ["/etc/a.png", "../../b.png", "./c/../c/d.png", "__MACOSX/._e.png", "caf\udce9/f.png"]
    images = open_data(tarred(tmp_path / "t.tar", [member(name, picture()) for name in names], encoding="utf-8"))
    assert images.names == ["../../b.png", "c/d.png", r"caf\xe9/f.png", "etc/a.png"]
    assert images.class_names == ("..", "c", r"caf\xe9", "etc")
    assert images.left_out.counts == {"hidden, or the operating system's own": 1}
    (batch,) = batches(images, PREPROCESS, batch_size=8)
    assert len(batch.names) == 4
    assert not (tmp_path / "etc").exists()


def test_the_last_of_two_members_of_one_name_counts(tmp_path):
    images = open_data(tarred(tmp_path / "t.tar", [member("a.png", picture(1)), member("a.png", picture(2))]))
    assert images[0].getpixel((0, 0)) == (2, 0, 0)
    assert images.left_out.counts == {"replaced by another file of the same name in the archive": 1}


def test_a_name_inside_an_inner_tar_may_be_taken_and_is_counted(tmp_path):
    inner = tarred(tmp_path / "inner", [member("1.png", picture(1))]).read_bytes()
    images = open_data(
        tarred(tmp_path / "t.tar", [member("a.tar", inner), member("a/1.png", picture(2)), member("a.tar", inner)])
    )
    assert images.names == ["a/1.png"]
    assert images.left_out.counts == {"replaced by another file of the same name in the archive": 2}


def sparse_tar(path, name, content, holes):
    """A tar with one sparse member, written by hand as GNU tar does it in PAX format 1.0."""
    whole = bytearray(content)
    parts, at = [], 0
    for start, length in holes:
        parts.append((at, start - at))
        whole[start : start + length] = b"\0" * length
        at = start + length
    parts.append((at, len(content) - at))
    table = "\n".join(map(str, [len(parts), *(number for part in parts for number in part)])) + "\n"
    stored = table.encode().ljust(512, b"\0") + b"".join(bytes(whole[a : a + n]) for a, n in parts)
    info = tarfile.TarInfo(f"GNUSparseFile.0/{name}")
    info.size = len(stored)
    info.pax_headers = {
        "GNU.sparse.major": "1",
        "GNU.sparse.minor": "0",
        "GNU.sparse.name": name,
        "GNU.sparse.realsize": str(len(content)),
    }
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        tar.addfile(info, io.BytesIO(stored))
        tar.addfile(*[each if i == 0 else io.BytesIO(each) for i, each in enumerate(member("z.png", picture(9)))])
    return bytes(whole)


def bitmap():
    """A BMP with long runs of zeros."""
    values = np.zeros((64, 64, 3), dtype=np.uint8)
    values[:8] = 200
    values[-8:] = 90
    stream = io.BytesIO()
    Image.fromarray(values).save(stream, "BMP")
    return stream.getvalue(), values


def test_a_sparse_member_is_read_with_its_holes(tmp_path):
    content, values = bitmap()
    sparse_tar(tmp_path / "t.tar", "a.bmp", content, [(2560, 4096), (7000, 512)])
    images = open_data(tmp_path / "t.tar")
    assert images.names == ["a.bmp", "z.png"]
    assert np.array_equal(np.asarray(images[0]), values)
    assert images[1].getpixel((0, 0)) == (9, 0, 0)


@pytest.mark.parametrize("flavour", ["gnu", "posix", "posix --sparse-version=0.0", "posix --sparse-version=0.1"])
def test_a_sparse_member_of_gnu_tar(tmp_path, flavour):
    content, values = bitmap()
    with (tmp_path / "a.bmp").open("wb") as stream:
        for at in range(0, len(content), 512):
            part = content[at : at + 512]
            stream.seek(at)
            if part.strip(b"\0"):
                stream.write(part)
        stream.truncate(len(content))
    kind, _, version = flavour.partition(" ")
    command = f"cd '{tmp_path}' && tar --format={kind} {version} --sparse -cf t.tar a.bmp 2>/dev/null"
    if os.system(command):
        pytest.skip("no GNU tar")
    images = open_data(tmp_path / "t.tar")
    assert np.array_equal(np.asarray(images[0]), values)


@pytest.mark.parametrize("name", ["a.tar.gz", "a.tgz", "a.tar", "a.zip", "a.csv"])
@pytest.mark.parametrize(("how", "mode"), [("gzip", "w:gz"), ("bzip2", "w:bz2"), ("xz", "w:xz")])
def test_a_compressed_tar_is_refused_as_what_it_is(tmp_path, name, how, mode):
    path = tarred(tmp_path / name, [member("0.png", picture())], mode)
    with pytest.raises(DataError, match=f"is compressed with {how}, .*unpack it") as caught:
        open_data(path)
    assert "\n" not in str(caught.value)


def test_an_archive_under_another_name_is_read_as_what_it_is(eight, tmp_path):
    (tmp_path / "t.zip").write_bytes(eight.read_bytes())
    assert len(open_data(tmp_path / "t.zip")) == 8
    with zipfile.ZipFile(tmp_path / "z.tar", "w") as archive:
        archive.writestr("0.png", picture())
    assert open_data(tmp_path / "z.tar").names == ["0.png"]


@pytest.mark.parametrize("packed", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_a_zip_reads_as_its_folder_would_in_any_number_of_processes(tmp_path, packed):
    with zipfile.ZipFile(tmp_path / "a.zip", "w", packed) as archive:
        for i in range(6):
            archive.writestr(f"{'cat' if i < 3 else 'dog'}/{i}.png", picture(40 * i))
        archive.writestr("__MACOSX/cat/._0.png", picture())
        archive.writestr("read.txt", "words")
        archive.writestr("dog/plain", picture(7))
    images = open_data(tmp_path / "a.zip")
    assert images.names == [f"cat/{i}.png" for i in range(3)] + [f"dog/{i}.png" for i in range(3, 6)] + ["dog/plain"]
    assert (images.class_names, images.labels) == (("cat", "dog"), [0, 0, 0, 1, 1, 1, 1])
    assert sum(images.left_out.counts.values()) == 2
    assert images[4].getpixel((0, 0)) == (160, 0, 0)
    assert pickle.loads(pickle.dumps(images))[4].getpixel((0, 0)) == (160, 0, 0)
    names = [name for batch in batches(images, PREPROCESS, batch_size=2, workers=2) for name in batch.names]
    assert names == images.names


def test_what_a_zip_cannot_give_is_counted_or_skipped(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("a.png", picture())
        archive.writestr("locked.png", picture())
        link = zipfile.ZipInfo("link.png")
        link.external_attr = 0o120777 << 16
        archive.writestr(link, "a.png")
        archive.writestr("bad.png", picture(77))
    content = bytearray((tmp_path / "a.zip").read_bytes())
    entry = content.rfind(b"PK\x01\x02", 0, content.rfind(b"locked.png"))
    content[entry + 8] |= 1  # encrypted
    damaged = content.find(b"bad.png") + 7 + 40
    content[damaged] ^= 0xFF
    (tmp_path / "a.zip").write_bytes(content)
    images = open_data(tmp_path / "a.zip")
    assert dict(images.left_out.entries()) == {
        "locked.png": "encrypted",
        "link.png": "a link to a file that is read already",
    }
    (batch,) = batches(images, PREPROCESS, batch_size=4)
    assert batch.names == ("a.png",)
    assert batch.skipped[0][0] == "bad.png"


def test_a_zip_bomb_is_never_unpacked(tmp_path, monkeypatch):
    monkeypatch.setattr("collapse_probe.data.archives.MOST_BYTES", 10_000)
    with zipfile.ZipFile(tmp_path / "a.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.png", picture())
        archive.writestr("bomb.png", b"\0" * 20_000)
        archive.writestr("zeros.png", b"\0" * 9_000)
    images = open_data(tmp_path / "a.zip")
    assert dict(images.left_out.entries()) == {"bomb.png": "a file of more than 10,000 bytes in an archive"}
    (batch,) = batches(images, PREPROCESS, batch_size=4)
    assert batch.skipped == (("zeros.png", "it does not begin as a picture of a format that is read"),)


def test_a_cut_zip_is_an_error(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("a.png", picture())
    content = (tmp_path / "a.zip").read_bytes()
    for cut in (3, 40, len(content) - 10):
        (tmp_path / "cut.zip").write_bytes(content[:cut])
        with pytest.raises(DataError, match="no whole zip"):
            open_data(tmp_path / "cut.zip")


def test_a_windows_zip_keeps_its_folders(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        for name in ("cat\\0.png", "dog\\1.png"):
            info = zipfile.ZipInfo(name)
            info.filename, info.create_system = name, 0
            archive.writestr(info, picture())
    assert open_data(tmp_path / "a.zip").class_names == ("cat", "dog")


def test_a_zip_of_a_later_version_is_not_called_damaged(tmp_path):
    path = tmp_path / "later.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("0.png", b"any")
    content = bytearray(path.read_bytes())
    at = content.find(b"PK\x01\x02") + 6  # the version that is needed, in the list of files
    content[at : at + 2] = (99).to_bytes(2, "little")
    path.write_bytes(content)
    with pytest.raises(DataError, match="packed in a way that Python cannot unpack: zip file version"):
        open_data(path)
