"""Two or more findings side by side as plain numbers: what differs and by how much, and the folder they live in."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from collapse_probe.errors import OutputError
from collapse_probe.files import SUBJECT_FOLDER, read_document, write_document
from collapse_probe.results.findings import Findings, plain, unknown
from collapse_probe.results.overview.display import Shown
from collapse_probe.results.stored import checks
from collapse_probe.statistics.paired import NO_INTERVAL, OF_KAPPAS, OF_MEANS, OF_SHARES, SAME, Paired

if TYPE_CHECKING:
    import pandas as pd

SCHEMA = "collapse-probe/comparison/1"
FILE, TABLE = "comparison.json", "comparison.csv"
COLUMNS = [
    *("first", "second", "metric", "axis", "place", "first_value", "second_value", "difference", "ci_low", "ci_high"),
    *("interval", "p", "q", "effect", "images", "left_out"),
]
TOP1, LABELS = "top1", "label"
ACCURACY = "accuracy"
PROBS = "@probs"  # behind the name of a metric taken at the softmax, where that is not what multiplies V
NULL, KAPPA = "/other_token", "/kappa"  # behind a metric's name: its null in images.npz, its kappa in a comparison
METHODS = {
    "difference": "second − first, the mean over the images that both define; of kappa: kappa of the mean "
    "values and nulls, second − first",
    "ci95": f"95 % over images; `interval` is its kind. {OF_MEANS}: of a mean difference, the paired t interval, wider on the "
    f"side of the longer tail (Hall's correction of skewness). {OF_KAPPAS}: of a difference of kappas, from Fieller's interval "
    f"of each, corrected in the same way (Zou and Donner's method). {OF_SHARES}: of answers right or wrong, Tango's score "
    f"interval. {SAME}: every image has the same value on both sides. {NO_INTERVAL}: too few images, or the same difference in "
    "all of them, of which no sampling error can be taken",
    "p": "two-sided test over images that belongs to the interval: below 0.05 just where that leaves out 0. The paired t test; "
    "of answers McNemar's; 1 where nothing differs",
    "q": "p with the false discovery rate controlled over the blocks of the metric (Benjamini–Hochberg)",
    "effect": "matched-pairs rank-biserial correlation, −1 (every image falls) … 1 (every image rises)",
    "overall": "the mean over blocks",
    "counts": "similar blocks; the interval of second − first is what one-sided bounds over images of each pair of blocks, "
    "in the first, in the second and of their difference, leave open, each at 5 % over the number of bounds (Bonferroni): at "
    "least 95 % coverage",
    "weights": "second − first of the two models; no interval and no test, for a model is no sample",
    "kl": "mean over images of KL(first ‖ second) of the softmax outputs, nats",
    "flops": "of one image, torch.utils.flop_counter; a multiplication and an addition are two",
}
OF_WEIGHTS = ("weights", "overall", "flops")  # the methods behind a comparison of weights alone
SUBJECT_FACTS = (
    *("address", "name", "weights", "checkpoint", "checkpoint_sha256", "loaded", "blocks_not_loaded"),
    *("parameters", "blocks", "mixes_maps"),
)


@dataclass(frozen=True)
class Difference:
    """One quantity of two subjects over `places` (block b, for a pair of blocks the later one), and their mean as `overall`."""

    axis: str
    places: tuple[int, ...]
    paired: Paired
    overall: Paired

    @property
    def unsampled(self) -> bool:
        """Whether it is one of two models' weights: no image entered it, and none was left out."""
        return not (self.paired.images.any() or self.paired.left_out.any())

    @property
    def equal(self) -> bool:
        """Whether both sides are the same at every place, in every image; undefined on both sides counts as the same."""
        one, other = self.paired.first, self.paired.second
        return np.array_equal(one, other, equal_nan=True) and not np.nan_to_num(self.paired.effect).any()

    @classmethod
    def from_json(cls, entry: Mapping[str, Any]) -> Difference:
        """One entry of a pair's metrics in comparison.json."""
        return cls(entry["axis"], tuple(entry["places"]), _paired(entry), _paired(entry["overall"]))


def _paired(entry: Mapping[str, Any]) -> Paired:
    arrays: dict[str, Any] = {key: np.array(entry[key], np.int64) for key in ("images", "left_out")}
    for key in ("first", "second", "difference", "ci95", "p", "q", "effect"):
        arrays[key] = np.array(entry[key], np.float64)
    return Paired(**arrays, interval=tuple(entry["interval"]))


@dataclass(frozen=True)
class OutputAgreement:
    """How often two subjects give the same top answer (with its Wilson interval), and the mean KL divergence from the first to
    the second in nats.

    None where it is not known; `reason` says why.
    """

    top1: float | None = None
    kl: float | None = None
    images: int = 0
    reason: str = ""
    top1_ci95: tuple[float, float] | None = None


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

    @classmethod
    def from_json(cls, entry: Mapping[str, Any]) -> CountDifference:
        """One entry of a pair's counts in comparison.json, with its undefined ends as NaN."""
        return cls(**{**entry, "ci95": tuple(np.array(entry["ci95"], np.float64).tolist())})


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

    def to_json(self) -> dict[str, Any]:
        """One entry of `pairs` in comparison.json."""
        content = plain(asdict(self))
        differences = content.pop("differences")
        return {**content, "metrics": {name: {**each.pop("paired"), **each} for name, each in differences.items()}}

    @classmethod
    def from_json(cls, entry: Mapping[str, Any]) -> Pair:
        """What `to_json` wrote."""
        agreement = entry["agreement"]
        ends = agreement.get("top1_ci95")
        return cls(
            **{key: entry[key] for key in ("first", "second", "images", "not_comparable")},
            differences={name: Difference.from_json(difference) for name, difference in entry["metrics"].items()},
            counts=tuple(CountDifference.from_json(count) for count in entry["counts"]),
            agreement=OutputAgreement(**{**agreement, "top1_ci95": ends and tuple(ends)}),
        )


@dataclass(frozen=True, repr=False)
class Comparison(Shown):
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
        """The summary of one subject, and for each of its names NAME_difference: less that of the first subject."""
        own, base = self.subjects[label].summary, self.subjects[self.first].summary
        differences: dict[str, float | int | None] = {}
        for name, value in own.items():
            other = base.get(name)
            differences[f"{name}_difference"] = None if value is None or other is None else value - other
        return {**own, **differences}

    def __getitem__(self, label: str) -> Findings:
        if label not in self.subjects:
            raise unknown("subject", label, self.subjects, "there are")
        return self.subjects[label]

    def _ipython_key_completions_(self) -> list[str]:
        return list(self.subjects)

    def frame(self) -> pd.DataFrame:
        """The content of comparison.csv: one row per pair of subjects, metric and block, and one of its mean over blocks.

        `place` is the block (of a pair of blocks the later one), blank for the mean. See METHODS for what the columns hold;
        `metric` also names NAME/kappa, and accuracy. An interval that was not taken is NaN.

        Example::

            table = comparison.frame()
            table[table.place.isna()][["second", "metric", "difference", "ci_low", "ci_high", "p"]]
        """
        import pandas as pd

        rows = []
        for pair in self.pairs:
            for name, difference in pair.differences.items():
                parts = ((difference.places, difference.paired), ((None,), difference.overall))
                for places, paired in parts:
                    rows += [
                        [pair.first, pair.second, name, difference.axis, *_row(paired, i, at)] for i, at in enumerate(places)
                    ]
        return pd.DataFrame(rows, columns=COLUMNS).astype({"place": "Int64"})

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
            "pairs": [pair.to_json() for pair in self.pairs],
        }

    @property
    def states(self) -> tuple[str, ...]:
        """Those of `compare`."""
        return ("subject-",)

    def write(self, inside: Path) -> None:
        """Write comparison.json, comparison.csv, and every subject's findings into subjects/LABEL, into an existing folder."""
        write_document(inside / FILE, self.to_json())
        self.frame().to_csv(inside / TABLE, index=False)
        folders = _folders(self.subjects)
        for label, findings in self.subjects.items():
            findings.save(inside / folders[label])

    @classmethod
    def load(cls, folder: str | Path) -> Comparison:
        """Read a comparison's folder back; OutputError where it is none or of another schema."""
        content = read_document(
            folder, FILE, schema=SCHEMA, refusal="is no comparison", command="compare", check=checks.comparison
        )
        subjects = {}
        for entry in content["subjects"]:
            subjects[entry["label"]] = findings = Findings.load(Path(folder) / entry["folder"])
            if entry.get("run") != findings.run.get("id"):
                raise OutputError(f"{Path(folder) / entry['folder']} is of another run than {FILE}: compare again")
        return cls(subjects, tuple(map(Pair.from_json, content["pairs"])), content["trajectory"], content["run"])


def _row(paired: Paired, i: int, place: int | None) -> list[Any]:
    """The columns of `frame` from `place` on."""
    numbers = [float(part[i]) for part in (paired.first, paired.second, paired.difference, *paired.ci95.T)]
    tested = [float(part[i]) for part in (paired.p, paired.q, paired.effect)]
    return [place, *numbers, paired.interval[i], *tested, int(paired.images[i]), int(paired.left_out[i])]


def _folders(labels: Iterable[str]) -> dict[str, str]:
    """A folder for each label that every file system takes, each another."""
    folders: dict[str, str] = {}
    for label in labels:
        name = re.sub(r"[^A-Za-z0-9._+-]+", "-", label).strip("-. ") or "subject"
        folder, number = f"{SUBJECT_FOLDER}/{name}", 2
        while folder.casefold() in map(str.casefold, folders.values()):
            folder, number = f"{SUBJECT_FOLDER}/{name}-{number}", number + 1
        folders[label] = folder
    return folders


def _subject(findings: Findings) -> dict[str, Any]:
    """One entry of `subjects` in comparison.json."""
    model, data, run = plain(findings.model), plain(findings.data), plain(findings.run)
    return {
        **{key: model.get(key) for key in SUBJECT_FACTS},
        **{key: data.get(key) for key in ("images", "names_sha256")},
        "run": run.get("id"),
        "notes": run.get("notes", []),
        **{key: run.get(key) for key in ("cost", "outputs")},
        "summary": plain(findings.summary),
    }
