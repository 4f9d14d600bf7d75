"""Flags whose values have a form of their own: sizes, keyword arguments, files of flags, patterns."""

import json
import os
import subprocess
import sys

import pytest
from factories import synthetic

from collapse_probe.errors import SettingError
from collapse_probe.settings import words_in

SMALL = "depth=2 embed_dim=24 num_heads=2"
VIT = ("-m", "timm:vit_tiny_patch16_224", "--no-pretrained", "--json")


@pytest.mark.parametrize(("text", "grid"), [("64", [4, 4]), ("64x96", [4, 6]), ("96,64", [6, 4]), ("(64, 96)", [4, 6])])
def test_a_size_is_a_side_or_height_and_width(run, text, grid):
    code, out, _ = run("doctor", *VIT, "--img-size", text, "--model-kwargs", SMALL)
    assert code == 0
    facts = json.loads(out)
    assert (facts["grid"], facts["input"]) == (grid, [3, 16 * grid[0], 16 * grid[1]])


@pytest.mark.parametrize("text", ["0", "64x", "large", "64x96x3", "-64"])
def test_what_is_no_size_is_wrong_usage(run, text):
    code, _, err = run("doctor", *VIT, "--img-size", text)
    assert code == 2
    assert "is no size; expected pixels above 0" in err


def test_spaces_inside_brackets_and_quotes_belong_to_a_value(run):
    code, out, _ = run("doctor", *VIT, "--model-kwargs", f"img_size=(64, 96) {SMALL}")
    assert code == 0
    assert json.loads(out)["grid"] == [4, 6]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a=1  b=2", ["a=1", "b=2"]),
        ("a=[(1, 2), {'x': 3}] b='c d'", ["a=[(1, 2), {'x': 3}]", "b='c d'"]),
        ("a='(' b=2", ["a='('", "b=2"]),
        ("", []),
    ],
)
def test_words(text, words):
    assert words_in(text) == words


@pytest.mark.parametrize("text", ["a=(1, 2", "a='b c"])
def test_an_open_bracket_is_an_error(text):
    with pytest.raises(SettingError, match="has no closing"):
        words_in(text)


def test_a_file_of_flags_takes_lists_and_words_with_spaces(run, tmp_path):
    lines = ["model: timm:vit_tiny_patch16_224", "pretrained: false", "json: true", "model-kwargs:"]
    lines += ["  img_size: [64, 96]", "  depth: 2", "  embed_dim: 24", "  num_heads: 2", "  act_layer: gelu"]
    (tmp_path / "flags.yaml").write_text("\n".join(lines))
    code, out, _ = run("doctor", "--config", "flags.yaml")
    assert code == 0
    assert json.loads(out)["grid"] == [4, 6]
    (tmp_path / "flags.yaml").write_text("\n".join([*lines[:4], "  depth: 2", "img-size: [32, 64]"]))
    code, out, _ = run("doctor", "--config", "flags.yaml")
    assert code == 0
    assert json.loads(out)["grid"] == [2, 4]


@pytest.mark.parametrize("channels", [1, 13])
def test_doctor_takes_the_models_own_channels(run, channels):
    code, out, _ = run("doctor", *VIT, "--img-size", 32, "--model-kwargs", f"in_chans={channels} {SMALL}")
    assert code == 0
    assert json.loads(out)["input"] == [channels, 32, 32]


def test_patterns_match_names_with_and_without_their_scheme(run):
    bare, full = (run("ls", "models", pattern)[1].split() for pattern in ("vit_tiny_patch16*", "timm:vit_tiny_patch16*"))
    assert "timm:vit_tiny_patch16_224" in bare
    assert bare == full
    assert run("ls", "models", "tiny_patch16*")[1] == ""


def program(*words, **surroundings):
    command = [sys.executable, "-m", "collapse_probe", *map(str, words)]
    return subprocess.run(command, capture_output=True, env={**os.environ, **surroundings}, timeout=120, check=True).stdout


def test_a_console_that_is_not_utf_8_gets_what_it_can_show():
    assert b"attention-similarity" in program("ls", "metrics", PYTHONIOENCODING="cp1252")
    assert b"(\xe2\x80\x9c" not in program("ls", "metrics", PYTHONIOENCODING="ascii")


def test_the_drawing_backend_of_a_notebook_does_not_matter(tmp_path):
    synthetic(blocks=3, gallery=False).save(tmp_path)
    program("report", tmp_path, MPLBACKEND="module://no_such_backend")
    assert (tmp_path / "report.html").is_file()


def test_the_package_can_be_imported_where_the_system_does_not_tell_its_memory():
    code = (
        "import sys; sys.modules['resource'] = None\n"
        "import torch, collapse_probe.analysis.analyze, collapse_probe.devices as d\n"
        "sys.exit(d.peak_memory(torch.device('cpu')) is not None)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_a_pattern_names_the_blocks(run):
    words = ("doctor", *VIT, "--model-kwargs", f"img_size=32 {SMALL}")
    assert json.loads(run(*words)[1])["blocks"] == 2
    assert json.loads(run(*words, "--blocks-pattern", "blocks.1")[1])["blocks"] == 1
