"""The families of timm, torchvision, transformers, open_clip and vit-pytorch, each as a small model with random parameters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn

WITHOUT = [
    "byobnet",
    "convmixer",
    "convnext",
    "cspnet",
    "cspnext",
    "densenet",
    "dla",
    "dpn",
    "efficientnet",
    "fasternet",
    "focalnet",
    "ghostnet",
    "hardcorenas",
    "hgnet",
    "hrnet",
    "inception_next",
    "inception_resnet_v2",
    "inception_v3",
    "inception_v4",
    "lcnetv2",
    "mambaout",
    "mlp_mixer",
    "nasnet",
    "nfnet",
    "pnasnet",
    "rdnet",
    "regnet",
    "repghost",
    "repvit",
    "res2net",
    "resnest",
    "resnet",
    "resnetv2",
    "rexnet",
    "selecsls",
    "senet",
    "sequencer",
    "sknet",
    "starnet",
    "tresnet",
    "vgg",
    "vovnet",
    "xception",
    "xception_aligned",
]
"""Families of timm without attention over tokens."""

SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 4, "num_classes": 5}
STAGED = {"num_classes": 5}
TIMM: dict[str, list[tuple[str, dict[str, Any], int]]] = {
    "beit": [("beit_base_patch16_224", SMALL, 32), ("beitv2_base_patch16_224", SMALL, 32)],
    "byoanet": [("botnet26t_256", STAGED, 256), ("halonet26t", STAGED, 256), ("lambda_resnet26t", STAGED, 128)],
    "cait": [("cait_xxs24_224", SMALL, 32)],
    "coat": [("coat_tiny", {"img_size": 64, **STAGED}, 64), ("coat_lite_tiny", {"img_size": 64, **STAGED}, 64)],
    "convit": [("convit_tiny", SMALL | {"local_up_to_layer": 1}, 32)],
    "cpubone": [("cpubone_nano", STAGED, 64)],
    "crossvit": [("crossvit_9_240", STAGED, 240)],
    "csatv2": [("csatv2", STAGED, 64)],
    "davit": [("davit_tiny", STAGED, 64)],
    "deepseek_vit": [("deepseek_vit_412m", {"embed_dim": 48, "depth": 2, "num_heads": 4}, 56)],
    "deit": [("deit_tiny_distilled_patch16_224", SMALL, 32), ("deit3_small_patch16_224", SMALL, 32)],
    "edgenext": [("edgenext_xx_small", STAGED, 64)],
    "efficientformer": [("efficientformer_l1", STAGED, 224)],
    "efficientformer_v2": [("efficientformerv2_s0", STAGED, 224)],
    "efficientvim": [("efficientvim_m1", STAGED, 224)],
    "efficientvit_mit": [("efficientvit_b0", STAGED, 64)],
    "efficientvit_msra": [("efficientvit_m0", STAGED, 224)],
    "eva": [("eva02_tiny_patch14_224", SMALL | {"patch_size": 8}, 32), ("vit_small_patch16_dinov3", SMALL, 32)],
    "fastvit": [("fastvit_sa12", STAGED, 64)],
    "gcvit": [("gcvit_xxtiny", STAGED | {"img_size": 64}, 64)],
    "gemma4_vit": [("gemma4_vit_167m", {"embed_dim": 48, "depth": 2, "num_heads": 4}, 96)],
    "hiera": [("hiera_tiny_224", STAGED | {"img_size": (64, 64), "stages": (1, 1, 1, 1)}, 64)],
    "hieradet_sam2": [("sam2_hiera_tiny", STAGED, 128)],
    "iformer": [("iformer_t", STAGED, 64)],
    "levit": [("levit_128s", STAGED, 224), ("levit_conv_128s", STAGED, 224)],
    "lowformer": [("lowformer_b0", STAGED, 64)],
    "maxxvit": [
        ("maxvit_rmlp_pico_rw_256", STAGED | {"img_size": 64}, 64),
        ("coatnet_rmlp_nano_rw_224", STAGED | {"img_size": 64}, 64),
        ("maxxvit_rmlp_nano_rw_256", STAGED | {"img_size": 64}, 64),
    ],
    "metaformer": [("caformer_s18", STAGED, 64)],
    "mobilenetv3": [("mobilenetv4_hybrid_medium", STAGED, 64)],
    "mobilenetv5": [("mobilenetv5_base", STAGED, 64)],
    "mobilevit": [("mobilevit_xxs", STAGED, 64), ("mobilevitv2_050", STAGED, 64)],
    "mvitv2": [("mvitv2_tiny", STAGED | {"img_size": 64}, 64)],
    "naflexvit": [
        ("naflexvit_base_patch16_gap", {"embed_dim": 48, "depth": 2, "num_heads": 4, "patch_size": 8, "num_classes": 5}, 32)
    ],
    "nest": [("nest_tiny", STAGED | {"img_size": 64}, 64)],
    "nextvit": [("nextvit_small", STAGED, 64)],
    "pit": [("pit_ti_224", STAGED | {"img_size": 64}, 64)],
    "pvt_v2": [("pvt_v2_b0", STAGED, 64)],
    "qwen3_vit": [("qwen3_vit_88m", {"embed_dim": 48, "depth": 2, "num_heads": 4}, 64)],
    "shvit": [("shvit_s1", STAGED, 128)],
    "swiftformer": [("swiftformer_xs", STAGED, 64)],
    "swin_transformer": [
        (
            "swin_tiny_patch4_window7_224",
            STAGED | {"img_size": 64, "window_size": 4, "depths": (2, 2), "num_heads": (2, 4), "embed_dim": 32},
            64,
        )
    ],
    "swin_transformer_v2": [
        (
            "swinv2_tiny_window8_256",
            STAGED | {"img_size": 64, "window_size": 4, "depths": (2, 2), "num_heads": (2, 4), "embed_dim": 32},
            64,
        )
    ],
    "swin_transformer_v2_cr": [
        (
            "swinv2_cr_tiny_ns_224",
            STAGED | {"img_size": 64, "window_size": 4, "depths": (2, 2), "num_heads": (2, 4), "embed_dim": 32},
            64,
        )
    ],
    "tiny_vit": [("tiny_vit_5m_224", STAGED | {"depths": (1, 1, 2, 1)}, 64)],
    "tnt": [("tnt_s_legacy_patch16_224", {"img_size": 32, "depth": 2, "num_classes": 5}, 32)],
    "twins": [("twins_pcpvt_small", STAGED | {"img_size": 64}, 64), ("twins_svt_small", STAGED | {"img_size": 64}, 64)],
    "visformer": [("visformer_tiny", STAGED | {"img_size": 64}, 64)],
    "vision_transformer": [
        ("vit_tiny_patch16_224", SMALL, 32),
        ("vit_small_patch14_reg4_dinov2", SMALL, 32),
        ("vit_base_patch16_siglip_224", SMALL, 32),
        ("vit_base_patch16_clip_224", SMALL, 32),
        ("vit_small_patch16_18x2_224", SMALL, 32),
    ],
    "vision_transformer_hybrid": [
        ("vit_tiny_r_s16_p8_224", {"img_size": 64, "embed_dim": 48, "depth": 2, "num_heads": 4, "num_classes": 5}, 64)
    ],
    "vision_transformer_relpos": [("vit_relpos_small_patch16_224", SMALL, 32), ("vit_relpos_base_patch16_cls_224", SMALL, 32)],
    "vision_transformer_sam": [
        ("samvit_base_patch16_224", SMALL | {"img_size": 64, "global_attn_indexes": (1,), "window_size": 3}, 64)
    ],
    "vitamin": [("vitamin_small_224", STAGED | {"img_size": 64}, 64)],
    "volo": [("volo_d1_224", STAGED | {"img_size": 64}, 64)],
    "xcit": [("xcit_nano_12_p16_224", SMALL | {"patch_size": 16, "img_size": 64}, 64)],
}

VIT = {
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 96,
    "image_size": 32,
    "patch_size": 8,
}
LADDER = {"depths": (1, 1, 1, 1), "hidden_sizes": (16, 32, 64, 64), "num_attention_heads": (1, 2, 4, 4)}
SWIN = {"image_size": 64, "patch_size": 4, "embed_dim": 16, "depths": (2, 2), "num_heads": (2, 4), "window_size": 4}
TRANSFORMERS: dict[str, tuple[dict[str, Any], int]] = {
    "ViT": (VIT, 32),
    "DeiT": (VIT, 32),
    "Beit": (VIT, 32),
    "Data2VecVision": (VIT, 32),
    "Dinov2": (VIT, 32),
    "Dinov2WithRegisters": (VIT, 32),
    "DINOv3ViT": (VIT, 32),
    "ViTMSN": (VIT, 32),
    "ViTMAE": (VIT | {"mask_ratio": 0.0}, 32),
    "IJepa": (VIT, 32),
    "Yolos": (VIT | {"image_size": (32, 32), "num_detection_tokens": 5}, 32),
    "CLIPVision": (VIT, 32),
    "MetaClip2Vision": (VIT, 32),
    "SiglipVision": (VIT, 32),
    "Aimv2Vision": (VIT, 32),
    "MLCDVision": (VIT | {"num_key_value_groups": 1}, 32),
    "Pixio": (VIT, 32),
    "BlipVision": (VIT, 32),
    "Blip2Vision": (VIT, 32),
    "InstructBlipVision": (VIT, 32),
    "AltCLIPVision": (VIT, 32),
    "ChineseCLIPVision": (VIT, 32),
    "CLIPSegVision": (VIT, 32),
    "XCLIPVision": (VIT | {"num_frames": 1}, 32),
    "GitVision": (VIT, 32),
    "Owlv2Vision": (VIT, 32),
    "OwlViTVision": (VIT, 32),
    "FlavaImage": (VIT, 32),
    "InternVLVision": (VIT | {"image_size": (32, 32), "patch_size": (8, 8)}, 32),
    "PixtralVision": (VIT | {"head_dim": 12}, 32),
    "VitPoseBackbone": (VIT | {"image_size": (32, 32), "patch_size": (8, 8)}, 32),
    "VitDet": (VIT | {"pretrain_image_size": 32}, 32),
    "SamVision": (
        VIT | {"image_size": 64, "mlp_dim": 96, "output_channels": 16, "window_size": 3, "global_attn_indexes": (1,)},
        64,
    ),
    "DPT": (VIT | {"backbone_out_indices": (0, 1, 1, 1), "neck_hidden_sizes": (16, 16, 16, 16)}, 32),
    "Swin": (SWIN, 64),
    "Swinv2": (SWIN, 64),
    "DonutSwin": (SWIN, 64),
    "Swin2SR": (SWIN | {"patch_size": 1, "image_size": 16}, 16),
    "Hiera": ({"image_size": (64, 64), "embed_dim": 16, "depths": (1, 1, 1, 1), "num_heads": (1, 2, 4, 8)}, 64),
    "Segformer": ({"depths": (1, 1, 1, 1), "hidden_sizes": (16, 32, 64, 64), "num_attention_heads": (1, 2, 4, 4)}, 64),
    "GLPN": ({"depths": (1, 1, 1, 1), "hidden_sizes": (16, 32, 64, 64), "num_attention_heads": (1, 2, 4, 4)}, 64),
    "Pvt": (LADDER | {"image_size": 64}, 64),
    "PvtV2": (
        {"image_size": 64, "depths": (1, 1, 1, 1), "hidden_sizes": (16, 32, 64, 64), "num_attention_heads": (1, 2, 4, 4)},
        64,
    ),
    "Levit": ({"image_size": 64, "hidden_sizes": (32, 48, 64), "num_attention_heads": (2, 3, 4), "depths": (1, 1, 1)}, 64),
    "Cvt": ({}, 64),
    "MobileViT": ({"image_size": 64}, 64),
    "MobileViTV2": ({"image_size": 64}, 64),
    "SwiftFormer": ({"image_size": 64}, 64),
    "FocalNet": ({"image_size": 64, "embed_dim": 16, "depths": (1, 1)}, 64),
    "PoolFormer": ({}, 64),
}
EAGER_ONLY = [
    "BlipVision",
    "GitVision",
    "FlavaImage",
    "VitDet",
    "Swinv2",
    "DonutSwin",
    "Swin2SR",
    "Hiera",
    "GLPN",
    "Pvt",
    "PvtV2",
    "Levit",
    "Cvt",
    "MobileViT",
    "MobileViTV2",
    "SwiftFormer",
    "FocalNet",
    "PoolFormer",
]
TORCHVISION: dict[str, tuple[dict[str, Any], int]] = {
    "vit_b_16": ({}, 224),
    "swin_t": ({}, 64),
    "swin_v2_t": ({}, 64),
    "maxvit_t": ({"input_size": (224, 224)}, 224),
}
OPEN_CLIP = {"ViT-B-32": 224, "coca_ViT-B-32": 224, "ViT-B-32-SigLIP2-256": 256, "ViTamin-S": 224, "MobileCLIP-S1": 256}
PHIL = {"image_size": 32, "patch_size": 8, "num_classes": 5, "dim": 48, "depth": 2, "heads": 4, "mlp_dim": 96}
VIT_PYTORCH: dict[str, dict[str, Any]] = {
    "vit.ViT": PHIL,
    "simple_vit.SimpleViT": PHIL,
    "deepvit.DeepViT": PHIL,
    "cait.CaiT": PHIL | {"cls_depth": 1},
    "parallel_vit.ViT": PHIL,
    "vit_for_small_dataset.ViT": PHIL,
    "rvt.RvT": PHIL,
    "vit_with_patch_merger.ViT": PHIL | {"depth": 4},
    "simple_vit_with_register_tokens.SimpleViT": PHIL,
    "simple_vit_with_qk_norm.SimpleViT": PHIL,
    "simple_vit_with_value_residual.SimpleViT": PHIL,
    "simple_vit_with_hyper_connections.SimpleViT": PHIL | {"num_residual_streams": 2},
    "simple_vit_with_fft.SimpleViT": PHIL | {"freq_patch_size": 8},
    "simple_flash_attn_vit.SimpleViT": PHIL,
    "learnable_memory_vit.ViT": PHIL,
    "normalized_vit.nViT": PHIL,
    "ats_vit.ViT": PHIL | {"max_tokens_per_depth": (8, 8)},
    "xcit.XCiT": PHIL | {"cls_depth": 1},
    "vit_with_decorr.ViT": PHIL,
    "vit_with_keel_post_ln.ViT": PHIL,
    "simple_uvit.SimpleUViT": PHIL,
}


FAST = {
    "timm: vit_tiny_patch16_224",
    "timm: vit_small_patch14_reg4_dinov2",
    "timm: vit_small_patch16_18x2_224",
    "timm: cait_xxs24_224",
    "timm: swin_tiny_patch4_window7_224",
    "timm: samvit_base_patch16_224",
    "timm: xcit_nano_12_p16_224",
    "timm: naflexvit_base_patch16_gap",
    "timm: efficientvit_b0",
    "transformers: ViT sdpa",
    "transformers: ViT eager",
    "transformers: DINOv3ViT sdpa",
    "transformers: Swinv2 eager",
    "vit-pytorch: deepvit.DeepViT",
    "vit-pytorch: simple_vit.SimpleViT",
}
"""What runs by default: "library: name"."""


class Row(NamedTuple):
    """One model of a library: what makes it, the size of its images, and the library's own tokens, if it says them."""

    library: str
    family: str
    name: str
    make: Callable[[], nn.Module]
    size: int
    tokens: Callable[[nn.Module, torch.Tensor], Any] | None = None


def timm_tokens(model, images):
    """What timm says of the tokens after each block."""
    if not hasattr(model, "forward_intermediates"):
        return None
    return model.forward_intermediates(images, intermediates_only=True, norm=False)


def hidden_states(model, images):
    """What transformers says of the tokens after each block; the last may be normalised."""
    states = getattr(model(images, output_hidden_states=True), "hidden_states", None)
    return None if states is None else list(states[1:-1])


def rows():
    """Every model of the table whose library is installed."""
    import timm
    import torchvision

    found = []
    for family, models in TIMM.items():
        for name, settings, size in models:
            make = lambda name=name, settings=settings: timm.create_model(name, **settings)  # noqa: E731
            found.append(Row("timm", family, name, make, size, timm_tokens))
    for name, (settings, size) in TORCHVISION.items():
        make = lambda name=name, settings=settings: torchvision.models.get_model(name, weights=None, **settings)  # noqa: E731
        found.append(Row("torchvision", name, name, make, size))
    return found + _transformers() + _open_clip() + _vit_pytorch()


def _transformers():
    import transformers

    found = []
    for family, (settings, size) in TRANSFORMERS.items():
        for kind in ("eager",) if family in EAGER_ONLY else ("sdpa", "eager"):

            def make(family=family, settings=settings, kind=kind):
                config = getattr(transformers, f"{family}Config")(**settings)
                config._attn_implementation = kind
                return getattr(transformers, family if family.endswith("Backbone") else f"{family}Model")(config)

            found.append(Row("transformers", family, f"{family} {kind}", make, size, hidden_states))
    return found


def _open_clip():
    try:
        import open_clip
    except ImportError:
        return []
    found = []
    for name, size in OPEN_CLIP.items():
        make = lambda name=name: open_clip.create_model(name, pretrained=None).visual  # noqa: E731
        found.append(Row("open_clip", name, name, make, size))
    return found


def _vit_pytorch():
    try:
        import vit_pytorch
    except ImportError:
        return []
    import importlib

    assert vit_pytorch
    found = []
    for name, settings in VIT_PYTORCH.items():
        module, cls = name.split(".")
        make = lambda module=module, cls=cls, settings=settings: getattr(  # noqa: E731
            importlib.import_module(f"vit_pytorch.{module}"), cls
        )(**settings)
        found.append(Row("vit-pytorch", name, name, make, 32))
    return found
