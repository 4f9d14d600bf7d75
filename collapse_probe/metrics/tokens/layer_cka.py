"""Do two depths tell the images apart in the same way?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from collapse_probe.capture.plan import Plan
from collapse_probe.capture.trace import Trace
from collapse_probe.metrics.functional.cka import FEWEST
from collapse_probe.metrics.metric import MATRICES, Need, Record
from collapse_probe.metrics.nulls import untrained_only
from collapse_probe.metrics.sampled_images import JACKKNIFE, SAMPLED, SampledHSIC, sample_size
from collapse_probe.metrics.token_metric import WITH_PREFIX, TokenMetric, sequence
from collapse_probe.registry import METRICS
from collapse_probe.results.findings import MetricResult


class DepthHSIC(SampledHSIC):
    """HSIC between the tokens at any two depths, one vector an image and depth."""

    def __init__(self, plan: Plan, prefix: bool) -> None:
        length = sum(patches * width for patches, width in filter(None, plan.patch_shapes))
        super().__init__(len(plan.taps), sample_size(length))
        self.prefix = prefix

    def start_batch(self, trace: Trace, names: Sequence[str]) -> None:
        self._names = names

    def end_batch(self, trace: Trace) -> dict[str, Tensor]:
        """Take the batch; CKA is no mean over images, so nothing is kept by image."""
        self.absorb(self._names, [sequence(trace, depth, self.prefix) for depth in range(len(trace.tokens))])
        return {}


class LayerCKA(TokenMetric):
    """Unbiased CKA between the patch embeddings at two depths (Nguyen et al., Raghu et al.)."""

    name = "layer-cka"
    summary = "unbiased linear CKA between the patch embeddings at two depths"
    dims = ("depth", "depth")
    collapsed = "high"
    title = "Which depths tell the images apart in the same way"
    seen = f"Unbiased CKA between the patch embeddings at two depths; right, where there is one, the untrained copy. {MATRICES}"
    limits = (
        "High values between neighbouring depths are usual, trained or not, and a few dominant directions can carry all of it. "
        "With few images the estimate is rough."
    )
    failure_types = ()
    formula = r"\frac{\mathrm{HSIC}_1(a, b)}{\sqrt{\mathrm{HSIC}_1(a, a)\, \mathrm{HSIC}_1(b, b)}}"
    value_range = "at most about 1; negative values are possible, for the estimate is unbiased"
    source = "Nguyen et al., arXiv 2010.15327; Raghu et al., arXiv 2108.08810"
    traps = (
        "Biased and unbiased CKA differ widely with few images (0.354 and −0.062 on one matrix of eight rows in our "
        "tests). A mean of CKAs over batches is a third number; here all images are one sum."
    )
    panel = "patch tokens"
    unit = "CKA"
    defaults = {"prefix": False}
    variants = {"all": WITH_PREFIX}

    @property
    def definition(self) -> str:
        which = "all tokens, prefix tokens included," if self.settings["prefix"] else "the patch tokens, prefix tokens out,"
        return (
            f"Linear CKA of {which} flattened to one vector an image, at two depths of the residual stream: the unbiased HSIC₁ "
            "over all images as one U-statistic (Song et al. 2012), then HSIC(a, b)/√(HSIC(a, a)·HSIC(b, b)) (arXiv "
            f"2010.15327), in float64. {SAMPLED} Negative values are possible: the estimate is unbiased. {JACKKNIFE}"
        )

    def accumulators(self) -> list[Need]:
        prefix = bool(self.settings["prefix"])
        return [(("depth-hsic", prefix), lambda: DepthHSIC(self.plan, prefix))]

    def compute(self, accumulators: Sequence[Any], records: Sequence[Record]) -> MetricResult:
        (hsic,) = accumulators
        values, stderr, ci95 = hsic.cka()
        details = hsic.details()
        if details["images"] < FEWEST:
            return self.not_applicable("unbiased CKA needs four images or more")
        return self.result(values, stderr=stderr, ci95=ci95, details=details, nulls=untrained_only())


METRICS.add(LayerCKA.name, LayerCKA)
