"""In a real browser a page is whole: nothing fetched, nothing complains, every control works by mouse and by keyboard."""

from __future__ import annotations

import functools
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from factories import findings_of, synthetic

from collapse_probe.analysis.compare import compare
from collapse_probe.analysis.comparison.pairing import pair_up
from collapse_probe.report.comparison import page as comparison_page
from collapse_probe.report.findings.page import render
from collapse_probe.report.intervention import page as intervention_page
from collapse_probe.report.survey import page as survey_page
from collapse_probe.report.sweep import page as sweep_page
from collapse_probe.results.comparison import Comparison
from collapse_probe.results.findings import Findings
from collapse_probe.results.intervention import Effect, Interventions
from collapse_probe.results.survey import Survey, SurveyRow, row_of
from collapse_probe.results.sweep import CellResult, Sweep
from collapse_probe.results.verdict import with_verdict

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install playwright")
BROWSER = next((found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None)
pytestmark = pytest.mark.skipif(BROWSER is None, reason="no Chromium is installed: none of its names is on the path")
HOSTILE = "<script>alert(1)</script>\n\"'\u202egnp.x"
SERIOUS = ("serious", "critical")


def plain() -> Findings:
    """A ViT of twelve blocks, its pairs of blocks tested."""
    findings = synthetic(12)
    q = np.where(np.eye(12, dtype=bool), np.nan, 0.01)
    whole = {"q": [[None if np.isnan(x) else x for x in row] for row in q], "test": "paired t", "significant": 66, "tested": 66}
    return replace(findings, sureness={"tests": {"attention-similarity": {"all_pairs": whole, **of_neighbours(11)}}})


def of_neighbours(pairs: int) -> dict[str, Any]:
    """The test of neighbouring pairs as findings hold it."""
    return {
        "q": [0.01] * pairs, "level": 0.05, "significant": pairs, "tested": pairs, "untrained": None, "images": 64,
        "enough_images": True, "test": "paired t", "assumption": "independent images", "sentence": "All are.",
    }  # fmt: skip


def windows() -> Findings:
    """A Swin: most pairs of blocks are not compared, and layers are left out."""
    findings = synthetic(12, gallery=False)
    apart = np.where(np.abs(np.subtract.outer(range(12), range(12))) < 1, 1.0, np.nan)
    apart[11, 10] = apart[10, 11] = 0.97
    reading = findings.metrics["attention-similarity"]
    nulls = replace(reading.nulls, values={name: np.where(np.isfinite(apart), 0.9, np.nan) for name in reading.nulls.values})
    metrics = {**findings.metrics, "attention-similarity": replace(reading, values=apart, nulls=nulls)}
    why = "their windows do not hold the same tokens"
    left_out = [{"where": "layers.0.blocks.0.attn", "why": "attention inside windows", "blocks": [0, 1]}]
    model = {**findings.model, "uncompared": [{"why": why, "blocks": list(range(1, 11))}], "left_out": left_out}
    return replace(findings, metrics=metrics, model=model)


def partial() -> Findings:
    """A run that was stopped, whose names are markup."""
    findings = synthetic(4, name=HOSTILE, images=(HOSTILE, "b.png"))
    data = {**findings.data, "address": HOSTILE, "partial": {"read": 64, "of": 1000, "why": "the run's time (60 s) is over"}}
    data["skipped"] = [{"name": HOSTILE, "reason": HOSTILE}]
    return replace(findings, data=data)


def nothing() -> Findings:
    """Every metric was refused."""
    findings = synthetic(4, gallery=False)
    refused = {
        name: replace(result, values=None, nulls=None, stderr=None, ci95=None, not_applicable="no attention over tokens")
        for name, result in findings.metrics.items()
    }
    return replace(findings, metrics=refused, summary={"images": 64})


def comparison() -> str:
    """Three subjects of one depth, the last with a name that is markup."""
    rng = np.random.default_rng(0)
    sides = rng.uniform(0.2, 0.8, (3, 2, 6, 5))
    subjects = {name: findings_of(*each) for name, each in zip(("one", "two", HOSTILE), sides, strict=True)}
    return comparison_page.render(compare(subjects))


def training() -> str:
    """A folder of checkpoints."""
    rng = np.random.default_rng(1)
    steps = {f"epoch-{i}": findings_of(*rng.uniform(0.3, 0.6 + 0.1 * i, (2, 6, 4))) for i in range(3)}
    pairs = tuple(pair_up(steps["epoch-0"], each, ("epoch-0", name)) for name, each in steps.items() if name != "epoch-0")
    return comparison_page.render(Comparison(steps, pairs, True, {"command": "made up"}))


def intervention() -> str:
    """Two kinds of replacement in three blocks."""
    each = {kind: [Effect(kind, (b,), 0.1 * b, (0.05 * b, 0.2 * b), 0.9, (0.8, 0.95)) for b in (1, 2, 3)] for kind in KINDS}
    kinds = {kind: tuple(effects) for kind, effects in each.items()}
    facts: dict[str, Any] = {"model": {"address": HOSTILE}, "data": {"images": 8, "address": "photos"}, "run": {}}
    kinds_said = {kind: f"what {kind} does" for kind in KINDS}
    made = Interventions(
        **facts,
        plain={"accuracy": None, "reason": "no labels"},
        single=kinds,
        cumulative=kinds,
        similarity={},
        kinds=kinds_said,
    )
    return intervention_page.render(made)


KINDS = ("share", "uniform")


def sweep() -> str:
    """Two depths, two seeds, and a cell that failed."""
    numbers = {"similar_blocks": 1.0, "similar_blocks_corrected": 0.0, "kappa_adjacent": 0.2, "pairs": 3.0}
    cells = [
        CellResult(name=f"depth={d},seed={s}", values={"depth": d}, seed=s, status="finished", numbers=numbers, accuracy=0.9)
        for d in (4, 8)
        for s in (0, 1)
    ]
    cells.append(CellResult(name=HOSTILE, values={"depth": 16}, seed=0, status="failed", reason=HOSTILE))
    facts: dict[str, Any] = {"recipe": {"name": "digits"}, "seeds": [0, 1], "changes": {}, "data": {}, "run": {}}
    return sweep_page.render(Sweep(varied={"depth": [4, 8, 16]}, cells=tuple(cells), **facts))


def gallery() -> str:
    """Two models, and one that failed."""
    findings = synthetic(12)
    rows = [row_of(with_verdict(findings), name, {}, f"models/{at}") for at, name in enumerate(("a model", HOSTILE))]
    rows.append(SurveyRow(label="no such", conditions={}, folder="models/2", status="failed", reason=HOSTILE))
    return survey_page.render(Survey(tuple(rows), {"address": HOSTILE, "images": 64}, {"command": "gallery"}))


PAGES: dict[str, Callable[[], str]] = {
    "plain": lambda: render(with_verdict(plain())),
    "deepvit": lambda: render(with_verdict(synthetic(32, signed=True))),
    "swin": lambda: render(with_verdict(windows())),
    "partial": lambda: render(with_verdict(partial())),
    "nothing": lambda: render(with_verdict(nothing())),
    "comparison": comparison,
    "training": training,
    "intervention": intervention,
    "sweep": sweep,
    "gallery": gallery,
}
"""The pages that are opened."""


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    folder = tmp_path_factory.mktemp("pages")

    @functools.cache
    def path(name: str) -> Path:
        file = folder / f"{name}.html"
        file.write_text(PAGES[name](), encoding="utf-8")
        return file

    return path


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture
def opened(browser: Any, files: Callable[[str], Path]) -> Iterator[Callable[..., Any]]:
    """Opens a page; when the test is over nothing must have been said on the console and nothing fetched."""
    contexts, said, asked = [], [], []

    def page(name: str, **options: Any) -> Any:
        context = browser.new_context(**{"viewport": {"width": 1200, "height": 900}, **options})
        contexts.append(context)
        if options.get("java_script_enabled", True):
            context.grant_permissions(["clipboard-read", "clipboard-write"])
        one = context.new_page()
        one.on("console", lambda message: said.append(message.text))
        one.on("pageerror", lambda error: said.append(str(error)))
        one.on("request", lambda request: asked.append(request.url))
        one.goto(files(name).as_uri())
        return one

    yield page
    for context in contexts:
        context.close()
    assert said == []
    assert [url for url in asked if not url.startswith("data:")] == [url for url in asked if url.startswith("file:")]
    assert len([url for url in asked if url.startswith("file:")]) == len(contexts)


def shown(page: Any) -> str:
    """The words of a page that can be seen or opened, without those of its script."""
    return re.sub(r"\s+", " ", page.evaluate("document.querySelector('main').textContent"))


@pytest.mark.parametrize("name", PAGES)
def test_a_page_has_one_heading_no_violation_and_fits_a_phone(opened, name):
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="axe-playwright-python is not installed")
    page = opened(name, viewport={"width": 360, "height": 800})
    page.add_style_tag(content=".long { content-visibility: visible !important }")
    page.evaluate("document.querySelectorAll('details').forEach(each => { each.open = true; })")
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    assert page.locator("h1").count() == 1
    page.evaluate("document.querySelectorAll('svg').forEach(each => each.replaceChildren())")  # pictures, by their names alone
    for scheme, options in (("light", {}), ("dark", {"runOnly": ["color-contrast"]})):
        page.emulate_media(color_scheme=scheme)
        found = axe.Axe().run(page, None, options).response["violations"]
        assert [(each["id"], each["nodes"][0]["html"][:200]) for each in found if each["impact"] in SERIOUS] == []


@pytest.mark.parametrize("name", PAGES)
def test_without_its_script_a_page_says_the_same(opened, name):
    scripted, bare = (opened(name, java_script_enabled=enabled) for enabled in (True, False))
    words = shown(bare)
    scripted.locator(".tools, .readout, .player").evaluate_all("found => found.forEach(each => each.remove())")
    assert shown(scripted).replace(" ", "") == words.replace(" ", "")
    assert bare.locator("button").count() == 0
    for box in bare.locator(".switch").all():
        choices = box.locator("label")
        choices.nth(choices.count() - 1).click()
        views = box.locator("xpath=ancestor::figure").locator(f".v{choices.count() - 1}")
        assert views.count()
        assert all(view.evaluate("each => getComputedStyle(each).display") == "inline" for view in views.all())


def test_a_switch_shows_one_matrix_in_the_place_of_another_by_mouse_and_by_keyboard(opened):
    page = opened("plain")
    figure = page.locator("#attention-similarity")
    cell = figure.locator(".cells path").nth(1)

    def colour() -> str:
        return str(cell.evaluate("each => getComputedStyle(each).fill"))

    def place() -> list[float]:
        return cell.evaluate(
            "each => { const a = each.getBoundingClientRect(), b = each.closest('figure').getBoundingClientRect();"
            "return [a.x - b.x, a.y - b.y, a.width, a.height]; }"
        )

    figure.scroll_into_view_if_needed()
    before, first = place(), colour()
    figure.locator(".switch > label").get_by_text("κ", exact=True).click()
    assert place() == pytest.approx(before, abs=0.1)
    assert colour() != first
    assert figure.locator(".v2").is_visible()
    assert not figure.locator(".v0").is_visible()
    page.keyboard.press("ArrowLeft")
    assert figure.locator(".v1").is_visible()


def test_two_subjects_blink_in_one_place(opened):
    page = opened("comparison")
    figure = page.locator("#matrices")
    button = figure.get_by_role("button", name="Blink")
    assert figure.locator(".v0").first.is_visible()
    button.click()
    assert figure.locator(".v1").first.is_visible()
    assert button.get_attribute("aria-pressed") == "true"
    figure.locator(".v0").first.wait_for(state="visible", timeout=5000)
    button.click()
    assert button.get_attribute("aria-pressed") == "false"


def test_pointing_at_a_cell_marks_its_blocks_in_every_matrix_and_on_every_curve(opened):
    page = opened("plain")
    cells = page.locator("#attention-similarity .cells path")
    cells.nth(12 * 7 + 7).hover()
    assert "blocks 7 and 7: raw similarity 1.000" in page.locator("#attention-similarity .readout").inner_text()
    matrices = page.locator(".cells").count()
    heads = page.locator('.cells[data-rows="head"]').count()
    assert page.locator("path.cross").count() == 2 * (matrices - heads) + heads
    at_seven = [path.get_attribute("d") for path in page.locator("#attention-similarity path.cross").all()]
    assert at_seven == ["M0 7h12v1h-12z", "M7 0h1v12h-1z"]
    assert page.locator("#feature-similarity path.cross").first.get_attribute("d") == "M0 8h13v1h-13z"  # what leaves block 7
    dots = page.locator("#attention-adjacent circle.dots")
    assert dots.count() >= 2
    svg = page.locator("#attention-adjacent svg[data-chart]").first
    chart = svg.evaluate("each => JSON.parse(each.dataset.chart)")
    measured = chart["lines"]["measured (95 % CI)"]
    at = measured[1].index(7)
    start, step, _ = chart["y"]
    assert float(dots.first.get_attribute("cy")) == pytest.approx(start + step * measured[2][at], abs=0.1)


def test_arrow_keys_walk_over_a_matrix_and_enter_copies_a_cell(opened):
    page = opened("plain")
    page.locator("#attention-similarity .panels svg").focus()
    for key in ("ArrowDown", "ArrowDown", "ArrowRight", "ArrowUp", "ArrowLeft", "ArrowDown", "ArrowLeft"):
        page.keyboard.press(key)
    said = page.locator("#attention-similarity .readout").inner_text()
    assert said.startswith("blocks 2 and 0: raw similarity ")
    assert all(word in said for word in ("95 % CI [", "chance level (other tokens) ", "untrained copy ", "κ ", "q 0.010"))
    page.keyboard.press("Enter")
    assert page.evaluate("navigator.clipboard.readText()") == said


def test_what_is_copied_from_a_figure_is_what_the_findings_hold(opened):
    page, findings = opened("plain"), plain()
    page.locator("#attention-similarity .tools button").click()
    head, *rows = (line.split(",") for line in page.evaluate("navigator.clipboard.readText()").splitlines())
    assert len(rows) == 144
    reading = findings.metrics["attention-similarity"]
    for row in rows:
        cell = dict(zip(head, row, strict=True))
        at = int(cell["block (row)"]), int(cell["block (column)"])
        assert float(cell["raw similarity"]) == pytest.approx(reading.array[at], abs=6e-4)
        assert float(cell["95 % CI low"]) == pytest.approx(reading.ci95[at][0], abs=6e-4)
    page.locator("#attention-adjacent .tools button").first.click()
    head, *rows = (line.split(",") for line in page.evaluate("navigator.clipboard.readText()").splitlines())
    assert head[:2] == ["block", "measured (95 % CI)"]
    np.testing.assert_allclose([float(row[1]) for row in rows], np.diagonal(reading.array, -1), atol=1e-3)


def test_the_gallery_shows_a_block_a_head_and_a_patch_in_one_place(opened):
    page = opened("plain")
    box = page.locator(".gallery")
    lens = box.locator(".large").first.locator("svg")
    box.locator("input[type=range]").focus()
    for _ in range(3):
        page.keyboard.press("ArrowRight")
    assert lens.get_attribute("viewBox").split(",") == ["21", "0", "7", "7"]
    assert [each.text_content() for each in box.locator(".now text").all()] == ["3", "3"]
    assert "M0 3h12v1h-12z" in [path.get_attribute("d") for path in page.locator("#attention-similarity path.cross").all()]
    box.locator("select").select_option("head 1")
    assert lens.get_attribute("viewBox").split(",") == ["21", "14", "7", "7"]
    place = box.locator(".large").first.bounding_box()
    box.locator(".large").first.click(position={"x": place["width"] * 0.9, "y": place["height"] * 0.9})
    assert lens.get_attribute("viewBox").split(",") == ["21", str(7 * (1 + 2 + 3)), "7", "7"]
    assert box.locator("select option:checked").text_content() == "patch at row 1, column 1"
    box.locator("[data-block='9']").first.click()
    assert lens.get_attribute("viewBox").split(",")[0] == "63"


def test_a_table_sorts_by_number_and_gives_its_rows(opened):
    page = opened("plain")
    table = page.locator("h2:has-text('Block by block') ~ .scroll table").first
    column = table.locator("thead th").nth(1)

    def values() -> list[float]:
        texts = table.locator("tbody tr td:nth-child(2)").all_inner_texts()
        return [float(text) for text in texts if text != "–"]

    column.locator("button").click()
    assert values() == sorted(values())
    assert column.get_attribute("aria-sort") == "ascending"
    column.locator("button").focus()
    page.keyboard.press("Enter")
    assert values() == sorted(values(), reverse=True)
    assert table.locator("tbody tr").last.locator("td").first.inner_text() == "–"  # undefined stays last
    table.locator("tbody th button").first.click()
    copied = page.evaluate("navigator.clipboard.readText()").strip()
    assert copied.split(",")[1] == table.locator("tbody tr").first.locator("td").first.inner_text()


@pytest.mark.parametrize("name", PAGES)
def test_every_control_answers(opened, name):
    page = opened(name)
    page.evaluate("document.querySelectorAll('details').forEach(each => { each.open = true; })")
    silent = page.evaluate(
        """async () => {
            const silent = [], said = document.querySelector('.said');
            for (const button of document.querySelectorAll('main button')) {
                const lasting = button.closest('th[aria-sort]') ?? button.closest('thead, [aria-pressed]');
                said.textContent = '';
                button.focus();
                if (document.activeElement !== button) silent.push('no focus: ' + button.textContent);
                button.click();
                for (let at = 0; at < 50 && !said.textContent && !lasting; at++) await new Promise(done => setTimeout(done, 2));
                if (!said.textContent && !lasting) silent.push(button.textContent);
            }
            return silent; }"""
    )
    assert silent == []


def test_names_that_are_markup_are_text(opened):
    page = opened("partial")
    words = shown(page)
    assert words.count("<script>alert(1)</script>⟨U+000A⟩\"'⟨U+202E⟩gnp.x") >= 3
    assert "\u202e" not in words
    assert "Partial: 64 of 1,000" in words


def test_a_page_of_twelve_blocks_prints_on_twelve_sheets(opened, tmp_path):
    page = opened("plain")
    page.pdf(path=tmp_path / "page.pdf", format="A4")
    pages = len(re.findall(rb"/Type\s*/Page\b", (tmp_path / "page.pdf").read_bytes()))
    assert 2 <= pages <= 12
