"""What rules, figures and tables read off findings: results, nulls, neighbouring blocks, shares of log N."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from collapse_probe.results.findings import Findings, MetricResult
from collapse_probe.results.rules import COUNT_THRESHOLDS, KAPPA_ABOVE, RAW_ABOVE
from collapse_probe.results.text import number, spans
from collapse_probe.statistics.intervals import Array

Summary = dict[str, "float | int | None"]
RANDOM, IN_PART = "random", "in part, over "
"""How the weights of a model are described that are random, and those of a checkpoint that was loaded over others."""
NULLS = ("other_token", "other_image", "other_head", "other_key", "untrained")


class Absent(Exception):
    """A number is not in the findings; the text says why."""


def is_untrained(model: Mapping[str, Any]) -> bool:
    """Whether the weights of a model's blocks are random ones, by the facts of findings or interventions about it."""
    weights, _, rest = str(model.get("weights") or "").partition(IN_PART)
    elsewhere = len(model.get("blocks_not_loaded") or ()) == model.get("blocks")
    return weights.startswith(RANDOM) or (elsewhere and rest.startswith(RANDOM))


def not_loaded(model: Mapping[str, Any]) -> str:
    """What the blocks hold whose weights a checkpoint lacks, in a sentence without its full stop; empty where it lacks none."""
    blocks, total, loaded = model.get("blocks_not_loaded") or [], model.get("blocks"), model.get("loaded") or {}
    if not blocks:
        return ""
    rest = str(model.get("weights")).partition(IN_PART)[2]
    what = "random parameters" if rest.startswith(RANDOM) else f"weights that are not the checkpoint's ({rest})"
    one = len(blocks) == 1
    where = f"All {total} blocks hold" if len(blocks) == total else f"{len(blocks)} of {total} blocks hold{'s' if one else ''}"
    which = "" if len(blocks) == total else f" (block{'' if one else 's'} {spans(list(blocks))})"
    came = f"{loaded.get('tensors')} of {loaded.get('of')} tensors"
    return f"{where} {what}{which}: the checkpoint was loaded in part, {came} of the model came from it"


def partial_sentence(data: Mapping[str, Any]) -> str:
    """That the numbers are of a part of the data, and of how much; empty where they are of all."""
    if not (part := data.get("partial")):
        return ""
    share = "" if part["of"] is None else f" of {part['of']:,} ({100 * part['read'] / part['of']:.3g} %)"
    return f"Partial: {part['read']:,}{share} images of the data were read, and every number is of these alone: {part['why']}."


TRAINED_ON = "The model was trained on"


def trained_on(data: Mapping[str, Any]) -> str:
    """How many of the images of a run its model was trained on, in a sentence; empty where that is not known."""
    count, images = data.get("trained_on"), data.get("images")
    if count is None:
        return ""
    if images == 1:
        return f"{TRAINED_ON} this image." if count else "The image was not trained on: it was held out."
    if not count:
        return f"None of these {images:,} images was trained on: they were held out."
    return f"{TRAINED_ON} {count:,} of these {images:,} images: numbers and accuracy are not those of unseen images."


def weights_only(findings: Findings) -> bool:
    """Whether all that was measured is about the weights, without images."""
    return bool(findings.metrics) and all(r.description.level == "weights" for r in findings.metrics.values())


def result_of(findings: Findings, name: str) -> MetricResult | None:
    """The result of metric `name` where it is there and has values."""
    result = findings.metrics.get(name)
    return None if result is None or result.values is None else result


def phase_starts(findings: Findings) -> tuple[int, ...]:
    """The blocks with which a phase of depth begins, but the first; empty where phases were not measured, or there is one."""
    result = result_of(findings, "depth-phases")
    groups = {} if result is None else result.details.get("groups", {})
    return tuple(sorted(int(blocks[0]) for blocks in groups.values()))[1:]


def require_result(findings: Findings, name: str) -> MetricResult:
    """The result of metric `name`, which has values; raises Absent."""
    if name not in findings.metrics:
        raise Absent(f"{name} was not measured in this run")
    if (result := result_of(findings, name)) is None:
        raise Absent(f"{name} does not apply here: {findings.metrics[name].not_applicable or 'it has no values'}")
    return result


def null_of(result: MetricResult, role: str) -> Array | None:
    """One of NULLS, or "kappa"; None where it was not taken or is defined nowhere."""
    values = None if result.nulls is None else result.nulls.values.get(role)
    return values if values is not None and np.isfinite(values).any() else None


def require_null(result: MetricResult, name: str, role: str) -> Array:
    """One null (or kappa) of metric `name`; raises Absent."""
    if (values := null_of(result, role)) is None:
        reasons = {} if result.nulls is None else result.nulls.reasons
        what = {"untrained": "the untrained copy", "kappa": "kappa"}.get(role, f"the {role.replace('_', '-')} null")
        raise Absent(f"{what} of {name} was not measured: {reasons.get(role, 'it is defined nowhere')}")
    return values


def null_ci95(result: MetricResult, role: str) -> Array | None:
    """The 95 % interval [..., 2] of a null or of kappa; None where it has none, as in findings stored before it was kept."""
    if result.nulls is None:
        return None
    if role == "kappa":
        return result.nulls.kappa_ci95
    stored = result.nulls.ci95.get(role)
    return None if stored is None else np.array(stored, dtype=np.float64)


def nulls_of(result: MetricResult) -> dict[str, Array]:
    """The nulls that hold any defined value, without kappa."""
    return {role: values for role in NULLS if (values := null_of(result, role)) is not None}


def adjacent(result: MetricResult, matrix: Array | Sequence[Any] | None) -> Array:
    """The entries (b, b − 1) of a block × block array (or lists) of a result, [L, L, …] -> [L − 1, …]: NaN where the two are
    no neighbours in depth; empty for None.
    """
    if matrix is None:
        return np.empty(0)
    whole, later = np.asarray(matrix, dtype=np.float64), np.arange(1, len(matrix))
    return of_neighbours(result, whole[later, later - 1])


def of_neighbours(result: MetricResult, values: Array) -> Array:
    """Numbers of each block with the block before, [L − 1, …], NaN where the two are no neighbours in depth."""
    return np.where(np.reshape(result.adjacent, (-1, *(1,) * (values.ndim - 1))), values, np.nan) if result.adjacent else values


def mean(values: Array | None) -> float | None:
    """The mean of what is defined; None where nothing is."""
    if values is None:
        return None
    defined = values[np.isfinite(values)]
    return float(defined.mean()) if defined.size else None


def over_heads(values: Array) -> Array:
    """Mean over the heads that are defined, [L, H] -> [L]."""
    counts = np.isfinite(values).sum(1)
    return np.where(counts > 0, np.nansum(values, axis=1) / np.maximum(counts, 1), np.nan)


def pair_count(findings: Findings, name: str = "similar-blocks") -> int:
    """How many pairs of adjacent blocks were compared."""
    result = result_of(findings, name)
    stored = None if result is None else result.details.get("pairs")
    return int(stored or max(int(findings.model.get("blocks") or 0) - 1, 1))


@dataclass(frozen=True)
class Count:
    """How many adjacent pairs are above the threshold `above`, with an interval [2], and the untrained copy's count."""

    value: float
    above: float
    ci95: Array | None = None
    untrained: float | None = None


def corrected_count(findings: Findings, name: str = "similar-blocks") -> Count | None:
    """The κ count of similar blocks, from the metric's details or (the plain one) else from the summary."""
    result = result_of(findings, name)
    stored = {} if result is None else result.details.get("corrected", {})
    value = stored.get("value")
    if value is None and name == "similar-blocks":
        value = findings.summary.get("similar_blocks_corrected")
    if value is None:
        return None
    ends = np.asarray(stored.get("ci95") or (), dtype=np.float64)
    ci95 = ends if len(ends) and np.isfinite(ends).all() else None
    return Count(float(value), float(stored.get("kappa_above", KAPPA_ABOVE)), ci95)


def counts_of(findings: Findings, name: str = "similar-blocks") -> dict[str, Count]:
    """The counts of similar blocks by threshold: `raw > 0.9`, …, `κ > 0.5`; empty where they were not measured."""
    if (result := result_of(findings, name)) is None:
        return {}
    fresh, counts = null_of(result, "untrained"), {}
    for at, above in enumerate(result.settings.get("thresholds", COUNT_THRESHOLDS)):
        ci95, twin = None if result.ci95 is None else result.ci95[at], None if fresh is None else float(fresh[at])
        counts[f"raw > {float(above):g}"] = Count(float(result.array[at]), float(above), ci95, twin)
    corrected = corrected_count(findings, name)
    return counts if corrected is None else {**counts, f"κ > {corrected.above:g}": corrected}


@dataclass(frozen=True)
class Entropy:
    """Attention entropy as a share of log N: 1 is uniform, 0 is one key; `keys` [L] is N.

    `heads` [L, H], `mean` over heads [L], its `ci95` [L, 2], and the untrained copy's mean [L].
    """

    keys: Array
    heads: Array
    mean: Array
    ci95: Array | None
    untrained: Array | None

    @property
    def unit(self) -> str:
        """What 1 stands for: log 50, or log N where blocks differ."""
        sizes = set(self.keys[np.isfinite(self.mean)].tolist())
        return f"log {sizes.pop():.0f}" if len(sizes) == 1 else "log N"


def entropy_share(findings: Findings) -> Entropy | None:
    """Attention entropy in shares of log N; None where it was not measured."""
    result = result_of(findings, "attention-entropy")
    if result is None or "tokens" not in result.details:
        return None
    keys = np.broadcast_to(np.asarray(result.details["tokens"], dtype=np.float64), len(result.array))
    scale = np.where(keys > 1, np.log(np.maximum(keys, 2)), np.nan)[:, None]
    fresh = null_of(result, "untrained")
    average, ci95 = over_heads(result.array), None
    if result.head_mean is not None:
        average, ci95 = result.head_mean[0], result.head_mean[2] / scale
    untrained = None if fresh is None else over_heads(fresh / scale)
    return Entropy(keys, result.array / scale, average / scale[:, 0], ci95, untrained)


def untrained_summary(findings: Findings) -> Summary:
    """The numbers of the summary that the untrained copy has too."""
    numbers: dict[str, float | None] = {}
    for name, metric in (("attention_similarity", "attention-similarity"), ("feature_similarity", "feature-similarity")):
        if (result := result_of(findings, metric)) is not None:
            numbers[f"{name}_adjacent"] = mean(adjacent(result, null_of(result, "untrained")))
    for name in ("head-similarity", "image-similarity"):
        if (result := result_of(findings, name)) is not None:
            numbers[f"{name.replace('-', '_')}_mean"] = mean(null_of(result, "untrained"))
    if (diversity := result_of(findings, "patch-diversity")) is not None:
        fresh = null_of(diversity, "untrained")
        numbers["patch_diversity_last"] = None if fresh is None else mean(fresh[-1:])
    if (share := entropy_share(findings)) is not None:
        numbers["attention_entropy_share"] = mean(share.untrained)
    if (count := counts_of(findings).get(f"raw > {RAW_ABOVE:g}")) is not None:
        numbers["similar_blocks"] = count.untrained
    return {name: value for name, value in numbers.items() if value is not None}


def against_seeds(result: MetricResult) -> str:
    """Whether a block × block similarity is beyond what untrained copies of several seeds span; empty with one seed."""
    spread = {} if result.nulls is None else result.nulls.untrained_seeds
    if not spread or result.values is None:
        return ""
    real, low, high = (mean(adjacent(result, part)) for part in (result.values, spread["low"], spread["high"]))
    if real is None or low is None or high is None:
        return ""
    where = "above" if real > high else "below" if real < low else "within"
    return (
        f"neighbouring blocks of the model are alike at {number(real)}, {where} what {len(spread['seeds'])} untrained copies "
        f"of different seeds span ({number(low)} to {number(high)}, mean of the lowest and of the highest of each pair)"
    )
