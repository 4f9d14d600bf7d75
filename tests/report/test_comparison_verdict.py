"""What a comparison says: each rule is reached, and turned around by its numbers."""

from __future__ import annotations

import re

import numpy as np
import pytest
from factories import findings_of

from collapse_probe.analysis.comparison.pairing import pair_up
from collapse_probe.report.comparison.verdict import CASES, verdict_of_pair, verdicts
from collapse_probe.results.comparison import Comparison
from collapse_probe.results.rules import NOTABLE

IMAGES, PAIRS = 20, 4


def around(*values, spread=0.01, seed=0):
    """Per-image values around a mean for each pair of blocks, [images, pairs]."""
    return np.array(values) + np.random.default_rng(seed).normal(0, spread, (IMAGES, len(values)))


def said(first, second):
    return verdict_of_pair(pair_up(first, second, ("A", "B")), first, second)


def shared_null(*null, kappa, **facts):
    """Findings whose maps agree beyond the null by the given kappa, the same in every image."""
    token = around(*null, seed=1)
    return findings_of(token + np.array(kappa) * (1 - token) + around(*[0.0] * len(null), spread=0.003, seed=2), token, **facts)


PLAIN = [0.5] * PAIRS


def test_the_same():
    one = shared_null(*PLAIN, kappa=[0.1] * PAIRS)
    found = said(one, one)
    assert found.case == "same"
    assert found.sentences == (found.sentences[0],)
    assert "no difference between A and B" in found.sentences[0]
    assert "p = 1" in found.sentences[0]
    assert found.caveats == ()


def contrast(first_weights, second_weights, mixes=(False, True), twins=(0.9, 0.0), raw=0.0):
    first = findings_of(
        around(*[0.9] * PAIRS), around(*[0.9] * PAIRS, seed=3), weights=first_weights, mixes=mixes[0], twin=twins[0]
    )
    level = around(*[raw] * PAIRS, seed=4)
    second = findings_of(level, around(*[0.0] * PAIRS, seed=5), weights=second_weights, mixes=mixes[1], twin=twins[1])
    return said(first, second)


def test_a_contrast_of_two_untrained_models_is_no_evidence():
    found = contrast("random (seed 0)", "random (seed 1)")
    assert found.case == "without-training"
    assert "exists without any training" in found.sentences[0]
    assert "no evidence" in found.sentences[1]
    assert found.sentences[1].startswith("It comes from B mixing its maps")
    assert contrast("random (seed 0)", "random (seed 0)", mixes=(True, False)).sentences[1].startswith("It comes from A")


@pytest.mark.parametrize(
    ("changed", "case"),
    [
        ({"first_weights": "checkpoint"}, "architecture"),
        ({"first_weights": "checkpoint", "twins": (0.9, 0.8)}, "raw-only"),
        ({"mixes": (False, False)}, "raw-only"),
        ({"raw": 0.9, "twins": (0.9, 0.9)}, "blocks"),
    ],
)
def test_each_condition_of_that_sentence_matters(changed, case):
    facts = {"first_weights": "random (seed 0)", "second_weights": "random (seed 0)", **changed}
    assert contrast(**facts).case == case


def test_a_contrast_that_the_twins_show_comes_with_the_architecture():
    found = contrast("checkpoint", "checkpoint")
    assert found.case == "architecture"
    assert "not with what was learned" in found.sentences[0]


@pytest.mark.parametrize(("kappa", "word"), [(0.8, "more"), (-0.4, "less")])
def test_the_block_that_differs_most_is_named(kappa, word):
    one = shared_null(*PLAIN, kappa=[0.1] * PAIRS)
    other = shared_null(*PLAIN, kappa=[0.1, 0.1, kappa, 0.1])
    found = said(one, other)
    assert found.case == "blocks"
    assert f"B differs from A in block 3: block 3 attends {word} like block 2" in found.sentences[0]
    assert "q < 0.001" in found.sentences[0]
    assert "1 of 4 pairs" in found.sentences[0]


def test_a_raw_difference_that_the_null_explains():
    one = shared_null(*PLAIN, kappa=[0.1] * PAIRS)
    other = shared_null(*[0.9] * PAIRS, kappa=[0.1] * PAIRS)
    found = said(one, other)
    assert found.case == "raw-only"
    assert "not beyond what the chance level explains" in found.sentences[0]


def test_a_sure_but_small_difference_is_called_small():
    one = shared_null(*PLAIN, kappa=[0.10] * PAIRS)
    other = shared_null(*PLAIN, kappa=[0.10 + NOTABLE / 2] * PAIRS)
    found = said(one, other)
    assert found.case == "small"
    assert "4 of 4 differ at all" in found.sentences[0]


@pytest.mark.parametrize(("images", "case"), [(6, "too-few"), (60, "blocks")])
def test_a_block_that_so_few_images_show_only_by_itself_is_not_called_no_difference(images, case):
    rise, spread = np.linspace(-0.01, 0.01, images)[:, None], np.linspace(-0.09, 0.09, images)[:, None]
    one = findings_of(0.7 + rise * [1, 2, 3, 4], 0.6 + rise * [4, 3, 2, 1])
    rises = np.array([0.0, 0.0, 0.1, 0.0]) + spread * [0, 0, 1, 0]
    other = findings_of(0.7 + rises + rise * [1, -2, 3, 4], 0.6 + rise * [4, 3, -2, 1])
    found = said(one, other)
    assert found.case == case
    assert ("6 images are too few" in found.sentences[0] and "Block 3 differs most" in found.sentences[0]) or case == "blocks"
    assert "block 3" in found.sentences[0].lower()


def test_noise_is_no_difference():
    one = findings_of(around(*PLAIN, seed=1), around(*PLAIN, seed=2))
    other = findings_of(around(*PLAIN, seed=3), around(*PLAIN, seed=4))
    found = said(one, other)
    assert found.case == "none"
    assert "show no difference in κ" in found.sentences[0]


def test_caveats_name_untrained_subjects_and_images_left_out():
    one = shared_null(*PLAIN, kappa=[0.1] * PAIRS, weights="random (seed 0)")
    raw = around(*PLAIN, seed=3)
    raw[:7, 2] = np.nan
    found = said(one, findings_of(raw, around(*PLAIN, seed=4)))
    assert any("A is untrained" in caveat for caveat in found.caveats)
    assert any("at most 7 of 20" in caveat for caveat in found.caveats)
    assert any("another seed" in caveat for caveat in found.caveats)


def test_answers_of_models_are_told_where_they_are_known():
    label = [0, 1] * 10
    one = findings_of(around(*PLAIN, seed=1), around(*PLAIN, seed=2), top1=label, label=label)
    other = findings_of(around(*PLAIN, seed=3), around(*PLAIN, seed=4), top1=[0] * 20, label=label)
    text = " ".join(said(one, other).sentences)
    assert "accuracy 1.000 and 0.500" in text
    assert "same top answer on 50.0 %" in text
    bare = findings_of(around(*PLAIN, seed=3), around(*PLAIN, seed=4))
    assert "top answer" not in " ".join(said(one, bare).sentences)


def test_the_checkpoints_of_a_training_get_one_answer():
    steps = {f"epoch-{i}": shared_null(*PLAIN, kappa=[0.1 * i] * PAIRS) for i in range(4)}
    first = steps["epoch-0"]
    pairs = tuple(pair_up(first, f, ("epoch-0", label)) for label, f in steps.items() if f is not first)
    found = verdicts(Comparison(steps, pairs, True, {}))
    assert [a.case for a in found] == ["course"]
    assert found[0].sentences[0].startswith("From epoch-0 to epoch-3, over 4 checkpoints: κ")
    assert "→ 0.3" in found[0].sentences[0]
    assert len(verdicts(Comparison(steps, pairs, False, {}))) == 3


def test_every_case_has_a_name_and_no_sentence_shows_a_bare_nan():
    one = findings_of(np.full((1, 2), 0.5), np.full((1, 2), 0.4))
    other = findings_of(np.full((1, 2), 0.6), np.full((1, 2), 0.4))
    found = said(one, other)
    assert found.case in CASES
    assert not re.search(r"\bnan\b", " ".join(found.sentences))
