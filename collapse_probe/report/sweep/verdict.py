"""What a sweep shows: one sentence about all of it, and a few about each curve, from the numbers of the cells."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from collapse_probe.results.sweep import SHARE, UNTRAINED, CellResult, Points, Sweep, estimate, trend
from collapse_probe.results.text import interval, number
from collapse_probe.results.verdict import Verdict

BEYOND, EXPLAINED, PARTLY, NEITHER, GONE = "beyond", "explained", "partly", "neither", "gone"
MOST_VERDICTS, MOST_NAMED = 6, 3
NUMBERS = {  # by their names, with decimals
    SHARE: ("share of adjacent blocks that count as similar by raw similarity", 3),
    "kappa_adjacent": ("mean κ of adjacent blocks", 3),
    "accuracy": ("accuracy on the held-out images", 3),
}
TWINS = {
    BEYOND: "count fewer everywhere",
    EXPLAINED: "count as many or more everywhere, so that the raw count shows no collapse that training brought",
    PARTLY: "count as many or more in some places, fewer in others",
    NEITHER: "count none either: training did not bring the zero",
    GONE: "do count some",
}


def headline(sweep: Sweep) -> str:
    """The whole sweep in one sentence: the trends along the first axis of numbers."""
    axis = _numeric_axis(sweep)
    if not sweep.finished:
        return f"None of the {len(sweep.cells)} cells is finished."
    seeds = "one seed each, which ranks nothing" if len(sweep.seeds) == 1 else f"{len(sweep.seeds)} seeds"
    if axis is None:
        return f"{len(sweep.groups)} kinds of network, {seeds}; no number was varied, so there is no trend."
    curves, parts = sweep.series(axis), []
    for key, (name, _) in NUMBERS.items():
        trends = {label: trend(points, key) for label, points in curves.items()}
        if cases := {label: each.case for label, each in trends.items() if each is not None}:
            parts.append(f"the {name} {_counted(cases)}")
    if not parts:
        return f"Too few cells are finished for a trend along {axis}."
    return f"Along {axis}{' (one seed each, which ranks nothing)' if len(sweep.seeds) == 1 else ''}, {'; '.join(parts)}."


def verdicts(sweep: Sweep) -> list[Verdict]:
    """What each curve along the first axis of numbers shows, or each kind of network where no number was varied."""
    axis = _numeric_axis(sweep)
    if axis is None:
        levels = []
        for label, cells in list(sweep.groups.items())[:MOST_VERDICTS]:
            pairs = mean(cells, "pairs", 0).partition(" ")[0]
            counts = f"{mean(cells, 'similar_blocks', 1)} of {pairs} adjacent pairs count as similar by raw similarity"
            corrected, kappa = mean(cells, "similar_blocks_corrected", 1), mean(cells, "kappa_adjacent", 3)
            text = f"{counts}, {corrected} by κ; mean κ {kappa}, accuracy {mean(cells, 'accuracy', 3)}."
            levels.append(Verdict("levels", (text,), label=label))
        return levels
    curves = list(sweep.series(axis).items())[:MOST_VERDICTS]
    return [Verdict("trend", tuple(_along(axis, points)), label=label) for label, points in curves]


def _numeric_axis(sweep: Sweep) -> str | None:
    return next((axis for axis in sweep.axes if sweep.is_numeric(axis)), None)


def _counted(cases: Mapping[str, str]) -> str:
    """The case of each curve by its label: by name for a few, else how many have it."""
    each, count = list(cases.values()), len(cases)
    if len(set(each)) == 1:
        return each[0] + ("" if count == 1 else " in both curves" if count == 2 else f" in all {count} curves")
    if count <= MOST_NAMED:
        return ", ".join(f"{case} ({label})" for label, case in cases.items())
    return ", ".join(f"{case} in {each.count(case)} of {count} curves" for case in dict.fromkeys(each))


def mean(cells: Sequence[CellResult], key: str, digits: int) -> str:
    """The mean of a number over seeds, with its interval where it has one."""
    value = estimate(cell.number(key) for cell in cells)
    return number(value.mean, digits) + ("" if value.ci95 is None else f" ({interval(value.ci95, digits)})")


def _along(axis: str, points: Points) -> list[str]:
    """A sentence for each of NUMBERS, and one on the counts of the untrained copies."""
    sentences = []
    for key, (name, digits) in NUMBERS.items():
        slope = trend(points, key)
        if slope is None:
            sentences.append(f"The {name} is known at fewer than two values of {axis}.")
            continue
        first, last = (f"{number(_mean(cells, key), digits)} at {axis} {value}" for value, cells in (points[0], points[-1]))
        more = ""
        if key == SHARE:
            more = f" ({_count_of_pairs(points[0][1])} and {_count_of_pairs(points[-1][1])} pairs)"
        untrained = [_mean(cells, UNTRAINED + key) for _, cells in (points[0], points[-1])]
        if key == "kappa_adjacent" and any(map(math.isfinite, untrained)):
            more = f", untrained {number(untrained[0])} and {number(untrained[1])}"
        sure = "one seed each, no interval"
        if (along := slope.slope).ci95 is not None:
            sure = f"slope over {axis} {number(along.mean, 4)}, 95 % CI {interval(along.ci95, 4)} over {along.seeds} seeds"
        sentences.append(f"The {name} {slope.case}: {first}, {last}{more} ({sure}).")
        if key == SHARE and (case := against_twin(points)):
            counts = [_mean(cells, UNTRAINED + "similar_blocks") for _, cells in points]
            words = ", ".join(number(count, 0 if count == round(count) else 1) for count in counts)
            sentences.append(f"Untrained networks of the same architecture {TWINS[case]} ({words}).")
    return sentences


def against_twin(points: Points, key: str = "similar_blocks") -> str | None:
    """Whether trained networks count more than untrained ones of the same architecture.

    beyond: more at every place; explained: at none; partly: at some; where the trained count none at all, neither: nor do
    the untrained; gone: the untrained do. None where there is nothing to compare.
    """
    pairs = [(_mean(cells, key), _mean(cells, UNTRAINED + key)) for _, cells in points]
    pairs = [pair for pair in pairs if all(map(math.isfinite, pair))]
    if not pairs:
        return None
    if not any(trained for trained, _ in pairs):
        return GONE if any(untrained for _, untrained in pairs) else NEITHER
    more = [trained > untrained for trained, untrained in pairs]
    return BEYOND if all(more) else PARTLY if any(more) else EXPLAINED


def _mean(cells: Sequence[CellResult], key: str) -> float:
    return estimate(cell.number(key) for cell in cells).mean


def _count_of_pairs(cells: Sequence[CellResult]) -> str:
    numbers = [_mean(cells, key) for key in ("similar_blocks", "pairs")]
    return " of ".join(number(each, 1).removesuffix(".0") for each in numbers)


def caveats(sweep: Sweep) -> list[str]:
    """What must not be read out of this sweep."""
    texts = [
        "Intervals are over seeds: initial weights, order and augmentation of the images. The data are split alike in all."
        if len(sweep.seeds) > 1
        else "One seed each: no interval is given, and any difference between cells may be that of the seeds, so that none of "
        "them is ranked above another. --seeds N adds seeds; finished cells are kept."
    ]
    if "depth" in sweep.axes:
        texts.append(
            "The published counts are of other networks on other data at another scale, and how they were counted was not "
            "published: they show what was reported, and are no target that these numbers could hit or miss."
        )
    architecture = sweep.recipe.get("architecture", {})
    settings = {**architecture.get("vit", {}), "embedding_std": architecture.get("embedding_std"), **sweep.changes}
    fixed = [f"{n} {settings[n]}" for n in ("heads", "init_std", "embedding_std") if settings.get(n) and n not in sweep.varied]
    if "width" in sweep.varied and fixed:
        texts.append(
            f"With the width only the width changed ({', '.join(fixed)} stayed): heads become wider, and fixed initial weights "
            "are relatively larger in a wider network, which alone moves the raw number."
        )
    if any("similar_blocks_probs" in cell.numbers for cell in sweep.finished):
        texts.append(
            "Where a fix changes the maps after the softmax, the counts are of what multiplies the values; the softmax of the "
            "same cells is drawn as a dotted line and may be more alike than in a network without the fix."
        )
    if len({cell.names_sha256 for cell in sweep.finished}) > 1:
        texts.append("The cells were not all trained and validated on the same images: their names differ.")
    if sweep.failed:
        texts.append(f"{len(sweep.failed)} of {len(sweep.cells)} cells failed and are missing from every curve; see the table.")
    return [*texts, *sweep.notes]
