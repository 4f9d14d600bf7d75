"""Damaged folders of results: drawn as they stand, or refused in one line that names the file."""

from __future__ import annotations

import contextlib
import copy
import io
import json
import math
import shutil
import sys
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
from fuzz_commands import said_of, without_figures
from fuzz_trials import READ, REFUSED, Kind, mutated

from collapse_probe.errors import CollapseProbeError
from collapse_probe.files import DOCUMENTS, MANIFEST

sys.path[:0] = [str(Path(__file__).parents[1] / "results")]
from test_damaged import KINDS  # noqa: E402

VALUES: tuple[Any, ...] = (
    *(None, True, -1, 0, 7.5, 1e300, -1e300, 1e-320, 2**70, math.nan, math.inf, "", "x", "<script>", "\ud800", "x" * 5000),
    *([], {}, [[]], [None], {"a": 1}, [1, [2]], [0.5] * 7),
)
DERIVED = ("definitions", "summary", "published", "methods", "subjects", "schema")
WITH_FIGURES = 0.01  # of what is read


def folders(place: Path) -> list[tuple[Path, Any]]:
    """A folder of every kind of results, and the class that reads it."""
    return [(make().save(place / name), kind) for name, (make, kind) in KINDS.items()]


def _places(content: Any) -> list[tuple[Any, Any]]:
    pairs = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    return [found for key, value in list(pairs) for found in ((content, key), *_places(value))]


def _document(random: Random, text: str, other: str) -> bytes:
    way = random.random()
    if way < 0.15:
        return mutated(random, text.encode(), other.encode())
    if way < 0.18:
        return b"[" * 10**5 + text.encode()
    content = json.loads(text)
    for _ in range(random.choice((1, 1, 2))):
        inside, key = random.choice(_places(content))
        if random.random() < 0.3:
            del inside[key]
        elif random.random() < 0.2:
            where, name = random.choice(_places(content))
            inside[key] = copy.deepcopy(where[name])
        elif type(inside[key]) in (int, float) and random.random() < 0.5:
            inside[key] *= random.choice((-1, 2, 1e6, 1 + 1e-9))
        else:
            inside[key] = random.choice(VALUES)
    return json.dumps(content).encode()


def _arrays(random: Random, content: bytes, other: bytes) -> bytes | None:
    way = random.randrange(4)
    if way == 0:
        return None
    if way == 1:
        return mutated(random, content, other)
    with np.load(io.BytesIO(content)) as stored:
        arrays: dict[str, Any] = dict(stored)
    name = random.choice(list(arrays) or ["x"])
    arrays[name] = random.choice(
        (np.array([{"a": 1}], dtype=object), np.zeros(0), np.full((2, 3), np.nan), np.array(["a"]), np.zeros((3, 1, 2), "i1"))
    )
    if way == 3:
        del arrays[name]
    stream = io.BytesIO()
    np.savez(stream, **arrays)
    return stream.getvalue()


def differs(stored: Any, loaded: Any) -> bool:
    """Whether what was loaded says something else than what is stored; what is in one alone is not compared."""
    if isinstance(stored, dict) and isinstance(loaded, dict):
        return any(differs(stored[key], loaded[key]) for key in stored if key in loaded)
    if isinstance(stored, list) and isinstance(loaded, list):
        return len(stored) != len(loaded) or any(map(differs, stored, loaded))
    return bool(stored != loaded)


def trial(random: Random, folder: Path, made: list[tuple[Path, Any]]) -> str:
    """One damaged file in one folder."""
    source, kind = random.choice(made)
    place = folder / "out"
    shutil.copytree(source, place)
    files = sorted(path for path in place.rglob("*") if path.is_file())
    documents = [path for path in files if path.name in DOCUMENTS]
    file = random.choice(documents if random.random() < 0.7 else files)
    other = random.choice([path for path in source.parent.glob("*/**/*") if path.name == file.name]).read_bytes()
    content = file.read_bytes()
    if file.suffix == ".npz":
        changed = _arrays(random, content, other)
    elif file.suffix == ".json":
        changed = _document(random, content.decode(), other.decode())
    else:
        changed = mutated(random, content, other)
    if changed is None:
        file.unlink()
    else:
        file.write_bytes(changed)
    if file.name != MANIFEST and random.random() < 0.5:
        file.with_name(MANIFEST).unlink()
    with contextlib.nullcontext() if random.random() < WITH_FIGURES else without_figures():
        said = said_of("report", place, "-q")
    said.check(names=(place, file.name))
    if said.code:
        return REFUSED
    if file == place / source.name and changed is not None:
        try:
            loaded = json.loads(json.dumps(kind.load(place).to_json()))
        except CollapseProbeError as error:
            raise AssertionError("its page is drawn, and it does not load") from error
        stored = {key: value for key, value in json.loads(changed).items() if key not in DERIVED}
        assert not differs(stored, loaded), (
            f"loads as something else: {[k for k in stored if differs(stored[k], loaded.get(k))]}"
        )
    return READ


KIND = Kind(3000, folders, trial, seconds=60)
