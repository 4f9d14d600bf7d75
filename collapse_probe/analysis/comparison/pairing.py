"""Two findings on the same images become pairs of numbers, image by image; other images are refused."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial

import numpy as np

from collapse_probe.errors import DataError
from collapse_probe.results.comparison import (
    ACCURACY,
    KAPPA,
    LABELS,
    NULL,
    PROBS,
    TOP1,
    CountDifference,
    Difference,
    OutputAgreement,
    Pair,
)
from collapse_probe.results.findings import Findings, MetricResult
from collapse_probe.results.readings import adjacent, over_heads
from collapse_probe.results.rules import KAPPA_ABOVE
from collapse_probe.statistics.intervals import Array, Side, count_difference_bounds, mean_parts, parts_interval
from collapse_probe.statistics.kappa import PairMoments, kappa_interval, kappa_parts
from collapse_probe.statistics.paired import NO_INTERVAL, Paired, Sides, compare_sides
from collapse_probe.statistics.proportions import wilson

Both = tuple[Findings, Findings]
Labels = tuple[str, str]


def pair_up(first: Findings, second: Findings, labels: Labels) -> Pair:
    """Everything that can be paired between two findings; see `Pair`. Raises DataError for other images."""
    both = with_probs(first), with_probs(aligned(first, second, labels))
    mixed = any(findings.model.get("mixes_maps", True) for findings in both)
    reasons = {
        name: _why_not(name, both, labels)
        for name in dict.fromkeys([*both[0].metrics, *both[1].metrics])
        if mixed or not name.endswith(PROBS)  # elsewhere they say the same again
    }
    comparable = [name for name, reason in reasons.items() if not reason]
    differences: dict[str, Difference] = {}
    for name in comparable:
        if name in both[0].images:
            differences |= _over_images(name, both)
    right = [_correct_answers(findings) for findings in both]
    if right[0] is not None and right[1] is not None:
        differences[ACCURACY] = _difference("all", (0,), Sides(right[0], right[1], answers=True))
    for name in comparable:
        if both[0].metrics[name].description.level == "weights":
            differences |= {f"{name}{part}": each for part, each in _over_weights(*(f.metrics[name] for f in both))}
    return Pair(
        first=labels[0],
        second=labels[1],
        images=len(both[0].images.get("names", ())),
        differences=differences,
        counts=tuple(count_differences(*both, comparable)),
        not_comparable={name: reason for name, reason in reasons.items() if reason},
        agreement=top1_agreement(*both),
    )


def aligned(first: Findings, second: Findings, labels: Labels) -> Findings:
    """The second findings with their images in the order of the first; DataError naming the first image that only one has."""
    names = [list(map(str, f.images.get("names", ()))) for f in (first, second)]
    if names[0] == names[1] and (names[0] or first.data.get("names_sha256") == second.data.get("names_sha256")):
        return second
    if names[0] == names[1] or sorted(names[0]) != sorted(names[1]):
        facts = [
            f"{label} has {f.data.get('images')} images of {f.data.get('address')} "
            f"(names_sha256 {str(f.data.get('names_sha256'))[:12]})"
            for label, f in zip(labels, (first, second), strict=True)
        ]
        what = _first_difference(names[0], names[1], labels) if names[0] != names[1] else "neither folder holds the names"
        raise DataError(f"the images are not the same: {what}; {'; '.join(facts)}; analyse both on the same images")
    back = np.argsort(np.argsort(names[0], kind="stable"), kind="stable")
    order = np.argsort(names[1], kind="stable")[back]
    return replace(second, images={key: values[order] for key, values in second.images.items()})


def _first_difference(first: list[str], second: list[str], labels: Labels) -> str:
    for mine, others, label in ((first, set(second), labels[0]), (second, set(first), labels[1])):
        for name in mine:
            if name not in others:
                return f"{name!r} is only in {label}"
    twice = next(name for name in first if first.count(name) != second.count(name))
    return f"{twice!r} is {first.count(twice)} times in {labels[0]}, {second.count(twice)} times in {labels[1]}"


def with_probs(findings: Findings) -> Findings:
    """Findings in which the @probs metrics are there also where they are the plain ones.

    A model that does not change its maps after the softmax is measured once: what multiplies V is the
    softmax.
    """
    if findings.model.get("mixes_maps", True):
        return findings
    metrics, images = dict(findings.metrics), dict(findings.images)
    for name, result in findings.metrics.items():
        if result.point == "weights":
            metrics.setdefault(name + PROBS, result)
            same = {key: values for key, values in images.items() if key in (name, name + NULL)}
            images |= {key.replace(name, name + PROBS): values for key, values in same.items()}
    return replace(findings, metrics=metrics, images=images)


def _why_not(name: str, both: Both, labels: Labels) -> str:
    """Why a metric of two findings cannot be paired; empty where it can."""
    for findings, label in zip(both, labels, strict=True):
        result = findings.metrics.get(name)
        if result is None:
            return f"not measured in {label}"
        if result.values is None:
            return f"not applicable in {label}: {result.not_applicable}"
    one = both[0].metrics[name]
    if one.description.level != "weights" and not any(name in findings.images for findings in both):
        return "" if one.dims == ("threshold",) else "it has no value of a single image, so nothing to pair"
    (shape, size), (other_shape, other_size) = (_shape(findings, name) for findings in both)
    return "" if shape == other_shape else f"other shapes: {labels[0]} has {size}, {labels[1]} has {other_size}"


def _shape(findings: Findings, name: str) -> tuple[tuple[object, ...], str]:
    """What must be equal for a metric to be paired, and its size in words."""
    result = findings.metrics[name]
    assert result.values is not None
    if result.description.level == "weights":
        matrices = tuple(result.details.get("matrices", ())) if "matrix" in result.dims else ()
        words = " × ".join(f"{size} {dim}" for size, dim in zip(result.values.shape, result.dims, strict=True))
        return (result.dims, result.values.shape, matrices), words
    if name not in findings.images:
        return (result.dims, None), "no per-image values"
    shape = findings.images[name].shape[1:]
    return (result.dims, shape), f"{shape[0]} {'pairs' if _first_place(result) else result.dims[0] + 's'}"


def _first_place(result: MetricResult) -> int:
    """1 for a block × block metric, whose per-image values are those of each block with the one before; else 0."""
    return int(len(result.dims) == 2 and result.dims[0] == result.dims[1])


def _over_images(name: str, both: Both) -> dict[str, Difference]:
    """The difference of one metric over images, and as NAME/kappa that of its null-corrected values."""
    result = both[0].metrics[name]
    one, other = (np.asarray(findings.images[name], dtype=np.float64) for findings in both)
    start = _first_place(result)
    axis, places = result.dims[0], tuple(range(start, start + one.shape[1]))
    differences = {name: _difference(axis, places, Sides(one, other))}
    nulls = [np.asarray(f.images[name + NULL], dtype=np.float64) for f in both if name + NULL in f.images]
    if len(nulls) == 2:
        differences[name + KAPPA] = _difference(axis, places, Sides(one, other, (nulls[0], nulls[1])))
    return differences


def _difference(axis: str, places: tuple[int, ...], sides: Sides) -> Difference:
    return Difference(axis, places, compare_sides(sides), compare_sides(replace(sides, pooled=True)))


def _correct_answers(findings: Findings) -> Array | None:
    """Whether each image's top answer is its label, [images, 1] of 0 and 1; None where there is no answer or no label."""
    top1, label = findings.images.get(TOP1), findings.images.get(LABELS)
    if top1 is None or label is None:
        return None
    return np.asarray(top1 == label, dtype=np.float64)[:, None]


def count_differences(first: Findings, second: Findings, names: Iterable[str]) -> list[CountDifference]:
    """The counts among the metrics `names` of two findings on the same images in the same order.

    Undefined ends where the findings hold no values of single images, or one image only.
    """
    counts: list[CountDifference] = []
    for name in names:
        base, *variant = name.split("@")
        if base == "similar-blocks":
            counts += _counts_of_metric(name, "@".join(["attention-similarity", *variant]), first, second)
    return counts


def _counts_of_metric(name: str, source: str, first: Findings, second: Findings) -> Iterable[CountDifference]:
    one, other = first.metrics[name], second.metrics[name]
    assert one.values is not None
    assert other.values is not None
    real = [f.images[source] for f in (first, second) if source in f.images]
    null = [f.images[source + NULL] for f in (first, second) if source + NULL in f.images]
    for at, threshold in enumerate(one.settings["thresholds"]):
        ends = _ends([_means(values) for values in real], threshold)
        yield CountDifference(name, float(threshold), float(one.values[at]), float(other.values[at]), ends)
    counts = [result.details.get("corrected", {}).get("value") for result in (one, other)]
    if None not in counts:
        sides = [_kappas(*side) for side in zip(real, null, strict=True)] if len(real) == len(null) == 2 else []
        ends = _ends(sides, KAPPA_ABOVE)
        yield CountDifference(name + KAPPA, KAPPA_ABOVE, float(counts[0]), float(counts[1]), ends)


def _means(values: Array) -> Side:
    numbers = mean_parts(values)
    return numbers, partial(parts_interval, numbers)


def _kappas(real: Array, null: Array) -> Side:
    return kappa_parts(real, null), partial(kappa_interval, PairMoments.of(real, null))


def _ends(sides: Sequence[Side], above: float) -> tuple[float, float]:
    """The interval of the second's count less the first's; NaN without both, or with fewer than two images."""
    if len(sides) != 2 or len(sides[0][0][1]) < 2:
        return float("nan"), float("nan")
    low, high = count_difference_bounds(sides[0], sides[1], above)
    return float(low), float(high)


def top1_agreement(first: Findings, second: Findings) -> OutputAgreement:
    """How often the top answers agree, from what the findings hold (two that are `aligned`)."""
    one, other = (f.images.get(TOP1) for f in (first, second))
    if one is None or other is None:
        return OutputAgreement(reason="the findings hold no answers of the models")
    classes = [f.run.get("outputs", {}).get("classes") for f in (first, second)]
    if classes[0] != classes[1]:
        return OutputAgreement(reason=f"the models answer with {classes[0]} and {classes[1]} classes")
    same = int((one == other).sum())
    return OutputAgreement(same / len(one), None, len(one), "the logits were not kept", wilson(same, len(one)))


def _over_weights(one: MetricResult, other: MetricResult) -> Iterator[tuple[str, Difference]]:
    """The differences of a metric of the weights: for each matrix (/MATRIX), of means over heads, or of neighbouring blocks."""
    first, second = one.values, other.values
    assert first is not None
    assert second is not None
    if one.dims == ("block", "head"):
        yield "", _weight_difference(over_heads(first), over_heads(second), 0)
        return
    if "matrix" not in one.dims:
        yield "", _weight_difference(adjacent(one, first), adjacent(other, second), 1)
        return
    for at, matrix in enumerate(one.details.get("matrices", range(first.shape[1]))):
        if np.isfinite(first[:, at]).any() or np.isfinite(second[:, at]).any():
            yield f"/{matrix}", _weight_difference(first[:, at], second[:, at], 0)


def _weight_difference(first: Array, second: Array, start: int) -> Difference:
    both = np.isfinite(first) & np.isfinite(second)
    means = [np.array([side[both].mean() if both.any() else np.nan]) for side in (first, second)]
    return Difference("block", tuple(range(start, start + len(first))), _unsampled(first, second), _unsampled(*means))


def _unsampled(first: Array, second: Array) -> Paired:
    """Two sides without images: a difference, and neither an interval nor a test, also where the sides are equal."""
    count, untested = np.zeros(len(first), dtype=np.int64), np.full(len(first), np.nan)
    ends, kinds = np.full((len(first), 2), np.nan), (NO_INTERVAL,) * len(first)
    return Paired(first, second, second - first, ends, kinds, untested, untested, untested, count, count)
