"""The pictures that come with a package, and those that a library of data sets reads, with their names and classes."""

from __future__ import annotations

import importlib.util
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
from PIL import Image

from collapse_probe.data.readers import Pictures, written
from collapse_probe.data.streams.hub import hub_shards
from collapse_probe.data.streams.stream import Shards
from collapse_probe.data.streams.tensorflow import tensorflow_shards
from collapse_probe.data.streams.webdataset import webdataset_shards
from collapse_probe.downloads import fetching, first_line
from collapse_probe.errors import DataError, UnknownNameError

T = TypeVar("T")
Pixels = npt.NDArray[np.uint8]
SIDE = 224  # no crop of a photograph is smaller, in pixels
GRID = (2, 3)  # and no photograph is cut finer: rows, columns
SCIKIT_IMAGE = "astronaut brick camera cat coffee coins grass gravel hubble_deep_field moon rocket"
SCIKIT_LEARN = "china flower"


def _from_array(arrays: Sequence[Pixels], index: int) -> Image.Image:
    """A picture out of arrays [height, width] or [height, width, 3]."""
    return Image.fromarray(np.ascontiguousarray(arrays[index])).convert("RGB")


def digits() -> Pictures:
    """scikit-learn's 1797 handwritten digits, 8×8 greys stretched from 0..16 to 0..255, with their labels."""
    stored = np.loadtxt(_of_scikit_learn("data/digits.csv.gz"), delimiter=",", dtype=np.int64)
    greys = np.round(stored[:, :64].reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)
    labels = tuple(stored[:, 64].tolist())
    names = tuple(f"{label}/{i:04d}.png" for i, label in enumerate(labels))
    classes = tuple(map(str, range(10)))
    return Pictures(names, partial(_from_array, tuple(greys)), labels, classes, bundled=True, bits=8, from_memory=True)


def photos() -> Pictures:
    """53 square crops, at least 224 pixels wide, of 13 photographs; no labels.

    Each photograph gives its largest centred square, then the squares of a grid of at most 2×3 cells (fewer
    where a cell would fall under 224 pixels): two scales, and no overlap within one.
    """
    crops = [(f"{name}/{i}.png", crop) for name, photo in photographs() for i, crop in enumerate(_squares(photo))]
    names, arrays = zip(*crops, strict=True)
    return Pictures(names, partial(_from_array, arrays), bundled=True, from_memory=True)


def photographs() -> Iterator[tuple[str, Pixels]]:
    """Name and pixels of the photographs that come with scikit-image and scikit-learn."""
    import skimage.data

    for name in SCIKIT_IMAGE.split():
        yield name, getattr(skimage.data, name)()
    for name in SCIKIT_LEARN.split():
        yield name, np.asarray(Image.open(_of_scikit_learn(f"images/{name}.jpg")))


def _of_scikit_learn(name: str) -> Path:
    """A file of scikit-learn's data sets, read without the library, whose import takes a second or two."""
    spec = importlib.util.find_spec("sklearn")
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError("No module named 'sklearn'", name="sklearn")
    return Path(spec.origin).parent / "datasets" / name


def _squares(photo: Pixels) -> Iterator[Pixels]:
    height, width = photo.shape[:2]
    fine = (min(GRID[0], height // SIDE), min(GRID[1], width // SIDE))
    for rows, columns in [(1, 1)] + [fine] * (fine != (1, 1)):
        side = min(height // rows, width // columns)
        for row, column in itertools.product(range(rows), range(columns)):
            top = (2 * row + 1) * height // (2 * rows) - side // 2
            left = (2 * column + 1) * width // (2 * columns) - side // 2
            yield photo[top : top + side, left : left + side]


BUNDLED: dict[str, Callable[[], Pictures]] = {"digits": digits, "photos": photos}


def bundled(name: str) -> Pictures:
    """The bundled set of that name. Raises UnknownNameError, or DataError without the extra `demo`."""
    if name not in BUNDLED:
        raise UnknownNameError(f"no bundled data called {name!r}; there are {', '.join(BUNDLED)}")
    try:
        return BUNDLED[name]()
    except ImportError as error:
        way_out = 'pip install "collapse-probe[demo]"'
        raise DataError(f"bundled:{name} needs a package that is not installed ({error}); {way_out}") from error
    except OSError as error:  # scikit-image would have to download
        raise DataError(f"bundled:{name} cannot be loaded: {error}") from error


LIBRARIES = {  # prefix: the library that it needs, how to install it
    "hfds": ("datasets", "pip install datasets"),
    "hfids": ("datasets", "pip install datasets"),
    "wds": ("webdataset", "pip install webdataset"),
    "tfds": ("tensorflow_datasets", "pip install tensorflow tensorflow-datasets"),
    "torch": ("torchvision", "pip install torchvision"),
}
STREAMS: dict[str, Callable[[str, str | None], Shards]] = {  # read from the beginning on, as they come
    "hfids": hub_shards,
    "wds": webdataset_shards,
    "tfds": tensorflow_shards,
}
WAY_OUT = "fetch it where there is network, or give a folder of images or bundled:photos"


def is_stream(address: str) -> bool:
    """Whether a data address is one of a stream."""
    return address.partition("/")[0] in STREAMS and not Path(address).exists()


def shards_at(address: str, split: str | None) -> Shards:
    """The shards of the stream at an address. Raises DataError where the library is missing or they cannot be found."""
    prefix, _, where = address.partition("/")
    return _opened(address, lambda: STREAMS[prefix](where, split), hub=prefix == "hfids" and not Path(where).exists())


def in_timm(address: str, split: str | None) -> Pictures:
    """The data set at one of timm's addresses; `split` is timm's default, "validation", where None.

    `torch/…` keeps its files in `datasets` in torch's hub folder. Raises DataError where the library is missing or the data
    cannot be fetched.
    """
    import timm.data
    import torch

    of_torch = address.startswith("torch/")
    root = str(Path(torch.hub.get_dir()) / "datasets") if of_torch else None
    factory: Any = timm.data  # untyped

    def create() -> Pictures:
        dataset = factory.create_dataset(address, root=root, split=split or "validation", download=of_torch)
        return _from_torch(dataset) if of_torch else _from_reader(dataset.reader)

    return _opened(address, create, hub=not of_torch)


def _opened(address: str, opening: Callable[[], T], hub: bool) -> T:
    """What `opening` gives; every failure as a DataError of one line."""
    library, command = LIBRARIES[address.partition("/")[0]]
    if importlib.util.find_spec(library) is None:
        raise DataError(f"{address} needs the library {library}; {command}")
    try:
        with fetching(address, DataError, WAY_OUT, hub=hub):
            return opening()
    except DataError:
        raise
    except Exception as error:  # each library has errors of its own
        raise DataError(f"cannot open {address}: {first_line(error)}") from error


def _open_timm(reader: Any, index: int) -> Any:
    return reader[index][0]


def _from_reader(reader: Any) -> Pictures:
    """hfds: the reader's data set is random access; a picture without a path is named by its number."""
    count = len(reader)
    paths = [reader.filename(i) for i in range(count)]
    if not all(isinstance(path, str) for path in paths) or len(set(paths)) < count:
        paths = [*map(str, range(count))]
    with_labels = reader.label_key in getattr(reader.dataset, "column_names", ())
    labels = _labels(reader.dataset[reader.label_key]) if with_labels else None
    ordered = sorted(reader.class_to_idx, key=reader.class_to_idx.get) if labels else []
    return Pictures(written(paths), partial(_open_timm, reader), labels, written(map(str, ordered)))


def _open_torch(dataset: Any, index: int) -> Any:
    return dataset[index][0]


def _from_torch(dataset: Any) -> Pictures:
    labels = _labels(getattr(dataset, "targets", ()))
    classes = written(map(str, getattr(dataset, "classes", ()))) if labels else ()
    return Pictures(tuple(map(str, range(len(dataset)))), partial(_open_torch, dataset), labels, classes)


def _labels(targets: Iterable[Any]) -> tuple[int, ...] | None:
    """Class numbers, or None where there are none or they are not single numbers."""
    try:
        labels = tuple(int(target) for target in targets)
    except (TypeError, ValueError):
        return None
    return labels if labels and min(labels) >= 0 else None
