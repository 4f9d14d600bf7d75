"""The verb intervene: what the attention of a block is worth, by replacing its map while the model runs."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from collapse_probe.analysis.analyze import read_all
from collapse_probe.analysis.intervention.conditions import condition_grid, run_conditions
from collapse_probe.analysis.intervention.effects import SIMILARITY, interventions_of
from collapse_probe.analysis.intervention.export import blocks_to_go, exported
from collapse_probe.analysis.intervention.orders import (
    FEWEST,
    INFLUENCES,
    NotFinite,
    Parts,
    greedy_order,
    influence_order,
    prefixes,
)
from collapse_probe.analysis.intervention.runner import ReplacementRunner, donors_among, mean_maps, mean_sinks, mean_states
from collapse_probe.analysis.intervention.untrained import with_untrained_copy
from collapse_probe.analysis.measurement import FAIL, Images, Progress, Report, RunSettings, restored, settled, with_input
from collapse_probe.analysis.state.keeper import SAVE_EVERY, saving_of
from collapse_probe.analysis.state.phases import CHOSEN, REPLACED, Phase
from collapse_probe.capture.edits.places import DROPS, OTHER, PREFIX, SINKS, Places
from collapse_probe.capture.edits.replacement import KINDS
from collapse_probe.data.images import OwnImages, images_from
from collapse_probe.data.preprocessing import Size
from collapse_probe.devices import choose_device
from collapse_probe.errors import DataError, SettingError
from collapse_probe.models.loading import Subject, resolve
from collapse_probe.models.pruning import Pruning
from collapse_probe.results.intervention import GREEDY, INFLUENCE, Interventions

STATES = tuple(kind.removeprefix("prefix_") for kind in PREFIX if not kind.endswith(OTHER))
VALUE = "-value"
EDITS = ("zero-value", "mean-value", "donor-value", "redirect")
"""What can be done to sinks; see `SINKS`."""
PARTS = tuple(kind.removeprefix("drop_") for kind in DROPS)


def intervene(
    model: str | nn.Module | Subject,
    data: str | Path | Images,
    replace: Sequence[str] | None = None,
    blocks: Sequence[int] | None = None,
    *,
    drop: Sequence[str] = (),
    prefix: Sequence[str] = (),
    sinks: Sequence[str] = (),
    window: int = 1,
    keep: int | None = None,
    export: str | Path | None = None,
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
    """Change `blocks` (None: all) while the model runs: replace their attention maps, or leave them out.

    `replace` names one or more of `KINDS`: share, mean, donor, uniform, identity, skip; the map of one block at a time is
    replaced, and of all from the last block down. Where nothing else is asked for it is share. `drop` names what is left out:
    block, attention, mlp; of one block at a time, of every `window` of consecutive blocks, and greedily, each time of the block
    that costs least after those that are gone, until `keep` of the model's blocks still have theirs; and by block influence. A
    third of the images chooses these orders (256 at most), another settles how many can go (512 at most), and all others give
    the price. Reported are the change in the logits (KL from the plain model, agreement of the top answer) and, where the
    data's labels are the model's classes, in accuracy, each with a 95 % interval over images. A map is what multiplies V; what
    does not apply to a block says why. The run with nothing replaced equals the plain model's to the bit, which is checked on
    the first images. The other arguments are as for `analyze`; the data are read twice or more, so an iterator will not do.
    Each image runs through the model once plainly, and about twice for every block and replacement.

    `prefix` names what stands in for the states of prefix tokens at the input of a block (registers where there are some, else
    the class token): zero, mean, noise, donor; beside it stands the same at as many random patch tokens.

    `sinks` names what is done to attention sinks, in every head of a block in which an image has one, beside the same at a
    random patch token: zero-value, mean-value, donor-value, redirect.

    `export` writes the model without whole blocks into a file (.safetensors, .pth) that timm loads: without those that the
    order lets go until `keep` are left, or without all `blocks` that are named, or without as many as can go.

    Raises SettingError for unknown replacements and blocks and where nothing can be replaced, ModelError for a model without
    logits, CollapseProbeError for whatever cannot be read or captured.
    """
    kinds = _kinds(replace, drop, prefix, sinks)
    least = 1 if keep is None else keep
    if window < 1 or least < 0:
        raise SettingError(f"expected a window of 1 block or more, and 0 blocks or more to keep; came {window} and {keep}")
    if export is not None and "drop_block" not in kinds:
        raise SettingError(f"{export}: a model is exported without blocks that are dropped; drop block")
    settings = RunSettings(
        device=device,
        amp=amp,
        amp_dtype=amp_dtype,
        batch_size=batch_size,
        workers=workers,
        seed=seed,
        metrics=(SIMILARITY, *(INFLUENCES[kind] for kind in kinds if kind in DROPS)),
        null_images=0,
        gallery_images=0,
        on_nonfinite=on_nonfinite,
        command=command,
    )
    if window > 1 and not drop:
        raise SettingError(f"a window of blocks is dropped together, and nothing is dropped; came a window of {window}")
    if keep is not None and not drop:
        raise SettingError(f"blocks are kept while others are dropped, and nothing is dropped; came {keep} to keep")
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
        pruning = None if export is None else Pruning.of(subject, export)
        subject, ill = with_input(subject, images), dict[str, str]()
        made = subject.preprocess
        settings = settled(settings, made.size, images)
        while True:  # once more without the images whose logits a replacement makes NaN or infinite, where that is asked for
            say("measuring the similarity of the maps")
            without = hashlib.sha256("\n".join(sorted(ill)).encode()).hexdigest()[:8] if ill else "all"
            first = None if saving is None else saving.of(f"similarity-{without}")
            probe, stopper = read_all(subject, images, settings, say=say, left_out=ill, saving=first)
            findings, plan = probe.conclude(say, stopper), probe.measurement.plan
            places = Places.of(subject.model, plan, kinds, made.size, made.channels, seed)
            skipped = frozenset(str(each["name"]) for each in findings.data["skipped"])
            keeping = None if saving is None else saving.of(without)
            runner = ReplacementRunner(subject, places, choose_device(device), settings, skipped, say=say, saving=keeping)
            if drop and least >= len(plan.blocks) > 1:
                raise SettingError(f"expected fewer blocks to keep than the model has, {len(plan.blocks)}; came {least}")
            grid = condition_grid(runner, kinds, blocks, window)
            takers = [kind for kind in grid.able if kind.removesuffix(OTHER).endswith("donor") and grid.able[kind]]
            if takers:
                say("reading the images that lend to others")
                names = [*map(str, findings.images["names"])]
                runner = dataclasses.replace(runner, donors=donors_among(runner, images, names))
            if any(grid.able.get(kind) for kind in ("prefix_mean", "prefix_mean_other")):
                say("gathering each token's mean state")
                runner.states.update(mean_states(runner, images, grid.able["prefix_mean"]))
            if grid.able.get("sinks_mean"):
                say("gathering each head's mean value at its sinks")
                runner.sinks.update(mean_sinks(runner, images, grid.able["sinks_mean"]))
            if grid.able.get("mean"):
                say("gathering each block's mean map")
                runner.means.update(mean_maps(runner, images, grid.able["mean"]))
            orders = dict[str, dict[str, Sequence[int]]]()
            try:
                parts = Parts()
                for kind in (kind for kind in grid.able if kind in DROPS and len(grid.able[kind]) > 1):
                    parts = Parts.of([*map(str, findings.images["names"])], seed)
                    if not parts.choosing:
                        say(f"no order of the blocks is chosen: that takes {FEWEST} images or more")
                        break
                    able = grid.able[kind]
                    steps = min(len(able), len(plan.blocks) - least)
                    runs = sum(len(able) - step for step in range(steps))
                    say(Phase(CHOSEN, f"choosing the order of the blocks: {runs} runs over {len(parts.choosing)} images"))
                    greedy = greedy_order(*runner.on(parts.choosing, images), kind, able, steps)
                    by_influence = influence_order(findings, kind, able, parts.choosing, steps)
                    orders[kind] = {GREEDY: greedy, **({INFLUENCE: by_influence} if by_influence else {})}
            except NotFinite as error:
                ill |= error.images
                continue
            ordered = [(kind, gone) for kind, each in orders.items() for order in each.values() for gone in prefixes(order)]
            grid.conditions[:] = dict.fromkeys([*grid.conditions, *ordered])
            say(Phase(REPLACED, f"{len(grid.conditions)} runs with something changed, beside the plain one, over every image"))
            outputs = run_conditions(runner, images, grid.conditions, progress)
            if not outputs.nonfinite:
                break
            ill |= dict(outputs.nonfinite)
        facts: dict[str, Any] = {}
        if {*PREFIX, *SINKS} & {*grid.able}:
            final = runner.places.streams.final
            facts = {"prefix_positions": [*runner.places.prefix], "last_tokens": None if final is None else final[0]}
        if runner.donors is not None:
            facts["donors"] = len(runner.donors.names)
        found = interventions_of(findings, grid, outputs, images, orders, parts, facts)
        found = with_untrained_copy(found, runner, images)
        if pruning is None:
            return found
        gone, why = blocks_to_go(found, keep, None if blocks is None or keep is not None else grid.able["drop_block"])
        file = exported(runner, pruning, gone) if gone else {"file": None, "why": why}
        return dataclasses.replace(found, run={**found.run, "export": file})


def _kinds(replace: Sequence[str] | None, drop: Sequence[str], prefix: Sequence[str], sinks: Sequence[str]) -> tuple[str, ...]:
    """The kinds of change that are asked for; SettingError for those that there are not."""
    dropped, states, edits = ([each] if isinstance(each, str) else [*each] for each in (drop, prefix, sinks))
    replaced = [replace] if isinstance(replace, str) else [*(replace or ())]
    if replace is None and not (dropped or states or edits):
        replaced = ["share"]
    asked = (
        ("replacements", replaced, KINDS),
        ("parts to drop", dropped, PARTS),
        ("states of prefix tokens", states, STATES),
        ("edits of sinks", edits, EDITS),
    )
    for what, names, known in asked:
        if unknown := [name for name in names if name not in known]:
            raise SettingError(f"expected {what} out of {', '.join(known)}; came {unknown[0]!r}")
    if not (replaced or dropped or states or edits):
        raise SettingError(f"expected replacements out of {', '.join(KINDS)}; came none")
    tokens = [*(f"prefix_{name}" for name in states), *(f"sinks_{name.removesuffix(VALUE)}" for name in edits)]
    tokens = [f"{kind}{other}" for kind in tokens for other in ("", OTHER)]
    return tuple(dict.fromkeys([*replaced, *(f"drop_{name}" for name in dropped), *tokens]))
