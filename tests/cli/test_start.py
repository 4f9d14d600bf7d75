"""The start and the end of a program: libraries are loaded with the garbage collector at rest; nothing is lost at the end."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

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


def run(code, **streams):
    code = f"import sys\nfrom collapse_probe.cli.main import main\nsys.argv = ['collapse-probe', 'ls', 'data']\n{code}\nmain()"
    buffered = {**os.environ, "PYTHONUNBUFFERED": ""}
    return subprocess.run([sys.executable, "-c", code], text=True, timeout=120, env=buffered, **streams)


def test_what_is_registered_for_the_end_runs_and_the_output_is_whole():
    done = run("import atexit\natexit.register(print, 'over')", capture_output=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "over"
    assert "bundled:digits" in done.stdout


def test_a_thread_that_is_still_at_work_is_waited_for():
    code = "import threading, time\nthreading.Thread(target=lambda: (time.sleep(0.5), print('done', flush=True))).start()"
    assert run(code, capture_output=True).stdout.splitlines()[-1] == "done"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device that is always full")
def test_output_that_cannot_be_written_is_a_failure():
    with Path("/dev/full").open("w") as full:
        assert run("", stdout=full, stderr=subprocess.PIPE).returncode != 0


def test_the_end_is_not_waited_for():
    """No object is freed at the end: where one was, it would say so."""
    code = "class Last:\n    def __del__(self):\n        print('freed', flush=True)\nlast = Last()"
    assert "freed" not in run(code, capture_output=True).stdout
