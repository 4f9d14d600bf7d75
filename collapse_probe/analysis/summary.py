"""The few numbers that stand for a run: what `summary` holds and `--fail-on` reads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from collapse_probe.analysis.state.gallery import Pixels
from collapse_probe.analysis.state.tally import Tally
from collapse_probe.results.findings import MetricResult
from collapse_probe.results.readings import Summary, adjacent, mean
from collapse_probe.results.rules import RAW_ABOVE
from collapse_probe.results.summary.places import key_of_weights, means, of_weights
from collapse_probe.statistics.breakdowns import COUNT, classes_of, convergence_of, extremes_of, pictured
from collapse_probe.statistics.estimates import HEADLINES, PerImageValues
from collapse_probe.statistics.pair_tests import ROUNDING, above_rounding, all_pairs_test, neighbours_test

COUNTED = (COUNT, f"{COUNT}_ci_low", f"{COUNT}_ci_high")
"""The number of similar blocks and its interval."""


def pair_tests(results: Mapping[str, MetricResult]) -> dict[str, Any]:
    """The tests of every block × block similarity whose null was measured with it, as plain data by metric.

    Adjacent pairs, beside those of the untrained copies, and all pairs; see `statistics.pair_tests`. A difference within
    rounding has p = 1 (`above_rounding`).
    """
    tests: dict[str, Any] = {}
    for name, result in results.items():
        nulls = result.nulls
        if nulls is None or nulls.beyond_p is None or (token := nulls.values["other_token"]) is None:
            continue
        if result.array.ndim < 2:  # of each block with the one before alone
            continue
        difference, images = result.array - token, nulls.images["other_token"]
        p = above_rounding(nulls.beyond_p, difference)
        neighbours, twins = adjacent(result, p), nulls.untrained_beyond_p
        if not np.isfinite(neighbours).any():
            continue
        rounded = int((np.isfinite(neighbours) & (np.abs(adjacent(result, difference)) <= ROUNDING)).sum())
        untrained = None if twins is None else np.stack([adjacent(result, each) for each in twins])
        tests[name] = neighbours_test(neighbours, rounded, images, untrained, nulls.images.get("untrained", 0))
        tests[name]["all_pairs"] = all_pairs_test(p, images)
    return tests


def summarise(results: Mapping[str, MetricResult], values: PerImageValues) -> Summary:
    """Flat names and numbers of all metrics; None where one was not measured or is undefined."""
    return {"images": values.total} | measured(results) | headline_bounds(values)


def exact_numbers(results: Mapping[str, MetricResult]) -> Summary:
    """What `PerImageValues.exact` takes where single images of a sample alone are kept: headline numbers over all images."""
    return {name: value for name, value in measured(results).items() if name in HEADLINES or name in COUNTED}


def measured(results: Mapping[str, MetricResult]) -> Summary:
    """The numbers of a summary that come from the results alone."""
    summary: Summary = {}
    for variant in ("", "@row", "@centred", "@probs"):
        summary |= means(results, f"attention-similarity{variant}")
    for variant in ("", "@probs"):
        if result := results.get(f"similar-blocks{variant}"):
            summary |= _counts(result, f"similar_blocks{variant.replace('@', '_')}")
    for name in ("attention-entropy", "head-similarity", "image-similarity", "feature-similarity", "patch-diversity"):
        summary |= means(results, name)
    weights = {name: result for name, result in results.items() if result.description.level == "weights"}
    return summary | summarise_weights(weights)


def _counts(result: MetricResult, key: str) -> Summary:
    """The count of similar blocks with its interval, and the corrected one."""
    if result.values is None or result.ci95 is None:
        return {key: None, f"{key}_corrected": None}
    at = list(result.settings["thresholds"]).index(RAW_ABOVE)
    low, high = (float(end) if np.isfinite(end) else None for end in result.ci95[at])
    return {
        key: int(result.values[at]),
        f"{key}_ci_low": low,
        f"{key}_ci_high": high,
        f"{key}_corrected": int(result.details["corrected"]["value"]),
        f"{key}_pairs": int(result.details["pairs"]),
    }


def summarise_weights(results: Mapping[str, MetricResult]) -> Summary:
    """The mean of each weight metric over what is defined, and that of its untrained copy.

    Keys are the metric's name with underscores and `_mean`, or `_adjacent` for the mean over neighbouring blocks.
    """
    summary: Summary = {}
    for name, result in results.items():
        key, fresh = key_of_weights(name, result), None if result.nulls is None else result.nulls.values.get("untrained")
        summary[key] = mean(of_weights(result, result.values))
        if fresh is not None:
            summary[f"{key}_untrained"] = mean(of_weights(result, fresh))
    return summary


def headline_bounds(values: PerImageValues) -> Summary:
    """The ends of the headline means' 95 % intervals, for the summary: NAME_ci_low and NAME_ci_high; None with one image."""
    return {
        f"{name}_ci_{end}": value if np.isfinite(value) else None
        for name, estimate in values.estimates().items()
        for end, value in zip(("low", "high"), estimate.ci95, strict=True)
    }


def sureness(
    values: PerImageValues,
    results: Mapping[str, MetricResult],
    labels: Mapping[str, int] | None = None,
    class_names: Sequence[str] = (),
    seed: int = 0,
) -> dict[str, dict[str, Any]]:
    """`tests`, `convergence`, `extremes` and `classes` of a run by name, as plain data; each empty where nothing can be said.

    `values` is what the headline numbers need of the single images, `labels` the class of each image by its name.
    See `pair_tests`, `convergence_of`, `extremes_of` and `classes_of` for what each holds.
    """
    return {
        "tests": pair_tests(results),
        "convergence": convergence_of(values, RAW_ABOVE, seed),
        "extremes": extremes_of(values),
        "classes": classes_of(values, labels, class_names),
    }


def with_ends(extremes: dict[str, Any], tally: Tally) -> dict[str, Any]:
    """What `extremes_of` gave for a sample of the images, with the ends over all of them."""
    if not tally.records.sampled or not extremes:
        return extremes
    numbers = dict(extremes["numbers"])
    for name in numbers:
        ends = tally.ends.get(name)
        if ends is not None:
            sides = {"highest": ends.highest, "lowest": ends.lowest}
            each = {side: [{"name": end.name, "value": end.value} for end in some] for side, some in sides.items()}
            numbers[name] = {**numbers[name], **each}
    return {**extremes, "numbers": numbers}


def thumbnails_of(extremes: Mapping[str, Any], tally: Tally) -> dict[str, Pixels]:
    """The pictures of the images at both ends of the number that the report shows, by name."""
    ends = pictured(extremes)
    if ends is None or ends[0] not in tally.ends:
        return {}
    known = tally.ends[ends[0]]
    pictures = {end.name: end.picture for end in (*known.highest, *known.lowest)}
    names = [str(image["name"]) for side in ("highest", "lowest") for image in ends[1][side]]
    return {name: pictures[name] for name in names if name in pictures}
