"""A monitor sees the model as analyze does, leaves a training as it was, and its folder is a trajectory."""

from __future__ import annotations

import random
import socket
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from factories import small_vit
from torch import nn

import collapse_probe as cp
from collapse_probe.analysis.comparison.subjects import ModelOptions, open_subjects
from collapse_probe.data.images import open_data
from collapse_probe.errors import DataError, ModelError, SettingError
from collapse_probe.models.loading import resolve
from collapse_probe.models.vit import ViT, ViTSettings
from collapse_probe.training.monitor import Monitor

SIZE = 16
QUICK = ("attention-similarity", "patch-diversity")
TINY = {"image_size": SIZE, "patch_size": 8, "depth": 2, "width": 16, "heads": 2, "classes": 3}


def pixels(count=6, seed=3):
    return torch.randn(count, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(seed))


def tiny(seed=0, **settings):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return ViT(ViTSettings(**{**TINY, **settings}))


def noisy():
    """A ViT with everything in it that a measurement could disturb: dropout, dropped paths, BatchNorm's statistics."""
    fixes = {"re-attention": {"norm": "batch"}}
    return tiny(dropout=0.1, attention_dropout=0.1, drop_path=0.2, fixes=fixes)


def trained(monitor=None, steps=5, model=None, wrap=lambda model: model):
    """The state after a few steps of a plain loop that draws from all three generators."""
    torch.manual_seed(0), random.seed(0), np.random.seed(0)  # noqa: NPY002
    model = noisy() if model is None else model
    wrapped = wrap(model).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(steps):
        images = torch.randn(4, 3, SIZE, SIZE) * (1 + random.random()) + np.random.rand()  # noqa: NPY002
        F.cross_entropy(wrapped(images), torch.randint(0, 3, (4,))).backward()
        if monitor is not None:
            monitor.step(wrapped, step)
        optimizer.step()
        optimizer.zero_grad()
    return model.state_dict()


def same_state(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def test_a_run_with_the_monitor_ends_in_the_same_weights(photos):
    monitor = Monitor(str(photos), every=2, limit=3, metrics=QUICK)
    assert same_state(trained(monitor), trained())


def test_two_other_runs_end_in_other_weights():
    assert not same_state(trained(steps=5), trained(steps=4))


def test_the_monitor_finds_what_analyze_finds(photos):
    model = noisy().train()
    found = Monitor(str(photos), every=1, limit=4, metrics=QUICK, seed=7).step(model, 3)
    expected = cp.analyze(model, str(photos), limit=4, metrics=QUICK, seed=7, null_images=0)
    assert found.summary == expected.summary
    assert found.data == expected.data
    assert found.run["step"] == 3
    assert found.model["weights"] == "in training, at step 3"
    for name in QUICK:
        np.testing.assert_array_equal(found.matrix(name), expected.matrix(name))


def test_images_as_a_tensor_are_taken_as_they_are():
    model = tiny().eval()
    found = Monitor(pixels(40), every=1, limit=33, metrics=QUICK).step(model, 0)
    expected = cp.analyze(model, list(pixels(40)[:33].split(10)), metrics=QUICK, img_size=SIZE)
    np.testing.assert_allclose(found.matrix(QUICK[0]), expected.matrix(QUICK[0]), atol=1e-6)
    assert found.summary["images"] == 33
    other = Monitor(pixels(40, seed=4), every=1, limit=33, metrics=QUICK).step(model, 0)
    assert found.data["content_sha256"] != other.data["content_sha256"]


def test_it_measures_when_it_should_and_only_then():
    seen = []
    monitor = Monitor(pixels(), every=3, metrics=QUICK, log=lambda step, numbers: seen.append((step, numbers)))
    measured = [monitor.step(tiny(), step) is not None for step in range(7)]
    assert measured == [True, False, False, True, False, False, True]
    assert [step for step, _ in seen] == [0, 3, 6]
    assert all(type(value) is float for _, numbers in seen for value in numbers.values())
    assert "attention_similarity_adjacent" in seen[0][1]


def hooks_of(model):
    return [[*m._forward_hooks, *m._forward_pre_hooks] for m in model.modules()]


@pytest.mark.parametrize("state", ["train", "eval", "mixed"])
def test_modes_gradients_buffers_and_randomness_are_as_before(state):
    model = noisy().train(state != "eval")
    if state == "mixed":
        model.blocks[0].eval()
    model(pixels()).sum().backward()
    buffers = {key: value.clone() for key, value in model.named_buffers()}
    gradients = {key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None}
    modes = [m.training for m in model.modules()]
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()  # noqa: NPY002
    hooks = hooks_of(model)
    Monitor(pixels(), every=1, metrics=QUICK).step(model, 0)
    assert [m.training for m in model.modules()] == modes
    assert all(torch.equal(value, buffers[key]) for key, value in model.named_buffers())
    assert all(torch.equal(p.grad, gradients[key]) for key, p in model.named_parameters() if key in gradients)
    assert torch.equal(states[0], torch.get_rng_state())
    assert states[1:] == (random.getstate(), np.random.get_state()[1].tolist())  # noqa: NPY002
    assert hooks_of(model) == hooks


class Restless(nn.Module):
    """Draws from every generator and writes a buffer whenever it runs, in eval mode too."""

    def __init__(self, inner, fails_at=99):
        super().__init__()
        self.inner, self.fails_at = inner, fails_at
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        torch.rand(1), random.random(), np.random.rand()  # noqa: NPY002
        self.calls += 1
        if self.calls >= self.fails_at:
            raise RuntimeError("no more")
        return self.inner(x)


@pytest.mark.parametrize("fails_at", [99, 2])
def test_a_restless_model_is_put_back_also_after_an_error(fails_at):
    model = Restless(tiny(), fails_at).train()
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()  # noqa: NPY002
    monitor = Monitor(pixels(), every=1, metrics=QUICK)
    if fails_at == 99:
        assert monitor.step(model, 0) is not None
    else:
        with pytest.raises(RuntimeError, match="no more"):
            monitor.step(model, 0)
    assert model.calls == 0
    assert model.training
    assert torch.equal(states[0], torch.get_rng_state())
    assert states[1:] == (random.getstate(), np.random.get_state()[1].tolist())  # noqa: NPY002


def test_it_may_stand_between_forward_and_backward():
    model = noisy().train()
    loss = model(pixels()).sum()
    Monitor(pixels(), every=1, metrics=QUICK).step(model, 0)
    loss.backward()


def test_autocast_around_it_does_not_enter():
    model, monitor = tiny().eval(), Monitor(pixels(), every=1, metrics=QUICK)
    plain = monitor.step(model, 0)
    with torch.autocast("cpu", torch.bfloat16):
        inside = monitor.step(model, 0)
        assert torch.is_autocast_enabled("cpu")
    np.testing.assert_array_equal(plain.matrix(QUICK[0]), inside.matrix(QUICK[0]))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_it_may_be_called_where_no_gradients_are_kept(mode):
    model, monitor = tiny(), Monitor(pixels(), every=1, metrics=QUICK)
    plain = monitor.step(model, 0)
    with mode():
        inside = monitor.step(model, 0)
    np.testing.assert_array_equal(plain.matrix(QUICK[0]), inside.matrix(QUICK[0]))


def test_a_compiled_model_is_measured_without_its_wrapper():
    model = tiny()
    compiled = torch.compile(model, backend="eager").train()
    found = Monitor(pixels(), every=1, metrics=QUICK).step(compiled, 0)
    assert found.model["class"].endswith("ViT")
    assert compiled.training
    assert model.training


def test_the_folder_is_a_trajectory_in_natural_order(tmp_path, photos):
    monitor = Monitor(str(photos), every=5, limit=4, metrics=QUICK, folder=tmp_path / "watch")
    trained(monitor, steps=11)
    (tmp_path / "watch" / "notes.txt").write_text("no findings")
    (tmp_path / "watch" / ".step-0000005.abc").mkdir()
    (tmp_path / "watch" / ".step-0000005.abc" / "findings.json").write_text("{}")
    assert sorted(p.name for p in (tmp_path / "watch").glob("step*")) == ["step-0000000", "step-0000005", "step-0000010"]
    specs, trajectory = open_subjects([tmp_path / "watch"], ModelOptions())
    assert [e.label for e in specs] == ["step-0000000", "step-0000005", "step-0000010"]
    assert trajectory
    assert not any(e.is_model for e in specs)
    compared = cp.compare([tmp_path / "watch"])
    assert compared.trajectory
    assert len(compared.subjects) == 3
    from collapse_probe.report.comparison.figures import draw_all

    assert "course" in draw_all(compared)


def test_steps_beyond_seven_digits_stay_in_order(tmp_path):
    monitor = Monitor(pixels(), every=1, metrics=("patch-diversity",), folder=tmp_path)
    for step in (12_345_678, 2_000_000):
        monitor.step(tiny(), step)
    assert [e.label for e in open_subjects([tmp_path], ModelOptions())[0]] == ["step-2000000", "step-12345678"]


def test_checkpoints_in_a_folder_come_before_findings_beside_them(tmp_path):
    for name in ("a.pth", "b.pth"):
        torch.save(nn.Linear(1, 1).state_dict(), tmp_path / name)
    Monitor(pixels(), every=1, metrics=("patch-diversity",), folder=tmp_path).step(tiny(), 0)
    assert [e.label for e in open_subjects([tmp_path], ModelOptions("timm:x"))[0]] == ["a", "b"]


def test_measuring_a_step_again_replaces_it(tmp_path):
    monitor = Monitor(pixels(), every=1, metrics=("patch-diversity",), folder=tmp_path)
    monitor.step(tiny(), 1)
    found = monitor.step(tiny(seed=1), 1)
    assert cp.Findings.load(tmp_path / "step-0000001").summary == found.summary
    assert len(list(tmp_path.iterdir())) == 1


def test_an_image_set_and_a_transform_of_ones_own(photos):
    from torchvision.transforms import v2

    transform = v2.Compose([v2.Resize((SIZE, SIZE)), v2.ToImage(), v2.ToDtype(torch.float32, scale=True)])
    monitor = Monitor(open_data(photos), every=1, limit=3, metrics=QUICK, preprocess=transform)
    assert monitor.step(tiny(), 0).model["preprocess"]["size"] == [SIZE, SIZE]
    assert monitor.step(tiny(), 0).data["images"] == 3
    given = resolve(small_vit(depth=1)).preprocess
    assert Monitor(str(photos), every=1, preprocess=given).preprocess is given


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        ({"data": pixels(), "every": 0}, SettingError, "from 1 on"),
        ({"data": pixels()[0], "every": 1}, DataError, "float images"),
        ({"data": pixels().long(), "every": 1}, DataError, "int64"),
        ({"data": pixels(), "every": 1, "limit": 0}, SettingError, "at least 1"),
        ({"data": pixels(), "every": 1, "preprocess": len}, SettingError, "leave preprocess out"),
        ({"data": "nowhere/at/all", "every": 1}, DataError, "nowhere"),
    ],
)
def test_mistakes_are_told_before_the_training(options, error, said):
    with pytest.raises(error, match=said):
        Monitor(**options)


def test_parameters_on_several_devices_are_refused():
    model = tiny()
    model.head = nn.Linear(16, 3, device="meta")
    with pytest.raises(ModelError, match="one device"):
        Monitor(pixels(), every=1).step(model, 0)


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


TWO = """
import datetime, sys
sys.path[:0] = [{tests!r}, {tests!r} + "/.."]
import torch, torch.distributed as dist
from test_monitor import QUICK, Monitor, pixels, same_state, trained
torch.set_num_threads(1)
dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=60))  # nobody waits for ever if the monitor does
watch = Monitor(pixels(), every=2, metrics=QUICK, folder={folder!r}) if dist.get_rank() == 0 else None
wrap = torch.nn.parallel.DistributedDataParallel
assert same_state(trained(watch, wrap=wrap, steps=4), trained(wrap=wrap, steps=4))
dist.barrier()
dist.destroy_process_group()
"""


def test_one_of_two_processes_measures_alone(tmp_path):
    script = tmp_path / "two.py"
    folder = tmp_path / "watch"
    script.write_text(TWO.format(tests=str(__import__("pathlib").Path(__file__).parent), folder=str(folder)))
    start = ["torch.distributed.run", "--nproc-per-node=2", "--master-addr=127.0.0.1", f"--master-port={free_port()}"]
    done = subprocess.run([sys.executable, "-m", *start, str(script)], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    found = cp.Findings.load(folder / "step-0000002")
    assert found.data["images"] == 6
    assert found.run["world_size"] == 1


def test_a_training_that_diverges_is_told_in_its_row_and_goes_on(tmp_path):
    rows, model = [], tiny()
    monitor = Monitor(pixels(), every=1, metrics=QUICK, folder=tmp_path, log=lambda step, numbers: rows.append(numbers))
    monitor.step(model, 0)
    with torch.no_grad():
        model.blocks[1].attn.qkv.weight[0, 0] = torch.nan
    assert monitor.step(model, 1) is None
    assert rows[1] == {"nonfinite": 1.0}
    assert "nonfinite" not in rows[0]
    assert "blocks.1.attn" in monitor.unmeasured[1]
    assert "head 0" in (tmp_path / "step-0000001.txt").read_text()
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["step-0000000", "step-0000001.txt"]


def test_a_row_holds_the_share_of_images_that_are_not_finite():
    model, images, rows = tiny(), pixels(), []
    images[[0, 4]] += 5
    bright = []
    model.register_forward_pre_hook(lambda module, args: bright.append(args[0].mean((1, 2, 3)) > 2))
    model.blocks[0].register_forward_pre_hook(
        lambda module, args: (torch.where(bright[-1][:, None, None], torch.inf, args[0]), *args[1:])
    )
    found = Monitor(images, every=1, metrics=QUICK, log=lambda step, numbers: rows.append(numbers)).step(model, 0)
    assert found.data["images"] == 4
    assert rows[0]["nonfinite"] == pytest.approx(2 / 6)
