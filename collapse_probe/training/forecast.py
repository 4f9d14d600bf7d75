"""What a recipe will cost: parameters, operations, memory, time on this machine; estimated before it is run."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from collapse_probe.devices import choose_device, device_name
from collapse_probe.models.cost import count_flops
from collapse_probe.seeding import random_kept, seed_all
from collapse_probe.training.loss import Mixer, TrainingLoss, needs_patch_targets
from collapse_probe.training.recipe import Recipe
from collapse_probe.training.run import input_size, output_classes, patch_side

COPIES = 4  # tensors of the size of the weights: themselves, gradients, two moments of Adam
KNOWN = {"bundled:digits": 1437, "bundled:photos": 1008, "imagenet": 1_281_167}  # training images


@dataclass(frozen=True)
class Forecast:
    """The expected costs of a run.

    `flops` are those of one forward pass of one image, `total_flops` of the whole run at three such passes a step (None where
    they cannot be counted). `state_bytes` hold weights, gradients, optimizer and average, `activation_bytes` what a forward
    pass keeps of one image for the backward pass. `seconds` is the time of the whole run in one process on `device`, from a
    step on `trial_images` images. `steps` and all that follows from it are None where the number of training images is not
    known.
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


def forecast(recipe: Recipe, train_images: int | None = None, device: str = "auto", *, most_images: int = 2) -> Forecast:
    """Build the model of a recipe and time a step on up to `most_images` noise images; nothing is written.

    `train_images` sets the length of an epoch; without it that of the recipe's own data is taken where known.
    """
    place = choose_device(device)
    with random_kept(place):
        seed_all(recipe.seed, 0)
        model = recipe.architecture.build(recipe.seed).to(place)
        loss = TrainingLoss(model, recipe.penalties, recipe.amp).to(place)
        flops, _ = count_flops(model.eval(), torch.randn(1, 3, *input_size(model), device=place))
        trial = max(2, min(recipe.batch_size, most_images))
        speed, activations = _try_step(loss, recipe, trial + trial % 2)
    weights = sum(p.numel() * p.element_size() for p in loss.parameters())
    state = weights * (COPIES + (recipe.ema is not None))
    count = KNOWN.get(recipe.data) if train_images is None else train_images
    known = recipe.steps is not None or count is not None
    steps = recipe.length((count or 0) // recipe.batch_size)[0] if known else None
    images = None if steps is None else steps * recipe.batch_size
    return Forecast(
        parameters=sum(p.numel() for p in model.parameters()),
        flops=flops,
        steps=steps,
        images=images,
        total_flops=None if flops is None or images is None else 3.0 * flops * images,
        state_bytes=state,
        activation_bytes=activations,
        memory_bytes=state + activations * math.ceil(recipe.batch_size / recipe.accumulate),
        images_per_second=speed,
        seconds=None if images is None else images / speed,
        device=device_name(place),
        trial_images=trial,
    )


def _try_step(loss: TrainingLoss, recipe: Recipe, count: int) -> tuple[float, int]:
    """Images per second forwards and backwards, and the bytes that autograd keeps of one image for the backward pass."""
    model: Any = loss.model
    place, classes = next(loss.parameters()).device, output_classes(model)
    images = torch.randn(count, 3, *input_size(model), device=place)
    labels = torch.arange(count, device=place) % classes
    patch = patch_side(model) if needs_patch_targets(recipe.penalties) else None
    tensors = Mixer(recipe, classes, patch)(images, labels, 0).tensors
    loss.train()
    weights = {p.data_ptr() for p in loss.parameters()}
    stored: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            stored[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        total = (loss(*tensors) * loss.weights).sum()
    kept = sum(stored.values())
    total.backward()
    start = time.perf_counter()
    (loss(*tensors) * loss.weights).sum().backward()
    if place.type == "cuda":
        torch.cuda.synchronize(place)
    return count / max(time.perf_counter() - start, 1e-9), kept // count
