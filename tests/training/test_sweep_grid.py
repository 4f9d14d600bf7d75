"""The grid of a sweep: values read from words, every combination once, folders that say what is in them."""

from __future__ import annotations

import pytest

from collapse_probe.errors import SettingError, UnknownNameError
from collapse_probe.registry import RECIPES
from collapse_probe.training.sweep_grid import cells, read_vary


@pytest.fixture
def recipe():
    return RECIPES["digits-quick"]()


@pytest.mark.parametrize(
    ("word", "name", "values"),
    [
        ("depth=8,16,24", "depth", [8, 16, 24]),
        ("fix=none,re-attention", "fix", [None, "re-attention"]),
        ("lr=1e-3, 5e-4", "lr", [1e-3, 5e-4]),
        ("betas=(0.9,0.95),None", "betas", [(0.9, 0.95), None]),
        (
            "fix=re-attention,['re-attention:norm=layer,eps=1','layer-scale']",
            "fix",
            ["re-attention", ["re-attention:norm=layer,eps=1", "layer-scale"]],
        ),
        ("tied=True,False", "tied", [True, False]),
    ],
)
def test_values_are_literals_or_none_or_text(word, name, values):
    assert read_vary(word) == (name, values)


@pytest.mark.parametrize("word", ["depth", "depth=", "depth=8,,16", "=8", "de pth=8", "depth=8,"])
def test_words_that_say_nothing_are_refused(word):
    with pytest.raises(SettingError, match="NAME=VALUE"):
        read_vary(word)


def test_every_combination_comes_once_and_a_whole_grid_before_the_next_seed(recipe):
    made = cells(recipe, {"depth": [2, 3], "fix": [None, "re-attention"]}, seeds=2, changes={"width": 16, "heads": 2})
    assert [cell.name for cell in made[:4]] == [
        "depth=2,fix=none,seed=0",
        "depth=2,fix=re-attention,seed=0",
        "depth=3,fix=none,seed=0",
        "depth=3,fix=re-attention,seed=0",
    ]
    assert [cell.seed for cell in made] == [0] * 4 + [1] * 4
    for cell in made:
        assert (cell.recipe.model.depth, cell.recipe.seed, cell.recipe.model.width) == (cell.values["depth"], cell.seed, 16)
        assert list(cell.recipe.fixes) == ([] if cell.values["fix"] is None else ["re-attention"])


def test_seeds_count_from_the_seed_that_was_set(recipe):
    assert [cell.seed for cell in cells(recipe, {}, seeds=2, changes={"seed": 5})] == [5, 6]


def test_changes_that_fit_only_in_another_order_are_made(recipe):
    made = cells(recipe, {"heads": [5], "width": [20, 40]})
    assert [(cell.recipe.model.heads, cell.recipe.model.width) for cell in made] == [(5, 20), (5, 40)]


def test_a_folder_name_holds_no_letter_that_a_file_system_or_an_address_would_take_amiss(recipe):
    made = cells(recipe, {"fix": ["re-attention:norm=layer", None]})
    assert made[0].name == "fix=re-attention-norm=layer,seed=0"


@pytest.mark.parametrize(
    ("vary", "seeds", "changes", "said"),
    [
        ({"dpeth": [2]}, 1, {}, "did you mean depth"),
        ({"depth": [2, 2]}, 1, {}, "given twice"),
        ({"depth": []}, 1, {}, "list of values"),
        ({"depth": "24"}, 1, {}, "list of values"),
        ({"depth": [2]}, 0, {}, "number of seeds"),
        ({"seed": [1, 2]}, 1, {}, "--seeds"),
        ({"depth": [2, 3]}, 1, {"depth": 4}, "leave one of the two out"),
        ({"width": [16, 15]}, 1, {}, "no multiple of heads"),
    ],
)
def test_a_grid_that_cannot_be_is_refused_before_anything_runs(recipe, vary, seeds, changes, said):
    with pytest.raises(SettingError, match=said):
        cells(recipe, vary, seeds, changes)


def test_an_unknown_fix_is_refused_with_the_nearest_name(recipe):
    with pytest.raises(UnknownNameError, match="re-attention"):
        cells(recipe, {"fix": ["re-atention"]})


def test_two_cells_never_share_a_folder(recipe):
    with pytest.raises(SettingError, match="share the folder"):
        cells(recipe, {"about": ["one/two", "one:two"]})
    with pytest.raises(SettingError, match="too long"):
        cells(recipe, {"about": ["a" * 250]})
