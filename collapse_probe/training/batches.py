"""Batches of labelled images: the same at the same step, whatever the number of processes and restarts."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from PIL.Image import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from collapse_probe.data.images import ImageSet, batches
from collapse_probe.data.preprocessing import Preprocess, from_timm_config
from collapse_probe.data.splits import SPLIT_SEED, Split
from collapse_probe.errors import DataError, SettingError
from collapse_probe.seeding import seed_of, seeded
from collapse_probe.training.recipe import Augmentation, Recipe

ORDER, DRAWS, PICTURE = 1, 2, 3  # what a random stream is for
VALIDATION_BATCH = 256
CPU = torch.device("cpu")

Pair = tuple[Tensor, Tensor]  # images [B, C, height, width], normalised, and classes [B]


class TrainingData(Protocol):
    """What a trainer asks of its data."""

    steps_per_epoch: int

    def batches(self, first: int, last: int) -> Iterator[Pair]:
        """This process's share of the batches of the steps from `first` to `last` (not with it)."""
        ...

    def plain(self, count: int) -> Iterator[Tensor]:
        """`count` batches of training images without augmentation: the same for every process."""
        ...

    def held_out(self) -> Iterator[Pair]:
        """This process's share of the held-out images, each once."""
        ...

    def sample(self, count: int) -> Tensor:
        """Up to `count` held-out images, always the same."""
        ...


@dataclass(frozen=True)
class Sharing:
    """Which share of every batch is this process's, and where its tensors go."""

    rank: int = 0
    world: int = 1
    device: torch.device = CPU


def open_training_data(split: Split, recipe: Recipe, size: tuple[int, int], sharing: Sharing) -> TrainingData:
    """The data of a split as the recipe wants them, for images of `size` (height, width)."""
    config = {"input_size": (3, *size), "mean": recipe.mean, "std": recipe.std}
    preprocess = from_timm_config({**config, "interpolation": recipe.interpolation, "crop_pct": recipe.crop_pct})
    share_of(recipe.batch_size, sharing.rank, sharing.world)
    kind = DecodedData if recipe.augmentation.by_picture else InMemoryData
    return kind(split, recipe, preprocess, sharing)


def share_of(batch: int, rank: int, world: int) -> list[int]:
    """The places of a batch that process `rank` of `world` takes; SettingError where they cannot be even.

    They are closed under the mirror i -> batch − 1 − i, in whose pairs timm mixes a batch, and mirrored
    within the share: mixing the shares is mixing the batch.

    >>> share_of(8, 0, 2), share_of(8, 1, 2)
    ([0, 1, 6, 7], [2, 3, 4, 5])
    """
    if world == 1:
        return list(range(batch))
    if batch % (2 * world):
        raise SettingError(f"batch_size {batch} must be a multiple of {2 * world} for {world} processes")
    half = batch // (2 * world)
    front = list(range(rank * half, (rank + 1) * half))
    return front + [batch - 1 - place for place in reversed(front)]


def order_of(count: int, batch: int, step: int, seed: int) -> Tensor:
    """The images of the whole batch of a step: a new permutation each epoch, the incomplete rest left out."""
    epoch, place = divmod(step, count // batch)
    return _permutation(count, seed, epoch)[place * batch : (place + 1) * batch]


@functools.lru_cache(maxsize=4)
def _permutation(count: int, seed: int, epoch: int) -> Tensor:
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed_of(seed, ORDER, epoch)))


def augmented(images_BCHW: Tensor, augmentation: Augmentation, seed: int, share: Sequence[int], batch: int) -> Tensor:
    """Shifted, flipped, with another contrast and noise: as drawn under `seed` for a whole batch, of which
    these are the places `share`.

    The edge is repeated into what a shift uncovers. Every draw is made for the whole batch, so that an image
    is changed alike whatever process has it.
    """
    a, x = augmentation, images_BCHW
    generator = torch.Generator().manual_seed(seed)
    mine = torch.tensor(list(share))
    if a.shift:
        x = _shifted(x, torch.randint(-a.shift, a.shift + 1, (batch, 2), generator=generator)[mine].to(x.device))
    if a.flip and not a.by_picture:
        flip_B = (torch.rand(batch, generator=generator) < 0.5)[mine].to(x.device)
        x = torch.where(flip_B[:, None, None, None], x.flip(-1), x)
    if a.contrast:
        factor_B = 1 + a.contrast * (2 * torch.rand(batch, generator=generator) - 1)
        x = x * factor_B[mine].to(x.device)[:, None, None, None]
    if a.noise:
        x = x + a.noise * torch.randn(batch, *x.shape[1:], generator=generator)[mine].to(x.device)
    return x


def _shifted(x_BCHW: Tensor, by_B2: Tensor) -> Tensor:
    _, channels, height, width = x_BCHW.shape
    rows_BH = (torch.arange(height, device=x_BCHW.device) - by_B2[:, :1]).clamp(0, height - 1)
    columns_BW = (torch.arange(width, device=x_BCHW.device) - by_B2[:, 1:]).clamp(0, width - 1)
    x = x_BCHW.gather(2, rows_BH[:, None, :, None].expand(-1, channels, -1, width))
    return x.gather(3, columns_BW[:, None, None, :].expand(-1, channels, height, -1))


class InMemoryData:
    """Data held in memory as one tensor on the device and changed a batch at a time: for small sets."""

    def __init__(self, split: Split, recipe: Recipe, preprocess: Preprocess, sharing: Sharing) -> None:
        self._recipe, self._sharing = recipe, sharing
        self.steps_per_epoch = whole_batches(len(split.train), recipe.batch_size)
        self._train = _read(split.train, preprocess, recipe.workers, sharing.device)
        self._held_out = _read(split.held_out, preprocess, recipe.workers, sharing.device)

    def batches(self, first: int, last: int) -> Iterator[Pair]:
        """As `Lessons.batches`."""
        recipe, sharing = self._recipe, self._sharing
        share = share_of(recipe.batch_size, sharing.rank, sharing.world)
        images, labels = self._train
        for step in range(first, last):
            order = order_of(len(labels), recipe.batch_size, step, recipe.seed)[share].to(sharing.device)
            seed = seed_of(recipe.seed, DRAWS, step)
            yield augmented(images[order], recipe.augmentation, seed, share, recipe.batch_size), labels[order]

    def plain(self, count: int) -> Iterator[Tensor]:
        """As `Lessons.plain`."""
        for at in range(count):
            order = order_of(len(self._train[1]), self._recipe.batch_size, at, SPLIT_SEED)
            yield self._train[0][order.to(self._sharing.device)]

    def held_out(self) -> Iterator[Pair]:
        """As `Lessons.held_out`."""
        images, labels = (each[self._sharing.rank :: self._sharing.world] for each in self._held_out)
        for first in range(0, len(labels), VALIDATION_BATCH):
            yield images[first : first + VALIDATION_BATCH], labels[first : first + VALIDATION_BATCH]

    def sample(self, count: int) -> Tensor:
        """As `Lessons.sample`."""
        return self._held_out[0][_spread(len(self._held_out[1]), count)].cpu()


def whole_batches(images: int, batch: int) -> int:
    """Whole batches in a set; DataError where there is none."""
    if images < batch:
        raise DataError(f"{images} training images do not fill one batch of {batch}; take a smaller batch_size")
    return images // batch


def _spread(count: int, wanted: int) -> list[int]:
    drawn = torch.randperm(count, generator=torch.Generator().manual_seed(SPLIT_SEED))[:wanted]
    return sorted(drawn.tolist())


def _read(images: ImageSet, preprocess: Preprocess, workers: int, device: torch.device) -> Pair:
    pixels, labels = [], []
    for batch in batches(images, preprocess, batch_size=VALIDATION_BATCH, workers=workers):
        if batch.skipped:
            raise _unreadable(*batch.skipped[0])
        assert batch.labels is not None
        pixels.append(batch.pixels)
        labels.append(batch.labels)
    return torch.cat(pixels).to(device), torch.cat(labels).to(device)


def _unreadable(name: str, reason: str) -> DataError:
    return DataError(f"{name} cannot be read ({reason}); remove it, or mend it, and begin again")


class _Seeded(Dataset[tuple[Tensor, int]]):
    """Item (epoch, index) is a picture changed as drawn under the seed, the epoch and the index alone."""

    def __init__(self, images: ImageSet, labels: Sequence[int], transform: Callable[[Image], Any], seed: int) -> None:
        self.images, self.labels, self.transform, self.seed = images, labels, transform, seed

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, int]:
        epoch, index = key
        try:
            picture = self.images[index]
        except Exception as error:  # Pillow has no common base for its errors
            raise _unreadable(self.images.names[index], f"{type(error).__name__}: {error}") from error
        with seeded(self.seed, PICTURE, epoch, index):
            return self.transform(picture), self.labels[index]


class DecodedData:
    """Pictures decoded anew each time and changed one by one with timm's transforms: for large sets."""

    def __init__(self, split: Split, recipe: Recipe, preprocess: Preprocess, sharing: Sharing) -> None:
        self._recipe, self._sharing, self._split, self._preprocess = recipe, sharing, split, preprocess
        self.steps_per_epoch = whole_batches(len(split.train), recipe.batch_size)

    def batches(self, first: int, last: int) -> Iterator[Pair]:
        """As `Lessons.batches`."""
        recipe, sharing, train = self._recipe, self._sharing, self._split.train
        share = share_of(recipe.batch_size, sharing.rank, sharing.world)
        items = _Seeded(train, train.labels or [], self._transform(), recipe.seed)
        keys = [(step // self.steps_per_epoch, step) for step in range(first, last)]
        count = len(train)
        orders = (
            [(epoch, int(i)) for i in order_of(count, recipe.batch_size, step, recipe.seed)[share]] for epoch, step in keys
        )
        loader: DataLoader[Any] = DataLoader(
            items,
            batch_sampler=orders,  # one pass, in order
            num_workers=recipe.workers,
            generator=torch.Generator(),  # else it would draw from the global one
            pin_memory=sharing.device.type == "cuda",
        )
        for step, (images, labels) in zip(range(first, last), loader, strict=True):
            moved = images.to(sharing.device, non_blocking=True), labels.to(sharing.device, non_blocking=True)
            seed = seed_of(recipe.seed, DRAWS, step)
            yield augmented(moved[0], recipe.augmentation, seed, share, recipe.batch_size), moved[1]

    def _transform(self) -> Callable[[Image], Any]:
        import timm.data

        factory: Any = timm.data  # untyped
        a, recipe = self._recipe.augmentation, self._recipe
        made: Callable[[Image], Any] = factory.create_transform(
            input_size=(3, *self._preprocess.size),
            is_training=True,
            scale=(1.0 if a.crop is None else a.crop, 1.0),
            hflip=0.5 if a.flip else 0.0,
            color_jitter=a.color_jitter,
            auto_augment=a.auto_augment,
            interpolation=recipe.interpolation,
            mean=recipe.mean,
            std=recipe.std,
            re_prob=a.erase,
            re_mode="pixel",
        )
        return made

    def plain(self, count: int) -> Iterator[Tensor]:
        """As `Lessons.plain`."""
        few = self._split.train.subset(count * self._recipe.batch_size, SPLIT_SEED)
        yield from (pixels for pixels, _ in self._read(few, self._recipe.batch_size, 0, 1))

    def held_out(self) -> Iterator[Pair]:
        """As `Lessons.held_out`."""
        yield from self._read(self._split.held_out, VALIDATION_BATCH, self._sharing.rank, self._sharing.world)

    def sample(self, count: int) -> Tensor:
        """As `Lessons.sample`."""
        few = self._split.held_out.subset(count, SPLIT_SEED)
        return torch.cat([pixels.cpu() for pixels, _ in self._read(few, VALIDATION_BATCH, 0, 1)])

    def _read(self, images: ImageSet, size: int, rank: int, world: int) -> Iterator[Pair]:
        stream = batches(images, self._preprocess, batch_size=size, workers=self._recipe.workers, rank=rank, world=world)
        for batch in stream:
            if batch.skipped:
                raise _unreadable(*batch.skipped[0])
            assert batch.labels is not None
            yield batch.pixels.to(self._sharing.device), batch.labels.to(self._sharing.device)
