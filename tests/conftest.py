"""What every test stands on: two threads at most, and a folder of real photographs."""

from __future__ import annotations

import pytest
import torch
from making import photographs


@pytest.fixture(autouse=True, scope="session")
def _two_threads():
    torch.set_num_threads(2)


@pytest.fixture(scope="session")
def photos(tmp_path_factory):
    """A folder of six real photographs."""
    return photographs(tmp_path_factory.mktemp("photos") / "pictures")
