"""Which colour a subject has in every figure of a comparison, and which subjects a crowded figure shows."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import seaborn

from collapse_probe.drawing import Role, printable
from collapse_probe.side_by_side import Comparison

DISTINCT = ("#0b5fa5", "#d55e00", "#01855f", "#b5579b", "#8a6d00", "#5b4fa2", "#a8322d", "#4a7f87")
MARKERS = ("o", "s", "D", "^", "v", "P", "X", "h")
FAINTER = {"other_token": (0, (1.2, 1.2)), "untrained": (0, (5, 2))}
NULL_LABELS = {"other_token": "its other-token null", "untrained": "its untrained twin"}


def colours(comparison: Comparison) -> dict[str, str]:
    """A colour for each label: distinct ones, or along one ramp for checkpoints and for many subjects."""
    labels = list(comparison.subjects)
    if not comparison.trajectory and len(labels) <= len(DISTINCT):
        return dict(zip(labels, DISTINCT, strict=False))
    ramp = seaborn.color_palette("flare", n_colors=len(labels)).as_hex()
    return dict(zip(labels, map(str, ramp), strict=True))


def roles(comparison: Comparison, most: int | None = None) -> dict[str, Role]:
    """How the measured line of each subject looks; of `most` subjects where there are more."""
    named = colours(comparison)
    shown = chosen(list(named), most or len(named))
    places = {label: at for at, label in enumerate(named)}
    return {
        label: Role(printable(label, 34), named[label], marker=MARKERS[places[label] % len(MARKERS)], width=1.8)
        for label in shown
    }


def null_role(role: Role, null: str) -> Role:
    """How a null of that subject looks: its colour, another line."""
    return Role("", role.colour, FAINTER[null], width=1.2)


def chosen(labels: Sequence[str], most: int) -> list[str]:
    """All labels, or `most` of them evenly spaced, first and last among them.

    >>> chosen(["a", "b", "c", "d", "e"], 3)
    ['a', 'c', 'e']
    """
    if len(labels) <= most:
        return list(labels)
    places = np.linspace(0, len(labels) - 1, most).round().astype(int)
    return [labels[at] for at in dict.fromkeys(places.tolist())]
