"""Which of a block's matrix products are q, k, v, proj, fc1 and fc2: told by their values, else by name, else by order."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from collapse_probe.capture.recorder import AttentionEvent

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
    spectra: dict[tuple[Any, ...], Tensor] = field(default_factory=dict, repr=False)

    def over(self, function: Callable[[Tensor], Tensor], by_head: bool = False) -> NDArray[np.float64]:
        """A function of one matrix [out, in] -> [] in float64 over all, [blocks, names]; NaN where there is none.

        `by_head` gives the mean over the heads' own rows, [heads, rows, in] -> [heads], of q, k and v; NaN for the others.
        Matrices that several blocks share are measured once.
        """

        def one(matrix: Matrix) -> Tensor:
            return function(wide(matrix.by_head)).mean() if by_head else function(wide(matrix.weight))

        return self.each(one, BY_HEAD if by_head else NAMES)

    def each(self, function: Callable[[Matrix], Tensor], names: tuple[str, ...]) -> NDArray[np.float64]:
        """A function of matrices over all that have one of these names, [block, matrix]; NaN for the others."""
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


CHECKED = "checked: it gives what the attention was heard to use"
NAMED = "by its name"
CONVENTION = "by convention: rows in the order q, k, v"
ORDERED = "by its place in the block"
STATED = "as PyTorch's own layer states it"
TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-6}
ROUGH = 3e-2  # half precision
_AFFIXES = ("to_", "in_", "w_", "_proj_weight", "_proj", "_projection", "_linear", "_lin", "_layer")
_CALLED = {
    word: role for role, words in {"q": "q query wq", "k": "k key wk", "v": "v value wv"}.items() for word in words.split()
}


@dataclass(frozen=True, eq=False)
class Product:
    """One multiplication of `rows` vectors by a matrix: `weight` [out, in], `output` [rows, out] while it is needed.

    `name` is that of the parameter, or of the module that multiplied where the matrix is made on the way.
    """

    name: str
    weight: Tensor
    rows: int
    output: Tensor | None = None

    def part(self, rows: Tensor) -> Product:
        """The same with only these rows of the matrix."""
        first, last = int(rows[0]), int(rows[-1]) + 1
        weight = self.weight[first:last] if last - first == len(rows) else self.weight[rows]
        return replace(self, weight=weight, output=None if self.output is None else self.output[:, rows])


Trial = tuple[dict[str, Product], str]
"""One way to give out q, k and v, and what speaks for it where values do not."""


def attention_roles(products: Sequence[Product], event: AttentionEvent) -> tuple[dict[str, Matrix], str]:
    """q, k and v among the products before an attention call, and where they cannot be told, why.

    Each way of giving them out (by name, as thirds of one matrix, …) is tried; the one of which most gives what the attention
    was heard to use is taken.
    """
    heads, vectors = _sizes(event)
    fitting = [p for p in products if p.rows in vectors and p.output is not None]
    products = fitting or [p for p in products if role_by_name(p.name) or "qkv" in p.name]  # windows, pools and channels
    best: tuple[int, Trial, list[str]] | None = None
    for trial in _trials(products, heads):
        checked = _checked(trial[0], event)
        if best is None or len(checked) > best[0]:
            best = len(checked), trial, checked
    if best is None:
        heard = ", ".join(f"{p.name} {list(p.weight.shape)}" for p in products) or "none over its tokens"
        return {}, f"q, k and v cannot be told apart among the products before the attention ({heard})"
    _, (given, how), checked = best
    return {role: Matrix(p.weight, CHECKED if role in checked else how, heads[role]) for role, p in given.items()}, ""


def projection_role(products: Sequence[Product], event: AttentionEvent, values: Matrix | None) -> int | None:
    """Which of the products after an attention call writes what it read.

    The first over its queries that reads the width of its values; or a first one that is followed by an MLP and no more.
    """
    heads, _ = _sizes(event)
    queries = next(iter(event_shape(event)))
    unsure = values is None or values.how == CONVENTION
    wanted = None if unsure or values is None else values.weight.shape[0] // values.heads * heads["q"]
    for index, product in enumerate(products):
        if product.rows == queries and wanted in (None, product.weight.shape[1]):
            return index
    mlp, _ = mlp_roles(products[1:])
    return 0 if mlp and products[0].weight.shape[0] == mlp["fc1"].weight.shape[1] else None


def doubtful_split(found: dict[str, Matrix]) -> str:
    """Why q, k and v that no value confirmed cannot be right: proj reads another width than v gives; else empty."""
    if not {"q", "v", "proj"} <= found.keys() or CHECKED in (found["q"].how, found["v"].how):
        return ""
    gives, reads = found["v"].weight.shape[0] // found["v"].heads * found["q"].heads, found["proj"].weight.shape[1]
    return "" if gives == reads else f"how q, k and v share their matrix is not known: proj reads {reads} values, not {gives}"


def mlp_roles(products: Sequence[Product]) -> tuple[dict[str, Matrix], str]:
    """fc1 and fc2 among the products after the attention's own, and where they cannot be told, why.

    Two layers in a row; or gated ones, whose two first layers are one matrix or are put together to one, [2·hidden, in].
    """
    shapes = [tuple(p.weight.shape) for p in products]
    if len(products) == 2 and shapes[1][1] in (shapes[0][0], shapes[0][0] / 2):
        return {name: Matrix(p.weight, ORDERED) for name, p in zip(("fc1", "fc2"), products, strict=True)}, ""
    if len(products) == 3 and shapes[0] == shapes[1] and shapes[2][1] == shapes[0][0]:
        both = torch.cat([products[0].weight, products[1].weight])
        return {"fc1": Matrix(both, ORDERED), "fc2": Matrix(products[2].weight, ORDERED)}, ""
    heard = ", ".join(f"{p.name} {list(p.weight.shape)}" for p in products) or "none"
    return {}, f"the products after the attention are no MLP of two layers ({heard})"


def event_shape(event: AttentionEvent) -> dict[int, int]:
    """How many vectors asked and were asked: {queries of all maps: their number in a map, keys…: …}."""
    a = event.attention
    if a.q is not None and a.k is not None:
        return {len(a.q) * a.q.shape[2]: a.q.shape[2], len(a.k) * a.k.shape[2]: a.k.shape[2]}
    assert a.probs is not None
    maps, queries, keys = len(a.probs), a.probs.shape[-2], a.probs.shape[-1]
    return {maps * queries: queries, maps * keys: keys}


def _sizes(event: AttentionEvent) -> tuple[dict[str, int], frozenset[int]]:
    """Heads of q, k and v, and over how many vectors the products that give them run."""
    a = event.attention
    if a.q is not None and a.k is not None:
        few = a.k.shape[1]
        return {"q": a.q.shape[1], "k": few, "v": few}, frozenset(event_shape(event))
    assert a.probs is not None
    return dict.fromkeys(BY_HEAD, a.probs.shape[1] if a.probs.ndim == 4 else 1), frozenset(event_shape(event))


def _trials(products: Sequence[Product], heads: dict[str, int]) -> Iterator[Trial]:
    """Every way to give out q, k and v that the shapes allow, the likeliest first."""
    named = {role: p for p in products if (role := role_by_name(p.name))}
    fits = [p for p in products if not role_by_name(p.name)]
    if len(named) == 3:
        yield named, NAMED
    for whole in fits:
        for parts in _split(whole, [heads[role] for role in BY_HEAD]):
            yield dict(zip(BY_HEAD, parts, strict=True)), CONVENTION
    for one, both in itertools.permutations(products, 2):
        rows, others = one.weight.shape[0], both.weight.shape[0]
        if not role_by_name(both.name) and role_by_name(one.name) in ("", "q") and others * heads["q"] == 2 * rows * heads["k"]:
            for parts in _split(both, [heads["k"], heads["v"]]):
                yield {"q": one, "k": parts[0], "v": parts[1]}, CONVENTION
        if not role_by_name(both.name) and role_by_name(one.name) in ("", "v") and others == 2 * rows:
            for parts in _split(both, [heads["q"], heads["k"]]):
                yield {"q": parts[0], "k": parts[1], "v": one}, CONVENTION
    for three in itertools.permutations(products, 3):
        if len(products) == 3 and all(p.weight.shape[0] % heads[role] == 0 for role, p in zip(BY_HEAD, three, strict=True)):
            yield dict(zip(BY_HEAD, three, strict=True)), CONVENTION


def _split(whole: Product, heads: list[int]) -> Iterator[list[Product]]:
    """One matrix as several, `heads` of each: one after the other, or head by head."""
    rows, total = whole.weight.shape[0], sum(heads)
    if rows % total:
        return
    lengths = [h * (rows // total) for h in heads]
    yield [whole.part(part) for part in torch.split(torch.arange(rows), lengths)]
    if len(set(heads)) == 1 and heads[0] > 1:
        by_head = torch.arange(rows).reshape(heads[0], len(heads), -1)
        yield [whole.part(by_head[:, i].flatten()) for i in range(len(heads))]


def role_by_name(name: str) -> str:
    """ "q", "k" or "v" where a parameter or module is called so, else "".

    >>> role_by_name("layer.0.attention.query.weight"), role_by_name("attn.k_proj.weight"), role_by_name("attn.qkv.weight")
    ('q', 'k', '')
    """
    word = re.sub(r"\.(weight|bias)$", "", name).rpartition(".")[2].lower()
    for affix in _AFFIXES:
        word = word.removesuffix(affix) if affix.startswith("_") else word.removeprefix(affix)
    return _CALLED.get(word, "")


def _checked(given: dict[str, Product], event: AttentionEvent) -> list[str]:
    """Which of q, k and v give what was heard: the kernel's own arguments, or else the softmax's map from q and k."""
    a = event.attention
    if a.q is not None:
        heard = {"q": a.q, "k": a.k, "v": event.value}
        return [role for role, target in heard.items() if target is not None and _same(given[role].output, target)]
    return ["q", "k"] if _gives_map(given, event) else []


def _same(output: Tensor | None, target: Tensor) -> bool:
    """Whether vectors [rows, out] are those of [B, H, N, K] up to a positive factor and an offset (scale and bias)."""
    if output is None or output.numel() != target.numel():
        return False
    tolerance = TOLERANCE.get(output.dtype, ROUGH)
    x = _centred(output)
    for axes in ((0, 2, 1, 3), (2, 0, 1, 3)):
        if _parallel(x, _centred(target.permute(*axes).reshape(output.shape)), tolerance):
            return True
    return False


def _centred(vectors: Tensor) -> Tensor:
    whole = vectors.detach().cpu().double()
    return whole - whole.mean(0, keepdim=True)


def _gives_map(given: dict[str, Product], event: AttentionEvent) -> bool:
    """Whether q kᵀ of the first map gives the softmax that was heard: its logarithm, up to a factor and an offset a row."""
    probs, q, k = event.attention.probs, given["q"].output, given["k"].output
    if probs is None or probs.ndim != 4 or q is None or k is None or q.shape != k.shape or probs.shape[2] != probs.shape[3]:
        return False
    maps, heads, tokens, _ = probs.shape
    heard = probs[0].detach().cpu().double().log()
    if q.shape[1] % heads or not heard.isfinite().all():
        return False
    tolerance = 10 * TOLERANCE.get(probs.dtype, ROUGH)  # a logarithm of float32 entries near 1/N has lost some digits
    y = heard - heard.mean(-1, keepdim=True)
    for shape, at in (((maps, tokens, heads, -1), (0,)), ((tokens, maps, heads, -1), (slice(None), 0))):
        query, key = (x.detach().cpu().double().reshape(shape)[at].transpose(0, 1) for x in (q, k))
        products = query @ key.mT
        if _parallel(products - products.mean(-1, keepdim=True), y, tolerance):
            return True
    return False


def _parallel(x: Tensor, y: Tensor, tolerance: float) -> bool:
    """Whether y is a positive multiple of x."""
    factor = (x * y).sum() / x.square().sum().clamp_min(torch.finfo(torch.float64).tiny)
    return bool(factor > 0 and (y - factor * x).norm() <= tolerance * y.norm())
