"""Two findings on the same images become pairs of numbers, image by image; other images are refused."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

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
from collapse_probe.results.readings import adjacent
from collapse_probe.results.rules import KAPPA_ABOVE
from collapse_probe.statistics.intervals import Array, Parts, count_difference_bounds, kappa_parts, mean_parts
from collapse_probe.statistics.paired import NO_INTERVAL, Paired, Sides, compare_sides


def count_differences(first: Findings, second: Findings, names: Iterable[str]) -> list[CountDifference]:
    """The counts among the metrics `names` of two findings on the same images in the same order.

    Undefined ends where the findings hold no values of single images, or one image only.
    """
    found: list[CountDifference] = []
    for name in names:
        base, *variant = name.split("@")
        if base == "similar-blocks":
            source = "@".join(["attention-similarity", *variant])
            found += _counts_of_metric(name, source, first, second)
    return found


def _counts_of_metric(name: str, source: str, first: Findings, second: Findings) -> Iterable[CountDifference]:
    one, other = first.metrics[name], second.metrics[name]
    assert one.values is not None
    assert other.values is not None
    real = [f.images[source] for f in (first, second) if source in f.images]
    null = [f.images[source + NULL] for f in (first, second) if source + NULL in f.images]
    for at, threshold in enumerate(one.settings["thresholds"]):
        ends = _ends([mean_parts(values) for values in real], threshold)
        yield CountDifference(name, float(threshold), float(one.values[at]), float(other.values[at]), ends)
    counts = [reading.details.get("corrected", {}).get("value") for reading in (one, other)]
    if None not in counts:
        sides = [kappa_parts(*held) for held in zip(real, null, strict=True)] if len(real) == len(null) == 2 else []
        ends = _ends(sides, KAPPA_ABOVE)
        yield CountDifference(name + KAPPA, KAPPA_ABOVE, float(counts[0]), float(counts[1]), ends)


def _ends(sides: Sequence[Parts], above: float) -> tuple[float, float]:
    """The interval of the second's count less the first's; NaN without both, or with fewer than two images."""
    if len(sides) != 2 or len(sides[0][1]) < 2:
        return float("nan"), float("nan")
    low, high = count_difference_bounds(sides[0], sides[1], above)
    return float(low), float(high)


def aligned(first: Findings, second: Findings, labels: tuple[str, str]) -> tuple[Findings, Findings]:
    """Both findings with their images in the order of the first; DataError naming the first image that
    only one has.
    """
    names = [list(map(str, f.images.get("names", ()))) for f in (first, second)]
    if names[0] == names[1]:
        if not names[0] and first.data.get("names_sha256") != second.data.get("names_sha256"):
            raise _mismatch(first, second, labels, "neither folder holds the names")
        return first, second
    if sorted(names[0]) != sorted(names[1]):
        raise _mismatch(first, second, labels, _first_difference(names[0], names[1], labels))
    back = np.argsort(np.argsort(names[0], kind="stable"), kind="stable")
    order = np.argsort(names[1], kind="stable")[back]
    return first, replace(second, images={key: values[order] for key, values in second.images.items()})


def with_probs(findings: Findings) -> Findings:
    """Findings in which the @probs metrics are there also where they are the plain ones.

    A model that does not change its maps after the softmax is measured once: what multiplies V is the
    softmax.
    """
    if findings.model.get("mixes_maps", True):
        return findings
    metrics, images = dict(findings.metrics), dict(findings.images)
    for name, reading in findings.metrics.items():
        if reading.point == "weights":
            metrics.setdefault(name + PROBS, reading)
            same = {key: values for key, values in images.items() if key in (name, name + NULL)}
            images |= {key.replace(name, name + PROBS): values for key, values in same.items()}
    return replace(findings, metrics=metrics, images=images)


def _first_difference(first: list[str], second: list[str], labels: tuple[str, str]) -> str:
    held = set(second)
    for name in first:
        if name not in held:
            return f"{name!r} is only in {labels[0]}"
    held = set(first)
    for name in second:
        if name not in held:
            return f"{name!r} is only in {labels[1]}"
    twice = next(name for name in first if first.count(name) != second.count(name))
    return f"{twice!r} is {first.count(twice)} times in {labels[0]}, {second.count(twice)} times in {labels[1]}"


def _mismatch(first: Findings, second: Findings, labels: tuple[str, str], what: str) -> DataError:
    facts = [
        f"{label} has {f.data.get('images')} images of {f.data.get('address')} "
        f"(names_sha256 {str(f.data.get('names_sha256'))[:12]})"
        for label, f in zip(labels, (first, second), strict=True)
    ]
    return DataError(f"the images are not the same: {what}; {'; '.join(facts)}; analyse both on the same images")


def pair_up(first: Findings, second: Findings, labels: tuple[str, str], seed: int = 0) -> Pair:
    """Everything that can be paired between two findings; see `Pair`. Raises DataError for other images."""
    first, second = (with_probs(findings) for findings in aligned(first, second, labels))
    differences: dict[str, Difference] = {}
    refused: dict[str, str] = {}
    names = _names(first, second)
    for name in names:
        reason = _why_not(name, first, second, labels)
        if reason:
            refused[name] = reason
        elif name in first.images:
            differences |= _of_metric(name, first, second, seed)
    right = [_right(findings) for findings in (first, second)]
    if right[0] is not None and right[1] is not None:
        differences[ACCURACY] = _difference("all", (0,), Sides(right[0], right[1]), seed)
    return Pair(
        first=labels[0],
        second=labels[1],
        images=len(first.images.get("names", ())),
        differences=differences,
        counts=tuple(count_differences(first, second, [n for n in names if n not in refused])),
        not_comparable=refused,
        agreement=top1_agreement(first, second),
    )


def _names(first: Findings, second: Findings) -> list[str]:
    """The metrics of either; those @probs only where a map is mixed, for elsewhere they say the same
    again.
    """
    mixed = any(findings.model.get("mixes_maps", True) for findings in (first, second))
    return [n for n in dict.fromkeys([*first.metrics, *second.metrics]) if mixed or not n.endswith(PROBS)]


def _why_not(name: str, first: Findings, second: Findings, labels: tuple[str, str]) -> str:
    for findings, label in zip((first, second), labels, strict=True):
        reading = findings.metrics.get(name)
        if reading is None:
            return f"not measured in {label}"
        if reading.values is None:
            return f"not applicable in {label}: {reading.not_applicable}"
    one, other = first.metrics[name], second.metrics[name]
    if name not in first.images and name not in second.images:
        return "" if one.dims == ("threshold",) else "it has no value of a single image, so nothing to pair"
    shapes = [f.images[name].shape[1:] if name in f.images else None for f in (first, second)]
    if one.dims != other.dims or shapes[0] != shapes[1]:
        sizes = [f"{label} has {_size(f, name)}" for f, label in zip((first, second), labels, strict=True)]
        return f"other shapes: {', '.join(sizes)}"
    return ""


def _size(findings: Findings, name: str) -> str:
    reading = findings.metrics[name]
    if name not in findings.images:
        return "no per-image values"
    return f"{findings.images[name].shape[1]} {'pairs' if _first_place(reading) else reading.dims[0] + 's'}"


def _first_place(reading: MetricResult) -> int:
    """1 for a block × block metric, whose per-image values are those of each block with the one before;
    else 0.
    """
    return int(len(reading.dims) == 2 and reading.dims[0] == reading.dims[1])


def _of_metric(name: str, first: Findings, second: Findings, seed: int) -> dict[str, Difference]:
    reading = first.metrics[name]
    one, other = (np.asarray(f.images[name], dtype=np.float64) for f in (first, second))
    start = _first_place(reading)
    axis, places = reading.dims[0], tuple(range(start, start + one.shape[1]))
    found = {name: _difference(axis, places, Sides(one, other), seed)}
    nulls = [f.images.get(name + NULL) for f in (first, second)]
    if nulls[0] is not None and nulls[1] is not None:
        sides = Sides(one, other, (np.asarray(nulls[0], dtype=np.float64), np.asarray(nulls[1], dtype=np.float64)))
        found[name + KAPPA] = _difference(axis, places, sides, seed)
    return found


def _difference(axis: str, places: tuple[int, ...], sides: Sides, seed: int) -> Difference:
    whole = compare_sides(replace(sides, pooled=True), seed=seed)
    return Difference(axis, places, compare_sides(sides, seed=seed), whole)


def _right(findings: Findings) -> Array | None:
    """Whether each image's top answer is its label, [images, 1] of 0 and 1; None where there is no answer
    or no label.
    """
    top1, label = findings.images.get(TOP1), findings.images.get(LABELS)
    if top1 is None or label is None:
        return None
    return np.asarray(top1 == label, dtype=np.float64)[:, None]


def top1_agreement(first: Findings, second: Findings) -> OutputAgreement:
    """How often the top answers agree, from what the findings hold (two that are `aligned`)."""
    one, other = (f.images.get(TOP1) for f in (first, second))
    if one is None or other is None:
        return OutputAgreement(reason="the findings hold no answers of the models")
    classes = [f.run.get("outputs", {}).get("classes") for f in (first, second)]
    if classes[0] != classes[1]:
        return OutputAgreement(reason=f"the models answer with {classes[0]} and {classes[1]} classes")
    return OutputAgreement(float(np.mean(one == other)), None, len(one), "the logits were not kept")


def with_weights(pair: Pair, first: Findings, second: Findings) -> Pair:
    """The pair with the differences of every weight metric that both findings hold: NAME/MATRIX, or NAME between blocks."""
    found: dict[str, Difference] = {}
    refused = dict(pair.not_comparable)
    for name, one in first.metrics.items():
        other = second.metrics.get(name)
        if other is None or one.values is None or other.values is None or one.description.level != "weights":
            continue
        if _shape(one) != _shape(other):
            shapes = ", ".join(f"{label} has {_words(r)}" for label, r in ((pair.first, one), (pair.second, other)))
            refused[name] = f"other shapes: {shapes}"
            continue
        refused.pop(name, None)
        found |= {f"{name}{part}": difference for part, difference in _differences(one, one.values, other.values)}
    return replace(pair, differences={**pair.differences, **found}, not_comparable=refused)


def _shape(reading: MetricResult) -> tuple[object, ...]:
    assert reading.values is not None
    return reading.dims, reading.values.shape, tuple(reading.details.get("matrices", ())) if "matrix" in reading.dims else ()


def _words(reading: MetricResult) -> str:
    assert reading.values is not None
    return " × ".join(f"{size} {dim}" for size, dim in zip(reading.values.shape, reading.dims, strict=True))


def _differences(reading: MetricResult, first: Array, second: Array) -> Iterator[tuple[str, Difference]]:
    if "matrix" not in reading.dims:
        yield "", _weight_difference(adjacent(first), adjacent(second), 1)
        return
    for at, matrix in enumerate(reading.details.get("matrices", range(first.shape[1]))):
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
