"""Findings: what a run found, as plain numbers with their provenance, and the folder that they live in."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from collapse_probe import storing
from collapse_probe.errors import UnknownNameError
from collapse_probe.evidence import Array, Gallery, Nulls, Reading
from collapse_probe.folders import new_folder
from collapse_probe.storing import CSV_COLUMNS, SCHEMA

__all__ = ["CSV_COLUMNS", "SCHEMA", "Array", "Findings", "Gallery", "Nulls", "Reading"]


@dataclass(frozen=True)
class Findings:
    """What one run found. `images` maps "names" and each metric's name to per-image arrays, first axis images.

    `thumbnails` are small pictures, uint8 [height, width, 3] by image name, of those at both ends of the headline number.
    `presets` holds the record of every preset by name, `verdict` how each rule came out in turn; `sureness`: see there.
    """

    model: Mapping[str, Any]
    data: Mapping[str, Any]
    run: Mapping[str, Any]
    metrics: Mapping[str, Reading]
    summary: Mapping[str, float | int | None]
    images: Mapping[str, NDArray[Any]] = field(default_factory=dict)
    gallery: Gallery | None = None
    thumbnails: Mapping[str, NDArray[np.uint8]] = field(default_factory=dict)
    presets: Mapping[str, Any] = field(default_factory=dict)
    sureness: Mapping[str, Any] = field(default_factory=dict)
    verdict: Sequence[Mapping[str, Any]] = ()

    @property
    def blocks(self) -> pd.DataFrame:
        """One row per metric and block (and head): metric, block, head, value, stderr, ci_low, ci_high.

        For a block × block metric the row of block b holds its value with the block before (b − 1); a metric of the weights is
        called NAME/MATRIX. Errors are NaN where none was taken (a model is no sample of weights). See `storing.block_rows`.
        """
        rows = [row for name, reading in self.metrics.items() for row in storing.block_rows(name, reading)]
        frame = pd.DataFrame(rows, columns=CSV_COLUMNS)
        return frame.astype({"block": "Int64", "head": "Int64"})

    def matrix(self, name: str) -> Array:
        """The values of metric `name`, float64, with its dims; raises where it has none."""
        if name not in self.metrics:
            raise UnknownNameError(f"these findings hold no metric {name!r}; they hold {', '.join(self.metrics)}")
        values = self.metrics[name].values
        if values is None:
            raise UnknownNameError(f"{name!r} does not apply here: {self.metrics[name].not_applicable}")
        return values

    def to_json(self) -> dict[str, Any]:
        """The content of findings.json: JSON types alone, undefined numbers as None."""
        return {
            "schema": SCHEMA,
            "model": storing.plain(self.model),
            "data": storing.plain(self.data),
            "run": storing.plain(self.run),
            "metrics": {name: storing.reading_to_json(reading) for name, reading in self.metrics.items()},
            "summary": storing.plain(self.summary),
            **{part: storing.plain(getattr(self, part)) for part in ("presets", "sureness", "verdict")},
        }

    def save(self, folder: str | Path) -> Path:
        """Write findings.json, blocks.csv, matrices.npz, images.npz (and gallery.npz); all of it or nothing."""
        with new_folder(folder) as inside:
            self.write(inside)
        return Path(folder)

    def write(self, inside: Path) -> None:
        """Write the files into an existing folder, without any guard."""
        text = json.dumps(self.to_json(), indent=1, allow_nan=False)
        (inside / "findings.json").write_text(text + "\n", encoding="utf-8")
        self.blocks.to_csv(inside / "blocks.csv", index=False)
        np.savez_compressed(inside / "matrices.npz", **storing.arrays_of(self.metrics))  # type: ignore[arg-type]
        np.savez_compressed(inside / "images.npz", **dict(self.images))  # type: ignore[arg-type]
        storing.write_gallery(inside / "gallery.npz", self.gallery, self.thumbnails)

    @classmethod
    def load(cls, folder: str | Path) -> Findings:
        """Read a findings folder back; raises OutputError where it is none or of another schema."""
        folder = Path(folder)
        content = storing.read_content(folder)
        return cls(
            model=content["model"],
            data=content["data"],
            run=content["run"],
            metrics={name: storing.reading_from_json(entry) for name, entry in content["metrics"].items()},
            summary=content["summary"],
            images=storing.load_arrays(folder / "images.npz"),
            gallery=storing.load_gallery(folder / "gallery.npz"),
            thumbnails=storing.load_thumbnails(folder / "gallery.npz"),
            presets=content.get("presets", {}),
            sureness=content.get("sureness", {}),
            verdict=content.get("verdict", ()),
        )

    def with_run(self, **facts: Any) -> Findings:
        """The same findings with more facts about the run."""
        return replace(self, run={**self.run, **facts})
