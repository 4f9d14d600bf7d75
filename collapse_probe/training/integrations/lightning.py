"""A monitor inside the Trainer of Lightning, whichever of its two packages is in use."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from torch import nn

from collapse_probe.training.monitor import Monitor

PACKAGES = ("lightning.pytorch", "pytorch_lightning")


def _callback_class() -> Any:
    """The base class of callbacks in the package that was imported already; none is imported here."""
    for package in PACKAGES:
        if package in sys.modules:
            return sys.modules[package].Callback
    raise ImportError(
        f"expected {' or '.join(PACKAGES)} to be imported before {__name__}, came neither; "
        "import the one that your Trainer comes from first"
    )


class LightningMonitor(_callback_class()):  # type: ignore[misc]
    """A callback for Lightning's Trainer: `Trainer(…, callbacks=[LightningMonitor(monitor)])`.

    `model_of` takes the model out of the LightningModule (`lambda module: module.net`); by default the module itself is called
    with images. Measures before the first step and after every optimizer step that the monitor wants, in the main process only;
    with accumulated gradients several batches are one step, which is measured once. Where the monitor's alarm holds, all
    processes raise AlarmError.
    """

    def __init__(self, monitor: Monitor, model_of: Callable[[Any], nn.Module] | None = None) -> None:
        super().__init__()
        self.monitor, self.model_of = monitor, model_of
        self.last = -1

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self.last = -1
        self._measure(trainer, pl_module)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self._measure(trainer, pl_module)

    def _measure(self, trainer: Any, module: Any) -> None:
        step = int(trainer.global_step)
        if self.monitor.wanted_in(trainer.is_global_zero) and step != self.last:
            self.monitor.step(module if self.model_of is None else self.model_of(module), step)
        self.last = step
