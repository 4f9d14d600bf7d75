"""What a run says of blocks that are no neighbours, not captured, or left out: in numbers, verdict, terminal and page."""

from __future__ import annotations

import csv
from dataclasses import replace

import numpy as np
import pytest
import timm
import torch
from collapse_probe.cli.summary import answer
from factories import plan_for, random_maps, readings, small_vit, trace_of

from collapse_probe.analysis import analyze as analyzing
from collapse_probe.analysis import probe as probing
from collapse_probe.analysis.comparison.pairing import pair_up
from collapse_probe.analysis.intervene import intervene
from collapse_probe.analysis.measurement import plan_of
from collapse_probe.capture.capture import discover_plan
from collapse_probe.capture.edits.replacement import refusal, source_of
from collapse_probe.capture.plan import Plan
from collapse_probe.capture.trace import Trace
from collapse_probe.metrics.coverage import covered, places_of_blocks, uncompared
from collapse_probe.metrics.metric import make
from collapse_probe.models.loading import ImageTower
from collapse_probe.registry import METRICS
from collapse_probe.report.comparison.verdict import verdict_of_pair
from collapse_probe.report.findings.page import render
from collapse_probe.results.findings import Findings
from collapse_probe.results.readings import adjacent
from collapse_probe.results.verdict import judge

NOT_HEARD = "not captured: its softmax is over another axis"
EVERYTHING = tuple(name for name, kind in METRICS.items() if kind.level != "weights")


def pictures(count=16, side=64):
    return [torch.randn(count // 2, 3, side, side, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1)]


def analysed(model, monkeypatch, change, metrics=(), images=None):
    """Findings of a model whose plan is changed before the run."""
    monkeypatch.setattr(probing, "plan_of", lambda *args: change(plan_of(*args)))
    facts = {"null_images": 2, "img_size": 64, "device": "cpu", "gallery_images": 1}
    return analyzing.analyze(model, data=images or pictures(), metrics=metrics, **facts)


def unheard(plan: Plan, place: int) -> Plan:
    """The plan as if a block could not be heard, so that its neighbours have none."""
    layers = list(plan.layers)
    layers[plan.map_layers[place]] = replace(layers[plan.map_layers[place]], reason=NOT_HEARD)
    near = tuple(known and i not in (place - 1, place) for i, known in enumerate(plan.adjacent))
    return replace(plan, layers=tuple(layers), adjacent=near)


def towers(plan: Plan) -> Plan:
    """The plan as if blocks 0–1 and 2–3 stood side by side."""
    return replace(plan, adjacent=(True, False, True))


def alike(model):
    """Blocks 1 and 2 attend alike: a count that takes them for neighbours sees it."""
    with torch.no_grad():
        for part in ("attn", "norm1"):
            model.blocks[2].get_submodule(part).load_state_dict(model.blocks[1].get_submodule(part).state_dict())
        for name in ("attn.proj", "mlp.fc2"):
            for parameter in model.blocks[1].get_submodule(name).parameters():
                parameter *= 1e-3
    return model


@pytest.fixture(scope="module")
def whole() -> Findings:
    model = alike(small_vit(sharpness=6.0))
    return analyzing.analyze(model, data=pictures(), metrics=EVERYTHING, null_images=2, img_size=64, device="cpu")


@pytest.fixture
def apart(monkeypatch) -> Findings:
    return analysed(alike(small_vit(sharpness=6.0)), monkeypatch, towers, EVERYTHING)


def test_blocks_of_two_towers_are_no_neighbours_in_any_number(whole, apart):
    raw = whole.matrix("attention-similarity")
    assert raw[2, 1] > 0.95
    assert whole.summary["similar_blocks_corrected"] == 1
    assert apart.summary["similar_blocks_corrected"] == 0
    assert apart.metrics["similar-blocks"].details["pairs"] == 2
    covers = "over 2 of 3 pairs of consecutive blocks: blocks 1, 3 with the block before"
    assert apart.metrics["similar-blocks"].covers == covers == apart.metrics["similarity-ratio"].covers
    np.testing.assert_array_equal(apart.matrix("attention-similarity"), raw)
    assert apart.summary["attention_similarity_adjacent"] == pytest.approx((raw[1, 0] + raw[3, 2]) / 2)
    assert apart.summary["attention_similarity_adjacent"] < whole.summary["attention_similarity_adjacent"]
    for name in ("attention-similarity", "attention-similarity/other_token", "whole-map-similarity"):
        assert np.isfinite(apart.images[name]).all(0).tolist() == [True, False, True]
    for name in ("feature-similarity", "cross-patch-similarity"):
        assert np.isfinite(apart.images[name]).all(0).tolist() == [True, True, False, True]
        assert np.isfinite(apart.metrics[name].array).all()
    assert [row for row in apart.blocks.itertuples() if row.metric == "feature-similarity" and row.block == 3] == []
    assert "must give its output to the next" in str(apart.metrics["attention-rollout"].not_applicable)
    tests = apart.sureness["tests"]["attention-similarity"]
    assert tests["tested"] == 2
    assert np.isnan(tests["q"][1])
    assert apart.metrics["similarity-ratio"].details["sensitivity"][0]["blocks"] == 2


def test_what_is_no_neighbour_is_said_in_verdict_and_page(whole, apart):
    assert whole.answer["collapsed"] is True
    assert apart.answer["collapsed"] is not True
    sentence = "2 of 3 pairs of consecutive blocks are compared; without the block before: block 2 "
    assert f"{sentence}(the output of one is not the input of the other)." in apart.answer["sentences"]
    assert not [text for text in whole.answer["sentences"] if "consecutive" in text]
    assert "of 2 compared pairs" in render(apart)
    assert apart.answer["pairs"][1] == "undefined"


def test_a_folder_keeps_who_is_a_neighbour(apart, tmp_path):
    apart.save(tmp_path / "kept")
    kept = Findings.load(tmp_path / "kept")
    result = kept.metrics["attention-similarity"]
    assert result.adjacent == (True, False, True)
    assert np.isfinite(adjacent(result, result.array)).tolist() == [True, False, True]
    assert judge(kept).sentences == judge(apart).sentences
    with (tmp_path / "kept" / "blocks.csv").open() as file:
        blocks = [row["block"] for row in csv.DictReader(file) if row["metric"] == "attention-similarity"]
    assert blocks == ["1", "3"]


def test_a_comparison_pairs_neighbours_alone_and_names_what_was_not_heard(whole, apart):
    pair = pair_up(whole, apart, ("chain", "towers"))
    raw = pair.differences["attention-similarity"]
    assert raw.paired.images.tolist() == [16, 0, 16]
    assert raw.overall.difference[0] == pytest.approx(0.0, abs=1e-12)
    hole = [{"where": "blocks.1", "why": NOT_HEARD, "blocks": [1]}]
    unheard_too = replace(apart, model={**apart.model, "left_out": hole})
    caveats = verdict_of_pair(pair, whole, unheard_too).caveats
    assert "towers: Block blocks.1 could not be captured: its neighbours are not compared." in caveats
    assert not [text for text in caveats if "left out of its pairs" in text]


def test_findings_without_neighbours_take_all_for_them(whole):
    result = whole.metrics["attention-similarity"]
    assert result.adjacent == ()
    assert np.isfinite(adjacent(result, result.array)).all()


def test_a_block_that_was_not_heard_is_said_first_and_has_no_neighbours(monkeypatch):
    model = small_vit(sharpness=6.0)
    found = analysed(model, monkeypatch, lambda plan: unheard(plan, 1), EVERYTHING)
    first, *others = found.answer["sentences"]
    assert first == "Block blocks.1 could not be captured: its neighbours are not compared."
    assert "blocks 1–2 (blocks.1 was not captured)" in " ".join(others)
    assert others[0].startswith("1 of 3 pairs")  # few pairs are said before what they show
    assert np.isnan(found.matrix("attention-similarity")[1]).all()
    assert np.isfinite(found.matrix("attention-similarity")[2, 0])
    assert np.isnan(found.matrix("attention-entropy")[1]).all()
    assert found.metrics["attention-entropy"].covers.startswith(f"over 3 of 4 blocks; left out: blocks.1: {NOT_HEARD}")
    assert found.metrics["similar-blocks"].details["pairs"] == 1
    assert found.model["left_out"] == [{"where": "blocks.1", "why": NOT_HEARD, "blocks": [1]}]
    assert f"left out: blocks.1: {NOT_HEARD}" in found.run["notes"]
    assert found.gallery is not None
    assert found.gallery.blocks == (0, 2, 3)
    text = answer(found)
    assert text.startswith(first)
    assert f"Left out: blocks.1: {NOT_HEARD}" in text
    assert f"<code><bdi>blocks.1</bdi></code> (block 1): {NOT_HEARD}" in render(found)


def test_without_any_neighbours_depth_is_not_judged(monkeypatch):
    found = analysed(alike(small_vit(sharpness=6.0)), monkeypatch, lambda plan: replace(plan, adjacent=(False,) * 3))
    assert found.answer["case"] == "not-applicable"
    assert found.answer["collapsed"] is None
    assert found.answer["sentences"][0] == (
        "Whether attention has collapsed across depth cannot be judged here: no two neighbouring blocks can be compared (the "
        "output of one is not the input of the other)."
    )
    assert not [text for text in found.answer["sentences"] if "collapse between" in text or "not collapse" in text]
    assert "no two neighbouring blocks" in str(found.metrics["similar-blocks"].not_applicable)
    assert found.summary["similar_blocks"] is None
    assert found.summary["attention_similarity_adjacent"] is None
    assert "attention-similarity" not in found.sureness["tests"]
    assert "similar_blocks" not in found.sureness["convergence"]["numbers"]
    assert "cannot be judged here" in render(found)


def test_the_ratio_looks_no_further_than_a_chain_of_neighbours():
    maps = random_maps((2, 5, 2, 6, 6), seed=3)
    trace = trace_of(maps)
    broken = replace(trace.plan, adjacent=(True, True, False, True))
    found = {}
    for key, plan in (("whole", trace.plan), ("broken", broken)):
        of_plan = Trace(plan, trace.images, trace.tokens, trace.attention, None)
        found[key] = readings([of_plan], ["similarity-ratio@nearest-3", "similarity-ratio"])
    assert np.isfinite(found["whole"]["similarity-ratio"].array).tolist() == [False, True, True, True, True]
    assert np.isfinite(found["broken"]["similarity-ratio"].array).tolist() == [False, True, True, False, True]
    first = readings([trace_of(maps[:, :3])], ["similarity-ratio@nearest-3"])["similarity-ratio@nearest-3"].array
    last = readings([trace_of(maps[:, 3:])], ["similarity-ratio@nearest-3"])["similarity-ratio@nearest-3"].array
    np.testing.assert_allclose(found["broken"]["similarity-ratio@nearest-3"].array, [*first, *last])


def test_share_takes_no_map_from_a_block_that_gives_no_output_on():
    model = small_vit()
    plan = discover_plan(model, (64, 64))
    assert source_of(plan, plan.map_layers[2]) == plan.map_layers[1]
    apart = towers(plan)
    assert source_of(apart, plan.map_layers[2]) is None
    assert refusal(apart, "share", 2, {}) == "there is no block before it that gives it its output"
    assert refusal(apart, "share", 3, {}) == ""
    assert refusal(apart, "share", 0, {}) == "there is no block before it"


def test_an_intervention_compares_neighbours_alone(monkeypatch):
    monkeypatch.setattr(probing, "plan_of", lambda *args: towers(plan_of(*args)))
    model = small_vit()
    done = intervene(model, pictures(), replace=("uniform",), img_size=64, device="cpu")
    assert [value is None for value in done.similarity["raw"]] == [False, True, False]


def test_pairs_are_counted_by_why_they_are_not_compared():
    plan = plan_for(6, 2, 9)
    layers = list(plan.layers)
    layers[1] = replace(layers[1], heads=0, queries=0, keys=0, reason=NOT_HEARD)
    layers[5] = replace(layers[5], heads=4)
    plan = replace(plan, layers=tuple(layers), adjacent=(False, False, True, False, True))
    channels = replace(layers[3], reason="channel attention")
    unlike = replace(plan, layers=(*layers[:3], channels, *layers[4:]))
    assert uncompared(unlike)["channel attention"] == [3, 4]  # what is not compared at all is no matter of neighbours
    assert uncompared(plan) == {
        "blocks.1 was not captured": [1, 2],
        "the output of one is not the input of the other": [4],
        "their maps have other shapes": [5],
    }
    assert plan.adjacent_blocks == plan.adjacent
    for name in EVERYTHING:
        make(name, plan).inapplicable()


def test_blocks_with_maps_of_two_kinds_say_whose_numbers_are_whose():
    plan = plan_for(6, 2, 9)
    layers = [replace(layer, block=i % 3, owner=f"blocks.{i % 3}.{'wg'[i // 3]}") for i, layer in enumerate(plan.layers)]
    plan = replace(plan, blocks=plan.blocks[:3], layers=tuple(layers), adjacent=(True, True, False, True, True))
    (sentence,) = places_of_blocks(plan)
    assert sentence.endswith("axis of blocks: 0–2 (blocks.0.w … blocks.2.w); 3–5 (blocks.0.g … blocks.2.g)")
    assert plan.adjacent_blocks == (True, True)
    assert places_of_blocks(plan_for(6, 2, 9)) == []


def test_beside_a_number_stand_two_reasons_and_how_many_more():
    plan = plan_for(6, 2, 9)
    layers = [replace(layer, reason=f"reason {i}" if i < 4 else "") for i, layer in enumerate(plan.layers)]
    plan = replace(plan, layers=tuple(layers))
    expected = "over 2 of 6 blocks; left out: blocks.0.attn: reason 0; blocks.1.attn: reason 1; and 2 more"
    assert covered(plan, [4, 5]) == expected
    assert covered(plan_for(2, 2, 9), [0, 1]) == ""


def test_class_attention_is_listed_with_its_reason(monkeypatch):
    torch.manual_seed(0)
    model = timm.create_model("cait_xxs24_224", num_classes=10, depth=3, img_size=64).eval()
    found = analysed(model, monkeypatch, lambda plan: plan)
    (left,) = found.model["left_out"]
    assert "blocks_token_only" in left["where"]
    assert "pooling query" in left["why"]
    assert f"left out: {left['where']}: {left['why']}" in found.run["notes"]
    assert found.metrics["attention-entropy"].covers == f"over 3 blocks; left out: {left['where']}: {left['why']}"
    assert f"The numbers are over 3 blocks; left out: {left['where']}" in render(found)


def test_many_layers_of_one_reason_are_one_line(monkeypatch):
    torch.manual_seed(0)
    model = timm.create_model("xcit_nano_12_p16_224", num_classes=10, depth=6, img_size=64).eval()
    found = analysed(model, monkeypatch, lambda plan: plan, ("attention-entropy", "patch-diversity"))
    shown = [each for each in found.model["left_out"] if "channel" in each["why"]]
    assert [each["where"] for each in shown] == ["6 layers (blocks.0.attn … blocks.5.attn)"]
    assert shown[0]["blocks"] == list(range(6))


def test_latents_are_no_patches(monkeypatch):
    def latents(plan: Plan) -> Plan:
        return replace(plan, grid=None, patch_shapes=(None,) * len(plan.patch_shapes))

    of_patches = (
        "attention-similarity@patches",
        "attention-sink@patches",
        "attention-distance",
        "patch-diversity",
        "token-norm",
    )
    metrics = ("attention-similarity", *of_patches)
    found = analysed(small_vit(), monkeypatch, latents, (*metrics, "feature-similarity", "rank-residual@all"))
    for name in metrics[1:]:
        assert "do not come from the image" in str(found.metrics[name].not_applicable), name
    assert found.metrics["attention-similarity"].values is not None
    assert found.metrics["rank-residual@all"].values is not None
    assert found.gallery is None
    page = render(found)
    assert "the tokens do not come from the image" in page
    assert found.summary["patch_diversity_last"] is None


def test_the_class_of_a_model_is_the_librarys_own():
    own = small_vit()
    found = analyzing.analyze(ImageTower(own, lambda answer: answer), pictures(2), metrics=["patch-diversity"], null_images=0)
    assert found.model["class"] == f"{type(own).__module__}.{type(own).__qualname__}"


def test_tokens_that_stood_behind_the_patches_are_gone_once_these_are_merged():
    transformers = pytest.importorskip("transformers")
    stages = {"depths": [2, 2], "num_hidden_layers": 4, "num_group_tokens": [8, 4], "num_output_groups": [8, 4]}
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "image_size": 64, "patch_size": 16}
    own = transformers.GroupViTVisionModel(transformers.GroupViTVisionConfig(**stages, **sizes)).eval()
    tower = ImageTower(own, lambda answer: answer.pooler_output)
    found = analyzing.analyze(tower, pictures(4), metrics=["patch-diversity", "attention-entropy"], null_images=0)
    names = [name.rpartition("stages.")[2] for name in found.model["block_names"]]
    assert names[:4] == ["0.layers.0", "0.layers.1", "0.downsample", "1.layers.0"]
    assert all(found.model["adjacent"])
    diversity = found.matrix("patch-diversity")
    assert np.isfinite(diversity[:3]).all()
    assert np.isnan(diversity[4:]).all()
    assert found.gallery is not None
