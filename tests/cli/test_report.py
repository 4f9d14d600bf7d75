"""`report` rebuilds the page of whatever a folder holds, from that folder alone."""

from __future__ import annotations

import numpy as np
import pytest
from click.testing import CliRunner
from collapse_probe.cli.main import group
from factories import findings_of, small_vit

from collapse_probe.analysis.compare import compare
from collapse_probe.analysis.intervene import intervene
from collapse_probe.data.images import open_data
from collapse_probe.errors import OutputError


def comparison(folder):
    rng = np.random.default_rng(0)
    compare(
        {"one": findings_of(*rng.uniform(0.2, 0.8, (2, 6, 3))), "two": findings_of(*rng.uniform(0.2, 0.8, (2, 6, 3)))}
    ).save(folder)
    return "two compared with one"


def findings(folder):
    findings_of(*np.random.default_rng(0).uniform(0.2, 0.8, (2, 6, 3))).save(folder)
    return "Block by block"


def interventions(folder):
    intervene(small_vit(depth=2), open_data("bundled:digits", limit=4), ["uniform"]).save(folder)
    return "maps replaced while the model runs"


@pytest.mark.parametrize("fill", [comparison, findings, interventions])
def test_the_page_is_rebuilt_from_the_folder(fill, tmp_path):
    said = fill(tmp_path / "out")
    result = CliRunner().invoke(group, ["report", str(tmp_path / "out")])
    assert result.exit_code == 0, result.output
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert said in " ".join(page.split())
    assert any((tmp_path / "out" / "figures").iterdir())


def test_a_folder_that_holds_nothing_is_told(tmp_path):
    result = CliRunner().invoke(group, ["report", str(tmp_path)])
    assert isinstance(result.exception, OutputError)
    assert "is not a findings folder" in str(result.exception)
    assert not (tmp_path / "report.html").exists()
