"""Sums of unbiased HSIC over minibatches of a fixed size, whatever batches and processes the images come in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from collapse_probe.distributed import gathered, rank_and_world
from collapse_probe.metrics.accumulators import GROUPS, Accumulator
from collapse_probe.metrics.functional.cka import FEWEST, alignment, linear_gram, pairwise_hsic
from collapse_probe.statistics.intervals import Array, interval, jackknife

if TYPE_CHECKING:
    from typing_extensions import Self

STRIDE = 4
"""An image waits for a minibatch with those whose place in the reading order differs by a multiple of this."""
MINIBATCH, SMALL_MINIBATCH = 16, 8
OPEN_BYTES = 512 * 2**20
Features = list[Tensor | None]
"""One image's vector in each view."""
Placed = tuple[int, Features]
"""An image's place in the reading order and its features."""


def minibatch_for(length: int) -> int:
    """Images in a minibatch where one image has `length` features in all: fewer where those kept would outgrow the budget."""
    return MINIBATCH if STRIDE * MINIBATCH * length * 4 <= OPEN_BYTES else SMALL_MINIBATCH


class MinibatchHSIC(Accumulator):
    """HSIC₁ between any two of V views of the same images (depths of a model, or of two), summed over minibatches.

    The minibatch of an image follows from its place in the reading order alone: the images whose places leave the same
    remainder by `STRIDE` fill one minibatch after the other, and those that fill none are shared out in their order at the end.
    So one process finds what two or four do, whatever the batch size (where all images can be read: the place counts those
    that were). W processes group by the least common multiple of `STRIDE` and W, which gives another unbiased estimate from
    the same images: it differs by about the standard error. A minibatch of n images weighs n. Besides the sums no more than
    STRIDE·(size − 1) images' features are kept.
    """

    def __init__(self, views: int, size: int = MINIBATCH) -> None:
        super().__init__()
        self.size = size
        self.add_state("hsic", GROUPS, views, views)
        self.add_state("minibatches", GROUPS)
        self._waiting: dict[int, list[Placed]] = {remainder: [] for remainder in range(STRIDE)}
        self._closed = [0] * STRIDE
        self._seen = 0

    def absorb(self, views: Sequence[Tensor | None]) -> None:
        """Take each view [B, …] of the next B images; None for a view that is not there."""
        rank, world = rank_and_world()
        for image in range(max((len(view) for view in views if view is not None), default=0)):
            place = rank + world * self._seen
            self._seen += 1
            waiting = self._waiting[place % STRIDE]
            waiting.append((place, [None if view is None else view[image].flatten().float().clone() for view in views]))
            if len(waiting) == self.size:
                self._close(place % STRIDE)

    def all_reduce(self) -> None:
        """All processes' sums, and the images that none of them has put into a minibatch yet."""
        super().all_reduce()
        self._waiting = {0: [one for part in gathered(self._open()) for one in part]}

    def merge(self, other: Self) -> None:
        """Add the other's sums and the images that it has not put into a minibatch yet."""
        super().merge(other)
        self._waiting = {0: [*self._open(), *other._open()]}

    def state_dict(self) -> dict[str, Any]:
        """The sums and the images that are in no minibatch yet, with how many were read."""
        return {**super().state_dict(), "open": dict(self._waiting), "closed": list(self._closed), "seen": self._seen}

    def load_state_dict(self, states: Mapping[str, Any]) -> None:
        """Take over what `state_dict` gave: reading goes on with the next image."""
        own = {"open", "closed", "seen"}
        super().load_state_dict({name: state for name, state in states.items() if name not in own})
        self._waiting = {remainder: list(images) for remainder, images in states["open"].items()}
        self._closed, self._seen = list(states["closed"]), states["seen"]

    def _open(self) -> list[Placed]:
        images = (image for group in self._waiting.values() for image in group)
        return [(place, [None if view is None else view.cpu() for view in views]) for place, views in images]

    def totals(self) -> tuple[Tensor, Tensor]:
        """n·HSIC₁ [GROUPS, V, V] and numbers of minibatches [GROUPS] over all images, those of unfilled minibatches too."""
        hsic, count = self.state("hsic").cpu().clone(), self.state("minibatches").cpu().clone()
        left = sorted((image for group in self._waiting.values() for image in group), key=lambda one: one[0])
        if len(left) < FEWEST:
            return hsic, count
        closed = int(count.sum())
        for i, places in enumerate(np.array_split(np.arange(len(left)), max(1, len(left) // self.size))):
            group = (closed + i) % GROUPS
            hsic[group] += _hsic([left[k][1] for k in places])
            count[group] += 1
        return hsic, count

    def cka(self) -> tuple[Array, Array, Array, int]:
        """CKA [V, V], its standard error (a jackknife over groups of minibatches), 95 % interval, number of minibatches."""
        hsic, count = self.totals()
        used = torch.nonzero(count > 0).flatten()
        whole = hsic.sum(0)
        values = _cka(whole).numpy()
        stderr, groups = jackknife(np.stack([_cka(whole - hsic[g]).numpy() for g in used]) if len(used) else values[None])
        return values, stderr, interval(values, stderr, max(groups, 1)), int(count.sum())

    def _close(self, remainder: int) -> None:
        group = (remainder + STRIDE * self._closed[remainder]) % GROUPS
        hsic = _hsic([features for _, features in self._waiting[remainder]])
        self.state("hsic")[group] += hsic.to(self.state("hsic").device)
        self.state("minibatches")[group] += 1
        self._closed[remainder] += 1
        self._waiting[remainder] = []


def _hsic(images: Sequence[Features]) -> Tensor:
    """n·HSIC₁ [V, V] of one minibatch of n images; that of a view which is not there is 0."""
    nothing = torch.zeros(len(images), len(images), dtype=torch.float64)
    views = [[image for image in view if image is not None] for view in zip(*images, strict=True)]
    return len(images) * pairwise_hsic([linear_gram(torch.stack(view)).cpu() if view else nothing for view in views])


def _cka(hsic: Tensor) -> Tensor:
    own = hsic.diagonal()
    return alignment(hsic, own[:, None], own[None, :])
