"""Numbers that took hours are kept, whatever becomes of their page."""

from __future__ import annotations

import numpy as np
import pytest
from factories import findings_of

from collapse_probe.errors import OutputError
from collapse_probe.files import Numbers, write_with_page
from collapse_probe.results.findings import Findings


@pytest.fixture
def found():
    return findings_of(*np.random.default_rng(0).uniform(0.2, 0.8, (2, 6, 3)))


def test_numbers_and_page_come_together(found, tmp_path):
    write_with_page(tmp_path / "out", found, lambda numbers, inside: (inside / "report.html").write_text(str(numbers.summary)))
    assert Findings.load(tmp_path / "out").summary == found.summary
    assert (tmp_path / "out" / "report.html").read_text() == str(found.summary)


def test_where_the_page_fails_the_numbers_are_kept_and_the_way_on_is_said(found, tmp_path):
    def page(numbers, inside):
        (inside / "report.html").write_text("half a page")
        raise ValueError("no ink")

    with pytest.raises(OutputError, match=r"page failed \(ValueError: no ink\); `collapse-probe report .*out`"):
        write_with_page(tmp_path / "out", found, page)
    assert Findings.load(tmp_path / "out").summary == found.summary
    assert not (tmp_path / "out" / "report.html").exists()


def test_an_interrupt_while_drawing_is_passed_on_and_keeps_the_numbers(found, tmp_path):
    def page(numbers, inside):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_with_page(tmp_path / "out", found, page)
    assert Findings.load(tmp_path / "out").summary == found.summary


def test_where_the_numbers_fail_nothing_is_left(tmp_path):
    class Broken(Numbers):
        run = {}  # noqa: RUF012

        def write(self, inside):
            (inside / "findings.json").write_text("{")
            raise OSError("disk full")

    with pytest.raises(OutputError, match="disk full; free space, or choose another folder"):
        write_with_page(tmp_path / "out", Broken(), lambda numbers, inside: None)
    assert list(tmp_path.iterdir()) == []
