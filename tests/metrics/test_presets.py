"""Presets: every choice is fixed and said, two of them run in one pass, and the findings keep what they were."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from factories import photographs, plan_for, readings, small_vit, trace_of

import collapse_probe as cp
from collapse_probe.analysis.measurement import accumulators_for
from collapse_probe.errors import SettingError, UnknownNameError
from collapse_probe.metrics.attention.whole_map_similarity import head_cosine
from collapse_probe.metrics.metric import make
from collapse_probe.metrics.presets import records, with_presets
from collapse_probe.registry import METRICS, PRESETS

NAMES = [
    "anti-oversmoothing",
    "attention-sinks",
    "deepvit",
    "diverse-vit",
    "entropy-collapse",
    "massive-activations",
    "patch-diversification",
    "rank-collapse",
    "rank-collapse-in-width",
    "rankme",
    "raptor",
    "redundant-depth",
    "registers",
]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return str(photographs(tmp_path_factory.mktemp("presets") / "pictures", count=5, side=64))


@pytest.fixture(scope="module")
def both(pictures):
    return cp.analyze(small_vit(), pictures, img_size=64, presets=("deepvit", "registers"), null_images=0, gallery_images=0)


def test_the_presets_of_the_literature_are_there():
    assert list(PRESETS) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_a_preset_says_what_it_is_and_who_made_each_choice(name):
    preset = PRESETS[name]
    assert preset.name == name
    assert preset.version == "1"
    assert "arXiv" in preset.paper
    assert preset.code
    assert preset.follows in ("paper", "code")
    assert {choice.follows for choice in preset.choices} <= {"paper", "code", "our reading"}
    assert any(choice.follows == preset.follows for choice in preset.choices)
    assert len({choice.choice for choice in preset.choices}) == len(preset.choices)
    json.dumps(preset.record())


@pytest.mark.parametrize("name", NAMES)
def test_the_settings_of_a_preset_are_those_that_its_metrics_run_with(name):
    plan = plan_for(3, 2, 5, prefix=(0,))
    for metric, settings in PRESETS[name].metrics.items():
        assert make(metric, plan).settings == dict(settings), f"{metric} has changed: give {name} a new version"


def test_equal_names_mean_equal_settings_in_all_presets():
    seen = {}
    for preset in PRESETS.values():
        for metric, settings in preset.metrics.items():
            assert seen.setdefault(metric, dict(settings)) == dict(settings)


def test_presets_add_to_metrics_and_name_each_once():
    asked = with_presets(("patch-diversity", "layer-cka"), ("patch-diversification", "entropy-collapse", "diverse-vit"))
    assert asked[:3] == ("patch-diversity", "layer-cka", "attention-entropy")
    assert len(set(asked)) == len(asked)
    assert with_presets((), ()) == ()


def test_a_wrong_preset_is_answered_with_the_nearest():
    with pytest.raises(UnknownNameError, match="did you mean 'deepvit'"):
        with_presets((), ("deep-vit",))
    with pytest.raises(SettingError, match="a sequence of names"):
        with_presets((), "deepvit")


def test_two_presets_run_in_one_pass_and_nothing_else_runs(both, pictures):
    assert list(both.metrics) == [*PRESETS["deepvit"].metrics, *PRESETS["registers"].metrics]
    assert both.data["images"] == 5
    for name in ("deepvit", "registers"):
        alone = cp.analyze(small_vit(), pictures, img_size=64, presets=(name,), null_images=0, gallery_images=0)
        assert list(alone.metrics) == list(PRESETS[name].metrics)
        for metric, reading in alone.metrics.items():
            np.testing.assert_array_equal(reading.values, both.metrics[metric].values)


def test_presets_that_need_the_same_sums_share_them():
    plan = plan_for(3, 2, 5, prefix=(0,))
    folds = [
        len(accumulators_for({name: make(name, plan) for name in with_presets((), chosen)}, torch.device("cpu")))
        for chosen in (("diverse-vit",), ("patch-diversification",), ("diverse-vit", "patch-diversification"))
    ]
    assert folds[2] < folds[0] + folds[1]


def test_metrics_beside_a_preset_both_run(pictures):
    options = {"img_size": 64, "null_images": 0, "gallery_images": 0}
    found = cp.analyze(small_vit(), pictures, metrics=("token-rank",), presets=("registers",), **options)
    assert list(found.metrics) == ["token-rank", *PRESETS["registers"].metrics]


def test_the_findings_keep_the_record_of_every_preset(both, tmp_path):
    both.save(tmp_path / "out")
    back = cp.Findings.load(tmp_path / "out")
    assert list(back.presets) == ["deepvit", "registers"]
    assert back.presets == json.loads(json.dumps(records(("deepvit", "registers"))))
    assert back.presets["deepvit"]["version"] == "1"
    assert "2103.11886" in back.presets["deepvit"]["source"]["paper"]
    assert {"choice", "value", "follows"} == set(back.presets["deepvit"]["choices"][0])
    assert all(name in back.metrics for name in back.presets["registers"]["metrics"])


def test_every_preset_measures_a_plain_vit_with_its_twin(pictures):
    model = "timm:vit_tiny_patch16_224"
    kwargs = {"depth": 4, "embed_dim": 32, "num_heads": 2}
    options = {"pretrained": False, "img_size": 64, "model_kwargs": kwargs, "null_images": 5, "gallery_images": 0}
    found = cp.analyze(model, pictures, presets=tuple(NAMES), **options)
    for name, reading in found.metrics.items():
        assert reading.not_applicable is None, name
        assert np.isfinite(reading.values).any(), name
        assert reading.nulls.values["untrained"] is not None, name


def exit_code(words):
    from collapse_probe.cli.main import main

    with pytest.raises(SystemExit) as ended:
        main(words)
    return ended.value.code


def test_presets_on_the_command_line(pictures, capsys):
    model = ["-m", "timm:vit_tiny_patch16_224", "--no-pretrained", "--img-size", "64"]
    model += ["--model-kwargs", "depth=2 embed_dim=32 num_heads=2"]
    words = ["analyze", *model, "--data", pictures, "--null-images", "0", "-q", "--json=full"]
    assert exit_code([*words, "--preset", "entropy-collapse", "--preset", "registers"]) == 0
    content = json.loads(capsys.readouterr().out)
    assert list(content["metrics"]) == ["attention-entropy", "token-norm@150", "token-norm@outliers", "token-norm"]
    assert list(content["presets"]) == ["entropy-collapse", "registers"]


def test_ls_presets_has_a_line_for_each(capsys):
    assert exit_code(["ls", "presets"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == NAMES
    assert all("version 1; " in line and "arXiv" in line for line in lines)


def golden_maps():
    """A1 and A2 of two images, three heads and five tokens, [2, 2 blocks, 3, 5, 5]."""
    b, h, i, j = np.ogrid[:2, :3, :5, :5]
    one = 2 * np.sin(0.2 + 0.5 * b + 1.1 * h + 0.6 * i + 0.4 * j + 0.3 * i * j)
    two = 2 * np.cos(0.1 + 0.3 * b + 0.7 * h + 0.9 * i + 0.5 * j + 0.2 * i * j)
    logits = np.stack([one, two], axis=1)
    return np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)


def slow(maps):
    """Σ over head pairs, one cosine at a time, [B, L, H, N, N] -> [L, L]."""
    images, blocks, heads = maps.shape[:3]
    found = np.zeros((images, blocks, blocks))
    for image, p, q in np.ndindex(found.shape):
        for g, h in np.ndindex(heads, heads):
            x, y = maps[image, p, g].ravel(), maps[image, q, h].ravel()
            found[image, p, q] += abs(x @ y) / np.sqrt((x @ x) * (y @ y)) / heads**2
    return found.mean(0)


def test_whole_maps_give_the_worked_values_of_the_released_code():
    found = readings([trace_of(golden_maps())], ["whole-map-similarity"])["whole-map-similarity"].values
    assert found[0, 0] == pytest.approx(0.6994060092, abs=1e-7)
    assert [found[1, 0], found[0, 1]] == pytest.approx([0.5678343143] * 2, abs=1e-7)


def test_whole_maps_agree_with_a_slow_reading_of_signed_maps(monkeypatch):
    maps = golden_maps()
    signed = np.random.default_rng(5).normal(size=maps.shape)
    names = ["whole-map-similarity", "whole-map-similarity@probs"]
    found = readings([trace_of(maps, weights=signed)], names)
    assert found[names[0]].values == pytest.approx(slow(signed), abs=1e-6)
    assert found[names[1]].values == pytest.approx(slow(maps), abs=1e-6)
    monkeypatch.setattr("collapse_probe.metrics.attention.whole_map_similarity.MAP_BYTES", 1)  # one query at a time
    again = readings([trace_of(maps, weights=signed)], names)
    assert again[names[0]].values == pytest.approx(found[names[0]].values, abs=1e-6)


def test_whole_maps_of_one_matrix_are_alike_and_zero_maps_have_no_angle():
    same = np.broadcast_to(golden_maps()[:, :1, :1], (2, 3, 2, 5, 5)).copy()
    assert readings([trace_of(same)], ["whole-map-similarity"])["whole-map-similarity"].values == pytest.approx(1, abs=1e-6)
    assert torch.isnan(head_cosine(torch.zeros(1, 2, 1, 2))).all()
    assert head_cosine(torch.diag(torch.tensor([1.0, 0.0])).view(1, 2, 1, 2)).item() == 1


def test_whole_maps_are_entered():
    assert METRICS["whole-map-similarity"].collapsed == "high"
