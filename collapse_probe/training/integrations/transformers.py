"""A monitor inside the Trainer of transformers."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback

from collapse_probe.training.monitor import Monitor


class TrainerMonitor(TrainerCallback):
    """A callback for transformers' Trainer: `Trainer(…, callbacks=[TrainerMonitor(monitor)])`.

    Measures before the first step and after every optimizer step that the monitor wants, in the main process only. The model's
    images come from the monitor's own data, so give it the `preprocess` with which the training images were made. Where the
    monitor's alarm holds, all processes raise AlarmError.
    """

    def __init__(self, monitor: Monitor) -> None:
        self.monitor = monitor

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **others: Any) -> None:
        self._measure(model, state)

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **others: Any) -> None:
        self._measure(model, state)

    def _measure(self, model: Any, state: Any) -> None:
        if self.monitor.wanted_in(state.is_world_process_zero):
            self.monitor.step(model, state.global_step)
