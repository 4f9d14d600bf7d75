"""Damaged results are refused in one line that names the file, the place in it and what to do; nothing else is ever raised."""

from __future__ import annotations

import copy
import json
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from collapse_probe.cli.main import group
from factories import findings_of, synthetic

from collapse_probe.analysis.compare import compare
from collapse_probe.errors import CollapseProbeError, OutputError
from collapse_probe.files import MANIFEST
from collapse_probe.registry import RECIPES
from collapse_probe.results.comparison import Comparison
from collapse_probe.results.findings import Findings
from collapse_probe.results.intervention import Effect, Interventions
from collapse_probe.results.sweep import CellResult, Sweep
from collapse_probe.training.sweep import Conditions, finished_result
from collapse_probe.training.sweep_grid import Cell


def findings():
    made = synthetic(4)
    return replace(made, data={**made.data, "images": 2}, images={"names": np.array(["a", "b"]), "x": np.ones((2, 3))})


def comparison():
    values = np.random.default_rng(0).uniform(0.2, 0.8, (2, 6, 3))
    return compare({"one": findings_of(*values), "two": findings_of(*values[::-1])})


def interventions():
    effects = {"share": (Effect("share", (1,), kl=0.5, kl_ci95=(0.4, 0.6), agreement=0.9, accuracy=0.5),)}
    made = synthetic(4)
    facts = {"model": made.model, "data": {**made.data, "images": 2}, "run": {"seed": 0}, "similarity": {"raw": [0.5, None]}}
    plain = {"accuracy": 0.6, "reason": "", "conditions": ["share 1"]}
    images = {"names": np.array(["a", "b"]), "kl": np.ones((1, 2))}
    return Interventions(**facts, plain=plain, single=effects, cumulative=effects, kinds={"share": "shared"}, images=images)


def sweep():
    cells = tuple(
        CellResult(
            name=f"depth={d},seed=0", values={"depth": d}, seed=0, status="finished", accuracy=0.5, numbers={"images": 4}
        )
        for d in (2, 3)
    )
    facts = {"recipe": {"name": "r"}, "changes": {}, "data": {"data": "d"}, "run": {"id": "a"}}
    return Sweep(**facts, varied={"depth": [2, 3]}, seeds=[0], cells=cells)


KINDS = {
    "findings.json": (findings, Findings),
    "comparison.json": (comparison, Comparison),
    "interventions.json": (interventions, Interventions),
    "sweep.json": (sweep, Sweep),
}
VALUES = [None, True, -1, 7.5, 1e300, float("nan"), float("inf"), 10**400, "", "x", [], {}, [[]], [None], {"a": 1}, [1, [2]]]


def mutated(content, rng):
    """The text of `content` with one place of it deleted or replaced, or cut off."""
    content = copy.deepcopy(content)
    if rng.random() < 0.1:
        text = json.dumps(content)
        return text[: rng.randrange(len(text))]
    at, path = content, []
    while isinstance(at, (dict, list)) and at and (not path or rng.random() < 0.8):
        path.append((at, rng.choice(list(at) if isinstance(at, dict) else range(len(at)))))
        at = path[-1][0][path[-1][1]]
    inside, key = path[-1]
    if rng.random() < 0.3:
        del inside[key]
    else:
        inside[key] = rng.choice(VALUES)
    return json.dumps(content)


@pytest.fixture(params=KINDS)
def stored(request, tmp_path):
    """A folder of each kind, the name of its document, and its class."""
    make, kind = KINDS[request.param]
    folder = make().save(tmp_path / "out")
    kind.load(folder)
    return folder, request.param, kind


def test_any_mutation_is_read_or_refused_in_one_line(stored):
    folder, name, kind = stored
    content, rng, refused = json.loads((folder / name).read_text()), random.Random(0), []
    for _ in range(60):
        (folder / name).write_text(mutated(content, rng))
        try:
            kind.load(folder)
        except OutputError as error:
            refused.append(str(error))
    assert len(refused) > 20
    assert all(name in text and "\n" not in text for text in refused)
    assert all("again" in text or f"expected {name} as" in text for text in refused)


@pytest.mark.parametrize("text", ["", "[]", "null", "3", '{"schema": "collapse-probe/findings/1"}', "[" * 100_000, "{" * 5])
def test_what_is_no_document_is_refused(stored, text):
    folder, name, kind = stored
    (folder / name).write_text(text)
    with pytest.raises(OutputError, match=name):
        kind.load(folder)


@pytest.mark.parametrize(
    ("name", "path", "value", "said"),
    [
        ("findings.json", "metrics attention-similarity values 1 0", 1.4, "number from -1 to 1, came 1.4"),
        ("findings.json", "metrics attention-similarity values 1", [0.5], "rows of one length"),
        ("findings.json", "metrics attention-similarity values 1 0", "0.5", "a number from -1 to 1, came '0.5'"),
        ("findings.json", "metrics attention-similarity stderr 1 0", -0.5, "stderr: expected a number from 0 up"),
        ("findings.json", "metrics attention-similarity ci95 1 0", [0.9, 0.1], "the lower end first"),
        ("findings.json", "metrics attention-similarity nulls other_token", [[0.5]], "numbers of the shape"),
        ("findings.json", "metrics attention-similarity nulls other_token 1 0", -1.5, "number from -1 to 1"),
        ("findings.json", "metrics attention-similarity nulls images other_token", -3, "whole number from 0 up"),
        ("findings.json", "metrics attention-similarity dims", ["block"], "one axis for each of block"),
        ("findings.json", "metrics attention-entropy values 0 0", -0.5, "number from 0 up"),
        ("findings.json", "data images", -3, "data.images: expected a whole number from 0 up, came -3"),
        ("findings.json", "data images", 5, "names .2. images, the findings are of 5"),
        ("findings.json", "summary patch_diversity_last", 1.5, "number from 0 to 1, came 1.5"),
        ("findings.json", "summary similar_blocks", -1, "number from 0 up, came -1"),
        ("findings.json", "model blocks", 1.5, "model.blocks: expected a whole number"),
        ("findings.json", "answer", {"case": "shared"}, "answer lacks sentences"),
        ("comparison.json", "pairs 0 metrics attention-similarity p 0", 1.5, "number from 0 to 1"),
        ("comparison.json", "pairs 0 metrics attention-similarity places", [1], "a list of 1"),
        ("comparison.json", "subjects 0 folder", "subjects/../../etc", "folders inside subjects/"),
        ("comparison.json", "subjects 0 folder", "/etc", "folders inside subjects/"),
        ("comparison.json", "pairs 0 second", "three", "labels of subjects"),
        ("interventions.json", "single share 0 agreement", 1.2, "number from 0 to 1"),
        ("interventions.json", "single share 0 kl", -1.0, "number from 0 up"),
        ("interventions.json", "cumulative", {}, "cumulative lacks share"),
        ("sweep.json", "cells 0 status", "almost", "one of finished, failed, waiting"),
        ("sweep.json", "cells 0 values", {}, "has no value of depth"),
        ("sweep.json", "cells 0 accuracy", 97.0, "number from 0 to 1"),
        ("sweep.json", "cells 0 more", 1, "has 'more', which it cannot have"),
    ],
)
def test_values_that_cannot_be_are_refused_with_their_place(name, path, value, said, tmp_path):
    make, kind = KINDS[name]
    folder = make().save(tmp_path / "out")
    content = json.loads((folder / name).read_text())
    *above, last = [int(part) if part.isdecimal() else part for part in path.split()]
    inside = content
    for part in above:
        inside = inside[part]
    inside[last] = value
    (folder / name).write_text(json.dumps(content))
    with pytest.raises(OutputError, match=said):
        kind.load(folder)


def torch_zip(path):
    torch.save({"a": torch.ones(2)}, path)


class Bomb:
    def __reduce__(self):
        return (Path.touch, (Path("exploded"),))


def pickled(path):
    np.savez(path, names=np.array([Bomb()], dtype=object))


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def huge(path):
    np.savez(path, names=np.array(["a", "b"]))
    path.write_bytes(path.read_bytes().replace(b"(2,)", b"(9999999999999,)"))


@pytest.mark.parametrize(
    "damage", [torch_zip, pickled, cut, huge, lambda path: path.write_bytes(b""), lambda path: path.write_text("x")]
)
@pytest.mark.parametrize("name", ["images.npz", "gallery.npz"])
@pytest.mark.parametrize("listed", [True, False])
def test_damaged_arrays_are_refused_by_name_and_never_unpickled(damage, name, listed, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = findings().save(tmp_path / "out")
    damage(folder / name)
    if not listed:
        (folder / MANIFEST).unlink()
    result = CliRunner().invoke(group, ["report", str(folder)])
    assert isinstance(result.exception, OutputError)
    assert name in str(result.exception)
    assert "take the folder from where it was written" in str(result.exception)
    assert not Path("exploded").exists()


@pytest.mark.parametrize(
    "change",
    [
        lambda a: {**a, "maps": a["maps"][:1]},
        lambda a: {**a, "maps": a["maps"][0]},
        lambda a: {**a, "maps": np.full_like(a["maps"], np.nan)},
        lambda a: {**a, "pictures": a["pictures"].astype(np.float32)},
        lambda a: {**a, "names": np.arange(len(a["names"]))},
        lambda a: {**a, "blocks": np.arange(99)},
        lambda a: {**a, "query": np.array(3)},
        lambda a: {**a, "thumbnails": a["pictures"]},
        lambda a: {key: value for key, value in a.items() if key != "pictures"},
    ],
)
def test_a_gallery_whose_arrays_do_not_fit_is_refused(change, tmp_path):
    folder = findings().save(tmp_path / "out")
    (folder / MANIFEST).unlink()
    with np.load(folder / "gallery.npz") as file:
        arrays = dict(file)
    np.savez(folder / "gallery.npz", **change(arrays))
    with pytest.raises(OutputError, match=r"gallery.npz is no gallery: its arrays do not fit"):
        Findings.load(folder)


def test_images_with_another_number_of_rows_are_refused(tmp_path):
    folder = findings().save(tmp_path / "out")
    (folder / MANIFEST).unlink()
    np.savez(folder / "images.npz", names=np.array(["a", "b"]), x=np.ones(3))
    with pytest.raises(OutputError, match=r"images.npz holds 'x' float64 \[3\], not a row for each of 2 images"):
        Findings.load(folder)


def test_a_page_that_cannot_be_drawn_says_what_was_changed(tmp_path, monkeypatch):
    def fail(numbers, inside):
        raise KeyError("answer")

    monkeypatch.setattr("collapse_probe.report.findings.page.write_report", fail)
    folder = findings().save(tmp_path / "out")
    for change, said in ((False, "please report this"), (True, "findings.json was changed after the run wrote it")):
        if change:
            (folder / "findings.json").write_text((folder / "findings.json").read_text() + "\n")
        result = CliRunner().invoke(group, ["report", str(folder)])
        assert isinstance(result.exception, CollapseProbeError)
        assert "cannot be drawn from its numbers (KeyError: 'answer')" in str(result.exception)
        assert said in str(result.exception)


@pytest.mark.parametrize("outcome", [None, [], {}, {"name": "a"}, {**sweep().cells[0].to_json(), "seed": "x"}])
def test_a_damaged_cell_of_a_sweep_is_named(outcome, tmp_path):
    conditions, cell = Conditions(data="d"), Cell(values={"depth": 2}, seed=0, recipe=RECIPES["digits-mhsa"]())
    (tmp_path / "findings").mkdir()
    content = {"measured": conditions.measured(), "outcome": sweep().cells[0].to_json()}
    (tmp_path / "cell.json").write_text(json.dumps(content))
    assert finished_result(cell, tmp_path, conditions).accuracy == 0.5
    (tmp_path / "cell.json").write_text(json.dumps({**content, "outcome": outcome}))
    with pytest.raises(OutputError, match=r"cell.json is damaged .*; remove it, and the cell is measured again"):
        finished_result(cell, tmp_path, conditions)
