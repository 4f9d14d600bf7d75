"""Into how many phases do the blocks fall, and where are the boundaries?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from collapse_probe.capture.plan import Plan
from collapse_probe.capture.trace import Trace
from collapse_probe.metrics.accumulators import GROUPS, Means, group_of
from collapse_probe.metrics.functional.phases import (
    MOST_CUT,
    SHORTEST,
    contiguous,
    max_cut_phases,
    phases_beyond_drift,
)
from collapse_probe.metrics.metric import Need, Record, Variant
from collapse_probe.metrics.nulls import untrained_only
from collapse_probe.metrics.token_metric import TokenMetric, tokens_of
from collapse_probe.registry import METRICS
from collapse_probe.results.findings import MetricResult
from collapse_probe.statistics.intervals import Array

MARGIN = 0.05
"""By which share of all distances phases must beat a steady drift."""
CUT_SHARE = 0.2
"""The largest of the three shares of the released notebook, below which no cut is made."""
RESAMPLES, SHUFFLES = 400, 100
RULES = {
    "drift": (
        "phases are stretches of consecutive blocks, of two or more, with the least sum of distances inside them (exact, by "
        "dynamic programming); their number is the one that beats most what as many phases of a steady drift leave inside "
        f"(each distance replaced by the mean over all pairs as far apart), and 1 where that is less than {MARGIN:g} of all "
        "distances"
    ),
    "max-cut": (
        "groups of blocks by recursive exact max-cut (arXiv 2512.19941): the group with the heaviest last cut is cut again "
        f"until no cut weighs more than {CUT_SHARE:g} of all distances; nothing makes them consecutive, and "
        "details.contiguous says whether they are"
    ),
}
NO_INTERVAL = "the number of a phase has none; each boundary has its own, in details.boundaries"


def summary_vectors(trace: Trace, depth: int) -> Tensor | None:
    """The class token and the mean patch at a depth, [B, 2, D] in float64; without a class token [B, 1, D]; None without
    patches.
    """
    patches, token = (tokens_of(trace, trace.tokens[depth], depth, which) for which in ("patches", "cls"))
    if patches is None or (trace.plan.prefix and token is None):
        return None
    vectors = [patches.mean(1, dtype=torch.float64)] if patches.device.type != "mps" else [patches.cpu().double().mean(1)]
    if token is not None:
        vectors.insert(0, token[:, 0].to(vectors[0]))
    return torch.stack(vectors, 1)


class GroupedDistances(Means):
    """1 − cosine between the summary vectors of any two blocks' outputs: means over images, and sums by group of images."""

    def __init__(self, plan: Plan) -> None:
        super().__init__()
        self.blocks = len(plan.blocks)
        square = (self.blocks, self.blocks)
        self.add_means(distance=square)
        self.add_state("by_group", GROUPS, *square)
        self.add_state("images", GROUPS)

    def start_batch(self, trace: Trace, names: Sequence[str]) -> None:
        self._names = names

    def end_batch(self, trace: Trace) -> dict[str, Tensor]:
        """Add one batch; nothing is kept by image, for phases are those of all images together."""
        distance = torch.full((trace.images, self.blocks, self.blocks), torch.nan, dtype=torch.float64)
        by_shape: dict[tuple[int, ...], list[tuple[int, Tensor]]] = {}
        for block in range(self.blocks):
            vectors = summary_vectors(trace, block + 1)
            if vectors is not None:
                by_shape.setdefault(tuple(vectors.shape[1:]), []).append((block, vectors))
        for some in by_shape.values():
            blocks, x_BLVD = [block for block, _ in some], torch.stack([x for _, x in some], 1)
            units = torch.nn.functional.normalize(x_BLVD, dim=-1)
            cosine = torch.einsum("blvd,bmvd->blm", units, units) / units.shape[2]
            for i, row in enumerate(blocks):
                distance[:, row, blocks] = (1 - cosine[:, i]).clamp_min(0.0).cpu()
            distance[:, blocks, blocks] = 0.0
        self.add_images("distance", distance)
        groups = torch.tensor([group_of(name) for name in self._names])
        state, count = self.state("by_group"), self.state("images")
        state.index_add_(0, groups.to(state.device), distance.to(state.device))
        count.index_add_(0, groups.to(count.device), torch.ones(len(groups), dtype=torch.float64, device=count.device))
        return {}


class DepthPhases(TokenMetric):
    """Phases of depth by the states that the blocks leave (block-recurrent hypothesis, arXiv 2512.19941)."""

    name = "depth-phases"
    summary = "into how many consecutive phases the blocks fall, with intervals of the boundaries; @max-cut: as published"
    dims = ("block",)
    title = "Into how many phases the blocks fall"
    seen = (
        "The number of the phase to which each block belongs, counted from 0. The boundaries are drawn in every matrix of "
        "blocks too. Grey: the phases of the untrained copy."
    )
    limits = (
        "Phases are a summary of distances between blocks, which drift in every network: a boundary says that the states "
        "move faster there, not that other work begins. An untrained copy may have phases too."
    )
    failure_types = ()
    formula = r"\min_{\text{phases}} \sum_{\text{phase}} \sum_{l<m \in \text{phase}} d_{lm}"
    value_range = "0 to the number of phases less 1"
    source = "after the block-recurrent hypothesis, arXiv 2512.19941, and its notebook at KempnerInstitute/raptor ba3b53f"
    traps = (
        "Any smooth walk falls into pieces if pieces are asked for: a threshold on what a cut gains, as published, finds "
        "phases in a steady drift, and groups need not be consecutive. So ours are counted beyond such a drift."
    )
    panel = "phase"
    unit = "number of the phase"
    defaults = {"rule": "drift"}
    choices = {"rule": RULES}
    variants = {"max-cut": Variant({"rule": "max-cut"}, "recursive max-cut, as published")}

    def inapplicable(self) -> str:
        """There must be patches behind the blocks, and few enough blocks for an exact max-cut where that is asked for."""
        if missing := super().inapplicable():
            return missing
        blocks = len(self.plan.blocks)
        if len(set(self.plan.patch_shapes[1:])) > 1 or not all(self.plan.adjacent_blocks):
            return "the blocks are no chain with tokens of one width: there are no distances between all of them"
        if blocks < 2 * SHORTEST:
            return f"there are {blocks} blocks, and two phases take {2 * SHORTEST}"
        if self.settings["rule"] == "max-cut" and blocks > MOST_CUT:
            return f"an exact max-cut of {blocks} blocks would try 2^{blocks - 1} cuts; it is made of up to {MOST_CUT}"
        return ""

    @property
    def neighbours(self) -> tuple[bool, ...]:
        """Those of the model's blocks."""
        return self.plan.adjacent_blocks

    @property
    def definition(self) -> str:
        return (
            "The distance of two blocks is the mean over images, and over the class token (where there is one) and the mean "
            "patch, of 1 − cos between what they leave on the residual stream, before any final norm. "
            f"{RULES[self.settings['rule']][0].upper()}{RULES[self.settings['rule']][1:]}. details.boundaries has for each "
            "boundary the first block behind it and the interval in which 95 % of resamples of the images (by sixteen groups) "
            "put it; details.shuffled the number of phases of the same distances with the blocks in random order."
        )

    def accumulators(self) -> list[Need]:
        return [(("depth-distances",), lambda: GroupedDistances(self.plan))]

    def compute(self, accumulators: Sequence[Any], records: Sequence[Record]) -> MetricResult:
        (sums,) = accumulators
        distance = sums.mean("distance")[0]
        groups = self._groups(distance)
        phase = np.empty(len(distance))
        for number, blocks in enumerate(groups):
            phase[blocks] = number
        details: dict[str, Any] = {
            "phases": len(groups),
            "groups": {f"phase {number}": blocks for number, blocks in enumerate(groups)},
            "contiguous": contiguous(groups),
            "distance": distance,
            "intervals": NO_INTERVAL,
        }
        generator = np.random.default_rng(0)
        if self.settings["rule"] == "drift":
            details["beyond_drift"] = phases_beyond_drift(distance, MARGIN)[1]
            details["boundaries"] = self._boundaries(sums, [group[0] for group in groups[1:]], generator)
            orders = [generator.permutation(len(distance)) for _ in range(SHUFFLES)]
            counts = [len(self._groups(distance[np.ix_(order, order)])) for order in orders]
            details["shuffled"] = {"mean": float(np.mean(counts)), "most": int(max(counts)), "orders": SHUFFLES}
        return self.result(phase, details=details, nulls=untrained_only())

    def _groups(self, distance: Array) -> list[list[int]]:
        if self.settings["rule"] == "max-cut":
            return max_cut_phases(distance, CUT_SHARE)
        starts = phases_beyond_drift(distance, MARGIN)[0]
        return [list(range(a, b)) for a, b in zip(starts, [*starts[1:], len(distance)], strict=True)]

    def _boundaries(self, sums: GroupedDistances, starts: list[int], generator: np.random.Generator) -> list[dict[str, Any]]:
        """For each boundary the interval of the nearest one of each resample, and the share of resamples with as many."""
        by_group, images = sums.array("by_group"), sums.array("images")
        filled = np.flatnonzero(images)
        if not starts or len(filled) < 2:
            return [{"first": start, "ci95": None, "same_count": None} for start in starts]
        nearest, same = np.full((RESAMPLES, len(starts)), np.nan), 0
        for i in range(RESAMPLES):
            drawn = generator.choice(filled, len(filled))
            resampled = [group[0] for group in self._groups(by_group[drawn].sum(0) / images[drawn].sum())[1:]]
            same += len(resampled) == len(starts)
            for j, start in enumerate(starts if resampled else ()):
                nearest[i, j] = min(resampled, key=lambda other: abs(other - start))
        found = []
        for j, start in enumerate(starts):
            known = nearest[np.isfinite(nearest[:, j]), j]
            ends = [int(end) for end in np.quantile(known, (0.025, 0.975), method="nearest")] if len(known) else None
            found.append({"first": start, "ci95": ends, "same_count": same / RESAMPLES})
        return found


METRICS.add(DepthPhases.name, DepthPhases)
