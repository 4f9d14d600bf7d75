"""Of a folder every real picture is read once under a name that can be written, and all else is counted with its reason."""

import os
import socket

import numpy as np
import pytest
from PIL import Image

from collapse_probe.data.images import batches, open_data
from collapse_probe.data.preprocessing import Preprocess, from_timm_config
from collapse_probe.data.readers import SUFFIXES, LeftOut
from collapse_probe.errors import DataError
from collapse_probe.provenance import escaped, names_sha256

THUMBNAIL = from_timm_config({"input_size": (3, 16, 16)})


def saved(path, value=0, **settings):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 6), (value, 0, 0)).save(path, **settings)
    return path


def reasons(images):
    return dict(images.left_out.entries())


# links, pipes, hidden files


def test_links_to_folders_above_and_to_each_other_end_and_count_nothing_twice(tmp_path):
    for i in range(3):
        saved(tmp_path / "in" / "sub" / f"{i}.png", i)
    saved(tmp_path / "beside.png")
    (tmp_path / "in/sub/up").symlink_to("..", target_is_directory=True)
    (tmp_path / "in/a").symlink_to(".", target_is_directory=True)
    (tmp_path / "in/b").symlink_to(tmp_path, target_is_directory=True)
    (tmp_path / "in/again").symlink_to("sub", target_is_directory=True)
    images = open_data(tmp_path / "in")
    assert images.names == ["sub/0.png", "sub/1.png", "sub/2.png"]
    assert images.left_out.counts == {"a link to a folder above it": 3, "a link to a folder that is read already": 1}
    assert reasons(images)["again/"] == "a link to a folder that is read already"


def test_links_that_lead_elsewhere_are_followed_once(tmp_path):
    saved(tmp_path / "store/x.png", 1)
    saved(tmp_path / "store/deep/y.png", 2)
    root = tmp_path / "set"
    saved(root / "z.png", 3)
    (root / "all").symlink_to(tmp_path / "store", target_is_directory=True)
    (root / "part").symlink_to(tmp_path / "store/deep", target_is_directory=True)
    (root / "0.png").symlink_to("z.png")
    (root / "x-too.png").symlink_to(tmp_path / "store/x.png")
    (root / "lost.png").symlink_to("nowhere.png")
    (root / "circle.png").symlink_to("circle.png")
    images = open_data(root)
    assert images.names == ["all/deep/y.png", "all/x.png", "z.png"]
    assert reasons(images)["part/"] == "a link to a folder that is read already"
    assert reasons(images)["0.png"] == reasons(images)["x-too.png"] == "a link to a file that is read already"
    assert reasons(images)["lost.png"] == "a link to nothing"
    assert "circle.png" in reasons(images)


def test_a_link_under_another_name_is_read_where_its_file_is_elsewhere(tmp_path):
    saved(tmp_path / "objects/3f2a", format="PNG")
    (tmp_path / "set").mkdir()
    (tmp_path / "set/cat.png").symlink_to("../objects/3f2a")
    images = open_data(tmp_path / "set")
    assert images.names == ["cat.png"]
    assert images[0].size == (8, 6)


def test_hard_links_are_images_of_their_own_and_said(tmp_path):
    saved(tmp_path / "a.png")
    os.link(tmp_path / "a.png", tmp_path / "b.png")
    images = open_data(tmp_path)
    assert images.names == ["a.png", "b.png"]
    assert images.notes == ("1 names are hard links to a file that another name stands for; each is an image",)


def test_pipes_and_sockets_are_never_opened(tmp_path):
    saved(tmp_path / "a.png")
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "to-pipe.png").symlink_to("pipe.png")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "socket"))
        images = open_data(tmp_path)
        assert images.names == ["a.png"]
        assert images.left_out.counts == {"no regular file, but a pipe, a socket or a device": 3}
        with pytest.raises(DataError, match="no regular file"):
            open_data(tmp_path / "pipe.png")


HIDDEN = (".ipynb_checkpoints/0.png", "__MACOSX/0.png", ".Trash/0.png", ".git/0.png", "@eaDir/0.png", "lost+found/0.png")


@pytest.mark.parametrize("name", [*HIDDEN, "$RECYCLE.BIN/0.png", "cat/._0.png", "cat/Thumbs.db", "cat/.DS_Store"])
def test_what_is_hidden_or_a_system_s_own_is_no_image_and_no_class(tmp_path, name):
    for folder in ("cat", "dog"):
        saved(tmp_path / folder / "0.png")
    saved(tmp_path / name, format="PNG")
    images = open_data(tmp_path)
    assert (images.names, images.class_names) == (["cat/0.png", "dog/0.png"], ("cat", "dog"))
    assert sum(images.left_out.counts.values()) == 1
    ((left_out, reason),) = images.left_out.entries()
    assert left_out.rstrip("/") in (name, name.partition("/")[0])
    assert reason.startswith("hidden")


def test_a_hidden_folder_that_is_asked_for_is_read(tmp_path):
    saved(tmp_path / ".cache/0.png")
    assert open_data(tmp_path / ".cache").names == ["0.png"]


def test_a_folder_without_permission_is_counted(tmp_path, monkeypatch):
    saved(tmp_path / "a/0.png")
    saved(tmp_path / "b/0.png")
    real = os.scandir

    def refusing(path):
        if str(path).endswith("b"):
            raise PermissionError(13, "Permission denied")
        return real(path)

    monkeypatch.setattr("os.scandir", refusing)
    images = open_data(tmp_path)
    assert images.names == ["a/0.png"]
    assert reasons(images) == {"b/": "a folder that cannot be opened (Permission denied)"}
    monkeypatch.setattr("os.scandir", lambda path: refusing("b"))
    with pytest.raises(DataError, match=r"holds no image: not read: 1 × a folder that cannot be opened"):
        open_data(tmp_path)


# formats


def test_every_format_of_the_list_is_read_whatever_its_name(tmp_path):
    for suffix in ("jpg", "JPEG", "jfif", "png", "webp", "bmp", "gif", "tif", "TIFF", "avif", "ppm", "pgm", "jp2"):
        assert f".{suffix.lower()}" in SUFFIXES
        saved(tmp_path / f"as-{suffix}.{suffix}", 200)
    saved(tmp_path / "no-suffix", 200, format="PNG")
    saved(tmp_path / "wrong.dat", 200, format="JPEG")
    saved(tmp_path / "jpeg-called.png", 200, format="JPEG")
    images = open_data(tmp_path)
    assert len(images) == 16
    assert images.left_out.counts == {}
    whole = list(batches(images, THUMBNAIL, batch_size=16))
    assert [len(batch.names) for batch in whole] == [16]
    assert whole[0].skipped == ()


def test_other_files_are_counted_by_suffix_and_postscript_is_never_run(tmp_path):
    saved(tmp_path / "a.png")
    saved(tmp_path / "b.eps", format="EPS")
    saved(tmp_path / "c.png", format="EPS")
    for i in range(30):
        (tmp_path / f"{i}.txt").write_text("words")
    (tmp_path / "read me").write_text("P5 and BM are words too")
    images = open_data(tmp_path)
    assert images.names == ["a.png", "c.png"]
    kind = "no picture of a format that is read"
    assert images.left_out.counts == {f"{kind} (.txt)": 30, f"{kind} (.eps)": 1, f"{kind} (no suffix)": 1}
    assert ("30 files, the first: 0.txt", f"{kind} (.txt)") in images.left_out.entries()
    assert f"not read: 30 × {kind} (.txt), the first 0.txt" in images.notes
    (batch,) = batches(images, THUMBNAIL, batch_size=4)
    assert batch.names == ("a.png",)
    assert batch.skipped[0][0] == "c.png"
    assert "no picture that can be read" in batch.skipped[0][1]


def test_what_is_left_out_is_a_short_list_however_much_it_is():
    left_out = LeftOut()
    for i in range(100_000):
        left_out.add(f"{i:06d}.txt", "words")
    for i in range(10):
        left_out.add(f"{i}", "few")
    assert len(left_out.entries()) == 11
    assert left_out.entries()[-1] == ("100,000 files, the first: 000000.txt", "words")


# names


def test_names_that_are_no_utf8_or_hold_control_characters_are_escaped_everywhere(tmp_path):
    root = tmp_path / os.fsdecode(b"set\xff")
    for name in (b"caf\xe9/a\xe8.png", b"caf\xe9/b\x1b[31m.png", b"plain/c.png"):
        saved(root / os.fsdecode(name))
    for name in (b"plain/junk\xe9.png", b"plain/no\xe9.txt"):
        (root / os.fsdecode(name)).write_bytes(b"junk")
    images = open_data(root)
    assert images.names == [r"caf\xe9/a\xe8.png", r"caf\xe9/b\x1b[31m.png", "plain/c.png", r"plain/junk\xe9.png"]
    assert images.class_names == (r"caf\xe9", "plain")
    assert images.address.endswith(r"set\xff")
    (batch,) = batches(images, THUMBNAIL, batch_size=4)
    assert len(batch.names) == 3
    for text in (*batch.names, *batch.skipped[0], *images.notes, *images.left_out.entries()[0], images.address):
        text.encode()
        assert text.isprintable()
    names_sha256(images.names)


def test_two_names_that_are_written_alike_stay_two(tmp_path):
    for name in (b"caf\xe9.png", rb"caf\xe9.png"):
        saved(tmp_path / os.fsdecode(name))
    assert sorted(open_data(tmp_path).names) == [r"caf\xe9.png", r"caf\xe9.png (2)"]
    assert escaped("été.png") == "été.png"
    assert escaped("\ud800.png") == r"\ud800.png"


# classes


def test_tiny_imagenet_s_class_is_the_folder_that_differs(tmp_path):
    for wnid in ("n02", "n01"):
        saved(tmp_path / "train" / wnid / "images" / f"{wnid}_0.JPEG")
        (tmp_path / "train" / wnid / f"{wnid}_boxes.txt").write_text("0 0 1 1")
    images = open_data(tmp_path / "train")
    assert (images.class_names, images.labels) == (("n01", "n02"), [0, 1])
    assert "an image's class is the folder above 'images', which is the same for all" in images.notes


def test_tiny_imagenet_s_validation_classes_come_from_its_annotations(tmp_path):
    for i in range(3):
        saved(tmp_path / "val/images" / f"val_{i}.JPEG")
    rows = [f"val_{i}.JPEG\t{wnid}\t0\t32\t44\t62" for i, wnid in enumerate(("n02", "n01", "n02"))]
    (tmp_path / "val/val_annotations.txt").write_text("\n".join(rows))
    images = open_data(tmp_path, split="val")
    assert (images.class_names, images.labels) == (("n01", "n02"), [1, 0, 1])
    assert images.left_out.counts == {}


def test_one_class_alone_keeps_its_name(tmp_path):
    saved(tmp_path / "train/cat/0.png")
    saved(tmp_path / "train/cat/1.png")
    images = open_data(tmp_path)
    assert (images.class_names, images.labels) == (("cat",), [0, 0])
    assert images.notes == ()


# other addresses


def test_one_picture_is_a_set_of_one(tmp_path):
    saved(tmp_path / "one.png", 7)
    images = open_data(tmp_path / "one.png")
    assert (images.names, images.labels) == (["one.png"], None)
    assert images[0].getpixel((0, 0)) == (7, 0, 0)


def test_a_pattern_takes_files_and_their_class_folders(tmp_path):
    for name in ("cat/0.png", "cat/1.jpg", "dog/0.png", "dog/.hidden.png"):
        saved(tmp_path / name)
    (tmp_path / "cat/notes.png.txt").write_text("words")
    (tmp_path / "cat/link.png").symlink_to("0.png")
    images = open_data(str(tmp_path / "*" / "*.png"))
    assert (images.names, images.class_names) == (["cat/0.png", "dog/0.png"], ("cat", "dog"))
    assert reasons(images) == {"cat/link.png": "a link to a file that is read already"}
    assert open_data(str(tmp_path / "**" / "*.jpg")).names == ["cat/1.jpg"]
    with pytest.raises(DataError, match="no file matches"):
        open_data(str(tmp_path / "*.bmp"))
    with pytest.raises(DataError, match="a folder, where files are asked for"):
        open_data(str(tmp_path / "*"))


def test_a_folder_whose_name_looks_like_a_pattern_is_a_folder(tmp_path):
    saved(tmp_path / "set[1]/0.png")
    assert open_data(tmp_path / "set[1]").names == ["0.png"]


@pytest.mark.parametrize("address", ["", "  "])
def test_an_empty_address_is_no_folder(address, tmp_path, monkeypatch):
    saved(tmp_path / "0.png")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match="address is empty"):
        open_data(address)


@pytest.mark.parametrize("address", ["a\0b", "x" * 5000])
def test_an_impossible_address_is_refused_in_one_line(address):
    with pytest.raises(DataError, match="cannot be opened"):
        open_data(address)


# pictures that cannot be used


def test_a_picture_too_thin_to_resize_is_skipped_before_it_is_resized(tmp_path):
    saved(tmp_path / "a.png")
    Image.new("L", (1, 1400)).save(tmp_path / "thin.jpg")  # a fifth of a gigabyte, should it be resized after all
    preprocess = from_timm_config({"input_size": (3, 224, 224)})
    (batch,) = batches(open_data(tmp_path), preprocess, batch_size=4)
    assert batch.names == ("a.png",)
    assert batch.skipped == (("thin.jpg", "it has 1 × 1,400 pixels (width × height): too thin to be resized to 224 × 224"),)


@pytest.mark.parametrize("failure", [ValueError("smaller than the crop"), MemoryError("no room")])
def test_a_picture_on_which_the_transform_fails_is_skipped_and_named(tmp_path, failure):
    for i in range(3):
        saved(tmp_path / f"{i}.png", i)

    def transform(picture):
        if picture.getpixel((0, 0))[0] == 1:
            raise failure
        return THUMBNAIL.transform(picture)

    stream = batches(open_data(tmp_path), Preprocess(transform, (16, 16), {}), batch_size=4)
    (batch,) = stream
    assert batch.names == ("0.png", "2.png")
    assert batch.skipped[0] == ("1.png", f"{type(failure).__name__}: {failure}")


def test_a_picture_of_another_shape_than_the_input_is_skipped(tmp_path):
    saved(tmp_path / "0.png")
    Image.new("RGB", (20, 20)).save(tmp_path / "1.png")

    def transform(picture):
        pixels = THUMBNAIL.transform(picture)
        return pixels[:, :8] if picture.width == 8 else pixels

    (batch,) = batches(open_data(tmp_path), Preprocess(transform, (16, 16), {}), batch_size=4)
    assert batch.names == ("1.png",)
    assert batch.skipped == (("0.png", "preprocessing gave [3, 8, 16] instead of [3, 16, 16] (channels, height, width)"),)


def test_what_is_wrong_with_the_model_is_no_fault_of_the_pictures(tmp_path):
    saved(tmp_path / "0.png")

    def refusing(picture):
        raise DataError("the model takes images of 4 channels")

    with pytest.raises(DataError, match="4 channels"):
        list(batches(open_data(tmp_path), Preprocess(refusing, (16, 16), {}), batch_size=4))


def test_where_all_are_skipped_the_error_names_the_first_reasons(tmp_path):
    (tmp_path / "a.png").write_bytes(b"junk")
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "b.jpg")
    (tmp_path / "b.jpg").write_bytes((tmp_path / "b.jpg").read_bytes()[:900])
    with pytest.raises(DataError, match=r"2 of 2 failed, for example a\.png \(.*\); b\.jpg \(.*truncated") as caught:
        list(batches(open_data(tmp_path), THUMBNAIL, batch_size=4))
    assert "\n" not in str(caught.value)
