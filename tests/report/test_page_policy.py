"""Every page forbids what it does not use: scripts, requests, forms; pictures are data, styles stand in the page."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import collapse_probe.report
from collapse_probe.report.html import paper

TEMPLATES = Path(collapse_probe.report.__file__).parent / "templates"
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
USED = re.compile(r"<script|<link|<iframe|<object|<embed|<form|<base|@import|url\(|\son\w+\s*=|javascript:", re.IGNORECASE)


@pytest.mark.parametrize("template", sorted(path.name for path in TEMPLATES.iterdir()))
def test_a_page_carries_the_policy_and_uses_nothing_beyond_it(template):
    text = (TEMPLATES / template).read_text(encoding="utf-8")
    assert USED.search(text) is None
    if template not in ("page.html", "macros.html"):
        assert text.startswith('{% extends "page.html" %}')
        assert "block head" not in text


def test_the_policy_stands_before_everything_that_it_is_for():
    page = paper("page.html")
    policy = f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
    assert page.count(policy) == 1
    assert page.index(policy) < page.index("<style>")
    assert page.index(policy) < page.index("<title>")
