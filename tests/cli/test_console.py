"""What is said while a command works: one bar, lines above it, and lines alone where there is no terminal."""

from __future__ import annotations

import io
import re
import sys

from collapse_probe.cli.console import Talk
from collapse_probe.cli.demo import shares


class Terminal(io.StringIO):
    """What stderr is for somebody at a screen."""

    def isatty(self) -> bool:
        return True


def at_a_terminal(monkeypatch):
    """From here on stderr is a screen; called in a test, for pytest's own capture begins after fixtures."""
    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "80")
    return screen


def rows(screen):
    """The lines of a screen as they were written, without colours and movements."""
    return [
        row.strip() for row in re.split(r"[\r\n]+", re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", screen.getvalue())) if row.strip()
    ]


def test_lines_go_above_a_bar_and_never_through_it(monkeypatch):
    terminal = at_a_terminal(monkeypatch)
    talk = Talk(quiet=False)
    with talk.bar(10) as move:
        move(5, 0)
        talk.say("a [line] of its own")
        move(10, 0)
    talk.say("after it")
    assert "a [line] of its own" in rows(terminal)
    assert rows(terminal)[-1] == "after it"
    assert talk.live is None


def test_one_bar_runs_over_all_parts_by_their_shares(monkeypatch):
    terminal = at_a_terminal(monkeypatch)
    with Talk(quiet=False).steps({"first": 1.0, "second": 3.0}) as begin:
        begin("first")(1, 2)
        move = begin("second")
        move(1, 3)
        assert {task.percentage for task in progress_of(begin)} == {50.0}
    assert rows(terminal)[-1].startswith("second")
    assert "100%" in rows(terminal)[-1]


def progress_of(begin):
    (progress,) = (cell.cell_contents for cell in begin.__closure__ if hasattr(cell.cell_contents, "tasks"))
    return progress.tasks


def test_where_there_is_no_terminal_each_part_is_a_line(capsys):
    with Talk(quiet=False).steps({"first": 1.0, "second": 3.0}) as begin:
        begin("first")(1, 2)
        begin("second")
    assert capsys.readouterr().err == "first\nsecond\n"
    with Talk(quiet=True).steps({"first": 1.0}) as begin:
        begin("first")(1, 1)
    assert capsys.readouterr().err == ""


def test_the_parts_of_the_demonstration_are_known_beforehand():
    assert len(shares()) == 7
    assert list(shares())[-1] == "figures and pages"
