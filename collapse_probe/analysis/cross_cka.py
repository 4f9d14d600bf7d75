"""Do two models tell the same images apart in the same way, depth by depth?"""

from __future__ import annotations

from collapse_probe.analysis.comparison.joint_pass import JointPass
from collapse_probe.analysis.measurement import Images
from collapse_probe.errors import DataError
from collapse_probe.metrics.functional.cka import FEWEST
from collapse_probe.metrics.sampled_images import JACKKNIFE, SAMPLED, SampledHSIC, sample_size
from collapse_probe.models.loading import Subject
from collapse_probe.results.findings import MetricResult

NAME = "cross-cka"
DIMS = ("depth_of_first", "depth_of_second")
DEFINITION = (
    "Linear CKA between the patch tokens (prefix tokens out) at a depth of the first model and at one of the second, flattened "
    "to one vector an image: the unbiased HSIC₁ over all images as one U-statistic (Song et al. 2012), then "
    "HSIC(a, b)/√(HSIC(a, a)·HSIC(b, b)) (arXiv 2010.15327), in float64. Each model sees an image through its own "
    f"preprocessing. Depth 0 enters the first block. {SAMPLED} Negative values are possible: the estimate is unbiased. "
    f"{JACKKNIFE}"
)


def cross_cka(
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
    """Unbiased linear CKA between any depth of one model and any of another, on the same images in one joint pass.

    `values` [depths of the first, depths of the second], −1 … 1 and a little beyond (the estimate is unbiased), 1 for features
    that are equal up to rotation, shift and scale; NaN where a depth has no patches. `images` as `analyze` takes them (an
    iterable's pixels go to both models as they are); `limit` is a seeded subset. `amp` is a dtype of autocast.
    Raises DataError for fewer than four images, SettingError for a limit of an iterable, CaptureError where a model cannot be
    captured.
    """
    both = JointPass(
        first, second, images, batch_size=batch_size, device=device, limit=limit, workers=workers, amp=amp, seed=seed
    )
    plans = both.plans
    length = sum(patches * width for plan in plans for patches, width in filter(None, plan.patch_shapes))
    hsic = SampledHSIC(sum(len(plan.taps) for plan in plans), sample_size(length))
    for names, one, other in both:
        hsic.absorb(names, [*one, *other])
    hsic.all_reduce()
    values, stderr, ci95 = hsic.cka()
    if hsic.details()["images"] < FEWEST:
        raise DataError("unbiased CKA between two models needs four images or more that both can read")
    across = slice(0, len(plans[0].taps)), slice(len(plans[0].taps), None)
    return MetricResult(
        dims=DIMS,
        definition=DEFINITION,
        values=values[across],
        stderr=stderr[across],
        ci95=ci95[across],
        details={"prefix": False, **hsic.details()},
    )
