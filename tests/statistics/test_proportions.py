"""Shares of images and their paired change against slow references and the exact distribution."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import optimize, stats

from collapse_probe.statistics.proportions import paired_shares, score, wilson


def answers(gained, lost, images):
    """Answers of both sides [images, 1] of which so many are right on one side alone."""
    first, second = np.ones((2, images, 1))
    first[:gained], second[gained : gained + lost] = 0.0, 0.0
    return first, second


def score_by_hand(gained, lost, images, difference):
    """The score with the shares that are likeliest at a given difference, found by search."""

    def unlikeliness(only_first):
        shares = only_first + difference, only_first, 1 - 2 * only_first - difference
        return -sum(n * np.log(p) for n, p in zip((gained, lost, images - gained - lost), shares, strict=True) if n)

    ends = max(0.0, -difference) + 1e-12, (1 - difference) / 2 - 1e-12
    lost_share = optimize.minimize_scalar(unlikeliness, bounds=ends, method="bounded", options={"xatol": 1e-13}).x
    return (gained - lost - images * difference) / np.sqrt(images * (2 * lost_share + difference - difference**2))


@pytest.mark.parametrize(
    ("gained", "lost", "images", "difference"), [(7, 2, 50, 0.05), (7, 2, 50, -0.1), (5, 0, 20, 0.3), (0, 3, 20, 0.1)]
)
def test_the_score_is_that_of_the_likeliest_shares(gained, lost, images, difference):
    ours = score(*(np.array(float(each)) for each in (gained, lost, images, difference)))
    assert ours == pytest.approx(score_by_hand(gained, lost, images, difference), abs=1e-5)


def test_without_a_discordant_image_the_ends_are_those_of_the_closed_form():
    z = stats.norm.ppf(0.975)
    for images in (1, 5, 20, 500):
        ((low, high),), (p,) = paired_shares(*answers(0, 0, images))
        assert (low, high) == pytest.approx((-(z**2) / (images + z**2), z**2 / (images + z**2)))
        assert p == 1.0


@pytest.mark.parametrize(("gained", "lost"), [(6, 1), (1, 9), (4, 0), (5, 1), (4, 4)])
def test_it_leaves_out_0_just_where_mcnemars_test_rejects(gained, lost):
    ((low, high),), (p,) = paired_shares(*answers(gained, lost, 30))
    assert p == pytest.approx(stats.chi2.sf((gained - lost) ** 2 / (gained + lost), 1))
    assert (p < 0.05) == (not low <= 0 <= high)
    assert -1 <= low <= (gained - lost) / 30 <= high <= 1


def test_undefined_answers_are_left_out():
    first, second = answers(3, 1, 12)
    whole = paired_shares(first, second)
    with_more = paired_shares(np.vstack([first, [[np.nan]]]), np.vstack([second, [[1.0]]]))
    np.testing.assert_array_equal(whole[0], with_more[0])
    assert np.isnan(np.concatenate([each.ravel() for each in paired_shares(first * np.nan, second)])).all()


def test_the_wilson_interval_of_every_answer_kept_is_not_certain():
    z = stats.norm.ppf(0.975)
    for trials in (1, 8, 100):
        assert wilson(trials, trials) == pytest.approx((trials / (trials + z**2), 1.0))


@pytest.mark.parametrize("images", [5, 8, 20, 50])
def test_the_interval_of_a_change_covers_by_the_exact_distribution(images):
    """Every number of gained and lost images with its probability: at least 0.92 wherever, 0.95 on average."""
    counts = [(b, c) for b in range(images + 1) for c in range(images + 1 - b)]
    columns = [answers(b, c, images) for b, c in counts]
    ends, _ = paired_shares(*(np.concatenate(side, axis=1) for side in zip(*columns, strict=True)))
    covered = []
    for gained, lost in [(a, b) for a in (0.005, 0.02, 0.1, 0.3, 0.5) for b in (0.005, 0.02, 0.1, 0.3, 0.5)]:
        shares = [gained, lost, max(1 - gained - lost, 0.0)]
        chance = stats.multinomial.pmf([[b, c, images - b - c] for b, c in counts], images, shares)
        covered.append(chance[(ends[:, 0] <= gained - lost + 1e-12) & (gained - lost - 1e-12 <= ends[:, 1])].sum())
    assert min(covered) > 0.92
    assert np.mean(covered) > 0.95
