"""Turns a data address into batches of images that keep their names."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain, islice
from typing import Any, TypeVar

import numpy as np
import torch
from PIL.Image import Image
from torch import Tensor
from torch.utils.data import Dataset

from collapse_probe.data.addresses import pictures_at
from collapse_probe.data.coverage import SHARD_BITS, Coverage
from collapse_probe.data.libraries import is_stream, shards_at
from collapse_probe.data.loading import WHOLE, Batch, Item, Part, check_share, collated, loader_of, read_all, reason_of
from collapse_probe.data.objects import LABEL_KEYS, PIXEL_KEYS, is_dataset, of_dataset, of_tensor
from collapse_probe.data.preprocessing import Preprocess
from collapse_probe.data.readers import (
    EIGHT_BITS,
    REMARK,
    LeftOut,
    Pictures,
    decode,
    is_deep,
    opened,
    rgb,
    significant_bits,
    suffix_of,
)
from collapse_probe.data.streams.remote import public
from collapse_probe.data.streams.stream import ImageStream
from collapse_probe.distributed import check_processes, gathered, rank_and_world
from collapse_probe.errors import CollapseProbeError, DataError, SettingError
from collapse_probe.provenance import escaped

Images = TypeVar("Images")
SAMPLED = 16  # pictures whose files tell one data set from another
LOOKED_AT = 64  # pictures that may have more than 8 bits and tell how many all have


class ImageSet(Dataset[Image]):
    """The pictures at one address: item i is a PIL image in RGB, its name `names[i]`, its class `labels[i]`.

    Names are paths relative to the root, with forward slashes; `labels` is None where there are none. Reading
    a damaged picture raises what Pillow raises; `batches` skips it and says so. Where `shape` is not None the items are
    float tensors [channels, height, width] that need no preprocessing. `max_pixels` is the most that a picture may have,
    by default where Pillow stops.
    """

    def __init__(
        self, address: str, pictures: Pictures, places: Sequence[int] | None = None, max_pixels: int | None = None
    ) -> None:
        self.address, self.max_pixels = escaped(public(address)), max_pixels
        self._pictures = pictures
        self._places = range(len(pictures.names)) if places is None else places

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index: int) -> Image:
        picture: Image = self.read(index)[0]
        return picture

    def pixels(self, index: int, preprocess: Preprocess) -> Tensor:
        """The picture as the model's input [channels, height, width], float32."""
        picture = self[index]
        return picture.float() if isinstance(picture, Tensor) else preprocess.pixels_of(picture)

    def read(self, index: int) -> tuple[Any, int | None]:
        """The picture (a float tensor where there is a `shape`), and the label that came with it alone, if any."""
        came = self._pictures.open(self._places[index])
        picture, label = came if isinstance(came, tuple) else (came, None)
        if isinstance(picture, Tensor):
            return picture, label
        if isinstance(picture, Image):
            return rgb(picture, self.bits), label
        with picture:
            return decode(picture, self.max_pixels, self.bits), label

    @functools.cached_property
    def bits(self) -> int:
        """The bits of grey that all pictures are read with that have more than 8; see `rgb`.

        They are those of the deepest among LOOKED_AT pictures, evenly spaced over all at the address.
        """
        if self._pictures.bits is not None:
            return self._pictures.bits
        names = self._pictures.names
        able = [i for i, name in enumerate(names) if suffix_of(name) not in EIGHT_BITS]
        deepest = 8
        for place in able[:: max(len(able) // LOOKED_AT, 1)][:LOOKED_AT]:
            try:
                came = self._pictures.open(place)
                picture = came[0] if isinstance(came, tuple) else came
                with picture if not isinstance(picture, Image) else contextlib.nullcontext():
                    picture = picture if isinstance(picture, Image) else opened(picture, self.max_pixels)
                    if is_deep(picture) and picture.mode != "F":
                        deepest = max(deepest, significant_bits(picture))
            except Exception:  # skipped when its turn comes; Pillow has no common base for its errors
                continue
        return deepest

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

    @property
    def from_memory(self) -> bool:
        """Whether the pictures are in memory, or objects of the caller's own, which other processes should not read."""
        return self._pictures.from_memory

    @property
    def count(self) -> int:
        """The number of pictures."""
        return len(self)

    @property
    def shape(self) -> tuple[int, int, int] | None:
        """(channels, height, width) of items that are tensors, made ready by the caller."""
        return self._pictures.shape

    @property
    def content_sha256(self) -> str | None:
        """A fingerprint of images that came as one tensor."""
        return self._pictures.content_sha256

    @functools.cached_property
    def sample_sha256(self) -> str | None:
        """A fingerprint of the files of SAMPLED pictures, evenly spaced, which tells other pictures of the same names; None
        where there are no files.
        """
        digest = hashlib.sha256()
        for place in () if self.from_memory else range(0, len(self), -(-len(self) // SAMPLED)):
            with contextlib.suppress(Exception):  # one that cannot be read is skipped when its turn comes
                came = self._pictures.open(self._places[place])
                file = came[0] if isinstance(came, tuple) else came
                if isinstance(file, (Image, Tensor)):
                    return None
                with file:
                    digest.update(hashlib.sha256(file.read()).digest())
        return None if self.from_memory else digest.hexdigest()

    def files_sha256(self) -> str:
        """A fingerprint of the sizes and times of all pictures' files, which tells a change of one; empty where they are no
        files of their own. Opens each, reads none.
        """
        digest = hashlib.sha256()
        for place in () if self.from_memory else self._places:
            try:
                came = self._pictures.open(place)
            except Exception:  # one that cannot be read is skipped when its turn comes
                continue
            with came[0] if isinstance(came, tuple) else came as file:
                try:
                    facts = os.fstat(file.fileno())
                except (AttributeError, OSError, ValueError):  # inside an archive, or on another machine
                    return ""
                digest.update(f"{place} {facts.st_size} {facts.st_mtime_ns};".encode())
        return digest.hexdigest()

    @property
    def left_out(self) -> LeftOut:
        """What else lies at the address and is not read."""
        return self._pictures.left_out

    @property
    def notes(self) -> tuple[str, ...]:
        """How the address was read, and what of it was not."""
        return (*self._pictures.notes, *self.left_out.notes())

    def only(self, places: Sequence[int]) -> ImageSet:
        """The pictures at these places, in this order, as a set of their own."""
        return ImageSet(self.address, self._pictures, [self._places[i] for i in places], self.max_pixels)

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


def open_data(
    address: str | os.PathLike[str],
    *,
    split: str | None = None,
    limit: int | None = None,
    seed: int = 0,
    max_pixels: int | None = None,
) -> ImageSet | ImageStream:
    """The pictures at a data address; nothing is decoded yet.

    A folder, flat or with class folders, Tiny-ImageNet's too; one picture; a pattern of files (`photos/**/*.jpg`); an
    uncompressed tar or a zip; a CSV or text file that lists paths, with labels or without; all but the pattern also behind an
    address of fsspec (`s3://`, `gs://`, `hf://`, `https://`); `bundled:digits` (1797 images) or `bundled:photos` (53);
    `hfds/ORG/NAME` and `torch/NAME` as timm reads them. Streams, which are read as they come:
    `wds/FOLDER` or `wds/shard-{000..019}.tar`, `hfids/ORG/NAME` or `hfids/FOLDER`, `tfds/NAME`. `split` is a
    subfolder, or the library's split. `limit` takes that many pictures at random under `seed`; of a stream see
    `ImageStream.subset`. `max_pixels` is the most that a picture may have.

    Every real file is read once, hidden ones and those of operating systems are not; `notes` and `left_out` say what is left
    out. Raises DataError where nothing can be read there, SettingError if `limit` < 1 or `max_pixels` < 1, UnknownNameError
    for unknown bundled data.
    """
    if limit is not None:
        check_count(limit)
    check_max_pixels(max_pixels)
    name = os.fspath(address)
    if is_stream(name):
        stream = ImageStream(name, shards_at(name, split), max_pixels)
        return stream if limit is None else stream.subset(limit, seed)
    pictures = pictures_at(name, split)
    if not pictures.names:
        raise DataError(f"{address} holds no image")
    images = ImageSet(name, pictures, max_pixels=max_pixels)
    return images if limit is None else images.subset(limit, seed)


def open_set(address: str | os.PathLike[str], *, split: str | None = None, limit: int | None = None) -> ImageSet:
    """The pictures at a data address by number; DataError for a stream, which has none."""
    images = open_data(address, split=split, limit=limit)
    if isinstance(images, ImageStream):
        way = "give a folder, a tar, or hfds/… instead of hfids/…"
        raise DataError(f"{address} is a stream, and here images are read by number and more than once; {way}")
    return images


def check_max_pixels(max_pixels: int | None) -> None:
    """Raise SettingError for a limit of pixels below 1."""
    if max_pixels is not None and max_pixels < 1:
        raise SettingError(f"max_pixels, the most that a picture may have, must be at least 1, not {max_pixels}")


class _Prepared(Dataset[Any]):
    """Item i is the picture at place i of an order."""

    def __init__(self, images: ImageSet, preprocess: Preprocess, order: Sequence[int] | None) -> None:
        self.images, self.preprocess, self.order = images, preprocess, order
        self.names, self.labels = images.names, images.labels

    def __getitem__(self, place: int) -> Item | CollapseProbeError:
        index = place if self.order is None else self.order[place]
        name, known = self.names[index], None if self.labels is None else self.labels[index]
        try:
            picture, label = self.images.read(index)
            pixels = picture.float() if isinstance(picture, Tensor) else self.preprocess.pixels_of(picture)
            remark = "" if isinstance(picture, Tensor) else str(picture.info.get(REMARK, ""))
            return Item(place, index, name, pixels, label if known is None else known, remark)
        except CollapseProbeError as error:  # of the model's, not of this picture
            return error
        except Exception as error:  # neither Pillow nor transforms have a common base for their errors
            return Item(place, index, name, reason_of(error))


def batches(
    images: ImageSet | ImageStream,
    preprocess: Preprocess,
    *,
    batch_size: int,
    workers: int = 0,
    rank: int = 0,
    world: int = 1,
    order: Sequence[int] | None = None,
    part: Part = WHOLE,
    done: Coverage | None = None,
    pin: bool = False,
) -> Iterator[Batch]:
    """Read the set in order, or in the `order` of these places, every picture once; a stream see `ImageStream.batches`.

    Of the places in that order, `part` (K, N) takes every N-th from the K-th on, of these process `rank` of `world` the
    rank-th, the (rank + world)-th, …, and of them those that are not `done`; `Batch.read` are places in that order. Nothing is
    padded or repeated, so processes may get different numbers of pictures. One that cannot be read (damaged, empty, a
    decompression bomb) or preprocessed is in the batch's `skipped` instead of its rows. `workers` are processes that decode;
    `pin` is for a GPU.

    Raises SettingError for impossible settings, and DataError at the end of a single process' pass in which
    no picture could be read.
    """
    if isinstance(images, ImageStream):
        share: dict[str, Any] = {"rank": rank, "world": world, "part": part, "done": done}
        return images.batches(preprocess, batch_size=batch_size, workers=workers, pin=pin, **share)
    check_share(batch_size, workers, rank, world, part)
    own = range(len(images) if order is None else len(order))[part[0] - 1 :: part[1]][rank::world]
    images.bits  # noqa: B018  # looked for once, not in every worker
    loader = loader_of(
        _Prepared(images, preprocess, order),
        batch_size=batch_size,
        workers=workers,
        pin=pin,
        sampler=own if done is None else done.outside(own),
        collate_fn=functools.partial(collated, (preprocess.channels, *preprocess.size)),
    )
    return read_all(loader, images.address, alone=world == 1 and part == WHOLE and not done)


def in_random_order(images: Images, seed: int) -> tuple[Images | ImageStream, Sequence[int] | None]:
    """What to give to `batches_of` so that images are read in a random order that follows from the seed: images, and an order.

    What a caller's own loader gives stays in its order.
    """
    if isinstance(images, ImageStream):
        return images.shuffled(seed), None
    return images, seeded_order(images, seed) if isinstance(images, ImageSet) else None


def batches_of(
    images: ImageSet | ImageStream | Iterable[Any],
    preprocess: Preprocess,
    batch_size: int,
    workers: int = 0,
    order: Sequence[int] | None = None,
    *,
    part: Part = WHOLE,
    done: Coverage | None = None,
    pin: bool = False,
) -> Iterator[Batch]:
    """This process's share of an ImageSet, see `batches`, or of an ImageStream; or what a caller's own loader gives, see
    `from_loader`.

    Raises SettingError where a caller's own loader is to give a `part`, or what is not `done`.
    """
    if not isinstance(images, (ImageSet, ImageStream)):
        if part != WHOLE or done is not None:
            raise SettingError(
                "a part of the images, or what is left of them, can be read of a data address, not of an iterable"
            )
        return from_loader(images)
    rank, world = rank_and_world()
    share: dict[str, Any] = {"rank": rank, "world": world, "part": part, "done": done}
    return batches(images, preprocess, batch_size=batch_size, workers=workers, pin=pin, order=order, **share)


def seeded_order(images: ImageSet, seed: int) -> tuple[int, ...]:
    """The places of all pictures in a random order that follows from the seed and their number."""
    return tuple(np.random.default_rng(seed).permutation(len(images)).tolist())


class OwnImages:
    """A caller's own iterable of batches, see `from_loader`, whose first batch was looked at and not lost.

    `shape` is (channels, height, width) of its images, the same in all processes; `once` says that it is an iterator, which
    can be run through only once. Raises DataError where no process has an image, or where their shapes differ.
    """

    notes: tuple[str, ...] = ()
    from_memory = True
    count: int | None = None

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


def images_from(
    data: Any, *, split: str | None = None, limit: int | None = None, seed: int = 0, max_pixels: int | None = None
) -> ImageSet | ImageStream | OwnImages:
    """The images behind whatever a caller gives: an address (see `open_data`), an ImageSet or ImageStream, one tensor of images
    made ready [n, channels, height, width], a data set of (image, label), or an iterable of batches (see `from_loader`).

    Raises SettingError where `split`, `limit` or `max_pixels` cannot be taken of it.
    """
    if isinstance(data, (str, os.PathLike)):
        return open_data(data, split=split, limit=limit, seed=seed, max_pixels=max_pixels)
    check_max_pixels(max_pixels)
    images: ImageSet | ImageStream | OwnImages
    if isinstance(data, Tensor):
        images = ImageSet(f"a tensor {list(data.shape)}", of_tensor(data))
    elif isinstance(data, (ImageSet, ImageStream, OwnImages)):
        images = data
    elif is_dataset(data):
        images = ImageSet(f"a data set ({type(data).__name__})", of_dataset(data))
    else:
        images = OwnImages(data)
    asked = {"split": split, "limit": limit, "max_pixels": max_pixels}
    takes = () if isinstance(images, OwnImages) else ("limit",)
    wrong = [name for name, value in asked.items() if value is not None and name not in takes]
    if wrong:
        where = "a data address or a set of images" if wrong[0] == "limit" else "a data address"
        what = "an iterable" if isinstance(images, OwnImages) else "a set of images"
        raise SettingError(f"{wrong[0]} belongs to {where}, not {what} ({type(data).__name__}); leave it out")
    return images if isinstance(images, OwnImages) or limit is None else images.subset(limit, seed)


def from_loader(loader: Iterable[Any]) -> Iterator[Batch]:
    """Batches of the caller's own loader: a tensor, (tensor, labels, …), or a dict with one of `PIXEL_KEYS`.

    The pixels [B, channels, height, width] are taken as they are, as float32: preprocessing is the loader's. Labels are kept
    where they are B whole numbers, as a tensor, an array or a list. Names are "0", "1", …, of several processes, each with a
    loader of its own images, "RANK/0", "RANK/1", …. Raises DataError for anything else, and in a single process for a loader
    that gives nothing.
    """
    seen, (rank, world) = 0, rank_and_world()
    for item in loader:
        pixels, labels = _pixels_and_labels(item)
        own = range(seen, seen + len(pixels))
        numbers = tuple((rank << SHARD_BITS) + i for i in own)
        names = tuple(str(i) if world == 1 else f"{rank}/{i}" for i in own)
        seen += len(pixels)
        check_processes()
        labelled = _whole_numbers(labels, len(pixels))
        yield Batch(numbers, names, pixels.float(), labelled, read=numbers, numbers=numbers)
    if not seen and world == 1:
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
