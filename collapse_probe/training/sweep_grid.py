"""The grid of a sweep: which values of a recipe are varied, and the training run in each cell."""

from __future__ import annotations

import ast
import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from collapse_probe.errors import SettingError
from collapse_probe.results.sweep import spelled
from collapse_probe.training.recipe import Recipe

OPENING, CLOSING = "([{", ")]}"
ORDERS = 120  # of the changes, tried until one makes a recipe
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
        return ",".join(_safe(f"{name}={spelled(value)}") for name, value in {**self.values, "seed": self.seed}.items())


def _safe(text: str) -> str:
    return re.sub(r"[^\w.=+-]+", "-", text)


def read_vary(word: str) -> tuple[str, list[Any]]:
    """A name and its values out of `NAME=V,V,…`: Python literals, `none` for None, or else text.

    Commas within brackets or quotes belong to a value. Raises SettingError.

    >>> read_vary("fix=none,re-attention"), read_vary("betas=(0.9,0.98),none")
    (('fix', [None, 're-attention']), ('betas', [(0.9, 0.98), None]))
    """
    name, equals, text = word.partition("=")
    parts = list(_parts(text))
    if not equals or not name.isidentifier() or not all(parts):
        raise SettingError(f"expected NAME=VALUE,VALUE,… to vary, came {word!r}; for example depth=8,16,24")
    return name, [_value(part) for part in parts]


def _parts(text: str) -> Iterator[str]:
    """`text` cut at the commas that stand in no bracket and no quotes."""
    depth, quote, start = 0, "", 0
    for at, letter in enumerate(text):
        if quote:
            quote = "" if letter == quote else quote
        elif letter in "'\"":
            quote = letter
        elif letter in OPENING + CLOSING:
            depth += 1 if letter in OPENING else -1
        elif letter == "," and depth == 0:
            yield text[start:at].strip()
            start = at + 1
    yield text[start:].strip()


def _value(text: str) -> Any:
    if text.lower() == "none":
        return None
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def cells(
    recipe: Recipe, vary: Mapping[str, Sequence[Any]], seeds: int = 1, changes: Mapping[str, Any] | None = None
) -> list[Cell]:
    """Every combination of the varied values for each of `seeds` seeds, from the recipe's own seed up.

    `changes` are made in all cells. One seed's whole grid comes before the next seed's. Raises SettingError or
    UnknownNameError for a grid in which any recipe cannot be.
    """
    _check(vary, seeds, changes or {})
    first = dict(changes or {}).get("seed", recipe.seed)
    made = []
    for seed, chosen in itertools.product(range(first, first + seeds), itertools.product(*vary.values())):
        values = dict(zip(vary, chosen, strict=True))
        made.append(Cell(values=values, seed=seed, recipe=_varied(recipe, {**(changes or {}), **values, "seed": seed})))
    _check_names(made)
    return made


def _check(vary: Mapping[str, Sequence[Any]], seeds: int, changes: Mapping[str, Any]) -> None:
    if type(seeds) is not int or seeds < 1:
        raise SettingError(f"the number of seeds must be a whole number from 1 up, not {seeds!r}")
    if "seed" in vary:
        raise SettingError("the seed is varied with seeds (--seeds N), not as a value")
    for name, values in vary.items():
        if isinstance(values, str) or len(values) == 0:
            raise SettingError(f"{name}: expected a list of values to vary, came {values!r}")
        if name in changes:
            raise SettingError(f"{name} is varied and set to {changes[name]!r} as well; leave one of the two out")
        twice = [value for at, value in enumerate(values) if value in values[:at]]
        if twice:
            raise SettingError(f"{name}: {spelled(twice[0])} is given twice")


def _varied(recipe: Recipe, changes: Mapping[str, Any]) -> Recipe:
    """The recipe with all changes, in whichever order they fit: heads may need the width first."""
    first: SettingError | None = None
    for order in itertools.islice(itertools.permutations(changes.items()), ORDERS):
        try:
            return recipe.vary(**dict(order))
        except SettingError as error:
            first = first or error
        except TypeError as error:
            raise SettingError(f"{', '.join(f'{k}={spelled(v)}' for k, v in changes.items())}: {error}") from error
    assert first is not None
    raise first


def _check_names(made: Sequence[Cell]) -> None:
    names = [cell.name for cell in made]
    twice = [name for at, name in enumerate(names) if name in names[:at]]
    if twice:
        raise SettingError(f"two cells would share the folder {twice[0]}; give the values in spellings that differ in letters")
    long = [name for name in names if len(name.encode()) > LONGEST_NAME]
    if long:
        raise SettingError(f"a cell's folder would be called {long[0][:60]}…, which is too long; vary fewer values at once")
