"""The drift of patch similarities that a monitor takes: against the slow way, gone on with, in an alarm and in its logs."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from test_alarm import tripped
from test_monitor import QUICK, free_port, pixels, same_state, tiny, trained

import collapse_probe as cp
from collapse_probe.analysis.comparison.first_patches import FILE
from collapse_probe.errors import SettingError
from collapse_probe.report.comparison.figures import draw_all
from collapse_probe.training.monitor import Monitor

LAST = ("gram_drift_last", "gram_drift_last_ci_low", "gram_drift_last_ci_high")


def watching(folder=None, data=None, **settings):
    return Monitor(pixels() if data is None else data, every=1, metrics=QUICK, folder=folder, gram_drift=True, **settings)


def moved(model, by=0.3, seed=1):
    """The model after a step in a random direction."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(by * torch.randn(parameter.shape, generator=generator))
    return model


def gram(model, images):
    """The cosines between patches after the last block, negative ones as 0, in float64, [n, P, P]."""
    kept = []
    with torch.no_grad(), model.blocks[-1].register_forward_hook(lambda module, args, out: kept.append(out)):
        model.eval()(images)
    x = kept[0][:, 1:].double().numpy()
    x = x / np.linalg.norm(x, axis=-1, keepdims=True)
    return np.maximum(x @ x.transpose(0, 2, 1), 0)


def test_the_drift_is_that_of_the_slow_way_and_0_at_first():
    model, monitor = tiny(), watching()
    first, start = gram(model, pixels()), monitor.step(model, 0)
    assert [start.summary[name] for name in LAST] == [0.0, 0.0, 0.0]
    found = monitor.step(moved(model), 5)
    now = gram(model, pixels())
    own = ((first - now) ** 2).mean((1, 2))
    across = np.mean([((first[a] - now[b]) ** 2).mean() for a in range(6) for b in range(6) if a != b])
    result = found["gram-drift"]
    assert own.mean() > 1e-3
    assert result.array[-1] == pytest.approx(own.mean(), abs=1e-6)
    assert result.stderr[-1] == pytest.approx(own.std(ddof=1) / np.sqrt(6), abs=1e-6)
    assert result.nulls.values["other_image"][-1] == pytest.approx(across, abs=1e-6)
    assert np.isnan(result.array[:-1]).all()
    assert result.details["from_step"] == 0
    low, high = found.summary[LAST[1]], found.summary[LAST[2]]
    assert low < found.summary[LAST[0]] < high
    assert [low, high] == result.ci95[-1].tolist()


def test_it_is_in_the_files_the_log_and_the_course(tmp_path):
    rows, model = {}, tiny()
    monitor = watching(tmp_path, log=lambda step, numbers: rows.__setitem__(step, numbers))
    for step in range(3):
        monitor.step(moved(model, 0.1), step)
    stored = json.loads((tmp_path / "step-0000002" / "findings.json").read_text())
    assert stored["summary"]["gram_drift_last"] == rows[2]["gram_drift_last"] > rows[1]["gram_drift_last"] > 0
    assert {*LAST} <= {*rows[1]}
    table = [
        row
        for row in csv.DictReader((tmp_path / "step-0000002" / "blocks.csv").read_text().splitlines())
        if row["metric"] == "gram-drift"
    ]
    assert float(table[-1]["value"]) == pytest.approx(rows[2]["gram_drift_last"])
    assert float(table[-1]["ci_low"]) == pytest.approx(rows[2]["gram_drift_last_ci_low"])
    compared = cp.compare([tmp_path])
    assert list(compared.subjects) == [f"step-{step:07d}" for step in range(3)]
    assert "gram-drift" in draw_all(compared)


def test_a_training_that_goes_on_is_held_against_its_own_start(tmp_path):
    model = tiny()
    watching(tmp_path).step(model, 0)
    expected = watching()
    expected.step(model, 0)
    moved(model)
    again = watching(tmp_path).step(model, 4)
    assert again["gram-drift"].details["from_step"] == 0
    assert again.summary == expected.step(model, 4).summary
    assert again.summary["gram_drift_last"] > 0


def test_a_new_training_in_the_same_folder_and_other_images_begin_anew(tmp_path):
    watching(tmp_path).step(tiny(), 2)
    assert watching(tmp_path).step(tiny(seed=5), 0).summary["gram_drift_last"] == 0
    assert torch.load(tmp_path / FILE)["step"] == 0
    assert watching(tmp_path, pixels(seed=8)).step(tiny(), 4).summary["gram_drift_last"] == 0


def test_an_alarm_on_it_stops_the_training_and_says_where(tmp_path):
    model, monitor = tiny(), watching(tmp_path, alarm="gram_drift_last > 0.001")
    monitor.step(model, 0)
    error = tripped(monitor, moved(model), 1)
    assert str(error).startswith(f"step 1: gram_drift_last is {error.value:.6g} after block 1, for which the alarm")
    assert error.state == tmp_path / "last-good" / "step-0000000.pth"
    with pytest.raises(SettingError, match="gram_drift=True measures it"):
        Monitor(pixels(), every=1, metrics=QUICK, alarm="gram_drift_last > 0.1")


def test_images_that_are_not_finite_in_either_are_left_out():
    model, images = tiny(), pixels()
    images[0] += 5
    monitor = watching(data=images)
    monitor.step(model, 0)
    bright = []
    model.register_forward_pre_hook(lambda module, args: bright.append(args[0].mean((1, 2, 3)) > 2))
    model.blocks[0].register_forward_pre_hook(
        lambda module, args: (torch.where(bright[-1][:, None, None], torch.inf, args[0]), *args[1:])
    )
    result = monitor.step(model, 1)["gram-drift"]
    assert result.details["images"] == 5
    assert result.array[-1] == 0


def test_a_model_with_other_patches_than_at_first_says_why():
    monitor = watching()
    monitor.step(tiny(), 0)
    found = monitor.step(tiny(patch_size=4), 1)
    assert found["gram-drift"].not_applicable == "at the first measurement an image had 4 patches, now it has 16"
    assert found.summary["gram_drift_last"] is None
    deeper = monitor.step(tiny(depth=3), 2)["gram-drift"].not_applicable
    assert deeper == "at the first measurement the model had 3 depths, now it has 4"


def test_the_training_ends_in_the_same_weights():
    assert same_state(trained(watching()), trained())


def test_a_recipe_takes_it_and_goes_on_with_it(run, tmp_path):
    words = ("train", "digits-quick", "--set", "depth=2 width=16 heads=2 monitor_images=6 monitor_gram_drift=True")
    words = (*words, "--steps", "4", "--monitor-every", "2", "-o", "out", "--alarm", "gram_drift_last > 3")
    code, _, err = run(*words, "--stop-after", "2")
    assert code == 0, err
    code, _, err = run(*words, "--resume")
    assert code == 0, err
    found = cp.Findings.load(tmp_path / "out" / "monitor" / "step-0000004")
    assert found["gram-drift"].details["from_step"] == 0
    assert found.summary["gram_drift_last"] > 0


def test_class_token_and_patches_are_followed_by_name(tmp_path):
    monitor = Monitor(pixels(), every=1, metrics=("cls-patch-similarity",), folder=tmp_path)
    model = tiny()
    one, other = monitor.step(model, 0), monitor.step(moved(model), 1)
    expected = cp.analyze(model, pixels(), metrics=("cls-patch-similarity",), null_images=0)
    np.testing.assert_allclose(other.matrix("cls-patch-similarity"), expected.matrix("cls-patch-similarity"), atol=1e-6)
    assert abs(other.matrix("cls-patch-similarity")[-1] - one.matrix("cls-patch-similarity")[-1]) > 1e-3
    assert "course" in draw_all(cp.compare([tmp_path]))


TWO = """
import datetime, sys
sys.path[:0] = [{tests!r}, {tests!r} + "/.."]
import torch, torch.distributed as dist
from test_monitor_drift import LAST, moved, tiny, watching
from collapse_probe.errors import AlarmError
torch.set_num_threads(1)
dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=60))
model, monitor = tiny(), watching({folder!r}, alarm="gram_drift_last > 0.001")
found = monitor.step(model, 0)
assert (found is None) == (dist.get_rank() > 0)
try:
    monitor.step(moved(model), 1)
except AlarmError as error:
    open({folder!r} + f"/rank-{{dist.get_rank()}}", "w").write(repr(error.value))
dist.barrier()
dist.destroy_process_group()
"""


def test_two_processes_raise_alike_with_the_number_of_one(tmp_path):
    script, folder = tmp_path / "two.py", tmp_path / "watch"
    script.write_text(TWO.format(tests=str(Path(__file__).parent), folder=str(folder)))
    start = ["torch.distributed.run", "--nproc-per-node=2", "--master-addr=127.0.0.1", f"--master-port={free_port()}"]
    done = subprocess.run([sys.executable, "-m", *start, str(script)], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    alone, model = watching(), tiny()
    alone.step(model, 0)
    expected = alone.step(moved(model), 1).summary["gram_drift_last"]
    values = [float((folder / f"rank-{rank}").read_text()) for rank in range(2)]
    assert values == pytest.approx([expected] * 2, abs=1e-6)
