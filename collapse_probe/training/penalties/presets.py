"""The penalties that published code trains with, in its own forms and weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from collapse_probe.registry import PENALTIES, Registry
from collapse_probe.training.penalties.base import Penalty

PRESETS: Registry[Mapping[str, tuple[Mapping[str, Any], float]]] = Registry(
    "penalty preset", "collapse_probe.training.penalties"
)
PRESETS.add("deepvit", {"block-cosine": ({"pairs": 12, "axis": "head", "point": "weights"}, 0.1)})
PRESETS.add(
    "diverse-vit",
    {
        "patch-mixing": ({"form": "diverse-vit"}, 1.0),
        "patch-cosine": ({"form": "repository"}, 0.5),
        "patch-contrastive": ({"form": "diverse-vit"}, 0.5),
        "attention-cosine": ({"form": "repository", "blocks": (0,)}, 1e-4),
        "conditional-orthogonality": ({"level": "weights", "estimate": "power"}, 5e-4),
    },
)
PRESETS.add(
    "patch-diversification",
    {
        "patch-mixing": ({"form": "repository"}, 1.0),
        "patch-contrastive": ({"form": "repository"}, 1.0),
    },
)


def preset(name: str) -> dict[str, tuple[Penalty, float]]:
    """The penalties and coefficients of a released training by its name: deepvit, diverse-vit or patch-diversification.

    deepvit: the recipe with 32 blocks (zhoudaquan/dvit_repo, where it acts only while mixup does). diverse-vit: both released
    scripts (VITA-Group/Diverse-ViT), whose mixing term takes the place of the classification loss (`replaces_criterion`).
    patch-diversification: the released code (ChengyueGongR/PatchVisionTransformer), which has no cosine term. Raises
    UnknownNameError.
    """
    return {key: (PENALTIES[key].with_settings(settings), weight) for key, (settings, weight) in PRESETS[name].items()}
