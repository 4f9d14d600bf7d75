"""`compare` on the command line, and --fail-on, --fix and --recalibrate-bn on `analyze`."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import timm
import torch

from collapse_probe.analysis.analyze import analyze as measured

SIZE = ["--img-size", "32", "--model-kwargs", "depth=2 num_classes=5"]
MODEL = ["--model", "timm:vit_tiny_patch16_224", *SIZE]
FEW = ["--metric", "attention-similarity", "--metric", "similar-blocks"]
QUICK = ["--null-images", "0", "-b", "8", "-q"]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """Five checkpoints of one small model, whose maps sharpen."""
    folder = tmp_path_factory.mktemp("training")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2, num_classes=5)
    for epoch in (1, 2, 3, 9, 10):
        torch.save({"state_dict": model.state_dict(), "epoch": epoch}, folder / f"epoch-{epoch}.pth")
        with torch.no_grad():
            for block in model.blocks:
                block.attn.qkv.weight.mul_(1.7)
    return folder


def analyze(run, photos, folder, *more):
    named = ["-m", "timm:vit_tiny_patch16_224", "--no-pretrained", *SIZE, "--data", photos]
    return run("analyze", *named, "-o", folder, *FEW, *QUICK, *more)


def findings_folder(photos, folder):
    options = {"pretrained": False, "img_size": 32, "model_kwargs": {"depth": 2, "num_classes": 5}, "null_images": 0}
    return measured("timm:vit_tiny_patch16_224", str(photos), **options).save(folder)


def test_two_checkpoints(run, photos, checkpoints):
    a, b = checkpoints / "epoch-1.pth", checkpoints / "epoch-10.pth"
    code, out, err = run("compare", a, b, *MODEL, "--data", photos, *QUICK, "-o", "out")
    assert (code, err) == (0, "")
    content = json.loads(Path("out/comparison.json").read_text())
    assert [s["label"] for s in content["subjects"]] == ["epoch-1", "epoch-10"]
    assert content["subjects"][0]["checkpoint_sha256"] != content["subjects"][1]["checkpoint_sha256"]
    assert content["run"]["command"].startswith("collapse-probe ")
    assert {"comparison.json", "comparison.csv", "manifest.json", "report.html", "figures", "subjects"} == {
        p.name for p in Path("out").iterdir()
    }
    assert Path("out/subjects/epoch-10/findings.json").exists()
    assert out.splitlines()[0].endswith(".")
    assert "\nκ of adjacent pairs  " in out
    assert "out/report.html" in out


def test_a_folder_of_five_checkpoints_in_natural_order(run, photos, checkpoints):
    code, out, _ = run("compare", checkpoints, *MODEL, "--data", photos, *QUICK, *FEW, "-o", "out")
    assert code == 0
    assert out.startswith("From epoch-1 to epoch-10, over 5 checkpoints")
    content = json.loads(Path("out/comparison.json").read_text())
    assert content["trajectory"] is True
    assert [s["label"] for s in content["subjects"]] == [f"epoch-{i}" for i in (1, 2, 3, 9, 10)]
    assert Path("out/figures/course.svg").exists()


def test_two_findings_folders_from_elsewhere_need_no_data(run, photos):
    for name in ("a", "b"):
        findings_folder(photos, name)
        shutil.move(name, f"moved-{name}")
    code, out, _ = run("compare", "moved-a", "moved-b", "--json=full", "-q")
    assert code == 0
    content = json.loads(out)
    assert [s["label"] for s in content["subjects"]] == ["moved-a", "moved-b"]
    for metric in content["pairs"][0]["metrics"].values():
        assert set(metric["difference"]) == {0.0}
        assert set(metric["p"]) == {1.0}
    assert not Path("comparison").exists()


def test_other_images_are_refused_naming_the_first_difference(run, photos, tmp_path):
    shutil.copytree(photos, tmp_path / "fewer")
    (tmp_path / "fewer" / "photo_1.png").unlink()
    findings_folder(photos, "a")
    findings_folder(tmp_path / "fewer", "b")
    code, _, err = run("compare", "a", "b", "-o", "out")
    assert code == 1
    assert "'photo_1.png' is only in a" in err
    assert "names_sha256" in err
    assert not Path("out").exists()


def test_an_untrained_model_beside_itself_with_re_attention(run, photos):
    words = ["timm:vit_tiny_patch16_224", "--no-pretrained", *SIZE, "--fix", "re-attention:norm=batch"]
    code, out, _ = run("compare", *words, "--data", photos, *QUICK, *FEW, "-o", "out")
    assert code == 0
    assert out.startswith("The contrast exists without any training")
    assert "no evidence that the mixing cures a collapse" in out
    content = json.loads(Path("out/comparison.json").read_text())
    assert [s["label"] for s in content["subjects"]] == ["vit_tiny_patch16_224", "vit_tiny_patch16_224+re-attention"]
    assert [s["mixes_maps"] for s in content["subjects"]] == [False, True]
    assert "re-attention in all blocks" in content["subjects"][1]["address"]


@pytest.mark.parametrize(("expression", "code"), [("similar_blocks > 0", 3), ("similar_blocks > 1", 0), ("accuracy < 1", 3)])
def test_fail_on_of_compare(run, photos, checkpoints, expression, code):
    a = checkpoints / "epoch-1.pth"
    words = ["compare", a, a, *MODEL, "--data", photos, *QUICK, *FEW, "--fail-on", expression]
    stopped, out, err = run(*words, "--json=full")
    assert stopped == code
    assert json.loads(out)["schema"] == "collapse-probe/comparison/1"
    assert len(err.splitlines()) == (2 if code else 0)  # a line for each subject
    if code:
        assert expression in err


def test_fail_on_may_ask_for_the_difference(run, photos, checkpoints):
    a, b = checkpoints / "epoch-1.pth", checkpoints / "epoch-10.pth"
    words = [
        "compare",
        a,
        b,
        *MODEL,
        "--data",
        photos,
        *QUICK,
        "--json=full",
        "--fail-on",
        "attention_similarity_adjacent_difference < -0.1",
    ]
    code, _, err = run(*words)
    assert code == 3
    assert len(err.splitlines()) == 1
    assert err.startswith("epoch-10: threshold")


def test_fail_on_of_analyze_comes_after_the_output(run, photos):
    code, out, err = analyze(run, photos, "out", "--fail-on", "similar_blocks >= 1", "--fail-on", "images > 100")
    assert code == 3
    assert err == "threshold 'similar_blocks >= 1' tripped: similar_blocks is 1\n"
    assert "\nsimilar blocks, κ > 0.5  " in out
    assert Path("out/report.html").exists()
    assert analyze(run, photos, "out", "--json=full", "--fail-on", "similar_blocks > 1")[0] == 0


def test_a_bad_threshold_stops_before_the_work(run, photos):
    code, _, err = analyze(run, photos, "out", "--fail-on", "open('x')")
    assert code == 2
    assert "expected NAME OP NUMBER" in err
    assert not Path("out").exists()


def test_fix_and_recalibration_of_analyze(run, photos):
    words = ["--fix", "re-attention:norm=batch", "--fix-blocks", "1", "--recalibrate-bn", "1", "--null-images", "2"]
    code, _, _ = analyze(run, photos, "out", *words)
    assert code == 0
    content = json.loads(Path("out/findings.json").read_text())
    assert content["model"]["address"].endswith("re-attention in blocks 1 (norm=batch, init=random, scale=1.0)")
    assert content["model"]["mixes_maps"]
    notes = " ".join(content["run"]["notes"])
    assert "re-estimated over 1 batches" in notes
    assert "untrained copy: fresh parameters" in notes


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        ([], 2, "SUBJECT"),
        (["timm:vit_tiny_patch16_224", "--no-pretrained"], 1, "two or more subjects"),
        (["timm:vit_tiny_patch16_224", "timm:deit_tiny_patch16_224"], 1, "--data"),
        (["nowhere.pth", "nowhere.pth", "--data", "bundled:photos"], 1, "no checkpoint nowhere.pth"),
        (["vit_tiny_patch16_22", "x", "--data", "bundled:photos"], 1, "vit_tiny_patch16_224"),
        (["a", "b", "--fix-blocks", "six", "--data", "bundled:photos"], 1, "6-11"),
        (["a", "b", "--fix-blocks", "1-2", "--data", "bundled:photos"], 1, "--fix"),
        (["a", "b", "--recalibrate-bn", "-1"], 2, "-1"),
    ],
)
def test_what_cannot_be_compared(run, words, code, said):
    found, _, err = run("compare", *words)
    assert found == code
    assert said in err
    assert "Traceback" not in err
    if code == 1:
        assert err.splitlines()[-1].startswith("error: ")


def test_one_model_named_by_m_is_compared_with_itself_with_the_fix(run, photos):
    code, _, err = run("compare", *MODEL, "--no-pretrained", "--fix", "layer-scale", "--data", photos, *QUICK, "-o", "alone")
    assert code == 0, err
    code, _, err = run("compare", "--data", photos)
    assert code == 2
    assert "Missing argument 'SUBJECT...'" in err
