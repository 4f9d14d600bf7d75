"""Recipes: complete, plain, easy to vary; and those that come along can be built and forecast without network."""

from __future__ import annotations

import json

import pytest

from collapse_probe.errors import ModelError, SettingError, UnknownNameError
from collapse_probe.models.architecture import Architecture
from collapse_probe.models.fixes.apply import read_fix
from collapse_probe.models.vit import ViTSettings
from collapse_probe.registry import RECIPES
from collapse_probe.training.recipe import Augmentation, Recipe

TINY = ViTSettings(image_size=8, patch_size=2, classes=10, depth=2, width=16, heads=2, mlp_ratio=2.0)
RECIPE = Recipe(name="tiny", model=TINY, steps=100, warmup=10, batch_size=8)


@pytest.mark.parametrize("name", list(RECIPES))
def test_a_recipe_has_its_own_name_and_survives_json(name):
    recipe = RECIPES[name]()
    assert recipe.name == name
    assert recipe.about
    assert recipe.data
    assert RECIPES[name].__doc__
    assert Recipe.from_json(json.loads(json.dumps(recipe.to_json()))) == recipe


PARAMETERS = {
    "imagenet-deepvit-s": 27_312_632,
    "imagenet-deepvit-l": 58_883_708,
    "imagenet-deepvit-16b": 24_426_664,
    "imagenet-mhsa-16b": 24_423_784,
    "imagenet-deepvit-24b": 36_261_448,
    "imagenet-mhsa-24b": 36_257_128,
    "imagenet-deepvit-32b": 48_096_232,
    "imagenet-mhsa-32b": 48_090_472,
}


@pytest.mark.parametrize("name", PARAMETERS)
def test_imagenet_models_have_the_official_number_of_parameters(name):
    model = RECIPES[name]().architecture.build(0)
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS[name]


@pytest.mark.parametrize("kind", ["digits", "photos"])
@pytest.mark.parametrize("tied", [True, False])
def test_small_pairs_differ_in_re_attention_alone(kind, tied):
    middle = "-tied" if tied else ""
    plain, mixed = RECIPES[f"{kind}{middle}-mhsa"](), RECIPES[f"{kind}{middle}-re-attention"]()
    other = {key for key, value in plain.to_json().items() if mixed.to_json()[key] != value}
    assert other == {"name", "about", "architecture", "recalibrate"}
    assert mixed.vary(fix=None, recalibrate=0, name=plain.name, about=plain.about) == plain
    heads, depth = 4, plain.model.depth
    count = [sum(p.numel() for p in r.architecture.build(0).parameters()) for r in (plain, mixed)]
    assert count[1] - count[0] == depth * (heads * heads + heads + 2 * heads)


def test_the_tied_model_has_one_block():
    model = RECIPES["digits-tied-mhsa"]().architecture.build(0)
    assert model.blocks[23].attn.qkv.weight is model.blocks[0].attn.qkv.weight


def test_varying_reaches_model_recipe_and_fixes():
    varied = RECIPE.vary(depth=3, lr=1e-4, fix="re-attention:norm=layer", augmentation={"shift": 2})
    assert (varied.model.depth, varied.lr, varied.augmentation.shift) == (3, 1e-4, 2)
    assert varied.fixes == {"re-attention": {"norm": "layer"}}
    assert len(varied.architecture.build(0).fixes[0].blocks) == 3
    assert varied.vary(fix=None).fixes == {}
    assert RECIPE.model.depth == 2


def test_varying_a_timm_model_speaks_its_language():
    recipe = Recipe(name="t", model="timm:vit_tiny_patch16_224", steps=1).vary(
        depth=2, width=32, heads=2, image_size=32, classes=3, fix=["attn-scale", "feat-scale"]
    )
    model = recipe.architecture.build(0)
    assert (len(model.blocks), model.embed_dim, model.num_classes) == (2, 32, 3)
    assert [each.name for each in model.fixes] == ["attn-scale", "feat-scale"]
    with pytest.raises(SettingError, match="tied"):
        recipe.vary(tied=True)


def test_another_length_keeps_the_shares():
    longer = RECIPE.vary(steps=1000)
    assert longer.length(7) == (1000, 100, 0)
    assert RECIPE.vary(epochs=20).length(7) == (140, 14, 0)


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"dpeth": 3}, "depth"),
        ({"lr": -1.0}, "lr"),
        ({"warmup": 101}, "warmup"),
        ({"batch_size": 0}, "batch_size"),
        ({"batch_size": 7, "mixup": 0.8}, "even"),
        ({"amp": "float8"}, "amp"),
        ({"augmentation": {"shfit": 1}}, "shift"),
        ({"steps": 0}, "steps"),
        ({"width": 15}, "width"),
    ],
)
def test_impossible_recipes_are_refused(changes, word):
    with pytest.raises(SettingError, match=word):
        RECIPE.vary(**changes)


@pytest.mark.parametrize("changes", [{"fix": "re-atention"}, {"penalty": {"patch-cosin": 1.0}}])
def test_unknown_names_are_answered_with_the_nearest(changes):
    with pytest.raises(UnknownNameError, match="did you mean"):
        RECIPE.vary(**changes)


def test_only_models_that_can_be_trained_here():
    with pytest.raises(ModelError, match="timm"):
        Architecture(model="hf:google/vit").build(0)


def test_the_seed_alone_decides_the_weights():
    import torch

    one, same, other = (RECIPE.architecture.build(seed).head.weight for seed in (0, 0, 1))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


def test_reading_a_fix():
    assert read_fix("re-attention") == ("re-attention", {})
    with pytest.raises(SettingError, match="NAME:SETTING"):
        read_fix("re-attention:norm")


def test_by_picture_or_in_memory():
    assert not Augmentation(shift=1, flip=True).by_picture
    assert Augmentation(crop=0.08).by_picture


@pytest.mark.parametrize("name", [name for name in RECIPES if not name.startswith("imagenet")])
def test_small_recipes_know_the_classes_of_their_data(name):
    from collapse_probe.data.splits import split_data

    recipe = RECIPES[name]()
    assert len(split_data(recipe.data).classes) == recipe.model.classes


def test_the_embedding_can_be_drawn_like_the_rest():
    drawn = RECIPE.vary(embedding_std=0.5).architecture.build(0)
    assert float(drawn.pos_embed.detach().std()) == pytest.approx(0.5, rel=0.2)
    assert float(drawn.patch_embed.proj.weight.detach().std()) == pytest.approx(0.5, rel=0.2)
    assert not drawn.patch_embed.proj.bias.any()
    assert float(RECIPE.architecture.build(0).pos_embed.detach().std()) < 0.03
