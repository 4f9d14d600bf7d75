"""What long work says of itself: lines, some of which begin a phase."""

from __future__ import annotations

LOAD, PROBE, WEIGHTS, IMAGES, UNTRAINED = "load", "probe", "weights", "images", "untrained copy"
CHOSEN, REPLACED, PAGE = "order of the blocks", "blocks changed", "page"
TRAINING, CELLS = "training", "cells"


class Phase(str):
    """A line with which the phase `name` begins; for who only reads lines it is one like the others."""

    name: str

    def __new__(cls, name: str, line: str) -> Phase:
        """The line, which also says what begins."""
        phase = super().__new__(cls, line)
        phase.name = name
        return phase
