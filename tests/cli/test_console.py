"""What is said while a command works: one live display, lines above it, and lines alone where there is no terminal."""

from __future__ import annotations

import io
import os
import re
import subprocess
import sys

import pytest
from collapse_probe.cli.console import Stages, Talk
from collapse_probe.cli.demo import shares
from rich.console import Console

from collapse_probe.analysis.state.phases import Phase


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
    assert len(shares()) == 12
    assert list(shares())[-1] == "figures and pages"


def strip_of(stages):
    return stages.strip().plain


def test_the_display_shows_what_is_over_what_is_under_way_and_what_comes(monkeypatch):
    screen = at_a_terminal(monkeypatch)
    talk = Talk(quiet=False)
    with talk.stages("load", "probe", "images", "untrained copy", "page"):
        assert strip_of(talk.live) == "▸ load  · probe  · images  · untrained copy  · page"
        talk.begin("probe")
        talk.say(Phase("images", "batches of 8 images"))
        assert re.fullmatch(r"✓ load \d+\.\d s  ✓ probe \d+\.\d s  ▸ images  · untrained copy  · page", strip_of(talk.live))
        with talk.bar(12) as move:
            move(5, 1)
        (task,) = talk.live.tasks
        assert (task.completed, task.total) == (6, 12)
        assert task.fields["detail"].startswith("6 of 12, ")
        talk.begin("page")  # no untrained copy was asked for
        assert "untrained copy" not in strip_of(talk.live)
    assert talk.live is None
    assert "batches of 8 images" in rows(screen)


def test_a_second_model_begins_the_phases_anew():
    stages = Stages(["load", "images"], Console(file=io.StringIO()))
    for name in ("load", "images", "images", "load"):
        stages.begin(name)
    assert strip_of(stages) == "▸ load  · images"
    stages.begin("once more")
    assert re.fullmatch(r"✓ load \d+\.\d s  ▸ once more  · images", strip_of(stages))


def test_a_phase_is_a_line_where_nobody_watches(capsys):
    talk = Talk(quiet=False)
    with talk.stages("load", "images"):
        talk.say(Phase("images", "batches of 8 images"))
        talk.begin("load")
        assert talk.live is None
    assert capsys.readouterr().err == "batches of 8 images\n"
    assert Phase("images", "a line") == "a line"


PROGRAM = """
import logging, sys, time
from collapse_probe.cli.console import Talk
from collapse_probe.cli.main import StderrHandler
logging.basicConfig(level=logging.INFO, format="%(message)s", handlers=[StderrHandler()])
from collapse_probe.analysis.state.phases import Phase
talk = Talk(False)
with talk.stages("load", "probe", "images", "untrained copy", "page"):
    talk.say("a line " + "x" * 150)
    with talk.bar(40) as move:
        talk.say(Phase("images", "images begin"))
        for done in range(41):
            move(done, 0)
            if done % 20 == 0:
                talk.say(f"done {done}")
            time.sleep(0.01)
    logging.info("a library speaks")
    print("and another", file=sys.stderr)
    talk.begin("page")
    time.sleep(0.15)
sys.stdout.write("the answer\\n")
"""


@pytest.mark.parametrize("columns", [80, 200])
@pytest.mark.skipif(sys.platform == "win32", reason="pseudo-terminals are of Unix")
def test_on_a_real_terminal_no_line_runs_through_the_display(columns):
    seen = at_a_pseudo_terminal(PROGRAM, columns)
    lines = [line.rstrip() for line in final(seen, columns) if line.strip()]
    long = "a line " + "x" * 150
    said = ["images begin", "done 0", "done 20", "done 40", "a library speaks", "and another", "the answer"]
    assert "".join(lines).replace(" ", "") == "".join([long, *said]).replace(" ", "")
    shown = [line for line in re.split(r"[\r\n]+", plain(seen)) if "▸" in line]
    assert shown
    assert all(len(line) <= columns for line in shown)
    assert any(line.startswith("✓ load") and "▸ images" in line for line in shown)


def at_a_pseudo_terminal(program, columns):
    """All that a program writes to a terminal of so many columns."""
    import fcntl
    import pty
    import struct
    import termios

    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
    environment = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES", "NO_COLOR", "CI")}
    with subprocess.Popen(
        [sys.executable, "-c", program], stdin=theirs, stdout=theirs, stderr=theirs, env={**environment, "TERM": "xterm"}
    ) as process:
        os.close(theirs)
        parts = []
        try:
            while part := os.read(ours, 65536):
                parts.append(part)
        except OSError:  # Linux says so where macOS gives an empty answer
            pass
        assert process.wait(60) == 0
    os.close(ours)
    return b"".join(parts).decode()


def plain(text):
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)


def final(text, columns):
    """The lines that stand on the screen in the end: what is written, with the few movements that a live display makes."""
    grid, row, column = {}, 0, 0
    for code, letter in re.findall(r"(\x1b\[[0-9;?]*[A-Za-z])|(.)", text, re.DOTALL):
        if code.endswith("A"):
            row = max(row - int(code[2:-1] or 1), 0)
        elif code.endswith("K"):
            grid[row] = "" if code == "\x1b[2K" else grid.get(row, "")[:column]
        elif letter == "\r":
            column = 0
        elif letter == "\n":
            row += 1
        elif letter:
            if column == columns:
                row, column = row + 1, 0
            grid[row] = grid.get(row, "").ljust(column)[:column] + letter + grid.get(row, "")[column + 1 :]
            column += 1
    return [grid.get(at, "") for at in range(max(grid, default=0) + 1)]


def test_the_time_that_is_left_is_that_of_the_images_that_are_left():
    stages = Stages(["images"], Console(file=io.StringIO()))
    stages.begin("images")
    stages.counted(20, 100, 4.0)
    assert stages.tasks[0].fields["detail"] == "20 of 100, 5.0/s, 16 s left"
    stages.counted(20, None, 4.0)
    assert stages.tasks[0].fields["detail"] == "20, 5.0/s"
