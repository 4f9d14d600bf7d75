"""What a sweep says, in a few sentences for each curve, made from rules that tests can turn around."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from collapse_probe.results.sweep import UNTRAINED, CellResult, Estimate, Sweep, estimate, label_of
from collapse_probe.results.text import interval, number

RISES, FALLS, FLAT, UNCLEAR = "rises", "falls", "stays the same", "shows no clear trend"
BEYOND, EXPLAINED, PARTLY, NEITHER, GONE = "beyond", "explained", "partly", "neither", "gone"
MOST_ANSWERS, NAMED = 6, 3
Points = Sequence[tuple[Any, Sequence[CellResult]]]


@dataclass(frozen=True)
class Trend:
    """Which way a number goes along an axis: the mean slope of the seeds, with its 95 % t interval over them."""

    case: str
    slope: Estimate


@dataclass(frozen=True)
class Answer:
    """What was varied in the curve, and the sentences about it."""

    label: str
    sentences: tuple[str, ...]


def trend(points: Points, key: str) -> Trend | None:
    """Whether a number rises or falls along an axis of numbers; None with fewer than two places where it is defined.

    A straight line is fitted to each seed that has all places. With two seeds or more the number rises where the
    interval of the mean slope lies above 0 and falls where it lies below; with one, where no step goes the other way.
    """
    places = [(float(x), {cell.seed: cell.number(key) for cell in cells}) for x, cells in points]
    places = [(x, held) for x, held in places if any(math.isfinite(value) for value in held.values())]
    if len(places) < 2:
        return None
    seeds = [seed for seed in places[0][1] if all(math.isfinite(held.get(seed, math.nan)) for _, held in places)]
    if not seeds:
        return None
    x = np.array([place for place, _ in places])
    lines = {seed: np.array([held[seed] for _, held in places]) for seed in seeds}
    slope = estimate(float(np.polyfit(x, y, 1)[0]) for y in lines.values())
    return Trend(_case(slope, list(lines.values()), np.argsort(x)), slope)


def _case(slope: Estimate, lines: list[Any], order: Any) -> str:
    if all(np.ptp(line) == 0 for line in lines):
        return FLAT
    if slope.ci95 is not None:
        return RISES if slope.ci95[0] > 0 else FALLS if slope.ci95[1] < 0 else UNCLEAR
    steps = np.diff(lines[0][order])
    return RISES if (steps >= 0).all() else FALLS if (steps <= 0).all() else UNCLEAR


def against_twin(points: Points, key: str = "similar_blocks") -> str | None:
    """Whether trained networks count more than untrained ones of the same architecture.

    beyond: more at every place; explained: at none; partly: at some; where the trained count none at all, neither: nor do
    the untrained; gone: the untrained do. None where there is nothing to compare.
    """
    pairs = [tuple(estimate(c.number(k) for c in cells).mean for k in (key, UNTRAINED + key)) for _, cells in points]
    pairs = [pair for pair in pairs if all(map(math.isfinite, pair))]
    more = [trained > fresh for trained, fresh in pairs]
    if not pairs:
        return None
    if not any(trained for trained, _ in pairs):
        return GONE if any(fresh for _, fresh in pairs) else NEITHER
    return BEYOND if all(more) else PARTLY if any(more) else EXPLAINED


def answers(sweep: Sweep) -> list[Answer]:
    """What each curve along the first axis of numbers says, or each kind of network where no number was varied."""
    axes = [axis for axis in sweep.axes if _numeric(sweep, axis)]
    if not axes:
        return [Answer(label, tuple(_levels(cells))) for label, cells in list(groups(sweep).items())[:MOST_ANSWERS]]
    curves = list(sweep.series(axes[0]).items())[:MOST_ANSWERS]
    return [Answer(label, tuple(_along(axes[0], points))) for label, points in curves]


def headline(sweep: Sweep) -> str:
    """The whole sweep in one sentence: which way the counts, kappa and the accuracy go along the first axis of numbers."""
    axes = [axis for axis in sweep.axes if _numeric(sweep, axis)]
    if not sweep.finished:
        return f"None of the {len(sweep.cells)} cells is finished."
    if not axes:
        return f"{len(groups(sweep))} kinds of network, {len(sweep.seeds)} seeds; no number was varied, so there is no trend."
    curves = sweep.series(axes[0])
    parts = []
    for key in CALLED:
        found = {label: trend(points, key) for label, points in curves.items()}
        cases = {label: each.case for label, each in found.items() if each is not None}
        if cases:
            parts.append(f"{SHORT[key]} {_counted(cases)}")
    if not parts:
        return f"Too few cells are finished to tell a trend along {axes[0]}."
    few = " (one seed: no interval)" if len(sweep.seeds) == 1 else ""
    return f"Along {axes[0]}{few}, {'; '.join(parts)}."


def _counted(cases: Mapping[str, str]) -> str:
    """The case of each curve by its label: by name for a few, else how many have it."""
    held, count = list(cases.values()), len(cases)
    if len(set(held)) == 1:
        return held[0] + ("" if count == 1 else " in both curves" if count == 2 else f" in all {count} curves")
    if count <= NAMED:
        return ", ".join(f"{case} ({label})" for label, case in cases.items())
    return ", ".join(f"{case} in {held.count(case)} of {count} curves" for case in dict.fromkeys(held))


def groups(sweep: Sweep) -> dict[str, list[CellResult]]:
    """The finished cells that differ in their seed alone, by what they have in common."""
    found: dict[str, list[CellResult]] = {}
    for cell in sweep.finished:
        found.setdefault(label_of(cell.values), []).append(cell)
    return found


def _numeric(sweep: Sweep, axis: str) -> bool:
    return all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in sweep.varied[axis])


def _levels(cells: Sequence[CellResult]) -> Iterable[str]:
    mean = {key: estimate(cell.number(key) for cell in cells) for key in KEYS}
    yield (
        f"{_plain(mean['similar_blocks'])} adjacent blocks count as similar by the raw cosine, "
        f"{_plain(mean['similar_blocks_corrected'])} by κ; mean κ {_plain(mean['kappa_adjacent'], 3)}, "
        f"accuracy {_plain(mean['accuracy'], 3)}."
    )


KEYS = ("similar_blocks", "similar_blocks_corrected", "kappa_adjacent", "accuracy")
CALLED = {
    "similar_blocks": "The raw count of similar blocks",
    "kappa_adjacent": "Corrected for chance, the mean κ of adjacent blocks",
    "accuracy": "Accuracy on the held-out images",
}
SHORT = {"similar_blocks": "the raw count of similar blocks", "kappa_adjacent": "mean κ", "accuracy": "accuracy"}
TWIN_SAYS = {
    BEYOND: "Untrained networks of the same architecture count fewer everywhere",
    EXPLAINED: "Untrained networks of the same architecture count as many or more everywhere, so that the raw count shows no "
    "collapse that training brought",
    PARTLY: "Untrained networks of the same architecture count as many or more in some of them, fewer in others",
    NEITHER: "Untrained networks of the same architecture count none either: training did not bring the zero",
    GONE: "Untrained networks of the same architecture do count some",
}


def _along(axis: str, points: Points) -> Iterable[str]:
    for key, name in CALLED.items():
        found = trend(points, key)
        if found is None:
            yield f"{name} is known at fewer than two values of {axis}."
            continue
        digits = 0 if key == "similar_blocks" and found.slope.seeds == 1 else 1 if key == "similar_blocks" else 3
        ends = [estimate(cell.number(key) for cell in cells).mean for _, cells in (points[0], points[-1])]
        text = f"{name} {found.case}: {number(ends[0], digits)} at {axis} {points[0][0]}, {number(ends[1], digits)} at {axis} "
        text += f"{points[-1][0]}{_shares(points, key)}{_untrained(points, key)}"
        yield f"{text} ({_sure(found, axis)})."
        if key == "similar_blocks":
            yield from _twin(points)


def _shares(points: Points, key: str) -> str:
    """The counts as shares of what could be counted: more blocks leave more to count."""
    if key != "similar_blocks":
        return ""
    shares = [estimate(c.number(key) / c.number("pairs") for c in cells if c.number("pairs") > 0).mean for _, cells in points]
    return f", {_percent(shares[0])} and {_percent(shares[-1])} of the adjacent pairs"


def _untrained(points: Points, key: str) -> str:
    fresh = [estimate(cell.number(UNTRAINED + key) for cell in cells).mean for _, cells in (points[0], points[-1])]
    known = key == "kappa_adjacent" and any(map(math.isfinite, fresh))
    return f", untrained {number(fresh[0])} and {number(fresh[1])}" if known else ""


def _percent(share: float) -> str:
    return f"{share:.0%}" if math.isfinite(share) else "–"


def _sure(found: Trend, axis: str) -> str:
    if found.slope.ci95 is None:
        return "one seed, no interval"
    return (
        f"slope over {axis} {number(found.slope.mean, 4)}, 95 % {interval(found.slope.ci95, 4)} over {found.slope.seeds} seeds"
    )


def _twin(points: Points) -> Iterable[str]:
    case = against_twin(points)
    if case is not None:
        fresh = [estimate(cell.number(UNTRAINED + "similar_blocks") for cell in cells).mean for _, cells in points]
        yield f"{TWIN_SAYS[case]} ({', '.join(number(value, 0 if value == round(value) else 1) for value in fresh)})."


def _plain(held: Estimate, digits: int = 1) -> str:
    return number(held.mean, digits) + ("" if held.ci95 is None else f" ({interval(held.ci95, digits)})")


def caveats(sweep: Sweep) -> list[str]:
    """What must not be read out of this sweep."""
    found = [
        "Intervals are over seeds: initial weights, order and augmentation of the images. The data are split alike in all."
        if len(sweep.seeds) > 1
        else "One seed: no interval is given, and any difference may be chance. --seeds N adds seeds; finished cells are kept."
    ]
    if "depth" in sweep.axes:
        found.append(
            "The published counts are of other networks on other data at another scale, and how they were counted was not "
            "published: they show what was reported, and are no target that these numbers could hit or miss."
        )
    found += _about_width(sweep.varied, sweep.recipe, sweep.changes)
    if any("similar_blocks_probs" in cell.numbers for cell in sweep.finished):
        found.append(
            "Where a fix changes the maps after the softmax, the counts are of what multiplies the values; the softmax of the "
            "same cells is drawn as a dotted line and may be more alike than in a network without the fix."
        )
    if len({cell.names_sha256 for cell in sweep.finished}) > 1:
        found.append("The cells were not all trained and validated on the same images: their names differ.")
    if sweep.failed:
        found.append(f"{len(sweep.failed)} of {len(sweep.cells)} cells failed and are missing from every curve; see the table.")
    return [*found, *sweep.notes]


def _about_width(varied: Mapping[str, Any], recipe: Mapping[str, Any], changes: Mapping[str, Any]) -> list[str]:
    architecture = recipe.get("architecture", {})
    held = {**architecture.get("vit", {}), "embedding_std": architecture.get("embedding_std"), **changes}
    kept = [f"{name} {held[name]}" for name in ("heads", "init_std", "embedding_std") if held.get(name) and name not in varied]
    if "width" not in varied or not kept:
        return []
    return [
        f"With the width only the width changed ({', '.join(kept)} stayed): heads become wider, and fixed initial weights are "
        "relatively larger in a wider network, which alone moves the raw number."
    ]
