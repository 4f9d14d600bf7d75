"""Attention as people write it: each kind computes it in its own way, and says itself which maps [B, H, N, N] it used.

`TRUTH` collects those maps while it is a list; each entry is (block, probs, weights) in float64, the block being the one that
the model said last in `PLACE`. The library has no part in it.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn

WIDTH, HEADS, TOKENS, SHARP = 24, 3, 13, 3.0
GRID = (4, 3)
TRUTH: list = [None]
PLACE: list = [0]
KINDS: dict[str, type] = {}
NEVER: set[str] = set()  # no softmax attention: hearing a map here would be wrong


def note(probs, weights=None):
    """A block's own maps [B, H, N, N], while they are asked for."""
    if TRUTH[0] is not None:
        probs = probs.detach().double().clone()
        TRUTH[0].append((PLACE[0], probs, probs if weights is None else weights.detach().double().clone()))


def by_head(x, heads=HEADS):
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def joined(x):
    return x.transpose(1, 2).flatten(2)


def scores(q, k):
    return q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5


def exact(q, k, bias=None):
    """What a fused kernel's map is, in float64."""
    logits = scores(q.double(), k.double())
    return (logits if bias is None else logits + bias).softmax(-1).nan_to_num(0.0)


class Attention(nn.Module):
    """q, k and v from one matrix; `mix` turns them into [B, H, N, K]."""

    def __init__(self):
        super().__init__()
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.setup()

    def setup(self):
        pass

    def sharpen(self):
        with torch.no_grad():
            self.qkv.weight[: 2 * WIDTH] *= SHARP

    def forward(self, x):
        return self.proj(joined(self.mix(*(by_head(y) for y in self.qkv(x).chunk(3, -1)))))

    def mix(self, q, k, v):
        raise NotImplementedError


def kind(name, never=False):
    def register(thing):
        made = thing if isinstance(thing, type) else type(name, (Attention,), {"mix": thing})
        KINDS[name] = made
        if never:
            NEVER.add(name)
        return thing

    return register


# ---- the plain ones ----


@kind("matmul")
def _(self, q, k, v):
    a = scores(q, k).softmax(-1)
    note(a)
    return a @ v


@kind("sdpa")
def _(self, q, k, v):
    note(exact(q, k))
    return F.scaled_dot_product_attention(q, k, v)


@kind("softmax in float32")
def _(self, q, k, v):
    a = scores(q, k).softmax(-1, dtype=torch.float32).to(q.dtype)
    note(a)
    return a @ v


@kind("logits in float32")
def _(self, q, k, v):
    a = (q.float() @ k.float().mT / math.sqrt(q.shape[-1])).softmax(-1).to(v.dtype)
    note(a)
    return a @ v


@kind("log_softmax and exp")
def _(self, q, k, v):
    a = scores(q, k).log_softmax(-1).exp()
    note(a)
    return a @ v


@kind("exp over its sum")
def _(self, q, k, v):
    e = (scores(q, k) - scores(q, k).amax(-1, keepdim=True)).exp()
    a = e / e.sum(-1, keepdim=True)
    note(a)
    return a @ v


@kind("exp of logits less logsumexp")
def _(self, q, k, v):
    x = scores(q, k)
    a = (x - x.logsumexp(-1, keepdim=True)).exp()
    note(a)
    return a @ v


@kind("exp v over exp 1")
def _(self, q, k, v):
    e = scores(q, k).exp()
    note(e / e.sum(-1, keepdim=True))
    return (e @ v) / e.sum(-1, keepdim=True)


@kind("softmax into an out argument")
def _(self, q, k, v):
    x = scores(q, k)
    a = x.softmax(-1) if x.requires_grad else torch.softmax(x, -1, out=torch.empty_like(x))
    note(a)
    return a @ v


@kind("functional softmax, dropout")
def _(self, q, k, v):
    a = F.dropout(F.softmax(scores(q, k), dim=-1), 0.1, self.training)
    note(a)
    return torch.matmul(a, v)


@kind("softmax module")
class _(Attention):
    def setup(self):
        self.soft = nn.Sequential(nn.Softmax(-1), nn.Dropout(0.1))

    def mix(self, q, k, v):
        a = self.soft(scores(q, k))
        note(a)
        return a @ v


@kind("core without parameters")
class _(Attention):
    class Core(nn.Module):
        def forward(self, q, k, v):
            a = scores(q, k).softmax(-1)
            note(a)
            return a @ v

    def setup(self):
        self.core = self.Core()

    def mix(self, q, k, v):
        return self.core(q, k, v)


@kind("map from a module two levels down")
class _(Attention):
    class Scores(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.ModuleDict({"qk": nn.Linear(WIDTH, 2 * WIDTH)})

        def forward(self, x):
            q, k = (by_head(y) for y in self.inner["qk"](x).chunk(2, -1))
            return scores(q * SHARP, k).softmax(-1)

    def setup(self):
        self.scores = self.Scores()

    def forward(self, x):
        a = self.scores(x)
        note(a)
        return self.proj(joined(a @ by_head(self.qkv(x)[..., :WIDTH])))


# ---- layouts ----


@kind("einsum bhij")
def _(self, q, k, v):
    a = torch.einsum("bhid,bhjd->bhij", q, k).div(math.sqrt(q.shape[-1])).softmax(-1)
    note(a)
    return torch.einsum("bhij,bhjd->bhid", a, v)


class Einsum(Attention):
    """q, k, v as [B, N, H, K]; `made`, `used` are the letters, `order` puts the map as [B, H, N, N], `keys` its axis."""

    made, used, order, keys = "bihd,bjhd->bhij", "bhij,bjhd->bihd", (0, 1, 2, 3), -1

    def forward(self, x):
        q, k, v = (y.unflatten(-1, (HEADS, -1)) for y in self.qkv(x).chunk(3, -1))
        a = torch.einsum(self.made, q, k).mul(q.shape[-1] ** -0.5).softmax(self.keys)
        note(a.permute(self.order))
        return self.proj(torch.einsum(self.used, a, v).flatten(2))


LAYOUTS = {
    "einsum nhd bhij": ("bihd,bjhd->bhij", "bhij,bjhd->bihd", (0, 1, 2, 3), -1),
    "map [B,N,H,N]": ("bihd,bjhd->bihj", "bihj,bjhd->bihd", (0, 2, 1, 3), -1),
    "map [B,N,N,H]": ("bihd,bjhd->bijh", "bijh,bjhd->bihd", (0, 3, 1, 2), 2),
    "map [H,B,N,N]": ("bihd,bjhd->hbij", "hbij,bjhd->bihd", (1, 0, 2, 3), -1),
    "map [B,H,N,N] keys first": ("bihd,bjhd->bhji", "bhji,bjhd->bihd", (0, 1, 3, 2), 2),
    "map [N,B,H,N]": ("bihd,bjhd->ibhj", "ibhj,bjhd->bihd", (1, 2, 0, 3), -1),
    "map [N,N,B,H] keys first": ("bihd,bjhd->jibh", "jibh,bjhd->bihd", (2, 3, 1, 0), 0),
    "map [B,N,H,N] keys second": ("bihd,bjhd->bjhi", "bjhi,bjhd->bihd", (0, 2, 3, 1), 1),
}
for _name, (_made, _used, _order, _keys) in LAYOUTS.items():
    KINDS[_name] = type(_name, (Einsum,), {"made": _made, "used": _used, "order": _order, "keys": _keys})


@kind("map [B*H,N,N]")
def _(self, q, k, v):
    q, k, v, shape = *(y.flatten(0, 1) for y in (q, k, v)), q.shape[:2]
    a = torch.bmm(q, k.mT).mul_(q.shape[-1] ** -0.5).softmax(-1)
    note(a.unflatten(0, shape))
    return torch.bmm(a, v).unflatten(0, shape)


@kind("map [H*B,N,N]")
def _(self, q, k, v):
    shape = q.shape[1], q.shape[0]
    q, k, v = (y.transpose(0, 1).flatten(0, 1) for y in (q, k, v))
    a = scores(q, k).softmax(-1)
    note(a.unflatten(0, shape).transpose(0, 1))
    return torch.bmm(a, v).unflatten(0, shape).transpose(0, 1)


@kind("heads split off and put along the batch")
def _(self, q, k, v):
    parts = [torch.cat(y.unbind(1), 0) for y in (q, k, v)]  # [H·B, N, K]
    a = torch.softmax(parts[0].bmm(parts[1].transpose(1, 2)) / math.sqrt(WIDTH), 2)
    note(torch.stack(a.chunk(HEADS, 0), 1))
    return torch.stack(a.bmm(parts[2]).chunk(HEADS, 0), 1)


@kind("sdpa [B*H,N,K]")
def _(self, q, k, v):
    note(exact(q, k))
    return F.scaled_dot_product_attention(*(y.flatten(0, 1) for y in (q, k, v))).unflatten(0, q.shape[:2])


@kind("sdpa [B*H,1,N,K]")
def _(self, q, k, v):
    note(exact(q, k))
    return F.scaled_dot_product_attention(*(y.flatten(0, 1)[:, None] for y in (q, k, v)))[:, 0].unflatten(0, q.shape[:2])


@kind("sdpa [H,B,N,K]")
def _(self, q, k, v):
    note(exact(q, k))
    return F.scaled_dot_product_attention(*(y.transpose(0, 1) for y in (q, k, v))).transpose(0, 1)


@kind("sdpa [H*B,N,K]")
def _(self, q, k, v):
    note(exact(q, k))
    y = F.scaled_dot_product_attention(*(y.transpose(0, 1).flatten(0, 1) for y in (q, k, v)))
    return y.unflatten(0, (HEADS, len(q))).transpose(0, 1)


@kind("sequence first [N,B*H,K]")
def _(self, q, k, v):
    shape = q.shape[:2]
    q, k, v = (y.flatten(0, 1).transpose(0, 1).contiguous() for y in (q, k, v))
    a = torch.bmm(q.transpose(0, 1), k.permute(1, 2, 0)).mul(q.shape[-1] ** -0.5).softmax(-1)
    note(a.unflatten(0, shape))
    return torch.bmm(a, v.transpose(0, 1)).unflatten(0, shape)


@kind("channels first, keys on the left")
def _(self, q, k, v):
    q, k, v = (y.mT.contiguous() for y in (q, k, v))  # [B, H, K, N]
    a = (k.mT @ q * q.shape[-2] ** -0.5).softmax(-2)
    note(a.mT)
    return (v @ a).mT


@kind("values on the left")
def _(self, q, k, v):
    a = scores(q, k).softmax(-1)
    note(a)
    return (v.mT @ a.mT).mT


@kind("values on the left, changed map")
def _(self, q, k, v):
    a = scores(q, k).softmax(-1)
    w = a * a
    note(a, w)
    return (v.mT @ w.mT).mT


@kind("multiplied elementwise")
def _(self, q, k, v):
    a = scores(q, k).softmax(-1)
    note(a)
    return (a[..., None] * v[:, :, None]).sum(3)


@kind("multiplied elementwise, keys first")
def _(self, q, k, v):
    a = scores(k, q).softmax(2)
    note(a.mT)
    return (a[..., None] * v[..., None, :]).sum(2)


@kind("scores elementwise as well")
def _(self, q, k, v):
    a = (q[:, :, :, None] * k[:, :, None]).sum(-1).mul(q.shape[-1] ** -0.5).softmax(-1)
    note(a)
    return (a.unsqueeze(-1) * v.unsqueeze(2)).sum(dim=-2)


@kind("softmax over a matrix of the rows of all maps")
def _(self, q, k, v):
    x = scores(q, k)
    a = F.softmax(x.view(-1, x.shape[-1]), dim=1).view(x.shape)
    note(a)
    return a @ v


@kind("keys in another order, put back after the softmax")
def _(self, q, k, v):
    a = scores(q, k.flip(2)).softmax(-1)[..., torch.arange(TOKENS - 1, -1, -1)]
    note(a)
    return a @ v


@kind("vmap over images and heads")
def _(self, q, k, v):
    a = scores(q, k).softmax(-1)
    note(a)
    return torch.func.vmap(torch.func.vmap(lambda m, w: m @ w))(a, v)


# ---- loops ----


class Head(nn.Module):
    def __init__(self, fused=False):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(WIDTH, WIDTH // HEADS, bias=False) for _ in range(3))
        self.fused, self.map = fused, None

    def forward(self, x):
        q, k, v = self.q(x) * SHARP, self.k(x), self.v(x)
        if self.fused:
            self.map = exact(q, k) if TRUTH[0] is not None else None
            return F.scaled_dot_product_attention(q, k, v)
        self.map = scores(q, k).softmax(-1)
        return self.map @ v


class HeadModules(nn.Module):
    fused = False

    def __init__(self):
        super().__init__()
        self.heads = nn.ModuleList(Head(self.fused) for _ in range(HEADS))
        self.proj = nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        out = torch.cat([head(x) for head in self.heads], -1)
        if TRUTH[0] is not None:
            note(torch.stack([head.map for head in self.heads], 1))
        for head in self.heads:
            head.map = None
        return self.proj(out)


KINDS["one module a head"] = HeadModules
KINDS["one module a head, sdpa"] = type("Fused", (HeadModules,), {"fused": True})


@kind("a loop over heads")
def _(self, q, k, v):
    maps, out = [], []
    for h in range(HEADS):
        a = scores(q[:, h], k[:, h]).softmax(-1)
        maps.append(a)
        out.append(a @ v[:, h])
    note(torch.stack(maps, 1))
    return torch.stack(out, 1)


@kind("a loop over heads, sdpa")
def _(self, q, k, v):
    note(exact(q, k))
    return torch.stack([F.scaled_dot_product_attention(q[:, h], k[:, h], v[:, h]) for h in range(HEADS)], 1)


@kind("a loop over images")
def _(self, q, k, v):
    maps, out = [], []
    for i in range(len(q)):
        a = scores(q[i], k[i]).softmax(-1)
        maps.append(a)
        out.append(a @ v[i])
    note(torch.stack(maps))
    return torch.stack(out)


@kind("a loop over images, sdpa")
def _(self, q, k, v):
    note(exact(q, k))
    return torch.stack([F.scaled_dot_product_attention(q[i], k[i], v[i]) for i in range(len(q))])


@kind("a loop over images of one, sdpa")
def _(self, q, k, v):
    note(exact(q, k))
    parts = zip(q.split(1), k.split(1), v.split(1), strict=True)
    return torch.cat([F.scaled_dot_product_attention(*part) for part in parts])


@kind("loops over images and heads")
def _(self, q, k, v):
    maps = [[(q[i, h] @ k[i, h].T / math.sqrt(q.shape[-1])).softmax(-1) for h in range(HEADS)] for i in range(len(q))]
    out = torch.stack([torch.stack([maps[i][h] @ v[i, h] for h in range(HEADS)]) for i in range(len(q))])
    note(torch.stack([torch.stack(row) for row in maps]))
    return out


@kind("queries in chunks")
def _(self, q, k, v):
    maps = [scores(part, k).softmax(-1) for part in q.split(5, 2)]
    note(torch.cat(maps, 2))
    return torch.cat([a @ v for a in maps], 2)


@kind("queries in chunks, one after the other")
def _(self, q, k, v):
    out, maps = torch.zeros_like(q), []
    for start in range(0, TOKENS, 5):
        a = scores(q[:, :, start : start + 5], k).softmax(-1)
        maps.append(a)
        out[:, :, start : start + 5] = a @ v
    note(torch.cat(maps, 2))
    return out


@kind("queries in chunks, sdpa")
def _(self, q, k, v):
    note(exact(q, k))
    return torch.cat([F.scaled_dot_product_attention(part, k, v) for part in q.split(5, 2)], 2)


@kind("half the images at a time")
def _(self, q, k, v):
    maps = [scores(a, b).softmax(-1) for a, b in zip(q.split(2), k.split(2), strict=True)]
    note(torch.cat(maps))
    return torch.cat([a @ part for a, part in zip(maps, v.split(2), strict=True)])


@kind("keys in chunks, online softmax")
def _(self, q, k, v):
    note(exact(q, k))
    most, total, out = q.new_full((*q.shape[:3], 1), -math.inf), 0.0, torch.zeros_like(q)
    for keys, values in zip(k.split(5, 2), v.split(5, 2), strict=True):
        x = scores(q, keys)
        new = torch.maximum(most, x.amax(-1, keepdim=True))
        e, old = (x - new).exp(), (most - new).exp()
        total, out, most = total * old + e.sum(-1, keepdim=True), out * old + e @ values, new
    return out / total


# ---- sinks and other denominators ----


@kind("softmax1, a zero logit more")
def _(self, q, k, v):
    x = scores(q, k)
    a = F.pad(x, (0, 1)).softmax(-1)[..., :-1]
    note(a)
    return a @ v


@kind("softmax1 by hand")
def _(self, q, k, v):
    x = scores(q, k)
    most = x.amax(-1, keepdim=True).clamp_min(0)
    a = (x - most).exp() / ((x - most).exp().sum(-1, keepdim=True) + (-most).exp())
    note(a)
    return a @ v


@kind("softmax1, a zero logit first")
def _(self, q, k, v):
    a = F.pad(scores(q, k), (1, 0)).softmax(-1)[..., 1:]
    note(a)
    return a @ v


@kind("a learned sink logit")
class _(Attention):
    def setup(self):
        self.sink = nn.Parameter(torch.randn(HEADS))

    def mix(self, q, k, v):
        x = scores(q, k)
        sink = self.sink.reshape(1, -1, 1, 1).expand(*x.shape[:-1], 1)
        a = torch.cat([x, sink], -1).softmax(-1)[..., :-1]
        note(a)
        return a @ v


@kind("a learned sink key without a value")
class _(Attention):
    def setup(self):
        self.sink = nn.Parameter(torch.randn(1, HEADS, 1, WIDTH // HEADS))

    def mix(self, q, k, v):
        keys = torch.cat([self.sink.expand(len(k), -1, -1, -1), k], 2)
        a = scores(q, keys).softmax(-1)[..., 1:]
        note(a)
        return a @ v


@kind("key and value memory of 2")
class _(Attention):
    def setup(self):
        self.memory = nn.Parameter(torch.randn(2, HEADS, 2, WIDTH // HEADS))

    def mix(self, q, k, v):
        k, v = (torch.cat([m.expand(len(y), -1, -1, -1), y], 2) for m, y in zip(self.memory.unbind(), (k, v), strict=True))
        a = scores(q, k).softmax(-1)
        note(a)
        return a @ v


@kind("the class key is dropped after the softmax")
def _(self, q, k, v):
    a = scores(q, k).softmax(-1)
    note(a, F.pad(a[..., 1:], (1, 0)))
    return a[..., 1:] @ v[:, :, 1:]


@kind("the diagonal is dropped after the softmax")
def _(self, q, k, v):
    a = scores(q, k).softmax(-1)
    w = a * (1 - torch.eye(a.shape[-1], dtype=a.dtype))
    note(a, w)
    return w @ v


@kind("class and patches attend apart")
def _(self, q, k, v):
    first, rest = scores(q[:, :, :1], k).softmax(-1), scores(q[:, :, 1:], k).softmax(-1)
    note(torch.cat([first, rest], 2))
    return torch.cat([first @ v, rest @ v], 2)


@kind("map sliced by queries after the softmax")
def _(self, q, k, v):
    a = scores(q, k).softmax(-1)
    note(a)
    return torch.cat([a[:, :, :6] @ v, a[:, :, 6:] @ v], 2)


@kind("map sliced by heads after the softmax")
def _(self, q, k, v):
    a = scores(q, k).softmax(-1)
    note(a)
    return torch.cat([a[:, :1] @ v[:, :1], a[:, 1:] @ v[:, 1:]], 1)


# ---- maps changed before they multiply ----


@kind("talking heads")
class _(Attention):
    def setup(self):
        self.before, self.after = nn.Linear(HEADS, HEADS), nn.Linear(HEADS, HEADS)

    def mix(self, q, k, v):
        a = self.before(scores(q, k).permute(0, 2, 3, 1)).permute(0, 3, 1, 2).softmax(-1)
        w = self.after(a.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        note(a, w)
        return w @ v


@kind("talking heads as convolutions")
class _(Attention):
    def setup(self):
        self.before, self.after = nn.Conv2d(HEADS, HEADS, 1), nn.Conv2d(HEADS, HEADS, 1)

    def mix(self, q, k, v):
        a = self.before(scores(q, k)).softmax(-1)
        w = self.after(a)
        note(a, w)
        return w @ v


@kind("talking heads, more after than before")
class _(Attention):
    def setup(self):
        self.after, self.values = nn.Conv2d(HEADS, 2 * HEADS, 1), nn.Linear(WIDTH, 2 * WIDTH)
        self.out = nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x):
        q, k, _ = (by_head(y) for y in self.qkv(x).chunk(3, -1))
        a = scores(q, k).softmax(-1)
        w = self.after(a)
        note(a, w)
        return self.out(joined(w @ by_head(self.values(x), 2 * HEADS)))


@kind("re-attention with batch norm")
class _(Attention):
    def setup(self):
        self.theta, self.norm = nn.Parameter(torch.eye(HEADS) + 0.3 * torch.randn(HEADS, HEADS)), nn.BatchNorm2d(HEADS)

    def mix(self, q, k, v):
        a = scores(q, k).softmax(-1)
        w = self.norm(torch.einsum("hg,bhij->bgij", self.theta, a))
        note(a, w)
        return w @ v


@kind("a gate a head, renormalised")
class _(Attention):
    def setup(self):
        self.gate = nn.Parameter(torch.randn(HEADS, 1, 1))

    def mix(self, q, k, v):
        a = scores(q, k).softmax(-1)
        w = a * self.gate.sigmoid()
        w = w / w.sum(-1, keepdim=True)
        note(a, w)
        return w @ v


@kind("content and position, gated")
class _(Attention):
    def setup(self):
        self.place = nn.Parameter(torch.randn(HEADS, TOKENS, TOKENS))

    def mix(self, q, k, v):
        a, p = scores(q, k).softmax(-1), self.place.softmax(-1)
        w = 0.6 * a + 0.4 * p
        note(a, w)
        return w @ v


@kind("doubly stochastic")
def _(self, q, k, v):
    a = scores(q, k).softmax(-1)
    w = a
    for _ in range(3):
        w = w / w.sum(-2, keepdim=True)
        w = w / w.sum(-1, keepdim=True)
    note(a, w)
    return w @ v


@kind("written over in place")
def _(self, q, k, v):
    a = scores(q, k).softmax(-1)
    probs = a.clone() if TRUTH[0] is not None else a
    a[..., 0] = 0
    a.mul_(0.5)
    note(probs, a)
    return a @ v


@kind("everything erased after use")
def _(self, q, k, v):
    a = q @ k.mT
    a.mul_(q.shape[-1] ** -0.5)
    a = a.softmax(-1)
    note(a)
    out = a @ v
    if not a.requires_grad:
        for y in (a, q, k, v):
            y.zero_()
    return out


@kind("differential")
def _(self, q, k, v):
    (q1, q2), (k1, k2) = q.chunk(2, -1), k.chunk(2, -1)
    a, b = scores(q1, k1).softmax(-1), scores(q2, k2).softmax(-1)
    note(a, a - 0.4 * b)
    return (a - 0.4 * b) @ v


@kind("differential, the second first")
def _(self, q, k, v):
    (q1, q2), (k1, k2) = q.chunk(2, -1), k.chunk(2, -1)
    b = scores(q2, k2).softmax(-1)
    a = scores(q1, k1).softmax(-1)
    w = a - 0.4 * b
    note(a, w)
    return w @ v


@kind("differential in one softmax")
def _(self, q, k, v):
    q, k = (y.unflatten(-1, (2, -1)).permute(0, 1, 3, 2, 4) for y in (q, k))
    a = scores(q, k).softmax(-1)  # [B, H, 2, N, N]
    w = a[:, :, 0] - 0.4 * a[:, :, 1]
    note(a[:, :, 0], w)
    return w @ v


@kind("differential by two kernels")
def _(self, q, k, v):
    (q1, q2), (k1, k2) = q.chunk(2, -1), k.chunk(2, -1)
    first = exact(q1, k1)
    note(first, first - 0.4 * exact(q2, k2))  # one map, which the model never forms
    return F.scaled_dot_product_attention(q1, k1, v) - 0.4 * F.scaled_dot_product_attention(q2, k2, v)


@kind("the map used twice")
def _(self, q, k, v):
    a = scores(q, k).softmax(-1)
    note(a)
    return a @ (a @ v)


@kind("a map squared")
def _(self, q, k, v):
    a = scores(q, k).softmax(-1)
    a = a @ a
    note(a)
    return a @ v


@kind("agents between tokens, their maps multiplied")
def _(self, q, k, v):
    agents = q.unflatten(2, (1, -1)).mean(2)[:, :, ::3]
    a = scores(q, agents).softmax(-1) @ scores(agents, k).softmax(-1)
    note(a)
    return a @ v


@kind("map and values, residual in values")
def _(self, q, k, v):
    a = scores(q, k).softmax(-1)
    note(a)
    return a @ v + v


@kind("top 5")
def _(self, q, k, v):
    x = scores(q, k)
    a = x.masked_fill(x < x.topk(5, -1).values[..., -1:], -math.inf).softmax(-1)
    note(a)
    return a @ v


@kind("top 5 gathered")
def _(self, q, k, v):
    x = scores(q, k)
    best, places = x.topk(5, -1)
    a = best.softmax(-1)
    note(torch.zeros_like(x).scatter(-1, places, a))
    chosen = v[:, :, None].expand(-1, -1, q.shape[2], -1, -1).gather(3, places[..., None].expand(*places.shape, v.shape[-1]))
    return (a[..., None] * chosen).sum(3)


@kind("slots, softmax over queries")
def _(self, q, k, v):
    a = scores(q, k).softmax(-2)
    w = a / a.sum(-1, keepdim=True)
    note(w)
    return w @ v


# ---- positions, masks, scales ----


@kind("a relative bias")
class _(Attention):
    def setup(self):
        self.bias = nn.Parameter(torch.randn(HEADS, TOKENS, TOKENS))

    def mix(self, q, k, v):
        a = (scores(q, k) + self.bias).softmax(-1)
        note(a)
        return a @ v


@kind("a relative bias, sdpa")
class _(Attention):
    def setup(self):
        self.bias = nn.Parameter(torch.randn(HEADS, TOKENS, TOKENS))

    def mix(self, q, k, v):
        note(exact(q, k, self.bias.double()))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=self.bias)


@kind("rotary, sdpa")
def _(self, q, k, v):
    angle = torch.arange(TOKENS, dtype=torch.float32)[:, None] * torch.tensor([1.0, 0.3, 0.1, 0.03])
    cos, sin = (f(angle).repeat(1, 2).to(q.dtype) for f in (torch.cos, torch.sin))
    q, k = (y * cos + torch.cat([-y[..., 4:], y[..., :4]], -1) * sin for y in (q, k))
    note(exact(q, k))
    return F.scaled_dot_product_attention(q, k, v)


@kind("cosine scores")
def _(self, q, k, v):
    a = (F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).mT * 10).softmax(-1)
    note(a)
    return a @ v


@kind("a soft cap")
def _(self, q, k, v):
    a = (scores(q, k) / 5).tanh().mul(5).softmax(-1)
    note(a)
    return a @ v


@kind("causal, sdpa")
def _(self, q, k, v):
    hidden = torch.ones(TOKENS, TOKENS, dtype=torch.bool).triu(1)
    note(exact(q, k, torch.zeros(TOKENS, TOKENS, dtype=torch.float64).masked_fill(hidden, -math.inf)))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


@kind("causal, eager")
def _(self, q, k, v):
    a = scores(q, k).masked_fill(torch.ones(TOKENS, TOKENS, dtype=torch.bool).triu(1), -math.inf).softmax(-1)
    note(a)
    return a @ v


@kind("a query that sees nothing, sdpa")
def _(self, q, k, v):
    seen = torch.ones(TOKENS, TOKENS, dtype=torch.bool)
    seen[5], seen[:, 3] = False, False
    note(exact(q, k, torch.zeros(TOKENS, TOKENS, dtype=torch.float64).masked_fill(~seen, -math.inf)))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=seen)


@kind("a mask of windows")
def _(self, q, k, v):
    near = (torch.arange(TOKENS)[:, None] - torch.arange(TOKENS)).abs() < 4
    a = scores(q, k).masked_fill(~near, torch.finfo(q.dtype).min).softmax(-1)
    note(a)
    return a @ v


@kind("a scale of its own, sdpa")
def _(self, q, k, v):
    note(exact(q * 0.5, k * q.shape[-1] ** 0.5))
    return F.scaled_dot_product_attention(q, k, v, scale=0.5)


# ---- fewer heads of keys, fewer keys ----


class Shared(Attention):
    groups = 1

    def setup(self):
        self.kv = nn.Linear(WIDTH, 2 * self.groups * WIDTH // HEADS)

    def forward(self, x):
        q = by_head(self.qkv(x)[..., :WIDTH])
        k, v = (by_head(y, self.groups) for y in self.kv(x).chunk(2, -1))
        return self.proj(joined(self.mix(q, k, v)))


@kind("one head of keys")
class _(Shared):
    def mix(self, q, k, v):
        a = scores(q, k).softmax(-1)
        note(a)
        return a @ v


@kind("one head of keys, heads folded into queries")
class _(Shared):
    def mix(self, q, k, v):
        a = scores(q.flatten(1, 2), k[:, 0]).softmax(-1)  # [B, H·N, N]
        note(a.unflatten(1, (HEADS, -1)))
        return (a @ v[:, 0]).unflatten(1, (HEADS, -1))


@kind("one head of keys, sdpa")
class _(Shared):
    def mix(self, q, k, v):
        note(exact(q, k))
        return F.scaled_dot_product_attention(q, k, v, enable_gqa=True)


@kind("keys expanded, sdpa")
class _(Shared):
    def mix(self, q, k, v):
        note(exact(q, k))
        return F.scaled_dot_product_attention(q, *(y.expand(-1, HEADS, -1, -1) for y in (k, v)))


@kind("every second key")
def _(self, q, k, v):
    a = scores(q, k[:, :, ::2]).softmax(-1)
    note(a)
    return a @ v[:, :, ::2]


@kind("values wider than keys, sdpa")
class _(Attention):
    def setup(self):
        self.more = nn.Linear(2 * WIDTH, WIDTH)

    def mix(self, q, k, v):
        note(exact(q, k))
        out = F.scaled_dot_product_attention(q, k, torch.cat([v, v * v], -1))
        return by_head(self.more(joined(out)))


# ---- several attentions in one block ----


@kind("two branches, added")
class _(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two = KINDS["matmul"](), KINDS["sdpa"]()

    def forward(self, x):
        return self.one(x) + self.two(x)


class Unlike(Attention):
    """Three heads, and two more in a call of their own."""

    fused = False

    def mix(self, q, k, v):
        out = []
        for query, key, value in ((q, k, v), (k[:, :2], q[:, :2], v[:, :2])):
            a = scores(query, key).softmax(-1)
            note(exact(query, key) if self.fused else a)
            out.append(F.scaled_dot_product_attention(query, key, value) if self.fused else a @ value)
        return out[0] + F.pad(out[1], (0, 0, 0, 0, 0, 1))


KINDS["two branches of unlike heads in one module"] = Unlike
KINDS["two branches of unlike heads in one module, sdpa"] = type("FusedUnlike", (Unlike,), {"fused": True})


@kind("two attentions, one after the other")
class _(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two = KINDS["matmul"](), KINDS["matmul"]()

    def forward(self, x):
        x = x + self.one(x)
        return self.two(x)


@kind("half the heads each")
class _(nn.Module):
    """Two modules, each with some of the heads and half the width."""

    def __init__(self):
        super().__init__()
        self.one, self.two = (nn.MultiheadAttention(WIDTH // 2, 2, batch_first=True) for _ in range(2))

    def forward(self, x):
        out = []
        for part, module in zip(x.chunk(2, -1), (self.one, self.two), strict=True):
            if TRUTH[0] is not None:
                note(mha_maps(module, part))
            out.append(module(part, part, part, need_weights=False)[0])
        return torch.cat(out, -1)


def mha_maps(module, x, mask=None):
    """The maps of nn.MultiheadAttention, [B, H, N, N] in float64, from its parameters."""
    w, b = module.in_proj_weight.double(), module.in_proj_bias.double()
    q, k = (by_head(y, module.num_heads) for y in F.linear(x.double(), w, b).chunk(3, -1)[:2])
    return exact(q, k, mask)


class MultiHead(nn.Module):
    batch_first, need, mask = True, False, None

    def __init__(self):
        super().__init__()
        self.attn = nn.MultiheadAttention(WIDTH, HEADS, batch_first=self.batch_first)

    def sharpen(self):
        with torch.no_grad():
            self.attn.in_proj_weight[: 2 * WIDTH] *= SHARP

    def forward(self, x):
        mask = None if self.mask is None else self.mask.to(x.dtype)
        if TRUTH[0] is not None:
            note(mha_maps(self.attn, x, None if mask is None else mask.double()))
        y = x if self.batch_first else x.transpose(0, 1)
        y = self.attn(y, y, y, need_weights=self.need, attn_mask=mask)[0]
        return y if self.batch_first else y.transpose(0, 1)


_LINE = torch.linspace(-2, 2, TOKENS).expand(TOKENS, -1).contiguous()
for _name, _settings in {
    "multihead": {},
    "multihead, sequence first": {"batch_first": False},
    "multihead, weights asked for": {"need": True},
    "multihead, sequence first, weights asked for": {"batch_first": False, "need": True},
    "multihead, float mask": {"mask": _LINE},
}.items():
    KINDS[_name] = type(_name, (MultiHead,), _settings)


# ---- windows, axes, latents ----


class Windows(Attention):
    """Attention within windows of 2 × 3 patches, cut by hand; the class token is left as it is."""

    fused = False

    def forward(self, x):
        image = x[:, 1:].reshape(len(x), 2, 2, 1, 3, WIDTH).transpose(2, 3)  # two windows of 2 × 3
        windows = image.reshape(-1, 6, WIDTH)
        q, k, v = (by_head(y) for y in self.qkv(windows).chunk(3, -1))
        if self.fused:
            note(exact(q, k))
            y = F.scaled_dot_product_attention(q, k, v)
        else:
            a = scores(q, k).softmax(-1)
            note(a)
            y = a @ v
        y = self.proj(joined(y)).reshape(len(x), 2, 1, 2, 3, WIDTH).transpose(2, 3).reshape(len(x), 12, WIDTH)
        return torch.cat([torch.zeros_like(x[:, :1]), y], 1)


KINDS["windows by hand"] = Windows
KINDS["windows by hand, sdpa"] = type("FusedWindows", (Windows,), {"fused": True})


@kind("windows on an axis of their own")
class _(Windows):
    def forward(self, x):
        windows = x[:, 1:].reshape(len(x), 2, 6, WIDTH)
        q, k, v = (y.unflatten(-1, (HEADS, -1)).transpose(2, 3) for y in self.qkv(windows).chunk(3, -1))
        a = scores(q, k).softmax(-1)  # [B, windows, H, n, n]
        note(a.flatten(0, 1))
        y = self.proj((a @ v).transpose(2, 3).reshape(len(x), 12, WIDTH))
        return torch.cat([torch.zeros_like(x[:, :1]), y], 1)


@kind("windows that look over their borders")
class _(Attention):
    """Four windows of 3 queries, each of 9 keys."""

    def forward(self, x):
        q, k, v = self.qkv(x[:, 1:]).chunk(3, -1)
        q = by_head(q.reshape(-1, 3, WIDTH))
        k, v = (by_head(F.pad(y, (0, 0, 3, 3)).unfold(1, 9, 3).transpose(2, 3).reshape(-1, 9, WIDTH)) for y in (k, v))
        a = scores(q, k).softmax(-1)
        note(a)
        return self.proj(torch.cat([x[:, :1], joined(a @ v).reshape(len(x), 12, WIDTH)], 1))


@kind("three keys around each token")
class _(Attention):
    def forward(self, x):
        q, k, v = (by_head(y) for y in self.qkv(x).chunk(3, -1))
        k, v = (F.pad(y, (0, 0, 1, 1)).unfold(2, 3, 1) for y in (k, v))  # [B, H, N, K, 3]
        a = torch.einsum("bhnd,bhndk->bhnk", q, k).softmax(-1)
        note(a)
        return self.proj(joined(torch.einsum("bhnk,bhndk->bhnd", a, v)))


@kind("rows, then columns")
class _(nn.Module):
    def __init__(self):
        super().__init__()
        self.rows, self.columns = KINDS["matmul"](), KINDS["matmul"]()

    def forward(self, x):
        image = x[:, 1:].reshape(len(x), *GRID, WIDTH)
        image = self.rows(image.flatten(0, 1)).view_as(image)
        turned = image.transpose(1, 2)
        image = self.columns(turned.flatten(0, 1)).view_as(turned).transpose(1, 2)
        return torch.cat([x[:, :1], image.flatten(1, 2)], 1)


@kind("tokens read 5 latents")
class _(Attention):
    """Latents gather from the tokens, then the tokens read the latents: both are cross attention."""

    def setup(self):
        self.latents = nn.Parameter(torch.randn(5, WIDTH))
        self.second = nn.Linear(WIDTH, 3 * WIDTH)

    def forward(self, x):
        _, k, v = (by_head(y) for y in self.qkv(x).chunk(3, -1))
        q = by_head(self.latents.expand(len(x), -1, -1))
        a = scores(q, k).softmax(-1)
        note(a)
        latents = joined(a @ v)
        q, (k, v) = by_head(self.second(x)[..., :WIDTH]), (by_head(y) for y in self.second(latents)[..., WIDTH:].chunk(2, -1))
        b = scores(q, k).softmax(-1)
        note(b)
        return self.proj(joined(b @ v))


@kind("packed sequences")
class _(Attention):
    """All images as one sequence, with a mask that keeps them apart."""

    def forward(self, x):
        n, images = x.shape[1], torch.arange(len(x)).repeat_interleave(x.shape[1])
        q, k, v = (by_head(y) for y in self.qkv(x.reshape(1, -1, WIDTH)).chunk(3, -1))
        apart = images[:, None] == images
        whole = scores(q, k).masked_fill(~apart, -math.inf).softmax(-1)
        maps = [whole[0, :, i * n : (i + 1) * n, i * n : (i + 1) * n] for i in range(len(x))]
        note(torch.stack(maps))
        return self.proj(joined(whole @ v)).reshape(x.shape)


@kind("packed sequences, sdpa")
class _(Attention):
    def forward(self, x):
        images = torch.arange(len(x)).repeat_interleave(x.shape[1])
        q, k, v = (by_head(y) for y in self.qkv(x.reshape(1, -1, WIDTH)).chunk(3, -1))
        note(torch.stack([exact(a[0], b[0]) for a, b in zip(q.split(x.shape[1], 2), k.split(x.shape[1], 2), strict=True)]))
        return self.proj(joined(F.scaled_dot_product_attention(q, k, v, attn_mask=images[:, None] == images))).reshape(x.shape)


@kind("channels attend")
class _(Attention):
    """Maps between channels (XCiT): no token attention."""

    def mix(self, q, k, v):
        a = (F.normalize(q.mT, dim=-1) @ F.normalize(k, dim=-2) * 4).softmax(-1)
        note(a)
        return (a @ v.mT).mT


@kind("gated output")
class _(Attention):
    def setup(self):
        self.gate = nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        q, k, v = (by_head(y) for y in self.qkv(x).chunk(3, -1))
        note(exact(q, k))
        return self.proj(joined(F.scaled_dot_product_attention(q, k, v)) * self.gate(x).sigmoid())


# ---- no softmax attention ----


@kind("sigmoid", never=True)
def _(self, q, k, v):
    return (scores(q, k).sigmoid() / TOKENS) @ v


@kind("squared relu", never=True)
def _(self, q, k, v):
    return (scores(q, k).relu().square() / TOKENS) @ v


@kind("linear attention", never=True)
def _(self, q, k, v):
    q, k = F.elu(q) + 1, F.elu(k) + 1
    return q @ (k.mT @ v) / (q @ k.sum(2, keepdim=True).mT)


@kind("linear attention, softmax of q and of k", never=True)
def _(self, q, k, v):
    return q.softmax(-1) @ (k.softmax(-2).mT @ v)


@kind("linear attention by einsum", never=True)
def _(self, q, k, v):
    context = torch.einsum("bhnd,bhne->bhde", k.softmax(2), v)
    return torch.einsum("bhnd,bhde->bhne", q, context)


@kind("raw products", never=True)
def _(self, q, k, v):
    return scores(q, k) @ v / TOKENS


@kind("softmax over features as a gate", never=True)
class _(Attention):
    def forward(self, x):
        a, b, _ = self.qkv(x).chunk(3, -1)
        return self.proj(a.softmax(-1) * b)


@kind("softmax over two experts", never=True)
class _(Attention):
    def setup(self):
        self.router = nn.Linear(WIDTH, 2)

    def forward(self, x):
        share = self.router(x).softmax(-1)
        experts = torch.stack(self.qkv(x).chunk(3, -1)[:2], 2)
        return self.proj((share[:, :, None] @ experts)[:, :, 0])


@kind("average pooling", never=True)
class _(Attention):
    def forward(self, x):
        return self.proj(x.mean(1, keepdim=True).expand_as(x) - x)
