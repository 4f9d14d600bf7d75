"""Findings: what a run found, as plain numbers with their provenance, and the folder that they live in."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from collapse_probe.errors import OutputError, UnknownNameError
from collapse_probe.files import Numbers, read_document, write_document
from collapse_probe.results import checks
from collapse_probe.statistics.intervals import Array

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class Nulls:
    """What a metric would read with nothing to find.

    `values` maps untrained, other_token, other_image, other_head, kappa and (of rows of maps) other_key to arrays with the
    metric's dims, or to None where `reasons` says why; `images` says on how many images each was taken. `ci95` holds intervals
    [..., 2] of nulls by name, `kappa_ci95` that of kappa; `beyond_p` the one-sided p of every pair being more alike than its
    null, `untrained_beyond_p` that in every untrained copy [seeds, ...]; `untrained_seeds` the `seeds` of several untrained
    copies and how these spread (`sd`, `low`, `high`); `untrained_beyond`, by null, the highest over the copies of their
    own (real − null)/(1 − null).
    """

    values: Mapping[str, Array | None]
    images: Mapping[str, int]
    reasons: Mapping[str, str] = field(default_factory=dict)
    kappa_ci95: Array | None = None
    ci95: Mapping[str, Array] = field(default_factory=dict)
    beyond_p: Array | None = None
    untrained_beyond_p: Array | None = None
    untrained_seeds: Mapping[str, Any] | None = None
    untrained_beyond: Mapping[str, Array] = field(default_factory=dict)


@dataclass(frozen=True)
class Description:
    """What a page says of a metric and how it draws it, as the metric itself states it for its own settings.

    `title`: a heading (empty: the metric's name); `seen`: what its figure shows; `limits`: what it does not say; `level`:
    attention, tokens, weights, or other for a metric that says nothing of itself; `panel`: what its panel shows, beside those
    of its variants (empty: its suffixes); `unit` stands at the axis, `top` is the least upper end of the scale. `reference`
    names an entry of `details` that is drawn as a line, and what that line is.
    """

    title: str = ""
    seen: str = ""
    limits: str = ""
    level: str = "other"
    panel: str = ""
    unit: str = "value"
    top: float | None = None
    logarithmic: bool = False
    reference: tuple[str, str] | None = None


@dataclass(frozen=True)
class MetricResult:
    """One metric: `values` with axes `dims`, `stderr` of the same shape, `ci95` with one more axis (low, high).

    `settings` is what was asked, `details` what else came out. `head_mean` holds, for a metric with a head axis, its mean over
    heads as (values, stderr, ci95) over blocks. A metric that does not apply has `not_applicable` (the reason) and no values.
    `adjacent` says for each two consecutive blocks or depths whether they are neighbours, the first giving its output to the
    second; empty where all are. `covers` says of which blocks the numbers are, where that is not simply all of them.
    """

    dims: tuple[str, ...]
    definition: str
    values: Array | None = None
    stderr: Array | None = None
    ci95: Array | None = None
    collapsed: str | None = None
    point: str | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    details: Mapping[str, Any] = field(default_factory=dict)
    description: Description = field(default_factory=Description)
    nulls: Nulls | None = None
    head_mean: tuple[Array, Array, Array] | None = None
    not_applicable: str | None = None
    adjacent: tuple[bool, ...] = ()
    covers: str = ""

    @property
    def array(self) -> Array:
        """The values of a metric that applies."""
        assert self.values is not None
        return self.values


@dataclass(frozen=True)
class Gallery:
    """A few of the images with the attention map of every block, for the report.

    `pictures` uint8 [I, height, width, 3] (the model's own crop), `maps` float64 [I, blocks, rows, columns]
    (attention paid to each patch, mean over heads and over the queries that `query` names) of the blocks numbered `blocks`
    (empty: of all, from 0). `rollouts`, of the same shape, is the same for attention rollout up to each block, from the mean
    over heads, where that was measured.
    """

    names: tuple[str, ...]
    pictures: NDArray[np.uint8]
    maps: Array
    query: str
    rollouts: Array | None = None
    blocks: tuple[int, ...] = ()


SCHEMA = "collapse-probe/findings/1"
CSV_COLUMNS = ["metric", "block", "head", "value", "stderr", "ci_low", "ci_high"]
STORED = (
    *("dims", "values", "stderr", "ci95", "collapsed", "point", "settings", "details", "description", "definition", "nulls"),
    "not_applicable",
)
PARTS = ("model", "data", "run", "metrics", "summary", "presets", "sureness", "verdict", "answer")
SPREAD, CI95 = ("beyond_p", "untrained_beyond_p", "untrained_seeds", "untrained_beyond"), "_ci95"
NO_NULLS = ("kappa_ci95", "images", "reasons", "spread")
"""What stands beside the nulls themselves in their entry."""


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


def result_to_json(result: MetricResult) -> dict[str, Any]:
    """One entry of `metrics` in findings.json."""
    parts = {name: getattr(result, name) for name in STORED}
    nulls = result.nulls
    if nulls is not None:
        parts["nulls"] = {
            **nulls.values,
            "kappa_ci95": nulls.kappa_ci95,
            "images": nulls.images,
            "reasons": nulls.reasons,
            "spread": {
                **{f"{name}{CI95}": bounds for name, bounds in nulls.ci95.items()},
                **{name: value for name in SPREAD if (value := getattr(nulls, name)) is not None and len(value)},
            },
        }
    if result.head_mean is not None:
        parts["head_mean"] = dict(zip(("values", "stderr", "ci95"), result.head_mean, strict=True))
    parts |= {name: value for name in ("adjacent", "covers") if (value := getattr(result, name))}
    entry: dict[str, Any] = plain({**parts, "description": asdict(result.description)})
    return entry


def result_from_json(name: str, entry: Mapping[str, Any]) -> MetricResult:
    """The result called `name` behind its entry of `metrics` in findings.json."""
    parts: dict[str, Any] = {key: entry.get(key) for key in STORED} | {
        key: _array(entry[key]) for key in ("values", "stderr", "ci95")
    }
    parts |= {"dims": tuple(entry["dims"]), "details": entry.get("details", entry["settings"])}
    stored, mean = entry["nulls"], entry.get("head_mean")
    if stored is not None:
        spread = dict(stored.get("spread", {}))
        parts["nulls"] = Nulls(
            values={key: _array(value) for key, value in stored.items() if key not in NO_NULLS},
            images=stored["images"],
            reasons=stored["reasons"],
            kappa_ci95=_array(stored["kappa_ci95"]),
            beyond_p=_array(spread.pop("beyond_p", None)),
            untrained_beyond_p=_array(spread.pop("untrained_beyond_p", None)),
            untrained_seeds=spread.pop("untrained_seeds", None),
            untrained_beyond={
                key: np.array(shares, dtype=np.float64) for key, shares in (spread.pop("untrained_beyond", None) or {}).items()
            },
            ci95={key.removesuffix(CI95): np.array(bounds, dtype=np.float64) for key, bounds in spread.items()},
        )
    if mean is not None:
        parts["head_mean"] = tuple(_array(part) for part in mean.values())
    parts |= {"adjacent": tuple(entry.get("adjacent", ())), "covers": entry.get("covers", "")}
    parts["description"] = _description(name, entry)
    return MetricResult(**parts)


def _description(name: str, entry: Mapping[str, Any]) -> Description:
    """The stored description; a plain one for findings that were written without."""
    stored = entry.get("description")
    if stored is None:
        of_weights = "matrix" in entry["dims"] or "matrices" in entry["settings"]
        base, *suffixes = name.split("@")
        return Description(base, level="weights" if of_weights else "other", panel="; ".join(suffixes) or base)
    return Description(**{**stored, "reference": stored.get("reference") and tuple(stored["reference"])})


def _array(value: Any) -> Array | None:
    return None if value is None else np.array(value, dtype=np.float64)


def block_rows(name: str, result: MetricResult) -> list[list[Any]]:
    """The rows of blocks.csv for one metric, as CSV_COLUMNS; NaN where it has no standard error or interval.

    Blocks × blocks and depths × depths give each with the one before where the two are neighbours, blocks × matrices a metric
    NAME/MATRIX for each matrix.
    None for other axes (thresholds, the depths of two models): these numbers belong to no single block.
    """
    if result.values is None:
        return []
    blank = np.full((*result.values.shape, 2), np.nan)
    stderr = blank[..., 0] if result.stderr is None else result.stderr
    parts, dims = (result.values, stderr, blank if result.ci95 is None else result.ci95), result.dims
    blocks = range(len(result.values))
    if len(dims) == 2 and dims[0] == dims[1]:
        neighbours = result.adjacent or (True,) * len(blocks[1:])
        return [[name, b, None, *_cell(parts, b, b - 1)] for b, known in zip(blocks[1:], neighbours, strict=True) if known]
    if dims == ("block", "matrix"):
        matrices = result.details.get("matrices", range(result.values.shape[1]))
        return [[f"{name}/{matrix}", b, None, *_cell(parts, b, m)] for m, matrix in enumerate(matrices) for b in blocks]
    if dims == ("block", "head"):
        rows = [[name, b, h, *_cell(parts, b, h)] for b, h in np.ndindex(result.values.shape)]
        mean = result.head_mean
        return rows if mean is None else rows + [[name, b, None, *_cell(mean, b)] for b in blocks]
    if dims in (("block",), ("depth",)):
        return [[name, b, None, *_cell(parts, b)] for b in blocks]
    return []


def _cell(parts: tuple[Array, Array, Array], *at: int) -> list[float]:
    values, stderr, ci95 = parts
    return [float(values[at]), float(stderr[at]), float(ci95[at][0]), float(ci95[at][1])]


AGAIN = "take the folder from where it was written, or measure again"


def load_arrays(path: Path) -> dict[str, NDArray[Any]]:
    """The content of an npz file; empty where there is no such file. OutputError for one that is damaged."""
    if not path.exists():
        return {}
    try:
        with path.open("rb") as stream, np.load(stream, allow_pickle=False) as stored:
            arrays = {key: np.asarray(stored[key]) for key in stored.files}
    except Exception as error:  # damaged files fail in many ways, an empty one with EOFError
        why = f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
        raise OutputError(f"{path} cannot be read as arrays of NumPy ({why}); {AGAIN}") from error
    if strange := [key for key, values in arrays.items() if values.dtype.kind not in "biufU"]:
        raise OutputError(f"{path} holds {strange[0]!r}, which is no array of numbers or names; {AGAIN}")
    return arrays


def write_gallery(path: Path, gallery: Gallery | None, thumbnails: Mapping[str, NDArray[np.uint8]]) -> None:
    """Write gallery.npz, the maps in float32, the thumbnails (all of one size) in one array; no file where there is neither."""
    arrays: dict[str, Any] = {}
    if thumbnails:
        arrays["thumbnail_names"] = np.array(list(thumbnails), dtype=np.str_)
        arrays["thumbnails"] = np.stack(list(thumbnails.values()))
    if gallery is not None:
        arrays |= {"names": np.array(gallery.names, dtype=np.str_), "query": np.array(gallery.query)}
        arrays["blocks"] = np.array(gallery.blocks, dtype=np.int64)
        arrays |= {"pictures": gallery.pictures, "maps": gallery.maps.astype(np.float32)}
        arrays |= {} if gallery.rollouts is None else {"rollouts": gallery.rollouts.astype(np.float32)}
    if arrays:
        np.savez_compressed(path, **arrays)


def load_gallery(path: Path) -> tuple[Gallery | None, dict[str, NDArray[np.uint8]]]:
    """The gallery (None where there is none) and the thumbnails by name out of gallery.npz, which may not exist.

    OutputError where its arrays do not fit each other.
    """
    stored = load_arrays(path)
    if not _fits(stored):
        came = ", ".join(f"{key} {values.dtype} {list(values.shape)}" for key, values in stored.items())
        raise OutputError(f"{path} is no gallery: its arrays do not fit each other ({came}); {AGAIN}")
    thumbnails = dict(zip(map(str, stored.get("thumbnail_names", ())), stored.get("thumbnails", ()), strict=True))
    if "maps" not in stored:
        return None, thumbnails
    rollouts = stored["rollouts"].astype(np.float64) if "rollouts" in stored else None
    names, maps = tuple(map(str, stored["names"])), stored["maps"].astype(np.float64)
    blocks = tuple(int(block) for block in stored.get("blocks", ()))
    return Gallery(names, stored["pictures"], maps, str(stored["query"]), rollouts, blocks), thumbnails


def _fits(stored: Mapping[str, NDArray[Any]]) -> bool:
    """Whether the arrays of a gallery, and of thumbnails, have the shapes and types of `Gallery`."""

    def pictures(names: str, key: str) -> bool:
        text, seen = stored.get(names), stored.get(key)
        if text is None or seen is None:
            return text is None and seen is None
        shaped = text.ndim == 1 and seen.ndim == 4 and len(text) == len(seen) and seen.shape[3] == 3 and seen.size > 0
        return shaped and text.dtype.kind == "U" and seen.dtype == np.uint8

    if not pictures("thumbnail_names", "thumbnails") or not pictures("names", "pictures"):
        return False
    if ("maps" in stored) != ("pictures" in stored):
        return False
    if "maps" not in stored:
        return "rollouts" not in stored
    maps, blocks, query = stored["maps"], stored.get("blocks", np.zeros(0, int)), stored.get("query")
    layers = maps.shape[1] if maps.ndim == 4 else 0
    shaped = layers and len(maps) == len(stored["names"]) and stored.get("rollouts", maps).shape == maps.shape
    numbered = blocks.ndim == 1 and blocks.dtype.kind == "i" and len(blocks) in (0, layers)
    finite = all(values.dtype.kind == "f" and np.isfinite(values).all() for values in (maps, stored.get("rollouts", maps)))
    return bool(shaped and numbered and finite and query is not None and query.ndim == 0 and query.dtype.kind == "U")


def load_images(path: Path, images: int) -> dict[str, NDArray[Any]]:
    """The per-image table out of images.npz, which may not exist; OutputError where it is not one row for each of `images`."""
    stored = load_arrays(path)
    names = stored.get("names")
    if names is not None and (names.ndim != 1 or names.dtype.kind != "U" or len(names) != images):
        raise OutputError(f"{path} names {list(names.shape)} images, the findings are of {images}; {AGAIN}")
    for key, values in stored.items():
        if values.ndim < 1 or len(values) != images or (key != "names" and values.dtype.kind == "U"):
            raise OutputError(
                f"{path} holds {key!r} {values.dtype} {list(values.shape)}, not a row for each of {images} images; {AGAIN}"
            )
    return stored


@dataclass(frozen=True)
class Findings(Numbers):
    """What one run found. `images` maps "names" and each metric's name to per-image arrays, first axis images.

    `thumbnails` are small pictures, uint8 [height, width, 3] by image name, of those at both ends of the headline number.
    `presets` holds the record of every preset by name, `verdict` how each rule came out in turn, `answer`
    what they say together (see `results.verdict`); `sureness`: see there.
    """

    model: Mapping[str, Any]
    data: Mapping[str, Any]
    run: Mapping[str, Any]
    metrics: Mapping[str, MetricResult]
    summary: Mapping[str, float | int | None]
    images: Mapping[str, NDArray[Any]] = field(default_factory=dict)
    gallery: Gallery | None = None
    thumbnails: Mapping[str, NDArray[np.uint8]] = field(default_factory=dict)
    presets: Mapping[str, Any] = field(default_factory=dict)
    sureness: Mapping[str, Any] = field(default_factory=dict)
    verdict: Sequence[Mapping[str, Any]] = ()
    answer: Mapping[str, Any] = field(default_factory=dict)

    @property
    def states(self) -> tuple[str, ...]:
        """Those of `analyze`, unless the findings are of a part of the data: the run may still go on."""
        return () if "partial" in self.data else ("run.",)

    @property
    def blocks(self) -> pd.DataFrame:
        """One row per metric and block (and head): metric, block, head, value, stderr, ci_low, ci_high.

        For a block × block metric the row of block b holds its value with the block before (b − 1), where that gives it its
        input; a metric of the weights is
        called NAME/MATRIX. Errors are NaN where none was taken (a model is no sample of weights). See `block_rows`.
        """
        import pandas as pd

        rows = [row for name, result in self.metrics.items() for row in block_rows(name, result)]
        return pd.DataFrame(rows, columns=CSV_COLUMNS).astype({"block": "Int64", "head": "Int64"})

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
        metrics = {name: result_to_json(result) for name, result in self.metrics.items()}
        return {"schema": SCHEMA, **{part: metrics if part == "metrics" else plain(getattr(self, part)) for part in PARTS}}

    def write(self, inside: Path) -> None:
        """Write findings.json, blocks.csv, matrices.npz, images.npz (and gallery.npz) into an existing folder."""
        write_document(inside / "findings.json", self.to_json())
        self.blocks.to_csv(inside / "blocks.csv", index=False)
        arrays: dict[str, Any] = {}  # NAME, and NAME/NULL for its nulls
        for name, result in self.metrics.items():
            if result.values is not None:
                nulls = {} if result.nulls is None else result.nulls.values
                arrays |= {name: result.values} | {f"{name}/{key}": null for key, null in nulls.items() if null is not None}
        np.savez_compressed(inside / "matrices.npz", **arrays)
        np.savez_compressed(inside / "images.npz", **dict(self.images))  # type: ignore[arg-type]
        write_gallery(inside / "gallery.npz", self.gallery, self.thumbnails)

    @classmethod
    def load(cls, folder: str | Path) -> Findings:
        """Read a findings folder back; raises OutputError where it is none or of another schema."""
        folder = Path(folder)
        content = read_document(
            folder,
            "findings.json",
            schema=SCHEMA,
            refusal="is not a findings folder",
            command="analyze",
            check=checks.FINDINGS,
        )
        parts = {part: content[part] for part in PARTS if part in content}
        parts["metrics"] = {name: result_from_json(name, entry) for name, entry in content["metrics"].items()}
        gallery, thumbnails = load_gallery(folder / "gallery.npz")
        return cls(
            **parts,
            images=load_images(folder / "images.npz", content["data"]["images"]),
            gallery=gallery,
            thumbnails=thumbnails,
        )

    def with_run(self, **facts: Any) -> Findings:
        """The same findings with more facts about the run."""
        return replace(self, run={**self.run, **facts})
