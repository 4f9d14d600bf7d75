"""Where a model can be changed, in which ways, and why not elsewhere."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

from torch import Tensor, nn

from collapse_probe.capture.blocks import NO_MIDDLE
from collapse_probe.capture.edits.branches import branches_of
from collapse_probe.capture.edits.replacement import KINDS as MAPS
from collapse_probe.capture.edits.replacement import Branch, Replacement, refusal, replacements_for, replacing
from collapse_probe.capture.edits.streams import Bypass, block_call, fixed_blocks, left_out
from collapse_probe.capture.plan import Frame, Plan
from collapse_probe.capture.recorder import ModuleTable

DROPS: dict[str, str] = {
    "drop_block": "the block is left out: the next one reads what this one would have read, as in the model without it",
    "drop_attention": "the attention branch gives zeros, its bias included, so that the residual stream passes alone (as skip)",
    "drop_mlp": "the MLP branch is left out: what leaves the block is the residual stream after its attention, to the bit",
}
KINDS: dict[str, str] = {**MAPS, **DROPS}
"""Every way to change a block."""


@dataclass(frozen=True)
class Edit:
    """What is changed in one run: other maps by layer, and the blocks that are left out."""

    maps: Mapping[int, Replacement] = field(default_factory=dict)
    bypass: Bypass = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.maps or self.bypass)


@dataclass(frozen=True)
class Places:
    """The places of a model that were looked for: `branches` by layer; the blocks that are `fixed`, each with the reason."""

    plan: Plan
    branches: Mapping[int, Branch] = field(default_factory=dict)
    fixed: Mapping[int, str] = field(default_factory=dict)

    @classmethod
    def of(
        cls, model: nn.Module, plan: Plan, kinds: Sequence[str], size: tuple[int, int], channels: int = 3, seed: int = 0
    ) -> Places:
        """Those that `kinds` need, found with two images of noise."""
        skips, drops = {"skip", "drop_attention"} & {*kinds}, "drop_block" in kinds
        branches = branches_of(model, plan, size, channels, seed) if skips else {}
        return cls(plan, branches, fixed_blocks(model, plan, size, channels, seed) if drops else {})

    def refusal(self, kind: str, block: int) -> str:
        """Why a block cannot be changed so; empty where it can."""
        if kind == "drop_block":
            return self.fixed.get(block, "")
        if kind == "drop_mlp":
            if block_call(self.plan, block) is None:
                return f"{self.plan.blocks[block]} is no module of its own, from which an MLP could be left out"
            return "" if self._middle(block) else f"{self.plan.blocks[block]}: {NO_MIDDLE}"
        return refusal(self.plan, _of_maps(kind), block, self.branches)

    def edit(self, kind: str, blocks: Sequence[int]) -> Edit:
        """What is changed for a kind in some blocks; `refusal` must be empty for each."""
        if kind == "drop_mlp":
            ends = {block_call(self.plan, block): self._middle(block) for block in blocks}
            return Edit(bypass={frame: tap for frame, tap in ends.items() if frame is not None and tap is not None})
        if kind == "drop_block":
            frames = [frame for block in blocks if (frame := block_call(self.plan, block)) is not None]
            return Edit(bypass={frame: frame for frame in frames})
        return Edit(maps=replacements_for(self.plan, _of_maps(kind), blocks, self.branches))

    def _middle(self, block: int) -> Frame | None:
        """The module call that is given the stream between attention and MLP."""
        tap = self.plan.middles[block] if block < len(self.plan.middles) else None
        return None if tap is None or tap.side != "input" else (tap.path, tap.call)


def _of_maps(kind: str) -> str:
    return "skip" if kind == "drop_attention" else kind


@contextmanager
def edited(
    model: nn.Module, plan: Plan, edit: Edit, means: Mapping[int, Tensor], modules: ModuleTable | None = None
) -> Iterator[None]:
    """Run `model` with an edit inside the `with`; with an empty one it runs as it is. `means`, `modules`: see `replacing`."""
    with ExitStack() as stack:
        if edit.maps or not edit:
            stack.enter_context(replacing(model, plan, edit.maps, means=means, modules=modules))
        if edit.bypass:
            stack.enter_context(left_out(model, edit.bypass, modules))
        yield
