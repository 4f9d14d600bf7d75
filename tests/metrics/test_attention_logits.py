"""Attention logits against slow NumPy: scale, bias, masks, windows, long inputs in parts, and maps without logits."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from factories import plan_for, random_maps, readings, small_vit, trace_of
from padded_models import model_and_plan
from padded_models import trace_of as padded_trace

from collapse_probe.capture.capture import discover_plan, record
from collapse_probe.capture.trace import Attention, Trace
from collapse_probe.metrics.attention import attention_logits

B, L, H, N, K = 3, 2, 2, 40, 5
NAMES = ["attention-logits", "attention-logits@quantile", "attention-logits@range"]


def heads(seed=0, count=H, tokens=N):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(B, n, tokens, K, generator=generator) for n in (H, count)]


def trace_with(**facts):
    plan = plan_for(L, H, N)
    attention = tuple(
        Attention(owner=f"blocks.{i}.attn", operation="kernel", q=q, k=k, scale=0.7, **facts)
        for i, (q, k) in enumerate(heads(seed) for seed in range(L))
    )
    return Trace(plan=plan, images=B, tokens=trace_of(random_maps((B, L, H, N, N))).tokens, attention=attention, output=None)


def slow(trace, add=None, visible=None):
    """[quantity, B, L, H] from every single logit."""
    found = np.zeros((3, B, L, H))
    for layer, attention in enumerate(trace.attention):
        for image in range(B):
            for head in range(H):
                q, k = attention.q[image, head].double().numpy(), attention.k[image, head].double().numpy()
                logits = 0.7 * q @ k.T + (0 if add is None else add)
                seen = np.ones((N, N), bool) if visible is None else visible
                every = np.sort(logits[seen])[::-1]
                rows = [logits[i][seen[i]] for i in range(N) if seen[i].any()]
                found[0, image, layer, head] = every[0]
                found[1, image, layer, head] = every[len(every) // 1000]
                found[2, image, layer, head] = np.mean([row.max() - row.min() for row in rows])
    return found


def check(trace, expected):
    found = readings([trace], NAMES)
    for name, slow_values in zip(NAMES, expected, strict=True):
        assert found[name].values == pytest.approx(slow_values.mean(0), abs=1e-5), name
        over_heads = slow_values.mean(-1)
        assert found[name].head_mean[0] == pytest.approx(over_heads.mean(0), abs=1e-5)
        assert found[name].stderr == pytest.approx(slow_values.std(0, ddof=1) / np.sqrt(B), abs=1e-5)
    assert found[NAMES[0]].details["highest"] == pytest.approx(expected[0].max(0), abs=1e-5)


def test_every_number_against_the_slow_way():
    check(trace_with(), slow(trace_with()))


@pytest.mark.parametrize("budget", [N * 4, 5 * N * 4, N * N * 4, 3 * N * N * 4])
def test_parts_of_a_map_give_what_the_whole_gives(monkeypatch, budget):
    monkeypatch.setattr(attention_logits, "LOGIT_BYTES", budget)
    check(trace_with(), slow(trace_with()))


def test_masked_entries_do_not_count():
    generator = np.random.default_rng(0)
    visible = generator.random((N, N)) < 0.6
    visible[3] = False  # a query that may see nothing
    shown = torch.as_tensor(visible)
    bias = torch.as_tensor(generator.normal(size=(N, N)), dtype=torch.float32)
    check(trace_with(bias=shown), slow(trace_with(), visible=visible))
    lowest = torch.finfo(torch.float32).min
    for mask in (-torch.inf, lowest, -100.0):
        check(trace_with(bias=torch.where(shown, bias, mask)), slow(trace_with(), bias.double().numpy(), visible))
    check(trace_with(causal=True), slow(trace_with(), visible=np.tri(N, dtype=bool)))


def test_the_quantile_leaves_one_in_a_thousand_above():
    trace = trace_with()
    logits = trace.attention[0].logits()[0, 0].flatten()
    quantile = readings([trace.first(1)], NAMES[1:2])[NAMES[1]].values[0, 0]
    assert (logits > quantile).sum() == N * N // 1000 == 1


def test_larger_weights_give_larger_logits_by_their_square():
    images = torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    found = []
    for sharpness in (1.0, 3.0):
        model = small_vit(sharpness=sharpness)
        plan = discover_plan(model, (64, 64))
        with torch.no_grad(), record(model, plan) as recordings:
            model(images)
        found.append(readings([recordings.take()], NAMES))
    for name in NAMES:
        assert found[1][name].values[0] == pytest.approx(9 * found[0][name].values[0], rel=1e-4)


def test_the_range_is_told_from_maps_without_logits_and_nothing_else_is():
    trace = trace_with()
    maps = torch.stack([each.maps()["probs"] for each in trace.attention], 1).double()
    eager = trace_of(maps.numpy())
    found = readings([eager], NAMES)
    assert found[NAMES[2]].values == pytest.approx(readings([trace], NAMES[2:])[NAMES[2]].values, abs=1e-4)
    assert "not what went into it" in found[NAMES[0]].not_applicable
    assert found[NAMES[1]].values is None
    maps[:, :, :, 2, 3] = 0.0
    assert "near 0" in readings([trace_of(maps.numpy())], NAMES[2:])[NAMES[2]].not_applicable


def test_the_windows_of_an_image_count_together_and_a_mask_in_them_leaves_the_range_open():
    trace, plan = padded_trace("windowed", range(3)), model_and_plan("windowed")[1]
    found = readings([trace], NAMES[2:])[NAMES[2]]
    masked = []
    for place, index in enumerate(plan.map_layers):
        layer = plan.layers[index]
        maps = trace.attention[index].maps()["probs"].double().numpy()
        masked.append(maps.min() < 1e-30)
        logs = np.log(maps).reshape(3, layer.windows, layer.heads, layer.queries, layer.keys)
        expected = (logs.max(-1) - logs.min(-1)).mean((1, 3)).mean(0)
        if masked[-1]:
            assert np.isnan(found.values[place]).all()
        else:
            assert found.values[place] == pytest.approx(expected, abs=1e-5)
    assert {*masked} == {True, False}  # what Swin's shift brings together is masked in every other block


def test_windows_whose_logits_are_known_are_taken_together():
    trace = trace_with()
    windows = tuple(replace(layer, windows=3, reason="attention inside windows") for layer in trace.plan.layers)
    together = replace(trace, plan=replace(trace.plan, layers=windows), images=1)
    found = readings([together], NAMES)
    every = np.stack([attention.logits().double().numpy() for attention in trace.attention], 1)  # [windows, L, H, N, N]
    joined = np.sort(every.transpose(1, 2, 0, 3, 4).reshape(L, H, -1))
    assert found[NAMES[0]].values == pytest.approx(joined[..., -1], abs=1e-5)
    assert found[NAMES[1]].values == pytest.approx(joined[..., -1 - joined.shape[-1] // 1000], abs=1e-5)
    assert found[NAMES[2]].values == pytest.approx((every.max(-1) - every.min(-1)).mean((0, 3)), abs=1e-5)


def test_the_highest_of_parts_is_that_of_all():
    traces = [trace_with(), trace_with()]
    later = tuple(replace(each, q=2 * each.q) for each in traces[1].attention)
    traces[1] = replace(traces[1], attention=later)
    found, alone = (readings(some, NAMES[:1])[NAMES[0]] for some in (traces, traces[1:]))
    assert found.details["highest"].tolist() == alone.details["highest"].tolist()
