"""How alike are the rows of a weight matrix, and the same matrix in different blocks?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from collapse_probe.capture.weights.matrices import INTO_THE_STREAM, NAMES, Matrices, Matrix, wide
from collapse_probe.metrics.functional.geometry import gram, unit
from collapse_probe.metrics.metric import Variant
from collapse_probe.metrics.weight_metric import ONE_HEAD, WeightMetric
from collapse_probe.registry import METRICS
from collapse_probe.statistics.intervals import Array

SPAN = 2**20
"""Entries of each block's vector that are brought to float64 at a time."""


def row_similarity(rows: Tensor, signed: bool = False) -> Tensor:
    """Mean over pairs of different rows of |cosine|, or of the cosine, [..., n, d] -> [...], 0 (−1) … 1.

    Pairs with a zero row do not count; NaN where no pair is left.

    >>> row_similarity(torch.tensor([[1.0, 0.0], [-2.0, 0.0], [0.0, 3.0]])).item()
    0.3333333432674408
    """
    directions, valid = unit(rows)
    count = valid.sum(-1).to(directions.dtype)
    if signed:  # the sum over all pairs is the squared length of the sum of the rows
        total = directions.sum(-2).square().sum(-1) - count
    else:
        total = gram(directions).abs().sum((-2, -1)) - directions.square().sum((-2, -1))
    pairs = count * (count - 1)
    return torch.where(pairs > 0, total / pairs.clamp_min(1), torch.nan)


def read_directions(matrix: Tensor, writes: bool) -> Tensor:
    """How much a matrix [out, in] reads (or writes) each direction of the token stream, as one vector; isotropy taken off.

    Wᵀ W (or W Wᵀ), less the multiple of the identity that has its trace, flattened: turning or reordering the neurons changes
    nothing. Zero where all directions are read alike, up to rounding.
    """
    energy = gram(matrix) if writes else gram(matrix.mT)
    width = energy.shape[-1]
    level = energy.diagonal(dim1=-2, dim2=-1).mean()
    rest = energy - level * torch.eye(width, dtype=energy.dtype, device=energy.device)
    return torch.where(rest.norm() > 1e-9 * energy.norm(), rest, 0.0).flatten()


def between_blocks(vectors: Sequence[Tensor | None]) -> Array:
    """Cosine of the vectors of every two blocks, [blocks, blocks]; NaN where one is missing, zero, or of another length."""
    cosines = np.full((len(vectors), len(vectors)), np.nan)
    for length in {len(v) for v in vectors if v is not None}:
        at = [i for i, v in enumerate(vectors) if v is not None and len(v) == length]
        some = [v for v in vectors if v is not None and len(v) == length]
        products = np.zeros((len(at), len(at)))
        for start in range(0, length, SPAN):
            products += gram(torch.stack([wide(v[start : start + SPAN]) for v in some])).cpu().numpy()
        lengths = np.sqrt(np.diagonal(products))
        with np.errstate(divide="ignore", invalid="ignore"):
            cosines[np.ix_(at, at)] = products / np.outer(lengths, lengths)
    return cosines


class WeightSimilarity(WeightMetric):
    """Cosine between the rows of a matrix, or between the same matrix in two blocks."""

    name = "weight-similarity"
    summary = "mean |cosine| between the rows of q, k, v, proj, fc1, fc2; @depth of the same matrix in two blocks"
    collapsed = "high"
    title = "Similarity of the rows of the weights"
    seen = "Mean |cosine| between the rows of each weight matrix of each block; dashed: the untrained copy."
    limits = "Random rows are not quite orthogonal: only the distance from the untrained copy is learned."
    failure_types = ()
    formula = r"\frac{1}{n(n-1)} \sum_{i \ne j} |\cos(r_i, r_j)|"
    value_range = "0 to 1; −1 to 1 for @signed, @depth and @directions"
    source = "Diverse-ViT, arXiv 2203.06345, which gives no code for it"
    traps = (
        "Rows of length d give about √(2/πd) at random. Two blocks whose neurons are permuted are alike only for @directions."
    )
    panel = "|cosine| between rows"
    unit = "|cosine|"
    defaults = {"between": "rows", "signed": False, "by_head": False}
    variants = {
        "signed": Variant({"signed": True}, "with its sign", unit="cosine"),
        "head": Variant({"by_head": True}, ONE_HEAD),
        "depth": Variant({"between": "blocks"}, "entry by entry"),
        "directions": Variant({"between": "directions"}, "by directions"),
    }

    @property
    def definition(self) -> str:
        if self.settings["between"] == "blocks":
            return (
                "Cosine between the same weight matrix in two blocks, entry by entry: 1 for shared or copied weights, 0 for "
                "unrelated ones. Mean over q, k, v, proj, fc1, fc2, each in details.by_matrix. A copy whose neurons are "
                "reordered or turned is not recognised; @directions does."
            )
        if self.settings["between"] == "directions":
            return (
                "Which directions of the token stream the same matrix uses in two blocks: cosine between Wᵀ W of q, k, v and "
                "fc1 (what is read), between W Wᵀ of proj and fc2 (what is written), each less the multiple of the identity "
                "with its trace. 1 where the same directions are used equally strongly, 0 for unrelated ones; no reordering or "
                "turning of neurons changes it, undefined where all directions are used alike. Mean over the six, each in "
                "details.by_matrix."
            )
        cosine = "cosine" if self.settings["signed"] else "|cosine|"
        rows = (
            "rows of one head, mean over heads (q, k, v)" if self.settings["by_head"] else "rows [out, in] of the weight matrix"
        )
        return (
            f"Mean {cosine} over pairs of different {rows}; rows are output neurons, zero rows are left out. Redundancy in the "
            "weights as in Diverse-ViT (arXiv 2203.06345), which gives no code for it. Random rows of length d give about "
            "√(2/πd) without the sign: the untrained copy says how much."
        )

    def values(self, matrices: Matrices) -> tuple[Array, dict[str, Any]]:
        if self.settings["between"] == "rows":
            signed = self.settings["signed"]
            return matrices.over(lambda rows: row_similarity(rows, signed), self.settings["by_head"]), {}
        each = np.stack(
            [between_blocks([self._vector(block.get(name), name) for block in matrices.by_block]) for name in NAMES]
        )
        count = np.isfinite(each).sum(0)
        values = np.where(count > 0, np.nansum(each, axis=0) / np.maximum(count, 1), np.nan)
        return values, {"dims": ("block", "block"), "details": {"by_matrix": each}}

    def _vector(self, matrix: Matrix | None, name: str) -> Tensor | None:
        if matrix is None:
            return None
        if self.settings["between"] == "blocks":
            return matrix.weight.flatten()
        return read_directions(wide(matrix.weight), name in INTO_THE_STREAM)


METRICS.add(WeightSimilarity.name, WeightSimilarity)
