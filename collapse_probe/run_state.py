"""The complete state of a training run on disk: written whole or not at all, found again after a kill."""

from __future__ import annotations

import contextlib
import os
import random
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch

from collapse_probe.errors import CheckpointError, OutputError

FORMAT = "collapse-probe/run-state/1"
PATTERN = re.compile(r"step-(\d{8,})\.pt")
PARTIAL = ".partial"


def write_whole(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    """Let `write` fill a file that then takes its place at `path` in one move, on disk before it is seen.

    Killed at any moment, `path` holds what it held or all of the new content. Raises OutputError.
    """
    partial = path.with_name(path.name + PARTIAL)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("wb") as stream:
            write(stream)
            stream.flush()
            os.fsync(stream.fileno())
        partial.replace(path)
        with contextlib.suppress(OSError):  # not every file system lets a folder be synced
            folder = os.open(path.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
    except OSError as error:
        raise OutputError(f"{path} cannot be written: {error}; free space, or choose another folder") from error


def save_state(folder: Path, step: int, state: Mapping[str, Any], keep: int = 2) -> Path:
    """Write the state after `step` steps, then remove all but the newest `keep`; the path of the new one."""
    path = folder / f"step-{step:08d}.pt"
    write_whole(path, lambda stream: torch.save({"format": FORMAT, "step": step, **state}, stream))
    for old in states_in(folder)[:-keep]:
        old.unlink(missing_ok=True)
    for partial in folder.glob(f"*{PARTIAL}"):
        partial.unlink(missing_ok=True)
    return path


def states_in(folder: Path) -> list[Path]:
    """The states in a folder, oldest first."""
    found = [path for path in folder.glob("step-*.pt") if PATTERN.fullmatch(path.name)] if folder.is_dir() else []
    return sorted(found, key=lambda path: int(path.stem.partition("-")[2]))


def load_state(path: Path) -> dict[str, Any]:
    """The state at `path`, on the CPU; no code in it is run. Raises CheckpointError where it is none."""
    try:
        held = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged files fail in many ways
        first = (str(error).splitlines() or [""])[0][:160]
        raise CheckpointError(f"{path} cannot be read as a training state ({type(error).__name__}: {first})") from error
    if not isinstance(held, dict) or held.get("format") != FORMAT:
        raise CheckpointError(f"{path} is no training state of collapse-probe ({FORMAT})")
    return held


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
