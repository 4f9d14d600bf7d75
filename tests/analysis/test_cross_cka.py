"""CKA of whole models: through `analyze`, between two of them, in two processes, and in `compare`."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from collapse_probe.cli.main import main
from factories import noise_by_class, photographs, small_vit

from collapse_probe.analysis.analyze import analyze
from collapse_probe.analysis.compare import compare
from collapse_probe.analysis.cross_cka import cross_cka
from collapse_probe.data.images import batches, open_data
from collapse_probe.errors import DataError, SettingError
from collapse_probe.models.loading import resolve
from collapse_probe.results.comparison import Comparison
from collapse_probe.results.findings import Findings
from collapse_probe.seeding import rank_of_name

SMALL = {"img_size": 32, "model_kwargs": {"depth": 2, "embed_dim": 24, "num_heads": 2, "num_classes": 5}, "pretrained": False}
NAME = "timm:vit_tiny_patch16_224"


def subject(seed=0, **changes):
    options = {**SMALL, **changes}
    return resolve(NAME, seed=seed, **options)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Twenty photographs, one of them damaged."""
    folder = photographs(tmp_path_factory.mktemp("cka") / "pictures", count=20, side=40)
    (folder / "photo_07.png").write_bytes(b"no picture")
    return folder


def test_a_model_agrees_with_itself_exactly_and_as_layer_cka_says(pictures):
    one = subject()
    found = cross_cka(one, one, open_data(str(pictures)), batch_size=7, device="cpu")
    alone = analyze(one, str(pictures), metrics=("layer-cka",), null_images=0, device="cpu").metrics["layer-cka"]
    assert found.dims == ("depth_of_first", "depth_of_second")
    assert np.diag(found.values).tolist() == [1, 1, 1]
    assert found.values == pytest.approx(found.values.T, abs=1e-12)
    assert found.values == pytest.approx(alone.values, abs=1e-6)
    assert found.details["images"] == alone.details["images"] == 20


def test_two_models_of_other_depth_width_and_input_size(pictures):
    one, other = subject(), subject(1, img_size=48, model_kwargs={"depth": 3, "embed_dim": 16, "num_heads": 2})
    images = open_data(str(pictures))
    found = cross_cka(one, other, images, device="cpu", batch_size=64)
    turned = cross_cka(other, one, images, device="cpu", batch_size=3)
    assert found.values.shape == (3, 4)
    assert found.values == pytest.approx(turned.values.T, abs=1e-9)
    assert (found.values < 1).all()
    few = cross_cka(one, other, images, device="cpu", limit=8)
    assert not np.allclose(few.values, found.values)


def test_a_model_with_turned_features_agrees_wholly():
    """The same embeddings in another basis: the CKA of depth 0 is 1, although no cosine would be."""
    one, other = small_vit(embed_dim=16, depth=1, num_heads=2), small_vit(embed_dim=16, depth=1, num_heads=2)
    turn = torch.linalg.qr(torch.randn(16, 16, generator=torch.Generator().manual_seed(3)))[0]
    with torch.no_grad():
        conv = other.patch_embed.proj
        conv.weight.copy_((turn @ conv.weight.flatten(1)).view_as(conv.weight))
        conv.bias.copy_(turn @ conv.bias)
        for token in (other.cls_token, other.pos_embed):
            token.copy_(token @ turn.T)
    images = [torch.randn(12, 3, 64, 64, generator=torch.Generator().manual_seed(0))]
    found = cross_cka(resolve(one), resolve(other), images, device="cpu").values
    assert found[0, 0] == pytest.approx(1, abs=1e-5)
    assert found[1, 1] < 0.9999


def test_few_images_and_a_limit_of_an_iterable_are_refused(pictures):
    one = subject()
    with pytest.raises(DataError, match="four images or more"):
        cross_cka(one, one, open_data(str(pictures), limit=3), device="cpu")
    with pytest.raises(SettingError, match="not an iterable"):
        cross_cka(one, one, [torch.randn(4, 3, 32, 32)], device="cpu", limit=2)


def test_compare_keeps_the_matrix_with_the_second_subject_and_draws_it(pictures, tmp_path):
    models = {"one": small_vit(embed_dim=16, num_heads=2, depth=2), "other": small_vit(1, embed_dim=16, num_heads=2, depth=3)}
    models["one"].train()
    found = compare(models, str(pictures), cka=True, metrics=("patch-diversity",), null_images=0, device="cpu")
    assert "cross-cka" not in found.subjects["one"].metrics
    reading = found.subjects["other"].metrics["cross-cka"]
    assert reading.values.shape == (3, 4)
    assert (reading.details["first"], reading.details["second"]) == ("one", "other")
    assert models["one"].training  # as it was
    found.save(tmp_path / "cmp")
    loaded = Comparison.load(tmp_path / "cmp").subjects["other"].metrics["cross-cka"]
    assert loaded.values == pytest.approx(reading.values)


def test_the_command_line_draws_it_and_refuses_findings(pictures, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    shape = ["--no-pretrained", "--img-size", "32", "--model-kwargs", "depth=2 num_classes=5"]
    few = ["--metric", "patch-diversity", "--null-images", "0", "-q", "--limit", "6", "--device", "cpu"]
    words = ["compare", NAME, NAME, "--cka", *shape, "--data", str(pictures), *few, "-o", "out"]
    with pytest.raises(SystemExit) as stop:
        main(words)
    assert (stop.value.code, capsys.readouterr().err) == (0, "")
    assert Path("out/figures/cross-cka.svg").exists()
    assert 'id="cross-cka"' in Path("out/report.html").read_text()
    held = Findings.load("out/subjects/vit_tiny_patch16_224-2")
    assert np.diag(held.metrics["cross-cka"].values).tolist() == [1, 1, 1]
    kept = [str(path) for path in sorted(Path("out/subjects").iterdir())]
    with pytest.raises(SystemExit) as stop:
        main(["compare", *kept, "--cka", "-q", "-o", "again"])
    assert stop.value.code == 1
    assert "models too, not findings folders" in capsys.readouterr().err


def found_by(world, folder):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    words = ["analyze", "-m", NAME, "--no-pretrained", "--img-size", "32", "--model-kwargs", "depth=2", "--data", str(folder)]
    for name in ("layer-cka", "token-rank@centred", "rank-residual@composite", "token-norm@outliers", "cross-patch-similarity"):
        words += ["--metric", name]
    words += ["--json=full", "--null-images", "0", "-b", "3", "-q", "--device", "cpu"]
    torchrun = ["-m", "torch.distributed.run", f"--nproc-per-node={world}", "--master-addr=127.0.0.1", f"--master-port={port}"]
    start = [*torchrun, "-m", "collapse_probe"] if world > 1 else ["-m", "collapse_probe"]
    done = subprocess.run([sys.executable, *start, *words], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)["metrics"]


def test_two_processes_find_what_one_does(tmp_path):
    folder = photographs(tmp_path / "many", count=72, side=34)
    one, two = found_by(1, folder), found_by(2, folder)
    assert one["layer-cka"]["details"]["images"] == one["layer-cka"]["details"]["of"] == 72
    for name in one:
        for part in ("values", "stderr", "ci95"):
            mine, other = (np.array(found[name][part], dtype=float) for found in (one, two))
            assert other == pytest.approx(mine, rel=1e-5, abs=1e-6, nan_ok=True), (name, part)
    assert two["token-norm@outliers"]["details"]["outlier_map"] == one["token-norm@outliers"]["details"]["outlier_map"]


def test_a_sample_of_a_folder_sorted_by_class_is_of_all_classes_and_the_same_in_any_batches(tmp_path, monkeypatch):
    images = open_data(str(noise_by_class(tmp_path, count=64, side=40)))
    for module in ("collapse_probe.metrics.tokens.layer_cka", "collapse_probe.analysis.cross_cka"):
        monkeypatch.setattr(f"{module}.sample_size", lambda length: 24)
    names = sorted(images.names, key=rank_of_name)[:24]
    assert len({name.split("/")[0] for name in names}) == 2
    one, two = subject(), subject(1)
    pixels = next(batches(images, one.preprocess, batch_size=64)).pixels
    kept = [pixels[[list(images.names).index(name) for name in names]]]
    facts = {"metrics": ("layer-cka",), "null_images": 0, "device": "cpu"}
    found, in_sixes, of_kept = (
        analyze(one, data, batch_size=size, **facts).metrics["layer-cka"]
        for data, size in ((images, 64), (images, 6), (kept, 64))
    )
    assert (found.details["images"], found.details["of"]) == (24, 64)
    assert in_sixes.values == pytest.approx(found.values, abs=1e-6)
    assert of_kept.values == pytest.approx(found.values, abs=1e-6)
    across, across_kept = (cross_cka(one, two, data, device="cpu") for data in (images, kept))
    assert (across.details["images"], across.details["of"]) == (24, 64)
    assert across.values == pytest.approx(across_kept.values, abs=1e-6)
