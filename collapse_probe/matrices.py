"""The weight matrices of a model's blocks as it multiplies by them: q, k, v, proj, fc1, fc2."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from collapse_probe.spectra import singular_values

Array = NDArray[np.float64]
NAMES = ("q", "k", "v", "proj", "fc1", "fc2")
"""The `matrix` axis: three that read the tokens, one that writes what attention read, the two layers of the MLP."""
BY_HEAD = ("q", "k", "v")
INTO_THE_STREAM = ("proj", "fc2")
"""Matrices whose output is added to the tokens; the others read the tokens."""


@dataclass(frozen=True, eq=False)
class Matrix:
    """One weight matrix [out, in], rows being output neurons, and how it was told which one it is.

    `heads` rows of equal parts belong to one attention head each (1 outside q, k and v).
    """

    weight: Tensor
    how: str
    heads: int = 1

    @property
    def key(self) -> tuple[Any, ...]:
        """The same for matrices that are one and the same memory, as in weight-tied blocks."""
        w = self.weight
        return w.data_ptr(), w.storage_offset(), tuple(w.shape), tuple(w.stride()), self.heads

    @property
    def by_head(self) -> Tensor:
        """[heads, rows of a head, in]."""
        return self.weight.reshape(self.heads, -1, self.weight.shape[-1])


@dataclass(frozen=True, eq=False)
class Matrices:
    """What was found in each block: `found[block][name]`, or `missing[block][name]`, the reason why it was not."""

    blocks: tuple[str, ...]
    found: tuple[Mapping[str, Matrix], ...]
    missing: tuple[Mapping[str, str], ...]
    _spectra: dict[tuple[Any, ...], Tensor] = field(default_factory=dict, repr=False)

    def over(self, function: Callable[[Tensor], Tensor], by_head: bool = False) -> Array:
        """A function of one matrix [out, in] -> [] in float64 over all, [blocks, names]; NaN where there is none.

        `by_head` gives the mean over the heads' own rows, [heads, rows, in] -> [heads], of q, k and v; NaN for the others.
        Matrices that several blocks share are measured once.
        """

        def one(matrix: Matrix) -> Tensor:
            return function(wide(matrix.by_head)).mean() if by_head else function(wide(matrix.weight))

        return self._each(one, BY_HEAD if by_head else NAMES)

    def spectral(self, function: Callable[[Tensor], Tensor], by_head: bool = False) -> Array:
        """A function of singular values [..., r] -> [...] over all matrices, as `over`; each is decomposed once."""

        def one(matrix: Matrix) -> Tensor:
            key = (*matrix.key, by_head)
            if key not in self._spectra:
                self._spectra[key] = singular_values(matrix.by_head if by_head else matrix.weight)
            return function(self._spectra[key]).mean()

        return self._each(one, BY_HEAD if by_head else NAMES)

    def _each(self, function: Callable[[Matrix], Tensor], names: tuple[str, ...]) -> Array:
        values = np.full((len(self.blocks), len(NAMES)), np.nan)
        known: dict[tuple[Any, ...], float] = {}
        for block, held in enumerate(self.found):
            for name in names:
                if name in held:
                    key = held[name].key
                    known[key] = known[key] if key in known else float(function(held[name]))
                    values[block, NAMES.index(name)] = known[key]
        return values

    def shapes(self) -> list[list[list[int] | None]]:
        """[out, in] of every matrix, by block and name; None where there is none."""
        return [[list(held[name].weight.shape) if name in held else None for name in NAMES] for held in self.found]

    def hows(self) -> dict[str, int]:
        """How the matrices were told apart, and how many in each way."""
        ways = [matrix.how for held in self.found for matrix in held.values()]
        return {how: ways.count(how) for how in dict.fromkeys(ways)}

    def reasons(self) -> list[str]:
        """One line for each reason why matrices are missing, with the blocks and names that it stands for."""
        found: dict[str, dict[str, list[str]]] = {}
        for block, missing in zip(self.blocks, self.missing, strict=True):
            for name, reason in missing.items():
                found.setdefault(reason, {}).setdefault(block, []).append(name)
        return [
            f"{', '.join(names)} of {block}{f' and {len(places) - 1} more blocks' if len(places) > 1 else ''}: {reason}"
            for reason, places in found.items()
            for block, names in [next(iter(places.items()))]
        ]


def wide(matrix: Tensor) -> Tensor:
    """The matrix detached in float64, on the CPU where its device has none."""
    return (matrix.cpu() if matrix.device.type == "mps" else matrix).detach().to(torch.float64)
