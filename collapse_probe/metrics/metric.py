"""What a metric is: which sums it needs from every batch, how it computes its numbers, and what a page says of it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from collapse_probe.capture.plan import Plan
from collapse_probe.capture.weights.matrices import Matrices
from collapse_probe.errors import SettingError
from collapse_probe.metrics.accumulators import Accumulator, Means
from collapse_probe.metrics.coverage import depth_neighbours
from collapse_probe.metrics.nulls import untrained_only
from collapse_probe.registry import METRICS
from collapse_probe.results.findings import Description, MetricResult
from collapse_probe.statistics.intervals import Array

LEVELS = ("attention", "tokens", "weights")
FAILURE_TYPES = {
    "depth": "attention maps alike across depth (attention collapse)",
    "tokens": "tokens alike within an image (over-smoothing, rank collapse)",
    "entropy": "rows that go to a single key (entropy collapse)",
}
BESIDE_TWIN = "The grey dashed line is the untrained copy, the same architecture with fresh parameters."
DOTS = f"One dot for each head; the line is the mean over heads with its 95 % interval over images. {BESIDE_TWIN}"
CURVE = f"The line is the mean over images with its 95 % interval. {BESIDE_TWIN}"
MATRICES = "No interval is drawn in a matrix; they are in findings.json."
Need = tuple[Hashable, Callable[[], Accumulator]]
"""The key that equal accumulators have in common, and how to make one."""
Record = Mapping[str, Array]
"""What a run kept of its images for one accumulator: values [images, …] by name."""


@dataclass(frozen=True)
class Variant:
    """What a suffix changes: settings, the title of the panel (empty: the suffix), the unit (empty: the metric's own)."""

    settings: Mapping[str, Any]
    panel: str = ""
    unit: str = ""


class Metric(ABC):
    """One metric with its settings, for one model's plan.

    A child states its nature in class attributes: `variants` by suffix (`@row`), `choices` the words that a setting may be,
    `title` to `reference` what `Description` holds, `level` attention, tokens or weights (as the three bases set it). The
    documentation shows `formula` (in LaTeX, of the plain metric), `value_range`, `source`, `traps` and the `failure_types` that
    it sees (keys of FAILURE_TYPES; none: it sees none of them by itself). It says
    which accumulators it needs (equal keys are shared between the metrics of a run). Where it needs one and is a mean over
    images, that is all: `quantity`, or the setting `quantity_from`, names which of the accumulator's means it is. Others
    override `compute`. `needs` names what a trace holds beside tokens, queries and keys: "values", "middles" (see `record`);
    or "matrices": `matrices`, the weights of every block, are there then before the first images.
    Every number is a function of the set of images, whatever their order and batches.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    dims: ClassVar[tuple[str, ...]]
    collapsed: ClassVar[str | None] = None
    level: ClassVar[str] = "other"
    title: ClassVar[str] = ""
    seen: ClassVar[str] = ""
    limits: ClassVar[str] = ""
    failure_types: ClassVar[tuple[str, ...]] = ()
    formula: ClassVar[str] = ""
    value_range: ClassVar[str] = ""
    source: ClassVar[str] = ""
    traps: ClassVar[str] = ""
    panel: ClassVar[str] = ""
    unit: ClassVar[str] = "value"
    top: ClassVar[float | None] = None
    logarithmic: ClassVar[bool] = False
    reference: ClassVar[tuple[str, str] | None] = None
    defaults: ClassVar[Mapping[str, Any]] = {}
    variants: ClassVar[Mapping[str, Variant]] = {}
    choices: ClassVar[Mapping[str, Collection[str]]] = {}
    quantity_from: ClassVar[str] = ""
    needs: frozenset[str] = frozenset()
    matrices: Matrices | None = None
    quantity: str = "value"

    def __init__(self, plan: Plan, **settings: Any) -> None:
        self.plan = plan
        self.suffixes: tuple[str, ...] = ()
        self.settings: dict[str, Any] = {**self.defaults, **settings}
        for setting, words in self.choices.items():
            if self.settings[setting] not in words:
                raise SettingError(f"{setting} must be one of {', '.join(words)}, not {self.settings[setting]!r}")
        if self.quantity_from:
            self.quantity = str(self.settings[self.quantity_from])

    @classmethod
    def describe(cls, *suffixes: str) -> Description:
        """What a page says of the metric with these suffixes. Scale and reference line are those of the plain unit alone."""
        variants = [cls.variants[suffix] for suffix in suffixes]
        unit = next((variant.unit for variant in variants if variant.unit), cls.unit)
        panels = [variant.panel or suffix for suffix, variant in zip(suffixes, variants, strict=True)]
        same = unit == cls.unit
        return Description(
            title=cls.title or cls.name,
            seen=cls.seen,
            limits=cls.limits,
            level=cls.level,
            panel="; ".join(panels) or cls.panel or cls.name,
            unit=unit,
            top=cls.top if same else None,
            logarithmic=cls.logarithmic and same,
            reference=cls.reference if same else None,
        )

    def inapplicable(self) -> str:
        """Why the metric has nothing to measure in this model; empty where it has."""
        return ""

    @property
    @abstractmethod
    def definition(self) -> str:
        """The exact definition under the current settings, with its source."""

    @abstractmethod
    def accumulators(self) -> Sequence[Need]:
        """The accumulators whose sums the metric needs."""

    def compute(self, accumulators: Sequence[Any], records: Sequence[Record]) -> MetricResult:
        """The numbers, after the last batch, from the accumulators and what was kept of the single images for each."""
        (means,) = accumulators
        facts = mean_over_images(means, self.quantity)
        return self.result(**facts, details=self.details(means), nulls=untrained_only())

    def details(self, accumulator: Any) -> dict[str, Any]:
        """What comes out besides the values."""
        return {}

    @property
    def neighbours(self) -> tuple[bool, ...]:
        """Whether each two consecutive blocks or depths of the metric are neighbours in depth."""
        return depth_neighbours(self.plan) if "depth" in self.dims else self.plan.adjacent

    def per_image(self, records: Sequence[Record]) -> Array | None:
        """Per-image values [images, …] for images.npz; None where the metric is no mean over images."""
        return records[0].get(self.quantity) if records else None

    def result(self, values: Array | None, **facts: Any) -> MetricResult:
        """A result with this metric's own facts filled in."""
        own: dict[str, Any] = {"settings": self.settings, "collapsed": self.collapsed}
        own["description"] = self.describe(*self.suffixes)
        own["adjacent"] = () if values is None or all(self.neighbours) else self.neighbours
        return MetricResult(dims=self.dims, definition=self.definition, values=values, **{**own, **facts})

    def not_applicable(self, reason: str) -> MetricResult:
        """The result of a metric that does not apply."""
        return self.result(None, not_applicable=reason)


def of_level(*levels: str) -> tuple[str, ...]:
    """The plain metrics of some levels ("all" for every one), in the order of the table."""
    asked = [level for level in (*LEVELS, "other") if level in levels or "all" in levels]
    return tuple(name for level in asked for name, kind in METRICS.items() if kind.level == level)


def extras_of(metrics: Mapping[str, Metric]) -> dict[str, bool]:
    """What a trace must hold for these metrics beside tokens, queries and keys, as `record` takes it."""
    asked = {name for metric in metrics.values() if not metric.inapplicable() for name in metric.needs}
    return {name: name in asked for name in ("values", "middles")}


def make(name: str, plan: Plan) -> Metric:
    """The metric called `name`, with the settings of its suffixes: `attention-similarity@row@centred`."""
    base, *suffixes = name.split("@")
    kind = METRICS[base]
    settings: dict[str, Any] = {}
    for suffix in suffixes:
        if suffix not in kind.variants:
            known = ", ".join(f"@{s}" for s in kind.variants) or "none"
            raise SettingError(f"{base} has no variant @{suffix}; it has {known}")
        settings |= kind.variants[suffix].settings
    metric: Metric = kind(plan, **settings)
    metric.suffixes = tuple(suffixes)
    return metric


def mean_over_images(means: Means, quantity: str = "value") -> dict[str, Array]:
    """values, stderr and ci95 of a quantity, as a MetricResult takes them."""
    mean, stderr, _ = means.mean(quantity)
    return {"values": mean, "stderr": stderr, "ci95": means.bounds(quantity)}
