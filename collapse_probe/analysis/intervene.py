"""The verb intervene: what the attention of a block is worth, by replacing its map while the model runs."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from collapse_probe.analysis.analyze import read_all
from collapse_probe.analysis.facts import behaviour_facts, source_facts, weights_sha256
from collapse_probe.analysis.measurement import (
    FAIL,
    Images,
    Progress,
    Report,
    RunSettings,
    model_input,
    restored,
    settled,
    with_input,
)
from collapse_probe.analysis.outputs import kl_divergence, labels_for, logits_in
from collapse_probe.analysis.state.keeper import SAVE_EVERY, Keeper, Saving, all_in_time, saving_of, signals_deferred
from collapse_probe.analysis.state.passes import Answers, MapSums, Pass, identity_of
from collapse_probe.analysis.state.phases import REPLACED, Phase
from collapse_probe.capture.capture import same
from collapse_probe.capture.edits.branches import branches_of
from collapse_probe.capture.edits.replacement import KINDS, Branch, Replacement, refusal, replacements_for, replacing
from collapse_probe.capture.plan import Plan
from collapse_probe.capture.recorder import ModuleTable
from collapse_probe.capture.trace import TRACE_BYTES
from collapse_probe.data.images import OwnImages, batches_of, images_from
from collapse_probe.data.loading import Batch
from collapse_probe.data.preprocessing import Size
from collapse_probe.devices import autocast, choose_device, floating_like
from collapse_probe.distributed import check_processes, unwrap
from collapse_probe.errors import CaptureError, DataError, ModelError, NonFiniteError, OutOfTimeError, SettingError
from collapse_probe.metrics.nonfinite import all_ill, nonfinite_error
from collapse_probe.models.loading import Subject, resolve
from collapse_probe.results.findings import Findings, plain
from collapse_probe.results.intervention import Effect, Ends, Interventions
from collapse_probe.results.readings import adjacent
from collapse_probe.results.text import numbered
from collapse_probe.statistics.intervals import Array
from collapse_probe.statistics.paired import Sides, compare_sides
from collapse_probe.statistics.proportions import wilson

MAPS_HELD = 6  # of one layer: the map before, the map in its place, their copies in other types
SIMILARITY = "attention-similarity"
Classes = NDArray[np.int64]
Condition = tuple[str, tuple[int, ...]]
"""A kind of replacement and the blocks in which it is made."""


def intervene(
    model: str | nn.Module | Subject,
    data: str | Path | Images,
    replace: Sequence[str] = ("share",),
    blocks: Sequence[int] | None = None,
    *,
    split: str | None = None,
    limit: int | None = None,
    max_pixels: int | None = None,
    checkpoint: str | Path | None = None,
    checkpoint_key: str | None = None,
    partial: bool = False,
    pretrained: bool | None = None,
    model_kwargs: Mapping[str, Any] | None = None,
    img_size: Size | None = None,
    blocks_pattern: str | None = None,
    batch_size: int | None = None,
    workers: int | None = None,
    device: str = "auto",
    amp: bool = False,
    amp_dtype: str | None = None,
    seed: int = 0,
    on_nonfinite: str = FAIL,
    save_to: str | Path | None = None,
    save_every: float = SAVE_EVERY,
    max_time: float | None = None,
    resume: bool = False,
    command: str = "",
    progress: Progress | None = None,
    report: Report | None = None,
) -> Interventions:
    """Replace the attention maps of `blocks` (None: all), one block at a time and cumulatively from the last block down.

    `replace` names one or more of `KINDS`: share, mean, uniform, identity, skip. Reported are the change in the logits
    (KL from the plain model, agreement of the top answer) and, where the data's labels are the model's classes, in accuracy,
    each with a 95 % interval over images. A map is what multiplies V; a replacement that does not apply to a block says why.
    The run with nothing replaced equals the plain model's to the bit, which is checked on the first images. The other
    arguments are as for `analyze`; the data are read twice or more, so an iterator will not do. Each image runs through the
    model once plainly, and about twice for every block and replacement.

    Raises SettingError for unknown replacements and blocks and where nothing can be replaced, ModelError for a model without
    logits, CollapseProbeError for whatever cannot be read or captured.
    """
    kinds = (replace,) if isinstance(replace, str) else tuple(dict.fromkeys(replace))
    unknown = [kind for kind in kinds if kind not in KINDS]
    if unknown or not kinds:
        came = repr(unknown[0]) if unknown else "none"
        raise SettingError(f"expected replacements out of {', '.join(KINDS)}; came {came}")
    settings = RunSettings(
        device=device,
        amp=amp,
        amp_dtype=amp_dtype,
        batch_size=batch_size,
        workers=workers,
        seed=seed,
        metrics=(SIMILARITY,),
        null_images=0,
        gallery_images=0,
        on_nonfinite=on_nonfinite,
        command=command,
    )
    saving = saving_of(save_to, save_every, max_time, resume)
    images = images_from(data, split=split, limit=limit, seed=seed, max_pixels=max_pixels)
    if isinstance(images, OwnImages) and images.once:
        raise DataError("the images are run through more than once: give an address, an ImageSet, a list or a DataLoader")
    say = report or (lambda text: None)
    for note in images.notes:
        say(note)
    with restored(model):
        subject = (
            model
            if isinstance(model, Subject)
            else resolve(
                model,
                checkpoint=checkpoint,
                checkpoint_key=checkpoint_key,
                partial=partial,
                pretrained=pretrained,
                model_kwargs=model_kwargs,
                img_size=img_size,
                blocks_pattern=blocks_pattern,
                seed=seed,
            )
        )
        subject, ill = with_input(subject, images), dict[str, str]()
        made = subject.preprocess
        settings = settled(settings, made.size, images)
        while True:  # once more without the images whose logits a replacement makes NaN or infinite, where that is asked for
            say("measuring the similarity of the maps")
            without = hashlib.sha256("\n".join(sorted(ill)).encode()).hexdigest()[:8] if ill else "all"
            first = None if saving is None else saving.of(f"similarity-{without}")
            probe, stopper = read_all(subject, images, settings, say=say, left_out=ill, saving=first)
            findings, plan = probe.conclude(say, stopper), probe.measurement.plan
            branches = branches_of(subject.model, plan, made.size, made.channels, seed) if "skip" in kinds else {}
            skipped = frozenset(str(each["name"]) for each in findings.data["skipped"])
            keeping = None if saving is None else saving.of(without)
            runner = ReplacementRunner(
                subject, plan, choose_device(device), settings, branches, skipped, say=say, saving=keeping
            )
            grid = condition_grid(runner, kinds, blocks)
            if grid.able.get("mean"):
                say("gathering each block's mean map")
                runner.means.update(mean_maps(runner, images, grid.able["mean"]))
            say(Phase(REPLACED, f"{len(grid.conditions)} runs with maps replaced, beside the plain one, over every image"))
            outputs = run_conditions(runner, images, grid.conditions, progress)
            if not outputs.nonfinite:
                break
            ill |= dict(outputs.nonfinite)
    return _interventions(findings, grid, outputs, images)


@dataclass(frozen=True)
class ReplacementRunner:
    """A model ready for runs with maps replaced, over all images but those `left_out` by name; `means` holds the mean map
    [H, N, N] of the layers that need it.
    """

    subject: Subject
    plan: Plan
    device: torch.device
    settings: RunSettings
    branches: Mapping[int, Branch]
    left_out: frozenset[str] = frozenset()
    means: dict[int, Tensor] = field(default_factory=dict)
    say: Report = field(default=lambda text: None)
    saving: Saving | None = None

    @property
    def model(self) -> nn.Module:
        """The model that is run."""
        return self.subject.model

    @cached_property
    def modules(self) -> ModuleTable:
        """Its modules, read off it once for all conditions."""
        return ModuleTable.of(unwrap(self.model))

    def over(
        self, images: Images, gathered: Pass, name: str, take: Callable[[Batch], None], progress: Progress | None = None
    ) -> None:
        """Let `take` add every batch of this process to a pass, whose state is kept under its name; then those of all
        together.
        """
        settings = self.settings
        keeper = Keeper(None if self.saving is None else self.saving.of(f"{name}-{self.saving.stem}"), self.say)
        with keeper.watching(gathered):
            done = keeper.take_up(gathered)
            over: OutOfTimeError | None = None
            preprocess = self.subject.preprocess
            for batch in batches_of(images, preprocess, settings.batch, settings.readers, done=done):
                check_processes()
                with signals_deferred():
                    take(batch)
                    gathered.coverage.add(batch.read)
                    gathered.inconsistent = False
                if progress is not None:
                    progress(gathered.images, gathered.skipped)
                try:
                    keeper.after_batch(gathered)
                except OutOfTimeError as error:
                    over = error
                    break
            all_in_time(over)
            keeper.all_read(gathered)
            gathered.all_reduce()

    def identity(self, name: str, images: Images, *facts: Any) -> dict[str, Any]:
        """What the states of a pass have in common."""
        source = source_facts(self.subject, images)
        left_out = sorted(self.left_out)
        amp, seed, made = self.settings.amp_as, self.settings.seed, self.subject.preprocess.description
        data = [source[key] for key in ("listing", "total", "content_sha256", "sample_sha256")]
        computed = behaviour_facts(self.subject, self.plan)
        return identity_of(name, weights_sha256(self.model), data, computed, made, left_out, amp, seed, *facts)

    def parts(self, batch: Batch) -> Iterator[tuple[list[int], Tensor]]:
        """The rows of a batch that are to be run, in parts whose maps fit the memory."""
        largest = max(layer.heads * layer.queries * layer.keys * 4 for layer in self.plan.layers)
        step = max(1, TRACE_BYTES[self.device.type] // (MAPS_HELD * largest))
        like = torch.empty(0, dtype=floating_like(self.model).dtype, device=self.device)
        rows = [i for i, name in enumerate(batch.names) if name not in self.left_out]
        for first in range(0, len(rows), step):
            part = rows[first : first + step]
            yield part, model_input(batch.pixels[part], self.plan, like)

    def run(self, images: Tensor, replacements: Mapping[int, Replacement]) -> Any:
        """What the model returns with maps replaced."""
        replaced = replacing(self.model, self.plan, replacements, means=self.means, modules=self.modules)
        with replaced, autocast(self.device, self.settings.amp_as):
            return self.model(images)

    def run_plain(self, images: Tensor) -> Any:
        """What the model returns by itself."""
        with torch.inference_mode(False), torch.no_grad(), autocast(self.device, self.settings.amp_as):
            return self.model(images)


@dataclass(frozen=True)
class ConditionGrid:
    """The chosen blocks, by kind those in which it can be made, the reasons why not in others, and every condition once."""

    blocks: tuple[int, ...]
    able: Mapping[str, Sequence[int]]
    refused: Mapping[tuple[str, int], str]
    conditions: list[Condition]


@dataclass(frozen=True)
class ConditionOutputs:
    """Of every image in the data's order the top answer, `plain` [images] and under each condition `top1` [conditions, images],
    and the KL divergence `kl` [conditions, images] from the plain softmax; `labels` by name where the batches had them.
    `spread` is how much a logit varies over the images at most, over the largest logit, `nonfinite` the images left out because
    a condition makes their logits NaN or infinite.
    """

    names: list[str]
    labels: dict[str, int]
    classes: int
    plain: Classes
    top1: Classes
    kl: Array
    spread: float = math.inf
    nonfinite: tuple[tuple[str, str], ...] = ()


def condition_grid(runner: ReplacementRunner, kinds: Sequence[str], blocks: Sequence[int] | None) -> ConditionGrid:
    """Each chosen block alone, and the sets of them from the last one down, for every kind; SettingError where none can be."""
    count = len(runner.plan.blocks)
    chosen = tuple(range(count)) if blocks is None else tuple(sorted(set(blocks)))
    if not chosen or chosen[0] < 0 or chosen[-1] >= count:
        raise SettingError(f"the model has blocks 0 to {count - 1}; came {list(chosen)}")
    reasons = {(kind, block): refusal(runner.plan, kind, block, runner.branches) for kind in kinds for block in chosen}
    refused = {key: reason for key, reason in reasons.items() if reason}
    if len(refused) == len(reasons):
        why = "; ".join(f"{kind} in block {block}: {reason}" for (kind, block), reason in refused.items())
        raise SettingError(f"nothing can be replaced: {why}")
    able = {kind: [block for block in chosen if (kind, block) not in refused] for kind in kinds}
    conditions = [(kind, some) for kind, each in able.items() for some in [*((b,) for b in each), *_from_the_last(each)]]
    return ConditionGrid(chosen, able, refused, list(dict.fromkeys(conditions)))


def _from_the_last(blocks: Sequence[int]) -> list[tuple[int, ...]]:
    """The last block, the last two, … all of them."""
    return [tuple(blocks[first:]) for first in reversed(range(len(blocks)))]


def mean_maps(runner: ReplacementRunner, images: Images, blocks: Sequence[int]) -> dict[int, Tensor]:
    """The mean map of each layer of these blocks [H, N, N]: sums in float64 over every image, of all processes."""
    layers = set(replacements_for(runner.plan, "mean", blocks, {}))
    gathered = MapSums(runner.identity("mean maps", images, sorted(layers)))

    def take(batch: Batch) -> None:
        sums, count = dict[int, Tensor](), 0

        def add(layer: int, maps_BHNN: Tensor) -> None:
            if layer in layers:
                on_mps = maps_BHNN.device.type == "mps"  # which has no float64
                total = maps_BHNN.cpu().double().sum(0) if on_mps else maps_BHNN.double().sum(0).cpu()
                sums[layer] = total if layer not in sums else sums[layer].add_(total)

        for part, pixels in runner.parts(batch):
            with replacing(runner.model, runner.plan, {}, gather=add), autocast(runner.device, runner.settings.amp_as):
                runner.model(pixels)
            count += len(part)
        gathered.inconsistent = True
        for layer, total in sums.items():
            gathered.add_maps(layer, total)
        gathered.count += count

    runner.over(images, gathered, "means", take)
    return {layer: mean.to(runner.device, torch.float32) for layer, mean in gathered.means().items()}


def run_conditions(
    runner: ReplacementRunner, images: Images, conditions: Sequence[Condition], progress: Progress | None
) -> ConditionOutputs:
    """Every image once plainly and once under each condition, in all processes."""
    replacements = [replacements_for(runner.plan, *condition, runner.branches) for condition in conditions]
    answers = Answers(runner.identity("conditions", images, conditions), runner.settings.seed)
    checked = False

    def take(batch: Batch) -> None:
        nonlocal checked
        kept: list[tuple[list[int], dict[str, Any], Tensor]] = []
        nonfinite: list[tuple[str, str]] = []
        for part, pixels in runner.parts(batch):
            output = runner.run(pixels, {})
            if not checked and not same(runner.run_plain(pixels), output):
                raise CaptureError(
                    "the model with nothing replaced differs from itself; is it deterministic? call eval() first"
                )
            checked = True
            plain_logits = _logits(output, len(pixels))
            changed = [_logits(runner.run(pixels, r), len(pixels)) for r in replacements]
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
            kept.append(([part[i] for i in keep], columns, plain_logits))
        answers.inconsistent = True
        for rows, columns, plain_logits in kept:
            labels = [] if batch.labels is None else batch.labels[rows].tolist()
            names, places = [batch.names[i] for i in rows], [batch.indices[i] for i in rows] if batch.indices else []
            answers.take(names, columns, places, labels, plain_logits)
        answers.nonfinite += nonfinite
        answers.skipped += len(batch.skipped)

    runner.over(images, answers, "conditions", take, progress)
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
        answers.bounds.spread,
        tuple(sorted(answers.nonfinite)),
    )


def _logits(output: Any, images: int) -> Tensor:
    """The logits [B, classes] in a model's output, float64 on the CPU; ModelError where there are none."""
    logits = logits_in(output, images)
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


def effects_of(
    conditions: Sequence[tuple[str, tuple[int, ...]]],
    kl: Array,
    plain: Classes,
    replaced: Classes,
    labels: Classes | None,
) -> list[Effect]:
    """The effects of all conditions, from per-image numbers: `kl` and `replaced` (top answers) [conditions, images], `plain`
    (top answers) and `labels` [images].
    """
    if not conditions:
        return []
    divergence = compare_sides(Sides(np.zeros_like(kl.T), kl.T))
    right = None
    if labels is not None:
        before, after = (np.broadcast_to(answers == labels, kl.shape).T.astype(np.float64) for answers in (plain, replaced))
        right = compare_sides(Sides(before, after, answers=True))
    effects = []
    for i, (kind, blocks) in enumerate(conditions):
        same = int((replaced[i] == plain).sum())
        numbers: dict[str, Any] = {
            "kl": float(divergence.difference[i]),
            "kl_ci95": _ends(np.maximum(divergence.ci95[i], 0.0)),  # no KL lies below
            "agreement": same / kl.shape[1],
            "agreement_ci95": wilson(same, kl.shape[1]),
        }
        if right is not None:
            numbers |= {
                "accuracy": float(right.second[i]),
                "accuracy_change": float(right.difference[i]),
                "accuracy_change_ci95": _ends(right.ci95[i]),
            }
        effects.append(Effect(kind, blocks, **numbers))
    return effects


def _ends(pair: Array) -> Ends:
    return (float(pair[0]), float(pair[1])) if np.isfinite(pair).all() else None


def _interventions(findings: Findings, grid: ConditionGrid, outputs: ConditionOutputs, images: Images) -> Interventions:
    labels, reason = labels_for(outputs.names, images, outputs.classes, outputs.labels)
    measured = effects_of(grid.conditions, outputs.kl, outputs.plain, outputs.top1, labels)
    effects = dict(zip(grid.conditions, measured, strict=True))
    effects |= {(kind, (block,)): Effect(kind, (block,), not_applicable=why) for (kind, block), why in grid.refused.items()}
    table = {"names": np.array(outputs.names, dtype=np.str_), "plain": outputs.plain, "kl": outputs.kl, "top1": outputs.top1}
    return Interventions(
        model=plain(findings.model),
        data=plain(findings.data),
        run={**plain(findings.run), "replace": list(grid.able), "blocks": list(grid.blocks), "unreplaced_equals_plain": True},
        plain={
            "accuracy": None if labels is None else float(np.mean(outputs.plain == labels)),
            "reason": reason,
            "classes": outputs.classes,
            "answers": len(np.unique(outputs.plain)),
            "logit_spread": outputs.spread,
            "conditions": [{"kind": kind, "blocks": list(blocks)} for kind, blocks in grid.conditions],
        },
        single={kind: tuple(effects[kind, (block,)] for block in grid.blocks) for kind in grid.able},
        cumulative={kind: tuple(effects[kind, some] for some in _from_the_last(able)) for kind, able in grid.able.items()},
        similarity=_similarity(findings),
        kinds={kind: KINDS[kind] for kind in grid.able},
        images=table if labels is None else {**table, "labels": labels},
    )


def _similarity(findings: Findings) -> dict[str, Sequence[float | None]]:
    """Cosine with the block before, its chance level and kappa, for each block from 1 on; empty where not defined."""
    result = findings.metrics[SIMILARITY]
    if result.values is None or result.nulls is None:
        return {}
    parts = {"raw": result.values, **{name: result.nulls.values[name] for name in ("other_token", "kappa")}}
    blank = [None] * (len(result.values) - 1)
    return {name: blank if part is None else plain(adjacent(result, part)) for name, part in parts.items()}
