"""The verb analyze: a model, images and metrics become findings, by a loop around a Probe."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from collapse_probe.analysis.measurement import (
    FAIL,
    GALLERY_IMAGES,
    NULL_IMAGES,
    Images,
    Progress,
    Report,
    RunSettings,
    restored,
    with_input,
)
from collapse_probe.analysis.outputs import ModelOutputs
from collapse_probe.analysis.probe import Probe
from collapse_probe.analysis.state.keeper import SAVE_EVERY, Keeper, Saving, all_in_time, saving_of, signals_deferred
from collapse_probe.analysis.state.phases import IMAGES, WEIGHTS, Phase
from collapse_probe.analysis.state.records import RECORDS
from collapse_probe.analysis.state.stopping import Stopper
from collapse_probe.analysis.state.tally import LOGITS, table_of
from collapse_probe.capture.trace import budget_line
from collapse_probe.data.images import ImageSet, batches_of, images_from, in_random_order
from collapse_probe.data.loading import LoadTimes
from collapse_probe.data.preprocessing import Size
from collapse_probe.distributed import check_processes
from collapse_probe.errors import OutOfTimeError
from collapse_probe.models.calibration import calibrated, to_be_found
from collapse_probe.models.loading import Subject, resolve
from collapse_probe.results.findings import Findings
from collapse_probe.settings import names_in


def analyze(
    model: str | nn.Module | Subject,
    data: str | Path | Images | None = None,
    *,
    metrics: str | Sequence[str] = (),
    presets: str | Sequence[str] = (),
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
    batch_size: int | None = None,
    workers: int | None = None,
    device: str = "auto",
    amp: bool = False,
    amp_dtype: str | None = None,
    seed: int = 0,
    null_images: int = NULL_IMAGES,
    null_seeds: int = 1,
    until_ci: float | None = None,
    gallery_images: int = GALLERY_IMAGES,
    on_nonfinite: str = FAIL,
    records: int = RECORDS,
    save_to: str | Path | None = None,
    save_every: float = SAVE_EVERY,
    max_time: float | None = None,
    resume: bool = False,
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
    see `resolve`. `null_images` is the number of images that each of `null_seeds` untrained copies sees (0 leaves them out);
    `until_ci` the half-width at which every headline mean's interval is narrow enough to stop. NaN or infinite weights or
    activations raise NonFiniteError; with `on_nonfinite` "skip" the weights are named, and images whose activations are not
    finite are left out of everything, counted and named. Of at most `records` images what they said one by one is kept, of more
    a random sample. With `save_to`, the folder where the findings are going to be saved, the state is stored there every
    `save_every` seconds and whenever the run is broken off; after `max_time` seconds it is stored, and OutOfTimeError raised;
    `resume` goes on with it. `progress(done, skipped)` is called after each batch, `report(line)` before each longer step;
    `command` is stored. Raises CollapseProbeError where the input cannot be analysed.
    """
    settings = RunSettings(
        device=device,
        amp=amp,
        amp_dtype=amp_dtype,
        batch_size=batch_size,
        workers=workers,
        seed=seed,
        metrics=names_in(metrics),
        presets=names_in(presets),
        null_images=null_images,
        null_seeds=null_seeds,
        until_ci=until_ci,
        gallery_images=gallery_images,
        on_nonfinite=on_nonfinite,
        records=records,
        command=command,
    )
    saving = saving_of(save_to, save_every, max_time, resume)
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
        return measure(subject, images, settings, progress=progress, report=report, saving=saving)


def measure(
    subject: Subject,
    images: Images | None,
    settings: RunSettings,
    *,
    progress: Progress | None = None,
    report: Report | None = None,
    left_out: Mapping[str, str] | None = None,
    saving: Saving | None = None,
) -> Findings:
    """Measure the subject and its untrained copies; see `analyze` and `measured`."""
    return measured(subject, images, settings, progress=progress, report=report, left_out=left_out, saving=saving)[0]


def measured(
    subject: Subject,
    images: Images | None,
    settings: RunSettings,
    *,
    progress: Progress | None = None,
    report: Report | None = None,
    left_out: Mapping[str, str] | None = None,
    keep_logits: bool = False,
    saving: Saving | None = None,
) -> tuple[Findings, ModelOutputs | None]:
    """The findings, and where `keep_logits` the model's outputs on the images whose records are kept.

    `left_out` are images, by name, that are counted as not finite without being run, each with the place; `saving` says where
    and how often the state is stored, and whether the run goes on with what is there.
    """
    say = report or (lambda text: None)
    probe, stopper = read_all(
        subject, images, settings, progress=progress, say=say, left_out=left_out, keep_logits=keep_logits, saving=saving
    )
    findings = probe.conclude(say, stopper)
    if not keep_logits:
        return findings, None
    tally = probe.measurement.tally
    names, logits = tuple(findings.images["names"].tolist()), probe.measurement.table().columns.get(LOGITS)
    if tally.no_logits or logits is None:
        return findings, ModelOutputs(names, None, tally.no_logits or "the model was run on no image")
    return findings, ModelOutputs(names, logits)


def read_all(
    subject: Subject,
    images: Images | None,
    settings: RunSettings,
    *,
    progress: Progress | None = None,
    say: Report,
    left_out: Mapping[str, str] | None = None,
    keep_logits: bool = False,
    saving: Saving | None = None,
    part: tuple[int, int] = (1, 1),
    begun: Probe | None = None,
) -> tuple[Probe, Stopper | None]:
    """A probe that has seen all images of all processes (of part K of N), and what decided when there were enough.

    `begun` is one that has seen none so far, where there is one already.
    """
    images, order = None if images is None else images_from(images), None
    if images is not None and settings.until_ci is not None:
        images, order = in_random_order(images, settings.seed)
    if to_be_found(subject.model):
        subject = calibrated(with_input(subject, images), images, device=settings.device, seed=settings.seed)
    probe = begun or Probe.over(subject, images, settings, left_out=left_out, keep_logits=keep_logits)
    measurement = probe.measurement
    settings = measurement.settings
    if not measurement.tally.accumulators:
        say(Phase(WEIGHTS, f"reading the weights of {len(measurement.plan.blocks)} blocks"))
        return probe, None
    assert images is not None
    say(Phase(IMAGES, budget_line(measurement.plan, measurement.device)))
    say(f"batches of {settings.batch} images, {settings.readers or 'no'} processes that read ahead")
    stopper = None if settings.until_ci is None else Stopper(settings.until_ci, measurement.metrics, measurement.heads)
    keeper = Keeper(saving, say)
    with keeper.watching(probe):
        done = keeper.take_up(probe)
        batches = batches_of(
            images,
            measurement.subject.preprocess,
            settings.batch,
            settings.readers,
            order,
            part=part,
            done=done,
            pin=measurement.device.type == "cuda",
        )
        times = LoadTimes()
        over: OutOfTimeError | None = None
        enough = (
            stopper is not None
            and probe.images > 0
            and stopper.enough(table_of(measurement.metrics, measurement.tally, measurement.table()))
        )
        for batch in () if enough else times.over(batches):
            check_processes()
            with signals_deferred():
                newest = measurement.update(batch)
            if progress is not None:
                tally = measurement.tally
                progress(tally.images, len(tally.skipped) + len(tally.nonfinite))
            if stopper is not None and stopper.enough(newest):
                break
            try:
                keeper.after_batch(probe)
            except OutOfTimeError as error:
                over = error
                break
        if stopper is not None:
            stopper.drain()
        if line := times.sentence(settings.readers):
            say(line)
        all_in_time(over)
        keeper.all_read(probe)
        measurement.all_reduce()
    return probe, stopper


def without(images: Images | None, names: Collection[str]) -> Images | None:
    """An ImageSet without some images; else as it came."""
    if not names or not isinstance(images, ImageSet):
        return images
    return images.only([i for i, name in enumerate(images.names) if name not in names])
