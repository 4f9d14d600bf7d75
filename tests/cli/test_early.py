"""What can be known to fail is found before the work: wrong usage before torch is loaded, a wrong folder before the model."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from collapse_probe.cli import intervene, options
from collapse_probe.cli.fail_on import thresholds

from collapse_probe.analysis.intervene import EDITS, PARTS, STATES
from collapse_probe.capture.edits.replacement import KINDS
from collapse_probe.registry import METRICS, PRESETS
from collapse_probe.results.summary.thresholds import EFFECTS

VIT = ("-m", "timm:vit_tiny_patch16_224", "--no-pretrained", "--img-size", "32")
TINY = (*VIT, "--model-kwargs", "depth=2 embed_dim=24 num_heads=2")
QUICK = ("--null-images", "0", "--metric", "attention-similarity")
WRONG = (  # words, what is said
    (["analyze", *VIT, "--data", "x", "--fail-on", "similar_block > 4"], "did you mean similar_blocks"),
    (["analyze", *VIT, "--data", "x", "--fail-on", "images > 1e999"], "is too large for a number"),
    (["analyze", *VIT, "--data", "x", "--fail-on", f"images > {'9' * 400}"], "is too large for a number"),
    (["analyze", *VIT], "Missing option '--data'"),
    (["analyze", *VIT, "--metric", "patch-diversity"], "patch-diversity needs images"),
    (["analyze", *VIT, "--preset", "deepvit"], "needs images"),
    (["compare", "a", "b", "--fail-on", "kapa_adjacent_difference > 1"], "did you mean kappa_adjacent_difference"),
    (["intervene", *VIT, "--data", "x", "--replace", "shares"], "'shares' is not one of 'share'"),
    (["intervene", *VIT, "--data", "x", "--fail-on", "share_all_kls > 1"], "no run of intervene has a number"),
)
CANNOT = (
    (["analyze", *VIT, "--data", "x", "--metric", "attention-similarty"], "did you mean 'attention-similarity'"),
    (["analyze", *VIT, "--data", "x", "--preset", "deepvitt"], "did you mean 'deepvit'"),
    (["compare", "a", "b", "--metric", "nonsense"], "no metric called 'nonsense'"),
    (["analyze", *VIT, "--data", "x", "--fix-blocks", "0-99999999999"], "names block 99999999999"),
    (["analyze", *VIT, "--data", "x", "-o", "taken"], "taken is a file"),
    (["analyze", *VIT, "--data", "x", "-o", "taken/out"], "cannot be written"),
    (["analyze", *VIT, "--data", "x", "-o", "figures-is-a-file"], "figures is a file"),
    (["compare", "a", "b", "-o", "taken"], "taken is a file"),
    (["intervene", *VIT, "--data", "x", "-o", "taken"], "taken is a file"),
    (["train", "digits-mhsa", "-o", "taken"], "taken is a file"),
    (["sweep", "--seeds", "2", "-o", "figures-is-a-file"], "figures is a file"),
    (["report", "nowhere"], "nowhere is not a findings folder"),
)
SCRIPT = """
import contextlib, io, json, sys
from collapse_probe.cli.main import main
ends = []
for words in json.loads(sys.argv[1]):
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        try:
            main(words)
        except SystemExit as end:
            ends.append([end.code, said.getvalue(), sorted({"torch", "timm", "numpy"} & set(sys.modules))])
print(json.dumps(ends))
"""


def ends_of(commands, folder):
    (folder / "taken").write_text("")
    (folder / "figures-is-a-file").mkdir()
    (folder / "figures-is-a-file" / "figures").write_text("")
    words = [sys.executable, "-c", SCRIPT, json.dumps(commands)]
    done = subprocess.run(words, capture_output=True, text=True, cwd=folder, timeout=200, check=True)
    return json.loads(done.stdout)


def test_wrong_usage_is_told_before_torch_is_loaded_and_makes_nothing(tmp_path):
    ends = ends_of([words for words, _ in WRONG], tmp_path)
    for (words, said), (code, err, loaded) in zip(WRONG, ends, strict=True):
        assert (code, loaded) == (2, []), (words, err)
        assert said in " ".join(err.split()), (words, err)
    assert {path.name for path in tmp_path.iterdir()} == {"taken", "figures-is-a-file"}


def test_a_folder_that_cannot_take_the_output_is_told_before_the_work(tmp_path):
    ends = ends_of([words for words, _ in CANNOT], tmp_path)
    for (words, said), (code, err, loaded) in zip(CANNOT, ends, strict=True):
        assert code == 1, (words, err)
        assert said in err
        assert len(err.splitlines()) == 1, err
        assert not loaded or words[0] in ("train", "sweep", "report"), (words, loaded)
    assert {path.name for path in tmp_path.iterdir()} == {"taken", "figures-is-a-file"}


def test_what_the_command_line_knows_without_torch_is_what_there_is():
    levels = options.levels_of_metrics()
    for name, metric in METRICS.items():
        assert levels[name] == metric.level
    assert {name for name in levels if name not in METRICS} == set()
    assert set(KINDS) == set(intervene.KINDS)
    assert set(PARTS) == set(intervene.PARTS)
    assert set(EDITS) == set(intervene.EDITS)
    assert set(STATES) == set(intervene.STATES)
    assert set(PRESETS)


def test_every_number_of_a_run_may_stand_in_a_threshold(run, photos):
    words = ("--data", photos, "--limit", "3", "--null-images", "2", "--json")
    code, out, err = run("analyze", *TINY, *words, "--level", "all")
    assert code == 0, err
    names = json.loads(out)["summary"]
    thresholds([f"{name} > 0" for name in names], "analyze")
    thresholds([f"{name}_difference > 0" for name in names], "compare")
    code, out, _ = run(
        "intervene",
        *TINY,
        "--data",
        photos,
        "--limit",
        "4",
        "--replace",
        "share",
        "--replace",
        "skip",
        "--drop",
        "block",
        "--json",
    )
    assert code == 0
    assert all(EFFECTS.fullmatch(name) for name in json.loads(out)["summary"])


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP"])
def test_a_signal_while_the_page_is_drawn_keeps_the_numbers_and_is_said_in_one_line(name, run, photos, monkeypatch):
    number = getattr(signal, name)
    handler = signal.getsignal(number)

    def draw(findings, inside):
        os.kill(os.getpid(), number)
        os.kill(os.getpid(), number)  # a second one changes nothing

    monkeypatch.setattr("collapse_probe.report.findings.page.write_report", draw)
    code, _, err = run("analyze", *TINY, *QUICK, "--data", photos, "--limit", "2", "-q", "-o", "out")
    assert code == 128 + number
    line = "interrupted; the numbers are in out, without their page; `collapse-probe report out` draws it again"
    assert err.split("\n") in ([line, ""], ["", line, ""])
    assert "findings.json" in os.listdir("out")  # noqa: PTH208
    assert [path.name for path in Path().iterdir() if path.name.startswith(".")] == []
    assert signal.getsignal(number) is handler


def test_a_signal_while_it_measures_leaves_nothing(run, photos, monkeypatch):
    def measure(*arguments, **options):
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr("collapse_probe.analysis.analyze.measure", measure)
    code, _, err = run("analyze", *TINY, *QUICK, "--data", photos, "--limit", "2", "-q", "-o", "out")
    assert (code, err.strip()) == (143, "interrupted; no output was written")
    assert not Path("out").exists()


def test_a_signal_that_is_ignored_stays_ignored(run, photos, monkeypatch):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        monkeypatch.setattr(
            "collapse_probe.report.findings.page.write_report", lambda findings, inside: os.kill(os.getpid(), signal.SIGHUP)
        )
        code, _, err = run("analyze", *TINY, *QUICK, "--data", photos, "--limit", "2", "-q", "-o", "out")
        assert code == 0, err
    finally:
        signal.signal(signal.SIGHUP, before)
