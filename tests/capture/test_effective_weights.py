"""A matrix that a model puts together on the way (LoRA, factors, several adapters) is measured whole, or not at all."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations
from toy_models import SIZE, WIDTH, Block, ToyAttention, ToyViT, heads_of, sharpen, toy

from collapse_probe.capture.capture import discover_plan, noise
from collapse_probe.capture.weights.matrices import CHECKED, NAMES
from collapse_probe.capture.weights.recording import record_matrices

RANK = 3


def matrices(model, size=SIZE):
    model.eval()
    return record_matrices(model, noise(model, size, 3, 0), discover_plan(model, size).blocks)


def measured(module, width=WIDTH):
    """The matrix of a linear module, from what it does to the basis vectors."""
    with torch.no_grad():
        basis = torch.eye(width)
        return (module(basis[None])[0] - module(torch.zeros(1, 1, width))[0]).T


def agree(found, block=0, **expected):
    for name, weight in expected.items():
        assert name in found.by_block[block], (name, found.missing[block])
        assert torch.allclose(found.by_block[block][name].weight.float(), weight, atol=1e-4, rtol=1e-4), name


class LoRA(nn.Module):
    """base(x) + s·B(A(x)), with as many adapters as are asked for."""

    def __init__(self, base, adapters=1, scale=0.7):
        super().__init__()
        self.base, self.scale, self.drop = base, scale, nn.Dropout(0.1)
        self.a = nn.ModuleList(nn.Linear(base.in_features, RANK, bias=False) for _ in range(adapters))
        self.b = nn.ModuleList(nn.Linear(RANK, base.out_features, bias=False) for _ in range(adapters))

    def forward(self, x):
        y = self.base(x)
        for a, b in zip(self.a, self.b, strict=True):
            y = y + self.scale * b(a(self.drop(x)))
        return y


class InPlaceLoRA(LoRA):
    def forward(self, x):
        y = self.base(x)
        y += self.b[0](self.a[0](x)) * self.scale
        return y


class AddmmLoRA(LoRA):
    def forward(self, x):
        y, low = self.base(x).flatten(0, 1), self.a[0](x).flatten(0, 1)
        return torch.addmm(y, low, self.b[0].weight.T, alpha=self.scale).unflatten(0, x.shape[:2])


class Bottleneck(LoRA):
    """Two factors and nothing between them: W = B·A."""

    def forward(self, x):
        return self.b[0](self.a[0](x))


class Merging(LoRA):
    """The sum of the matrices is formed before it multiplies."""

    def forward(self, x):
        return F.linear(x, self.base.weight + self.scale * self.b[0].weight @ self.a[0].weight, self.base.bias)


class Conv(nn.Module):
    """A 1 × 1 convolution over tokens laid out as an image, with an adapter of the same kind."""

    def __init__(self, base):
        super().__init__()
        self.base = nn.Conv2d(base.in_features, base.out_features, 1)
        self.a, self.b = nn.Conv2d(base.in_features, RANK, 1), nn.Conv2d(RANK, base.out_features, 1)

    def forward(self, x):
        image = x.transpose(1, 2).unsqueeze(-1)
        return (self.base(image) + self.b(self.a(image))).squeeze(-1).transpose(1, 2)


class Rescaled(LoRA):
    """IA3: each output has a factor of its own."""

    def __init__(self, base):
        super().__init__(base)
        self.factors = nn.Parameter(torch.ones(base.out_features))

    def forward(self, x):
        return self.base(x) * self.factors


def wrapped(wrap, places=("q", "kv", "out", "fc1", "fc2"), attention=ToyAttention, dtype=torch.float32):
    model = toy(attention)
    for block in model.blocks:
        for name in ("q", "kv", "out"):
            if name in places:
                setattr(block.attn, name, wrap(getattr(block.attn, name)))
        for name, i in (("fc1", 0), ("fc2", 2)):
            if name in places:
                block.mlp[i] = wrap(block.mlp[i])
    return sharpen(model).to(dtype)


def effective(model, block=0):
    block = model.blocks[block]
    kv = measured(block.attn.kv)
    both = {"fc1": measured(block.mlp[0]), "fc2": measured(block.mlp[2], 2 * WIDTH)}
    return {"q": measured(block.attn.q), "k": kv[:WIDTH], "v": kv[WIDTH:], "proj": measured(block.attn.out), **both}


class Eager(ToyAttention):
    def mix(self, q, k, v):
        return self.logits(q, k).softmax(-1) @ v


class Normed(ToyAttention):
    """q and k are normalised after their products: no value confirms them."""

    def mix(self, q, k, v):
        return F.scaled_dot_product_attention(F.layer_norm(q, q.shape[-1:]), F.layer_norm(k, k.shape[-1:]), v)


SUMS = {
    "LoRA": LoRA,
    "two adapters": lambda base: LoRA(base, 2),
    "in place": InPlaceLoRA,
    "addmm": AddmmLoRA,
    "two factors": Bottleneck,
    "merged": Merging,
    "convolutions": Conv,
    "weight norm": parametrizations.weight_norm,
    "LoRA of LoRA": lambda base: Outer(base),
}


class Outer(nn.Module):
    """An adapter around an adapter."""

    def __init__(self, base):
        super().__init__()
        self.inner, self.a, self.b = LoRA(base), nn.Linear(base.in_features, RANK), nn.Linear(RANK, base.out_features)

    def forward(self, x):
        return self.inner(x) - self.b(self.a(x))


@pytest.mark.parametrize("attention", [ToyAttention, Eager, Normed])
@pytest.mark.parametrize("kind", SUMS)
def test_sums_and_chains_of_products_are_one_matrix(kind, attention):
    model = wrapped(SUMS[kind], attention=attention)
    found = matrices(model)
    for block in range(2):
        agree(found, block, **effective(model, block))
    if attention is not Normed and kind != "convolutions":  # whose logits are so far apart here that probabilities vanish
        assert found.by_block[0]["q"].how == CHECKED


@pytest.mark.parametrize("place", ["q", "kv", "out", "fc1", "fc2"])
def test_an_adapter_in_one_place_alone(place):
    model = wrapped(LoRA, (place,))
    agree(matrices(model), 1, **effective(model, 1))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_adapters_in_other_precisions(dtype):
    model = wrapped(LoRA, dtype=dtype)
    found, expected = matrices(model), effective(model.float())
    for name in NAMES:
        assert torch.allclose(found.by_block[0][name].weight.float(), expected[name], atol=1e-2), name


def test_spectral_norm_is_in_the_matrix():
    model = toy()
    layer = parametrizations.spectral_norm(model.blocks[0].attn.q)
    assert torch.equal(matrices(model).by_block[0]["q"].weight, layer.weight)


def test_a_factor_for_each_output_is_in_the_matrix():
    model = wrapped(Rescaled, ("q", "kv"))
    agree(matrices(model), 0, **effective(model))


class SplitLoRA(nn.Module):
    """Adapters that write into the parts of one fused output, as for Segment Anything."""

    def __init__(self):
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.aq, self.av = nn.Linear(WIDTH, RANK), nn.Linear(WIDTH, RANK)
        self.bq, self.bv = nn.Linear(RANK, WIDTH), nn.Linear(RANK, WIDTH)

    def fused(self, x):
        qkv = self.qkv(x)
        qkv[..., :WIDTH] += self.bq(self.aq(x))
        qkv[..., -WIDTH:] += self.bv(self.av(x))
        return qkv

    def forward(self, x):
        q, k, v = (heads_of(y) for y in self.fused(x).chunk(3, -1))
        return self.out(F.scaled_dot_product_attention(*self.change(q, k), v).transpose(1, 2).flatten(2))

    def change(self, q, k):
        return q, k


class SplitNormed(SplitLoRA):
    change = staticmethod(lambda q, k: (F.layer_norm(q, q.shape[-1:]), F.layer_norm(k, k.shape[-1:])))


@pytest.mark.parametrize("kind", [SplitLoRA, SplitNormed])
def test_adapters_that_write_into_parts_of_a_fused_output(kind):
    model = toy(kind)
    attention = model.blocks[0].attn
    weight = measured(attention.fused)
    agree(matrices(model), 0, q=weight[:WIDTH], k=weight[WIDTH : 2 * WIDTH], v=weight[2 * WIDTH :])


class Gated(LoRA):
    """How much of the adapter is added depends on the token: no matrix does that."""

    def forward(self, x):
        return self.base(x) + x.mean(-1, keepdim=True).sigmoid() * self.b[0](self.a[0](x))


class Curved(LoRA):
    def forward(self, x):
        return self.base(x) + self.b[0](torch.relu(self.a[0](x)))


class Narrow(LoRA):
    """The adapter is a convolution with groups, which has no plain matrix."""

    def __init__(self, base):
        super().__init__(base)
        self.more = nn.Conv1d(base.in_features, base.out_features, 1, groups=4)

    def forward(self, x):
        return self.base(x) + self.more(x.transpose(1, 2)).transpose(1, 2)


class ByHead(LoRA):
    """The adapter is one matrix for each group of inputs, as a batched product."""

    def __init__(self, base):
        super().__init__(base)
        self.parts = nn.Parameter(torch.randn(4, base.in_features // 4, base.out_features // 4))

    def forward(self, x):
        return self.base(x) + torch.einsum("bngi,gio->bngo", x.unflatten(-1, (4, -1)), self.parts).flatten(2)


@pytest.mark.parametrize("attention", [ToyAttention, Normed])
@pytest.mark.parametrize("place", ["q", "kv", "out", "fc1", "fc2"])
@pytest.mark.parametrize("kind", [Gated, Curved, Narrow, ByHead])
def test_what_no_matrix_does_is_never_a_part_of_it(kind, place, attention):
    model = wrapped(kind, (place,), attention)
    found, names = matrices(model), {"out": ["proj"], "kv": ["k", "v"]}.get(place, [place])
    for name in names:
        assert name not in found.by_block[0]
        assert found.missing[0][name]


def test_a_parallel_adapter_is_no_gated_mlp():
    class Parallel(Block):
        def __init__(self, attention):
            super().__init__(attention)
            self.down, self.up = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

        def forward(self, x):
            x = x + self.attn(self.norm1(x))
            hidden = self.mlp[1](self.mlp[0](self.norm2(x))) + self.down(x)
            return x + self.mlp[2](hidden)

    found = matrices(ToyViT([Parallel(ToyAttention())]))
    assert set(found.by_block[0]) == {"q", "k", "v", "proj"}
    assert "gated MLP" in found.missing[0]["fc1"]


@torch.library.custom_op("collapse_probe_tests::packed_linear", mutates_args=())
def packed_linear(x: torch.Tensor, packed: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return x @ (packed.float() * scale).T


class Packed(nn.Module):
    """Its matrix is in whole numbers that only its own kernel reads; beside it, an adapter where it is asked for."""

    def __init__(self, base, adapter=False):
        super().__init__()
        scale = base.weight.detach().abs().max() / 127
        self.register_buffer("packed", (base.weight.detach() / scale).round().to(torch.int8))
        self.register_buffer("scale", scale)
        self.a, self.b = nn.Linear(base.in_features, RANK), nn.Linear(RANK, base.out_features)
        self.adapter = adapter

    def forward(self, x):
        y = packed_linear(x, self.packed, self.scale)
        return y + self.b(self.a(x)) if self.adapter else y


@pytest.mark.parametrize("adapter", [False, True])
@pytest.mark.parametrize(
    ("places", "lost"),
    [
        (("q", "kv"), "q k v"),
        (("out",), "proj fc1 fc2"),
        (("fc1", "fc2"), "fc1 fc2"),
        (("q", "kv", "out", "fc1", "fc2"), "q k v proj fc1 fc2"),
    ],
)
def test_packed_matrices_are_declined(places, lost, adapter):
    found = matrices(wrapped(lambda base: Packed(base, adapter), places))
    assert set(found.by_block[0]) == set(NAMES) - set(lost.split())
    if places == ("out",) or (adapter and "fc1" in places):  # else no product of the tokens is left that could be told apart
        assert any("packed_linear" in found.missing[0][name] for name in lost.split())


def test_frozen_weights_kept_as_buffers():
    model = toy()
    for module in list(model.modules()):
        for name, parameter in list(module._parameters.items()):
            if parameter is not None:
                del module._parameters[name]
                module.register_buffer(name, parameter.detach())
    agree(matrices(model), 1, **effective(model, 1))


@pytest.mark.filterwarnings("ignore:FSDP is switching to use `NO_SHARD`:UserWarning")
@pytest.mark.parametrize("version", ["flat", 1, 2])
def test_sharded_matrices_are_read_while_they_are_whole(version, tmp_path):
    from torch import distributed
    from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    try:
        model = toy()
        expected = effective(model)
        if version != 2:
            model = FullyShardedDataParallel(model, device_id=torch.device("cpu"), use_orig_params=version == 1)
        else:
            for block in model.blocks:
                fully_shard(block, mesh=distributed.init_device_mesh("cpu", (1,)))
        agree(matrices(model), 0, **expected)
    finally:
        distributed.destroy_process_group()


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("settings", [{}, {"use_dora": True}, {"use_rslora": True}, {"lora_alpha": 32}])
@pytest.mark.parametrize("library", ["timm", "transformers"])
def test_adapters_of_peft(library, settings, merged):
    peft = pytest.importorskip("peft")
    if library == "timm":
        import timm

        model = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=48, depth=2, num_heads=4)
        names = ["qkv", "proj", "fc1", "fc2"]
    else:
        from transformers import ViTConfig, ViTModel

        shape = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96}
        model = ViTModel(ViTConfig(**shape, image_size=32, patch_size=8))
        linear = {name.rpartition(".")[2] for name, m in model.named_modules() if isinstance(m, nn.Linear) and "layer" in name}
        names = sorted(linear)
    config = peft.LoraConfig(r=RANK, target_modules=names, init_lora_weights=False, **settings)
    model = peft.get_peft_model(model, config).eval()
    if not settings:
        model.add_adapter("second", peft.LoraConfig(r=2, target_modules=names, init_lora_weights=False))
        model.base_model.set_adapter(["default", "second"])
    if merged:
        model.merge_adapter()
    found = matrices(model, (32, 32))
    layers = [m for m in model.modules() if isinstance(m, peft.tuners.lora.Linear)]
    first = layers[: len(layers) // 2]
    if library == "timm":
        qkv = measured(first[0], 48)
        expected = {"q": qkv[:48], "k": qkv[48:96], "v": qkv[96:]}
        rest = first[1:]
    else:
        expected, rest = {name: measured(layer, 48) for name, layer in zip("qkv", first[:3], strict=True)}, first[3:]
    agree(found, 0, **expected)
    widths = {"proj": 48, "fc1": 48, "fc2": rest[2].in_features}
    agree(found, 0, **{name: measured(layer, width) for layer, (name, width) in zip(rest, widths.items(), strict=True)})
