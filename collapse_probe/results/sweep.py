"""What a sweep found: the outcome of every cell as plain numbers, and the files that they live in."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from collapse_probe.errors import OutputError
from collapse_probe.files import read_document, write_whole
from collapse_probe.statistics.intervals import interval


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
    fresh weights on the same images; both with `pairs`, the adjacent pairs of blocks that were counted. Seconds are of
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
        """`accuracy`, a name of the summary, or `untrained.NAME`; NaN where the cell has none."""
        if key in ("accuracy", "loss"):
            value = getattr(self, key)
        elif key.startswith(UNTRAINED):
            value = self.untrained.get(key.removeprefix(UNTRAINED))
        else:
            value = self.numbers.get(key)
        return math.nan if value is None else float(value)

    def to_json(self) -> dict[str, Any]:
        """The same as plain values."""
        held: dict[str, Any] = json.loads(json.dumps(asdict(self), allow_nan=False))
        return held

    @classmethod
    def from_json(cls, held: Mapping[str, Any]) -> CellResult:
        """The outcome that `to_json` wrote; OutputError for anything else."""
        try:
            return cls(**held)
        except TypeError as error:
            raise OutputError(f"these values describe no cell of a sweep: {error}") from error


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds with its 95 % t interval; none (None) with fewer than two seeds."""

    mean: float
    ci95: tuple[float, float] | None
    seeds: int


def estimate(values: Iterable[float]) -> Estimate:
    """The mean of what is defined, and how far it may be from that of all seeds.

    >>> estimate([1.0, float("nan")])
    Estimate(mean=1.0, ci95=None, seeds=1)
    """
    held = np.array([value for value in values if math.isfinite(value)], dtype=np.float64)
    if len(held) < 2:
        return Estimate(float(held.mean()) if len(held) else math.nan, None, len(held))
    error = held.std(ddof=1) / math.sqrt(len(held))
    low, high = interval(held.mean(), error, len(held))
    return Estimate(float(held.mean()), (float(low), float(high)), len(held))


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """The outcomes of a grid: `varied` maps each varied name to its values, `recipe` is the one that was varied."""

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
        numbers = [name for name in several if all(_is_number(value) for value in self.varied[name])]
        first = [name for name in ("depth", "width") if name in numbers]
        return tuple(first + [name for name in numbers if name not in first]) or tuple(several[:1])

    def series(self, axis: str) -> dict[str, list[tuple[Any, list[CellResult]]]]:
        """The finished cells along `axis`: for every combination of the other values, by its name, each value of the axis
        with its cells, one a seed.
        """
        found: dict[str, dict[Any, list[CellResult]]] = {}
        for cell in self.finished:
            label = label_of({name: value for name, value in cell.values.items() if name != axis})
            found.setdefault(label, {}).setdefault(_key(cell.values[axis]), []).append(cell)
        return {
            label: [(value, by_value[_key(value)]) for value in self.varied[axis] if _key(value) in by_value]
            for label, by_value in found.items()
        }

    @property
    def table(self) -> pd.DataFrame:
        """One row a cell: varied values, seed, status, accuracy, seconds, then the summaries (`untrained.NAME`: the twin)."""
        rows = []
        for cell in self.cells:
            row: dict[str, Any] = {"cell": cell.name, **{name: spelled(value) for name, value in cell.values.items()}}
            names = ("seed", "status", "reason", "accuracy", "loss", "parameters", "train_seconds", "measure_seconds")
            row |= {name: getattr(cell, name) for name in names}
            rows.append({**row, **cell.numbers, **{UNTRAINED + name: value for name, value in cell.untrained.items()}})
        return pd.DataFrame(rows)

    def to_json(self) -> dict[str, Any]:
        """The content of sweep.json: JSON types alone, undefined numbers as None."""
        held = {key: getattr(self, key) for key in PARTS}
        plain: dict[str, Any] = json.loads(json.dumps(held, allow_nan=False))
        return {"schema": SCHEMA, **plain, "published": PUBLISHED, "cells": [cell.to_json() for cell in self.cells]}

    def write(self, folder: str | Path) -> None:
        """Write sweep.json and table.csv into a folder, each whole or not at all. Raises OutputError."""
        text = json.dumps(self.to_json(), indent=1, allow_nan=False) + "\n"
        write_whole(Path(folder) / FILE, lambda stream: stream.write(text.encode()))
        table = self.table.to_csv(index=False).encode()
        write_whole(Path(folder) / TABLE, lambda stream: stream.write(table))

    @classmethod
    def load(cls, folder: str | Path) -> Sweep:
        """Read a folder back; raises OutputError where it is none or of another schema."""
        content = read_document(folder, FILE, schema=SCHEMA, refusal="holds no sweep", command="sweep")
        missing = [key for key in (*PARTS, "cells") if key not in content]
        if missing:
            raise OutputError(f"{Path(folder) / FILE} lacks {', '.join(missing)}: sweep again")
        outcomes = tuple(CellResult.from_json(cell) for cell in content["cells"])
        return cls(**{**{key: content[key] for key in PARTS}, "notes": tuple(content["notes"])}, cells=outcomes)


def label_of(values: Mapping[str, Any]) -> str:
    """Varied values as a reader meets them; nothing for none.

    >>> label_of({"fix": None, "width": 64}), label_of({"fix": "re-attention"})
    ('no fix, width 64', 're-attention')
    """
    return ", ".join(_said(name, value) for name, value in values.items())


def _said(name: str, value: Any) -> str:
    if value is None:
        return f"no {name}"
    return spelled(value) if name in ("fix", "penalty") else f"{name} {spelled(value)}"


def _key(value: Any) -> str:
    return json.dumps(value, sort_keys=True)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
