"""What models return: logits kept beside the image names while a run is made, then scored and compared."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from collapse_probe.data.images import ImageSet

Logits = NDArray[np.float32]
CHUNK = 4096  # images whose divergences are taken at a time


@dataclass(frozen=True)
class ModelOutputs:
    """Logits [images, classes], float32, in the order of `names`; None with a `reason` for a model that gives none."""

    names: tuple[str, ...]
    logits: Logits | None
    reason: str = ""

    @property
    def classes(self) -> int:
        """How many classes there are; 0 without logits."""
        return 0 if self.logits is None else int(self.logits.shape[1])

    def top1(self) -> NDArray[np.int64] | None:
        """The class of the largest logit of every image."""
        return None if self.logits is None else self.logits.argmax(1).astype(np.int64)


class Bounds:
    """The least and the largest logit of each class over images: whether a model's output varies at all."""

    def __init__(self) -> None:
        self.low: Tensor | None = None
        self.high: Tensor | None = None

    def take(self, logits: Tensor) -> None:
        """Take finite logits [B, classes]."""
        if len(logits):
            low, high = torch.aminmax(logits.double(), dim=0)
            self.low = low if self.low is None else torch.minimum(self.low, low)
            self.high = high if self.high is None else torch.maximum(self.high, high)

    @classmethod
    def of(cls, parts: Iterable[Bounds]) -> Bounds:
        """Those of all images of some parts."""
        whole = cls()
        for part in parts:
            for ends in (part.low, part.high):
                if ends is not None:
                    whole.take(ends[None])
        return whole

    @property
    def spread(self) -> float:
        """How much a logit varies over the images at most, over the largest logit there is; 0 where all are 0."""
        if self.low is None or self.high is None:
            return 0.0
        largest = float(torch.maximum(self.low.abs(), self.high.abs()).max())
        return float((self.high - self.low).max()) / largest if largest else 0.0


def logits_in(output: Any, images: int) -> Tensor | str:
    """The logits [images, classes] that a model returned, or in words what it returned instead."""
    logits = getattr(output, "logits", output)
    if not isinstance(logits, Tensor):
        return type(output).__name__
    fits = logits.ndim == 2 and len(logits) == images and logits.shape[1] > 1
    return logits if fits else str(list(logits.shape))


def labels_for(
    names: Sequence[str], images: object, classes: int, loader_labels: Mapping[str, int] | None = None
) -> tuple[NDArray[np.int64] | None, str]:
    """The label of every image [images], or None and why accuracy cannot be told.

    The labels of an ImageSet with named classes are places among these, which must be as many as the `classes` of the output.
    `loader_labels` came with a caller's own batches, and must be among the output's classes.
    """
    labels = loader_labels or {}
    if isinstance(images, ImageSet) and images.labels is not None:
        count = len(images.class_names)
        if count not in (0, classes):
            return None, f"the data have {count} classes, the output {classes}"
        labels = dict(zip(images.names, images.labels, strict=True))
    if not labels or any(name not in labels for name in names):
        return None, "the data have no labels"
    numbers = np.array([labels[name] for name in names], dtype=np.int64)
    if numbers.max() >= classes or numbers.min() < 0:
        return None, f"the labels run to {numbers.max()}, the output has {classes} classes"
    return numbers, ""


def kl_divergence(first: Tensor, second: Tensor) -> NDArray[np.float64]:
    """KL(softmax(first) ‖ softmax(second)) of every image, logits [B, classes] twice -> [B] in nats, in float64.

    >>> kl_divergence(torch.zeros(2, 2), torch.zeros(2, 2))
    array([0., 0.])
    """
    p, q = first.double().log_softmax(1), second.double().log_softmax(1)
    return np.asarray((p.exp() * (p - q)).sum(1).clamp_min(0.0).numpy())


def mean_kl(first: Logits, second: Logits) -> float:
    """The mean of `kl_divergence` over images."""
    each = [
        kl_divergence(torch.from_numpy(first[at : at + CHUNK]), torch.from_numpy(second[at : at + CHUNK]))
        for at in range(0, len(first), CHUNK)
    ]
    return float(np.concatenate(each).mean())
