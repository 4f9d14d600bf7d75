"""What a penalty is, and how its loss is computed from a model in training.

A penalty is a frozen dataclass of its settings: one term of a loss, computed from what was recorded of a forward pass::

    penalties = ModelPenalties(model, {"patch-cosine": {"form": "paper"}})
    with penalties.recording():
        logits = model(images)
    terms = penalties.terms(labels)          # {"patch-cosine": a 0-d tensor with its graph}
    loss = criterion(logits, targets) + 0.5 * terms["patch-cosine"]
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from collapse_probe.capture.gradients import MATRICES, GradientTrace, Matrix, Requests, ViTParts, record_with_gradients
from collapse_probe.distributed import rank_and_world, unwrap
from collapse_probe.errors import CaptureError, SettingError
from collapse_probe.metrics.functional.geometry import anchored, unit
from collapse_probe.registry import PENALTIES
from collapse_probe.settings import Settings

Direction = Literal["up", "down", "between"]
Level = Literal["tokens", "attention", "weights"]


@dataclass(frozen=True, eq=False)
class MixedLabels:
    """The labels of a batch as distributions over classes.

    `targets_BK` of the images, after mixing and smoothing; `patch_targets_BPK` of each patch, from the image that it was taken
    from (None: each patch has the label of its image, as under mixup).
    """

    targets_BK: Tensor
    patch_targets_BPK: Tensor | None = None

    def of_patches(self, patches: int) -> Tensor:
        """The label of each patch, [B, P, K]; SettingError where there are labels for another number of patches."""
        if self.patch_targets_BPK is None:
            return self.targets_BK[:, None].expand(-1, patches, -1)
        if self.patch_targets_BPK.shape[1] != patches:
            raise SettingError(f"labels are given for {self.patch_targets_BPK.shape[1]} patches, the model has {patches}")
        return self.patch_targets_BPK


@dataclass(frozen=True, eq=False)
class Inputs:
    """What a penalty gets beside the trace: the labels, a seed that differs from step to step, the penalty's own module."""

    labels: MixedLabels | None = None
    seed: int = 0
    own: nn.Module | None = None


@dataclass(frozen=True)
class Penalty(Settings, ABC):
    """One term of a loss; its settings are the fields.

    `metric` is the collapse-probe metric that it moves, and `direction` where to ("between": into bounds), unless `moves()`
    says otherwise for the settings; `needs` says what it is computed from: tokens, attention, weights, labels.
    """

    summary: ClassVar[str]
    source: ClassVar[str]
    metric: ClassVar[str]
    direction: ClassVar[Direction]
    needs: ClassVar[tuple[str, ...]]

    def __post_init__(self) -> None:
        super().__post_init__()
        blocks: Any = getattr(self, "blocks", None)
        if blocks is None:
            return
        whole = isinstance(blocks, tuple) and all(type(i) is int and i >= 0 for i in blocks)
        if not whole or not blocks or len(set(blocks)) != len(blocks):
            raise SettingError(f"{self.name}: blocks must be different block numbers from 0 up, not {blocks!r}")

    def moves(self) -> tuple[str, Direction]:
        """The metric that these settings move, and where to."""
        return self.metric, self.direction

    @property
    def replaces_criterion(self) -> bool:
        """Whether the term contains the classification loss, so that the trainer leaves its own out."""
        return False

    @abstractmethod
    def requests(self, parts: ViTParts) -> Requests:
        """What must be recorded of a model; SettingError or ModelError where the model does not have it."""

    def own(self, parts: ViTParts) -> nn.Module | None:
        """A module with parameters of the penalty's own, or None."""
        return None

    @abstractmethod
    def loss(self, trace: GradientTrace, inputs: Inputs) -> Tensor:
        """The unweighted term, a 0-d tensor with its graph: a mean over images, unless the class says otherwise."""


@dataclass(frozen=True)
class RowPenalty(Penalty):
    """A penalty on rows, at one of three levels.

    tokens: all tokens (prefix tokens included, as the released code has it) where they leave the chosen blocks (None: the
    last). attention: the heads' softmax maps of the chosen blocks (None: the first), each flattened to one row. weights: the
    rows of the chosen `matrices` in the chosen blocks (None: all). The term is the mean over images and blocks, at the level of
    weights the sum over matrices.
    """

    level: Level = "tokens"
    blocks: tuple[int, ...] | None = None
    matrices: tuple[Matrix, ...] = ("query", "key", "value")

    weight_metric: ClassVar[str] = "hyperspherical-energy"
    metric: ClassVar[str] = "patch-diversity"
    direction: ClassVar[Direction] = "up"
    needs = ("tokens", "attention", "weights")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.matrices or any(name not in MATRICES for name in self.matrices):
            raise SettingError(f"{self.name}: matrices must be some of {', '.join(MATRICES)}, not {self.matrices!r}")

    def moves(self) -> tuple[str, Direction]:
        """The metric of this level."""
        if self.level == "tokens":
            return "patch-diversity", "up"
        return ("head-similarity" if self.level == "attention" else self.weight_metric), "down"

    def _blocks_of(self, parts: ViTParts) -> tuple[int, ...]:
        if self.blocks is None and self.level != "weights":
            return (parts.depth - 1,) if self.level == "tokens" else (0,)
        return parts.block_numbers(self.blocks)

    def requests(self, parts: ViTParts) -> Requests:
        """Tokens or maps of the chosen blocks; for weights nothing but that the matrices are there."""
        blocks = self._blocks_of(parts)
        if self.level == "tokens":
            return Requests(places=frozenset(i + 1 for i in blocks))
        if self.level == "attention":
            return Requests(maps=frozenset(blocks))
        for i in blocks:
            for name in self.matrices:
                parts.matrix(i, name)
        return Requests()

    @abstractmethod
    def of_rows(self, rows: Tensor, seed: int) -> Tensor:
        """The penalty on sets of rows, [..., n, d] -> [...]."""

    def loss(self, trace: GradientTrace, inputs: Inputs) -> Tensor:
        """The mean over images and blocks, or the sum over matrices."""
        blocks = self._blocks_of(trace.parts)
        if self.level == "weights":
            stacks: dict[tuple[int, ...], list[Tensor]] = {}
            for matrix in trace.matrices(blocks, self.matrices):
                stacks.setdefault(tuple(matrix.shape), []).append(matrix)
            return torch.stack([self.of_rows(torch.stack(s), inputs.seed).sum() for s in stacks.values()]).sum()
        if self.level == "tokens":
            rows = [unit(anchored(trace.tokens(i + 1)))[0] for i in blocks]
        else:
            rows = [trace.maps(i).flatten(2) for i in blocks]
        return torch.stack([self.of_rows(each, inputs.seed).mean() for each in rows]).mean()


class ModelPenalties(nn.Module):
    """A model and its penalties: `recording()` around the forward pass, then `terms(labels)`.

    `penalties` gives each term its name: a Penalty, or the settings of the penalty that has that name. The model is not part
    of this module: `parameters()` and `state_dict()` hold what the penalties own (a head for patches, the count of steps
    from which random starts are drawn). A wrapped model (DistributedDataParallel) is recorded through its wrapper; call
    `average_gradients()` after backward then, for the wrapper does not know the penalties' own parameters. Raises
    UnknownNameError, SettingError, and ModelError where the model lacks a part that a penalty reads.
    """

    steps: Tensor

    def __init__(self, model: nn.Module, penalties: Mapping[str, Penalty | Mapping[str, Any]]) -> None:
        super().__init__()
        self._parts = ViTParts(unwrap(model))
        self.penalties: dict[str, Penalty] = {
            name: each if isinstance(each, Penalty) else PENALTIES[name].with_settings(each) for name, each in penalties.items()
        }
        self._requests = Requests()
        for each in self.penalties.values():
            self._requests |= each.requests(self._parts)
        for place in self._requests.places:
            self._parts.passage(place)
        for block in self._requests.maps:
            self._parts.attention(block)
        self.own = nn.ModuleDict()
        device = next(self._parts.model.parameters()).device
        for name, each in self.penalties.items():
            module = each.own(self._parts)
            if module is not None:
                self.own[name] = module.to(device)
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))
        self._count: int | None = None
        hook: Any = self.register_load_state_dict_post_hook
        hook(_read_steps_again)
        self._traces: Sequence[GradientTrace] | None = None
        if rank_and_world()[1] > 1:
            for parameter in self.parameters():
                dist.broadcast(parameter.data, src=0)

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Record the forward passes of the model inside the `with`; `terms` reads the last one."""
        self._traces = None
        with record_with_gradients(self._parts, self._requests) as traces:
            yield
        self._traces = traces

    def terms(self, labels: MixedLabels | None = None) -> dict[str, Tensor]:
        """The unweighted losses by name, 0-d, in float32 with their graphs; the recording is dropped.

        Raises CaptureError where no forward pass was recorded since the last call, SettingError where labels are missing.
        """
        if self._traces is None:
            raise CaptureError("nothing was recorded: run the model inside `with penalties.recording()` before each `terms()`")
        trace, self._traces = self._traces[0], None
        self._count = int(self.steps) if self._count is None else self._count
        modules = dict(self.own.items())
        with torch.autocast(next(self._parts.model.parameters()).device.type, enabled=False):
            terms = {
                name: penalty.loss(trace, Inputs(labels, self._count, modules.get(name)))
                for name, penalty in self.penalties.items()
            }
        self._count += 1
        self.steps.add_(1)
        return terms

    def average_gradients(self) -> None:
        """Average the gradients of the penalties' own parameters over all processes; nothing to do in one."""
        _, world = rank_and_world()
        for parameter in self.parameters() if world > 1 else ():
            if parameter.grad is not None:
                dist.all_reduce(parameter.grad)
                parameter.grad /= world


def _read_steps_again(penalties: ModelPenalties, keys: Any) -> None:
    """After loading, also as part of another module: random starts go on from the count of steps that was loaded."""
    penalties._count = None
