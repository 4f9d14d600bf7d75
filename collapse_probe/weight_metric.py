"""What a metric of the weights is: it reads the model's matrices once and needs no images."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from collapse_probe.findings import Reading
from collapse_probe.matrices import NAMES, Matrices
from collapse_probe.measure import Array, Metric, Need
from collapse_probe.nulls import untrained_only
from collapse_probe.sockets import METRICS
from collapse_probe.summary import Summary, adjacent, mean

NO_INTERVAL = "none: a model has one set of weights, which is no sample of anything"
LEVELS = ("attention", "tokens", "weights")


class WeightMetric(Metric):
    """A metric that reads weight matrices, [block, matrix] with the matrices `matrices.NAMES`; see `Metric`.

    `matrices` is filled in before the numbers are read; the folds of a pass over images are not used.
    """

    dims = ("block", "matrix")
    matrices: Matrices | None = None

    def inapplicable(self) -> str:
        """Some block must have been found."""
        return "" if self.plan.blocks else "no block was found whose weights could be read"

    def needs(self) -> dict[str, Need]:
        """Nothing from the images."""
        return {}

    def read(self, folds: Mapping[str, Any], records: Mapping[str, Mapping[str, Array]]) -> Reading:
        """The numbers, from `matrices` alone."""
        if self.matrices is None:
            return self.refused("the weights were not read: this metric needs the model itself, not only what it computed")
        values, facts = self.values(self.matrices)
        if not np.isfinite(values).any():
            zero = ["those that were found are undefined under this definition"] if any(self.matrices.found) else []
            return self.refused(f"no matrix could be measured ({'; '.join([*zero, *self.matrices.reasons()])})")
        settings = {
            **self.settings,
            "matrices": list(NAMES),
            "told_apart": self.matrices.hows(),
            "missing": self.matrices.reasons(),
            "intervals": NO_INTERVAL,
            **facts.pop("settings", {}),
        }
        dims = facts.pop("dims", self.dims)
        return replace(self.reading(values, settings=settings, nulls=untrained_only(), **facts), dims=dims)

    @abstractmethod
    def values(self, matrices: Matrices) -> tuple[Array, dict[str, Any]]:
        """The values [block, matrix], and what differs from the metric's own facts (dims, collapsed, settings)."""


def level_of(kind: type[Metric]) -> str:
    """The level that a metric belongs to: the folder of its family that its file is in."""
    return kind.__module__.split(".")[-2]


def of_level(*levels: str) -> tuple[str, ...]:
    """The plain metrics of some levels ("all" for every one), in the order of the table."""
    wanted = LEVELS if "all" in levels else levels
    return tuple(name for level in LEVELS if level in wanted for name, kind in METRICS.items() if level_of(kind) == level)


def summary_of(readings: Mapping[str, Reading]) -> Summary:
    """The mean of each weight reading over what is defined, and that of its untrained twin.

    Keys are the metric's name with underscores and `_mean`, or `_adjacent` for the mean over neighbouring blocks.
    """
    found: Summary = {}
    for name, reading in readings.items():
        across = reading.dims == ("block", "block")
        key = name.replace("-", "_").replace("@", "_")
        fresh = None if reading.nulls is None else reading.nulls.values.get("untrained")
        for ending, values in (("", reading.values), ("_untrained", fresh)):
            numbers = None if values is None else mean(adjacent(values) if across else values)
            if not ending or fresh is not None:
                found[f"{key}_{'adjacent' if across else 'mean'}{ending}"] = numbers
    return found
