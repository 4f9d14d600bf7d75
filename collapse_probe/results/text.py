"""Numbers and facts as a reader should meet them: a real minus, and a dash where nothing is defined."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from collapse_probe.statistics.intervals import Array

DASH = "–"
MOST_ITEMS = 32
MOST_REASONS = 4  # why blocks are not compared


def number(value: Any, digits: int = 3) -> str:
    """A number with so many decimals and a real minus; a dash where it is undefined.

    >>> number(-0.01234), number(None), number(float("nan"))
    ('−0.012', '–', '–')
    """
    if value is None or not math.isfinite(value):
        return DASH
    text = f"{value:.{digits}f}"
    return text.lstrip("-") if float(text) == 0 else text.replace("-", "−")


def sentence_case(text: str) -> str:
    """The text with a capital first letter."""
    return f"{text[:1].upper()}{text[1:]}"


def visible(text: str) -> str:
    """A name that somebody else chose, with its line breaks and marks of direction as text.

    >>> visible("a\nb\u202ec")
    'a⟨U+000A⟩b⟨U+202E⟩c'
    """
    return "".join(letter if letter == " " or letter.isprintable() else f"⟨U+{ord(letter):04X}⟩" for letter in text)


def interval(ends: Sequence[float] | Array | None, digits: int = 3) -> str:
    """The two ends of an interval, or a dash."""
    if ends is None or not np.isfinite(np.asarray(ends, dtype=np.float64)).all():
        return DASH
    return f"[{number(ends[0], digits)}, {number(ends[1], digits)}]"


def p_value(p: float | None) -> str:
    """A p-value as it should be read.

    >>> p_value(0.0312), p_value(1e-7), p_value(float("nan"))
    ('0.031', '< 0.001', '–')
    """
    return "< 0.001" if p is not None and p < 0.001 else number(p)


def spans(numbers: Sequence[int]) -> str:
    """Block numbers as spans.

    >>> spans([3, 4, 5, 9])
    '3–5, 9'
    """
    runs: list[list[int]] = []
    for n in numbers:
        if runs and n == runs[-1][1] + 1:
            runs[-1][1] = n
        else:
            runs.append([n, n])
    return ", ".join(f"{a}" if a == b else f"{a}–{b}" for a, b in runs)


def listed(numbers: Sequence[int]) -> str:
    """Numbers as a sentence lists them, three or more in a row as a span.

    >>> listed([3, 7, 9]), listed([4]), listed([2, 3, 5, 6, 7])
    ('3, 7 and 9', '4', '2, 3 and 5–7')
    """
    parts: list[str] = []
    for run in spans(numbers).split(", "):
        first, _, last = run.partition("–")
        parts += [first, last] if last and int(last) == int(first) + 1 else [run]
    return f"{', '.join(parts[:-1])} and {parts[-1]}" if parts[1:] else parts[0]


def with_reasons(reasons: Mapping[str, Sequence[int]]) -> str:
    """Blocks by the reason, each followed by it; after a few reasons only that there are more."""
    which = "; ".join(f"{numbered(blocks)} ({why})" for why, blocks in list(reasons.items())[:MOST_REASONS])
    return f"{which}; …" if len(reasons) > MOST_REASONS else which


def no_neighbours(reasons: Mapping[str, Sequence[int]]) -> str:
    """That no block is compared with the one before, and which blocks for which reason."""
    which = f" ({next(iter(reasons))})" if len(reasons) == 1 else f": {with_reasons(reasons)}" if reasons else ""
    return f"no two neighbouring blocks can be compared{which}"


def numbered(blocks: Sequence[int]) -> str:
    """Numbers of blocks as words: "block 3", "blocks 1–4, 7"."""
    return f"{'block' if len(blocks) == 1 else 'blocks'} {spans(blocks)}"


def plain(value: Any) -> str:
    """Any value of the provenance as words: nested facts joined, nothing undefined shown as such.

    >>> plain(np.array([0.5, np.nan])), plain({"a_b": [1, 2]})
    ('0.5, –', 'a b (1, 2)')
    """
    if isinstance(value, (np.ndarray, np.generic)):
        return plain(value.tolist())
    if value is None or value == "" or (isinstance(value, float) and not math.isfinite(value)):
        return DASH
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, Mapping):
        return ", ".join(f"{_spaced(key)} {_inner(item)}" for key, item in value.items()) or DASH
    if isinstance(value, (list, tuple)):
        return _several([plain(item) for item in value])
    if isinstance(value, float):
        return f"{value:.4g}".replace("-", "−") if abs(value) < 1e5 else f"{value:,.0f}"
    return str(value)


def facts(stored: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The names and values of `stored` as a page lists them."""
    return [(_spaced(key), plain(value)) for key, value in stored.items()]


def _inner(value: Any) -> str:
    return f"({plain(value)})" if isinstance(value, (list, tuple, Mapping)) and value else plain(value)


def _several(items: list[str]) -> str:
    if len(items) > 2 and len(set(items)) == 1:
        return f"{items[0]} (each of {len(items)})"
    if len(items) > MOST_ITEMS:
        return f"{', '.join(items[:MOST_ITEMS])} … ({len(items)} in all, in findings.json)"
    return ", ".join(items) or DASH


def _spaced(key: Any) -> str:
    return str(key).replace("_", " ")
