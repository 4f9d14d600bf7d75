"""Every penalty in the table: worked values, degenerate inputs, gradients, and the promises that all of them keep."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import timm
import torch
from torch import nn
from torch.autograd import gradcheck

import collapse_probe.training.penalties.patch_contrastive as contrastive
import collapse_probe.training.penalties.patch_mixing as mixing
from collapse_probe.capture.gradients import AttentionCall, GradientTrace, ViTParts
from collapse_probe.capture.trace import Attention
from collapse_probe.errors import CaptureError, ModelError, SettingError, UnknownNameError
from collapse_probe.metrics.functional.geometry import contrast, cosines, mean_cosine
from collapse_probe.models.deepvit import DeepViT, DeepViTSettings
from collapse_probe.models.vit import ViT
from collapse_probe.registry import METRICS, PENALTIES
from collapse_probe.training.penalties.base import Inputs, MixedLabels, ModelPenalties, Penalty

CLASSES = 3


def softmax(x):
    x = np.exp(x - x.max(-1, keepdims=True))
    return x / x.sum(-1, keepdims=True)


B, H, Q, K = np.ogrid[:2, :3, :5, :5]
A1 = torch.as_tensor(softmax(2 * np.sin(0.2 + 0.5 * B + 1.1 * H + 0.6 * Q + 0.4 * K + 0.3 * Q * K)))
A2 = torch.as_tensor(softmax(2 * np.cos(0.1 + 0.3 * B + 0.7 * H + 0.9 * Q + 0.5 * K + 0.2 * Q * K)))
b, t, c = np.ogrid[:2, :6, :5]
E1 = torch.as_tensor(np.sin(1 + 0.7 * b + 1.3 * t + 0.9 * c + 0.5 * t * c))
E2 = torch.as_tensor(np.cos(0.3 + 0.4 * b + 0.8 * t + 1.1 * c + 0.2 * t * c))
ROW, COLUMN = np.ogrid[:4, :4]
WEIGHT = torch.as_tensor(np.sin(0.4 + 0.9 * ROW + 0.7 * COLUMN + 0.35 * ROW * COLUMN))


def small(depth=2, fixes=None, **changes):
    torch.manual_seed(0)
    own = {"image_size": 8, "patch_size": 2, "depth": depth, "width": 16, "heads": 2, "classes": CLASSES, "init_std": 0.3}
    return ViT(**(own | changes), fixes=fixes or {})


def heard_as(tokens=None, maps=(), weight=None):
    """A two-block model of which these tokens (by place) and maps (by block) were heard, its query weight replaced."""
    model = small().requires_grad_(weight is not None)
    heard = GradientTrace(ViTParts(model))
    for place, found in (tokens or {}).items():
        heard.passed[place] = found
        heard.patch_count = found.shape[1] - 1
    for block, found in enumerate(maps):
        heard.calls[block] = [AttentionCall(Attention("", "softmax", probs=found), product=True)]
        heard.calls[block][0].mark("probs")
    if weight is not None:
        for block in model.blocks:
            block.attn.qkv.weight = nn.Parameter(torch.cat([weight] * 3))
    return heard


def term(name, heard, given=Inputs(), **settings):  # noqa: B008
    with torch.no_grad():
        return PENALTIES[name].with_settings(settings).loss(heard, given).item()


@pytest.mark.parametrize(
    ("name", "settings", "expected"),
    [
        ("patch-cosine", {"form": "repository"}, 0.0366483750),
        ("patch-cosine", {"form": "paper"}, 0.3580696730),
        ("patch-contrastive", {"form": "diverse-vit"}, 0.7150642629),
        ("patch-contrastive", {"form": "paper"}, 0.8613307923),
        ("soft-orthogonality", {"level": "tokens"}, 5.0624616950),
        ("hyperspherical-separation", {"level": "tokens"}, -1.0354630014),
        ("hyperspherical-separation", {"level": "tokens", "form": "repository"}, -1.0354630014),
        ("gram-determinant", {"level": "tokens"}, 0.3900863091),
    ],
)
def test_worked_values_of_tokens(name, settings, expected):
    first = {"patch-contrastive": E1}.get(name, E2)
    heard = heard_as({0: first, 1: first, 2: E2 if name == "patch-contrastive" else E1})
    assert term(name, heard, **settings) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(
    ("name", "settings", "expected"),
    [
        ("attention-cosine", {}, 0.6994060092),
        ("attention-cosine", {"pairs": "across"}, 0.5678343143),
        ("attention-contrastive", {}, 0.7098605207),
        ("soft-orthogonality", {"level": "attention"}, 12.2817546431),
        ("block-cosine", {}, 0.7319070839),
        ("block-cosine", {"axis": "column"}, 0.5754295055),
        ("block-cosine", {"axis": "row"}, 0.5775482493),
    ],
)
def test_worked_values_of_attention(name, settings, expected):
    assert term(name, heard_as(maps=(A1, A2)), **settings) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(
    ("name", "settings", "expected"),
    [
        ("soft-orthogonality", {}, 12.7558555816),
        ("conditional-orthogonality", {"estimate": "exact"}, 13.2178664971),
        ("hyperspherical-separation", {}, -1.4269400015),
        ("gram-determinant", {}, 0.1354976366),
    ],
)
def test_worked_values_of_weights_summed_over_matrices(name, settings, expected):
    heard = heard_as(weight=WEIGHT)
    assert term(name, heard, level="weights", **settings) == pytest.approx(6 * expected, abs=1e-5)
    one = {"level": "weights", "blocks": (1,), "matrices": ("value",)}
    assert term(name, heard, **one, **settings) == pytest.approx(expected, abs=1e-6)


def test_absolute_cosines_of_the_released_code_that_it_does_not_train_with():
    assert mean_cosine(E1[:, 1:], absolute=True).mean().item() == pytest.approx(0.4864557384, abs=1e-6)
    assert mean_cosine(E1[:, 1:], E2[:, 1:], absolute=True).mean().item() == pytest.approx(0.4087667691, abs=1e-6)


def test_entropy_between_its_bounds_costs_nothing_and_beyond_them_its_distance():
    share = 1.1109327543 / np.log(5)
    heard = heard_as(maps=(A1, A1))
    per_head = (-(A1 * A1.log()).sum(-1).mean(-1) / np.log(5)).numpy()
    assert term("attention-entropy", heard, low=0.0, high=1.0) == 0
    assert term("attention-entropy", heard, low=None, high=0.0) == pytest.approx(share, abs=1e-6)
    assert term("attention-entropy", heard, low=1.0, high=None) == pytest.approx(1 - share, abs=1e-6)
    assert term("attention-entropy", heard, low=None, high=0.7) == pytest.approx(np.maximum(per_head - 0.7, 0).mean(), abs=1e-6)


def test_the_power_estimate_changes_with_the_step_and_stays_below_the_exact_gap():
    heard = heard_as(weight=WEIGHT)
    found = [term("conditional-orthogonality", heard, Inputs(seed=seed)) for seed in range(20)]
    assert len(set(found)) == 20
    assert max(found) < 6 * 13.2178664971
    assert found[3] == term("conditional-orthogonality", heard, Inputs(seed=3))


def test_opposite_patches_cancel_in_the_signed_form_alone():
    opposite = torch.ones(2, 5, 3) * torch.tensor([0.0, 1, -1, 1, -1])[:, None]
    heard = heard_as({0: opposite, 2: opposite})
    assert term("patch-cosine", heard, form="repository") == pytest.approx(0, abs=1e-6)
    assert term("patch-cosine", heard, form="paper") == pytest.approx(1, abs=1e-6)


def test_relation_of_the_released_cosine_to_the_mean_off_the_diagonal():
    rows = E1[0, 1:]
    n = len(rows)
    off = (cosines(rows, rows).sum() - n) / (n * (n - 1))
    assert mean_cosine(rows).item() == pytest.approx(((1 + (n - 1) * off) / n).item(), abs=1e-12)


def test_the_contrast_lies_between_its_bounds():
    alike = torch.ones(1, 4, 3, dtype=torch.float64)
    assert contrast(alike, alike).mean().item() == pytest.approx(np.log(2))
    two = torch.tensor([[[1.0, 0.0], [-1.0, 0.0]]], dtype=torch.float64)
    assert contrast(two, two).mean().item() == pytest.approx(np.log1p(np.exp(-2)))
    assert contrast(alike[:, :1], alike[:, :1]).item() == 0


def test_the_released_contrast_agrees_with_a_slow_reference():
    first, last, grid = torch.randn(2, 12, 5).double(), torch.randn(2, 12, 5).double(), (3, 4)
    found = contrastive.released_contrast(first, last, grid).numpy()
    for image in range(2):
        for i in range(12):
            others = [last[image, j].numpy() for j in range(12) if j != i]
            near = [last[image, j].numpy() for j in range(12) if j != i and abs(j // 4 - i // 4) < 4 and abs(j % 4 - i % 4) < 4]
            own = first[image, i].numpy()
            scores = [own @ last[image, i].numpy(), own @ np.mean(others, 0), own @ (np.sum(near, 0) / 48)]
            p = softmax(np.array(scores))[0]
            assert found[image, i] == pytest.approx(-np.log(p + 1e-8), abs=1e-9)


@pytest.mark.parametrize(("form", "held"), [("paper", True), ("repository", True), ("diverse-vit", False)])
def test_the_shallow_patches_are_held_fixed_where_the_form_says_so(form, held):
    shallow, deep = (torch.randn(2, 17, 16, requires_grad=True) for _ in range(2))
    heard = heard_as({0: shallow, 1: shallow, 2: deep, "normed": deep})
    heard.passed["embedded"] = shallow[:, 1:]
    PENALTIES["patch-contrastive"](form=form).loss(heard, Inputs()).backward()
    assert deep.grad.abs().sum() > 0
    assert (shallow.grad is None or shallow.grad.abs().sum() == 0) == held


def labels_of(images, patches, seed=0):
    hard = torch.eye(CLASSES)[torch.randint(CLASSES, (images, patches), generator=torch.Generator().manual_seed(seed))]
    return MixedLabels(hard.mean(1), hard)


def test_mixing_with_the_models_head_agrees_with_a_slow_reference():
    heard = heard_as({"normed": torch.randn(2, 6, 16)})
    labels = labels_of(2, 5)
    head = heard.parts.model.head
    found = term("patch-mixing", heard, Inputs(labels), form="diverse-vit")
    total = 0.0
    for image in range(2):
        for i in range(6):
            p = softmax((heard.passed["normed"][image, i] @ head.weight.T + head.bias).detach().double().numpy())
            y = labels.targets_BK[image] if i == 0 else labels.patch_targets_BPK[image, i - 1]
            total -= (y.numpy() * np.log(p)).sum()
    assert found == pytest.approx(total / 12, abs=1e-6)


def test_mixing_of_regions_agrees_with_a_slow_reference():
    one, other = torch.tensor([0.7, 0.2, 0.1]), torch.tensor([0.0, 1.0, 0.0])
    inside = torch.tensor([[1, 1, 0, 0, 1], [1, 1, 1, 1, 1]], dtype=torch.bool)
    labels = MixedLabels(torch.zeros(2, 3), torch.where(inside[..., None], one, other))
    heard = heard_as({"normed": torch.randn(2, 6, 16)})
    penalty = PENALTIES["patch-mixing"].with_settings({"form": "repository"})
    own = penalty.own(heard.parts).eval()
    found = penalty.loss(heard, Inputs(labels, own=own)).item()
    total = 0.0
    for image in range(2):
        for region, y in ((inside[image], one.numpy()), (~inside[image], other.numpy())):
            if region.any():
                mean = heard.passed["normed"][image, 1:][region].mean(0)
                p = softmax((mean @ own[1].weight.T + own[1].bias).detach().double().numpy())
                divergence = sum(y[k] * (np.log(y[k]) - np.log(p[k])) for k in range(3) if y[k] > 0)
                total += region.double().mean().item() * divergence
    assert found == pytest.approx(total / 2, abs=1e-6)


LEVELS = {
    name: [{"level": level} for level in ("tokens", "attention", "weights")]
    for name in ("soft-orthogonality", "conditional-orthogonality", "hyperspherical-separation", "gram-determinant")
}
FORMS = {
    "patch-cosine": [{"form": "paper"}, {"form": "repository"}],
    "patch-contrastive": [{"form": form} for form in ("paper", "repository", "diverse-vit")],
    "patch-mixing": [{"form": form} for form in ("paper", "repository", "diverse-vit")],
    "attention-cosine": [{}, {"form": "paper"}, {"pairs": "across"}, {"blocks": (1,), "point": "weights"}],
    "block-cosine": [{}, {"axis": "column", "point": "probs"}],
    "conditional-orthogonality": [*LEVELS["conditional-orthogonality"], {"estimate": "exact"}],
    "hyperspherical-separation": [*LEVELS["hyperspherical-separation"], {"level": "tokens", "form": "repository"}],
    "attention-entropy": [{}, {"low": None, "high": 0.3}, {"low": 0.99, "high": None}],
}
VARIANTS = [(name, settings) for name in PENALTIES for settings in FORMS.get(name, LEVELS.get(name, [{}]))]
every = pytest.mark.parametrize(
    ("name", "settings"), VARIANTS, ids=[f"{n} {' '.join(map(str, s.values()))}" for n, s in VARIANTS]
)
each = pytest.mark.parametrize("name", list(PENALTIES))


def heard_from(tokens, maps):
    places = dict.fromkeys((0, 1, 2, "normed"), tokens)
    heard = heard_as(places, maps)
    heard.passed["embedded"] = tokens[:, 1:]
    heard.input = torch.linspace(-1, 1, 2 * 3 * 8 * 8).double().reshape(2, 3, 8, 8)
    return heard


def loss_of(name, settings, heard):
    penalty = PENALTIES[name].with_settings(settings)
    torch.manual_seed(1)
    own = penalty.own(heard.parts)
    own = None if own is None else own.double().eval()
    return penalty.loss(heard, Inputs(labels_of(2, 16), 0, own))


DEGENERATE = {
    "zeros": lambda: (torch.zeros(2, 17, 16), torch.full((2, 2, 17, 17), 1 / 17)),
    "duplicates": lambda: (torch.ones(2, 17, 16), torch.eye(17).expand(2, 2, 17, 17).clone()),
    "one zero row": lambda: (torch.cat((torch.randn(2, 16, 16), torch.zeros(2, 1, 16)), 1), torch.rand(2, 2, 17, 17)),
    "orthogonal": lambda: (torch.eye(17)[None, :, :16].repeat(2, 1, 1), torch.eye(17).expand(2, 2, 17, 17).clone()),
    "opposite": lambda: (
        torch.ones(2, 17, 16) * torch.tensor([1.0, -1.0]).repeat(9)[:17, None],
        torch.zeros(2, 2, 17, 17),
    ),
}


HEARD = [(n, s) for n, s in VARIANTS if s.get("level", PENALTIES[n].needs[0]) != "weights" and s != {"estimate": "exact"}]


@pytest.mark.parametrize(("name", "settings"), HEARD, ids=[f"{n} {s}" for n, s in HEARD])
@pytest.mark.parametrize("what", DEGENERATE)
def test_degenerate_inputs_give_no_nan_in_value_or_gradient(name, settings, what):
    tokens, maps = (x.requires_grad_() for x in DEGENERATE[what]())
    heard = heard_from(tokens, (maps, maps))
    found = (
        loss_of(name, settings, heard) if name != "patch-mixing" else loss_of(name, settings, heard_from(tokens.double(), ()))
    )
    assert found.isfinite()
    assert found.ndim == 0
    found.backward()
    for tensor in (tokens, maps, *heard.parts.model.parameters()):
        assert tensor.grad is None or tensor.grad.isfinite().all()


@pytest.mark.parametrize("identity", [torch.eye(16), torch.zeros(16, 16), torch.ones(16, 16)], ids=["identity", "zero", "same"])
@pytest.mark.parametrize("name", LEVELS)
def test_degenerate_weights_give_no_nan_in_value_or_gradient(name, identity):
    heard = heard_as(weight=identity)
    found = PENALTIES[name].with_settings({"level": "weights"}).loss(heard, Inputs())
    found.backward()
    assert found.isfinite()
    assert heard.parts.blocks[0].attn.qkv.weight.grad.isfinite().all()


TOKENS_ONLY = [(n, s) for n, s in VARIANTS if PENALTIES[n].with_settings(s).requests(ViTParts(small())).places]


WITHOUT_HEAD = [case for case in TOKENS_ONLY if case != ("patch-mixing", {"form": "diverse-vit"})]  # that head is float32


@pytest.mark.parametrize(("name", "settings"), WITHOUT_HEAD, ids=[f"{n} {s}" for n, s in WITHOUT_HEAD])
def test_token_gradients_agree_with_finite_differences(name, settings):
    torch.manual_seed(2)
    fixed = torch.randn(2, 17, 16).double()

    def value(tokens):
        heard = heard_from(fixed, ())
        for place in (2, "normed"):
            heard.passed[place] = tokens
        return loss_of(name, settings, heard)

    assert gradcheck(value, (torch.randn(2, 17, 16).double().requires_grad_(),), fast_mode=True)


MAPS_ONLY = [(n, s) for n, s in VARIANTS if s.get("level") == "attention" or PENALTIES[n].needs[0] == "attention"]


@pytest.mark.parametrize(("name", "settings"), MAPS_ONLY, ids=[f"{n} {s}" for n, s in MAPS_ONLY])
def test_map_gradients_agree_with_finite_differences(name, settings):
    torch.manual_seed(2)
    second = torch.randn(2, 2, 17, 17).softmax(-1)

    def value(logits):
        heard = heard_from(torch.zeros(2, 17, 16), ())
        heard._maps = {(i, p): m for i, m in enumerate((logits.softmax(-1), second.double())) for p in ("probs", "weights")}
        return loss_of(name, settings, heard)

    assert gradcheck(value, (torch.randn(2, 2, 17, 17).double().requires_grad_(),), fast_mode=True)


def timm_model(name="vit_tiny_patch16_224", **changes):
    torch.manual_seed(0)
    sizes = {"img_size": 64, "embed_dim": 24, "depth": 2, "num_heads": 2, "num_classes": CLASSES}
    return timm.create_model(name, **sizes, **changes)


MODELS = {
    "ours": small,
    "ours registers": lambda: small(registers=2),
    "ours re-attention": lambda: small(fixes={"re-attention": {}}),
    "timm": timm_model,
    "timm registers": lambda: timm_model(reg_tokens=2),
    "timm distilled": lambda: timm_model("deit_tiny_distilled_patch16_224"),
    "deepvit": lambda: DeepViT(DeepViTSettings(width=24, depth=2, re_attention=(1,), heads=2, image_size=64, classes=CLASSES)),
}


def paid(model, penalties, autocast=False):
    size = 8 if isinstance(model, ViT) else 64
    penalties = ModelPenalties(model, penalties)
    with penalties.recording(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        model(torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0)))
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        return penalties, penalties.terms(labels_of(2, 16))


def all_penalties():
    return {f"{i} {name}": PENALTIES[name].with_settings(settings) for i, (name, settings) in enumerate(VARIANTS)}


@pytest.mark.parametrize("which", MODELS)
def test_every_model_in_training_pays_every_penalty(which):
    model = MODELS[which]().train()
    hooks = hooks_of(model)
    penalties, terms = paid(model, all_penalties())
    assert len(terms) == len(VARIANTS)
    assert hooks_of(model) == hooks
    for label, found in terms.items():
        model.zero_grad()
        assert found.isfinite(), label
        assert found.ndim == 0, label
        assert found.requires_grad, label
        found.backward(retain_graph=True)
        graded = any(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())
        at_zero = "entropy" in label or "gram-anchor" in label  # within its bounds, and before anything has moved
        assert graded == (found.item() != 0 or not at_zero), label
        assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters()), label
    assert all(p.grad.abs().sum() > 0 for p in penalties.parameters())


def hooks_of(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def test_under_autocast_terms_are_float32_and_near_their_plain_value():
    found = []
    for autocast in (False, True):
        torch.manual_seed(3)  # the penalties' own heads
        found.append(paid(small().eval(), all_penalties(), autocast)[1])
    for label, plain in found[0].items():
        assert found[1][label].dtype == torch.float32, label
        near = 1e-6 if VARIANTS[int(label.split()[0])][1].get("level") == "weights" else 0.05
        assert found[1][label].item() == pytest.approx(plain.item(), rel=3 * near, abs=near), label


@each
def test_every_penalty_says_what_it_is(name):
    penalty = PENALTIES[name]
    assert issubclass(penalty, Penalty)
    assert penalty.name == name
    assert dataclasses.is_dataclass(penalty)
    assert penalty().moves() == (penalty.metric, penalty.direction) or name in LEVELS
    assert penalty.direction in ("up", "down", "between")
    assert set(penalty.needs) <= {"tokens", "attention", "weights", "labels"}
    levels = [penalty(level=level) for level in ("tokens", "attention")] if name in LEVELS else [penalty()]
    assert all(each.moves()[0] in METRICS for each in levels)
    assert penalty.summary
    assert penalty.source


@each
def test_settings_that_cannot_be_are_refused(name):
    with pytest.raises(SettingError, match="no setting 'weight'"):
        PENALTIES[name].with_settings({"weight": 1})
    for field in dataclasses.fields(PENALTIES[name]):
        with pytest.raises(SettingError, match=field.name):
            PENALTIES[name].with_settings({field.name: "nonsense"})


def test_lists_from_a_file_are_taken_as_blocks():
    assert PENALTIES["attention-cosine"].with_settings({"blocks": [0, 1]}).blocks == (0, 1)
    for wrong in ([0, 0], [-1], [], [0.5]):
        with pytest.raises(SettingError, match="blocks"):
            PENALTIES["attention-cosine"].with_settings({"blocks": wrong})


def test_the_wrong_use_is_explained():
    model = small()
    with pytest.raises(UnknownNameError, match="patch-cosine"):
        ModelPenalties(model, {"patch-cosin": {}})
    with pytest.raises(SettingError, match="blocks 0 to 1"):
        ModelPenalties(model, {"attention-cosine": {"blocks": (2,)}})
    with pytest.raises(SettingError, match="has one"):
        ModelPenalties(small(depth=1), {"block-cosine": {}})
    with pytest.raises(ModelError, match="no list `blocks`"):
        ModelPenalties(nn.Linear(2, 2), {"patch-cosine": {}})
    with pytest.raises(ModelError, match="linear classifier"):
        ModelPenalties(small(classes=0), {"patch-mixing": {}})
    penalties = ModelPenalties(model, {"patch-mixing": {}})
    with pytest.raises(CaptureError, match="nothing was recorded"):
        penalties.terms()
    with penalties.recording():
        model(torch.randn(2, 3, 8, 8))
    with pytest.raises(SettingError, match="needs labels"):
        penalties.terms()
    with penalties.recording():
        model(torch.randn(2, 3, 8, 8))
    with pytest.raises(SettingError, match="5 patches"):
        penalties.terms(labels_of(2, 5))
    with pytest.raises(CaptureError, match="nothing was recorded"):
        penalties.terms(labels_of(2, 16))


def test_several_penalties_pay_together_and_share_what_was_heard():
    model = small().train()
    penalties = ModelPenalties(
        model,
        {"near": PENALTIES["patch-cosine"](form="repository"), "patch-cosine": {}, "block-cosine": {}, "attention-cosine": {}},
    )
    with penalties.recording():
        logits = model(torch.randn(2, 3, 8, 8))
    terms = penalties.terms()
    assert list(terms) == ["near", "patch-cosine", "block-cosine", "attention-cosine"]
    (logits.sum() + sum(terms.values())).backward()
    assert all(p.grad is not None for p in model.parameters())


def test_own_parameters_and_the_count_of_steps_go_into_a_checkpoint():
    model = small()
    penalties = ModelPenalties(model, {"patch-mixing": {"form": "repository"}, "conditional-orthogonality": {}})
    assert sum(p.numel() for p in penalties.parameters()) == 16 * CLASSES + CLASSES
    images, found = torch.randn(2, 3, 8, 8), []
    for step in range(3):
        if step == 2:
            saved = {k: v.clone() for k, v in penalties.state_dict().items()}
        with penalties.recording():
            model(images)
        found.append(penalties.terms(labels_of(2, 16))["conditional-orthogonality"].item())
    again = ModelPenalties(model, {"patch-mixing": {"form": "repository"}, "conditional-orthogonality": {}})
    again.load_state_dict(saved)
    with again.recording():
        model(images)
    assert again.terms(labels_of(2, 16))["conditional-orthogonality"].item() == found[2]
    nn.ModuleDict({"part": penalties}).load_state_dict({f"part.{key}": value for key, value in saved.items()})
    with penalties.recording():
        model(images)
    assert penalties.terms(labels_of(2, 16))["conditional-orthogonality"].item() == found[2]
    assert len(set(found)) == 3


class Wrapper(nn.parallel.DistributedDataParallel):
    """DistributedDataParallel's face without its processes."""

    def __init__(self, module):
        nn.Module.__init__(self)
        self.module = module

    def forward(self, x):
        return self.module(x)


def test_a_wrapped_model_is_heard_through_its_wrapper():
    model = small()
    penalties = ModelPenalties(Wrapper(model), {"patch-cosine": {}, "block-cosine": {}})
    with penalties.recording():
        Wrapper(model)(torch.randn(2, 3, 8, 8))
    assert all(found.requires_grad for found in penalties.terms().values())


def test_validation_without_gradients_reads_the_same_terms():
    model = small().eval()
    plain = paid(model, {"patch-cosine": {}, "block-cosine": {}})[1]
    with torch.no_grad():
        silent = paid(model, {"patch-cosine": {}, "block-cosine": {}})[1]
    assert {k: v.item() for k, v in plain.items()} == {k: v.item() for k, v in silent.items()}


def test_labels_of_the_image_stand_for_its_patches():
    labels = MixedLabels(torch.eye(3)[:2])
    assert torch.equal(labels.of_patches(4), torch.eye(3)[:2, None].expand(2, 4, 3))
    assert mixing.two_regions(labels.of_patches(4))[..., 1].sum() == 0
