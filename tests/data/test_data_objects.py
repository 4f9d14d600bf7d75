"""A tensor, a data set and a path are data as an address is: named, shared among processes, with labels."""

import os
from pathlib import Path

import pytest
import torch
from factories import small_vit
from PIL import Image
from torch.utils.data import Dataset, Subset, TensorDataset

import collapse_probe as cp
from collapse_probe.data.images import ImageSet, batches, batches_of, images_from
from collapse_probe.data.preprocessing import from_timm_config, given_pixels
from collapse_probe.errors import DataError, SettingError

PREPROCESS = from_timm_config({"input_size": (3, 16, 16)})
READY = given_pixels(3, (16, 16))


class Items(Dataset):
    """A data set of one's own."""

    def __init__(self, items, **held):
        self.items = items
        vars(self).update(held)

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        item = self.items[index]
        if isinstance(item, Exception):
            raise item
        return item


def pictures(count):
    return [Image.new("RGB", (20, 18), (i, 0, 0)) for i in range(count)]


# data sets


@pytest.mark.parametrize(
    "item",
    [
        lambda picture, label: (picture, label),
        lambda picture, label: (picture, torch.tensor(label)),
        lambda picture, label: {"image": picture, "label": label},
    ],
)
def test_a_data_set_of_pictures_gives_its_labels_as_it_is_read(item):
    images = images_from(Items([item(picture, i % 2) for i, picture in enumerate(pictures(5))]))
    assert isinstance(images, ImageSet)
    assert (images.names, images.labels, images.shape) == (list("01234"), None, None)
    got = list(batches(images, PREPROCESS, batch_size=3))
    assert [batch.labels.tolist() for batch in got] == [[0, 1, 0], [1, 0]]
    assert torch.equal(got[1].pixels[0], PREPROCESS.transform(pictures(5)[3]))


def test_a_data_set_that_holds_its_labels_is_not_read_for_them():
    images = images_from(Items(pictures(3), targets=[2, 0, 1], classes=["a", "b", "c"]))
    assert (images.labels, images.class_names) == ([2, 0, 1], ("a", "b", "c"))
    part = images_from(Subset(Items(pictures(3), targets=[2, 0, 1]), [2, 0]))
    assert (part.labels, part[0].getpixel((0, 0))) == ([1, 2], (2, 0, 0))
    assert images_from(Items(pictures(3), labels=[[1, 0], [0, 1], [1, 1]])).labels is None
    assert images_from(Items(pictures(3))).labels is None


def test_a_data_set_of_tensors_is_taken_as_made_ready():
    pixels = torch.rand(5, 3, 16, 16, dtype=torch.float64)
    images = images_from(TensorDataset(pixels, torch.tensor([4, 3, 2, 1, 0])), limit=4, seed=1)
    assert images.shape == (3, 16, 16)
    (batch,) = batches(images, READY, batch_size=8)
    places = [int(name) for name in batch.names]
    assert len(places) == 4
    assert torch.equal(batch.pixels, pixels[places].float())
    assert batch.labels.tolist() == [4 - place for place in places]


def test_an_item_that_fails_or_differs_is_skipped_and_named():
    whole = torch.rand(3, 16, 16)
    items = [OSError("gone"), (whole, 0), (torch.rand(3, 8, 16), 1), (whole, 1)]
    (batch,) = batches(images_from(Items(items)), READY, batch_size=8)
    assert (batch.names, batch.labels.tolist()) == (("1", "3"), [0, 1])
    assert batch.skipped == (("0", "OSError: gone"), ("2", "the item is [3, 8, 16], where the first is [3, 16, 16]"))


@pytest.mark.parametrize(
    ("items", "message"),
    [
        ([], "is empty"),
        (["words"], "came str"),
        ([torch.zeros(3, 4, 4, dtype=torch.uint8)], r"float images \[channels, height, width\]; came torch.uint8"),
        ([torch.zeros(4, 4)], r"came torch.float32 \[4, 4\]"),
        ([OSError("gone"), OSError("gone too")], "no item of the data set can be read, the first: OSError: gone"),
    ],
)
def test_a_data_set_of_anything_else_is_refused(items, message):
    with pytest.raises(DataError, match=message):
        images_from(Items(items))


def test_a_data_set_of_batches_is_read_as_a_loader():
    images = images_from(Items([torch.zeros(2, 3, 4, 4), torch.zeros(1, 3, 4, 4)]))
    assert not isinstance(images, ImageSet)
    assert [len(batch.names) for batch in batches_of(images, READY, 8)] == [2, 1]


# tensors and processes


def test_one_tensor_is_shared_among_processes_like_a_folder():
    pixels = torch.rand(5, 3, 16, 16)
    images = images_from(pixels)
    shares = [next(batches(images, READY, batch_size=8, rank=rank, world=2)) for rank in (0, 1)]
    assert [share.names for share in shares] == [("0", "2", "4"), ("1", "3")]
    assert torch.equal(shares[1].pixels, pixels[1::2])
    assert images.content_sha256 != images_from(pixels.flip(0)).content_sha256


@pytest.mark.parametrize("tensor", [torch.zeros(2, 3, 4, 4, dtype=torch.uint8), torch.zeros(3, 4, 4), torch.zeros(0, 3, 4, 4)])
def test_a_tensor_that_is_no_stack_of_images_is_refused(tensor):
    with pytest.raises(DataError, match=r"expected float images \[n, channels, height, width\]"):
        images_from(tensor)


@pytest.mark.parametrize("asked", [{"split": "val"}, {"limit": 3}, {"max_pixels": 100}])
def test_what_a_loader_cannot_give_is_not_passed_over(asked):
    with pytest.raises(SettingError, match=r"belongs to a data address.*not an iterable \(list\)"):
        images_from([torch.rand(2, 3, 16, 16)], **asked)


# the verbs


@pytest.fixture(scope="module")
def model():
    return small_vit(depth=2)


def test_every_verb_takes_a_tensor_a_data_set_and_a_path(model, tmp_path):
    for i in range(3):
        Image.effect_noise((70, 70), 40 + i).convert("RGB").save(tmp_path / f"{i}.png")
    (tmp_path / "words.txt").write_text("words")
    settings = {"metrics": ["attention-similarity"], "null_images": 0}
    for data in (Path(tmp_path), torch.rand(3, 3, 64, 64), Items([(picture, 1) for picture in pictures(3)])):
        found = cp.analyze(model, data, **settings)
        assert found.summary["images"] == 3
        assert found.data["skipped"] == ([{"name": "words.txt", "reason": TEXT}] if data == tmp_path else [])
        assert found.data.get("left_out") == ({TEXT: 1} if data == tmp_path else None)
        assert (f"not read: 1 × {TEXT}, words.txt" in found.run["notes"]) == (data == tmp_path)
        assert found.data["bundled"] is False
    assert cp.compare({"a": model, "b": model}, Path(tmp_path), limit=2, **settings).subjects["b"].data["images"] == 2
    said = []
    cp.analyze(model, Path(tmp_path), max_pixels=4900, report=said.append, **settings)
    assert f"not read: 1 × {TEXT}, words.txt" in said
    with pytest.raises(DataError, match="3 of 3 failed"):
        cp.analyze(model, Path(tmp_path), max_pixels=4899, **settings)


TEXT = "no picture of a format that is read (.txt)"


def test_what_was_done_to_pictures_is_counted_in_the_notes(model, tmp_path):
    frames = pictures(2)
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    for name in ("b.gif", os.fsdecode(b"caf\xe9.gif")):
        frames[1].save(tmp_path / name)
    found = cp.analyze(model, tmp_path, metrics=["attention-similarity"], null_images=0, batch_size=1)
    assert "1 image: several frames or pages, of which the first was read" in found.run["notes"]
    found.save(tmp_path / "out")
    assert cp.Findings.load(tmp_path / "out").images["names"].tolist() == ["a.gif", "b.gif", r"caf\xe9.gif"]
