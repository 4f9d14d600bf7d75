"""Into how many stretches of depth do the states of a network fall?  From the distances W [L, L] between them, in NumPy."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from collapse_probe.statistics.intervals import Array

SHORTEST = 2
"""Blocks of the shortest phase, as in the released code of arXiv 2512.19941."""
MOST_CUT = 16
"""Blocks up to which the exact max-cut is found by trying all of its 2^(L − 1) cuts."""
MOST_PHASES = 8


def steady_drift(distance: Array) -> Array:
    """The same distances with each pair's replaced by the mean over all pairs as far apart in depth, [L, L] -> [L, L].

    So far would states be that move on by equal steps: it has no boundaries, and as much drift.

    >>> steady_drift(np.array([[0.0, 1.0, 1.0], [1.0, 0.0, 0.0], [1.0, 0.0, 0.0]])).tolist()
    [[0.0, 0.5, 1.0], [0.5, 0.0, 0.5], [1.0, 0.5, 0.0]]
    """
    size = len(distance)
    by_step = np.array([np.diagonal(distance, step).mean() for step in range(size)])
    places = np.arange(size)
    steady: Array = by_step[np.abs(places[:, None] - places)]
    return steady


def contiguous_phases(distance: Array, most: int = MOST_PHASES, shortest: int = SHORTEST) -> tuple[Array, list[list[int]]]:
    """For 1, 2, … phases the least sum of distances inside phases over the sum of all, and where they begin; [L, L] -> [k].

    Phases are stretches of consecutive states, `shortest` long at least; the best ones are found by dynamic programming. All
    shares are 0 where all distances are.

    >>> two = np.kron(1 - np.eye(2), np.ones((2, 2)))
    >>> contiguous_phases(two)
    (array([1., 0.]), [[0], [0, 2]])
    """
    size = len(distance)
    upper = np.triu(distance, 1)
    area = np.pad(upper, ((1, 0), (1, 0))).cumsum(0).cumsum(1)
    ends = np.arange(size + 1)
    inside = area[ends, ends][None, :] - area[ends[:, None], ends] - area[ends, ends[:, None]] + np.diag(area)[:, None]
    inside = np.where(ends[None, :] - ends[:, None] >= shortest, inside, np.inf)  # [first, end)
    total = float(upper.sum())
    best, begun = inside[0].copy(), list[Array]()
    shares, starts = [best[size]], [[0]]
    for _ in range(2, min(most, size // shortest) + 1):
        candidates = best[:, None] + inside
        begun.append(candidates.argmin(0))
        best = candidates.min(0)
        shares.append(best[size])
        where, cuts = size, list[int]()
        for column in reversed(begun):
            where = int(column[where])
            cuts.insert(0, where)
        starts.append([0, *cuts])
    return np.array(shares) / total if total > 0 else np.zeros(len(shares)), starts


def phases_beyond_drift(distance: Array, margin: float, most: int = MOST_PHASES) -> tuple[list[int], float]:
    """Where phases begin, and by how much they beat a steady drift: the number of them for which the share of the distances
    that stays inside phases is most below that of `steady_drift`; one phase where it is not below by `margin`.

    >>> phases_beyond_drift(np.kron(1 - np.eye(3), np.ones((3, 3))), 0.05)[0]
    [0, 3, 6]
    >>> places = np.arange(12.0)
    >>> phases_beyond_drift(np.abs(places[:, None] - places), 0.05)
    ([0], 0.0)
    """
    shares, starts = contiguous_phases(distance, most)
    gains = contiguous_phases(steady_drift(distance), most)[0] - shares
    best = int(gains.argmax())
    return (starts[best], float(gains[best])) if gains[best] > margin else ([0], float(max(gains[best], 0.0)))


def max_cut_phases(distance: Array, threshold: float, shortest: int = SHORTEST) -> list[list[int]]:
    """Groups of states by recursive exact max-cut (arXiv 2512.19941): the group whose last cut weighed most is cut again until
    no cut weighs more than `threshold` of the sum of all distances; groups of fewer than 2 · `shortest` are left whole.

    Nothing makes the groups contiguous. Raises ValueError for more than MOST_CUT states.

    >>> max_cut_phases(np.kron(1 - np.eye(2), np.ones((3, 3))), 0.2)
    [[0, 1, 2], [3, 4, 5]]
    """
    size = len(distance)
    if size > MOST_CUT:
        raise ValueError(f"an exact max-cut takes up to {MOST_CUT} states; came {size}")
    least = threshold * np.triu(distance, 1).sum()
    groups, gains = [np.arange(size)], [np.inf]
    while max(gains) > least:
        which = int(np.argmax(gains))
        group = groups[which]
        if len(group) < 2 * shortest:
            gains[which] = -np.inf
            continue
        weight, side = _max_cut(distance[np.ix_(group, group)])
        if weight <= least:
            gains[which] = -np.inf
            continue
        groups[which], gains[which] = group[~side], weight
        groups.append(group[side])
        gains.append(weight)
    return sorted(group.tolist() for group in groups)


def _max_cut(distance: Array) -> tuple[float, NDArray[np.bool_]]:
    """The heaviest cut of a graph and the side of each vertex; the first vertex is on the side False, of equal cuts the first
    in counting order.
    """
    size = len(distance)
    numbers = np.arange(2 ** (size - 1))
    sides = (numbers[:, None] >> np.arange(size - 2, -1, -1)) & 1
    signs = 1.0 - 2.0 * np.pad(sides, ((0, 0), (1, 0)))
    weights = (distance.sum() - np.einsum("ci,ij,cj->c", signs, distance, signs, optimize=True)) / 4
    best = int(weights.argmax())
    return float(weights[best]), signs[best] < 0


def contiguous(groups: Sequence[Sequence[int]]) -> bool:
    """Whether each group is a stretch of consecutive states."""
    return all(max(group) - min(group) + 1 == len(group) for group in groups)
