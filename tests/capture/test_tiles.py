"""Tiles of every size put together are the same maps, and their unit vectors are those of NumPy in float64."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from factories import plan_for

from collapse_probe.capture.plan import Layer, MapGroup
from collapse_probe.capture.trace import Attention, Trace, tile_shape
from collapse_probe.metrics.pairwise_cosine import unit_vectors

IMAGES, HEADS, TOKENS, WIDTH = 3, 2, 11, 5
LAYERS = 4


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def attention(kind, seed):
    """One layer's attention for a batch, as a fused kernel or an eager softmax leaves it."""
    q, k = (2 * normal(IMAGES, HEADS, TOKENS, WIDTH, seed=10 * seed + i) for i in (0, 1))
    heard = Attention(owner=f"blocks.{seed}.attn", operation=kind, q=q, k=k, scale=0.8)
    if kind == "grouped":
        heard.k = k[:, :1]
    elif kind == "masked":
        heard.bias = normal(IMAGES, 1, TOKENS, TOKENS, seed=9) > -0.5
        heard.bias[:, :, 4] = False
    elif kind == "biased":
        heard.bias = normal(HEADS, TOKENS, TOKENS, seed=9)
    elif kind == "causal":
        heard.causal = True
    elif kind in ("eager", "mixed"):
        probs = torch.softmax(q @ k.transpose(-1, -2), -1)
        heard = Attention(owner=heard.owner, operation=kind, probs=probs)
        heard.weights = probs - 0.3 * probs.flip(1) if kind == "mixed" else None
    return heard


def slow_map(heard, point):
    """A layer's maps in float64 NumPy, from the definition."""
    if heard.q is None:
        kept = heard.weights if point == "weights" and heard.weights is not None else heard.probs
        return kept.double().numpy()
    q, k = heard.q.double().numpy(), heard.k.double().numpy()
    k = np.repeat(k, HEADS // k.shape[1], axis=1)
    logits = q @ np.swapaxes(k, -1, -2) * heard.scale
    if heard.bias is not None:
        bias = heard.bias.numpy()
        logits = np.where(bias, logits, -np.inf) if bias.dtype == bool else logits + bias
    if heard.causal:
        logits = np.where(np.tri(TOKENS, dtype=bool), logits, -np.inf)
    top = logits.max(-1, keepdims=True)
    grown = np.exp(logits - np.where(np.isfinite(top), top, 0.0))
    return grown / np.maximum(grown.sum(-1, keepdims=True), 1e-300)


def trace_of(kind):
    heard = tuple(attention(kind, seed) for seed in range(LAYERS))
    plan = plan_for(LAYERS, HEADS, TOKENS, mixed=kind == "mixed")
    return Trace(plan=plan, images=IMAGES, tokens=(), attention=heard, output=None)


KINDS = ["plain", "grouped", "masked", "biased", "causal", "eager", "mixed"]
ONE = LAYERS * HEADS * TOKENS * TOKENS * 4
BUDGETS = {"tiny": 1, "a few rows": ONE // 3, "one image": ONE, "two images": 2 * ONE + 1, "all": 100 * ONE}


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("kind", KINDS)
def test_tiles_are_the_maps(kind, budget):
    trace = trace_of(kind)
    for point in ("probs", "weights"):
        expected = np.stack([slow_map(a, point) for a in trace.attention], 2)
        for axis in ("row", "column"):
            found = np.full_like(expected, np.nan)
            for tile in trace.tiles(BUDGETS[budget]):
                assert tile.positions == list(range(LAYERS))
                if tile.whole(axis):
                    place = (tile.images, tile.heads, slice(None), tile.rows, tile.columns)
                    assert np.isnan(found[place]).all()
                    found[place] = tile.maps(point).double().numpy()
            np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)
        whole = np.stack([trace.maps(i, point).double().numpy() for i in range(LAYERS)], 2)
        np.testing.assert_allclose(whole, expected, rtol=0, atol=1e-6)
        assert torch.equal(trace.map_of(1, 2, point), trace.maps(1, point)[2])


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("kind", KINDS)
def test_rows_of_tiles_sum_to_one(kind, budget):
    for tile in trace_of(kind).tiles(BUDGETS[budget]):
        if tile.whole_rows:
            sums = tile.probs.sum(-1)
            blind = sums == 0
            assert bool(blind.any()) == (kind == "masked" and 4 in tile.tokens("row"))
            assert torch.allclose(sums[~blind], torch.ones(()), atol=1e-6)


@pytest.mark.parametrize("budget", BUDGETS)
def test_tiles_keep_to_their_budget_and_say_which_is_the_last(budget):
    tiles = list(trace_of("plain").tiles(BUDGETS[budget]))
    smallest = LAYERS * HEADS * TOKENS * 4
    assert all(tile.probs.numel() * 4 <= max(BUDGETS[budget], smallest) for tile in tiles)
    assert all(tile.weights is tile.probs for tile in tiles)
    for axis in ("row", "column"):
        whole = [tile for tile in tiles if tile.whole(axis)]
        ends = [tile.images.stop for tile in whole if tile.last_tokens and tile.last_heads]
        assert ends == sorted(set(ends))
        assert ends[-1] == IMAGES
        assert whole[-1].last_tokens
        assert whole[-1].last_heads
    b, _, rows, columns = tile_shape(MapGroup(HEADS, TOKENS, TOKENS, 1, list(range(LAYERS))), BUDGETS[budget])
    assert (rows == columns == TOKENS) == (BUDGETS[budget] >= ONE)
    assert b == max(1, BUDGETS[budget] // ONE)


def slow_units(vectors, axis, centred):
    vectors = vectors if axis == "row" else np.swapaxes(vectors, -1, -2)
    if centred:
        vectors = vectors - vectors.mean(-1, keepdims=True)
    length = np.linalg.norm(vectors, axis=-1, keepdims=True)
    return vectors / np.where(length > 0, length, 1.0)


@pytest.mark.parametrize("without", [(), (0, 3)])
@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize("axis", ["row", "column"])
@pytest.mark.parametrize("kind", ["plain", "mixed"])
@pytest.mark.parametrize("budget", BUDGETS)
def test_unit_vectors(kind, axis, centred, without, budget):
    trace = trace_of(kind)
    kept = [t for t in range(TOKENS) if t not in without]
    expected = np.stack([slow_map(a, "weights") for a in trace.attention], 2)[..., kept, :][..., kept]
    expected = slow_units(expected, axis, centred)
    seen = {image: [] for image in range(IMAGES)}
    for tile in trace.tiles(BUDGETS[budget]):
        if not tile.whole(axis):
            continue
        made = unit_vectors(tile, "weights", axis, centred, without)
        assert unit_vectors(tile, "weights", axis, centred, without) is made
        units, defined = made.matrices, made.valid
        assert bool(defined.all())
        units = units if axis == "row" else units.transpose(-1, -2)
        tokens = tile.tokens(axis, without)
        assert units.shape[-2] == len(tokens) == defined.shape[-1]
        places = [kept.index(t) for t in tokens]
        np.testing.assert_allclose(units.double(), expected[tile.images, tile.heads][..., places, :], rtol=0, atol=2e-5)
        for image in range(tile.images.start, tile.images.stop):
            seen[image] += tokens if tile.heads.start == 0 else []
    assert all(tokens == kept for tokens in seen.values())


def degenerate():
    """Two layers of maps: uniform ones, and ones where every query looks at the first key."""
    uniform = torch.full((1, 1, 4, 4), 0.25)
    first = torch.zeros(1, 1, 4, 4)
    first[..., 0] = 1.0
    heard = tuple(Attention(owner="", operation="softmax", probs=probs) for probs in (uniform, first))
    return Trace(plan=plan_for(2, 1, 4), images=1, tokens=(), attention=heard, output=None)


@pytest.mark.parametrize("budget", [1, 10**6])
@pytest.mark.parametrize(
    ("axis", "centred", "defined"),
    [
        ("row", False, [[True] * 4, [True] * 4]),
        ("row", True, [[False] * 4, [True] * 4]),
        ("column", False, [[True] * 4, [True, False, False, False]]),
        ("column", True, [[False] * 4, [False] * 4]),
    ],
)
def test_what_has_no_direction_is_zero_and_marked(axis, centred, defined, budget):
    marks = {}
    for tile in degenerate().tiles(budget):
        if tile.whole(axis):
            made = unit_vectors(tile, "probs", axis, centred)
            units, marked = made.matrices, made.valid
            assert bool(torch.isfinite(units).all())
            length = units.norm(dim=-1 if axis == "row" else -2)
            assert torch.allclose(length, marked.float(), atol=1e-6)
            marks |= {t: marked[0, 0, :, i].tolist() for i, t in enumerate(tile.tokens(axis))}
    assert [[marks[t][layer] for t in range(4)] for layer in (0, 1)] == defined


@pytest.mark.parametrize("budget", [1, 400, 10**9])
def test_layers_of_another_signature_come_in_tiles_of_their_own(budget):
    fused = attention("plain", 0)
    narrow = Attention(owner="", operation="sub", q=fused.q, k=fused.k[:, :, :3], scale=0.5)
    layers = (
        plan_for(1, HEADS, TOKENS).layers[0],
        Layer("", 0, 1, "sub", HEADS, TOKENS, 3),
        Layer("", 0, 2, "window", HEADS, 4, 4, reason="a window"),
    )
    plan = replace(plan_for(3, HEADS, TOKENS), layers=layers)
    trace = Trace(plan=plan, images=IMAGES, tokens=(), attention=(fused, narrow, fused), output=None)
    tiles = list(trace.tiles(budget))
    assert {tuple(tile.positions) for tile in tiles} == {(0,), (1,)}
    found = torch.full((IMAGES, HEADS, TOKENS, 3), torch.nan)
    for tile in tiles:
        if tile.positions == [1] and tile.whole_columns:
            found[tile.images, tile.heads, tile.rows, tile.columns] = tile.probs[:, :, 0]
    assert torch.allclose(found, torch.softmax(fused.q @ fused.k[:, :, :3].transpose(-1, -2) / 2, -1), atol=1e-6)
