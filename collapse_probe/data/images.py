"""Turns a data address into batches of images that keep their names."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL.Image import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from collapse_probe.data.preprocessing import Preprocess
from collapse_probe.data.readers import LIBRARIES, Pictures, bundled, in_folder, in_tar, in_timm
from collapse_probe.distributed import gathered, rank_and_world
from collapse_probe.errors import DataError, SettingError

Skipped = tuple[str, str]  # name, reason


class ImageSet(Dataset[Image]):
    """The pictures at one address: item i is a PIL image in RGB, its name `names[i]`, its class `labels[i]`.

    Names are paths relative to the root, with forward slashes; `labels` is None where there are none. Reading
    a damaged picture raises what Pillow raises; `batches` skips it and says so.
    """

    def __init__(self, address: str, pictures: Pictures, places: Sequence[int] | None = None) -> None:
        self.address = address
        self._pictures = pictures
        self._places = range(len(pictures.names)) if places is None else places

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index: int) -> Image:
        return self._pictures.read(self._places[index])

    @functools.cached_property
    def names(self) -> list[str]:
        """One name per picture, in order."""
        return [self._pictures.names[i] for i in self._places]

    @functools.cached_property
    def labels(self) -> list[int] | None:
        """One class number per picture, in order, or None."""
        labels = self._pictures.labels
        return None if labels is None else [labels[i] for i in self._places]

    @property
    def class_names(self) -> tuple[str, ...]:
        """The name of each class number; empty where unknown."""
        return self._pictures.class_names

    @property
    def bundled(self) -> bool:
        """Whether the pictures come with a package rather than from the user."""
        return self._pictures.bundled

    def only(self, places: Sequence[int]) -> ImageSet:
        """The pictures at these places, in this order, as a set of their own."""
        return ImageSet(self.address, self._pictures, [self._places[i] for i in places])

    def subset(self, count: int, seed: int = 0) -> ImageSet:
        """`count` pictures drawn without replacement under `seed`, in the set's order; at most all.

        Raises SettingError if `count` < 1.
        """
        check_count(count)
        if count >= len(self):
            return self
        return self.only(sorted(np.random.default_rng(seed).choice(len(self), size=count, replace=False).tolist()))


def check_count(count: int) -> None:
    """Raise SettingError for a number of images below 1."""
    if count < 1:
        raise SettingError(f"the number of images to take must be at least 1, not {count}; leave it out for all")


@dataclass(frozen=True)
class Batch:
    """Some pictures made ready: `pixels` [B, channels, height, width] float32; row b is picture `indices[b]`.

    `labels` [B] int64 or None. `skipped` are the pictures of this batch that could not be read, each with its
    reason; they have no row, so B may be 0.
    """

    indices: tuple[int, ...]
    names: tuple[str, ...]
    pixels: Tensor
    labels: Tensor | None = None
    skipped: tuple[Skipped, ...] = ()


def open_data(address: str | Path, *, split: str | None = None, limit: int | None = None, seed: int = 0) -> ImageSet:
    """The pictures at a data address; nothing is decoded yet.

    A folder, flat or with class folders; a `.tar`; `bundled:digits` (1797 images) or `bundled:photos` (53);
    `hfds/ORG/NAME`, `hfids/…`, `wds/FOLDER`, `tfds/…`, `torch/NAME` as timm reads them. `split` is a
    subfolder, or timm's split. `limit` takes that many pictures at random under `seed`; of a stream (hfids,
    wds, tfds) the first.

    Raises DataError where nothing can be read there, SettingError if `limit` < 1, UnknownNameError for
    unknown bundled data.
    """
    if limit is not None:
        check_count(limit)
    name, path = str(address), Path(address).expanduser()
    if name.startswith("bundled:") or (path.suffix.lower() == ".tar" and not path.is_dir()):
        if split is not None:
            raise DataError(f"{address} has no splits, so {split!r} cannot be taken; leave --split out")
        pictures = bundled(name.removeprefix("bundled:")) if name.startswith("bundled:") else in_tar(path)
    elif name.partition("/")[0] in LIBRARIES and not path.exists():
        pictures = in_timm(name, split, limit)
    else:
        pictures = in_folder(path, split)
    if not pictures.names:
        raise DataError(f"{address} holds no image")
    images = ImageSet(name, pictures)
    return images if limit is None else images.subset(limit, seed)


class _Prepared(Dataset[tuple[int, Tensor | str]]):
    """Item i is (i, pixels), or (i, the reason) for a picture that cannot be read."""

    def __init__(self, images: ImageSet, transform: Callable[[Image], Tensor]) -> None:
        self.images, self.transform = images, transform

    def __getitem__(self, index: int) -> tuple[int, Tensor | str]:
        try:
            picture = self.images[index]
        except Exception as error:  # Pillow has no common base for its errors
            return index, " ".join(f"{type(error).__name__}: {error}".split())[:200]
        return index, self.transform(picture).float()


def batches(
    images: ImageSet,
    preprocess: Preprocess,
    *,
    batch_size: int,
    workers: int = 0,
    rank: int = 0,
    world: int = 1,
    order: Sequence[int] | None = None,
) -> Iterator[Batch]:
    """Read the set in order, or in the `order` of these places, every picture once.

    Process `rank` of `world` takes the pictures rank, rank + world, … of that order.

    Nothing is padded or repeated, so processes may get different numbers of pictures. One that cannot be
    read (damaged, empty, a decompression bomb) is in the batch's `skipped` instead of its rows. `workers` are
    processes that decode.

    Raises SettingError for impossible settings, and DataError at the end of a single process' pass in which
    no picture could be read.
    """
    if batch_size < 1:
        raise SettingError(f"the batch size must be at least 1, not {batch_size}")
    if workers < 0 or not 0 <= rank < world:
        raise SettingError(f"expected workers ≥ 0 and 0 ≤ rank < world, not {workers}, {rank}, {world}")
    places = (range(len(images)) if order is None else order)[rank::world]
    collate = functools.partial(_collate, images.names, images.labels, (preprocess.channels, *preprocess.size))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # more workers than cores
        loader: DataLoader[Any] = DataLoader(
            _Prepared(images, preprocess.transform),
            batch_size=batch_size,
            sampler=places,
            num_workers=workers,
            collate_fn=collate,
            generator=torch.Generator(),  # DataLoader would draw its workers' seed from the global one
        )
    return _read_all(loader, images.address, len(places), alone=world == 1)


def _read_all(loader: DataLoader[Any], address: str, count: int, alone: bool) -> Iterator[Batch]:
    """The loader's batches; DataError at their end where one process `alone` could read none of `count` pictures."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # fork in a process with threads
        iterator = iter(loader)
    skipped: list[Skipped] = []
    read = 0
    for batch in iterator:
        read += len(batch.indices)
        skipped += batch.skipped
        yield batch
    if alone and not read:
        example = f", for example {skipped[0][0]} ({skipped[0][1]})" if skipped else ""
        raise DataError(f"no image of {address} can be read: {len(skipped)} of {count} failed{example}")


def batches_of(
    images: ImageSet | Iterable[Any],
    preprocess: Preprocess,
    batch_size: int,
    workers: int = 0,
    order: Sequence[int] | None = None,
) -> Iterator[Batch]:
    """This process's share of an ImageSet, see `batches`; or what a caller's own loader gives, see `from_loader`."""
    if not isinstance(images, ImageSet):
        return from_loader(images)
    rank, world = rank_and_world()
    return batches(images, preprocess, batch_size=batch_size, workers=workers, rank=rank, world=world, order=order)


def seeded_order(images: ImageSet, seed: int) -> tuple[int, ...]:
    """The places of all pictures in a random order that follows from the seed and their number."""
    return tuple(np.random.default_rng(seed).permutation(len(images)).tolist())


def _collate(
    names: Sequence[str],
    labels: Sequence[int] | None,
    shape: tuple[int, int, int],
    items: Sequence[tuple[int, Tensor | str]],
) -> Batch:
    rows = [(i, pixels) for i, pixels in items if isinstance(pixels, Tensor)]
    indices = tuple(i for i, _ in rows)
    return Batch(
        indices,
        tuple(names[i] for i in indices),
        torch.stack([pixels for _, pixels in rows]) if rows else torch.empty(0, *shape),
        None if labels is None else torch.tensor([labels[i] for i in indices], dtype=torch.int64),
        tuple((names[i], reason) for i, reason in items if isinstance(reason, str)),
    )


class OwnImages:
    """A caller's own iterable of batches, see `from_loader`, whose first batch was looked at and not lost.

    `shape` is (channels, height, width) of its images, the same in all processes; `once` says that it is an iterator, which
    can be run through only once. Raises DataError where no process has an image, or where their shapes differ.
    """

    def __init__(self, batches: Iterable[Any]) -> None:
        self.batches = batches
        iterator = iter(batches)
        self.once = iterator is batches
        first = list(islice(iterator, 1))
        self._begun: Iterator[Any] | None = chain(first, iterator)
        own = [tuple(_pixels_and_labels(item)[0].shape[1:]) for item in first]
        shapes = {shape for part in gathered(own) for shape in part}
        if len(shapes) != 1:
            came = f"gave images {sorted(shapes)} (channels, height, width)" if shapes else "gave no image"
            raise DataError("the loader " + came + (" in different processes: they must have one size" if shapes else ""))
        channels, height, width = shapes.pop()
        self.shape = (int(channels), int(height), int(width))

    def __iter__(self) -> Iterator[Any]:
        begun, self._begun = self._begun, None
        return iter(self.batches) if begun is None else begun


def looked_at(images: ImageSet | OwnImages | Iterable[Any]) -> ImageSet | OwnImages:
    """A set of pictures as it is, anything else as `OwnImages`."""
    return images if isinstance(images, (ImageSet, OwnImages)) else OwnImages(images)


PIXEL_KEYS = ("pixel_values", "image", "images", "pixels")
LABEL_KEYS = ("labels", "label", "target", "targets")


def from_loader(loader: Iterable[Any]) -> Iterator[Batch]:
    """Batches of the caller's own loader: a tensor, (tensor, labels, …), or a dict with one of `PIXEL_KEYS`.

    The pixels [B, channels, height, width] are taken as they are, as float32: preprocessing is the loader's. Labels are kept
    where they are B whole numbers, as a tensor, an array or a list. Names are "0", "1", …. Raises DataError for anything else,
    and in a single process for a loader that gives nothing.
    """
    seen = 0
    for item in loader:
        pixels, labels = _pixels_and_labels(item)
        indices = tuple(range(seen, seen + len(pixels)))
        seen += len(pixels)
        yield Batch(indices, tuple(map(str, indices)), pixels.float(), _whole_numbers(labels, len(pixels)))
    if not seen and rank_and_world()[1] == 1:
        raise DataError("the loader gave no image")


def _pixels_and_labels(item: Any) -> tuple[Tensor, Any]:
    pixels, labels = item, None
    if isinstance(item, Mapping):
        pixels, labels = (next((item[key] for key in keys if key in item), None) for keys in (PIXEL_KEYS, LABEL_KEYS))
    elif isinstance(item, (tuple, list)) and item:
        pixels, labels = item[0], item[1] if len(item) > 1 else None
    if not isinstance(pixels, Tensor) or pixels.ndim != 4 or not pixels.is_floating_point():
        came = f"a dict with {', '.join(map(str, item))}" if isinstance(item, Mapping) else f"a {type(item).__name__}"
        came = f"{pixels.dtype} {list(pixels.shape)}" if isinstance(pixels, Tensor) else came
        raise DataError(f"a loader must give float images [batch, channels, height, width], alone or with labels; came {came}")
    return pixels, labels


def _whole_numbers(labels: Any, count: int) -> Tensor | None:
    """Labels as int64 [count]; None for anything else (none, words, one-hot rows, shares, boxes)."""
    if isinstance(labels, (list, tuple)) and not all(isinstance(label, (int, np.integer)) for label in labels):
        return None
    if not isinstance(labels, (Tensor, np.ndarray, list, tuple)):
        return None
    numbers = np.asarray(labels.cpu() if isinstance(labels, Tensor) else labels)
    return torch.from_numpy(numbers.astype(np.int64)) if numbers.shape == (count,) and numbers.dtype.kind in "iu" else None
