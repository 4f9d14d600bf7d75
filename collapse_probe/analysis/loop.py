"""One pass: every image once through a listened-to model, and into the sums that the metrics asked for."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from collapse_probe.analysis.gallery import Glimpse, glimpse
from collapse_probe.capture.capture import record
from collapse_probe.capture.plan import Plan
from collapse_probe.capture.trace import TILE_BYTES, Trace, micro_batch
from collapse_probe.data.images import Batch
from collapse_probe.devices import autocast
from collapse_probe.distributed import gathered
from collapse_probe.errors import SettingError
from collapse_probe.metrics.accumulators import Accumulator
from collapse_probe.metrics.metric import Metric
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
        self.half_width, self.heads = half_width, heads
        self.kept = PerImageValues((), {}, heads)
        self.stopped = False

    def enough(self, table: Mapping[str, NDArray[Any]]) -> bool:
        """Take what was kept of the newest images (keys of images.npz); whether to stop."""
        self._take(per_image_values(table, self.heads))
        return self.stopped

    def drain(self) -> None:
        """Keep deciding with the processes that still have images."""
        while not self.stopped and self._take(None):
            pass

    def widths(self) -> dict[str, float]:
        """Half the length of the interval of every headline mean that is defined so far."""
        return {name: estimate.half_width for name, estimate in self.kept.estimates().items()}

    def _take(self, mine: PerImageValues | None) -> bool:
        """Add everybody's newest images; whether anybody had any left."""
        parts = [part for part in gathered(mine) if part is not None]
        held = [part for part in (self.kept, *parts) if len(part)]
        if held:
            values = {key: np.concatenate([part.values[key] for part in held]) for key in held[0].values}
            self.kept = PerImageValues(tuple(name for part in held for name in part.names), values, self.heads)
        widths = self.widths()
        self.stopped = len(self.kept) >= FEWEST and bool(widths) and all(w <= self.half_width for w in widths.values())
        return bool(parts)

    def facts(self, total: int | None) -> dict[str, Any]:
        """What the findings say of it: after how many of `total` images it stopped, and how wide the intervals then were."""
        used = len(self.kept)
        taken = f"{used} images in the order given" if total is None else f"{used} of {total} images drawn at random"
        wide = f"every headline mean's 95 % interval is within ± {self.half_width:g}"
        reached = self.stopped
        said = f"stopped after {taken}, because {wide}; {CAUTION}"
        if not reached:
            said = f"all {used} images were used, and not {wide}"
        return {
            "until_ci": self.half_width,
            "reached": reached,
            "images": used,
            "of": total,
            "half_widths": self.widths(),
            "sentence": said,
        }


Progress = Callable[[int, int], None]
Outputs = Callable[[Sequence[str], Any], None]
"""Takes the names of some images and what the model answered for them."""


@dataclass
class PassResult:
    """What one pass over the images gathered."""

    folds: dict[Hashable, Accumulator]
    names: list[str] = field(default_factory=list)
    indices: list[int] = field(default_factory=list)
    skipped: list[tuple[str, str]] = field(default_factory=list)
    records: dict[Hashable, dict[str, list[Array]]] = field(default_factory=dict)
    pictures: dict[str, Glimpse] = field(default_factory=dict)
    labels: dict[str, int] = field(default_factory=dict)
    seconds: float = 0.0


@dataclass(frozen=True)
class PassOptions:
    """What a pass does besides adding up: it keeps the pictures of the images named in `gallery`, reports `progress` after
    each batch, hands the model's outputs to `outputs`, and ends early where `stopper` says so.
    """

    gallery: frozenset[str] = frozenset()
    progress: Progress | None = None
    outputs: Outputs | None = None
    stopper: Stopper | None = None


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
    run = PassResult(folds=folds_for(metrics, device))
    start, done, skipped = time.perf_counter(), 0, 0
    dtype = next(model.parameters()).dtype
    with torch.no_grad():
        for batch in batches:
            latest = PassResult(folds=run.folds)
            step = micro_batch(plan, device, len(batch.names))
            for first in range(0, len(batch.names), step):
                part = slice(first, first + step)
                images = batch.pixels[part].to(device, dtype, non_blocking=True)
                with record(model, plan) as ears, autocast(device, amp):
                    answer = model(images)
                if options.outputs is not None:
                    options.outputs(batch.names[part], answer)
                absorb(latest, ears.take(), batch.names[part], batch.pixels[part], TILE_BYTES[device.type], options.gallery)
            latest.names = list(batch.names)
            _append(run, latest)
            run.indices += list(batch.indices)
            run.skipped += batch.skipped
            if batch.labels is not None:
                run.labels |= dict(zip(batch.names, batch.labels.tolist(), strict=True))
            done, skipped = done + len(batch.names), skipped + len(batch.skipped)
            if options.progress is not None:
                options.progress(done, skipped)
            if options.stopper is not None and options.stopper.enough(image_table(metrics, latest)):
                break
        if options.stopper is not None:
            options.stopper.drain()
    run.seconds = time.perf_counter() - start
    return _joined(run)


def folds_for(metrics: Mapping[str, Metric], device: torch.device) -> dict[Hashable, Accumulator]:
    """The folds that the metrics need, each once."""
    folds: dict[Hashable, Accumulator] = {}
    for metric in metrics.values():
        if not metric.inapplicable():
            for key, build in metric.needs().values():
                if key not in folds:
                    folds[key] = build().to(device if device.type != "mps" else "cpu")
    return folds


def absorb(run: PassResult, trace: Trace, names: Sequence[str], pixels: Tensor, budget: int, wanted: frozenset[str]) -> None:
    """One batch's trace into all folds and records; overlays of the images that are wanted."""
    for fold in run.folds.values():
        fold.start_batch(trace, names)
    for tile in trace.tiles(budget):
        for fold in run.folds.values():
            fold.add_tile(tile)
    for key, fold in run.folds.items():
        for name, values in fold.end_batch(trace).items():
            store = run.records.setdefault(key, {}).setdefault(name, [])
            store.append(values.detach().cpu().to(torch.float64).numpy())
    rolled = any(isinstance(key, tuple) and key[0] == "rollout" for key in run.folds)
    for i, name in enumerate(names):
        if name in wanted:
            run.pictures[name] = glimpse(trace, i, pixels[i], rolled)


def _append(run: PassResult, latest: PassResult) -> None:
    """Add the names, records and pictures of a batch to the run's."""
    run.names += latest.names
    run.pictures |= latest.pictures
    for key, found in latest.records.items():
        for name, chunks in found.items():
            run.records.setdefault(key, {}).setdefault(name, []).extend(chunks)


def _joined(run: PassResult) -> PassResult:
    """All processes' sums added and their images brought into the order of the data set."""
    for fold in run.folds.values():
        fold.all_reduce()
    mine = (run.names, run.indices, run.skipped, run.records, run.pictures, run.seconds, run.labels)
    parts = gathered(mine)
    order = np.argsort([i for part in parts for i in part[1]], kind="stable")
    names = [name for part in parts for name in part[0]]
    records: dict[Hashable, dict[str, list[Array]]] = {}
    for key in {key: None for part in parts for key in part[3]}:
        for name in {name: None for part in parts for name in part[3].get(key, {})}:
            chunks = [chunk for part in parts for chunk in part[3].get(key, {}).get(name, [])]
            records.setdefault(key, {})[name] = [np.concatenate(chunks)[order]]
    return PassResult(
        folds=run.folds,
        names=[names[i] for i in order],
        skipped=sorted(s for part in parts for s in part[2]),
        records=records,
        pictures={name: shown for part in parts for name, shown in part[4].items()},
        labels={name: label for part in parts for name, label in part[6].items()},
        seconds=max(part[5] for part in parts),
    )


def result_of(metric: Metric, run: PassResult) -> MetricResult:
    """The metric's numbers off the run's sums, or why it has none."""
    reason = metric.inapplicable()
    if reason:
        return metric.refused(reason)
    return metric.read({n: run.folds[key] for n, (key, _) in metric.needs().items()}, records_of(metric, run))


def records_of(metric: Metric, run: PassResult) -> dict[str, dict[str, Array]]:
    """The per-image values of the folds that a metric needs."""
    keys = {name: key for name, (key, _) in metric.needs().items()}
    return {name: {k: _whole(v) for k, v in run.records.get(key, {}).items()} for name, key in keys.items()}


def _whole(chunks: list[Array]) -> Array:
    return chunks[0] if len(chunks) == 1 else np.concatenate(chunks)


def image_table(metrics: Mapping[str, Metric], run: PassResult) -> dict[str, Any]:
    """What images.npz holds: the names, the per-image values of every metric that has some, and the null that is theirs."""
    table: dict[str, Any] = {"names": np.array(run.names, dtype=np.str_)}
    for name, metric in metrics.items():
        records = {} if metric.inapplicable() or not run.names else records_of(metric, run)
        values = metric.per_image(records) if records else None
        if values is not None:
            table[name] = values
            nulls = [r["other_token"] for r in records.values() if "other_token" in r and values is r.get("real")]
            table |= {f"{name}/other_token": null for null in nulls}
    return table
