"""The numbers that matter most in findings, each with what it would be by chance and in an untrained copy."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from collapse_probe.results.findings import Findings, MetricResult
from collapse_probe.results.readings import (
    adjacent,
    corrected_count,
    entropy_share,
    mean,
    null_of,
    pair_count,
    result_of,
)
from collapse_probe.results.text import interval, number
from collapse_probe.statistics.intervals import Array

MOST = 6
Ends = tuple[float, float] | None


@dataclass(frozen=True)
class Headline:
    """One number: its value with the 95 % interval over images, and beside it chance level and untrained copy.

    `unit` says of what it is, `along` holds it block by block (pairs of blocks by the later one, from 1), on the scale from
    `low` to `high`. What is undefined or was not measured is None, or NaN in `along`.
    """

    name: str
    value: float | None
    unit: str = ""
    ci95: Ends = None
    chance: float | None = None
    untrained: float | None = None
    along: tuple[float, ...] = ()
    first: int = 0
    low: float = 0.0
    high: float = 1.0
    digits: int = 3

    @property
    def written(self) -> str:
        """The value and its unit."""
        return f"{number(self.value, self.digits)} {self.unit}".strip()

    @property
    def interval(self) -> str:
        """The 95 % interval, or nothing."""
        return "" if self.ci95 is None else interval(self.ci95, self.digits)

    @property
    def beside(self) -> str:
        """Chance level and untrained copy, as far as there are any."""
        parts = {"chance level": self.chance, "untrained copy": self.untrained}
        return ", ".join(f"{name} {number(value, self.digits)}" for name, value in parts.items() if value is not None)


def headlines(findings: Findings) -> list[Headline]:
    """The numbers that matter of these findings, at most MOST; of the weights alone their means."""
    makers: tuple[Callable[[Findings], Headline | None], ...] = (
        kappa_of_pairs,
        raw_of_pairs,
        similar_pairs,
        entropy,
        across_images,
        diversity,
    )
    made = [each for each in (make(findings) for make in makers) if each is not None]
    return made or of_summary(findings)


def kappa_of_pairs(findings: Findings) -> Headline | None:
    """κ of adjacent pairs of blocks; its chance level is 0 by definition."""
    result = result_of(findings, "attention-similarity")
    if result is None or (values := null_of(result, "kappa")) is None:
        return None
    fresh = None if result.nulls is None else result.nulls.untrained_beyond.get("other_token")
    pairs = adjacent(result, values)
    return Headline(
        "κ of adjacent pairs",
        mean(pairs),
        ci95=_ends(findings, "kappa_adjacent"),
        chance=0.0,
        untrained=mean(adjacent(result, fresh)),
        along=_along(pairs),
        first=1,
    )


def raw_of_pairs(findings: Findings) -> Headline | None:
    """Raw similarity of adjacent pairs of blocks."""
    if (result := result_of(findings, "attention-similarity")) is None or len(result.array) < 2:
        return None
    pairs = adjacent(result, result.values)
    return Headline(
        "raw similarity",
        mean(pairs),
        ci95=_ends(findings, "attention_similarity_adjacent"),
        chance=mean(adjacent(result, null_of(result, "other_token"))),
        untrained=mean(adjacent(result, null_of(result, "untrained"))),
        along=_along(pairs),
        first=1,
    )


def similar_pairs(findings: Findings) -> Headline | None:
    """How many adjacent pairs agree beyond chance in more than half of what is possible."""
    if (count := corrected_count(findings)) is None:
        return None
    ends = None if count.ci95 is None else (float(count.ci95[0]), float(count.ci95[1]))
    result, fresh = result_of(findings, "attention-similarity"), None
    if result is not None and result.nulls is not None:
        beyond = adjacent(result, result.nulls.untrained_beyond.get("other_token"))
        fresh = float((beyond > count.above).sum()) if np.isfinite(beyond).any() else None
    name, pairs = f"similar blocks, κ > {count.above:g}", f"of {pair_count(findings)} pairs"
    return Headline(name, count.value, pairs, ci95=ends, untrained=fresh, digits=0)


def entropy(findings: Findings) -> Headline | None:
    """Attention entropy as a share of that of uniform attention."""
    if (share := entropy_share(findings)) is None:
        return None
    return Headline(
        "attention entropy",
        mean(share.mean),
        f"of {share.unit}",
        untrained=mean(share.untrained),
        along=_along(share.mean),
    )


def across_images(findings: Findings) -> Headline | None:
    """How alike the maps of a block are for different images."""
    if (result := result_of(findings, "image-similarity")) is None:
        return None
    return _of_blocks("image similarity", result)


def diversity(findings: Findings) -> Headline | None:
    """Patch diversity after the last block."""
    result = result_of(findings, "patch-diversity")
    if result is None or not len(result.array):
        return None
    fresh = null_of(result, "untrained")
    return Headline(
        "patch diversity, last",
        mean(result.array[-1:]),
        ci95=_ends(findings, "patch_diversity_last"),
        untrained=None if fresh is None else mean(fresh[-1:]),
        along=_along(result.array),
    )


def of_summary(findings: Findings) -> list[Headline]:
    """The first numbers of the summary, for findings without any of the above."""
    own, ends = findings.summary, ("_untrained", "_ci_low", "_ci_high")
    names = [name for name in own if name != "images" and not name.endswith(ends)]
    made = [
        Headline(name.replace("_", " "), own[name], ci95=_ends(findings, name), untrained=own.get(f"{name}_untrained"))
        for name in names[:MOST]
    ]
    return [each for each in made if each.value is not None]


def _of_blocks(name: str, result: MetricResult) -> Headline:
    return Headline(
        name,
        mean(result.values),
        chance=mean(null_of(result, "other_token")),
        untrained=mean(null_of(result, "untrained")),
        along=_along(result.array),
    )


def _ends(findings: Findings, name: str) -> Ends:
    low, high = (findings.summary.get(f"{name}_ci_{end}") for end in ("low", "high"))
    return None if low is None or high is None else (float(low), float(high))


def _along(values: Array | Sequence[float]) -> tuple[float, ...]:
    return tuple(np.asarray(values, dtype=np.float64).tolist())


BARS = "▁▂▃▄▅▆▇█"


def spark(values: Sequence[float], low: float = 0.0, high: float = 1.0) -> str:
    """Numbers as bars of text on the scale from `low` to `high`; a dot where one is undefined.

    >>> spark([0.0, 0.5, 1.0, float("nan"), -3.0])
    '▁▅█·▁'
    """
    steps = len(BARS) - 1
    places = [float(np.clip((value - low) / (high - low), 0, 1)) if np.isfinite(value) else None for value in values]
    return "".join("·" if place is None else BARS[int(place * steps + 0.5)] for place in places)
