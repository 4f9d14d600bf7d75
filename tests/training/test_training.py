"""The trainer: to the bit after a kill, the same in two processes, undisturbed by its monitor, honest when it diverges."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

from collapse_probe.errors import DataError, OutputError, SettingError
from collapse_probe.models.loading import resolve
from collapse_probe.models.model_file import is_model_file, load_model, read_card
from collapse_probe.models.vit import ViTSettings
from collapse_probe.training.recipe import Augmentation, Recipe
from collapse_probe.training.run import load_state, states_in
from collapse_probe.training.step import DivergedError
from collapse_probe.training.trainer import train

TINY = ViTSettings(image_size=8, patch_size=2, classes=10, depth=2, width=16, heads=2, mlp_ratio=2.0, drop_path=0.1)
RECIPE = Recipe(
    name="tiny",
    model=TINY,
    steps=12,
    warmup=2,
    batch_size=8,
    label_smoothing=0.1,
    clip=1.0,
    augmentation=Augmentation(shift=1, contrast=0.2, noise=0.05, flip=True),
    checkpoint_every=4,
    log_every=5,
)
RICH = RECIPE.vary(
    fix="re-attention",
    mixup=0.8,
    cutmix=1.0,
    ema=0.9,
    recalibrate=2,
    penalty={"patch-cosine": 0.1, "patch-mixing": 0.5},
)
TIED = RECIPE.vary(tied=True, ema=0.5, drop_path=0.0)
DIGITS = "bundled:digits"


def weights(path):
    return load_model(path)[0].state_dict()


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize("recipe", [RECIPE, RICH, TIED], ids=["plain", "rich", "tied"])
def test_an_interrupted_run_goes_on_to_the_bit(tmp_path, recipe):
    whole = train(recipe, DIGITS, tmp_path / "whole")
    stopped = train(recipe, DIGITS, tmp_path / "broken", stop_after=7)
    assert not stopped.finished
    torch.manual_seed(99)  # another process begins with other random states
    np.random.seed(99)  # noqa: NPY002
    ended = train(recipe, DIGITS, tmp_path / "broken", resume=True)
    assert same(weights(whole.model), weights(ended.model))
    assert (ended.accuracy, ended.loss) == (whole.accuracy, whole.loss)
    one, other = load_state(whole.checkpoint), load_state(ended.checkpoint)
    assert same(one["model"], other["model"])
    assert same(one["optimizer"]["state"][0], other["optimizer"]["state"][0])
    if recipe.ema is not None:
        assert same(one["ema"], other["ema"])
        assert not same(one["ema"], one["model"])


def test_another_seed_is_another_run(tmp_path):
    one, other = (train(RECIPE.vary(seed=s, steps=2, warmup=0), DIGITS, tmp_path / str(s)) for s in (0, 1))
    assert not same(weights(one.model), weights(other.model))


def test_training_leaves_the_random_states_of_the_caller(tmp_path):
    before = random.getstate(), torch.get_rng_state()
    train(RECIPE.vary(steps=2, warmup=0), DIGITS, tmp_path)
    assert random.getstate() == before[0]
    assert torch.equal(torch.get_rng_state(), before[1])


CALL = """
import sys, torch
from pathlib import Path
sys.path[:0] = [{here!r}, {here!r} + "/.."]
torch.set_num_threads(1)
from collapse_probe.distributed import joined
from collapse_probe.training.trainer import train
from test_training import DIGITS, {recipe} as recipe
with joined():
    train(recipe.vary(**{changes!r}), DIGITS, sys.argv[1], device="cpu", resume="--resume" in sys.argv)
"""


def script(tmp_path, recipe, **changes):
    path = tmp_path / "run.py"
    path.write_text(CALL.format(here=os.path.dirname(__file__), recipe=recipe, changes=changes))  # noqa: PTH120
    return path


ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def test_a_killed_run_goes_on_to_the_bit(tmp_path):
    path = script(tmp_path, "RICH", steps=60, checkpoint_every=3)
    command = [sys.executable, str(path)]
    subprocess.run([*command, str(tmp_path / "whole")], check=True, env=ENVIRONMENT, timeout=120)
    broken = tmp_path / "broken"
    process = subprocess.Popen([*command, str(broken)], env=ENVIRONMENT)
    while not states_in(broken / "state") and process.poll() is None:
        time.sleep(0.005)
    time.sleep(random.Random().uniform(0, 0.5))
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert states_in(broken / "state")
    assert not (broken / "model.safetensors").exists(), "the run was over before it was killed"
    subprocess.run([*command, str(broken), "--resume"], check=True, env=ENVIRONMENT, timeout=120)
    assert same(weights(tmp_path / "whole" / "model.safetensors"), weights(broken / "model.safetensors"))


@pytest.mark.parametrize("recipe", ["PARTED", "PARTED_RICH"])
def test_two_processes_agree_with_one(tmp_path, recipe):
    path = script(tmp_path, recipe)
    subprocess.run([sys.executable, str(path), str(tmp_path / "one")], check=True, env=ENVIRONMENT, timeout=120)
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "0"]
    launch[-2:] = ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"]
    subprocess.run([*launch, str(path), str(tmp_path / "two")], check=True, env=ENVIRONMENT, timeout=180)
    one, two = (weights(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    for key in one:
        torch.testing.assert_close(two[key], one[key], rtol=0, atol=1e-5)
    accounts = [json.loads((tmp_path / name / "training.json").read_text()) for name in ("one", "two")]
    assert [each["world_size"] for each in accounts] == [1, 2]
    assert accounts[1]["accuracy"] == accounts[0]["accuracy"]
    assert accounts[1]["loss"] == pytest.approx(accounts[0]["loss"], abs=1e-5)


PARTED = RECIPE.vary(drop_path=0.0)  # dropout draws in each process for itself
PARTED_RICH = PARTED.vary(mixup=0.8, cutmix=1.0, ema=0.9, penalty={"patch-cosine": 0.1, "patch-mixing": 0.5}, accumulate=2)


class Counting:
    """A monitor that draws random numbers and changes modes, as a careless one would not put back."""

    def __init__(self):
        self.steps = []

    def step(self, model, step):
        self.steps.append(step)


def test_the_monitor_is_called_before_the_first_step_and_after_each(tmp_path):
    monitor = Counting()
    train(RECIPE.vary(steps=3, warmup=0), DIGITS, tmp_path, monitor=monitor)
    assert monitor.steps == [0, 1, 2, 3]


def test_the_monitor_changes_nothing_and_logs(tmp_path):
    recipe = RECIPE.vary(fix="re-attention")
    plain = train(recipe, DIGITS, tmp_path / "plain")
    watched = train(recipe.vary(monitor_every=4, monitor_images=8), DIGITS, tmp_path / "watched")
    assert same(weights(plain.model), weights(watched.model))
    found = sorted(path.name for path in (tmp_path / "watched" / "monitor").iterdir())
    assert len(found) == 4
    assert any((tmp_path / "watched" / "logs").iterdir())


def test_a_loss_that_is_no_number_stops_with_step_term_and_checkpoint(tmp_path, monkeypatch):
    from collapse_probe.training.penalties.patch_cosine import PatchCosine

    calls = []
    real = PatchCosine.loss

    def goes_bad(self, heard, given):
        calls.append(1)
        return real(self, heard, given) * (float("nan") if len(calls) == 7 else 1.0)

    monkeypatch.setattr(PatchCosine, "loss", goes_bad)
    with pytest.raises(DivergedError, match=r"step 7: patch-cosine is nan.*step-00000004\.pt"):
        train(RECIPE.vary(penalty={"patch-cosine": 0.1}), DIGITS, tmp_path)
    assert all(torch.isfinite(t).all() for t in load_state(states_in(tmp_path / "state")[-1])["model"].values())


def test_a_learning_rate_beyond_reason_is_told_and_leaves_no_model(tmp_path):
    with pytest.raises(DivergedError, match="step"):
        train(RECIPE.vary(lr=1e38, warmup=0, clip=None, optimizer="sgd"), DIGITS, tmp_path)
    assert not (tmp_path / "model.safetensors").exists()


def test_the_account_and_the_card_say_what_was_done(tmp_path):
    ended = train(RECIPE.vary(evaluate_every=6, snapshot_every=6), DIGITS, tmp_path, command="the command")
    account = json.loads((tmp_path / "training.json").read_text())
    assert (account["train_images"], account["held_out_images"]) == (1437, 360)
    assert [each["step"] for each in account["evaluations"]] == [6, 12]
    assert Recipe.from_json(account["recipe"]) == ended.recipe
    card = read_card(ended.model)
    assert card.facts["accuracy"] == ended.accuracy == account["accuracy"]
    assert card.facts["command"] == "the command"
    assert sorted(path.name for path in (tmp_path / "models").iterdir()) == [
        "step-00000006.safetensors",
        "step-00000012.safetensors",
    ]
    assert not same(weights(tmp_path / "models" / "step-00000006.safetensors"), weights(ended.model))


@pytest.mark.parametrize("scheme", ["", "ours:"])
def test_a_trained_model_is_an_address(tmp_path, scheme):
    ended = train(TIED.vary(steps=2, warmup=0, fix="re-attention"), DIGITS, tmp_path)
    assert is_model_file(ended.model)
    subject = resolve(f"{scheme}{ended.model}")
    assert subject.preprocess.size == (8, 8)
    assert same(subject.model.state_dict(), weights(ended.model))
    assert subject.model.blocks[1].attn.qkv.weight is subject.model.blocks[0].attn.qkv.weight
    fresh = subject.fresh(0)
    assert not torch.equal(fresh.head.weight, subject.model.head.weight)
    assert ended.model.stat().st_size < 100_000


def test_the_validation_is_what_the_saved_model_says(tmp_path):
    from collapse_probe.data.images import batches
    from collapse_probe.data.splits import split_data

    ended = train(RICH, DIGITS, tmp_path)
    model, card = load_model(ended.model)
    held_out = split_data(DIGITS).held_out
    found = [(model(b.pixels).argmax(-1) == b.labels).float() for b in batches(held_out, card.preprocess(), batch_size=100)]
    assert float(torch.cat(found).mean()) == pytest.approx(ended.accuracy, abs=1e-6)


def test_a_folder_that_holds_a_run_is_not_overwritten(tmp_path):
    train(RECIPE.vary(steps=2, warmup=0), DIGITS, tmp_path)
    with pytest.raises(OutputError, match="--resume"):
        train(RECIPE.vary(steps=2, warmup=0), DIGITS, tmp_path)
    with pytest.raises(SettingError, match="another lr"):
        train(RECIPE.vary(steps=2, warmup=0, lr=1e-4), DIGITS, tmp_path, resume=True)


def test_a_damaged_newest_checkpoint_falls_back_to_the_one_before(tmp_path):
    whole = train(RECIPE, DIGITS, tmp_path / "whole")
    train(RECIPE, DIGITS, tmp_path / "broken", stop_after=9)
    newest = states_in(tmp_path / "broken" / "state")[-1]
    newest.write_bytes(newest.read_bytes()[:1000])
    said = []
    ended = train(RECIPE, DIGITS, tmp_path / "broken", resume=True, report=said.append)
    assert "taking the one before" in said[0]
    assert same(weights(whole.model), weights(ended.model))


def test_other_classes_and_too_few_images_are_told(tmp_path):
    with pytest.raises(SettingError, match="classes=10"):
        train(RECIPE.vary(classes=7), DIGITS, tmp_path)
    with pytest.raises(DataError, match="do not fill"):
        train(RECIPE.vary(batch_size=2000), DIGITS, tmp_path)


def test_bfloat16_and_timm_models_train(tmp_path):
    recipe = RECIPE.vary(steps=2, warmup=0, amp="bfloat16")
    small = {"depth": 2, "embed_dim": 16, "num_heads": 2, "img_size": 8, "patch_size": 2, "num_classes": 10}
    timm = Recipe(**{**vars(recipe), "model": "timm:vit_tiny_patch16_224", "model_kwargs": small}).vary(fix="attn-scale")
    for at, each in enumerate((recipe, timm)):
        ended = train(each, DIGITS, tmp_path / str(at))
        assert weights(ended.model)["blocks.0.attn.qkv.weight"].dtype == torch.float32


def picture_folders(root):
    from PIL import Image

    generator = np.random.default_rng(0)
    for name in ("train/a", "train/b", "val/a", "val/b"):
        (root / name).mkdir(parents=True)
        for i in range(4):
            Image.fromarray(generator.integers(0, 255, (40, 40, 3), dtype=np.uint8)).save(root / name / f"{i}.png")
    return str(root)


@pytest.mark.parametrize("name", ["imagenet-diverse-vit-s", "imagenet-patch-diversification-b", "imagenet-mhsa-16b"])
def test_a_recipe_for_imagenet_runs_on_a_small_folder_laid_out_like_it(tmp_path, name):
    from collapse_probe.registry import RECIPES

    small = {"depth": 2, "width": 24, "heads": 12, "classes": 2, "steps": 3, "batch_size": 4, "image_size": 32, "workers": 0}
    recipe = RECIPES[name]().vary(**small, amp="bfloat16")
    ended = train(recipe, picture_folders(tmp_path / "data"), tmp_path / "out")
    assert ended.steps == 3
    assert resolve(str(ended.model)).preprocess.size == (32, 32)
