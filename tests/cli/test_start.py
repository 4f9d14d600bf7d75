"""The start of a program: libraries are loaded once, with the garbage collector at rest, which then works again."""

from __future__ import annotations

import subprocess
import sys

LOADED = """
import gc, sys
from collapse_probe.cli.options import load_libraries
load_libraries()
loaded = gc.get_freeze_count()
assert {"torch", "torchvision", "timm"} <= set(sys.modules) and loaded > 100_000, loaded
assert gc.isenabled()
more = [[] for _ in range(1000)]
load_libraries()
assert gc.get_freeze_count() <= loaded, "what the program itself makes is left to the garbage collector"
"""


def test_libraries_are_left_out_of_garbage_collection_and_released_at_the_end():
    """Triton complains on stderr of what is still there when the interpreter is gone."""
    done = subprocess.run([sys.executable, "-c", LOADED], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")


def test_libraries_that_are_loaded_already_change_nothing():
    code = "import gc, timm\nfrom collapse_probe.cli.options import load_libraries\ngc.disable()\nload_libraries()\n"
    code += "assert gc.get_freeze_count() == 0 and not gc.isenabled()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
