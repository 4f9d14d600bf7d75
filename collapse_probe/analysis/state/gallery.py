"""The report's gallery: a few images with the attention that each patch receives in every block."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.nn.functional import avg_pool2d

from collapse_probe.capture.plan import Plan
from collapse_probe.capture.trace import Trace
from collapse_probe.metrics.functional.rollout import fused, rollouts
from collapse_probe.results.findings import Gallery
from collapse_probe.statistics.intervals import Array

Pixels = NDArray[np.uint8]
LONGEST = 144  # pixels of a thumbnail's longer side
Glimpse = tuple[Tensor, ...]
"""A picture as the model saw it, [3, height, width], its maps, [L, rows, columns], its rollouts, as these or empty, and its
maps by head and by patch, as `overlays` gives them."""
MOST_PATCHES = 400  # of a map by head or by patch; more are pooled
MOST_NUMBERS = 200_000  # of all maps by patch of one image


def on_the_grid(plan: Plan) -> dict[int, list[int]]:
    """The patches among the keys of every block whose map can be laid over the picture, by the block's number."""
    places: dict[int, list[int]] = {}
    for place, index in enumerate(plan.map_layers):
        layer = plan.layers[index]
        patches = [token for token in range(layer.keys) if token not in plan.prefix]
        if plan.grid is not None and not layer.reason and len(patches) == plan.grid[0] * plan.grid[1]:
            places[place] = patches
    return places


def overlays(trace: Trace, image: int) -> tuple[Tensor, Tensor, Tensor]:
    """What each patch receives in every block that is `on_the_grid`, all empty where there is none.

    From the class token or all queries: mean over heads [L, rows, columns], and head by head [L, H, rows, columns], NaN where
    a block has fewer heads. From single patches, mean over heads: [L, down, along, rows, columns]. The last two are pooled to
    at most MOST_PATCHES patches, and the queries to so many that one image has no more than MOST_NUMBERS.
    """
    plan, maps, heads, queries = trace.plan, [], [], []
    for place, patches in on_the_grid(plan).items():
        assert plan.grid is not None
        map_HNN = trace.map_of(plan.map_layers[place], image)
        first = plan.prefix[0] if plan.prefix and plan.prefix[0] < map_HNN.shape[1] else None
        each_HN = (map_HNN.mean(1) if first is None else map_HNN[:, first])[:, patches]
        maps.append(each_HN.mean(0).reshape(plan.grid).cpu())
        heads.append(pooled(each_HN.reshape(-1, *plan.grid)).cpu())
        if map_HNN.shape[1] == map_HNN.shape[2]:
            from_each = pooled(map_HNN.mean(0)[patches][:, patches].reshape(-1, *plan.grid))
            queries.append(_of_cells(from_each, plan.grid, len(on_the_grid(plan))).cpu())
    if not maps:
        return (torch.empty(0),) * 3
    most = max(len(each) for each in heads)
    whole = [torch.cat([each, each.new_full((most - len(each), *each.shape[1:]), math.nan)]) for each in heads]
    return torch.stack(maps), torch.stack(whole), torch.stack(queries) if len(queries) == len(maps) else torch.empty(0)


def pooled(maps: Tensor) -> Tensor:
    """Maps [..., rows, columns] of at most MOST_PATCHES patches: means over squares of neighbours, the smallest that do."""
    side = 1
    while -(-maps.shape[-2] // side) * -(-maps.shape[-1] // side) > MOST_PATCHES:
        side += 1
    return avg_pool2d(maps, side, ceil_mode=True) if side > 1 else maps


def _of_cells(maps: Tensor, grid: tuple[int, int], blocks: int) -> Tensor:
    """Maps of every query, [rows · columns, …], as means over the queries of square cells, [down, along, …]."""
    size, side = maps[0].numel() * blocks, 1
    while -(-grid[0] // side) * -(-grid[1] // side) * size > MOST_NUMBERS:
        side += 1
    by_key = maps.flatten(1).T.reshape(1, -1, *grid)
    cells = avg_pool2d(by_key, side, ceil_mode=True)[0] if side > 1 else by_key[0]
    return cells.permute(1, 2, 0).reshape(*cells.shape[1:], *maps.shape[1:])


def rollout_overlay(trace: Trace, image: int, fusion: str = "mean") -> Tensor:
    """What has come from each patch by attention rollout up to every block, [L, rows, columns]: for the class token, else the
    mean over queries.

    Empty where the blocks' maps are not all square and between the tokens of the grid. Rows of a rollout sum to one over all
    tokens (Abnar & Zuidema, arXiv 2005.00928).
    """
    plan = trace.plan
    layers = [plan.layers[index] for index in plan.map_layers]
    square = all(not layer.reason and layer.queries == layer.keys == plan.tokens for layer in layers)
    if not layers or not square or plan.grid is None:
        return torch.empty(0)
    patches = [token for token in range(plan.tokens) if token not in plan.prefix]
    rollouts_LNN = rollouts(torch.stack([fused(trace.map_of(index, image), fusion) for index in plan.map_layers]))
    gathered = rollouts_LNN[:, plan.prefix[0]] if plan.prefix else rollouts_LNN.mean(1)
    return gathered[:, patches].reshape(-1, *plan.grid).cpu()


def glimpse(trace: Trace, image: int, pixels_CHW: Tensor, rolled: bool) -> Glimpse:
    """What the gallery keeps of one image; its rollouts only where `rolled`."""
    maps, heads, patches = overlays(trace, image)
    return pixels_CHW.cpu().float(), maps, rollout_overlay(trace, image) if rolled else torch.empty(0), heads, patches


def gallery_of(glimpses: Iterable[tuple[str, Glimpse]], plan: Plan, preprocess: Mapping[str, Any]) -> Gallery | None:
    """The glimpses in the order of their names; None where no block has a map over a grid of patches."""
    by_name = {name: parts for name, parts in sorted(glimpses) if parts[1].numel()}
    if not by_name:
        return None
    pictures, maps, rolled, heads, patches = zip(*by_name.values(), strict=True)
    return Gallery(
        names=tuple(by_name),
        pictures=np.stack([as_seen(pixels, preprocess) for pixels in pictures]),
        maps=np.stack([each.double().numpy() for each in maps]),
        query="the class token" if plan.prefix else "all patches",
        blocks=tuple(on_the_grid(plan)),
        rollouts=_stacked(rolled),
        heads=_stacked(heads),
        patches=_stacked(patches),
    )


def _stacked(parts: Sequence[Tensor]) -> Array | None:
    """The parts of all images in one array; None where they are empty."""
    return np.stack([each.double().numpy() for each in parts]) if all(each.numel() for each in parts) else None


def as_seen(pixels_CHW: Tensor, facts: Mapping[str, Any]) -> Pixels:
    """The model's input [channels, height, width] as a picture again, uint8 [height, width, 3].

    `facts` describe the preprocessing. Of more than three channels the first three are shown, of fewer the first, in grey.
    """
    mean, std = facts.get("mean"), facts.get("std")
    if mean is not None and std is not None and len(mean) == len(pixels_CHW):
        pixels_CHW = pixels_CHW * torch.tensor(std)[:, None, None] + torch.tensor(mean)[:, None, None]
    else:
        low, high = pixels_CHW.min(), pixels_CHW.max()
        pixels_CHW = (pixels_CHW - low) / (high - low).clamp_min(1e-6)
    pixels_CHW = pixels_CHW[:3] if len(pixels_CHW) >= 3 else pixels_CHW[:1].expand(3, -1, -1)
    return np.asarray((pixels_CHW.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy())


def thumbnail(pixels_CHW: Tensor, facts: Mapping[str, Any]) -> Pixels:
    """The model's input as a small picture, uint8 [height, width, 3], LONGEST at most; `facts` describe the preprocessing."""
    seen = as_seen(pixels_CHW.detach().cpu().float(), facts)
    scale = min(1.0, LONGEST / max(seen.shape[:2]))
    height, width = (max(round(side * scale), 1) for side in seen.shape[:2])
    return np.asarray(Image.fromarray(seen).resize((width, height), Image.Resampling.LANCZOS), dtype=np.uint8)
