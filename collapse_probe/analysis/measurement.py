"""The one path on which a model is measured: a plan, metrics and images become results."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from collapse_probe.analysis.loop import FAIL, ON_NONFINITE, PassOptions, PassResult, all_ill, one_pass, result_of
from collapse_probe.capture.capture import discover_plan, noise
from collapse_probe.capture.plan import Plan
from collapse_probe.capture.weights.matrices import NAMES, Matrices
from collapse_probe.capture.weights.recording import record_matrices
from collapse_probe.data.images import ImageSet, OwnImages, batches_of, in_random_order
from collapse_probe.data.preprocessing import ASSUMED, given_pixels, shown, sides_of
from collapse_probe.data.streams.stream import ImageStream
from collapse_probe.devices import choose_device, moved
from collapse_probe.distributed import unwrap
from collapse_probe.errors import DataError, NonFiniteError, SettingError
from collapse_probe.metrics.metric import Metric, make
from collapse_probe.metrics.weight_metric import WeightMetric
from collapse_probe.models.loading import Subject
from collapse_probe.results.findings import MetricResult

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

Images = ImageSet | ImageStream | Iterable[Any]
Report = Callable[[str], None]


@dataclass(frozen=True)
class RunSettings:
    """How a run is made; none of it changes what the numbers mean, and all of it is stored."""

    device: str = "auto"
    amp: bool = False
    amp_dtype: str = "float16"
    batch_size: int = 64
    workers: int = 0
    seed: int = 0
    metrics: tuple[str, ...] = ()
    presets: tuple[str, ...] = ()
    null_images: int = NULL_IMAGES
    null_seeds: int = 1
    until_ci: float | None = None
    gallery_images: int = GALLERY_IMAGES
    command: str = ""
    on_nonfinite: str = FAIL

    @property
    def amp_as(self) -> str | None:
        """The dtype of automatic mixed precision, None where it is off."""
        return self.amp_dtype if self.amp else None

    def __post_init__(self) -> None:
        for name, value, low in (
            ("the batch size", self.batch_size, 1),
            ("the number of null images", self.null_images, 0),
            ("the number of seeds of the untrained twin", self.null_seeds, 1),
        ):
            if value < low:
                raise SettingError(f"{name} must be {low} or more, not {value}")
        if self.on_nonfinite not in ON_NONFINITE:
            raise SettingError(f"on_nonfinite must be {' or '.join(ON_NONFINITE)}, not {self.on_nonfinite!r}")
        if self.until_ci is not None and not self.until_ci > 0:
            raise SettingError(f"the half-width to stop at must be above 0, not {self.until_ci}")
        if self.amp_dtype not in ("float16", "bfloat16"):
            raise SettingError(f"the amp dtype must be float16 or bfloat16, not {self.amp_dtype!r}")


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
class Measurement:
    """Results by metric name, what the pass over the images gathered, and notes for the run."""

    results: dict[str, MetricResult]
    images: PassResult
    seconds: float
    notes: tuple[str, ...] = ()


def measure_model(
    subject: Subject,
    plan: Plan,
    metrics: Mapping[str, Metric],
    images: Images | None,
    settings: RunSettings,
    options: PassOptions | None = None,
) -> Measurement:
    """Every metric of one model, from its weights and from one pass over the images (None where no metric needs any).

    An ImageSet is read in a random order that follows from the seed where the run may stop early or a metric asks for it.
    Raises DataError where no image can be read.
    """
    device, start, run = choose_device(settings.device), time.perf_counter(), PassResult()
    model, notes = moved(subject.model, device), tuple[str, ...]()
    if need_images(metrics):
        assert images is not None
        drawn = settings.until_ci is not None or not all(metric.any_order for metric in metrics.values())
        source, order = in_random_order(images, settings.seed) if drawn else (images, None)
        batches = batches_of(source, subject.preprocess, settings.batch_size, settings.workers, order)
        options = replace(options or PassOptions(), on_nonfinite=settings.on_nonfinite)
        run = one_pass(model, plan, metrics, batches, device, settings.amp_as, options)
        if not run.names and run.nonfinite:
            raise NonFiniteError(f"no image is left to measure: {all_ill(run.nonfinite)}")
        if not run.names:
            why = f": {len(run.skipped)} were skipped, the first ({': '.join(run.skipped[0])})" if run.skipped else ""
            raise DataError(f"no image could be read{why}")
    of_weights = [metric for metric in metrics.values() if isinstance(metric, WeightMetric)]
    if of_weights:
        matrices = read_matrices(model, plan, settings.seed)
        notes = tuple(dict.fromkeys(matrices.reasons()))
        for metric in of_weights:
            metric.matrices = matrices
    results = {name: result_of(metric, run) for name, metric in metrics.items()}
    return Measurement(results, run, run.seconds or time.perf_counter() - start, notes)


def with_input(subject: Subject, images: ImageSet | ImageStream | OwnImages | None) -> Subject:
    """The subject as it takes these images: those that came as tensors are made ready already.

    Raises SettingError where another img_size was asked for than they have.
    """
    shape = None if images is None else images.shape
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


def read_matrices(model: nn.Module, plan: Plan, seed: int = 0) -> Matrices:
    """The weight matrices of every block of `plan`, recorded in one forward pass of noise; no data are needed."""
    if plan.image_size is None:
        reason = "the probe saw no image, so that no pass could be made to record the products of the blocks"
        missing = tuple(dict.fromkeys(NAMES, reason) for _ in plan.blocks)
        return Matrices(plan.blocks, tuple({} for _ in plan.blocks), missing)
    model = unwrap(model)
    return record_matrices(model, noise(model, plan.image_size, plan.input_shape[0], seed), plan.blocks)
