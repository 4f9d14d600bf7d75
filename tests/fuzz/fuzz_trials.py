"""Trials of hostile and unlucky input: seeded, counted, each within a time limit, and repeatable by its number alone."""

from __future__ import annotations

import faulthandler
import importlib
import logging
import signal
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory
from typing import Any

from collapse_probe.errors import CollapseProbeError

KINDS = ("images", "archives", "findings", "checkpoints", "commands", "kills", "resumes", "disks")
READ, REFUSED, SKIPPED = "read", "refused", "skipped"


class TooLong(BaseException):
    """Raised by the clock: no `except Exception` takes it."""


@dataclass(frozen=True)
class Kind:
    """`prepare(folder)` makes what all trials share; `trial(random, folder, shared)` says how one went, or raises.

    Any exception of a trial is a violation. The folder of a trial is empty. `seconds` is the most that one may take.
    """

    count: int
    prepare: Callable[[Path], Any]
    trial: Callable[[Random, Path, Any], str]
    seconds: int = 20


@dataclass
class Tally:
    """How the trials of one kind went, and how to repeat those that should not have gone so."""

    name: str
    counts: Counter[str] = field(default_factory=Counter)
    violations: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        counts = ", ".join(f"{count} {how}" for how, count in sorted(self.counts.items()))
        lines = [f"{self.name}: {sum(self.counts.values())} trials, {counts or 'none'}; {len(self.violations)} violations"]
        return "\n".join([*lines, *(f"  {violation}" for violation in self.violations)])


def run(name: str, kind: Kind, seed: int = 0, share: float = 1.0, only: int | None = None) -> Tally:
    """The first `share` of a kind's trials, or the one numbered `only`, whose violation shows where it was raised."""
    tally = Tally(name)
    numbers = range(max(1, round(kind.count * share))) if only is None else [only]
    with TemporaryDirectory() as place, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        shared = kind.prepare(Path(place))
        for number in numbers:
            with TemporaryDirectory(dir=place) as folder:
                before = signal.signal(signal.SIGALRM, _too_long)
                signal.alarm(kind.seconds)
                try:
                    tally.counts[kind.trial(Random(f"{name} {seed} {number}"), Path(folder), shared)] += 1
                except (Exception, SystemExit, TooLong) as error:
                    tally.counts["wrong"] += 1
                    said = traceback.format_exc() if only is not None else f"{type(error).__name__}: {str(error)[:300]}"
                    tally.violations.append(f"python -m tests.fuzz {name} --seed {seed} --trial {number}: {said}")
                finally:
                    signal.alarm(0)
                    signal.signal(signal.SIGALRM, before)
    return tally


def tally_of(job: tuple[str, int, float, int | None]) -> Tally:
    """The kind, seed, share and trial of a job, in a process of its own."""
    logging.disable()
    faulthandler.enable()
    name, *asked = job
    return run(name, importlib.import_module(f"fuzz_{name}").KIND, *asked)


def _too_long(*_: object) -> None:
    raise TooLong("took longer than its limit")


def refused(error: CollapseProbeError, *names: object) -> str:
    """REFUSED, for an error of one line that holds one of the names."""
    text = str(error)
    assert "\n" not in text.strip(), f"an error of several lines: {text!r}"
    assert any(str(name) in text for name in names), f"names none of {[str(name) for name in names]}: {text!r}"
    return REFUSED


def mutated(random: Random, content: bytes, other: bytes = b"") -> bytes:
    """`content` after one to three changes: flipped, cut, inserted, repeated, zeroed, or spliced with `other`."""
    data = bytearray(content)
    for _ in range(random.choice((1, 1, 1, 2, 3))):
        size = len(data)
        if not size:
            break
        at = random.choice((random.randrange(size), random.randrange(min(size, 64)), max(0, size - 1 - random.randrange(64))))
        length = random.choice((1, 2, 4, 16, 512, random.randrange(1, size + 1)))
        way = random.randrange(7)
        if way == 0:
            for _ in range(random.choice((1, 1, 4, 32))):
                data[random.randrange(size) if random.random() < 0.5 else at] ^= 1 << random.randrange(8)
        elif way == 1:
            del data[at:]
        elif way == 2:
            data[at:at] = random.randbytes(length % 4096)
        elif way == 3:
            data[at:at] = data[at : at + length]
        elif way == 4:
            data[at : at + length] = bytes(len(data[at : at + length]))
        elif way == 5:
            number = random.choice((0, 1, 255, 65535, 2**31 - 1, 2**32 - 1, random.randrange(2**32)))
            data[at : at + 4] = number.to_bytes(4, random.choice(("big", "little")))
        else:
            data[at:] = other[random.randrange(len(other) + 1) :]
    return bytes(data)
