"""Findings: what a run found, as plain numbers with their provenance, and the folder that they live in."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from collapse_probe.errors import UnknownNameError
from collapse_probe.files import read_document, write_document
from collapse_probe.results.overview.display import Shown
from collapse_probe.results.stored import checks
from collapse_probe.results.stored.arrays import Gallery as Gallery
from collapse_probe.results.stored.arrays import load_gallery, load_images, write_gallery
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


SCHEMA = "collapse-probe/findings/1"
CSV_COLUMNS = [
    *("metric", "block", "head", "value", "stderr", "ci_low", "ci_high"),
    *("chance_level", "chance_ci_low", "chance_ci_high", "kappa", "kappa_ci_low", "kappa_ci_high", "untrained"),
]
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
    """The rows of blocks.csv for one metric, as CSV_COLUMNS; NaN where it has no such number.

    Blocks × blocks and depths × depths give each with the one before where the two are neighbours, blocks × matrices a metric
    NAME/MATRIX for each matrix.
    None for other axes (thresholds, the depths of two models): these numbers belong to no single block.
    """
    if result.values is None:
        return []
    cells, dims = _columns(result), result.dims
    blocks = range(len(result.values))
    if len(dims) == 2 and dims[0] == dims[1]:
        neighbours = result.adjacent or (True,) * len(blocks[1:])
        pairs = zip(blocks[1:], neighbours, strict=True)
        return [[name, b, None, *cells[b, b - 1].tolist()] for b, known in pairs if known]
    if dims == ("block", "matrix"):
        matrices = result.details.get("matrices", range(result.values.shape[1]))
        return [[f"{name}/{matrix}", b, None, *cells[b, m].tolist()] for m, matrix in enumerate(matrices) for b in blocks]
    if dims == ("block", "head"):
        rows = [[name, b, h, *cells[b, h].tolist()] for b, h in np.ndindex(result.values.shape)]
        return rows if result.head_mean is None else [*rows, *([name, b, None, *_over_heads(result, b)] for b in blocks)]
    if dims in (("block",), ("depth",)):
        return [[name, b, None, *cells[b].tolist()] for b in blocks]
    return []


def _columns(result: MetricResult) -> Array:
    """The numbers of CSV_COLUMNS, from `value` on, along a last axis behind those of a result that has values."""
    values, nulls = result.array, result.nulls or Nulls({}, {})

    def one(part: Array | None) -> Array:
        return np.full(values.shape, np.nan) if part is None else part

    def ends(part: Array | None) -> tuple[Array, Array]:
        return (one(None), one(None)) if part is None else (part[..., 0], part[..., 1])

    chance, kappa = nulls.values.get("other_token"), nulls.values.get("kappa")
    beyond = (one(chance), *ends(nulls.ci95.get("other_token")), one(kappa), *ends(nulls.kappa_ci95))
    return np.stack(
        [values, one(result.stderr), *ends(result.ci95), *beyond, one(nulls.values.get("untrained"))], -1, dtype=np.float64
    )


def _over_heads(result: MetricResult, block: int) -> list[float]:
    """A row of the mean over heads; chance level, κ and untrained copy are means over the heads that have them."""
    assert result.head_mean is not None
    value, stderr, ci95 = (part[block] for part in result.head_mean)
    heads = _columns(result)[block]
    means = [float(np.mean(known)) if (known := part[np.isfinite(part)]).size else math.nan for part in heads.T]
    blank = [math.nan, math.nan]
    return [float(value), float(stderr), *map(float, ci95), means[4], *blank, means[7], *blank, means[10]]


def parts_of(result: MetricResult) -> dict[str, Array | None]:
    """The values of a result, and by their names all that stands beside them."""
    nulls = result.nulls or Nulls({}, {})
    ends = {"value": result.ci95, "kappa": nulls.kappa_ci95, **nulls.ci95}
    known = {name: each for name, each in ends.items() if each is not None}
    bounds = {f"{name}_ci_{end}": each[..., at] for name, each in known.items() for at, end in enumerate(("low", "high"))}
    return {"value": result.values, "stderr": result.stderr, **nulls.values, **bounds}


def unknown(noun: str, name: str, known: Iterable[str], there: str) -> UnknownNameError:
    """The error for a name that is not among those `known`: it names the nearest, or all."""
    near = difflib.get_close_matches(name, list(known), n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(map(repr, near))}?" if near else f"{there} {', '.join(known)}"
    return UnknownNameError(f"no {noun} called {name!r}; {hint}")


@dataclass(frozen=True, repr=False)
class Findings(Shown):
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
        """`frame()` of all metrics: the content of blocks.csv."""
        return self.frame()

    def frame(self, *names: str) -> pd.DataFrame:
        """One row per metric (all, or those called `names`) and block (and head), with the columns CSV_COLUMNS.

        `value` has its standard error and 95 % interval over images beside it, then its chance level (other tokens), κ and the
        untrained copy's value. For a block × block metric the row of block b holds its value with the block before (b − 1),
        where that gives it its input; a metric of the weights is called NAME/MATRIX. What was not taken is NaN (a model is no
        sample of weights, so these have no error). See `block_rows`.

        Example::

            table = findings.frame("attention-similarity")
            table[["block", "value", "chance_level", "kappa"]]
        """
        import pandas as pd

        results = {name: self[name] for name in names} if names else self.metrics
        rows = [row for name, result in results.items() for row in block_rows(name, result)]
        table = pd.DataFrame(rows, columns=CSV_COLUMNS).astype({"block": "Int64", "head": "Int64"})
        return table.astype(dict.fromkeys(CSV_COLUMNS[3:], "float64"))

    def __getitem__(self, name: str) -> MetricResult:
        if name not in self.metrics:
            raise unknown("metric", name, self.metrics, "these findings hold")
        return self.metrics[name]

    def _ipython_key_completions_(self) -> list[str]:
        return list(self.metrics)

    def matrix(self, name: str, part: str = "value") -> Array:
        """The values of metric `name`, float64, with its dims; raises UnknownNameError where it has none.

        `part` asks for what stands beside them: stderr, kappa, untrained, other_token (the chance level), other_image,
        other_head, and with `_ci_low` or `_ci_high` behind it an end of an interval (value_ci_low, kappa_ci_high, …).

        Example::

            findings.matrix("attention-similarity")
            findings.matrix("attention-similarity", "kappa")
        """
        if name not in self.metrics and part == "value" and name in ("kappa", "untrained", "other_token", "chance_level"):
            raise UnknownNameError(
                f"{name!r} stands beside a metric: matrix(METRIC, {name!r}), as METRIC any of these findings"
            )
        parts = parts_of(self[name])
        if parts["value"] is None:
            raise UnknownNameError(f"{name!r} does not apply here: {self.metrics[name].not_applicable}")
        wanted = part.replace("chance_level", "other_token")
        if wanted not in parts:
            raise unknown(f"part of {name}", part, parts, "there are")
        values = parts[wanted]
        if values is None:
            nulls = self.metrics[name].nulls
            reason = "it was not taken in this run" if nulls is None else nulls.reasons.get(wanted, "it was not taken")
            raise UnknownNameError(f"{name!r} has no {part} here: {reason}")
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
