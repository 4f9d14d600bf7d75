"""Finds the pictures in a folder or a tar file, with their names and classes, and decodes one of them."""

from __future__ import annotations

import importlib.util
import io
import itertools
import os
import shutil
import tarfile
import tempfile
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from collapse_probe.downloads import fetching, first_line
from collapse_probe.errors import DataError, UnknownNameError

SPLITS: tuple[tuple[str, ...], ...] = (
    ("train", "training"),
    ("val", "valid", "validation", "eval", "evaluation"),
    ("test", "testing"),
)


@dataclass(frozen=True)
class Pictures:
    """Names, class labels (or None) and a way to read: `read(i)` gives picture i in RGB or raises.

    `read` can be pickled, so that loader processes can have it. Without labels `class_names` is empty.
    """

    names: tuple[str, ...]
    read: Callable[[int], Image.Image]
    labels: tuple[int, ...] | None = None
    class_names: tuple[str, ...] = ()
    bundled: bool = False


def decode(stream: IO[bytes]) -> Image.Image:
    """One picture as RGB, as timm and torchvision do it: convert("RGB"), no rotation by EXIF, alpha dropped.

    One difference: 16-bit greys are scaled to 8 bits, where convert("RGB") would clip nearly all of them to
    white. Raises what Pillow raises for a damaged or truncated picture, and DecompressionBombWarning or
    DecompressionBombError for one of more than Image.MAX_IMAGE_PIXELS.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # odd metadata
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        picture: Image.Image = Image.open(stream)
        if picture.mode.startswith("I;16"):
            picture = picture.point(lambda value: value / 257).convert("L")
        return picture.convert("RGB")


@dataclass(frozen=True)
class _FolderReader:
    root: Path
    names: tuple[str, ...]

    def __call__(self, index: int) -> Image.Image:
        with (self.root / self.names[index]).open("rb") as stream:
            return decode(stream)


@dataclass(frozen=True)
class _TarReader:
    file: Path
    places: tuple[tuple[int, int], ...]  # offset and length of each picture, in bytes

    def __call__(self, index: int) -> Image.Image:
        offset, length = self.places[index]
        with self.file.open("rb") as stream:
            stream.seek(offset)
            return decode(io.BytesIO(stream.read(length)))


def in_folder(root: Path, split: str | None = None) -> Pictures:
    """The pictures below `root`, sorted by relative path; extensions as timm has them.

    A picture's class is the folder that it lies in; there are labels only if every picture lies in one.
    `split` is a subfolder of that name or of the usual other names. Raises DataError for no folder or no
    picture.
    """
    if not root.is_dir():
        raise DataError(f"there is no folder {root}; give a folder of images, a .tar, or bundled:photos")
    root = _split_folder(root, split) if split else root
    extensions = _extensions()
    found = [
        Path(folder, file).relative_to(root).as_posix()
        for folder, _, files in os.walk(root, followlinks=True)
        for file in files
        if PurePosixPath(file).suffix.lower() in extensions
    ]
    if not found:
        raise DataError(f"the folder {root} holds no image ({', '.join(sorted(extensions))})")
    names = tuple(sorted(found))
    return Pictures(names, _FolderReader(root, names), *_classes(names))


def in_tar(file: Path) -> Pictures:
    """The pictures in an uncompressed tar and in tars inside it, sorted by path; classes as in a folder.

    Each is read by its offset with a handle of its own, so that any number of processes may read at once.
    Raises DataError for no file, a damaged or compressed one, or no picture.
    """
    if not file.is_file():
        raise DataError(f"there is no tar file {file}")
    try:
        with file.open("rb") as stream:
            members = dict(_tar_members(stream, "", 0, _extensions()))
    except (tarfile.TarError, OSError) as error:
        raise DataError(f"cannot read {file} as an uncompressed tar: {error}") from error
    if not members:
        raise DataError(f"the tar {file} holds no image ({', '.join(sorted(_extensions()))})")
    names = tuple(sorted(members))
    return Pictures(names, _TarReader(file, tuple(members[name] for name in names)), *_classes(names))


def _tar_members(stream: IO[bytes], folder: str, start: int, extensions: set[str]) -> Iterator[tuple[str, tuple[int, int]]]:
    """Path, and absolute offset and length, of each picture; a tar inside counts as a folder of its stem."""
    with tarfile.open(fileobj=stream, mode="r:") as tar:
        for member in tar:
            path = PurePosixPath(folder, member.name)
            if not member.isfile():
                continue
            if path.suffix.lower() in extensions:
                yield str(path), (start + member.offset_data, member.size)
            elif path.suffix.lower() == ".tar" and (inner := tar.extractfile(member)):
                yield from _tar_members(inner, str(path.with_suffix("")), start + member.offset_data, extensions)


def _extensions() -> set[str]:
    from timm.data.readers import img_extensions

    known: Any = img_extensions  # untyped
    return set(known.get_img_extensions(as_set=True))


def _split_folder(root: Path, split: str) -> Path:
    same = next((names for names in SPLITS if split in names), (split,))
    for name in (split, *same):
        if (root / name).is_dir():
            return root / name
    raise DataError(f"{root} has no folder for the split {split!r}; leave --split out, or name the folder itself")


def _classes(names: Sequence[str]) -> tuple[tuple[int, ...] | None, tuple[str, ...]]:
    """Labels by the name of the innermost folder, numbered in timm's order (natural: 2 before 10)."""
    from timm.utils.misc import natural_key

    folders = [PurePosixPath(name).parent.name for name in names]
    if not all(folders):
        return None, ()
    classes = sorted(set(folders), key=natural_key)
    index = {name: i for i, name in enumerate(classes)}
    return tuple(index[folder] for folder in folders), tuple(classes)


Pixels = npt.NDArray[np.uint8]

SIDE = 224  # no crop of a photograph is smaller, in pixels
GRID = (2, 3)  # and no photograph is cut finer: rows, columns
SCIKIT_IMAGE = (
    "astronaut",
    "brick",
    "camera",
    "cat",
    "coffee",
    "coins",
    "grass",
    "gravel",
    "hubble_deep_field",
    "moon",
    "rocket",
)
SCIKIT_LEARN = ("china", "flower")


@dataclass(frozen=True)
class _ArrayReader:
    arrays: tuple[Pixels, ...]  # each [height, width] or [height, width, 3]

    def __call__(self, index: int) -> Image.Image:
        return Image.fromarray(np.ascontiguousarray(self.arrays[index])).convert("RGB")


def digits() -> Pictures:
    """scikit-learn's 1797 handwritten digits, 8×8 greys stretched from 0..16 to 0..255, with their labels."""
    from sklearn.datasets import load_digits

    held = load_digits()
    greys = np.round(held.images * (255 / 16)).astype(np.uint8)
    labels = tuple(int(label) for label in held.target)
    names = tuple(f"{label}/{i:04d}.png" for i, label in enumerate(labels))
    classes = tuple(str(name) for name in held.target_names)
    return Pictures(names, _ArrayReader(tuple(greys)), labels, classes, bundled=True)


def photos() -> Pictures:
    """53 square crops, at least 224 pixels wide, of 13 photographs; no labels.

    Each photograph gives its largest centred square, then the squares of a grid of at most 2×3 cells (fewer
    where a cell would fall under 224 pixels): two scales, and no overlap within one.
    """
    crops = [(f"{name}/{i}.png", crop) for name, photo in _photographs() for i, crop in enumerate(_squares(photo))]
    names = tuple(name for name, _ in crops)
    return Pictures(names, _ArrayReader(tuple(crop for _, crop in crops)), bundled=True)


def _photographs() -> Iterator[tuple[str, Pixels]]:
    import skimage.data
    from sklearn.datasets import load_sample_image

    for name in SCIKIT_IMAGE:
        yield name, getattr(skimage.data, name)()
    for name in SCIKIT_LEARN:
        yield name, load_sample_image(f"{name}.jpg")


def _squares(photo: Pixels) -> Iterator[Pixels]:
    height, width = photo.shape[:2]
    fine = (min(GRID[0], height // SIDE), min(GRID[1], width // SIDE))
    for rows, columns in [(1, 1)] + [fine] * (fine != (1, 1)):
        side = min(height // rows, width // columns)
        for row in range(rows):
            for column in range(columns):
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
        raise DataError(f"bundled:{name} needs scikit-learn and scikit-image ({error}); {way_out}") from error
    except OSError as error:  # scikit-image would have to download
        raise DataError(f"bundled:{name} cannot be loaded: {error}") from error


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
