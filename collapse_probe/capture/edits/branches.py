"""Finds what has to give zeros so that the attention of a layer adds nothing to the residual stream."""

from __future__ import annotations

import torch
from torch import nn

from collapse_probe.capture.capture import noise
from collapse_probe.capture.edits.replacement import ZEROS, Branch, Replacement, replacing
from collapse_probe.capture.plan import Plan
from collapse_probe.distributed import unwrap


def branches_of(model: nn.Module, plan: Plan, size: tuple[int, int], channels: int = 3, seed: int = 0) -> dict[int, Branch]:
    """For each layer what has to give zeros so that its attention adds nothing; layers without such a place are missing.

    With all maps zero, two different images are run: the outermost module between the block and its attention whose output is
    then the same for both adds nothing but attention (and biases), and so can be zeroed. The residual stream differs.
    """
    model = unwrap(model)
    zeros = {index: Replacement(ZEROS) for index in plan.map_layers}
    with torch.inference_mode(False), torch.no_grad(), replacing(model, plan, zeros) as replacer:
        model(noise(model, size, channels, seed))
    branches: dict[int, Branch] = dict.fromkeys(replacer.fused_blocks)
    for index, stack in replacer.stacks.items():
        block = plan.layers[index].block
        if index in branches or block is None:
            continue
        inside = plan.blocks[block].partition(" (call ")[0] + "."
        frame = next((f for f in stack if f[0].startswith(inside) and f in replacer.steady), None)
        if frame is not None:
            branches[index] = frame
    return branches
