"""A list of paths gives its pictures in its order, with its labels, and counts what it names in vain."""

import os

import pytest
from PIL import Image

from collapse_probe.data.images import open_data
from collapse_probe.errors import DataError


@pytest.fixture
def root(tmp_path):
    for i, name in enumerate(("a.png", "b.png", "my cat.png", "deep/c.png")):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (8, 6), (i, 0, 0)).save(tmp_path / name)
    return tmp_path


def listed(root, text, name="list.csv"):
    (root / name).write_text(text)
    return open_data(root / name)


def test_a_csv_with_a_head(root):
    images = listed(root, "id,path,label\n1,deep/c.png,dog\n2,a.png,cat\n3,./b.png,dog\n")
    assert images.names == ["deep/c.png", "a.png", "b.png"]
    assert (images.class_names, images.labels) == (("cat", "dog"), [1, 0, 1])
    assert images[0].getpixel((0, 0)) == (3, 0, 0)


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("a.png,1\nmy cat.png,3\n", "list.csv"),
        ("a.png;1\nmy cat.png;3\n", "list.csv"),
        ("a.png\t1\nmy cat.png\t3\n", "list.tsv"),
        ("\ufeffa.png 1\r\nmy cat.png 3\r\n", "val.txt"),
        ("file_name,class\na.png,1\n\nmy cat.png,3\n", "metadata.csv"),
        ('"a.png","1"\n"my cat.png","3"\n', "list.csv"),
    ],
)
def test_labels_that_are_numbers_are_class_numbers(root, text, name):
    images = listed(root, text, name)
    assert images.names == ["a.png", "my cat.png"]
    assert (images.labels, images.class_names) == ([1, 3], ())


@pytest.mark.parametrize("text", ["a.png\nmy cat.png\n", "path\na.png\nmy cat.png"])
def test_paths_alone_have_no_labels(root, text):
    images = listed(root, text, "list.txt")
    assert (images.names, images.labels) == (["a.png", "my cat.png"], None)
    assert images.left_out.counts == {}


def test_what_is_listed_in_vain_is_counted_by_name(root):
    os.mkfifo(root / "pipe.png")
    (root / "same.png").symlink_to("a.png")
    (root / "words.txt").write_text("words")
    rows = ["a.png,0", "gone.png,0", "deep,0", "pipe.png,0", "./a.png,1", "same.png,0", "words.txt,1", f"{root}/b.png,1"]
    images = listed(root, "\n".join(rows))
    assert images.names == ["a.png", f"{root}/b.png"]
    assert images.labels == [0, 1]
    assert dict(images.left_out.entries()) == {
        "gone.png": "listed, but there is no such file",
        "deep/": "a folder, where files are asked for",
        "pipe.png": "no regular file, but a pipe, a socket or a device",
        "a.png": "listed more than once; the first line counts",
        "same.png": "a link to a file that is read already",
        "words.txt": "no picture of a format that is read (.txt)",
    }


def test_labels_that_are_missing_or_not_named_are_said(root):
    images = listed(root, "a.png,1\nb.png,\n")
    assert images.labels is None
    assert images.notes == ("1 of 2 listed images have no label, so that none is used",)
    images = listed(root, "path,width,height\na.png,8,6\n")
    assert images.labels is None
    assert images.notes == (
        "the list has the columns path, width, height: none is called label or class, so there are no labels",
    )


def test_a_list_that_leads_nowhere_says_where_it_looked(root):
    with pytest.raises(DataError, match=r"2 × listed, but there is no such file, the first x\.png.*relative paths from"):
        listed(root, "path,label\nx.png,0\ny.png,0\n")
    (root / "weights.bin").write_bytes(b"\0\1\2" * 50)
    with pytest.raises(DataError, match="neither a picture, an archive nor a text"):
        open_data(root / "weights.bin")
    with pytest.raises(DataError, match="it has no lines"):
        listed(root, "")


def test_names_that_are_no_utf8_are_escaped(root):
    Image.new("RGB", (8, 6)).save(root / os.fsdecode(b"caf\xe9.png"))
    (root / "list.csv").write_bytes(b"caf\xe9.png,th\xe9\na.png,tea\n")
    images = open_data(root / "list.csv")
    assert (images.names, images.class_names) == ([r"caf\xe9.png", "a.png"], ("tea", r"th\xe9"))
    assert images[0].size == (8, 6)
