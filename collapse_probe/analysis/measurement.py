"""The one path on which a model is measured: a plan, metrics and batches of images become a tally, and this results."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from itertools import chain
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from collapse_probe.analysis.outputs import logits_in
from collapse_probe.analysis.state.ends import NOTHING, Ends
from collapse_probe.analysis.state.gallery import glimpse, thumbnail
from collapse_probe.analysis.state.memory import Room, alike
from collapse_probe.analysis.state.records import BY_CONTENT, NO_NUMBER, RECORDS, Lowest, Records, Table
from collapse_probe.analysis.state.tally import LOGITS, Tally, columns_of, image_table, result_of, table_of
from collapse_probe.capture.capture import discover_plan, record
from collapse_probe.capture.plan import Plan
from collapse_probe.capture.trace import TILE_BYTES, Trace, extra_bytes, micro_batch
from collapse_probe.capture.weights.recording import read_matrices
from collapse_probe.data.images import ImageSet
from collapse_probe.data.loading import Batch
from collapse_probe.data.preprocessing import ASSUMED, given_pixels, shown, sides_of
from collapse_probe.data.streams.stream import ImageStream
from collapse_probe.devices import (
    autocast,
    choose_device,
    default_amp_dtype,
    default_batch_size,
    default_workers,
    floating_like,
    keep_freed_memory,
    modes_kept,
    moved,
)
from collapse_probe.distributed import rank_and_world, shared
from collapse_probe.errors import DataError, NonFiniteError, SettingError, StateError
from collapse_probe.metrics.accumulators import Accumulator, vectors_of
from collapse_probe.metrics.metric import Metric, extras_of, make
from collapse_probe.metrics.nonfinite import all_ill, nonfinite_error, nonfinite_images
from collapse_probe.metrics.weight_metric import WeightMetric
from collapse_probe.models.loading import Subject
from collapse_probe.results.findings import MetricResult
from collapse_probe.statistics.breakdowns import PICTURED
from collapse_probe.statistics.estimates import per_image_values

DEFAULT_METRICS = (
    "attention-similarity",
    "attention-similarity@row",
    "attention-similarity@centred",
    "similar-blocks",
    "head-similarity",
    "image-similarity",
    "attention-entropy",
    "feature-similarity",
    "patch-diversity",
)
PROBS_METRICS = tuple(f"{name}@probs" for name in DEFAULT_METRICS[:6])
NULL_IMAGES = 64
GALLERY_IMAGES = 4

TWIN_BYTES = 256 * 2**20
"""Bytes that the images for untrained copies may take."""
FEWEST_TWIN = 16
ON_NONFINITE = FAIL, SKIP = "fail", "skip"
"""What to do where activations are not finite: stop with an error, or leave these images out of everything and name them."""

Images = ImageSet | ImageStream | Iterable[Any]
Report = Callable[[str], None]
Progress = Callable[[int, int], None]
"""Takes how many images were measured, and how many could not be used."""


@dataclass(frozen=True)
class RunSettings:
    """How a run is made; none of it changes what the numbers mean, and all of it is stored.

    What is None of `amp_dtype`, `batch_size` and `workers` follows from the machine, the model and the images: see `settled`.
    """

    device: str = "auto"
    amp: bool = False
    amp_dtype: str | None = None
    batch_size: int | None = None
    workers: int | None = None
    seed: int = 0
    metrics: tuple[str, ...] = ()
    presets: tuple[str, ...] = ()
    null_images: int = NULL_IMAGES
    null_seeds: int = 1
    until_ci: float | None = None
    gallery_images: int = GALLERY_IMAGES
    command: str = ""
    on_nonfinite: str = FAIL
    records: int = RECORDS

    @property
    def amp_as(self) -> str | None:
        """The dtype of automatic mixed precision, None where it is off."""
        return (self.amp_dtype or default_amp_dtype(choose_device(self.device))) if self.amp else None

    @property
    def batch(self) -> int:
        """Images in a batch, of settings that are settled."""
        assert self.batch_size is not None, "the settings are not settled"
        return self.batch_size

    @property
    def readers(self) -> int:
        """Processes that read images, of settings that are settled."""
        assert self.workers is not None, "the settings are not settled"
        return self.workers

    def __post_init__(self) -> None:
        for name, value, low in (
            ("the batch size", self.batch_size, 1),
            ("the number of null images", self.null_images, 0),
            ("the number of seeds of the untrained copy", self.null_seeds, 1),
            ("the number of images of which records are kept", self.records, 1),
        ):
            if value is not None and value < low:
                raise SettingError(f"{name} must be {low} or more, not {value}")
        if self.on_nonfinite not in ON_NONFINITE:
            raise SettingError(f"on_nonfinite must be {' or '.join(ON_NONFINITE)}, not {self.on_nonfinite!r}")
        if self.until_ci is not None and not self.until_ci > 0:
            raise SettingError(f"the half-width to stop at must be above 0, not {self.until_ci}")
        if self.amp_dtype not in (None, "float16", "bfloat16"):
            raise SettingError(f"the amp dtype must be float16 or bfloat16, not {self.amp_dtype!r}")


def settled(settings: RunSettings, size: tuple[int, int], images: Images | None = None) -> RunSettings:
    """The settings with a batch size and a number of reading processes, for images of `size` (height, width)."""
    device = choose_device(settings.device)
    batch_size = settings.batch_size or default_batch_size(device, size)
    workers = settings.workers
    if workers is None:
        known = isinstance(images, (ImageSet, ImageStream))
        workers = default_workers(device, batch_size, images.count, images.from_memory) if known else 0  # type: ignore[union-attr]
    return replace(settings, batch_size=batch_size, workers=workers)


def make_metrics(plan: Plan, names: Sequence[str]) -> dict[str, Metric]:
    """The metrics of a run by name: those asked for, or the default set (with @probs where the model mixes its maps)."""
    if not names:
        mixed = any(plan.layers[i].mixed for i in plan.map_layers)
        names = [*DEFAULT_METRICS, *(PROBS_METRICS if mixed else ())]
    return {name: make(name, plan) for name in dict.fromkeys(names)}


def need_images(metrics: Mapping[str, Metric]) -> list[str]:
    """The names of the metrics that are not of the weights alone."""
    return [name for name, metric in metrics.items() if not isinstance(metric, WeightMetric)]


@dataclass(frozen=True)
class Ill:
    """Images that are not finite, by their place in a batch, each with the place where that is first seen."""

    places: Mapping[int, str]


class Measurement:
    """One model's measurement: its plan, its metrics by name, and the `tally` of the images that were run through it so far.

    `left_out` are images, by name, that are counted as not finite without being run, each with the place; `keep_logits` keeps
    the model's outputs of the images whose records are kept.
    """

    def __init__(
        self,
        subject: Subject,
        plan: Plan,
        metrics: Mapping[str, Metric],
        settings: RunSettings,
        *,
        left_out: Mapping[str, str] | None = None,
        keep_logits: bool = False,
    ) -> None:
        self.subject, self.plan, self.metrics, self.settings = subject, plan, metrics, settings
        self.left_out, self.keep_logits = left_out or {}, keep_logits
        self.device = choose_device(settings.device)
        keep_freed_memory(self.device)
        self.notes: tuple[str, ...] = ()
        self.inconsistent = False
        self.tally = new_tally(subject, plan, metrics, settings, self.device)
        self.heads = np.array([plan.layers[i].heads for i in plan.map_layers], dtype=np.float64)
        self._of_weights: dict[str, MetricResult] | None = None
        self._extras = extras_of(metrics)
        images = micro_batch(plan, self.device, more=extra_bytes(plan, **self._extras))
        self.room = Room(self.device, TILE_BYTES[self.device.type], images)
        self._like = torch.empty(0, dtype=floating_like(subject.model).dtype, device=self.device)

    def update(self, batch: Batch) -> dict[str, Any]:
        """Run a batch of images through the model, and take them into the tally; returns their rows of images.npz.

        Raises NonFiniteError where activations are not finite and this is not to happen; what was taken until then counts.
        """
        start, newest = time.perf_counter(), list[tuple[Sequence[str], dict[str, NDArray[Any]]]]()
        model = moved(self.subject.model, self.device)
        self._give_matrices(model)
        ill = [i for i, name in enumerate(batch.names) if name in self.left_out]
        self._leave_out(batch, {i: self.left_out[batch.names[i]] for i in ill})
        pending = self._steps([i for i in range(len(batch.names)) if i not in ill])
        with torch.no_grad():
            while pending:
                rows = pending.pop(0)
                taken = self._take(model, batch, rows)
                if taken is None:  # memory ran out, and nothing was added
                    said = self.room.fewer_images(len(rows))
                    self.tally.remarks[said] += len(rows)
                    pending = self._steps([row for some in (rows, *pending) for row in some])
                elif isinstance(taken, Ill):
                    if self.settings.on_nonfinite == FAIL:
                        seen = self.tally.images + len(rows)
                        ill_images = [(batch.names[rows[i]], place) for i, place in taken.places.items()]
                        raise NonFiniteError(nonfinite_error(ill_images, seen, self.settings.amp_as))
                    self._leave_out(batch, {rows[i]: place for i, place in taken.places.items()})
                    if rest := [row for i, row in enumerate(rows) if i not in taken.places]:
                        pending.insert(0, rest)  # once more without them
                else:
                    newest.append(([batch.names[i] for i in rows], taken))
        tally = self.tally
        tally.skipped += batch.skipped
        tally.remarks += batch.remarks
        tally.coverage.add(batch.read)
        tally.seconds += time.perf_counter() - start
        names = [name for some, _ in newest for name in some]
        columns = {key: np.concatenate([part[key] for _, part in newest]) for key in (newest[0][1] if newest else ())}
        return image_table(self.metrics, tally.accumulators, names, columns)

    def _give_matrices(self, model: nn.Module) -> None:
        """Let metrics of images that need the weights have them, before the first images."""
        asking = [m for m in self.metrics.values() if "matrices" in m.needs and m.matrices is None]
        matrices = read_matrices(model, self.plan, self.settings.seed) if asking else None
        for metric in asking:
            metric.matrices = matrices

    def _steps(self, rows: Sequence[int]) -> list[Sequence[int]]:
        """Rows by what goes through the model at a time: split evenly, in multiples of `alike` where memory allows."""
        most, unit = self.room.images, self._unit
        most -= most % unit
        even = -(-len(rows) // max(-(-len(rows) // most), 1))
        step = max(-(-even // unit) * unit, 1)
        return [rows[first : first + step] for first in range(0, len(rows), step)]

    @property
    def _unit(self) -> int:
        return min(alike(self.plan, self.device), self.room.images)

    def _take(self, model: nn.Module, batch: Batch, rows: Sequence[int]) -> dict[str, NDArray[Any]] | Ill | None:
        """Run some images and add them: their per-image columns. Ill or, where memory ran out, None: nothing was added then."""
        together = rows[-1] - rows[0] + 1 == len(rows)  # then no copy is made, which for a GPU would not be pinned
        with self.room.enough() as enough:
            pixels = batch.pixels[rows[0] : rows[-1] + 1] if together else batch.pixels[rows]
            trace = self._traced(model, pixels)
            if places := nonfinite_images(trace, pixels):
                return Ill(places)
        return self._absorb(trace, batch, rows, pixels) if enough else None

    def _traced(self, model: nn.Module, pixels: Tensor) -> Trace:
        """The trace of some images, which come with copies of the last to make a multiple of `alike`."""
        count, unit = len(pixels), self._unit
        if missing := -count % unit:
            pixels = torch.cat([pixels, pixels[-1:].expand(missing, *pixels.shape[1:])])
        with record(model, self.plan, **self._extras) as recordings, autocast(self.device, self.settings.amp_as):
            model(model_input(pixels, self.plan, self._like))
        return recordings.take().first(count)

    def _leave_out(self, batch: Batch, places: Mapping[int, str]) -> None:
        self.tally.nonfinite += [(batch.names[i], place) for i, place in places.items()]
        if batch.numbers:
            self.tally.coverage.add([batch.numbers[i] for i in places])

    def _absorb(self, trace: Trace, batch: Batch, rows: Sequence[int], pixels: Tensor) -> dict[str, NDArray[Any]] | None:
        """Add one trace to everything that is kept; returns the per-image columns, or None where memory ran out before that."""
        tally, names, before = self.tally, [batch.names[i] for i in rows], None
        self.inconsistent = True
        while True:
            with self.room.enough() as enough:
                before = self.room.copied(tally.accumulators.values())
                columns = self._added(trace, names)
                self._keep_glimpses(trace, names, pixels)
            if enough:
                break
            if before is not None:
                self.room.restore(tally.accumulators.values(), before)
                before = None
            if (said := self.room.smaller_tiles()) is None:
                self.inconsistent = False
                return None
            tally.remarks[said] += len(rows)
        places = [batch.indices[i] for i in rows] if batch.indices else []
        labels = [] if batch.labels is None else batch.labels[list(rows)].tolist()
        tally.records.add(names, columns, places, labels)
        self._keep_ends(names, places or [NO_NUMBER] * len(names), pixels, columns)
        tally.coverage.add([batch.numbers[i] for i in rows] if batch.numbers else ())
        self.inconsistent = False
        return columns

    def _added(self, trace: Trace, names: Sequence[str]) -> dict[str, NDArray[Any]]:
        """Add one trace to the sums; returns the per-image columns."""
        tally = self.tally
        for accumulator in tally.accumulators.values():
            accumulator.start_batch(trace, names)
        of_tiles = sorted((each for each in tally.accumulators.values() if each.takes_tiles), key=vectors_of)
        for tile in trace.tiles(self.room.tile) if of_tiles else ():
            for accumulator in of_tiles:
                accumulator.take(tile)
        values = {key: accumulator.end_batch(trace) for key, accumulator in tally.accumulators.items()}
        columns: dict[str, NDArray[Any]] = {**columns_of(tally.accumulators, values)}
        if self.keep_logits:
            logits = logits_in(trace.output, len(names))
            if isinstance(logits, str):
                tally.no_logits = f"the model's output is no vector of logits (it is {logits})"
            else:
                columns[LOGITS] = logits.detach().to("cpu", torch.float32).numpy()
        return columns

    def _keep_glimpses(self, trace: Trace, names: Sequence[str], pixels: Tensor) -> None:
        """Keep what the gallery and untrained copies need of the images; of an image that comes again, once."""
        tally = self.tally
        rolled = any(isinstance(key, tuple) and key[0] == "rollout" for key in tally.accumulators)
        for i, name in enumerate(names):
            tally.twin_pixels.add(name, lambda i=i: (pixels[i].detach().cpu().float().clone(),))  # type: ignore[misc]
            tally.glimpses.add(name, lambda i=i: glimpse(trace, i, pixels[i], rolled))  # type: ignore[misc]

    def _keep_ends(
        self, names: Sequence[str], places: Sequence[int], pixels: Tensor, columns: Mapping[str, NDArray[Any]]
    ) -> None:
        @cache
        def small(i: int) -> NDArray[np.uint8]:
            return thumbnail(pixels[i], self.subject.preprocess.description)

        tally = self.tally
        if self.settings.gallery_images:
            values = per_image_values(image_table(self.metrics, tally.accumulators, names, columns), self.heads)
            for number, each in values.each().items():
                picture = small if number in PICTURED else lambda i: NOTHING
                tally.ends.setdefault(number, Ends()).add(each, places, names, picture)

    def loaded(self, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> Tally:
        """The tally that `Tally.state` and `Tally.facts` of a measurement of the same kind gave. Raises StateError."""
        tally = new_tally(self.subject, self.plan, self.metrics, self.settings, self.device)
        tally.load(tensors, facts)
        return tally

    def merge(self, part: Tally) -> None:
        """Add a tally of other images."""
        self.inconsistent = True
        self.tally.merge(part)
        self.inconsistent = False

    def all_reduce(self) -> None:
        """Bring the tallies of all processes together, the same in all of them; every process calls it."""
        rank, world = rank_and_world()
        if world == 1:
            return
        own, whole = self.tally, new_tally(self.subject, self.plan, self.metrics, self.settings, self.device)
        slowest = 0.0
        for source in range(world):
            tensors, facts = shared((own.state(), own.facts()) if source == rank else None, source)
            part = self.loaded(tensors, facts)
            slowest = max(slowest, part.seconds)
            if twice := whole.overlap(part, BY_CONTENT):
                raise StateError(f"process {source} has seen an image that another process has seen too: {twice}")
            whole.merge(part)
        whole.seconds = slowest
        self.tally = whole

    def table(self) -> Table:
        """The images whose records are kept, in their order."""
        return self.tally.records.table()

    def results(self, table: Table) -> dict[str, MetricResult]:
        """Every metric's numbers, from the sums and from the records in `table`."""
        weights = self.of_weights()
        return {
            name: weights[name] if name in weights else result_of(metric, self.tally, table.columns)
            for name, metric in self.metrics.items()
        }

    def per_image(self, table: Table) -> dict[str, Any]:
        """What images.npz holds."""
        return table_of(self.metrics, self.tally, table)

    def use_weights(self, results: Mapping[str, MetricResult]) -> None:
        """Take the numbers of the metrics of the weights as they were measured before."""
        self._of_weights = dict(results)

    def of_weights(self) -> dict[str, MetricResult]:
        """The numbers of the metrics of the weights, which no image changes."""
        if self._of_weights is None:
            own = {name: metric for name, metric in self.metrics.items() if isinstance(metric, WeightMetric)}
            if own:
                model = moved(self.subject.model, self.device)
                matrices = read_matrices(model, self.plan, self.settings.seed)
                self.notes = tuple(dict.fromkeys(matrices.reasons()))
                for metric in own.values():
                    metric.matrices = matrices
            self._of_weights = {name: result_of(metric, self.tally, {}) for name, metric in own.items()}
        return self._of_weights

    def check_some(self) -> None:
        """Raise DataError or NonFiniteError where metrics need images and none was measured."""
        tally = self.tally
        if tally.images or not tally.accumulators:  # no metric that was asked for looks at images here
            return
        if tally.nonfinite:
            raise NonFiniteError(f"no image is left to measure: {all_ill(tally.nonfinite)}")
        first = f": {len(tally.skipped)} were skipped, the first ({': '.join(tally.skipped[0])})" if tally.skipped else ""
        raise DataError(f"no image could be read{first}")


def new_tally(
    subject: Subject, plan: Plan, metrics: Mapping[str, Metric], settings: RunSettings, device: torch.device
) -> Tally:
    """An empty tally for these metrics of a model."""
    pixels = 4 * int(np.prod(plan.input_shape)) if plan.input_shape else 1
    most = min(settings.null_images, max(FEWEST_TWIN, TWIN_BYTES // pixels)) if subject.fresh is not None else 0
    return Tally(
        accumulators_for(metrics, device),
        Records(settings.records, settings.seed),
        Lowest(most, settings.seed),
        Lowest(settings.gallery_images, settings.seed),
    )


def accumulators_for(metrics: Mapping[str, Metric], device: torch.device) -> dict[Hashable, Accumulator]:
    """The accumulators that the metrics need, each once, by key."""
    needs = [need for metric in metrics.values() if not metric.inapplicable() for need in metric.accumulators()]
    place = device if device.type != "mps" else "cpu"
    return {key: build().to(place) for key, build in dict(needs).items()}


def model_input(pixels: Tensor, plan: Plan, like: Tensor) -> Tensor:
    """The pixels on the device and in the dtype of `like`; DataError for images of another shape than the probe's."""
    if plan.input_shape and tuple(pixels.shape[1:]) != plan.input_shape:
        came, expected = (" × ".join(map(str, shape)) for shape in (pixels.shape[1:], plan.input_shape))
        raise DataError(
            f"the model was probed with images of {expected} (channels × height × width), and this batch has {came}: "
            "all images must have one size"
        )
    return pixels.to(like.device, like.dtype, non_blocking=True)


@contextmanager
def restored(model: object) -> Iterator[None]:
    """Leave a module, or that of a Subject, in the modes and on the device in which it came; anything else is nothing to do."""
    module = model.model if isinstance(model, Subject) else model
    if not isinstance(module, nn.Module):
        yield
        return
    device = next((t.device for t in chain(module.parameters(), module.buffers())), None)
    try:
        with modes_kept(module):
            yield
    finally:
        if device is not None and device.type != "meta":
            moved(module, device)


def with_input(subject: Subject, images: Images | None) -> Subject:
    """The subject as it takes these images: those that came as tensors are made ready already.

    Raises SettingError where another img_size was asked for than they have.
    """
    return with_shape(subject, getattr(images, "shape", None))


def with_shape(subject: Subject, shape: tuple[int, int, int] | None) -> Subject:
    """The subject for images [channels, height, width] made ready; None: for pictures, as it is. See `with_input`."""
    if shape is not None:
        channels, height, width = shape
        notes = tuple(note for note in subject.notes if not note.startswith(ASSUMED))
        subject = replace(subject, preprocess=given_pixels(channels, (height, width)), notes=notes)
    size = subject.preprocess.size
    if subject.img_size is not None and sides_of(subject.img_size) != size:
        whose = "the images given are" if shape is not None else "the model's own preprocessing gives"
        raise SettingError(
            f"img_size is {shown(sides_of(subject.img_size))}, but {whose} {shown(size)} (height × width): "
            "leave img_size out, or give images of that size"
        )
    return subject


def plan_of(subject: Subject, device: str, seed: int) -> Plan:
    """Move the subject's model to the device, in eval mode, and probe it with noise of the size and channels of its images."""
    model = moved(subject.model, choose_device(device)).eval()
    made = subject.preprocess
    return discover_plan(model, made.size, made.channels, seed, blocks=subject.blocks_pattern)
