"""Where tokens, maps and weight matrices of a Vision Transformer are found: in ours, in DeepViT's, in timm's."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

from torch import Tensor, nn

from collapse_probe.errors import ModelError, SettingError

Place = int | Literal["embedded", "normed"]
"""Where tokens pass: a depth (0 enters the first block, L leaves the last), the patch embedding's output, the final norm's."""
Matrix = Literal["query", "key", "value", "proj", "fc1", "fc2"]
MATRICES: tuple[Matrix, ...] = ("query", "key", "value", "proj", "fc1", "fc2")


class Anatomy:
    """The parts of `model` that penalties name; each is looked for when it is asked for.

    Raises ModelError for a model without a list of blocks.
    """

    def __init__(self, model: Any) -> None:
        self.model, self.kind = model, type(model).__name__
        blocks = getattr(model, "blocks", None)
        if not isinstance(blocks, nn.Sequential | nn.ModuleList) or not len(blocks):
            raise ModelError(f"{self.kind} has no list `blocks`: penalties hear timm's VisionTransformer, DeepViT or our ViT")
        self.blocks: Sequence[Any] = list(blocks)
        self.depth = len(self.blocks)

    @property
    def prefix(self) -> int:
        """How many tokens stand before the patches inside the blocks."""
        found = getattr(self.model, "num_prefix_tokens", None)
        if not isinstance(found, int):
            raise ModelError(f"{self.kind} does not say how many tokens stand before the patches (num_prefix_tokens)")
        return found

    @property
    def width(self) -> int:
        """The width D of the tokens."""
        found = getattr(self.model, "embed_dim", None)
        if not isinstance(found, int):
            raise ModelError(f"{self.kind} does not say how wide its tokens are (embed_dim)")
        return found

    def chosen(self, blocks: tuple[int, ...] | None) -> tuple[int, ...]:
        """The blocks meant by a setting (None: all); SettingError for one that the model does not have."""
        if blocks is None:
            return tuple(range(self.depth))
        wrong = [i for i in blocks if not 0 <= i < self.depth]
        if wrong:
            raise SettingError(f"{self.kind} has blocks 0 to {self.depth - 1}, not {wrong}")
        return blocks

    def passage(self, place: Place) -> tuple[nn.Module, Literal["input", "output"]]:
        """The module at which the tokens of a place pass, and on which side of it."""
        if place == 0:
            return self.blocks[0], "input"
        if isinstance(place, int):
            if not 0 < place <= self.depth:
                raise SettingError(f"{self.kind} has depths 0 to {self.depth}, not {place}")
            return self.blocks[place - 1], "output"
        return self.part({"embedded": "patch_embed", "normed": "norm"}[place]), "output"

    def part(self, name: str) -> nn.Module:
        """The model's own module of that name; ModelError where it has none."""
        found = getattr(self.model, name, None)
        if not isinstance(found, nn.Module):
            raise ModelError(f"{self.kind} has no `{name}`, where this penalty would hear")
        return found

    def attention(self, block: int) -> nn.Module:
        """The attention module of a block."""
        found = getattr(self.blocks[block], "attn", None)
        if not isinstance(found, nn.Module):
            raise ModelError(f"block {block} of {self.kind} has no `attn`, where its attention maps would be heard")
        return found

    def matrix(self, block: int, name: Matrix) -> Tensor:
        """A weight matrix of a block, [out, in]: of the attention (query, key, value, proj) or the MLP (fc1, fc2)."""
        if name in ("fc1", "fc2"):
            owner, layer = getattr(self.blocks[block], "mlp", None), str(name)
        else:
            owner, layer = self.attention(block), "proj" if name == "proj" else "qkv"
        weight = getattr(getattr(owner, layer, None), "weight", None)
        if not isinstance(weight, Tensor) or weight.ndim != 2:
            raise ModelError(
                f"block {block} of {self.kind} has no linear layer `{layer}`, whose weight this penalty would read"
            )
        if layer != "qkv":
            return weight
        if weight.shape[0] % 3:
            raise ModelError(
                f"`qkv` in block {block} of {self.kind} has {weight.shape[0]} rows, which are no three equal parts"
            )
        return weight.chunk(3)[("query", "key", "value").index(name)]

    def grid(self, patches: int) -> tuple[int, int]:
        """Rows and columns of so many patches; ModelError where they fill no known grid."""
        known = getattr(getattr(self.model, "patch_embed", None), "grid_size", None)
        if isinstance(known, tuple) and len(known) == 2 and math.prod(known) == patches:
            return known
        side = math.isqrt(patches)
        if side**2 != patches:
            raise ModelError(f"the {patches} patches of {self.kind} fill no square, and its patch_embed names no grid")
        return side, side

    def classes(self) -> int:
        """How many classes the model's head tells apart."""
        head = self.part("head")
        found = getattr(head, "out_features", None)
        if not isinstance(found, int):
            raise ModelError(f"the head of {self.kind} is no linear classifier ({type(head).__name__}): it gives no logits")
        return found

    def logits(self, normed_BND: Tensor) -> Tensor:
        """The model's own head on every token behind the final norm, [B, N, D] -> [B, N, classes]."""
        self.classes()
        norm, head = getattr(self.model, "fc_norm", None), self.part("head")
        tokens_BND = normed_BND.to(next(head.parameters()).dtype)
        found: Tensor = head(tokens_BND if norm is None else norm(tokens_BND))
        return found
