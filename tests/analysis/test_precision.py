"""A model in bfloat16 gives the numbers of the same model in float32: only its own rounding is between them."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from factories import small_vit

import collapse_probe as cp
from collapse_probe.registry import METRICS

NAMES = [*METRICS, *(f"{name}@{variant}" for name, kind in METRICS.items() for variant in kind.variants)]
OF_LARGEST, BESIDES = 0.005, 2e-4
"""The tolerance that docs/recording.md states: this share of the metric's largest value, and so much besides."""
OF_COUNTS = 0.005
"""The same for shares of vectors or tokens above a threshold, which rounding can carry over it one by one."""
COUNTS = {"similarity-ratio", "token-norm@outliers", "token-norm@150"}
EXCESS = {"massive-activations@kurtosis": 3.0, "residual-contribution@cosine": 1.0}
"""What was taken off, or cancels (cosines of both signs): the tolerance is a share of the whole."""


@pytest.fixture(scope="module")
def runs():
    """Every metric of one sharp model: in float32, with its weights in bfloat16, and under autocast."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    model = small_vit(sharpness=8)
    images = torch.randn(24, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    facts = {"data": [images], "metrics": tuple(NAMES)}
    found = {
        "float32": cp.analyze(copy.deepcopy(model), **facts),
        "weights": cp.analyze(copy.deepcopy(model).bfloat16(), **facts),
        "autocast": cp.analyze(copy.deepcopy(model), amp=True, amp_dtype="bfloat16", **facts),
    }
    torch.set_num_threads(before)
    return found


@pytest.mark.parametrize("kind", ["weights", "autocast"])
@pytest.mark.parametrize("name", NAMES)
def test_bfloat16_changes_no_number_by_more_than_is_stated(runs, name, kind):
    wide, narrow = runs["float32"].metrics[name], runs[kind].metrics[name]
    if wide.values is None:
        assert narrow.not_applicable == wide.not_applicable
        return
    allowed = OF_LARGEST * np.nanmax(np.abs(wide.values + EXCESS.get(name, 0.0)), initial=0.0) + BESIDES
    if name in COUNTS or name.partition("@")[0] in COUNTS:
        allowed = OF_COUNTS
    assert np.array_equal(np.isnan(narrow.values), np.isnan(wide.values))
    assert np.nanmax(np.abs(narrow.values - wide.values), initial=0.0) <= allowed


def test_the_runs_were_in_the_precisions_that_they_name(runs):
    assert [runs[kind].run["dtype"] for kind in ("float32", "weights", "autocast")] == ["float32", "bfloat16", "bfloat16"]
    pairs = [runs[kind].metrics["attention-entropy"].values for kind in ("weights", "autocast")]
    assert all((values != runs["float32"].metrics["attention-entropy"].values).any() for values in pairs)
