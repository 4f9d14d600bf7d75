"""How many blocks attend like the block before: the count of DeepViT's Figure 3b, raw and corrected."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from collapse_probe.agreement import MapAgreement
from collapse_probe.findings import Reading
from collapse_probe.measure import Array, Metric, Need, no_token_maps
from collapse_probe.nulls import untrained_only
from collapse_probe.sockets import METRICS
from collapse_probe.statistics import bootstrap, kappa

THRESHOLDS = (0.8, 0.9, 0.95)
CORRECTED_ABOVE = 0.5


def count_above(adjacent: Array, threshold: float) -> Array:
    """How many of the adjacent pairs have a mean over images above the threshold, [pairs, ..., images] -> [...].

    >>> float(count_above(np.array([[0.95, 0.91], [0.2, 0.99]]), 0.9))
    1.0
    """
    return np.asarray((_mean(adjacent) > threshold).sum(0), dtype=np.float64)


def count_corrected(real: Array, other_token: Array) -> Array:
    """How many of the adjacent pairs have kappa above one half, [pairs, ..., images] -> [...]."""
    return np.asarray((kappa(_mean(real), _mean(other_token)) > CORRECTED_ABOVE).sum(0), dtype=np.float64)


def _mean(values: Array) -> Array:
    defined = np.isfinite(values)
    n = defined.sum(-1)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.asarray(np.where(n > 0, np.where(defined, values, 0.0).sum(-1) / n, np.nan))


class SimilarBlocks(Metric):
    """The number of blocks whose mean similarity with the block before is above a threshold."""

    name = "similar-blocks"
    summary = "how many blocks attend like the block before (DeepViT Fig. 3b), at 0.8 / 0.9 / 0.95"
    dims = ("threshold",)
    collapsed = "high"
    defaults = {"axis": "column", "centred": False, "point": "weights", "thresholds": list(THRESHOLDS)}  # noqa: RUF012
    variants = {"row": {"axis": "row"}, "centred": {"centred": True}, "probs": {"point": "probs"}}  # noqa: RUF012

    def inapplicable(self) -> str:
        """Without maps over tokens there is nothing to count."""
        return no_token_maps(self.plan)

    @property
    def definition(self) -> str:
        """The definition in words."""
        return (
            "Number of blocks whose attention-similarity with the block before, averaged over images, heads and tokens, is "
            f"above the threshold ({self.settings['axis']}s, at {self.settings['point']}). DeepViT does not define its count; "
            "this is our reading. The corrected count asks for kappa above 0.5 instead. Standard errors and intervals: "
            "bootstrap over images (scipy.stats.bootstrap, percentile)."
        )

    def needs(self) -> dict[str, Need]:
        """The same agreement as attention-similarity."""
        key = (self.settings["point"], self.settings["axis"], self.settings["centred"], ())
        return {"agreement": (("maps", *key), lambda: MapAgreement(self.plan, *key))}

    def read(self, folds: Mapping[str, Any], records: Mapping[str, Mapping[str, Array]]) -> Reading:
        """Counts with bootstrap intervals; the corrected count and its interval stand in the settings."""
        real, null = (records["agreement"][name].T for name in ("real", "other_token"))
        counts = [count_above(real, t) for t in self.settings["thresholds"]]
        spread = [_spread(partial(_above, real, t), real.shape[-1]) for t in self.settings["thresholds"]]
        corrected = count_corrected(real, null)
        _, corrected_ci95 = _spread(lambda chosen: count_corrected(real[:, chosen], null[:, chosen]), real.shape[-1])
        settings = {
            **self.settings,
            "pairs": len(real),
            "corrected": {"kappa_above": CORRECTED_ABOVE, "value": float(corrected), "ci95": corrected_ci95.tolist()},
        }
        return self.reading(
            np.array(counts),
            stderr=np.array([error for error, _ in spread]),
            ci95=np.array([bounds for _, bounds in spread]),
            point=self.settings["point"],
            settings=settings,
            nulls=untrained_only(),
        )


def _above(real: Array, threshold: float, chosen: NDArray[np.int64]) -> Array:
    return count_above(real[:, chosen], threshold)


def _spread(statistic: Callable[[NDArray[np.int64]], Array], images: int) -> tuple[float, Array]:
    """Bootstrap error and interval; NaN with one image."""
    if images < 2:
        return float("nan"), np.full(2, np.nan)
    error, bounds = bootstrap(statistic, images)
    return float(error), bounds


METRICS.add(SimilarBlocks.name, SimilarBlocks)
