"""Untrained twins: the same architecture with fresh weights, measured on the same path as the model itself."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from collapse_probe.analysis.measurement import (
    Images,
    Measurement,
    Report,
    RunSettings,
    make_metrics,
    measure_model,
    need_images,
    plan_of,
)
from collapse_probe.data.images import ImageSet
from collapse_probe.data.streams.stream import ImageStream
from collapse_probe.errors import ModelError
from collapse_probe.metrics.metric import Metric
from collapse_probe.metrics.nulls import with_twins
from collapse_probe.models.loading import Subject
from collapse_probe.results.findings import Findings, MetricResult
from collapse_probe.results.quantities import SHARED_BY, kinds_of, pairs_of
from collapse_probe.results.readings import against_seeds
from collapse_probe.results.rules import FEWEST_IMAGES

DECIDING, DECIDING_SEEDS = ("attention-similarity", "attention-similarity@row"), 5
"""The metrics by which blocks share their attention, and how many untrained twins these have where the answer hangs on them."""


def with_untrained(
    results: Mapping[str, MetricResult],
    subject: Subject,
    metrics: Mapping[str, Metric],
    images: Images | None,
    settings: RunSettings,
    say: Report,
) -> tuple[dict[str, MetricResult], list[str]]:
    """The results beside those of the same architecture with fresh weights, and notes on these untrained twins.

    Where a metric has no twin, its nulls hold the reason.
    """
    on_images = need_images(metrics)
    reasons = {name: _no_twin(subject, images, settings, name in on_images) for name in metrics}
    names = [name for name, reason in reasons.items() if not reason]
    twins: dict[int, Measurement] = {}
    more: dict[int, Measurement] = {}
    first = settings.seed + 1
    try:
        if names:
            few = images if set(names) & set(on_images) else None
            twins = measure_twins(subject, names, few, settings, range(first, first + settings.null_seeds), say)
            deciding = [name for name in DECIDING if name in names]
            if deciding and hangs_on_twins(results):
                more = measure_twins(subject, deciding, few, settings, range(first + len(twins), first + DECIDING_SEEDS), say)
    except ModelError as error:
        reasons |= dict.fromkeys(names, str(error))
    except Exception as error:  # of any kind, also out of memory: the model itself has been measured
        why = f"the untrained twin failed ({type(error).__name__}: {' '.join(str(error).split())[:300]})"
        say(f"{why}; the model's own numbers are kept")
        reasons |= dict.fromkeys(names, why)
    seen = max((len(twin.images.names) for twin in twins.values()), default=0)
    paired = {}
    for name, result in results.items():
        of_twins = {seed: twin.results[name] for seed, twin in (twins | more).items() if name in twin.results}
        paired[name] = with_twins(result, of_twins, seen if name in on_images else 0, reasons[name])
    if not twins:
        return paired, []
    which, seeds = ("twins", f"seeds {[*twins]}") if len(twins) > 1 else ("twin", f"seed {next(iter(twins))}")
    notes = [f"untrained {which}: fresh weights with {seeds} on {seen} images"] if seen else []
    if more:
        notes.append(
            f"{' and '.join(deciding)}: also those of seeds {[*more]}, because whether attention has collapsed hangs on them"
        )
    notes += filter(None, [against_seeds(result) for name, result in paired.items() if name == "attention-similarity"])
    if set(names) - set(on_images):
        notes.append(f"untrained {which} of the weights: fresh weights with {seeds}")
    return paired, notes


def _no_twin(subject: Subject, images: Images | None, settings: RunSettings, on_images: bool) -> str:
    """Why a metric has no untrained twin; empty where it has one."""
    if settings.null_images == 0:
        return "no null images were asked for"
    if on_images and not isinstance(images, (ImageSet, ImageStream)):
        return "the images came from an iterable that can be run through once"
    return "" if subject.fresh is not None else "the model came as an object, and its architecture cannot be made anew"


def hangs_on_twins(results: Mapping[str, MetricResult]) -> bool:
    """Whether some neighbouring blocks share their attention by value: then twins must tell whether untrained ones do too."""
    similarity = results.get("attention-similarity")
    if similarity is None or similarity.values is None or similarity.nulls is None:
        return False
    if max(similarity.nulls.images.values(), default=0) < FEWEST_IMAGES:
        return False
    bare = Findings(model={}, data={}, run={}, metrics=dict(results), summary={})
    return any(kind in SHARED_BY for kind in kinds_of(pairs_of(bare)))


def measure_twins(
    subject: Subject, names: Sequence[str], images: Images | None, settings: RunSettings, seeds: Iterable[int], say: Report
) -> dict[int, Measurement]:
    """The same architecture with fresh weights of some seeds, by seed, one model at a time.

    A twin sees a seeded subset of the images, the same for all. Raises ModelError where the weights cannot be made anew.
    """
    assert subject.fresh is not None
    few = images.subset(settings.null_images, settings.seed) if isinstance(images, (ImageSet, ImageStream)) else None
    twins: dict[int, Measurement] = {}
    for seed in seeds:
        say(f"measuring the untrained twin of seed {seed}" + ("" if few is None else f" on {few.count} images"))
        twin = replace(subject, model=subject.fresh(seed))
        plan = plan_of(twin, settings.device, settings.seed)
        twins[seed] = measure_model(twin, plan, make_metrics(plan, names), few, settings)
    return twins
