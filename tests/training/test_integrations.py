"""Monitors inside other people's trainers: measured when they should be, and the training ends in the same weights."""

from __future__ import annotations

import importlib
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from test_monitor import QUICK, pixels, same_state, tiny
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2

from collapse_probe.training.integrations.timm import MonitoredScheduler
from collapse_probe.training.monitor import Monitor

LIGHTNING = "pytorch-lightning==2.5.6"  # lightning 2.6.2 and 2.6.3 were malicious releases


def watching(seen, every=2):
    return Monitor(pixels(), every=every, metrics=QUICK, log=lambda step, numbers: seen.append(step))


class TestTimm:
    """A loop as in timm's train.py: updates counted over epochs, `step_update` after each, `step` after each epoch."""

    def trained(self, monitor=None):
        torch.manual_seed(0)
        model = tiny(dropout=0.2)
        optimizer = create_optimizer_v2(model, opt="adamw", lr=1e-2)
        lr_scheduler, epochs = create_scheduler_v2(
            optimizer, sched="cosine", num_epochs=2, step_on_epochs=False, updates_per_epoch=3
        )
        rates = []
        if monitor is not None:
            lr_scheduler = MonitoredScheduler(lr_scheduler, model, monitor)
        for epoch in range(epochs):
            model.train()
            num_updates = epoch * 3
            for _ in range(3):
                F.cross_entropy(model(torch.randn(4, 3, 16, 16)), torch.tensor([0, 1, 2, 0])).backward()
                optimizer.step()
                optimizer.zero_grad()
                num_updates += 1
                lr_scheduler.step_update(num_updates=num_updates, metric=0.0)
                rates.append(optimizer.param_groups[0]["lr"])
            lr_scheduler.step(epoch + 1, 0.0)
        assert "base_values" in lr_scheduler.state_dict()
        return model.state_dict(), rates

    def test_the_same_weights_and_rates_and_the_right_steps(self):
        seen = []
        (with_it, rates), (without, plain_rates) = self.trained(watching(seen)), self.trained()
        assert seen == [2, 4, 6]
        assert same_state(with_it, without)
        assert rates == plain_rates
        assert len(set(rates)) > 2

    def test_what_the_scheduler_has_not_is_still_missing(self):
        wrapped = MonitoredScheduler(types.SimpleNamespace(a=1), tiny(), watching([]))
        assert wrapped.a == 1
        with pytest.raises(AttributeError, match="nonsense"):
            wrapped.nonsense  # noqa: B018


class TestTransformers:
    """The real Trainer, on a tiny ViT."""

    def trained(self, folder, monitor=None):
        from transformers import Trainer, TrainingArguments, ViTConfig, ViTForImageClassification, set_seed

        from collapse_probe.training.integrations.transformers import TrainerMonitor

        set_seed(0)
        config = ViTConfig(
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=32,
            image_size=16,
            patch_size=8,
            num_labels=3,
        )
        model = ViTForImageClassification(config)
        items = [{"pixel_values": x, "labels": i % 3} for i, x in enumerate(pixels(16))]
        settings = TrainingArguments(
            output_dir=str(folder),
            max_steps=5,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            report_to=[],
            save_strategy="no",
            use_cpu=True,
            disable_tqdm=True,
            logging_strategy="no",
        )
        callbacks = [] if monitor is None else [TrainerMonitor(monitor)]
        Trainer(model, settings, train_dataset=items, callbacks=callbacks).train()
        return model.state_dict()

    @pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning")
    def test_the_same_weights_and_the_right_steps(self, tmp_path):
        seen = []
        assert same_state(self.trained(tmp_path, watching(seen)), self.trained(tmp_path))
        assert seen == [0, 2, 4]

    def test_only_the_main_process_measures(self):
        from collapse_probe.training.integrations.transformers import TrainerMonitor

        seen = []
        state = types.SimpleNamespace(is_world_process_zero=False, global_step=2)
        TrainerMonitor(watching(seen)).on_step_end(None, state, None, model=tiny())
        assert seen == []


class TestLightning:
    """The adapter against a stand-in with Lightning's own hook signatures; the real one is tested under -m network."""

    @pytest.fixture
    def adapter(self, monkeypatch):
        stand_in = types.ModuleType("pytorch_lightning")
        stand_in.Callback = type("Callback", (), {})
        for package in ("lightning.pytorch", "collapse_probe.training.integrations.lightning"):
            monkeypatch.delitem(sys.modules, package, raising=False)
        monkeypatch.setitem(sys.modules, "pytorch_lightning", stand_in)
        yield importlib.import_module("collapse_probe.training.integrations.lightning")
        monkeypatch.delitem(sys.modules, "collapse_probe.training.integrations.lightning", raising=False)

    def test_accumulated_batches_are_one_step(self, adapter):
        seen, net = [], tiny()
        trainer = types.SimpleNamespace(global_step=0, is_global_zero=True)
        watch = adapter.LightningMonitor(watching(seen), lambda module: module.net)
        module = types.SimpleNamespace(net=net)
        watch.on_train_start(trainer, module)
        for trainer.global_step in (0, 1, 1, 2, 2, 3, 4):
            watch.on_train_batch_end(trainer, module, None, None, 0)
        assert seen == [0, 2, 4]
        trainer.is_global_zero, trainer.global_step = False, 6
        watch.on_train_batch_end(trainer, module, None, None, 0)
        assert seen == [0, 2, 4]

    def test_neither_package_imported(self, monkeypatch):
        for package in ("lightning.pytorch", "pytorch_lightning", "collapse_probe.training.integrations.lightning"):
            monkeypatch.delitem(sys.modules, package, raising=False)
        with pytest.raises(ImportError, match="pytorch_lightning to be imported before"):
            importlib.import_module("collapse_probe.training.integrations.lightning")


REAL_LIGHTNING = """
import sys, warnings
warnings.simplefilter("ignore")
sys.path[:0] = [{library!r}, {tests!r}, {tests!r} + "/.."]
import logging
logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
import pytorch_lightning as lightning
import torch
import torch.nn.functional as F
from test_integrations import pixels, same_state, tiny, watching
from collapse_probe.adapters.lightning import LightningMonitor

class Module(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = tiny(dropout=0.1)
    def training_step(self, batch, index):
        images, labels = batch
        return F.cross_entropy(self.net(images + 0.1 * torch.randn_like(images)), labels)
    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-2)

def trained(seen=None):
    lightning.seed_everything(0)
    data = torch.utils.data.TensorDataset(pixels(20), torch.arange(20) % 3)
    loader = torch.utils.data.DataLoader(data, batch_size=2, shuffle=True)
    callbacks = [] if seen is None else [LightningMonitor(watching(seen), lambda module: module.net)]
    options = dict(logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
    trainer = lightning.Trainer(max_steps=5, accumulate_grad_batches=2, accelerator="cpu", callbacks=callbacks, **options)
    module = Module()
    trainer.fit(module, loader)
    return module.state_dict()

seen = []
assert same_state(trained(seen), trained())
assert seen == [0, 2, 4], seen
print("the same weights", lightning.__version__)
"""


@pytest.mark.network
def test_the_real_lightning_trainer(tmp_path):
    library = tmp_path / "library"
    install = ["-m", "pip", "install", "--quiet", "--no-deps", "--target", str(library), LIGHTNING]
    subprocess.run([sys.executable, *install], check=True, timeout=200)
    code = REAL_LIGHTNING.format(library=str(library), tests=str(Path(__file__).parent))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert "the same weights 2.5.6" in done.stdout
