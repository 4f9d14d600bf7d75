"""What bilinear form do the query and key matrices of a head make of the tokens?"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from collapse_probe.capture.weights.matrices import CHECKED, Matrices, Matrix, wide
from collapse_probe.metrics.functional.spectra import effective_rank_of, singular_values
from collapse_probe.metrics.metric import BESIDE_TWIN, Variant
from collapse_probe.metrics.weight_metric import WeightMetric
from collapse_probe.registry import METRICS
from collapse_probe.statistics.intervals import Array

MEASURES = {
    "variance": "the variance of the eigenvalues, (Σ|λ|²/d − |Σλ/d|²) / (‖M‖_F²/d)",
    "trace": "the mean eigenvalue, (tr M/d) / (‖M‖_F/√d)",
    "symmetric": "the share of the symmetric part, ‖(M + Mᵀ)/2‖_F² / ‖M‖_F²",
    "rank": "the effective rank exp(−Σ p log p), p = σ/Σσ, of its singular values",
    "largest": "the largest singular value",
}


def bilinear_form(q: Tensor, k: Tensor) -> dict[str, Tensor]:
    """The numbers of MEASURES for M = W_Qᵀ W_K of each head, from [..., d, D] twice -> [...] each, in float64.

    With q_i · k_j = x_iᵀ M x_j. M is D × D and has at most d eigenvalues that are not 0, those of the d × d matrix W_K W_Qᵀ;
    everything is over these d, so that random matrices of any width are comparable. NaN for M = 0.

    >>> found = bilinear_form(2 * torch.eye(3, dtype=torch.float64), torch.eye(3, dtype=torch.float64))
    >>> {name: round(value.item(), 6) for name, value in found.items()}
    {'variance': 0.0, 'trace': 1.0, 'symmetric': 1.0, 'rank': 3.0, 'largest': 2.0}
    """
    size = q.shape[-2]
    core = k @ q.mT
    whole = ((q @ q.mT) * (k @ k.mT)).sum((-2, -1))  # ‖M‖_F²
    level = torch.where(whole > 0, whole, torch.nan) / size
    eigenvalues = torch.linalg.eigvals(core)
    mean = core.diagonal(dim1=-2, dim2=-1).mean(-1)
    spread = eigenvalues.abs().square().mean(-1) - mean.square()
    twice = (core * core.mT).sum((-2, -1))  # tr M²
    triangles = torch.linalg.qr(q.mT, "r")[1] @ torch.linalg.qr(k.mT, "r")[1].mT
    singular = singular_values(triangles)
    return {
        "variance": spread.clamp_min(0.0) / level,
        "trace": mean / level.sqrt(),
        "symmetric": (1 + twice / (size * level)) / 2,
        "rank": effective_rank_of(singular),
        "largest": singular.amax(-1),
    }


def random_variance(size: int, width: int) -> float:
    """What `variance` is in the mean for independent normal W_Q and W_K [d, D] with d ≤ D: about d/2D.

    The squared eigenvalues of a product of two rectangular matrices of complex normal entries are products of Gamma variables
    of shapes j and j + D − d, j = 1 … d; that of real entries is close to it.
    """
    return ((size + 1) * (2 * size + 1) / 6 + (width - size) * (size + 1) / 2) / width**2


def by_heads(block: Mapping[str, Matrix]) -> tuple[Tensor, Tensor, bool] | None:
    """W_Q and W_K of each head [H, d, D] in float64, with the norm's gains on them where both are known; None without one.

    Keys that several heads share stand once for each head. None where a head's map is merged of several softmaxes too: parts of
    its queries and keys meet apart, and the form of the whole head is none by which it compares tokens.
    """
    q, k = block.get("q"), block.get("k")
    if q is None or k is None or q.softmaxes > 1:
        return None
    if q.weight.shape[0] * k.heads != k.weight.shape[0] * q.heads or q.weight.shape[1] != k.weight.shape[1]:
        return None
    folded = q.gain is not None and k.gain is not None
    parts = []
    for matrix in (q, k):
        rows = wide(matrix.by_head).cpu()
        if folded and matrix.gain is not None:
            rows = rows * wide(matrix.gain).cpu()
        parts.append(rows.repeat_interleave(q.heads // k.heads, 0) if matrix is k else rows)
    return parts[0], parts[1], folded


class QKSpectrum(WeightMetric):
    """Eigenvalues of the form by which a head compares tokens, W_Qᵀ W_K."""

    name = "qk-spectrum"
    summary = "eigenvalues of W_Qᵀ W_K by head: their variance; @trace, @symmetric part, @rank, @largest singular value"
    dims = ("block", "head")
    title = "How a head's queries and keys compare tokens"
    seen = (
        "Variance of the eigenvalues of W_Qᵀ W_K, over the mean square of its singular values. One dot for each head; the "
        f"line is the mean over heads. {BESIDE_TWIN} Dotted: independent random matrices."
    )
    limits = (
        "It is of the matrices alone: what a head does also depends on the tokens, on biases, position embeddings and norms of "
        "queries and keys. Only the distance from the untrained copy is learned."
    )
    failure_types = ()
    formula = r"\frac{\frac1d\sum_k|\lambda_k|^2-|\frac1d\sum_k\lambda_k|^2}{\|W_Q^T W_K\|_F^2/d}"
    value_range = "0 to 1; @trace −1 to 1; @symmetric 0 to 1 (0.5 for random matrices); @rank 1 to d; @largest 0 upwards"
    source = (
        "this project's normalisation; that a small variance of these eigenvalues localises attention is claimed by arXiv "
        "2402.02098, whose own normalisation was not read"
    )
    traps = (
        "The gain of the norm before the attention belongs to the form: it is on both matrices where it is found "
        "(details.folded), and blocks with and without it cannot be compared. With norms on queries and keys, or with "
        "rotary positions, the logits are not this form (details.as_used)."
    )
    panel = "variance of the eigenvalues"
    unit = "share of the mean square"
    top = None
    reference = ("random", "random matrices")
    defaults = {"measure": "variance"}
    choices = {"measure": MEASURES}
    variants = {
        "trace": Variant({"measure": "trace"}, "mean eigenvalue", unit="share of the root mean square"),
        "symmetric": Variant({"measure": "symmetric"}, "symmetric part", unit="share of ‖M‖²"),
        "rank": Variant({"measure": "rank"}, "effective rank", unit="rank"),
        "largest": Variant({"measure": "largest"}, "largest singular value", unit="singular value"),
    }

    @property
    def definition(self) -> str:
        return (
            f"{MEASURES[self.settings['measure']]} of M = W_Qᵀ W_K of one head of d channels (q_i · k_j = x_iᵀ M x_j, without "
            "the scale and without biases), over the d eigenvalues (of D) that need not be 0, in float64. The gain of the norm "
            "before the attention stands on both matrices in the blocks of details.folded; in others none was found. "
            "details.as_used says in which blocks the attention used queries and keys as these matrices give them, up to a "
            "factor and an offset. Undefined in the blocks of details.merged, whose heads merge several softmax maps."
        )

    def undefined(self, matrices: Matrices) -> str:
        merged = _merged(matrices)
        if not merged:
            return super().undefined(matrices)
        more = f" and {len(merged) - 1} more blocks" if len(merged) > 1 else ""
        return (
            f"a head of {matrices.blocks[merged[0]]}{more} merges several softmax maps, as differential attention does: parts "
            "of its queries and keys meet apart, and no W_Qᵀ W_K of the whole head compares tokens"
        )

    def values(self, matrices: Matrices) -> tuple[Array, dict[str, Any]]:
        blocks, measure = len(matrices.blocks), self.settings["measure"]
        found = [by_heads(block) for block in matrices.by_block]
        heads = max((len(each[0]) for each in found if each is not None), default=1)
        values, random = np.full((blocks, heads), np.nan), np.full(blocks, np.nan)
        for at, each in enumerate(found):
            if each is None:
                continue
            q, k, _ = each
            values[at, : len(q)] = bilinear_form(q, k)[measure].numpy()
            if measure == "variance" and q.shape[1] <= q.shape[2]:
                random[at] = random_variance(*q.shape[1:])
        folded = [at for at, each in enumerate(found) if each is not None and each[2]]
        used = [
            at
            for at, block in enumerate(matrices.by_block)
            if found[at] is not None and all(block[name].how == CHECKED for name in ("q", "k"))
        ]
        return values, {"details": {"folded": folded, "as_used": used, "merged": _merged(matrices), "random": random}}


def _merged(matrices: Matrices) -> list[int]:
    """The blocks in which a head's map is merged of several softmaxes."""
    return [at for at, block in enumerate(matrices.by_block) if "q" in block and block["q"].softmaxes > 1]


METRICS.add(QKSpectrum.name, QKSpectrum)
