"""What a recipe will cost, told before it is run: parameters, operations, memory, time on this machine."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from collapse_probe.devices import choose_device, device_name
from collapse_probe.models.cost import count_flops
from collapse_probe.seeding import random_kept, seed_all
from collapse_probe.training.loss import Mixer, TrainingLoss, needs_patch_targets
from collapse_probe.training.recipe import Recipe
from collapse_probe.training.run import input_size, output_classes, patch_side

TRIALS = 1
PER_WEIGHT = 4  # tensors of the size of the weights: themselves, gradients, two moments of Adam
IMAGENET_IMAGES = 1_281_167
KNOWN = {"bundled:digits": 1437, "bundled:photos": 1008, "imagenet": IMAGENET_IMAGES}  # training images


@dataclass(frozen=True)
class Forecast:
    """What is to be expected of a run.

    `flops` are those of one forward pass of one image, `total_flops` of the whole run with three such passes
    for a step forwards and backwards (None where they cannot be counted). `state_bytes` hold weights,
    gradients, optimizer and average, `activation_bytes` what a forward pass keeps of one image for the way
    back. `seconds` is the time of the whole run in one process on `device`, from `trial_images` images tried.
    `steps` and all that follows from it are None where the number of training images is not known.
    """

    parameters: int
    flops: int | None
    steps: int | None
    images: int | None
    total_flops: float | None
    state_bytes: int
    activation_bytes: int
    memory_bytes: int
    images_per_second: float
    seconds: float | None
    device: str
    trial_images: int

    def facts(self) -> dict[str, Any]:
        """The same as plain values."""
        return asdict(self)


def forecast(recipe: Recipe, train_images: int | None = None, device: str = "auto", *, most_images: int = 2) -> Forecast:
    """Build the model of a recipe, try a step on up to `most_images` noise images, and reckon; nothing is written.

    `train_images` sets the length of an epoch; without it that of the recipe's own data is taken where known.
    """
    place = choose_device(device)
    with random_kept(place):
        seed_all(recipe.seed, 0)
        model = recipe.architecture.build(recipe.seed).to(place)
        lesson = TrainingLoss(model, recipe.penalties, recipe.amp).to(place)
        size = input_size(model)
        flops, _ = count_flops(model.eval(), torch.randn(1, 3, *size, device=place))
        trial = max(2, min(recipe.batch_size, most_images))
        speed, activations = _tried(lesson, recipe, size, trial)
    weights = sum(p.numel() * p.element_size() for p in lesson.parameters())
    state = weights * (PER_WEIGHT + (recipe.ema is not None))
    steps = _steps(recipe, train_images)
    images = None if steps is None else steps * recipe.batch_size
    at_once = math.ceil(recipe.batch_size / recipe.accumulate)
    return Forecast(
        parameters=sum(p.numel() for p in model.parameters()),
        flops=flops,
        steps=steps,
        images=images,
        total_flops=None if flops is None or images is None else 3.0 * flops * images,
        state_bytes=state,
        activation_bytes=activations,
        memory_bytes=state + activations * at_once,
        images_per_second=speed,
        seconds=None if images is None else images / speed,
        device=device_name(place),
        trial_images=trial,
    )


def _steps(recipe: Recipe, train_images: int | None) -> int | None:
    count = KNOWN.get(recipe.data) if train_images is None else train_images
    if recipe.steps is None and count is None:
        return None
    return recipe.length((count or 0) // recipe.batch_size)[0]


def _tried(lesson: TrainingLoss, recipe: Recipe, size: tuple[int, int], count: int) -> tuple[float, int]:
    """Images per second forwards and backwards, and the bytes kept of one image for the way back."""
    model: Any = lesson.model
    place = next(lesson.parameters()).device
    count += count % 2
    images = torch.randn(count, 3, *size, device=place)
    labels = torch.arange(count, device=place) % output_classes(model)
    patch = patch_side(model) if needs_patch_targets(recipe.penalties) else None
    batch = lesson.chosen(Mixer(recipe, output_classes(model), patch)(images, labels, 0))
    lesson.train()
    own = {p.data_ptr() for p in lesson.parameters()}
    with _kept(own) as kept:
        total = (lesson(*batch) * lesson.weights).sum()
    held = sum(kept.values())
    total.backward()
    start = time.perf_counter()
    for _ in range(TRIALS):
        (lesson(*batch) * lesson.weights).sum().backward()
    if place.type == "cuda":
        torch.cuda.synchronize(place)
    return count * TRIALS / max(time.perf_counter() - start, 1e-9), held // count


@contextmanager
def _kept(own: set[int]) -> Iterator[dict[int, int]]:
    """Bytes by storage of what autograd keeps inside the `with`, weights left out."""
    found: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield found
