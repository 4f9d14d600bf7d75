"""Putting a fix into a model that has sockets: all of it or nothing, with a record of what was done."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn

from collapse_probe.errors import ModelError, SettingError
from collapse_probe.fix import Fix, Mounted, Part, Site


def mount(model: Any, fix: Fix, blocks: Sequence[int] | None = None) -> None:
    """Put `fix` into a model with sockets: into `blocks` (None: all that it can act on), at once or not at
    all.

    A model with sockets has `blocks` (each with `attn`), `embed_dim`, `num_prefix_tokens`, and a list
    `seats` on itself, on each block and on each attention. Raises SettingError for blocks that the model or
    the fix does not have, ModelError where the fix already sits.
    """
    depth = len(model.blocks)
    given = None if blocks is None else _checked(fix, blocks, depth)
    reach = fix.reach(given, depth)
    for before in model.fixes:
        if before.name == fix.name and set(before.blocks) & set(reach):
            raise ModelError(f"the model already has {fix.name} in blocks {list(before.blocks)}: once is enough")
    if fix.home == "modules":
        _convert(model, fix, given)
    else:
        _seat(model, fix, _sites(model, fix, reach))
    model.num_prefix_tokens = fix.prefix_tokens(model.num_prefix_tokens)
    model.fixes = (*model.fixes, Mounted(fix.name, asdict(fix), reach))


def _checked(fix: Fix, blocks: Sequence[int], depth: int) -> tuple[int, ...]:
    chosen = tuple(sorted({*blocks}))
    if not chosen or len(chosen) != len(blocks) or not all(type(i) is int and 0 <= i < depth for i in chosen):
        raise SettingError(f"{fix.name}: blocks must be different numbers from 0 to {depth - 1}, not {list(blocks)}")
    return chosen


def _sites(model: Any, fix: Fix, reach: tuple[int, ...]) -> list[Site]:
    heads = model.blocks[0].attn.num_heads
    facts = (reach, len(model.blocks), model.embed_dim, heads, model.num_prefix_tokens)
    memory: dict[str, Tensor] = {}
    if fix.home == "model":
        return [Site(model, -1, *facts, memory)]
    blocks = {i: model.blocks[i] for i in reach}
    return [Site(block.attn if fix.home == "attention" else block, i, *facts, memory) for i, block in blocks.items()]


def _seat(model: Any, fix: Fix, sites: list[Site]) -> None:
    like = next(model.parameters())
    with torch.device(like.device):
        made = [fix.parts(site) for site in sites]
    for site, parts in zip(sites, made, strict=True):
        for name in parts:
            if hasattr(site.home, name):
                where = "the model" if site.block < 0 else f"block {site.block}"
                raise ModelError(f"{where} already has a {name}, which {fix.name} would add")
    for site, parts in zip(sites, made, strict=True):
        for name, part in parts.items():
            setattr(site.home, name, _fitted(part, like.dtype, site.home.training))
        site.home.seats.append((fix, site))


def _fitted(part: Part, dtype: torch.dtype, training: bool) -> Part:
    if isinstance(part, nn.Module):
        return part.to(dtype).train(training)
    return nn.Parameter(part.to(dtype))


def _convert(model: Any, fix: Fix, blocks: tuple[int, ...] | None) -> None:
    roots = [model] if blocks is None else [model.blocks[i] for i in blocks]
    modules = [module for root in roots for module in root.modules()]
    if not sum(fix.convert(module, model.embed_dim) for module in modules):
        raise ModelError(f"the model has no layer that {fix.name} could act on")
