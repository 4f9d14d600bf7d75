"""Diverse-ViT's numbers: redundancy in patch embeddings, attention maps and weights."""

from __future__ import annotations

from collapse_probe.preset import Choice, Preset
from collapse_probe.sockets import PRESETS

WHOLE = {"by_head": False}

PRESETS.add(
    "diverse-vit",
    Preset(
        name="diverse-vit",
        version="1",
        summary="redundancy at three levels, by the definitions of the released regularisers",
        paper="Diverse-ViT, arXiv 2203.06345",
        code="github.com/VITA-Group/Diverse-ViT at 8116a7d, whose regularisers are read as measures: it holds no others",
        follows="code",
        metrics={
            "patch-diversity": {},
            "cross-patch-similarity": {"prefix": False},
            "whole-map-similarity@probs": {"point": "probs"},
            "weight-orthogonality@squared": {"measure": "squared", **WHOLE},
            "weight-orthogonality@soft": {"measure": "soft", **WHOLE},
            "hyperspherical-energy@separation": {"measure": "separation", "power": 1.0, **WHOLE},
            "hyperspherical-energy@gram": {"measure": "gram", "power": 1.0, **WHOLE},
            "weight-rank": {"measure": "effective", "divided": False, **WHOLE},
            "weight-rank@pca90": {"measure": "pca", "share": 0.9, "divided": False, **WHOLE},
        },
        choices=(
            Choice("patches: tokens", "patches alone, the class token dropped", "code"),
            Choice("patches: cosine", "absolute, as in the variant that the released training leaves unused", "code"),
            Choice("patches within a depth", "different patches alone; the code counts a patch with itself", "our reading"),
            Choice("patches across depths", "all pairs of patches, a patch with itself included", "code"),
            Choice("patches: place", "the residual stream from position embeddings on, before the final norm", "code"),
            Choice("patches: depths", "every depth; the released training reads the first and the last", "our reading"),
            Choice("maps: vector", "the whole map of a head, flattened; all tokens, the class token included", "code"),
            Choice("maps: which", "the softmax, before dropout", "code"),
            Choice("maps: pairs", "absolute cosine of every two heads, a head with itself included", "code"),
            Choice("maps: blocks", "every block and every two blocks; the released training reads the first", "our reading"),
            Choice("weights: matrix", "q, k and v whole, not by head", "code"),
            Choice("weights: which", "proj, fc1 and fc2 as well; the released training reads q, k and v", "our reading"),
            Choice("weights: orthogonality", "(λmax − λmin)² of W Wᵀ, and ‖W Wᵀ − I‖_F²", "code"),
            Choice("weights: eigenvalues", "exact; the code takes one random power step, which is biased low", "our reading"),
            Choice("weights: separation", "duplicate rows count as distance 0; the code passes over them", "our reading"),
            Choice("weights: determinant", "−log det of exp(−‖r̂_i − r̂_j‖²) + 1e-6·I over rows at unit length", "code"),
            Choice("weights: rank", "effective rank of singular values, exp(−Σ p log p)", "our reading"),
            Choice("weights: principal components", "what 90 % of the components leave of the variance", "our reading"),
        ),
    ),
)
