"""Thresholds: what trips, what is undefined, and that anything but NAME OP NUMBER is refused."""

from __future__ import annotations

from xml.etree import ElementTree

import click
import pytest
from collapse_probe.cli.fail_on import cases_of, junit_xml, thresholds

from collapse_probe.errors import SettingError

TINY = ("-m", "timm:vit_tiny_patch16_224", "--no-pretrained", "--img-size", "32", "--model-kwargs", "depth=3")
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


def junit_of(path):
    return ElementTree.parse(path).getroot()


def test_junit_has_a_case_for_each_threshold_and_subject(tmp_path):
    rules = thresholds(["similar_blocks > 4", "kappa_adjacent > 0.9", "accuracy < 0.5", "nonsense > 1"])
    root = ElementTree.fromstring(junit_xml(cases_of(rules, {"one": NUMBERS, "tw\x00o": NUMBERS}), "compare"))
    (suite,) = root
    assert root.tag == "testsuites"
    assert {name: suite.get(name) for name in ("tests", "failures", "errors")} == {"tests": "8", "failures": "4", "errors": "2"}
    cases = suite.findall("testcase")
    assert [case.get("name") for case in cases[::2]] == [f"not ({rule.text})" for rule in rules]
    assert {case.get("classname") for case in cases} == {"collapse-probe.compare.one", "collapse-probe.compare.tw�o"}
    failed = cases[0].find("failure")
    assert failed.get("message") == "threshold 'similar_blocks > 4' tripped: similar_blocks is 5"
    assert [len(case) for case in cases] == [1, 1, 0, 0, 1, 1, 1, 1]
    assert cases[-1].find("error").get("message").startswith("threshold 'nonsense > 1' names 'nonsense'")


@pytest.mark.parametrize(("threshold", "code", "failures"), [("images > 1", 3, "1"), ("images > 100", 0, "0")])
def test_junit_is_written_beside_the_exit_code(run, photos, threshold, code, failures):
    words = ("analyze", *TINY, "--data", photos, "--limit", "2", "--null-images", "0", "--no-page", "-q", "-o", "out")
    found, _, err = run(*words, "--metric", "patch-diversity", "--fail-on", threshold, "--junit", "cases.xml")
    assert found == code, err
    root = junit_of("cases.xml")
    assert (root.get("tests"), root.get("failures")) == ("1", failures)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--junit", "cases.xml"), "it writes the thresholds of --fail-on, and none is given"),
        (("--fail-on", "images > 1", "--junit", "no/such/cases.xml"), "is no folder that can be written"),
    ],
)
def test_a_junit_file_that_cannot_be_is_wrong_usage_at_once(run, words, says):
    code, _, err = run("analyze", *TINY, "--data", "/no/such/folder", *words)
    assert code == 2
    assert says in " ".join(err.split())
