"""A monitor inside a training script in the style of timm's train.py, hung on its learning rate schedule."""

from __future__ import annotations

from typing import Any

from torch import nn

from collapse_probe.distributed import rank_and_world
from collapse_probe.training.monitor import Monitor


class MonitoredScheduler:
    """A timm scheduler that also calls a monitor at every update.

    One line in the script, before its loop: `lr_scheduler = MonitoredScheduler(lr_scheduler, model, monitor)`. The script
    calls `lr_scheduler.step_update(num_updates=…)` after each optimizer step, and that number is the monitor's step. Everything
    else is passed on to the scheduler. `model` is what is measured: the trained model, wrapped or not, or its EMA copy. Only
    the main process measures; where the monitor's alarm holds, all of them raise AlarmError.
    """

    def __init__(self, scheduler: Any, model: nn.Module, monitor: Monitor) -> None:
        self.scheduler, self.model, self.monitor = scheduler, model, monitor

    def step_update(self, num_updates: int, *args: Any, **options: Any) -> Any:
        """Set the learning rate as the scheduler does, then measure where the monitor wants it."""
        result = self.scheduler.step_update(num_updates, *args, **options)
        if self.monitor.wanted_in(rank_and_world()[0] == 0):
            self.monitor.step(self.model, num_updates)
        return result

    def __getattr__(self, name: str) -> Any:  # asked only for what is not defined here
        return getattr(self.__dict__["scheduler"], name)
