"""How much does a block, or one of its two branches, turn the tokens?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from collapse_probe.capture.blocks import NO_MIDDLE
from collapse_probe.capture.plan import Plan
from collapse_probe.capture.trace import Trace
from collapse_probe.metrics.accumulators import Means
from collapse_probe.metrics.metric import CURVE, Need, Record, Variant, mean_over_images
from collapse_probe.metrics.nulls import with_reasons
from collapse_probe.metrics.token_metric import TokenMetric, in_parts
from collapse_probe.registry import METRICS
from collapse_probe.results.findings import MetricResult
from collapse_probe.statistics.kappa import MONOMIALS, PairMoments, kappa, kappa_interval

TOKENS = {
    "all": "all tokens, prefix tokens included",
    "patches": "the patch tokens, prefix tokens out",
    "cls": "the first prefix token (the class token)",
}
OF_TOKENS = {"patches": Variant({"tokens": "patches"}, "patch tokens"), "cls": Variant({"tokens": "cls"}, "class token")}
BRANCHES = {
    "block": "x before and y behind the whole block",
    "attention": "x before the block and y = x + Attn(x), its attention branch alone added (with any LayerScale)",
    "mlp": "x = what the attention branch left and y = x + MLP(x), behind the block",
}
OF_BRANCHES = {
    "attention": Variant({"branch": "attention"}, "the attention branch alone"),
    "mlp": Variant({"branch": "mlp"}, "the MLP branch alone"),
}
NO_CLASS_TOKEN = "the model has no prefix token (class, distillation or register token)"
ONE_TOKEN = "undefined: there is one such token in an image, and no other to confuse it with"


def cosines(x_BND: Tensor, y_BND: Tensor) -> dict[str, Tensor]:
    """Mean cosine of each token in x with itself in y, `same` [B], and with every other token, `other` [B]; in float64.

    Vectors of length zero have no direction: pairs with them are left out. NaN where no pair is left.

    >>> x = torch.eye(2, dtype=torch.float64)[None]
    >>> {name: value.item() for name, value in cosines(x, x).items()}
    {'same': 1.0, 'other': 0.0}
    """
    units, present = [], []
    for tokens in (x_BND, y_BND):
        length = tokens.norm(dim=-1, keepdim=True)
        present.append((length > 0).squeeze(-1).to(tokens.dtype))
        units.append(tokens / length.masked_fill(length == 0, 1.0))
    both = present[0] * present[1]
    own = both * (1 - (units[0] - units[1]).square().sum(-1) / 2)  # the cosine, and just 1 where nothing changed
    pairs = present[0].sum(1) * present[1].sum(1) - both.sum(1)
    others = (units[0].sum(1) * units[1].sum(1)).sum(-1) - own.sum(1)
    return {
        "same": torch.where(both.sum(1) > 0, own.sum(1) / both.sum(1), torch.nan),
        "other": torch.where(pairs > 0, others / pairs.clamp_min(1), torch.nan),
    }


def ends_of(trace: Trace, block: int, branch: str) -> tuple[Tensor | None, Tensor | None]:
    """What enters and what leaves a block, or one of its branches, [B, N, D] each; None where it is not read."""
    before, after = trace.tokens[block], trace.tokens[block + 1]
    if block and not trace.plan.adjacent_blocks[block - 1]:
        return None, None  # what enters it is not what the block before gave
    if branch == "block":
        return before, after
    middle = trace.middles[block]
    return (before, middle) if branch == "attention" else (middle, after)


def chosen(trace: Trace, ends: tuple[Tensor | None, Tensor | None], block: int, tokens: str) -> list[Tensor] | None:
    """Both ends with the tokens of one kind alone, [B, n, D] in float32; None where these are not the same at both."""
    depths = block, block + 1
    if tokens == "patches":
        kept = [trace.patches_of(x, depth) for x, depth in zip(ends, depths, strict=True)]
    else:
        kept = [None if x is None else x.float() for x in ends]
    there = [x for x in kept if x is not None]
    if len(there) < 2 or there[0].shape != there[1].shape:
        return None
    if tokens == "cls":
        first = trace.plan.prefix[0]
        return [x[:, first : first + 1] for x in there]
    return there


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
            pair = chosen(trace, ends_of(trace, block, self.branch), block, self.tokens)
            if pair is None:
                continue
            width = pair[0].shape[-1]
            joined = torch.cat(pair, -1)
            for name, cosine in in_parts(lambda x, w=width: cosines(x[..., :w], x[..., w:]), joined).items():  # type: ignore[misc]
                turned[name][:, block] = 1 - cosine
        value, other = turned["same"], turned["other"]
        self.add_images("value", value)
        self.add_images("other_token", other)
        self.add_images("both", value, other)
        return {"value": value, "other_token": other}


class BlockInfluence(TokenMetric):
    """1 − cosine of a token before and behind a block, or one of its branches (ShortGPT, arXiv 2403.03853)."""

    name = "block-influence"
    summary = "1 − cosine of a token before and behind a block; of its attention or MLP branch alone"
    dims = ("block",)
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

    def __init__(self, plan: Plan, **settings: Any) -> None:
        super().__init__(plan, **settings)
        self.needs = frozenset() if self.settings["branch"] == "block" else frozenset({"middles"})

    def inapplicable(self) -> str:
        """The tokens must be read before and behind a block, and where they are to come from one kind, be of that kind."""
        return no_ends(self.plan, self.settings["branch"], self.settings["tokens"])

    @property
    def neighbours(self) -> tuple[bool, ...]:
        """Those of the model's blocks."""
        return self.plan.adjacent_blocks

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


def no_ends(plan: Plan, branch: str, tokens: str) -> str:
    """Why the ends of blocks, or of their branches, are not to be had of some tokens; empty where they are of some block."""
    if not plan.width:
        return "no token sequence was found at the first block's input"
    if tokens == "cls" and not plan.prefix:
        return NO_CLASS_TOKEN
    if tokens == "patches" and not any(plan.patch_shapes):
        return "the tokens do not come from the image"
    return NO_MIDDLE if branch != "block" and not any(plan.middles) else ""


METRICS.add(BlockInfluence.name, BlockInfluence)
