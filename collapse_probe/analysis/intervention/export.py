"""Which blocks an exported model lacks, and that it gives what the model gave without them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from collapse_probe.analysis.intervention.runner import ReplacementRunner
from collapse_probe.analysis.outputs import logits_in
from collapse_probe.capture.capture import noise, same
from collapse_probe.capture.edits.places import edited
from collapse_probe.devices import moved
from collapse_probe.distributed import rank_and_world, shared
from collapse_probe.errors import ModelError
from collapse_probe.models.pruning import BLOCKS, Pruning
from collapse_probe.results.intervention import GREEDY, Interventions
from collapse_probe.results.text import numbered


def blocks_to_go(interventions: Interventions, keep: int | None, blocks: Sequence[int] | None) -> tuple[tuple[int, ...], str]:
    """The blocks that the exported model lacks, and why there are none: those that were named; or the first ones of the greedy
    order until `keep` are left; or as many of these as can go.
    """
    if blocks is not None:
        return tuple(sorted(blocks)), ""
    order = interventions.orders.get("drop_block", {}).get(GREEDY)
    if order is None:
        return (), "no order of the blocks was chosen; name the blocks to leave out"
    count = order.spared if keep is None else len(order.blocks)
    return tuple(sorted(order.blocks[:count])), "no block can go; say how many to keep, or name the blocks to leave out"


def exported(runner: ReplacementRunner, pruning: Pruning, gone: Sequence[int]) -> dict[str, Any]:
    """Write the model without some blocks; what `Pruning.write` says of it.

    Raises ModelError where it does not give what the model gives without them, to the bit, on images of noise.
    """
    plan = runner.plan
    if list(plan.blocks) != [f"{BLOCKS}.{block}" for block in range(pruning.depth)]:
        raise ModelError(f"{pruning.subject.address}: its blocks are not those of its list `{BLOCKS}`, and cannot be exported")
    made = runner.subject.preprocess
    pixels = noise(runner.model, made.size, made.channels, runner.settings.seed)
    with edited(runner.model, plan, runner.places.edit("drop_block", gone)):
        expected = runner.model(pixels)
    model = pruning.pruned(gone)
    with torch.inference_mode(False), torch.no_grad():
        found = moved(model, runner.device)(pixels)
    if isinstance(logits_in(found, len(pixels)), str) or not same(found, expected):
        raise ModelError(
            f"{pruning.subject.address} built without {numbered(gone)} is another model: what a block computes depends on its "
            "place here, and no checkpoint without some blocks gives the same logits"
        )
    said = pruning.write(model.cpu(), gone) if rank_and_world()[0] == 0 else None
    return dict(shared(said, 0))
