"""The plan of a model holds for others made alike, and only for these; one pass tells, with all checks of the capture."""

from __future__ import annotations

import pytest
import timm
import torch
import torchvision
from factories import small_vit
from toy_models import SIZE, Block, Encoder, Matmul, Projected, ToyViT, sharpen, toy

from collapse_probe.analysis.measurement import RunSettings, plan_of
from collapse_probe.analysis.untrained_twins import plan_of_twin
from collapse_probe.capture import attention_operators
from collapse_probe.capture.capture import discover_plan, plan_again
from collapse_probe.errors import CaptureError, NonFiniteError
from collapse_probe.models.loading import resolve

pytestmark = pytest.mark.usefixtures("one_thread")


SIDE = (64, 64)  # of factories.small_vit


def small(name, size, **settings):
    return lambda: timm.create_model(name, img_size=size, **settings), (size, size)


ISOTROPIC = {"depth": 2, "embed_dim": 48, "num_heads": 3}
ALIKE = {
    "ViT": small("vit_tiny_patch16_224", 48, **ISOTROPIC),
    "registers": small("vit_small_patch14_reg4_dinov2", 42, **ISOTROPIC),
    "distilled": small("deit_tiny_distilled_patch16_224", 48, **ISOTROPIC),
    "class attention": small("cait_xxs24_224", 48, **ISOTROPIC),
    "windows": small("swin_tiny_patch4_window7_224", 56, depths=(1, 1), num_heads=(1, 2), embed_dim=12, window_size=7),
    "torchvision": (
        lambda: torchvision.models.VisionTransformer(32, 8, 2, 2, 32, 64, num_classes=3),
        (32, 32),
    ),
    "by hand": (lambda: toy(Matmul), SIZE),
    "fast path": (lambda: ToyViT([Block(Projected(call={"need_weights": False}))]), SIZE),
    "encoder layers": (lambda: ToyViT([Encoder()]), SIZE),
}


@pytest.mark.parametrize("name", ALIKE)
def test_the_plan_of_the_same_architecture_is_what_a_search_finds(name):
    make, size = ALIKE[name]
    torch.manual_seed(0)
    model, twin = make().eval(), sharpen(make()).eval()
    plan = discover_plan(model, size)
    assert plan_again(twin, plan, size) == discover_plan(twin, size)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"depth": 3}, "ran attention in 3 module calls, the probe in 2"),
        ({"num_heads": 1}, "heads, queries and keys"),
        ({"patch_size": 8}, "made 0 attention calls of"),
        ({"embed_dim": 96}, "the tokens at the input of blocks.0"),
        ({"class_token": False, "global_pool": "avg", "reg_tokens": 0, "img_size": 64}, "queries"),
        ({"reg_tokens": 1, "class_token": False, "global_pool": "avg"}, None),
        ({"class_token": True, "no_embed_class": True}, None),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_another_architecture_is_refused(settings, reason):
    plan = discover_plan(small_vit(depth=2), SIDE)
    other = small_vit(**{"depth": 2, **settings})
    if reason is None:  # another kind of prefix token, at the same place: the plan is the same
        assert plan_again(other, plan, SIDE) == discover_plan(other, SIDE)
        return
    with pytest.raises(CaptureError, match=reason):
        plan_again(other, plan, SIDE)


def test_other_prefix_tokens_are_refused():
    plan, other = discover_plan(small_vit(depth=2), SIDE), small_vit(depth=2)
    with torch.no_grad():
        other.patch_embed.proj.weight.zero_()  # no token comes from the image any more
    with pytest.raises(CaptureError, match=r"the prefix tokens are \(0, 1, 2"):
        plan_again(other, plan, SIDE)


def test_the_self_check_bites_here_too(monkeypatch):
    plan = discover_plan(toy(), SIZE)
    for func in attention_operators.FUSED:
        read = attention_operators.READERS[func]

        def wrong(call, read=read):
            kernel = read(call)
            kernel.attention.scale *= 1.01
            return kernel

        monkeypatch.setitem(attention_operators.READERS, func, wrong)
    with pytest.raises(CaptureError, match="not the model's"):
        plan_again(toy(), plan, SIZE)


def test_numbers_that_are_not_finite_are_told():
    plan, other = discover_plan(toy(), SIZE), toy()
    next(other.parameters()).data.fill_(torch.nan)
    with pytest.raises(NonFiniteError):
        plan_again(other, plan, SIZE)


def test_a_twin_that_runs_otherwise_has_a_plan_of_its_own():
    settings = RunSettings(device="cpu")
    subject, deeper = resolve(small_vit(depth=2)), resolve(small_vit(depth=3))
    plan = plan_of(subject, "cpu", 0)
    assert plan_of_twin(subject, plan, settings) == plan
    assert plan_of_twin(deeper, plan, settings) == plan_of(deeper, "cpu", 0) != plan
