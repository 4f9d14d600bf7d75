"""From a path to what its checkpoint holds: which files hold weights, and their content, read without running anything."""

from __future__ import annotations

import argparse
import hashlib
import json
import pickle
import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from datetime import date, datetime, timedelta
from pathlib import Path, PosixPath, PurePosixPath
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from collapse_probe.errors import CheckpointError

NUMPY_PARTS: Any = (np.float64(0).__reduce__()[0], np.zeros(1).__reduce__()[0])
SUFFIXES = (".safetensors", ".pth", ".pt", ".bin", ".tar", ".ckpt")  # `.pth.tar` ends in .tar
PLAIN_VALUES: list[Any] = [  # of training files: settings, the best accuracy, dates, paths; making one of these runs no code
    *(argparse.Namespace, SimpleNamespace, PosixPath, PurePosixPath, date, datetime, timedelta, slice),
    *(np.ndarray, np.dtype, *(kind for kind in vars(np.dtypes).values() if isinstance(kind, type))),
    *((part, f"numpy.{core}.multiarray.{part.__name__}") for part in NUMPY_PARTS for core in ("core", "_core")),
]
INDEX = ".index.json"  # lists the parts of a checkpoint in several files, as transformers and accelerate write them
NO_WEIGHTS = re.compile(r"(optim|sched|lr_|scaler|rng_state|random_states|sampler|training_args|custom_checkpoint)")
NEWER, OLDER = "model.safetensors", "pytorch_model.bin"
PART = re.compile(r"-\d+-of-\d+$")


def _parts_of(index: Path) -> Sequence[str]:
    """The names of the files that an index lists, sorted."""
    try:
        return sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{index} cannot be read as the index of a checkpoint: it has no weight_map") from error


def _own_files(folder: Path) -> list[Path]:
    files = [file for file in folder.iterdir() if file.is_file() and not file.name.startswith(".")]
    indices = [file for file in files if file.name.endswith(INDEX)]
    parts = {folder / name for index in indices for name in _parts_of(index)}
    own = [f for f in files if f.suffix.lower() in SUFFIXES and not NO_WEIGHTS.match(f.name.lower()) and f not in parts]
    if folder / NEWER in own:  # transformers reads this one of the two
        own = [file for file in own if file.name != OLDER]
    return sorted(own + indices)


def weight_files(folder: Path) -> list[Path]:
    """The checkpoints in a folder, one path each: an index stands for its parts, and files of optimizers, schedulers and random
    states are none. Where the folder itself holds none: those of its subfolders, such as `checkpoint-500`.
    """
    visible = sorted(each for each in folder.iterdir() if not each.name.startswith("."))
    return _own_files(folder) or [file for each in visible if each.is_dir() for file in _own_files(each)]


def checkpoint_file(path: Path) -> Path:
    """The one checkpoint at a path: a file, an index of several, or the only one in a folder. Raises CheckpointError."""
    try:
        there = path.exists()
    except OSError as error:
        raise CheckpointError(f"the checkpoint {path!s:.200} cannot be opened ({error.strerror}); name another") from error
    if not there:
        raise CheckpointError(f"there is no checkpoint {path}; give an existing file ({', '.join(SUFFIXES)})")
    if path.is_file():
        if path.suffix.lower() not in SUFFIXES and not path.name.endswith(INDEX):
            raise CheckpointError(f"{path} is no known kind of checkpoint; expected {', '.join(SUFFIXES)}")
        return path
    if any(path.glob("*.distcp")):
        how = "python -m torch.distributed.checkpoint.format_utils dcp_to_torch FOLDER FILE.pt"
        raise CheckpointError(f"the folder {path} holds a distributed checkpoint; put its parts into one file: {how}")
    inside = weight_files(path)
    if len(inside) != 1:
        found = sample([str(file.relative_to(path)) for file in inside], 6) if inside else "none"
        raise CheckpointError(f"the folder {path} must hold one checkpoint, found {len(inside)} ({found}); name one")
    return inside[0]


def read_checkpoint(file: Path) -> Mapping[str, Any]:
    """The content of a checkpoint, of all its parts where it has several. Raises CheckpointError, also for a single part."""
    if not file.name.endswith(INDEX):
        if PART.search(file.stem):
            raise CheckpointError(f"{file} is one part of a checkpoint in several files; name its folder, or the {INDEX} there")
        return read_file(file)
    content: dict[str, Any] = {}
    for name in _parts_of(file):
        if not (file.parent / name).is_file():
            raise CheckpointError(f"{file} lists the part {name}, which is not there; copy all of them")
        content |= read_file(file.parent / name)
    return content


def read_file(file: Path) -> Mapping[str, Any]:
    """The content of one file. Nothing in it is executed: torch reads it with `weights_only`, and of other Python classes only
    PLAIN_VALUES are allowed. Raises CheckpointError.
    """
    try:
        if file.suffix.lower() == ".safetensors":
            from safetensors.torch import load_file

            content: Any = load_file(file)
        else:
            with warnings.catch_warnings(), torch.serialization.safe_globals(PLAIN_VALUES):
                warnings.simplefilter("ignore")  # on pickles of other protocols
                content = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        culprit = re.search(r"GLOBAL\s+([\w.]+)", str(error))
        if culprit is None:
            why = "it is damaged, or holds more than tensors"
            raise CheckpointError(f"{file} is no checkpoint that torch can read safely: {why}") from error
        what = f"it holds the Python object {culprit[1]!r}, and loading that could run code"
        raise CheckpointError(f"{file} was not loaded: {what}; save the tensors alone, e.g. as .safetensors") from error
    except Exception as error:  # damaged files fail in many ways
        why = (str(error).strip().splitlines() or [""])[0][:160]
        raise CheckpointError(f"{file} cannot be read as a checkpoint ({type(error).__name__}: {why})") from error
    if not isinstance(content, Mapping):
        kind = type(content).__name__
        raise CheckpointError(f"{file} holds a {kind}, expected a dictionary of tensors; save model.state_dict()")
    return content


def sha256_of(file: Path) -> str:
    """SHA-256 of a file; of an index, of itself and then its parts in the order of their names."""
    digest = hashlib.sha256()
    parts = [file.parent / name for name in _parts_of(file)] if file.name.endswith(INDEX) else []
    for each in (file, *parts):
        with each.open("rb") as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def sample(names: Iterable[str], count: int = 3) -> str:
    """The first few of `names`.

    >>> sample(["a", "b", "c", "d"])
    'a, b, c, …'
    """
    listed = list(names)
    return ", ".join(listed[:count]) + (", …" if len(listed) > count else "")
