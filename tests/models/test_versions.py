"""A torchvision that was built for another torch is said to be one, wherever it is met first."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BROKEN = """
raise RuntimeError("operator torchvision::nms does not exist")
"""
PYTHON = """
import collapse_probe
try:
    collapse_probe.analyze
except collapse_probe.errors.ModelError as error:
    print("said:", error)
"""


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (["-m", "collapse_probe", "doctor", "-m", "vit_b_32", "--no-pretrained"], 1),
        (["-m", "collapse_probe", "ls", "models", "vit_tiny*"], 1),
        (["-c", PYTHON], 0),
    ],
    ids=["doctor", "ls", "Python"],
)
def test_a_torchvision_for_another_torch_is_one_sentence(tmp_path, words, code):
    (tmp_path / "torchvision").mkdir()
    (tmp_path / "torchvision" / "__init__.py").write_text(BROKEN)
    path = {"PYTHONPATH": f"{tmp_path}:{ROOT}", "PATH": "/usr/bin:/bin"}
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True, env=path, timeout=120, check=False)
    assert done.returncode == code, done.stderr
    lines = (done.stderr + done.stdout).strip().splitlines()
    (said,) = [line for line in lines if "fit each other" in line]
    assert "torchvision" in said
    assert "(operator torchvision::nms does not exist); install two that were released together" in said
    assert "Traceback" not in done.stderr
