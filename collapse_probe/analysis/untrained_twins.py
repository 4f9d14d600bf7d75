"""Untrained copies: the same architecture with fresh parameters, measured on the same path as the model itself."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import torch

from collapse_probe.analysis.measurement import Measurement, Report, RunSettings, make_metrics, need_images, plan_of
from collapse_probe.analysis.state.phases import UNTRAINED, Phase
from collapse_probe.analysis.state.records import Lowest
from collapse_probe.capture.capture import plan_again
from collapse_probe.capture.plan import Plan
from collapse_probe.data.loading import Batch
from collapse_probe.devices import choose_device, moved
from collapse_probe.distributed import rank_and_world
from collapse_probe.errors import ModelError
from collapse_probe.metrics.nulls import with_twins
from collapse_probe.models.loading import Subject
from collapse_probe.results.findings import Findings, MetricResult
from collapse_probe.results.quantities import SHARED_BY, kinds_of, pairs_of
from collapse_probe.results.readings import against_seeds
from collapse_probe.results.rules import FEWEST_IMAGES

Sample = Lowest[tuple[torch.Tensor, ...]]
DECIDING, DECIDING_SEEDS = ("attention-similarity", "attention-similarity@row"), 5
"""The metrics by which blocks share their attention, and how many copies these have where the answer hangs on them."""


def with_untrained(
    measurement: Measurement,
    results: Mapping[str, MetricResult],
    say: Report,
) -> tuple[dict[str, MetricResult], list[str]]:
    """The results of a measurement beside those of the same architecture with fresh parameters, and notes on these twins.

    A twin sees the images that the tally keeps for it, a random sample, the same for all. Where a metric has no twin, its nulls
    hold the reason.
    """
    subject, plan, settings = measurement.subject, measurement.plan, measurement.settings
    few = measurement.tally.twin_pixels
    on_images = need_images(measurement.metrics)
    reasons = dict.fromkeys(measurement.metrics, _no_twin(subject, settings))
    names = [name for name, reason in reasons.items() if not reason]
    twins: dict[int, dict[str, MetricResult]] = {}
    more: dict[int, dict[str, MetricResult]] = {}
    first = settings.seed + 1
    try:
        if names:
            twins = measure_twins(subject, plan, names, few, settings, range(first, first + settings.null_seeds), say)
            deciding = [name for name in DECIDING if name in names]
            if deciding and hangs_on_twins(results):
                others = range(first + len(twins), first + DECIDING_SEEDS)
                more = measure_twins(subject, plan, deciding, few, settings, others, say)
    except ModelError as error:
        reasons |= dict.fromkeys(names, str(error))
    except Exception as error:  # of any kind, also out of memory: the model itself has been measured
        why = f"the untrained copy failed ({type(error).__name__}: {' '.join(str(error).split())[:300]})"
        say(f"{why}; the model's own numbers are kept")
        reasons |= dict.fromkeys(names, why)
    seen = len(few) if twins and on_images else 0
    paired = {}
    for name, result in results.items():
        of_twins = {seed: twin[name] for seed, twin in (twins | more).items() if name in twin}
        paired[name] = with_twins(result, of_twins, seen if name in on_images else 0, reasons[name])
    if not twins:
        return paired, []
    which, seeds = ("copies", f"seeds {[*twins]}") if len(twins) > 1 else ("copy", f"seed {next(iter(twins))}")
    notes = [f"untrained {which}: fresh parameters with {seeds} on {seen} images"] if seen else []
    if more:
        notes.append(
            f"{' and '.join(deciding)}: also those of seeds {[*more]}, because whether attention has collapsed hangs on them"
        )
    notes += filter(None, [against_seeds(result) for name, result in paired.items() if name == "attention-similarity"])
    if set(names) - set(on_images):
        notes.append(f"untrained {which} of the weights: fresh parameters with {seeds}")
    return paired, notes


def _no_twin(subject: Subject, settings: RunSettings) -> str:
    """Why there is no untrained copy; empty where there is one."""
    if settings.null_images == 0:
        return "no null images were asked for"
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


def plan_of_twin(twin: Subject, plan: Plan, settings: RunSettings) -> Plan:
    """The plan of the model, checked on its twin; a plan of its own for a twin that does not run as the model does."""
    model, made = moved(twin.model, choose_device(settings.device)).eval(), twin.preprocess
    try:
        return plan_again(model, plan, made.size, made.channels, settings.seed)
    except Exception:  # of any kind: the search says what is wrong, or finds what there is
        return plan_of(twin, settings.device, settings.seed)


def measure_twins(
    subject: Subject, plan: Plan, names: Sequence[str], few: Sample, settings: RunSettings, seeds: Iterable[int], say: Report
) -> dict[int, dict[str, MetricResult]]:
    """The numbers of the same architecture with fresh parameters of some seeds, by seed, one model at a time.

    All twins see the same `few` images, of which every process takes some. Raises ModelError where the weights cannot be made
    anew.
    """
    assert subject.fresh is not None
    twins: dict[int, dict[str, MetricResult]] = {}
    rank, world = rank_and_world()
    images = [*few]
    own = images[rank::world]
    for seed in seeds:
        say(Phase(UNTRAINED, f"measuring the untrained copy of seed {seed}" + (f" on {len(images)} images" if images else "")))
        twin = replace(subject, model=subject.fresh(seed))
        own_plan = plan_of_twin(twin, plan, settings)
        bare = replace(settings, null_images=0, gallery_images=0)
        measured = Measurement(twin, own_plan, make_metrics(own_plan, names), bare)
        for first in range(0, len(own), settings.batch):
            some = own[first : first + settings.batch]
            measured.update(Batch((), tuple(name for name, _ in some), torch.stack([pixels for _, (pixels,) in some])))
        measured.all_reduce()
        twins[seed] = measured.results(measured.table())
    return twins
