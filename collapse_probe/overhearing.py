"""Overhear a model while it trains: tokens and attention maps that carry gradients, for penalties.

Tokens are taken by forward hooks, with fused attention left on. A dispatch mode, which `capture` uses, hears below autograd and
so hears no gradients; maps are therefore taken where functions are called: q and k of the fused kernel, or the softmax itself
and the map that is multiplied afterwards. Nothing is computed during the forward pass; maps are made from q and k when asked.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from collapse_probe.anatomy import Anatomy, Matrix, Place
from collapse_probe.attention import Attention, maps_of
from collapse_probe.errors import CaptureError

_PRODUCTS = ("matmul", "__matmul__", "bmm", "einsum")
_EVERYTHING = (slice(None),) * 4


@dataclass(frozen=True)
class Wanted:
    """What is to be heard: the places where tokens pass, and the blocks whose attention is needed."""

    places: frozenset[Place] = frozenset()
    maps: frozenset[int] = frozenset()

    def __or__(self, other: Wanted) -> Wanted:
        return Wanted(self.places | other.places, self.maps | other.maps)


@dataclass(eq=False)
class AttentionCall:
    """One attention as it was called: its tensors with their graph, and what autocast will make of q, k and the
    map that multiplies V.

    `versions` count the writes into the tensors until they were heard; `product` says whether the map that
    multiplies V is known.
    """

    attention: Attention
    lowered: torch.dtype | None = None
    product: bool = False
    versions: dict[str, int] = field(default_factory=dict)

    def mark(self, *names: str) -> None:
        """Remember how often the named tensors have been written until now."""
        self.versions |= {name: getattr(self.attention, name)._version for name in names}

    @property
    def overwritten(self) -> bool:
        """Whether the model has since written into what was heard."""
        return any(getattr(self.attention, name)._version != count for name, count in self.versions.items())


class MapEar(TorchFunctionMode):
    """Hears the attention of the block that is running; the outputs are the model's own."""

    def __init__(self) -> None:
        super().__init__()
        self.block: int | None = None
        self.calls: dict[int, list[AttentionCall]] = {}

    def enter(self, block: int, module: nn.Module, args: Any) -> None:
        """A pre-hook: the attention of `block` begins."""
        self.block = block

    def leave(self, module: nn.Module, args: Any, output: Any) -> None:
        """A hook: it ends, also by an exception."""
        self.block = None

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run the function unchanged; note it where it is attention."""
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if self.block is not None:
            name, calls = getattr(func, "__name__", ""), self.calls.setdefault(self.block, [])
            if name == "scaled_dot_product_attention":
                calls.append(_fused(*args, **kwargs))
            elif name == "softmax" and _over_keys(out, *args, **kwargs):
                calls.append(AttentionCall(Attention(owner="", operation="softmax", probs=out), _lowered(out)))
                calls[-1].mark("probs")
            elif name in _PRODUCTS and calls:
                _multiplied(calls[-1], args, out)
        return out


def _fused(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> AttentionCall:
    """The arguments of the fused kernel, named as PyTorch names them."""
    number = float(query.shape[-1] ** -0.5 if scale is None else scale)
    heard = Attention("", "scaled_dot_product_attention", query, key, attn_mask, is_causal, number)
    call = AttentionCall(heard, _lowered(query), product=True)
    call.mark("q", "k")
    return call


def _lowered(tensor: Tensor) -> torch.dtype | None:
    """What autocast makes of the operands of a product, where it is on."""
    kind = tensor.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None


def _over_keys(out: Tensor, input: Tensor, dim: int | None = None, *others: Any, **named: Any) -> bool:
    return out.ndim == 4 and dim in (-1, 3)


def _multiplied(call: AttentionCall, args: tuple[Any, ...], out: Tensor) -> None:
    """A product after the softmax: where a map goes in and no map comes out, that map multiplied V."""
    probs = call.attention.probs
    if probs is None or call.product:
        return
    operands = [x for x in args if isinstance(x, Tensor)]
    same = bool(operands) and operands[0].numel() == probs.numel() and operands[0].shape[-2:] == probs.shape[-2:]
    if same and out.shape != probs.shape:
        call.product = True
        if operands[0] is not probs:
            call.attention.weights = operands[0].reshape(probs.shape)
            call.mark("weights")


class Heard:
    """What one forward pass left: tokens and maps with their graphs, and the model's own matrices.

    Tensors come in float32 (float64 stays) whatever autocast did.
    """

    def __init__(self, anatomy: Anatomy) -> None:
        self.anatomy = anatomy
        self.passed: dict[Place, Tensor] = {}
        self.calls: dict[int, list[AttentionCall]] = {}
        self.patch_count: int | None = None
        self._maps: dict[tuple[int, str], Tensor] = {}

    def tokens(self, place: Place) -> Tensor:
        """All tokens at a place, [B, N, D]."""
        if place not in self.passed:
            what = f"at depth {place}" if isinstance(place, int) else f"behind the {place} tokens' module"
            raise CaptureError(f"no tokens were heard {what}: call the model itself inside `with penalised.listening()`")
        found = self.passed[place]
        self._with_graph(found, self._modules_before(place), f"the tokens at {place}")
        return _wide(found)

    def patches(self, place: Place) -> Tensor:
        """The patch tokens at a place, [B, P, D]; prefix tokens stand before them and are left out."""
        tokens_BND = self.tokens(place)
        if place == "embedded":
            return tokens_BND.flatten(1, -2)  # some embeddings keep the grid
        if self.patch_count is None:
            raise CaptureError("the first block did not run: call the model itself inside `with penalised.listening()`")
        return tokens_BND[:, tokens_BND.shape[1] - self.patch_count :]

    def maps(self, block: int, point: Literal["probs", "weights"] = "probs") -> Tensor:
        """The attention map of a block, [B, H, N, N]: the softmax before dropout, or what multiplies V."""
        if (block, point) not in self._maps:
            self._maps[block, point] = self._made(block, point)
        return self._maps[block, point]

    def matrices(self, blocks: tuple[int, ...], names: tuple[Matrix, ...]) -> list[Tensor]:
        """Weight matrices [out, in] of some blocks, each of them once where blocks share it."""
        found: dict[tuple[int, tuple[int, ...]], Tensor] = {}
        for matrix in (self.anatomy.matrix(i, name) for i in blocks for name in names):
            found.setdefault((matrix.data_ptr(), tuple(matrix.shape)), matrix)
        return [_wide(matrix) for matrix in found.values()]

    def _made(self, block: int, point: str) -> Tensor:
        calls = self.calls.get(block, [])
        module = self.anatomy.attention(block)
        where = f"in `attn` of block {block} ({type(module).__name__})"
        if len(calls) != 1:
            raise CaptureError(
                f"expected one softmax attention {where}, heard {len(calls)}; attention penalties hear "
                "scaled_dot_product_attention and a softmax over keys, in a model that is not compiled"
            )
        call = calls[0]
        if call.overwritten:
            raise CaptureError(f"the model wrote into its attention {where} after it was heard: its maps cannot be made")
        if point == "weights" and not call.product:
            raise CaptureError(f"cannot tell which map multiplies V {where}; take the softmax instead (point='probs')")
        heard = call.attention
        self._with_graph(heard.q if heard.q is not None else heard.probs, [module], f"the attention {where}")
        if call.lowered is not None:
            for name in ("q", "k", "weights"):
                tensor = getattr(heard, name)
                setattr(heard, name, None if tensor is None else tensor.to(call.lowered))
        return maps_of(heard, *_EVERYTHING)[point]

    def _modules_before(self, place: Place) -> list[nn.Module]:
        if place in ("embedded", 0):
            return [self.anatomy.part("patch_embed")] if place == "embedded" else []
        return list(self.anatomy.blocks[: place if isinstance(place, int) else None])

    def _with_graph(self, found: Tensor | None, modules: list[nn.Module], what: str) -> None:
        trainable = any(p.requires_grad for module in modules for p in module.parameters())
        if found is not None and not found.requires_grad and trainable and torch.is_grad_enabled():
            raise CaptureError(
                f"{what} carry no gradient: the forward pass ran under torch.no_grad, or under reentrant "
                "checkpointing; use non-reentrant checkpointing (use_reentrant=False)"
            )


def _wide(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def _take(heard: Heard, place: Place, value: Any) -> None:
    tensors = [x for x in (value if isinstance(value, tuple | list) else (value,)) if isinstance(x, Tensor)]
    if not tensors or tensors[0].ndim < 3:
        raise CaptureError(f"{heard.anatomy.kind} passes no token sequence at {place!r}, where a penalty would hear it")
    heard.passed[place] = tensors[0]
    if place == 0:
        heard.patch_count = tensors[0].shape[1] - heard.anatomy.prefix


@contextmanager
def overhear(anatomy: Anatomy, wanted: Wanted) -> Iterator[list[Heard]]:
    """Hear what is `wanted` of each forward pass of the model inside the `with`; the list holds the newest.

    Hooks and the mode leave with the `with`, whatever ended it. Raises CaptureError where a module passes no tokens.
    """
    ear, newest = MapEar(), [Heard(anatomy)]

    def begin(module: nn.Module, args: Any) -> None:
        newest[0] = Heard(anatomy)
        ear.block, ear.calls = None, newest[0].calls

    def before(place: Place, module: nn.Module, args: Any) -> None:
        _take(newest[0], place, args)

    def after(place: Place, module: nn.Module, args: Any, output: Any) -> None:
        _take(newest[0], place, output)

    with ExitStack() as stack:
        stack.callback(anatomy.model.register_forward_pre_hook(begin, prepend=True).remove)
        for place in wanted.places | ({0} if wanted.places else set()):
            module, side = anatomy.passage(place)
            register = module.register_forward_pre_hook if side == "input" else module.register_forward_hook
            hook = partial(before if side == "input" else after, place)
            stack.callback(register(hook).remove)
        for block in wanted.maps:
            module = anatomy.attention(block)
            stack.callback(module.register_forward_pre_hook(partial(ear.enter, block)).remove)
            stack.callback(module.register_forward_hook(ear.leave, always_call=True).remove)
        if wanted.maps:
            stack.enter_context(ear)
        yield newest
