"""Every image through the model plainly and under every set of replaced maps: top answers and divergences per image."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from collapse_probe.analysis import Settings
from collapse_probe.capture import same
from collapse_probe.data import Batch, ImageSet, batches, from_loader
from collapse_probe.devices import TRACE_BYTES, autocast
from collapse_probe.errors import CaptureError, DataError, ModelError
from collapse_probe.one_pass import Progress
from collapse_probe.orders import Branch, Order, orders_for
from collapse_probe.processes import gathered, rank_and_world
from collapse_probe.replacing import replacing
from collapse_probe.subject import Subject
from collapse_probe.trace import Plan

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
class Bench:
    """A model ready for runs with maps replaced."""

    subject: Subject
    plan: Plan
    device: torch.device
    settings: Settings
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

    def run(self, images: Tensor, orders: Mapping[int, Order]) -> Any:
        """What the model returns with maps replaced."""
        with replacing(self.model, self.plan, orders, means=self.means), autocast(self.device, self.settings.amp_as):
            return self.model(images)

    def orders(self, condition: Condition) -> dict[int, Order]:
        """What a condition asks of each layer."""
        return orders_for(self.plan, *condition, self.branches)


def _stream(images: Images, subject: Subject, settings: Settings) -> Iterator[Batch]:
    if not isinstance(images, ImageSet):
        return from_loader(images)
    rank, world = rank_and_world()
    size, workers = settings.batch_size, settings.workers
    return batches(images, subject.preprocess, batch_size=size, workers=workers, rank=rank, world=world)


def gather_means(bench: Bench, images: Images, blocks: Sequence[int]) -> None:
    """The mean map of each layer [H, N, N]: sums in float64 over every image, of all processes."""
    wanted = set(orders_for(bench.plan, "mean", blocks, {}))
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


def run_all(bench: Bench, images: Images, conditions: Sequence[Condition], progress: Progress | None) -> Pass:
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


def _plainly(bench: Bench, pixels: Tensor) -> Any:
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
