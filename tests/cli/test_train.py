"""`collapse-probe train` as a user meets it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from collapse_probe.registry import RECIPES

QUICK = ["train", "digits-quick", "--steps", "6", "--set", "depth=2 width=16 heads=2 batch_size=8"]


def test_train_writes_the_folder_and_says_how_it_ended(run):
    code, out, err = run(*QUICK, "--fix", "re-attention", "--penalty", "patch-cosine=0.1", "--seed", "3", "-o", "out")
    assert code == 0, err
    assert "of the held-out images right" in out
    assert "out/model.safetensors" in out
    account = json.loads(Path("out/training.json").read_text())
    recipe = account["recipe"]
    assert (recipe["steps"], recipe["seed"], recipe["penalties"]) == (6, 3, {"patch-cosine": [0.1, {}]})
    assert recipe["architecture"]["fixes"] == {"re-attention": {}}
    assert account["command"].startswith("collapse-probe")


def test_stopping_and_going_on(run):
    code, out, _ = run(*QUICK, "-o", "out", "--stop-after", "3")
    assert code == 0
    assert "--resume" in out
    code, _, err = run(*QUICK, "-o", "out")
    assert code == 1
    assert "already holds a run" in err
    code, _, err = run(*QUICK, "-o", "out", "--resume")
    assert code == 0
    assert "going on after step 3 of 6" in err


def test_what_was_trained_can_be_analysed_and_compared(run, photos):
    run(*QUICK, "-o", "out")
    code, out, err = run(
        "analyze",
        "-m",
        "out/model.safetensors",
        "--data",
        photos,
        "--null-images",
        "2",
        "--json=full",
        "-q",
        "--metric",
        "patch-diversity",
    )
    assert code == 0, err
    assert json.loads(out)["model"]["source"] == "ours"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["train", "digits-quik"], "did you mean 'digits-quick'"),
        ([*QUICK, "--set", "dpeth=3"], "did you mean depth"),
        ([*QUICK, "--fix", "re-atention"], "did you mean"),
        ([*QUICK, "--penalty", "patch-cosin=1"], "did you mean"),
        ([*QUICK, "--data", "nowhere"], "there is no folder nowhere"),
        (["train", "digits-quick", "--set", "classes=3"], "classes=10"),
        ([*QUICK, "--device", "cuda:7"], "cannot be used here"),
    ],
)
def test_mistakes_are_told_in_one_line(run, words, said):
    code, _, err = run(*words)
    assert code == 1
    assert said in err.splitlines()[-1]


@pytest.mark.parametrize("word", ["patch-cosine", "patch-cosine=much"])
def test_a_penalty_needs_a_coefficient(run, word):
    code, _, err = run(*QUICK, "--penalty", word)
    assert code == 2
    assert "NAME=COEF" in err


@pytest.mark.parametrize("name", [name for name in RECIPES if not name.startswith("imagenet")])
def test_a_dry_run_says_what_a_recipe_costs_and_writes_nothing(run, name, tmp_path):
    code, out, err = run("train", name, "--dry-run")
    assert code == 0, err
    for word in ("parameters", "GFLOP", "memory", "expected time", "steps"):
        assert word in out
    assert json.loads(out[: out.rindex("}") + 1])["name"] == name
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in RECIPES if name.startswith("imagenet")])
def test_a_dry_run_of_imagenet_recipes_works_offline(run, name, tmp_path):
    code, out, err = run("train", name, "--dry-run")
    assert code == 0, err
    assert "expected time" in out
    assert list(tmp_path.iterdir()) == []


def test_recipes_and_penalties_are_listed(run):
    code, out, _ = run("ls", "recipes", "digits")
    assert code == 0
    assert "digits-tied-mhsa" in out
    assert "positive control" in out
    code, out, _ = run("ls", "penalties")
    assert "patch-cosine" in out


def test_an_alarm_stops_with_its_own_code_and_leaves_a_model_that_can_be_analysed(run, photos):
    watched = (*QUICK, "--monitor-every", "2", "--set", "monitor_images=8")
    code, out, err = run(*watched, "-o", "out", "--alarm", "attention_entropy_share > 2", "--alarm", "images > 7")
    assert code == 3
    assert out == ""
    assert err.splitlines()[-1].startswith("step 0: images is 8, for which the alarm 'images > 7' stops the training; no state")
    code, _, err = run(*watched, "-o", "well", "--alarm", "attention_entropy_share > 2")
    assert code == 0, err
    kept = [path.name for path in Path("well/monitor/last-good").iterdir()]
    assert kept == ["step-0000006.safetensors"]
    words = ("--data", photos, "--null-images", "0", "--json=full", "-q", "--metric", "patch-diversity")
    code, out, err = run("analyze", "-m", f"well/monitor/last-good/{kept[0]}", *words)
    assert code == 0, err
    assert json.loads(out)["model"]["source"] == "ours"


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (("--alarm", "images >", "--monitor-every", "2"), 2, "expected NAME OP NUMBER"),
        (("--alarm", "imges > 3", "--monitor-every", "2"), 2, "no run of train has a number 'imges'; did you mean images"),
        (("--alarm", "accuracy < 0.3", "--monitor-every", "2"), 1, "which this monitor does not measure"),
        (("--alarm", "images > 3"), 1, "this run has none: --monitor-every N"),
    ],
)
def test_an_alarm_that_cannot_be_is_told_before_the_first_step(run, words, code, said):
    found, _, err = run(*QUICK, *words)
    assert found == code
    assert said in " ".join(err.split())
