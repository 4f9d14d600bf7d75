"""The verb compare: two or more subjects on the same images, paired image by image."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from collapse_probe.analysis.analyze import measured, without
from collapse_probe.analysis.comparison import gram_drift as drift
from collapse_probe.analysis.comparison.pairing import pair_up
from collapse_probe.analysis.comparison.subjects import Candidate, ModelOptions, SubjectSpec, open_subjects
from collapse_probe.analysis.cross_cka import NAME as CKA
from collapse_probe.analysis.cross_cka import cross_cka
from collapse_probe.analysis.facts import NOT_FINITE
from collapse_probe.analysis.measurement import (
    FAIL,
    GALLERY_IMAGES,
    NULL_IMAGES,
    Images,
    Progress,
    Report,
    RunSettings,
    restored,
    settled,
    with_input,
)
from collapse_probe.analysis.outputs import Bounds, ModelOutputs, labels_for, mean_kl
from collapse_probe.analysis.state.keeper import SAVE_EVERY, Saving, saving_of
from collapse_probe.analysis.state.phases import LOAD, Phase
from collapse_probe.analysis.state.records import RECORDS
from collapse_probe.data.images import ImageSet, OwnImages, images_from
from collapse_probe.data.preprocessing import Size
from collapse_probe.data.streams.stream import ImageStream
from collapse_probe.errors import DataError, NonFiniteError, SettingError
from collapse_probe.models.batchnorm import recalibrated
from collapse_probe.models.cost import measure_cost
from collapse_probe.models.loading import Subject
from collapse_probe.provenance import stamp
from collapse_probe.results.comparison import LABELS, TOP1, Comparison, Pair
from collapse_probe.results.findings import Findings
from collapse_probe.settings import names_in

__all__ = ["Comparison", "compare"]
COST_BATCH = 16  # images a time when throughput is measured; fewer where the run's own batch is smaller
Watch = Callable[[str, "int | None"], AbstractContextManager["Progress | None"]]
"""Gives the progress callback of one subject from its label and the number of images."""


@dataclass(frozen=True)
class ComparisonRun:
    """What all subjects of one comparison share; `left_out` are images whose activations are not finite in one of them."""

    images: ImageSet | ImageStream | OwnImages | None
    settings: RunSettings
    recalibrate_bn: int
    watch: Watch
    say: Report
    saving: Saving | None = None
    left_out: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class MeasuredSubject:
    """A subject's findings; of one that was run also the outputs on every image and the model."""

    label: str
    findings: Findings
    outputs: ModelOutputs | None = None
    subject: Subject | None = None


def compare(
    subjects: Mapping[str, Candidate] | Sequence[Candidate],
    data: str | Path | Images | None = None,
    *,
    metrics: str | Sequence[str] = (),
    presets: str | Sequence[str] = (),
    cka: bool = False,
    gram_drift: bool = False,
    split: str | None = None,
    limit: int | None = None,
    max_pixels: int | None = None,
    model: str | None = None,
    checkpoint_key: str | None = None,
    partial: bool = False,
    pretrained: bool | None = None,
    model_kwargs: Mapping[str, Any] | None = None,
    img_size: Size | None = None,
    blocks_pattern: str | None = None,
    fixes: str | Sequence[str] = (),
    fix_blocks: Sequence[int] | None = None,
    recalibrate_bn: int = 0,
    batch_size: int | None = None,
    workers: int | None = None,
    device: str = "auto",
    amp: bool = False,
    amp_dtype: str | None = None,
    seed: int = 0,
    null_images: int = NULL_IMAGES,
    null_seeds: int = 1,
    gallery_images: int = GALLERY_IMAGES,
    on_nonfinite: str = FAIL,
    records: int = RECORDS,
    save_to: str | Path | None = None,
    save_every: float = SAVE_EVERY,
    max_time: float | None = None,
    resume: bool = False,
    command: str = "",
    watch: Watch | None = None,
    report: Report | None = None,
) -> Comparison:
    """Measure every subject that is a model, take the findings of the others, and pair all with the first, image by image.

    `subjects` maps labels to addresses, modules, Subjects, checkpoint files (of the architecture `model`), folders of
    checkpoints, findings folders or Findings; a sequence gets labels from their names. `data`, `split`, `limit` and
    `max_pixels` as for `analyze`; findings need none. `checkpoint_key`, `partial`, `pretrained`, `model_kwargs`, `img_size`
    and `blocks_pattern` are for all models, see `resolve`. `fixes` and `fix_blocks` (see `with_fixes`) go into every model
    after the first; `recalibrate_bn` is a number of batches; `cka` also takes the CKA between the depths of the first model
    and of each other (`cross_cka`), into the other's findings. `watch` follows the images, `report(line)` is called before
    each longer step; the rest is as for `analyze`. Raises DataError for subjects on different images, naming the first
    difference, and for models without data.
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
        gallery_images=gallery_images,
        on_nonfinite=on_nonfinite,
        records=records,
        command=command,
    )
    saving = saving_of(save_to, save_every, max_time, resume)
    options = ModelOptions(
        model=model,
        checkpoint_key=checkpoint_key,
        partial=partial,
        pretrained=pretrained,
        model_kwargs=model_kwargs or {},
        img_size=img_size,
        blocks_pattern=blocks_pattern,
        fixes=names_in(fixes),
        fix_blocks=None if fix_blocks is None else tuple(fix_blocks),
        seed=seed,
    )
    specs, trajectory = open_subjects(subjects, options)
    joint = tuple(name for name, asked in ((CKA, cka), (drift.NAME, gram_drift)) if asked)
    _check_specs(specs, data, joint)
    watch, say = watch or (lambda label, total: nullcontext()), report or (lambda text: None)
    images = None
    if data is not None and any(spec.is_model for spec in specs):
        images = images_from(data, split=split, limit=limit, seed=seed, max_pixels=max_pixels)
        for note in images.notes:
            say(note)
    findings, pairs = _compare_all(specs, ComparisonRun(images, settings, recalibrate_bn, watch, say, saving), joint)
    facts = {
        "command": command,
        "seed": seed,
        **stamp(),
    }
    return Comparison(findings, tuple(pairs), trajectory, facts)


JOINT = {CKA: ("CKA", cross_cka), drift.NAME: ("the drift of patch similarities", drift.gram_drift)}
"""What is taken of the first model and another together, by the name of its result: in words, and how."""


def _check_specs(specs: Sequence[SubjectSpec], data: object, joint: Sequence[str]) -> None:
    models = [spec.label for spec in specs if spec.is_model]
    if models and data is None:
        raise DataError(f"{models[0]!r} is a model, to be run on images: give --data (findings folders need none)")
    if joint and (len(models) < 2 or not specs[0].is_model):
        what = JOINT[joint[0]][0]
        raise SettingError(f"{what} is taken between the first subject and others that are models too, not findings folders")


def _compare_all(
    specs: Sequence[SubjectSpec], run: ComparisonRun, joint: Sequence[str]
) -> tuple[dict[str, Findings], list[Pair]]:
    """The findings of every subject in turn, and its pair with the first; the logits of two subjects are held at a time."""
    findings: dict[str, Findings] = {}
    pairs: list[Pair] = []
    first: MeasuredSubject | None = None
    for place, spec in enumerate(specs):
        run.say(Phase(LOAD, f"subject {spec.label}"))
        current = measure_subject(spec, run, place)
        if spec.is_model and (ill := _newly_ill(current, run)):
            run = replace(run, left_out={**run.left_out, **ill})
            if first is not None:  # the subjects before have seen these images
                run.say(f"once more, without {len(ill)} images whose activations are not finite in {spec.label}")
                return _compare_all(specs, run, joint)
        if first is None:
            first = current if joint else replace(current, subject=None)
        else:
            pair = pair_up(first.findings, current.findings, (first.label, current.label))
            pairs.append(with_divergence(pair, first.outputs, current.outputs))
            for name in joint:
                current = with_joint(name, current, first, run)
        findings[spec.label] = current.findings
    return findings, pairs


def _newly_ill(subject: MeasuredSubject, run: ComparisonRun) -> dict[str, str]:
    """The images whose activations are not finite in this subject, and were in none before; each with the place."""
    skipped = {str(each["name"]): str(each["reason"]) for each in subject.findings.data["skipped"]}
    return {
        name: f"in {subject.label}, {reason.removeprefix(f'{NOT_FINITE}: ')}"
        for name, reason in skipped.items()
        if reason.startswith(NOT_FINITE) and name not in run.left_out
    }


def measure_subject(spec: SubjectSpec, run: ComparisonRun, place: int = 0) -> MeasuredSubject:
    """Load the findings of one subject, or open the model and measure it; a caller's module stays as it was."""
    with restored(spec.candidate):
        subject, settings, images = spec.open(), run.settings, run.images
        if isinstance(subject, Findings):
            return MeasuredSubject(spec.label, subject)
        assert images is not None
        subject = with_input(subject, images)
        settings = settled(settings, subject.preprocess.size, images)
        size, device, seed = settings.batch, settings.device, settings.seed
        subject = recalibrated(subject, images, run.recalibrate_bn, batch_size=size, device=device, seed=seed)
        run.say(f"model {subject.source}:{subject.name}, weights {subject.weights}")
        left_out = hashlib.sha256("\n".join(sorted(run.left_out)).encode()).hexdigest()[:8] if run.left_out else "all"
        saving = None if run.saving is None else run.saving.of(f"subject-{place}-{left_out}")
        with run.watch(spec.label, getattr(images, "count", None)) as progress:
            findings, outputs = measured(
                subject,
                images,
                settings,
                progress=progress,
                report=run.say,
                left_out=run.left_out,
                keep_logits=True,
                saving=saving,
            )
        assert outputs is not None
        shape = (subject.preprocess.channels, *subject.preprocess.size)
        cost = measure_cost(subject.model, shape, min(COST_BATCH, settings.batch))
        findings = with_accuracy(findings.with_run(cost=asdict(cost)), outputs, images)
        return MeasuredSubject(spec.label, findings, outputs, subject)


def with_accuracy(findings: Findings, outputs: ModelOutputs, images: Images) -> Findings:
    """The findings with top answers, labels and accuracy, as far as there are any."""
    top1, table = outputs.top1(), dict(findings.images)
    accuracy, reason = None, outputs.reason
    if top1 is not None:
        labels, reason = labels_for(outputs.names, images, outputs.classes)
        table[TOP1] = top1
        if labels is not None:
            table[LABELS], accuracy = labels, float(np.mean(top1 == labels))
    facts = {"classes": outputs.classes, "accuracy": accuracy, "reason": reason}
    if outputs.logits is not None:
        bounds = Bounds()
        bounds.take(torch.from_numpy(outputs.logits))
        facts["logit_spread"] = bounds.spread
    return replace(
        findings.with_run(outputs=facts),
        images=table,
        summary={**findings.summary, "accuracy": accuracy},
    )


def with_divergence(pair: Pair, first: ModelOutputs | None, second: ModelOutputs | None) -> Pair:
    """The pair with the KL divergence of the outputs, where the logits of both models are at hand."""
    if first is None or second is None or first.logits is None or second.logits is None:
        return pair
    if first.classes != second.classes or first.names != second.names:
        return pair
    return replace(pair, agreement=replace(pair.agreement, kl=mean_kl(first.logits, second.logits), reason=""))


def with_joint(name: str, current: MeasuredSubject, first: MeasuredSubject, run: ComparisonRun) -> MeasuredSubject:
    """The second subject with what JOINT says of the first model and it in its findings, where both are models."""
    if first.subject is None or current.subject is None:
        return current
    what, taken = JOINT[name]
    run.say(f"{what} between {first.label} and {current.label}")
    images = without(run.images, run.left_out)
    assert images is not None
    if run.left_out and not isinstance(images, ImageSet):
        raise NonFiniteError(f"{what} can leave images out of a data address or an ImageSet alone; these came from a loader")
    settings = settled(run.settings, first.subject.preprocess.size, images)
    with restored(first.subject), restored(current.subject):
        first.subject.model.eval()
        current.subject.model.eval()
        result = taken(
            first.subject,
            current.subject,
            images,
            batch_size=settings.batch,
            device=settings.device,
            workers=settings.readers,
            amp=settings.amp_as,
            seed=settings.seed,
        )
    result = replace(result, details={**result.details, "first": first.label, "second": current.label})
    return replace(current, findings=replace(current.findings, metrics={**current.findings.metrics, name: result}))
