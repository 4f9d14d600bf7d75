"""The page: one self-contained file that answers first, hides nothing undefined and trusts no name."""

from __future__ import annotations

import functools
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from factories import synthetic

from collapse_probe.metrics.presets import records
from collapse_probe.registry import PRESETS
from collapse_probe.report import style as style_module
from collapse_probe.report.findings import page as page_module
from collapse_probe.report.findings.cards import key_numbers
from collapse_probe.report.findings.figures import FIGURES, draw_all
from collapse_probe.report.findings.page import render, write_report
from collapse_probe.report.findings.provenance import definitions, not_measured, skipped
from collapse_probe.report.findings.tables import per_block
from collapse_probe.report.sheet import themed
from collapse_probe.results.findings import Description, Findings, MetricResult, Nulls
from collapse_probe.results.rules import KAPPA_ABOVE, RAW_ABOVE
from collapse_probe.results.text import interval, number, plain
from collapse_probe.results.verdict import Verdict

VOID = {"meta", "img", "source", "br", "hr", "link", "input", "wbr"}
ANSWER = ("The blocks look alike, and that is not collapse.", "The chance level explains it.")


@pytest.fixture(autouse=True)
def fixed_verdict(monkeypatch: pytest.MonkeyPatch) -> None:
    def verdict_of(findings: Findings) -> Verdict:
        fresh = str(findings.model.get("weights")).startswith("random")
        caveats = {"untrained": "The model is untrained: twice is once too often."} if fresh else {}
        caveats["shared"] = "It says nothing about <accuracy>."
        return Verdict("near-uniform", ANSWER, tuple(caveats.values()), caveat_rules=tuple(caveats))

    monkeypatch.setattr(page_module, "verdict_of", verdict_of)


class Tree(HTMLParser):
    """Checks that every tag closes, and collects what a reader and a browser see."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not {"style", "script"} & set(self.open):
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())

    def links(self) -> list[str]:
        names = ("src", "href", "srcset", "action", "data", "poster")
        return [attributes[n] or "" for _, attributes in self.tags for n in names if n in attributes]


@functools.cache
def page() -> str:
    return render(synthetic(2))


def words(findings: Findings) -> str:
    """The text of a page without figures."""
    return Tree(render(findings, {})).text


def without_all_but(findings: Findings, *names: str) -> Findings:
    return replace(findings, metrics={name: findings.metrics[name] for name in names})


def with_kappa(findings: Findings, kappa: np.ndarray | None, reason: str) -> Findings:
    reading = findings.metrics["attention-similarity"]
    assert reading.nulls is not None
    nulls = replace(
        reading.nulls,
        values={**reading.nulls.values, "kappa": kappa},
        reasons={"kappa": reason},
        kappa_ci95=None,
    )
    return replace(findings, metrics={**findings.metrics, "attention-similarity": replace(reading, nulls=nulls)})


def noisy(blocks: int) -> Findings:
    """Findings with as many figures as there can be, and pictures that compress as badly as pictures can."""
    findings = synthetic(blocks, heads=16, images=("a", "b", "c", "d", "e"))
    rng = np.random.default_rng(0)
    gallery = findings.gallery
    assert gallery is not None
    gallery = replace(gallery, pictures=rng.integers(0, 256, (5, 224, 224, 3), dtype=np.uint8))
    probs = findings.metrics["attention-similarity"]
    metrics = {**findings.metrics, "attention-similarity@probs": probs, "attention-similarity@patches": probs}
    return replace(findings, gallery=gallery, metrics=metrics)


@pytest.mark.parametrize(("findings", "most"), [(noisy(12), 3_000_000), (synthetic(32), 8_000_000)])
def test_the_page_stays_small_and_fetches_nothing(findings: Findings, most: int) -> None:
    html = render(findings)
    assert len(html.encode()) < most
    found = Tree(html)
    assert found.links()
    assert all(link.startswith(("data:image/", "#")) for link in found.links())
    assert "http" not in re.sub(r'data:image[^"]+|http-equiv|xmlns="http://www.w3.org/2000/svg"', "", html)
    assert [tag for tag, _ in found.tags if tag in ("script", "link", "iframe")] == ["script"]
    assert all(target.startswith("#") for target in re.findall(r"url\(([^)]*)", html))
    assert "@import" not in html


def test_the_answer_stands_before_everything_else() -> None:
    text = Tree(page()).text
    assert text.index(ANSWER[0]) < text.index(ANSWER[1]) < text.index("nothing about <accuracy>")
    rows = ["Attention across depth", "Tokens within an image", "Attention entropy", "raw similarity of adjacent pairs"]
    places = [text.index(word) for word in (*rows, ANSWER[0], "Pictures")]
    assert places == sorted(places)
    assert text.index("Pictures") < text.index("Block by block") < text.index("How it was measured")
    assert [tag for tag, _ in Tree(page()).tags if tag == "h1"] == ["h1"]


@pytest.mark.parametrize("kind", [{}, {"nulls": False}, {"signed": True}, {"gallery": False}])
def test_nothing_undefined_is_printed_as_such(kind: dict[str, bool]) -> None:
    text = words(synthetic(4, **kind))  # type: ignore[arg-type]
    assert not re.search(r"\b(nan|None|NaN|inf|null\)|Undefined)\b", text)
    assert "array(" not in text


def test_every_dash_has_its_reason() -> None:
    text = words(synthetic(4))
    assert "Block 0 has no block before it" in text
    assert "other heads: one head only." in text
    assert "κ is undefined where the chance level is 1" in text
    bare = words(synthetic(4, nulls=False))
    assert "chance level (other tokens): not taken in this run." in bare


def test_kappa_that_is_missing_says_why() -> None:
    reason = "the chance level is 1 itself"
    findings = with_kappa(synthetic(4), None, reason)
    text = Tree(render(findings, draw_all(findings, names=["attention-similarity"]))).text
    assert f"κ is not drawn here: {reason}." in text
    assert f"κ: {reason}." in text
    (card,) = [c for c in key_numbers(findings) if c.label.startswith("κ")]
    assert (card.value, card.detail) == ("–", reason)


def test_names_cannot_become_markup() -> None:
    hostile = "<script>alert(1)</script>"
    findings = synthetic(3, name=hostile, images=(hostile, '"><img src=x>'))
    data = {**findings.data, "address": hostile, "skipped": [{"name": hostile, "reason": "<b>bad</b>"}]}
    findings = replace(findings, data=data)
    html = render(findings, draw_all(findings, names=["attention-gallery"]))
    assert html.count("<script") == 1  # our own, whose text the policy knows
    assert "<b>bad" not in html
    assert "&lt;script&gt;" in html
    assert hostile in Tree(html).text


def test_an_untrained_model_is_called_so_before_the_answer() -> None:
    text = words(synthetic(4, weights="random (seed 0)"))
    assert text.index("This model is untrained") < text.index(ANSWER[0])
    assert "twice is once too often" not in text
    assert "untrained:" not in words(synthetic(4))


def test_images_that_the_model_was_trained_on_are_told_before_the_pictures() -> None:
    findings = synthetic(4)
    page = render(replace(findings, data={**findings.data, "trained_on": 50}))
    told = page.index("The model was trained on 50 of these 64 images")
    assert told < page.index('id="pictures"')
    assert "was trained on" not in render(findings)


def test_without_a_gallery_the_page_still_stands() -> None:
    findings = synthetic(3, gallery=False)
    figures = draw_all(findings, names=["attention-gallery", "per-block"])
    found = Tree(render(findings, figures))
    assert [attributes.get("id") for tag, attributes in found.tags if tag == "figure"] == [None, "per-block"]  # at a glance


def test_figures_are_drawn_once_fit_any_width_and_have_words() -> None:
    html = page()
    found = Tree(html)
    pictures = [attributes for tag, attributes in found.tags if tag == "svg" and "role" in attributes]
    assert len(pictures) >= 10
    assert all(picture["role"] == "img" and picture["aria-label"] and "width" not in picture for picture in pictures)
    assert "max-width: 600px" in html
    assert ("meta", {"name": "viewport", "content": "width=device-width, initial-scale=1"}) in found.tags
    assert found.text.count("What it does not say.") == len([tag for tag, _ in found.tags if tag == "figure"]) - 1 == 8


def test_every_id_stands_once_and_what_is_pointed_at_is_there() -> None:
    html = render(synthetic(4))
    ids = re.findall(r' id="([^"]*)"', html)
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'(?:href="|url\()#([^")]+)', html)) <= set(ids)


def test_the_folder_holds_what_the_page_shows(tmp_path) -> None:
    findings = synthetic(3)
    html = write_report(findings, tmp_path).read_text(encoding="utf-8")
    for figure in (tmp_path / "figures").iterdir():
        if figure.suffix == ".jpg":
            continue  # of photographs the page holds every map, the file those of all blocks
        whole = figure.read_text(encoding="utf-8")
        bodies = re.findall(r'<svg x="[^>]*viewBox="0 0 [^"]*"[^>]*>(.*?)</svg>', whole)
        assert bodies
        for body in bodies:
            if "<title>" not in body:
                assert themed(body) in html, figure.name
            for fill, cell in re.findall(r'<path fill="([^"]*)"[^>]*(d="M[^"]*"><title>[^:<]*: )', body):
                assert re.search(rf'<path [^>]*(?:fill="|--v\d:){fill}["; ][^>]*{re.escape(cell)}', html), figure.name
        ElementTree.fromstring(whole)


def test_tables_scroll_in_their_own_box() -> None:
    html = page()
    assert re.search(r"\.scroll \{ overflow-x: auto", html)
    assert re.search(r'<div class="scroll"[^>]*>\s*<table>', html)


def test_the_table_holds_the_findings() -> None:
    findings = synthetic(5)
    table = per_block(findings)
    assert len(table.rows) == 5
    assert all(len(row) == len(table.header) for row in table.rows)
    cells = [dict(zip(table.header, row, strict=True)) for row in table.rows]
    matrix = findings.matrix("attention-similarity")
    assert cells[0]["adjacent similarity"] == "–"
    assert cells[3]["adjacent similarity"] == number(matrix[3, 2])
    assert cells[3]["chance level (other tokens)"] == number(
        findings.metrics["attention-similarity"].nulls.values["other_token"][3, 2]
    )
    assert cells[4]["κ"] == "–"
    assert cells[2]["patch diversity"] == number(findings.matrix("patch-diversity")[3])
    assert cells[2]["entropy, nats"] == number(findings.matrix("attention-entropy")[2].mean(), 2)


def test_key_numbers_are_means_over_adjacent_pairs() -> None:
    findings = synthetic(5)
    cards = {card.label: card for card in key_numbers(findings)}
    pairs = np.diagonal(findings.matrix("attention-similarity"), -1)
    raw = cards["raw similarity of adjacent pairs"]
    assert raw.value == number(pairs.mean())
    assert raw.detail == f"95 % CI {interval((pairs.mean() - 0.02, pairs.mean() + 0.02))}"
    assert cards["similar blocks, raw / by κ"].detail.startswith("of 4 pairs")
    assert cards["κ: agreement beyond chance"].reference == "undefined for 1 of 4 pairs"
    assert len(cards) == 6
    assert key_numbers(replace(findings, metrics={}, summary={})) == []


def test_where_no_neighbours_are_compared_kappa_says_so_and_no_curve_is_drawn() -> None:
    findings = synthetic(3)
    similarity = findings.metrics["attention-similarity"]
    apart = np.where(np.eye(3, dtype=bool), 1.0, np.nan)
    assert similarity.nulls is not None
    nulls = replace(similarity.nulls, values={**similarity.nulls.values, "kappa": apart})
    changed = replace(
        findings, metrics={**findings.metrics, "attention-similarity": replace(similarity, values=apart, nulls=nulls)}
    )
    (card,) = [card for card in key_numbers(changed) if card.label.startswith("κ")]
    assert (card.value, card.detail) == ("–", "no two adjacent blocks are compared")
    names = ["attention-similarity", "attention-adjacent"]
    assert list(draw_all(changed, names=names)) == names[:1]
    assert list(draw_all(findings, names=names)) == names


@pytest.mark.parametrize("undefined", [None, np.nan])
def test_a_count_whose_interval_is_undefined_has_none(undefined: float | None) -> None:
    findings = synthetic(5)
    count = findings.metrics["similar-blocks"]
    details = {**count.details, "corrected": {"kappa_above": 0.5, "value": 0.0, "ci95": [undefined, undefined]}}
    changed = replace(findings, metrics={**findings.metrics, "similar-blocks": replace(count, details=details)})
    (card,) = [card for card in key_numbers(changed) if card.label.startswith("similar blocks")]
    assert card.value.endswith("/ 0")
    assert card.reference.startswith("95 % CI raw")
    assert "κ" not in card.reference


def test_what_does_not_apply_is_named_with_its_reason() -> None:
    findings = synthetic(3)
    gone = replace(findings.metrics["attention-entropy"], values=None, not_applicable="rows do not sum to one")
    changed = replace(findings, metrics={**findings.metrics, "attention-entropy": gone})
    assert not_measured(changed) == [("attention-entropy", "rows do not sum to one")]
    text = words(changed)
    assert "Not measured here" in text
    assert "rows do not sum to one" in text


def test_definitions_state_settings_end_and_images_of_the_nulls() -> None:
    entries = {entry.title: dict(entry.facts) for entry in definitions(synthetic(3))}
    facts = entries["attention-similarity"]
    assert facts["collapse"] == "high values are the collapsed end"
    assert facts["axis"] == "column"
    assert facts["compared with: untrained copy"] == "on 16 images"
    assert facts["compared with: other heads"] == "one head only"
    assert entries["attention-entropy"]["share"] == "3 × 6 numbers, in findings.json"


def test_provenance_is_on_the_page() -> None:
    text = words(synthetic(4))
    for fact in (
        "IMAGENET1K_V1",
        "collapse-probe analyze -m vit_b_32",
        "torch 2.13",
        "1,024 MiB",
        "truncated file",
    ):
        assert fact in text
    assert "self-check, worst error rows 3e−07" in text


def test_every_choice_of_a_preset_is_shown_with_who_made_it() -> None:
    names = ("registers", "deepvit", "rank-collapse")
    findings = replace(synthetic(2), presets=records(names))
    text = words(findings)
    for name in names:
        preset = PRESETS[name]
        at = text.index(f"Preset {name} , version {preset.version}: {preset.summary}")
        for said in (preset.paper, preset.code, ", ".join(preset.metrics), *preset.choices):
            row = said if isinstance(said, str) else f"{said.choice} {said.value} {said.follows}"
            assert row in text[at:], row
    assert text.index("How it was measured") < text.index("Preset registers") < text.index("Definitions, settings")
    assert '<details class="grid" open>' not in render(findings, {})
    assert '<details class="grid" open>' in render(replace(findings, presets=records(["registers"])), {})
    assert "Preset" not in words(synthetic(2))


def test_a_page_of_the_weights_alone_speaks_of_no_images() -> None:
    fresh = np.ones((2, 6))
    facts = {"description": Description(level="weights"), "nulls": Nulls({"untrained": fresh}, {"untrained": 0})}
    reading = MetricResult(("block", "matrix"), "rank", values=fresh, **facts)
    plain_run = synthetic(2, gallery=False)
    data = {"address": None, "images": 0, "skipped": [], "names_sha256": None, "bundled": False}
    findings = replace(plain_run, data=data, metrics={"weight-rank": reading}, summary={"images": 0})
    text = words(findings)
    assert "vit_b_32 · parameters alone, no images" in text
    assert "Parameters of vit_b_32" in text
    assert "compared with: untrained copy taken" in text
    assert not re.search(r"0 images|images of|images per second|batch size|Patch diversity|skipped", text)
    assert "64 images of photos" in words(plain_run)
    assert "batch size 16" in words(plain_run)


def test_thresholds_on_the_page_are_those_of_the_rules() -> None:
    assert f"κ passes {KAPPA_ABOVE:g}." in FIGURES["similar-blocks"].seen
    card = next(card for card in key_numbers(synthetic(5)) if card.label.startswith("similar blocks"))
    assert card.detail == f"of 4 pairs: raw above {RAW_ABOVE:g}, κ above {KAPPA_ABOVE:g}"


def test_each_rule_of_style_stands_once() -> None:
    lines: list[str] = []
    for path in (Path(style_module.__file__).parent / "templates").glob("*.html"):
        (style,) = re.findall(r"<style>(.*?)</style>", path.read_text(encoding="utf-8"), re.DOTALL) or [""]
        lines += [line for line in style.split("@media")[0].splitlines() if line.strip() and "{%" not in line]
    assert len(lines) > 40
    selectors = [line.partition("{")[0].strip() for line in lines if "{" in line]
    assert len(selectors) == len(set(selectors))


def test_a_long_list_of_skipped_images_is_cut() -> None:
    findings = synthetic(2)
    many = [{"name": f"{i}.jpg", "reason": "broken"} for i in range(500)]
    listed, more = skipped(replace(findings, data={**findings.data, "skipped": many}))
    assert (len(listed), more) == (200, 300)


def test_write_report_fills_the_folder_and_repeats_itself(tmp_path) -> None:
    findings = without_all_but(synthetic(3, gallery=False), "patch-diversity")
    path = write_report(findings, tmp_path)
    assert path == tmp_path / "report.html"
    first = path.read_bytes()
    assert {p.name for p in tmp_path.iterdir()} == {"report.html", "figures"}
    assert write_report(findings, tmp_path).read_bytes() == first


def test_a_report_needs_the_folder_alone(tmp_path) -> None:
    findings = synthetic(3)
    again = Findings.load(findings.save(tmp_path / "out"))
    assert words(again) == words(findings)


def test_findings_of_nothing_make_a_page() -> None:
    empty = Findings(model={}, data={}, run={}, metrics={}, summary={})
    text = Tree(render(empty)).text
    assert "hold nothing that can be drawn" in text
    assert ANSWER[0] in text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "–"),
        (float("nan"), "–"),
        (True, "yes"),
        ({"size": [224, 224], "crop": None}, "size (224, 224), crop –"),
        ([50] * 12, "50 (each of 12)"),
        ([], "–"),
        (-1.5, "−1.5"),
    ],
)
def test_facts_become_words(value: object, text: str) -> None:
    assert plain(value) == text


def test_a_card_and_the_answer_give_one_interval_of_one_number():
    ends = {"kappa_adjacent_ci_low": 0.111, "kappa_adjacent_ci_high": 0.222, "attention_similarity_adjacent_ci_low": 0.333}
    whole = synthetic(5)
    found = replace(whole, summary={**whole.summary, **ends, "attention_similarity_adjacent_ci_high": 0.444})
    shown = {card.label: card.detail for card in key_numbers(found)}
    assert shown["κ: agreement beyond chance"] == "95 % CI [0.111, 0.222]"
    assert shown["raw similarity of adjacent pairs"] == "95 % CI [0.333, 0.444]"
