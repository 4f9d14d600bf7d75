"""A data address becomes batches in which every readable image stands exactly once under its own name."""

import io
import pickle
import tarfile
import types

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms.functional import pil_to_tensor

from collapse_probe.data import libraries
from collapse_probe.data.images import batches, from_loader, open_data
from collapse_probe.data.preprocessing import Preprocess
from collapse_probe.data.readers import decode
from collapse_probe.errors import DataError, SettingError, UnknownNameError

RED, GREEN = (200, 10, 20), (10, 200, 20)


def transform(image):
    return pil_to_tensor(image.resize((4, 4))).float() / 255


PREPROCESS = Preprocess(transform, (4, 4), {})


def saved(path, colour=RED, size=(8, 6)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)
    return path


def encoded(image, kind="PNG", **settings):
    stream = io.BytesIO()
    image.save(stream, kind, **settings)
    return stream.getvalue()


@pytest.fixture
def flat(tmp_path):
    for i in range(7):
        saved(tmp_path / f"{i}.png", (i * 10, 0, 0))
    return tmp_path


def gathered(images, **settings):
    return list(batches(images, PREPROCESS, **{"batch_size": 3, **settings}))


def names_of(got):
    return [name for batch in got for name in batch.names]


# folders


def test_a_flat_folder(flat):
    images = open_data(flat)
    assert images.names == [f"{i}.png" for i in range(7)]
    assert images.labels is None
    assert images.class_names == ()
    assert not images.bundled
    assert images.address == str(flat)
    assert (images[3].mode, images[3].size, images[3].getpixel((0, 0))) == ("RGB", (8, 6), (30, 0, 0))


def test_class_folders(tmp_path):
    for name in ("10/b.png", "2/a.PNG", "10/a.jpeg", "2/deep/c.jpg"):
        saved(tmp_path / name)
    (tmp_path / "2" / "notes.txt").write_text("no image")
    images = open_data(tmp_path)
    assert images.names == ["10/a.jpeg", "10/b.png", "2/a.PNG", "2/deep/c.jpg"]
    assert images.class_names == ("2", "10", "deep")
    assert images.labels == [1, 1, 0, 2]


def test_classes_are_numbered_as_timm_does(tmp_path):
    from timm.data.readers.reader_image_folder import find_images_and_targets

    for name in ("n10/b.png", "n2/a.png", "x/n1/c.png", "n10/a.png"):
        saved(tmp_path / name)
    images = open_data(tmp_path)
    theirs, _ = find_images_and_targets(str(tmp_path))
    expected = {path[len(str(tmp_path)) + 1 :]: label for path, label in theirs}
    assert dict(zip(images.names, images.labels, strict=True)) == expected


def test_one_image_outside_the_class_folders_means_no_labels(tmp_path):
    saved(tmp_path / "a/1.png")
    saved(tmp_path / "2.png")
    assert open_data(tmp_path).labels is None


def test_a_split_is_a_subfolder_by_any_of_its_names(tmp_path):
    saved(tmp_path / "val/a/1.png")
    saved(tmp_path / "train/a/2.png")
    assert open_data(tmp_path, split="validation").names == ["a/1.png"]
    assert len(open_data(tmp_path)) == 2
    with pytest.raises(DataError, match="no folder for the split 'test'"):
        open_data(tmp_path, split="test")


def test_no_folder_and_no_image(tmp_path):
    with pytest.raises(DataError, match="there is no folder"):
        open_data(tmp_path / "absent")
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(DataError, match="holds no image") as caught:
        open_data(tmp_path)
    assert "\n" not in str(caught.value)


# tar files


def tarred(path, members):
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def test_a_tar_reads_as_its_folder_would(tmp_path):
    red, green = (encoded(Image.new("RGB", (8, 6), colour)) for colour in (RED, GREEN))
    path = tarred(tmp_path / "set.tar", {"./b/1.png": green, "a/1.png": red, "a/readme.txt": b"x"})
    images = open_data(path)
    assert images.names == ["a/1.png", "b/1.png"]
    assert images.labels == [0, 1]
    assert images.class_names == ("a", "b")
    assert [images[i].getpixel((0, 0)) for i in (0, 1)] == [RED, GREEN]
    assert names_of(gathered(images, workers=2, batch_size=1)) == images.names


def test_a_tar_of_tars(tmp_path):
    inner = tarred(tmp_path / "inner", {"1.png": encoded(Image.new("RGB", (8, 6), GREEN))}).read_bytes()
    middle = tarred(tmp_path / "middle", {"n01.tar": inner, "n02.tar": inner}).read_bytes()
    images = open_data(tarred(tmp_path / "outer.tar", {"n00.tar": inner, "deep.tar": middle}))
    assert images.names == ["deep/n01/1.png", "deep/n02/1.png", "n00/1.png"]
    assert images.labels == [1, 2, 0]
    assert [images[i].getpixel((0, 0)) for i in range(3)] == [GREEN] * 3


def test_a_damaged_tar_and_an_empty_one(tmp_path):
    (tmp_path / "bad.tar").write_bytes(b"no tar at all" * 100)
    with pytest.raises(DataError, match="as an uncompressed tar"):
        open_data(tmp_path / "bad.tar")
    with pytest.raises(DataError, match="holds no image"):
        open_data(tarred(tmp_path / "empty.tar", {"a.txt": b"x"}))
    with pytest.raises(DataError, match="there is no tar"):
        open_data(tmp_path / "absent.tar")


# bundled


def test_the_digits():
    images = open_data("bundled:digits")
    assert len(images) == len(set(images.names)) == 1797
    assert images.bundled
    assert images.class_names == tuple("0123456789")
    assert (images.names[0], images.labels[0], images[0].size) == ("0/0000.png", 0, (8, 8))
    values = np.asarray(images[0])
    assert (values.min(), values.max()) == (0, 239)  # 15 of 16
    assert max(np.asarray(images[i]).max() for i in range(9)) == 255


def test_the_photos():
    images = open_data("bundled:photos")
    assert len(images) == len(set(images.names)) == 53
    assert images.labels is None
    assert images.bundled
    assert images.names[0] == "astronaut/0.png"
    sizes = [images[i].size for i in range(len(images))]
    assert all(width == height >= 224 for width, height in sizes)
    assert len({size for size, name in zip(sizes, images.names, strict=True) if "astronaut" in name}) == 2
    contents = {images[i].tobytes() for i in range(len(images))}
    assert len(contents) == len(images)


def test_bundled_names_and_their_extra(monkeypatch):
    with pytest.raises(UnknownNameError, match="digits, photos"):
        open_data("bundled:faces")
    with pytest.raises(DataError, match="has no splits"):
        open_data("bundled:digits", split="test")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(DataError, match=r'pip install "collapse-probe\[demo\]"'):
        open_data("bundled:digits")


# the limit


def test_the_limit_is_a_seeded_subset_in_order(flat):
    everything = open_data(flat).names
    some = open_data(flat, limit=4, seed=1)
    assert len(some) == 4
    assert some.names == sorted(some.names)
    assert some.names == open_data(flat, limit=4, seed=1).names
    assert len({tuple(open_data(flat, limit=4, seed=seed).names) for seed in range(8)}) > 2
    assert some[2].getpixel((0, 0)) == (10 * everything.index(some.names[2]), 0, 0)
    assert open_data(flat, limit=100).names == everything


def test_the_limit_takes_the_labels_along():
    images = open_data("bundled:digits", limit=20)
    assert [name[0] for name in images.names] == [str(label) for label in images.labels]


@pytest.mark.parametrize("limit", [0, -3])
def test_a_limit_below_one_is_refused(flat, limit):
    with pytest.raises(SettingError):
        open_data(flat, limit=limit)


# batches


@pytest.mark.parametrize(("size", "workers"), [(1, 0), (3, 0), (7, 0), (64, 0), (3, 2)])
def test_every_image_once_in_order(flat, size, workers):
    images = open_data(flat)
    got = gathered(images, batch_size=size, workers=workers)
    assert names_of(got) == images.names
    assert [i for batch in got for i in batch.indices] == list(range(7))
    pixels = torch.cat([batch.pixels for batch in got])
    assert pixels.dtype == torch.float32
    assert torch.equal(pixels, torch.stack([transform(images[i]) for i in range(7)]))
    assert max(len(batch.names) for batch in got) == min(size, 7)


def test_labels_come_along(tmp_path):
    for name in ("b/1.png", "a/1.png", "b/2.png"):
        saved(tmp_path / name)
    (batch,) = gathered(open_data(tmp_path))
    assert torch.equal(batch.labels, torch.tensor([0, 1, 1]))


@pytest.mark.parametrize("world", [1, 2, 3, 9])
def test_ranks_share_without_padding(flat, world):
    images = open_data(flat)
    shares = [names_of(gathered(images, rank=rank, world=world)) for rank in range(world)]
    assert shares == [images.names[rank::world] for rank in range(world)]


def test_the_global_generator_is_left_alone(flat):
    torch.manual_seed(0)
    before = torch.get_rng_state()
    gathered(open_data(flat), workers=1)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize(
    "settings", [{"batch_size": 0}, {"batch_size": -1}, {"workers": -1}, {"rank": 1}, {"rank": 2, "world": 2}]
)
def test_impossible_settings_are_refused_at_once(flat, settings):
    with pytest.raises(SettingError):
        batches(open_data(flat), PREPROCESS, **{"batch_size": 3, **settings})


def test_a_set_can_be_sent_to_another_process(flat):
    images = pickle.loads(pickle.dumps(open_data(flat, limit=3)))
    assert images[0].getpixel((0, 0)) == open_data(flat, limit=3)[0].getpixel((0, 0))


# damaged and unusual pictures


@pytest.fixture
def damaged(flat):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    whole = encoded(Image.fromarray(noise), "JPEG")
    (flat / "1a_truncated.jpg").write_bytes(whole[: len(whole) // 2])
    (flat / "2a_empty.png").write_bytes(b"")
    (flat / "3a_text.png").write_text("this is no image\n")
    return flat


@pytest.mark.parametrize("workers", [0, 2])
def test_an_unreadable_image_is_skipped_named_and_explained(damaged, workers):
    got = gathered(open_data(damaged), workers=workers)
    skipped = dict(pair for batch in got for pair in batch.skipped)
    assert sorted(skipped) == ["1a_truncated.jpg", "2a_empty.png", "3a_text.png"]
    assert "truncated" in skipped["1a_truncated.jpg"]
    assert all(reason and "\n" not in reason for reason in skipped.values())
    assert names_of(got) == [f"{i}.png" for i in range(7)]
    assert [len(batch.names) == len(batch.pixels) for batch in got] == [True] * len(got)


def test_a_decompression_bomb_is_skipped(flat, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    saved(flat / "bomb_error.png", size=(40, 40))
    saved(flat / "bomb_warning.png", size=(12, 10))
    skipped = dict(pair for batch in gathered(open_data(flat)) for pair in batch.skipped)
    assert list(skipped) == ["bomb_error.png"]  # the other one is between Pillow's limits, which stops at twice the number
    assert "1,600 pixels" in skipped["bomb_error.png"]
    assert "--max-pixels N (Python: max_pixels=N) allows more" in skipped["bomb_error.png"]
    assert [skip for batch in gathered(open_data(flat, max_pixels=1600)) for skip in batch.skipped] == []
    assert Image.MAX_IMAGE_PIXELS == 100


def test_no_readable_image_is_an_error(tmp_path):
    for name in ("a.png", "b.png"):
        (tmp_path / name).write_bytes(b"broken")
    stream = batches(open_data(tmp_path), PREPROCESS, batch_size=1)
    assert [batch.pixels.shape for batch in (next(stream), next(stream))] == [(0, 3, 4, 4)] * 2
    with pytest.raises(DataError, match=r"can be read: 2 of 2 failed, for example a.png"):
        next(stream)


def test_sixteen_bit_greys_keep_their_contrast():
    ramp = Image.fromarray(np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8))
    values = np.asarray(decode(io.BytesIO(encoded(ramp))))[..., 0].ravel()
    assert values[0] == 0
    assert values[-1] == 255
    assert len(set(values.tolist())) == 64


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGBA", "CMYK", "1"])
def test_other_modes_become_rgb_as_pillow_converts_them(mode):
    picture = Image.new("RGB", (8, 6), RED).convert(mode)
    content = encoded(picture, "JPEG" if mode == "CMYK" else "PNG")
    got = decode(io.BytesIO(content))
    assert (got.mode, got.size) == ("RGB", (8, 6))
    assert got.tobytes() == Image.open(io.BytesIO(content)).convert("RGB").tobytes()


def test_exif_rotation_is_not_applied_as_in_timm_and_torchvision():
    exif = Image.Exif()
    exif[0x0112] = 6
    content = encoded(Image.new("RGB", (8, 6), RED), "JPEG", exif=exif)
    assert decode(io.BytesIO(content)).size == (8, 6)


# timm's readers


@pytest.mark.parametrize("address", ["hfds/some/name", "hfids/some/name", "wds/folder", "tfds/name"])
def test_a_missing_library_names_its_command(address, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda *_: None)
    with pytest.raises(DataError, match=r"needs the library \w+; pip install") as caught:
        open_data(address)
    assert "\n" not in str(caught.value)


def test_torchvision_sets_that_cannot_be_fetched(monkeypatch, tmp_path):
    import urllib.error

    def silent(*_args, **_settings):
        raise urllib.error.URLError("Name or service not known")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr("urllib.request.urlopen", silent)
    with pytest.raises(DataError, match=r"cannot fetch torch/cifar10 \(no network"):
        open_data("torch/cifar10")


def test_a_torchvision_set(monkeypatch):
    class Faces:
        targets, classes = [1, 0, 1], ["cat", "dog"]

        def __len__(self):
            return 3

        def __getitem__(self, index):
            return Image.new("L", (8, 6), 100 * index), self.targets[index]

    asked = {}

    def create(name, **settings):
        asked.update(settings, name=name)
        return Faces()

    monkeypatch.setattr("timm.data.create_dataset", create)
    images = open_data("torch/faces", split="test")
    assert (asked["name"], asked["split"], asked["download"]) == ("torch/faces", "test", True)
    assert (images.names, images.labels, images.class_names) == (["0", "1", "2"], [1, 0, 1], ("cat", "dog"))
    assert images[2].getpixel((0, 0)) == (200, 200, 200)


def test_a_hub_set_is_read_past_its_damaged_images(monkeypatch, tmp_path):
    good = encoded(Image.new("RGB", (8, 6), GREEN))

    class Rows(dict):
        column_names = ("image", "label")

    class Reader:
        label_key, class_to_idx = "label", {"cat": 0, "dog": 1}
        dataset = Rows(label=[1, 0])

        def __len__(self):
            return 2

        def __getitem__(self, index):
            return io.BytesIO((b"damaged", good)[index]), 0

        def filename(self, index):
            return ("a.png", "b.png")[index]

    monkeypatch.setattr("importlib.util.find_spec", lambda *_: True)
    monkeypatch.setattr("collapse_probe.downloads._hub_answers", lambda _: False)
    monkeypatch.setattr("timm.data.create_dataset", lambda *_, **__: types.SimpleNamespace(reader=Reader()))
    images = open_data("hfds/some/name")
    assert (images.names, images.labels, images.class_names) == (["a.png", "b.png"], [1, 0], ("cat", "dog"))
    (batch,) = gathered(images)
    assert batch.names == ("b.png",)
    assert batch.skipped[0][0] == "a.png"


# the caller's own loader


def pixels(count):
    return torch.rand(count, 3, 4, 4, dtype=torch.float64)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda x, y: (x, y),
        lambda x, y: [x, y],
        lambda x, y: {"pixel_values": x, "labels": y},
        lambda x, y: {"image": x, "label": y},
    ],
)
def test_a_loader_with_labels(wrap):
    held = [(pixels(2), torch.tensor([0, 1])), (pixels(1), torch.tensor([2]))]
    got = list(from_loader(wrap(*pair) for pair in held))
    assert names_of(got) == ["0", "1", "2"]
    assert [batch.indices for batch in got] == [(0, 1), (2,)]
    assert torch.equal(got[0].labels, torch.tensor([0, 1]))
    assert torch.equal(got[1].pixels, held[1][0].float())


def test_a_loader_of_bare_tensors():
    (batch,) = from_loader([pixels(2)])
    assert batch.labels is None
    assert batch.pixels.dtype == torch.float32


@pytest.mark.parametrize(
    ("held", "came"),
    [
        ("text", "a str"),
        (torch.zeros(2, 3), r"torch.float32 \[2, 3\]"),
        (torch.zeros(2, 3, 4, 4, dtype=torch.uint8), r"torch.uint8 \[2, 3, 4, 4\]"),
        ({"input_ids": torch.zeros(2)}, "a dict with input_ids"),
        ([], "a list"),
    ],
)
def test_a_loader_of_anything_else_is_refused(held, came):
    with pytest.raises(DataError, match=f"must give float images.*came {came}"):
        list(from_loader([held]))


def test_an_empty_loader_is_refused():
    with pytest.raises(DataError, match="gave no image"):
        list(from_loader([]))


def test_bundled_pictures_are_those_that_scikit_learn_gives():
    datasets = pytest.importorskip("sklearn.datasets")
    stored, ours = datasets.load_digits(), open_data("bundled:digits")
    assert ours.labels == stored.target.tolist()
    assert ours.class_names == tuple(map(str, stored.target_names))
    greys = np.stack([np.asarray(ours[at])[..., 0] for at in range(len(ours))])
    np.testing.assert_array_equal(greys, np.round(stored.images * (255 / 16)).astype(np.uint8))
    theirs = {name: datasets.load_sample_image(f"{name}.jpg") for name in ("china", "flower")}
    for name, pixels in libraries.photographs():
        if name in theirs:
            np.testing.assert_array_equal(pixels, theirs.pop(name))
    assert not theirs
