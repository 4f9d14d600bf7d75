"""The difference of two subjects' counts of similar blocks, from what findings hold of single images."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
from factories import findings_of

from collapse_probe.analysis.comparison.pairing import count_differences
from collapse_probe.results.findings import MetricResult
from collapse_probe.statistics.intervals import count_difference_bounds, mean_parts, parts_interval
from collapse_probe.statistics.kappa import PairMoments, kappa, kappa_interval, kappa_parts

IMAGES = 20
THRESHOLDS = [0.8, 0.9, 0.95]


def counted(raw, null, corrected=True):
    """Findings with counts of similar blocks as well."""
    found = findings_of(raw, null)
    real, token = np.mean(raw, 0), np.mean(null, 0)
    counts = np.array([(real > t).sum() for t in THRESHOLDS], dtype=np.float64)
    result = MetricResult(("threshold",), "", counts, settings={"thresholds": THRESHOLDS})
    if corrected:
        value = float((kappa(real, token) > 0.5).sum())
        result = replace(result, details={"corrected": {"kappa_above": 0.5, "value": value}})
    return replace(found, metrics={**found.metrics, "similar-blocks": result})


def around(means, seed, spread=0.01):
    return np.asarray(means) + np.random.default_rng(seed).normal(0, spread, (IMAGES, len(means)))


FIRST = around([0.9, 0.76, 0.85, 0.96], 0), around([0.6] * 4, 1)
SECOND = around([0.93, 0.91, 0.84, 0.5], 2), around([0.6] * 4, 3)


def test_each_threshold_and_the_corrected_count_have_their_own_interval():
    found = count_differences(counted(*FIRST), counted(*SECOND), ["similar-blocks", "attention-similarity"])
    assert [(c.name, c.threshold) for c in found] == [
        ("similar-blocks", 0.8),
        ("similar-blocks", 0.9),
        ("similar-blocks", 0.95),
        ("similar-blocks/kappa", 0.5),
    ]
    assert [(c.first, c.second) for c in found[:3]] == [(3, 3), (FIRST[0].mean(0).__gt__(0.9).sum(), 2), (1, 0)]
    for count in found[:3]:
        numbers = [mean_parts(real) for real, _ in (FIRST, SECOND)]
        ends = count_difference_bounds(*((each, partial(parts_interval, each)) for each in numbers), count.threshold)
        assert count.ci95 == tuple(ends)
    kappas = ((kappa_parts(*side), partial(kappa_interval, PairMoments.of(*side))) for side in (FIRST, SECOND))
    assert found[3].ci95 == tuple(count_difference_bounds(*kappas, 0.5))
    for count in found:
        assert count.ci95[0] <= count.second - count.first <= count.ci95[1]


def test_the_same_findings_differ_by_nothing():
    one = counted(*FIRST)
    assert {c.ci95 for c in count_differences(one, one, ["similar-blocks"])} == {(0.0, 0.0)}


def test_without_single_images_or_with_one_the_ends_are_undefined():
    one, other = counted(*FIRST), counted(*SECOND)
    bare = replace(other, images={"names": other.images["names"]})
    alone = [counted(real[:1], null[:1]) for real, null in (FIRST, SECOND)]
    for pair in ((one, bare), (bare, one), alone, (alone[0], alone[0])):
        assert np.isnan([c.ci95 for c in count_differences(*pair, ["similar-blocks"])]).all()


@pytest.mark.parametrize("drop", ["first", "second"])
def test_without_the_null_the_corrected_count_alone_is_undefined(drop):
    pair = {"first": counted(*FIRST), "second": counted(*SECOND)}
    held = {key: values for key, values in pair[drop].images.items() if not key.endswith("/other_token")}
    pair[drop] = replace(pair[drop], images=held)
    *raw, corrected = count_differences(pair["first"], pair["second"], ["similar-blocks"])
    assert np.isfinite([c.ci95 for c in raw]).all()
    assert np.isnan(corrected.ci95).all()


def test_a_count_that_was_not_corrected_is_not_compared_corrected():
    found = count_differences(counted(*FIRST), counted(*SECOND, corrected=False), ["similar-blocks"])
    assert [c.name for c in found] == ["similar-blocks"] * 3


def test_subjects_of_different_depth_are_counted():
    deep = around([0.99] * 7, 5), around([0.5] * 7, 6)
    first = around([0.5] * 4, 7), around([0.4] * 4, 8)
    assert {c.ci95 for c in count_differences(counted(*first), counted(*deep), ["similar-blocks"])} == {(7.0, 7.0)}
