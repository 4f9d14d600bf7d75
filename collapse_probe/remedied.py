"""Subjects changed before they are measured: fixes put in, BatchNorm recalibrated; notes and the untrained
twin carry it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from collapse_probe.data import ImageSet, batches
from collapse_probe.devices import choose_device
from collapse_probe.errors import SettingError
from collapse_probe.grafting import apply
from collapse_probe.recalibration import recalibrate
from collapse_probe.settings import read_settings
from collapse_probe.sockets import FIXES
from collapse_probe.sources import loaded, resolve
from collapse_probe.subject import Subject

Chosen = tuple[str, dict[str, Any]]


def resolved(
    address: str | nn.Module,
    fixes: Sequence[str] = (),
    blocks: Sequence[int] | None = None,
    *,
    seed: int = 0,
    checkpoint: str | Path | None = None,
    pretrained: bool | None = None,
    partial: bool = False,
    **options: Any,
) -> Subject:
    """The subject at `address` with `fixes` in it, then the weights of `checkpoint`: see `sources.resolve` and `with_fixes`.

    The checkpoint may hold the fixes' own parameters, trained, or be one of the model without them: they then stay as the
    fixes made them, and a note says so. Raises what those two raise.
    """
    if not fixes or checkpoint is None:
        facts: dict[str, Any] = {"checkpoint": checkpoint, "pretrained": pretrained, "partial": partial, **options}
        return with_fixes(resolve(address, seed=seed, **facts), fixes, blocks, seed)
    subject = resolve(address, seed=seed, pretrained=bool(pretrained), **options)
    before = set(subject.model.state_dict())
    subject = with_fixes(subject, fixes, blocks, seed)
    return loaded(subject, checkpoint, partial=partial, optional=set(subject.model.state_dict()) - before)


def with_fixes(subject: Subject, fixes: Sequence[str], blocks: Sequence[int] | None = None, seed: int = 0) -> Subject:
    """The subject with `fixes` grafted into its model in place, into `blocks` (None: all that each can act
    on).

    A fix is `NAME`, at its neutral setting where it has one (the model then still computes what it
    computed), or `NAME:K=V,K=V` with settings of one's own beside the fix's defaults. Whatever a fix draws
    is drawn under `seed`. Raises UnknownNameError, SettingError, ModelError.
    """
    if not fixes:
        check_blocks(fixes, blocks)
        return subject
    chosen = [_read(fix) for fix in fixes]
    model = _grafted(subject.model, chosen, blocks, seed)
    before = subject.fresh
    said = _said(model, chosen)
    return replace(
        subject,
        address=f"{subject.address} + {said}",
        name="+".join([subject.name, *(name for name, _ in chosen)]),
        model=model,
        fresh=None if before is None else lambda s: _grafted(before(s), chosen, blocks, s),
        notes=(*subject.notes, f"fixes put into the model: {said}"),
    )


def check_blocks(fixes: Sequence[str], blocks: Sequence[int] | None) -> None:
    """Raise SettingError for blocks without a fix that could go there."""
    if blocks is not None and not fixes:
        raise SettingError(f"blocks {list(blocks)} were named for a fix, but no fix; name one (--fix)")


def blocks_in(text: str) -> list[int]:
    """Numbers of blocks from words; SettingError for anything else.

    >>> blocks_in("0,6-8")
    [0, 6, 7, 8]
    """
    found: list[int] = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        ends = (first, last) if dash else (first, first)
        if not all(end.strip().isascii() and end.strip().isdigit() for end in ends):
            raise SettingError(f"{text!r} names no blocks; expected for example 6-11 or 0,2,5-7")
        found += range(int(ends[0]), int(ends[1]) + 1)
    if not found or len(set(found)) != len(found):
        raise SettingError(f"{text!r} must name blocks from low to high, each once; for example 6-11 or 0,2,5-7")
    return sorted(found)


def recalibrated(
    subject: Subject, images: Any, count: int, *, batch_size: int = 64, device: str = "auto", seed: int = 0
) -> Subject:
    """The subject with the BatchNorm statistics of its model re-estimated in place over `count` batches of
    the images.

    The batches are a seeded draw from `images`, an ImageSet. The untrained twin is treated alike. With
    `count` 0 nothing is done; the notes say what was done, also where a model has no BatchNorm2d.
    SettingError for images that can be run through only once, or a negative count.
    """
    norms = [m for m in subject.model.modules() if isinstance(m, nn.BatchNorm2d) and m.track_running_stats]
    if count < 0:
        raise SettingError(f"the number of batches to recalibrate on must be 0 or more, not {count}")
    if not norms or not count:
        asked = "BatchNorm recalibration: there is no BatchNorm2d with running statistics, nothing was done"
        stored = "BatchNorm statistics are those that were stored; nothing was recalibrated"
        note = asked if count else stored if norms else ""
        return replace(subject, notes=(*subject.notes, note)) if note else subject
    if not isinstance(images, ImageSet):
        raise SettingError("recalibration reads some images twice: give a data address or an ImageSet, not an iterable")
    few, before, place = images.subset(count * batch_size, seed), subject.fresh, choose_device(device)

    def settled(model: nn.Module) -> int:
        stream = batches(few, subject.preprocess, batch_size=batch_size)
        return recalibrate(model.to(place), (batch.pixels for batch in stream if batch.names), count)

    def fresh(s: int) -> nn.Module:
        assert before is not None
        twin = before(s)
        settled(twin)
        return twin

    used = settled(subject.model)
    where = f"over {used} batches of up to {batch_size} images"
    note = f"BatchNorm statistics of {len(norms)} layers re-estimated {where}"
    return replace(subject, fresh=None if before is None else fresh, notes=(*subject.notes, note))


def _read(text: str) -> Chosen:
    """A fix's name and its settings out of `NAME:K=V,K=V`; without settings the neutral ones."""
    name, colon, rest = text.partition(":")
    fix = FIXES[name]
    if not colon:
        return name, dict(fix.neutral or {})
    return name, read_settings(rest.split(","), text)


def _grafted(model: nn.Module, chosen: Sequence[Chosen], blocks: Sequence[int] | None, seed: int) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        for name, settings in chosen:
            apply(model, name, blocks, **settings)
    return model.eval()


def _said(model: Any, chosen: Sequence[Chosen]) -> str:
    parts = []
    for (name, settings), mounted in zip(chosen, model.fixes[-len(chosen) :], strict=True):
        neutral = settings == FIXES[name].neutral
        how = "neutral" if neutral else ", ".join(f"{k}={v}" for k, v in mounted.settings.items())
        whole = tuple(mounted.blocks) == tuple(range(len(model.blocks)))
        where = "all blocks" if whole else f"blocks {', '.join(map(str, mounted.blocks))}"
        parts.append(f"{name} in {where} ({how or 'no settings'})")
    return " + ".join(parts)
