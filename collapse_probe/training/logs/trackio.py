"""A log into a run of trackio."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from collapse_probe.training.logs.log import PROJECT, library, stored_id

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


class TrackioLog:
    """Writes into a run of yours, `TrackioLog(trackio.init(…))`, which stays open, or into one of its own that `trackio.init`
    begins with the settings; where trackio keeps them, the environment's TRACKIO_DIR says.
    """

    def __init__(self, run: Any = None, **settings: Any) -> None:
        self._trackio = library("trackio", "trackio", "logging to trackio")
        self._own = run is None
        with _spoken_to_stderr():
            self.run = self._trackio.init(**settings) if run is None else run

    @classmethod
    def opened(cls, folder: Path, name: str, settings: Mapping[str, Any]) -> TrackioLog:
        """A run in the project collapse-probe, whose name ends in an id of its own: trackio knows runs by their names."""
        library("trackio", "trackio", "logging to trackio")
        known = f"{name}-{stored_id(folder, 'trackio')}"
        quiet = {"embed": False, "auto_log_gpu": False, "auto_log_cpu": False}
        return cls(project=PROJECT, name=known, config=dict(settings), resume="allow", **quiet)

    def numbers(self, step: int, numbers: Mapping[str, float]) -> None:
        """Metrics."""
        self.run.log(dict(numbers), step=step)

    def image(self, step: int, name: str, pixels_HW3: NDArray[np.uint8]) -> None:
        """An Image among the metrics."""
        self.run.log({name: self._trackio.Image(pixels_HW3)}, step=step)

    def artifact(self, step: int, name: str, folder: Path) -> None:
        """An artifact NAME-RUN, a version for each step."""
        with _spoken_to_stderr():
            self.run.log_artifact(folder, name=f"{name}-{self.run.name}", type=name, aliases=[f"step-{step}"])

    def close(self, failed: bool = False) -> None:
        """Finish the run."""
        if self._own:
            with _spoken_to_stderr():
                self._trackio.finish()  # not `run.finish`, after which trackio would finish it again at exit


@contextlib.contextmanager
def _spoken_to_stderr() -> Iterator[None]:
    """What trackio prints goes to stderr: stdout is for results."""
    with contextlib.redirect_stdout(sys.stderr):
        yield
