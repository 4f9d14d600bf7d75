"""Which of a block's matrix products are q, k, v, proj, fc1 and fc2: told by their values, else by name, else by order."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from collapse_probe.capture.recorder import AttentionEvent
from collapse_probe.capture.trace import Attention

NAMES = ("q", "k", "v", "proj", "fc1", "fc2")
"""The `matrix` axis: three that read the tokens, one that writes what attention read, the two layers of the MLP."""
BY_HEAD = ("q", "k", "v")
INTO_THE_STREAM = ("proj", "fc2")
"""Matrices whose output is added to the tokens; the others read the tokens."""

CHECKED = "checked: it gives what the attention used"
NAMED = "by its name"
CONVENTION = "by convention: rows in the order q, k, v"
ORDERED = "by its place in the block"
STATED = "as PyTorch's own layer states it"


@dataclass(frozen=True, eq=False)
class Matrix:
    """One weight matrix [out, in], rows being output neurons, and how it was told which one it is.

    `heads` rows of equal parts belong to one attention head each (1 outside q, k and v); `parts` are the products of the pass
    of which it is made. `gain` [in] is that of the norm whose output the matrix reads; None where no norm was seen to give it.
    `softmaxes` is how many softmax maps were merged into the map of a head: more than one where parts of its rows meet apart.
    """

    weight: Tensor
    how: str
    heads: int = 1
    parts: frozenset[int] = frozenset()
    gain: Tensor | None = None
    softmaxes: int = 1

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
    """The matrices of each block, `by_block[block][name]`, or `missing[block][name]`, the reason why there is none."""

    blocks: tuple[str, ...]
    by_block: tuple[Mapping[str, Matrix], ...]
    missing: tuple[Mapping[str, str], ...]
    spectra: dict[tuple[Any, ...], Tensor] = field(default_factory=dict, repr=False)

    def over(self, function: Callable[[Tensor], Tensor], by_head: bool = False) -> NDArray[np.float64]:
        """A function of one matrix [out, in] -> [] in float64 over all, [blocks, names]; NaN where there is none.

        `by_head` gives the mean over the heads' own rows, [heads, rows, in] -> [heads], of q, k and v; NaN for the others.
        Matrices that several blocks share are measured once.
        """

        if by_head:
            return self.each(lambda matrix: function(wide(matrix.by_head)).mean(), BY_HEAD)
        return self.each(lambda matrix: function(wide(matrix.weight)), NAMES)

    def each(self, function: Callable[[Matrix], Tensor], names: tuple[str, ...]) -> NDArray[np.float64]:
        """A function of matrices over all that have one of these names, [block, matrix]; NaN for the others."""
        values = np.full((len(self.blocks), len(NAMES)), np.nan)
        known: dict[tuple[Any, ...], float] = {}
        for block, matrices in enumerate(self.by_block):
            for name in names:
                if name in matrices:
                    key = matrices[name].key
                    known[key] = known[key] if key in known else float(function(matrices[name]))
                    values[block, NAMES.index(name)] = known[key]
        return values

    def hows(self) -> dict[str, int]:
        """How the matrices were told apart, and how many in each way."""
        ways = [matrix.how for block in self.by_block for matrix in block.values()]
        return {how: ways.count(how) for how in dict.fromkeys(ways)}

    def reasons(self) -> list[str]:
        """One line for each reason why matrices are missing, with the blocks and names that it stands for."""
        places: dict[str, dict[str, list[str]]] = {}
        for block, missing in zip(self.blocks, self.missing, strict=True):
            for name, reason in missing.items():
                places.setdefault(reason, {}).setdefault(block, []).append(name)
        lines = []
        for reason, blocks in places.items():
            block, names = next(iter(blocks.items()))
            more = f" and {len(blocks) - 1} more blocks" if len(blocks) > 1 else ""
            lines.append(f"{', '.join(names)} of {block}{more}: {reason}")
        return lines


def wide(matrix: Tensor) -> Tensor:
    """The matrix detached in float64, on the CPU where its device has none."""
    return (matrix.cpu() if matrix.device.type == "mps" else matrix).detach().to(torch.float64)


@dataclass(frozen=True, eq=False)
class Product:
    """One multiplication of `rows` vectors by a matrix: `weight` [out, in], `output` [rows, out] while it is needed.

    `name` is that of the parameter, or of the module that multiplied where the matrix is made on the way. `parts` are the
    products of the pass that it sums up: more than one where products are added or follow one another. `gain` as in `Matrix`.
    """

    name: str
    weight: Tensor
    rows: int
    output: Tensor | None = None
    parts: frozenset[int] = frozenset()
    gain: Tensor | None = None

    @property
    def role(self) -> str:
        """What its name says."""
        return role_by_name(self.name)

    def part(self, rows: Tensor) -> Product:
        """The same with only these rows of the matrix."""
        first, last = int(rows[0]), int(rows[-1]) + 1
        weight = self.weight[first:last] if last - first == len(rows) else self.weight[rows]
        return replace(self, weight=weight, output=None if self.output is None else self.output[:, rows])


_AFFIXES = ("to_", "in_", "w_", "_proj_weight", "_proj", "_projection", "_linear", "_lin", "_layer")
_WORDS = {"q": "q", "query": "q", "wq": "q", "k": "k", "key": "k", "wk": "k", "v": "v", "value": "v", "wv": "v"}


_AROUND = {"weight", "bias", "base_layer", "base", "linear", "module", "_orig_mod"}  # what wrappers call the layer inside


def role_by_name(name: str) -> str:
    """ "q", "k" or "v" where a parameter or module is called so, else "".

    >>> role_by_name("layer.0.attention.query.weight"), role_by_name("attn.k_proj.weight"), role_by_name("attn.qkv.weight")
    ('q', 'k', '')
    """
    words = [word for word in name.lower().split(".") if word not in _AROUND]
    word = words[-1] if words else ""
    for affix in _AFFIXES:
        word = word.removesuffix(affix) if affix.startswith("_") else word.removeprefix(affix)
    return _WORDS.get(word, "")


def wholes(products: Sequence[Product]) -> list[Product]:
    """The products that are no part of another one."""
    return [p for p in products if not any(p.parts < other.parts for other in products)]


def attention_roles(
    products: Sequence[Product], event: AttentionEvent, values: Sequence[Tensor]
) -> tuple[dict[str, Matrix], str]:
    """q, k and v among the products before an attention call, and where they cannot be told, why.

    Each assignment that the shapes allow (by name, as thirds of one matrix, …) is compared with what the attention used, its
    `values` [B, H, N, K] in every way in which they can be read among that; the one of which most products agree is taken.
    """
    a, heads, vectors = event.attention, _heads(event.attention), vectors_of(event.attention)
    fitting = [p for p in products if p.rows in vectors and p.output is not None]
    products = fitting or [p for p in products if p.role or "qkv" in p.name]  # windows, pools and channels
    trials = []
    for candidates in (wholes(products), products):
        for given, how in _assignments(candidates, heads):
            agreeing = [role for role, target in (("q", a.q), ("k", a.k)) if _gives(given[role].output, target)]
            if a.q is None and _gives_map(given, a):
                agreeing = ["q", "k"]
            if any(_gives(given["v"].output, value) for value in values):
                agreeing.append("v")
            trials.append((given, how, agreeing))
        if any(len(agreeing) == len(BY_HEAD) for _, _, agreeing in trials):
            break
    if not trials:
        came = _listed(products) or "none over its tokens"
        return {}, f"q, k and v cannot be told apart among the products before the attention ({came})"
    given, how, agreeing = max(trials, key=lambda trial: len(trial[2]))
    merged = event.softmaxes
    hows = {role: CHECKED if role in agreeing else how for role in given}
    return {r: Matrix(p.weight, hows[r], heads[r], p.parts, p.gain, merged) for r, p in given.items()}, ""


def projection_role(products: Sequence[Product], event: AttentionEvent, values: Matrix | None) -> Product | None:
    """Which of the products after an attention call writes what it read.

    The first over its queries that reads the width of its values; or a first one that is followed by an MLP and no more.
    """
    queries, width = vectors_of(event.attention)[0], None
    if values is not None and values.how != CONVENTION:
        width = values.weight.shape[0] // values.heads * _heads(event.attention)["q"]
    for product in products:
        if product.rows == queries and width in (None, product.weight.shape[1]):
            return product
    mlp, _ = mlp_roles(products[1:])
    return products[0] if mlp and products[0].weight.shape[0] == mlp["fc1"].weight.shape[1] else None


def doubtful_split(matrices: Mapping[str, Matrix]) -> str:
    """Why q, k and v that no value confirmed cannot be right: proj reads another width than v gives; else empty."""
    if not {"q", "v", "proj"} <= matrices.keys() or CHECKED in (matrices["q"].how, matrices["v"].how):
        return ""
    gives = matrices["v"].weight.shape[0] // matrices["v"].heads * matrices["q"].heads
    reads = matrices["proj"].weight.shape[1]
    return "" if gives == reads else f"how q, k and v share their matrix is not known: proj reads {reads} values, not {gives}"


def mlp_roles(products: Sequence[Product]) -> tuple[dict[str, Matrix], str]:
    """fc1 and fc2 among the products after the attention's own, and where they cannot be told, why.

    Two layers in a row; or gated ones, whose two first layers are one matrix or are put together to one, [2·hidden, in].
    """
    weights = [p.weight for p in products]
    shapes = [tuple(weight.shape) for weight in weights]
    if len(products) == 3 and shapes[0] == shapes[1] and shapes[2][1] == shapes[0][0]:
        weights = [torch.cat(weights[:2]), weights[2]]
    elif len(products) != 2 or shapes[1][1] not in (shapes[0][0], shapes[0][0] / 2):
        return {}, f"the products after the attention are no MLP of two layers ({_listed(products) or 'none'})"
    parts = frozenset().union(*(p.parts for p in products[:-1])), products[-1].parts
    named = zip(("fc1", "fc2"), weights, parts, strict=True)
    return {name: Matrix(weight, ORDERED, parts=made) for name, weight, made in named}, ""


def _listed(products: Sequence[Product]) -> str:
    return ", ".join(f"{p.name} {list(p.weight.shape)}" for p in products)


def _heads(attention: Attention) -> dict[str, int]:
    shape = attention.shape
    heads = shape[1] if attention.q is not None or len(shape) == 4 else 1
    shared = heads if attention.k is None else attention.k.shape[1]
    return {"q": heads, "k": shared, "v": shared}


def vectors_of(attention: Attention) -> tuple[int, int]:
    """Over how many vectors the products run that give queries, and those that give keys."""
    maps, queries, keys = attention.shape[0], *attention.shape[-2:]
    return maps * queries, maps * keys


def _assignments(products: Sequence[Product], heads: dict[str, int]) -> Iterator[tuple[dict[str, Product], str]]:
    """Every way to give out q, k and v that the shapes allow, the likeliest first, and what speaks for it."""
    named = {p.role: p for p in products if p.role}
    if len(named) == 3:
        yield named, NAMED
    for whole in products:
        if not whole.role:
            for parts in _split(whole, BY_HEAD, heads):
                yield parts, CONVENTION
    for one, both in itertools.permutations(products, 2):
        rows, others = one.weight.shape[0], both.weight.shape[0]
        for single, pair in (("q", ("k", "v")), ("v", ("q", "k"))):
            fits = others * heads[single] == rows * sum(heads[role] for role in pair)
            if fits and not both.role and one.role in ("", single):
                for parts in _split(both, pair, heads):
                    yield {single: one, **parts}, CONVENTION
    for three in itertools.permutations(products, 3) if len(products) == 3 else ():
        if all(p.weight.shape[0] % heads[role] == 0 for role, p in zip(BY_HEAD, three, strict=True)):
            yield dict(zip(BY_HEAD, three, strict=True)), CONVENTION


def _split(whole: Product, roles: Sequence[str], heads: dict[str, int]) -> Iterator[dict[str, Product]]:
    """One matrix as several, of so many heads each: one after the other, or head by head."""
    rows, counts = whole.weight.shape[0], [heads[role] for role in roles]
    if rows % sum(counts):
        return
    splits = [torch.split(torch.arange(rows), [count * (rows // sum(counts)) for count in counts])]
    if len(set(counts)) == 1 and counts[0] > 1:
        splits.append(torch.arange(rows).reshape(counts[0], len(counts), -1).transpose(0, 1).flatten(1).unbind())
    for parts in splits:
        yield {role: whole.part(part) for role, part in zip(roles, parts, strict=True)}


# ---- whether products are what the attention used ----

TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-6}
ROUGH = 3e-2  # half precision


def tolerance_of(x: Tensor) -> float:
    """How far from one another two ways of computing a tensor may end, relative to its norm."""
    return TOLERANCE.get(x.dtype, ROUGH)


def _gives(output: Tensor | None, target: Tensor | None) -> bool:
    """Whether vectors [rows, out] are those of [B, H, N, K] up to a positive factor and an offset (scale and bias)."""
    if output is None or target is None or output.numel() != target.numel():
        return False
    tolerance, x = tolerance_of(output), centred(output, 0)
    layouts = (target.permute(*axes).reshape(output.shape) for axes in ((0, 2, 1, 3), (2, 0, 1, 3)))
    return any(_parallel(x, centred(vectors, 0), tolerance) for vectors in layouts)


def _gives_map(given: dict[str, Product], attention: Attention) -> bool:
    """Whether q kᵀ of the first map gives the recorded softmax: its logarithm, up to a factor and an offset a row."""
    probs, q, k = attention.probs, given["q"].output, given["k"].output
    if probs is None or probs.ndim != 4 or q is None or k is None or q.shape != k.shape or probs.shape[2] != probs.shape[3]:
        return False
    maps, heads, tokens, _ = probs.shape
    logits = probs[0].detach().cpu().double().log()
    if q.shape[1] % heads or not logits.isfinite().all():
        return False
    tolerance = 10 * tolerance_of(probs)  # a logarithm of float32 entries near 1/N has lost some digits
    for shape, first in (((maps, tokens, heads, -1), (0,)), ((tokens, maps, heads, -1), (slice(None), 0))):
        query, key = (x.detach().cpu().double().reshape(shape)[first].transpose(0, 1) for x in (q, k))
        if _parallel(centred(query @ key.mT, -1), centred(logits, -1), tolerance):
            return True
    return False


def centred(x: Tensor, dim: int) -> Tensor:
    """In float64, less its mean along an axis."""
    whole = x.detach().cpu().double()
    return whole - whole.mean(dim, keepdim=True)


def _parallel(x: Tensor, y: Tensor, tolerance: float) -> bool:
    """Whether y is a positive multiple of x."""
    factor = (x * y).sum() / x.square().sum().clamp_min(torch.finfo(torch.float64).tiny)
    return bool(factor > 0 and (y - factor * x).norm() <= tolerance * y.norm())
