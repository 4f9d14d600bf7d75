"""From the answers of single images to the effects of conditions, with their intervals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from collapse_probe.analysis.intervention.conditions import Classes, Condition, ConditionGrid, ConditionOutputs
from collapse_probe.analysis.intervention.orders import Parts, prefixes
from collapse_probe.analysis.measurement import Images
from collapse_probe.analysis.outputs import labels_for
from collapse_probe.capture.edits.places import KINDS
from collapse_probe.results.findings import Findings, plain
from collapse_probe.results.intervention import Effect, Ends, Interventions, Order
from collapse_probe.results.readings import adjacent
from collapse_probe.statistics.intervals import Array
from collapse_probe.statistics.paired import Sides, compare_sides
from collapse_probe.statistics.proportions import wilson

SIMILARITY = "attention-similarity"


def effects_of(
    conditions: Sequence[Condition],
    kl: Array,
    plain: Classes,
    replaced: Classes,
    labels: Classes | None,
    moves: Mapping[str, Array] | None = None,
) -> list[Effect]:
    """The effects of all conditions, from per-image numbers: `kl` and `replaced` (top answers) [conditions, images], `plain`
    (top answers) and `labels` [images]; `moves` [conditions, images].
    """
    if not conditions:
        return []
    divergence = compare_sides(Sides(np.zeros_like(kl.T), kl.T))
    right = None
    if labels is not None:
        before, after = (np.broadcast_to(answers == labels, kl.shape).T.astype(np.float64) for answers in (plain, replaced))
        right = compare_sides(Sides(before, after, answers=True))
    moved = {name: compare_sides(Sides(np.zeros_like(each.T), each.T)) for name, each in (moves or {}).items()}
    effects = []
    for i, (kind, blocks) in enumerate(conditions):
        same = int((replaced[i] == plain).sum())
        numbers: dict[str, Any] = {
            "kl": float(divergence.difference[i]),
            "kl_ci95": _ends(np.maximum(divergence.ci95[i], 0.0)),  # no KL lies below
            "agreement": same / kl.shape[1],
            "agreement_ci95": wilson(same, kl.shape[1]),
        }
        for name, sides in moved.items():
            if np.isfinite(sides.difference[i]):
                numbers |= {name: float(sides.difference[i]), f"{name}_ci95": _ends(np.maximum(sides.ci95[i], 0.0))}
        if right is not None:
            numbers |= {
                "accuracy": float(right.second[i]),
                "accuracy_change": float(right.difference[i]),
                "accuracy_change_ci95": _ends(right.ci95[i]),
            }
        effects.append(Effect(kind, blocks, **numbers))
    return effects


def _ends(pair: Array) -> Ends:
    return (float(pair[0]), float(pair[1])) if np.isfinite(pair).all() else None


def interventions_of(
    findings: Findings,
    grid: ConditionGrid,
    outputs: ConditionOutputs,
    images: Images,
    orders: Mapping[str, Mapping[str, Sequence[int]]],
    parts: Parts,
    facts: Mapping[str, Any],
) -> Interventions:
    """All effects: of single blocks and sets over all images, of `orders` over each of the parts; `facts` are
    further ones on the run.
    """
    labels, reason = labels_for(outputs.names, images, outputs.classes, outputs.labels)
    conditions = grid.conditions
    measured = effects_of(conditions, outputs.kl, outputs.plain, outputs.top1, labels, outputs.moves)
    effects = dict(zip(conditions, measured, strict=True))
    effects |= {(kind, (block,)): Effect(kind, (block,), not_applicable=why) for (kind, block), why in grid.refused.items()}
    chose, settled = (np.array([n in some for n in outputs.names], np.bool_) for some in (parts.choosing, parts.settling))
    priced = ~(chose | settled)
    steps = {
        kind: {how: [(kind, gone) for gone in prefixes(order)] for how, order in each.items()} for kind, each in orders.items()
    }

    def over(rows: NDArray[np.bool_], some: Sequence[Condition]) -> tuple[Effect, ...]:
        at = [conditions.index(condition) for condition in some]
        own = None if labels is None else labels[rows]
        return tuple(effects_of(some, outputs.kl[at][:, rows], outputs.plain[rows], outputs.top1[at][:, rows], own))

    table = {"names": np.array(outputs.names, dtype=np.str_), "plain": outputs.plain, "kl": outputs.kl, "top1": outputs.top1}
    rows = {"chose": chose, "settled": settled, "priced": priced} if orders else {}
    table |= rows
    table |= outputs.moves
    return Interventions(
        model=plain(findings.model),
        data=plain(findings.data),
        run={
            **plain(findings.run),
            "replace": list(grid.able),
            "blocks": list(grid.blocks),
            "unreplaced_equals_plain": True,
            **facts,
            **({"order_images": {part: int(some.sum()) for part, some in rows.items()}} if rows else {}),
        },
        plain={
            "accuracy": None if labels is None else float(np.mean(outputs.plain == labels)),
            "reason": reason,
            "classes": outputs.classes,
            "answers": len(np.unique(outputs.plain)),
            "logit_spread": outputs.spread,
            "conditions": [{"kind": kind, "blocks": list(blocks)} for kind, blocks in conditions],
        },
        single={kind: tuple(effects[kind, (block,)] for block in grid.blocks) for kind in grid.able},
        cumulative={kind: tuple(effects[kind, some] for some in grid.down(kind)) for kind in grid.able},
        windows={kind: tuple(effects[kind, some] for some in each) for kind, each in grid.windows.items() if each},
        orders={
            kind: {
                how: Order(tuple(orders[kind][how]), *(over(some, gone) for some in rows.values()))
                for how, gone in each.items()
            }
            for kind, each in steps.items()
        },
        similarity=_similarity(findings),
        kinds={kind: KINDS[kind] for kind in grid.able},
        images=table if labels is None else {**table, "labels": labels},
    )


def _similarity(findings: Findings) -> dict[str, Sequence[float | None]]:
    """Cosine with the block before, its chance level and kappa, for each block from 1 on; empty where not defined."""
    result = findings.metrics[SIMILARITY]
    if result.values is None or result.nulls is None:
        return {}
    parts = {"raw": result.values, **{name: result.nulls.values[name] for name in ("other_token", "kappa")}}
    blank = [None] * (len(result.values) - 1)
    return {name: blank if part is None else plain(adjacent(result, part)) for name, part in parts.items()}
