"""Which attention layers an intervention touches, and where each takes its new map from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from collapse_probe.softmaxes import Frame
from collapse_probe.trace import Plan

KINDS: dict[str, str] = {
    "share": "the map of the block before, as it is in the same run (already replaced, where that block is replaced too); with "
    "blocks of other sizes between, that of the nearest earlier block whose map has the same heads, queries and keys",
    "mean": "the mean of the block's own map over all images of the run, gathered in a pass before with nothing replaced",
    "uniform": "the same weight for every key that the query may see",
    "identity": "every query reads its own token alone",
    "skip": "the attention branch gives zeros, its bias included, so that the residual stream passes alone",
}
WITHOUT_BRANCH = (
    "no module around the attention gives nothing but the attention's result: the residual is added within, or something "
    "besides the map carries the tokens on"
)


@dataclass(frozen=True)
class Branch:
    """What is silenced to skip a layer: the module call `frame`, or where that is None the attention inside a fused layer."""

    frame: Frame | None


@dataclass(frozen=True)
class Order:
    """What happens to one attention layer: its `kind`; the layer that `share` takes from; the branch that `skip` silences."""

    kind: str
    source: int | None = None
    branch: Branch | None = None


def layers_of(plan: Plan, block: int) -> list[int]:
    """The attention layers of a block, as indices into `plan.layers`."""
    return [i for i in plan.map_layers if plan.layers[i].block == block]


def source_of(plan: Plan, layer: int) -> int | None:
    """The layer whose map `share` takes: in the nearest earlier block with a map of the same heads, queries and keys."""
    mine = plan.layers[layer]
    assert mine.block is not None
    for block in range(mine.block - 1, -1, -1):
        alike = [i for i in layers_of(plan, block) if not plan.layers[i].reason and plan.layers[i].signature == mine.signature]
        if alike:
            place = layers_of(plan, mine.block).index(layer)
            return alike[min(place, len(alike) - 1)]
    return None


def refusal(plan: Plan, kind: str, block: int, branches: Mapping[int, Branch]) -> str:
    """Why the maps of a block cannot be replaced by `kind`; empty where they can."""
    for layer in layers_of(plan, block):
        found = plan.layers[layer]
        if kind in ("share", "mean") and found.reason:
            return found.reason
        if kind == "share" and source_of(plan, layer) is None:
            return (
                "there is no block before it"
                if block == 0
                else f"no earlier block has a map of {found.heads} heads and {found.queries} × {found.keys}"
            )
        if kind == "identity" and found.queries != found.keys:
            return f"its maps are not square ({found.queries} × {found.keys})"
        if kind == "skip" and layer not in branches:
            return f"{found.owner}: {WITHOUT_BRANCH}"
    return ""


def orders_for(plan: Plan, kind: str, blocks: Sequence[int], branches: Mapping[int, Branch]) -> dict[int, Order]:
    """The orders for all layers of some blocks, none of which refuses."""
    return {
        layer: Order(kind, source_of(plan, layer) if kind == "share" else None, branches.get(layer) if kind == "skip" else None)
        for block in blocks
        for layer in layers_of(plan, block)
    }
