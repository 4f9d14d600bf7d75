"""Data sets that timm's readers know: `hfds/…`, `hfids/…`, `wds/…`, `tfds/…` and `torch/…`."""

from __future__ import annotations

import importlib.util
import itertools
import shutil
import tempfile
import weakref
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from collapse_probe.errors import DataError
from collapse_probe.hub import fetching, first_line
from collapse_probe.pictures import Pictures, decode

LIBRARIES = {  # prefix: the library that it needs, how to install it
    "hfds": ("datasets", "pip install datasets"),
    "hfids": ("datasets", "pip install datasets"),
    "wds": ("webdataset", "pip install webdataset"),
    "tfds": ("tensorflow_datasets", "pip install tensorflow tensorflow-datasets"),
    "torch": ("torchvision", "pip install torchvision"),
}
STREAMS = ("hfids", "wds", "tfds")  # can only be read from the beginning on
WAY_OUT = "fetch it where there is network, or give a folder of images or bundled:photos"


@dataclass(frozen=True)
class _TimmReader:
    reader: Any  # a timm.data.readers.Reader: index -> (open file, target)

    def __call__(self, index: int) -> Image.Image:
        with self.reader[index][0] as stream:
            return decode(stream)


@dataclass(frozen=True)
class _TorchReader:
    dataset: Any  # index -> (PIL image, target)

    def __call__(self, index: int) -> Image.Image:
        picture: Image.Image = self.dataset[index][0]
        return picture.convert("RGB")


class _SpoolReader:
    """Reads what `_spooled` wrote; the folder goes when the reader that owns it does, not with its copies."""

    def __init__(self, folder: str, owner: bool = False) -> None:
        self.folder = folder
        if owner:
            weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)

    def __reduce__(self) -> tuple[type[_SpoolReader], tuple[str]]:
        return _SpoolReader, (self.folder,)

    def __call__(self, index: int) -> Image.Image:
        with Path(self.folder, f"{index}.png").open("rb") as stream:
            return decode(stream)


def in_timm(address: str, split: str | None, limit: int | None) -> Pictures:
    """The data set at one of timm's addresses; `split` is timm's default, "validation", where None.

    A stream cannot be read by index, so its pictures (the first `limit` where one is given) are first written
    to a temporary folder, without loss. `torch/…` keeps its files in `datasets` in torch's hub folder.
    Raises DataError where the library is missing or the data cannot be fetched.
    """
    prefix = address.partition("/")[0]
    library, command = LIBRARIES[prefix]
    if importlib.util.find_spec(library) is None:
        raise DataError(f"{address} needs the library {library}; {command}")
    try:
        with fetching(address, DataError, WAY_OUT, hub=prefix in ("hfds", "hfids")):
            dataset = _create(address, prefix, split or "validation")
            if prefix in STREAMS:
                return _spooled(itertools.islice(iter(dataset), limit))
            return _from_torch(dataset) if prefix == "torch" else _from_reader(dataset.reader)
    except DataError:
        raise
    except Exception as error:  # each library has errors of its own
        raise DataError(f"cannot open {address}: {first_line(error)}") from error


def _create(address: str, prefix: str, split: str) -> Any:
    import timm.data
    import torch

    if prefix in STREAMS and torch.distributed.is_available() and torch.distributed.is_initialized():
        raise DataError(f"{address} is a stream, which one process alone can read; run without torchrun")
    root: str | None = None
    if prefix == "torch":
        root = str(Path(torch.hub.get_dir()) / "datasets")
    elif prefix == "wds":
        root = address.partition("/")[2]
    factory: Any = timm.data  # untyped
    return factory.create_dataset(address, root=root, split=split, download=prefix in ("torch", "tfds"))


def _from_reader(reader: Any) -> Pictures:
    """hfds: the reader's data set is random access; a picture without a path is named by its number."""
    count = len(reader)
    paths = [reader.filename(i) for i in range(count)]
    unique = all(isinstance(path, str) for path in paths) and len(set(paths)) == count
    names = tuple(str(path) for path in paths) if unique else tuple(str(i) for i in range(count))
    labels = _labels(reader.dataset[reader.label_key]) if _has_column(reader) else None
    ordered = sorted(reader.class_to_idx, key=reader.class_to_idx.get) if labels else []
    return Pictures(names, _TimmReader(reader), labels, tuple(str(name) for name in ordered))


def _has_column(reader: Any) -> bool:
    return reader.label_key in getattr(reader.dataset, "column_names", ())


def _from_torch(dataset: Any) -> Pictures:
    names = tuple(str(i) for i in range(len(dataset)))
    labels = _labels(getattr(dataset, "targets", ()))
    classes = tuple(str(name) for name in getattr(dataset, "classes", ())) if labels else ()
    return Pictures(names, _TorchReader(dataset), labels, classes)


def _spooled(stream: Iterable[tuple[Image.Image, Any]]) -> Pictures:
    folder = tempfile.mkdtemp(prefix="collapse-probe-")
    reader = _SpoolReader(folder, owner=True)
    targets = []
    for i, (picture, target) in enumerate(stream):
        picture.convert("RGB").save(Path(folder, f"{i}.png"), compress_level=1)
        targets.append(target)
    return Pictures(tuple(str(i) for i in range(len(targets))), reader, _labels(targets))


def _labels(targets: Iterable[Any]) -> tuple[int, ...] | None:
    """Class numbers, or None where there are none or they are not single numbers."""
    try:
        labels = tuple(int(target) for target in targets)
    except (TypeError, ValueError):
        return None
    return labels if labels and min(labels) >= 0 else None
