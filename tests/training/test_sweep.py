"""The sweep itself: every cell on its own, what is finished kept, what failed told, nothing mixed up."""

from __future__ import annotations

import json
from contextlib import contextmanager
from dataclasses import replace

import pandas as pd
import pytest
import torch

import collapse_probe as cp
from collapse_probe.data.splits import split_data
from collapse_probe.errors import CollapseProbeError, OutputError, SettingError
from collapse_probe.registry import RECIPES
from collapse_probe.results.findings import Findings
from collapse_probe.results.sweep import FAILED, FINISHED, WAITING, Sweep
from collapse_probe.training.recipe import Recipe, differences
from collapse_probe.training.sweep import Conditions, grid_of, images_of, process_result
from collapse_probe.training.sweep_grid import cells
from collapse_probe.training.trainer import train

TINY = {"width": 16, "heads": 2, "batch_size": 8, "steps": 4}
FAST = {"limit": 12, "null_images": 0, "device": "cpu"}


def tiny() -> Recipe:
    return RECIPES["digits-quick"]().vary(**TINY)


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    """A small sweep over depth and fix, and its folder."""
    folder = tmp_path_factory.mktemp("sweep") / "out"
    return cp.sweep(tiny(), {"depth": [2, 3], "fix": [None, "re-attention"]}, folder, **FAST), folder


def test_every_cell_is_trained_and_measured_with_its_own_architecture(swept):
    found, folder = swept
    assert [cell.status for cell in found.cells] == [FINISHED] * 4
    for cell in found.cells:
        held = Findings.load(folder / cell.name / "findings")
        twin = Findings.load(folder / cell.name / "untrained")
        assert held.model["blocks"] == twin.model["blocks"] == cell.values["depth"]
        assert held.data["images"] == twin.data["images"] == 12
        assert held.data["names_sha256"] == twin.data["names_sha256"]
        assert held.model["weights"].startswith("trained")
        assert twin.model["weights"].startswith("random")
        assert cell.number("similar_blocks") == held.summary["similar_blocks"]
        assert cell.number("untrained.kappa_adjacent") == twin.summary["kappa_adjacent"]
        assert cell.numbers["pairs"] == cell.values["depth"] - 1
        account = json.loads((folder / cell.name / "training.json").read_text())
        assert (account["accuracy"], account["steps"]) == (cell.accuracy, 4)
        assert ("similar_blocks_probs" in cell.numbers) == (cell.values["fix"] is not None)


def test_the_measured_images_are_held_out_from_the_training():
    split = split_data("bundled:digits")
    cell = cells(tiny(), {"depth": [2]})[0]
    names = images_of(cell, Conditions(data="bundled:digits", limit=12)).names
    assert len(names) == 12
    assert set(names) <= set(split.held_out.names)
    assert not set(names) & set(split.train.names)
    assert images_of(cell, Conditions(data="bundled:digits")).names == split.held_out.names
    assert set(images_of(cell, Conditions(data="bundled:digits", eval_data="bundled:photos", limit=2)).names).isdisjoint(names)


def test_the_files_hold_the_whole_sweep(swept):
    found, folder = swept
    again = Sweep.load(folder)
    assert again.to_json() == found.to_json()
    table = pd.read_csv(folder / "table.csv", dtype=str, keep_default_na=False)
    assert list(table["cell"]) == [cell.name for cell in found.cells]
    assert list(table["fix"]) == ["none", "re-attention"] * 2
    assert [float(value) for value in table["accuracy"]] == [cell.accuracy for cell in found.cells]
    assert found.to_json()["published"]["similar_blocks"] == {"ViT": [5, 11, 15], "DeepViT": [0, 0, 0]}


def test_finished_cells_are_kept_and_a_larger_grid_adds_to_them(swept):
    found, folder = swept
    told, stamps = [], {cell.name: (folder / cell.name / "model.safetensors").stat().st_mtime_ns for cell in found.cells}
    more = cp.sweep(tiny(), {"depth": [2, 3], "fix": [None, "re-attention"]}, folder, seeds=2, report=told.append, **FAST)
    assert any("4 of 8 cells were finished before" in line for line in told)
    assert len(more.finished) == 8
    for name, stamp in stamps.items():
        assert (folder / name / "model.safetensors").stat().st_mtime_ns == stamp
    one, other = (next(c for c in more.cells if c.values["fix"] is None and c.seed == seed) for seed in (0, 1))
    assert one.loss != other.loss
    assert replace(more, seeds=[0], cells=more.cells[:4]).table.equals(found.table)


def test_another_recipe_in_the_same_folder_is_refused_and_says_what_differs(swept):
    _, folder = swept
    before = (folder / "sweep.json").read_text()
    with pytest.raises(SettingError, match=r"lr \(0\.001 then, 0\.5 now\)"):
        cp.sweep(tiny(), {"depth": [2, 3], "fix": [None]}, folder, changes={"lr": 0.5, "recalibrate": 20}, **FAST)
    with pytest.raises(SettingError, match=r"architecture\.vit\.mlp_ratio"):
        cp.sweep(tiny(), {"depth": [2], "fix": [None]}, folder, changes={"mlp_ratio": 3.0}, **FAST)
    with pytest.raises(SettingError, match=r"data .*bundled:digits.* then, .*bundled:photos"):
        cp.sweep(tiny(), {"depth": [2], "fix": [None]}, folder, data="bundled:photos", **FAST)
    assert (folder / "sweep.json").read_text() == before


def test_other_measurements_are_taken_anew_without_training_again(swept):
    found, folder = swept
    vary = {"depth": [2], "fix": [None]}
    stamp = (folder / found.cells[0].name / "model.safetensors").stat().st_mtime_ns
    few = cp.sweep(tiny(), vary, folder, **{**FAST, "limit": 5})
    assert few.cells[0].numbers["images"] == 5
    assert (folder / few.cells[0].name / "model.safetensors").stat().st_mtime_ns == stamp
    back = cp.sweep(tiny(), vary, folder, **FAST)
    assert back.cells[0].numbers == found.cells[0].numbers


def test_a_cell_that_was_begun_goes_on_to_the_same_end(swept, tmp_path):
    found, _ = swept
    cell = next(c for c in grid_of(tiny(), {"depth": [2], "fix": [None]}, 1, None)[0])
    train(cell.recipe, "bundled:digits", tmp_path / cell.name, device="cpu", stop_after=3)
    told = []
    again = cp.sweep(tiny(), {"depth": [2], "fix": [None]}, tmp_path, report=told.append, **FAST)
    assert any("going on after step 3 of 4" in line for line in told)
    same = next(c for c in found.cells if c.name == cell.name)
    assert (again.cells[0].loss, again.cells[0].numbers) == (same.loss, same.numbers)


def test_a_failed_cell_stops_no_other_and_is_tried_again(tmp_path):
    vary = {"classes": [3, 10]}
    changes = {"depth": 2}
    found = cp.sweep(tiny(), vary, tmp_path, changes=changes, **FAST)
    assert [cell.status for cell in found.cells] == [FAILED, FINISHED]
    assert "the model 3" in found.cells[0].reason
    text = (tmp_path / "classes=3,seed=0" / "error.txt").read_text()
    assert "bundled:digits has 10 classes" in text
    assert "Traceback" in text
    assert found.table["status"].tolist() == [FAILED, FINISHED]
    told = []
    cp.sweep(tiny(), vary, tmp_path, changes=changes, report=told.append, **FAST)
    assert any(line.startswith("cell 1 of 1: classes=3") for line in told)


def test_a_failure_that_is_mended_leaves_no_error_behind(tmp_path, monkeypatch):
    import collapse_probe.training.sweep as sweep_cell

    def broken(*_, **__):
        raise MemoryError("no room")

    with monkeypatch.context() as patch:
        patch.setattr(sweep_cell, "measure", broken)
        found = cp.sweep(tiny(), {"depth": [2]}, tmp_path, **FAST)
    assert found.cells[0].reason == "MemoryError: no room"
    found = cp.sweep(tiny(), {"depth": [2]}, tmp_path, **FAST)
    assert found.cells[0].status == FINISHED
    assert not (tmp_path / found.cells[0].name / "error.txt").exists()


def test_an_interruption_leaves_the_finished_cells_on_disk(tmp_path):
    calls = []

    @contextmanager
    def watch(total):
        calls.append(total)
        if len(calls) == 2:
            raise KeyboardInterrupt
        yield lambda done, skipped: None

    with pytest.raises(KeyboardInterrupt):
        cp.sweep(tiny(), {"depth": [2, 3]}, tmp_path, watch=watch, **FAST)
    assert calls == [32, 32]
    assert [cell.status for cell in Sweep.load(tmp_path).cells] == [FINISHED, WAITING]


def test_two_jobs_find_what_one_finds(swept, tmp_path):
    found, _ = swept
    state = torch.get_rng_state()
    beside = cp.sweep(tiny(), {"depth": [2, 3], "fix": [None]}, tmp_path, jobs=2, **FAST)
    assert torch.equal(state, torch.get_rng_state())
    expected = [cell for cell in found.cells if cell.values["fix"] is None]
    assert [cell.name for cell in beside.cells] == [cell.name for cell in expected]
    for one, other in zip(beside.cells, expected, strict=True):
        assert one.status == FINISHED
        assert one.loss == pytest.approx(other.loss, rel=1e-4)
        assert one.number("attention_similarity_adjacent") == pytest.approx(
            other.number("attention_similarity_adjacent"), rel=1e-3
        )


def test_a_process_that_was_killed_is_a_failed_cell(tmp_path):
    cell = cells(tiny(), {"depth": [2]})[0]
    conditions = Conditions(data="bundled:digits")
    outcome = process_result(cell, tmp_path / cell.name, conditions, -9)
    assert outcome.status == FAILED
    assert "exit code -9" in outcome.reason
    assert "exit code -9" in (tmp_path / cell.name / "error.txt").read_text()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"jobs": 0}, "number of jobs"),
        ({"limit": 0}, "at least 1"),
        ({"null_images": -1}, "0 or more"),
        ({"data": "nowhere"}, "nowhere"),
    ],
)
def test_mistakes_are_told_before_any_training(tmp_path, options, said):
    with pytest.raises(CollapseProbeError, match=said):
        cp.sweep(tiny(), {"depth": [2]}, tmp_path / "out", **{**FAST, **options})
    assert not (tmp_path / "out").exists()


def test_a_recipe_without_data_asks_for_some(tmp_path):
    with pytest.raises(SettingError, match="--data"):
        cp.sweep(replace(tiny(), data=""), {"depth": [2]}, tmp_path / "out", **FAST)


def test_a_fix_that_is_varied_has_its_batch_norm_settled_unless_told_otherwise():
    made, notes = grid_of(tiny(), {"fix": [None, "re-attention"]}, 1, None)
    assert {cell.recipe.recalibrate for cell in made} == {20}
    assert "BatchNorm" in notes[0]
    made, notes = grid_of(tiny(), {"fix": [None, "re-attention"]}, 1, {"recalibrate": 0})
    assert ({cell.recipe.recalibrate for cell in made}, notes) == ({0}, [])
    assert grid_of(tiny(), {"depth": [2]}, 1, None)[0][0].recipe.recalibrate == tiny().recalibrate


def test_differences_are_named_by_their_dotted_place():
    assert differences({"a": {"b": 1, "c": 2}}, {"a": {"b": 1, "c": 3}}) == ["a.c (2 then, 3 now)"]
    assert differences({"a": 1}, {"a": 1}) == []


@pytest.mark.parametrize("content", ["{", '{"schema": "other"}', '{"schema": "collapse-probe/sweep/1"}'])
def test_a_folder_that_holds_no_sweep_is_refused(tmp_path, content):
    with pytest.raises(OutputError):
        Sweep.load(tmp_path)
    (tmp_path / "sweep.json").write_text(content)
    with pytest.raises(OutputError):
        Sweep.load(tmp_path)
