"""A log into a run of Weights & Biases."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from collapse_probe.training.logs.log import PROJECT, library, stored_id

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

STEP = "collapse_probe/step"


class WandbLog:
    """Writes into a run of yours, `WandbLog(wandb.run)`, which stays open, or into one of its own that `wandb.init` begins
    with the settings.

    The training step is a number of its own, `collapse_probe/step`, over which the curves are drawn: W&B drops what comes with
    a step before the newest one, so that a log beside yours would lose points.
    """

    def __init__(self, run: Any = None, **settings: Any) -> None:
        self._wandb = library("wandb", "wandb", "logging to Weights & Biases")
        self._own = run is None
        self.run = self._wandb.init(**settings) if run is None else run
        self._groups: set[str] = set()

    @classmethod
    def opened(cls, folder: Path, name: str, settings: Mapping[str, Any]) -> WandbLog:
        """A run in the project collapse-probe."""
        library("wandb", "wandb", "logging to Weights & Biases")
        run_id = stored_id(folder, "wandb")
        return cls(project=PROJECT, name=name, dir=str(folder.resolve()), config=dict(settings), id=run_id, resume="allow")

    def _log(self, step: int, values: Mapping[str, Any]) -> None:
        for group in {name.partition("/")[0] for name in values} - self._groups:
            self.run.define_metric(f"{group}/*", step_metric=STEP)
            self._groups.add(group)
        self.run.log({**values, STEP: step})

    def numbers(self, step: int, numbers: Mapping[str, float]) -> None:
        """Numbers of the history."""
        self._log(step, numbers)

    def image(self, step: int, name: str, pixels_HW3: NDArray[np.uint8]) -> None:
        """An Image of the history."""
        self._log(step, {name: self._wandb.Image(pixels_HW3)})

    def artifact(self, step: int, name: str, folder: Path) -> None:
        """An Artifact NAME-RUN, a version for each step."""
        artifact = self._wandb.Artifact(f"{name}-{self.run.id}", type=name, metadata={"step": step})
        artifact.add_dir(str(folder))
        self.run.log_artifact(artifact, aliases=[f"step-{step}"])

    def close(self, failed: bool = False) -> None:
        """Finish the run."""
        if self._own:
            self.run.finish(exit_code=int(failed))
