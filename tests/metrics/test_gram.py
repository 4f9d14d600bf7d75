"""The drift of patch Gram matrices: worked cases, a slow NumPy reference, and what the official code gave."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from collapse_probe.metrics.functional.gram import gram_drift, patch_gram

k, p, c = np.ogrid[:2, :5, :4]
ONE = np.sin(1 + 0.7 * k + 1.3 * p + 0.9 * c + 0.5 * p * c)
OTHER = np.cos(0.3 + 0.4 * k + 0.8 * p + 1.1 * c + 0.2 * p * c)
# facebookresearch/dinov3 at 6876159, dinov3/loss/gram_loss.py: GramLoss(remove_neg=…)(ONE[i : i + 1], OTHER[i : i + 1]), which
# computes in float32.
OFFICIAL = {
    "zero": [0.05867204815149307, 0.08729495853185654],
    "keep": [0.30631810426712036, 0.5013720989227295],
}


def slow(one, other, negatives):
    total = 0.0
    for i in range(len(one)):
        for j in range(len(one)):
            s, t = (x[i] @ x[j] / np.linalg.norm(x[i]) / np.linalg.norm(x[j]) for x in (one, other))
            s, t = (max(each, 0.0) if negatives == "zero" else each for each in (s, t))
            total += (s - t) ** 2
    return total / len(one) ** 2


@pytest.mark.parametrize("negatives", ["zero", "keep"])
def test_drift_against_the_slow_way_and_the_official_code(negatives):
    found = gram_drift(torch.as_tensor(ONE), torch.as_tensor(OTHER), negatives)
    assert found.tolist() == pytest.approx([slow(a, b, negatives) for a, b in zip(ONE, OTHER, strict=True)], abs=1e-12)
    assert found.tolist() == pytest.approx(OFFICIAL[negatives], abs=1e-6)


def test_rotation_scale_and_another_width_are_no_drift():
    one = torch.as_tensor(np.random.default_rng(0).normal(size=(3, 9, 6)))
    turn = torch.linalg.qr(torch.as_tensor(np.random.default_rng(1).normal(size=(8, 6))))[0]
    assert gram_drift(one, one).tolist() == [0.0, 0.0, 0.0]
    assert gram_drift(one, 7 * one @ turn.mT, "keep").max() < 1e-28


def test_hand_made_cases():
    apart, alike = torch.eye(4), torch.ones(4, 4)
    assert gram_drift(apart, alike).item() == pytest.approx(12 / 16)  # every pair of different patches went from 0 to 1
    opposite = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
    assert gram_drift(opposite, torch.eye(2)).item() == 0.0  # a negative cosine counts as none
    assert gram_drift(opposite, torch.eye(2), "keep").item() == 0.5


def test_a_zero_patch_has_no_direction_and_a_finite_gradient():
    patches = torch.tensor([[0.0, 0.0], [1.0, 2.0]], requires_grad=True)
    assert patch_gram(patches).tolist()[0] == [0.0, 0.0]
    gram_drift(patches, torch.eye(2)).backward()
    assert patches.grad.isfinite().all()
