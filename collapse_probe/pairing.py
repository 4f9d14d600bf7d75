"""Two findings on the same images become pairs of numbers, image by image; other images are refused."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from collapse_probe.counting import KAPPA, NULL, CountDifference, count_differences
from collapse_probe.errors import DataError
from collapse_probe.findings import Findings, Reading
from collapse_probe.paired import Paired, Sides, compare_sides

Array = NDArray[np.float64]

PROBS = "@probs"
TOP1, LABELS = "top1", "label"
ACCURACY = "accuracy"


@dataclass(frozen=True)
class Difference:
    """One quantity of two subjects over `places` (block b, for a pair of blocks the later one), and their
    mean as `overall`.
    """

    axis: str
    places: tuple[int, ...]
    paired: Paired
    overall: Paired


@dataclass(frozen=True)
class Agreement:
    """How often two subjects give the same top answer, and the mean KL divergence from the first to the
    second in nats.

    None where it was not to be had; `reason` says why.
    """

    top1: float | None = None
    kl: float | None = None
    images: int = 0
    reason: str = ""


@dataclass(frozen=True)
class Pair:
    """The subject called `second` against `first`, on `images` images in common order.

    `differences` holds metrics by name, `NAME/kappa` for the corrected similarity, and `accuracy`;
    `not_comparable` what one of the two lacks or has in another shape, with the reason.
    """

    first: str
    second: str
    images: int
    differences: Mapping[str, Difference]
    counts: tuple[CountDifference, ...]
    not_comparable: Mapping[str, str]
    agreement: Agreement


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


def _first_place(reading: Reading) -> int:
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


def top1_agreement(first: Findings, second: Findings) -> Agreement:
    """How often the top answers agree, from what the findings hold (two that are `aligned`)."""
    one, other = (f.images.get(TOP1) for f in (first, second))
    if one is None or other is None:
        return Agreement(reason="the findings hold no answers of the models")
    classes = [f.run.get("outputs", {}).get("classes") for f in (first, second)]
    if classes[0] != classes[1]:
        return Agreement(reason=f"the models answer with {classes[0]} and {classes[1]} classes")
    return Agreement(float(np.mean(one == other)), None, len(one), "the logits were not kept")
