"""What findings hold of a metric, its nulls and their intervals, or why they do not hold it."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from collapse_probe.findings import Findings, Reading
from collapse_probe.statistics import half_width

Array = NDArray[np.float64]
TWIN_EXACT = "the twin's own sampling error is not counted"


class Absent(Exception):
    """A number is not in the findings; the text says why."""


def held(findings: Findings, metric: str) -> tuple[Reading, Array]:
    """The reading of a metric and its values; raises Absent."""
    reading = findings.metrics.get(metric)
    if reading is None:
        raise Absent(f"{metric} was not measured in this run")
    if reading.values is None:
        raise Absent(f"{metric} does not apply here: {reading.not_applicable or 'it has no values'}")
    return reading, reading.values


def null(reading: Reading, metric: str, role: str) -> Array:
    """The values of one of a metric's nulls; raises Absent."""
    found = None if reading.nulls is None else reading.nulls.values.get(role)
    if found is None or not np.isfinite(found).any():
        reasons = {} if reading.nulls is None else reading.nulls.reasons
        raise Absent(f"{role} of {metric} was not taken: {reasons.get(role, 'it is defined nowhere')}")
    return found


def null_interval(reading: Reading, role: str) -> Array | None:
    """The 95 % interval [..., 2] of a null; None where it has none, as in findings stored before it was kept."""
    stored = None if reading.nulls is None else reading.nulls.spread.get(f"{role}_ci95")
    return None if stored is None else np.array(stored, dtype=np.float64)


def at_last(findings: Findings, metric: str) -> tuple[int, Array, Array]:
    """The last depth, its value [1] and interval [1, 2] (NaN where there is none); raises Absent."""
    reading, values = held(findings, metric)
    bounds = np.full((len(values), 2), np.nan) if reading.ci95 is None else reading.ci95
    return len(values) - 1, values[-1:], bounds[-1:]


def last_of_twin(findings: Findings, metric: str) -> tuple[Array, Array, str]:
    """The untrained twin's last value [1], half the length of its interval, and a note where none was kept; raises Absent."""
    reading, _ = held(findings, metric)
    fresh, bounds = null(reading, metric, "untrained")[-1:], null_interval(reading, "untrained")
    return (fresh, fresh * 0, TWIN_EXACT) if bounds is None else (fresh, half_width(bounds[-1:]), "")
