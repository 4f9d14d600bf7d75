"""Records a model while it trains: tokens and attention maps that carry gradients, for penalties.

Tokens are taken by forward hooks, with fused attention left on. A dispatch mode, which `capture` uses, runs below autograd and
so sees no gradients; maps are therefore taken where functions are called: q and k of the fused kernel, or the softmax itself
and the map that is multiplied afterwards. Nothing is computed during the forward pass; maps are made from q and k when asked.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from collapse_probe.capture.trace import Attention
from collapse_probe.errors import CaptureError, ModelError, SettingError

Place = int | Literal["embedded", "normed"]
"""Where tokens pass: a depth (0 enters the first block, L leaves the last), the patch embedding's output, the final norm's."""
Matrix = Literal["query", "key", "value", "proj", "fc1", "fc2"]
SEVERAL = (
    "attention penalties are losses of one softmax map in each head, and of several, as in differential attention, no penalty "
    "is defined: take one of tokens or of weights"
)
MATRICES: tuple[Matrix, ...] = ("query", "key", "value", "proj", "fc1", "fc2")


class ViTParts:
    """The parts of `model` that penalties name; each is looked up when it is asked for.

    Raises ModelError for a model without a list of blocks.
    """

    def __init__(self, model: Any) -> None:
        self.model, self.kind = model, type(model).__name__
        blocks = getattr(model, "blocks", None)
        if not isinstance(blocks, nn.Sequential | nn.ModuleList) or not len(blocks):
            raise ModelError(f"{self.kind} has no list `blocks`: penalties take timm's VisionTransformer, DeepViT or our ViT")
        self.blocks: Sequence[Any] = list(blocks)
        self.depth = len(self.blocks)

    def _whole_number(self, name: str, what: str) -> int:
        number = getattr(self.model, name, None)
        if not isinstance(number, int):
            raise ModelError(f"{self.kind} does not say {what} ({name})")
        return number

    @property
    def prefix(self) -> int:
        """How many tokens stand before the patches inside the blocks."""
        return self._whole_number("num_prefix_tokens", "how many tokens stand before the patches")

    @property
    def width(self) -> int:
        """The width D of the tokens."""
        return self._whole_number("embed_dim", "how wide its tokens are")

    def block_numbers(self, blocks: tuple[int, ...] | None) -> tuple[int, ...]:
        """The blocks meant by a setting (None: all); SettingError for one that the model does not have."""
        if blocks is None:
            return tuple(range(self.depth))
        wrong = [i for i in blocks if not 0 <= i < self.depth]
        if wrong:
            raise SettingError(f"{self.kind} has blocks 0 to {self.depth - 1}, not {wrong}")
        return blocks

    def passage(self, place: Place) -> tuple[nn.Module, Literal["input", "output"]]:
        """The module at which the tokens of a place pass, and on which side of it."""
        if place == 0:
            return self.blocks[0], "input"
        if isinstance(place, int):
            if not 0 < place <= self.depth:
                raise SettingError(f"{self.kind} has depths 0 to {self.depth}, not {place}")
            return self.blocks[place - 1], "output"
        return self.part({"embedded": "patch_embed", "normed": "norm"}[place]), "output"

    def part(self, name: str) -> nn.Module:
        """The model's own module of that name; ModelError where it has none."""
        module = getattr(self.model, name, None)
        if not isinstance(module, nn.Module):
            raise ModelError(f"{self.kind} has no module `{name}`, which this penalty reads")
        return module

    def attention(self, block: int) -> nn.Module:
        """The attention module of a block."""
        module = getattr(self.blocks[block], "attn", None)
        if not isinstance(module, nn.Module):
            raise ModelError(f"block {block} of {self.kind} has no module `attn`, whose attention maps this penalty reads")
        return module

    def matrix(self, block: int, name: Matrix) -> Tensor:
        """A weight matrix of a block, [out, in]: of the attention (query, key, value, proj) or the MLP (fc1, fc2)."""
        if name in ("fc1", "fc2"):
            owner, layer = getattr(self.blocks[block], "mlp", None), str(name)
        else:
            owner, layer = self.attention(block), "proj" if name == "proj" else "qkv"
        weight = getattr(getattr(owner, layer, None), "weight", None)
        where = f"block {block} of {self.kind}"
        if not isinstance(weight, Tensor) or weight.ndim != 2:
            raise ModelError(f"{where} has no linear layer `{layer}`, whose weight this penalty reads")
        if layer != "qkv":
            return weight
        if weight.shape[0] % 3:
            raise ModelError(f"`qkv` in {where} has {weight.shape[0]} rows, which are no three equal parts")
        return weight.chunk(3)[("query", "key", "value").index(name)]

    def grid(self, patches: int) -> tuple[int, int]:
        """Rows and columns of so many patches; ModelError where they fill no known grid."""
        known = getattr(getattr(self.model, "patch_embed", None), "grid_size", None)
        if isinstance(known, tuple) and len(known) == 2 and math.prod(known) == patches:
            return known
        side = math.isqrt(patches)
        if side**2 != patches:
            raise ModelError(f"the {patches} patches of {self.kind} fill no square, and its patch_embed names no grid")
        return side, side

    def classes(self) -> int:
        """How many classes the model's head tells apart."""
        head = self.part("head")
        count = getattr(head, "out_features", None)
        if not isinstance(count, int):
            raise ModelError(f"the head of {self.kind} is no linear classifier ({type(head).__name__}): it gives no logits")
        return count

    def logits(self, normed_BND: Tensor) -> Tensor:
        """The model's own head on every token behind the final norm, [B, N, D] -> [B, N, classes]."""
        self.classes()
        norm, head = getattr(self.model, "fc_norm", None), self.part("head")
        tokens_BND = normed_BND.to(next(head.parameters()).dtype)
        logits_BNK: Tensor = head(tokens_BND if norm is None else norm(tokens_BND))
        return logits_BNK


@dataclass(frozen=True)
class Requests:
    """What is to be recorded: the places where tokens pass, and the blocks whose attention is needed."""

    places: frozenset[Place] = frozenset()
    maps: frozenset[int] = frozenset()

    def __or__(self, other: Requests) -> Requests:
        return Requests(self.places | other.places, self.maps | other.maps)


@dataclass(eq=False)
class AttentionCall:
    """One attention as it was called: its tensors with their graph, and what autocast will make of q, k and the
    map that multiplies V.

    `versions` count the writes into the tensors until they were recorded; `product` says whether the map that
    multiplies V is known, `halved` that there are half as many of these as softmaxes: each is made of two.
    """

    attention: Attention
    lowered: torch.dtype | None = None
    product: bool = False
    halved: bool = False
    versions: dict[str, int] = field(default_factory=dict)

    def mark(self, *names: str) -> None:
        """Remember how often the named tensors have been written until now."""
        self.versions |= {name: getattr(self.attention, name)._version for name in names}

    @property
    def overwritten(self) -> bool:
        """Whether the model has since written into what was recorded."""
        return any(getattr(self.attention, name)._version != count for name, count in self.versions.items())


class MapRecorder(TorchFunctionMode):
    """Records the attention of the block that is running; the outputs are the model's own."""

    def __init__(self) -> None:
        super().__init__()
        self.block: int | None = None
        self.calls: dict[int, list[AttentionCall]] = {}

    def enter(self, block: int | None, *hook: Any) -> None:
        """A hook: the attention of `block` begins, or with None it ends, also by an exception."""
        self.block = block

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run the function unchanged; record it where it is attention."""
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if self.block is not None:
            name, calls = getattr(func, "__name__", ""), self.calls.setdefault(self.block, [])
            if name == "scaled_dot_product_attention":
                calls.append(_fused(*args, **kwargs))
            elif name == "softmax" and out.ndim == 4:
                if (args[1] if len(args) > 1 else kwargs.get("dim")) in (-1, 3):  # over keys
                    calls.append(AttentionCall(Attention(owner="", operation="softmax", probs=out), _lowered(out)))
                    calls[-1].mark("probs")
            elif name in ("matmul", "__matmul__", "bmm", "einsum") and calls:
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
    attention = Attention("", "scaled_dot_product_attention", query, key, attn_mask, is_causal, number)
    call = AttentionCall(attention, _lowered(query), product=True)
    call.mark("q", "k")
    return call


def _lowered(tensor: Tensor) -> torch.dtype | None:
    """What autocast makes of the operands of a product, where it is on."""
    kind = tensor.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None


def _multiplied(call: AttentionCall, args: tuple[Any, ...], out: Tensor) -> None:
    """A product after the softmax: where a map goes in and no map comes out, that map multiplied V."""
    probs = call.attention.probs
    if probs is None or call.product:
        return
    operands = [x for x in args if isinstance(x, Tensor)]
    call.halved |= bool(operands) and operands[0].shape[-2:] == probs.shape[-2:] and operands[0].numel() * 2 == probs.numel()
    same = bool(operands) and operands[0].numel() == probs.numel() and operands[0].shape[-2:] == probs.shape[-2:]
    if same and out.shape != probs.shape:
        call.product = True
        if operands[0] is not probs:
            call.attention.weights = operands[0].reshape(probs.shape)
            call.mark("weights")


class GradientTrace:
    """What was recorded of one forward pass: tokens and maps with their graphs, and the model's own matrices.

    Tensors come in float32 (float64 stays) whatever autocast did.
    """

    def __init__(self, parts: ViTParts) -> None:
        self.parts = parts
        self.passed: dict[Place, Tensor] = {}
        self.calls: dict[int, list[AttentionCall]] = {}
        self.patch_count: int | None = None
        self.input: Any = None
        self._maps: dict[tuple[int, str], Tensor] = {}

    def images(self) -> Tensor:
        """The images that entered the model, [B, C, height, width]."""
        if not isinstance(self.input, Tensor):
            raise CaptureError("the model was not called with images as its first argument, which a penalty reads")
        return self.input

    def tokens(self, place: Place) -> Tensor:
        """All tokens at a place, [B, N, D]."""
        if place not in self.passed:
            what = f"at depth {place}" if isinstance(place, int) else f"behind the {place} tokens' module"
            raise CaptureError(f"no tokens were recorded {what}: call the model itself inside `with penalties.recording()`")
        tokens_BND = self.passed[place]
        if place == "embedded":
            before = [self.parts.part("patch_embed")]
        else:
            before = list(self.parts.blocks[: place if isinstance(place, int) else None])
        _check_graph(tokens_BND, before, f"the tokens at {place}")
        return _wide(tokens_BND)

    def patches(self, place: Place) -> Tensor:
        """The patch tokens at a place, [B, P, D]; prefix tokens stand before them and are left out."""
        tokens_BND = self.tokens(place)
        if place == "embedded":
            return tokens_BND.flatten(1, -2)  # some embeddings keep the grid
        if self.patch_count is None:
            raise CaptureError("the first block did not run: call the model itself inside `with penalties.recording()`")
        return tokens_BND[:, tokens_BND.shape[1] - self.patch_count :]

    def maps(self, block: int, point: Literal["probs", "weights"] = "probs") -> Tensor:
        """The attention map of a block, [B, H, N, N]: the softmax before dropout, or what multiplies V."""
        if (block, point) in self._maps:
            return self._maps[block, point]
        calls = self.calls.get(block, [])
        module = self.parts.attention(block)
        where = f"in `attn` of block {block} ({type(module).__name__})"
        if len(calls) > 1:
            raise CaptureError(f"expected one softmax attention {where}, came {len(calls)}; {SEVERAL}")
        if not calls:
            raise CaptureError(
                f"expected one softmax attention {where}, came 0; attention penalties take "
                "scaled_dot_product_attention and a softmax over keys, in a model that is not compiled"
            )
        call, attention = calls[0], calls[0].attention
        if call.halved:
            raise CaptureError(f"two softmaxes make each map {where}; {SEVERAL}")
        if call.overwritten:
            raise CaptureError(f"the model wrote into its attention {where} after it was recorded: its maps cannot be made")
        if point == "weights" and not call.product:
            raise CaptureError(f"cannot tell which map multiplies V {where}; take the softmax instead (point='probs')")
        _check_graph(attention.q if attention.q is not None else attention.probs, [module], f"the attention {where}")
        if call.lowered is not None:
            for name in ("q", "k", "weights"):
                tensor = getattr(attention, name)
                setattr(attention, name, None if tensor is None else tensor.to(call.lowered))
        self._maps[block, point] = attention.maps()[point]
        return self._maps[block, point]

    def matrices(self, blocks: tuple[int, ...], names: tuple[Matrix, ...]) -> list[Tensor]:
        """Weight matrices [out, in] of some blocks, each of them once where blocks share it."""
        distinct: dict[tuple[int, tuple[int, ...]], Tensor] = {}
        for matrix in (self.parts.matrix(i, name) for i in blocks for name in names):
            distinct.setdefault((matrix.data_ptr(), tuple(matrix.shape)), matrix)
        return [_wide(matrix) for matrix in distinct.values()]


def _check_graph(tensor: Tensor | None, modules: list[nn.Module], what: str) -> None:
    trainable = any(p.requires_grad for module in modules for p in module.parameters())
    if tensor is not None and not tensor.requires_grad and trainable and torch.is_grad_enabled():
        raise CaptureError(
            f"{what} carry no gradient: the forward pass ran under torch.no_grad, or under reentrant "
            "checkpointing; use non-reentrant checkpointing (use_reentrant=False)"
        )


def _wide(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()


@contextmanager
def record_with_gradients(parts: ViTParts, requests: Requests) -> Iterator[list[GradientTrace]]:
    """Record what `requests` names of each forward pass of the model inside the `with`; the list holds the newest.

    Hooks and the mode leave with the `with`, also after an error. Raises CaptureError where a module passes no tokens.
    """
    recorder, newest = MapRecorder(), [GradientTrace(parts)]

    def begin(module: nn.Module, args: Any) -> None:
        newest[0] = GradientTrace(parts)
        newest[0].input = args[0] if args else None
        recorder.block, recorder.calls = None, newest[0].calls

    def take(place: Place, module: nn.Module, *passed: Any) -> None:  # (input,) before the module, (input, output) after it
        value, trace = passed[-1], newest[0]
        tensors = [x for x in (value if isinstance(value, tuple | list) else (value,)) if isinstance(x, Tensor)]
        if not tensors or tensors[0].ndim < 3:
            raise CaptureError(f"{parts.kind} passes no token sequence at {place!r}, where a penalty reads it")
        trace.passed[place] = tensors[0]
        if place == 0:
            trace.patch_count = tensors[0].shape[1] - parts.prefix

    with ExitStack() as stack:
        stack.callback(parts.model.register_forward_pre_hook(begin, prepend=True).remove)
        for place in requests.places | ({0} if requests.places else set()):
            module, side = parts.passage(place)
            register: Any = module.register_forward_pre_hook if side == "input" else module.register_forward_hook
            stack.callback(register(partial(take, place)).remove)
        for block in requests.maps:
            module = parts.attention(block)
            stack.callback(module.register_forward_pre_hook(partial(recorder.enter, block)).remove)
            stack.callback(module.register_forward_hook(partial(recorder.enter, None), always_call=True).remove)
        if requests.maps:
            stack.enter_context(recorder)
        yield newest
