"""In how many directions do the tokens of an image still differ?"""

from __future__ import annotations

import torch
from torch import Tensor

from collapse_probe.metrics.functional.geometry import SMALLEST_SPREAD
from collapse_probe.metrics.functional.spectra import effective_rank_of, singular_values, stable_rank_of
from collapse_probe.metrics.metric import CURVE, Variant
from collapse_probe.metrics.token_metric import WITH_PREFIX, DepthMetric
from collapse_probe.registry import METRICS


def token_ranks(tokens_BND: Tensor, *, centred: bool = False) -> dict[str, Tensor]:
    """Effective and stable rank of each image's token matrix, [B, N, D] -> two [B], 1 … min(N, D).

    With the singular values σ and p = σ/Σσ: effective exp(−Σ p log p) (Roy & Vetterli 2007; σ, not σ²), stable Σσ²/σ₁².
    `centred` takes the mean token off first. NaN for tokens that are all zero, or centred all equal (their spread below
    `SMALLEST_SPREAD` of their length, which is rounding).

    >>> {name: round(rank.item(), 6) for name, rank in token_ranks(torch.eye(3, dtype=torch.float64)[None]).items()}
    {'effective': 3.0, 'stable': 3.0}
    """
    whole = tokens_BND.square().sum((-2, -1))
    if centred:
        tokens_BND = tokens_BND - tokens_BND.mean(-2, keepdim=True)
    defined = tokens_BND.square().sum((-2, -1)) > SMALLEST_SPREAD**2 * whole
    singular = singular_values(torch.where(defined[:, None, None], tokens_BND, 0.0))
    return {"effective": effective_rank_of(singular), "stable": stable_rank_of(singular)}


class TokenRank(DepthMetric):
    """Effective or stable rank of the token matrix: 1 where all tokens are parallel."""

    name = "token-rank"
    summary = "effective and stable rank of the token matrix, centred and not"
    collapsed = "low"
    title = "In how many directions the tokens of an image differ"
    seen = f"Rank of the matrix of all patch embeddings of one image, on a logarithmic scale from 1. {CURVE}"
    limits = (
        "Uncentred, a strong common part of all tokens lowers the rank even where they still differ; a few tokens of large "
        "norm lower it too."
    )
    failure_types = ("tokens",)
    formula = r"\exp\left(-\sum_k p_k \log p_k\right), \quad p_k = \sigma_k / \sum_l \sigma_l"
    value_range = "1 (all tokens parallel) to min(N, D)"
    source = "Roy & Vetterli 2007"
    traps = (
        "Squared singular values give another rank under the same name. One outlier token of large norm lowers it, "
        "and so does the mean that all tokens share (@centred)."
    )
    panel = "effective rank"
    unit = "rank"
    logarithmic = True
    quantity_from = "rank"
    quantities = ("effective", "stable")
    defaults = {"rank": "effective", "centred": False, "prefix": False}
    variants = {
        "stable": Variant({"rank": "stable"}, "stable rank ‖X‖²/σ₁²"),
        "centred": Variant({"centred": True}, "effective rank, mean token taken off"),
        "all": WITH_PREFIX,
    }

    @property
    def definition(self) -> str:
        formula = {
            "effective": "exp(−Σ p log p), p = σ/Σσ (Roy & Vetterli 2007)",
            "stable": "‖X‖_F²/σ₁²",
        }[self.quantity]
        taken = " after their mean was taken off" if self.settings["centred"] else ""
        least = "they are parallel" if not self.settings["centred"] else "they differ in one direction; undefined: in none"
        return f"{formula}, σ the singular values of {self.which_tokens()}{taken}; from 1 ({least}) to min(N, D)."

    def numbers(self, tokens_BND: Tensor) -> dict[str, Tensor]:
        return token_ranks(tokens_BND, centred=bool(self.settings["centred"]))


METRICS.add(TokenRank.name, TokenRank)
