"""The results of a sweep: every cell as plain numbers, and the files that they live in."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from collapse_probe.errors import OutputError
from collapse_probe.files import read_document, write_document
from collapse_probe.results.findings import plain
from collapse_probe.results.overview.display import Shown
from collapse_probe.results.stored import checks
from collapse_probe.statistics.intervals import interval

if TYPE_CHECKING:
    import pandas as pd


def spelled(value: Any) -> str:
    """A value as the command line takes it.

    >>> spelled(None), spelled(16), spelled("re-attention")
    ('none', '16', 're-attention')
    """
    return "none" if value is None else value if isinstance(value, str) else repr(value)


SCHEMA = "collapse-probe/sweep/1"
FILE, TABLE = "sweep.json", "table.csv"
FINISHED, FAILED, WAITING = "finished", "failed", "waiting"
UNTRAINED = "untrained."
PARTS = ("recipe", "varied", "seeds", "changes", "data", "run", "notes")
PUBLISHED: dict[str, Any] = {
    "source": "README of the official DeepViT code (arXiv 2103.11886)",
    "conditions": "ImageNet, images of 224 pixels, width 384, 12 heads; the code of the count was not published",
    "depth": [16, 24, 32],
    "similar_blocks": {"ViT": [5, 11, 15], "DeepViT": [0, 0, 0]},
}


@dataclass(frozen=True, kw_only=True)
class CellResult:
    """How one cell ended.

    `numbers` is the summary of its findings on the held-out images and `untrained` that of the same architecture with
    fresh parameters on the same images; both with `pairs`, the adjacent pairs of blocks that were counted. Seconds are of
    training and of measuring. `reason` says why a cell failed.
    """

    name: str
    values: Mapping[str, Any]
    seed: int
    status: str = WAITING
    reason: str = ""
    accuracy: float | None = None
    loss: float | None = None
    parameters: int | None = None
    train_seconds: float | None = None
    measure_seconds: float | None = None
    names_sha256: str = ""
    numbers: Mapping[str, float | None] = field(default_factory=dict)
    untrained: Mapping[str, float | None] = field(default_factory=dict)

    def number(self, key: str) -> float:
        """`accuracy`, a name of the summary, SHARE, or `untrained.NAME`; NaN where the cell has none."""
        if key.endswith(SHARE):
            before = key.removesuffix(SHARE)
            pairs = self.number(f"{before}pairs")
            return self.number(f"{before}similar_blocks") / pairs if pairs > 0 else math.nan
        numbers = {**self.numbers, "accuracy": self.accuracy, "loss": self.loss}
        value = self.untrained.get(key.removeprefix(UNTRAINED)) if key.startswith(UNTRAINED) else numbers.get(key)
        return math.nan if value is None else float(value)

    def to_json(self) -> dict[str, Any]:
        """The same as plain values."""
        content: dict[str, Any] = plain(vars(self))
        return content

    @classmethod
    def from_json(cls, content: Any) -> CellResult:
        """What `to_json` wrote; OutputError for anything else."""
        try:
            checks.CELL(content, "cell")
        except ValueError as error:
            raise OutputError(f"these values describe no cell of a sweep: {error}") from error
        return cls(**content)


SHARE = "similar_share"
"""Similar blocks over the adjacent pairs that were compared: unlike the count, it does not grow with the depth alone."""
Points = Sequence[tuple[Any, Sequence[CellResult]]]
"""The values of an axis, each with its cells, one a seed."""


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds with its 95 % t interval; none (None) with fewer than two seeds."""

    mean: float
    ci95: tuple[float, float] | None
    seeds: int


def estimate(values: Iterable[float]) -> Estimate:
    """The mean of the defined values, with its interval.

    >>> estimate([1.0, float("nan")])
    Estimate(mean=1.0, ci95=None, seeds=1)
    """
    defined = np.array([value for value in values if math.isfinite(value)], dtype=np.float64)
    count = len(defined)
    if count < 2:
        return Estimate(float(defined[0]) if count else math.nan, None, count)
    low, high = interval(defined.mean(), defined.std(ddof=1) / math.sqrt(count), count)
    return Estimate(float(defined.mean()), (float(low), float(high)), count)


RISES, FALLS, FLAT, UNCLEAR = "rises", "falls", "stays the same", "shows no clear trend"
ONE_SEED = "shows no trend that one seed could tell"


@dataclass(frozen=True)
class Trend:
    """Which way a number goes along an axis: the mean slope of the seeds, with its 95 % t interval over them."""

    case: str
    slope: Estimate


def trend(points: Points, key: str) -> Trend | None:
    """Whether a number rises or falls along an axis of numbers; None with fewer than two places where it is defined.

    A straight line is fitted to each seed that has all places. With two seeds or more the number rises where the
    interval of the mean slope lies above 0 and falls where it lies below. One seed ranks nothing: another may go the other way.
    """
    places = [(float(x), {cell.seed: cell.number(key) for cell in cells}) for x, cells in points]
    places = [(x, by_seed) for x, by_seed in sorted(places, key=lambda p: p[0]) if any(map(math.isfinite, by_seed.values()))]
    seeds = [s for s in (places[0][1] if places else ()) if all(math.isfinite(by.get(s, math.nan)) for _, by in places)]
    if len(places) < 2 or not seeds:
        return None
    x = np.array([place for place, _ in places])
    lines = [np.array([by_seed[seed] for _, by_seed in places]) for seed in seeds]
    slope = estimate(float(np.polyfit(x, line, 1)[0]) for line in lines)
    if all(np.ptp(line) == 0 for line in lines):
        return Trend(FLAT, slope)
    if slope.ci95 is None:
        return Trend(ONE_SEED, slope)
    return Trend(RISES if slope.ci95[0] > 0 else FALLS if slope.ci95[1] < 0 else UNCLEAR, slope)


@dataclass(frozen=True, kw_only=True, repr=False)
class Sweep(Shown):
    """The results of a grid: `varied` maps each varied name to its values, `recipe` is the one that was varied."""

    recipe: Mapping[str, Any]
    varied: Mapping[str, Sequence[Any]]
    seeds: Sequence[int]
    changes: Mapping[str, Any]
    data: Mapping[str, Any]
    run: Mapping[str, Any]
    cells: tuple[CellResult, ...]
    notes: tuple[str, ...] = ()

    @property
    def finished(self) -> tuple[CellResult, ...]:
        """The cells that were trained and measured."""
        return tuple(cell for cell in self.cells if cell.status == FINISHED)

    @property
    def failed(self) -> tuple[CellResult, ...]:
        """The cells that could not be."""
        return tuple(cell for cell in self.cells if cell.status == FAILED)

    @property
    def axes(self) -> tuple[str, ...]:
        """The names along which curves are drawn: those with numbers alone, depth and width first; or the first varied one."""
        several = [name for name, values in self.varied.items() if len(values) > 1]
        numbers = [name for name in several if self.is_numeric(name)]
        first = [name for name in ("depth", "width") if name in numbers]
        return tuple(first + [name for name in numbers if name not in first]) or tuple(several[:1])

    def is_numeric(self, name: str) -> bool:
        """Whether all values of a varied name are numbers."""
        return all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in self.varied[name])

    @property
    def groups(self) -> dict[str, list[CellResult]]:
        """The finished cells that differ in their seed alone, by the label of what they have in common."""
        cells: dict[str, list[CellResult]] = {}
        for cell in self.finished:
            cells.setdefault(label_of(cell.values), []).append(cell)
        return cells

    def series(self, axis: str) -> dict[str, Points]:
        """The finished cells along `axis`: for every combination of the other values, by its label, each value of the axis
        with its cells, one a seed.
        """
        curves: dict[str, dict[str, list[CellResult]]] = {}
        for cell in self.finished:
            label = label_of({name: value for name, value in cell.values.items() if name != axis})
            curves.setdefault(label, {}).setdefault(_key(cell.values[axis]), []).append(cell)
        return {
            label: [(value, cells[_key(value)]) for value in self.varied[axis] if _key(value) in cells]
            for label, cells in curves.items()
        }

    @property
    def table(self) -> pd.DataFrame:
        """One row a cell: varied values, seed, status, accuracy, seconds, then the summaries (`untrained.NAME`: the twin)."""
        import pandas as pd

        rows = []
        for cell in self.cells:
            row: dict[str, Any] = {"cell": cell.name, **{name: spelled(value) for name, value in cell.values.items()}}
            names = ("seed", "status", "reason", "accuracy", "loss", "parameters", "train_seconds", "measure_seconds")
            row |= {name: getattr(cell, name) for name in names}
            rows.append({**row, **cell.numbers, **{UNTRAINED + name: value for name, value in cell.untrained.items()}})
        return pd.DataFrame(rows)

    def frame(self) -> pd.DataFrame:
        """The content of table.csv: one row a cell; see `table`.

        Example::

            sweep.frame()[["cell", "kappa_adjacent", "accuracy"]]
        """
        return self.table

    def to_json(self) -> dict[str, Any]:
        """The content of sweep.json: JSON types alone, undefined numbers as None."""
        parts = {key: plain(getattr(self, key)) for key in PARTS}
        return {"schema": SCHEMA, **parts, "published": PUBLISHED, "cells": [cell.to_json() for cell in self.cells]}

    def write(self, inside: Path) -> None:
        """Write sweep.json and table.csv into an existing folder."""
        write_document(inside / FILE, self.to_json())
        self.table.to_csv(inside / TABLE, index=False)

    @classmethod
    def load(cls, folder: str | Path) -> Sweep:
        """Read a folder back; raises OutputError where it is none or of another schema."""
        content = read_document(folder, FILE, schema=SCHEMA, refusal="holds no sweep", command="sweep", check=checks.sweep)
        parts = {key: content[key] for key in PARTS} | {"notes": tuple(content["notes"])}
        return cls(**parts, cells=tuple(map(CellResult.from_json, content["cells"])))


def label_of(values: Mapping[str, Any]) -> str:
    """Varied values as a reader meets them; nothing for none.

    >>> label_of({"fix": None, "width": 64}), label_of({"fix": "re-attention"})
    ('no fix, width 64', 're-attention')
    """
    words = []
    for name, value in values.items():
        alone = name in ("fix", "penalty") and value is not None
        words.append(f"no {name}" if value is None else spelled(value) if alone else f"{name} {spelled(value)}")
    return ", ".join(words)


def _key(value: Any) -> str:
    return json.dumps(value, sort_keys=True)
