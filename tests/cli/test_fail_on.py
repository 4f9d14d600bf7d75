"""Thresholds: what trips, what is undefined, and that anything but NAME OP NUMBER is refused."""

from __future__ import annotations

import click
import pytest
from collapse_probe.cli.fail_on import thresholds

from collapse_probe.errors import SettingError

NUMBERS = {"similar_blocks": 5, "kappa_adjacent": 0.25, "accuracy": None, "images": 64, "margin": -2.0, "broken": float("nan")}


def line(text):
    (threshold,) = thresholds([text])
    return threshold.line(NUMBERS)


@pytest.mark.parametrize(
    ("text", "trips"),
    [
        ("similar_blocks > 4", True),
        ("similar_blocks > 5", False),
        ("similar_blocks >= 5", True),
        ("similar_blocks < 5", False),
        ("similar_blocks <= 5.0", True),
        ("similar_blocks == 5", True),
        ("similar_blocks != 5", False),
        ("kappa_adjacent<.3", True),
        ("  kappa_adjacent   >   2.5e-1 ", False),
        ("margin < -1.5", True),
        ("margin < -2.5", False),
    ],
)
def test_what_trips(text, trips):
    assert (line(text) is not None) is trips


@pytest.mark.parametrize("text", ["accuracy < 0.5", "accuracy >= 0.5", "broken != 1"])
def test_an_undefined_number_trips(text):
    assert "cannot be decided" in line(text)
    assert line(text).endswith("is undefined")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "similar_blocks",
        "4",
        "similar_blocks > ",
        "4 < similar_blocks",
        "similar_blocks => 4",
        "similar_blocks = 4",
        "similar_blocks > 4 and images > 3",
        "0.2 < kappa_adjacent < 0.3",
        "similar_blocks + 4 > 2",
        "similar_blocks > nan",
        "similar_blocks > '4'",
        "similar_blocks.real > 1",
        "__import__('os').system('touch exploded') > 0",
    ],
)
def test_anything_else_is_wrong_usage_with_an_example(text):
    with pytest.raises(click.UsageError, match=r"expected NAME OP NUMBER.*'similar_blocks > 4'; came") as caught:
        thresholds([text])
    assert caught.value.exit_code == 2


def test_an_unknown_name_is_answered_with_the_nearest():
    with pytest.raises(SettingError, match="did you mean similar_blocks"):
        line("similar_block > 4")
    with pytest.raises(SettingError, match="there are accuracy, broken, images"):
        line("zzz > 4")


def test_the_line_says_the_value():
    assert line("similar_blocks > 4") == "threshold 'similar_blocks > 4' tripped: similar_blocks is 5"
