"""Where the patches of an image lie: their places among a layer's tokens, and how many pixels they are apart."""

from __future__ import annotations

import torch
from torch import Tensor

from collapse_probe.trace import Layer, Plan


def patch_places(plan: Plan, tokens: int) -> list[int] | None:
    """Positions of the patches among `tokens` tokens; None where there are fewer tokens than the model's patches.

    Tokens that a block adds of its own come first, as in `Trace.patches`.
    """
    patches = plan.tokens - len(plan.prefix)
    if patches < 1 or tokens < patches:
        return None
    if tokens == plan.tokens:
        return [t for t in range(tokens) if t not in plan.prefix]
    return list(range(tokens - patches, tokens))


def prefix_places(plan: Plan, tokens: int) -> list[int]:
    """Positions of what is no patch among `tokens` tokens; empty where the patches are not known there."""
    patches = patch_places(plan, tokens)
    return [] if patches is None else [t for t in range(tokens) if t not in set(patches)]


def patch_size(plan: Plan) -> tuple[float, float] | None:
    """Height and width of a patch in pixels of the model's input: the input's sides over the grid's.

    None where the patches form no rectangle or the input's size is unknown.
    """
    if plan.grid is None or plan.image_size is None:
        return None
    return plan.image_size[0] / plan.grid[0], plan.image_size[1] / plan.grid[1]


def patch_distances(grid: tuple[int, int], size: tuple[float, float]) -> Tensor:
    """Distance in pixels between the centres of all patches of a grid (rows, columns), row by row: [P, P] in float64.

    d_ij = √((height · Δrow)² + (width · Δcolumn)²) with the patches' (height, width) `size`.

    >>> patch_distances((1, 3), (16, 16))[0].tolist()
    [0.0, 16.0, 32.0]
    """
    rows, columns = (torch.arange(n, dtype=torch.float64) * side for n, side in zip(grid, size, strict=True))
    centres = torch.cartesian_prod(rows, columns)
    return (centres[:, None] - centres[None, :]).square().sum(-1).sqrt()


def over_patches(plan: Plan, layer: Layer) -> list[int] | None:
    """Positions of the patches among both the queries and the keys of a layer; None where these are not the same tokens."""
    return patch_places(plan, layer.keys) if layer.queries == layer.keys else None
