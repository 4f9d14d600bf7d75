"""The one loop: a subject, batches of images and metrics become findings."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from collapse_probe.analysis.gallery import gallery_of, spread_out, thumbnails
from collapse_probe.analysis.loop import FEWEST, Outputs, PassResult, Progress, Stopper, image_table, one_pass, reading_of
from collapse_probe.analysis.summary import bounds_of, summarise, summary_of, sureness
from collapse_probe.analysis.weights import apart, read_weights
from collapse_probe.capture.capture import discover_plan
from collapse_probe.capture.plan import Plan
from collapse_probe.capture.trace import budget_line, tile_bytes
from collapse_probe.data.images import Batch, ImageSet, batches, from_loader, open_data, seeded_order
from collapse_probe.devices import choose_device, device_name, peak_memory
from collapse_probe.distributed import rank_and_world
from collapse_probe.errors import DataError, ModelError, SettingError
from collapse_probe.metrics.metric import Metric, make
from collapse_probe.metrics.nulls import with_twins, with_untrained
from collapse_probe.metrics.presets import records as preset_records
from collapse_probe.metrics.presets import with_presets
from collapse_probe.models.loading import Subject, resolve
from collapse_probe.provenance import names_sha256, versions
from collapse_probe.results.findings import Findings, MetricResult
from collapse_probe.results.readings import against_seeds
from collapse_probe.results.verdict import with_verdict
from collapse_probe.statistics.estimates import per_image_values


def wanted(images: ImageSet | Iterable[Any], count: int, seed: int | None) -> frozenset[str]:
    """The names of `count` images for the gallery; with a seed, of those that a run which may stop early reads in any case."""
    if isinstance(images, ImageSet):
        order = range(len(images)) if seed is None else seeded_order(images, seed)[:FEWEST]
        return spread_out([images.names[i] for i in order], count)
    return frozenset(str(i) for i in range(count))


def model_facts(subject: Subject, plan: Plan) -> dict[str, Any]:
    """The section `model`: provenance, and the shape that the probe found."""
    heads = [plan.layers[i].heads for i in plan.map_layers]
    return {
        "address": subject.address,
        "source": subject.source,
        "name": subject.name,
        "weights": subject.weights,
        "checkpoint": subject.checkpoint,
        "checkpoint_sha256": subject.checkpoint_sha256,
        "class": f"{type(subject.model).__module__}.{type(subject.model).__qualname__}",
        "parameters": sum(p.numel() for p in subject.model.parameters()),
        "blocks": len(plan.blocks),
        "heads": heads[0] if len(set(heads)) == 1 else heads,
        "tokens": plan.tokens,
        "prefix_tokens": len(plan.prefix),
        "width": plan.width,
        "preprocess": subject.preprocess.description,
        "block_names": list(plan.blocks),
        "attention_layers": [plan.layers[i].owner for i in plan.map_layers],
        "mixes_maps": any(plan.layers[i].mixed for i in plan.map_layers),
    }


def data_facts(
    images: ImageSet | Iterable[Any] | None, names: Sequence[str], skipped: Sequence[tuple[str, str]]
) -> dict[str, Any]:
    """The section `data`; where no image was used, no address and 0 images."""
    return {
        "address": None if images is None else address_of(images),
        "images": len(names),
        "skipped": [{"name": name, "reason": reason} for name, reason in skipped],
        "names_sha256": None if images is None else names_sha256(names),
        "bundled": isinstance(images, ImageSet) and images.bundled,
    }


def address_of(images: ImageSet | Iterable[Any]) -> str:
    """Where images came from."""
    return images.address if isinstance(images, ImageSet) else f"an iterable ({type(images).__name__})"


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
PROBS_METRICS = (
    "attention-similarity@probs",
    "attention-similarity@row@probs",
    "attention-similarity@centred@probs",
    "similar-blocks@probs",
    "head-similarity@probs",
    "image-similarity@probs",
)
NULL_IMAGES = 64
GALLERY_IMAGES = 4

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

    @property
    def amp_as(self) -> str | None:
        """The dtype of automatic mixed precision, None where it is off."""
        return self.amp_dtype if self.amp else None

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise SettingError(f"the batch size must be 1 or more, not {self.batch_size}")
        if self.null_images < 0:
            raise SettingError(f"the number of null images must be 0 or more, not {self.null_images}")
        if self.null_seeds < 1:
            raise SettingError(f"the number of seeds of the untrained twin must be 1 or more, not {self.null_seeds}")
        if self.until_ci is not None and not self.until_ci > 0:
            raise SettingError(f"the half-width to stop at must be above 0, not {self.until_ci}")
        if self.amp_dtype not in ("float16", "bfloat16"):
            raise SettingError(f"the amp dtype must be float16 or bfloat16, not {self.amp_dtype!r}")


def analyze(
    model: str | nn.Module | Subject,
    data: str | ImageSet | Iterable[Any] | None = None,
    *,
    limit: int | None = None,
    split: str | None = None,
    settings: RunSettings | None = None,
    progress: Progress | None = None,
    report: Report | None = None,
    **options: Any,
) -> Findings:
    """Measure the collapse of one model over images: the main job.

    `model` is an address, a module or a Subject; `data` an address, an ImageSet or any iterable of image batches
    [B, 3, H, W], or None where all metrics are of the weights. `options` are fields of `Settings` (device, batch_size, metrics,
    …) and, for an address, those of `sources.resolve` (checkpoint, pretrained, img_size, …). Raises CollapseProbeError where
    the input cannot be analysed.
    """
    known = {name: options.pop(name) for name in list(options) if name in RunSettings.__dataclass_fields__}
    settings = replace(settings or RunSettings(), **known)
    images = open_data(data, split=split, limit=limit, seed=settings.seed) if isinstance(data, str) else data
    with as_it_was(model):
        subject = _subject(model, options, settings.seed)
        return measure(subject, images, settings, progress=progress, report=report)


@contextmanager
def as_it_was(model: object) -> Iterator[None]:
    """Give a caller's own module back in the modes and on the device in which it came."""
    if not isinstance(model, nn.Module):
        yield
        return
    training = {module: module.training for module in model.modules()}
    device = next((p.device for p in model.parameters()), None)
    try:
        yield
    finally:
        for module, flag in training.items():
            module.training = flag
        if device is not None:
            model.to(device)


def measure(
    subject: Subject,
    images: ImageSet | Iterable[Any] | None,
    settings: RunSettings,
    *,
    progress: Progress | None = None,
    report: Report | None = None,
    outputs: Outputs | None = None,
) -> Findings:
    """Probe the subject, run the images, then the untrained twin; see `analyze`. `outputs` hears the model's outputs."""
    say = report or (lambda text: None)
    device = choose_device(settings.device)
    model = subject.model.to(device)
    plan = discover_plan(model, subject.preprocess.size, seed=settings.seed)
    metrics = chosen_metrics(plan, with_presets(settings.metrics, settings.presets))
    of_weights, heard = apart(metrics)
    run, readings, notes, stopping = PassResult(folds={}), dict[str, MetricResult](), list[str](), None
    if heard:
        say(budget_line(plan, device))
        images = _needed(images, heard)
        stream, early = _stream(images, subject, settings, heard), None if settings.until_ci is None else settings.seed
        chosen = wanted(images, settings.gallery_images, early)
        stopper = None if settings.until_ci is None else Stopper(settings.until_ci, heard, _heads(plan))
        hearers: dict[str, Any] = {"progress": progress, "outputs": outputs, "stopper": stopper}
        run = one_pass(model, plan, heard, stream, device, amp=settings.amp_as, wanted=chosen, **hearers)
        if not run.names:
            raise DataError(f"no readable image in {address_of(images)}{_why(run.skipped)}")
        readings = {name: reading_of(metric, run) for name, metric in heard.items()}
        readings, notes = _against_twin(readings, subject, images, settings, device, say)
        stopping = stopper and stopper.facts(len(images) if isinstance(images, ImageSet) else None)
        notes += [stopping["sentence"]] if stopping else []
    elif images is not None:
        images, notes = None, ["the metrics asked for are of the weights alone: the images were not used"]
    seeds = settings.null_seeds if settings.null_images else 0
    weights = read_weights(subject, model, plan, of_weights, seed=settings.seed, device=device, seeds=seeds, say=say)
    readings = {name: {**readings, **weights.readings}[name] for name in metrics}
    _, world = rank_and_world()
    facts = {
        "device": device_name(device),
        "dtype": settings.amp_dtype if settings.amp else str(next(model.parameters()).dtype).removeprefix("torch."),
        "batch_size": settings.batch_size,
        "world_size": world,
        "seed": settings.seed,
        "seconds": round(run.seconds if heard else weights.seconds, 3),
        "images_per_second": round(len(run.names) / max(run.seconds, 1e-9), 2),
        "peak_memory_bytes": peak_memory(device),
        "command": settings.command,
        "versions": versions(),
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "self_check": {k: None if math.isnan(v) else v for k, v in vars(plan.check).items()},
        "tile_bytes": tile_bytes(plan, device),
        "until_ci": stopping,
        "notes": [*subject.notes, *plan.notes, *notes, *weights.notes],
    }
    table, summary = image_table(heard, run), summarise(readings, len(run.names)) | summary_of(weights.readings)
    sure = sureness(table, readings, heads=_heads(plan), images=images, labels=run.labels, seed=settings.seed)
    found = Findings(
        model=model_facts(subject, plan),
        data=data_facts(images, run.names, run.skipped),
        run=facts,
        metrics=readings,
        summary=summary | bounds_of(per_image_values(table, _heads(plan))),
        images=table,
        gallery=gallery_of(run.pictures, run.names, plan, subject.preprocess.description),
        presets=preset_records(settings.presets),
        thumbnails=thumbnails(sure["extremes"], images, subject.preprocess) if settings.gallery_images else {},
        sureness=sure,
    )
    return with_verdict(found)


def chosen_metrics(plan: Plan, names: Sequence[str]) -> dict[str, Metric]:
    """The metrics of a run by name: those asked for, or the default set (with @probs where the model mixes its maps)."""
    if not names:
        mixed = any(plan.layers[i].mixed for i in plan.map_layers)
        names = [*DEFAULT_METRICS, *(PROBS_METRICS if mixed else ())]
    return {name: make(name, plan) for name in dict.fromkeys(names)}


def _needed(images: ImageSet | Iterable[Any] | None, heard: Mapping[str, Metric]) -> ImageSet | Iterable[Any]:
    if images is None:
        raise DataError(f"{next(iter(heard))} needs images: give data, or ask for metrics of the weights alone")
    return images


def _subject(model: str | nn.Module | Subject, options: dict[str, Any], seed: int) -> Subject:
    if isinstance(model, Subject):
        return model
    return resolve(model, seed=seed, **options)


def _stream(
    images: ImageSet | Iterable[Any], subject: Subject, settings: RunSettings, metrics: Mapping[str, Metric]
) -> Iterator[Batch]:
    if not isinstance(images, ImageSet):
        return from_loader(images)
    rank, world = rank_and_world()
    drawn = settings.until_ci is not None or not all(metric.any_order for metric in metrics.values())
    order = seeded_order(images, settings.seed) if drawn else None
    facts: dict[str, Any] = {"batch_size": settings.batch_size, "workers": settings.workers, "rank": rank, "world": world}
    return batches(images, subject.preprocess, order=order, **facts)


def _against_twin(
    readings: dict[str, MetricResult],
    subject: Subject,
    images: ImageSet | Iterable[Any],
    settings: RunSettings,
    device: torch.device,
    say: Report,
) -> tuple[dict[str, MetricResult], list[str]]:
    """The readings beside those of the same architecture with fresh weights, on a seeded subset of the images."""
    twins: dict[int, dict[str, MetricResult]] = {}
    for seed in range(settings.seed + 1, settings.seed + 1 + settings.null_seeds):
        try:
            twin = _twin(subject, images, settings, seed).to(device)
        except ModelError as error:
            return {name: with_untrained(r, None, 0, str(error)) for name, r in readings.items()}, []
        assert isinstance(images, ImageSet)
        few = images.subset(settings.null_images, settings.seed)
        say(f"measuring the untrained twin on {len(few)} images")
        plan = discover_plan(twin, subject.preprocess.size, seed=settings.seed)
        metrics = chosen_metrics(plan, list(readings))
        run = one_pass(twin, plan, metrics, _stream(few, subject, settings, metrics), device, amp=settings.amp_as)
        twins[seed] = {name: reading_of(metric, run) for name, metric in metrics.items()}
    which = f"twin: fresh weights with seed {seed}" if len(twins) == 1 else f"twins: fresh weights with seeds {[*twins]}"
    found = {name: with_twins(r, {s: t[name] for s, t in twins.items()}, len(run.names)) for name, r in readings.items()}
    spans = [against_seeds(found["attention-similarity"])] if "attention-similarity" in found else []
    return found, [f"untrained {which} on {len(run.names)} images", *filter(None, spans)]


def _heads(plan: Plan) -> NDArray[np.float64]:
    return np.array([plan.layers[i].heads for i in plan.map_layers], dtype=np.float64)


def _twin(subject: Subject, images: ImageSet | Iterable[Any], settings: RunSettings, seed: int) -> nn.Module:
    """The untrained twin; raises ModelError with the reason where there is none."""
    if settings.null_images == 0:
        raise ModelError("no null images were asked for")
    if not isinstance(images, ImageSet):
        raise ModelError("the images came from an iterable that can be run through once")
    if subject.fresh is None:
        raise ModelError("the model came as an object, and its architecture cannot be made anew")
    return subject.fresh(seed)


def _why(skipped: Sequence[tuple[str, str]]) -> str:
    if not skipped:
        return ""
    name, reason = skipped[0]
    return f": all {len(skipped)} were skipped, the first ({name}) because {reason}"
