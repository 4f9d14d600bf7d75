"""What models answer: kept beside the image names while a run is made, then scored and compared."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, float32

from collapse_probe.distributed import gathered

Logits = NDArray[np.float32]
AT_ONCE = 4096  # images


@dataclass(frozen=True)
class Answers:
    """Logits [images, classes], float32, in the order of `names`; None with a `reason` for a model that
    gives none.
    """

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


class OutputCollector:
    """Takes a model's outputs batch by batch; holds 4 bytes a class and image."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self.parts: list[Logits] = []
        self.reason = ""

    def __call__(self, names: Sequence[str], output: Any) -> None:
        """Take the output of one forward pass: logits [B, classes]."""
        self.names += names
        fits = isinstance(output, Tensor) and output.ndim == 2 and len(output) == len(names)
        if not fits or output.shape[1] < 2:
            came = list(output.shape) if isinstance(output, Tensor) else type(output).__name__
            self.reason = f"the model's output is no vector of logits (it is {came})"
        elif not self.reason:
            self.parts.append(output.detach().to("cpu", float32).numpy())

    def answers(self, order: Sequence[str]) -> Answers:
        """What all processes heard, with the images in the order of the names given."""
        parts = gathered((self.names, self.parts, self.reason))
        names = [name for part in parts for name in part[0]]
        reason = next((part[2] for part in parts if part[2]), "")
        if reason or not names:
            return Answers(tuple(order), None, reason or "no image was answered")
        logits = np.concatenate([chunk for part in parts for chunk in part[1]])
        if names == list(order):
            return Answers(tuple(order), logits)
        place = np.argsort(np.argsort(np.array(order), kind="stable"), kind="stable")
        return Answers(tuple(order), logits[np.argsort(np.array(names), kind="stable")[place]])


def labels_for(names: Sequence[str], labels: Mapping[str, int] | None, kinds: int, classes: int) -> tuple[Any, str]:
    """The label of every image [images], or None and why accuracy cannot be told.

    `kinds` is the number of classes in the data, `classes` that of the output: labels are positions among
    the data's own classes, so the two must be the same classes.
    """
    if labels is None:
        return None, "the data have no labels"
    if kinds != classes:
        return None, f"the data have {kinds} classes, the output {classes}"
    return np.array([labels[name] for name in names], dtype=np.int64), ""


def mean_kl(first: Logits, second: Logits) -> float:
    """Mean over images of KL(softmax(first) ‖ softmax(second)), [images, classes] twice -> nats.

    >>> mean_kl(np.zeros((2, 2), np.float32), np.zeros((2, 2), np.float32))
    0.0
    """
    total = 0.0
    for start in range(0, len(first), AT_ONCE):
        p, q = (_log_softmax(side[start : start + AT_ONCE].astype(np.float64)) for side in (first, second))
        total += float((np.exp(p) * (p - q)).sum())
    return total / len(first)


def _log_softmax(logits: NDArray[np.float64]) -> NDArray[np.float64]:
    shifted = logits - logits.max(1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(1, keepdims=True)))
