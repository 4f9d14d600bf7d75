"""A log into a run of MLflow."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from collapse_probe.training.logs.log import PROJECT, library, stored_id

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

NOT_IN_NAMES = re.compile(r"[^\w\-. /]", re.ASCII)
MOST = 1000  # metrics in one call


class MlflowLog:
    """Writes into the run of an id, `MlflowLog(mlflow.active_run().info.run_id)`, which stays open, or into one of its own,
    called `name`, in an `experiment`.

    `tracking_uri` is where MLflow keeps it, by default as MLflow itself decides. In names MLflow takes no `@`: it becomes a
    full stop, as in `attention-similarity.row`.
    """

    def __init__(
        self,
        run_id: str | None = None,
        *,
        tracking_uri: str | None = None,
        experiment: str = PROJECT,
        name: str | None = None,
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        mlflow = library("mlflow", "mlflow", "logging to MLflow")
        self._metric = library("mlflow.entities", "mlflow", "logging to MLflow").Metric
        self.client, self._own = mlflow.MlflowClient(tracking_uri=tracking_uri), run_id is None
        if run_id is None:
            known = self.client.get_experiment_by_name(experiment)
            place = self.client.create_experiment(experiment) if known is None else known.experiment_id
            run_id = self.client.create_run(place, run_name=name).info.run_id
            if settings:
                self.client.log_dict(run_id, dict(settings), "settings.json")
        self.run_id: str = run_id

    @classmethod
    def opened(cls, folder: Path, name: str, settings: Mapping[str, Any]) -> MlflowLog:
        """A run in the experiment collapse-probe."""
        if (folder / "mlflow.id").exists():
            log = cls(stored_id(folder, "mlflow"))
            log.client.update_run(log.run_id, status="RUNNING")
        else:
            log = cls(name=name, settings=settings)
            stored_id(folder, "mlflow", log.run_id)
        log._own = True
        return log

    def numbers(self, step: int, numbers: Mapping[str, float]) -> None:
        """Metrics."""
        now = int(time.time() * 1000)
        metrics = [self._metric(_named(name), float(value), now, step) for name, value in numbers.items()]
        for first in range(0, len(metrics), MOST):
            self.client.log_batch(self.run_id, metrics=metrics[first : first + MOST])

    def image(self, step: int, name: str, pixels_HW3: NDArray[np.uint8]) -> None:
        """An image of the run, by key and step."""
        self.client.log_image(self.run_id, pixels_HW3, key=_named(name), step=step, synchronous=True)

    def artifact(self, step: int, name: str, folder: Path) -> None:
        """Files below NAME/step-0001000."""
        self.client.log_artifacts(self.run_id, str(folder), f"{name}/step-{step:07d}")

    def close(self, failed: bool = False) -> None:
        """Say that the run is over."""
        if self._own:
            self.client.set_terminated(self.run_id, status="FAILED" if failed else "FINISHED")


def _named(name: str) -> str:
    """The name with what MLflow takes.

    >>> _named("collapse/attention-similarity@row")
    'collapse/attention-similarity.row'
    """
    return NOT_IN_NAMES.sub(".", name)
