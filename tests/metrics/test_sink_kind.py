"""What a head's sinks do: hand-made heads with known answers, a slow reference, and the authors' own seven numbers."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from toy_models import HEADS, SIZE, Block, Matmul, OneKey, ToyAttention, ToyViT, heads_of, images, sharpen, toy

from collapse_probe.analysis.analyze import analyze
from collapse_probe.capture.capture import discover_plan, record
from collapse_probe.capture.weights.recording import read_matrices
from collapse_probe.metrics.attention.sink_kind import sinks_of
from collapse_probe.metrics.metric import make
from collapse_probe.report.findings.beside import sink_tables
from collapse_probe.report.findings.figures import draw_all
from collapse_probe.report.findings.page import render
from collapse_probe.results.verdict import with_verdict

N, K = 12, 4


def kinds_of(maps, values):
    sinks = sinks_of(maps[None, None].double(), values[None, None].double())
    return {name: bool(held[0, 0]) for name, held in sinks.kinds().items()}, sinks


def routed_to(key, mass=1.0):
    maps = torch.full((N, N), (1 - mass) / (N - 1), dtype=torch.float64)
    maps[:, key] = mass
    return maps


def values_with(key, length):
    values = torch.randn(N, K, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    values = F.normalize(values, dim=-1)
    values[key] *= length
    return values


def test_a_sink_on_a_value_of_zero_does_nothing_and_has_no_rank():
    kinds, sinks = kinds_of(routed_to(3), values_with(3, 0.0))
    assert kinds == {"sink": True, "no_op": True, "broadcast": False, "other": False}
    assert sinks.ratio.item() == 0.0
    assert torch.isnan(sinks.stable_rank).all()
    assert sinks.key.item() == 3
    assert sinks.least.item() == 1.0


def test_a_head_that_copies_one_value_to_all_broadcasts_it():
    kinds, sinks = kinds_of(routed_to(5), values_with(5, 3.0))
    assert kinds == {"sink": True, "no_op": False, "broadcast": True, "other": False}
    assert sinks.stable_rank.item() == pytest.approx(1.0)
    assert sinks.ratio.item() == pytest.approx(3.0)


def test_attention_of_every_token_to_itself_is_no_sink():
    kinds, sinks = kinds_of(torch.eye(N), values_with(0, 5.0))
    assert not any(kinds.values())
    assert sinks.routed.item() == pytest.approx(1 / N)


def test_a_sink_between_the_thresholds_is_neither():
    kinds, _ = kinds_of(routed_to(2), values_with(2, 0.35))
    assert kinds == {"sink": True, "no_op": False, "broadcast": False, "other": True}


def test_a_broadcast_must_be_of_one_direction():
    maps = routed_to(2, 0.5)
    maps[:, :] = 0.5 * torch.eye(N)
    maps[:, 2] += 0.5
    values = values_with(2, 1.0) * 1.0
    values[:, :] = torch.eye(N, K).double().roll(0, 0) * 4
    values[2] = 0.6 * 4 / 3 * torch.tensor([1.0, 0, 0, 0])
    kinds, sinks = kinds_of(maps, values)
    assert kinds["sink"]
    assert sinks.stable_rank.item() > 1.5
    assert kinds["other"]


def test_lengths_do_not_depend_on_the_scale_of_the_values():
    maps, values = routed_to(4, 0.7), values_with(4, 0.8)
    first, second = (kinds_of(maps, factor * values)[1] for factor in (1.0, 50.0))
    assert first.ratio.item() == pytest.approx(second.ratio.item())
    assert first.stable_rank.item() == pytest.approx(second.stable_rank.item())


def slow_sinks(maps, values):
    """Of one map and its values, with loops and a singular value decomposition."""
    received = [np.mean([maps[i, j] for i in range(len(maps))]) for j in range(maps.shape[1])]
    s = int(np.argmax(received))
    lengths = [np.linalg.norm(v) for v in values]
    sigma = np.linalg.svd(maps @ values, compute_uv=False)
    return {
        "key": s,
        "mass": received[s],
        "routed": np.mean([row[s] >= 0.5 for row in maps]),
        "least": min(row[s] for row in maps),
        "ratio": lengths[s] / np.mean([v for j, v in enumerate(lengths) if j != s]),
        "stable_rank": (sigma**2).sum() / sigma[0] ** 2,
    }


def test_every_number_is_that_of_a_slow_reference():
    generator = torch.Generator().manual_seed(1)
    maps = torch.softmax(3 * torch.randn(2, 3, N, N, generator=generator, dtype=torch.float64), -1)
    values = torch.randn(2, 3, N, K, generator=generator, dtype=torch.float64)
    sinks = sinks_of(maps, values, of_all=True)
    for b in range(2):
        for h in range(3):
            for name, expected in slow_sinks(maps[b, h].numpy(), values[b, h].numpy()).items():
                assert float(getattr(sinks, name)[b, h]) == pytest.approx(float(expected), abs=1e-9)


# ---- the metric, on models ----


class Sinking(ToyAttention):
    """Every query of every head attends to patch 2 of its image; heads 0 and 1 have no value there."""

    def mix(self, q, k, v):
        v = v.clone()
        v[:, :2, 3] = 0.0
        bias = torch.zeros(q.shape[2], k.shape[2])
        bias[:, 3] = 40.0
        return F.scaled_dot_product_attention(q * 0, k, v, attn_mask=bias)


def sinking(depth=2):
    return ToyViT([Block(Sinking()) for _ in range(depth)])


NAMES = ("sink-kind", "sink-kind@no-op", "sink-kind@broadcast", "sink-kind@other")


def test_sinks_are_counted_by_kind_and_by_the_token_they_sit_on():
    findings = analyze(sinking(), images(5), metrics=NAMES, gallery_images=0)
    sink, no_op, broadcast, other = (findings.metrics[name] for name in NAMES)
    assert sink.values.tolist() == [[1.0] * HEADS] * 2
    assert no_op.values.tolist() == [[1.0, 1.0, 0.0, 0.0]] * 2
    np.testing.assert_allclose(no_op.values + broadcast.values + other.values, sink.values)
    details = sink.details
    assert details["per_image"]["no_op"] == 4.0
    assert sum(details["per_image"].values()) == 2.0 * HEADS
    assert set(details["by_class"]["no_op"]) == {"patch"}
    assert details["by_rule"]["ε = 0.1"] == details["by_rule"]["90% of the queries"]
    assert details["by_ratio"]["no_op"] == {"0.1": 4.0, "0.2": 4.0, "0.3": 4.0}
    assert no_op.nulls.values["other_image"].tolist() == [[1.0, 1.0, 0.0, 0.0]] * 2
    assert sink.nulls.values["other_image"] is None
    assert "from its map alone" in sink.nulls.reasons["other_image"]


def test_the_chance_level_pairs_maps_with_values_of_other_images():
    model, pictures = toy(), images(6)
    plan = discover_plan(model, SIZE)
    metric = make("sink-kind@no-op", plan)
    (build,) = [build for _, build in metric.accumulators()]
    counts = build()
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad(), record(model, plan, values=True) as recording:
        model(pictures)
    trace = recording.last
    for attention in trace.attention:  # sinks at two places, short values at others: by hand, where toys have none
        place = torch.randint(0, 2, (6, HEADS), generator=generator)
        attention.probs = F.one_hot(place, 13).double()[:, :, None].expand(-1, -1, 13, -1).float()
        attention.q = attention.k = None
        attention.v = attention.v.clone()
        short = torch.randint(0, 2, (6, HEADS, 2), generator=generator).bool()
        attention.v[:, :, :2][short] = 0.0
    counts.start_batch(trace, [str(i) for i in range(6)])
    counts.end_batch(trace)
    expected = np.zeros((2, HEADS))
    for layer, attention in enumerate(trace.attention):
        for head in range(HEADS):
            found = []
            for i in range(6):
                for j in range(6):
                    if i != j:
                        maps, values = attention.probs[i, head], attention.v[j, head]
                        found.append(bool(sinks_of(maps[None, None], values[None, None]).kinds()["no_op"]))
            expected[layer, head] = np.mean(found)
    np.testing.assert_allclose(counts.of_other_images(), expected, atol=1e-12)
    assert 0 < expected.mean() < 1


def test_batches_and_halves_give_the_same_counts():
    model, pictures = sharpen(toy(), 3, 4.0), images(7)
    whole = analyze(model, pictures, metrics=NAMES, gallery_images=0, batch_size=7)
    parts = analyze(model, pictures, metrics=NAMES, gallery_images=0, batch_size=2)
    for name in NAMES:
        np.testing.assert_allclose(whole.metrics[name].values, parts.metrics[name].values, atol=1e-12)
    assert whole.metrics["sink-kind"].details["per_image"] == parts.metrics["sink-kind"].details["per_image"]


def test_eager_attention_gives_what_the_fused_kernel_gives():
    fused, eager = (sharpen(toy(kind), 3, 4.0) for kind in (ToyAttention, Matmul))
    found = [analyze(model, images(3), metrics=("sink-kind", "sink-kind@out"), gallery_images=0) for model in (fused, eager)]
    for name in ("sink-kind", "sink-kind@out"):
        np.testing.assert_allclose(found[0].metrics[name].values, found[1].metrics[name].values, atol=1e-12)


def test_where_the_values_are_not_known_it_says_so():
    result = analyze(toy(OneKey), images(2), metrics=("sink-kind",), gallery_images=0).metrics["sink-kind"]
    assert result.values is None
    assert result.not_applicable


# ---- the authors' own numbers ----

AUTHORS = {
    "key": [[2, 6, 2], [7, 5, 12], [15, 12, 14]],
    "mass": [[0.3240893, 0.3668419, 0.4001385], [0.8525887, 0.5370119, 0.3055962], [0.316025, 0.8887413, 0.5597479]],
    "routed": [[0.2941177, 0.4117647, 0.4117647], [0.8823529, 0.4705882, 0.2941177], [0.3529412, 0.9411765, 0.5294118]],
    "least": [[0.0, 0.0, 0.0], [0.0907879, 0.0111725, 0.0002607], [5.07e-05, 0.0086531, 0.0002224]],
    "ratio": [[1.1173648, 0.9594666, 0.9971622], [1.0261596, 0.8526616, 1.0807562], [0.9690554, 0.9552278, 1.1320082]],
    "ratio_out": [[1.0765554, 0.9753227, 0.9230623], [1.0448242, 0.8041463, 0.9761726], [0.9630356, 0.9646159, 1.0910739]],
    "stable_rank": [[1.5698299, 1.3347737, 1.4826394], [1.03028, 1.1419764, 1.1196811], [1.0544279, 1.0208622, 1.0603518]],
}
"""[blocks][heads] of the first image: attention_internals, stable_rank and the loop of collect, in lejepa_sinks/diagnose.py of
KempnerInstitute/attention_sink a83cd59, on the blocks of `authors_model()` behind its position embedding, in float32."""


def authors_model():
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, depth=3, init_values=0.5, num_classes=5)
    return sharpen(model, scale=2.5)


def test_the_seven_numbers_are_those_of_the_authors_code():
    model, pictures = authors_model(), images(4, size=(32, 32))
    plan = discover_plan(model, (32, 32))
    with torch.no_grad(), record(model, plan, values=True) as recording:
        model(pictures)
    metric = make("sink-kind@out", plan)
    metric.matrices = read_matrices(model, plan)
    for layer, attention in enumerate(recording.last.attention):
        maps = attention.maps()["weights"][:1]
        head = sinks_of(maps, attention.v[:1], of_all=True)
        out = sinks_of(maps, attention.v[:1], metric._grams()[layer], of_all=True)
        found = {name: getattr(head, name) for name in ("key", "mass", "routed", "least", "ratio")}
        found |= {"ratio_out": out.ratio, "stable_rank": out.stable_rank}
        for name, values in found.items():
            np.testing.assert_allclose(values[0].numpy(), AUTHORS[name][layer], atol=1e-5, err_msg=name)


def test_values_are_measured_behind_their_projection():
    model = sharpen(toy(), 3, 4.0)
    plan = discover_plan(model, SIZE)
    metric = make("sink-kind@out", plan)
    metric.matrices = read_matrices(model, plan)
    tokens = torch.randn(1, 5, 32, generator=torch.Generator().manual_seed(0))
    values = heads_of(tokens)
    with torch.no_grad():
        weight = model.blocks[1].attn.out.weight.double()
    for head in range(HEADS):
        projected = values[0, head].double() @ weight[:, 8 * head : 8 * head + 8].T
        gram = metric._grams()[1][head]
        lengths = ((values[0, head].double() @ gram) * values[0, head].double()).sum(-1).sqrt()
        np.testing.assert_allclose(lengths.numpy(), projected.norm(dim=-1).numpy(), rtol=1e-9)


def test_the_page_counts_sinks_by_kind_token_and_threshold():
    findings = analyze(sinking(), images(5), metrics=("sink-kind", "sink-kind@out"), gallery_images=0)
    head, other, _, _ = sink_tables(findings)
    assert head.rows[0][:3] == ("no-op", "4.00", "[4.00, 4.00]")
    assert head.header == ("kind", "per image", "95 % CI", "on a patch")
    assert ("no-op: ratio ≤ 0.1", "4.00", "–", "–") in other.rows
    page = render(findings, draw_all(findings))
    assert "Sinks of each kind, values of the head" in page
    assert "Sinks of each kind, values as they are written" in page


@pytest.mark.parametrize(("fresh", "share", "answer"), [(0.0, 1.0, "yes"), (0.0, 0.4, "no"), (0.6, 1.0, "no"), (None, 1.0, "")])
def test_heads_are_called_switched_off_where_an_untrained_copy_has_none(fresh, share, answer):
    findings = analyze(sinking(), images(20), metrics=NAMES, gallery_images=0)
    metrics = {}
    for name, result in findings.metrics.items():
        twin = None if fresh is None else np.full_like(result.array, fresh)
        nulls = replace(result.nulls, values={**result.nulls.values, "untrained": twin})
        metrics[name] = replace(result, nulls=nulls, head_mean=tuple(np.full_like(part, share) for part in result.head_mean))
    judged = with_verdict(replace(findings, metrics=metrics))
    rule = next(row for row in judged.verdict if row["rule"] == "heads-switched-off")
    assert rule["answer"] == (answer or "not applicable")
    assert "2606.08105" in rule["source"]
    said = "Attention: most heads of a block are switched off in most images"
    assert any(sentence.startswith(said) for sentence in judged.answer["sentences"]) == (answer == "yes")


@pytest.mark.parametrize("kwargs", [{}, {"class_token": False, "global_pool": "avg"}])
def test_maps_of_two_keys_have_no_sinks_to_speak_of(kwargs):
    model = timm.create_model("vit_tiny_patch16_224", depth=2, embed_dim=24, num_heads=2, img_size=16, **kwargs).eval()
    (result,) = analyze(model, "bundled:digits", limit=4, metrics=["sink-kind"]).metrics.values()
    assert "uniform attention alone makes a sink in maps of" in result.not_applicable


def test_a_count_says_over_how_many_blocks_it_is():
    model = ToyViT([Block(Sinking()), Block(OneKey()), Block(Sinking())])
    (table, *_) = sink_tables(analyze(model, images(4), metrics=("sink-kind",), gallery_images=0))
    assert table.rows[0][1] == "4.00"
    assert "over the 2 of 3 blocks that could be measured" in table.notes[0]
