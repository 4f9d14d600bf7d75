"""The intervals of the numbers that rules are about: nulls and twins count with their own sampling error."""

from __future__ import annotations

import numpy as np
import pytest

from collapse_probe.results.findings import Findings, MetricResult, Nulls
from collapse_probe.results.outcomes import READERS, outcome
from collapse_probe.results.quantities import NO_INTERVAL_OF_NULL, ONE_SIDE, TWIN_EXACT, chance_of_weights
from collapse_probe.results.rules import BY_NAME

BLOCKS = 3
ROW, COLUMN = "attention-similarity@row", "attention-similarity"


def findings(metrics, images=20):
    return Findings(model={"weights": "made by hand"}, data={"images": images}, run={}, metrics=metrics, summary={})


def around(values, reach):
    values = np.asarray(values, dtype=np.float64)
    return np.stack([values - reach, values + reach], axis=-1)


def reading(values, reach, nulls, ci95=None, dims=("depth",)):
    values = np.asarray(values, dtype=np.float64)
    held = Nulls({name: np.asarray(v, dtype=np.float64) for name, v in nulls.items()}, {}, ci95=ci95 or {})
    return MetricResult(dims, "", values, stderr=values * 0, ci95=around(values, reach), nulls=held)


def square(value):
    return np.full((BLOCKS, BLOCKS), value)


def rows(row=0.9, head=0.4, row_reach=0.05, head_reach=None):
    """Query-independent maps whose rows agree at `row`, those of different heads at `head`."""
    ci95 = {} if head_reach is None else {"other_head": around(square(head), head_reach)}
    pair = ("block", "block")
    return findings(
        {
            COLUMN: reading(square(0.99), 0, {"other_token": square(0.99)}, dims=pair),
            ROW: reading(square(row), row_reach, {"other_head": square(head)}, ci95, pair),
        }
    )


def last(value, reach, fresh, fresh_reach=None, metric="patch-diversity"):
    ci95 = {} if fresh_reach is None else {"untrained": around([7.0, fresh], fresh_reach)}
    return findings({metric: reading([7.0, value], reach, {"untrained": [7.0, fresh]}, ci95)})


def test_the_wrong_head_null_has_its_interval():
    found = READERS["same-everywhere"](rows(head=0.985, head_reach=0.002), ROW)
    assert found.ci95[:, 0] == pytest.approx([0.983] * 2)
    assert found.ci95[:, 1] == pytest.approx([0.987] * 2)
    assert found.note == ""
    answers = [outcome(BY_NAME["same-everywhere"], rows(head=0.985, head_reach=r)).answer for r in (0.002, 0.01, np.nan)]
    assert answers == ["yes", "undecided", "undecided"]


def test_the_wrong_token_null_has_its_interval_without_the_single_images():
    pair = ("block", "block")
    ci95 = {"other_token": around(square(0.905), 0.01)}
    given = findings({COLUMN: reading(square(0.99), 0, {"other_token": square(0.905)}, ci95, pair)})
    assert READERS["columns-alike"](given, COLUMN).ci95[:, 0] == pytest.approx([0.895] * 2)
    assert outcome(BY_NAME["columns-alike"], given).answer == "undecided"


def test_chance_of_the_weights_is_measured_by_the_shares_below_zero():
    shares = np.array([[9.0, 9.0, 9.0], [-0.2, 9.0, 9.0], [0.9, 0.1, 9.0]])
    assert chance_of_weights(shares) == pytest.approx(np.tanh(4 * np.arctanh(0.2)))
    assert chance_of_weights(np.abs(shares)) == 0
    shares[2] = [-3.0, np.nan, 9.0]
    assert chance_of_weights(shares) == pytest.approx(np.tanh(4 * np.sqrt((np.arctanh(0.2) ** 2 + np.arctanh(0.99) ** 2) / 2)))


@pytest.mark.parametrize(("elsewhere", "answer"), [(0.3, "yes"), (-0.1, "yes"), (-0.3, "undecided")])
def test_a_share_within_chance_of_the_weights_is_undecided(elsewhere, answer):
    shares = square(elsewhere)
    shares[1, 0] = 0.7
    nulls = {"other_token": square(0.0), "kappa": shares}
    found = outcome(BY_NAME["shared"], findings({COLUMN: reading(shares, 0.01, nulls, dims=("block", "block"))}))
    assert found.answer == answer
    assert ("chance agreement of the parameters reaches 0.8" in found.reason) == (answer == "undecided")


def test_rows_beyond_the_heads_count_both_errors():
    exact = READERS["shared-row"](rows(), ROW)
    assert exact.note == ONE_SIDE
    assert exact.ci95[:, 1] - exact.values == pytest.approx([0.05 / 0.6] * 2)
    both = READERS["shared-row"](rows(head_reach=0.3), ROW)
    by_row, by_head = 1 / (1 - 0.4), (1 - 0.9) / (1 - 0.4) ** 2  # derivatives of (r − h)/(1 − h)
    assert both.values == pytest.approx([0.5 / 0.6] * 2)
    assert both.ci95[:, 1] - both.values == pytest.approx([np.hypot(by_row * 0.05, by_head * 0.3)] * 2)
    assert both.note == ""


def test_a_quotient_with_the_twin_counts_both_errors():
    rule = "less-diverse-than-untrained"
    exact = READERS[rule](last(0.3, 0.06, 0.8), "patch-diversity")
    assert (exact.ci95[:, 0], exact.ci95[:, 1]) == (pytest.approx([0.3]), pytest.approx([0.45]))
    assert exact.note == TWIN_EXACT
    both = READERS[rule](last(0.3, 0.06, 0.8, 0.2), "patch-diversity")
    assert both.note == ""
    for end in both.ci95[0]:
        assert abs(0.3 - end * 0.8) == pytest.approx(np.hypot(0.06, end * 0.2))
    assert both.ci95[0, 0] < exact.ci95[0, 0] < exact.ci95[0, 1] < both.ci95[0, 1]


def test_a_difference_from_the_twin_counts_both_errors():
    both = READERS["outlier-tokens"](last(0.05, 0.03, 0.01, 0.04, "token-norm@outliers"), "token-norm@outliers")
    assert (both.ci95[:, 0], both.ci95[:, 1]) == (pytest.approx([-0.01]), pytest.approx([0.09]))
    exact = READERS["outlier-tokens"](last(0.05, 0.03, 0.01, None, "token-norm@outliers"), "token-norm@outliers")
    assert (exact.ci95[:, 0], exact.ci95[:, 1]) == (pytest.approx([0.01]), pytest.approx([0.07]))
    assert exact.note == TWIN_EXACT


@pytest.mark.parametrize(
    ("fresh_reach", "answer"), [(None, "yes"), (0.02, "yes"), (0.3, "undecided"), (0.9, "undecided"), (np.nan, "undecided")]
)
def test_a_twin_that_is_not_sure_leaves_the_comparison_undecided(fresh_reach, answer):
    assert outcome(BY_NAME["less-diverse-than-untrained"], last(0.3, 0.02, 0.8, fresh_reach)).answer == answer


def test_findings_stored_before_the_intervals_are_judged_by_their_values():
    found = outcome(BY_NAME["same-everywhere"], rows(head=0.99))
    assert found.answer == "yes"
    assert NO_INTERVAL_OF_NULL in found.reason
    assert TWIN_EXACT in outcome(BY_NAME["less-diverse-than-untrained"], last(0.3, 0.02, 0.8)).reason
