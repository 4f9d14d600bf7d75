"""What befalls the untrained copy never costs the numbers of the model itself."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from factories import small_vit

import collapse_probe as cp
from collapse_probe.models.loading import resolve
from collapse_probe.results.findings import Findings


@pytest.mark.parametrize(
    "error", [MemoryError(), torch.OutOfMemoryError("out of memory"), KeyError("head"), RuntimeError("a\nb")], ids=repr
)
def test_the_model_s_numbers_are_kept_and_the_reason_is_said(error, photos, tmp_path):
    def fresh(seed):
        raise error

    said = []
    subject = replace(resolve(small_vit(depth=2)), fresh=fresh)
    found = cp.analyze(subject, str(photos), limit=3, gallery_images=0, report=said.append)
    nulls = Findings.load(found.save(tmp_path / "out")).metrics["attention-similarity"].nulls
    assert nulls.values["untrained"] is None
    assert f"the untrained copy failed ({type(error).__name__}" in nulls.reasons["untrained"]
    assert "\n" not in nulls.reasons["untrained"]
    assert any("the model's own numbers are kept" in line for line in said)
