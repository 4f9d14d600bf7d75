"""How sure the findings are: tests, convergence, extremes and classes, all from what was kept of single images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from numpy.typing import NDArray

from collapse_probe.classes import classes_of
from collapse_probe.convergence import convergence_of
from collapse_probe.data import ImageSet
from collapse_probe.extremes import extremes_of
from collapse_probe.findings import Reading
from collapse_probe.headlines import Array, Kept, kept_of
from collapse_probe.permutation import pair_tests
from collapse_probe.summary import Summary, adjacent, mean
from collapse_probe.words import number


def sureness(
    table: Mapping[str, NDArray[Any]],
    readings: Mapping[str, Reading],
    *,
    heads: Array | None = None,
    images: object = None,
    labels: Mapping[str, int] | None = None,
    seed: int = 0,
) -> dict[str, dict[str, Any]]:
    """`tests`, `convergence`, `extremes` and `classes` of a run by name, as plain data; each empty where nothing can be said.

    `table` is the content of images.npz, `heads` the heads of every block; `images` gives the labels where it is an ImageSet
    that has some, else `labels` may hold them by image name. See `pair_tests`, `convergence_of`, `extremes_of` and `classes_of`
    for what each holds.
    """
    kept = kept_of(table, heads)
    own, class_names = labels_of(images)
    return {
        "tests": pair_tests(table, readings, seed),
        "convergence": convergence_of(kept, seed),
        "extremes": extremes_of(kept),
        "classes": classes_of(kept, labels or None if own is None else own, class_names),
    }


def labels_of(images: object) -> tuple[dict[str, int] | None, Sequence[str]]:
    """The class of every image by its name and the names of the classes; None where there are no labels."""
    if not isinstance(images, ImageSet) or images.labels is None:
        return None, ()
    return dict(zip(images.names, images.labels, strict=True)), images.class_names


def bounds_of(kept: Kept) -> Summary:
    """The ends of the headline means' 95 % intervals, for the summary: NAME_ci_low and NAME_ci_high; None with one image."""
    found: Summary = {}
    for name, estimate in kept.estimates().items():
        for end, value in zip(("low", "high"), estimate.ci95, strict=True):
            found[f"{name}_ci_{end}"] = value if value == value else None
    return found


def against_seeds(reading: Reading) -> str:
    """Whether a block × block similarity is beyond what untrained twins of several seeds span; empty with one seed."""
    if reading.nulls is None or "untrained_seeds" not in reading.nulls.spread or reading.values is None:
        return ""
    spread = reading.nulls.spread["untrained_seeds"]
    real, low, high = (mean(adjacent(part)) for part in (reading.values, spread["low"], spread["high"]))
    if real is None or low is None or high is None:
        return ""
    where = "above" if real > high else "below" if real < low else "within"
    return (
        f"neighbouring blocks of the model are alike at {number(real)}, {where} what {len(spread['seeds'])} untrained twins of "
        f"different seeds span ({number(low)} to {number(high)}, mean of the lowest and of the highest of each pair)"
    )
