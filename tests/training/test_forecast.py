"""The forecast of a recipe: counted by hand for a small model, and nothing disturbed."""

from __future__ import annotations

import random

import pytest
import torch

from collapse_probe.data.splits import split_data
from collapse_probe.models.vit import ViTSettings
from collapse_probe.training.forecast import KNOWN, forecast
from collapse_probe.training.recipe import Recipe

TINY = ViTSettings(image_size=8, patch_size=2, classes=10, depth=2, width=16, heads=2, mlp_ratio=2.0)
RECIPE = Recipe(name="tiny", model=TINY, epochs=3, batch_size=8)


def test_parameters_operations_and_steps_are_those_counted_by_hand():
    tokens, width, hidden, depth = 17, 16, 32, 2
    block = 2 * tokens * (4 * width * width + 2 * width * hidden) + 4 * tokens * tokens * width
    expected = depth * block + 2 * 16 * 12 * width + 2 * width * 10
    found = forecast(RECIPE, 100, "cpu")
    assert found.flops == expected
    assert (found.steps, found.images) == (36, 288)
    assert found.total_flops == 3 * expected * 288
    assert found.parameters == sum(p.numel() for p in RECIPE.architecture.build(0).parameters())
    assert found.state_bytes == 16 * found.parameters
    assert found.memory_bytes == found.state_bytes + 8 * found.activation_bytes
    assert found.seconds == pytest.approx(288 / found.images_per_second)


def test_an_average_needs_one_copy_more_and_pieces_need_less_at_once():
    found = forecast(RECIPE.vary(ema=0.9, accumulate=2), 100, "cpu")
    assert found.state_bytes == 20 * found.parameters
    assert found.memory_bytes == found.state_bytes + 4 * found.activation_bytes


def test_data_of_unknown_length_leave_the_length_open():
    found = forecast(RECIPE, device="cpu")
    assert (found.steps, found.seconds, found.total_flops) == (None, None, None)


def test_random_states_stay():
    before = random.getstate(), torch.get_rng_state()
    forecast(RECIPE.vary(mixup=0.8, penalty={"patch-mixing": 1.0}), 100, "cpu")
    assert random.getstate() == before[0]
    assert torch.equal(torch.get_rng_state(), before[1])


@pytest.mark.parametrize("data", [data for data in KNOWN if data.startswith("bundled")])
def test_known_numbers_of_training_images_are_those_of_the_split(data):
    assert KNOWN[data] == len(split_data(data).train)
