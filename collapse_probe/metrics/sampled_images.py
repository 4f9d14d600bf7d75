"""A random sample of images that follows from their names, whatever batches and processes they had; unbiased HSIC over it."""

from __future__ import annotations

from bisect import insort
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from collapse_probe.distributed import gathered, rank_and_world
from collapse_probe.errors import SettingError
from collapse_probe.metrics.accumulators import GROUPS, Accumulator
from collapse_probe.metrics.functional.cka import FEWEST, alignment, hsic_without_groups, linear_gram
from collapse_probe.seeding import rank_of_name
from collapse_probe.statistics.intervals import Array, interval, jackknife

if TYPE_CHECKING:
    from typing_extensions import Self

OPEN_BYTES = 512 * 2**20
FEWEST_KEPT, MOST_KEPT = 32, 1024
SAMPLED = (
    f"Above a number of images ({FEWEST_KEPT} to {MOST_KEPT:,}: what fits in {OPEN_BYTES // 2**20} MiB) it is of a random "
    "sample of them, by a hash of their names; details.images is how many entered, details.of how many there were."
)
JACKKNIFE = f"The standard error is a jackknife over {GROUPS} groups of these images, by that hash; NaN with four images."
Features = list[Tensor | None]
"""One image's vector in each view."""
Ranked = tuple[int, Features]
"""An image's rank by its name and its features."""


def sample_size(length: int) -> int:
    """How many images are kept where one has `length` features in all: what fits in the budget, from 32 up to 1,024."""
    return min(max(OPEN_BYTES // max(4 * length, 1), FEWEST_KEPT), MOST_KEPT)


class SampledImages(Accumulator):
    """Features of a sample of images in V views, each a vector of its own.

    Kept are those of the `most` images whose names have the lowest `rank_of_name`: up to so many all of them, beyond it
    a random sample, which is the same whatever batches, order, parts and processes the images came in.
    """

    def __init__(self, views: int, most: int, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.views, self.most, self.dtype = views, most, dtype
        self.add_state("seen", 1)
        self._kept: list[Ranked] = []  # by rank

    def take_images(self, names: Sequence[str], features: Callable[[int], Sequence[Tensor | None]]) -> None:
        """Take of images those that belong to the sample, with what `features` gives of the i-th; None for a view that is not
        there.
        """
        self.add("seen", torch.tensor([float(len(names))]))
        for image, name in enumerate(names):
            rank = rank_of_name(name) - 2**63  # a whole number that int64 holds
            if len(self._kept) < self.most or rank < self._kept[-1][0]:
                own = [None if x is None else x.flatten().to("cpu", self.dtype, copy=True) for x in features(image)]
                self._keep((rank, own))

    def _keep(self, image: Ranked) -> None:
        insort(self._kept, image, key=_rank)
        del self._kept[self.most :]

    def snapshot(self) -> Any:
        return super().snapshot(), [*self._kept]

    def put_back(self, snapshot: Any) -> None:
        states, self._kept = snapshot
        super().put_back(states)

    def of_sample(self, names: Sequence[str]) -> NDArray[np.bool_]:
        """Which of these images are in the sample of all that were seen."""
        kept = {rank for rank, _ in self._kept}
        return np.array([rank_of_name(name) - 2**63 in kept for name in names], dtype=np.bool_)

    def state_dict(self) -> dict[str, Tensor]:
        """`seen`, how many images came; of those kept the `ranks` [n] in their order and `features_v` [n, F] of each view v."""
        states = {**super().state_dict(), "ranks": torch.tensor([rank for rank, _ in self._kept], dtype=torch.int64)}
        for v in range(self.views):
            columns = [features[v] for _, features in self._kept]
            there = [column for column in columns if column is not None]
            states[f"features_{v}"] = torch.stack(there) if there else torch.zeros(len(columns), 0, dtype=self.dtype)
        return states

    def load_state_dict(self, states: Mapping[str, Tensor]) -> None:
        """Take over what `state_dict` gave; SettingError for the states of another accumulator."""
        kept = self._images_in(states)
        super().load_state_dict({"seen": states["seen"]})
        self._kept = kept

    def merge(self, other: Self) -> None:
        """Add the images that another one has seen; SettingError where its views are others."""
        lengths, others = _lengths(self._kept), _lengths(other._kept)
        if (self.views, self.most) != (other.views, other.most) or (lengths and others and lengths != others):
            raise SettingError("these are the features of another metric, model or version: add like to like")
        super().merge(other)
        for image in other._kept:
            self._keep(image)

    def all_reduce(self) -> None:
        """The sample of the images of all processes, in all of them."""
        super().all_reduce()
        if rank_and_world()[1] > 1:
            ranks = sorted(rank for part in gathered([rank for rank, _ in self._kept]) for rank in part)[: self.most]
            mine = [image for image in self._kept if ranks and image[0] <= ranks[-1]]
            self._kept = sorted((image for part in gathered(mine) for image in part), key=_rank)[: self.most]

    def _images_in(self, states: Mapping[str, Tensor]) -> list[Ranked]:
        """The kept images that states hold; SettingError where they are not of this kind."""
        names = ["seen", "ranks", *(f"features_{v}" for v in range(self.views))]
        if sorted(states) != sorted(names):
            raise SettingError(f"expected the states of a sample of images, {', '.join(names)}, not {', '.join(states)}")
        self._check({"seen": states["seen"]})
        ranks, columns = states["ranks"].tolist(), [states[name] for name in names[2:]]
        shapes = [tuple(column.shape) for column in columns]
        if (
            len(ranks) > self.most
            or ranks != sorted(ranks)
            or any(len(shape) != 2 or shape[0] != len(ranks) for shape in shapes)
            or any(column.dtype != self.dtype for column in columns)
        ):
            raise SettingError(
                f"expected up to {self.most} images in the order of their ranks with as many features of each view, in "
                f"{str(self.dtype)[6:]}, not {len(ranks)} ranks and features of {shapes}"
            )
        rows = [[column[i].clone() if column.shape[1] else None for column in columns] for i in range(len(ranks))]
        return list(zip(ranks, rows, strict=True))

    def details(self) -> dict[str, int]:
        """How many images the numbers are of, and how many there were."""
        return {"images": len(self._kept), "of": int(self.state("seen").item())}


class SampledHSIC(SampledImages):
    """HSIC₁ between any two of V views of the same images (depths of a model, or of two), as one U-statistic over all kept."""

    def __init__(self, views: int, most: int = MOST_KEPT) -> None:
        super().__init__(views, most)

    def absorb(self, names: Sequence[str], views: Sequence[Tensor | None]) -> None:
        """Take each view [B, …] of the B images called `names`; None for a view that is not there."""
        self.take_images(names, lambda image: [None if x is None else x[image] for x in views])

    def cka(self) -> tuple[Array, Array, Array]:
        """CKA [V, V], its standard error and its 95 % interval; NaN with fewer than four images.

        The error is a jackknife that leaves out one of `GROUPS` groups of images each: every sixteenth in the order of ranks.
        """
        n = len(self._kept)
        if n < FEWEST:
            nothing = np.full((self.views, self.views), np.nan)
            return nothing, nothing.copy(), np.full((self.views, self.views, 2), np.nan)
        hsic, without = hsic_without_groups(torch.stack([self._gram(v) for v in range(self.views)]), min(GROUPS, n))
        values = _cka(hsic).numpy()
        stderr, groups = jackknife(_cka(without).numpy())
        return values, stderr, interval(values, stderr, max(groups, 1))

    def _gram(self, view: int) -> Tensor:
        """The Gram matrix [n, n] of one view; zeros where it is not there."""
        there = [features[view] for _, features in self._kept]
        rows = [row for row in there if row is not None]
        return linear_gram(torch.stack(rows)) if rows else torch.zeros(len(there), len(there), dtype=torch.float64)


def _rank(image: Ranked) -> int:
    return image[0]


def _lengths(images: Sequence[Ranked]) -> list[int]:
    """How many features each view has; empty without images."""
    return [0 if view is None else view.numel() for view in images[0][1]] if images else []


def _cka(hsic: Tensor) -> Tensor:
    own = hsic.diagonal(dim1=-2, dim2=-1)
    return alignment(hsic, own[..., :, None], own[..., None, :])
