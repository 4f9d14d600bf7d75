"""Do two models tell the same images apart in the same way, depth by depth?"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import tee

import torch
from torch import Tensor, nn

from collapse_probe.analysis.measurement import Images, model_input, plan_of, with_input
from collapse_probe.analysis.state.memory import alike
from collapse_probe.capture.capture import record
from collapse_probe.capture.plan import Plan
from collapse_probe.capture.trace import micro_batch
from collapse_probe.data.images import OwnImages, batches_of, from_loader, images_from
from collapse_probe.data.loading import Batch
from collapse_probe.devices import autocast, choose_device, floating_like
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
    place, subjects = choose_device(device), (first, second)
    source = images_from(images, limit=limit, seed=seed)
    subjects = with_input(first, source), with_input(second, source)
    models = [subject.model for subject in subjects]
    plans = [plan_of(subject, device, seed) for subject in subjects]
    length = sum(patches * width for plan in plans for patches, width in filter(None, plan.patch_shapes))
    hsic = SampledHSIC(sum(len(plan.taps) for plan in plans), sample_size(length))
    if isinstance(source, OwnImages):
        streams = [*tee(from_loader(source))]
    else:
        streams = [batches_of(source, subject.preprocess, batch_size, workers) for subject in subjects]
    step = min(micro_batch(plan, place) for plan in plans)
    with torch.no_grad():
        for one, other in zip(*streams, strict=True):
            for names, *pixels in _pairs(one, other, step):
                patches = [_patches(m, p, x, amp, place) for m, p, x in zip(models, plans, pixels, strict=True)]
                hsic.absorb(names, [*patches[0], *patches[1]])
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


def _pairs(one: Batch, other: Batch, step: int) -> Iterator[tuple[list[str], Tensor, Tensor]]:
    """Names and pixels of the images that both batches hold, a few at a time."""
    places = {index: row for row, index in enumerate(other.indices)}
    rows = [(row, places[index]) for row, index in enumerate(one.indices) if index in places]
    for start in range(0, len(rows), step):
        mine, others = zip(*rows[start : start + step], strict=True)
        yield [one.names[row] for row in mine], one.pixels[list(mine)], other.pixels[list(others)]


def _patches(model: nn.Module, plan: Plan, pixels: Tensor, amp: str | None, device: torch.device) -> list[Tensor | None]:
    """The patch tokens of one model at each depth."""
    count = len(pixels)
    if missing := -count % alike(plan, device):
        pixels = torch.cat([pixels, pixels[-1:].expand(missing, *pixels.shape[1:])])
    images = model_input(pixels, plan, floating_like(model))
    with record(model, plan) as recordings, autocast(images.device, amp):
        model(images)
    trace = recordings.take().first(count)
    return [trace.patches(depth) for depth in range(len(trace.tokens))]
