"""The weights of two models beside each other, by block and matrix: plain differences, for nothing is sampled."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from collapse_probe.findings import Findings, Reading
from collapse_probe.paired import NO_INTERVAL, Paired
from collapse_probe.pairing import Difference, Pair
from collapse_probe.summary import adjacent
from collapse_probe.unasked import MEANS, MOST_LISTED, of_weights
from collapse_probe.words import number

Array = NDArray[np.float64]
NO_SAMPLE = "A model is no sample of weights: these differences have no interval and no p-value."


def with_weights(pair: Pair, first: Findings, second: Findings) -> Pair:
    """The pair with the differences of every weight metric that both findings hold: NAME/MATRIX, or NAME between blocks."""
    found: dict[str, Difference] = {}
    refused = dict(pair.not_comparable)
    for name, one in first.metrics.items():
        other = second.metrics.get(name)
        if other is None or one.values is None or other.values is None or not of_weights(name, one):
            continue
        if _shape(one) != _shape(other):
            shapes = ", ".join(f"{label} has {_words(r)}" for label, r in ((pair.first, one), (pair.second, other)))
            refused[name] = f"other shapes: {shapes}"
            continue
        refused.pop(name, None)
        found |= {f"{name}{part}": difference for part, difference in _differences(one, one.values, other.values)}
    return replace(pair, differences={**pair.differences, **found}, not_comparable=refused)


def _shape(reading: Reading) -> tuple[object, ...]:
    assert reading.values is not None
    return reading.dims, reading.values.shape, tuple(reading.settings.get("matrices", ())) if "matrix" in reading.dims else ()


def _words(reading: Reading) -> str:
    assert reading.values is not None
    return " × ".join(f"{size} {dim}" for size, dim in zip(reading.values.shape, reading.dims, strict=True))


def _differences(reading: Reading, first: Array, second: Array) -> Iterator[tuple[str, Difference]]:
    if "matrix" not in reading.dims:
        yield "", _difference(adjacent(first), adjacent(second), 1)
        return
    for at, matrix in enumerate(reading.settings.get("matrices", range(first.shape[1]))):
        if np.isfinite(first[:, at]).any() or np.isfinite(second[:, at]).any():
            yield f"/{matrix}", _difference(first[:, at], second[:, at], 0)


def _difference(first: Array, second: Array, start: int) -> Difference:
    both = np.isfinite(first) & np.isfinite(second)
    means = [np.array([side[both].mean() if both.any() else np.nan]) for side in (first, second)]
    return Difference("block", tuple(range(start, start + len(first))), _unsampled(first, second), _unsampled(*means))


def _unsampled(first: Array, second: Array) -> Paired:
    """Two sides without images: a difference, and neither an interval nor a test, also where the sides are equal."""
    count, untested = np.zeros(len(first), dtype=np.int64), np.full(len(first), np.nan)
    ends, kinds = np.full((len(first), 2), np.nan), (NO_INTERVAL,) * len(first)
    return Paired(first, second, second - first, ends, kinds, untested, untested, untested, count, count)


def unsampled(difference: Difference) -> bool:
    """Whether a difference is one of two models' weights: no image entered it, and none was left out."""
    return not (difference.paired.images.any() or difference.paired.left_out.any())


def equal(difference: Difference) -> bool:
    """Whether both sides are the same at every place; those undefined in both count as the same."""
    return np.array_equal(difference.paired.first, difference.paired.second, equal_nan=True)


def contrasted(pair: Pair, first: Findings, second: Findings) -> tuple[str, ...]:
    """The sentences about two models of which the weights alone were measured."""
    every = {name: _parts(pair, name) for name in first.metrics if name in second.metrics}
    held = {name: parts for name, parts in every.items() if parts}
    who = f"{pair.first} and {pair.second}"
    if not held:
        why = "; ".join(f"{name}: {reason}" for name, reason in pair.not_comparable.items())
        return (f"The weights of {who} cannot be set against each other block by block ({why or 'nothing was measured'}).",)
    if all((np.nan_to_num(part.paired.difference) == 0).all() for parts in held.values() for part in parts.values()):
        return (f"No number of the weights differs between {who}: {', '.join(held)}.",)
    chosen = [name for name in MEANS if name in held] or list(held)[:MOST_LISTED]
    told = "; ".join(_told(name, held[name]) for name in chosen)
    return (f"The weights of {pair.second} against those of {pair.first}, mean over blocks and matrices: {told}.",)


def _parts(pair: Pair, name: str) -> dict[str, Difference]:
    parts = {key: d for key, d in pair.differences.items() if key == name or key.startswith(f"{name}/")}
    return {key: part for key, part in parts.items() if np.isfinite(part.paired.difference).any()}


def _told(name: str, parts: Mapping[str, Difference]) -> str:
    first, second = (np.nanmean([getattr(part.overall, side)[0] for part in parts.values()]) for side in ("first", "second"))
    key, part = max(parts.items(), key=lambda item: float(np.nanmax(np.abs(item[1].paired.difference))))
    at = int(np.nanargmax(np.abs(part.paired.difference)))
    matrix = key.removeprefix(name).removeprefix("/")
    where = f"{f'{matrix} of ' if matrix else ''}block {part.places[at]}"
    ends = f"{number(part.paired.second[at])} against {number(part.paired.first[at])}"
    return f"{name} {number(second)} against {number(first)} (most apart: {where}, {ends})"
