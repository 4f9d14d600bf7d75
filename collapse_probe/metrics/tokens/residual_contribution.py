"""How much does each branch of a block add to the residual stream?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from collapse_probe.capture.plan import Plan
from collapse_probe.capture.trace import Trace
from collapse_probe.metrics.accumulators import Means
from collapse_probe.metrics.functional.geometry import own_and_other_cosines
from collapse_probe.metrics.metric import CURVE, Need, Record, Variant, mean_over_images
from collapse_probe.metrics.nulls import untrained_only, with_reasons
from collapse_probe.metrics.token_metric import OF_TOKENS, ONE_TOKEN, TOKENS, BlockMetric, block_ends, in_parts
from collapse_probe.registry import METRICS
from collapse_probe.results.findings import MetricResult

BRANCHES = {
    "attention": "x enters the block and a = Attn(x) is what its attention branch adds",
    "mlp": "x is what the attention branch left and a = MLP(x) is what the MLP branch adds",
    "block": "x enters the block and a = y − x is all that it adds",
}
MEASURES = {
    "ratio": "‖a‖₂/‖x‖₂: the length of what is added over that of the stream",
    "cosine": "cos(a, x): above 0 the branch lengthens what is there, below 0 it takes away from it",
}


def contributions(x_BND: Tensor, y_BND: Tensor) -> dict[str, Tensor]:
    """Mean over tokens of ‖a‖/‖x‖ and of cos(a, x) for a = y − x; of the cosine with other tokens too, [B] each, in float64.

    Tokens of length zero, and for cosines those to which nothing is added, are left out.

    >>> x = torch.tensor([[[3.0, 4.0]]], dtype=torch.float64)
    >>> {name: value.item() for name, value in contributions(x, 3 * x).items()}
    {'ratio': 2.0, 'cosine': 1.0, 'other': nan}
    """
    added = y_BND - x_BND
    length = x_BND.norm(dim=-1)
    ratio = torch.where(length > 0, added.norm(dim=-1) / length.masked_fill(length == 0, 1.0), torch.nan)
    turned = own_and_other_cosines(x_BND, added)
    return {"ratio": ratio.nanmean(1), "cosine": turned["same"], "other": turned["other"]}


class ContributionMeans(Means):
    """Per image and block the ratio and the cosines of one branch."""

    def __init__(self, plan: Plan, branch: str, tokens: str) -> None:
        super().__init__()
        self.blocks, self.branch, self.tokens = len(plan.blocks), branch, tokens
        self.add_means(**dict.fromkeys(("ratio", "cosine", "other"), (self.blocks,)))

    def end_batch(self, trace: Trace) -> dict[str, Tensor]:
        """Add one batch; per image [B, blocks]."""
        shape = trace.images, self.blocks
        values = {name: torch.full(shape, torch.nan, dtype=torch.float64) for name in ("ratio", "cosine", "other")}
        for block in range(self.blocks):
            pair = block_ends(trace, block, self.branch, self.tokens)
            if pair is None:
                continue
            width = pair[0].shape[-1]
            joined = torch.cat(pair, -1)
            for name, value in in_parts(lambda x, w=width: contributions(x[..., :w], x[..., w:]), joined).items():  # type: ignore[misc]
                values[name][:, block] = value
        for name, value in values.items():
            self.add_images(name, value)
        return values


class ResidualContribution(BlockMetric):
    """‖branch‖/‖stream‖ and their cosine, block by block (Csordás, Manning, Potts, arXiv 2505.13898)."""

    name = "residual-contribution"
    summary = "length of what the attention or MLP branch adds over that of the stream; @cosine: whether it adds or takes away"
    collapsed = "low"
    title = "How much each branch adds to the stream"
    seen = f"Length of what the branch adds to a token, over the length of the token. {CURVE}"
    limits = (
        "The stream grows with depth in most pre-norm networks, so that equal branches count less and less, trained or not. "
        "A small share is no proof that a branch does nothing: later blocks may read just what it wrote."
    )
    failure_types = ("depth",)
    formula = r"\frac{\|a_t\|_2}{\|x_t\|_2}"
    value_range = "0 upwards; the cosine −1 to 1"
    source = "after Csordás, Manning, Potts, arXiv 2505.13898; its code was not read, the stream is that which the branch reads"
    traps = "One token of huge norm moves neither much, for the mean is over tokens; channels of huge activations move both."
    panel = "attention branch"
    unit = "share of the stream's length"
    defaults = {"branch": "attention", "measure": "ratio", "tokens": "all"}
    choices = {"branch": BRANCHES, "measure": MEASURES, "tokens": TOKENS}
    quantity_from = "measure"
    variants = {
        "mlp": Variant({"branch": "mlp"}, "MLP branch"),
        "block": Variant({"branch": "block"}, "both branches"),
        "cosine": Variant({"measure": "cosine"}, "cosine with the stream", unit="cosine"),
        **OF_TOKENS,
    }

    @property
    def definition(self) -> str:
        chance = "; the chance level is the cosine with other tokens" if self.quantity == "cosine" else ""
        return (
            f"Mean over images and tokens ({TOKENS[self.settings['tokens']]}) of {MEASURES[self.quantity]}, where "
            f"{BRANCHES[self.settings['branch']]} (any LayerScale included), in float64{chance}. What is added is the "
            "difference of the stream behind and before, so that a branch a million times shorter than the stream is lost in "
            "rounding."
        )

    def accumulators(self) -> list[Need]:
        branch, tokens = self.settings["branch"], self.settings["tokens"]
        return [(("residual-contribution", branch, tokens), lambda: ContributionMeans(self.plan, branch, tokens))]

    def compute(self, accumulators: Sequence[Any], records: Sequence[Record]) -> MetricResult:
        (means,) = accumulators
        facts = mean_over_images(means, self.quantity)
        if self.quantity == "ratio":
            return self.result(**facts, nulls=untrained_only())
        values = {"untrained": None, "other_token": means.mean("other")[0]}
        reasons = {"other_token": ONE_TOKEN} if self.settings["tokens"] == "cls" else {}
        bounds = {"other_token": means.bounds("other")}
        nulls = with_reasons(values, reasons, int(means.mean(self.quantity)[2].max(initial=0)), bounds)
        return self.result(**facts, nulls=nulls)


METRICS.add(ResidualContribution.name, ResidualContribution)
