"""Thresholds: the grammar, what is undefined, and that nothing is ever run."""

from __future__ import annotations

import pytest
from collapse_probe.cli.fail_on import read

from collapse_probe.errors import SettingError

NUMBERS = {"similar_blocks": 5, "similar_blocks_corrected": 2, "kappa_adjacent": 0.25, "accuracy": None, "images": 64}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("similar_blocks > 4", True),
        ("similar_blocks > 5", False),
        ("similar_blocks >= 5", True),
        ("similar_blocks == 5 and kappa_adjacent < 0.3", True),
        ("similar_blocks != 5 or kappa_adjacent <= 0.25", True),
        ("not similar_blocks < 5", True),
        ("not (similar_blocks > 4 and images < 10)", True),
        ("0.2 < kappa_adjacent < 0.3", True),
        ("0.2 < kappa_adjacent < 0.21", False),
        ("similar_blocks - similar_blocks_corrected > 2", True),
        ("similar_blocks_corrected / similar_blocks >= 0.4", True),
        ("-kappa_adjacent * 2 + 1 == +0.5", True),
        ("similar_blocks > 1 + 2 * 3", False),
        ("similar_blocks > (1 + 2) * 3 or images == 64", True),
    ],
)
def test_what_it_says(text, expected):
    outcome = read(text).check(NUMBERS)
    assert outcome.holds is expected
    assert outcome.tripped is expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("accuracy < 0.5", None),
        ("not accuracy < 0.5", None),
        ("accuracy + 1 > 0", None),
        ("accuracy < 0.5 and similar_blocks > 4", None),
        ("accuracy < 0.5 and similar_blocks > 9", False),
        ("accuracy < 0.5 or similar_blocks > 4", True),
        ("accuracy < 0.5 or similar_blocks > 9", None),
        ("images > 100 > accuracy", False),
        ("similar_blocks / (images - 64) > 1", None),
    ],
)
def test_an_undefined_number_decides_nothing_and_trips(text, expected):
    outcome = read(text).check(NUMBERS)
    assert outcome.holds is expected
    assert outcome.tripped is (expected is not False)


def test_nan_is_undefined():
    assert read("x > 0").check({"x": float("nan")}).holds is None


@pytest.mark.parametrize(
    "text",
    [
        "",
        "similar_blocks",
        "4",
        "similar_blocks > ",
        "similar_blocks + 4",
        "__import__('os').system('touch exploded') > 0",
        "().__class__ == 1",
        "similar_blocks.real > 1",
        "[1][0] > 0",
        "similar_blocks > '4'",
        "similar_blocks > True",
        "similar_blocks is 4",
        "similar_blocks in (4, 5)",
        "(lambda: 1)() > 0",
        "similar_blocks ** 9999999 > 1",
        "similar_blocks > 1j",
        "(x := 3) > 1",
        "[x for x in (1, 2)] > 0",
        "1 if images > 3 else 0",
        "not similar_blocks",
        "(" * 500 + "1" + ")" * 500 + " > 0 and " * 200,
    ],
)
def test_anything_else_is_refused(text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SettingError):
        read(text)
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_name_is_answered_with_the_nearest():
    with pytest.raises(SettingError, match="did you mean similar_blocks"):
        read("similar_block > 4").check(NUMBERS)
    with pytest.raises(SettingError, match="there are accuracy, images"):
        read("zzz > 4").check(NUMBERS)


def test_the_line_says_which_numbers_entered():
    assert read("similar_blocks > 4").line(NUMBERS) == "threshold 'similar_blocks > 4' tripped: similar_blocks is 5"
    assert "cannot be decided" in read("accuracy < 1").line(NUMBERS)
    assert "accuracy is undefined" in read("accuracy < 1").line(NUMBERS)
    assert "did not trip" in read("images < 3").line(NUMBERS)
