"""Interventions → matplotlib figures: what replacing maps changes, over the blocks."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes

from collapse_probe.report.html import Drawing, draw_figures
from collapse_probe.report.sheet import Sheet
from collapse_probe.report.style import (
    DISTINCT,
    MARKERS,
    ROLES,
    Role,
    charts,
    curve,
    drawn,
    over_blocks,
    panels,
    powers_of_ten,
)
from collapse_probe.results.intervention import GREEDY, INFLUENCE, OTHER, Effect, Interventions, Order
from collapse_probe.results.rules import KEEPS_ANSWERS
from collapse_probe.statistics.intervals import Array

PANELS = {
    "kl": "KL from the plain logits, nats",
    "agreement": "share of equal top answers",
    "accuracy_change": "change in accuracy",
    "moved": "move of the last patches",
    "shared": "part of it that is shared",
    "sinks": "heads with a sink, of an image",
}
ORDERS = {GREEDY: "least loss first", INFLUENCE: "least influence first"}
"""What the orders are called in which blocks go."""
SHORT = {"drop_block": "blocks", "drop_attention": "attention", "drop_mlp": "MLPs"}
LOGARITHMIC_FROM = 30.0  # largest over smallest KL


@drawn
def one_at_a_time(interventions: Interventions) -> Sheet | None:
    """Every number of every replacement, block by block."""
    effects = {kind: [e for e in single if e.kl is not None] for kind, single in interventions.single.items()}
    return _over_blocks(effects, "block")


@drawn
def cumulative(interventions: Interventions) -> Sheet | None:
    """The same with all blocks from b up to the last."""
    effects = {kind: list(reversed(each)) if len(each) > 1 else [] for kind, each in interventions.cumulative.items()}
    return _over_blocks(effects, "first replaced block b")


def _over_blocks(by_kind: Mapping[str, Sequence[Effect]], label: str) -> Sheet | None:
    """One panel a number, one line a kind that has effects; a kind keeps its colour in every figure."""
    every = [e for effects in by_kind.values() for e in effects]
    names = [name for name in PANELS if any(getattr(e, name) is not None for e in every)]
    if not names:
        return None
    places, own = panels(len(names), columns=3), [kind for kind in by_kind if not kind.endswith(OTHER)]
    blocks = np.array(sorted({e.blocks[0] for e in every}), dtype=np.float64)
    for axes, name in zip(places, names, strict=True):
        for kind, effects in by_kind.items():
            place = own.index(kind.removesuffix(OTHER)) if kind.removesuffix(OTHER) in own else 0
            said, colour = kind.replace("_", " "), DISTINCT[place % len(DISTINCT)]
            if effects and kind.endswith(OTHER):
                _curve(axes, effects, name, Role(f"{said} tokens", colour, (0, (5, 2))))
            elif effects:
                _curve(axes, effects, name, Role(said, colour, marker=MARKERS[place % len(MARKERS)], width=1.8))
        _scale(axes, name, [getattr(e, name) for e in every])
        over_blocks(axes, blocks, label, 9)
        axes.set_title(PANELS[name])
    return charts(places, 3)


def _curve(axes: Axes, effects: Sequence[Effect], name: str, role: Role, left: int = 0) -> None:
    """One number of some effects over their first blocks, or how many of `left` blocks are left, with its intervals; NaN where
    there is none.
    """
    x = np.array([left - len(e.blocks) if left else e.blocks[0] for e in effects], dtype=np.float64)
    values = np.array([getattr(e, name) for e in effects], dtype=np.float64)
    ends: Array = np.array([getattr(e, f"{name}_ci95") or (np.nan, np.nan) for e in effects], dtype=np.float64)
    curve(axes, x, values, role, ends)


def _scale(axes: Axes, name: str, numbers: Sequence[float | None]) -> None:
    axes.grid(axis="y")
    known = [number for number in numbers if number is not None and np.isfinite(number)]
    if name == "kl" and known and min(known) > 0 and max(known) / min(known) > LOGARITHMIC_FROM:
        powers_of_ten(axes)
    elif name == "accuracy_change":
        axes.axhline(0.0, color=ROLES["untrained"].colour, linewidth=0.9, zorder=0)
    elif name == "agreement":
        axes.set_ylim(0.0, 1.03)
    else:
        axes.set_ylim(bottom=0.0)


@drawn
def blocks_left(interventions: Interventions) -> Sheet | None:
    """What is left of the model against how many blocks are, in every order: on the images that give the price, with their
    intervals, and on those that chose.
    """
    lines: list[tuple[Order, Role, Role | None]] = []
    total = int(interventions.model.get("blocks") or 0)
    for kind, orders in interventions.orders.items():
        for how, order in orders.items():
            at, said = len(lines) % len(DISTINCT), f"{SHORT[kind]}, {ORDERS[how]}"
            priced = Role(f"{said} (95 % CI)", DISTINCT[at], marker=MARKERS[at % len(MARKERS)], width=1.8)
            lines.append((order, priced, Role(f"{said}, where chosen", DISTINCT[at], ":") if how == GREEDY else None))
    if not lines:
        return None
    every = [effect for order, _, _ in lines for effect in order.priced]
    names = [name for name in PANELS if any(getattr(e, name) is not None for e in every)]
    places = panels(len(names), columns=3)
    for axes, name in zip(places, names, strict=True):
        for order, priced, chosen in lines:
            _curve(axes, order.priced, name, priced, left=total)
            if chosen is not None:
                x = np.array([total - len(e.blocks) for e in order.chosen], dtype=np.float64)
                curve(axes, x, np.array([getattr(e, name) for e in order.chosen], dtype=np.float64), chosen)
        _scale(axes, name, [getattr(e, name) for e in every])
        least = total - max(len(e.blocks) for e in every)
        over_blocks(axes, np.arange(least, total, dtype=np.float64), f"blocks left, of {total}", 9)
        axes.invert_xaxis()
        if name == "agreement":
            axes.axhline(KEEPS_ANSWERS, color=ROLES["untrained"].colour, linewidth=0.9, linestyle=(0, (5, 2)), zorder=0)
        axes.set_title(PANELS[name])
    return charts(places, 3)


@drawn
def windows(interventions: Interventions) -> Sheet | None:
    """Consecutive blocks that are left out together, over the first one."""
    return _over_blocks(interventions.windows, "first block of the window")


@drawn
def beside_similarity(interventions: Interventions) -> Sheet | None:
    """Similarity with the block before, and the cost of sharing, over the same blocks."""
    shared = [e for e in interventions.single.get("share", ()) if e.kl is not None]
    if not shared or not interventions.similarity:
        return None
    top, bottom = panels(2, tall=3.0)
    x = np.arange(1.0, len(interventions.similarity["raw"]) + 1)
    for name, role in {
        "raw": Role("raw similarity", ROLES["measured"].colour, marker="o", width=2.0),
        "other_token": ROLES["other_token"],
        "kappa": Role("κ", DISTINCT[2], marker="D", width=1.8),
    }.items():
        curve(top, x, np.array(interventions.similarity[name], dtype=np.float64), role)
    top.set(ylabel="cosine with the block before, κ", ylim=(min(-0.05, *top.get_ylim()), 1.05))
    top.grid(axis="y")
    _curve(bottom, shared, "kl", Role("cost of sharing (95 % CI)", DISTINCT[1], marker="s", width=1.8))
    _scale(bottom, "kl", [e.kl for e in shared])
    bottom.set_ylabel("KL when shared, nats")
    for axes in (top, bottom):
        over_blocks(axes, x, "block b, with block b − 1", 12)
    return charts([top, bottom])


FIGURES: dict[str, Drawing] = {
    "blocks-left": Drawing(
        "How many blocks are left",
        "What is left of the model against how many blocks are: from left to right one block more is left out, in the order in "
        "which each costs least. Lines with bands: on the images that had no part in choosing the order, which is the price; "
        "dotted: on the images on which it was chosen. Dashed: the share of unchanged answers from which on blocks can go.",
        "Leaving out one more block can also help by chance or undo what another did: the curve need not be monotonic.",
        blocks_left,
    ),
    "one-at-a-time": Drawing(
        "One block at a time",
        "Each block changed (its map replaced, or the block left out) while all others are the model's own: how far the output "
        "moves (KL in nats), how many top answers stay and, where there are labels, what accuracy gains or loses; 95 % "
        "intervals over images.",
        "A block that can be spared alone need not be one that can be spared together with others; and the model was not "
        "trained with the replacement.",
        one_at_a_time,
    ),
    "cumulative": Drawing(
        "From the last block down",
        "The same numbers with the maps of all replaced blocks from block b up to the last replaced at once. With share, "
        "all of them then use the map of the block below b.",
        "Errors can cancel as well as add up on the way, so the curve need not be monotonic.",
        cumulative,
    ),
    "windows": Drawing(
        "Consecutive blocks together",
        "The same numbers with several consecutive blocks left out at once, over the first of them.",
        "The cheapest of many windows looks cheaper than it is: it was found on the images that it is drawn of.",
        windows,
    ),
    "beside-similarity": Drawing(
        "Similarity is one thing, redundancy another",
        "First, how alike each block's map is to that of the block before: raw similarity, its chance level, and κ, from "
        "the same images. Then, what it costs to use the map of the block before.",
        "A high cosine beside a high cost means that the small difference between the two maps matters; a low cosine "
        "beside no cost, that the map hardly matters.",
        beside_similarity,
    ),
}
draw_all = functools.partial(draw_figures, FIGURES)
"""Every figure that these numbers fill, by name, in the order of the page."""
