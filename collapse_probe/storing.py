"""How findings lie in their folder: the entries of findings.json, the rows of blocks.csv, the arrays of the npz files."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from collapse_probe.documents import read_document
from collapse_probe.evidence import Array, Gallery, Nulls, Reading

SCHEMA = "collapse-probe/findings/1"
CSV_COLUMNS = ["metric", "block", "head", "value", "stderr", "ci_low", "ci_high"]
Whole = tuple[Array, Array, Array]


def read_content(folder: Path) -> dict[str, Any]:
    """The content of findings.json in `folder`; OutputError where there is none or it has another schema."""
    return read_document(folder, "findings.json", schema=SCHEMA, refusal="is not a findings folder", command="analyze")


def plain(value: Any) -> Any:
    """`value` in JSON types alone: arrays as lists, undefined numbers as None."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, np.ndarray):
        return plain(value.tolist())
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, np.generic):
        return plain(value.item())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def reading_to_json(reading: Reading) -> dict[str, Any]:
    """One entry of `metrics` in findings.json."""
    entry: dict[str, Any] = {
        "dims": list(reading.dims),
        "values": plain(reading.values),
        "stderr": plain(reading.stderr),
        "ci95": plain(reading.ci95),
        "collapsed": reading.collapsed,
        "point": reading.point,
        "settings": plain(reading.settings),
        "definition": reading.definition,
        "nulls": None,
        "not_applicable": reading.not_applicable,
    }
    if reading.nulls is not None:
        entry["nulls"] = {
            **{key: plain(value) for key, value in reading.nulls.values.items()},
            "kappa_ci95": plain(reading.nulls.kappa_ci95),
            "images": dict(reading.nulls.images),
            "reasons": dict(reading.nulls.reasons),
            "spread": plain(reading.nulls.spread),
        }
    if reading.head_mean is not None:
        entry["head_mean"] = dict(zip(("values", "stderr", "ci95"), map(plain, reading.head_mean), strict=True))
    return entry


def _array(value: Any) -> Array | None:
    return None if value is None else np.array(value, dtype=np.float64)


def reading_from_json(entry: Mapping[str, Any]) -> Reading:
    """The Reading behind one entry of `metrics` in findings.json."""
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


def arrays_of(metrics: Mapping[str, Reading]) -> dict[str, Array]:
    """The content of matrices.npz: the values of every metric as NAME, its nulls as NAME/NULL."""
    found: dict[str, Array] = {}
    for name, reading in metrics.items():
        if reading.values is None:
            continue
        found[name] = reading.values
        if reading.nulls is not None:
            found |= {f"{name}/{key}": v for key, v in reading.nulls.values.items() if v is not None}
    return found


def block_rows(name: str, reading: Reading) -> list[list[Any]]:
    """The rows of blocks.csv for one metric, as CSV_COLUMNS; NaN where it has no standard error or interval.

    Blocks × blocks and depths × depths give each with the one before, blocks × matrices a metric NAME/MATRIX for each matrix.
    None for other axes (thresholds, the depths of two models): these numbers belong to no single block.
    """
    if reading.values is None:
        return []
    whole, dims = _whole(reading.values, reading.stderr, reading.ci95), reading.dims
    blocks = range(len(reading.values))
    if len(dims) == 2 and dims[0] == dims[1]:
        return [[name, b, None, *_cell(whole, (b, b - 1))] for b in blocks[1:]]
    if dims == ("block", "matrix"):
        matrices = reading.settings.get("matrices", range(reading.values.shape[1]))
        return [[f"{name}/{matrix}", b, None, *_cell(whole, (b, m))] for m, matrix in enumerate(matrices) for b in blocks]
    if dims == ("block", "head"):
        rows = [[name, b, h, *_cell(whole, (b, h))] for b, h in np.ndindex(reading.values.shape)]
        mean = reading.head_mean
        return rows if mean is None else rows + [[name, b, None, *_cell(mean, (b,))] for b in blocks]
    if dims in (("block",), ("depth",)):
        return [[name, b, None, *_cell(whole, (b,))] for b in blocks]
    return []


def _whole(values: Array, stderr: Array | None, ci95: Array | None) -> Whole:
    blank = np.full((*values.shape, 2), np.nan)
    return values, blank[..., 0] if stderr is None else stderr, blank if ci95 is None else ci95


def _cell(whole: Whole, at: tuple[int, ...]) -> list[float]:
    values, stderr, ci95 = whole
    return [float(values[at]), float(stderr[at]), float(ci95[at][0]), float(ci95[at][1])]


def load_arrays(path: Path) -> dict[str, NDArray[Any]]:
    """The content of an npz file; empty where there is no such file."""
    if not path.exists():
        return {}
    with np.load(path, allow_pickle=False) as stored:
        return {key: stored[key] for key in stored.files}


def write_gallery(path: Path, gallery: Gallery | None, thumbnails: Mapping[str, NDArray[np.uint8]]) -> None:
    """Write gallery.npz, the maps in float32, the thumbnails (all of one size) in one array; no file where there is neither."""
    kept: dict[str, Any] = {}
    if thumbnails:
        kept["thumbnail_names"] = np.array(list(thumbnails), dtype=np.str_)
        kept["thumbnails"] = np.stack(list(thumbnails.values()))
    if gallery is not None:
        kept |= {"names": np.array(gallery.names, dtype=np.str_), "query": np.array(gallery.query)}
        kept |= {"pictures": gallery.pictures, "maps": gallery.maps.astype(np.float32)}
        kept |= {} if gallery.rollouts is None else {"rollouts": gallery.rollouts.astype(np.float32)}
    if kept:
        np.savez_compressed(path, **kept)


def load_gallery(path: Path) -> Gallery | None:
    """The gallery back out of gallery.npz; None where there is no such file, or no gallery in it."""
    stored = load_arrays(path)
    if "maps" not in stored:
        return None
    return Gallery(
        names=tuple(str(name) for name in stored["names"]),
        pictures=stored["pictures"],
        maps=stored["maps"].astype(np.float64),
        query=str(stored["query"]),
        rollouts=stored["rollouts"].astype(np.float64) if "rollouts" in stored else None,
    )


def load_thumbnails(path: Path) -> dict[str, NDArray[np.uint8]]:
    """The thumbnails out of gallery.npz by name; empty where it holds none."""
    stored = load_arrays(path)
    return dict(zip(map(str, stored.get("thumbnail_names", ())), stored.get("thumbnails", ()), strict=True))
