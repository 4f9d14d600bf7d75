"""A model ready for runs with something changed in it, and what is gathered over all images before these."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from collapse_probe.analysis.facts import behaviour_facts, source_facts, weights_sha256
from collapse_probe.analysis.intervention.donors import Donors, Pictures, donor_names, drawn_for
from collapse_probe.analysis.measurement import Images, Progress, Report, RunSettings, model_input
from collapse_probe.analysis.state.keeper import Keeper, Saving, all_in_time, signals_deferred
from collapse_probe.analysis.state.passes import MapSums, Pass, identity_of
from collapse_probe.capture.edits.places import Edit, Given, Places, edited
from collapse_probe.capture.edits.replacement import CHANGED, Replacement, layers_of, replacements_for, replacing
from collapse_probe.capture.edits.sinks import SinkRecord, SinkValues
from collapse_probe.capture.edits.streams import Drawn, StreamHooks, block_call
from collapse_probe.capture.plan import Plan
from collapse_probe.capture.recorder import ModuleTable
from collapse_probe.capture.trace import TRACE_BYTES
from collapse_probe.data.images import ImageSet, batches_of
from collapse_probe.data.loading import Batch
from collapse_probe.devices import autocast, floating_like
from collapse_probe.distributed import check_processes, unwrap
from collapse_probe.errors import OutOfTimeError
from collapse_probe.models.loading import Subject
from collapse_probe.provenance import names_sha256

MAPS_HELD = 6  # of one layer: the map before, the map in its place, their copies in other types


@dataclass(frozen=True)
class Run:
    """What a model returned for `images` images, its last tokens [images, N, D] where these were kept, and the sinks that were
    edited.
    """

    output: Any
    images: int
    last: Tensor | None = None
    sinks: SinkRecord = field(default_factory=SinkRecord)


@dataclass(frozen=True)
class ReplacementRunner:
    """A model ready for runs with something changed, over all images but those `left_out` by name, or `only` some; `means`
    holds the mean map [H, N, N] of the layers that need it, `states` the mean state [N, D] of each token at the input of the
    blocks that need it, `sinks` the mean values of sinks and of patch tokens [2, H, K] of the
    layers that need it, `donors` the images that lend to others.
    """

    subject: Subject
    places: Places
    device: torch.device
    settings: RunSettings
    left_out: frozenset[str] = frozenset()
    only: frozenset[str] | None = None
    means: dict[int, Tensor] = field(default_factory=dict)
    states: dict[int, Tensor] = field(default_factory=dict)
    sinks: dict[int, Tensor] = field(default_factory=dict)
    donors: Donors | None = None
    say: Report = field(default=lambda text: None)
    saving: Saving | None = None

    @property
    def plan(self) -> Plan:
        """What the probe found."""
        return self.places.plan

    @property
    def model(self) -> nn.Module:
        """The model that is run."""
        return self.subject.model

    @cached_property
    def modules(self) -> ModuleTable:
        """Its modules, read off it once for all conditions."""
        return ModuleTable.of(unwrap(self.model))

    def on(self, names: frozenset[str], images: Images) -> tuple[ReplacementRunner, Images]:
        """The same for some of the images alone, and these: of an ImageSet no other is read."""
        if isinstance(images, ImageSet):
            images = images.only([i for i, name in enumerate(images.names) if name in names])
        return replace(self, only=names), images

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
        only = [] if self.only is None else [names_sha256(sorted(self.only))]
        return identity_of(name, weights_sha256(self.model), data, computed, made, left_out, amp, seed, *only, *facts)

    def parts(self, batch: Batch) -> Iterator[tuple[list[int], Tensor]]:
        """The rows of a batch that are to be run, in parts whose maps fit the memory."""
        largest = max(layer.heads * layer.queries * layer.keys * 4 for layer in self.plan.layers)
        step = max(1, TRACE_BYTES[self.device.type] // (MAPS_HELD * largest * (1 if self.donors is None else 2)))
        like = torch.empty(0, dtype=floating_like(self.model).dtype, device=self.device)
        rows = [
            i for i, name in enumerate(batch.names) if name not in self.left_out and (self.only is None or name in self.only)
        ]
        for first in range(0, len(rows), step):
            part = rows[first : first + step]
            yield part, model_input(batch.pixels[part], self.plan, like)

    def run(self, images: Tensor, edit: Edit, names: Sequence[str] = (), final: bool = False) -> Run:
        """What the model returns with something changed, on images of these names, and where it takes donors on these too, in
        a second half. `final` keeps the last tokens.
        """
        if edit.donors:
            assert self.donors is not None
            lent = self.donors.of(names).to(images.device, images.dtype)
            images = torch.cat([images, lent])
        given = Given(self.means, self.states, self.drawn(names) if edit.states or edit.sinks else None, self.sinks)
        end = self.places.streams.final if final else None
        with (
            edited(self.model, self.plan, edit, given, self.modules, end) as seen,
            autocast(self.device, self.settings.amp_as),
        ):
            output = self.model(images)
        return Run(output, len(images), seen.last, seen.sinks)

    def drawn(self, names: Sequence[str]) -> Drawn:
        """What is drawn for images of these names."""
        return drawn_for(names, self.settings.seed, self.patches, len(self.places.prefix), self.plan.width, self.device)

    @property
    def patches(self) -> list[int]:
        """The places of the patch tokens."""
        return [i for i in range(self.plan.tokens) if i not in self.plan.prefix]

    def run_plain(self, images: Tensor) -> Any:
        """What the model returns by itself."""
        with torch.inference_mode(False), torch.no_grad(), autocast(self.device, self.settings.amp_as):
            return self.model(images)


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


def mean_states(runner: ReplacementRunner, images: Images, blocks: Sequence[int]) -> dict[int, Tensor]:
    """The mean state of each token at the input of these blocks [N, D]: sums in float64 over every image, of all processes."""
    gathered = MapSums(runner.identity("mean states", images, sorted(blocks)))
    frames = {frame: block for block in blocks if (frame := block_call(runner.plan, block)) is not None}

    def take(batch: Batch) -> None:
        sums, count = dict[int, Tensor](), 0

        def adding(block: int) -> Callable[[Tensor], Tensor]:
            def add(x: Tensor) -> Tensor:
                total = x.detach().cpu().double().sum(0)
                sums[block] = total if block not in sums else sums[block].add_(total)
                return x

            return add

        changes = {frame: adding(block) for frame, block in frames.items()}
        for part, pixels in runner.parts(batch):
            hooks = StreamHooks(unwrap(runner.model), {}, runner.modules, changes)
            with hooks.attached(), autocast(runner.device, runner.settings.amp_as):
                runner.model(pixels)
            count += len(part)
        gathered.inconsistent = True
        for block, total in sums.items():
            gathered.add_maps(block, total)
        gathered.count += count

    runner.over(images, gathered, "states", take)
    return {block: mean.to(runner.device, torch.float32) for block, mean in gathered.means().items()}


def mean_sinks(runner: ReplacementRunner, images: Images, blocks: Sequence[int]) -> dict[int, Tensor]:
    """Of each layer of these blocks the mean value at sinks, and that of the patch tokens [2, H, K], over every image of all
    processes; zeros for heads without a sink, which are not edited.
    """
    plan = runner.plan
    layers = {layer: Replacement(CHANGED) for block in blocks for layer in layers_of(plan, block)}
    gathered = MapSums(runner.identity("mean sinks", images, sorted(layers)))

    def take(batch: Batch) -> None:
        values, count = SinkValues(), 0

        def add(layer: int, maps: Tensor, own: Tensor | None) -> None:
            assert own is not None
            values.add(layer, maps, own, runner.patches)

        for part, pixels in runner.parts(batch):
            replaced = replacing(runner.model, plan, layers, modules=runner.modules, change=add)
            with replaced, autocast(runner.device, runner.settings.amp_as):
                runner.model(pixels)
            count += len(part)
        gathered.inconsistent = True
        for layer, total in values.sums.items():
            gathered.add_maps(layer, torch.cat([total, values.counts[layer][..., None]], 2))
        gathered.count += count

    runner.over(images, gathered, "sinks", take)
    means = {layer: total[..., :-1] / total[..., -1:].clamp_min(1) for layer, total in gathered.sums.items()}
    return {layer: mean.to(runner.device, torch.float32) for layer, mean in means.items()}


def donors_among(runner: ReplacementRunner, images: Images, names: Sequence[str]) -> Donors:
    """The images among these that lend to others, read once."""
    seed = runner.settings.seed
    runner, images = runner.on(donor_names(names, seed), images)
    gathered = Pictures(runner.identity("donors", images))

    def take(batch: Batch) -> None:
        gathered.inconsistent = True
        for part, pixels in runner.parts(batch):
            gathered.pixels |= {batch.names[i]: x for i, x in zip(part, pixels.cpu(), strict=True)}

    runner.over(images, gathered, "donors", take)
    found = tuple(sorted(gathered.pixels))
    return Donors(found, torch.stack([gathered.pixels[name] for name in found]), seed)
