"""What a metric is: which sums it needs from every batch, and how it reads its numbers off them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Mapping
from typing import Any, ClassVar

from collapse_probe.capture.plan import Plan
from collapse_probe.errors import SettingError
from collapse_probe.metrics.accumulators import Accumulator, Means
from collapse_probe.registry import METRICS
from collapse_probe.results.findings import Description, MetricResult
from collapse_probe.statistics.intervals import Array, interval

LEVELS = ("attention", "tokens", "weights")
Need = tuple[Hashable, Callable[[], Accumulator]]


class Metric(ABC):
    """One metric with its settings, for one model's plan.

    A child states its nature in class attributes, says which folds it needs (equal keys are shared between the metrics
    of a run) and reads a `Reading` off them. `variants` maps a suffix such as `row` to the settings that it changes. A metric
    whose number depends on which images come near one another (minibatches) says that not `any_order` will do: a run then
    reads the images in a random order. `level` is "attention", "tokens" or "weights", by default the folder in which the
    metric's file lies.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    dims: ClassVar[tuple[str, ...]]
    collapsed: ClassVar[str | None] = None
    variants: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    defaults: ClassVar[Mapping[str, Any]] = {}
    any_order: ClassVar[bool] = True
    level: ClassVar[str] = ""

    def __init__(self, plan: Plan, **settings: Any) -> None:
        self.plan = plan
        self.settings: dict[str, Any] = {**self.defaults, **settings}

    def inapplicable(self) -> str:
        """Why the metric has nothing to measure in this model; empty where it has."""
        return ""

    @property
    @abstractmethod
    def definition(self) -> str:
        """The exact definition under the current settings, with its source."""

    @abstractmethod
    def needs(self) -> dict[str, Need]:
        """The folds that the metric reads: a key that tells equal folds, and how to make one."""

    @abstractmethod
    def read(self, folds: Mapping[str, Any], records: Mapping[str, Mapping[str, Array]]) -> MetricResult:
        """The numbers, after the last batch; `records` holds the per-image values of each fold."""

    def per_image(self, records: Mapping[str, Mapping[str, Array]]) -> Array | None:
        """Per-image values [images, …] for images.npz; None where the metric is no mean over images."""
        return None

    def reading(self, values: Array | None, **facts: Any) -> MetricResult:
        """A result with this metric's own facts filled in."""
        common: dict[str, Any] = {
            "settings": self.settings,
            "collapsed": self.collapsed,
            "description": Description(level=level_of(type(self))),
        }
        return MetricResult(dims=self.dims, definition=self.definition, values=values, **{**common, **facts})

    def refused(self, reason: str) -> MetricResult:
        """The Reading of a metric that does not apply."""
        return self.reading(None, not_applicable=reason)


def level_of(kind: type[Metric]) -> str:
    """The level that a metric belongs to: its own `level`, or the folder of its family that its file is in, or else "other"."""
    folder = kind.__module__.split(".")[-2:][0]
    return kind.level or (folder if folder in LEVELS else "other")


def of_level(*levels: str) -> tuple[str, ...]:
    """The plain metrics of some levels ("all" for every one), in the order of the table."""
    wanted = [level for level in (*LEVELS, "other") if level in levels or "all" in levels]
    return tuple(name for level in wanted for name, kind in METRICS.items() if level_of(kind) == level)


def make(name: str, plan: Plan) -> Metric:
    """The metric called `name`, with the settings of its suffixes: `attention-similarity@row@centred`."""
    base, *suffixes = name.split("@")
    kind = METRICS[base]
    settings: dict[str, Any] = {}
    for suffix in suffixes:
        if suffix not in kind.variants:
            known = ", ".join(f"@{s}" for s in kind.variants) or "none"
            raise SettingError(f"{base} has no variant @{suffix}; it has {known}")
        settings |= kind.variants[suffix]
    metric: Metric = kind(plan, **settings)
    return metric


def mean_over_images(fold: Means, name: str = "value") -> dict[str, Array]:
    """values, stderr and ci95 of a quantity, as a Reading takes them."""
    mean, stderr, n = fold.mean(name)
    return {"values": mean, "stderr": stderr, "ci95": interval(mean, stderr, n)}


def no_token_maps(plan: Plan) -> str:
    """Why attention maps cannot be compared token by token; empty where those of some blocks can."""
    if plan.token_layers:
        return ""
    reasons = dict.fromkeys(plan.layers[i].reason for i in plan.map_layers)
    return "no block has attention between all of an image's tokens: " + "; ".join(reasons)
