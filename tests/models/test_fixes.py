"""Contracts over the table of fixes, and the equations of each."""

from __future__ import annotations

import copy
import math
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from timm.models.vision_transformer import Attention, ResPostBlock, VisionTransformer
from torch import Tensor, nn

from collapse_probe.capture.capture import record
from collapse_probe.errors import CollapseProbeError, ModelError, SettingError
from collapse_probe.models.fixes.apply import apply
from collapse_probe.models.fixes.attn_scale import scale_contrast
from collapse_probe.models.fixes.base import FixSite, attend
from collapse_probe.models.fixes.contra_norm import similarity_weights
from collapse_probe.models.fixes.drop_attention import drop_and_renormalise
from collapse_probe.models.fixes.exclusive_self_attention import without_own_value
from collapse_probe.models.fixes.feat_scale import scale_bands
from collapse_probe.models.fixes.re_attention import ReAttention
from collapse_probe.models.fixes.sigma_reparam import power_step
from collapse_probe.models.vit import ViT
from collapse_probe.registry import FIXES

SMALL = {
    "depth": 3,
    "width": 24,
    "heads": 3,
    "patch_size": 8,
    "image_size": 32,
    "classes": 5,
    "init_std": 0.2,
}
LEARNING = {"temperature": {"learnable": True, "tau": 0.7}}  # settings with parameters, where the default has none
WITHOUT_PARAMETERS = {
    "contra-norm",
    "drop-attention",
    "exclusive-self-attention",
    "layernorm-scaling",
    "neutreno",
    "shared-attention",
    "test-time-registers",
    "value-residual",
}
NO_NEUTRAL = {
    "class-attention",
    "differential",
    "exclusive-self-attention",
    "layernorm-scaling",
    "qk-norm",
    "registers",
    "shared-attention",
    "skip-attention",
    "test-time-registers",
}
MIXES = {
    "attn-scale",
    "differential",
    "re-attention",
    "refiner",
    "shaped-attention",
    "talking-heads",
}  # those whose weights are not the softmax's probs
BAD: dict[str, dict[str, Any]] = {
    "attn-scale": {"init": "one"},
    "class-attention": {"depth": 0},
    "contra-norm": {"tau": 0},
    "differential": {"heads": 3},
    "drop-attention": {"p": 1.0},
    "exclusive-self-attention": {"strength": 1.0},
    "feat-scale": {"multiplicity": 3},
    "gated-attention": {"gate": "global"},
    "layer-scale": {"init": 0.0},
    "layernorm-scaling": {"power": 0.5},
    "neutreno": {"alpha": math.nan},
    "qk-norm": {"norm": "batch"},
    "re-attention": {"norm": "group"},
    "refiner": {"kernel": 4},
    "registers": {"count": 0},
    "shaped-attention": {"alpha": math.inf},
    "shared-attention": {"source_block": -1},
    "sigma-reparam": {"gamma": 1.0},
    "skip-attention": {"every": 2},
    "talking-heads": {"where": "values"},
    "temperature": {"tau": 0.0},
    "test-time-registers": {"count": 0},
    "value-residual": {"mix": 1.5},
}


@pytest.fixture
def images() -> Tensor:
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def plain(seed: int = 0, **settings: Any) -> ViT:
    torch.manual_seed(seed)
    return ViT(**SMALL, **settings).eval()


def fixed(name: str, settings: dict[str, Any] | None = None, **vit: Any) -> ViT:
    """A ViT with the plain one's weights and one fix."""
    model = ViT(**SMALL, **vit, fixes={name: LEARNING.get(name, {}) if settings is None else settings}).eval()
    unexpected = model.load_state_dict(plain(**vit).state_dict(), strict=False).unexpected_keys
    assert not unexpected
    for module in model.modules():  # what depends on the weights starts from the ones just loaded
        if hasattr(module, "u") and hasattr(module, "gamma"):
            leading = torch.linalg.svd(module.weight.detach().flatten(1), full_matrices=False).Vh[0]
            module.u.copy_(leading)
            module.gamma.data.copy_(power_step(module.weight.detach().flatten(1), leading)[0])
    return model


def test_every_fix_of_the_literature_is_there() -> None:
    assert list(FIXES) == sorted(BAD)
    assert {name for name in FIXES if FIXES[name].neutral is None} == NO_NEUTRAL
    for name, fix in FIXES.items():
        assert fix.name == name
        assert fix.source
        assert "\n" not in fix.summary
        assert len(fix.summary) < 90


@pytest.mark.parametrize("mode", ["eval", "train"])
@pytest.mark.parametrize("name", sorted(set(FIXES) - NO_NEUTRAL))
def test_the_neutral_setting_is_the_identity(name: str, mode: str, images: Tensor) -> None:
    model = fixed(name, dict(FIXES[name].neutral)).train(mode == "train")
    torch.testing.assert_close(model(images), plain()(images), rtol=0, atol=2e-6)


@pytest.mark.parametrize("name", sorted(NO_NEUTRAL))
def test_a_fix_without_a_neutral_setting_says_so(name: str, images: Tensor) -> None:
    assert "No neutral setting" in " ".join(FIXES[name].__doc__.split())
    assert (fixed(name)(images) - plain()(images)).abs().max() > 1e-3


@pytest.mark.parametrize("name", list(FIXES))
def test_gradients_reach_the_parameters_of_the_fix(name: str, images: Tensor) -> None:
    model = fixed(name).train()
    own = {key for key, _ in plain().named_parameters()}
    added = {key: parameter for key, parameter in model.named_parameters() if key not in own}
    assert bool(added) != (name in WITHOUT_PARAMETERS)
    before = {key: parameter.detach().clone() for key, parameter in added.items()}
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1)
    model(images).square().sum().backward()
    assert all(parameter.grad is not None for parameter in added.values())
    optimiser.step()
    moved = {key.rpartition(".")[2] for key in added if not torch.equal(added[key], before[key])}
    assert {key.rpartition(".")[2] for key in added} == moved


@pytest.mark.parametrize("name", list(FIXES))
def test_saved_and_loaded_again_it_is_the_same_model(name: str, images: Tensor, tmp_path: Any) -> None:
    model = fixed(name).train()
    model(images)  # moves running statistics, where there are any
    model.eval()
    torch.save(model.state_dict(), tmp_path / "model.pt")
    again = ViT(**SMALL, fixes={name: LEARNING.get(name, {})}).eval()
    again.load_state_dict(torch.load(tmp_path / "model.pt", weights_only=True))
    assert torch.equal(again(images), model(images))
    copied = pickle.loads(pickle.dumps(copy.deepcopy(model)))
    assert torch.equal(copied(images), model(images))


@pytest.mark.parametrize("name", list(FIXES))
def test_a_copy_shares_nothing_with_its_original(name: str, images: Tensor) -> None:
    model = fixed(name)
    expected = model(images)
    copied = copy.deepcopy(model)
    for parameter in copied.parameters():
        parameter.data.zero_()
    copied(images)
    assert torch.equal(model(images), expected)


@pytest.mark.parametrize("name", list(FIXES))
def test_it_runs_under_bf16_autocast_and_in_bf16(name: str, images: Tensor) -> None:
    model = fixed(name)
    exact = model(images)
    model.train()
    with torch.autocast("cpu", torch.bfloat16):
        model(images).float().sum().backward()
    model.eval()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        rough = fixed(name)(images)
    if name not in {
        "re-attention",
        "refiner",
        "talking-heads",
        "class-attention",
        "registers",
        "differential",
        "layer-scale",
        "skip-attention",
        "gated-attention",
    }:
        torch.testing.assert_close(rough.float(), exact, rtol=0.1, atol=0.1)  # those draw their start at random
    assert torch.isfinite(model.bfloat16()(images.bfloat16())).all()


@pytest.mark.parametrize("name", list(FIXES))
@pytest.mark.parametrize("other", ["re-attention", "feat-scale"])
def test_it_composes_with_another(name: str, other: str, images: Tensor) -> None:
    if name == other:
        other = "neutreno"
    pair = {name: LEARNING.get(name, {}), other: dict(FIXES[other].neutral)}
    torch.manual_seed(0)
    model = ViT(**SMALL, fixes=pair).eval()
    own = fixed(name)
    assert not own.load_state_dict(model.state_dict(), strict=False).missing_keys
    torch.testing.assert_close(model(images), own(images), rtol=0, atol=2e-6)


@pytest.mark.parametrize("name", list(FIXES))
def test_wrong_settings_are_refused_in_one_line(name: str) -> None:
    for wrong in (BAD[name], {"strenght": 1}):
        with pytest.raises(SettingError) as error:
            ViT(**SMALL, fixes={name: wrong})
        assert name in str(error.value)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", list(FIXES))
@pytest.mark.parametrize("blocks", [[3], [-1], [], [1, 1], ["1"], [True]])
def test_wrong_blocks_are_refused(name: str, blocks: list[Any]) -> None:
    with pytest.raises(SettingError, match=name):
        ViT(**SMALL, fixes={name: {"blocks": blocks}})


WHOLE_MODEL = sorted(name for name in FIXES if FIXES[name].home == "model")


@pytest.mark.parametrize("name", WHOLE_MODEL)
def test_a_fix_of_the_whole_model_takes_no_blocks(name: str) -> None:
    with pytest.raises(SettingError, match="whole model"):
        ViT(**SMALL, fixes={name: {"blocks": [1]}})


@pytest.mark.parametrize("name", sorted(set(FIXES) - set(WHOLE_MODEL)))
def test_chosen_blocks_alone_are_changed(name: str) -> None:
    model = ViT(**SMALL, fixes={name: {"blocks": [1]} | LEARNING.get(name, {})})
    new = set(model.state_dict()) - set(plain().state_dict())
    assert all(key.startswith("blocks.1.") for key in new)
    assert {block for each in model.fixes for block in each.blocks} <= {0, 1}


@pytest.mark.parametrize("name", list(FIXES))
def test_the_capture_records_it_rightly(name: str, images: Tensor) -> None:
    model = fixed(name)
    expected = model(images)
    with torch.no_grad(), record(model) as recording:
        recorded = model(images)
    plan = recording.plan
    assert torch.equal(recorded, expected)
    assert len(plan.map_layers) == 3
    assert all(plan.layers[i].mixed == (name in MIXES) for i in plan.map_layers)
    assert plan.prefix == tuple(range(model.num_prefix_tokens))


def keys_of(modules: str, leaves: str) -> list[str]:
    return [f"{module}.{leaf}" for module in modules.split() for leaf in leaves.split()]


BATCH_NORM = "weight bias running_mean running_var num_batches_tracked"
CLASS_LAYERS = "norm1 attn.q attn.k attn.v attn.proj norm2 mlp.fc1 mlp.fc2"
OFFICIAL_KEYS = {  # names of the parameters in the official checkpoints, relative to the block (or the model)
    "attn-scale": ["attn.lamb"],
    "class-attention": [
        f"blocks_token_only.{{i}}.{key}" for key in [*keys_of(CLASS_LAYERS, "weight bias"), "gamma_1", "gamma_2"]
    ],
    "feat-scale": ["lamb1", "lamb2"],
    "layer-scale": ["gamma_1", "gamma_2"],
    "re-attention": [*keys_of("attn.reatten_matrix", "weight bias"), *keys_of("attn.var_norm", BATCH_NORM)],
    "refiner": [
        *keys_of("attn.DLA.conv_exp attn.DLA.depth_sep_conv attn.DLA.conv_pro", "weight"),
        *keys_of("attn.DLA.bn1 attn.DLA.bn2 attn.DLA.bn3 attn.adapt_bn", BATCH_NORM),
    ],
    "talking-heads": keys_of("attn.proj_l attn.proj_w", "weight bias"),
}


@pytest.mark.parametrize("name", OFFICIAL_KEYS)
def test_parameters_have_their_official_names(name: str) -> None:
    model = ViT(**SMALL, fixes={name: {}})
    new = set(model.state_dict()) - set(plain().state_dict())
    official = OFFICIAL_KEYS[name]
    where = "" if FIXES[name].home == "model" else "blocks.{block}."
    wanted = {(where + key).format(block=b, i=i) for key in official for b in range(3) for i in range(2)}
    assert new == wanted


def test_a_model_has_a_fix_once_in_a_block() -> None:
    from collapse_probe.models.fixes.base import add_fix

    model = plain()
    add_fix(model, FIXES["attn-scale"](), [0, 1])
    add_fix(model, FIXES["attn-scale"](), [2])
    before = set(model.state_dict())
    with pytest.raises(ModelError, match=r"already has attn-scale in blocks \[0, 1\]"):
        add_fix(model, FIXES["attn-scale"](init=1.0), [1])
    with pytest.raises(ModelError, match="already"):
        add_fix(plain(fixes={"contra-norm": {}}), FIXES["contra-norm"]())
    assert set(model.state_dict()) == before


def test_parts_never_take_the_place_of_what_is_there() -> None:
    from collapse_probe.models.fixes.base import add_fix

    model = plain()
    model.blocks[2].attn.lamb = nn.Parameter(torch.zeros(3))
    with pytest.raises(ModelError, match="block 2 already has a lamb"):
        add_fix(model, FIXES["attn-scale"]())
    assert not hasattr(model.blocks[0].attn, "lamb")
    assert not model.fixes


# The equations of each fix.


def site_of(fix: Any, heads: int = 2, dtype: torch.dtype = torch.float64) -> FixSite:
    home = nn.Module()
    site = FixSite(home, 0, (0, 1), 2, 8, heads, 1, {})
    for name, part in fix.parts(site).items():
        setattr(home, name, part.to(dtype) if isinstance(part, nn.Module) else nn.Parameter(part.to(dtype)))
    return site


@pytest.fixture
def worked() -> tuple[Tensor, ReAttention, FixSite]:
    """A of shape (1, 2, 3, 3), the fix and the site of the worked Re-attention example."""
    h, i, j = (torch.arange(n, dtype=torch.float64) for n in (2, 3, 3))
    h, i, j = h[:, None, None], i[None, :, None], j[None, None, :]
    probs = torch.sin(0.3 + 0.9 * h + 0.5 * i + 0.8 * j + 0.4 * i * j).softmax(-1)[None]
    fix = ReAttention()
    site = site_of(fix)
    conv, norm = site.home.reatten_matrix, site.home.var_norm
    with torch.no_grad():
        conv.weight.copy_(torch.tensor([[0.6, -0.2], [0.1, 0.5]], dtype=torch.float64)[:, :, None, None])
        conv.bias.copy_(torch.tensor([0.05, -0.1], dtype=torch.float64))
        norm.weight.copy_(torch.tensor([1.1, 0.9], dtype=torch.float64))
        norm.bias.copy_(torch.tensor([0.0, 0.3], dtype=torch.float64))
        norm.running_mean.copy_(torch.tensor([0.1, 0.2], dtype=torch.float64))
        norm.running_var.copy_(torch.tensor([0.04, 0.09], dtype=torch.float64))
    return probs, fix, site


def test_re_attention_gives_the_worked_values(worked: tuple[Tensor, ReAttention, FixSite]) -> None:
    probs, fix, site = worked
    site.home.eval()
    expected = [
        [
            [-0.0126531619, 0.5650014458, 0.8224798733],
            [0.2871814320, 0.9042124551, 0.1834342702],
            [0.9916324446, 0.5235866821, -0.1403909694],
        ],
        [
            [0.0567876196, 0.0950747928, -0.1518124165],
            [0.4297622254, -0.0315997978, -0.3981124318],
            [0.6206151012, -0.2602504132, -0.3603146922],
        ],
    ]
    np.testing.assert_allclose(fix.weights(probs, site).detach()[0], expected, rtol=0, atol=1e-9)
    site.home.train()
    trained = fix.weights(probs, site).detach()[0]
    np.testing.assert_allclose(trained[0, 0], [-1.3529803717, 0.3066222228, 1.0463581489], rtol=0, atol=1e-9)
    np.testing.assert_allclose(trained.sum(-1), [[0.0] * 3, [0.9] * 3], rtol=0, atol=1e-12)


def test_re_attention_rows_sum_to_n_beta_in_train_mode_whatever_the_bias() -> None:
    torch.manual_seed(3)
    probs = torch.randn(4, 2, 7, 7, dtype=torch.float64).softmax(-1)
    fix = ReAttention()
    site = site_of(fix)
    site.home.var_norm.bias.data.copy_(torch.tensor([0.25, -1.5]))
    first = fix.weights(probs, site)
    torch.testing.assert_close(first.sum(-1), torch.tensor([0.25, -1.5])[:, None].double().expand(4, 2, 7) * 7)
    site.home.reatten_matrix.bias.data.add_(5.0)
    torch.testing.assert_close(fix.weights(probs, site), first)


def test_re_attention_scale_multiplies_the_normalised_map() -> None:
    torch.manual_seed(0)
    probs = torch.randn(1, 2, 5, 5, dtype=torch.float64).softmax(-1)
    site = site_of(ReAttention())
    torch.testing.assert_close(ReAttention(scale=0.25).weights(probs, site), 0.25 * ReAttention().weights(probs, site))


def test_the_layernorm_variant_has_the_names_and_orientation_of_vit_pytorch() -> None:
    torch.manual_seed(0)
    probs = torch.randn(2, 3, 4, 4, dtype=torch.float64).softmax(-1)
    fix = ReAttention(norm="layer")
    site = site_of(fix, heads=3)
    shapes = {key: tuple(value.shape) for key, value in site.home.state_dict().items()}
    assert shapes == {"reattn_weights": (3, 3), "reattn_norm.1.weight": (3,), "reattn_norm.1.bias": (3,)}
    theta = site.home.reattn_weights.detach().numpy()
    mixed = np.einsum("bhij,hg->bgij", probs.numpy(), theta)
    expected = (mixed - mixed.mean(1, keepdims=True)) / np.sqrt(mixed.var(1, keepdims=True) + 1e-5)
    np.testing.assert_allclose(fix.weights(probs, site).detach(), expected, atol=1e-10)


def test_talking_heads_mix_heads_on_both_sides_of_the_softmax() -> None:
    torch.manual_seed(0)
    fix = FIXES["talking-heads"](init="random")
    site = site_of(fix, heads=2)
    for layer in (site.home.proj_l, site.home.proj_w):
        layer.weight.data.normal_()
        layer.bias.data.normal_()
    q, k, v = torch.randn(3, 1, 2, 4, 3, dtype=torch.float64)
    got = attend([(fix, site)], q, k, v, scale=0.5).detach()
    logits = np.einsum("hid,hjd->hij", q[0], k[0]) * 0.5
    left, right = site.home.proj_l, site.home.proj_w
    logits = np.einsum("hg,gij->hij", left.weight.detach(), logits) + left.bias.detach().numpy()[:, None, None]
    probs = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    weights = np.einsum("hg,gij->hij", right.weight.detach(), probs) + right.bias.detach().numpy()[:, None, None]
    np.testing.assert_allclose(got[0], weights @ v[0].numpy(), atol=1e-12)


def test_attn_scale_keeps_row_sums_and_weighs_the_contrast() -> None:
    probs = torch.randn(2, 3, 6, 6, dtype=torch.float64).softmax(-1)
    lamb = torch.tensor([0.0, 1.0, -1.0], dtype=torch.float64)
    scaled = scale_contrast(probs, lamb)
    assert torch.equal(scaled[:, 0], probs[:, 0])
    torch.testing.assert_close(scaled[:, 2], torch.full_like(probs[:, 2], 1 / 6))
    torch.testing.assert_close(scaled.sum(-1), torch.ones(2, 3, 6, dtype=torch.float64))
    torch.testing.assert_close(scaled[:, 1], 1 / 6 + 2 * (probs[:, 1] - 1 / 6))


def test_feat_scale_splits_mean_and_rest_once_or_twice(images: Tensor) -> None:
    x = torch.randn(2, 5, 4, dtype=torch.float64)
    s, t = torch.randn(2, 4, dtype=torch.float64)
    mean = x.mean(1, keepdim=True)
    torch.testing.assert_close(scale_bands(x, s, t), x + s * mean + t * (x - mean))
    once, twice = fixed("feat-scale", {"init": 0.2}), fixed("feat-scale", {"init": 0.1, "multiplicity": 2})
    torch.testing.assert_close(once(images), twice(images))
    block = once.blocks[1]
    x = torch.randn(2, 5, 24)
    attended = block.attn.forward(block.norm1(x))  # without the hook in which the fix acts
    mean = attended.mean(1, keepdim=True)
    x_attended = x + attended + 0.2 * mean + 0.2 * (attended - mean)
    torch.testing.assert_close(block(x), x_attended + block.mlp(block.norm2(x_attended)))


def test_layer_scale_scales_both_branches(images: Tensor) -> None:
    model, scaled = fixed("layer-scale", {"init": 0.5}), plain()
    for block, other in zip(model.blocks, scaled.blocks, strict=True):
        block.gamma_2.data.fill_(0.25)
        for layer, factor in ((other.attn.proj, 0.5), (other.mlp.fc2, 0.25)):
            layer.weight.data.mul_(factor)
            layer.bias.data.mul_(factor)
    torch.testing.assert_close(model(images), scaled(images))


def test_neutreno_pulls_towards_the_first_values(images: Tensor) -> None:
    values: list[Tensor] = []
    model = fixed("neutreno", {"alpha": 1.0})
    for block in model.blocks:
        block.attn.qkv.weight.data[:48].zero_()  # equal logits: attention gives the mean value
        block.attn.qkv.bias.data[:48].zero_()
        block.attn.qkv.register_forward_hook(lambda _, __, out: values.append(out[..., 48:]))
    outputs: list[Tensor] = []
    model.blocks[2].attn.proj.register_forward_pre_hook(lambda _, args: outputs.append(args[0]))
    model(images)
    expected = values[2].mean(1, keepdim=True) + values[0] - values[2]
    torch.testing.assert_close(outputs[0], expected.expand_as(outputs[0]), rtol=0, atol=1e-5)
    memory = model.blocks[0].attn.sites[0][1].memory
    assert memory == {}, "the last block must clear away what the first one left"


def test_a_block_that_runs_alone_says_what_it_misses(images: Tensor) -> None:
    for name, what in (("neutreno", "values"), ("shared-attention", "attention logits")):
        model = fixed(name)
        with pytest.raises(ModelError, match=f"block 1 needs the {what}"):
            model.blocks[1](torch.zeros(1, 4, 24))


def test_shared_attention_gives_the_same_map_above_its_source(images: Tensor) -> None:
    model = fixed("shared-attention", {"source_block": 1})
    inputs: list[Tensor] = []
    for block in model.blocks:
        block.attn.proj.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    model(images)
    model.blocks[2].attn.qkv.weight.data[:48].normal_()  # queries and keys of a borrowing block do not matter
    model(images)
    assert torch.equal(inputs[2], inputs[5])
    with pytest.raises(SettingError, match="above source_block 2"):
        fixed("shared-attention", {"source_block": 2})
    with pytest.raises(SettingError, match="above source_block 1"):
        fixed("shared-attention", {"source_block": 1, "blocks": [0, 2]})


def test_contra_norm_subtracts_what_tokens_share() -> None:
    x = torch.randn(2, 5, 4, dtype=torch.float64)
    unit = (x / x.norm(dim=-1, keepdim=True)).numpy()
    mass = np.exp(unit @ unit.swapaxes(1, 2) / 0.3)
    rows, columns = mass / mass.sum(2, keepdims=True), mass / mass.sum(1, keepdims=True)
    np.testing.assert_allclose(similarity_weights(x, 0.3, False), rows, atol=1e-12)
    np.testing.assert_allclose(similarity_weights(x, 0.3, True), rows + columns, atol=1e-12)
    layer = nn.LayerNorm(4).double()
    assert FIXES["contra-norm"](scale=0.5, tau=0.3, identity=True).convert(layer, 4)
    pushed = torch.from_numpy(1.5 * x.numpy() - 0.5 * rows @ x.numpy())
    torch.testing.assert_close(layer(x), nn.functional.layer_norm(pushed, (4,)))
    assert not FIXES["contra-norm"]().convert(nn.LayerNorm(3), 4), "norms of heads are not norms of tokens"


def test_contra_norm_goes_into_every_layernorm_or_those_of_its_blocks() -> None:
    def kinds(model: ViT) -> list[str]:
        return [name for name, m in model.named_modules() if type(m).__name__ == "ContraLayerNorm"]

    assert len(kinds(fixed("contra-norm"))) == 7
    assert kinds(fixed("contra-norm", {"blocks": [1]})) == ["blocks.1.norm1", "blocks.1.norm2"]


def test_sigma_reparam_follows_the_largest_singular_value() -> None:
    weight = torch.randn(6, 4, dtype=torch.float64)
    _, s, v = np.linalg.svd(weight.numpy())
    sigma, again = power_step(weight, torch.from_numpy(v[0].copy()))
    np.testing.assert_allclose([sigma, *again.abs()], [s[0], *np.abs(v[0])], atol=1e-12)
    layer = nn.Linear(4, 6).double()
    assert FIXES["sigma-reparam"](gamma="one").convert(layer, 4)
    x = torch.randn(3, 4, dtype=torch.float64)
    largest = torch.linalg.matrix_norm(layer.weight, 2)
    torch.testing.assert_close(layer(x), nn.functional.linear(x, layer.weight / largest, layer.bias))
    layer.weight.data.copy_(torch.randn(6, 4))
    kept = layer.u.clone()
    layer.eval()(x)
    assert torch.equal(layer.u, kept), "u moves in train mode only"
    layer.train()(x).square().sum().backward()
    along = (layer.weight.grad * layer.weight).sum()
    assert along.abs() < 1e-6, "the size of W does not matter, so no gradient runs along W"
    for _ in range(500):
        layer.train()(x)
    largest = torch.linalg.matrix_norm(layer.weight, 2)
    torch.testing.assert_close(layer(x), nn.functional.linear(x, layer.weight / largest, layer.bias))


def test_sigma_reparam_covers_every_linear_and_convolution(images: Tensor) -> None:
    model = fixed("sigma-reparam")
    kinds = [type(m).__name__ for m in model.modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    assert sorted(set(kinds)) == ["SigmaConv2d", "SigmaLinear"]
    doubled = fixed("sigma-reparam")
    for module in doubled.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            module.weight.data.mul_(2.0)
    torch.testing.assert_close(doubled(images), model(images), rtol=0, atol=1e-5)


def test_refiner_is_a_bottleneck_over_heads_and_positions() -> None:
    torch.manual_seed(0)
    fix = FIXES["refiner"]()
    site = site_of(fix, heads=3)
    p = dict(site.home.state_dict())
    shapes = [tuple(p[f"DLA.{name}.weight"].shape) for name in ("conv_exp", "depth_sep_conv", "conv_pro")]
    assert shapes == [(9, 3, 1, 1), (9, 1, 3, 3), (3, 9, 1, 1)]
    probs = torch.randn(2, 3, 5, 5, dtype=torch.float64).softmax(-1)

    def norm(x: Tensor) -> Tensor:
        return (x - x.mean((0, 2, 3), keepdim=True)) / (x.var((0, 2, 3), keepdim=True, correction=0) + 1e-5).sqrt()

    x = norm(torch.einsum("ogxy,bgij->boij", p["DLA.conv_exp.weight"], probs)).clamp(0, 6)
    x = nn.functional.pad(x, (1, 1, 1, 1)).unfold(2, 3, 1).unfold(3, 3, 1)
    x = norm((x * p["DLA.depth_sep_conv.weight"][:, 0, None, None]).sum((-2, -1))).clamp(0, 6)
    x = norm(torch.einsum("ogxy,bgij->boij", p["DLA.conv_pro.weight"], x))
    torch.testing.assert_close(fix.weights(probs, site).detach(), norm(probs + x))


def test_temperature_divides_the_logits() -> None:
    q, k, v = torch.randn(3, 1, 2, 4, 3, dtype=torch.float64)
    sharp = FIXES["temperature"](tau=0.5)
    learnt = FIXES["temperature"](tau=0.5, learnable=True)
    expected = (2 * (q @ k.transpose(-2, -1)) * 3**-0.5).softmax(-1) @ v
    for fix in (sharp, learnt):
        assert not fix.needs_map
        torch.testing.assert_close(attend([(fix, site_of(fix))], q, k, v, scale=3**-0.5).detach(), expected)


@pytest.mark.parametrize("unit", ["key", "entry"])
def test_drop_attention_renormalises_rows_in_train_mode_only(unit: str) -> None:
    torch.manual_seed(0)
    probs = torch.randn(8, 2, 6, 6).softmax(-1)
    fix = FIXES["drop-attention"](p=0.5, unit=unit)
    site = site_of(fix)
    site.home.eval()
    assert torch.equal(fix.probs(probs, site), probs)
    site.home.train()
    dropped = fix.probs(probs, site)
    torch.testing.assert_close(dropped.sum(-1), torch.ones(8, 2, 6))
    zero = dropped == 0
    assert 0.4 < zero.float().mean() < 0.6
    assert torch.equal(zero, zero[:, :, :1].expand_as(zero)) == (unit == "key")


def test_drop_attention_leaves_a_row_that_lost_everything() -> None:
    probs = torch.tensor([[0.25, 0.75]])
    assert torch.equal(drop_and_renormalise(probs, torch.tensor([[False, False]])), probs)


def test_registers_and_class_attention_tell_how_many_prefix_tokens_the_blocks_see() -> None:
    assert fixed("registers", {"count": 3}).num_prefix_tokens == 4
    assert fixed("class-attention").num_prefix_tokens == 0
    both = ViT(**SMALL, fixes={"class-attention": {}, "registers": {"count": 2}})
    assert both.num_prefix_tokens == 2
    seen: list[Tensor] = []
    both.blocks[0].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    both(torch.randn(1, 3, 32, 32))
    assert torch.equal(seen[0][0, :2], both.registers[0])


def test_class_attention_moves_cls_alone_and_reads_all_patches(images: Tensor) -> None:
    model = fixed("class-attention", {"init": 1.0, "depth": 1})
    block = model.blocks_token_only[0]
    tokens = torch.randn(1, 5, 24, requires_grad=True)
    moved = block(tokens[:, 1:], tokens[:, :1])
    assert moved.shape == (1, 1, 24)
    moved.sum().backward()
    assert (tokens.grad.abs().sum(-1) > 0).all()
    x = block.norm1(tokens)
    q, k, v = (f(x).reshape(1, 5, 3, 8).transpose(1, 2) for f in (block.attn.q, block.attn.k, block.attn.v))
    read = ((q[:, :, :1] @ k.transpose(-2, -1)) * 8**-0.5).softmax(-1) @ v
    after = tokens[:, :1] + block.attn.proj(read.transpose(1, 2).reshape(1, 1, 24))
    torch.testing.assert_close(moved, after + block.mlp(block.norm2(after)))


def test_masks_reach_the_map_like_the_fused_kernel() -> None:
    q, k, v = torch.randn(3, 2, 2, 5, 4)
    fix = ReAttention(norm="none", init="identity")
    sites: Any = [(fix, site_of(fix, dtype=torch.float32))]
    boolean = torch.rand(5, 5) > 0.3
    boolean.fill_diagonal_(True)
    for given in ({"causal": True}, {"mask": boolean}, {"mask": torch.randn(5, 5)}):
        torch.testing.assert_close(attend(sites, q, k, v, scale=0.5, **given).detach(), attend([], q, k, v, scale=0.5, **given))


def test_all_errors_are_ours() -> None:
    with pytest.raises(CollapseProbeError, match="did you mean 're-attention'"):
        ViT(**SMALL, fixes={"re-atention": {}})


def test_queries_and_keys_are_normalised_as_in_timm(images: Tensor) -> None:
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 3, "num_heads": 3, "num_classes": 5}
    theirs = VisionTransformer(**sizes, qk_norm=True)
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, 0.5, 0.3)
    ours = apply(VisionTransformer(**sizes), "qk-norm")
    ours.load_state_dict(theirs.state_dict())
    torch.testing.assert_close(ours.eval()(images), theirs.eval()(images))
    q = 100 * torch.randn(2, 4, 7, 8)
    rms = FIXES["qk-norm"](norm="rms")
    attention = Attention(32, 4)
    assert rms.convert(attention, 32)
    assert not rms.convert(attention, 32), "once is enough"
    logits = attention.q_norm(q) @ attention.k_norm(-q).mT * attention.scale
    assert logits.abs().max() <= 8**0.5 + 1e-4, "gains of one bound the logits by the root of the width"


def test_exclusive_attention_leaves_nothing_along_a_tokens_own_value() -> None:
    y, v = torch.randn(2, 1, 2, 5, 4, dtype=torch.float64)
    z = FIXES["exclusive-self-attention"]().heads(y, v, None)
    for h, i in np.ndindex(2, 5):
        own = v[0, h, i] / np.linalg.norm(v[0, h, i])
        np.testing.assert_allclose(z[0, h, i], y[0, h, i] - float(own @ y[0, h, i]) * own, atol=1e-12)
    assert (z * v).sum(-1).abs().max() < 1e-12
    assert torch.equal(without_own_value(y, torch.zeros_like(v)), y)


def test_fixes_that_cannot_share_a_model_say_so() -> None:
    for first, second in (("differential", "shared-attention"), ("shared-attention", "differential")):
        with pytest.raises(ModelError, match=f"{second} cannot stand beside {first}"):
            ViT(**SMALL, fixes={first: {}, second: {}})
    with pytest.raises(ModelError, match="heads are 3 wide"):
        ViT(**{**SMALL, "width": 9, "heads": 3}, fixes={"differential": {}})
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 1, "num_heads": 3}
    with pytest.raises(ModelError, match="a norm before attention and MLP"):
        apply(VisionTransformer(**sizes, block_fn=ResPostBlock), "layernorm-scaling")
