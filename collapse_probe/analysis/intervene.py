"""The verb intervene: what the attention of a block is worth, by replacing its map while the model runs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy import stats
from torch import Tensor, nn

from collapse_probe.analysis.analyze import Report, RunSettings, as_it_was, measure
from collapse_probe.analysis.loop import Progress
from collapse_probe.analysis.outputs import labels_for
from collapse_probe.capture.capture import discover_plan, same
from collapse_probe.capture.plan import Plan
from collapse_probe.capture.replacement import KINDS, Branch, Replacement, branches_of, refusal, replacements_for, replacing
from collapse_probe.capture.trace import TRACE_BYTES
from collapse_probe.data.images import Batch, ImageSet, batches, from_loader, open_data
from collapse_probe.devices import autocast, choose_device
from collapse_probe.distributed import gathered, rank_and_world
from collapse_probe.errors import CaptureError, DataError, ModelError, SettingError
from collapse_probe.models.loading import Subject, resolve
from collapse_probe.results.findings import Findings
from collapse_probe.results.intervention import Effect, Ends, Interventions
from collapse_probe.statistics.intervals import Array
from collapse_probe.statistics.paired import Sides, compare_sides


def effects_of(
    conditions: Sequence[tuple[str, tuple[int, ...]]], kl: Array, plain: Array, replaced: Array, labels: Array | None, seed: int
) -> list[Effect]:
    """The effects of all conditions, from per-image numbers: `kl` and `replaced` (top answers) [conditions, images], `plain`
    (top answers) and `labels` [images].
    """
    if not conditions:
        return []
    divergence = compare_sides(Sides(np.zeros_like(kl.T), kl.T), seed=seed)
    right = None
    if labels is not None:
        before, after = (np.broadcast_to(answers == labels, kl.shape).T.astype(np.float64) for answers in (plain, replaced))
        right = compare_sides(Sides(before, after), seed=seed)
    found = []
    for i, (kind, blocks) in enumerate(conditions):
        same = int((replaced[i] == plain).sum())
        numbers: dict[str, Any] = {
            "kl": float(divergence.difference[i]),
            "kl_ci95": _ends(divergence.ci95[i]),
            "agreement": same / kl.shape[1],
            "agreement_ci95": _wilson(same, kl.shape[1]),
        }
        if right is not None:
            numbers |= {
                "accuracy": float(right.second[i]),
                "accuracy_change": float(right.difference[i]),
                "accuracy_change_ci95": _ends(right.ci95[i]),
            }
        found.append(Effect(kind, blocks, **numbers))
    return found


def _wilson(successes: int, trials: int) -> Ends:
    if trials < 2:
        return None
    ends = stats.binomtest(successes, trials).proportion_ci(method="wilson")
    return float(ends.low), float(ends.high)


def _ends(pair: Array) -> Ends:
    return (float(pair[0]), float(pair[1])) if np.isfinite(pair).all() else None


MAPS_HELD = 6  # of one layer: the map that is lent, that is made, their copies in other types
Condition = tuple[str, tuple[int, ...]]
"""A kind of replacement and the blocks in which it is made."""
Images = ImageSet | Iterable[Any]


@dataclass
class Pass:
    """What the runs of one process gathered; rows are conditions."""

    names: list[str] = field(default_factory=list)
    indices: list[int] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    plain: list[int] = field(default_factory=list)
    kl: list[np.ndarray[Any, Any]] = field(default_factory=list)
    top1: list[np.ndarray[Any, Any]] = field(default_factory=list)
    classes: int = 0


@dataclass(frozen=True)
class ReplacementRunner:
    """A model ready for runs with maps replaced."""

    subject: Subject
    plan: Plan
    device: torch.device
    settings: RunSettings
    branches: Mapping[int, Branch]
    means: dict[int, Tensor] = field(default_factory=dict)

    @property
    def model(self) -> nn.Module:
        """The model that is run."""
        return self.subject.model

    def parts(self, batch: Batch) -> Iterator[tuple[slice, Tensor]]:
        """A batch in parts whose maps fit the memory."""
        largest = max(layer.heads * layer.queries * layer.keys * 4 for layer in self.plan.layers)
        step = max(1, TRACE_BYTES[self.device.type] // (MAPS_HELD * largest))
        dtype = next(self.model.parameters()).dtype
        for first in range(0, len(batch.names), step):
            part = slice(first, first + step)
            yield part, batch.pixels[part].to(self.device, dtype)

    def run(self, images: Tensor, orders: Mapping[int, Replacement]) -> Any:
        """What the model returns with maps replaced."""
        with replacing(self.model, self.plan, orders, means=self.means), autocast(self.device, self.settings.amp_as):
            return self.model(images)

    def orders(self, condition: Condition) -> dict[int, Replacement]:
        """What a condition asks of each layer."""
        return replacements_for(self.plan, *condition, self.branches)


def _stream(images: Images, subject: Subject, settings: RunSettings) -> Iterator[Batch]:
    if not isinstance(images, ImageSet):
        return from_loader(images)
    rank, world = rank_and_world()
    size, workers = settings.batch_size, settings.workers
    return batches(images, subject.preprocess, batch_size=size, workers=workers, rank=rank, world=world)


def gather_means(bench: ReplacementRunner, images: Images, blocks: Sequence[int]) -> None:
    """The mean map of each layer [H, N, N]: sums in float64 over every image, of all processes."""
    wanted = set(replacements_for(bench.plan, "mean", blocks, {}))
    sums: dict[int, Tensor] = {}
    count = 0

    def add(layer: int, maps_BHNN: Tensor) -> None:
        if layer in wanted:
            here = (
                maps_BHNN.to(torch.float64).sum(0).cpu() if maps_BHNN.device.type != "mps" else maps_BHNN.cpu().double().sum(0)
            )
            sums[layer] = here if layer not in sums else sums[layer].add_(here)

    for batch in _stream(images, bench.subject, bench.settings):
        for part, pixels in bench.parts(batch):
            with replacing(bench.model, bench.plan, {}, gather=add), autocast(bench.device, bench.settings.amp_as):
                bench.model(pixels)
            count += len(batch.names[part])
    everywhere = gathered((sums, count))
    total = sum(n for _, n in everywhere)
    for layer in wanted:
        whole = torch.stack([found[layer] for found, _ in everywhere if layer in found]).sum(0)
        bench.means[layer] = (whole / total).to(bench.device, torch.float32)


def run_all(bench: ReplacementRunner, images: Images, conditions: Sequence[Condition], progress: Progress | None) -> Pass:
    """Every image once plainly and once under each condition."""
    found, skipped = Pass(), 0
    orders = [bench.orders(condition) for condition in conditions]
    for batch in _stream(images, bench.subject, bench.settings):
        for part, pixels in bench.parts(batch):
            answer = bench.run(pixels, {})
            if not found.names and not same(_plainly(bench, pixels), answer):
                raise CaptureError(
                    "the model with nothing replaced differs from itself; is it deterministic? call eval() first"
                )
            plain = _logits(answer, len(pixels))
            replaced = [_logits(bench.run(pixels, order), len(pixels)) for order in orders]
            _check_finite(plain, replaced, conditions)
            found.kl.append(np.stack([_divergence(plain, other) for other in replaced]))
            found.top1.append(np.stack([other.argmax(1).numpy() for other in replaced]))
            found.plain += plain.argmax(1).tolist()
            found.names += batch.names[part]
            found.classes = plain.shape[1]
        found.indices += batch.indices
        found.labels += [] if batch.labels is None else batch.labels.tolist()
        skipped += len(batch.skipped)
        if progress is not None:
            progress(len(found.names), skipped)
    return found


def _plainly(bench: ReplacementRunner, pixels: Tensor) -> Any:
    with torch.inference_mode(False), torch.no_grad(), autocast(bench.device, bench.settings.amp_as):
        return bench.model(pixels)


def _logits(answer: Any, images: int) -> Tensor:
    """The logits [B, classes] in a model's output, float64 on the CPU; ModelError where there are none."""
    held = getattr(answer, "logits", answer)
    if isinstance(held, Tensor) and held.ndim == 2 and len(held) == images and held.shape[1] > 1:
        return held.detach().cpu().to(torch.float64)
    came = list(held.shape) if isinstance(held, Tensor) else type(answer).__name__
    raise ModelError(f"interventions are judged by a classifier's logits [images, classes]; the model's output is {came}")


def _check_finite(plain: Tensor, replaced: Sequence[Tensor], conditions: Sequence[Condition]) -> None:
    for logits, (kind, held) in zip([plain, *replaced], [("nothing", ()), *conditions], strict=True):
        if not torch.isfinite(logits).all():
            raise ModelError(f"with {kind} in blocks {list(held)} the logits are not finite; run it in float32, without --amp")


def _divergence(plain: Tensor, other: Tensor) -> np.ndarray[Any, Any]:
    """KL(softmax(plain) ‖ softmax(other)) of every image, [B, classes] twice -> [B] in nats."""
    p, q = plain.log_softmax(1), other.log_softmax(1)
    return np.asarray((p.exp() * (p - q)).sum(1).clamp_min(0.0).numpy())


def joined(run: Pass) -> Pass:
    """What all processes gathered, in the order of the data set."""
    parts: list[Pass] = [part for part in gathered(run) if part.names]
    if not parts:
        raise DataError("no image could be read")
    order = np.argsort([i for part in parts for i in part.indices], kind="stable")
    listed: dict[str, Any] = {
        key: [v for part in parts for v in getattr(part, key)] for key in ("names", "indices", "labels", "plain")
    }
    in_order: dict[str, Any] = {key: [values[i] for i in order] for key, values in listed.items() if values}
    stacked: dict[str, Any] = {
        key: [np.concatenate([c for p in parts for c in getattr(p, key)], axis=1)[:, order]] for key in ("kl", "top1")
    }
    return replace(run, **in_order, **stacked, classes=parts[0].classes)


SIMILARITY = "attention-similarity"
RUNNING = ("device", "amp", "amp_dtype", "batch_size", "workers", "seed", "command")  # settings that are about any run


def intervene(
    model: str | nn.Module | Subject,
    data: str | Path | ImageSet | Iterable[Any],
    replace: Sequence[str] = ("share",),
    blocks: Sequence[int] | None = None,
    *,
    limit: int | None = None,
    split: str | None = None,
    settings: RunSettings | None = None,
    progress: Progress | None = None,
    report: Report | None = None,
    **options: Any,
) -> Interventions:
    """Replace the attention maps of `blocks` (None: all), one block at a time and cumulatively from the last block down.

    `replace` names one or more of `orders.KINDS`: share, mean, uniform, identity, skip. Reported are the change in the logits
    (KL from the plain model, agreement of the top answer) and, where the data's labels are the model's classes, in accuracy,
    each with a 95 % interval over images. A map is what multiplies V; a replacement that does not apply to a block says why.
    The run with nothing replaced equals the plain model's to the bit, which is checked on the first images. `model`, `data`,
    `limit`, `split` and `options` as for `analyze`; the data are read twice or more, so an iterator will not do. Each image
    runs through the model once plainly, and about twice for every block and replacement.

    Raises SettingError for unknown replacements and blocks and where nothing can be replaced, ModelError for a model without
    logits, CollapseProbeError for whatever cannot be read or heard.
    """
    kinds = _known(replace)
    known = {name: options.pop(name) for name in list(options) if name in RunSettings.__dataclass_fields__}
    given = settings or RunSettings()
    running: dict[str, Any] = {name: known.get(name, getattr(given, name)) for name in RUNNING}
    settings = RunSettings(**running, metrics=(SIMILARITY,), null_images=0, gallery_images=0)
    images = open_data(data, split=split, limit=limit, seed=settings.seed) if isinstance(data, (str, Path)) else data
    if iter(images) is images:
        raise DataError("the images are run through more than once: give an address, an ImageSet, a list or a DataLoader")
    say = report or (lambda text: None)
    with as_it_was(model.model if isinstance(model, Subject) else model):
        subject = model if isinstance(model, Subject) else resolve(model, seed=settings.seed, **options)
        say("measuring the similarity of the maps beside")
        findings = measure(subject, images, settings, report=say)
        return _intervened(subject, images, kinds, blocks, settings, findings, progress, say)


def _intervened(
    subject: Subject,
    images: Images,
    kinds: tuple[str, ...],
    blocks: Sequence[int] | None,
    settings: RunSettings,
    findings: Findings,
    progress: Progress | None,
    say: Callable[[str], None],
) -> Interventions:
    device = choose_device(settings.device)
    plan = discover_plan(subject.model, subject.preprocess.size, seed=settings.seed)
    branches = branches_of(subject.model, plan, subject.preprocess.size, settings.seed) if "skip" in kinds else {}
    bench = ReplacementRunner(subject, plan, device, settings, branches)
    chosen = _chosen(plan, blocks)
    refused = {(kind, block): reason for kind in kinds for block in chosen if (reason := refusal(plan, kind, block, branches))}
    able = {kind: [block for block in chosen if (kind, block) not in refused] for kind in kinds}
    if not any(able.values()):
        raise SettingError(
            f"nothing can be replaced: {'; '.join(f'{k} in block {b}: {why}' for (k, b), why in refused.items())}"
        )
    conditions = _conditions(able)
    if "mean" in kinds and able["mean"]:
        say("gathering each block's mean map")
        gather_means(bench, images, able["mean"])
    say(f"{len(conditions)} runs with maps replaced, beside the plain one, over every image")
    run = joined(run_all(bench, images, conditions, progress))
    labels, why = _labels(run, images)
    kl, top1, plain = np.concatenate(run.kl, axis=1), np.concatenate(run.top1, axis=1), np.array(run.plain)
    effects = dict(zip(conditions, effects_of(conditions, kl, plain, top1, labels, settings.seed), strict=True))
    stored = findings.to_json()
    table = {"names": np.array(run.names, dtype=np.str_), "plain": plain, "kl": kl, "top1": top1}
    return Interventions(
        model=stored["model"],
        data=stored["data"],
        run={**stored["run"], "replace": list(kinds), "blocks": list(chosen), "unreplaced_equals_plain": True},
        plain={
            "accuracy": None if labels is None else float(np.mean(plain == labels)),
            "reason": why,
            "classes": run.classes,
            "conditions": [{"kind": kind, "blocks": list(held)} for kind, held in conditions],
        },
        single={kind: tuple(_single(kind, b, effects, refused) for b in chosen) for kind in kinds},
        cumulative={kind: tuple(effects[kind, held] for held in _sets(able[kind])) for kind in kinds},
        similarity=_similarity(findings),
        kinds={kind: KINDS[kind] for kind in kinds},
        images=table if labels is None else {**table, "labels": labels},
    )


def _known(kinds: Sequence[str]) -> tuple[str, ...]:
    kinds = (kinds,) if isinstance(kinds, str) else tuple(dict.fromkeys(kinds))
    unknown = [kind for kind in kinds if kind not in KINDS]
    if unknown or not kinds:
        came = repr(unknown[0]) if unknown else "none"
        raise SettingError(f"expected replacements out of {', '.join(KINDS)}; came {came}")
    return kinds


def _chosen(plan: Plan, blocks: Sequence[int] | None) -> tuple[int, ...]:
    count = len(plan.blocks)
    chosen = tuple(range(count)) if blocks is None else tuple(sorted(set(blocks)))
    if not chosen or chosen[0] < 0 or chosen[-1] >= count:
        raise SettingError(f"the model has blocks 0 to {count - 1}; came {list(chosen)}")
    return chosen


def _sets(blocks: Sequence[int]) -> list[tuple[int, ...]]:
    """The last block, the last two, … all of them."""
    return [tuple(blocks[first:]) for first in reversed(range(len(blocks)))]


def _conditions(able: Mapping[str, Sequence[int]]) -> list[Condition]:
    """Every run that is needed, once: each block alone, and the sets from the last block down."""
    wanted = [(kind, held) for kind, blocks in able.items() for held in [*((b,) for b in blocks), *_sets(blocks)]]
    return list(dict.fromkeys(wanted))


def _single(kind: str, block: int, effects: Mapping[Condition, Effect], refused: Mapping[tuple[str, int], str]) -> Effect:
    if (kind, block) in refused:
        return Effect(kind, (block,), not_applicable=refused[kind, block])
    return effects[kind, (block,)]


def _labels(run: Pass, images: Images) -> tuple[Any, str]:
    """The label of every image, or None and why accuracy cannot be told."""
    if len(run.labels) != len(run.names):
        return None, "the data have no labels"
    if isinstance(images, ImageSet):
        kinds = len(images.class_names) or max(run.labels) + 1
        return labels_for(run.names, dict(zip(run.names, run.labels, strict=True)), kinds, run.classes)
    if max(run.labels) >= run.classes or min(run.labels) < 0:
        return None, f"the labels run to {max(run.labels)}, the output has {run.classes} classes"
    return np.array(run.labels, dtype=np.int64), ""


def _similarity(findings: Findings) -> dict[str, Sequence[float | None]]:
    """Cosine with the block before, its wrong-token null and kappa, for each block from 1 on; empty where not defined."""
    reading = findings.to_json()["metrics"][SIMILARITY]
    if reading["values"] is None:
        return {}
    nulls = reading["nulls"]
    held = {"raw": reading["values"], "other_token": nulls["other_token"], "kappa": nulls["kappa"]}
    return {
        name: [None if matrix is None else matrix[b][b - 1] for b in range(1, len(reading["values"]))]
        for name, matrix in held.items()
    }
