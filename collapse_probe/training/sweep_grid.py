"""The grid of a sweep: which values of a recipe are varied, and the training run in each cell."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from collapse_probe.errors import SettingError
from collapse_probe.results.sweep import spelled
from collapse_probe.settings import parse_value
from collapse_probe.training.recipe import Recipe

LONGEST_NAME = 200


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One training run of a grid: the varied `values` by name, the seed, and the whole recipe."""

    values: Mapping[str, Any] = field(default_factory=dict)
    seed: int
    recipe: Recipe

    @property
    def name(self) -> str:
        """The name of its folder, which says its values: `depth=16,fix=re-attention,seed=0`."""
        words = [f"{name}={spelled(value)}" for name, value in {**self.values, "seed": self.seed}.items()]
        return ",".join(re.sub(r"[^\w.=+-]+", "-", word) for word in words)


def read_vary(word: str) -> tuple[str, list[Any]]:
    """A name and its values out of `NAME=V,V,…`: Python literals, `none` for None, or else text.

    Commas within brackets or quotes belong to a value. Raises SettingError.

    >>> read_vary("fix=none,re-attention"), read_vary("betas=(0.9,0.98),none")
    (('fix', [None, 're-attention']), ('betas', [(0.9, 0.98), None]))
    """
    name, equals, text = word.partition("=")
    parts = list(_split(text))
    if not equals or not name.isidentifier() or not all(parts):
        raise SettingError(f"expected NAME=VALUE,VALUE,… to vary, came {word!r}; for example depth=8,16,24")
    return name, [None if part.lower() == "none" else parse_value(part) for part in parts]


def _split(text: str) -> Iterator[str]:
    """`text` cut at the commas that stand in no bracket and no quotes."""
    depth, quote, start = 0, "", 0
    for at, letter in enumerate(text):
        if quote:
            quote = "" if letter == quote else quote
        elif letter in "'\"":
            quote = letter
        elif letter in "([{":
            depth += 1
        elif letter in ")]}":
            depth -= 1
        elif letter == "," and depth == 0:
            yield text[start:at].strip()
            start = at + 1
    yield text[start:].strip()


def cells(
    recipe: Recipe, vary: Mapping[str, Sequence[Any]], seeds: int = 1, changes: Mapping[str, Any] | None = None
) -> list[Cell]:
    """Every combination of the varied values for each of `seeds` seeds, from the recipe's own seed up.

    `changes` are made in all cells. One seed's whole grid comes before the next seed's. Raises SettingError or
    UnknownNameError for a grid in which any recipe cannot be, or whose cells' folders could not be told apart.
    """
    changes = changes or {}
    if type(seeds) is not int or seeds < 1:
        raise SettingError(f"the number of seeds must be a whole number from 1 up, not {seeds!r}")
    if "seed" in vary:
        raise SettingError("the seed is varied with seeds (--seeds N), not as a value")
    for name, listed in vary.items():
        if isinstance(listed, str) or len(listed) == 0:
            raise SettingError(f"{name}: expected a list of values to vary, came {listed!r}")
        if name in changes:
            raise SettingError(f"{name} is varied and set to {changes[name]!r} as well; leave one of the two out")
        if twice := _repeated(listed):
            raise SettingError(f"{name}: {spelled(twice[0])} is given twice")
    first = changes.get("seed", recipe.seed)
    grid = []
    for seed, combination in itertools.product(range(first, first + seeds), itertools.product(*vary.values())):
        values = dict(zip(vary, combination, strict=True))
        grid.append(Cell(values=values, seed=seed, recipe=recipe.vary(**{**changes, **values, "seed": seed})))
    names = [cell.name for cell in grid]
    if twice := _repeated(names):
        raise SettingError(f"two cells would share the folder {twice[0]}; give the values in spellings that differ in letters")
    for name in names:
        if len(name.encode()) > LONGEST_NAME:
            raise SettingError(f"a cell's folder would be called {name[:60]}…, which is too long; vary fewer values at once")
    return grid


def _repeated(values: Sequence[Any]) -> list[Any]:
    return [value for at, value in enumerate(values) if value in values[:at]]
