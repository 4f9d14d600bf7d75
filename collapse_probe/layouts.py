"""How the axes of a block's tokens are laid out, and the one layout that everything here reads: [B, N, D]."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

_SEQUENCES: dict[str, Callable[[Tensor], Tensor]] = {
    "BND": lambda x: x,
    "NBD": lambda x: x.transpose(0, 1),
    "BhwD": lambda x: x.flatten(1, 2),
    "BDhw": lambda x: x.flatten(2).transpose(1, 2),
}


def as_tokens(value: object, images: int, layout: str) -> Tensor | None:
    """A block's output in a known layout as a token sequence [B, N, D]; None where there is none."""
    for x in value if isinstance(value, tuple) else (value,):
        if layout and _is_tokens(x, layout, images):
            assert isinstance(x, Tensor)
            return _SEQUENCES[layout](x)
    return None


def layout_of(block: nn.Module, value: object, images: int) -> str:
    """How the axes of a block's output are laid out, "" where no tensor in it is a token sequence.

    With four axes, that of the channels is as long as some vector of the block's parameters; where two axes
    are, a block with convolutions keeps its channels first.
    """
    widths = {len(p) for p in block.parameters() if p.ndim == 1}
    convolves = any(isinstance(module, nn.Conv2d) for module in block.modules())
    for x in value if isinstance(value, tuple) else (value,):
        for layout in ("BND", "NBD"):
            if _is_tokens(x, layout, images):
                return layout
        if isinstance(x, Tensor) and _is_tokens(x, "BDhw", images):
            first, last = x.shape[1] in widths, x.shape[3] in widths
            if first or last:
                return "BhwD" if last and not (first and convolves) else "BDhw"
    return ""


def _is_tokens(x: object, layout: str, images: int) -> bool:
    if not isinstance(x, Tensor) or x.ndim != len(layout) or not x.is_floating_point():
        return False
    return x.shape[layout.index("B")] == images


def steady_tokens(tokens: Tensor | None, images: int) -> list[bool] | None:
    """Which positions of [B, N, D] or [N, B, D] are bitwise the same for all images; None for other shapes."""
    if tokens is None or tokens.is_nested or tokens.ndim != 3 or images < 2 or images not in tokens.shape[:2]:
        return None
    tokens = tokens if len(tokens) == images else tokens.transpose(0, 1)
    found: list[bool] = (tokens == tokens[:1]).all(2).all(0).tolist()
    return found
