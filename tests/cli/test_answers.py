"""What a command answers with: verdict and summary as JSON, all numbers on request, and pages that come later without torch."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from factories import findings_of

from collapse_probe.results.comparison import Comparison
from collapse_probe.results.findings import Findings
from collapse_probe.results.intervention import Interventions
from collapse_probe.results.sweep import Sweep

MODEL = ("-m", "timm:vit_tiny_patch16_224", "--no-pretrained", "--img-size", "32", "--model-kwargs", "depth=3")
PAGE = {"report.html", "figures"}


def answer(run, *words):
    code, out, err = run(*words)
    assert code == 0, err
    content = json.loads(out)
    assert content["schema"] == "collapse-probe/answer/1"
    return content


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """Folders of findings of two subjects."""
    rng, place = np.random.default_rng(0), tmp_path_factory.mktemp("two")
    for name in ("one", "other"):
        findings_of(*rng.uniform(0.2, 0.8, (2, 6, 3))).save(place / name)
    return place / "one", place / "other"


def test_json_is_the_verdict_and_the_summary_of_the_findings(run, photos):
    found = answer(run, "analyze", *MODEL, "--data", photos, "--json", "-q", "-o", "out")
    findings = Findings.load("out")
    assert found["of"] == "collapse-probe/findings/1"
    assert found["summary"] == findings.summary
    assert [each["sentences"] for each in found["answers"]] == [list(findings.answer["sentences"])]
    assert found["answers"][0]["case"] == findings.answer["case"]
    assert (found["model"]["blocks"], found["data"]["images"]) == (3, len(findings.images["names"]))
    similarity = findings.metrics["attention-similarity"].nulls.values["untrained"]
    assert found["untrained"]["attention_similarity_adjacent"] == pytest.approx(np.diagonal(similarity, -1).mean())
    diversity = findings.metrics["patch-diversity"].nulls.values["untrained"]
    assert found["untrained"]["patch_diversity_last"] == pytest.approx(diversity[-1])
    assert found["untrained"].keys() <= found["summary"].keys()
    assert (found["output"], found["page"]) == ("out", "out/report.html")
    assert found["notes"] == findings.run["notes"]
    numbers = [value for part in ("summary", "untrained") for value in found[part].values()]
    assert 20 <= len(numbers) <= 45


def test_without_a_folder_json_writes_nothing_and_says_so(run, photos, tmp_path):
    found = answer(run, "analyze", *MODEL, "--data", photos, "--limit", "2", "--null-images", "0", "--json", "-q")
    assert (found["output"], found["page"], found["untrained"]) == (None, None, {})
    assert list(tmp_path.iterdir()) == []


def test_a_bare_json_takes_no_word_that_follows_it(run, two):
    found = answer(run, "compare", "--json", *two)
    assert list(found["subjects"]) == ["one", "other"]
    full = json.loads(run("compare", "--json=full", *two)[1])
    assert full["schema"] == "collapse-probe/comparison/1"
    assert found["summary"]["other"] == full["subjects"][1]["summary"]
    (pair,), (whole,) = found["pairs"], full["pairs"]
    assert pair["differences"].keys() == whole["metrics"].keys()
    for name, each in pair["differences"].items():
        assert [each["difference"]] == whole["metrics"][name]["overall"]["difference"]
    code, _, err = run("compare", "--json=all", *two)
    assert code == 2
    assert "summary" in err


@pytest.mark.parametrize("value", ["true", "summary", "full", "false"])
def test_a_file_of_flags_may_ask_for_json(value, run, two, tmp_path):
    (tmp_path / "flags.yaml").write_text(f"json: {value}\nno-page: true\n")
    code, out, err = run("compare", "--config", "flags.yaml", *two, "-o", "out")
    assert code == 0, err
    schema = {"full": "collapse-probe/comparison/1", "false": None}.get(value, "collapse-probe/answer/1")
    assert (json.loads(out)["schema"] if schema else None) == schema
    assert not PAGE & {path.name for path in Path("out").iterdir()}


def test_no_page_leaves_the_page_out_and_report_draws_it(run, photos, two, tmp_path):
    single = ("--data", photos, "--limit", "3", "-q")
    code, out, err = run("analyze", *MODEL, *single, "--no-page", "-o", "a")
    assert code == 0, err
    assert "`collapse-probe report a` draws their page" in out
    assert answer(run, "compare", *two, "--json", "--no-page", "-o", "b")["page"] is None
    effect = answer(run, "intervene", *MODEL, *single, "--replace", "uniform", "--json", "--no-page", "-o", "c")
    assert effect["summary"] == Interventions.load("c").summary
    assert effect["answers"][0]["label"] == "uniform"
    small = ("--set", "width=16 heads=2 batch_size=8", "--steps", "2", "--limit", "8", "--null-images", "0", "--device", "cpu")
    words = ("digits-quick", *small, "--vary", "depth=2,3", "--json", "--no-page", "-q", "-o", "d")
    cells = answer(run, "sweep", *words)["summary"]
    assert {name: each["similar_blocks"] for name, each in cells.items()} == {
        cell.name: cell.number("similar_blocks") for cell in Sweep.load("d").cells
    }
    assert run("analyze", *MODEL, *single, "--part", "1/1", "-o", "parts")[0] == 0
    merged = answer(run, "merge", "parts", "--json", "--no-page", "-q", "-o", "e")
    assert merged["summary"] == Findings.load("e").summary
    for folder in "abcde":
        assert not PAGE & {path.name for path in Path(folder).iterdir()}, folder
        code, out, err = run("report", folder)
        assert code == 0, err
        assert {path.name for path in Path(folder).iterdir()} >= PAGE
    assert Comparison.load("b").first == "one"


def test_a_page_that_is_left_out_takes_the_page_of_the_run_before_along(run, two):
    for more in ((), ("--no-page",)):
        assert run("compare", *two, "-q", "-o", "out", *more)[0] == 0
    assert not PAGE & {path.name for path in Path("out").iterdir()}


def test_a_page_is_drawn_without_torch(two):
    code = """
import sys
from collapse_probe.cli.main import main
try:
    main(["report", sys.argv[1]])
except SystemExit as end:
    heavy = {"torch", "timm", "torchvision", "pandas", "seaborn"} & set(sys.modules)
    sys.exit(str(heavy) if heavy else end.code)
"""
    subprocess.run([sys.executable, "-c", code, str(two[0])], check=True, timeout=120)
    assert (two[0] / "report.html").exists()
