"""Edits of attention sinks: a value edit changes A_:p (v' − v_p) and no more, only heads with a sink are touched."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
from factories import small_vit

import collapse_probe as cp
from collapse_probe.analysis.intervene import EDITS
from collapse_probe.capture.capture import discover_plan
from collapse_probe.capture.edits.places import Given, Places, edited
from collapse_probe.capture.edits.sinks import SinkEdit, SinkValues, sinks_in
from collapse_probe.capture.edits.streams import Drawn
from collapse_probe.data.images import open_data
from collapse_probe.errors import SettingError
from collapse_probe.report.intervention.page import render
from collapse_probe.report.intervention.tokens import NO_SINKS
from collapse_probe.report.intervention.verdict import WORDS, headline, verdicts

pytestmark = pytest.mark.usefixtures("one_thread")
KINDS = ("zero", "mean", "donor", "redirect")


def attention(images=4, heads=3, tokens=9, width=5, sink_heads=(0, 2)):
    """Maps and values in float64; in `sink_heads` every query gives one key, another in each image, most of its attention."""
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(images, heads, tokens, tokens, generator=g, dtype=torch.float64)
    for image in range(images):
        for head in sink_heads:
            logits[image, head, :, 1 + (image + head) % 4] += 6
    return logits.softmax(-1), torch.randn(images, heads, tokens, width, generator=g, dtype=torch.float64)


OTHERS = torch.tensor([[7, 8], [6, 7]])


def test_sinks_are_the_keys_that_most_queries_give_half_their_attention():
    maps, _ = attention()
    key, sink = sinks_in(maps)
    assert sink.tolist() == [[True, False, True]] * 4
    assert key[:, 0].tolist() == [1, 2, 3, 4]
    for image in range(4):
        for head in range(3):
            s = int(maps[image, head].mean(0).argmax())
            assert int(key[image, head]) == s
            assert bool(sink[image, head]) == bool((maps[image, head, :, s] >= 0.5).double().mean() >= 0.9)


@pytest.mark.parametrize("control", [False, True])
@pytest.mark.parametrize("kind", ["zero", "mean", "donor"])
def test_a_value_edit_changes_the_update_by_what_each_query_gave_the_key_times_the_change(kind, control):
    maps, values = attention()
    means = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    new, added, sink, at = SinkEdit(kind, OTHERS, control, means).apply(maps, values)
    found = new @ values + (0 if added is None else added)
    key, _ = sinks_in(maps)
    for image in range(4):
        for head in range(3):
            expected = maps[image, head] @ values[image, head]
            if image < 2 and head != 1:
                p = int(OTHERS[image, 0]) if control else int(key[image, head])
                lent = p if control else int(key[image + 2, head])
                value = {
                    "zero": torch.zeros(5, dtype=torch.float64),
                    "mean": means[int(control), head],
                    "donor": values[image + 2, head, lent],
                }[kind]
                expected = expected + maps[image, head, :, p, None] * (value - values[image, head, p])
                assert int(at[image, head]) == p
            assert float((found[image, head] - expected).abs().max()) < 1e-8
    assert sink.tolist() == [[True, False, True]] * 2


def test_redirected_attention_goes_to_the_other_keys_in_proportion():
    maps, values = attention()
    new, added, _, at = SinkEdit("redirect", OTHERS).apply(maps, values)
    assert added is None
    torch.testing.assert_close(new.sum(-1), torch.ones_like(new.sum(-1)))
    assert float(new[0, 0, :, int(at[0, 0])].abs().max()) == 0
    others = [j for j in range(9) if j != int(at[0, 0])]
    torch.testing.assert_close(
        new[0, 0][:, others[0]] / new[0, 0][:, others[1]], maps[0, 0][:, others[0]] / maps[0, 0][:, others[1]]
    )
    assert torch.equal(new[0, 1], maps[0, 1])  # no sink there
    assert torch.equal(new[2:], maps[2:])  # donors keep theirs


def test_laws_of_donors_and_means():
    maps, values = attention(images=2)
    twice = torch.cat([maps, maps]), torch.cat([values, values])
    new, added, *_ = SinkEdit("donor", OTHERS).apply(*twice)  # itself
    torch.testing.assert_close((new @ twice[1] + added)[:2], maps @ values, rtol=0, atol=1e-12)
    constant = values.clone()
    constant[:] = constant[:1, :, :1]
    means = torch.stack([constant[0, :, 0]] * 2)
    new, added, *_ = SinkEdit("mean", OTHERS, means=means).apply(maps, constant)
    torch.testing.assert_close(new @ constant + added, maps @ constant, rtol=0, atol=1e-12)


def test_a_control_is_never_the_sink():
    maps, values = attention()
    key, _ = sinks_in(maps)
    others = torch.stack([key[:2, 0], torch.tensor([8, 8])], 1)
    *_, at = SinkEdit("zero", others, control=True).apply(maps, values)
    assert at[:, 0].tolist() == [8, 8]


def test_means_of_sinks_are_over_the_images_that_have_one():
    maps, values = attention(sink_heads=(0,))
    maps[3, 0] = 1 / 9  # no sink in this image
    found = SinkValues()
    found.add(4, maps[:2], values[:2], range(1, 9))
    found.add(4, maps[2:], values[2:], range(1, 9))
    assert found.counts[4].tolist() == [[3, 0, 0], [4, 4, 4]]
    key, _ = sinks_in(maps)
    torch.testing.assert_close(found.sums[4][0, 0], sum(values[i, 0, int(key[i, 0])] for i in range(3)))
    torch.testing.assert_close(found.sums[4][1], values[:, :, 1:].mean(2).sum(0))


def with_sinks():
    """A small model whose class token draws all attention in head 0 of block 1."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = timm.models.VisionTransformer(
            img_size=32, patch_size=8, depth=3, embed_dim=24, num_heads=2, num_classes=10, init_values=1.0
        ).eval()
        for parameter in model.parameters():
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=0.2)
    with torch.no_grad():
        attn = model.blocks[1].attn
        attn.qkv.weight[:12] = 0
        attn.qkv.bias[:12] = 1.0  # every query of head 0 is the same vector
        direction = model.blocks[1].norm1(model.blocks[0](model._pos_embed(torch.zeros(1, 16, 24))))[0, 0]
        attn.qkv.weight[24:36] = 4 * direction / direction.norm() ** 2 * direction.norm() ** 0.5
        attn.qkv.bias[24:36] = 0
        model.cls_token.mul_(8)
    return model


@pytest.fixture(scope="module")
def model():
    return with_sinks()


@pytest.fixture(scope="module")
def digits():
    return open_data("bundled:digits", limit=12)


@pytest.fixture(scope="module")
def found(model, digits):
    return cp.intervene(model, digits, sinks=EDITS, img_size=32)


def test_only_blocks_with_sinks_lose_anything(found):
    for kind in KINDS:
        effects = found.single[f"sinks_{kind}"]
        assert effects[1].sinks >= 1
        assert effects[1].kl > 0
        assert effects[1].moved > 0
        for effect in (effects[0], effects[2]):
            if effect.sinks == 0:
                assert (effect.kl, effect.moved) == (0, 0)  # to the bit
        assert found.single[f"sinks_{kind}_other"][1].sinks == effects[1].sinks


@torch.no_grad()
def test_zero_value_is_a_model_whose_head_gives_nothing_for_its_sink(model):
    pictures = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    plan = discover_plan(model, (32, 32))
    places = Places.of(model, plan, ["sinks_zero"], (32, 32))
    drawn = Drawn(torch.tensor([[3, 4]] * 3), torch.zeros(3, 0, 24))
    with edited(model, plan, places.edit("sinks_zero", [1]), Given(drawn=drawn)) as seen:
        out = model(pictures)
    changed = copy.deepcopy(model)

    def forward(x, attn_mask=None, **_):
        a = changed.blocks[1].attn
        q, k, v = a.qkv(x).reshape(3, 17, 3, 2, 12).permute(2, 0, 3, 1, 4)
        maps = (q @ k.mT * a.scale).softmax(-1)
        key, sink = sinks_in(maps)
        for image in range(3):
            for head in range(2):
                if sink[image, head]:
                    maps[image, head, :, key[image, head]] = 0
        return a.proj((maps @ v).transpose(1, 2).reshape(3, 17, 24))

    changed.blocks[1].attn.forward = forward
    torch.testing.assert_close(out, changed(pictures), rtol=1e-4, atol=1e-5)
    assert bool((seen.sinks.heads >= 1).all())


def test_batches_do_not_matter(model, digits, found):
    small = cp.intervene(model, digits, sinks=EDITS, img_size=32, batch_size=5)
    for kind, effects in found.single.items():
        for one, other in zip(effects, small.single[kind], strict=True):
            assert one.kl == pytest.approx(other.kl, rel=1e-3, abs=1e-9)
            assert one.sinks == other.sinks


def test_eager_attention_takes_edits_of_maps_and_says_why_not_of_values(model, digits, found):
    eager = copy.deepcopy(model)
    for block in eager.blocks:
        block.attn.fused_attn = False
    same = cp.intervene(eager, digits, sinks=("zero-value", "redirect"), img_size=32)
    for kind in ("sinks_zero", "sinks_redirect"):
        assert same.single[kind][1].kl == pytest.approx(found.single[kind][1].kl, rel=1e-3)
    with pytest.raises(SettingError, match="values are not those of a fused attention call"):
        cp.intervene(eager, digits, sinks="donor-value", img_size=32)
    with pytest.raises(SettingError, match="zero-value, mean-value, donor-value, redirect"):
        cp.intervene(eager, digits, sinks="zero")


def test_the_page_says_how_many_heads_were_edited(model, digits, found):
    every = verdicts(found)
    assert [answer.label for answer in every] == [f"sinks_{kind}" for kind in KINDS]
    assert all("heads of an image in block" in answer.sentences[0] for answer in every)
    assert headline(every, found) == "What sinks are worth"
    assert "sinks zero other" in render(found)
    only = verdicts(cp.intervene(model, digits, sinks="zero-value", img_size=32))
    assert any("zeros overstate" in caveat for caveat in only[0].caveats)


def test_without_a_sink_nothing_is_said_of_what_sinks_are_worth(digits):
    found = cp.intervene(small_vit(depth=2), digits, sinks="redirect")
    (answer,) = verdicts(found)
    assert answer.case == NO_SINKS
    assert headline([answer], found) == "No head of any block has a sink in any image"
    assert "needed" not in WORDS[answer.case]
