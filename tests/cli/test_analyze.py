"""The command line as a user meets it: what it writes, what it says to bad input, and with which exit code."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from collapse_probe.cli.main import main
from factories import small_vit

from collapse_probe.results.findings import Findings

SMALL_MODEL = [
    "-m",
    "timm:vit_tiny_patch16_224",
    "--no-pretrained",
    "--img-size",
    "64",
    "--model-kwargs",
    "depth=3 num_classes=7",
]


def analyze(run, photos, *more):
    return run("analyze", *SMALL_MODEL, "--data", photos, "--null-images", "2", *more)


def test_analyze_writes_the_whole_folder(run, photos, tmp_path):
    code, out, err = analyze(run, photos, "-o", "out", "-b", "4")
    assert code == 0
    names = {str(p.relative_to("out")) for p in Path("out").rglob("*") if p.is_file()}
    assert {"findings.json", "blocks.csv", "matrices.npz", "images.npz", "gallery.npz", "report.html"} <= names
    assert "figures/attention-similarity.svg" in names
    assert "Where each block looks is not drawn" in Path("out/report.html").read_text()  # fresh parameters, uniform maps
    assert out.splitlines()[0].endswith(".")
    assert "\nraw similarity  " in out
    assert "weights random (seed 0)" in err
    assert "mean [0.5, 0.5, 0.5]" in err
    assert "tiles of" in err
    assert Findings.load("out").data["images"] == 6
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_report_rebuilds_page_and_figures_from_the_folder_alone(run, photos):
    analyze(run, photos, "-o", "out")
    page = Path("out/report.html").read_text()
    for path in [Path("out/report.html"), *Path("out/figures").iterdir()]:
        path.unlink()
    code, _, _ = run("report", "out")
    assert code == 0
    assert Path("out/report.html").read_text() == page
    assert Path("out/figures/attention-similarity.svg").exists()


def test_json_goes_to_stdout_and_nothing_else(run, photos, tmp_path):
    code, out, _ = analyze(run, photos, "--json=full", "-q")
    assert code == 0
    assert json.loads(out)["schema"] == "collapse-probe/findings/1"
    assert list(tmp_path.iterdir()) == []


def test_limit_metric_and_config(run, photos, tmp_path):
    Path("flags.yaml").write_text("limit: 3\nmetric: [patch-diversity]\nbatch_size: 2\n")
    code, out, _ = analyze(run, photos, "--config", "flags.yaml", "--json=full", "-b", "1")
    found = json.loads(out)
    assert code == 0
    assert list(found["metrics"]) == ["patch-diversity"]
    assert (found["data"]["images"], found["run"]["batch_size"]) == (3, 1)


def test_doctor(run):
    code, out, _ = run("doctor", *SMALL_MODEL)
    assert code == 0
    assert "3 of 3 attention layers can be compared" in out
    assert "flash_attention_for_cpu" in out
    code, out, _ = run("doctor", *SMALL_MODEL, "--json")
    assert json.loads(out)["prefix_tokens"] == [0]


@pytest.mark.parametrize(
    ("kind", "pattern", "expected"),
    [
        ("metrics", None, "patch-diversity"),
        ("models", "vit_b_32", "torchvision:vit_b_32"),
        ("data", "bundled", "bundled:digits"),
        ("fixes", "re-att*", "re-attention"),
    ],
)
def test_ls(run, kind, pattern, expected):
    code, out, _ = run("ls", kind, *([pattern] if pattern else []))
    assert code == 0
    assert expected in out


def save(path, model):
    torch.save(model.state_dict(), path)
    return path


class Bomb:
    def __reduce__(self):
        return (os.system, ("touch exploded",))


def prepare(kind, folder):
    """Flags that override the good ones, by kind of bad input."""
    if kind == "unknown model":
        return ["-m", "vit_b_33"]
    if kind == "a CNN":
        return ["-m", "timm:resnet18"]
    if kind == "linear attention":
        return ["-m", "timm:efficientvit_b0", "--no-pretrained"]
    if kind == "missing folder":
        return ["--data", folder / "nowhere"]
    if kind == "no images":
        (folder / "empty").mkdir()
        (folder / "empty" / "readme.txt").write_text("no image")
        return ["--data", folder / "empty"]
    if kind == "all corrupt":
        (folder / "corrupt").mkdir()
        for i in range(3):
            (folder / "corrupt" / f"{i}.png").write_bytes(b"not a picture")
        return ["--data", folder / "corrupt"]
    if kind == "another checkpoint":
        return ["--checkpoint", save(folder / "other.pth", small_vit(depth=2))]
    if kind == "a pickle that runs code":
        (folder / "bomb.pth").write_bytes(pickle.dumps({"state_dict": Bomb()}))
        return ["--checkpoint", folder / "bomb.pth"]
    if kind == "an output that is a file":
        (folder / "taken").write_text("")
        return ["-o", folder / "taken"]
    return {
        "batch size 0": ["-b", "0"],
        "unknown metric": ["--metric", "patch-diversty"],
        "no such device": ["--device", "cuda:99"],
        "limit 0": ["--limit", "0"],
    }[kind]


BAD = [
    ("unknown model", 1, "vit_b_32"),
    ("a CNN", 1, "has no attention"),
    ("linear attention", 1, "linear attention"),
    ("missing folder", 1, "nowhere"),
    ("no images", 1, "no image"),
    ("all corrupt", 1, "3 of 3 failed"),
    ("another checkpoint", 1, "blocks.2"),
    ("a pickle that runs code", 1, "bomb.pth"),
    ("an output that is a file", 1, "is a file"),
    ("batch size 0", 2, "0"),
    ("limit 0", 2, "0"),
    ("unknown metric", 1, "patch-diversity"),
    ("no such device", 1, "--device auto"),
]


@pytest.mark.parametrize(("kind", "code", "says"), BAD, ids=[kind for kind, _, _ in BAD])
def test_bad_input(run, photos, tmp_path, kind, code, says):
    flags = prepare(kind, tmp_path)
    before = sorted(p.name for p in tmp_path.iterdir())
    base = SMALL_MODEL if "-m" not in flags else ["--no-pretrained"]
    found, out, err = run("analyze", *base, "--data", photos, "-o", tmp_path / "out", "-q", *flags)
    assert found == code, err
    assert says in err
    assert "Traceback" not in err
    assert out == ""
    if code == 1:
        assert len(err.strip().splitlines()) == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == before


def test_weights_that_cannot_be_fetched(run, photos, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    code, _, err = run("analyze", "-m", "timm:vit_tiny_patch16_224", "--data", photos, "-q")
    assert code == 1
    assert "--no-pretrained" in err
    assert "--checkpoint" in err


def test_verbose_shows_the_traceback(run, tmp_path):
    with pytest.raises(Exception, match="nowhere"):
        main(["analyze", *SMALL_MODEL, "--data", str(tmp_path / "nowhere"), "-v"])


def test_an_unreadable_image_is_named_and_counted(run, photos, tmp_path):
    (tmp_path / "data").mkdir()
    for path in photos.iterdir():
        (tmp_path / "data" / path.name).write_bytes(path.read_bytes())
    (tmp_path / "data" / "broken.jpg").write_bytes(b"\xff\xd8\xff")
    code, out, _ = run("analyze", *SMALL_MODEL, "--data", "data", "-o", "out", "--null-images", "0")
    assert code == 0
    assert "1 image was skipped: broken.jpg" in out
    skipped = Findings.load("out").data["skipped"]
    assert [s["name"] for s in skipped] == ["broken.jpg"]
    assert Findings.load("out").data["images"] == 6


def test_python_m_is_the_same_program():
    done = subprocess.run([sys.executable, "-m", "collapse_probe", "--version"], capture_output=True, text=True, check=True)
    assert "0.1.0" in done.stdout


def stop(*args, **kwargs):
    raise KeyboardInterrupt


def test_a_run_interrupted_while_it_measures_leaves_nothing(run, photos, tmp_path, monkeypatch):
    monkeypatch.setattr("collapse_probe.analysis.measurement.Measurement.update", stop)
    code, _, error = analyze(run, photos, "-o", "out", "-q")
    assert code == 130
    assert "interrupted; no output was written" in error
    assert list(tmp_path.iterdir()) == []


def test_a_run_interrupted_while_it_draws_keeps_its_numbers_and_says_so(run, photos, tmp_path, monkeypatch):
    monkeypatch.setattr("collapse_probe.report.findings.page.write_report", stop)
    code, _, error = analyze(run, photos, "-o", "out", "-q")
    assert code == 130
    assert "interrupted; the numbers are in out, without their page; `collapse-probe report out` draws it again" in error
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert Findings.load(tmp_path / "out").summary["images"] > 0
    assert not (tmp_path / "out" / "report.html").exists()
