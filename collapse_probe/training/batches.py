"""Batches of labelled images: the same at the same step, for any number of processes and restarts."""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL.Image import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from collapse_probe.data.images import ImageSet, batches
from collapse_probe.data.loading import reason_of
from collapse_probe.data.preprocessing import Preprocess, from_timm_config
from collapse_probe.data.splits import SPLIT_SEED, Split
from collapse_probe.errors import DataError, SettingError
from collapse_probe.seeding import seed_of, seeded
from collapse_probe.training.recipe import Augmentation, Recipe

ORDER, DRAWS, PICTURE = 1, 2, 3  # what a random stream is for
VALIDATION_BATCH = 256
CPU = torch.device("cpu")

Pair = tuple[Tensor, Tensor]  # images [B, C, height, width], normalised, and classes [B]


@dataclass(frozen=True)
class Sharing:
    """Which share of every batch is this process's, and where its tensors go."""

    rank: int = 0
    world: int = 1
    device: torch.device = CPU


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
    is changed alike in any process.
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


class TrainingData(ABC):
    """The batches of a split as a recipe asks for them: on the device of `sharing`, normalised."""

    def __init__(self, split: Split, recipe: Recipe, preprocess: Preprocess, sharing: Sharing) -> None:
        self.split, self.recipe, self.preprocess, self.sharing = split, recipe, preprocess, sharing
        if len(split.train) < recipe.batch_size:
            many = f"{len(split.train)} training images do not fill one batch of {recipe.batch_size}"
            raise DataError(f"{many}; take a smaller batch_size")
        self.steps_per_epoch = len(split.train) // recipe.batch_size
        self.share = share_of(recipe.batch_size, sharing.rank, sharing.world)

    def batches(self, first: int, last: int) -> Iterator[Pair]:
        """This process's share of the batches of the steps from `first` to `last` (not with it)."""
        recipe = self.recipe
        for step, (images, labels) in zip(range(first, last), self.pictures(range(first, last)), strict=True):
            seed = seed_of(recipe.seed, DRAWS, step)
            yield augmented(images, recipe.augmentation, seed, self.share, recipe.batch_size), labels

    def order(self, step: int) -> Tensor:
        """The training images of this process in the batch of a step."""
        return order_of(len(self.split.train), self.recipe.batch_size, step, self.recipe.seed)[self.share]

    @abstractmethod
    def pictures(self, steps: range) -> Iterator[Pair]:
        """The images and labels of `order` for each of these steps, before the augmentation of whole batches."""

    @abstractmethod
    def plain(self, count: int) -> Iterator[Tensor]:
        """`count` batches of training images without augmentation: the same for every process."""

    @abstractmethod
    def held_out(self) -> Iterator[Pair]:
        """This process's share of the held-out images, each once."""

    @abstractmethod
    def sample(self, count: int) -> Tensor:
        """Up to `count` held-out images, always the same."""

    def read(self, images: ImageSet, size: int, rank: int = 0, world: int = 1) -> Iterator[Pair]:
        """Preprocessed images in batches of `size`; DataError for one that cannot be read."""
        stream = batches(images, self.preprocess, batch_size=size, workers=self.recipe.workers, rank=rank, world=world)
        for batch in stream:
            if batch.skipped:
                raise unreadable(*batch.skipped[0])
            assert batch.labels is not None
            yield batch.pixels.to(self.sharing.device), batch.labels.to(self.sharing.device)


class InMemoryData(TrainingData):
    """Data held in memory as one tensor on the device and changed a batch at a time: for small sets."""

    def __init__(self, split: Split, recipe: Recipe, preprocess: Preprocess, sharing: Sharing) -> None:
        super().__init__(split, recipe, preprocess, sharing)
        self._train, self._held_out = (
            tuple(map(torch.cat, zip(*self.read(images, VALIDATION_BATCH), strict=True)))
            for images in (split.train, split.held_out)
        )

    def pictures(self, steps: range) -> Iterator[Pair]:
        for step in steps:
            order = self.order(step).to(self.sharing.device)
            yield self._train[0][order], self._train[1][order]

    def plain(self, count: int) -> Iterator[Tensor]:
        for at in range(count):
            order = order_of(len(self.split.train), self.recipe.batch_size, at, SPLIT_SEED)
            yield self._train[0][order.to(self.sharing.device)]

    def held_out(self) -> Iterator[Pair]:
        images, labels = (each[self.sharing.rank :: self.sharing.world] for each in self._held_out)
        for first in range(0, len(labels), VALIDATION_BATCH):
            yield images[first : first + VALIDATION_BATCH], labels[first : first + VALIDATION_BATCH]

    def sample(self, count: int) -> Tensor:
        drawn = torch.randperm(len(self._held_out[1]), generator=torch.Generator().manual_seed(SPLIT_SEED))[:count]
        return self._held_out[0][sorted(drawn.tolist())].cpu()


def unreadable(name: str, reason: str) -> DataError:
    """The error of an image that a training cannot do without."""
    return DataError(f"{name} cannot be read ({reason}); remove it or repair it, and begin again")


class SeededPictures(Dataset[tuple[Tensor, int]]):
    """Item (epoch, index) is a picture changed as drawn under the seed, the epoch and the index alone."""

    def __init__(self, images: ImageSet, labels: Sequence[int], transform: Callable[[Image], Any], seed: int) -> None:
        self.images, self.labels, self.transform, self.seed = images, labels, transform, seed

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, int]:
        epoch, index = key
        try:
            picture = self.images[index]
            with seeded(self.seed, PICTURE, epoch, index):
                return self.transform(picture), self.labels[index]
        except Exception as error:  # neither Pillow nor transforms have a common base for their errors
            raise unreadable(self.images.names[index], reason_of(error)) from error


class DecodedData(TrainingData):
    """Pictures decoded anew each time and changed one by one with timm's transforms: for large sets."""

    def pictures(self, steps: range) -> Iterator[Pair]:
        train, device = self.split.train, self.sharing.device
        loader: DataLoader[Any] = DataLoader(
            SeededPictures(train, train.labels or [], self._transform(), self.recipe.seed),
            batch_sampler=([(step // self.steps_per_epoch, int(i)) for i in self.order(step)] for step in steps),
            num_workers=self.recipe.workers,
            generator=torch.Generator(),  # else it would draw from the global one
            pin_memory=device.type == "cuda",
        )
        for images, labels in loader:
            yield images.to(device, non_blocking=True), labels.to(device, non_blocking=True)

    def _transform(self) -> Callable[[Image], Any]:
        import timm.data

        factory: Any = timm.data  # untyped
        a, recipe = self.recipe.augmentation, self.recipe
        transform: Callable[[Image], Any] = factory.create_transform(
            input_size=(3, *self.preprocess.size),
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
        return transform

    def plain(self, count: int) -> Iterator[Tensor]:
        few = self.split.train.subset(count * self.recipe.batch_size, SPLIT_SEED)
        yield from (images for images, _ in self.read(few, self.recipe.batch_size))

    def held_out(self) -> Iterator[Pair]:
        yield from self.read(self.split.held_out, VALIDATION_BATCH, self.sharing.rank, self.sharing.world)

    def sample(self, count: int) -> Tensor:
        few = self.split.held_out.subset(count, SPLIT_SEED)
        return torch.cat([images.cpu() for images, _ in self.read(few, VALIDATION_BATCH)])


def open_training_data(split: Split, recipe: Recipe, size: tuple[int, int], sharing: Sharing) -> TrainingData:
    """The data of a split as the recipe wants them, for images of `size` (height, width)."""
    config = {"input_size": (3, *size), "mean": recipe.mean, "std": recipe.std}
    preprocess = from_timm_config({**config, "interpolation": recipe.interpolation, "crop_pct": recipe.crop_pct})
    kind = DecodedData if recipe.augmentation.by_picture else InMemoryData
    return kind(split, recipe, preprocess, sharing)
