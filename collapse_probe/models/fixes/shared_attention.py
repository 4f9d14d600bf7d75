"""Shared attention: blocks that reuse the map of an earlier block instead of making their own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from torch import Tensor

from collapse_probe.errors import SettingError
from collapse_probe.models.fixes.base import Fix, FixSite
from collapse_probe.registry import FIXES


@dataclass(frozen=True)
class SharedAttention(Fix):
    """The chosen blocks above block `source_block` attend as it does: softmax of its logits, on their own values.

    If maps have collapsed onto each other, this should cost little: it is the test of that claim on one's own model. The
    source takes the previous block's map; here any block's, by default in all blocks above it. Fixes added later act on the
    shared map in each block by itself. No neutral setting, no parameters; queries and keys of the borrowing blocks get no
    gradient.
    """

    source_block: Annotated[int, "[0, inf)"] = 0

    name = "shared-attention"
    summary = "blocks reuse the attention map of an earlier block"
    source = "share_atten in the code of Refiner, arXiv 2106.03714"

    def reach(self, blocks: tuple[int, ...] | None, depth: int) -> tuple[int, ...]:
        """The source block and the blocks that borrow from it."""
        borrowing = tuple(range(self.source_block + 1, depth)) if blocks is None else blocks
        if not borrowing or min(borrowing) <= self.source_block:
            raise SettingError(
                f"{self.name}: blocks must lie above source_block {self.source_block} "
                f"(the model has blocks 0 to {depth - 1}), not {list(borrowing)}"
            )
        return (self.source_block, *borrowing)

    def logits(self, logits_BHNN: Tensor, site: FixSite) -> Tensor:
        """The source block leaves its logits; the others take them, so that their softmax is the same map."""
        if site.block == self.source_block:
            site.memory["attention logits"] = logits_BHNN
            return logits_BHNN
        return site.take("attention logits")


FIXES.add(SharedAttention.name, SharedAttention)
