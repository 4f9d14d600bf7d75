"""The worked values that belong to the metrics here: computed from the same inputs by official code or transcriptions of it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from factories import readings, trace_of

from collapse_probe.metrics.attention.attention_entropy import entropy
from collapse_probe.metrics.tokens.patch_diversity import patch_cosine


def softmax(x):
    x = np.exp(x - x.max(-1, keepdims=True))
    return x / x.sum(-1, keepdims=True)


B, H, Q, K = np.ogrid[:2, :3, :5, :5]
A1 = softmax(2 * np.sin(0.2 + 0.5 * B + 1.1 * H + 0.6 * Q + 0.4 * K + 0.3 * Q * K))
A2 = softmax(2 * np.cos(0.1 + 0.3 * B + 0.7 * H + 0.9 * Q + 0.5 * K + 0.2 * Q * K))
b, t, c = np.ogrid[:2, :6, :5]
E1 = np.sin(1 + 0.7 * b + 1.3 * t + 0.9 * c + 0.5 * t * c)


@pytest.mark.parametrize(("variant", "expected"), [("", 0.5754295055), ("@row", 0.5775482493)])
@pytest.mark.parametrize("budget", [2**24, 1])
def test_cross_layer_similarity(variant, expected, budget):
    name = f"attention-similarity{variant}"
    found = readings([trace_of(np.stack([A1, A2], 1))], [name], budget)[name]
    assert found.values[0, 1] == pytest.approx(expected, abs=1e-6)
    assert found.values[1, 0] == pytest.approx(expected, abs=1e-6)
    assert np.diag(found.values) == pytest.approx(1, abs=1e-6)


def test_entropy():
    assert entropy(torch.as_tensor(A1)).mean().item() == pytest.approx(1.1109327543, abs=1e-9)
    found = readings([trace_of(np.stack([A1, A2], 1))], ["attention-entropy"])["attention-entropy"]
    assert found.values[0].mean() == pytest.approx(1.1109327543, abs=1e-6)


@pytest.mark.parametrize(("tokens", "expected"), [(E1[:, 1:], 0.3580696730), (E1, 0.3224542139)])
def test_patch_cosine(tokens, expected):
    assert patch_cosine(torch.as_tensor(tokens)).mean().item() == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize(("n", "expected"), [(197, 5.2832), (196, 5.2781)])
def test_entropy_of_uniform_attention(n, expected):
    assert entropy(torch.full((1, n), 1 / n)).item() == pytest.approx(expected, abs=5e-5)
