"""Which labelled images are trained on and which are held out: always the same ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from PIL.Image import Image

from collapse_probe.data.folders import SPLITS
from collapse_probe.data.images import ImageSet, open_set
from collapse_probe.data.readers import Pictures
from collapse_probe.errors import DataError
from collapse_probe.seeding import seed_of

SPLIT_SEED = 0  # the split is part of the data, not of a run
PHOTOS = "bundled:photos"
TILES = 6  # a side, cut from a crop of a bundled photograph


@dataclass(frozen=True)
class Split:
    """What is trained on and what is held out, both with labels, and the names of the classes."""

    train: ImageSet
    held_out: ImageSet
    classes: tuple[str, ...]


def split_data(address: str, val_data: str | None = None, *, share: float = 0.2) -> Split:
    """The two parts of the data at an address.

    A folder with `train` and `val` in it is taken as it is laid out; with `val_data`, `address` (or its
    `train`) is trained on. `bundled:photos` becomes tiles, see `photograph_tiles`. Of anything else a `share`
    of every class is held out. Raises DataError where there are no labels, or other classes in the two parts.
    """
    folder = Path(address).expanduser()
    laid_out = [folder.is_dir() and any((folder / name).is_dir() for name in names) for names in SPLITS[:2]]
    if val_data is not None:
        held_out = Path(val_data).expanduser()
        inner = held_out.is_dir() and any((held_out / name).is_dir() for name in SPLITS[1])
        return _paired(
            open_set(address, split="train" if laid_out[0] else None),
            open_set(val_data, split="val" if inner else None),
        )
    if all(laid_out):
        return _paired(open_set(address, split="train"), open_set(address, split="val"))
    whole = open_set(address)
    if address == PHOTOS:
        return photograph_tiles(whole)
    labels = _labels(whole)
    train, held = stratified(labels, share)
    return Split(whole.only(train), whole.only(held), _names(whole))


def _paired(train: ImageSet, held_out: ImageSet) -> Split:
    for images in (train, held_out):
        _labels(images)
    names = [_names(images) for images in (train, held_out)]
    if names[0] != names[1]:
        odd = sorted({*names[0]} ^ {*names[1]})[:3]
        raise DataError(
            f"{train.address} and {held_out.address} have other classes ({len(names[0])} and {len(names[1])}; "
            f"for example {', '.join(odd) or 'in another order'}); both need the same class folders"
        )
    return Split(train, held_out, names[0])


def _labels(images: ImageSet) -> list[int]:
    if images.labels is None:
        raise DataError(f"{images.address} has no labels to learn; expected a folder for each class, or bundled:digits")
    return images.labels


def _names(images: ImageSet) -> tuple[str, ...]:
    return images.class_names or tuple(str(label) for label in range(max(_labels(images)) + 1))


def stratified(labels: Sequence[int], share: float) -> tuple[list[int], list[int]]:
    """Indices that are kept and indices that are held out: `share` of all, rounded up, and of every class.

    Fractions of an image go to the classes with the largest remainders; the draw is always the same.
    """
    members = {c: [i for i, label in enumerate(labels) if label == c] for c in sorted(set(labels))}
    shares = {c: len(each) * share for c, each in members.items()}
    counts = {c: int(number) for c, number in shares.items()}
    missing = int(-(-len(labels) * share // 1)) - sum(counts.values())
    for c in sorted(members, key=lambda c: counts[c] - shares[c])[:missing]:
        counts[c] += 1
    generator = torch.Generator().manual_seed(seed_of(SPLIT_SEED))
    taken: set[int] = set()
    for c, each in members.items():
        order = torch.randperm(len(each), generator=generator).tolist()
        taken |= {each[at] for at in order[: counts[c]]}
    return [i for i in range(len(labels)) if i not in taken], sorted(taken)


def photograph_tiles(photos: ImageSet) -> Split:
    """From which photograph is this tile? The crops of the bundled photographs, each cut into 6×6 tiles.

    The last crop of a photograph's grid is held out whole, so that no pixel is on both sides; the crop of the
    whole photograph is left out, and so are photographs without a grid.
    """
    crops: dict[str, list[int]] = {}
    for i, name in enumerate(photos.names):
        crops.setdefault(name.partition("/")[0], []).append(i)
    cells = {name: places[1:] for name, places in crops.items() if len(places) > 2}
    classes = tuple(cells)
    train = [(label, i) for label, name in enumerate(classes) for i in cells[name][:-1]]
    held_out = [(label, i) for label, name in enumerate(classes) for i in cells[name][-1:]]
    return Split(_tiled(photos, train, classes), _tiled(photos, held_out, classes), classes)


def whole_picture(name: str) -> str:
    """The name of the picture that a tile was cut from; of a picture its own."""
    return name.partition("#")[0]


def _tiled(photos: ImageSet, crops: Sequence[tuple[int, int]], classes: tuple[str, ...]) -> ImageSet:
    names = tuple(f"{photos.names[i]}#{place}" for _, i in crops for place in range(TILES**2))
    labels = tuple(label for label, _ in crops for _ in range(TILES**2))
    read = partial(_read_tile, photos, tuple(i for _, i in crops))
    return ImageSet(photos.address, Pictures(names, read, labels, classes, bundled=True))


def _read_tile(photos: ImageSet, crops: Sequence[int], index: int) -> Image:
    crop, place = divmod(index, TILES**2)
    picture = photos[crops[crop]]
    side = picture.width // TILES
    row, column = divmod(place, TILES)
    return picture.crop((column * side, row * side, (column + 1) * side, (row + 1) * side))
