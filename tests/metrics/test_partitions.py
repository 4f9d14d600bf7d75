"""Every number of a measurement follows from the set of images alone: any batches, parts, order and merging give the same."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from padded_models import KINDS, model_and_plan, trace_of
from safetensors.torch import load, save

from collapse_probe.metrics.metric import make
from collapse_probe.metrics.presets import PRESETS, with_presets
from collapse_probe.registry import METRICS
from collapse_probe.results.findings import result_to_json

OF_IMAGES = [name for name, kind in METRICS.items() if kind.level != "weights"]
VARIANTS = [f"{name}@{suffix}" for name in OF_IMAGES for suffix in METRICS[name].variants]
NAMES = [name for name in with_presets([*OF_IMAGES, *VARIANTS], PRESETS) if name.split("@")[0] in OF_IMAGES]
BUDGETS = {"whole maps": 2**22, "some heads": 1500, "some rows": 200}
SAMPLING = ("collapse_probe.metrics.pairwise_cosine", "collapse_probe.metrics.attention.distance_from_image_mean")
TOLERANCE = 1e-9


def name_of(number):
    return f"folder {number % 3}/image {number}"


class Part:
    """The sums and per-image records of some of the images."""

    def __init__(self, metrics):
        needs = dict(need for metric in metrics.values() if not metric.inapplicable() for need in metric.accumulators())
        self.metrics = metrics
        self.sums = {key: build() for key, build in needs.items()}
        self.records = {key: {} for key in needs}

    def add(self, kind, numbers, budget):
        trace, names = trace_of(kind, numbers), [*map(name_of, numbers)]
        for accumulator in self.sums.values():
            accumulator.start_batch(trace, names)
        for tile in trace.tiles(budget):
            for accumulator in self.sums.values():
                accumulator.take(tile)
        for key, accumulator in self.sums.items():
            for name, values in accumulator.end_batch(trace).items():
                rows = values.double().numpy()
                self.records[key].setdefault(name, {}).update(zip(names, rows, strict=True))

    def stored(self):
        """The same after all went through a file."""
        again = Part(self.metrics)
        again.records = self.records
        for key, accumulator in self.sums.items():
            again.sums[key].load_state_dict(load(save(accumulator.state_dict())))
        return again

    def merge(self, other):
        for key, accumulator in self.sums.items():
            accumulator.merge(other.sums[key])
            for name, rows in other.records[key].items():
                self.records[key].setdefault(name, {}).update(rows)

    def results(self):
        """Every number of every metric, by metric and place."""
        found = {}
        for metric_name, metric in self.metrics.items():
            if metric.inapplicable():
                continue
            keys = [key for key, _ in metric.accumulators()]
            records = [
                {name: np.stack([rows[image] for image in sorted(rows)]) for name, rows in self.records[key].items()}
                for key in keys
            ]
            result = metric.compute([self.sums[key] for key in keys], records)
            found |= dict(numbers(result_to_json(result), metric_name))
        return found


def numbers(value, place):
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from numbers(inner, f"{place}.{key}")
    elif isinstance(value, (list, tuple)):
        for i, inner in enumerate(value):
            yield from numbers(inner, f"{place}[{i}]")
    else:
        yield place, value


def metrics_of(kind, names=NAMES):
    return {name: make(name, model_and_plan(kind)[1]) for name in names}


def differing(found, expected):
    """The places at which two sets of results differ."""
    assert found.keys() == expected.keys()

    def same(one, other):
        if isinstance(one, float) and isinstance(other, float):
            return math.isclose(one, other, rel_tol=TOLERANCE, abs_tol=TOLERANCE) or (math.isnan(one) and math.isnan(other))
        return one == other

    return [(place, found[place], value) for place, value in expected.items() if not same(found[place], value)]


@st.composite
def partitions(draw, most_images, most_batches):
    """A number of images; and these in any order, in parts of batches, each through a file or not and with its place."""
    count = draw(st.integers(1, most_images))
    order = draw(st.permutations(range(count)))
    cuts = sorted(draw(st.sets(st.integers(1, count), max_size=most_batches - 1)) | {count})
    parts = []
    for first, last in itertools.pairwise([0, *cuts]):
        if not parts or draw(st.booleans()):
            parts.append(([], draw(st.booleans()), draw(st.integers(0, 9))))
        parts[-1][0].append(order[first:last])
    return count, parts


def check(kind, budget, partition, names=NAMES):
    count, parts = partition
    metrics = metrics_of(kind, names)
    whole = Part(metrics)
    whole.add(kind, list(range(count)), budget)
    merged = []
    for batches, through_file, place in parts:
        part = Part(metrics)
        for batch in batches:
            part.add(kind, batch, budget)
        merged.insert(place % (len(merged) + 1), part.stored() if through_file else part)
    while len(merged) > 1:
        first = merged.pop(len(merged) // 2)
        merged[len(merged) // 3].merge(first)
    assert not (wrong := differing(merged[0].results(), whole.results())), f"{len(wrong)} differ: {wrong[:5]}"


FACTS = {"deadline": None, "derandomize": True, "database": None, "suppress_health_check": [*HealthCheck]}


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=2, phases=[Phase.generate], **FACTS)
@given(partitions(most_images=11, most_batches=3))
def test_all_metrics_of_any_partition_are_those_of_one_pass(kind, partition):
    check(kind, BUDGETS["whole maps"], partition)


@pytest.fixture(params=[False, True], ids=["all tokens", "sampled tokens"])
def sampled(request, monkeypatch):
    """Sums over images of all tokens' vectors, or of a seeded sample of them."""
    if request.param:
        for module in SAMPLING:
            monkeypatch.setattr(f"{module}.STATE_BUDGET", 1)
            monkeypatch.setattr(f"{module}.SAMPLED_TOKENS", 3)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("budget", BUDGETS)
@settings(max_examples=6, **FACTS)
@given(partitions(most_images=40, most_batches=12))
def test_all_metrics_of_many_partitions_are_those_of_one_pass(kind, budget, sampled, partition):
    check(kind, BUDGETS[budget], partition)


@pytest.mark.parametrize("kind", ["plain", "mixed"])
def test_counts_of_similar_blocks_are_of_all_images_though_few_are_kept_one_by_one(kind):
    metric = make("similar-blocks", model_and_plan(kind)[1])
    part = Part({"similar-blocks": metric})
    part.add(kind, list(range(24)), BUDGETS["whole maps"])
    (key,) = part.sums
    records = {name: np.stack([*rows.values()]) for name, rows in part.records[key].items()}
    some = {name: rows[:6] for name, rows in records.items()}
    sums = [part.sums[key]]
    whole, sampled, alone = (metric.compute(sums, kept) for kept in ([records], [some], [{}]))
    for found in (sampled, alone):
        assert found.values.tolist() == whole.values.tolist()
        assert found.ci95.tolist() == whole.ci95.tolist()
        assert found.details == whole.details
    adjacent = records["real"].mean(0)
    adjacent = adjacent[np.isfinite(adjacent)]
    assert whole.values.tolist() == [(adjacent > threshold).sum() for threshold in metric.settings["thresholds"]]
    assert whole.details["pairs"] == len(adjacent)
    assert np.isnan(alone.stderr).all()
    half = Part({"similar-blocks": metric})
    half.add(kind, list(range(6)), BUDGETS["whole maps"])
    expected = metric.compute([half.sums[key]], [some]).stderr / 2
    assert sampled.stderr.tolist() == pytest.approx(expected.tolist())
