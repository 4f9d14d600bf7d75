"""Where a model can be changed, in which ways, and why not elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from collapse_probe.capture.blocks import NO_MIDDLE
from collapse_probe.capture.edits.branches import branches_of
from collapse_probe.capture.edits.replacement import (
    CHANGED,
    Branch,
    Replacement,
    layers_of,
    refusal,
    replacements_for,
    replacing,
)
from collapse_probe.capture.edits.replacement import KINDS as MAPS
from collapse_probe.capture.edits.sinks import SinkEdit, SinkRecord
from collapse_probe.capture.edits.streams import (
    Bypass,
    Drawn,
    StreamHooks,
    Streams,
    block_call,
    fixed_blocks,
    streams_of,
    with_states,
)
from collapse_probe.capture.layout import is_plain
from collapse_probe.capture.plan import Frame, Plan
from collapse_probe.capture.recorder import ModuleTable
from collapse_probe.distributed import unwrap

DROPS: dict[str, str] = {
    "drop_block": "the block is left out: the next one reads what this one would have read, as in the model without it",
    "drop_attention": "the attention branch gives zeros, its bias included, so that the residual stream passes alone (as skip)",
    "drop_mlp": "the MLP branch is left out: what leaves the block is the residual stream after its attention, to the bit",
}
_STATES = {
    "zero": "zeros, which the model never saw there",
    "mean": "the mean of that token's state over all images of the run, gathered in a pass before with nothing changed",
    "noise": "a random direction, drawn for each image, with the length of the state that it replaces",
    "donor": "the state of the same token of another image, which is drawn by the image's name out of 64 at most, never itself",
}
OTHER = "_other"
"""Ends the name of a control: the same at as many random patch tokens, drawn for each image."""
PREFIX: dict[str, str] = {
    f"prefix_{kind}{other}": f"where the residual stream enters the block, the states of "
    f"{'as many random patch tokens' if other else 'prefix tokens'} are replaced by {says}"
    for kind, says in _STATES.items()
    for other in ("", OTHER)
}
_SINKS = {
    "zero": "the value at the sink's key is zero",
    "mean": "the value at the sink's key is the mean of that over all images in which the head has one (in the control, the "
    "mean value of the patch tokens), gathered in a pass before",
    "donor": "the value at the sink's key is that at the sink of another image (in the control, at the same token), which is "
    "drawn by the image's name out of 64 at most",
    "redirect": "no query attends to the sink's key, and the others get what it had, in proportion",
}
SINKS: dict[str, str] = {
    f"sinks_{kind}{other}": f"in every head of the block in which an image has a sink (90 % of the queries give one key half "
    f"of their attention or more){', at a random patch token in place of the sink' if other else ''}: {says}"
    for kind, says in _SINKS.items()
    for other in ("", OTHER)
}
KINDS: dict[str, str] = {**MAPS, **DROPS, **PREFIX, **SINKS}
"""Every way to change a block."""


@dataclass(frozen=True)
class Edit:
    """What is changed in one run: other maps by layer, the blocks that are left out, and by block the kind of state that some
    tokens are given at its input, `at` these positions, None for those that were drawn;
    `sinks` is what is done to the sinks of the layers of the kind CHANGED.
    """

    maps: Mapping[int, Replacement] = field(default_factory=dict)
    bypass: Bypass = field(default_factory=dict)
    states: Mapping[int, str] = field(default_factory=dict)
    at: tuple[int, ...] | None = None
    sinks: str = ""

    def __bool__(self) -> bool:
        return bool(self.maps or self.bypass or self.states)

    @property
    def donors(self) -> bool:
        """Whether every image needs another one beside it, in the second half of the images."""
        return "donor" in {*(each.kind for each in self.maps.values()), *self.states.values(), self.sinks.removesuffix(OTHER)}


@dataclass(frozen=True)
class Given:
    """What edits take from elsewhere: mean maps by layer, mean states [N, D] by block, and what was drawn for the images."""

    means: Mapping[int, Tensor] = field(default_factory=dict)
    states: Mapping[int, Tensor] = field(default_factory=dict)
    drawn: Drawn | None = None
    sinks: Mapping[int, Tensor] = field(default_factory=dict)
    """Of each layer the mean values of sinks and of patch tokens [2, H, K]."""


@dataclass(frozen=True)
class Places:
    """The places of a model that were looked for: `branches` by layer, and its `streams`."""

    plan: Plan
    branches: Mapping[int, Branch] = field(default_factory=dict)
    streams: Streams = field(default_factory=Streams)

    @classmethod
    def of(
        cls, model: nn.Module, plan: Plan, kinds: Sequence[str], size: tuple[int, int], channels: int = 3, seed: int = 0
    ) -> Places:
        """Those that `kinds` need, found with two images of noise."""
        skips, streams = {"skip", "drop_attention"} & {*kinds}, {"drop_block", *PREFIX, *SINKS} & {*kinds}
        branches = branches_of(model, plan, size, channels, seed) if skips else {}
        return cls(plan, branches, streams_of(model, plan, size, channels, seed) if streams else Streams())

    @property
    def prefix(self) -> tuple[int, ...]:
        """The prefix tokens that are given other states: of several all but the first, the class token; else the one."""
        return self.plan.prefix[1:] or self.plan.prefix

    def refusal(self, kind: str, block: int) -> str:
        """Why a block cannot be changed so; empty where it can."""
        if kind == "drop_block":
            return fixed_blocks(self.plan, self.streams).get(block, "")
        if kind in SINKS:
            return self._no_sinks(kind, block)
        if kind in PREFIX:
            before, _ = self.streams.shapes.get(block, (None, None))
            if not self.plan.prefix:
                return "the model has no prefix tokens"
            if before != (self.plan.tokens, self.plan.width):
                return "what enters it is not the tokens of the first block, so that the places of prefix tokens are not known"
            return ""
        if kind == "drop_mlp":
            if block_call(self.plan, block) is None:
                return f"{self.plan.blocks[block]} is no module of its own, from which an MLP could be left out"
            return "" if self._middle(block) else f"{self.plan.blocks[block]}: {NO_MIDDLE}"
        return refusal(self.plan, _of_maps(kind), block, self.branches)

    def _no_sinks(self, kind: str, block: int) -> str:
        """Why the sinks of a block cannot be edited."""
        if why := refusal(self.plan, "donor", block, {}):
            return why
        values = kind.removeprefix("sinks_").removesuffix(OTHER) in ("mean", "donor")
        for layer in (self.plan.layers[i] for i in layers_of(self.plan, block)):
            if layer.queries != self.plan.tokens or layer.keys != self.plan.tokens:
                return "its maps are not between the tokens of the first block"
            if values and (layer.operation == "softmax" or not is_plain(layer.parts[0])):
                return f"{layer.owner}: its values are not those of a fused attention call, and are not read"
        return ""

    def edit(self, kind: str, blocks: Sequence[int]) -> Edit:
        """What is changed for a kind in some blocks; `refusal` must be empty for each."""
        if kind in SINKS:
            changed = {layer: Replacement(CHANGED) for block in blocks for layer in layers_of(self.plan, block)}
            return Edit(maps=changed, sinks=kind.removeprefix("sinks_"))
        if kind in PREFIX:
            other, state = kind.endswith(OTHER), kind.removeprefix("prefix_").removesuffix(OTHER)
            return Edit(states=dict.fromkeys(blocks, state), at=None if other else self.prefix)
        if kind == "drop_mlp":
            ends = {block_call(self.plan, block): self._middle(block) for block in blocks}
            return Edit(bypass={frame: tap for frame, tap in ends.items() if frame is not None and tap is not None})
        if kind == "drop_block":
            frames = [frame for block in blocks if (frame := block_call(self.plan, block)) is not None]
            return Edit(bypass={frame: frame for frame in frames})
        return Edit(maps=replacements_for(self.plan, _of_maps(kind), blocks, self.branches))

    def _middle(self, block: int) -> Frame | None:
        """The module call that is given the stream between attention and MLP."""
        tap = self.plan.middles[block] if block < len(self.plan.middles) else None
        return None if tap is None or tap.side != "input" else (tap.path, tap.call)


def _of_maps(kind: str) -> str:
    return "skip" if kind == "drop_attention" else kind


@dataclass
class Seen:
    """What was seen in the newest run with an edit: the tokens after the `final` module call, and which sinks were edited."""

    hooks: StreamHooks | None = None
    sinks: SinkRecord = field(default_factory=SinkRecord)

    @property
    def last(self) -> Tensor | None:
        """The last tokens, where they were asked for."""
        return None if self.hooks is None else self.hooks.last


@contextmanager
def edited(
    model: nn.Module,
    plan: Plan,
    edit: Edit,
    given: Given | None = None,
    modules: ModuleTable | None = None,
    final: Frame | None = None,
) -> Iterator[Seen]:
    """Run `model` with an edit inside the `with`; with an empty one it runs as it is. `modules`: see `replacing`; `final` names
    the module call that gives the last tokens.
    """
    given = given or Given()

    def change_states(block: int) -> Callable[[Tensor], Tensor]:
        assert given.drawn is not None
        drawn, kind = given.drawn, edit.states[block]
        at = (
            drawn.others if edit.at is None else torch.tensor(edit.at, device=drawn.others.device).expand(len(drawn.others), -1)
        )
        return lambda x: with_states(kind, x, at, given.states.get(block), drawn.noise)

    changes = {frame: change_states(block) for block in edit.states if (frame := block_call(plan, block)) is not None}
    seen = Seen()

    def change_sinks(layer: int, maps: Tensor, values: Tensor | None) -> tuple[Tensor, Tensor | None, Tensor | None] | None:
        assert given.drawn is not None
        control = edit.sinks.endswith(OTHER)
        sinks = SinkEdit(edit.sinks.removesuffix(OTHER), given.drawn.others, control, given.sinks.get(layer))
        new, added, sink, at = sinks.apply(maps, values)
        seen.sinks.note(sink, at, maps.shape[3])
        rows = torch.zeros(len(maps), dtype=torch.bool, device=maps.device)
        rows[: len(sink)] = sink.any(1)
        return (new, added, rows) if bool(rows.any()) else None

    with ExitStack() as stack:
        if edit.maps or not edit:
            change = change_sinks if edit.sinks else None
            stack.enter_context(replacing(model, plan, edit.maps, means=given.means, modules=modules, change=change))
        if edit.bypass or changes or final is not None:
            seen.hooks = stack.enter_context(StreamHooks(unwrap(model), edit.bypass, modules, changes, final).attached())
        yield seen
