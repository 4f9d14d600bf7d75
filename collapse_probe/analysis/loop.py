"""One pass: every image once through a recorded model, and into the sums that the metrics asked for."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from collapse_probe.analysis.gallery import Glimpse, glimpse
from collapse_probe.capture.capture import record
from collapse_probe.capture.plan import Plan
from collapse_probe.capture.trace import TILE_BYTES, Trace, micro_batch
from collapse_probe.data.loading import Batch
from collapse_probe.devices import autocast, floating_like
from collapse_probe.distributed import gathered
from collapse_probe.errors import DataError, NonFiniteError, SettingError
from collapse_probe.metrics.accumulators import Accumulator
from collapse_probe.metrics.metric import Metric
from collapse_probe.metrics.nonfinite import nonfinite_images
from collapse_probe.results.findings import MetricResult
from collapse_probe.statistics.estimates import DIVERSITY, ENTROPY, SIMILARITY, PerImageValues, per_image_values
from collapse_probe.statistics.intervals import Array

FEWEST = 32
"""Images below which no interval is believed."""
WATCHED = (SIMILARITY, DIVERSITY, ENTROPY)
"""The metrics that headline means are read off."""
CAUTION = "looking at the intervals after every batch and stopping at a narrow one makes them slightly too narrow"


class Stopper:
    """Decides after every batch, alike in all processes, whether every headline mean's interval is narrow enough.

    `half_width` is what half of each 95 % interval may be at most, in the number's own unit (nats for the entropy). Numbers
    that are undefined so far are not waited for. A process that has no images left goes on with `drain`, so that all decide
    together. Raises SettingError where none of the metrics `measured` gives a headline mean.
    """

    def __init__(self, half_width: float, measured: Iterable[str], heads: Array | None = None) -> None:
        if not set(WATCHED) & set(measured):
            raise SettingError(
                f"an interval to stop at is one of a headline mean, and no metric that gives one is measured: ask for one of "
                f"{', '.join(WATCHED)}, or leave until_ci out"
            )
        self.half_width, self.heads, self.stopped = half_width, heads, False
        self.values = PerImageValues((), {}, heads)
        self.half_widths: dict[str, float] = {}

    def enough(self, table: Mapping[str, NDArray[Any]]) -> bool:
        """Take the values of the newest images (keys of images.npz); whether to stop."""
        self._take(per_image_values(table, self.heads))
        return self.stopped

    def drain(self) -> None:
        """Keep deciding with the processes that still have images."""
        while not self.stopped and self._take(None):
            pass

    def _take(self, newest: PerImageValues | None) -> bool:
        """Add the newest images of all processes; whether any process had any left."""
        parts = [part for part in gathered(newest) if part is not None]
        filled = [part for part in (self.values, *parts) if len(part)]
        if filled:
            values = {key: np.concatenate([part.values[key] for part in filled]) for key in filled[0].values}
            self.values = PerImageValues(tuple(name for part in filled for name in part.names), values, self.heads)
        self.half_widths = {name: estimate.half_width for name, estimate in self.values.estimates().items()}
        narrow = bool(self.half_widths) and all(width <= self.half_width for width in self.half_widths.values())
        self.stopped = len(self.values) >= FEWEST and narrow
        return bool(parts)

    def facts(self, total: int | None) -> dict[str, Any]:
        """What the findings say of it: after how many of `total` images it stopped, and how wide the intervals then were."""
        used = len(self.values)
        taken = f"{used} images in the order given" if total is None else f"{used} of {total} images drawn at random"
        narrow = f"every headline mean's 95 % interval is within ± {self.half_width:g}"
        sentence = f"stopped after {taken}, because {narrow}; {CAUTION}"
        return {
            "until_ci": self.half_width,
            "reached": self.stopped,
            "images": used,
            "of": total,
            "half_widths": self.half_widths,
            "sentence": sentence if self.stopped else f"all {used} images were used, and not {narrow}",
        }


FAIL, SKIP = "fail", "skip"
ON_NONFINITE = (FAIL, SKIP)
"""What to do where activations are not finite: stop with an error, or leave these images out of everything and name them."""
Progress = Callable[[int, int], None]
Outputs = Callable[[Sequence[str], Any], None]
"""Takes the names of some images and what the model returned for them."""


@dataclass
class PassResult:
    """What one pass over the images gathered: sums by key, and of each image its name and values, in the order of the data.

    `records` holds the per-image values of every accumulator, in chunks, by key and name. `nonfinite` are images left out of
    everything because their activations are not finite, each with the place. `remarks` counts what was done to images besides
    decoding.
    """

    accumulators: dict[Hashable, Accumulator] = field(default_factory=dict)
    names: list[str] = field(default_factory=list)
    indices: list[int] = field(default_factory=list)
    skipped: list[tuple[str, str]] = field(default_factory=list)
    nonfinite: list[tuple[str, str]] = field(default_factory=list)
    remarks: Counter[str] = field(default_factory=Counter)
    records: dict[Hashable, dict[str, list[Array]]] = field(default_factory=dict)
    pictures: dict[str, Glimpse] = field(default_factory=dict)
    labels: dict[str, int] = field(default_factory=dict)
    seconds: float = 0.0

    def extend(self, other: PassResult) -> None:
        """Add the images of another part of the same pass, whose sums are in the accumulators already."""
        self.names += other.names
        self.indices += other.indices
        self.skipped += other.skipped
        self.nonfinite += other.nonfinite
        self.remarks += other.remarks
        self.pictures |= other.pictures
        self.labels |= other.labels
        self.seconds = max(self.seconds, other.seconds)
        for key, parts in other.records.items():
            for name, chunks in parts.items():
                self.records.setdefault(key, {}).setdefault(name, []).extend(chunks)


@dataclass(frozen=True)
class PassOptions:
    """What a pass does besides adding up: it keeps the pictures of the images named in `gallery`, reports `progress` after
    each batch, hands the model's outputs to `outputs`, and ends early where `stopper` says so. `on_nonfinite` says what an
    image is whose activations are not finite: an error, or left out and named; those of `left_out`, by name, each with the
    place, are known to be.
    """

    gallery: frozenset[str] = frozenset()
    progress: Progress | None = None
    outputs: Outputs | None = None
    stopper: Stopper | None = None
    on_nonfinite: str = FAIL
    left_out: Mapping[str, str] = field(default_factory=dict)


def model_input(pixels: Tensor, plan: Plan, like: Tensor) -> Tensor:
    """The pixels on the device and in the dtype of `like`; DataError for images of another shape than the probe's."""
    if plan.input_shape and tuple(pixels.shape[1:]) != plan.input_shape:
        came, expected = (" × ".join(map(str, shape)) for shape in (pixels.shape[1:], plan.input_shape))
        raise DataError(
            f"the model was probed with images of {expected} (channels × height × width), and this batch has {came}: "
            "all images must have one size"
        )
    return pixels.to(like.device, like.dtype, non_blocking=True)


def one_pass(
    model: nn.Module,
    plan: Plan,
    metrics: Mapping[str, Metric],
    batches: Iterable[Batch],
    device: torch.device,
    amp: str | None,
    options: PassOptions,
) -> PassResult:
    """Every image once through the model and into the accumulators; then the sums of all processes together."""
    run = PassResult(accumulators_for(metrics, device))
    start, like = time.perf_counter(), torch.empty(0, dtype=floating_like(model).dtype, device=device)
    with torch.no_grad():
        for batch in batches:
            newest = PassResult(run.accumulators, skipped=[*batch.skipped], remarks=batch.remarks)
            if batch.labels is not None:
                newest.labels = dict(zip(batch.names, batch.labels.tolist(), strict=True))
            newest.nonfinite = [(name, options.left_out[name]) for name in batch.names if name in options.left_out]
            wanted = [i for i, name in enumerate(batch.names) if name not in options.left_out]
            step = micro_batch(plan, device, len(wanted))
            for first in range(0, len(wanted), step):
                rows = wanted[first : first + step]
                while rows:
                    names, pixels = [batch.names[i] for i in rows], batch.pixels[rows]
                    with record(model, plan) as recordings, autocast(device, amp):
                        output = model(model_input(pixels, plan, like))
                    trace = recordings.take()
                    ill = nonfinite_images(trace, pixels)
                    if not ill:
                        newest.indices += [batch.indices[i] for i in rows]
                        if options.outputs is not None:
                            options.outputs(names, output)
                        absorb(newest, trace, names, pixels, TILE_BYTES[device.type], options.gallery)
                        break
                    newest.nonfinite += [(names[i], place) for i, place in ill.items()]
                    if options.on_nonfinite == FAIL:
                        seen = len(run.names) + len(newest.names) + len(rows)
                        raise NonFiniteError(nonfinite_error(newest.nonfinite, seen, amp))
                    rows = [row for i, row in enumerate(rows) if i not in ill]  # once more without them
            run.extend(newest)
            if options.progress is not None:
                options.progress(len(run.names), len(run.skipped) + len(run.nonfinite))
            if options.stopper is not None and options.stopper.enough(image_table(metrics, newest)):
                break
        if options.stopper is not None:
            options.stopper.drain()
    run.seconds = time.perf_counter() - start
    return _joined(run)


def nonfinite_error(ill: Sequence[tuple[str, str]], seen: int, amp: str | None) -> str:
    """What is said where the activations of images are not finite and this is not to happen; `seen` images were run so far."""
    ways = [f"try it without {amp} (--amp)"] if amp else []
    if len(ill) < seen:
        ways.append("leave such images out and count them (--on-nonfinite skip, on_nonfinite='skip')")
    return (
        f"the activations of {len(ill)} of the {seen} images read so far are not finite, first of {ill[0][0]} ({ill[0][1]}); "
        + (", or ".join(ways) or "check the model's weights and its precision")
    )


def all_ill(ill: Sequence[tuple[str, str]]) -> str:
    """What is said where the activations of no image are finite."""
    return f"the activations of all {len(ill)} images are not finite, first of {ill[0][0]} ({ill[0][1]})"


def accumulators_for(metrics: Mapping[str, Metric], device: torch.device) -> dict[Hashable, Accumulator]:
    """The accumulators that the metrics need, each once, by key."""
    needs = [need for metric in metrics.values() if not metric.inapplicable() for need in metric.accumulators()]
    place = device if device.type != "mps" else "cpu"
    return {key: build().to(place) for key, build in dict(needs).items()}


def absorb(run: PassResult, trace: Trace, names: Sequence[str], pixels: Tensor, budget: int, gallery: frozenset[str]) -> None:
    """Add one trace to all accumulators, records and names; and the pictures of the images in `gallery`."""
    for accumulator in run.accumulators.values():
        accumulator.start_batch(trace, names)
    for tile in trace.tiles(budget):
        for accumulator in run.accumulators.values():
            accumulator.take(tile)
    for key, accumulator in run.accumulators.items():
        for name, values in accumulator.end_batch(trace).items():
            chunks = run.records.setdefault(key, {}).setdefault(name, [])
            chunks.append(values.detach().cpu().to(torch.float64).numpy())
    rolled = any(isinstance(key, tuple) and key[0] == "rollout" for key in run.accumulators)
    run.pictures |= {name: glimpse(trace, i, pixels[i], rolled) for i, name in enumerate(names) if name in gallery}
    run.names += names


def _joined(run: PassResult) -> PassResult:
    """The sums of all processes, and the images of all in the order of the data set."""
    for accumulator in run.accumulators.values():
        accumulator.all_reduce()
    whole = PassResult(run.accumulators)
    for part in gathered(replace(run, accumulators={})):
        whole.extend(part)
    order = np.argsort(whole.indices, kind="stable")
    whole.names = [whole.names[i] for i in order]
    whole.skipped.sort()
    whole.nonfinite.sort()
    whole.records = {
        key: {name: [np.concatenate(chunks)[order]] for name, chunks in parts.items()} for key, parts in whole.records.items()
    }
    return whole


def result_of(metric: Metric, run: PassResult) -> MetricResult:
    """The metric's numbers from the sums of a pass, or why it has none."""
    reason = metric.inapplicable()
    if reason:
        return metric.not_applicable(reason)
    return metric.compute([run.accumulators[key] for key, _ in metric.accumulators()], records_of(metric, run))


def records_of(metric: Metric, run: PassResult) -> list[dict[str, Array]]:
    """The per-image values of the accumulators that a metric needs."""
    records = [run.records.get(key, {}) for key, _ in metric.accumulators()]
    return [{name: parts[0] if len(parts) == 1 else np.concatenate(parts) for name, parts in r.items()} for r in records]


NULLS_BY_IMAGE = ("other_token", "other_head", "other_key")
"""The nulls that images.npz holds beside the values of neighbouring blocks; the last two for rows of maps."""


def image_table(metrics: Mapping[str, Metric], run: PassResult) -> dict[str, Any]:
    """What images.npz holds: the names, the per-image values of every metric that has some, and the nulls that are theirs."""
    table: dict[str, Any] = {"names": np.array(run.names, dtype=np.str_)}
    for name, metric in metrics.items():
        records = [] if metric.inapplicable() or not run.names else records_of(metric, run)
        values = metric.per_image(records)
        if values is not None:
            table[name] = values
            of_values = [record for record in records if values is record.get("real")]
            kept = NULLS_BY_IMAGE if metric.settings.get("axis") == "row" else NULLS_BY_IMAGE[:1]
            table |= {f"{name}/{null}": record[null] for record in of_values for null in kept if null in record}
    return table
