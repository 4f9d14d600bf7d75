"""The random generators of Python, NumPy and torch: seeds made of keys, ranks of names, seeding for a while, states kept."""

from __future__ import annotations

import contextlib
import hashlib
import random
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch


def seed_of(*key: int) -> int:
    """One seed below 2^63 out of several whole numbers from 0 up; different keys give unrelated seeds."""
    return int(np.random.SeedSequence(list(key)).generate_state(1, np.uint64)[0]) >> 1


def rank_of_name(name: str, seed: int = 0) -> int:
    """A pseudo-random whole number below 2^64 that follows from a name and a seed alone.

    The k names of the lowest ranks are a random sample of any set of names: the same one whatever the order in which they come,
    and that of a union is found among those of its parts.
    """
    return int.from_bytes(hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest(), "big")


def seed_all(*key: int) -> None:
    """Seed the global generators of Python, NumPy and torch (GPUs too) by `key`."""
    seed = seed_of(*key)
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002  (timm draws from it)
    torch.manual_seed(seed)


def random_states() -> dict[str, Any]:
    """The states of the generators of Python, NumPy, torch and the current GPU, as plain values that a checkpoint can hold."""
    version, internal, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state()  # noqa: NPY002
    numpy_state = [str(name), torch.from_numpy(np.asarray(keys).astype(np.int64)), int(position), int(has_gauss), float(cached)]
    return {
        "python": [version, list(internal), gauss],
        "numpy": numpy_state,
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
    }


def restore_random(states: Mapping[str, Any]) -> None:
    """Put the generators back to what `random_states` returned."""
    version, internal, gauss = states["python"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, position, has_gauss, cached = states["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), position, has_gauss, cached))  # noqa: NPY002
    torch.set_rng_state(states["torch"])
    if states.get("cuda") is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])


@contextlib.contextmanager
def random_kept(device: torch.device | None = None) -> Iterator[None]:
    """After the `with` the global generators are in the states from before: Python's, NumPy's, torch's on the CPU.

    With a `device` also those of every GPU where it is one, or where CUDA is in use.
    """
    python, legacy = random.getstate(), np.random.get_state()  # noqa: NPY002
    metal = torch.mps.get_rng_state() if device is not None and device.type == "mps" else None
    cuda = device is not None and (device.type == "cuda" or torch.cuda.is_initialized())  # type: ignore[no-untyped-call]
    try:
        with torch.random.fork_rng(devices=range(torch.cuda.device_count()) if cuda else []):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(legacy)  # noqa: NPY002
        if metal is not None:
            torch.mps.set_rng_state(metal)


@contextlib.contextmanager
def seeded(*key: int) -> Iterator[None]:
    """Seed the global generators of Python, NumPy and torch's CPU by `key` for the length of the `with`.

    For libraries that draw from nowhere else: what they draw then depends on the key alone.
    """
    with random_kept():
        seed = seed_of(*key)
        random.seed(seed)
        np.random.seed(seed % 2**32)  # noqa: NPY002
        torch.default_generator.manual_seed(seed)
        yield


@contextlib.contextmanager
def torch_seeded(seed: int) -> Iterator[None]:
    """Seed torch's CPU generator for the length of the `with` and put it back; no other generator is touched."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield
