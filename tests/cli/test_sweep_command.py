"""`collapse-probe sweep` as a user meets it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from collapse_probe.cli.main import main

SMALL = "--set", "width=16 heads=2 batch_size=8", "--steps", "3", "--limit", "8", "--null-images", "0", "--device", "cpu"


@pytest.fixture
def run(capsys, tmp_path, monkeypatch):
    """Run the program in an empty folder; exit code, stdout, stderr."""
    monkeypatch.chdir(tmp_path)

    def call(*words):
        with pytest.raises(SystemExit) as stop:
            main(["sweep", *map(str, words)])
        out = capsys.readouterr()
        return stop.value.code, out.out, out.err

    return call


def test_it_writes_a_folder_for_each_cell_one_table_and_one_page_and_keeps_what_is_finished(run):
    words = ("digits-quick", *SMALL, "--vary", "depth=2,3", "-o", "out")
    code, out, err = run(*words)
    assert code == 0, err
    assert "Along depth" in out
    assert "report: out/report.html" in out
    assert "cell 2 of 2: depth=3,seed=0" in err
    here = {p.name for p in Path("out").iterdir()}
    assert here == {"depth=2,seed=0", "depth=3,seed=0", "figures", "manifest.json", "report.html", "sweep.json", "table.csv"}
    cell = {p.name for p in Path("out/depth=2,seed=0").iterdir()}
    assert {"model.safetensors", "training.json", "recipe.json", "cell.json", "findings", "untrained"} <= cell
    assert json.loads(Path("out/sweep.json").read_text())["run"]["command"].startswith("collapse-probe")
    code, out, err = run(*words, "--json=full", "-q")
    assert (code, err) == (0, "")
    assert [held["status"] for held in json.loads(out)["cells"]] == ["finished", "finished"]


def test_a_failed_cell_makes_the_exit_code_one_after_all_others(run):
    code, out, err = run("digits-quick", *SMALL, "--set", "depth=2", "--vary", "classes=3,10", "-o", "out")
    assert code == 1
    assert "1 of 2 cells failed" in err.splitlines()[-1]
    assert "classes=3,seed=0 (SettingError" in err.splitlines()[-1]
    assert "report: out/report.html" in out


def test_a_dry_run_says_what_every_cell_costs_and_writes_nothing(run, tmp_path):
    code, out, err = run(
        "digits-quick", *SMALL, "--vary", "depth=2,3", "--vary", "fix=none,re-attention", "--seeds", "2", "--dry-run"
    )
    assert code == 0, err
    assert out.count(" parameters ") == 8
    assert "depth=3,fix=re-attention,seed=1" in out
    assert "8 cells" in out
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (("digits-quick",), 2, "Nothing to vary"),
        (("digits-quick", "--vary", "depth=2", "--vary", "depth=3"), 2, "given twice"),
        (("digits-quick", "--vary", "depth"), 1, "NAME=VALUE"),
        (("digits-quik", "--vary", "depth=2"), 1, "did you mean 'digits-quick'"),
        (("digits-quick", "--vary", "dpeth=2"), 1, "did you mean depth"),
        (("digits-quick", "--vary", "depth=2", "--data", "nowhere"), 1, "there is no folder nowhere"),
    ],
)
def test_mistakes_are_told_in_one_line(run, words, code, said, tmp_path):
    came, _, err = run(*words)
    assert came == code
    assert said in err.splitlines()[-1]
    assert list(tmp_path.iterdir()) == []
