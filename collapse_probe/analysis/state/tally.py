"""The state of a measurement: what the metrics add up, and what is kept of single images; it adds, and it can be stored."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from collapse_probe.analysis.state.ends import Ends
from collapse_probe.analysis.state.records import Lowest, Records, State, Table
from collapse_probe.data.coverage import Coverage
from collapse_probe.errors import StateError
from collapse_probe.metrics.accumulators import Accumulator
from collapse_probe.metrics.metric import Metric
from collapse_probe.results.findings import MetricResult
from collapse_probe.statistics.intervals import Array

LOGITS = "logits"
"""The column of records that holds the model's outputs."""


@dataclass
class Tally:
    """Sums by the key of their accumulator, and of single images what is worth keeping.

    `coverage` holds the places of all images that were read, those that could not be used (`skipped`, and `nonfinite`: left out
    because their activations are not finite, each with the place) too; `remarks` counts what was done to images besides
    decoding. `twin_pixels` are the images that untrained copies see, `glimpses` those of the gallery, `ends` those at both
    ends of the headline numbers. `seconds` is the time that it took. `no_logits` says why no outputs are kept.
    """

    accumulators: dict[Hashable, Accumulator]
    records: Records
    twin_pixels: Lowest[tuple[Tensor, ...]]
    glimpses: Lowest[tuple[Tensor, ...]]
    ends: dict[str, Ends] = field(default_factory=dict)
    coverage: Coverage = field(default_factory=Coverage)
    skipped: list[tuple[str, str]] = field(default_factory=list)
    nonfinite: list[tuple[str, str]] = field(default_factory=list)
    remarks: Counter[str] = field(default_factory=Counter)
    seconds: float = 0.0
    no_logits: str = ""

    @property
    def images(self) -> int:
        """How many images the numbers are of."""
        return self.records.seen

    def overlap(self, other: Tally, unnamed: str) -> str | None:
        """An image that both have seen; None where there is none among those that are known one by one.

        Images whose names begin with `unnamed` only show that they look alike, unless all of the other's do.
        """
        place = self.coverage.overlap(other.coverage)
        mine, others = (tally.records.names_below(min(self.records.reach, other.records.reach)) for tally in (self, other))
        twice = mine & others
        if twice != others:
            twice = {name for name in twice if not name.startswith(unnamed)}
        return min(twice) if twice else None if place is None else f"image number {place}"

    def merge(self, other: Tally) -> None:
        """Add what another measurement of the same kind has seen, of other images."""
        for key, accumulator in self.accumulators.items():
            accumulator.merge(other.accumulators[key])
        self.records.merge(other.records)
        self.twin_pixels.merge(other.twin_pixels)
        self.glimpses.merge(other.glimpses)
        for name, ends in other.ends.items():
            self.ends.setdefault(name, Ends()).merge(ends)
        self.coverage.merge(other.coverage)
        self.skipped += other.skipped
        self.nonfinite += other.nonfinite
        self.remarks += other.remarks
        self.seconds += other.seconds
        self.no_logits = self.no_logits or other.no_logits

    def state(self) -> State:
        """All tensors of it, by name."""
        parts: dict[str, State] = {f"sums/{i}": each.state_dict() for i, each in enumerate(self.accumulators.values())}
        parts |= {"records": self.records.state(), "twin": self.twin_pixels.state(), "gallery": self.glimpses.state()}
        parts |= {f"ends/{name}": ends.state() for name, ends in self.ends.items()}
        return {f"{part}/{name}": tensor.contiguous() for part, state in parts.items() for name, tensor in state.items()}

    def facts(self) -> dict[str, Any]:
        """The rest of it, in JSON types."""
        return {
            "images": self.images,
            "accumulators": [repr(key) for key in self.accumulators],
            "records": self.records.facts(),
            "ends": [*self.ends],
            "coverage": self.coverage.to_json(),
            "skipped": [list(each) for each in self.skipped],
            "nonfinite": [list(each) for each in self.nonfinite],
            "remarks": dict(self.remarks),
            "seconds": self.seconds,
            "no_logits": self.no_logits,
        }

    def load(self, state: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        """Take over what `state` and `facts` gave for a measurement of the same kind. Raises StateError for another's."""
        if facts["accumulators"] != [repr(key) for key in self.accumulators]:
            raise StateError("the state is of other metrics than those that are measured here")

        def part(name: str) -> State:
            return {key.removeprefix(f"{name}/"): tensor for key, tensor in state.items() if key.startswith(f"{name}/")}

        try:
            for i, accumulator in enumerate(self.accumulators.values()):
                accumulator.load_state_dict(part(f"sums/{i}"))
            self.records.load(part("records"), facts["records"])
            self.twin_pixels.load(part("twin"))
            self.glimpses.load(part("gallery"))
            for name in facts["ends"]:
                self.ends.setdefault(name, Ends()).load(part(f"ends/{name}"))
            self.coverage = Coverage.from_json(facts["coverage"])
        except (KeyError, IndexError, TypeError, ValueError, RuntimeError) as error:
            raise StateError(f"the state is damaged or incomplete ({type(error).__name__}: {error})") from error
        self.skipped = [(str(name), str(why)) for name, why in facts["skipped"]]
        self.nonfinite = [(str(name), str(why)) for name, why in facts["nonfinite"]]
        self.remarks = Counter(facts["remarks"])
        self.seconds, self.no_logits = float(facts["seconds"]), str(facts["no_logits"])


def columns_of(accumulators: Collection[Hashable], values: Mapping[Hashable, Mapping[str, Tensor]]) -> dict[str, Array]:
    """The per-image values of some accumulators as columns of `Records`."""
    columns = {}
    for i, key in enumerate(accumulators):
        for name, each in values.get(key, {}).items():
            columns[f"{i}/{name}"] = each.detach().cpu().double().numpy()
    return columns


def records_of(metric: Metric, accumulators: Iterable[Hashable], columns: Mapping[str, NDArray[Any]]) -> list[dict[str, Array]]:
    """The per-image values of the accumulators that a metric needs, by name."""
    place = {key: i for i, key in enumerate(accumulators)}
    found = []
    for key, _ in metric.accumulators():
        start = f"{place[key]}/"
        found.append({column.removeprefix(start): x for column, x in columns.items() if column.startswith(start)})
    return found


def result_of(metric: Metric, tally: Tally, columns: Mapping[str, NDArray[Any]]) -> MetricResult:
    """The metric's numbers from the sums, or why it has none."""
    reason = metric.inapplicable()
    if reason:
        return metric.not_applicable(reason)
    needed = [tally.accumulators[key] for key, _ in metric.accumulators()]
    return metric.compute(needed, records_of(metric, tally.accumulators, columns))


NULLS_BY_IMAGE = ("other_token", "other_head", "other_key")
"""The nulls that images.npz holds beside the values of neighbouring blocks; the last two for rows of maps."""


def image_table(
    metrics: Mapping[str, Metric], accumulators: Iterable[Hashable], names: Sequence[str], columns: Mapping[str, NDArray[Any]]
) -> dict[str, Any]:
    """What images.npz holds: the names, the per-image values of every metric that has some, and the nulls that are theirs."""
    table: dict[str, Any] = {"names": np.array(names, dtype=np.str_)}
    keys = list(accumulators)
    for name, metric in metrics.items():
        records = [] if metric.inapplicable() or not len(names) else records_of(metric, keys, columns)
        values = metric.per_image(records)
        if values is not None:
            table[name] = values
            of_values = [record for record in records if values is record.get("real")]
            kept = NULLS_BY_IMAGE if metric.settings.get("axis") == "row" else NULLS_BY_IMAGE[:1]
            table |= {f"{name}/{null}": record[null] for record in of_values for null in kept if null in record}
    return table


def table_of(metrics: Mapping[str, Metric], tally: Tally, table: Table) -> dict[str, Any]:
    """`image_table` of the images that are kept; NaN for those outside of the sample that a metric takes."""
    columns = dict(table.columns)
    for i, accumulator in enumerate(tally.accumulators.values()):
        if (inside := accumulator.of_sample(table.names)) is not None:
            own = [column for column in columns if column.startswith(f"{i}/")]
            columns |= {column: np.where(inside[:, None], columns[column], np.nan) for column in own}
    return image_table(metrics, tally.accumulators, table.names, columns)
