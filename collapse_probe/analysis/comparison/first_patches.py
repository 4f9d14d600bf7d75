"""The patches after the last block as a training began, and how far their similarities have moved since."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from collapse_probe.analysis.comparison.gram_drift import DEFINITION, WORDS, GramSums
from collapse_probe.analysis.comparison.joint_pass import patches_by_depth
from collapse_probe.analysis.measurement import plan_of, with_input
from collapse_probe.capture.trace import micro_batch
from collapse_probe.data.images import ImageSet, batches_of
from collapse_probe.devices import choose_device
from collapse_probe.files import write_whole
from collapse_probe.models.loading import Subject
from collapse_probe.results.findings import MetricResult

FILE = "gram-drift/first.pt"
BATCH = 64
SEEN = "Mean squared difference of the cosines between the patches of an image, from the first measurement to this one."


@dataclass(frozen=True, eq=False)
class LastPatches:
    """The patches that leave the last block, `patches` [n, P, D] in float32 on the CPU, of the images at the places `indices`.

    Empty [0] where the last block gives none. `depths` are those of the model; `content` tells the images from others.
    """

    indices: tuple[int, ...]
    patches: Tensor
    depths: int
    step: int
    content: str

    @classmethod
    def of(cls, subject: Subject, images: ImageSet, *, device: str, seed: int, step: int, content: str) -> LastPatches:
        """Those of a model now; images that are not finite have no place."""
        indices, parts, depths = [], [], 1
        for places, patches, depths in _batches(with_input(subject, images), images, device, seed):  # noqa: B007
            if patches is not None:
                finite = torch.isfinite(patches).flatten(1).all(1)
                indices += [place for place, known in zip(places, finite.tolist(), strict=True) if known]
                parts.append(patches[finite])
        return cls(tuple(indices), torch.cat(parts) if parts else torch.empty(0), depths, step, content)

    def drift_to(self, other: LastPatches) -> MetricResult:
        """The gram-drift from these to others, NaN at every depth but the last; one that does not apply, with the reason."""
        at = {place: row for row, place in enumerate(other.indices)}
        rows = [(row, at[place]) for row, place in enumerate(self.indices) if place in at]
        if self.depths != other.depths:
            return _nothing(f"at the first measurement the model had {self.depths} depths, now it has {other.depths}")
        if not rows:
            return _nothing("no image gives finite patches after the last block both at the first measurement and now")
        count, now = self.patches.shape[1], other.patches.shape[1]
        if count != now:
            return _nothing(f"at the first measurement an image had {count} patches, now it has {now}")
        before = [None] * (self.depths - 1)
        sums = GramSums([*[0] * len(before), count])
        mine, others = zip(*rows, strict=True)
        sums.absorb([*before, self.patches[list(mine)]], [*before, other.patches[list(others)]])
        result = sums.result()
        details = {**result.details, "from_step": self.step}
        return replace(result, details=details, description=replace(WORDS, seen=SEEN))

    def write(self, folder: Path) -> None:
        """Into a file of the folder."""
        write_whole(folder / FILE, lambda stream: torch.save(vars(self), stream))

    @classmethod
    def read(cls, folder: Path) -> LastPatches | None:
        """What `write` left in a folder; None where there is nothing."""
        path = folder / FILE
        return cls(**torch.load(path, map_location="cpu", weights_only=True)) if path.is_file() else None


def last(result: MetricResult) -> dict[str, float | None]:
    """The numbers of a summary: the drift after the last block, and the ends of its interval."""
    values = [None] * 3 if result.values is None or result.ci95 is None else [result.values[-1], *result.ci95[-1]]
    names = (f"gram_drift_last{end}" for end in ("", "_ci_low", "_ci_high"))
    return {
        name: None if value is None or not np.isfinite(value) else float(value)
        for name, value in zip(names, values, strict=True)
    }


def _batches(
    subject: Subject, images: ImageSet, device: str, seed: int
) -> Iterator[tuple[tuple[int, ...], Tensor | None, int]]:
    plan, where = plan_of(subject, device, seed), choose_device(device)
    step = micro_batch(plan, where)
    for batch in batches_of(images, subject.preprocess, BATCH):
        for start in range(0, len(batch.indices), step):
            part: Any = slice(start, start + step)
            with torch.no_grad():
                patches = patches_by_depth(subject.model, plan, batch.pixels[part], None, where)
            yield batch.indices[part], None if patches[-1] is None else patches[-1].cpu(), len(patches)


def _nothing(reason: str) -> MetricResult:
    return MetricResult(dims=("depth",), definition=DEFINITION, description=replace(WORDS, seen=SEEN), not_applicable=reason)
