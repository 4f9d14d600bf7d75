"""What each mean of a summary is the mean of: numbers at pairs of blocks, blocks, heads, depths or matrices."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from collapse_probe.results.findings import MetricResult
from collapse_probe.results.readings import Summary, adjacent, mean
from collapse_probe.results.summary.thresholds import BOUNDS, METRIC_OF, POINTS
from collapse_probe.statistics.intervals import Array

Reader = Callable[[MetricResult], "Array | None"]


def _values(result: MetricResult) -> Array | None:
    return result.values


def _of_neighbours(result: MetricResult) -> Array:
    return adjacent(result, result.values)


def _null_of_neighbours(role: str) -> Reader:
    return lambda result: adjacent(result, None if result.nulls is None else result.nulls.values.get(role))


def _share(result: MetricResult) -> Array | None:
    return None if result.values is None else np.asarray(result.details["share"], dtype=np.float64)


def _last(result: MetricResult) -> Array | None:
    return None if result.values is None else result.values[-1:]


MEANS: Mapping[str, Reader] = {
    **{f"attention_similarity{point}_adjacent": _of_neighbours for point in POINTS},
    **{f"{role}{point}_adjacent": _null_of_neighbours(role) for role in ("other_token", "kappa") for point in POINTS},
    **{"attention_entropy_mean": _values, "attention_entropy_share": _share},
    **{"head_similarity_mean": _values, "image_similarity_mean": _values},
    **{"feature_similarity_adjacent": _of_neighbours, "patch_diversity_last": _last, "gram_drift_last": _last},
}
"""By the name of a mean, what reads its numbers off the result of its metric (`METRIC_OF`)."""


def means(results: Mapping[str, MetricResult], metric: str) -> Summary:
    """The means of the summary that are of one metric, where that was measured; None where nothing is defined."""
    if (result := results.get(metric)) is None:
        return {}
    return {name: mean(read(result)) for name, read in MEANS.items() if METRIC_OF[name] == metric}


def key_of_weights(name: str, result: MetricResult) -> str:
    """How the summary calls the mean of a metric of the weights, or that over neighbouring blocks."""
    return f"{name.replace('-', '_').replace('@', '_')}_{'adjacent' if _is_square(result) else 'mean'}"


def of_weights(result: MetricResult, values: Array | None) -> Array | None:
    """What the mean over the values of a metric of the weights, or of its untrained copy, is taken of."""
    return adjacent(result, values) if _is_square(result) else values


def _is_square(result: MetricResult) -> bool:
    return result.dims == ("block", "block")


@dataclass(frozen=True)
class Place:
    """Where a number is: its value, the block (the later of a pair), the head where there is one, and the place in words."""

    value: float
    block: int
    head: int | None = None
    words: str = ""


def extreme(results: Mapping[str, MetricResult], name: str, sign: str) -> Place | None:
    """Where the numbers behind a mean of the summary, or behind an end of its interval, are lowest (`sign` < or <=) or highest
    (> or >=); None for a number that is no mean over places, where none is defined, and for other signs.
    """
    base = next((name.removesuffix(end) for end in BOUNDS[1:] if name.endswith(end)), name)
    result, values = _behind(results, base)
    if result is None or values is None or not np.isfinite(values).any() or sign[0] not in "<>":
        return None
    at = np.unravel_index(np.nanargmin(values) if sign[0] == "<" else np.nanargmax(values), values.shape)
    place, value = [int(each) for each in at], float(values[at])
    block, dims = place[0], result.dims
    if dims in (("block", "block"), ("depth", "depth")):
        what = "block" if dims[0] == "block" else "depth"
        return Place(value, block + 1, words=f"between {what}s {block} and {block + 1}")
    if dims == ("depth",):  # the last one: the output of the last block
        last = len(result.array) - 1
        return Place(value, last - 1, words=f"after block {last - 1}")
    if dims == ("block", "head"):
        return Place(value, block, place[1], f"in block {block}, head {place[1]}")
    if dims == ("block", "matrix"):
        matrices = result.details.get("matrices", range(values.shape[1]))
        return Place(value, block, words=f"in block {block}, matrix {matrices[place[1]]}")
    return Place(value, block, words=f"in block {block}")


def _behind(results: Mapping[str, MetricResult], name: str) -> tuple[MetricResult | None, Array | None]:
    if name in MEANS:
        result = results.get(METRIC_OF[name])
        return result, None if result is None else MEANS[name](result)
    for metric, result in results.items():
        if result.description.level == "weights" and key_of_weights(metric, result) == name:
            return result, of_weights(result, result.values)
    return None, None
