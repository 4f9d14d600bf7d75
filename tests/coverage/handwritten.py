"""Whole models as people write them, around every kind of `odd_attention`: containers, towers, wrappers, outputs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from odd_attention import GRID, HEADS, KINDS, NEVER, PLACE, TOKENS, TRUTH, WIDTH, Attention, exact, note
from torch import nn
from torch.utils.checkpoint import checkpoint

SIZE = (32, 24)
DEPTH = 3


class Case(NamedTuple):
    """What makes a model, and what is to be heard of it.

    `never`: there is no softmax attention, hearing a map would be wrong. `says`: a word of the reason why its maps are not
    between a block's tokens. `apart`: after which blocks the next one is no neighbour.
    """

    make: Callable[[], nn.Module]
    channels: int = 3
    never: bool = False
    says: str = ""
    apart: tuple[int, ...] = ()


SAYS = {
    "channels attend": "channel",
    "tokens read 5 latents": "between",
    "every second key": "",
    "windows by hand": "window",
    "windows by hand, sdpa": "window",
    "windows on an axis of their own": "window",
    "windows that look over their borders": "window",
    "rows, then columns": "",
}


class Block(nn.Module):
    """`place` is its number in its model, where a model does not say that itself."""

    place = None

    def __init__(self, attention):
        super().__init__()
        self.norm1, self.attn, self.norm2 = nn.LayerNorm(WIDTH), attention, nn.LayerNorm(WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH))

    def forward(self, x):
        if self.place is not None:
            PLACE[0] = self.place
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Parallel(Block):
    def forward(self, x):
        y = self.norm1(x)
        return x + self.attn(y) + self.mlp(y)


class PostNorm(Block):
    def forward(self, x):
        x = self.norm1(x + self.attn(x))
        return self.norm2(x + self.mlp(x))


class InPlaceStream(Block):
    def forward(self, x):
        x = x.clone()
        x += self.attn(self.norm1(x))
        x += self.mlp(self.norm2(x))
        return x


class TupleBlock(Block):
    def forward(self, x):
        return super().forward(x), None


class KeywordBlock(Block):
    def forward(self, hidden_states=None):
        return super().forward(hidden_states)


class Net(nn.Module):
    """A Vision Transformer; subclasses keep or call their blocks in another way."""

    channels = 3

    def __init__(self, attention="matmul", depth=DEPTH, block=Block, cls=True):
        super().__init__()
        make = KINDS[attention] if isinstance(attention, str) else attention
        self.patches = nn.Conv2d(self.channels, WIDTH, 8, 8)
        self.cls = nn.Parameter(torch.randn(1, 1, WIDTH)) if cls else None
        self.positions = nn.Parameter(0.5 * torch.randn(1, TOKENS - 1 + cls, WIDTH))
        self.keep([block(make()) for _ in range(depth)])
        self.head = nn.Linear(WIDTH, 5)
        for module in self.modules():
            if hasattr(module, "sharpen"):
                module.sharpen()

    def keep(self, blocks):
        self.blocks = nn.ModuleList(blocks)

    def each(self):
        return list(self.blocks)

    def embed(self, x):
        x = self.patches(x).flatten(2).transpose(1, 2)
        if self.cls is not None:
            x = torch.cat([self.cls.expand(len(x), -1, -1), x], 1)
        return x + self.positions

    def run(self, x):
        for i, block in enumerate(self.each()):
            PLACE[0] = i
            x = self.call(block, x)
        return x

    def call(self, block, x):
        return block(x)

    def forward(self, x):
        return self.head(self.run(self.embed(x)).mean(1))


MODELS = {}


def model(name):
    def register(thing):
        MODELS[name] = thing
        return thing

    return register


# ---- where blocks are kept ----


@model("blocks in a Sequential, indexed")
class _(Net):
    def keep(self, blocks):
        self.blocks = nn.Sequential(*blocks)


@model("blocks in a ModuleDict")
class _(Net):
    def keep(self, blocks):
        self.blocks = nn.ModuleDict({f"layer_{i}": block for i, block in enumerate(blocks)})

    def each(self):
        return list(self.blocks.values())


@model("blocks as attributes")
class _(Net):
    def keep(self, blocks):
        for i, block in enumerate(blocks):
            setattr(self, f"block{i}", block)

    def each(self):
        return [getattr(self, f"block{i}") for i in range(DEPTH)]


@model("blocks as attributes with words for names")
class _(Net):
    def keep(self, blocks):
        self.first, self.middle, self.last = blocks

    def each(self):
        return [self.first, self.middle, self.last]


@model("blocks as attributes of an encoder")
class _(Net):
    class Encoder(nn.Module):
        def __init__(self, blocks):
            super().__init__()
            for i, block in enumerate(blocks):
                self.add_module(f"layer{i}", block)

    def keep(self, blocks):
        self.encoder = self.Encoder(blocks)

    def each(self):
        return list(self.encoder.children())


@model("blocks in a Python list")
class _(Net):
    """They are no submodules; parameters are reached through a second, unused name for the optimiser."""

    def keep(self, blocks):
        self.hidden = blocks
        for i, block in enumerate(blocks):
            for name, parameter in block.named_parameters():
                self.register_parameter(f"p{i}_{name.replace('.', '_')}", parameter)

    def each(self):
        return self.hidden


@model("blocks each in a list of their own")
class _(Net):
    def keep(self, blocks):
        self.layers = nn.ModuleList(nn.ModuleList([block]) for block in blocks)

    def each(self):
        return [group[0] for group in self.layers]


@model("groups of norm, attention, norm, mlp")
class _(Net):
    def keep(self, blocks):
        self.layers = nn.ModuleList(nn.ModuleList([b.norm1, b.attn, b.norm2, b.mlp]) for b in blocks)

    def each(self):
        return list(self.layers)

    def call(self, block, x):
        norm1, attention, norm2, mlp = block
        x = x + attention(norm1(x))
        return x + mlp(norm2(x))


@model("parallel lists of attentions and mlps")
class _(Net):
    def keep(self, blocks):
        self.norms1, self.norms2 = nn.ModuleList(b.norm1 for b in blocks), nn.ModuleList(b.norm2 for b in blocks)
        self.attentions, self.mlps = nn.ModuleList(b.attn for b in blocks), nn.ModuleList(b.mlp for b in blocks)

    def each(self):
        return list(zip(self.norms1, self.attentions, self.norms2, self.mlps, strict=True))

    def call(self, block, x):
        norm1, attention, norm2, mlp = block
        x = x + attention(norm1(x))
        return x + mlp(norm2(x))


@model("one block, looped")
class _(Net):
    def keep(self, blocks):
        self.block = blocks[0]

    def each(self):
        return [self.block] * DEPTH


@model("one block, three times in a list")
class _(Net):
    def keep(self, blocks):
        self.blocks = nn.ModuleList([blocks[0]] * DEPTH)


@model("stages of one and two blocks")
class _(Net):
    def keep(self, blocks):
        self.stages = nn.ModuleList(nn.ModuleDict({"blocks": nn.ModuleList(part)}) for part in (blocks[:1], blocks[1:]))

    def each(self):
        return [block for stage in self.stages for block in stage["blocks"]]


@model("a Sequential of Sequentials")
class _(Net):
    def keep(self, blocks):
        self.body = nn.Sequential(nn.Sequential(blocks[0]), nn.Sequential(*blocks[1:]))
        for i, block in enumerate(blocks):
            block.place = i

    def run(self, x):
        return self.body(x)


@model("one whole Sequential")
class _(Net):
    def keep(self, blocks):
        self.body = nn.Sequential(*blocks)
        for i, block in enumerate(blocks):
            block.place = i

    def run(self, x):
        return self.body(x)


# ---- how blocks are called ----


@model("checkpointed, reentrant or not by autograd")
class _(Net):
    def call(self, block, x):
        return checkpoint(block, x, use_reentrant=False)


@model("every image by itself in a vmap")
class _(Net):
    def each(self):
        return [block if TRUTH[0] is not None else self.mapped(block) for block in self.blocks]

    @staticmethod
    def mapped(block):
        return torch.func.vmap(lambda x: block(x[None])[0])


@model("block.forward called directly")
class _(Net):
    def call(self, block, x):
        return block.forward(x)


@model("tokens first [N,B,D]")
class _(Net):
    class Attn(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = KINDS["matmul"]()

        def forward(self, x):
            return self.inner(x.transpose(0, 1)).transpose(0, 1)

    def __init__(self):
        super().__init__(self.Attn)

    def run(self, x):
        return super().run(x.transpose(0, 1).contiguous()).transpose(0, 1)


@model("blocks that return tuples")
class _(Net):
    def __init__(self):
        super().__init__(block=TupleBlock)

    def call(self, block, x):
        return block(x)[0]


class DictBlock(Block):
    def forward(self, state):
        return {"tokens": super().forward(state["tokens"])}


@model("blocks that take and return dicts")
class _(Net):
    def __init__(self):
        super().__init__(block=DictBlock)

    def run(self, x):
        return super().run({"tokens": x})["tokens"]


@dataclass
class State:
    tokens: torch.Tensor


class StateBlock(Block):
    def forward(self, state):
        return State(super().forward(state.tokens))


@model("blocks that take and return dataclasses")
class _(Net):
    def __init__(self):
        super().__init__(block=StateBlock)

    def run(self, x):
        return super().run(State(x)).tokens


@model("blocks called by keyword")
class _(Net):
    def __init__(self):
        super().__init__(block=KeywordBlock)

    def call(self, block, x):
        return block(hidden_states=x)


class Variant(Net):
    kind = Block

    def __init__(self):
        super().__init__(block=self.kind)


MODELS["attention and mlp in parallel"] = type("ParallelNet", (Variant,), {"kind": Parallel})
MODELS["norm after"] = type("PostNet", (Variant,), {"kind": PostNorm})
MODELS["the stream written in place"] = type("InPlaceNet", (Variant,), {"kind": InPlaceStream})


@model("two frames: attention over time, then over space")
class _(Net):
    """The upper and the lower half of the image are the frames; each of the 6 places attends to itself over time."""

    class SpaceTime(Block):
        def __init__(self, attention):
            super().__init__(attention)
            self.over_time = KINDS["matmul"]()

        def forward(self, x):
            x = x.unflatten(1, (2, 6))
            x = x + self.over_time(self.norm1(x).transpose(1, 2).flatten(0, 1)).unflatten(0, (-1, 6)).transpose(1, 2)
            x = x + self.attn(self.norm1(x).flatten(0, 1)).unflatten(0, (-1, 2))
            return (x + self.mlp(self.norm2(x))).flatten(1, 2)

    def __init__(self):
        super().__init__(block=self.SpaceTime, cls=False)


@model("no class token")
class _(Net):
    """One token less: the positions of all tokens come from the image."""

    def __init__(self):
        super().__init__(cls=False)


@model("registers at the end")
class _(Net):
    def __init__(self):
        super().__init__()
        self.registers = nn.Parameter(torch.randn(1, 3, WIDTH))

    def run(self, x):
        return super().run(torch.cat([x, self.registers.expand(len(x), -1, -1)], 1))


@model("a class token that joins at the last block")
class _(Net):
    def __init__(self):
        super().__init__(cls=False)
        self.late = nn.Parameter(torch.randn(1, 1, WIDTH))

    def call(self, block, x):
        return block(torch.cat([self.late.expand(len(x), -1, -1), x], 1) if block is self.blocks[-1] else x)


@model("a rectangle of 13 channels")
class _(Net):
    channels = 13


@model("one channel")
class _(Net):
    channels = 1


@model("layers of torch.nn, norm first")
class _(Net):
    norm_first = True

    def keep(self, blocks):
        layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 2 * WIDTH, batch_first=True, norm_first=self.norm_first)
        self.encoder = nn.TransformerEncoder(layer, DEPTH, enable_nested_tensor=False)

    def run(self, x):
        if TRUTH[0] is not None:
            y = x
            for i, layer in enumerate(self.encoder.layers):
                PLACE[0] = i
                entered = layer.norm1(y) if self.norm_first else y
                w, b = layer.self_attn.in_proj_weight.double(), layer.self_attn.in_proj_bias.double()
                q, k, _ = nn.functional.linear(entered.double(), w, b).chunk(3, -1)
                note(exact(*(z.unflatten(-1, (HEADS, -1)).transpose(1, 2) for z in (q, k))))
                y = layer(y)
        return self.encoder(x)


MODELS["layers of torch.nn, norm after"] = type(
    "PostLayers", (MODELS["layers of torch.nn, norm first"],), {"norm_first": False}
)


# ---- what models give back, and towers ----


@model("a dict of outputs")
class _(Net):
    def forward(self, x):
        y = super().forward(x)
        return {"logits": y, "more": [y * 2, (y,)]}


@model("two towers side by side")
class _(nn.Module):
    channels = 3

    def __init__(self):
        super().__init__()
        self.left, self.right = Net("matmul", 2), Net("sdpa", 2)

    def forward(self, x):
        a = self.left(x)
        y = self.right.embed(x)
        for i, block in enumerate(self.right.blocks):
            PLACE[0] = 2 + i
            y = block(y)
        return a + self.right.head(y.mean(1))


@model("two towers, block by block")
class _(nn.Module):
    """Blocks of the left and of the right tower alternate in time."""

    channels = 3

    def __init__(self):
        super().__init__()
        self.left, self.right = Net("matmul", 2), Net("matmul", 2)

    def forward(self, x):
        a, b = self.left.embed(x), self.right.embed(x)
        for i in range(2):
            PLACE[0] = i
            a = self.left.blocks[i](a)
            PLACE[0] = 2 + i
            b = self.right.blocks[i](b)
        return self.left.head(a.mean(1)) + self.right.head(b.mean(1))


@model("siamese, one encoder called twice")
class _(nn.Module):
    channels = 3

    def __init__(self):
        super().__init__()
        self.encoder = Net("matmul", 2)

    def forward(self, x):
        a = self.encoder(x)
        y = self.encoder.embed(x.flip(-1))
        for i, block in enumerate(self.encoder.blocks):
            PLACE[0] = 2 + i
            y = block(y)
        return a - self.encoder.head(y.mean(1))


class Pool(Attention):
    """One learned query reads the tokens."""

    def setup(self):
        self.query = nn.Parameter(torch.randn(1, 1, WIDTH))

    def forward(self, x):
        _, k, v = self.qkv(x).chunk(3, -1)
        a = (self.query @ k.mT * WIDTH**-0.5).softmax(-1)
        return self.proj(a @ v)


@model("a pooling head beside plain blocks")
class _(Net):
    def __init__(self):
        super().__init__()
        self.pool = Pool()

    def forward(self, x):
        return self.head(self.pool(self.run(self.embed(x)))[:, 0])


class Mixed(Net):
    """The middle block has another kind of attention than the first and the last."""

    middle = "sigmoid"

    def keep(self, blocks):
        blocks[1] = Block(KINDS[self.middle]())
        super().keep(blocks)


for _name in (
    "sigmoid",
    "linear attention",
    "a learned sink logit",
    "map [B,N,N,H]",
    "multiplied elementwise",
    "keys in chunks, online softmax",
):
    MODELS[f"plain blocks with one of: {_name}"] = type("Mixed", (Mixed,), {"middle": _name})


@model("weights kept as buffers")
class _(Net):
    def __init__(self):
        super().__init__()
        for module in list(self.modules()):
            for name, parameter in list(module._parameters.items()):
                if parameter is not None:
                    del module._parameters[name]
                    module.register_buffer(name, parameter.detach())


@model("an integer parameter first")
class _(Net):
    def __init__(self):
        super().__init__()
        first = {"count": nn.Parameter(torch.zeros(1, dtype=torch.int64), requires_grad=False)}
        self._parameters = {**first, **self._parameters}


@model("dynamically deep: stops early in no_grad")
class _(Net):
    """A constant number of blocks that is less than there are."""

    def each(self):
        return list(self.blocks)[:2]


APART = {"two towers side by side": (1,), "two towers, block by block": (1,), "siamese, one encoder called twice": (1,)}
"""After which blocks, by tower, the next one does not read what the block gives."""


def cases():
    """Every model by its name."""
    made = {name: Case(lambda name=name: Net(name), never=name in NEVER, says=SAYS.get(name, "")) for name in KINDS}
    for name, thing in MODELS.items():
        made[f"model: {name}"] = Case(thing, thing.channels, apart=APART.get(name, ()))
    return made


assert GRID[0] * GRID[1] == TOKENS - 1
