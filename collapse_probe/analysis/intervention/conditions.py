"""Which changes are tried, each alone and together, and what every image gave under each of them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from collapse_probe.analysis.intervention.moves import relative_rms_change, shared_energy_fraction
from collapse_probe.analysis.intervention.runner import ReplacementRunner, Run
from collapse_probe.analysis.measurement import FAIL, Images, Progress
from collapse_probe.analysis.outputs import kl_divergence, logits_in
from collapse_probe.analysis.state.passes import Answers
from collapse_probe.capture.capture import same
from collapse_probe.capture.edits.places import DROPS, PREFIX, SINKS, Edit
from collapse_probe.data.loading import Batch
from collapse_probe.errors import CaptureError, DataError, ModelError, NonFiniteError, SettingError
from collapse_probe.metrics.nonfinite import all_ill, nonfinite_error
from collapse_probe.results.text import numbered
from collapse_probe.statistics.intervals import Array

Classes = NDArray[np.int64]
MOVES = ("moved", "shared", "sinks")
"""How far the last patch tokens move, the part of that which they share, and how many heads were edited; see `Effect`."""
Condition = tuple[str, tuple[int, ...]]
"""A kind of change and the blocks in which it is made."""


@dataclass(frozen=True)
class ConditionGrid:
    """The chosen blocks, by kind those in which it can be made, the reasons why not in others, the windows of consecutive
    blocks, and every condition once.
    """

    blocks: tuple[int, ...]
    able: Mapping[str, Sequence[int]]
    refused: Mapping[tuple[str, int], str]
    windows: Mapping[str, Sequence[tuple[int, ...]]]
    conditions: list[Condition]

    def down(self, kind: str) -> list[tuple[int, ...]]:
        """The last block, the last two, … all of them; none for blocks that are dropped, which have an
        order of their own, and for states, which pass on from block to block."""
        able = self.able[kind]
        return [] if kind in {*DROPS, *PREFIX, *SINKS} else [tuple(able[first:]) for first in reversed(range(len(able)))]


@dataclass(frozen=True)
class ConditionOutputs:
    """Of every image in the data's order the top answer, `plain` [images] and under each condition `top1` [conditions, images],
    and the KL divergence `kl` [conditions, images] from the plain softmax; `labels` by name where the batches had
    them; `moves` [conditions, images].
    `spread` is how much a logit varies over the images at most, over the largest logit, `nonfinite` the images left out because
    a condition makes their logits NaN or infinite.
    """

    names: list[str]
    labels: dict[str, int]
    classes: int
    plain: Classes
    top1: Classes
    kl: Array
    moves: Mapping[str, Array] = field(default_factory=dict)
    spread: float = math.inf
    nonfinite: tuple[tuple[str, str], ...] = ()


def condition_grid(
    runner: ReplacementRunner, kinds: Sequence[str], blocks: Sequence[int] | None, window: int = 1
) -> ConditionGrid:
    """Each chosen block alone, the sets of them from the last one down, and for blocks that are dropped every `window` of
    consecutive ones, for every kind; SettingError where none can be.
    """
    count = len(runner.plan.blocks)
    chosen = tuple(range(count)) if blocks is None else tuple(sorted(set(blocks)))
    if not chosen or chosen[0] < 0 or chosen[-1] >= count:
        raise SettingError(f"the model has blocks 0 to {count - 1}; came {list(chosen)}")
    reasons = {(kind, block): runner.places.refusal(kind, block) for kind in kinds for block in chosen}
    refused = {key: reason for key, reason in reasons.items() if reason}
    if len(refused) == len(reasons):
        why = "; ".join(f"{kind} in block {block}: {reason}" for (kind, block), reason in refused.items())
        raise SettingError(f"nothing can be {'dropped' if {*kinds} <= {*DROPS} else 'replaced'}: {why}")
    able = {kind: [block for block in chosen if (kind, block) not in refused] for kind in kinds}
    windows = {kind: _windows(each, window) if kind in DROPS and window > 1 else [] for kind, each in able.items()}
    if window > 1 and not any(windows.values()):
        raise SettingError(f"there are no {window} consecutive blocks that can be dropped; came a window of {window}")
    grid = ConditionGrid(chosen, able, refused, windows, [])
    for kind, each in able.items():
        grid.conditions.extend((kind, some) for some in [*((b,) for b in each), *grid.down(kind), *windows[kind]])
    grid.conditions[:] = dict.fromkeys(grid.conditions)
    return grid


def _windows(blocks: Sequence[int], size: int) -> list[tuple[int, ...]]:
    """Every `size` consecutive blocks of some."""
    return [tuple(range(b, b + size)) for b in blocks if {*range(b, b + size)} <= {*blocks}]


def run_conditions(
    runner: ReplacementRunner,
    images: Images,
    conditions: Sequence[Condition],
    progress: Progress | None = None,
    name: str = "conditions",
) -> ConditionOutputs:
    """Every image once plainly and once under each condition, in all processes; the state of the pass is kept under `name`."""
    edits = [runner.places.edit(*condition) for condition in conditions]
    answers = Answers(runner.identity(name, images, conditions), runner.settings.seed)
    moving = {condition for condition in conditions if condition[0] in {*PREFIX, *SINKS}}
    checked = False

    def take(batch: Batch) -> None:
        nonlocal checked
        kept: list[tuple[list[int], dict[str, Any], Tensor]] = []
        nonfinite: list[tuple[str, str]] = []
        for part, pixels in runner.parts(batch):
            named = [batch.names[i] for i in part]
            plainly = runner.run(pixels, Edit(), named, final=bool(moving))
            if not checked and not same(runner.run_plain(pixels), plainly.output):
                raise CaptureError(
                    "the model with nothing replaced differs from itself; is it deterministic? call eval() first"
                )
            checked = True
            plain_logits, changed, moves = _logits(plainly)[: len(pixels)], [], []
            for condition, edit in zip(conditions, edits, strict=True):
                run = runner.run(pixels, edit, named, final=condition in moving)
                changed.append(_logits(run)[: len(pixels)])
                if moving:
                    moves.append(_moved(runner, plainly.last, run, named, edit) if condition in moving else nowhere(named))
            ill = _nonfinite(plain_logits, changed, conditions)
            nonfinite += [(batch.names[part[i]], why) for i, why in ill.items()]
            if ill and runner.settings.on_nonfinite == FAIL:
                seen = answers.records.seen + len(part)
                raise NonFiniteError(nonfinite_error(nonfinite, seen, runner.settings.amp_as))
            keep = [i for i in range(len(part)) if i not in ill]
            plain_logits, changed = plain_logits[keep], [logits[keep] for logits in changed]
            columns = {
                "plain": plain_logits.argmax(1).numpy(),
                "top1": np.stack([logits.argmax(1).numpy() for logits in changed], axis=1),
                "kl": np.stack([kl_divergence(plain_logits, logits) for logits in changed], axis=1),
            }
            if moving:
                columns |= {name: np.stack([each[at] for each in moves], axis=1)[keep] for at, name in enumerate(MOVES)}
            kept.append(([part[i] for i in keep], columns, plain_logits))
        answers.inconsistent = True
        for rows, columns, plain_logits in kept:
            labels = [] if batch.labels is None else batch.labels[rows].tolist()
            names, places = [batch.names[i] for i in rows], [batch.indices[i] for i in rows] if batch.indices else []
            answers.take(names, columns, places, labels, plain_logits)
        answers.nonfinite += nonfinite
        answers.skipped += len(batch.skipped)

    runner.over(images, answers, name, take, progress)
    table = answers.records.table()
    if not len(table):
        raise NonFiniteError(all_ill(answers.nonfinite)) if answers.nonfinite else DataError("no image could be read")
    columns = table.columns
    return ConditionOutputs(
        list(table.names),
        table.labels_by_name(),
        answers.classes,
        columns["plain"],
        columns["top1"].T,
        columns["kl"].T,
        {name: columns[name].T for name in MOVES if name in columns},
        answers.bounds.spread,
        tuple(sorted(answers.nonfinite)),
    )


def nowhere(names: Sequence[str]) -> list[Array]:
    """No move of these images' tokens."""
    return [np.full(len(names), np.nan) for _ in MOVES]


def _moved(runner: ReplacementRunner, before: Tensor | None, run: Run, names: Sequence[str], edit: Edit) -> list[Array]:
    """How far the last patch tokens move, those that were edited left out, the shared part of that, and in how many heads sinks
    were edited; NaN where the last tokens are others than the first ones.
    """
    plan, count = runner.plan, len(names)
    moved, shared, heads = nowhere(names)
    if edit.sinks and run.sinks.heads is not None:
        heads = run.sinks.heads.double().cpu().numpy()
    if before is None or run.last is None or before.shape[1:] != (plan.tokens, plan.width):
        return [moved, shared, heads]
    counted = torch.ones(count, plan.tokens, dtype=torch.bool, device=before.device)
    counted[:, list(plan.prefix)] = False
    if edit.states and edit.at is None:
        drawn = runner.drawn(names)
        counted.scatter_(1, drawn.others[:, : drawn.count], False)
    if run.sinks.keys is not None:
        counted &= ~run.sinks.keys
    base, new = before[:count], run.last[:count]
    moves = relative_rms_change(new, base, counted), shared_energy_fraction(new.double() - base.double(), counted)
    return [*(each.cpu().numpy() for each in moves), heads]


def _logits(run: Run) -> Tensor:
    """The logits [B, classes] in a model's output, float64 on the CPU; ModelError where there are none."""
    logits = logits_in(run.output, run.images)
    if isinstance(logits, str):
        raise ModelError(f"interventions are judged by a classifier's logits [images, classes]; the model's output is {logits}")
    return logits.detach().cpu().to(torch.float64)


def _nonfinite(plain: Tensor, changed: Sequence[Tensor], conditions: Sequence[Condition]) -> dict[int, str]:
    """The images of which some logits are NaN or infinite, each with the first condition under which they are."""
    ill = dict.fromkeys(torch.nonzero(~torch.isfinite(plain).all(1)).flatten().tolist(), "its logits, with nothing replaced")
    for (kind, blocks), logits in zip(conditions, changed, strict=True):
        for i in torch.nonzero(~torch.isfinite(logits).all(1)).flatten().tolist():
            ill.setdefault(i, f"its logits, with {kind} in {numbered(blocks)}")
    return ill
