"""Finds the pictures at an address, in a folder, a tar, a package or a library, with names and classes, and decodes one."""

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
from functools import partial
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


def _read_file(root: Path, names: Sequence[str], index: int) -> Image.Image:
    with (root / names[index]).open("rb") as stream:
        return decode(stream)


def in_folder(root: Path, split: str | None = None) -> Pictures:
    """The pictures below `root`, sorted by relative path; extensions as timm has them.

    A picture's class is the folder that it lies in; there are labels only if every picture lies in one.
    `split` is a subfolder of that name or of the usual other names. Raises DataError for no folder or no picture.
    """
    if not root.is_dir():
        raise DataError(f"there is no folder {root}; give a folder of images, a .tar, or bundled:photos")
    if split:
        names = (split, *next((same for same in SPLITS if split in same), ()))
        inner = next((root / name for name in names if (root / name).is_dir()), None)
        if inner is None:
            raise DataError(f"{root} has no folder for the split {split!r}; leave --split out, or name the folder itself")
        root = inner
    extensions = _extensions()
    paths = [
        Path(folder, file).relative_to(root).as_posix()
        for folder, _, files in os.walk(root, followlinks=True)
        for file in files
        if PurePosixPath(file).suffix.lower() in extensions
    ]
    if not paths:
        raise DataError(f"the folder {root} holds no image ({', '.join(sorted(extensions))})")
    paths = sorted(paths)
    return Pictures(tuple(paths), partial(_read_file, root, tuple(paths)), *_classes(paths))


def _read_tar(file: Path, places: Sequence[tuple[int, int]], index: int) -> Image.Image:
    """A picture by its offset and length in bytes, with a handle of its own: any number of processes may read at once."""
    offset, length = places[index]
    with file.open("rb") as stream:
        stream.seek(offset)
        return decode(io.BytesIO(stream.read(length)))


def in_tar(file: Path) -> Pictures:
    """The pictures in an uncompressed tar and in tars inside it, sorted by path; classes as in a folder.

    Raises DataError for no file, a damaged or compressed one, or no picture.
    """
    if not file.is_file():
        raise DataError(f"there is no tar file {file}")
    extensions = _extensions()
    try:
        with file.open("rb") as stream:
            members = dict(sorted(_tar_members(stream, "", 0, extensions)))
    except (tarfile.TarError, OSError) as error:
        raise DataError(f"cannot read {file} as an uncompressed tar: {error}") from error
    if not members:
        raise DataError(f"the tar {file} holds no image ({', '.join(sorted(extensions))})")
    names = tuple(members)
    return Pictures(names, partial(_read_tar, file, tuple(members.values())), *_classes(names))


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
SCIKIT_IMAGE = "astronaut brick camera cat coffee coins grass gravel hubble_deep_field moon rocket"
SCIKIT_LEARN = "china flower"


def _from_array(arrays: Sequence[Pixels], index: int) -> Image.Image:
    """A picture out of arrays [height, width] or [height, width, 3]."""
    return Image.fromarray(np.ascontiguousarray(arrays[index])).convert("RGB")


def digits() -> Pictures:
    """scikit-learn's 1797 handwritten digits, 8×8 greys stretched from 0..16 to 0..255, with their labels."""
    from sklearn.datasets import load_digits

    stored = load_digits()
    greys = np.round(stored.images * (255 / 16)).astype(np.uint8)
    labels = tuple(int(label) for label in stored.target)
    names = tuple(f"{label}/{i:04d}.png" for i, label in enumerate(labels))
    return Pictures(names, partial(_from_array, tuple(greys)), labels, tuple(map(str, stored.target_names)), bundled=True)


def photos() -> Pictures:
    """53 square crops, at least 224 pixels wide, of 13 photographs; no labels.

    Each photograph gives its largest centred square, then the squares of a grid of at most 2×3 cells (fewer
    where a cell would fall under 224 pixels): two scales, and no overlap within one.
    """
    crops = [(f"{name}/{i}.png", crop) for name, photo in photographs() for i, crop in enumerate(_squares(photo))]
    names, arrays = zip(*crops, strict=True)
    return Pictures(names, partial(_from_array, arrays), bundled=True)


def photographs() -> Iterator[tuple[str, Pixels]]:
    """Name and pixels of the photographs that come with scikit-image and scikit-learn."""
    import skimage.data
    from sklearn.datasets import load_sample_image

    for name in SCIKIT_IMAGE.split():
        yield name, getattr(skimage.data, name)()
    for name in SCIKIT_LEARN.split():
        yield name, load_sample_image(f"{name}.jpg")


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
    root = {"torch": str(Path(torch.hub.get_dir()) / "datasets"), "wds": address.partition("/")[2]}.get(prefix)
    factory: Any = timm.data  # untyped
    return factory.create_dataset(address, root=root, split=split, download=prefix in ("torch", "tfds"))


def _read_timm(reader: Any, index: int) -> Image.Image:
    with reader[index][0] as stream:
        return decode(stream)


def _from_reader(reader: Any) -> Pictures:
    """hfds: the reader's data set is random access; a picture without a path is named by its number."""
    count = len(reader)
    paths = [reader.filename(i) for i in range(count)]
    if not all(isinstance(path, str) for path in paths) or len(set(paths)) < count:
        paths = [*map(str, range(count))]
    with_labels = reader.label_key in getattr(reader.dataset, "column_names", ())
    labels = _labels(reader.dataset[reader.label_key]) if with_labels else None
    ordered = sorted(reader.class_to_idx, key=reader.class_to_idx.get) if labels else []
    return Pictures(tuple(paths), partial(_read_timm, reader), labels, tuple(map(str, ordered)))


def _read_torch(dataset: Any, index: int) -> Image.Image:
    picture: Image.Image = dataset[index][0]
    return picture.convert("RGB")


def _from_torch(dataset: Any) -> Pictures:
    labels = _labels(getattr(dataset, "targets", ()))
    classes = tuple(map(str, getattr(dataset, "classes", ()))) if labels else ()
    return Pictures(tuple(map(str, range(len(dataset)))), partial(_read_torch, dataset), labels, classes)


def _spooled(stream: Iterable[tuple[Image.Image, Any]]) -> Pictures:
    """The pictures of a stream, written to a temporary folder that goes when they are no longer used here."""
    folder, targets = tempfile.mkdtemp(prefix="collapse-probe-"), []
    try:
        for i, (picture, target) in enumerate(stream):
            picture.convert("RGB").save(Path(folder, f"{i}.png"), compress_level=1)
            targets.append(target)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    numbers = tuple(map(str, range(len(targets))))
    read = partial(_read_file, Path(folder), tuple(f"{number}.png" for number in numbers))
    pictures = Pictures(numbers, read, _labels(targets))
    weakref.finalize(pictures, shutil.rmtree, folder, ignore_errors=True)
    return pictures


def _labels(targets: Iterable[Any]) -> tuple[int, ...] | None:
    """Class numbers, or None where there are none or they are not single numbers."""
    try:
        labels = tuple(int(target) for target in targets)
    except (TypeError, ValueError):
        return None
    return labels if labels and min(labels) >= 0 else None
