"""A gallery that is run again keeps a number only where everything that it depends on is the same, and loses none."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from factories import synthetic
from PIL import Image

from collapse_probe.analysis import survey as module
from collapse_probe.analysis.state.files import FOLDER, SUFFIX
from collapse_probe.analysis.survey import Entry, folders_of, listing, survey
from collapse_probe.data.images import open_data
from collapse_probe.results.findings import Findings
from collapse_probe.results.survey import FINISHED, WAITING, Survey


@pytest.fixture
def pictures(tmp_path):
    (tmp_path / "pictures").mkdir()
    for at in range(20):
        Image.new("RGB", (8, 8), (at, 0, 0)).save(tmp_path / "pictures" / f"{at:02}.png")
    return tmp_path / "pictures"


@pytest.fixture
def run(monkeypatch, pictures, tmp_path):
    """A gallery of addresses by label, each "measured" as a model of that name; which were, in order."""
    measured: list[str] = []

    def analyze(subject, images, **settings):
        if subject == "stop":
            raise KeyboardInterrupt
        measured.append(subject)
        return replace(synthetic(), model={**synthetic().model, "address": subject})

    monkeypatch.setattr(module, "analyze", analyze)
    monkeypatch.setattr(module, "resolve", lambda address, **how: address)
    monkeypatch.setattr(module, "draw_page", lambda results, inside: page_of(results, inside))

    def go(models, **settings):
        measured.clear()
        survey(
            [Entry(label, address) for label, address in models.items()],
            open_data(str(pictures)),
            tmp_path / "site",
            **settings,
        )
        return list(measured)

    return go


def page_of(results, inside):
    path = Path(inside) / ("index.html" if isinstance(results, Survey) else "report.html")
    path.write_text("a page", encoding="utf-8")
    return path


def test_labels_that_clean_to_one_folder_keep_their_own_findings(run, tmp_path):
    assert run({"a/b": "first"}) == ["first"]
    assert run({"a b": "second", "a/b": "first"}) == ["second", "first"]
    for row in Survey.load(tmp_path / "site").rows:
        assert Findings.load(tmp_path / "site" / row.folder).model["address"] == row.conditions["model"]
    assert run({"a b": "second", "a/b": "first"}) == []


def test_folders_differ_where_case_does_not_count():
    folders = folders_of([Entry("ViT", "a"), Entry("vit", "b")])
    assert len({folder.lower() for folder in folders.values()}) == 2


def test_a_change_of_any_picture_of_limits_or_of_a_page_measures_again(run, pictures, tmp_path):
    models = {"one": "first"}
    run(models)
    assert run(models) == []
    for at in (0, 1, 7):  # a sample of the files would miss one of these
        Image.new("RGB", (9, 8), (200, at, 0)).save(pictures / f"{at:02}.png")
        assert run(models) == ["first"]
    assert run(models, seed=1) == ["first"]
    assert run(models, seed=1, workers=2) == []
    (tmp_path / "site" / "models" / "one" / "report.html").unlink()
    assert run(models, seed=1) == ["first"]
    assert listing(open_data(str(pictures))) != listing(open_data(str(pictures), max_pixels=100))


def test_a_changed_file_in_a_model_s_folder_measures_again(run, tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    models = {"one": f"hf:{tmp_path / 'model'}"}
    run(models)
    assert run(models) == []
    (tmp_path / "model" / "config.json").write_text("{ }")
    assert len(run(models)) == 1


def test_what_was_measured_is_kept_when_a_later_run_is_interrupted(run, tmp_path):
    run({"one": "first", "two": "second"})
    with pytest.raises(KeyboardInterrupt):
        run({"zero": "stop", "one": "first", "two": "second"})
    assert [row.status for row in Survey.load(tmp_path / "site").rows] == [WAITING, FINISHED, FINISHED]
    assert run({"zero": "third", "one": "first", "two": "second"}) == ["third"]


def test_the_state_of_another_measurement_is_not_taken_up(run, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        run({"one": "stop"})
    state = tmp_path / "site" / "models" / "one" / FOLDER / f"run.1{SUFFIX}"
    state.parent.mkdir(parents=True)
    state.write_bytes(b"what the run that was stopped left")
    for settings, kept in (({}, True), ({"seed": 1}, False)):
        with pytest.raises(KeyboardInterrupt):
            run({"one": "stop"}, **settings)
        assert state.exists() is kept


def test_a_gallery_whose_file_is_damaged_is_measured_again(run, tmp_path):
    run({"one": "first"})
    path = tmp_path / "site" / "gallery.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    del content["rows"][0]["notes"]
    path.write_text(json.dumps(content), encoding="utf-8")
    lines: list[str] = []
    assert run({"one": "first"}, say=lines.append) == ["first"]
    assert lines[0].startswith("every model is measured again")
    assert run({"one": "first"}) == []
