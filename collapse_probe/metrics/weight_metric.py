"""What a metric of the weights is: it reads the model's matrices once and needs no images."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from torch import Tensor

from collapse_probe.capture.weights.matrices import BY_HEAD, NAMES, Matrices, Matrix
from collapse_probe.metrics.functional.spectra import singular_values
from collapse_probe.metrics.metric import Metric, Need, Record
from collapse_probe.metrics.nulls import untrained_only
from collapse_probe.results.findings import MetricResult
from collapse_probe.statistics.intervals import Array

NO_INTERVAL = "none: a model has one set of weights, which is no sample of anything"
ONE_HEAD = "rows of one head (q, k, v)"


class WeightMetric(Metric):
    """A metric of the weight matrices, [block, matrix] with the matrices `weights.matrices.NAMES`; see `Metric`.

    `matrices` is filled in before the numbers are computed; no accumulator is needed.
    """

    level = "weights"
    dims = ("block", "matrix")

    def inapplicable(self) -> str:
        """Some block must have been found."""
        return "" if self.plan.blocks else "no block was found whose weights could be read"

    @property
    def neighbours(self) -> tuple[bool, ...]:
        """Those of the model's blocks."""
        return self.plan.adjacent_blocks

    def accumulators(self) -> list[Need]:
        return []

    def compute(self, accumulators: Sequence[Any] = (), records: Sequence[Record] = ()) -> MetricResult:
        """The numbers, from `matrices` alone."""
        if self.matrices is None:
            return self.not_applicable(
                "the weights were not read: this metric needs the model itself, not only what it computed"
            )
        values, facts = self.values(self.matrices)
        if not np.isfinite(values).any():
            zero = [self.undefined(self.matrices)] if any(self.matrices.by_block) else []
            return self.not_applicable(f"no matrix could be measured ({'; '.join([*zero, *self.matrices.reasons()])})")
        details = {
            "matrices": list(NAMES),
            "told_apart": self.matrices.hows(),
            "missing": self.matrices.reasons(),
            "intervals": NO_INTERVAL,
            **facts.pop("details", {}),
        }
        dims = facts.pop("dims", self.dims)
        return replace(self.result(values, details=details, nulls=untrained_only(), **facts), dims=dims)

    def undefined(self, matrices: Matrices) -> str:
        """Why matrices that were found gave no number at all."""
        return "those that were found are undefined under this definition"

    @abstractmethod
    def values(self, matrices: Matrices) -> tuple[Array, dict[str, Any]]:
        """The values [block, matrix], and what differs from the metric's own facts (dims, collapsed, details)."""


def spectral(matrices: Matrices, function: Callable[[Tensor], Tensor], by_head: bool = False) -> Array:
    """A function of singular values [..., r] -> [...] over all matrices, [block, matrix]; each is decomposed once.

    `by_head` gives the mean over the heads' own rows of q, k and v; NaN for the others.
    """

    def one(matrix: Matrix) -> Tensor:
        key = (*matrix.key, by_head)
        if key not in matrices.spectra:
            matrices.spectra[key] = singular_values(matrix.by_head if by_head else matrix.weight)
        mean: Tensor = function(matrices.spectra[key]).mean()
        return mean

    return matrices.each(one, BY_HEAD if by_head else NAMES)
