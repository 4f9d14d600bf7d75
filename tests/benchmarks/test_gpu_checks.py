"""The script with all checks that need a GPU runs where there is none, so that it is known to work where there is one."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PARTS = ("environment", "equality", "prices", "profile", "errors", "memory", "exhaustion", "tests")


def run(out, *parts):
    words = [sys.executable, "benchmarks/gpu.py", "--out", str(out), "--limit", "400", "--parts", *parts]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=290)
    assert done.returncode == 0, done.stderr
    found = json.loads(out.read_text())
    assert list(found["parts"]) == list(parts)
    assert {part: each["outcome"] for part, each in found["parts"].items()} == dict.fromkeys(parts, "done")
    return {part: each["found"] for part, each in found["parts"].items()}


def test_errors_are_measured_against_float64(tmp_path):
    found = run(tmp_path / "gpu.json", "errors")["errors"]
    assert len(found) >= 6
    for name, errors in found.items():
        assert len(errors) >= 7
        for metric, error in errors.items():
            assert 0 < error < (1e-4 if "single" in metric else 1e-6), (name, metric)


@pytest.mark.slow
def test_all_checks_run(tmp_path):
    found = run(tmp_path / "gpu.json", *PARTS)
    assert all(each["equal"] for each in found["equality"].values())
    assert {row["default analysis"]["ratio"]["median"] > 0 for row in found["prices"].values()} == {True}
    assert max(found["exhaustion"]["difference"].values()) < 1e-12
