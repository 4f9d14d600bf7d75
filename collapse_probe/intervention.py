"""The verb intervene: what the attention of a block is worth, by replacing its map while the model runs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from collapse_probe.analysis import Report, Settings, as_it_was, measure
from collapse_probe.answers import labels_for
from collapse_probe.capture import probe
from collapse_probe.data import ImageSet, open_data
from collapse_probe.devices import choose_device
from collapse_probe.effects import Effect, Interventions, effects_of
from collapse_probe.errors import DataError, SettingError
from collapse_probe.findings import Findings
from collapse_probe.one_pass import Progress
from collapse_probe.orders import KINDS, refusal
from collapse_probe.replaced_runs import Bench, Condition, Images, Pass, gather_means, joined, run_all
from collapse_probe.replacing import branches_of
from collapse_probe.sources import resolve
from collapse_probe.subject import Subject
from collapse_probe.trace import Plan

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
    settings: Settings | None = None,
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
    known = {name: options.pop(name) for name in list(options) if name in Settings.__dataclass_fields__}
    given = settings or Settings()
    running: dict[str, Any] = {name: known.get(name, getattr(given, name)) for name in RUNNING}
    settings = Settings(**running, metrics=(SIMILARITY,), null_images=0, gallery_images=0)
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
    settings: Settings,
    findings: Findings,
    progress: Progress | None,
    say: Callable[[str], None],
) -> Interventions:
    device = choose_device(settings.device)
    plan = probe(subject.model, subject.preprocess.size, seed=settings.seed)
    branches = branches_of(subject.model, plan, subject.preprocess.size, settings.seed) if "skip" in kinds else {}
    bench = Bench(subject, plan, device, settings, branches)
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
