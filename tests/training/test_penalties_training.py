"""Each penalty alone, 200 steps on a tiny ViT, moves the metric that it names in the direction that it names."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from factories import readings

from collapse_probe.capture.capture import record
from collapse_probe.metrics.functional.orthogonality import hyperspherical_energy, orthogonality_gap
from collapse_probe.models.vit import ViT
from collapse_probe.registry import PENALTIES
from collapse_probe.training.penalties.base import MixedLabels, ModelPenalties

STEPS = 200
LAST, FIRST, NEIGHBOURS = (-1,), (0,), (0, 1)
"""Where the metric is read: at the last depth, in the first block, between the first two blocks."""
WEIGHT_METRICS = {"weight-orthogonality": orthogonality_gap, "hyperspherical-energy": hyperspherical_energy}


def mixed_batch():
    """Eight images, each cut from two of three noisy colours along a vertical line, and the label of every patch."""
    generator = torch.Generator().manual_seed(0)
    colours = torch.eye(3)
    left, right = torch.tensor([0, 1, 2, 0, 1, 2, 0, 1]), torch.tensor([1, 2, 0, 2, 0, 1, 1, 2])
    grid = torch.where(torch.arange(4) < 2, left[:, None], right[:, None])[:, None].expand(8, 4, 4)
    pixels = colours[grid].permute(0, 3, 1, 2).repeat_interleave(2, 2).repeat_interleave(2, 3)
    images = pixels + 0.3 * torch.randn(8, 3, 8, 8, generator=generator)
    targets = colours[grid.flatten(1)]
    return images, MixedLabels(targets.mean(1), targets)


pytestmark = pytest.mark.usefixtures("one_thread")


def over_smoothed():
    """A tiny ViT whose patches start alike: every position has the same large part."""
    torch.manual_seed(0)
    model = ViT(image_size=8, patch_size=2, depth=2, width=16, heads=2, classes=3, mlp_ratio=2.0, init_std=0.2)
    with torch.no_grad():
        model.pos_embed += 2 * torch.randn(16)
    return model


def measured(model, images, metric, where):
    """The metric as collapse-probe reads it; those of weights from the same pure functions."""
    if metric in WEIGHT_METRICS:
        parts = [part for block in model.blocks for part in block.attn.qkv.weight.detach().chunk(3)]
        return WEIGHT_METRICS[metric](torch.stack(parts)).mean().item()
    model.eval()
    with record(model) as recording, torch.no_grad():
        model(images)
    found = readings([recording.take()], [metric])[metric].values
    model.train()
    return float(np.mean(found[where]))


def sharpened(model):
    """The same model with queries and keys so long that each head sees few keys."""
    with torch.no_grad():
        for block in model.blocks:
            block.norm1.weight *= 5
    return model


def trained(name, settings, metric, where):
    """The metric before and after, and the term before and after."""
    model, (images, labels) = over_smoothed().train(), mixed_batch()
    if settings.get("low") is not None:
        model = sharpened(model)
    penalties = ModelPenalties(model, {name: settings})
    optimiser = torch.optim.Adam([*model.parameters(), *penalties.parameters()], lr=3e-3)
    before, terms = measured(model, images, metric, where), []
    for _ in range(STEPS):
        with penalties.recording():
            model(images)
        term = penalties.terms(labels)[name]
        optimiser.zero_grad()
        term.backward()
        optimiser.step()
        terms.append(term.item())
    return before, measured(model, images, metric, where), float(np.mean(terms[:5])), float(np.mean(terms[-5:]))


CASES = [
    ("patch-cosine", {"form": "paper"}, LAST),
    ("patch-cosine", {"form": "repository"}, LAST),
    ("patch-contrastive", {"form": "paper"}, LAST),
    ("patch-contrastive", {"form": "repository"}, LAST),
    ("patch-contrastive", {"form": "diverse-vit"}, LAST),
    ("patch-mixing", {"form": "paper"}, LAST),
    ("patch-mixing", {"form": "repository"}, LAST),
    ("patch-mixing", {"form": "diverse-vit"}, LAST),
    ("attention-cosine", {}, FIRST),
    ("attention-cosine", {"form": "paper"}, FIRST),
    ("attention-contrastive", {}, FIRST),
    ("block-cosine", {}, NEIGHBOURS),
    ("block-cosine", {"axis": "column"}, NEIGHBOURS),
    *[
        ("soft-orthogonality", {"level": level}, where)
        for level, where in (("tokens", LAST), ("attention", FIRST), ("weights", ()))
    ],
    *[
        ("conditional-orthogonality", {"level": level}, where)
        for level, where in (("tokens", LAST), ("attention", FIRST), ("weights", ()))
    ],
    ("conditional-orthogonality", {"estimate": "exact"}, ()),
    *[
        ("hyperspherical-separation", {"level": level}, where)
        for level, where in (("tokens", LAST), ("attention", FIRST), ("weights", ()))
    ],
    *[
        ("gram-determinant", {"level": level}, where)
        for level, where in (("tokens", LAST), ("attention", FIRST), ("weights", ()))
    ],
    ("attention-entropy", {"low": None, "high": 0.5}, FIRST),
    ("attention-entropy", {"low": 0.95, "high": None}, FIRST),
]


@pytest.mark.parametrize(
    ("name", "settings", "where"), CASES, ids=[f"{n} {' '.join(map(str, s.values()))}" for n, s, _ in CASES]
)
def test_alone_it_moves_its_metric_where_it_says(name, settings, where):
    metric, direction = PENALTIES[name].with_settings(settings).moves()
    before, after, first, last = trained(name, settings, metric, where)
    assert last < first
    assert direction in ("up", "down")
    assert (after > before) == (direction == "up"), f"{metric} went from {before:.4f} to {after:.4f}"
    assert abs(after - before) > 0.005


def test_every_penalty_was_trained():
    assert {name for name, _, _ in CASES} == set(PENALTIES) - {"gram-anchor"}, "which holds still what others move"
