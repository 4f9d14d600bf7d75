"""Runs that are killed at any moment and taken up again: at the end they say what an unbroken run says, to the last bit."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import fuzz_commands
import numpy as np
from fuzz_commands import TINY, without_figures
from fuzz_kills import STOPPED, _ended, _in_child, _stop_at
from fuzz_trials import Kind

IMAGES, BATCH = 48, 4
OF_A_RUN = ("id", "created", "seconds", "images_per_second", "peak_memory_bytes", "command", "cost", "until_ci")
"""What two runs of the same say differently."""
DOCUMENTS = {"analyze": "findings.json", "compare": "comparison.json", "intervene": "interventions.json"}
MODEL = ("timm:vit_tiny_patch16_224", "--no-pretrained", *TINY)
MOST_KILLS = 6


@dataclass(frozen=True)
class Unbroken:
    """A command without its output folder, the seconds that it takes, and what it writes."""

    words: tuple[str, ...]
    seconds: float
    results: dict[str, Any]


def numbers_of(value: Any, place: str = "") -> Iterator[tuple[str, Any]]:
    """Every plain value of a document by its place, but for those of a run."""
    if isinstance(value, dict):
        for key, item in value.items():
            if key not in OF_A_RUN and not (key == "run" and isinstance(item, str)):
                yield from numbers_of(item, f"{place}/{key}")
    elif isinstance(value, list):
        for i, item in enumerate(value):
            yield from numbers_of(item, f"{place}/{i}")
    else:
        yield place, value


def results_of(folder: Path) -> dict[str, Any]:
    """All that a run found: the values of its documents and arrays."""
    found: dict[str, Any] = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.name in DOCUMENTS.values():
            found |= {f"{name}{place}": value for place, value in numbers_of(json.loads(path.read_text()))}
        elif path.suffix == ".npz":
            with np.load(path) as arrays:
                found |= {f"{name}/{key}": arrays[key].tobytes() for key in arrays.files}
    return found


def _run(words: tuple[str, ...], out: Path, said: Path) -> int:
    """The process id of a child that runs a command as a user would."""

    def work() -> None:
        with said.open("a") as stream:
            os.dup2(stream.fileno(), 1)
            os.dup2(stream.fileno(), 2)
        sys.stdout, sys.stderr = (io.TextIOWrapper(io.FileIO(handle, "w"), write_through=True) for handle in (1, 2))
        fuzz_commands.main([*words, "-o", str(out)])

    return _in_child(work)


def prepare(place: Path) -> list[Unbroken]:
    """The unbroken runs of all commands."""
    photos = place / "photos"
    photos.mkdir()
    random = np.random.default_rng(0)
    from PIL import Image

    for i in range(IMAGES):
        picture = Image.fromarray(random.integers(0, 256, (40, 40, 3), dtype=np.uint8))
        picture.save(photos / f"{i:03d}.png")
    (photos / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n and no more")
    data = ("--data", str(photos), "-b", str(BATCH), "--save-every", "0", "-j", "0", "-q")
    commands = {
        "analyze": ("-m", *MODEL, *data, "--level", "attention", "--metric", "layer-cka", "--null-images", "8"),
        "compare": ("timm:vit_tiny_patch16_224", "timm:deit_tiny_patch16_224", *MODEL[1:], *data, "--null-images", "4"),
        "intervene": ("-m", *MODEL, *data, "--replace", "mean", "--replace", "share"),
    }
    made = []
    with without_figures():
        for name, words in commands.items():
            for _ in range(2):  # the second time without what is only read once
                out, start = place / "unbroken" / name, time.monotonic()
                shutil.rmtree(out, ignore_errors=True)
                code = _ended(_run((name, *words), out, place / "said.txt"))
                assert code == 0, (place / "said.txt").read_text()[-1000:]
            made.append(Unbroken((name, *words), time.monotonic() - start, results_of(out)))
            assert not (out / ".state").exists(), "states are left"
    return made


def trial(random: Random, folder: Path, made: list[Unbroken]) -> str:
    """A run that is killed a few times, and then ends."""
    run = random.choice((*made, made[0], made[0], made[0], made[0], made[0]))
    out, said, kills, code = folder / "out", folder / "said.txt", 0, None
    with without_figures():
        while code != 0:
            words = (*run.words, "--resume") if kills else run.words
            if kills < MOST_KILLS and (not kills or random.random() < 0.6):
                code = _killed(random, run, words, out, said)
                assert code in (0, -signal.SIGKILL, STOPPED, 128 + signal.SIGTERM, 130), f"{code}: {said.read_text()[-800:]}"
            else:
                code = _ended(_run(words, out, said))
                assert code == 0, f"{code}: {said.read_text()[-800:]}"
            kills += code != 0
    text = said.read_text()
    assert "Traceback" not in text, text[-1500:]
    found = results_of(out)
    assert found.keys() == run.results.keys(), sorted(found.keys() ^ run.results.keys())[:5]
    other = [place for place in found if found[place] != run.results[place]]
    assert not other, (
        f"{len(other)} of {len(found)} values differ, the first {other[0]}: {run.results[other[0]]} {found[other[0]]}"
    )
    assert not (out / ".state").exists(), "states are left"
    return f"{run.words[0]}, killed {'and taken up' if kills else 'too late'}"


def _killed(random: Random, run: Unbroken, words: tuple[str, ...], out: Path, said: Path) -> int:
    """The exit code of a run that is stopped: by a signal at some time, or at its n-th call that opens or changes a file."""
    if random.random() < 0.3:

        def work() -> None:
            with said.open("a") as stream:
                os.dup2(stream.fileno(), 1)
                os.dup2(stream.fileno(), 2)
            sys.stdout, sys.stderr = (io.TextIOWrapper(io.FileIO(handle, "w"), write_through=True) for handle in (1, 2))
            _stop_at(random)
            fuzz_commands.main([*words, "-o", str(out)])

        return _ended(_in_child(work))
    child = _run(words, out, said)
    time.sleep(random.uniform(0, run.seconds))
    os.kill(child, random.choice((signal.SIGKILL, signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT)))
    return _ended(child)


KIND = Kind(360, prepare, trial, seconds=180)
