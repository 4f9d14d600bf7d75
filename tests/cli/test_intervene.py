"""`collapse-probe intervene` as a user meets it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from test_analyze import SMALL_MODEL

from collapse_probe.results.intervention import Interventions


def intervene(run, photos, *more):
    return run("intervene", *SMALL_MODEL, "--data", photos, "--device", "cpu", *more)


def test_it_writes_the_whole_folder_and_says_what_sharing_costs(run, photos):
    code, out, err = intervene(run, photos, "--replace", "share", "--replace", "skip", "-o", "out")
    assert code == 0, err
    names = {str(p.relative_to("out")) for p in Path("out").rglob("*") if p.is_file()}
    assert {"interventions.json", "images.npz", "report.html", "figures/one-at-a-time.svg", "figures/cumulative.svg"} <= names
    assert "Using the map of the block before" in out
    assert "Leaving out the attention branch" in out
    assert "report: out/report.html" in out
    found = Interventions.load("out")
    assert list(found.single) == ["share", "skip"]
    assert "intervene" in found.run["command"] or found.run["command"]
    assert found.model["weights"] == "random (seed 0)"


def test_json_alone_on_stdout_and_no_folder(run, photos, tmp_path):
    code, out, err = intervene(run, photos, "--json=full", "--blocks", "1-2", "--limit", "3")
    assert code == 0, err
    content = json.loads(out)
    assert content["schema"] == "collapse-probe/interventions/1"
    assert [e["blocks"] for e in content["single"]["share"]] == [[1], [2]]
    assert content["data"]["images"] == 3
    assert list(tmp_path.iterdir()) == [] or not (tmp_path / "interventions").exists()


@pytest.mark.parametrize(
    ("more", "code", "said"),
    [
        (["--replace", "half"], 2, "half"),
        (["--blocks", "7"], 1, "blocks 0 to 2"),
        (["--blocks", "x"], 1, "names no blocks"),
        (["--metric", "attention-similarity"], 2, "--metric"),
        (["--fail-on", "share_all_agreement < 2", "--json=full"], 3, "share_all_agreement"),
    ],
)
def test_exit_codes(run, photos, more, code, said):
    found, _, err = intervene(run, photos, *more)
    assert found == code
    assert said in err
    assert "Traceback" not in err


def test_a_fix_in_the_model_is_part_of_it(run, photos):
    code, out, err = intervene(run, photos, "--fix", "attn-scale", "--replace", "uniform", "--json=full")
    assert code == 0, err
    content = json.loads(out)
    assert "attn-scale" in content["model"]["name"]
    assert content["single"]["uniform"][0]["kl"] is not None
