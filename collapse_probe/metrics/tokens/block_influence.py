"""How much does a block, or one of its two branches, turn the tokens?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from collapse_probe.capture.plan import Plan
from collapse_probe.capture.trace import Trace
from collapse_probe.metrics.accumulators import Means
from collapse_probe.metrics.functional.geometry import own_and_other_cosines
from collapse_probe.metrics.metric import CURVE, Need, Record, Variant, mean_over_images
from collapse_probe.metrics.nulls import with_reasons
from collapse_probe.metrics.token_metric import OF_TOKENS, ONE_TOKEN, TOKENS, BlockMetric, block_ends, in_parts
from collapse_probe.registry import METRICS
from collapse_probe.results.findings import MetricResult
from collapse_probe.statistics.kappa import MONOMIALS, PairMoments, kappa, kappa_interval

BRANCHES = {
    "block": "x before and y behind the whole block",
    "attention": "x before the block and y = x + Attn(x), its attention branch alone added (with any LayerScale)",
    "mlp": "x = what the attention branch left and y = x + MLP(x), behind the block",
}
OF_BRANCHES = {
    "attention": Variant({"branch": "attention"}, "the attention branch alone"),
    "mlp": Variant({"branch": "mlp"}, "the MLP branch alone"),
}


class InfluenceMeans(Means):
    """Per image and block 1 − cosine of a token before and behind, and of different tokens; with what kappa needs."""

    def __init__(self, plan: Plan, branch: str, tokens: str) -> None:
        super().__init__()
        self.blocks, self.branch, self.tokens = len(plan.blocks), branch, tokens
        self.add_means(value=(self.blocks,), other_token=(self.blocks,))
        self.add_moments("both", (self.blocks,), MONOMIALS)

    def end_batch(self, trace: Trace) -> dict[str, Tensor]:
        """Add one batch; per image [B, blocks]."""
        turned = {name: torch.full((trace.images, self.blocks), torch.nan, dtype=torch.float64) for name in ("same", "other")}
        for block in range(self.blocks):
            pair = block_ends(trace, block, self.branch, self.tokens)
            if pair is None:
                continue
            width = pair[0].shape[-1]
            joined = torch.cat(pair, -1)
            for name, cosine in in_parts(lambda x, w=width: own_and_other_cosines(x[..., :w], x[..., w:]), joined).items():  # type: ignore[misc]
                turned[name][:, block] = 1 - cosine
        value, other = turned["same"], turned["other"]
        self.add_images("value", value)
        self.add_images("other_token", other)
        self.add_images("both", value, other)
        return {"value": value, "other_token": other}


class BlockInfluence(BlockMetric):
    """1 − cosine of a token before and behind a block, or one of its branches (ShortGPT, arXiv 2403.03853)."""

    name = "block-influence"
    summary = "1 − cosine of a token before and behind a block; of its attention or MLP branch alone"
    collapsed = "low"
    title = "How much each block turns the tokens"
    seen = (
        f"1 − cosine of the same token before and behind the block, averaged over tokens. {CURVE} Orange: the same for "
        "different tokens, which is what a block would reach that put every token in another's place."
    )
    limits = (
        "The residual stream carries each token past a block, so that the influence of most blocks is small, trained or not. "
        "A small influence does not say that a block can go: dropping it says that (intervene --drop)."
    )
    failure_types = ("depth",)
    formula = r"1 - \frac{1}{N} \sum_t \cos(x_t, y_t)"
    value_range = "0 (no token turns) to 2"
    source = "ShortGPT, arXiv 2403.03853; by branch: arXiv 2406.15786"
    traps = (
        "It is no angle, and sees no change of length. One channel with huge activations carries the cosine alone: read "
        "massive-activations beside it."
    )
    panel = "whole block"
    unit = "1 − cosine"
    defaults = {"branch": "block", "tokens": "all"}
    choices = {"branch": BRANCHES, "tokens": TOKENS}
    variants = {**OF_BRANCHES, **OF_TOKENS}

    @property
    def definition(self) -> str:
        return (
            f"Mean over images and tokens ({TOKENS[self.settings['tokens']]}) of 1 − cos(x, y), with "
            f"{BRANCHES[self.settings['branch']]}, on the residual stream before any final norm, in float64. Tokens of length "
            "zero are left out (the released code of arXiv 2403.03853 counts them as 0.5). The chance level is the same of "
            "different tokens of an image; kappa is 1 − value/chance level. Blocks that change the number or width of the "
            "tokens, and those whose input is not the output of the block before, have no value."
        )

    def accumulators(self) -> list[Need]:
        branch, tokens = self.settings["branch"], self.settings["tokens"]
        return [(("block-influence", branch, tokens), lambda: InfluenceMeans(self.plan, branch, tokens))]

    def compute(self, accumulators: Sequence[Any], records: Sequence[Record]) -> MetricResult:
        (means,) = accumulators
        facts = mean_over_images(means)
        other = means.mean("other_token")[0]
        own = PairMoments.of_sums(means.array("both_count"), means.array("both_moments"))
        values = {"untrained": None, "other_token": other, "kappa": kappa(1 - facts["values"], 1 - other)}
        reasons = dict.fromkeys(("other_token", "kappa"), ONE_TOKEN) if self.settings["tokens"] == "cls" else {}
        bounds = {"other_token": means.bounds("other_token")}
        nulls = with_reasons(values, reasons, int(means.mean()[2].max(initial=0)), bounds, kappa_interval(own))
        return self.result(**facts, nulls=replace(nulls, reasons={**nulls.reasons, **reasons}))


METRICS.add(BlockInfluence.name, BlockInfluence)
