"""Every page forbids what it does not use: all scripts but our own, requests, forms; pictures are data, styles are inside."""

from __future__ import annotations

import base64
import hashlib
import re
from pathlib import Path

import pytest

import collapse_probe.report
from collapse_probe.report.html import paper

TEMPLATES = Path(collapse_probe.report.__file__).parent / "templates"
POLICY = "img-src data:; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
OURS = "<script>{{ script }}</script>"
MOST_BYTES = 10_000
USED = re.compile(r"<script|<link|<iframe|<object|<embed|<form|<base|@import|url\(|\son\w+\s*=|javascript:", re.IGNORECASE)


@pytest.mark.parametrize("template", sorted(path.name for path in TEMPLATES.glob("*.html")))
def test_a_page_carries_the_policy_and_uses_nothing_beyond_it(template):
    text = (TEMPLATES / template).read_text(encoding="utf-8")
    assert text.count(OURS) == (template == "page.html")
    assert USED.search(text.replace(OURS, "")) is None
    if template not in ("page.html", "macros.html"):
        assert text.startswith('{% extends "page.html" %}')
        assert "block head" not in text


def test_the_policy_stands_before_everything_that_it_is_for():
    page = paper("page.html")
    (script,) = re.findall(r"<script>(.*?)</script>", page, re.DOTALL)
    known = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    whole = f"default-src 'none'; script-src 'sha256-{known}'; {POLICY}".replace("'", "&#39;")
    policy = f'<meta http-equiv="Content-Security-Policy" content="{whole}">'
    assert page.count(policy) == 1
    assert page.index(policy) < page.index("<style>")
    assert page.index(policy) < page.index("<title>")


def test_the_script_is_small_plain_and_asks_nobody_for_anything():
    text = (TEMPLATES / "page.js").read_text(encoding="utf-8")
    assert len(text.encode()) <= MOST_BYTES
    assert re.search(r"fetch\(|XMLHttp|import |eval\(|innerHTML|insertAdjacent|document\.write|https?:", text) is None
