"""The verdict tells its cases apart, each on a model built for it, and says nothing that no rule is behind."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from making import photographs, small_vit

import collapse_probe as cp
from collapse_probe.analysis import measure
from collapse_probe.quantities import Pairs, classify
from collapse_probe.verdict import judge, spans
from collapse_probe.verdict_rules import BY_NAME

KEPT = {"init_values": 1e-5}  # LayerScale so small that every block sees the same tokens


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return str(photographs(tmp_path_factory.mktemp("verdict") / "pictures", count=6, side=64))


def findings_of(model, pictures):
    return cp.analyze(model, pictures, img_size=64, batch_size=4, gallery_images=0)


def copy_attention(model, source, target):
    blocks = model.blocks
    blocks[target].attn.load_state_dict(blocks[source].attn.state_dict())


def ignore_the_query(model, shared):
    """Queries that are the same for every token: every row of a head's map is the same."""
    generator = torch.Generator().manual_seed(3)
    d = model.embed_dim
    with torch.no_grad():
        for i, block in enumerate(model.blocks):
            if shared and i:
                block.attn.load_state_dict(model.blocks[0].attn.state_dict())
                continue
            block.attn.qkv.weight[:d] = 0
            block.attn.qkv.bias[:d] = torch.randn(d, generator=generator) * 3
            block.attn.qkv.weight[d : 2 * d] = torch.randn(d, d, generator=generator) * 0.2
    return model


def test_near_uniform_maps_are_not_collapse(pictures):
    found = cp.analyze("vit_b_32", pictures, pretrained=False, batch_size=6, null_images=0, gallery_images=0)
    assert found.summary["attention_similarity_adjacent"] == pytest.approx(0.94, abs=0.01)
    assert found.summary["similar_blocks"] == 11
    assert found.summary["similar_blocks_corrected"] == 0
    assert abs(found.summary["kappa_adjacent"]) < 0.05
    assert abs(found.summary["attention_similarity_centred_adjacent"]) < 0.05
    answer = judge(found)
    assert answer.case == "near-uniform"
    assert answer.collapsed is False
    assert answer.sentences[0].startswith("This is not collapse: 11 of 11")
    assert any("untrained" in caveat for caveat in answer.caveats)


def test_query_independent_maps_with_rows_of_their_own(pictures):
    found = findings_of(ignore_the_query(small_vit(**KEPT), shared=False), pictures)
    column = found.metrics["attention-similarity"]
    assert np.diag(column.values, -1) == pytest.approx(1, abs=1e-4)
    assert np.diag(column.nulls.values["other_token"], -1) == pytest.approx(1, abs=1e-4)
    assert found.summary["kappa_adjacent"] is None
    answer = judge(found)
    assert (answer.case, answer.collapsed) == ("query-independent", None)
    assert "whether blocks share it, more images must tell" in answer.sentences[0]
    row = found.metrics["attention-similarity@row"]
    sure = {**found.metrics, "attention-similarity@row": replace(row, ci95=np.stack([row.values] * 2, axis=-1))}
    answer = judge(replace(found, metrics=sure))
    assert (answer.case, answer.collapsed) == ("query-independent", False)
    assert "each block with a row of its own" in answer.sentences[0]


def test_query_independent_maps_that_share_their_row(pictures):
    answer = judge(findings_of(ignore_the_query(small_vit(**KEPT), shared=True), pictures))
    assert (answer.case, answer.collapsed) == ("query-independent", True)
    assert answer.sentences[0].startswith("Attention has collapsed across depth in 3 of 3")
    assert "every query with the same row" in answer.sentences[0]


def test_shared_maps_are_collapse(pictures):
    model = small_vit(sharpness=12, **KEPT)
    for i in range(1, 4):
        copy_attention(model, 0, i)
    found = findings_of(model, pictures)
    assert found.summary["kappa_adjacent"] > 0.95
    answer = judge(found)
    assert (answer.case, answer.collapsed) == ("shared", True)
    assert answer.sentences[0].startswith(
        "Attention has collapsed across depth in 3 of 3 neighbouring pairs of blocks: blocks 1–3"
    )


def test_one_copied_block_is_found_where_it_is(pictures):
    model = small_vit(sharpness=12, **KEPT)
    copy_attention(model, 1, 2)
    found = findings_of(model, pictures)
    assert found.summary["similar_blocks_corrected"] == 1
    answer = judge(found)
    assert answer.pairs == ("distinct", "shared", "distinct")
    assert "block 2 attends like the block before" in answer.sentences[0]


def test_distinct_maps(pictures):
    found = findings_of(small_vit(sharpness=25), pictures)
    answer = judge(found)
    assert (answer.case, answer.collapsed) == ("distinct", False)
    assert answer.sentences[0].startswith("No collapse")


def pair(**numbers):
    base = {"raw": 0.5, "null": 0.4, "kappa": 0.1, "row": 0.5, "row_head": 0.4, "share": 0.6}
    return Pairs(**{name: np.array([value]) for name, value in {**base, **numbers}.items()})


@pytest.mark.parametrize(
    ("numbers", "kind"),
    [
        ({}, "distinct"),
        ({"raw": np.nan}, "undefined"),
        ({"kappa": 0.51}, "shared"),
        ({"kappa": 0.49}, "distinct"),
        ({"raw": 0.91, "share": 0.91}, "near-uniform"),
        ({"raw": 0.91, "share": 0.89}, "explained"),
        ({"raw": 0.89, "share": 0.99}, "distinct"),
        ({"null": 0.99, "kappa": np.nan}, "query-independent"),
        ({"null": 0.99, "kappa": np.nan, "row": 0.9}, "shared-row"),
        ({"null": 0.99, "kappa": np.nan, "row": 0.99, "row_head": 0.99}, "same-everywhere"),
        ({"null": 0.99, "kappa": np.nan, "raw": 0.99, "share": 0.95}, "near-uniform"),
    ],
)
def test_each_rule_on_both_sides_of_its_threshold(numbers, kind):
    assert classify(pair(**numbers), 0) == kind


def test_every_sentence_comes_from_a_rule(pictures):
    model = small_vit(sharpness=12, **KEPT)
    copy_attention(model, 1, 2)
    for found in (findings_of(model, pictures), findings_of(small_vit(sharpness=25), pictures)):
        answer = judge(found)
        assert len(answer.rules) == len(answer.sentences) >= 2
        assert len(answer.caveat_rules) == len(answer.caveats) >= 1
        assert set(answer.rules) | set(answer.caveat_rules) <= set(BY_NAME)


def test_what_the_page_says_is_what_the_findings_keep(pictures):
    model = small_vit(sharpness=12, **KEPT)
    copy_attention(model, 1, 2)
    found = findings_of(model, pictures)
    kept = {row["rule"]: row for row in found.to_json()["verdict"]}
    assert list(kept) == list(BY_NAME)
    assert judge(found).collapsed is True
    assert kept["shared"]["answer"] == "yes"
    assert [place["at"] for place in kept["shared"]["places"] if place["answer"] == "yes"] == [2]
    assert kept["constant-tokens"]["answer"] == "not applicable"
    assert "rank-residual was not measured" in kept["constant-tokens"]["reason"]


def test_not_applicable_says_why(pictures):
    found = measured_swin(pictures)
    answer = judge(found)
    assert answer.case == "not-applicable"
    assert "window" in answer.sentences[0]


def measured_swin(pictures):
    from collapse_probe.analysis import Settings
    from collapse_probe.data import open_data
    from collapse_probe.sources import resolve

    subject = resolve("timm:maxvit_nano_rw_256", pretrained=False)
    return measure(subject, open_data(pictures, limit=2), Settings(null_images=0, gallery_images=0))


def test_unsure_collapse_says_so(pictures):
    model = small_vit(sharpness=12, **KEPT)
    copy_attention(model, 1, 2)
    found = findings_of(model, pictures)
    reading = found.metrics["attention-similarity"]
    wide = np.stack([np.zeros((4, 4)), np.ones((4, 4))], axis=-1)
    unsure = replace(reading, nulls=replace(reading.nulls, kappa_ci95=wide))
    answer = judge(replace(found, metrics={**found.metrics, "attention-similarity": unsure}))
    assert (answer.case, answer.collapsed) == ("undecided", None)
    assert answer.sentences[0].startswith("It cannot be told from these images")
    assert any("more images are needed" in caveat for caveat in answer.caveats)


def test_one_image_decides_nothing(pictures):
    model = small_vit(sharpness=12, **KEPT)
    copy_attention(model, 1, 2)
    found = cp.analyze(model, pictures, img_size=64, limit=1, gallery_images=0)
    answer = judge(found)
    assert (answer.case, answer.collapsed) == ("undecided", None)
    measured = {row["rule"]: row["answer"] for row in found.verdict if row["level"] in ("attention", "tokens")}
    assert measured["shared"] == measured["parallel-patches"] == measured["near-uniform"] == "undecided"
    assert set(measured.values()) <= {"undecided", "not applicable"}


def test_spans():
    assert spans([1, 2, 3]) == "1–3"
    assert spans([5]) == "5"
    assert spans([1, 3, 4]) == "1, 3–4"
