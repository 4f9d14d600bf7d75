"""What every test stands on: no more threads than cores, a folder of real photographs, and the program itself."""

from __future__ import annotations

import os

import pytest
import torch
from collapse_probe.cli.main import main
from factories import photographs


@pytest.fixture(autouse=True, scope="session")
def _few_threads():
    beside_others = "PYTEST_XDIST_WORKER" in os.environ
    torch.set_num_threads(1 if beside_others else min(2, torch.get_num_threads()))  # as many as OMP_NUM_THREADS allows
    if beside_others:
        os.environ["OMP_NUM_THREADS"] = "1"  # for the processes that tests start


@pytest.fixture
def one_thread():
    """One thread: the same bits whatever the machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def photos(tmp_path_factory):
    """A folder of six real photographs."""
    return photographs(tmp_path_factory.mktemp("photos") / "pictures")


@pytest.fixture
def run(capsys, tmp_path, monkeypatch):
    """Run the program in an empty folder; exit code, stdout, stderr."""
    monkeypatch.chdir(tmp_path)

    def call(*words):
        with pytest.raises(SystemExit) as stop:
            main([str(word) for word in words])
        out = capsys.readouterr()
        return stop.value.code, out.out, out.err

    return call
