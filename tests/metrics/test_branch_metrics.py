"""What a block and its branches do to the tokens: hand-made streams with known answers, laws, references, released code."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import timm
import torch
from toy_models import SIZE, Block, ToyAttention, ToyViT, images, sharpen, toy

from collapse_probe.analysis.analyze import analyze
from collapse_probe.capture.capture import discover_plan, record
from collapse_probe.metrics.functional.geometry import own_and_other_cosines
from collapse_probe.metrics.functional.phases import (
    contiguous_phases,
    max_cut_phases,
    phases_beyond_drift,
    steady_drift,
)
from collapse_probe.metrics.metric import make
from collapse_probe.metrics.token_metric import block_ends
from collapse_probe.metrics.tokens.angular_distance import angles, least_windows
from collapse_probe.metrics.tokens.residual_contribution import contributions
from collapse_probe.report.findings.beside import boundary_tables, window_tables
from collapse_probe.report.findings.figures import draw_all
from collapse_probe.report.findings.page import render
from collapse_probe.report.heatmaps import PHASES
from collapse_probe.results.readings import phase_starts


def measured(model, *names, count=3, size=SIZE):
    """Results by name, and the trace of the same images."""
    plan = discover_plan(model, size)
    pictures = images(count, size=size)
    with torch.no_grad(), record(model, plan, values=True, middles=True) as recording:
        model(pictures)
    trace = recording.last
    results = {}
    for name in names:
        metric = make(name, plan)
        assert not metric.inapplicable(), metric.inapplicable()
        accumulators = [build() for _, build in metric.accumulators()]
        for accumulator in accumulators:
            accumulator.start_batch(trace, [f"image {i}" for i in range(count)])
        records = [{k: v.cpu().numpy() for k, v in accumulator.end_batch(trace).items()} for accumulator in accumulators]
        results[name] = metric.compute(accumulators, records)
    return results, trace


def cosine(x, y):
    return float(np.dot(x, y) / np.linalg.norm(x) / np.linalg.norm(y))


def slow_influence(x, y):
    """1 − cosine of the same and of different tokens, token by token, of one image."""
    same = np.mean([1 - cosine(a, b) for a, b in zip(x, y, strict=True)])
    other = [1 - cosine(a, b) for i, a in enumerate(x) for j, b in enumerate(y) if i != j]
    return same, np.mean(other)


def test_influence_and_its_chance_level_are_those_of_a_loop_over_tokens():
    results, trace = measured(toy(depth=3), "block-influence", "block-influence@attention", "block-influence@mlp")
    tokens = [x.double().numpy() for x in trace.tokens]
    middles = [x.double().numpy() for x in trace.middles]
    for name, before, behind in (
        ("block-influence", tokens[:-1], tokens[1:]),
        ("block-influence@attention", tokens[:-1], middles),
        ("block-influence@mlp", middles, tokens[1:]),
    ):
        for block in range(3):
            expected = [slow_influence(x, y) for x, y in zip(before[block], behind[block], strict=True)]
            same, other = np.mean(expected, 0)
            assert results[name].values[block] == pytest.approx(same, abs=1e-9)
            assert results[name].nulls.values["other_token"][block] == pytest.approx(other, abs=1e-9)
            assert results[name].nulls.values["kappa"][block] == pytest.approx(1 - same / other, abs=1e-9)


def test_influence_over_patches_is_what_feature_similarity_lacks_to_one():
    model = toy(depth=3)
    results, _ = measured(model, "block-influence@patches", "feature-similarity")
    beside = np.diagonal(results["feature-similarity"].values, 1)
    np.testing.assert_allclose(results["block-influence@patches"].values, 1 - beside, atol=1e-6)


def test_influence_of_the_class_token_has_no_other_token_to_confuse_it_with():
    results, trace = measured(toy(), "block-influence@cls")
    result = results["block-influence@cls"]
    before, behind = (trace.tokens[depth][:, 0].double().numpy() for depth in (0, 1))
    expected = [1 - cosine(x, y) for x, y in zip(before, behind, strict=True)]
    assert result.values[0] == pytest.approx(np.mean(expected), abs=1e-9)
    assert result.nulls.values["other_token"] is None
    assert "one such token" in result.nulls.reasons["other_token"]
    assert "one such token" in result.nulls.reasons["kappa"]


def test_a_block_whose_branches_are_scaled_to_zero_has_no_influence_at_all():
    model = sharpen(timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, depth=2, init_values=0.5))
    with torch.no_grad():
        model.blocks[1].ls1.gamma.zero_()
        model.blocks[1].ls2.gamma.zero_()
    names = ("block-influence", "block-influence@mlp", "angular-distance", "residual-contribution", "residual-contribution@mlp")
    results, _ = measured(model, *names, size=(32, 32))
    assert results["block-influence"].values[1] == 0.0
    assert results["block-influence@mlp"].values[1] == 0.0
    assert results["angular-distance"].values[1, 2] == pytest.approx(0.0, abs=1e-7)
    assert results["residual-contribution"].values[1] == 0.0
    assert results["residual-contribution@mlp"].values[1] == 0.0
    assert results["block-influence"].values[0] > 0.01


def test_tokens_of_length_zero_are_left_out():
    x = torch.tensor([[[1.0, 0.0], [0.0, 0.0], [0.0, 1.0]]], dtype=torch.float64)
    y = torch.tensor([[[0.0, 1.0], [1.0, 0.0], [0.0, 1.0]]], dtype=torch.float64)
    found = own_and_other_cosines(x, y)
    assert found["same"].item() == pytest.approx(0.5)  # of the first and the last token
    assert found["other"].item() == pytest.approx((1 + 0 + 1 + 0) / 4)  # of the first with two others, of the last with two
    assert math.isnan(own_and_other_cosines(torch.zeros(1, 2, 2).double(), y[:, :2])["same"].item())


def test_angles_are_those_of_a_loop_and_obey_the_triangle():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4, 6, 5, generator=generator, dtype=torch.float64)
    found = angles(x).numpy()
    for a in range(4):
        for b in range(4):
            each = [math.acos(np.clip(cosine(x[a, t].numpy(), x[b, t].numpy()), -1, 1)) / math.pi for t in range(6)]
            assert found[a, b] == pytest.approx(np.mean(each) if a != b else 0.0, abs=1e-9)
    shifted = angles(x, 3).numpy()
    each = [math.acos(cosine(x[1, t].numpy(), x[2, (t + 3) % 6].numpy())) / math.pi for t in range(6)]
    assert shifted[1, 2] == pytest.approx(np.mean(each), abs=1e-9)
    assert np.array_equal(np.diagonal(found), np.zeros(4))
    np.testing.assert_allclose(found, found.T, atol=1e-12)
    for a, b, c in ((0, 1, 2), (3, 0, 2), (1, 3, 0)):
        assert found[a, c] <= found[a, b] + found[b, c] + 1e-12


def test_the_least_window_is_the_least_of_all_and_crosses_no_gap():
    distance = np.array([[0, 0.5, 0.6, 0.9], [0.5, 0, 0.1, 0.4], [0.6, 0.1, 0, 0.3], [0.9, 0.4, 0.3, 0]])
    ci95 = np.stack([distance, distance], -1)
    found = least_windows(distance, ci95, (True, True, True))
    assert [(each["blocks"], each["first"], each["distance"]) for each in found] == [(1, 1, 0.1), (2, 1, 0.4), (3, 0, 0.9)]
    across = least_windows(distance, ci95, (True, False, True))
    assert [(each["blocks"], each["first"]) for each in across] == [(1, 2)]


def test_contributions_of_branches_follow_from_the_stream():
    results, trace = measured(toy(depth=2), "residual-contribution", "residual-contribution@mlp@cosine")
    x, middle, y = (t.double() for t in (trace.tokens[1], trace.middles[1], trace.tokens[2]))
    ratio = ((middle - x).norm(dim=-1) / x.norm(dim=-1)).mean()
    assert results["residual-contribution"].values[1] == pytest.approx(float(ratio), abs=1e-9)
    turned = torch.cosine_similarity(y - middle, middle, dim=-1).mean()
    assert results["residual-contribution@mlp@cosine"].values[1] == pytest.approx(float(turned), abs=1e-9)
    scaled = contributions(7 * x, 7 * middle)
    assert float(scaled["ratio"].mean()) == pytest.approx(float(ratio), abs=1e-12)


class Parallel(Block):
    def forward(self, x):
        return x + self.attn(self.norm1(x)) + self.mlp(self.norm2(x))


def test_branches_that_are_added_at_once_are_said_to_be_so():
    model = ToyViT([Parallel(ToyAttention()) for _ in range(2)])
    findings = analyze(model, images(2), metrics=("block-influence", "block-influence@attention"), gallery_images=0)
    assert findings.metrics["block-influence"].values is not None
    assert "added at once" in findings.metrics["block-influence@attention"].not_applicable


# ---- phases of depth ----


def blocks_of(*sizes):
    """Distances 1 between groups of these sizes, 0 inside."""
    labels = np.repeat(np.arange(len(sizes)), sizes)
    return (labels[:, None] != labels[None, :]).astype(np.float64)


@pytest.mark.parametrize("sizes", [(4, 4, 4), (6, 6), (2, 5, 5), (3, 3, 3, 3), (8, 4)])
def test_groups_of_blocks_are_found_again(sizes):
    starts = [0, *np.cumsum(sizes)[:-1].tolist()]
    assert phases_beyond_drift(blocks_of(*sizes), 0.05)[0] == starts


def test_equal_states_and_a_steady_drift_are_one_phase():
    places = np.arange(12.0)
    for distance in (np.zeros((12, 12)), np.abs(places[:, None] - places), 1 - np.exp(-np.abs(places[:, None] - places) / 4)):
        assert phases_beyond_drift(distance, 0.05)[0] == [0]
        np.testing.assert_allclose(steady_drift(distance), distance)


def slow_phases(distance, count, shortest):
    """Every way to cut a chain, tried."""
    size, best = len(distance), (math.inf, [])
    for cuts in itertools.combinations(range(1, size), count - 1):
        starts = [0, *cuts]
        parts = list(zip(starts, [*cuts, size], strict=True))
        if min(b - a for a, b in parts) >= shortest:
            inside = sum(distance[i, j] for a, b in parts for i in range(a, b) for j in range(i + 1, b))
            best = min(best, (inside, starts))
    return best


def test_the_dynamic_programme_finds_the_best_of_all_cuts():
    generator = np.random.default_rng(0)
    states = generator.normal(size=(9, 3)).cumsum(0)
    distance = np.linalg.norm(states[:, None] - states[None], axis=-1)
    shares, starts = contiguous_phases(distance)
    for count in range(1, 5):
        inside, best = slow_phases(distance, count, 2)
        assert shares[count - 1] == pytest.approx(inside / np.triu(distance).sum())
        assert starts[count - 1] == best


def test_the_published_cut_is_the_heaviest_of_all_and_may_leave_one_phase():
    generator = np.random.default_rng(1)
    states = generator.normal(size=(7, 3))
    distance = np.linalg.norm(states[:, None] - states[None], axis=-1)

    def weight(side):
        return sum(distance[i, j] for i in range(7) for j in range(i) if side[i] != side[j])

    best = max(weight([0, *((n >> k) & 1 for k in range(6))]) for n in range(64))
    groups = max_cut_phases(distance, 0.999 * best / np.triu(distance).sum())
    assert len(groups) == 2
    assert weight([i in groups[1] for i in range(7)]) == pytest.approx(best)
    assert max_cut_phases(distance, 1.0) == [list(range(7))]
    assert max_cut_phases(blocks_of(3, 5, 4), 0.09) == [[0, 1, 2], [3, 4, 5, 6, 7], [8, 9, 10, 11]]
    with pytest.raises(ValueError, match="up to 16"):
        max_cut_phases(np.zeros((17, 17)), 0.2)


def test_a_model_of_one_tied_block_is_one_phase_and_a_planted_turn_is_a_boundary():
    tied = toy(depth=8)
    for number in range(1, 8):
        tied.blocks[number] = tied.blocks[0]
    with torch.no_grad():
        for parameter in tied.blocks[0].mlp[-1].parameters():
            parameter.mul_(0.1)
        tied.blocks[0].attn.out.weight.mul_(0.1)
    result = analyze(tied, images(4), metrics=("depth-phases",), gallery_images=0).metrics["depth-phases"]
    assert result.details["phases"] == 1
    assert result.details["boundaries"] == []
    turned = toy(depth=8)
    with torch.no_grad():
        for block in (*turned.blocks[:4], *turned.blocks[5:]):
            block.attn.out.weight.mul_(0.01)
            block.mlp[-1].weight.mul_(0.01)
            block.mlp[-1].bias.mul_(0.01)
            block.attn.out.bias.mul_(0.01)
    result = analyze(turned, images(4), metrics=("depth-phases",), gallery_images=0).metrics["depth-phases"]
    assert result.values.tolist() == [0, 0, 0, 0, 1, 1, 1, 1]
    assert [each["first"] for each in result.details["boundaries"]] == [4]
    assert result.details["boundaries"][0]["ci95"] == [4, 4]
    assert result.details["shuffled"]["mean"] < 3


def test_distances_are_over_the_class_token_and_the_mean_patch():
    results, trace = measured(toy(depth=4), "depth-phases")
    distance = results["depth-phases"].details["distance"]
    expected = []
    for image in range(3):
        a, b = (trace.tokens[depth][image].double().numpy() for depth in (1, 3))
        expected.append(1 - (cosine(a[0], b[0]) + cosine(a[1:].mean(0), b[1:].mean(0))) / 2)
    assert distance[0, 2] == pytest.approx(np.mean(expected), abs=1e-9)
    np.testing.assert_allclose(distance, distance.T, atol=1e-12)


def test_a_model_too_short_or_too_long_says_so():
    short = analyze(toy(depth=2), images(2), metrics=("depth-phases",), gallery_images=0).metrics["depth-phases"]
    assert "two phases take 4" in short.not_applicable
    plan = discover_plan(ToyViT([Block(ToyAttention()) for _ in range(17)]), SIZE)
    assert "2^16 cuts" in make("depth-phases@max-cut", plan).inapplicable()
    assert not make("depth-phases", plan).inapplicable()


# ---- the released code, on the same states ----

STATES = [[[0.3, -1.2, 0.8], [1.5, 0.2, -0.7]], [[0.1, -0.9, 1.1], [1.2, 0.9, -0.2]], [[-0.4, -0.2, 1.6], [0.2, 1.4, 0.5]]]
"""Three layers of two tokens."""
SHORT_GPT = [0.1058144107, 0.2902700399]
"""1 − cos of each two layers: mean of `block_influence(layer, next)` of sramshetty/ShortGPT 78d9615, short_gpt/metrics.py, on
STATES in float64."""
PRUNE_ME = {1: [0.1426893090, 0.2459207566], 2: [0.3884145854]}
"""`compute_block_distances(STATES, n)` of arcee-ai/PruneMe faee6c9, compute_block_similarity/utils.py, in float64."""


def test_influence_is_that_of_the_released_code():
    x = torch.tensor(STATES, dtype=torch.float64)
    found = [float(1 - own_and_other_cosines(a[None], b[None])["same"]) for a, b in itertools.pairwise(x)]
    np.testing.assert_allclose(found, SHORT_GPT, atol=1e-9)


def test_angles_are_those_of_the_released_code():
    found = angles(torch.tensor(STATES, dtype=torch.float64))
    for n, expected in PRUNE_ME.items():
        np.testing.assert_allclose(found.diagonal(n), expected, atol=1e-9)


def test_the_boundaries_of_phases_are_drawn_in_every_square_matrix():
    turned = toy(depth=8)
    with torch.no_grad():
        for block in (*turned.blocks[:4], *turned.blocks[5:]):
            for part in (block.attn.out, block.mlp[-1]):
                for parameter in part.parameters():
                    parameter.mul_(0.01)
    names = ("depth-phases", "attention-similarity", "feature-similarity", "angular-distance", "attention-entropy")
    findings = analyze(turned, images(4), metrics=names, gallery_images=0)
    assert phase_starts(findings) == (4,)
    drawn = {name: figure.content().decode() for name, figure in draw_all(findings).items()}
    for name in ("attention-similarity", "feature-similarity", "angular-distance"):
        assert "stroke-dasharray=" in drawn[name], name
        assert PHASES in drawn[name], name
    assert PHASES not in drawn["attention-entropy"]
    page = render(findings, draw_all(findings))
    assert "Into how many phases the blocks fall" in page
    assert "phase 0" in page


def test_tables_name_the_least_window_and_the_boundaries():
    findings = analyze(toy(depth=6), images(4), metrics=("depth-phases", "angular-distance"), gallery_images=0)
    (windows,) = window_tables(findings)
    first = findings.metrics["angular-distance"].details["windows"][0]
    assert windows.rows[0][:3] == ("1", f"block {first['first']}", f"{first['distance']:.3f}")
    (boundaries,) = boundary_tables(findings)
    count = findings.metrics["depth-phases"].details["phases"]
    assert len(boundaries.rows) == max(count - 1, 1)
    assert "in random order" in boundaries.notes[0]


def test_a_block_that_is_fed_by_no_block_before_it_is_not_measured_from_there():
    _, trace = measured(toy(depth=2))
    apart = replace(trace, plan=replace(trace.plan, adjacent=(False,)))
    assert block_ends(trace, 1, "block", "all") is not None
    assert block_ends(apart, 0, "block", "all") is not None
    assert block_ends(apart, 1, "block", "all") is None
    assert block_ends(apart, 1, "attention", "patches") is None
