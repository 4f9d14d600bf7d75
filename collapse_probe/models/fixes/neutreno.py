"""NeuTRENO: keep each head's output near the values of the first block."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from torch import Tensor

from collapse_probe.errors import SettingError
from collapse_probe.models.fixes.base import Fix, FixSite
from collapse_probe.registry import FIXES


@dataclass(frozen=True)
class NeuTRENO(Fix):
    """out_h = A_h v_h + α (v⁰_h − v_h) in every chosen block but the first, v⁰ the values of block 0, not detached.

    As in the official code (α = 0.6 for DeiT, fixed), before the projection of the heads. Attention stays fused.
    """

    alpha: Annotated[float, "(-inf, inf)"] = 0.6

    name = "neutreno"
    summary = "pulls each head's output towards the values of the first block"
    source = "NeuTRENO, arXiv 2312.00751"
    failure_types = ("tokens",)
    neutral = {"alpha": 0.0}

    def reach(self, blocks: tuple[int, ...] | None, depth: int) -> tuple[int, ...]:
        """The chosen blocks and block 0, which only lends its values."""
        pulled = set(range(depth) if blocks is None else blocks) - {0}
        if not pulled:
            raise SettingError(f"{self.name} acts in blocks above 0: choose at least one of them")
        return (0, *sorted(pulled))

    def heads(self, out_BHNK: Tensor, v_BHNK: Tensor, site: FixSite) -> Tensor:
        """[B, H, N, K] -> [B, H, N, K]."""
        if site.block == 0:
            site.memory["values"] = v_BHNK
            return out_BHNK
        return out_BHNK + self.alpha * (site.take("values") - v_BHNK)


FIXES.add(NeuTRENO.name, NeuTRENO)
