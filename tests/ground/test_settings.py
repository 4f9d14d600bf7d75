"""Settings: what words become, which names and values are refused, and that fixes and penalties refuse alike."""

from __future__ import annotations

import pytest

from collapse_probe.errors import SettingError
from collapse_probe.registry import FIXES, PENALTIES
from collapse_probe.settings import between, parse_keywords


def test_words_become_literals_or_text():
    words = ["a=1", " b =(1, 2)", "c=None", "d=layer", "e=x=y", "f="]
    expected = {"a": 1, "b": (1, 2), "c": None, "d": "layer", "e": "x=y", "f": ""}
    assert parse_keywords(words, "…") == expected
    assert parse_keywords([], "…") == {}


@pytest.mark.parametrize("word", ["a", "", "=1", "1a=2", "a b=1"])
def test_a_word_that_sets_nothing_is_named_with_the_whole_text(word):
    with pytest.raises(SettingError) as said:
        parse_keywords(["a=1", word], "re-attention:all of it")
    assert str(said.value) == f"'re-attention:all of it': expected NAME:SETTING=VALUE,…, came {word!r}"


def test_a_number_lies_between_two_and_is_no_truth_value():
    assert all(between(value, 0, 1) for value in (0, 1, 0.5))
    assert not any(between(value, 0, 1) for value in (-0.1, 1.1, True, False, "0.5", None, float("nan")))


@pytest.mark.parametrize(
    ("kind", "settings", "said"),
    [
        (FIXES["attn-scale"], {"nonsense": 1}, "attn-scale has no setting 'nonsense'; it has init"),
        (PENALTIES["patch-mixing"], {"nonsense": 1}, "patch-mixing has no setting 'nonsense'; it has form"),
        (FIXES["registers"], {"count": 0}, "registers: count must be a whole number from 1 up, not 0"),
        (FIXES["registers"], {"count": True}, "registers: count must be a whole number from 1 up, not True"),
        (PENALTIES["block-cosine"], {"pairs": 1.0}, "block-cosine: pairs must be a whole number from 1 up, not 1.0"),
        (FIXES["feat-scale"], {"multiplicity": True}, "feat-scale: multiplicity must be one of (1, 2), not True"),
        (PENALTIES["patch-cosine"], {"form": "x"}, "patch-cosine: form must be one of ('paper', 'repository'), not 'x'"),
        (FIXES["drop-attention"], {"p": 1}, "drop-attention: p must be a number in [0, 1), not 1"),
        (PENALTIES["gram-determinant"], {"epsilon": 0}, "gram-determinant: epsilon must be a number in (0, inf), not 0"),
    ],
)
def test_fixes_and_penalties_say_what_a_setting_must_be(kind, settings, said):
    with pytest.raises(SettingError) as refused:
        kind.with_settings(settings)
    assert str(refused.value) == said


def test_the_two_penalties_on_directions_move_the_same_metrics():
    moved = {level: PENALTIES["gram-determinant"](level=level).moves() for level in ("tokens", "attention", "weights")}
    assert moved == {
        "tokens": ("patch-diversity", "up"),
        "attention": ("head-similarity", "down"),
        "weights": ("hyperspherical-energy", "down"),
    }
    for level, expected in moved.items():
        assert PENALTIES["hyperspherical-separation"](level=level).moves() == expected
