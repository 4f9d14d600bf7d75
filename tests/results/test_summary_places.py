"""Every mean of a summary is that of its places, and is said to be of the metric that it comes from."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from factories import small_vit

import collapse_probe as cp
from collapse_probe.analysis.measurement import DEFAULT_METRICS
from collapse_probe.results.findings import Description, MetricResult
from collapse_probe.results.summary.places import MEANS, extreme
from collapse_probe.results.summary.thresholds import METRIC_OF


@pytest.fixture(scope="module")
def measured():
    """Findings of a small ViT with a metric of the weights and one over pairs of it."""
    images = torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    metrics = (*DEFAULT_METRICS, "weight-rank", "weight-similarity")
    return cp.analyze(small_vit(depth=3), [images], metrics=metrics, null_images=0)


def test_each_number_of_a_metric_alone_is_said_to_be_of_it(measured):
    images = torch.randn(3, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    for metric in DEFAULT_METRICS:
        alone = cp.analyze(small_vit(depth=2), [images], metrics=metric, null_images=0).summary
        stated = {name for name, of in METRIC_OF.items() if of == metric}
        bounds = {f"{name}_ci_{end}" for name in stated for end in ("low", "high")}
        assert stated <= set(alone) <= stated | bounds | {"images"}
    assert set(MEANS) <= set(METRIC_OF)


def test_the_lowest_and_the_highest_place_enclose_every_mean(measured):
    means = [name for name in measured.summary if name in MEANS or name.startswith("weight_")]
    assert len(means) > 15
    for name in means:
        low, high = (extreme(measured.metrics, name, sign) for sign in "<>")
        assert low.value - 1e-12 <= measured.summary[name] <= high.value + 1e-12, name
        assert low.words


def test_places_are_named_as_their_metric_counts_them(measured):
    entropy = measured["attention-entropy"].details["share"]
    block, head = np.unravel_index(np.argmin(entropy), np.shape(entropy))
    found = extreme(measured.metrics, "attention_entropy_share", "<=")
    assert (found.block, found.head, found.words) == (block, head, f"in block {block}, head {head}")
    later = int(np.argmax(measured.matrix("attention-similarity")[[1, 2], [0, 1]])) + 1
    found = extreme(measured.metrics, "attention_similarity_adjacent", ">")
    assert (found.block, found.head, found.words) == (later, None, f"between blocks {later - 1} and {later}")
    assert extreme(measured.metrics, "patch_diversity_last", "<").words == "after block 2"
    assert extreme(measured.metrics, "weight_rank_mean", "<").words.startswith("in block ")
    end, mean = (extreme(measured.metrics, f"attention_entropy_mean{end}", ">") for end in ("_ci_low", ""))
    assert end == mean


@pytest.mark.parametrize(
    ("name", "sign"), [("images", "<"), ("similar_blocks", ">"), ("nonsense", ">"), ("attention_entropy_share", "==")]
)
def test_what_is_no_mean_over_places_has_no_place(measured, name, sign):
    assert extreme(measured.metrics, name, sign) is None


def test_undefined_places_are_passed_over():
    values = np.array([[0.2, np.nan], [np.nan, 0.1]])
    result = MetricResult(("block", "head"), "", values, details={"share": values}, description=Description(level="attention"))
    assert extreme({"attention-entropy": result}, "attention_entropy_share", "<").words == "in block 1, head 1"
    nothing = MetricResult(("block", "head"), "", None, not_applicable="signed maps")
    assert extreme({"attention-entropy": nothing}, "attention_entropy_share", "<") is None
