"""The answer as text: the verdict, the numbers that matter with what chance gives, a curve; plain where it is piped."""

from __future__ import annotations

import io
import sys
from dataclasses import replace

import pytest
from collapse_probe.cli.summary import answer, answers, curve
from factories import findings_of, synthetic

import collapse_probe as cp
from collapse_probe.results.overview.headline import Headline, headlines
from collapse_probe.results.text import number
from collapse_probe.results.verdict import verdict_of


class Screen(io.StringIO):
    def isatty(self):
        return True


def on_a_screen(monkeypatch, columns):
    monkeypatch.setattr(sys, "stdout", Screen())
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)


def test_piped_it_is_plain_and_each_sentence_is_one_line():
    findings = synthetic()
    text = answer(findings)
    assert "\x1b" not in text
    assert text.splitlines()[0] == verdict_of(findings).sentences[0]
    for each in headlines(findings):
        (line,) = (line for line in text.splitlines() if line.startswith(f"{each.name}  "))
        assert each.written in line
        assert each.interval in line
        assert line.rstrip().endswith(curve(each)) or not each.along
    assert "1 image was skipped: bad.jpg (truncated file)" in text
    assert len(text.splitlines()) < 30


def test_no_number_is_without_its_chance_level():
    (line,) = (line for line in answer(synthetic()).splitlines() if line.startswith("raw similarity"))
    raw = next(each for each in headlines(synthetic()) if each.name == "raw similarity")
    assert f"{raw.chance:.3f}" in line
    assert f"{raw.untrained:.3f}" in line


@pytest.mark.parametrize("columns", [80, 200])
def test_on_a_terminal_no_line_is_wider_and_there_is_colour(monkeypatch, columns):
    on_a_screen(monkeypatch, columns)
    text = answer(synthetic(24))
    assert "\x1b[1m" in text
    import re

    lines = re.sub(r"\x1b\[[0-9;]*m", "", text).splitlines()
    assert max(map(len, lines)) <= columns
    assert any("▁" <= letter <= "█" for line in lines for letter in line)
    assert ("block by block" in "".join(lines)) is (columns == 200)


def test_a_long_curve_is_drawn_in_means_of_neighbours():
    each = Headline("x", 0.5, along=(0.0, 0.0, 1.0, 1.0, float("nan"), float("nan")))
    assert curve(each, 3) == "▁█·"
    assert curve(each) == "▁▁██··"


def test_subjects_stand_side_by_side_and_many_below_one_another():
    subjects = {f"model {at}": findings_of([[0.5]], [[0.2]]) for at in range(2)}
    text = answers((), subjects=subjects)
    assert text.splitlines()[0].split() == ["model", "0", "model", "1"]
    many = answers((), subjects={f"model {at}": synthetic() for at in range(5)})
    assert [line[:7] for line in many.splitlines()[1:]] == [f"model {at}" for at in range(5)]


def test_a_summary_can_be_listed_whole():
    text = answers((), {"": {"images": 3, "share_all_kl": 0.125, "accuracy": None}})
    assert [line.split() for line in text.splitlines()] == [["images", "3"], ["share_all_kl", "0.125"], ["accuracy", "–"]]


def test_findings_of_weights_alone_have_a_summary():
    found = cp.analyze("timm:vit_tiny_patch16_224", pretrained=False, model_kwargs={"depth": 2}, metrics="weight-rank")
    assert "weight rank mean" in answer(found)


def test_on_a_narrow_terminal_numbers_are_whole(monkeypatch):
    on_a_screen(monkeypatch, 60)
    words = " ".join(answer(synthetic(24)).split())
    assert "…" not in words
    for each in headlines(synthetic(24)):
        assert each.written in words
        assert each.interval in words
        assert each.chance is None or f"chance level {number(each.chance, each.digits)}" in words


def test_metrics_without_a_headline_are_named_in_place_of_an_empty_table():
    only = {"rank-residual": replace(synthetic().metrics["patch-diversity"])}
    text = answer(replace(synthetic(), metrics=only, summary={"images": 64}))
    assert "Measured: rank-residual. The numbers of each block are in blocks.csv." in text
    assert "95 % CI" not in text.partition("Measured")[2]
