"""Interventions → matplotlib figures: what replacing maps changes, over the blocks."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from collapse_probe.report.html import Caption
from collapse_probe.report.style import (
    DISTINCT,
    MARKERS,
    NARROW,
    ROLES,
    WIDE,
    Role,
    curve,
    draw_each,
    drawn,
    over_blocks,
    share_legend,
    sheet,
)
from collapse_probe.results.intervention import Effect, Interventions
from collapse_probe.statistics.intervals import Array

PANELS = {
    "kl": "KL from the plain logits, nats",
    "agreement": "share of equal top answers",
    "accuracy_change": "change in accuracy",
}
LOGARITHMIC_FROM = 30.0  # largest over smallest KL
CAPTIONS: dict[str, Caption] = {
    "one-at-a-time": Caption(
        "One block at a time",
        "Each block's map replaced while all others are the model's own: how far the output moves (KL in nats), how many top "
        "answers stay and, where there are labels, what accuracy gains or loses; 95 % intervals over images.",
        "A block that can be spared alone need not be one that can be spared together with others; and the model was not "
        "trained with the replacement.",
    ),
    "cumulative": Caption(
        "From the last block down",
        "The same numbers with the maps of all chosen blocks from block b up to the last replaced at once. With share, all of "
        "them then use the map of the block below b.",
        "Errors can cancel as well as add up on the way, so the curve need not be monotonic.",
    ),
    "beside-similarity": Caption(
        "Similarity is one thing, redundancy another",
        "Above, how alike each block's map is to that of the block before: raw cosine, its wrong-token null, and κ, from the "
        "same images. Beneath, what it costs to use the map of the block before.",
        "A high cosine beside a high cost means that the small difference between the two maps matters; a low cosine beside "
        "no cost, that the map hardly matters.",
    ),
}


def _role(kind: str, place: int) -> Role:
    return Role(kind, DISTINCT[place % len(DISTINCT)], marker=MARKERS[place % len(MARKERS)], width=1.8)


def _line(effects: Sequence[Effect], number: str) -> tuple[Array, Array, Array]:
    """Blocks, values and intervals of one number; NaN where there is none."""
    x = np.array([e.blocks[0] for e in effects], dtype=np.float64)
    values = np.array([getattr(e, number) for e in effects], dtype=np.float64)
    ends = np.array([getattr(e, f"{number}_ci95") or (np.nan, np.nan) for e in effects], dtype=np.float64)
    return x, values, ends.reshape(-1, 2)


def _scale(axes: Axes, number: str, lines: Sequence[Array]) -> None:
    axes.grid(axis="y")
    values = np.concatenate(lines)
    values = values[np.isfinite(values)]
    if number == "kl" and len(values) and values.min() > 0 and values.max() / values.min() > LOGARITHMIC_FROM:
        axes.set_yscale("log")
    elif number == "accuracy_change":
        axes.axhline(0.0, color=ROLES["untrained"].colour, linewidth=0.9, zorder=0)
    else:
        axes.set_ylim(bottom=0.0)


def _over_blocks(found: Interventions, by_kind: dict[str, list[Effect]], label: str, narrow: bool) -> Figure | None:
    """One panel a number, one line a kind."""
    drawn_kinds = {kind: effects for kind, effects in by_kind.items() if effects}
    every = [e for effects in drawn_kinds.values() for e in effects]
    panels = [n for n in PANELS if any(getattr(e, n) is not None for e in every)]
    if not panels:
        return None
    count = len(panels)
    figure = sheet(NARROW if narrow else WIDE, 2.7 * count + 0.7 if narrow else 3.7)
    shape = (count, 1) if narrow else (1, count)
    places = figure.subplots(*shape, squeeze=False).ravel()
    blocks = np.array(sorted({e.blocks[0] for e in every}), dtype=np.float64)
    for axes, name in zip(places, panels, strict=True):
        lines = []
        for place, (kind, effects) in enumerate(drawn_kinds.items()):
            x, values, ends = _line(effects, name)
            curve(axes, x, values, _role(kind, list(found.single).index(kind) if kind in found.single else place), ends)
            lines.append(values)
        _scale(axes, name, lines)
        over_blocks(axes, blocks, label, 8 if narrow or count > 1 else 16)
        axes.set_title(PANELS[name])
    share_legend(figure, places[0], columns=2 if narrow else 5)
    return figure


@drawn
def one_at_a_time(found: Interventions, narrow: bool = False) -> Figure | None:
    """Every number of every replacement, block by block."""
    by_kind = {kind: [e for e in effects if e.kl is not None] for kind, effects in found.single.items()}
    return _over_blocks(found, by_kind, "block", narrow)


@drawn
def cumulative(found: Interventions, narrow: bool = False) -> Figure | None:
    """The same with all blocks from b up to the last."""
    by_kind = {kind: list(reversed(effects)) for kind, effects in found.cumulative.items() if len(effects) > 1}
    return _over_blocks(found, by_kind, "first replaced block b", narrow)


@drawn
def beside_similarity(found: Interventions, narrow: bool = False) -> Figure | None:
    """Similarity with the block before above, the cost of sharing beneath, over the same blocks."""
    shared = [e for e in found.single.get("share", ()) if e.kl is not None]
    if not shared or not found.similarity:
        return None
    figure = sheet(NARROW if narrow else WIDE, 5.2)
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=[3, 2])
    x = np.arange(1.0, len(found.similarity["raw"]) + 1)
    looks = {
        "raw": Role("raw cosine", ROLES["measured"].colour, marker="o", width=2.0),
        "other_token": ROLES["other_token"],
        "kappa": Role("κ", DISTINCT[2], marker="D", width=1.8),
    }
    for name, role in looks.items():
        curve(top, x, np.array(found.similarity[name], dtype=np.float64), role)
    top.set(ylabel="cosine with the block before, κ", ylim=(min(-0.05, *top.get_ylim()), 1.05))
    top.grid(axis="y")
    at, values, ends = _line(shared, "kl")
    curve(bottom, at, values, Role("cost of sharing (95 % interval)", DISTINCT[1], marker="s", width=1.8), ends)
    _scale(bottom, "kl", [values])
    bottom.set_ylabel("KL when shared, nats")
    over_blocks(bottom, x, "block b, with block b − 1")
    share_legend(figure, top, bottom, columns=1 if narrow else 4)
    return figure


FIGURES: dict[str, Callable[[Interventions, bool], Figure | None]] = {
    "one-at-a-time": one_at_a_time,
    "cumulative": cumulative,
    "beside-similarity": beside_similarity,
}


def draw_all(found: Interventions, *, narrow: bool = False) -> dict[str, Figure]:
    """Every figure that these numbers fill, by name, in the order of the page; `narrow` for a phone."""
    return draw_each(FIGURES, found, narrow)
