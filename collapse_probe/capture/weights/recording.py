"""Records by which matrices the blocks of a model multiply, so that a weight is the one in use, reparametrised or not."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from collapse_probe.capture import attention_operators
from collapse_probe.capture.attention_operators import OperatorCall, storage_of
from collapse_probe.capture.capture import noise
from collapse_probe.capture.plan import Frame, Plan
from collapse_probe.capture.recorder import AttentionEvent, Recorder
from collapse_probe.capture.weights.linear_maps import Ids, LinearMaps
from collapse_probe.capture.weights.matrices import (
    BY_HEAD,
    CHECKED,
    NAMES,
    ORDERED,
    STATED,
    Matrices,
    Matrix,
    Product,
    attention_roles,
    doubtful_split,
    mlp_roles,
    projection_role,
    vectors_of,
    wholes,
)
from collapse_probe.distributed import unwrap

NORMS = tuple(
    packet.default
    for name in ("native_layer_norm", "_fused_rms_norm", "rms_norm")
    if (packet := getattr(torch.ops.aten, name, None)) is not None
)


@dataclass(eq=False)
class BlockProducts:
    """The products of one block, `frame`, before and after its attention, and the matrices told apart so far."""

    frame: Frame
    maps: LinearMaps
    before: list[Product] = field(default_factory=list)
    after: list[Product] = field(default_factory=list)
    matrices: dict[str, Matrix] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)
    events: list[AttentionEvent] = field(default_factory=list)
    gates: list[tuple[Ids, Ids]] = field(default_factory=list)
    attention: int = 0
    steps: list[int] = field(default_factory=list)

    def add_attention(self, event: AttentionEvent, call: OperatorCall) -> None:
        """Tell q, k and v of the block's attention apart, while its values are there."""
        a, values = event.attention, _values(event, call)
        roles, reason = attention_roles(self.before, event, values)
        reasons = {} if roles else dict.fromkeys(BY_HEAD, reason)
        used = frozenset[int]().union(*(matrix.parts for matrix in roles.values()))
        read = (a.q, a.k) if a.q is not None else (event.operand, event.operand)
        for role, tensor in zip(BY_HEAD, (*read, *values[:1]), strict=False):
            if role in roles and roles[role].how != CHECKED and (stray := self._stray(tensor, used, vectors_of(a))):
                del roles[role]
                reasons[role] = stray
        self.matrices |= roles
        self.missing |= reasons
        self.before.clear()
        event.sketch()
        self.events.append(event)
        self.attention = len(self.maps.steps) - 1

    def _stray(self, used_by_attention: Tensor | None, used: Ids, vectors: tuple[int, int]) -> str:
        """Which product went into what the attention used, beside those of its matrices and those that they read."""
        made_of = None if used_by_attention is None else self.maps.depends(used_by_attention)
        if made_of is None:
            return "what the attention used cannot be followed back to products"
        for number in sorted(made_of - used - self.maps.inputs_of(used)):
            step = self.maps.steps[number]
            if step.multiplies and (not step.inputs & used or (step.kind == "product" and step.rows in vectors)):
                return f"{step.name} goes into what the attention used as well, and not as a sum with its matrix"
        return ""

    def finish(self) -> None:
        """Tell the products after the attention apart, once the block is over."""
        if len(self.events) != 1:
            reason = f"{len(self.events)} attention layers run in this block, and its matrices belong to no one of them"
            self.matrices, self.missing = {}, dict.fromkeys(NAMES, reason)
            return
        after = wholes(self.after)
        if "proj" not in self.matrices:
            after = self._tell_projection(after)
        if "fc1" not in self.matrices:
            roles, reason = mlp_roles(after)
            if "proj" in self.missing and len(after) < len(wholes(self.after)):
                roles, reason = {}, self.missing["proj"]
            roles, reason = (roles, self._doubtful_mlp(after) or reason) if roles else (roles, reason)
            self.matrices |= {} if reason else roles
            self.missing |= dict.fromkeys(NAMES[4:], reason) if reason else {}
        if doubt := doubtful_split(self.matrices):
            self.matrices = {name: matrix for name, matrix in self.matrices.items() if name not in BY_HEAD}
            self.missing |= dict.fromkeys(BY_HEAD, doubt)
        self.missing = {name: reason for name, reason in self.missing.items() if name not in self.matrices}

    def _tell_projection(self, after: list[Product]) -> list[Product]:
        """Find proj, unless other products of what attention read run beside it; the products that are left."""
        reading = [p for p in after if self.attention in self.maps.inputs_of(p.parts)]
        product = projection_role(reading, self.events[0], self.matrices.get("v"))
        if product is None:
            self.missing["proj"] = "no product after the attention has the width of its values"
            return after
        inputs, others = self.maps.inputs_of(product.parts), []
        for number in self.steps:
            step = self.maps.steps[number]
            beside = self.attention in step.inputs and number not in product.parts | inputs and not step.inputs & product.parts
            if step.multiplies and (beside or (number in inputs and step.kind == "unread")):
                others.append(step.name)
        if others:
            self.missing["proj"] = f"{others[0]} multiplies what attention read as well, and not as a sum with one matrix"
        else:
            self.matrices["proj"] = Matrix(product.weight, ORDERED, parts=product.parts)
        return [p for p in after if p is not product]

    def _doubtful_mlp(self, products: list[Product]) -> str:
        """Why products of the shapes of an MLP are none, or only a part of it; else empty."""
        *first, last = products
        if not all(p.parts & self.maps.inputs_of(last.parts) for p in first):
            return f"{last.name} does not read what {first[0].name} gives"
        if len(first) == 2:
            one, two = (p.parts for p in first)
            if not any((one & (a - b) and two & (b - a)) or (two & (a - b) and one & (b - a)) for a, b in self.gates):
                return f"{first[0].name} and {first[1].name} are not multiplied with one another, as in a gated MLP"
        one, two = frozenset[int]().union(*(p.parts for p in first)), last.parts
        before, between = self.maps.inputs_of(one), self.maps.inputs_of(two)
        for number in self.steps:
            step = self.maps.steps[number]
            if number in one | two | before or not step.multiplies:
                continue
            read, written = bool(step.inputs & one), number in between
            if read != written and not step.inputs & two:
                return f"{step.name} is added to the MLP, and not as a sum with one of its matrices"
            if step.kind == "unread":
                return f"{step.name} multiplies by a matrix that cannot be read"
        return ""


class ProductRecorder:
    """Notes each product of token vectors with a matrix, in the block in which it happens."""

    def __init__(self, model: nn.Module, blocks: Sequence[str]) -> None:
        self.recorder = Recorder(model, thorough=True, on_operator=self._on_operator)
        tensors = [*model.named_parameters(), *model.named_buffers()]
        self.names = {(storage_of(p), p.storage_offset()): name for name, p in tensors}
        self.storages = {storage for storage, _ in self.names}
        self.maps = LinearMaps()
        self.current: BlockProducts | None = None
        self.normed: tuple[Tensor, Tensor] | None = None  # what the last norm gave, and its gain
        self.blocks = []
        for name in blocks:  # as in a Plan, which numbers the calls of a repeated block
            repeated = re.fullmatch(r"(.*) \(call (\d+)\)", name)
            frame = (repeated[1], int(repeated[2]) - 1) if repeated else (name, 0)
            self.blocks.append(BlockProducts(frame, self.maps))

    def _on_operator(self, call: OperatorCall, events: list[AttentionEvent]) -> None:
        log, frames = self.recorder.log, self.recorder.frames()
        if not self.maps.made_of and log.input is not None:
            self.maps.begin(log.input)
        here = self._block(frames)
        if here is not None and here is not self.current:
            self._enter(here)
        if call.func in NORMS:
            gain, given = call.bound.get("weight"), call.out[0] if isinstance(call.out, tuple) else call.out
            self.normed = None if gain is None else (given, gain.detach())
        first = len(self.maps.steps)
        products = self.maps.follow(call, self._name(call, frames, here), bool(events))
        for event in events:
            block = self._block(event.stack)
            if block is None:
                event.sketch()
            else:
                block.add_attention(event, call)
        if here is None:
            return
        here.steps += range(first, len(self.maps.steps)) if here.events else ()
        if (
            call.func in attention_operators.MULTI_HEAD | attention_operators.ENCODER_LAYER
        ):  # whose fast paths are given the matrices by name
            bound, thirds = call.bound, call.bound["qkv_weight"].detach().chunk(3)
            heads = int(bound.get("num_head", bound.get("num_heads")) or 1)
            here.matrices |= {name: Matrix(weight, STATED, heads) for name, weight in zip(BY_HEAD, thirds, strict=True)}
            for name, key in (("proj", "proj_weight"), ("fc1", "ffn_weight_1"), ("fc2", "ffn_weight_2")):
                if bound.get(key) is not None:
                    here.matrices[name] = Matrix(bound[key].detach(), STATED)
            return
        for product in products:
            if product.rows <= log.images:
                continue
            weight = product.weight if self._lasts(product.weight) else product.weight.clone()
            if here.events:
                here.after.append(replace(product, weight=weight, output=None))
            else:
                here.before.append(replace(product, weight=weight, gain=self._gain(call, weight)))

    def _enter(self, block: BlockProducts) -> None:
        self.maps.enter_block()
        self.maps.gates, self.current = block.gates, block

    def _name(self, call: OperatorCall, frames: Sequence[Frame], block: BlockProducts | None) -> str:
        """The parameter by which an operator multiplies, inside its block; or the module in which it runs."""
        name = frames[-1][0]
        for x in call.args[1:]:
            if isinstance(x, Tensor) and x.ndim > 1:
                name = self.names.get((storage_of(x), x.storage_offset()), name)
        return name if block is None else name.removeprefix(block.frame[0] + ".")

    def _gain(self, call: OperatorCall, weight: Tensor) -> Tensor | None:
        """The gain of the norm whose output an operator multiplies by a matrix [out, in]; None where that is not seen."""
        if self.normed is None or self.normed[1].shape != weight.shape[1:]:
            return None
        read = {storage_of(x) for x in call.args if isinstance(x, Tensor)}
        return self.normed[1].clone() if storage_of(self.normed[0]) in read else None

    def _lasts(self, weight: Tensor) -> bool:
        """Whether a matrix is the model's own memory, which is still there after the pass."""
        return storage_of(weight) in self.storages

    def _block(self, frames: Sequence[Frame]) -> BlockProducts | None:
        """The block in which a module stack stands, if any."""
        for path, number in frames:
            for block in self.blocks:
                if number == block.frame[1] and (path == block.frame[0] or path.startswith(block.frame[0] + ".")):
                    return block
        return None


def record_matrices(model: nn.Module, images: Tensor, blocks: Sequence[str]) -> Matrices:
    """The matrices of each block (names as in a Plan) by which `model` multiplies in one forward pass of `images`.

    The pass is a plain one under no_grad. What cannot be told has its reason in `Matrices.missing`.
    """
    products = ProductRecorder(model, blocks)
    with torch.inference_mode(False), torch.no_grad(), products.recorder.attached():
        model(images)
    for block in products.blocks:
        block.finish()
    return Matrices(tuple(blocks), tuple(b.matrices for b in products.blocks), tuple(b.missing for b in products.blocks))


def _values(event: AttentionEvent, call: OperatorCall) -> list[Tensor]:
    """The values [B, H, N, K] that the attention read, in every way in which an eager product's operand may hold them."""
    if event.kernel is not None:
        return [event.kernel.value]
    operands = [call.bound.get("self"), call.bound.get("mat2")]
    value = next((x for x in operands if isinstance(x, Tensor) and x is not event.operand), None)
    if value is None or value.ndim != 3 or len(event.attention.shape) != 4:
        return []
    *leading, _, keys = event.attention.shape
    turned = [x for x in (value, value.mT) if x.shape[1] == keys and len(x) == leading[0] * leading[1]]
    return [x.reshape(*leading, keys, -1) for x in turned]


def read_matrices(model: nn.Module, plan: Plan, seed: int = 0) -> Matrices:
    """The weight matrices of every block of `plan`, recorded in one forward pass of noise; no data are needed."""
    if plan.image_size is None:
        reason = "the probe saw no image, so that no pass could be made to record the products of the blocks"
        missing = tuple(dict.fromkeys(NAMES, reason) for _ in plan.blocks)
        return Matrices(plan.blocks, tuple({} for _ in plan.blocks), missing)
    model = unwrap(model)
    return record_matrices(model, noise(model, plan.image_size, plan.input_shape[0], seed), plan.blocks)
