"""How far do the tokens turn over several blocks, and over which is that least?"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from collapse_probe.capture.plan import Plan
from collapse_probe.capture.trace import Trace
from collapse_probe.metrics.accumulators import Means
from collapse_probe.metrics.coverage import depth_neighbours
from collapse_probe.metrics.metric import Need, Record, mean_over_images
from collapse_probe.metrics.nulls import with_reasons
from collapse_probe.metrics.token_metric import OF_TOKENS, ONE_TOKEN, TOKENS, TokenMetric, no_ends, tokens_of
from collapse_probe.registry import METRICS
from collapse_probe.results.findings import MetricResult
from collapse_probe.statistics.intervals import Array
from collapse_probe.statistics.kappa import MONOMIALS, PairMoments, kappa, kappa_interval


def angles(x_LND: Tensor, shift: int = 0) -> Tensor:
    """Mean over tokens of arccos(cos(x[a, t], x[b, t + shift]))/π between any two of L states, [L, L] in float64.

    0: the same direction, 0.5: a right angle, 1: opposite. Pairs with a vector of length zero are left out; NaN without any.

    >>> x = torch.tensor([[[1.0, 0.0]], [[0.0, 1.0]]], dtype=torch.float64)
    >>> angles(x).tolist()
    [[0.0, 0.5], [0.5, 0.0]]
    """
    x_LND = x_LND.to(torch.float64)
    length = x_LND.norm(dim=-1, keepdim=True)
    units = (x_LND / length.masked_fill(length == 0, 1.0)).transpose(0, 1)
    present = (length > 0).squeeze(-1).to(torch.float64)
    cosine_NLL = units @ units.roll(-shift, 0).mT
    turned_NLL = cosine_NLL.clamp_(-1, 1).arccos_().div_(math.pi)
    if not shift:
        turned_NLL.diagonal(dim1=1, dim2=2).zero_()
    there_NLL = present.T[:, :, None] * present.roll(-shift, 1).T[:, None, :]
    pairs = there_NLL.sum(0)
    return torch.where(pairs > 0, (turned_NLL * there_NLL).sum(0) / pairs.clamp_min(1), torch.nan)


class AngleMeans(Means):
    """Per image the mean angle of a token between any two depths, and of a token with another one half the sequence away."""

    def __init__(self, plan: Plan, tokens: str) -> None:
        super().__init__()
        self.plan, self.tokens, self.depths = plan, tokens, len(plan.taps)
        square = (self.depths, self.depths)
        self.add_means(value=square, other_token=square)
        self.add_moments("both", square, MONOMIALS)
        self.neighbours = depth_neighbours(plan)

    def end_batch(self, trace: Trace) -> dict[str, Tensor]:
        """Add one batch; of each image the angles between neighbouring depths are kept."""
        shape = trace.images, self.depths, self.depths
        value, other = (torch.full(shape, torch.nan, dtype=torch.float64) for _ in range(2))
        by_shape: dict[tuple[int, ...], list[int]] = {}
        states = [tokens_of(trace, trace.tokens[depth], depth, self.tokens) for depth in range(self.depths)]
        for depth, state in enumerate(states):
            if state is not None:
                by_shape.setdefault(tuple(state.shape[1:]), []).append(depth)
        for (n, _), depths in by_shape.items():
            place = np.ix_(depths, depths)
            for image in range(trace.images):
                x_LND = torch.stack([states[depth][image] for depth in depths])  # type: ignore[index]
                x_LND = x_LND.cpu() if x_LND.device.type == "mps" else x_LND
                value[image][place] = angles(x_LND).cpu()
                if n > 1:
                    other[image][place] = angles(x_LND, n // 2).cpu()
        self.add_images("value", value)
        self.add_images("other_token", other)
        self.add_images("both", value, other)
        among = torch.tensor(self.neighbours, dtype=torch.bool)
        return {"value": torch.where(among, value.diagonal(1, 1, 2), torch.nan)}


class AngularDistance(TokenMetric):
    """Angle of a token between two depths, over π (Gromov et al.)."""

    name = "angular-distance"
    summary = "angle between a token at two depths over π, and which n blocks turn the tokens least"
    dims = ("depth", "depth")
    collapsed = "low"
    title = "How far the tokens turn from depth to depth"
    seen = "Angle of the same token at two depths, over π; then what different tokens reach, and how far beyond that."
    limits = (
        "Neighbouring depths are close in every network with a residual stream, trained or not. The window that turns the "
        "tokens least is a guess at which blocks can go; dropping them says whether they can (intervene --drop)."
    )
    failure_types = ("depth",)
    formula = r"\frac{1}{\pi} \arccos \cos(x^a_t,\, x^b_t)"
    value_range = "0 (the same direction) to 1 (opposite)"
    source = "Gromov et al., arXiv 2403.17887, as arcee-ai/PruneMe at faee6c9 computes it"
    traps = (
        "The mean of angles is not the angle of a mean. The code for language models reads the last token alone: here all "
        "tokens, patches or the class token are asked for by name."
    )
    panel = "all tokens"
    unit = "angle / π"
    defaults = {"tokens": "all"}
    choices = {"tokens": TOKENS}
    variants = OF_TOKENS

    def inapplicable(self) -> str:
        """As for block influence."""
        return no_ends(self.plan, "block", self.settings["tokens"])

    @property
    def definition(self) -> str:
        return (
            f"Mean over images and tokens ({TOKENS[self.settings['tokens']]}) of arccos(cos)/π between the same token at two "
            "depths of the residual stream, before any final norm, in float64; depth 0 enters the first block, depth b leaves "
            "block b − 1. The chance level is that of a token and the one half the sequence further; kappa is 1 − "
            "value/chance level. details.windows says for each n between which depths l and l + n the angle is least: the n "
            "blocks l … l + n − 1. Depths of other shapes are not compared."
        )

    def accumulators(self) -> list[Need]:
        tokens = self.settings["tokens"]
        return [(("angles", tokens), lambda: AngleMeans(self.plan, tokens))]

    def compute(self, accumulators: Sequence[Any], records: Sequence[Record]) -> MetricResult:
        (means,) = accumulators
        facts = mean_over_images(means)
        other = means.mean("other_token")[0]
        own = PairMoments.of_sums(means.array("both_count"), means.array("both_moments"))
        values = {"untrained": None, "other_token": other, "kappa": kappa(1 - facts["values"], 1 - other)}
        reasons = dict.fromkeys(("other_token", "kappa"), ONE_TOKEN) if self.settings["tokens"] == "cls" else {}
        bounds = {"other_token": means.bounds("other_token")}
        nulls = with_reasons(values, reasons, int(means.mean()[2].max(initial=0)), bounds, kappa_interval(own))
        details = {"windows": least_windows(facts["values"], facts["ci95"], self.neighbours)}
        return self.result(**facts, nulls=replace(nulls, reasons={**nulls.reasons, **reasons}), details=details)


def least_windows(distance: Array, ci95: Array, neighbours: Sequence[bool]) -> list[dict[str, Any]]:
    """For each number n of blocks the depth l from which on d(l, l + n) is least, with the distance and its interval.

    Windows over depths that are no neighbours do not count; of equal ones the first.
    """
    found = []
    for n in range(1, len(distance)):
        starts = [i for i in range(len(distance) - n) if all(neighbours[i : i + n]) and np.isfinite(distance[i, i + n])]
        if starts:
            start = min(starts, key=lambda i: distance[i, i + n])
            place = start, start + n
            found.append({"blocks": n, "first": start, "distance": distance[place], "ci95": ci95[place].tolist()})
    return found


METRICS.add(AngularDistance.name, AngularDistance)
