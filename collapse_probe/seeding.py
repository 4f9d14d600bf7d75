"""FIXME docstring."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch


def random_states() -> dict[str, Any]:
    """The states of the generators of Python, NumPy, torch and the current GPU, as plain values."""
    version, internal, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state()  # noqa: NPY002  (timm draws from it)
    numpy_state = [str(name), torch.from_numpy(np.asarray(keys).astype(np.int64)), int(position), int(has_gauss), float(cached)]
    return {
        "python": [version, list(internal), gauss],
        "numpy": numpy_state,
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
    }


def restore_random(states: Mapping[str, Any]) -> None:
    """Put the generators back to what `random_states` found."""
    version, internal, gauss = states["python"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, position, has_gauss, cached = states["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), position, has_gauss, cached))  # noqa: NPY002
    torch.set_rng_state(states["torch"])
    if states.get("cuda") is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])


@contextlib.contextmanager
def drawn_under(*key: int) -> Iterator[None]:
    """Seed the global generators of Python, NumPy and torch's CPU by `key`, and put them back afterwards.

    For libraries that draw from nowhere else: what they draw then depends on the key alone.
    """
    before = (random.getstate(), np.random.get_state(), torch.get_rng_state())  # noqa: NPY002
    seed = seed_of(*key)
    try:
        random.seed(seed)
        np.random.seed(seed % 2**32)  # noqa: NPY002
        torch.default_generator.manual_seed(seed)
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])  # noqa: NPY002
        torch.set_rng_state(before[2])


def seed_of(*key: int) -> int:
    """One seed below 2^63 out of several whole numbers from 0 up; different keys give unrelated seeds."""
    return int(np.random.SeedSequence(list(key)).generate_state(1, np.uint64)[0]) >> 1


def seeded_all(seed: int, rank: int) -> None:
    """Seed the global generators of Python, NumPy and torch (GPUs too) for one process of a run."""
    drawn = seed_of(seed, rank)
    random.seed(drawn)
    np.random.seed(drawn % 2**32)  # noqa: NPY002
    torch.manual_seed(drawn)


@contextlib.contextmanager
def torch_seeded(seed: int) -> Iterator[None]:
    """Seed torch's CPU generator for the length of the `with` and put it back; no other generator is touched."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield
