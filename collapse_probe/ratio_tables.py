"""How many blocks are similar under every choice that DeepViT's similarity ratio leaves open."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from collapse_probe.findings import Findings, Reading
from collapse_probe.tables import Table
from collapse_probe.words import plain

SIDES = {"before": "blocks before", "both": "blocks on each side"}
NOTE = (
    "Blocks whose similarity ratio is above {above:g}, of those that have neighbours, with the 95 % interval of the number; "
    "outlined: the choice drawn above. "
    "DeepViT leaves these choices open, so that no cell is the paper's own. With the mean as threshold a vector counts when it "
    "is not below the mean of its block, which about half of them are by chance."
)


def sensitivity_tables(findings: Findings) -> list[Table]:
    """One table for each kind of attention vector: rows direction and k, columns thresholds, cells "n of m (low … high)"."""
    found: dict[tuple[str, ...], list[Reading]] = {}
    for name, reading in findings.metrics.items():
        if name.partition("@")[0] == "similarity-ratio" and reading.values is not None and reading.settings.get("sensitivity"):
            settings = reading.settings
            centred = ", centred" if settings.get("centred") else ""
            kind = (f"{settings.get('axis', 'column')}s{centred} of {settings.get('point', 'weights')}",)
            found.setdefault(kind, []).append(reading)
    return [_table(kind[0], readings) for kind, readings in found.items()]


def _table(kind: str, readings: Sequence[Reading]) -> Table:
    rows: Sequence[Mapping[str, Any]] = readings[0].settings["sensitivity"]
    thresholds = list(dict.fromkeys(row["threshold"] for row in rows))
    lines = list(dict.fromkeys((row["direction"], row["k"]) for row in rows))
    cells = [["–"] * len(thresholds) for _ in lines]
    for row in rows:
        ends = row.get("ci95")
        text = f"{row['similar_blocks']} of {row['blocks']}" + ("" if ends is None else f" ({ends[0]:g} … {ends[1]:g})")
        cells[lines.index((row["direction"], row["k"]))][thresholds.index(row["threshold"])] = text
    marked = {
        (lines.index((s["direction"], s["k"])), thresholds.index(s["threshold"]) + 1)
        for s in (reading.settings for reading in readings)
        if (s.get("direction"), s.get("k")) in lines and s.get("threshold") in thresholds
    }
    header = ("nearest blocks", *(t if isinstance(t, str) else f"cosine > {plain(t)}" for t in thresholds))
    return Table(
        tuple("threshold: mean" if name == "mean" else name for name in header),
        tuple((_line(*line), *row) for line, row in zip(lines, cells, strict=True)),
        (NOTE.format(above=readings[0].settings.get("ratio_above", 0.9)),),
        title=f"Similar blocks under every choice, {kind}",
        marked=frozenset(marked),
    )


def _line(direction: str, k: int) -> str:
    sides = SIDES.get(direction, direction)
    return f"{k} {sides if k > 1 else sides.replace('blocks', 'block')}"
