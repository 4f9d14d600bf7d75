"""A part of every kind of hostile input; all of it by `make fuzz`. Any trial that went wrong is named with what repeats it."""

from __future__ import annotations

import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
from fuzz_trials import KINDS, REFUSED, Kind, mutated, run

SHARES = {"images": 0.02, "archives": 0.05, "findings": 0.04, "checkpoints": 0.1, "commands": 0.04, "disks": 0.2}


@pytest.mark.parametrize("name", SHARES)
def test_nothing_goes_wrong(name, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    tally = run(name, import_module(f"fuzz_{name}").KIND, share=SHARES[name])
    assert not tally.violations, str(tally)


@pytest.mark.parametrize(("name", "share"), [("kills", "0.06"), ("resumes", "0.02")])
def test_nothing_goes_wrong_where_runs_are_killed(name, share):
    """In a process of its own, which forks."""
    words = [sys.executable, "-m", "tests.fuzz", name, "--share", share]
    done = subprocess.run(words, cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=250, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_kind_has_its_part():
    assert {*SHARES, "kills", "resumes"} == set(KINDS)


def test_a_trial_is_repeated_by_its_number_and_what_goes_wrong_is_counted():
    def trial(random, folder, shared):
        assert not list(folder.iterdir())
        (folder / "file").write_bytes(mutated(random, b"content", b"other"))
        assert random.random() < 0.5, random.random()
        return REFUSED

    kind = Kind(40, lambda folder: None, trial)
    tally = run("made up", kind, seed=3)
    assert tally.counts[REFUSED] == 40 - len(tally.violations)
    assert 5 < len(tally.violations) < 35
    number = int(tally.violations[0].split("--trial ")[1].split(":")[0])
    (again,) = run("made up", kind, seed=3, only=number).violations
    assert tally.violations[0].rpartition(" ")[2] in again


def test_a_trial_that_hangs_is_stopped():
    def trial(random, folder, shared):
        while True:
            pass

    (violation,) = run("made up", Kind(1, lambda folder: None, trial, seconds=1)).violations
    assert "TooLong" in violation
