"""Fixes beside their official code on the same weights: forward and gradient, as `official_fixes.json` holds them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from collapse_probe.models.fixes.apply import apply
from tests.models.official_fixes import DEPTH, HEADS, SOURCES, STORED, TOKENS, WIDTH, answers, leaves, set_weights, tokens, wave

OFFICIAL: Mapping[str, Any] = json.loads(STORED.read_text(encoding="utf-8"))
CASES = OFFICIAL["cases"]


def blocks_with(fix: str, **settings: Any) -> Any:
    """The blocks of a small timm model in float64 with a fix, whose attention has no biases."""
    sizes = {"img_size": 4, "patch_size": 2, "embed_dim": WIDTH, "depth": DEPTH, "num_heads": HEADS, "num_classes": 0}
    model = VisionTransformer(**sizes, qkv_bias=False, proj_bias=False).double().eval()
    return apply(model, fix, **settings).blocks


def attention_of(fix: str, own: Mapping[str, Tensor], block: int = 0, **settings: Any) -> nn.Module:
    """The attention of a block with these weights."""
    attention: nn.Module = blocks_with(fix, **settings)[block].attn
    set_weights(attention, **{name.replace(".", "__"): tensor for name, tensor in own.items() if name != "x"})
    return attention


def gated(gate: str) -> dict[str, Any]:
    gates = HEADS if gate == "headwise" else WIDTH
    own = leaves(**{"output_gate.weight": wave(gates, WIDTH, phase=0.4)})
    return answers(attention_of("gated-attention", own, gate=gate)(own["x"]), own)


def value_residual(mix: float) -> dict[str, Any]:
    own = leaves(**{f"later.{name}": tensor.detach() * 1.5 for name, tensor in leaves().items() if name != "x"})
    blocks, x = blocks_with("value-residual", blocks=(1,), mix=mix), own["x"]
    for block, start in enumerate(("", "later.")):
        for part in ("qkv", "proj"):
            set_weights(blocks[block].attn, **{f"{part}__weight": own[f"{start}{part}.weight"]})
    x = x + blocks[0].attn(x)
    return answers(blocks[1].attn(x), own)


def differential(block: int) -> dict[str, Any]:
    half = WIDTH // HEADS // 2
    vectors = {f"lambda_{name}": wave(half, phase=2.0 + i) for i, name in enumerate(("q1", "k1", "q2", "k2"))}
    own = leaves(**vectors, **{"sub_norm.weight": 1 + wave(2 * half, phase=0.9)})
    return answers(attention_of("differential", own, block)(own["x"]), own)


def shaped() -> dict[str, Any]:
    names = ("attn_mat_resid_gain", "attn_mat_skip_gain", "centre_attn_gain")
    own = leaves(**{name: 1 + wave(1, HEADS, 1, 1, phase=3.0 + i) for i, name in enumerate(names)})
    return answers(attention_of("shaped-attention", own)(own["x"]), own)


def centred() -> dict[str, Any]:
    own = leaves()
    settings = {"alpha": 1.0, "beta": 0.0, "gamma": 1.0, "learnable": False}
    return answers(attention_of("shaped-attention", own, **settings)(own["x"]), own)


def layernorm_scaling(number: int) -> dict[str, Any]:
    class Mixing(nn.Module):
        def forward(self, x: Tensor, **_: Any) -> Tensor:
            return own["mixing"] @ x

    class Linear(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x @ own["mlp"].T

    own = {"x": tokens(), "mixing": wave(TOKENS, TOKENS, phase=0.5), "mlp": wave(WIDTH, WIDTH, phase=0.6)}
    own = {name: tensor.requires_grad_() for name, tensor in own.items()}
    block = blocks_with("layernorm-scaling")[number]
    block.attn, block.mlp = Mixing(), Linear()
    return answers(block(own["x"]), own)


def skip_attention() -> dict[str, Any]:
    blocks = blocks_with("skip-attention", blocks=(1, 2))
    own: dict[str, Tensor] = {"x": wave(1, 1 + 9, WIDTH, phase=0.3, size=1.0)}
    for k in range(2):
        module = blocks[1 + k].attn.skip
        named = {name: wave(*p.shape, phase=0.5 * k + 0.1 * i) for i, (name, p) in enumerate(module.named_parameters())}
        own |= {f"{k}.{name}": tensor for name, tensor in named.items()}
        set_weights(module, **{name.replace(".", "__"): tensor for name, tensor in named.items()})
    own = {name: tensor.requires_grad_() for name, tensor in own.items()}
    fix, site = blocks[0].attn.sites[0]
    fix.around(own["x"], lambda: own["x"], site)  # what attention added in the block that lends
    blocks[1].attn(own["x"])
    return answers(blocks[2].attn(own["x"]), own)


OURS: dict[str, Callable[[], dict[str, Any]]] = {
    "gated-attention elementwise": lambda: gated("elementwise"),
    "gated-attention headwise": lambda: gated("headwise"),
    "value-residual": lambda: value_residual(0.5),
    "value-residual svformer": lambda: value_residual(1.0),
    "differential block 0": lambda: differential(0),
    "differential block 2": lambda: differential(2),
    "shaped-attention": shaped,
    "shaped-attention centred": centred,
    "skip-attention": skip_attention,
    "layernorm-scaling block 0": lambda: layernorm_scaling(0),
    "layernorm-scaling block 2": lambda: layernorm_scaling(2),
}


@pytest.mark.parametrize("case", CASES)
def test_a_fix_gives_what_its_official_code_gives(case: str) -> None:
    ours, theirs = OURS[case](), CASES[case]
    torch.testing.assert_close(torch.tensor(ours["out"]), torch.tensor(theirs["out"]), rtol=0, atol=1e-5)
    assert ours["gradients"].keys() == theirs["gradients"].keys()
    for name, parts in theirs["gradients"].items():
        torch.testing.assert_close(torch.tensor(ours["gradients"][name]), torch.tensor(parts), rtol=0, atol=1e-5, msg=name)


def test_every_case_is_held_and_has_its_source() -> None:
    assert set(OURS) == set(CASES)
    assert OFFICIAL["sources"] == {case: list(source) for case, source in SOURCES.items()}
    for repository, commit, path in SOURCES.values():
        assert repository.count("/") == 1
        assert len(commit) == 40
        assert path.endswith(".py")
