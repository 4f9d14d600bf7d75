"""The few numbers that stand for a run: what `summary` holds and `--fail-on` reads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from collapse_probe.results.findings import MetricResult
from collapse_probe.results.readings import Summary, adjacent, mean
from collapse_probe.results.rules import RAW_ABOVE
from collapse_probe.statistics.breakdowns import classes_of, convergence_of, extremes_of
from collapse_probe.statistics.estimates import PerImageValues
from collapse_probe.statistics.intervals import Array
from collapse_probe.statistics.paired import controlled
from collapse_probe.statistics.permutation import ASSUMPTION, LEVEL, NULL, ROUNDING, SignFlips, above_rounding, sign_flips


def pair_tests(table: Mapping[str, NDArray[Any]], results: Mapping[str, MetricResult], seed: int = 0) -> dict[str, Any]:
    """The tests of every block × block similarity whose single images were kept with their null, as plain data by metric.

    Adjacent pairs by `sign_flips`; all pairs by the paired t test of the run's sums. `q` is p with the false discovery rate
    controlled (Benjamini–Hochberg) over the pairs of the metric. A difference within rounding has p = 1 (`above_rounding`).
    """
    differences = {
        name: np.asarray(values - table[name + NULL], dtype=np.float64)
        for name, values in table.items()
        if name + NULL in table and np.isfinite(values).any()
    }
    if not differences:
        return {}
    flips, tests, first = sign_flips(np.concatenate([*differences.values()], axis=1), seed=seed), {}, 0
    for name, each in differences.items():
        part = slice(first, first + each.shape[1])
        first = part.stop
        tests[name] = _adjacent_pairs(each, replace(flips, p=flips.p[part], smallest=flips.smallest[part]))
        if name in results:
            tests[name]["all_pairs"] = _all_pairs(results[name])
    return tests


def _adjacent_pairs(differences: Array, flips: SignFlips) -> dict[str, Any]:
    """One metric's test of adjacent pairs, with what its images could have shown at most."""
    known = np.isfinite(differences)
    means = np.where(known, differences, 0.0).sum(0) / known.sum(0).clip(1)
    flips, images = replace(flips, p=above_rounding(flips.p, means)), int(known.any(1).sum())
    q, rounded = controlled(flips.p), int((np.isfinite(flips.p) & (np.abs(means) <= ROUNDING)).sum())
    smallest = float(np.nanmin(flips.smallest, initial=1.0))
    significant, tested = int((q <= LEVEL).sum()), int(np.isfinite(flips.p).sum())
    sentence = f"{significant} of {tested} neighbouring pairs are more alike than with the wrong tokens (FDR {LEVEL:g})."
    if rounded:
        sentence += f" In {rounded} the difference is within the rounding of float32 ({ROUNDING:g}): none is found there."
    if smallest > LEVEL:
        sentence = f"Too few images to tell: with {images} the smallest p-value is {smallest:.2g}, above {LEVEL:g}."
    return {
        "null": "other_token",
        "alternative": "real > other_token",
        "test": "sign-flip permutation over images, one-sided" + (", exact" if flips.exact else ", Monte Carlo"),
        "permutations": flips.permutations,
        "exact": flips.exact,
        "images": images,
        "pairs": [[block, block - 1] for block in range(1, differences.shape[1] + 1)],
        "p": flips.p,
        "q": q,
        "level": LEVEL,
        "significant": significant,
        "tested": tested,
        "rounding": ROUNDING,
        "within_rounding": rounded,
        "smallest_p": smallest,
        "enough_images": smallest <= LEVEL,
        "assumption": ASSUMPTION,
        "sentence": sentence,
    }


def _all_pairs(result: MetricResult) -> dict[str, Any] | None:
    """p and q [blocks, blocks] of the paired t test of every pair of different blocks; None where the sums were not kept."""
    if result.nulls is None or result.nulls.beyond_p is None:
        return None
    token = result.nulls.values["other_token"]
    p = above_rounding(result.nulls.beyond_p, result.array - (np.nan if token is None else token))
    np.fill_diagonal(p, np.nan)
    q, (rows, columns) = np.full(p.shape, np.nan), np.tril_indices(len(p), -1)
    q[rows, columns] = q[columns, rows] = controlled(p[rows, columns])
    below = q[rows, columns]
    return {
        "test": "paired t over images, one-sided",
        "p": p,
        "q": q,
        "significant": int((below <= LEVEL).sum()),
        "tested": int(np.isfinite(below).sum()),
    }


def summarise(results: Mapping[str, MetricResult], values: PerImageValues) -> Summary:
    """Flat names and numbers of all metrics; None where one was not measured or is undefined."""
    summary: Summary = {"images": len(values)}
    for variant in ("", "@row", "@centred", "@probs"):
        if result := results.get(f"attention-similarity{variant}"):
            nulls, key = {} if result.nulls is None else result.nulls.values, variant.replace("@", "_")
            summary[f"attention_similarity{key}_adjacent"] = mean(adjacent(result, result.values))
            summary[f"other_token{key}_adjacent"] = mean(adjacent(result, nulls.get("other_token")))
            summary[f"kappa{key}_adjacent"] = mean(adjacent(result, nulls.get("kappa")))
    for variant in ("", "@probs"):
        if result := results.get(f"similar-blocks{variant}"):
            summary |= _counts(result, f"similar_blocks{variant.replace('@', '_')}")
    if result := results.get("attention-entropy"):
        share = None if result.values is None else np.asarray(result.details["share"], dtype=np.float64)
        summary |= {"attention_entropy_mean": mean(result.values), "attention_entropy_share": mean(share)}
    for name, key in (
        ("head-similarity", "head_similarity_mean"),
        ("image-similarity", "image_similarity_mean"),
        ("feature-similarity", "feature_similarity_adjacent"),
    ):
        if result := results.get(name):
            summary[key] = mean(adjacent(result, result.values) if key.endswith("adjacent") else result.values)
    if result := results.get("patch-diversity"):
        summary["patch_diversity_last"] = None if result.values is None else mean(result.values[-1:])
    of_weights = {name: result for name, result in results.items() if result.description.level == "weights"}
    return summary | summarise_weights(of_weights) | headline_bounds(values)


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
    }


def summarise_weights(results: Mapping[str, MetricResult]) -> Summary:
    """The mean of each weight metric over what is defined, and that of its untrained twin.

    Keys are the metric's name with underscores and `_mean`, or `_adjacent` for the mean over neighbouring blocks.
    """
    summary: Summary = {}
    for name, result in results.items():
        across = result.dims == ("block", "block")
        key = f"{name.replace('-', '_').replace('@', '_')}_{'adjacent' if across else 'mean'}"
        fresh = None if result.nulls is None else result.nulls.values.get("untrained")
        summary[key] = mean(adjacent(result, result.values) if across else result.values)
        if fresh is not None:
            summary[f"{key}_untrained"] = mean(adjacent(result, fresh) if across else fresh)
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
    table: Mapping[str, NDArray[Any]],
    results: Mapping[str, MetricResult],
    labels: Mapping[str, int] | None = None,
    class_names: Sequence[str] = (),
    seed: int = 0,
) -> dict[str, dict[str, Any]]:
    """`tests`, `convergence`, `extremes` and `classes` of a run by name, as plain data; each empty where nothing can be said.

    `table` is the content of images.npz, `values` what the headline numbers need of it, `labels` the class of each image by
    its name. See `pair_tests`, `convergence_of`, `extremes_of` and `classes_of` for what each holds.
    """
    return {
        "tests": pair_tests(table, results, seed),
        "convergence": convergence_of(values, RAW_ABOVE, seed),
        "extremes": extremes_of(values),
        "classes": classes_of(values, labels, class_names),
    }
