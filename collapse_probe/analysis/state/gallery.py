"""The report's gallery: a few images with the attention that each patch receives in every block."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from collapse_probe.capture.plan import Plan
from collapse_probe.capture.trace import Trace
from collapse_probe.metrics.functional.rollout import fused, rollouts
from collapse_probe.results.findings import Gallery

Pixels = NDArray[np.uint8]
LONGEST = 144  # pixels of a thumbnail's longer side
Glimpse = tuple[Tensor, ...]
"""A picture as the model saw it, [3, height, width], its overlays, [L, rows, columns], and its rollouts, as these or empty."""


def on_the_grid(plan: Plan) -> dict[int, list[int]]:
    """The patches among the keys of every block whose map can be laid over the picture, by the block's number."""
    places: dict[int, list[int]] = {}
    for place, index in enumerate(plan.map_layers):
        layer = plan.layers[index]
        patches = [token for token in range(layer.keys) if token not in plan.prefix]
        if plan.grid is not None and not layer.reason and len(patches) == plan.grid[0] * plan.grid[1]:
            places[place] = patches
    return places


def overlay(trace: Trace, image: int) -> Tensor:
    """What each patch receives in every block that is `on_the_grid`, [L, rows, columns]: mean over heads, from the class token
    or all queries.
    """
    plan, maps = trace.plan, []
    for place, patches in on_the_grid(plan).items():
        assert plan.grid is not None
        mean_NN = trace.map_of(plan.map_layers[place], image).mean(0)
        received = mean_NN[plan.prefix[0]] if plan.prefix and plan.prefix[0] < len(mean_NN) else mean_NN.mean(0)
        maps.append(received[patches].reshape(plan.grid).cpu())
    return torch.stack(maps) if maps else torch.empty(0)


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
    return pixels_CHW.cpu().float(), overlay(trace, image), rollout_overlay(trace, image) if rolled else torch.empty(0)


def gallery_of(glimpses: Iterable[tuple[str, Glimpse]], plan: Plan, preprocess: Mapping[str, Any]) -> Gallery | None:
    """The glimpses in the order of their names; None where no block has a map over a grid of patches."""
    by_name = {name: parts for name, parts in sorted(glimpses) if parts[1].numel()}
    if not by_name:
        return None
    pictures, maps, rolled = zip(*by_name.values(), strict=True)
    return Gallery(
        names=tuple(by_name),
        pictures=np.stack([as_seen(pixels, preprocess) for pixels in pictures]),
        maps=np.stack([each.double().numpy() for each in maps]),
        query="the class token" if plan.prefix else "all patches",
        blocks=tuple(on_the_grid(plan)),
        rollouts=np.stack([each.double().numpy() for each in rolled]) if all(each.numel() for each in rolled) else None,
    )


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
