"""An alarm stops a training where a number passes its threshold, says where, and leaves the last good state."""

from __future__ import annotations

import json
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from test_monitor import QUICK, free_port, pixels, tiny

import collapse_probe as cp
from collapse_probe.errors import AlarmError, SettingError, UnknownNameError
from collapse_probe.models.checkpoints import load_checkpoint
from collapse_probe.training.integrations.timm import MonitoredScheduler
from collapse_probe.training.monitor import Monitor

ENTROPY = "attention_entropy_share < 0.9"
WATCHED = ("attention-entropy", "patch-diversity")


def sharpen(model, block=1, by=60.0):
    """Make a block's softmax nearly pick one key, by larger queries and keys."""
    with torch.no_grad():
        width = model.blocks[block].attn.qkv.weight.shape[1]
        model.blocks[block].attn.qkv.weight[: 2 * width] *= by


def watching(folder=None, alarm=ENTROPY, **options):
    return Monitor(pixels(), every=1, metrics=WATCHED, folder=folder, alarm=alarm, **options)


def state_of(model):
    return {key: value.clone() for key, value in model.state_dict().items()}


def tripped(monitor, model, step):
    with pytest.raises(AlarmError) as caught:
        monitor.step(model, step)
    return caught.value


def test_the_error_names_number_place_value_threshold_and_step(tmp_path):
    model, monitor, rows = tiny(), watching(tmp_path), []
    monitor.log = lambda step, numbers: rows.append((step, numbers))
    assert monitor.step(model, 0).summary["attention_entropy_share"] > 0.9
    sharpen(model)
    error = tripped(monitor, model, 7)
    found = cp.Findings.load(tmp_path / "step-0000007")
    share = np.array(found["attention-entropy"].details["share"])
    block, head = np.unravel_index(share.argmin(), share.shape)
    assert (error.alarm, error.quantity, error.step) == (ENTROPY, "attention_entropy_share", 7)
    assert error.value == pytest.approx(share.mean(), abs=1e-12)
    assert (error.block, error.head) == (block, head)
    assert block == 1
    text = str(error)
    assert text.startswith(f"step 7: attention_entropy_share is {share.mean():.6g}, lowest in block 1, head {head} (")
    assert f"the alarm '{ENTROPY}' stops the training" in text
    assert f"of step 0, is {tmp_path / 'last-good' / 'step-0000000.pth'}" in text
    assert [step for step, _ in rows] == [0, 7]
    assert rows[1][1]["attention_entropy_share"] == error.value


def test_the_state_kept_is_the_newest_good_one_and_the_only_one(tmp_path):
    model, monitor = tiny(), watching(tmp_path)
    for step in range(3):
        with torch.no_grad():
            model.head.weight += step
        monitor.step(model, step)
    good = state_of(model)
    sharpen(model)
    error = tripped(monitor, model, 3)
    assert [path.name for path in (tmp_path / "last-good").iterdir()] == ["step-0000002.pth"]
    other = tiny(seed=5)
    assert load_checkpoint(other, error.state).complete
    assert all(torch.equal(value, good[key]) for key, value in other.state_dict().items())
    assert [each.name for each in sorted(tmp_path.glob("step*"))] == [f"step-{step:07d}" for step in range(4)]
    assert len(cp.compare([tmp_path]).subjects) == 4  # the state is no subject of the course


def test_wrapped_models_and_tied_weights_are_kept_under_their_own_names(tmp_path):
    model = tiny()
    model.blocks[1] = model.blocks[0]
    monitor = watching(tmp_path, alarm="patch_diversity_last < -1")
    monitor.step(torch.compile(model, backend="eager"), 0)
    other = tiny(seed=5)
    other.blocks[1] = other.blocks[0]
    assert load_checkpoint(other, monitor.alarm.state).complete
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in other.state_dict().items())


def test_the_first_of_several_alarms_that_holds_is_told():
    monitor = watching(alarm=["patch_diversity_last < -1", "images > 3", ENTROPY])
    error = tripped(monitor, tiny(), 0)
    assert (error.alarm, error.value, error.block, error.head) == ("images > 3", 6.0, None, None)
    assert "the monitor has no folder" in str(error)


def test_a_number_of_one_place_alone_is_told_with_it():
    error = tripped(watching(alarm="patch_diversity_last > -1"), tiny(), 0)
    assert str(error).startswith(f"step 0: patch_diversity_last is {error.value:.6g} after block 1, for which the alarm")


def test_an_alarm_that_holds_from_the_first_measurement_on_has_no_state(tmp_path):
    error = tripped(watching(tmp_path, alarm="images > 3"), tiny(), 0)
    assert error.state is None
    assert "since this monitor began, no measurement was without an alarm" in str(error)
    assert not (tmp_path / "last-good").exists()


def test_weights_that_are_not_finite_trip_every_alarm_and_are_not_kept(tmp_path):
    model, monitor = tiny(), watching(tmp_path)
    monitor.step(model, 0)
    with torch.no_grad():
        model.blocks[1].attn.qkv.weight[0, 0] = torch.nan
    error = tripped(monitor, model, 1)
    assert error.value is None
    assert "attention_entropy_share cannot be told (" in str(error)
    assert "blocks.1.attn" in str(error)
    assert all(torch.isfinite(t).all() for t in torch.load(error.state)["state_dict"].values())


def test_images_that_are_not_finite_trip_it_though_the_others_are_well():
    model, images = tiny(), pixels()
    images[[0, 4]] += 5
    bright = []
    model.register_forward_pre_hook(lambda module, args: bright.append(args[0].mean((1, 2, 3)) > 2))
    model.blocks[0].register_forward_pre_hook(
        lambda module, args: (torch.where(bright[-1][:, None, None], torch.inf, args[0]), *args[1:])
    )
    monitor = Monitor(images, every=1, metrics=WATCHED, alarm="attention_entropy_share < 0.0")
    error = tripped(monitor, model, 0)
    assert "attention_entropy_share cannot be told (2 of 6 images are not finite)" in str(error)


def test_a_number_that_is_undefined_trips():
    monitor = Monitor(pixels(), every=1, metrics=("attention-similarity",), alarm="attention_similarity_adjacent > 2")
    error = tripped(monitor, tiny(depth=1), 0)
    assert error.value is None
    assert "it is undefined" in str(error)


@pytest.mark.parametrize(
    ("alarm", "metrics", "said"),
    [
        ("attention_entropy_share <", (), "expected NAME OP NUMBER"),
        ("attention_entropy_share < 1e999", (), "too large"),
        ("attention_entropy_shar < 0.1", (), "did you mean attention_entropy_share"),
        ("accuracy < 0.1", (), "does not measure; there are"),
        ("kappa_adjacent > 0.5", WATCHED, "metric attention-similarity, which is not among those measured: attention-entropy"),
        ("weight_rank_mean < 2", (), "does not measure"),
        ("weight_rank_mean_untrained < 2", ("weight-rank",), "did you mean weight_rank_mean"),
        ("attention_entropy_share_ci_low < 1", (), "did you mean"),
    ],
)
def test_names_that_the_monitor_does_not_measure_are_told_before_the_training(alarm, metrics, said):
    with pytest.raises(SettingError, match=said):
        Monitor(pixels(), every=1, metrics=metrics, alarm=alarm)


def test_names_that_it_measures_may_be_asked_for():
    metrics = ("weight-rank", "weight-similarity", "patch-diversity", "attention-similarity@row")
    names = ["weight_rank_mean", "weight_similarity_mean", "patch_diversity_last_ci_low", "kappa_row_adjacent", "images"]
    monitor = Monitor(pixels(), every=1, metrics=metrics, alarm=[f"{name} == -7" for name in names])
    assert monitor.step(tiny(), 0).summary.keys() >= set(names)
    with pytest.raises(UnknownNameError, match="did you mean 'weight-rank'"):
        Monitor(pixels(), every=1, metrics="weight-rnk", alarm="images > 3")


def test_a_number_that_this_model_does_not_give_is_told_at_its_first_measurement():
    monitor = Monitor(pixels(), every=1, alarm="kappa_probs_adjacent > 0.5")
    with pytest.raises(SettingError, match=r"kappa_probs_adjacent.*which the summary does not hold; did you mean"):
        monitor.step(tiny(), 0)


def test_a_training_without_alarm_keeps_no_state(tmp_path):
    Monitor(pixels(), every=1, metrics=WATCHED, folder=tmp_path).step(tiny(), 0)
    assert [path.name for path in tmp_path.iterdir()] == ["step-0000000"]


class TestIntegrations:
    """The error comes out of other people's loops."""

    def test_timm(self, tmp_path):
        model = tiny()
        scheduler = types.SimpleNamespace(step_update=lambda num_updates: None)
        wrapped = MonitoredScheduler(scheduler, model, watching(tmp_path))
        wrapped.step_update(1)
        sharpen(model)
        with pytest.raises(AlarmError, match="of step 1, is"):
            wrapped.step_update(2)

    @pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning")
    def test_transformers(self, tmp_path):
        from test_integrations import TestTransformers

        monitor = Monitor(pixels(), every=2, metrics=QUICK, folder=tmp_path / "watch", alarm="patch_diversity_last > -1")
        with pytest.raises(AlarmError, match="step 0: patch_diversity_last is"):
            TestTransformers().trained(tmp_path, monitor)
        monitor = Monitor(pixels(), every=2, metrics=QUICK, folder=tmp_path / "watch", alarm="patch_diversity_last < -1")
        TestTransformers().trained(tmp_path, monitor)
        assert monitor.alarm.state.name == "step-0000004.pth"

    def test_lightning(self, tmp_path):
        lightning = pytest.importorskip("lightning.pytorch")
        sys.modules.pop("collapse_probe.training.integrations.lightning", None)
        from collapse_probe.training.integrations.lightning import LightningMonitor

        model = tiny()
        watch = LightningMonitor(watching(tmp_path), lambda module: module.net)
        assert isinstance(watch, lightning.Callback)
        trainer, module = types.SimpleNamespace(global_step=0, is_global_zero=True), types.SimpleNamespace(net=model)
        watch.on_train_start(trainer, module)
        sharpen(model)
        trainer.global_step = 1
        with pytest.raises(AlarmError, match="of step 0, is"):
            watch.on_train_batch_end(trainer, module, None, None, 0)


TWO = """
import datetime, json, pathlib, sys
sys.path[:0] = [{tests!r}, {tests!r} + "/.."]
import torch, torch.distributed as dist
from test_alarm import sharpen, watching
from test_monitor import Monitor, pixels, tiny
from collapse_probe.errors import AlarmError
from collapse_probe.training.integrations.timm import MonitoredScheduler
torch.set_num_threads(1)
dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=60))
rank, folder = dist.get_rank(), pathlib.Path({folder!r})
model = tiny()
wrapped = torch.nn.parallel.DistributedDataParallel(model)
class Plain:
    def step_update(self, num_updates): pass
scheduler = MonitoredScheduler(Plain(), wrapped, watching(folder / "watch"))
said = None
for step in range(4):
    wrapped(pixels()).sum().backward()
    if step == 2:
        sharpen(model)
    try:
        scheduler.step_update(step)
    except AlarmError as error:
        said = dict(vars(error), text=str(error), state=str(error.state))
        break
(folder / f"rank-{{rank}}.json").write_text(json.dumps(said))
failing = Monitor(pixels()[:, :, :5, :5], every=1, metrics=("attention-entropy",), alarm="images > 9")
try:
    failing.step(wrapped, 0)
except Exception as error:
    (folder / f"failed-{{rank}}.txt").write_text(f"{{type(error).__name__}}: {{error}}")
if rank == 0:  # one that the first process alone calls waits for nobody
    watching(folder / "alone").step(tiny(), 0)
dist.barrier()
dist.destroy_process_group()
"""


def test_all_of_two_processes_raise_and_one_saves(tmp_path):
    script = tmp_path / "two.py"
    script.write_text(TWO.format(tests=str(Path(__file__).parent), folder=str(tmp_path)))
    start = ["torch.distributed.run", "--nproc-per-node=2", "--master-addr=127.0.0.1", f"--master-port={free_port()}"]
    done = subprocess.run([sys.executable, "-m", *start, str(script)], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    first, second = (json.loads((tmp_path / f"rank-{rank}.json").read_text()) for rank in (0, 1))
    assert first == second
    assert (first["step"], first["block"], first["alarm"]) == (2, 1, ENTROPY)
    assert first["text"].endswith(f"of step 1, is {tmp_path / 'watch' / 'last-good' / 'step-0000001.pth'}")
    assert [path.name for path in (tmp_path / "watch" / "last-good").iterdir()] == ["step-0000001.pth"]
    assert (tmp_path / "failed-0.txt").read_text().startswith("ModelError: ")
    assert (tmp_path / "failed-1.txt").read_text().startswith("ProcessError: the first process could not measure: ModelError")
