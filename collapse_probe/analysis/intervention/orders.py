"""In which order blocks go: greedily by what each costs, on images that have no part in saying how many can go, or for what."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from collapse_probe.analysis.intervention.conditions import Condition, run_conditions
from collapse_probe.analysis.intervention.runner import ReplacementRunner
from collapse_probe.analysis.measurement import Images
from collapse_probe.results.findings import Findings
from collapse_probe.results.text import number, numbered
from collapse_probe.seeding import rank_of_name

INFLUENCES = {
    "drop_block": "block-influence",
    "drop_attention": "block-influence@attention",
    "drop_mlp": "block-influence@mlp",
}
"""The metric that says how much what is left out turns the tokens."""
MOST_CHOOSING, MOST_SETTLING = 256, 512
"""Images on which an order is chosen, and on which it is settled how many blocks can go, at most; each a third of fewer."""
FEWEST = 6
"""Images below which no order is chosen: two for each part."""


@dataclass(frozen=True)
class Parts:
    """Names of the images that choose an order, and of those that settle how many blocks can go; all others give the price."""

    choosing: frozenset[str] = frozenset()
    settling: frozenset[str] = frozenset()

    @classmethod
    def of(cls, names: Sequence[str], seed: int) -> Parts:
        """Random samples that every order, partition and process shares; empty where there are fewer than FEWEST names."""
        third = len(names) // 3 if len(names) >= FEWEST else 0
        ranked = sorted(names, key=lambda name: (rank_of_name(f"order/{name}", seed), name))
        first, second = min(third, MOST_CHOOSING), min(third, MOST_SETTLING)
        return cls(frozenset(ranked[:first]), frozenset(ranked[first : first + second]))


class NotFinite(Exception):
    """Images of which some logits are NaN or infinite while an order is chosen, each with the condition."""

    def __init__(self, images: Sequence[tuple[str, str]]) -> None:
        super().__init__("logits that are not finite")
        self.images = dict(images)


def greedy_order(runner: ReplacementRunner, images: Images, kind: str, able: Sequence[int], steps: int) -> tuple[int, ...]:
    """The blocks in the order in which they go: each time the one whose loss, after those that are gone, costs the least mean
    KL; of equal ones the last. Raises NotFinite.
    """
    gone: tuple[int, ...] = ()
    for step in range(steps):
        left = [block for block in able if block not in gone]
        if len(left) == 1:
            return (*gone, left[0])
        conditions: list[Condition] = [(kind, tuple(sorted((*gone, block)))) for block in left]
        outputs = run_conditions(runner, images, conditions, name=f"{kind}-{step}")
        if outputs.nonfinite:
            raise NotFinite(outputs.nonfinite)
        costs = outputs.kl.mean(1)
        cheapest = max(np.flatnonzero(costs == costs.min()).tolist())
        gone = (*gone, left[cheapest])
        runner.say(
            f"{step + 1} of {steps}: {numbered([left[cheapest]])} goes, KL {number(costs[cheapest], 4)} nats without "
            f"{numbered(sorted(gone))}"
        )
    return gone


def influence_order(
    findings: Findings, kind: str, able: Sequence[int], choosing: frozenset[str], steps: int
) -> tuple[int, ...]:
    """The blocks by their influence on the images that choose, the least first; empty where that of some is not known."""
    values = findings.images.get(INFLUENCES[kind])
    if values is None:
        return ()
    rows = [str(name) in choosing for name in findings.images["names"]]
    means = np.asarray(values, dtype=np.float64)[rows][:, list(able)].mean(0)
    return () if np.isnan(means).any() else tuple(able[i] for i in np.argsort(means, kind="stable")[:steps])


def prefixes(order: Sequence[int]) -> list[tuple[int, ...]]:
    """The sets of blocks that are gone after each step, each from low to high."""
    return [tuple(sorted(order[: count + 1])) for count in range(len(order))]
