"""A checkpoint that was loaded in part: every answer begins with the blocks whose weights it lacks."""

from __future__ import annotations

import pytest
import timm
import torch

import collapse_probe as cp
from collapse_probe.data.images import open_data
from collapse_probe.report.comparison.verdict import verdicts as compared
from collapse_probe.report.findings.page import render
from collapse_probe.report.intervention.verdict import verdicts as replaced
from collapse_probe.results.findings import Findings
from collapse_probe.results.readings import is_untrained, not_loaded
from collapse_probe.results.verdict import verdict_of

ADDRESS = "timm:vit_tiny_patch16_224"
SMALL = {"img_size": 64, "depth": 3, "embed_dim": 48, "num_heads": 3, "num_classes": 10}
CALL = {"partial": True, "model_kwargs": SMALL}
IN_PART = "the checkpoint was loaded in part, {} of 44 tensors of the model came from it."
ONE = f"1 of 3 blocks holds random parameters (block 1): {IN_PART.format(32)}"
ALL = f"All 3 blocks hold random parameters: {IN_PART.format(8)}"


@pytest.fixture(scope="module")
def images():
    return open_data("bundled:photos", limit=3)


def file_without(folder, blocks):
    state = timm.create_model("vit_tiny_patch16_224", **SMALL).state_dict()
    lost = tuple(f"blocks.{i}." for i in blocks)
    path = folder / f"without-{len(blocks)}.pth"
    torch.save({name: tensor for name, tensor in state.items() if not name.startswith(lost)}, path)
    return path


def analysed(path, images, **more):
    return cp.analyze(ADDRESS, images, checkpoint=path, null_images=0, gallery_images=0, **{**CALL, **more})


@pytest.mark.parametrize(("blocks", "first", "untrained"), [((1,), ONE, False), ((0, 1, 2), ALL, True), ((), "", False)])
def test_the_answer_begins_with_the_random_blocks(tmp_path, images, blocks, first, untrained):
    found = analysed(file_without(tmp_path, blocks), images)
    found.save(tmp_path / "out")
    found = Findings.load(tmp_path / "out")
    assert found.model["blocks_not_loaded"] == list(blocks)
    assert found.model["loaded"] == {"tensors": 44 - 12 * len(blocks), "of": 44}
    verdict = verdict_of(found)
    assert (verdict.sentences[0] == first, verdict.rules[0] == "loaded-in-part") == (bool(blocks), bool(blocks))
    assert is_untrained(found.model) is untrained
    outcome = {row["rule"]: row["answer"] for row in found.verdict}
    assert outcome["loaded-in-part"] == ("yes" if blocks else "no")
    assert outcome["untrained"] == ("yes" if untrained else "no")
    page = render(found, {})
    assert ("random parameters" in page) == bool(blocks)
    assert ("<b>This model is untrained:</b>" in page) == untrained


def test_comparisons_and_interventions_begin_with_them_too(tmp_path, images):
    path = file_without(tmp_path, (1,))
    one = analysed(path, images)
    comparison = cp.compare({"a": one, "b": analysed(file_without(tmp_path, ()), images)})
    assert compared(comparison)[0].sentences[0] == f"a: {ONE}"
    assert not any("random parameters" in sentence for sentence in compared(comparison)[0].sentences[1:])
    found = cp.intervene(ADDRESS, images, ("mean",), checkpoint=path, **CALL)
    assert replaced(found)[0].sentences[0] == ONE


def test_only_weights_count_and_only_where_there_was_a_checkpoint(images):
    fresh = cp.analyze(ADDRESS, images, pretrained=False, model_kwargs=SMALL, null_images=0, gallery_images=0)
    assert (fresh.model["loaded"], fresh.model["blocks_not_loaded"]) == (None, None)
    assert not_loaded(fresh.model) == ""


def test_weights_that_are_not_random_are_called_what_they_are():
    model = {"weights": "checkpoint in part, over augreg_in21k", "blocks": 12, "blocks_not_loaded": [3, 4, 5, 9]}
    text = not_loaded({**model, "loaded": {"tensors": 104, "of": 152}})
    assert text.startswith("4 of 12 blocks hold weights that are not the checkpoint's (augreg_in21k) (blocks 3–5, 9): ")
    assert not is_untrained({**model, "blocks_not_loaded": list(range(12))})
