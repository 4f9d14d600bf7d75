"""The demonstration's command: its help loads nothing heavy (what the run itself shows: tests/models/test_bundled.py)."""

from __future__ import annotations

import subprocess
import sys

HELP = """
import sys
import collapse_probe.cli.main as cli
try:
    cli.main(["demo", "--help"])
except SystemExit:
    sys.exit(str([name for name in ("torch", "timm", "matplotlib", "numpy") if name in sys.modules] or ""))
"""


def test_help_loads_no_analysis():
    done = subprocess.run([sys.executable, "-c", HELP], capture_output=True, text=True, timeout=120)
    assert "Compare the trained pairs" in done.stdout
    assert done.stderr.strip() == ""


def test_no_sentence_is_cut_off_where_nothing_wraps_it():
    from collapse_probe.cli.demo import told

    sentence = "word " * 99 + "end."
    assert sentence in told({"A chapter": [sentence]})
