"""The trained models that ship: what their files say, the bands in which they lie, and the story that follows from it."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from bundle_models import command_of, shrink

from collapse_probe.analysis.analyze import analyze
from collapse_probe.analysis.intervene import intervene
from collapse_probe.data.splits import split_data
from collapse_probe.models.model_file import load_model, read_card
from collapse_probe.models.sources.ours import FOLDER, MODELS, bundled_models, file_of
from collapse_probe.registry import RECIPES
from collapse_probe.report.demo import LABELS, PAIRS, Demonstration, chapters
from collapse_probe.report.intervention import dropping
from collapse_probe.training.recipe import Recipe

HELD_OUT = 64


@pytest.fixture(scope="module")
def found():
    images = split_data("bundled:digits").held_out.subset(HELD_OUT)
    return {name: analyze(f"ours:{name}", images, null_images=0, device="cpu") for name in MODELS}


def test_all_are_there_and_small():
    assert bundled_models() == list(MODELS)
    assert sum(path.stat().st_size for path in FOLDER.iterdir() if path.is_file()) < 4 * 2**20


@pytest.mark.parametrize("name", MODELS)
def test_each_says_how_it_was_made(name):
    facts = read_card(file_of(name)).facts
    account = json.loads((FOLDER / "spread.json").read_text())["models"][name]
    seed = account["shipped_seed"]
    stored = Recipe.from_json(facts["recipe"])
    assert stored == RECIPES[name]().vary(seed=seed)  # what has become a setting since stands at its default
    assert facts["recipe"].items() <= stored.to_json().items()
    assert stored.seed == seed
    assert f"train {name} --seed {seed}" in facts["command"]
    assert account["command"] == command_of(name, seed)
    assert {"torch", "timm"} <= set(facts["versions"])
    kappas = sorted(numbers["kappa_adjacent"] for numbers in account["seeds"].values())
    assert account["seeds"][str(seed)]["kappa_adjacent"] == kappas[1]
    assert account["seeds"][str(seed)]["accuracy"] == facts["accuracy"] > 0.95


def test_the_positive_control_has_collapsed(found):
    assert found["digits-tied-mhsa"].summary["kappa_adjacent"] > 0.9
    assert found["digits-tied-mhsa"].summary["attention_similarity_adjacent"] > 0.97


def test_re_attention_changes_weights_and_not_probs(found):
    numbers = found["digits-tied-re-attention"].summary
    assert abs(numbers["attention_similarity_adjacent"]) < 0.1
    assert numbers["attention_similarity_probs_adjacent"] > 0.9


def test_the_ordinary_model_is_near_uniform_and_not_collapsed(found):
    numbers = found["digits-mhsa"].summary
    assert numbers["kappa_adjacent"] < 0.35
    assert numbers["attention_similarity_adjacent"] > 0.8


def test_they_still_read_digits():
    images = split_data("bundled:digits").held_out
    for name in MODELS:
        model, card = load_model(file_of(name))
        transform = card.preprocess().transform
        pixels = torch.stack([transform(images[i]) for i in range(120)])
        with torch.no_grad():
            right = (model(pixels).argmax(1) == torch.tensor(images.labels[:120])).float().mean()
        assert right > 0.9, name


def test_rounding_keeps_what_float16_cannot_hold(tmp_path):
    from safetensors.torch import load_file

    shrink(file_of("digits-tied-re-attention"), tmp_path / "again.safetensors")
    held = load_file(tmp_path / "again.safetensors")
    assert held["blocks.0.attn.qkv.weight"].dtype == torch.float16
    assert held["blocks.3.attn.var_norm.running_var"].dtype == torch.float32
    assert held["blocks.3.attn.reatten_matrix.weight"].dtype == torch.float32


class Shown:
    """A subject with nothing but a summary."""

    def __init__(self, summary):
        self.summary = summary


@pytest.fixture(scope="module")
def beside():
    """What the sinks of each model do and which blocks of one can go, on a few images."""
    few = split_data("bundled:digits").held_out.subset(12, 0)
    settings = {"metrics": ("sink-kind",), "null_images": 4, "gallery_images": 0}
    sinks = {
        pair: {label: analyze(f"ours:{name}", few, **settings) for label, name in zip(LABELS, names, strict=True)}
        for pair, names in PAIRS.items()
    }
    return {"sinks": sinks, "dropping": intervene("ours:digits-mhsa", few, drop=("block",), blocks=(21, 22, 23))}


def story(found, beside, **changes):
    numbers = {name: dict(f.summary) for name, f in found.items()}
    for name, change in changes.items():
        numbers[name.replace("_", "-")] |= change
    made = {pair: {"MHSA": Shown(numbers[a]), "Re-attention": Shown(numbers[b])} for pair, (a, b) in PAIRS.items()}
    held = {pair: dataclasses.make_dataclass("Held", ["subjects"])(subjects) for pair, subjects in made.items()}
    return chapters(Demonstration(held, {}, **beside))


def test_the_story_follows_the_numbers(found, beside):
    assert "attends alike throughout" in story(found, beside)["What collapse looks like"][0]
    low = {"kappa_adjacent": 0.4}
    assert "read it with care" in story(found, beside, digits_tied_mhsa=low)["What collapse looks like"][0]
    assert "blocks still attend alike" in story(found, beside)["What Re-attention does, and where"][0]
    high = {"attention_similarity_adjacent": 0.5}
    assert (
        "still attend alike" not in story(found, beside, digits_tied_re_attention=high)["What Re-attention does, and where"][0]
    )
    assert "near-uniform maps are alike" in story(found, beside)["What an ordinary ViT shows"][0]
    shared = {"kappa_adjacent": 0.8}
    assert "do share attention" in story(found, beside, digits_mhsa=shared)["What an ordinary ViT shows"][0]


def test_the_story_tells_which_blocks_can_go_and_what_the_sinks_do(found, beside):
    chapters = story(found, beside)
    assert dropping.answer(beside["dropping"], "drop_block") in chapters["Which blocks can go"][0]
    assert "of these 3 can be left out" in chapters["Which blocks can go"][1]
    counts = beside["sinks"]["ordinary ViT"]["Re-attention"].metrics["sink-kind"].details["per_image"]
    assert f"Re-attention (ordinary ViT) {sum(counts.values()):.2f}, of them" in chapters["What the sinks do"][0]
    assert "Untrained copies have" in chapters["What the sinks do"][0]
