"""The flags of data on the command line: an empty address, the limit of pixels, and how files that are left out are said."""

import json
import os
from pathlib import Path

import pytest
from PIL import Image

SMALL = ("--no-pretrained", "--img-size", "32", "--model-kwargs", "depth=2 embed_dim=24 num_heads=2")
MODEL = ("-m", "timm:vit_tiny_patch16_224", *SMALL)
QUICK = (*MODEL, "--null-images", "0", "--metric", "attention-similarity")


@pytest.mark.parametrize("address", ["", " "])
@pytest.mark.parametrize(
    "words",
    [
        ("analyze", *MODEL, "--data"),
        ("intervene", *MODEL, "--data"),
        ("compare", "timm:vit_tiny_patch16_224", "timm:vit_tiny_patch16_224", *SMALL, "--data"),
        ("train", "digits-mhsa", "--data"),
        ("train", "digits-mhsa", "--val-data"),
        ("sweep", "--seeds", "2", "--eval-data"),
    ],
    ids=lambda words: f"{words[0]} {words[-1]}",
)
def test_an_empty_address_is_wrong_usage_and_not_this_folder(run, tmp_path, words, address):
    Image.new("RGB", (40, 40)).save(tmp_path / "0.png")
    code, out, err = run(*words, address)
    assert (code, out) == (2, "")
    assert "it is empty (an unset variable?)" in err
    assert [path.name for path in tmp_path.iterdir()] == ["0.png"]


def test_what_is_left_out_is_said_on_the_terminal_in_the_findings_and_on_the_page(run, tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    for i in range(3):
        Image.effect_noise((40, 40), 50 + i).save(data / f"{i}.png")
    Image.new("RGB", (40, 40)).save(data / os.fsdecode(b"caf\xe9.png"))
    (data / "junk.png").write_bytes(b"junk")
    (data / "readme.txt").write_text("words")
    (data / "up").symlink_to("..", target_is_directory=True)
    code, out, err = run("analyze", *QUICK, "--data", "data", "-o", os.fsdecode(b"out\xe9"))
    assert code == 0
    assert "not read: 1 × a link to a folder above it, up/" in err
    assert "1 image was skipped: junk.png" in out
    assert "Left out of the data: 1 × a link to a folder above it, 1 × no picture of a format that is read (.txt)" in out
    folder = Path(os.fsdecode(b"out\xe9"))
    stored = json.loads((folder / "findings.json").read_text(encoding="utf-8"))
    assert stored["data"]["images"] == 4
    assert [each["name"] for each in stored["data"]["skipped"]] == ["junk.png", "up/", "readme.txt"]
    assert sum(note.startswith("not read: ") for note in stored["run"]["notes"]) == 2
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert "files that were not read" in page
    assert "a link to a folder above it" in page
    code, _, _ = run("report", os.fsdecode(b"out\xe9"))
    assert code == 0


def test_max_pixels_is_a_flag_of_every_verb_that_reads_pictures(run, tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 2000)
    (tmp_path / "data").mkdir()
    for name, side in (("large", 80), ("small", 50)):
        Image.effect_noise((side, side), 50).save(tmp_path / "data" / f"{name}.png")
    some, whole = (
        json.loads(run("analyze", *QUICK, "--data", "data", "--json=full", *m)[1]) for m in ((), ("--max-pixels", "6400"))
    )
    assert (some["data"]["images"], whole["data"]["images"]) == (1, 2)
    assert "--max-pixels N (Python: max_pixels=N) allows more" in some["data"]["skipped"][0]["reason"]
    twice = ("timm:vit_tiny_patch16_224", "timm:vit_tiny_patch16_224", *QUICK[2:], "--data", "data", "--max-pixels", "6400")
    found = json.loads(run("compare", *twice, "--json=full")[1])
    assert found["pairs"][0]["images"] == 2
    for word in ("0", "many"):
        assert run("intervene", *MODEL, "--data", "data", "--max-pixels", word)[0] == 2
