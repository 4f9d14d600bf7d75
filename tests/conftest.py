"""What every test stands on: no more threads than cores, and a folder of real photographs."""

from __future__ import annotations

import os

import pytest
import torch
from making import photographs


@pytest.fixture(autouse=True, scope="session")
def _few_threads():
    beside_others = "PYTEST_XDIST_WORKER" in os.environ
    torch.set_num_threads(1 if beside_others else 2)
    if beside_others:
        os.environ["OMP_NUM_THREADS"] = "1"  # for the processes that tests start


@pytest.fixture(scope="session")
def photos(tmp_path_factory):
    """A folder of six real photographs."""
    return photographs(tmp_path_factory.mktemp("photos") / "pictures")
