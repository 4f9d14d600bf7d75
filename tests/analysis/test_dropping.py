"""Blocks that are left out: the model without them to the bit, the cheapest first, priced on images that did not choose."""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import pytest
import timm
import torch
from factories import small_vit
from test_intervention import MODELS, images, made, output, size_of
from toy_models import Matmul, toy

import collapse_probe as cp
from collapse_probe.analysis.intervention.orders import FEWEST, Parts, prefixes
from collapse_probe.analysis.outputs import kl_divergence
from collapse_probe.capture.capture import discover_plan
from collapse_probe.capture.edits.places import Edit, Places, edited
from collapse_probe.capture.edits.streams import block_call, fixed_blocks, streams_of
from collapse_probe.data.images import open_data
from collapse_probe.errors import SettingError
from collapse_probe.models.loading import resolve
from collapse_probe.report.intervention import dropping
from collapse_probe.report.intervention.page import render
from collapse_probe.report.intervention.verdict import headline, verdicts
from collapse_probe.results.intervention import GREEDY, Effect, Interventions, Order, UntrainedCopy

pytestmark = pytest.mark.usefixtures("one_thread")


def without(model, kind, blocks, pictures, size):
    """The model's output without some blocks or parts of them."""
    plan = discover_plan(model, size)
    places = Places.of(model, plan, [kind], size)
    assert [places.refusal(kind, block) for block in blocks] == [""] * len(blocks)
    with edited(model, plan, places.edit(kind, blocks)):
        return output(model(pictures))


class Nothing(torch.nn.Module):
    def forward(self, x, **_):
        return torch.zeros_like(x)


def container(model):
    """Where the blocks of a model stand."""
    path = discover_plan(model, size_of(model)).blocks[0].rpartition(".")[0]
    return model.get_submodule(path)


def removed(model, blocks):
    """A copy in which blocks do not exist."""
    model = copy.deepcopy(model)
    each = container(model)
    for block in sorted(blocks, reverse=True):
        del each[block]
    return model


@pytest.mark.parametrize("blocks", [[0], [1], [2], [0, 2], [1, 2]], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_a_block_left_out_is_a_model_without_it_to_the_bit(name, blocks):
    model = made(name)
    pictures = images(3, size=size_of(model))
    with torch.no_grad():
        plain, expected = output(model(pictures)), output(removed(model, blocks)(pictures))
    found = without(model, "drop_block", blocks, pictures, size_of(model))
    assert torch.equal(found, expected)
    assert not torch.equal(found, plain)
    with torch.no_grad():
        assert torch.equal(output(model(pictures)), plain)  # and nothing stays behind


def test_attention_left_out_is_a_branch_of_zeros():
    model, pictures = small_vit(sharpness=6.0, depth=3), images(2, size=(64, 64))
    changed = copy.deepcopy(model)
    changed.blocks[1].attn = Nothing()
    with torch.no_grad():
        expected = changed(pictures)
    assert torch.equal(without(model, "drop_attention", [1], pictures, (64, 64)), expected)


def test_a_block_whose_branches_have_no_weight_changes_no_bit():
    model, pictures = small_vit(sharpness=6.0, depth=3, init_values=1.0), images(2, size=(64, 64))
    with torch.no_grad():
        model.blocks[1].ls1.gamma.zero_(), model.blocks[1].ls2.gamma.zero_()
        plain = model(pictures)
    assert torch.equal(without(model, "drop_block", [1], pictures, (64, 64)), plain)
    assert not torch.equal(without(model, "drop_block", [2], pictures, (64, 64)), plain)


@pytest.mark.parametrize("name", ["timm", "timm-layer-scale", "torchvision", "hf-sdpa", "hf-eager", "multi-head"])
def test_an_mlp_left_out_is_the_stream_after_the_attention_to_the_bit(name):
    model = made(name)
    pictures, seen = images(3, size=size_of(model)), {}
    plan = discover_plan(model, size_of(model))
    middle, after = model.get_submodule(plan.middles[1].path), model.get_submodule(plan.blocks[2])
    handles = [
        middle.register_forward_pre_hook(lambda m, args: seen.__setitem__("middle", args[0].clone())),
        after.register_forward_pre_hook(lambda m, args: seen.__setitem__("next", args[0].clone())),
    ]
    without(model, "drop_mlp", [1], pictures, size_of(model))
    assert torch.equal(seen["middle"], seen["next"])
    for handle in handles:
        handle.remove()
    if name.startswith("timm"):
        changed = copy.deepcopy(model)
        changed.blocks[1].mlp = Nothing()
        with torch.no_grad():
            expected = output(changed(pictures))
        assert torch.equal(without(model, "drop_mlp", [1], pictures, size_of(model)), expected)


class WritesIntoItsInput(Matmul):
    """Attention that overwrites what it was given."""

    def forward(self, x):
        out = super().forward(x)
        x.zero_()
        return out


def test_what_entered_a_block_stays_when_the_block_writes_into_it():
    model, pictures = toy(WritesIntoItsInput, 3), images(2)
    for block in model.blocks:
        block.norm1 = torch.nn.Identity()  # attention is given the stream itself
    with torch.no_grad():
        expected = removed(model, [1])(pictures)
    assert torch.equal(without(model, "drop_block", [1], pictures, size_of(model)), expected)


def test_what_changes_the_shape_of_the_stream_is_refused():
    model = timm.create_model("mvitv2_tiny", img_size=64, num_classes=3).eval()
    plan = discover_plan(model, (64, 64))
    streams = streams_of(model, plan, (64, 64))
    reasons = fixed_blocks(plan, streams)
    assert set(reasons) == {1, 3, 8}
    assert "256×96 to 64×192" in reasons[1]
    assert Places(plan, streams=streams).refusal("drop_block", 3) == reasons[3]
    assert Places(plan, streams=streams).refusal("drop_block", 4) == ""


def test_a_block_inside_a_stage_of_windows_is_left_out_like_any_other():
    model = timm.models.SwinTransformer(
        img_size=32, patch_size=4, window_size=4, embed_dim=16, depths=(2, 2), num_heads=(2, 2), num_classes=5
    ).eval()
    pictures = images(2, size=(32, 32))
    changed = copy.deepcopy(model)
    del changed.layers[1].blocks[0]
    with torch.no_grad():
        expected = changed(pictures)
    assert torch.equal(without(model, "drop_block", [2], pictures, (32, 32)), expected)


def test_a_tied_block_is_left_out_where_it_is_called_and_not_elsewhere():
    model = toy(Matmul, 1)
    block, pictures = model.blocks[0], images(2)
    model.blocks.extend([block, block])
    plan = discover_plan(model, size_of(model))
    assert [block_call(plan, b) for b in range(3)] == [("blocks.0", 0), ("blocks.0", 1), ("blocks.0", 2)]
    shorter = copy.deepcopy(model)
    del shorter.blocks[2]
    with torch.no_grad():
        expected = shorter(pictures)
    assert torch.equal(without(model, "drop_block", [1], pictures, size_of(model)), expected)


def test_an_empty_edit_changes_nothing():
    model, pictures = small_vit(depth=2), images(2, size=(64, 64))
    plan = discover_plan(model, (64, 64))
    with torch.no_grad():
        plain = model(pictures)
    with edited(model, plan, Edit()):
        assert torch.equal(model(pictures), plain)


# ---- orders ----


@pytest.fixture(scope="module")
def model():
    return small_vit(sharpness=6.0, depth=4)


@pytest.fixture(scope="module")
def digits():
    return open_data("bundled:digits", limit=24)


@pytest.fixture(scope="module")
def found(model, digits):
    return cp.intervene(model, digits, drop=("block", "attention"), window=2)


@torch.no_grad()
def logits(model, digits, gone=()):
    transform = resolve(model).preprocess.transform
    model = copy.deepcopy(model)
    for block in sorted(gone, reverse=True):
        del model.blocks[block]
    return model(torch.stack([transform(digits[i]) for i in range(len(digits))])).double()


def greedy(model, digits, rows, steps):
    plain, gone = logits(model, digits)[rows], []
    for _ in range(steps):
        left = [b for b in range(4) if b not in gone]
        costs = [kl_divergence(plain, logits(model, digits, [*gone, b])[rows]).mean() for b in left]
        gone.append(left[int(np.argmin(costs))])
    return tuple(gone)


def test_the_order_is_the_greedy_one_of_models_without_the_blocks(model, digits, found):
    order, images = found.orders["drop_block"][GREEDY], found.images
    assert order.blocks == greedy(model, digits, torch.from_numpy(images["chose"]), 3)
    plain = logits(model, digits)
    for step, gone in enumerate(prefixes(order.blocks)):
        other = logits(model, digits, gone)
        for part, effects in (("chose", order.chosen), ("settled", order.settled), ("priced", order.priced)):
            rows = torch.from_numpy(images[part])
            assert effects[step].blocks == gone
            assert effects[step].kl == pytest.approx(kl_divergence(plain[rows], other[rows]).mean(), rel=1e-4)
            same = (plain.argmax(1) == other.argmax(1))[rows].double().mean()
            assert effects[step].agreement == pytest.approx(float(same))


def test_the_order_of_influence_is_that_of_the_images_that_choose(digits):
    model = small_vit(sharpness=6.0, depth=4, init_values=1.0)
    with torch.no_grad():
        model.blocks[1].ls1.gamma.zero_(), model.blocks[1].ls2.gamma.zero_()
    found = cp.intervene(model, digits, drop=("block", "mlp"))
    measured = cp.analyze(model, digits, metrics=["block-influence", "block-influence@mlp"], null_images=0)
    assert measured.images["names"].tolist() == found.images["names"].tolist()
    assert np.all(measured.images["block-influence"][:, 1] == 0)  # γ = 0: no token turns, and nothing is lost
    assert found.single["drop_block"][1].kl == 0
    for kind, name in (("drop_block", "block-influence"), ("drop_mlp", "block-influence@mlp")):
        means = measured.images[name][found.images["chose"]].mean(0)
        assert found.orders[kind]["influence"].blocks == tuple(np.argsort(means)[:3].tolist())
    assert found.orders["drop_block"][GREEDY].blocks[0] == 1
    assert "By their influence" in " ".join(verdicts(found)[0].sentences)


def test_every_image_has_one_part_in_an_order(found):
    parts = np.stack([found.images[part] for part in ("chose", "settled", "priced")])
    assert parts.sum(0).tolist() == [1] * 24
    assert parts.sum(1).tolist() == [8, 8, 8]
    assert found.run["order_images"] == {"chose": 8, "settled": 8, "priced": 8}


def test_parts_are_the_same_in_any_order_of_the_names_and_differ_by_seed():
    names = [f"{i}.png" for i in range(3000)]
    one, other = Parts.of(names, 0), Parts.of(names[::-1], 0)
    assert one == other
    assert (len(one.choosing), len(one.settling)) == (256, 512)
    assert not one.choosing & one.settling
    assert one != Parts.of(names, 1)
    assert Parts.of(names[: FEWEST - 1], 0) == Parts()


def test_single_blocks_windows_and_what_is_kept(model, digits, found):
    assert [e.blocks for e in found.single["drop_block"]] == [(0,), (1,), (2,), (3,)]
    assert [e.blocks for e in found.windows["drop_attention"]] == [(0, 1), (1, 2), (2, 3)]
    assert found.cumulative["drop_block"] == ()
    plain, other = logits(model, digits), logits(model, digits, [1, 2])
    assert found.windows["drop_block"][1].kl == pytest.approx(kl_divergence(plain, other).mean(), rel=1e-4)
    half = cp.intervene(model, digits, drop="block", keep=2)
    assert half.orders["drop_block"][GREEDY].blocks == found.orders["drop_block"][GREEDY].blocks[:2]
    some = cp.intervene(model, digits, drop="block", blocks=[0, 2])
    assert set(some.orders["drop_block"][GREEDY].blocks) == {0, 2}


def test_of_too_few_images_no_order_is_made(model, digits):
    few = cp.intervene(model, digits.subset(FEWEST - 1), drop="block")
    assert few.orders == {}
    assert few.single["drop_block"][0].kl is not None
    assert verdicts(few)[0].case == dropping.NO_ORDER
    assert render(few)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"drop": "half"}, "block, attention, mlp"),
        ({"drop": "block", "window": 5}, "no 5 consecutive blocks"),
        ({"drop": "block", "window": 0}, "window of 1 block"),
        ({"drop": "block", "keep": -1}, "0 blocks or more"),
        ({"drop": "block", "keep": 4}, "fewer blocks to keep than the model has, 4; came 4"),
        ({"drop": "mlp", "keep": 9}, "fewer blocks to keep than the model has, 4; came 9"),
        ({"window": 2}, "nothing is dropped"),
        ({"keep": 2}, "nothing is dropped; came 2 to keep"),
    ],
)
def test_what_cannot_be_dropped_is_told(model, digits, options, said):
    with pytest.raises(SettingError, match=said):
        cp.intervene(model, digits, **options)


def test_the_folder_holds_orders_and_windows(found, tmp_path):
    found.save(tmp_path / "out")
    back = Interventions.load(tmp_path / "out")
    assert back.orders == found.orders
    assert back.windows == found.windows
    assert back.to_json() == found.to_json()
    table = found.frame()
    priced = table[(table.kind == "drop_block") & (table.how == "greedy, priced")]
    assert [len(blocks.split()) for blocks in priced.blocks] == [1, 2, 3]
    parts = {f"{how}, {part}" for how in ("greedy", "influence") for part in ("chosen", "settled", "priced")}
    assert {*table.how} == {"single", "windows", *parts}


def test_a_stopped_run_goes_on_with_its_order(model, digits, found, tmp_path):
    steps = []

    def stop(text):
        steps.append(text)
        if text.startswith("2 of 3"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cp.intervene(model, digits, drop=("block", "attention"), window=2, save_to=tmp_path, save_every=0, report=stop)
    assert {path.name.partition("-all")[0] for path in (tmp_path / ".state").iterdir()} >= {"drop_block-0", "drop_block-1"}
    again = cp.intervene(model, digits, drop=("block", "attention"), window=2, save_to=tmp_path, resume=True)
    assert again.orders == found.orders
    again.save(tmp_path)
    assert not (tmp_path / ".state").exists()


# ---- sentences ----


def effect(blocks, agreement, low, high, change=None):
    ends = None if change is None else (change - 0.01, change + 0.02)
    accuracy = {} if change is None else {"accuracy": 0.9, "accuracy_change": change, "accuracy_change_ci95": ends}
    return Effect("drop_block", blocks, kl=0.1, agreement=agreement, agreement_ci95=(low, high), **accuracy)


def told(found, settled, priced):
    order = Order((3, 1), settled, settled, priced)
    some = replace(found, orders={"drop_block": {GREEDY: order}}, single={"drop_block": found.single["drop_block"]}, windows={})
    (answer,) = verdicts(some)
    return some, answer


def test_the_headline_names_blocks_price_and_how_sure(found):
    sure = [effect((3,), 1.0, 0.97, 1.0, -0.001), effect((1, 3), 0.98, 0.96, 0.99, -0.004)]
    some, answer = told(found, sure, sure)
    assert some.orders["drop_block"][GREEDY].spared == 2
    assert headline([answer], some) == (
        "Blocks 1 and 3 of 4 can go for 0.4 points of accuracy (95 % CI [−1.6, 1.4]); the price was measured on 8 images that "
        "had no part in the choice."
    )
    assert answer.case == dropping.SOME
    assert "the whole interval lies at or above 95 %" in answer.sentences[1]
    assert headline([answer], some) in render(some)


def test_what_the_other_images_do_not_bear_out_is_said(found):
    settled = [effect((3,), 1.0, 0.97, 1.0), effect((1, 3), 0.94, 0.92, 0.96)]
    unsure, answer = told(found, settled, [effect((3,), 0.96, 0.94, 0.98), effect((1, 3), 0.9, 0.8, 0.94)])
    assert headline([answer], unsure).startswith(
        "Block 3 of 4 can perhaps go for 4.0 % of the top answers (95 % CI [2.0, 6.0])"
    )
    assert answer.case == dropping.UNSURE
    refuted, answer = told(found, settled, [effect((3,), 0.9, 0.85, 0.94), effect((1, 3), 0.9, 0.8, 0.94)])
    assert "cannot go" in headline([answer], refuted)
    assert answer.case == dropping.NONE


def test_where_no_block_can_go_the_cheapest_is_named(found):
    dear = [effect((3,), 0.8, 0.7, 0.9), effect((1, 3), 0.6, 0.5, 0.7)]
    some, answer = told(found, dear, dear)
    assert headline([answer], some) == (
        "None of the blocks can go: without block 3, which costs least, 80.0 % (95 % CI [70.0, 90.0]) of the top answers stay, "
        "on 8 images that had no part in the choice."
    )
    assert answer.case == dropping.NONE


def test_settled_is_what_loses_half_of_what_may_be_lost_however_many_the_images():
    all_kept, one_lost = effect((3,), 1.0, 0.7, 1.0), effect((1, 3), 0.9, 0.6, 0.98)
    few_lost = effect((3,), 0.98, 0.91, 0.996)
    assert Order((3,), (), (few_lost,), (few_lost,)).spared == 1
    assert Order((3, 1), (), (all_kept, one_lost), (all_kept, one_lost)).spared == 1
    assert Order((3, 1), (), (one_lost, all_kept), (one_lost, all_kept)).spared == 0


@pytest.mark.parametrize(
    ("weights", "settled", "copy_keeps", "learned"),
    [
        ("file", 1.0, (0.3, 0.2, 0.4), True),
        ("file", 1.0, (0.9, 0.7, 0.98), False),  # the interval of the copy holds 95 %
        ("file", 1.0, (0.97, 0.9, 1.0), False),
        ("file", 0.2, (0.1, 0.0, 0.3), False),  # no block can go
        ("random (seed 0)", 1.0, (0.3, 0.2, 0.4), False),
    ],
)
def test_that_blocks_can_go_is_called_learned_only_where_it_can_be(found, weights, settled, copy_keeps, learned):
    each = [effect((3,), settled, settled - 0.01, settled), effect((1, 3), settled, settled - 0.01, settled)]
    twin = UntrainedCopy(8, 5, (effect((1, 3), *copy_keeps),))
    some = replace(found, model={**found.model, "weights": weights}, untrained=twin)
    _, answer = told(some, each, each)
    (said,) = (sentence for sentence in answer.sentences if "untrained copy" in sentence)
    assert said.endswith("so that these can go is learned.") == learned
