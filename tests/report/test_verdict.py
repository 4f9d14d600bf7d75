"""The verdict tells its cases apart, each on a model built for it, and says nothing that no rule is behind."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from factories import findings_of as by_hand
from factories import photographs, small_vit

import collapse_probe as cp
from collapse_probe.analysis.analyze import measure
from collapse_probe.results.findings import Description, Findings, MetricResult, Nulls
from collapse_probe.results.quantities import Pairs, classify
from collapse_probe.results.rules import BY_NAME
from collapse_probe.results.text import number, spans
from collapse_probe.results.verdict import judge

KEPT = {"init_values": 1e-5}  # LayerScale so small that every block sees the same tokens


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return str(photographs(tmp_path_factory.mktemp("verdict") / "pictures", count=16, side=64))


def findings_of(model, pictures):
    return cp.analyze(model, pictures, img_size=64, batch_size=8, gallery_images=0)


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
    found = cp.analyze("vit_b_32", pictures, pretrained=False, batch_size=16, null_images=0, gallery_images=0)
    assert found.summary["attention_similarity_adjacent"] == pytest.approx(0.94, abs=0.01)
    assert found.summary["similar_blocks"] == 11
    assert found.summary["similar_blocks_corrected"] == 0
    assert abs(found.summary["kappa_adjacent"]) < 0.05
    assert abs(found.summary["attention_similarity_centred_adjacent"]) < 0.05
    answer = judge(found)
    assert answer.case == "near-uniform"
    assert answer.collapsed is False
    assert answer.sentences[0].startswith("This is not collapse across depth: 11 of 11")
    assert any("untrained" in caveat for caveat in answer.caveats)


def test_query_independent_maps_with_rows_of_their_own(pictures):
    found = findings_of(ignore_the_query(small_vit(**KEPT), shared=False), pictures)
    column = found.metrics["attention-similarity"]
    assert np.diag(column.values, -1) == pytest.approx(1, abs=1e-4)
    assert np.diag(column.nulls.values["other_token"], -1) == pytest.approx(1, abs=1e-4)
    assert found.summary["kappa_adjacent"] is None
    answer = judge(found)
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
    base |= {"row_key": 0.3, "queries": 0.4, "order": np.nan}
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
        ({"row": 0.9}, "shared-row"),
        ({"row": 0.69}, "distinct"),
        ({"order": 0.91}, "other-order"),
        ({"order": 0.89}, "distinct"),
        ({"queries": 0.99, "kappa": np.nan}, "query-independent"),
        ({"queries": 0.99, "kappa": np.nan, "share": 0.95}, "distinct"),
        ({"queries": 0.99, "kappa": np.nan, "raw": 0.99, "share": 0.95}, "near-uniform"),
        ({"queries": 0.99, "row": 0.99, "row_head": 0.985}, "same-row"),
        ({"queries": 0.99, "row": 0.99, "row_head": 0.985, "row_key": 0.985}, "same-everywhere"),
        ({"queries": 0.97, "row": 0.99, "row_head": 0.985}, "distinct"),
        ({"queries": 0.99, "row": 0.99, "row_head": np.nan}, "same-row"),
        ({"row": 0.99, "row_head": np.nan}, "untold"),
        ({"row": 0.5, "row_head": np.nan}, "distinct"),
        ({"null": 0.91, "row": np.nan, "row_head": np.nan}, "untold"),
        ({"null": 0.89, "row": np.nan, "row_head": np.nan}, "distinct"),
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
    found = measured_xcit(pictures)
    answer = judge(found)
    assert answer.case == "not-applicable"
    assert "channel attention" in answer.sentences[0]
    assert answer.collapsed is None


def measured_xcit(pictures):
    from collapse_probe.analysis.measurement import RunSettings
    from collapse_probe.data.images import open_data
    from collapse_probe.models.loading import resolve

    subject = resolve("timm:xcit_nano_12_p16_224", pretrained=False, model_kwargs={"depth": 2})
    return measure(subject, open_data(pictures, limit=2), RunSettings(null_images=0, gallery_images=0))


@pytest.mark.parametrize(
    ("raw", "said"),
    [
        (0.4, ": on average nothing agrees beyond chance (κ −0.200, 95 % CI [−0.260, −0.140])."),
        (0.5, ": on average nothing agrees beyond chance (κ 0.000, 95 % CI [−0.060, 0.060])."),
        (0.6, ": of the agreement that chance cannot explain, 20.0 % is reached (κ 0.200)."),
    ],
)
def test_a_kappa_of_nothing_is_no_share_of_what_is_left(raw, said):
    found = by_hand(np.full((4, 3), raw), np.full((4, 3), 0.5))
    kappa = found.summary["kappa_adjacent"]
    ends = {"kappa_adjacent_ci_low": kappa - 0.06, "kappa_adjacent_ci_high": kappa + 0.06}
    sure = judge(replace(found, summary={**found.summary, **ends})).sentences[1]
    start = f"Neighbouring blocks have a raw similarity of {raw:.3f}, against a chance level (other tokens) of 0.500"
    assert sure == f"{start}{said}"
    without = judge(found).sentences[1]
    assert without == sure.replace(sure[sure.index(", 95 %") : sure.rindex(")")], "") if kappa <= 0 else sure
    assert "-" not in sure


def test_the_interval_beside_kappa_is_that_of_the_run(pictures):
    found = cp.analyze("vit_b_32", pictures, pretrained=False, batch_size=6, null_images=0, gallery_images=0, seed=1)
    ends = [found.summary[f"kappa_adjacent_ci_{end}"] for end in ("low", "high")]
    mean = found.summary["kappa_adjacent"]
    assert ends[0] < mean < ends[1]
    said = f"(κ {number(mean)}, 95 % CI [{number(ends[0])}, {number(ends[1])}])"
    assert (said in judge(found).sentences[1]) == (mean <= 0)


def test_unsure_collapse_says_so(pictures):
    model = small_vit(sharpness=12, **KEPT)
    copy_attention(model, 1, 2)
    found = findings_of(model, pictures)
    reading = found.metrics["attention-similarity"]
    wide = np.stack([np.zeros((4, 4)), np.ones((4, 4))], axis=-1)
    unsure = replace(reading, nulls=replace(reading.nulls, kappa_ci95=wide))
    answer = judge(replace(found, metrics={**found.metrics, "attention-similarity": unsure}, images={}))
    assert (answer.case, answer.collapsed) == ("undecided", None)
    assert answer.sentences[0].startswith("It cannot be told whether attention has collapsed across depth: 3 of 3")
    assert any("the interval includes 0.5" in caveat for caveat in answer.caveats)


def test_one_image_decides_nothing(pictures):
    model = small_vit(sharpness=12, **KEPT)
    copy_attention(model, 1, 2)
    found = cp.analyze(model, pictures, img_size=64, limit=1, gallery_images=0)
    answer = judge(found)
    assert (answer.case, answer.collapsed) == ("undecided", None)
    measured = {row["rule"]: row["answer"] for row in found.verdict if row["level"] in ("attention", "tokens")}
    assert measured["shared"] == measured["parallel-patches"] == measured["near-uniform"] == "undecided"
    assert set(measured.values()) <= {"undecided", "not applicable"}


def of_weights(rank=0.9, alike=1.0, **more):
    """Findings of the weights alone, two blocks and two matrices: the metrics over those of the untrained copy."""
    fresh = {"weight-rank": np.full((2, 2), 40.0), "weight-similarity": np.full((2, 2), 0.1)}
    values = {"weight-rank": fresh["weight-rank"] * [[rank], [1]], "weight-similarity": fresh["weight-similarity"] * alike}
    full_rank = {"weight-rank": {"full_rank": np.full((2, 2), 80.0)}}
    readings = {
        name: MetricResult(
            ("block", "matrix"),
            "made up",
            values=values[name],
            settings={"measure": "effective"},
            details={"matrices": ["q", "k"], **full_rank.get(name, {})},
            description=Description(level="weights"),
            nulls=Nulls({"untrained": fresh[name]}, {"untrained": 0}),
        )
        for name in fresh
    }
    facts = {"model": {"weights": "made by hand", "mixes_maps": True}, "data": {"images": 0}, "run": {}, "summary": {}}
    return Findings(metrics={**readings, **more}, **facts)


def test_weights_alone_are_answered_by_their_own_rules():
    answer = judge(of_weights())
    assert (answer.case, answer.collapsed) == ("weights-only", None)
    for name, sentence in zip(("weights-lost-rank", "rows-more-alike"), answer.sentences, strict=False):
        assert sentence.startswith(f"No sign that {BY_NAME[name].says} ({BY_NAME[name].quantity}: ")
        assert f"; the rule holds {BY_NAME[name].direction} {BY_NAME[name].threshold:g})." in sentence
    assert "0.900 in block 0;" in answer.sentences[0]
    assert "effective rank over the full one 0.475 (untrained copy 0.500)" in answer.sentences[2]
    assert "|cosine| between rows 0.100 (untrained copy 0.100)" in answer.sentences[2]
    assert "not judged here" in answer.sentences[-1]
    assert len(answer.rules) == len(answer.sentences) == 4
    text = " ".join((*answer.sentences, *answer.caveats))
    assert "was not measured" not in text
    assert "cannot be judged" not in text
    assert "softmax" not in text  # a model that mixes its maps: nothing was said about maps
    (caveat,) = answer.caveats
    assert "no sample" in caveat


def test_what_the_weights_have_lost_is_said_first():
    answer = judge(of_weights(rank=0.4))
    assert (answer.case, answer.collapsed) == ("weights-only", None)
    assert answer.rules[0] == "weights-lost-rank"
    assert answer.sentences[0].startswith("Weights: training has left the weight matrices of a block fewer directions")
    assert "0.400, below 0.5, block 0" in answer.sentences[0]
    assert "0.350 (untrained copy 0.500)" in answer.sentences[1]
    assert judge(of_weights(alike=3.0)).rules[0] == "rows-more-alike"


def test_one_metric_beside_the_weights_is_no_run_of_weights_alone(pictures):
    entropy = cp.analyze(small_vit(), pictures, img_size=64, metrics=("attention-entropy",), gallery_images=0).metrics
    assert judge(of_weights(**entropy)).case == "not-judged"


def test_numbers_without_a_rule_are_said_to_be_that():
    answer = judge(replace(of_weights(), metrics={"hyperspherical-energy": of_weights().metrics["weight-similarity"]}))
    assert answer.sentences[0] == "There are numbers here and no verdict on them: no rule is about hyperspherical-energy."
    bare = {
        name: replace(r, nulls=Nulls({"untrained": None}, {}, {"untrained": "why"})) for name, r in of_weights().metrics.items()
    }
    answer = judge(replace(of_weights(), metrics=bare))
    assert "the untrained copy of weight-rank was not measured: why" in answer.sentences[0]
    assert "effective rank over the full one 0.475;" in answer.sentences[1]


@pytest.mark.parametrize(
    ("metrics", "first", "count"),
    [
        (("attention-entropy",), "No sign that the heads of a block attend to hardly more than one key each (entropy", 2),
        (("token-rank",), "There are numbers here and no verdict on them: the untrained copy of token-rank was not", 2),
        (("head-similarity",), "There are numbers here and no verdict on them: no rule is about head-similarity.", 2),
    ],
)
def test_what_was_not_asked_for_is_no_failure(pictures, metrics, first, count):
    answer = judge(cp.analyze(small_vit(), pictures, img_size=64, metrics=metrics, gallery_images=0))
    assert (answer.case, answer.collapsed) == ("not-judged", None)
    assert answer.sentences[0].startswith(first)
    assert len(answer.sentences) == len(answer.rules) == count
    assert "not judged here: attention-similarity was not asked for" in answer.sentences[-1]
    assert not any("Similarity between blocks" in text for text in answer.sentences)
    assert ("; the rule holds " in answer.sentences[0]) == (metrics == ("attention-entropy",))


def test_many_rules_are_counted_and_few_are_named():
    values = np.array([1.0, 0.5])
    sure = MetricResult(("depth",), "made up", values=values, stderr=0 * values, ci95=np.stack([values, values], -1))
    few = {"patch-diversity": sure}
    many = {**few, "rank-residual": sure, "rank-residual@composite@all": sure}
    bare = replace(of_weights(), data={"images": 16})
    named, counted = (judge(replace(bare, metrics=metrics)) for metrics in (few, many))
    rule = BY_NAME["parallel-patches"]
    assert named.sentences[0] == f"No sign that {rule.says} ({rule.quantity}: 0.500; the rule holds above 0.7)."
    assert counted.sentences[0] == "No sign of collapse in what was measured: none of 3 rules about tokens holds."
    assert len(named.sentences) == len(counted.sentences) == 2
    wide = replace(sure, ci95=np.stack([values - 0.45, values + 0.45], -1))
    unsure = judge(replace(bare, metrics={**many, "patch-diversity": wide}))
    assert unsure.sentences[0] == ("No rule about tokens holds for certain, and 1 cannot be told from these images.")


def test_one_image_leaves_what_was_asked_for_open(pictures):
    answer = judge(cp.analyze(small_vit(), pictures, img_size=64, limit=1, metrics=("patch-diversity",), gallery_images=0))
    assert answer.sentences[0] == "No rule about tokens holds for certain, and 1 cannot be told from these images."
    assert answer.caveats[0] == "No rule about maps or tokens is judged with fewer than 16 images."
    assert set(answer.rules) | set(answer.caveat_rules) == {"shared"}


def test_spans():
    assert spans([1, 2, 3]) == "1–3"
    assert spans([5]) == "5"
    assert spans([1, 3, 4]) == "1, 3–4"
