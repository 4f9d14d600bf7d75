"""The reference that is made from the tables: no metric, fix, penalty or preset lacks what a reader asks for."""

from __future__ import annotations

import importlib.util
import inspect
import re
from pathlib import Path

import pytest

from collapse_probe.metrics.metric import FAILURE_TYPES
from collapse_probe.registry import FIXES, METRICS, PENALTIES, PRESETS
from collapse_probe.results.citing.references import BY_KEY

ROOT = Path(__file__).parents[2]


def ours(table):
    return [name for name, kind in table.items() if getattr(kind, "__module__", "").startswith("collapse_probe.")]


@pytest.mark.parametrize("name", ours(METRICS))
@pytest.mark.parametrize("field", ["formula", "value_range", "source", "traps", "limits", "summary", "failure_types"])
def test_no_metric_lacks_what_a_reader_asks_for(name, field):
    kind = METRICS[name]
    assert field in vars(kind), f"{name} takes its {field} from a base class"
    assert vars(kind)[field] or field == "failure_types"


@pytest.mark.parametrize("name", ours(METRICS))
def test_a_formula_can_be_shown(name):
    docutils = pytest.importorskip("docutils.utils.math.latex2mathml")
    shown = str(docutils.tex2mathml(METRICS[name].formula, as_block=True))
    assert shown.startswith("<math")
    assert "merror" not in shown


def test_failure_types_are_the_three():
    for kind in (*METRICS.values(), *FIXES.values()):
        assert {*kind.failure_types} <= FAILURE_TYPES.keys()
    for key in FAILURE_TYPES:
        assert any(key in kind.failure_types for kind in METRICS.values())


@pytest.mark.parametrize("table", [FIXES, PENALTIES], ids=["fixes", "penalties"])
def test_no_fix_and_no_penalty_lacks_a_source_and_a_description(table):
    for name in ours(table):
        assert table[name].source, name
        assert len(inspect.getdoc(table[name])) > 40, name


def test_no_preset_lacks_a_source_and_its_choices():
    for name, preset in PRESETS.items():
        assert all((preset.paper, preset.code, preset.choices)), name


def test_the_pages_name_everything_and_every_chance_level():
    pytest.importorskip("docutils")
    spec = importlib.util.spec_from_file_location("registry_pages", ROOT / "docs" / "registry_pages.py")
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    pages = dict(made.pages())
    for page, table in {"metrics.md": METRICS, "fixes.md": FIXES, "penalties.md": PENALTIES, "presets.md": PRESETS}.items():
        for name in table:
            assert f"# {name}\n" in pages[page]
    sections = pages["metrics.md"].split("\n### ")[1:]
    assert len(sections) == len(METRICS)
    assert all("**Compared with.** an untrained copy" in section for section in sections)
    assert "other tokens (the chance level), other images, other heads, κ" in pages["metrics.md"]


def test_links_between_pages_lead_somewhere():
    for page in (*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")):
        for target in re.findall(r"\]\(([^)#:\s]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
            if not target.startswith("reference/"):
                assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_the_papers_references_are_those_that_cite_prints():
    entries = (ROOT / "paper.bib").read_text(encoding="utf-8").strip().split("\n\n")
    assert all(entry == BY_KEY[re.match(r"@\w+\{(\w+),", entry)[1]].bibtex for entry in entries)
    cited = set(re.findall(r"@(\w+)", (ROOT / "paper.md").read_text(encoding="utf-8")))
    assert cited == {re.match(r"@\w+\{(\w+),", entry)[1] for entry in entries}


def test_the_readme_counts_the_metrics():
    assert f"measure {len(ours(METRICS))} metrics in all" in (ROOT / "README.md").read_text(encoding="utf-8")
