"""Value residual: every block attends to values that keep a part of the first block's."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from torch import Tensor

from collapse_probe.errors import SettingError
from collapse_probe.models.fixes.base import Fix, FixSite
from collapse_probe.registry import FIXES


@dataclass(frozen=True)
class ValueResidual(Fix):
    """v ← (1 − λ) v + λ v⁰ in every chosen block but the first, before the map multiplies it; v⁰ the values of block 0.

    As in the official code for ResFormer λ (`mix`) is 0.5 and fixed, and v⁰ is not detached. λ = 1 is SVFormer: all blocks
    share the values of block 0. Attention stays fused.
    """

    mix: Annotated[float, "[0, 1]"] = 0.5

    name = "value-residual"
    summary = "mixes the values of the first block into those of every other"
    source = "Value Residual Learning (ResFormer), arXiv 2410.17897"
    failure_types = ("entropy",)
    neutral = {"mix": 0.0}

    def reach(self, blocks: tuple[int, ...] | None, depth: int) -> tuple[int, ...]:
        """The chosen blocks and block 0, which only lends its values."""
        mixed = set(range(depth) if blocks is None else blocks) - {0}
        if not mixed:
            raise SettingError(f"{self.name} acts in blocks above 0: choose at least one of them")
        return (0, *sorted(mixed))

    def values(self, v_BHNK: Tensor, site: FixSite) -> Tensor:
        """[B, H, N, K] -> [B, H, N, K]."""
        if site.block == 0:
            site.memory["values"] = v_BHNK
            return v_BHNK
        return v_BHNK.lerp(site.take("values"), self.mix)


FIXES.add(ValueResidual.name, ValueResidual)
