"""What the official code of this decade's fixes gives for fixed inputs and weights, forward and gradient.

`python -m tests.models.official_fixes FOLDER` runs the official classes, unchanged, out of the clones in FOLDER (one folder a
repository, at the commits below) and writes `official_fixes.json`, which the tests hold our fixes against. Only what stands
around a class is replaced: rotary positions turn nothing, caches and masks are absent. Some of that code has its softmax in
float32, so the numbers agree to 1e-7 and not to 1e-12.
"""

from __future__ import annotations

import ast
import json
import math
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn

STORED = Path(__file__).with_suffix(".json")
WIDTH, HEADS, TOKENS, DEPTH = 8, 2, 5, 3
SOURCES = {
    "gated-attention": ("qiuzh20/gated_attention", "49645df63aafe9e680bc44a9c0ca280d4aefa8e9", "modeling_qwen3.py"),
    "value-residual": (
        "Zcchill/Value-Residual-Learning",
        "95652f64aba7db6c095f4e92eafb9e76e6ed9e02",
        "src/modeling/modeling_llama_resformer.py",
    ),
    "svformer": (
        "Zcchill/Value-Residual-Learning",
        "95652f64aba7db6c095f4e92eafb9e76e6ed9e02",
        "src/modeling/modeling_llama_svformer.py",
    ),
    "differential": (
        "microsoft/unilm",
        "768a3c873f598bb9b4d4dfb9267b099e35f8fe56",
        "Diff-Transformer/multihead_diffattn.py",
    ),
    "differential-norm": ("microsoft/unilm", "768a3c873f598bb9b4d4dfb9267b099e35f8fe56", "Diff-Transformer/rms_norm.py"),
    "shaped-attention": (
        "bobby-he/simplified_transformers",
        "8d4ea7965f61c61259123a37ff06cdef636845c0",
        "simplified_transformers/model_utils.py",
    ),
    "centred-attention": (
        "thizirinait/Mind-the-Gap-a-Spectral-Analysis-of-Rank-Collapse-and-Signal-Propagation-in-Attention-Layers",
        "79ece73622028b1492e354f572e311e956453c6f",
        "atttention/ScaledDotProductAttention.py",
    ),
    "layernorm-scaling": (
        "lmsdss/LayerNorm-Scaling",
        "3ac54dde961b04780b152bc8b38b71b2f8e1c16a",
        "peft_pretraining/modeling_llama.py",
    ),
    "skip-attention": (
        "Qualcomm-AI-research/skip-attention",
        "a7a312dacf55cfd65e0a1e412621bd92d80e9b9b",
        "model/uformer_utils.py",
    ),
}


def wave(*shape: int, phase: float = 0.0, size: float = 0.5) -> Tensor:
    """Numbers without a pattern that need no generator: size · sin(phase + 0.37 i²), in float64."""
    i = torch.arange(math.prod(shape), dtype=torch.float64)
    return (size * torch.sin(phase + 0.37 * i * i)).reshape(shape)


def weights() -> dict[str, Tensor]:
    """The weights of the attention that every case starts from, as one projection, in our names."""
    return {"qkv.weight": wave(3 * WIDTH, WIDTH, phase=0.1), "proj.weight": wave(WIDTH, WIDTH, phase=0.2)}


def tokens() -> Tensor:
    """The tokens that enter, [1, N, D]."""
    return wave(1, TOKENS, WIDTH, phase=0.3, size=1.0)


def answers(out: Tensor, leaves: Mapping[str, Tensor]) -> dict[str, Any]:
    """The output, and of the gradient of a fixed sum over it by each leaf four projections (all of it, for the tokens)."""
    gradients = torch.autograd.grad((out * wave(*out.shape, phase=0.7)).sum(), [*leaves.values()])
    shown = {}
    for name, gradient in zip(leaves, gradients, strict=True):
        parts = [(gradient * wave(*gradient.shape, phase=1.0 + k)).sum() for k in range(4)]
        shown[name] = gradient.flatten().tolist() if name == "x" else [float(part) for part in parts]
    return {"out": out.detach().flatten().tolist(), "gradients": shown}


# ---- the official side ----


def classes(folder: Path, case: str, names: tuple[str, ...], **around: Any) -> SimpleNamespace:
    """Classes and functions of an official file by name, run as they stand, with what they need `around` them."""
    repository, _, path = SOURCES[case]
    tree = ast.parse((folder / repository.partition("/")[2] / path).read_text(encoding="utf-8"))
    body: list[Any] = [node for node in tree.body if getattr(node, "name", None) in names]
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            node.decorator_list = []
    space: dict[str, Any] = {"torch": torch, "nn": nn, "F": F, "math": math, "os": os, **around}
    code = ast.Module([ast.ImportFrom("__future__", [ast.alias("annotations")], 0), *body], [])
    exec(compile(ast.fix_missing_locations(code), path, "exec"), space)
    return SimpleNamespace(**{name: space[name] for name in names})


def set_weights(module: nn.Module, **named: Tensor) -> None:
    """Put these tensors where the module has its parameters, so that gradients reach them."""
    for name, tensor in named.items():
        owner, _, leaf = name.replace("__", ".").rpartition(".")
        holder = module.get_submodule(owner)
        holder._parameters.pop(leaf, None)
        holder._buffers.pop(leaf, None)
        setattr(holder, leaf, tensor)


def leaves(**more: Tensor) -> dict[str, Tensor]:
    """Tokens, weights and what a fix adds, as leaves."""
    return {name: tensor.requires_grad_() for name, tensor in {"x": tokens(), **weights(), **more}.items()}


def still(q: Tensor, k: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
    """Rotary positions that turn nothing."""
    return q, k


LLAMA = {
    "hidden_size": WIDTH,
    "num_attention_heads": HEADS,
    "num_key_value_heads": HEADS,
    "head_dim": WIDTH // HEADS,
    "max_position_embeddings": TOKENS,
    "rope_theta": 1.0,
    "attention_dropout": 0.0,
    "attention_bias": False,
    "qkv_bias": False,
    "use_qk_norm": False,
    "pretraining_tp": 1,
}


def gated(folder: Path, gate: str) -> dict[str, Any]:
    """Qwen3Attention with its output gate, whose rows stand in the query projection, behind those of each head."""
    around = {"apply_rotary_pos_emb": still, "Qwen3RotaryEmbedding": lambda config: nn.Identity()}
    official = classes(folder, "gated-attention", ("Qwen3Attention", "repeat_kv"), **around)
    chosen = {f"{each}_attn_output_gate": each == gate for each in ("headwise", "elementwise")}
    module = official.Qwen3Attention(SimpleNamespace(**LLAMA, **chosen), 0)
    gates = 1 if gate == "headwise" else WIDTH // HEADS
    own = leaves(**{"output_gate.weight": wave(HEADS * gates, WIDTH, phase=0.4)})
    q, k, v = own["qkv.weight"].chunk(3)
    rows = [q.unflatten(0, (HEADS, -1)), own["output_gate.weight"].unflatten(0, (HEADS, gates))]
    set_weights(module, q_proj__weight=torch.cat(rows, 1).flatten(0, 1), k_proj__weight=k, v_proj__weight=v)
    set_weights(module, o_proj__weight=own["proj.weight"])
    return answers(module(own["x"], position_embeddings=(None, None))[0], own)


def value_residual(folder: Path, case: str) -> dict[str, Any]:
    """Two LlamaAttentions, the second with the values of the first: a₁(x + a₀(x))."""
    around = {"apply_rotary_pos_emb": still, "LlamaRotaryEmbedding": lambda config: nn.Identity()}
    official = classes(folder, case, ("LlamaAttention", "repeat_kv"), **around)
    own = leaves(**{f"later.{name}": tensor * 1.5 for name, tensor in weights().items()})
    values: list[Tensor] = []
    x = own["x"]
    for block, start in enumerate(("", "later.")):
        module = official.LlamaAttention(SimpleNamespace(**LLAMA), block)
        q, k, v = own[f"{start}qkv.weight"].chunk(3)
        set_weights(module, q_proj__weight=q, k_proj__weight=k, o_proj__weight=own[f"{start}proj.weight"])
        if block == 0 or case == "value-residual":
            set_weights(module, v_proj__weight=v)
        out = module(x, position_embeddings=(None, None), formal_layer_values=values)[0]
        x = x + out if block == 0 else out
    if case == "svformer":  # whose second block has no values of its own
        x = x + 0 * own["later.qkv.weight"].sum()
    return answers(x, own)


def differential(folder: Path, block: int) -> dict[str, Any]:
    """MultiheadDiffAttn of the block at this depth; a mask of zeros, where its own would be causal."""
    norm = classes(folder, "differential-norm", ("RMSNorm",)).RMSNorm
    around = {"apply_rotary_emb": lambda x, *_, **__: x, "RMSNorm": norm}
    names = ("MultiheadDiffAttn", "lambda_init_fn", "repeat_kv")
    module = classes(folder, "differential", names, **around).MultiheadDiffAttn(WIDTH, block, HEADS)
    half = WIDTH // HEADS // 2
    vectors = {f"lambda_{name}": wave(half, phase=2.0 + i) for i, name in enumerate(("q1", "k1", "q2", "k2"))}
    own = leaves(**vectors, **{"sub_norm.weight": 1 + wave(2 * half, phase=0.9)})
    q, k, v = own["qkv.weight"].chunk(3)
    set_weights(module, q_proj__weight=q, k_proj__weight=k, v_proj__weight=v, out_proj__weight=own["proj.weight"])
    set_weights(module, subln__weight=own["sub_norm.weight"], **{name: own[name] for name in vectors})
    keep = {"float": Tensor.double}  # the code casts the softmax and λ to float32, which would hide small differences
    with mock.patch.multiple(Tensor, **keep), mock.patch.object(torch, "float32", torch.float64):
        return answers(module(own["x"], (), torch.zeros(TOKENS, TOKENS, dtype=torch.float64)), own)


def shaped(folder: Path) -> dict[str, Any]:
    """myGPT2Attention with all three gains; its causal mask and causal uniform map are replaced by those without a mask."""
    settings: dict[str, Any] = {
        "max_position_embeddings": TOKENS,
        "hidden_size": WIDTH,
        "num_attention_heads": HEADS,
        "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False,
        "first_layer_value_resid_gain": None,
        "last_layer_proj_resid_gain": None,
        "value_resid_gain": 1.0,
        "value_skip_gain": None,
        "proj_resid_gain": 1.0,
        "proj_skip_gain": None,
        "val_init_type": "normal",
        "proj_init_type": "normal",
        "trainable_value_gains": False,
        "trainable_proj_gains": False,
        "query_init_std": None,
        "key_init_std": None,
        "val_proj_init_std": None,
        "qk_norm_type": "none",
        "dot_norm_type": "none",
        "attn_pdrop": 0.0,
        "resid_pdrop": 0.0,
        "attn_mat_resid_gain": 1.0,
        "attn_mat_skip_gain": 1.0,
        "centre_attn_gain": 1.0,
        "centre_attn": True,
        "trainable_attn_mat_gains": True,
        "n_layer": 1,
    }
    official = classes(folder, "shaped-attention", ("myGPT2Attention", "MyConv1D", "RMSNorm"))
    module = official.myGPT2Attention(SimpleNamespace(**settings), layer_idx=0).double()
    module.bias = torch.ones_like(module.bias)
    module.uniform_causal_attn_mat = torch.full_like(module.uniform_causal_attn_mat, 1 / TOKENS)
    names = ("attn_mat_resid_gain", "attn_mat_skip_gain", "centre_attn_gain")
    own = leaves(**{name: 1 + wave(1, HEADS, 1, 1, phase=3.0 + i) for i, name in enumerate(names)})
    set_weights(module, **{name: own[name] for name in names})
    set_weights(module, qk_attn__weight=own["qkv.weight"][: 2 * WIDTH].T, v_attn__weight=own["qkv.weight"][2 * WIDTH :].T)
    set_weights(module, c_proj__weight=own["proj.weight"].T)
    return answers(module(own["x"])[0], own)


def centred(folder: Path) -> dict[str, Any]:
    """ScaledDotProductAttention with `chafai_perp`, head by head: (A − J/N) V."""
    official = classes(folder, "centred-attention", ("ScaledDotProductAttention",))
    width = WIDTH // HEADS
    module = official.ScaledDotProductAttention(WIDTH, width, "chafai_perp")
    own = leaves()
    q, k, v = (own["x"] @ part.T for part in own["qkv.weight"].chunk(3))
    heads = [module(*(each[..., h * width : (h + 1) * width] for each in (q, k, v))) for h in range(HEADS)]
    return answers(torch.cat(heads, -1) @ own["proj.weight"].T, own)


def layernorm_scaling(folder: Path, block: int) -> dict[str, Any]:
    """LlamaDecoderLayer with NORM_TYPE=LNS around a linear map in place of attention and one in place of the MLP."""
    layer = classes(folder, "layernorm-scaling", ("LlamaDecoderLayer",)).LlamaDecoderLayer
    module = layer.__new__(layer)
    nn.Module.__init__(module)
    own = leaves(mixing=wave(TOKENS, TOKENS, phase=0.5), mlp=wave(WIDTH, WIDTH, phase=0.6))
    module.layer_index = block
    module.input_layernorm = module.post_attention_layernorm = lambda x: F.layer_norm(x, (WIDTH,), eps=1e-6)
    module.self_attn = lambda hidden_states, **_: (own["mixing"] @ hidden_states, None, None)
    module.mlp = lambda x: x @ own["mlp"].T
    as_asked = SimpleNamespace(lower=lambda: "LNS")  # the code turns the name into small letters, and then asks for large ones
    with mock.patch("os.getenv", return_value=as_asked):
        out = module(own["x"])[0]
    used = {name: own[name] for name in ("x", "mixing", "mlp")}
    return answers(out, used)


def skip_attention(folder: Path) -> dict[str, Any]:
    """LeFF twice, as VisionTransformerSkipAt chains it on the patches: a block that attends, and two that do not."""
    from einops import rearrange

    official = classes(folder, "skip-attention", ("LeFF", "eca_layer_1d"), rearrange=rearrange)
    own: dict[str, Tensor] = {"x": wave(1, 1 + 9, WIDTH, phase=0.3, size=1.0)}
    x, prefix = own["x"].requires_grad_()[:, 1:], own["x"][:, :1]
    for k in range(2):
        module = official.LeFF(WIDTH, 2 * WIDTH)
        named = {name: wave(*p.shape, phase=0.5 * k + 0.1 * i) for i, (name, p) in enumerate(module.named_parameters())}
        own |= {f"{k}.{name}": tensor.requires_grad_() for name, tensor in named.items()}
        set_weights(module, **{name.replace(".", "__"): tensor for name, tensor in named.items()})
        x = module(x)
    return answers(torch.cat((prefix, x), 1), own)


def main(folder: Path) -> None:
    """Run every official case and store what it gives."""
    results: dict[str, Any] = {
        "gated-attention elementwise": gated(folder, "elementwise"),
        "gated-attention headwise": gated(folder, "headwise"),
        "value-residual": value_residual(folder, "value-residual"),
        "value-residual svformer": value_residual(folder, "svformer"),
        "differential block 0": differential(folder, 0),
        "differential block 2": differential(folder, 2),
        "shaped-attention": shaped(folder),
        "shaped-attention centred": centred(folder),
        "skip-attention": skip_attention(folder),
        "layernorm-scaling block 0": layernorm_scaling(folder, 0),
        "layernorm-scaling block 2": layernorm_scaling(folder, 2),
    }
    stored = {"command": "python -m tests.models.official_fixes FOLDER", "sources": SOURCES, "cases": results}
    rounded = json.loads(json.dumps(stored), parse_float=lambda text: float(f"{float(text):.12g}"))
    STORED.write_text(json.dumps(rounded, separators=(",", ":")).replace('},"', '},\n"') + "\n", encoding="utf-8")


if __name__ == "__main__":
    torch.set_default_dtype(torch.float64)
    main(Path(sys.argv[1]))
