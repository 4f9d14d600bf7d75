"""The drift of patch similarities between two models: a slow reference, its chance level, and a training's checkpoints."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from collapse_probe.cli.main import main
from factories import photographs, small_vit

from collapse_probe.analysis.analyze import analyze
from collapse_probe.analysis.compare import compare
from collapse_probe.analysis.comparison import gram_drift as drift
from collapse_probe.analysis.comparison.gram_drift import gram_drift
from collapse_probe.capture.capture import discover_plan, record
from collapse_probe.data.images import open_data
from collapse_probe.errors import DataError, SettingError
from collapse_probe.models.loading import resolve
from collapse_probe.report.comparison.figures import draw_all
from collapse_probe.results.comparison import Comparison

NAME = "timm:vit_tiny_patch16_224"
SHAPE = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return photographs(tmp_path_factory.mktemp("pictures"), count=7, side=40)


def model(seed=0, **more):
    return small_vit(seed, **{**SHAPE, **more})


def patches_of(vit, pixels):
    plan = discover_plan(vit, (32, 32))
    with torch.no_grad(), record(vit, plan) as recordings:
        vit(pixels)
    trace = recordings.take()
    return np.stack([trace.patches(depth).double().numpy() for depth in range(len(trace.tokens))], 1)


def gram(x):
    unit = x / np.linalg.norm(x, axis=-1, keepdims=True)
    return np.maximum(unit @ unit.T, 0)


def noise(count=6):
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def test_drift_and_chance_level_against_the_slow_way():
    one, other, pixels = model(), model(1, embed_dim=16), noise()
    found = gram_drift(resolve(one), resolve(other), [pixels[:4], pixels[4:]], device="cpu")
    s, t = patches_of(one, pixels), patches_of(other, pixels)
    every = np.array([[[np.mean((gram(s[a, d]) - gram(t[b, d])) ** 2) for d in range(3)] for b in range(6)] for a in range(6)])
    own = every[range(6), range(6)]
    assert found.values == pytest.approx(own.mean(0), abs=1e-6)
    assert found.stderr == pytest.approx(own.std(0, ddof=1) / np.sqrt(6), abs=1e-6)
    assert found.nulls.values["other_image"] == pytest.approx(every[~np.eye(6, dtype=bool)].mean(0), abs=1e-6)
    assert found.details["images"] == 6


def test_a_model_has_not_moved_from_itself_and_a_rotation_is_no_move(pictures):
    one = resolve(model())
    same = gram_drift(one, one, open_data(str(pictures)), batch_size=3, device="cpu")
    assert same.values.tolist() == [0.0, 0.0, 0.0]
    assert (same.nulls.values["other_image"] > 0).all()


def test_only_a_changed_block_and_those_behind_it_move(pictures):
    changed = copy.deepcopy(model())
    with torch.no_grad():
        changed.blocks[1].mlp.fc2.weight.mul_(-4)
    values = gram_drift(resolve(model()), resolve(changed), open_data(str(pictures)), device="cpu").values
    assert values[:2].tolist() == [0.0, 0.0]
    assert values[2] > 1e-4


def test_models_that_cannot_be_set_depth_by_depth_say_why(pictures):
    images = open_data(str(pictures))
    deeper = gram_drift(resolve(model()), resolve(model(depth=3)), images, device="cpu")
    assert deeper.not_applicable == "the first has 3 depths and this one 4: which belong together is not known"
    finer = gram_drift(resolve(model()), resolve(model(patch_size=4)), images, device="cpu")
    assert finer.not_applicable == "no depth has the same patches in both"


def test_other_images_are_left_out_where_their_sums_are_too_large(pictures, monkeypatch):
    monkeypatch.setattr(drift, "STATE_BYTES", 1)
    found = gram_drift(resolve(model()), resolve(model(1)), open_data(str(pictures)), device="cpu")
    assert found.nulls.values["other_image"] is None
    assert "256 MiB" in found.nulls.reasons["other_image"]
    assert (found.values > 0).all()


def test_no_image_is_an_error():
    with pytest.raises(DataError):
        gram_drift(resolve(model()), resolve(model(1)), [], device="cpu")


def checkpoints(folder):
    """A training of three steps whose patch similarities move further and further."""
    vit = model(num_classes=5)
    generator = torch.Generator().manual_seed(1)
    steps = [torch.randn(p.shape, generator=generator) * 0.05 for p in vit.parameters()]
    for epoch in range(3):
        torch.save(vit.state_dict(), folder / f"epoch-{epoch}.pth")
        with torch.no_grad():
            for parameter, step in zip(vit.parameters(), steps, strict=True):
                parameter.add_(step)
    return folder


def test_a_folder_of_checkpoints_is_set_against_its_first(pictures, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run").mkdir()
    folder = checkpoints(tmp_path / "run")
    kwargs = "patch_size=8 embed_dim=32 depth=2 num_heads=2 num_classes=5"
    words = ["--img-size", "32", "--model-kwargs", kwargs, "--null-images", "0", "-q", "--device", "cpu", "-o", "out"]
    metrics = ["--metric", "cls-patch-similarity", "--gram-drift"]
    with pytest.raises(SystemExit) as stop:
        main(["compare", str(folder), "-m", NAME, "--data", str(pictures), *metrics, *words])
    assert (stop.value.code, capsys.readouterr().err) == (0, "")
    found = Comparison.load("out")
    moved = [found.subjects[f"epoch-{i}"].metrics["gram-drift"].values[-1] for i in (1, 2)]
    assert 0 < moved[0] < moved[1]
    assert "gram-drift" not in found.subjects["epoch-0"].metrics
    assert [len(each.metrics["cls-patch-similarity"].values) for each in found.subjects.values()] == [3, 3, 3]
    assert "cls-patch-similarity" in found.pairs[0].differences
    assert Path("out/figures/gram-drift.svg").exists()
    assert 'id="gram-drift"' in Path("out/report.html").read_text(encoding="utf-8")
    assert "gram-drift" in draw_all(found)


def test_findings_have_no_patches_to_set_a_model_against():
    found = analyze(model(), [noise()], metrics=("patch-diversity",), null_images=0, gallery_images=0, device="cpu")
    with pytest.raises(SettingError, match="drift of patch similarities is taken between the first subject and others"):
        compare({"one": found, "other": model()}, "bundled:digits", gram_drift=True)
