"""A log into TensorBoard's files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from collapse_probe.training.logs.log import library

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


class TensorBoardLog:
    """Writes into a `folder`, or with a SummaryWriter of yours, which stays open.

    What an interrupted run wrote into the folder from the first step on is taken back.
    """

    def __init__(self, writer: Any = None, *, folder: str | Path | None = None) -> None:
        self._make = library("torch.utils.tensorboard", "tensorboard", "logging to TensorBoard").SummaryWriter
        self._writer, self._own = writer, writer is None
        self._folder = str(folder or "runs")

    @classmethod
    def opened(cls, folder: Path, name: str, settings: Mapping[str, Any]) -> TensorBoardLog:
        """One in `folder`."""
        return cls(folder=folder)

    def _at(self, step: int) -> Any:
        if self._writer is None:
            self._writer = self._make(self._folder, purge_step=step)
        return self._writer

    def numbers(self, step: int, numbers: Mapping[str, float]) -> None:
        """Scalars."""
        for name, value in numbers.items():
            self._at(step).add_scalar(name.replace(" ", "_"), value, step)

    def image(self, step: int, name: str, pixels_HW3: NDArray[np.uint8]) -> None:
        """An image."""
        self._at(step).add_image(name.replace(" ", "_"), pixels_HW3, step, dataformats="HWC")

    def artifact(self, step: int, name: str, folder: Path) -> None:
        """Nothing: TensorBoard has no place for files."""

    def close(self, failed: bool = False) -> None:
        """Write what is left."""
        if self._writer is not None:
            self._writer.flush()
            if self._own:
                self._writer.close()
