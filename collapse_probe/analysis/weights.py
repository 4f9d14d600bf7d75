"""Reads the metrics of the weights: the matrices once, then every metric of them, beside those of untrained twins."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from collapse_probe.capture.capture import discover_plan, noise
from collapse_probe.capture.plan import Plan
from collapse_probe.capture.weight_capture import record_matrices
from collapse_probe.capture.weight_matrices import NAMES, Matrices
from collapse_probe.distributed import unwrap
from collapse_probe.errors import ModelError
from collapse_probe.metrics.metric import Metric
from collapse_probe.metrics.nulls import with_twins, with_untrained
from collapse_probe.metrics.weight_metric import WeightMetric
from collapse_probe.models.loading import Subject
from collapse_probe.results.findings import MetricResult

Metrics = Mapping[str, Metric]


@dataclass(frozen=True)
class WeightRun:
    """The readings of the weight metrics by name, notes for the run, and the seconds that the reading took."""

    readings: dict[str, MetricResult] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    seconds: float = 0.0


def matrices_of(model: nn.Module, plan: Plan, seed: int = 0) -> Matrices:
    """The weight matrices of every block of `plan`, heard in one forward pass of noise; no data are needed."""
    if plan.image_size is None:
        reason = "the probe saw no image, so that no pass could be made to hear the products of the blocks"
        missing = tuple(dict.fromkeys(NAMES, reason) for _ in plan.blocks)
        return Matrices(plan.blocks, tuple({} for _ in plan.blocks), missing)
    model = unwrap(model)
    return record_matrices(model, noise(model, plan.image_size, 3, seed), plan.blocks)


def apart(metrics: Metrics) -> tuple[dict[str, WeightMetric], dict[str, Metric]]:
    """The metrics of the weights, and those that need images."""
    weights = {name: metric for name, metric in metrics.items() if isinstance(metric, WeightMetric)}
    return weights, {name: metric for name, metric in metrics.items() if name not in weights}


def read_weights(
    subject: Subject,
    model: nn.Module,
    plan: Plan,
    metrics: Mapping[str, WeightMetric],
    *,
    seed: int,
    device: torch.device,
    seeds: int = 1,
    say: Callable[[str], None] = lambda text: None,
) -> WeightRun:
    """Every weight metric of `model`, beside its untrained twins of so many `seeds` (after `seed`); 0 leaves them out."""
    if not metrics:
        return WeightRun()
    start = time.perf_counter()
    say(f"reading the weights of {len(plan.blocks)} blocks")
    readings = _readings(model, plan, metrics, seed)
    notes = tuple(dict.fromkeys(line for metric in metrics.values() if metric.matrices for line in metric.matrices.reasons()))
    try:
        twins = _twins(subject, metrics, range(seed + 1, seed + 1 + seeds), seed, device, say)
    except ModelError as error:
        found = {name: with_untrained(reading, None, 0, str(error)) for name, reading in readings.items()}
        return WeightRun(found, notes, time.perf_counter() - start)
    found = {name: with_twins(r, {s: twin[name] for s, twin in twins.items()}, 0) for name, r in readings.items()}
    which = f"twin of the weights: fresh weights with seed {seed + 1}"
    if len(twins) > 1:
        which = f"twins of the weights: fresh weights with seeds {[*twins]}"
    return WeightRun(found, (*notes, f"untrained {which}"), time.perf_counter() - start)


def _twins(
    subject: Subject,
    metrics: Mapping[str, WeightMetric],
    seeds: Sequence[int],
    probe_seed: int,
    device: torch.device,
    say: Callable[[str], None],
) -> dict[int, dict[str, MetricResult]]:
    """The readings of the untrained twin of each seed, one model at a time; ModelError with the reason where there is none."""
    if not seeds:
        raise ModelError("no null images were asked for, which leaves the untrained twin out")
    if subject.fresh is None:
        raise ModelError("the model came as an object, and its architecture cannot be made anew")
    found: dict[int, dict[str, MetricResult]] = {}
    for seed in seeds:
        say("reading the weights of the untrained twin" + (f", seed {seed}" if len(seeds) > 1 else ""))
        fresh = subject.fresh(seed).to(device)
        plan = discover_plan(fresh, subject.preprocess.size, seed=probe_seed)
        found[seed] = _readings(fresh, plan, {n: type(m)(plan, **m.settings) for n, m in metrics.items()}, probe_seed)
    return found


def _readings(model: nn.Module, plan: Plan, metrics: Mapping[str, WeightMetric], seed: int) -> dict[str, MetricResult]:
    matrices = matrices_of(model, plan, seed)
    for metric in metrics.values():
        metric.matrices = matrices
    refused = {name: metric.inapplicable() for name, metric in metrics.items()}
    return {name: metric.refused(refused[name]) if refused[name] else metric.read({}, {}) for name, metric in metrics.items()}
