"""Two or more findings side by side as plain numbers: what differs, by how much, and the folder they live
in.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from collapse_probe.files import new_folder, read_document
from collapse_probe.results.findings import Findings
from collapse_probe.statistics.paired import BCA_IMAGES, RESAMPLES, Paired


def unsampled(difference: Difference) -> bool:
    """Whether a difference is one of two models' weights: no image entered it, and none was left out."""
    return not (difference.paired.images.any() or difference.paired.left_out.any())


def equal(difference: Difference) -> bool:
    """Whether both sides are the same at every place; those undefined in both count as the same."""
    return np.array_equal(difference.paired.first, difference.paired.second, equal_nan=True)


PROBS = "@probs"
TOP1, LABELS = "top1", "label"
ACCURACY = "accuracy"


@dataclass(frozen=True)
class Difference:
    """One quantity of two subjects over `places` (block b, for a pair of blocks the later one), and their
    mean as `overall`.
    """

    axis: str
    places: tuple[int, ...]
    paired: Paired
    overall: Paired


@dataclass(frozen=True)
class OutputAgreement:
    """How often two subjects give the same top answer, and the mean KL divergence from the first to the
    second in nats.

    None where it was not to be had; `reason` says why.
    """

    top1: float | None = None
    kl: float | None = None
    images: int = 0
    reason: str = ""


@dataclass(frozen=True)
class Pair:
    """The subject called `second` against `first`, on `images` images in common order.

    `differences` holds metrics by name, `NAME/kappa` for the corrected similarity, and `accuracy`;
    `not_comparable` what one of the two lacks or has in another shape, with the reason.
    """

    first: str
    second: str
    images: int
    differences: Mapping[str, Difference]
    counts: tuple[CountDifference, ...]
    not_comparable: Mapping[str, str]
    agreement: OutputAgreement


NULL, KAPPA = "/other_token", "/kappa"
"""What stands behind a metric's name where images.npz holds its null, and where a comparison holds its
kappa.
"""


@dataclass(frozen=True)
class CountDifference:
    """Similar blocks of two subjects at one threshold: the counts, and the interval of second − first, which covers at least
    95 % (`count_difference_bounds`).
    """

    name: str
    threshold: float
    first: float
    second: float
    ci95: tuple[float, float]


SCHEMA = "collapse-probe/comparison/1"
METHODS = {
    "difference": "second − first, the mean over the images that both define; of kappa: kappa of the mean "
    "values and nulls, second − first",
    "ci95": f"bootstrap over images, {RESAMPLES} resamples, all blocks of one image together "
    "(scipy.stats.bootstrap); `interval` is BCa, percentile where BCa is undefined or there are more "
    f"than {BCA_IMAGES} images, exact where every image has the same value on both sides",
    "p": "two-sided Wilcoxon signed-rank test over images (scipy.stats.wilcoxon), on each image's own "
    "difference; 1 where nothing differs",
    "q": "p with the false discovery rate controlled over the blocks of the metric (Benjamini–Hochberg, "
    "scipy.stats.false_discovery_control)",
    "effect": "matched-pairs rank-biserial correlation, −1 (every image falls) … 1 (every image rises)",
    "overall": "the mean over blocks",
    "counts": "similar blocks; the interval of second − first is what one-sided t bounds over images of each pair of blocks, "
    "in the first, in the second and of their difference, leave open, each at 5 % over the number of bounds (Bonferroni): at "
    "least 95 % coverage",
    "weights": "second − first of the two models; no interval and no test, for a model is no sample",
    "kl": "mean over images of KL(first ‖ second) of the softmax outputs, nats",
    "flops": "of one image, torch.utils.flop_counter; a multiplication and an addition are two",
}
OF_WEIGHTS = ("weights", "overall", "flops")
"""The methods behind a comparison of weights alone."""
ARRAYS = ("first", "second", "difference", "ci95", "p", "q", "effect")


@dataclass(frozen=True)
class Comparison:
    """Subjects by label, the first being what each other is compared with in `pairs`.

    `trajectory` says that the subjects are checkpoints of one training, in order. What a model costs and
    answers is in its findings: `run["cost"]`, `run["outputs"]`, `summary["accuracy"]`.
    """

    subjects: Mapping[str, Findings]
    pairs: tuple[Pair, ...]
    trajectory: bool
    run: Mapping[str, Any]

    @property
    def first(self) -> str:
        """The label of the subject with which the others are compared."""
        return next(iter(self.subjects))

    def numbers(self, label: str) -> dict[str, float | int | None]:
        """The summary of one subject, and for each of its names NAME_difference: less that of the first
        subject.
        """
        own, base = self.subjects[label].summary, self.subjects[self.first].summary
        found: dict[str, float | int | None] = dict(own)
        for name, value in own.items():
            other = base.get(name)
            found[f"{name}_difference"] = None if value is None or other is None else value - other
        return found

    def to_json(self) -> dict[str, Any]:
        """The content of comparison.json: JSON types alone, undefined numbers as None."""
        folders = _folders(self.subjects)
        return {
            "schema": SCHEMA,
            "run": dict(self.run),
            "trajectory": self.trajectory,
            "methods": METHODS,
            "subjects": [
                {"label": label, "folder": folders[label], **_subject(findings)} for label, findings in self.subjects.items()
            ],
            "pairs": [_pair_to_json(pair) for pair in self.pairs],
        }

    def save(self, folder: str | Path) -> Path:
        """Write comparison.json, and every subject's findings into subjects/LABEL; all of it or nothing."""
        with new_folder(folder) as inside:
            self.write(inside)
        return Path(folder)

    def write(self, inside: Path) -> None:
        """Write the files into an existing folder, without any guard."""
        text = json.dumps(self.to_json(), indent=1, allow_nan=False, ensure_ascii=False)
        (inside / "comparison.json").write_text(text + "\n", encoding="utf-8")
        folders = _folders(self.subjects)
        for label, findings in self.subjects.items():
            place = inside / folders[label]
            place.mkdir(parents=True)
            findings.write(place)

    @classmethod
    def load(cls, folder: str | Path) -> Comparison:
        """Read a comparison's folder back; OutputError where it is none or of another schema."""
        content = read_document(folder, "comparison.json", schema=SCHEMA, refusal="is no comparison", command="compare")
        subjects = {s["label"]: Findings.load(Path(folder) / s["folder"]) for s in content["subjects"]}
        pairs = tuple(_pair_from_json(entry) for entry in content["pairs"])
        return cls(subjects, pairs, content["trajectory"], content["run"])


def _folders(labels: Mapping[str, Any]) -> dict[str, str]:
    """A folder for each label that every file system takes, each another."""
    found: dict[str, str] = {}
    for label in labels:
        plain = re.sub(r"[^A-Za-z0-9._+-]+", "-", label).strip("-. ") or "subject"
        folder, number = plain, 2
        while f"subjects/{folder}".casefold() in {name.casefold() for name in found.values()}:
            folder, number = f"{plain}-{number}", number + 1
        found[label] = f"subjects/{folder}"
    return found


def _subject(findings: Findings) -> dict[str, Any]:
    keys = (
        "address",
        "name",
        "weights",
        "checkpoint",
        "checkpoint_sha256",
        "parameters",
        "blocks",
        "mixes_maps",
    )
    facts = findings.to_json()
    return {
        **{key: facts["model"].get(key) for key in keys},
        "images": facts["data"].get("images"),
        "names_sha256": facts["data"].get("names_sha256"),
        "notes": facts["run"].get("notes", []),
        "cost": facts["run"].get("cost"),
        "outputs": facts["run"].get("outputs"),
        "summary": facts["summary"],
    }


def _listed(values: Any) -> Any:
    """Arrays as nested lists, NaN as None."""
    if isinstance(values, np.ndarray):
        return [_listed(value) for value in values]
    return None if values is None or not np.isfinite(values) else float(values)


def _array(values: Any) -> Any:
    return np.array(values, dtype=np.float64)


def _paired_to_json(paired: Paired) -> dict[str, Any]:
    return {
        **{name: _listed(getattr(paired, name)) for name in ARRAYS},
        "interval": list(paired.interval),
        "images": paired.images.tolist(),
        "left_out": paired.left_out.tolist(),
    }


def _paired_from_json(entry: Mapping[str, Any]) -> Paired:
    images, left_out = (np.array(entry[name], dtype=np.int64) for name in ("images", "left_out"))
    arrays = {name: _array(entry[name]) for name in ARRAYS}
    return Paired(**arrays, images=images, left_out=left_out, interval=tuple(entry["interval"]))


def _pair_to_json(pair: Pair) -> dict[str, Any]:
    return {
        "first": pair.first,
        "second": pair.second,
        "images": pair.images,
        "metrics": {
            name: {
                "axis": difference.axis,
                "places": list(difference.places),
                **_paired_to_json(difference.paired),
                "overall": _paired_to_json(difference.overall),
            }
            for name, difference in pair.differences.items()
        },
        "counts": [{**vars(count), "ci95": [_listed(end) for end in count.ci95]} for count in pair.counts],
        "not_comparable": dict(pair.not_comparable),
        "agreement": dict(vars(pair.agreement)),
    }


def _pair_from_json(entry: Mapping[str, Any]) -> Pair:
    differences = {
        name: Difference(d["axis"], tuple(d["places"]), _paired_from_json(d), _paired_from_json(d["overall"]))
        for name, d in entry["metrics"].items()
    }
    counts = tuple(CountDifference(**{**c, "ci95": tuple(_array(c["ci95"]).tolist())}) for c in entry["counts"])
    return Pair(
        first=entry["first"],
        second=entry["second"],
        images=entry["images"],
        differences=differences,
        counts=counts,
        not_comparable=entry["not_comparable"],
        agreement=OutputAgreement(**entry["agreement"]),
    )
