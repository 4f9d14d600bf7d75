"""The verb analyze: a model, images and metrics become findings."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from collapse_probe.analysis.gallery import gallery_of, spread_out, thumbnails
from collapse_probe.analysis.loop import FAIL, FEWEST, Outputs, PassOptions, Progress, Stopper, image_table
from collapse_probe.analysis.measurement import (
    GALLERY_IMAGES,
    NULL_IMAGES,
    Images,
    Measurement,
    Report,
    RunSettings,
    make_metrics,
    measure_model,
    need_images,
    plan_of,
    with_input,
)
from collapse_probe.analysis.summary import summarise, sureness
from collapse_probe.analysis.untrained_twins import with_untrained
from collapse_probe.capture.plan import Plan
from collapse_probe.capture.trace import budget_line, tile_bytes
from collapse_probe.data.images import ImageSet, OwnImages, images_from, seeded_order
from collapse_probe.data.preprocessing import Size
from collapse_probe.data.readers import LeftOut
from collapse_probe.data.splits import split_data, whole_picture
from collapse_probe.data.streams.stream import ImageStream
from collapse_probe.devices import choose_device, device_name, floating_like, modes_kept, moved, peak_memory
from collapse_probe.distributed import rank_and_world
from collapse_probe.errors import DataError, NonFiniteError
from collapse_probe.metrics.coverage import omissions, places_of_blocks, uncompared
from collapse_probe.metrics.metric import Metric
from collapse_probe.metrics.nonfinite import nonfinite_weights, some
from collapse_probe.metrics.presets import records, with_presets
from collapse_probe.models.checkpoints import holds_any
from collapse_probe.models.loading import Subject, library_module, resolve
from collapse_probe.provenance import names_sha256, stamp
from collapse_probe.results.findings import Findings, MetricResult
from collapse_probe.results.readings import trained_on
from collapse_probe.results.verdict import with_verdict
from collapse_probe.statistics.estimates import per_image_values

NOT_FINITE = "its activations are not finite"


def analyze(
    model: str | nn.Module | Subject,
    data: str | Path | Images | None = None,
    *,
    metrics: Sequence[str] = (),
    presets: Sequence[str] = (),
    split: str | None = None,
    limit: int | None = None,
    max_pixels: int | None = None,
    checkpoint: str | Path | None = None,
    checkpoint_key: str | None = None,
    partial: bool = False,
    pretrained: bool | None = None,
    model_kwargs: Mapping[str, Any] | None = None,
    img_size: Size | None = None,
    blocks_pattern: str | None = None,
    batch_size: int = 64,
    workers: int = 0,
    device: str = "auto",
    amp: bool = False,
    amp_dtype: str = "float16",
    seed: int = 0,
    null_images: int = NULL_IMAGES,
    null_seeds: int = 1,
    until_ci: float | None = None,
    gallery_images: int = GALLERY_IMAGES,
    on_nonfinite: str = FAIL,
    command: str = "",
    progress: Progress | None = None,
    report: Report | None = None,
) -> Findings:
    """Measure the collapse of one model over images: the main job.

    `model` is an address, a module or a Subject; `data` an address, an ImageSet, one tensor [n, channels, H, W], a data set of
    (image, label) or any iterable of image batches [B, channels, H, W] of one size, whose first batch the probe follows, or
    None where all metrics are of the weights. `metrics` and `presets` are names, by default a fixed set. `split`, `limit` and
    `max_pixels` are for a data address, see `open_data`; `checkpoint`,
    `checkpoint_key`, `partial`, `pretrained`, `model_kwargs`, `img_size` and `blocks_pattern` for a model that is no Subject,
    see `resolve`. `null_images` is the number of images that each of `null_seeds` untrained twins sees (0 leaves them out);
    `until_ci` the half-width at which every headline mean's interval is narrow enough to stop. NaN or infinite weights or
    activations raise NonFiniteError; with `on_nonfinite` "skip" the weights are named, and images whose activations are not
    finite are left out of everything, counted and named. `progress(done, skipped)` is called after each batch, `report(line)`
    before each longer step; `command` is stored. Raises CollapseProbeError where the input cannot be analysed.
    """
    settings = RunSettings(
        device=device,
        amp=amp,
        amp_dtype=amp_dtype,
        batch_size=batch_size,
        workers=workers,
        seed=seed,
        metrics=tuple(metrics),
        presets=tuple(presets),
        null_images=null_images,
        null_seeds=null_seeds,
        until_ci=until_ci,
        gallery_images=gallery_images,
        on_nonfinite=on_nonfinite,
        command=command,
    )
    images = None
    if data is not None:
        images = images_from(data, split=split, limit=limit, seed=seed, max_pixels=max_pixels)
        for note in images.notes:
            (report or (lambda text: None))(note)
    with restored(model):
        subject = (
            model
            if isinstance(model, Subject)
            else resolve(
                model,
                checkpoint=checkpoint,
                checkpoint_key=checkpoint_key,
                partial=partial,
                pretrained=pretrained,
                model_kwargs=model_kwargs,
                img_size=img_size,
                blocks_pattern=blocks_pattern,
                seed=seed,
            )
        )
        return measure(subject, images, settings, progress=progress, report=report)


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


def measure(
    subject: Subject,
    images: Images | None,
    settings: RunSettings,
    *,
    progress: Progress | None = None,
    report: Report | None = None,
    outputs: Outputs | None = None,
    left_out: Mapping[str, str] | None = None,
) -> Findings:
    """Measure the subject and its untrained twins; see `analyze`. `outputs` takes what the model returns for each batch;
    `left_out` are images, by name, that are counted as not finite without being run, each with the place.
    """
    say, device = report or (lambda text: None), choose_device(settings.device)
    images = None if images is None else images_from(images)
    subject = with_input(subject, images)
    ill_weights = _checked_weights(subject, settings)
    plan = plan_of(subject, settings.device, settings.seed)
    metrics = make_metrics(plan, with_presets(settings.metrics, settings.presets))
    images, notes = _images_needed(images, metrics)
    heads = np.array([plan.layers[i].heads for i in plan.map_layers], dtype=np.float64)
    stopper = None if settings.until_ci is None or images is None else Stopper(settings.until_ci, metrics, heads)
    say(f"reading the weights of {len(plan.blocks)} blocks" if images is None else budget_line(plan, device))
    options = PassOptions(gallery_names(images, settings), progress, outputs, stopper, left_out=left_out or {})
    measured = measure_model(subject, plan, metrics, images, settings, options)
    seen = measured.images
    stopping = None if stopper is None else stopper.facts(len(images) if isinstance(images, ImageSet) else None)
    images = without(images, dict(seen.nonfinite))
    results, twin_notes = with_untrained(measured.results, subject, metrics, images, settings, say)
    nonfinite = nonfinite_facts(ill_weights, seen.nonfinite, len(seen.names))
    not_measured = places_of_blocks(plan) + [f"left out: {each.where}: {each.why}" for each in omissions(plan)]
    stopped = [] if stopping is None else [stopping["sentence"]]
    ill = [] if nonfinite is None else [nonfinite["sentence"]]
    data = data_facts(subject, images, seen.names, [*seen.skipped, *((n, f"{NOT_FINITE}: {why}") for n, why in seen.nonfinite)])
    known = [text] if (text := trained_on(data)) else []
    said = [*subject.notes, *data_notes(images, seen.remarks), *plan.notes, *not_measured, *measured.notes]
    notes = [*ill, *known, *said, *left_out_vectors(measured.results), *notes, *twin_notes, *stopped]
    table = image_table(metrics, seen)
    values = per_image_values(table, heads)
    class_names = images.class_names if isinstance(images, (ImageSet, ImageStream)) else ()
    sure = sureness(values, results, seen.labels, class_names, settings.seed)
    findings = Findings(
        model=model_facts(subject, plan),
        data=data,
        run={
            **run_facts(subject.model, plan, settings, measured),
            "until_ci": stopping,
            "nonfinite": nonfinite,
            "notes": notes,
        },
        metrics=results,
        summary=summarise(results, values),
        images=table,
        gallery=gallery_of(seen.pictures, seen.names, plan, subject.preprocess.description),
        presets=records(settings.presets),
        thumbnails=thumbnails(sure["extremes"], images, subject.preprocess) if settings.gallery_images else {},
        sureness=sure,
    )
    return with_verdict(findings)


def _checked_weights(subject: Subject, settings: RunSettings) -> list[str]:
    """The weights that are not finite, where the run is to go on with them; else NonFiniteError, with where they are felt."""
    ill = nonfinite_weights(subject.model)
    if not ill or settings.on_nonfinite != FAIL:
        return ill
    what = f"{_tensors(ill)} NaN or infinite numbers: {some(ill)}"
    try:
        plan_of(subject, settings.device, settings.seed)
    except NonFiniteError as error:
        where = f"; noise images show it {error.place}; give other weights"
        raise NonFiniteError(f"{what}{where}", error.place) from None
    raise NonFiniteError(
        f"{what}; noise images do not show it; give other weights, or go on (--on-nonfinite skip, on_nonfinite='skip')"
    )


def without(images: Images | None, names: Collection[str]) -> Images | None:
    """An ImageSet without some images, so that twins and others see none that the numbers are not of; else as it came."""
    if not names or not isinstance(images, ImageSet):
        return images
    return images.only([i for i, name in enumerate(images.names) if name not in names])


def nonfinite_facts(weights: Sequence[str], images: Sequence[tuple[str, str]], finite: int) -> dict[str, Any] | None:
    """What the findings say of weights and images that are not finite; None where all are."""
    if not weights and not images:
        return None
    total = len(images) + finite
    said = [f"{_tensors(weights)} NaN or infinite numbers ({some(weights)})"] if weights else []
    if images:
        places = [f"{count} × {place}" for place, count in Counter(place for _, place in images).most_common()]
        verb = "is" if len(images) == 1 else "are"
        why = f"activations that are not finite ({some(places)})"
        said.append(f"{len(images)} of {total} images {verb} left out of every number, because of {why}")
    return {"weights": [*weights], "images": len(images), "of": total, "sentence": f"{'; '.join(said)}."}


def _tensors(names: Sequence[str]) -> str:
    return "1 of the model's tensors holds" if len(names) == 1 else f"{len(names)} of the model's tensors hold"


def left_out_vectors(results: Mapping[str, MetricResult]) -> list[str]:
    """A note for each similarity of maps from which rows or columns without a direction are left out."""
    notes = []
    for name, result in results.items():
        share = np.asarray(result.details.get("left_out", ()), dtype=np.float64)
        if share.any():
            blocks = ", ".join(f"block {i}: {100 * each:.3g} %" for i, each in enumerate(share) if each)
            notes.append(
                f"{name}: {result.settings['axis']}s that are zero in float32 have no direction and are left out ({blocks})"
            )
    return notes


def _images_needed(images: Images | None, metrics: Mapping[str, Metric]) -> tuple[Images | None, list[str]]:
    """The images, None where no metric needs any, and a note where they are not used; DataError where they are missing."""
    names = need_images(metrics)
    if names and images is None:
        raise DataError(f"{names[0]} needs images: give data, or ask for metrics of the weights alone")
    if names or images is None:
        return images, []
    return None, ["the metrics asked for are of the weights alone: the images were not used"]


def gallery_names(images: Images | None, settings: RunSettings) -> frozenset[str]:
    """The images to keep pictures of, spread over the data; of a run that may stop early, among those it reads in any case."""
    if not isinstance(images, ImageSet):
        return frozenset(str(i) for i in range(settings.gallery_images))
    first = None if settings.until_ci is None else seeded_order(images, settings.seed)[:FEWEST]
    return spread_out(images.names if first is None else [images.names[i] for i in first], settings.gallery_images)


def model_facts(subject: Subject, plan: Plan) -> dict[str, Any]:
    """The section `model`: provenance, and the shape that the probe found."""
    heads = [plan.layers[i].heads for i in plan.map_layers]
    own = type(library_module(subject.model))
    return {
        "address": subject.address,
        "source": subject.source,
        "name": subject.name,
        "weights": subject.weights,
        "checkpoint": subject.checkpoint,
        "checkpoint_sha256": subject.checkpoint_sha256,
        **loading_facts(subject, plan),
        "class": f"{own.__module__}.{own.__qualname__}",
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
        "adjacent": list(plan.adjacent),
        "shares_weights": shares_weights(subject.model, plan),
        "places": places_of_blocks(plan),
        "uncompared": [{"why": why, "blocks": blocks} for why, blocks in uncompared(plan).items()],
        "left_out": [{"where": each.where, "why": each.why, "blocks": list(each.places)} for each in omissions(plan)],
    }


def shares_weights(model: nn.Module, plan: Plan) -> list[bool]:
    """Whether the attention of each block and of the block before is made with the same tensors, mostly; [blocks − 1]."""
    owners = [plan.layers[i].owner for i in plan.map_layers]
    sizes = [{id(p): p.numel() for p in model.get_submodule(owner).parameters()} if owner else {} for owner in owners]
    common = [sum(size for tensor, size in one.items() if tensor in other) for one, other in pairwise(sizes)]
    return [2 * shared > sum(one.values()) for shared, one in zip(common, sizes[1:], strict=True)]


def loading_facts(subject: Subject, plan: Plan) -> dict[str, Any]:
    """How many tensors came from the checkpoint, and the numbers of the blocks with weights that did not; None without one."""
    if subject.loading is None:
        return {"loaded": None, "blocks_not_loaded": None}
    elsewhere = [i for i, name in enumerate(plan.blocks) if holds_any(subject.loading.not_loaded, name)]
    return {
        "loaded": {"tensors": subject.loading.loaded, "of": subject.loading.total},
        "blocks_not_loaded": elsewhere,
    }


def data_facts(
    subject: Subject, images: Images | None, names: Sequence[str], skipped: Iterable[tuple[str, str]]
) -> dict[str, Any]:
    """The section `data`; where no image was used, no address and 0 images. What was not read has its number in `left_out`."""
    came = images.batches if isinstance(images, OwnImages) else images
    address = images.address if isinstance(images, (ImageSet, ImageStream)) else f"an iterable ({type(came).__name__})"
    left_out = images.left_out if isinstance(images, ImageSet) else LeftOut()
    return {
        "address": None if images is None else address,
        "images": len(names),
        "skipped": [{"name": name, "reason": reason} for name, reason in [*skipped, *left_out.entries()]],
        "names_sha256": None if images is None else names_sha256(names),
        "bundled": isinstance(images, ImageSet) and images.bundled,
        "trained_on": images_trained_on(subject, images, names),
        **({"left_out": dict(sorted(left_out.counts.items()))} if left_out.counts else {}),
        **({"content_sha256": images.content_sha256} if isinstance(images, ImageSet) and images.content_sha256 else {}),
    }


def data_notes(images: Images | None, remarks: Mapping[str, int]) -> list[str]:
    """How the data were read, what of them was not, and what was done to how many images."""
    notes = images.notes if isinstance(images, (ImageSet, ImageStream)) else ()
    return [*notes, *(f"{count:,} image{'s' * (count > 1)}: {remark}" for remark, count in sorted(remarks.items()))]


def images_trained_on(subject: Subject, images: Images | None, names: Sequence[str]) -> int | None:
    """How many of the images the model was trained on; None where that is not known: of weights whose training is not
    recorded, and of data that do not come with the package, whose names do not say whether they are the same images.
    """
    trained = subject.training_data
    if trained is None or not isinstance(images, ImageSet) or not images.bundled or images.address != trained["address"]:
        return None
    of_training = {whole_picture(name) for name in split_data(**trained).train.names}
    return sum(whole_picture(name) in of_training for name in names)


def run_facts(model: nn.Module, plan: Plan, settings: RunSettings, measured: Measurement) -> dict[str, Any]:
    """The section `run`: where, how and how fast the model was measured, and how far its attention was from its own."""
    device = choose_device(settings.device)
    return {
        "device": device_name(device),
        "dtype": settings.amp_as or str(floating_like(model).dtype).removeprefix("torch."),
        "batch_size": settings.batch_size,
        "world_size": rank_and_world()[1],
        "seed": settings.seed,
        "seconds": round(measured.seconds, 3),
        "images_per_second": round(len(measured.images.names) / max(measured.images.seconds, 1e-9), 2),
        "peak_memory_bytes": peak_memory(device),
        "command": settings.command,
        **stamp(),
        "self_check": {name: None if math.isnan(value) else value for name, value in vars(plan.check).items()},
        "tile_bytes": tile_bytes(plan, device),
    }
