"""How far have the similarities between the patches of an image moved from one model, or checkpoint, to another?"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from collapse_probe.analysis.comparison.joint_pass import JointPass, Patches
from collapse_probe.analysis.measurement import Images
from collapse_probe.errors import DataError
from collapse_probe.metrics.accumulators import Means
from collapse_probe.metrics.functional.gram import patch_gram
from collapse_probe.metrics.nulls import with_reasons
from collapse_probe.models.loading import Subject
from collapse_probe.results.findings import Description, MetricResult
from collapse_probe.statistics.intervals import Array

NAME = "gram-drift"
STATE_BYTES = 256 * 2**20
"""Bytes that the sums of Gram matrices of all depths may take; where they take more, other images are not compared with."""
GRAM_BYTES = 64 * 2**20
NO_COPY = "not taken: what other images' Gram matrices give is the chance level here"
TOO_LARGE = "not taken: the sums of Gram matrices of so many patches would take more than 256 MiB"
DEFINITION = (
    "Mean over images of mean_ij (S_ij − T_ij)², S and T the cosines between patches i and j of one image at the same depth of "
    "the first subject and of this one, negative cosines as 0 (the Gram loss of DINOv3, arXiv 2508.10104, as its class has it; "
    "its training configurations keep negative ones), on the residual stream before any final norm, prefix tokens out. 0: the "
    "same patches are alike in both, whatever rotation and scale is between them. Compared with other images: the same "
    "between the first subject's matrix of one image and this one's of another, exact over all pairs of different images."
)
WORDS = Description(
    title="How far the similarities between patches have moved",
    seen="Mean squared difference of the cosines between the patches of an image, from the first subject to this one.",
    limits="That they have moved, not that dense features have become worse: a better model moves them too.",
    level="tokens",
    panel="drift of patch similarities",
    unit="mean squared difference of cosines",
)


class GramSums(Means):
    """The drift by depth, and what its mean over all pairs of different images needs: sums of Gram matrices of both models.

    Σ_{a≠b} ‖S_a − T_b‖² = (n − 1)(Σ‖S_a‖² + Σ‖T_b‖²) − 2 (⟨Σ S_a, Σ T_b⟩ − Σ ⟨S_a, T_a⟩).
    """

    def __init__(self, patches: Sequence[int]) -> None:
        """`patches` says how many there are at each depth; 0 where it is not compared."""
        super().__init__()
        self.patches = list(patches)
        self.across = 2 * 8 * sum(count**2 for count in self.patches) <= STATE_BYTES
        self.add_means(value=(len(self.patches),))
        self.add_state("images", len(self.patches))
        self.add_state("squares", len(self.patches))
        self.add_state("own", len(self.patches))
        for depth, count in enumerate(self.patches if self.across else ()):
            self.add_state(f"sums_{depth}", 2, count, count)

    def absorb(self, first: Patches, second: Patches) -> None:
        """Take the patches of some images in both models."""
        images = next((len(x) for x in (*first, *second) if x is not None), 0)
        drift = torch.full((images, len(self.patches)), torch.nan, dtype=torch.float64)
        for depth, (one, other) in enumerate(zip(first, second, strict=True)):
            if one is None or other is None or not self.patches[depth]:
                continue
            step = max(1, GRAM_BYTES // (self.patches[depth] ** 2 * 8))
            for start in range(0, images, step):
                part = slice(start, start + step)
                drift[part, depth] = self._add(depth, one[part], other[part])
        self.add_images("value", drift)

    def _add(self, depth: int, one: Tensor, other: Tensor) -> Tensor:
        s, t = (patch_gram(x).cpu().double() for x in (one, other))
        if self.across:
            self.state(f"sums_{depth}")[0] += s.sum(0)
            self.state(f"sums_{depth}")[1] += t.sum(0)
            self.state("squares")[depth] += s.square().sum() + t.square().sum()
            self.state("own")[depth] += (s * t).sum()
        self.state("images")[depth] += len(s)
        return (s - t).square().mean((-2, -1))

    def across_images(self) -> Array | None:
        """The mean drift between one image in the first model and another in the second, by depth; None where not kept."""
        if not self.across:
            return None
        n, squares, own = (self.array(name) for name in ("images", "squares", "own"))
        values = np.full(len(self.patches), np.nan)
        for depth, patches in enumerate(self.patches):
            if patches and n[depth] > 1:
                s, t = self.array(f"sums_{depth}")
                pairs = n[depth] * (n[depth] - 1)
                total = (n[depth] - 1) * squares[depth] - 2 * ((s * t).sum() - own[depth])
                values[depth] = total / pairs / patches**2
        return values

    def result(self) -> MetricResult:
        """The drift by depth with its intervals and chance level; DataError where no image was absorbed."""
        count = int(self.array("images").max(initial=0))
        if not count:
            raise DataError("the drift between two models needs an image that both can read")
        reasons = {"untrained": NO_COPY, **({} if self.across else {"other_image": TOO_LARGE})}
        return MetricResult(
            dims=("depth",),
            definition=DEFINITION,
            values=self.mean()[0],
            stderr=self.mean()[1],
            ci95=self.bounds(),
            settings={"negatives": "zero"},
            details={"prefix": False, "images": count},
            description=WORDS,
            nulls=with_reasons({"untrained": None, "other_image": self.across_images()}, reasons, count),
        )


def gram_drift(
    first: Subject,
    second: Subject,
    images: Images,
    *,
    batch_size: int = 64,
    device: str = "auto",
    limit: int | None = None,
    workers: int = 0,
    amp: str | None = None,
    seed: int = 0,
) -> MetricResult:
    """Mean squared difference of patch cosines between two models at each depth, on the same images in one joint pass.

    `values` [depths], 0 … 1; NaN where a depth has other patches in the two. Arguments and errors as those of `JointPass`;
    models of different depth give a result that does not apply, with the reason; DataError where there is no image.
    """
    both = JointPass(
        first, second, images, batch_size=batch_size, device=device, limit=limit, workers=workers, amp=amp, seed=seed
    )
    depths = [len(plan.patch_shapes) for plan in both.plans]
    if depths[0] != depths[1]:
        reason = f"the first has {depths[0]} depths and this one {depths[1]}: which belong together is not known"
        return MetricResult(dims=("depth",), definition=DEFINITION, description=WORDS, not_applicable=reason)
    shapes = zip(*(plan.patch_shapes for plan in both.plans), strict=True)
    sums = GramSums([one[0] if one and other and one[0] == other[0] else 0 for one, other in shapes])
    if not any(sums.patches):
        reason = "no depth has the same patches in both"
        return MetricResult(dims=("depth",), definition=DEFINITION, description=WORDS, not_applicable=reason)
    for _, one, other in both:
        sums.absorb(one, other)
    sums.all_reduce()
    return sums.result()
