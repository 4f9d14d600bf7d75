"""The token metrics against slow NumPy in float64, worked values, and inputs at the edge of what they are defined for."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import reference
import torch
from factories import random_maps, readings, small_vit, trace_of

from collapse_probe.capture.capture import discover_plan, record
from collapse_probe.errors import SettingError
from collapse_probe.metrics.metric import make
from collapse_probe.metrics.tokens.cross_patch_similarity import cross_patch_cosine
from collapse_probe.metrics.tokens.dirichlet_energy import dirichlet_energy
from collapse_probe.metrics.tokens.rank_residual import rank_residual
from collapse_probe.metrics.tokens.token_frequency import frequency_ratio
from collapse_probe.metrics.tokens.token_rank import token_ranks
from collapse_probe.outliers import outliers, robust_threshold
from collapse_probe.registry import METRICS

DEPTHS, B, N, D = 4, 5, 10, 8  # a prefix token and a grid of 3 × 3
ONE_NUMBER = [
    "token-rank",
    "token-rank@stable",
    "token-rank@centred",
    "token-rank@stable@centred",
    "token-rank@all",
    "rank-residual",
    "rank-residual@composite",
    "rank-residual@all",
    "token-frequency",
    "token-frequency@total",
    "token-frequency@all",
    "token-norm",
    "token-norm@outliers",
    "token-norm@150",
    "dirichlet-energy",
    "dirichlet-energy@complete",
    "dirichlet-energy@raw",
    "dirichlet-energy@all",
]
EVERY = [*ONE_NUMBER, "cross-patch-similarity", "cross-patch-similarity@all", "layer-cka", "layer-cka@all"]

b, t, c = np.ogrid[:2, :6, :5]
E1 = np.sin(1 + 0.7 * b + 1.3 * t + 0.9 * c + 0.5 * t * c)
E2 = np.cos(0.3 + 0.4 * b + 0.8 * t + 1.1 * c + 0.2 * t * c)


def tokens_of(images=B, seed=0):
    rng = np.random.default_rng(seed)
    tokens = rng.normal(size=(images, DEPTHS, N, D)) + rng.normal(size=D)
    tokens[:, 2, 5] *= 60  # one patch that is far longer than the others
    return tokens


def trace_with(tokens):
    images, depths, n, _ = tokens.shape
    return trace_of(random_maps((images, depths - 1, 2, n, n)), tokens, prefix=(0,))


def entropy_rank(x):
    values = np.linalg.svd(x, compute_uv=False)
    share = values / values.sum()
    return float(np.exp(-sum(p * np.log(p) for p in share if p > 0)))


def stable(x):
    return float((x**2).sum() / np.linalg.svd(x, compute_uv=False)[0] ** 2)


def centred(x):
    return x - x.mean(0)


def composite(x):
    return np.sqrt(np.abs(x).sum(0).max() * np.abs(x).sum(1).max())


def on_grid(x, sides=(3, 3), relative=True):
    total, size = 0.0, 0.0
    for (r, c), (s, d) in itertools.permutations(itertools.product(range(sides[0]), range(sides[1])), 2):
        if abs(r - s) + abs(c - d) == 1:
            one, other = x[r * sides[1] + c], x[s * sides[1] + d]
            total += ((one - other) ** 2).sum() / 2
            size += (one**2).sum()
    return total / size if relative else 2 * total / len(x)


def everywhere(x):
    pairs = list(itertools.combinations(range(len(x)), 2))
    return sum(((x[i] - x[j]) ** 2).sum() for i, j in pairs) / sum((x[i] ** 2).sum() + (x[j] ** 2).sum() for i, j in pairs)


def share_above(x, limit=None):
    norms = np.sqrt((x**2).sum(1))
    median = np.median(norms)
    limit = median + 6 * np.median(np.abs(norms - median)) if limit is None else limit
    return float(np.mean(norms > limit))


SLOW = {
    "token-rank": entropy_rank,
    "token-rank@stable": stable,
    "token-rank@centred": lambda x: entropy_rank(centred(x)),
    "token-rank@stable@centred": lambda x: stable(centred(x)),
    "token-rank@all": entropy_rank,
    "rank-residual": lambda x: np.linalg.norm(centred(x)) / np.linalg.norm(x),
    "rank-residual@composite": lambda x: composite(centred(x)) / composite(x),
    "rank-residual@all": lambda x: np.linalg.norm(centred(x)) / np.linalg.norm(x),
    "token-frequency": lambda x: np.linalg.norm(centred(x)) / np.linalg.norm(np.tile(x.mean(0), (len(x), 1))),
    "token-frequency@total": lambda x: np.linalg.norm(centred(x)) / np.linalg.norm(x),
    "token-frequency@all": lambda x: np.linalg.norm(centred(x)) / np.linalg.norm(np.tile(x.mean(0), (len(x), 1))),
    "token-norm": lambda x: np.mean([np.linalg.norm(row) for row in x]),
    "token-norm@outliers": share_above,
    "token-norm@150": lambda x: share_above(x, 150),
    "dirichlet-energy": on_grid,
    "dirichlet-energy@complete": everywhere,
    "dirichlet-energy@raw": lambda x: on_grid(x, relative=False),
    "dirichlet-energy@all": everywhere,
}


def test_every_variant_of_a_metric_with_one_number_is_here():
    assert set(SLOW) == set(ONE_NUMBER)
    for base in {name.split("@")[0] for name in EVERY}:
        asked = {suffix for name in EVERY if name.split("@")[0] == base for suffix in name.split("@")[1:]}
        assert asked == set(METRICS[base].variants)


@pytest.mark.parametrize("name", ONE_NUMBER)
def test_curves_against_the_slow_way(name):
    tokens = tokens_of().astype(np.float32).astype(np.float64)
    found = readings([trace_with(tokens)], [name])[name]
    kept = tokens if "all" in name.split("@") else tokens[:, :, 1:]
    slow = np.array([[SLOW[name](x) for x in image] for image in kept])
    assert found.dims == ("depth",)
    assert found.values == pytest.approx(slow.mean(0), rel=1e-6)
    assert found.stderr == pytest.approx(slow.std(0, ddof=1) / np.sqrt(B), rel=1e-5, abs=1e-9)
    assert (found.ci95[:, 0] <= found.values).all()
    assert (found.values <= found.ci95[:, 1]).all()


@pytest.mark.parametrize("first", [0, 1])
def test_cross_patch_similarity_against_the_slow_way(first):
    tokens = tokens_of(images=3)
    name = "cross-patch-similarity" + ("" if first else "@all")
    found = readings([trace_with(tokens)], [name])[name]
    slow = np.zeros((3, DEPTHS, DEPTHS))
    for image, p, q in itertools.product(range(3), range(DEPTHS), range(DEPTHS)):
        one, other = tokens[image, p, first:], tokens[image, q, first:]
        cosines = [abs(x @ y) / np.linalg.norm(x) / np.linalg.norm(y) for x in one for y in other]
        slow[image, p, q] = np.mean(cosines)
    assert found.values == pytest.approx(slow.mean(0), abs=1e-6)
    assert found.stderr == pytest.approx(slow.std(0, ddof=1) / np.sqrt(3), abs=1e-6)


def test_cross_patch_similarity_leaves_out_other_widths_and_missing_depths():
    tokens = tokens_of(images=2)
    trace = trace_with(tokens)
    wider = torch.cat([trace.tokens[1]] * 2, dim=2)
    trace = type(trace)(trace.plan, 2, (trace.tokens[0], wider, None, trace.tokens[3]), trace.attention, None)
    found = readings([trace], ["cross-patch-similarity"])["cross-patch-similarity"].values
    assert np.isfinite(found).tolist() == [
        [True, False, False, True],
        [False, True, False, False],
        [False, False, False, False],
        [True, False, False, True],
    ]


def test_rank_residual_worked_values():
    e1 = torch.as_tensor(E1)
    assert rank_residual(e1).mean().item() == pytest.approx(0.9868708507, abs=1e-9)
    assert rank_residual(e1, composite=True).mean().item() == pytest.approx(0.9643536048, abs=1e-9)


def test_token_frequency_worked_value():
    assert frequency_ratio(torch.as_tensor(E1)).mean().item() == pytest.approx(6.2664853660, abs=1e-9)


def test_token_rank_worked_values():
    found = token_ranks(torch.as_tensor(E1))
    assert found["effective"].mean().item() == pytest.approx(4.1567666746, abs=1e-9)
    assert found["stable"].mean().item() == pytest.approx(2.6333258117, abs=1e-9)


def test_cross_patch_worked_values():
    one, other = torch.as_tensor(E1)[:, 1:], torch.as_tensor(E2)[:, 1:]
    assert cross_patch_cosine(one, other).mean().item() == pytest.approx(0.4087667691, abs=1e-9)
    assert cross_patch_cosine(one, one).mean().item() == pytest.approx(0.4864557384, abs=1e-9)  # with the diagonal


def test_the_total_frequency_is_the_frobenius_residual_and_fixes_the_ratio():
    x = torch.as_tensor(E1)
    total = frequency_ratio(x, total=True)
    assert total.tolist() == pytest.approx(rank_residual(x).tolist(), abs=1e-12)
    assert frequency_ratio(x).tolist() == pytest.approx((total / (1 - total**2).sqrt()).tolist(), abs=1e-9)


def test_a_checkerboard_has_the_largest_dirichlet_energy_and_equal_patches_none():
    signs = torch.tensor([1.0, -1, 1, -1, 1, -1, 1, -1, 1]).double()
    assert dirichlet_energy(signs[None, :, None] * torch.ones(4).double(), (3, 3)).item() == pytest.approx(2)
    assert dirichlet_energy(torch.ones(1, 9, 4).double(), (3, 3)).item() == 0
    assert dirichlet_energy(torch.ones(1, 9, 4).double()).item() == 0
    rows = torch.arange(3.0).double().repeat_interleave(5)[None, :, None]  # 3 × 5: equal along rows
    assert dirichlet_energy(rows, (3, 5)).item() == pytest.approx(on_grid(rows[0].numpy(), (3, 5)))


def test_outliers_are_found_where_they_sit_and_equal_norms_have_none():
    tokens = tokens_of()
    found = readings([trace_with(tokens)], ["token-norm@outliers", "token-norm"])
    where = np.asarray(found["token-norm@outliers"].details["outlier_map"])
    assert where.shape == (DEPTHS, 3, 3)
    assert where[2, 1, 1] == 1  # token 5 is patch 4
    assert where[2].sum() * B / (9 * B) == pytest.approx(found["token-norm@outliers"].values[2])
    assert found["token-norm"].details["outlier_map"].tolist() == where.tolist()
    assert not outliers(torch.full((2, 7), 3.0) + 1e-6 * torch.rand(2, 7)).any()
    assert not outliers(torch.zeros(2, 7)).any()
    assert robust_threshold(torch.tensor([[1.0, 2, 3, 90]]), 6.0).item() == 8.5


def test_the_share_of_outliers_has_an_interval_and_their_map_a_reason():
    found = readings([trace_with(tokens_of()[:2]), trace_with(tokens_of()[2:])], ["token-norm", "token-norm@outliers"])
    plain, share = found["token-norm"], found["token-norm@outliers"]
    assert plain.details["outlier_share"] == pytest.approx(share.values)
    assert plain.details["outlier_share_ci95"] == pytest.approx(share.ci95)
    rows = [[share_above(image[depth, 1:]) for depth in range(DEPTHS)] for image in tokens_of()]
    expected = np.array([reference.interval_ends(each) for each in np.transpose(rows)])
    assert (expected[:, 0] < expected[:, 1]).any()
    assert plain.details["outlier_share_ci95"] == pytest.approx(expected, abs=1e-6)
    assert plain.details["intervals"].startswith("outlier_map has none: ")


def test_impossible_deviations_are_refused():
    plan = trace_with(tokens_of()).plan
    with pytest.raises(SettingError, match="above 0, not 0"):
        METRICS["token-norm"](plan, deviations=0)


def test_a_plan_without_a_grid_has_no_grid_energy_and_no_outlier_map():
    trace = trace_of(random_maps((2, 1, 1, 8, 8)), np.random.default_rng(0).normal(size=(2, 2, 8, 4)))
    assert "form no rectangle" in make("dirichlet-energy", trace.plan).inapplicable()
    assert make("dirichlet-energy@complete", trace.plan).inapplicable() == ""
    assert readings([trace], ["token-norm"])["token-norm"].details["outlier_map"] is None


@pytest.mark.parametrize("name", EVERY)
def test_batches_of_1_7_and_64_find_the_same(name):
    tokens = tokens_of(images=70)
    whole = readings([trace_with(tokens)], [name])[name]
    for size in (1, 7, 64):
        parts = [trace_with(tokens[i : i + size]) for i in range(0, 70, size)]
        found = readings(parts, [name])[name]
        for one, other in ((whole.values, found.values), (whole.stderr, found.stderr), (whole.ci95, found.ci95)):
            assert other == pytest.approx(one, rel=1e-6, abs=1e-9, nan_ok=True)


@pytest.mark.parametrize("name", [name for name in EVERY if not name.startswith("layer-cka")])
def test_order_of_images_does_not_matter(name):
    tokens = tokens_of(images=6)
    order = [3, 0, 5, 1, 4, 2]
    one, other = (readings([trace_with(x)], [name])[name] for x in (tokens, tokens[order]))
    assert other.values == pytest.approx(one.values, rel=1e-9)
    assert other.stderr == pytest.approx(one.stderr, rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("name", EVERY)
def test_zero_tokens_give_no_nonsense(name):
    found = readings([trace_with(np.zeros((5, DEPTHS, N, D)))], [name])[name].values
    assert not np.isinf(found).any()
    assert np.isnan(found).all() or (found == 0).all()


@pytest.mark.parametrize("name", EVERY)
def test_one_patch_is_measured_or_undefined(name):
    tokens = np.random.default_rng(0).normal(size=(5, DEPTHS, 2, D))
    trace = trace_with(tokens)
    if make(name, trace.plan).inapplicable():
        assert name in ("dirichlet-energy", "dirichlet-energy@raw")
        return
    assert not np.isinf(readings([trace], [name])[name].values).any()


@pytest.mark.parametrize("name", EVERY)
def test_equal_tokens_read_at_the_sick_end(name):
    rng = np.random.default_rng(0)
    tokens = np.tile(rng.normal(size=(6, 1, 1, D)), (1, DEPTHS, N, 1))
    found = readings([trace_with(tokens)], [name])[name]
    if found.collapsed == "high":
        assert found.values == pytest.approx(1, abs=1e-6)
    elif found.collapsed == "low" and "centred" not in name:
        assert found.values == pytest.approx(1 if name.startswith("token-rank") else 0, abs=1e-4)
    elif found.collapsed == "low":
        assert np.isnan(found.values).all()


@pytest.mark.parametrize("name", EVERY)
def test_the_state_does_not_grow_with_the_images(name, monkeypatch):
    monkeypatch.setattr("collapse_probe.metrics.tokens.layer_cka.sample_size", lambda length: 32)

    def held(images):
        metric = make(name, trace_with(tokens_of(images=1)).plan)
        folds = [build() for _, build in metric.accumulators()]
        for fold in folds:
            trace = trace_with(tokens_of(images=images))
            fold.start_batch(trace, [f"image {i}" for i in range(images)])
            fold.end_batch(trace)
        return sum(v.numel() for fold in folds for v in fold.state_dict().values())

    assert held(40) == held(200)


@pytest.mark.parametrize("name", EVERY)
def test_a_bfloat16_model_is_measured_in_wide_sums(name):
    model = small_vit(num_heads=2, embed_dim=16, depth=2).to(torch.bfloat16)
    plan = discover_plan(model, (64, 64))
    with record(model, plan) as recording, torch.no_grad():
        model(torch.randn(6, 3, 64, 64, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16))
    found = readings([recording.last], [name])[name].values
    assert found.dtype == np.float64
    if name == "layer-cka":
        assert np.diag(found) == pytest.approx(1)
    assert np.isfinite(found).all()


def test_depths_of_other_sizes_are_measured_each_for_itself():
    trace = trace_with(tokens_of(images=3))
    trace = type(trace)(trace.plan, 3, (*trace.tokens[:3], None), trace.attention, None)
    for name in ONE_NUMBER:
        assert np.isfinite(readings([trace], [name])[name].values).tolist() == [True, True, True, False], name
