"""Findings: what a run found, as plain numbers with their provenance, and the folder that they live in."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from collapse_probe.errors import OutputError, UnknownNameError
from collapse_probe.folders import new_folder

SCHEMA = "collapse-probe/findings/1"
Array = NDArray[np.float64]
CSV_COLUMNS = ["metric", "block", "head", "value", "stderr", "ci_low", "ci_high"]


@dataclass(frozen=True)
class Nulls:
    """What a metric would read with nothing to find.

    `values` maps untrained, other_token, other_image, other_head and kappa to arrays with the metric's dims, or to
    None where `reasons` says why; `images` says on how many images each was taken; `kappa_ci95` [..., 2]; `spread`: see nulls.
    """

    values: Mapping[str, Array | None]
    images: Mapping[str, int]
    reasons: Mapping[str, str] = field(default_factory=dict)
    kappa_ci95: Array | None = None
    spread: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Reading:
    """One metric: `values` with axes `dims`, `stderr` of the same shape, `ci95` with one more axis (low, high).

    `head_mean` holds, for a metric with a head axis, its mean over heads as (values, stderr, ci95) over blocks.
    A metric that does not apply has `not_applicable` (the reason) and no values.
    """

    dims: tuple[str, ...]
    definition: str
    values: Array | None = None
    stderr: Array | None = None
    ci95: Array | None = None
    collapsed: str | None = None
    point: str | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    nulls: Nulls | None = None
    head_mean: tuple[Array, Array, Array] | None = None
    not_applicable: str | None = None


@dataclass(frozen=True)
class Gallery:
    """A few of the images with the attention map of every block, for the report.

    `pictures` uint8 [I, height, width, 3] (the model's own crop), `maps` float64 [I, blocks, rows, columns]
    (attention paid to each patch, mean over heads and over the queries that `query` names). `rollouts`, of the same shape,
    is the same for attention rollout up to each block, from the mean over heads, where that was measured.
    """

    names: tuple[str, ...]
    pictures: NDArray[np.uint8]
    maps: Array
    query: str
    rollouts: Array | None = None


@dataclass(frozen=True)
class Findings:
    """What one run found. `images` maps "names" and each metric's name to per-image arrays, first axis images.

    `presets` holds the record of every preset by name, `verdict` how each rule came out in turn; `sureness`: see there.
    """

    model: Mapping[str, Any]
    data: Mapping[str, Any]
    run: Mapping[str, Any]
    metrics: Mapping[str, Reading]
    summary: Mapping[str, float | int | None]
    images: Mapping[str, NDArray[Any]] = field(default_factory=dict)
    gallery: Gallery | None = None
    presets: Mapping[str, Any] = field(default_factory=dict)
    sureness: Mapping[str, Any] = field(default_factory=dict)
    verdict: Sequence[Mapping[str, Any]] = ()

    @property
    def blocks(self) -> pd.DataFrame:
        """One row per metric and block (and head): metric, block, head, value, stderr, ci_low, ci_high.

        For a block × block metric the row of block b holds its value with the block before (b − 1).
        """
        rows: list[list[Any]] = []
        for name, reading in self.metrics.items():
            rows += [[name, *row] for row in _block_rows(reading)]
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
            "model": _plain(self.model),
            "data": _plain(self.data),
            "run": _plain(self.run),
            "metrics": {name: _reading_to_json(reading) for name, reading in self.metrics.items()},
            "summary": _plain(self.summary),
            **{part: _plain(getattr(self, part)) for part in ("presets", "sureness", "verdict")},
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
        np.savez_compressed(inside / "matrices.npz", **self._matrices())  # type: ignore[arg-type]
        np.savez_compressed(inside / "images.npz", **dict(self.images))  # type: ignore[arg-type]
        if self.gallery is not None:
            rollouts = self.gallery.rollouts
            kept: dict[str, Any] = {} if rollouts is None else {"rollouts": rollouts.astype(np.float32)}
            np.savez_compressed(
                inside / "gallery.npz",
                names=np.array(self.gallery.names, dtype=np.str_),
                pictures=self.gallery.pictures,
                maps=self.gallery.maps.astype(np.float32),
                query=np.array(self.gallery.query),
                **kept,
            )

    def _matrices(self) -> dict[str, Array]:
        found: dict[str, Array] = {}
        for name, reading in self.metrics.items():
            if reading.values is None:
                continue
            found[name] = reading.values
            if reading.nulls is not None:
                found |= {f"{name}/{key}": v for key, v in reading.nulls.values.items() if v is not None}
        return found

    @classmethod
    def load(cls, folder: str | Path) -> Findings:
        """Read a findings folder back; raises OutputError where it is none or of another schema."""
        folder = Path(folder)
        path = folder / "findings.json"
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise OutputError(
                f"{folder} is not a findings folder ({error}); expected findings.json as analyze writes it"
            ) from error
        if content.get("schema") != SCHEMA:
            raise OutputError(f"{path} has schema {content.get('schema')!r}; expected {SCHEMA!r}: analyze again")
        images: dict[str, NDArray[Any]] = {}
        if (folder / "images.npz").exists():
            with np.load(folder / "images.npz", allow_pickle=False) as stored:
                images = {key: stored[key] for key in stored.files}
        return cls(
            model=content["model"],
            data=content["data"],
            run=content["run"],
            metrics={name: _reading_from_json(entry) for name, entry in content["metrics"].items()},
            summary=content["summary"],
            images=images,
            gallery=_load_gallery(folder / "gallery.npz"),
            presets=content.get("presets", {}),
            sureness=content.get("sureness", {}),
            verdict=content.get("verdict", ()),
        )

    def with_run(self, **facts: Any) -> Findings:
        """The same findings with more facts about the run."""
        return replace(self, run={**self.run, **facts})


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, np.ndarray):
        return _plain(value.tolist())
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, np.generic):
        return _plain(value.item())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _reading_to_json(reading: Reading) -> dict[str, Any]:
    entry: dict[str, Any] = {
        "dims": list(reading.dims),
        "values": _plain(reading.values),
        "stderr": _plain(reading.stderr),
        "ci95": _plain(reading.ci95),
        "collapsed": reading.collapsed,
        "point": reading.point,
        "settings": _plain(reading.settings),
        "definition": reading.definition,
        "nulls": None,
        "not_applicable": reading.not_applicable,
    }
    if reading.nulls is not None:
        entry["nulls"] = {
            **{key: _plain(value) for key, value in reading.nulls.values.items()},
            "kappa_ci95": _plain(reading.nulls.kappa_ci95),
            "images": dict(reading.nulls.images),
            "reasons": dict(reading.nulls.reasons),
            "spread": _plain(reading.nulls.spread),
        }
    if reading.head_mean is not None:
        entry["head_mean"] = dict(zip(("values", "stderr", "ci95"), map(_plain, reading.head_mean), strict=True))
    return entry


def _array(value: Any) -> Array | None:
    return None if value is None else np.array(value, dtype=np.float64)


def _reading_from_json(entry: Mapping[str, Any]) -> Reading:
    stored, nulls = entry["nulls"], None
    if stored is not None:
        extra = ("kappa_ci95", "images", "reasons", "spread")
        nulls = Nulls(
            values={key: _array(value) for key, value in stored.items() if key not in extra},
            images=stored["images"],
            reasons=stored["reasons"],
            kappa_ci95=_array(stored["kappa_ci95"]),
            spread=stored.get("spread", {}),
        )
    mean = entry.get("head_mean")
    return Reading(
        dims=tuple(entry["dims"]),
        definition=entry["definition"],
        values=_array(entry["values"]),
        stderr=_array(entry["stderr"]),
        ci95=_array(entry["ci95"]),
        collapsed=entry["collapsed"],
        point=entry["point"],
        settings=entry["settings"],
        nulls=nulls,
        head_mean=None if mean is None else tuple(np.array(mean[k], dtype=np.float64) for k in mean),  # type: ignore[arg-type]
        not_applicable=entry["not_applicable"],
    )


def _block_rows(reading: Reading) -> list[list[Any]]:
    if reading.values is None or reading.stderr is None or reading.ci95 is None:
        return []
    whole = (reading.values, reading.stderr, reading.ci95)
    if len(reading.dims) == 2 and reading.dims[0] == reading.dims[1]:
        pairs = [(b, b - 1) for b in range(1, len(reading.values))]
        return [[b, None, *_cell(whole, (b, a))] for b, a in pairs]
    if reading.dims == ("block", "head"):
        rows = [[b, h, *_cell(whole, (b, h))] for b, h in np.ndindex(reading.values.shape)]
        if reading.head_mean is not None:
            rows += [[b, None, *_cell(reading.head_mean, (b,))] for b in range(len(reading.values))]
        return rows
    if reading.dims in (("block",), ("depth",)):
        return [[b, None, *_cell(whole, (b,))] for b in range(len(reading.values))]
    return []


def _cell(whole: tuple[Array, Array, Array], at: tuple[int, ...]) -> list[float]:
    values, stderr, ci95 = whole
    return [float(values[at]), float(stderr[at]), float(ci95[at][0]), float(ci95[at][1])]


def _load_gallery(path: Path) -> Gallery | None:
    if not path.exists():
        return None
    with np.load(path, allow_pickle=False) as stored:
        return Gallery(
            names=tuple(str(name) for name in stored["names"]),
            pictures=stored["pictures"],
            maps=stored["maps"].astype(np.float64),
            query=str(stored["query"]),
            rollouts=stored["rollouts"].astype(np.float64) if "rollouts" in stored.files else None,
        )
