"""The verb compare: two or more subjects on the same images, paired image by image."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np

from collapse_probe.analysis.analyze import Report, RunSettings, as_it_was, measure
from collapse_probe.analysis.cross_cka import NAME, cross_cka
from collapse_probe.analysis.loop import Progress
from collapse_probe.analysis.outputs import Answers, OutputCollector, labels_for, mean_kl
from collapse_probe.analysis.pairing import pair_up, with_weights
from collapse_probe.analysis.subjects import Candidate, ModelOptions, SubjectSpec, open_subjects
from collapse_probe.data.images import ImageSet, open_data
from collapse_probe.errors import DataError, SettingError
from collapse_probe.models.batchnorm import recalibrated
from collapse_probe.models.cost import measure_cost
from collapse_probe.models.loading import Subject
from collapse_probe.provenance import versions
from collapse_probe.results.comparison import LABELS, TOP1, Comparison, OutputAgreement, Pair
from collapse_probe.results.findings import Findings

__all__ = ["Comparison", "compare"]
COST_BATCH = 16  # images a time when throughput is measured; fewer where the run's own batch is smaller
Images = ImageSet | Iterable[Any] | None
Watch = Callable[[str, "int | None"], AbstractContextManager["Progress | None"]]


@dataclass(frozen=True)
class ComparisonRun:
    """What all subjects of one comparison share."""

    images: Images
    settings: RunSettings
    recalibrate_bn: int
    watch: Watch
    report: Report
    cka: bool


def compare(
    subjects: Mapping[str, Candidate] | Sequence[Candidate],
    data: str | Path | ImageSet | Iterable[Any] | None = None,
    *,
    model: str | None = None,
    fixes: Sequence[str] = (),
    fix_blocks: Sequence[int] | None = None,
    recalibrate_bn: int = 0,
    cka: bool = False,
    limit: int | None = None,
    split: str | None = None,
    settings: RunSettings | None = None,
    watch: Watch | None = None,
    report: Report | None = None,
    **options: Any,
) -> Comparison:
    """Measure every subject that is a model, take the findings of the others, and pair all with the first,
    image by image.

    `subjects` maps labels to addresses, modules, Subjects, checkpoint files (of the architecture `model`),
    folders of checkpoints, findings folders or Findings; a sequence gets labels from their names. `data`
    as `analyze` takes it; findings need none. `fixes` and `fix_blocks` (see `remedied.with_fixes`) go into
    every model after the first; `recalibrate_bn` is a number of batches; `cka` also takes the CKA between the
    depths of the first model and of each other (`cross_cka`), into the other's findings. `options` are
    fields of `Settings`, and those of `sources.resolve`. Raises DataError for subjects on different images,
    naming the first difference, and for models without data.
    """
    known = {name: options.pop(name) for name in list(options) if name in RunSettings.__dataclass_fields__}
    settings = replace(settings or RunSettings(), **known)
    blocks = None if fix_blocks is None else tuple(fix_blocks)
    lineup = open_subjects(subjects, ModelOptions(model, options, tuple(fixes), blocks, settings.seed))
    models = [entry.label for entry in lineup.entries if entry.is_model]
    if models and data is None:
        raise DataError(f"{models[0]!r} is a model, to be run on images: give --data (findings folders need none)")
    if cka and (len(models) < 2 or not lineup.entries[0].is_model):
        raise SettingError("CKA is taken between the first subject and others that are models too, not findings folders")
    images = open_data(data, split=split, limit=limit, seed=settings.seed) if isinstance(data, (str, Path)) else data
    run = ComparisonRun(
        images,
        settings,
        recalibrate_bn,
        watch or (lambda label, total: nullcontext()),
        report or (lambda text: None),
        cka,
    )
    found, pairs = _run_all(lineup.entries, run)
    facts = {
        "command": settings.command,
        "seed": settings.seed,
        "versions": versions(),
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }
    return Comparison(found, tuple(pairs), lineup.trajectory, facts)


def _run_all(entries: Sequence[SubjectSpec], run: ComparisonRun) -> tuple[dict[str, Findings], list[Pair]]:
    """Every subject in turn, paired with the first at once; the logits of two subjects are held at a time."""
    found: dict[str, Findings] = {}
    pairs: list[Pair] = []
    first: tuple[str, Findings, Answers | None, Subject | None] | None = None
    for entry in entries:
        run.report(f"subject {entry.label}")
        findings, answers, subject = _one(entry, run)
        found[entry.label] = findings
        if first is None:
            first = (entry.label, findings, answers, subject if run.cka else None)
            continue
        pair = with_weights(pair_up(first[1], findings, (first[0], entry.label), run.settings.seed), first[1], findings)
        pairs.append(replace(pair, agreement=_agreement(pair, (first[2], answers), first[1], findings)))
        if first[3] is not None and subject is not None:
            found[entry.label] = _with_cka(findings, (first[0], entry.label), (first[3], subject), run)
    return found, pairs


def _one(entry: SubjectSpec, run: ComparisonRun) -> tuple[Findings, Answers | None, Subject | None]:
    """The findings of one subject, with what it answered and the model if it was run; a module of the caller
    stays as it was.
    """
    with as_it_was(entry.given.model if isinstance(entry.given, Subject) else entry.given):
        subject = entry.open()
        if isinstance(subject, Findings):
            return subject, None, None
        assert run.images is not None
        return *_measured(entry.label, subject, run.images, run), subject


def _with_cka(findings: Findings, labels: tuple[str, str], subjects: tuple[Subject, Subject], run: ComparisonRun) -> Findings:
    """The second subject's findings with the CKA between the first model's depths and its own."""
    run.report(f"CKA between {labels[0]} and {labels[1]}")
    first, second = subjects
    settings = run.settings
    assert run.images is not None
    with as_it_was(first.model), as_it_was(second.model):
        first.model.eval()
        second.model.eval()
        reading = cross_cka(
            first,
            second,
            run.images,
            batch_size=settings.batch_size,
            device=settings.device,
            workers=settings.workers,
            amp=settings.amp_as,
            seed=settings.seed,
        )
    reading = replace(reading, details={**reading.details, "first": labels[0], "second": labels[1]})
    return replace(findings, metrics={**findings.metrics, NAME: reading})


def _measured(label: str, subject: Subject, images: ImageSet | Iterable[Any], run: ComparisonRun) -> tuple[Findings, Answers]:
    settings, listener = run.settings, OutputCollector()
    subject = recalibrated(
        subject,
        images,
        run.recalibrate_bn,
        batch_size=settings.batch_size,
        device=settings.device,
        seed=settings.seed,
    )
    run.report(f"model {subject.source}:{subject.name}, weights {subject.weights}")
    total = len(images) if isinstance(images, ImageSet) else None
    with run.watch(label, total) as progress:
        findings = measure(subject, images, settings, progress=progress, report=run.report, outputs=listener)
    answers = listener.answers(findings.images["names"].tolist())
    cost = measure_cost(subject.model, subject.preprocess.size, min(COST_BATCH, settings.batch_size))
    return _with_answers(findings.with_run(cost=cost.facts()), answers, images), answers


def _with_answers(findings: Findings, answers: Answers, images: ImageSet | Iterable[Any]) -> Findings:
    """The findings with top answers, labels and accuracy, as far as there are any."""
    top1, names = answers.top1(), list(answers.names)
    table: dict[str, Any] = {} if top1 is None else {TOP1: top1}
    accuracy, why = None, answers.reason
    if top1 is not None:
        labels, kinds = _labels(images)
        label, why = labels_for(names, labels, kinds, answers.classes)
        if label is not None:
            table[LABELS] = label
            accuracy = float(np.mean(top1 == label))
    return replace(
        findings,
        images={**findings.images, **table},
        summary={**findings.summary, "accuracy": accuracy},
        run={**findings.run, "outputs": {"classes": answers.classes, "accuracy": accuracy, "reason": why}},
    )


def _labels(images: ImageSet | Iterable[Any]) -> tuple[dict[str, int] | None, int]:
    """The class of every image by name and the number of classes, where the data tell."""
    if not isinstance(images, ImageSet) or images.labels is None:
        return None, 0
    kinds = len(images.class_names) or max(images.labels) + 1
    return dict(zip(images.names, images.labels, strict=True)), kinds


def _agreement(
    pair: Pair, answers: tuple[Answers | None, Answers | None], first: Findings, second: Findings
) -> OutputAgreement:
    """Agreement of the top answers, with the KL divergence where both models' logits are at hand."""
    one, other = answers
    if one is None or other is None or one.logits is None or other.logits is None:
        return pair.agreement
    if one.classes != other.classes or one.names != other.names:
        return pair.agreement
    return replace(pair.agreement, kl=mean_kl(one.logits, other.logits), reason="")
