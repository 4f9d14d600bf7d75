"""The curves of a training run for TensorBoard."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any


class TrainingLog:
    """Writes scalars into `folder`; without one (other processes), or without tensorboard, nothing."""

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder
        self._writer: Any = None

    def scalars(self, group: str, values: Mapping[str, float], step: int) -> None:
        """One point of each curve, called `group/name`."""
        if self._folder is None:
            return
        if self._writer is None:
            self._writer = _writer(self._folder, step)
            if self._writer is None:
                self._folder = None
                return
        for name, value in values.items():
            self._writer.add_scalar(f"{group}/{name.replace(' ', '_')}", value, step)

    def close(self) -> None:
        """Let everything reach the disk."""
        if self._writer is not None:
            self._writer.close()


def _writer(folder: Path, step: int) -> Any:
    """A writer that takes back what an interrupted run wrote from `step` on; None without tensorboard."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    make: Any = SummaryWriter  # untyped
    return make(str(folder), purge_step=step)
