"""Data sets of the libraries datasets and TensorFlow Datasets are read as they come: each image once, with name and class."""

import io
import itertools

import numpy as np
import pytest
from PIL import Image
from torchvision.transforms.functional import pil_to_tensor

from collapse_probe.data.coverage import Coverage
from collapse_probe.data.images import open_data
from collapse_probe.data.preprocessing import Preprocess
from collapse_probe.errors import DataError

PREPROCESS = Preprocess(lambda image: pil_to_tensor(image.resize((2, 2))).float(), (2, 2), {})


@pytest.fixture(autouse=True)
def _own_caches(tmp_path, monkeypatch):
    config = pytest.importorskip("datasets.config")
    monkeypatch.setattr(config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr("collapse_probe.downloads._hub_answers", lambda _: False)


def encoded(number):
    stream = io.BytesIO()
    Image.new("RGB", (3, 3), (number, 0, 0)).save(stream, "PNG")
    return stream.getvalue()


def parquet(path, numbers, paths=True, **columns):
    """A file of images with the classes cat and dog."""
    import datasets
    import pyarrow.parquet

    path.parent.mkdir(parents=True, exist_ok=True)
    kinds = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog"])}
        | {name: datasets.Value("string") for name in columns}
    )
    images = [{"bytes": encoded(n), "path": f"{n:03d}.png" if paths else None} for n in numbers]
    rows = datasets.Dataset.from_dict({"image": images, "label": [n % 2 for n in numbers], **columns}, features=kinds)
    pyarrow.parquet.write_table(rows.data.table.replace_schema_metadata(rows.features.arrow_schema.metadata), path)
    return path


def read(stream, **share):
    return list(stream.batches(PREPROCESS, **{"batch_size": 4, **share}))


def names_of(got):
    return [name for batch in got for name in batch.names]


@pytest.fixture
def folder(tmp_path):
    for shard in range(5):
        parquet(
            tmp_path / f"hub/data/train-{shard:05d}-of-00005.parquet", range(10 * shard, 10 * shard + (7, 1, 3, 9, 4)[shard])
        )
    return tmp_path / "hub"


def test_a_folder_of_parquet_files(folder):
    stream = open_data(f"hfids/{folder}")
    assert (stream.count, stream.class_names, stream.notes) == (None, ("cat", "dog"), ())
    got = read(stream)
    names = names_of(got)
    assert names[:8] == [*(f"00000/{n:03d}.png" for n in range(7)), "00001/010.png"]
    assert len(set(names)) == 24
    for batch in got:
        numbers = [int(name[-7:-4]) for name in batch.names]
        assert batch.pixels[:, 0, 0, 0].tolist() == numbers
        assert batch.labels.tolist() == [number % 2 for number in numbers]
    for world, workers in itertools.product((1, 2, 3, 7), (0, 2)):
        shares = [read(stream, rank=rank, world=world, workers=workers) for rank in range(world)]
        assert sorted(name for share in shares for name in names_of(share)) == sorted(names)
    done = Coverage(number for batch in got[:3] for number in batch.read)
    assert [batch.names for batch in read(stream, done=done)] == [batch.names for batch in got[3:]]
    assert len(names_of(read(open_data(f"hfids/{folder}", limit=9)))) == 9


def test_one_parquet_file_and_names(tmp_path):
    assert names_of(read(open_data(f"hfids/{parquet(tmp_path / 'a.parquet', range(3))}"))) == ["000.png", "001.png", "002.png"]
    plain = parquet(tmp_path / "b.parquet", range(2), paths=False)
    assert names_of(read(open_data(f"hfids/{plain}"))) == ["000000", "000001"]
    named = parquet(tmp_path / "c.parquet", range(3), paths=False, image_id=["x", "y", "x"])
    assert names_of(read(open_data(f"hfids/{named}"))) == ["x", "y", "x (2)"]


def test_a_folder_of_images_has_the_names_of_the_folder(tmp_path):
    for name in ("a/1.png", "a/2.png", "b/1.png"):
        path = tmp_path / "pictures" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded(5))
    (tmp_path / "pictures/a/2.png").write_bytes(b"broken")
    stream = open_data(f"hfids/{tmp_path}/pictures")
    (batch,) = read(stream)
    assert (batch.names, batch.labels.tolist(), stream.class_names) == (("a/1.png", "b/1.png"), [0, 1], ("a", "b"))
    assert [name for name, _ in batch.skipped] == ["a/2.png"]


def test_splits(tmp_path):
    parquet(tmp_path / "two/train.parquet", range(3))
    parquet(tmp_path / "two/validation.parquet", range(5, 7))
    assert names_of(read(open_data(f"hfids/{tmp_path}/two"))) == ["005.png", "006.png"]
    assert open_data(f"hfids/{tmp_path}/two").notes == ("the split validation of train, validation",)
    assert len(names_of(read(open_data(f"hfids/{tmp_path}/two", split="train")))) == 3
    with pytest.raises(DataError, match="has no split 'test'; it has train, validation"):
        open_data(f"hfids/{tmp_path}/two", split="test")


@pytest.mark.parametrize("workers", [0, 2])
def test_a_damaged_file_is_an_error_that_names_it(folder, workers):
    path = folder / "data/train-00003-of-00005.parquet"
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2] + bytes(len(content) // 4) + content[len(content) // 4 * 3 :])
    with pytest.raises(DataError, match=r"cannot read shard 00003 of hfids/|image .*can be read") as caught:
        read(open_data(f"hfids/{folder}"), workers=workers)
    assert "\n" not in str(caught.value)


def test_what_is_no_data_set_of_images(tmp_path):
    (tmp_path / "words").mkdir()
    (tmp_path / "words/a.csv").write_text("a,b\n1,2\n")
    with pytest.raises(DataError, match="no column of images"):
        open_data(f"hfids/{tmp_path}/words")
    with pytest.raises(DataError, match=r"cannot (fetch|open) hfids/some/name"):
        open_data("hfids/some/name")


def test_a_data_set_of_tensorflow(tmp_path, monkeypatch):
    tfds = pytest.importorskip("tensorflow_datasets")
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    pixels, kinds = (tfds.features.Image(shape=(None, None, 3)), tfds.features.ClassLabel(names=["cat", "dog"]))

    class TinyPictures(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            columns = {"image": pixels, "label": kinds, "id": tfds.features.Text()}
            return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(columns))

        def _split_generators(self, _):
            return {"train": self._generate_examples(3), "validation": self._generate_examples(37)}

        def _generate_examples(self, count):
            for i in range(count):
                yield str(i), {"image": np.full((4, 4, 3), i, np.uint8), "label": i % 2, "id": f"{i:03d}"}

    stream = open_data("tfds/tiny_pictures")
    assert (stream.class_names, stream.notes) == (("cat", "dog"), ("the split validation of train, validation",))
    for world, workers in itertools.product((1, 2), (0, 2)):
        got = [batch for rank in range(world) for batch in read(stream, rank=rank, world=world, workers=workers)]
        assert sorted(name.rpartition("/")[2] for name in names_of(got)) == [f"{i:03d}" for i in range(37)]
        for batch in got:
            assert batch.pixels[:, 0, 0, 0].tolist() == [int(name[-3:]) for name in batch.names]
            assert batch.labels.tolist() == [int(name[-3:]) % 2 for name in batch.names]
