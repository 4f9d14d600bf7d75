"""The matrices of several subjects on one common scale, and their differences."""

from __future__ import annotations

import numpy as np
from matplotlib.figure import Figure

from collapse_probe.colours import chosen
from collapse_probe.drawing import Array, drawn, printable
from collapse_probe.findings import Findings
from collapse_probe.heatmaps import SIGNED, Panel, Scale, grid, scale_of
from collapse_probe.pairing import PROBS
from collapse_probe.readings import held, null
from collapse_probe.sentences import RAW
from collapse_probe.side_by_side import Comparison

MOST = 4  # subjects in a row
LIMITS = (0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0)  # where the scale of differences may end


@drawn
def matrices(comparison: Comparison, narrow: bool = False) -> Figure | None:
    """Cosine between the maps of every two blocks: a column a subject, raw above and null-corrected
    beneath.
    """
    found = {label: m for label in shown(comparison) if (m := _matrix(comparison, label, RAW)) is not None}
    if not found:
        return None
    scale = scale_of(*found.values())
    raw = [Panel(m, f"{printable(label, 30)}: raw cosine", scale) for label, m in found.items()]
    kappas = {label: _kappa(comparison.subjects[label], RAW) for label in found}
    corrected = [None if m is None else Panel(m, f"{printable(label, 30)}: κ", SIGNED) for label, m in kappas.items()]
    return grid([*raw, *(corrected if any(corrected) else [])], len(found), narrow=narrow)


@drawn
def difference_maps(comparison: Comparison, narrow: bool = False) -> Figure | None:
    """Each subject less the first, raw and null-corrected, all on one scale."""
    maps: list[tuple[str, Array | None, Array | None]] = []
    first = comparison.first
    for label in shown(comparison)[1:]:
        raw = _less(_matrix(comparison, label, RAW), _matrix(comparison, first, RAW))
        kappas = [_kappa(comparison.subjects[each], RAW) for each in (label, first)]
        if raw is not None:
            maps.append((label, raw, _less(*kappas)))
    if not maps:
        return None
    scale = difference_scale([m for _, *both in maps for m in both if m is not None])
    panels: list[Panel | None] = []
    for label, raw, kappa in maps:
        room = 14 if narrow else 22
        name = f"{printable(label, room)} − {printable(first, room)}"
        panels += [None if m is None else Panel(m, f"{name}, {kind}", scale) for m, kind in ((raw, "raw"), (kappa, "κ"))]
    return grid(panels, 2, narrow=narrow)


@drawn
def probs_and_weights(comparison: Comparison, narrow: bool = False) -> Figure | None:
    """The softmax beside what multiplies V, a row a subject; drawn only where a subject changes its maps."""
    if not any(findings.model.get("mixes_maps") for findings in comparison.subjects.values()):
        return None
    found: list[tuple[str, Array, Array]] = []
    for label in shown(comparison):
        weights = _matrix(comparison, label, RAW)
        probs = _matrix(comparison, label, RAW + PROBS)
        if weights is not None:
            found.append((label, weights if probs is None else probs, weights))
    if not found:
        return None
    scale = scale_of(*(m for _, *both in found for m in both))
    panels: list[Panel | None] = []
    for label, probs, weights in found:
        same = " = probs" if probs is weights else ""
        panels += [
            Panel(probs, f"{printable(label, 22)}: probs", scale),
            Panel(weights, f"{printable(label, 22)}: weights{same}", scale),
        ]
    return grid(panels, 2, narrow=narrow)


@drawn
def cross_cka(comparison: Comparison, narrow: bool = False) -> Figure | None:
    """CKA between each depth of the first model and each of another's, a panel a subject."""
    found = {label: m for label in shown(comparison) if (m := _matrix(comparison, label, "cross-cka")) is not None}
    if not found:
        return None
    scale = scale_of(*found.values())
    first = printable(comparison.first, 22)
    panels = [
        Panel(m, printable(label, 30), scale, rows=f"depth of {first}", columns="depth of this model")
        for label, m in found.items()
    ]
    return grid(panels, min(len(panels), 2), narrow=narrow)


def shown(comparison: Comparison) -> list[str]:
    """The subjects that have room in a row, first and last among them."""
    return chosen(list(comparison.subjects), MOST)


def difference_scale(matrices: list[Array]) -> Scale:
    """From −limit to limit, the smallest of LIMITS that holds every value; never finer than the first."""
    reach = max(float(np.abs(m[np.isfinite(m)]).max(initial=0.0)) for m in matrices)
    limit = next((limit for limit in LIMITS if reach <= limit + 1e-9), LIMITS[-1])
    return Scale(-limit, limit, SIGNED.colours)


def _matrix(comparison: Comparison, label: str, name: str) -> Array | None:
    reading = held(comparison.subjects[label], name)
    return None if reading is None else reading.values


def _kappa(findings: Findings, name: str) -> Array | None:
    reading = held(findings, name)
    return None if reading is None else null(reading, "kappa")


def _less(one: Array | None, other: Array | None) -> Array | None:
    return None if one is None or other is None or one.shape != other.shape else one - other
