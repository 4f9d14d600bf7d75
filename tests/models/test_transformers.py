"""Folders of transformers: the part that sees is measured, at any size that it takes, or one sentence says why not."""

import functools

import numpy as np
import pytest
import torch
import transformers as hf
from PIL import Image

import collapse_probe as cp
from collapse_probe.analysis.measurement import plan_of
from collapse_probe.capture.capture import record
from collapse_probe.errors import ModelError
from collapse_probe.models.loading import resolve
from collapse_probe.models.sources.transformers import _as_patches

ViT = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "image_size": 64,
    "patch_size": 16,
}
WORDS = {
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "vocab_size": 99,
    "max_position_embeddings": 16,
}
STAGES = {"hidden_sizes": [8, 8, 16, 16], "num_attention_heads": [1, 1, 1, 2], "depths": [1, 1, 1, 1], "num_labels": 5}


def without(*names):
    return {key: value for key, value in ViT.items() if key not in names}


def clip():
    return hf.CLIPModel(hf.CLIPConfig(vision_config={**ViT, "projection_dim": 16}, text_config=WORDS, projection_dim=16))


def llava():
    words = {key: value for key, value in WORDS.items() if key != "max_position_embeddings"}
    vision, text = hf.CLIPVisionConfig(**ViT), hf.LlamaConfig(**words)
    return hf.LlavaForConditionalGeneration(hf.LlavaConfig(vision_config=vision, text_config=text, image_token_index=98))


def sam():
    shared = {"num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 64, "patch_size": 16}
    vision = {**shared, "hidden_size": 32, "mlp_dim": 64, "output_channels": 16, "global_attn_indexes": [0, 1]}
    decoder = {"hidden_size": 16, "mlp_dim": 16, "num_attention_heads": 2, "iou_head_hidden_dim": 16, "num_hidden_layers": 1}
    prompts = {"hidden_size": 16, "image_size": 64, "patch_size": 16, "image_embedding_size": 4}
    return hf.SamModel(
        hf.SamConfig(vision_config=hf.SamVisionConfig(**vision), mask_decoder_config=decoder, prompt_encoder_config=prompts)
    )


def square(processor):
    return processor(size={"height": 64, "width": 64})


def crop(processor):
    return processor(size={"shortest_edge": 64}, crop_size={"height": 64, "width": 64})


FAMILIES = {
    "vit": (
        lambda: hf.ViTForImageClassification(hf.ViTConfig(**ViT, num_labels=5)),
        lambda: square(hf.ViTImageProcessor),
        ("ViTForImageClassification", 17, 1),
    ),
    "clip": (clip, lambda: crop(hf.CLIPImageProcessor), ("CLIPVision", 17, 1)),
    "llava": (llava, lambda: crop(hf.CLIPImageProcessor), ("CLIPVision", 17, 1)),
    "siglip": (
        lambda: hf.SiglipModel(hf.SiglipConfig(vision_config=ViT, text_config=WORDS)),
        lambda: square(hf.SiglipImageProcessor),
        ("SiglipVision", 16, 0),
    ),
    "siglip2": (
        lambda: hf.Siglip2Model(hf.Siglip2Config(vision_config={**ViT, "num_patches": 16}, text_config=WORDS)),
        lambda: hf.Siglip2ImageProcessor(patch_size=16, max_num_patches=16),
        ("Siglip2Vision", 16, 0),
    ),
    "sam": (
        sam,
        lambda: hf.SamImageProcessor(size={"longest_edge": 64}, pad_size={"height": 64, "width": 64}),
        ("SamVisionEncoder", 16, 0),
    ),
    "dinov3": (
        lambda: hf.DINOv3ViTModel(hf.DINOv3ViTConfig(**ViT, num_register_tokens=2)),
        lambda: square(hf.DINOv3ViTImageProcessor),
        ("DINOv3ViTModel", 19, 3),
    ),
    "dinov2": (
        lambda: hf.Dinov2Model(hf.Dinov2Config(**without("intermediate_size"))),
        lambda: crop(hf.BitImageProcessor),
        ("Dinov2Model", 17, 1),
    ),
    "mae": (
        lambda: hf.ViTMAEForPreTraining(hf.ViTMAEConfig(**ViT, decoder_hidden_size=32, decoder_num_hidden_layers=1)),
        lambda: square(hf.ViTImageProcessor),
        ("ViTMAEModel", 17, 1),
    ),
    "segformer": (
        lambda: hf.SegformerForImageClassification(hf.SegformerConfig(**STAGES)),
        lambda: square(hf.SegformerImageProcessor),
        ("SegformerForImageClassification", 256, 0),
    ),
    "pvt_v2": (
        lambda: hf.PvtV2ForImageClassification(hf.PvtV2Config(**STAGES)),
        lambda: square(hf.PvtImageProcessor),
        ("PvtV2ForImageClassification", 256, 0),
    ),
    "videomae": (
        lambda: hf.VideoMAEForVideoClassification(hf.VideoMAEConfig(**ViT, num_frames=4, num_labels=5)),
        lambda: crop(hf.VideoMAEImageProcessor),
        ("VideoMAEForVideoClassification", 32, 0),
    ),
    "vivit": (
        lambda: hf.VivitModel(hf.VivitConfig(**without("patch_size"), num_frames=4, tubelet_size=[2, 16, 16])),
        lambda: crop(hf.VivitImageProcessor),
        ("VivitModel", 33, 1),
    ),
    "timesformer": (
        lambda: hf.TimesformerModel(hf.TimesformerConfig(**ViT, num_frames=4)),
        lambda: crop(hf.VideoMAEImageProcessor),
        ("TimesformerModel", 65, 1),
    ),
    "yolos": (
        lambda: hf.YolosForObjectDetection(hf.YolosConfig(**{**ViT, "image_size": [64, 64]}, num_detection_tokens=5)),
        lambda: hf.YolosImageProcessor(size={"shortest_edge": 64, "longest_edge": 128}),
        ("YolosModel", 22, 6),
    ),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Makes the folder of a family, once."""

    @functools.cache
    def made(name):
        torch.manual_seed(0)
        path = tmp_path_factory.mktemp(name)
        model, processor, _ = FAMILIES[name]
        model().save_pretrained(path)
        processor().save_pretrained(path)
        return path

    return made


@pytest.mark.parametrize("name", FAMILIES)
def test_a_folder_is_resolved_probed_and_analysed(name, folder, photos):
    wrapped, tokens, prefix = FAMILIES[name][2]
    subject = resolve(f"hf:{folder(name)}")
    assert type(subject.model.wrapped).__name__.startswith(wrapped)
    assert subject.preprocess.size == (64, 64)
    plan = plan_of(subject, "cpu", 0)
    assert (plan.tokens, len(plan.prefix)) == (tokens, prefix)
    assert (plan.grid is None) == (name in ("videomae", "vivit", "timesformer"))
    found = cp.analyze(subject, photos, metrics=("patch-diversity",), null_images=2, device="cpu")
    assert found.summary["images"] == 6
    assert np.isfinite(found.metrics["patch-diversity"].values).any()
    assert "untrained" in found.metrics["patch-diversity"].nulls.values


@pytest.mark.parametrize("name", ["clip", "siglip2", "dinov3", "dinov2", "mae", "segformer", "pvt_v2", "yolos"])
@pytest.mark.parametrize("pretrained", [True, False])
@pytest.mark.parametrize("size", [96, (64, 96)])
def test_a_model_that_takes_any_size_is_given_it(name, folder, pretrained, size):
    height, width = size if isinstance(size, tuple) else (size, size)
    subject = resolve(f"hf:{folder(name)}", img_size=size, pretrained=pretrained)
    assert subject.preprocess.size == (height, width)
    tokens, prefix = FAMILIES[name][2][1:]
    expected = prefix + (tokens - prefix) * height * width // 64**2
    assert plan_of(subject, "cpu", 0).tokens == expected


def test_a_model_of_one_size_says_so_itself_and_takes_another_with_fresh_weights(folder):
    subject = resolve(f"hf:{folder('videomae')}", img_size=96)
    with pytest.raises(ModelError, match=r"Input image size \(96\*96\) doesn't match model \(64\*64\)"):
        plan_of(subject, "cpu", 0)
    fresh = resolve(f"hf:{folder('videomae')}", img_size=96, pretrained=False)
    assert plan_of(fresh, "cpu", 0).tokens == 2 * 36


def test_a_masked_autoencoder_is_measured_on_whole_images_in_their_order(folder):
    subject = resolve(f"hf:{folder('mae')}")
    assert any("mask_ratio was set to 0" in note for note in subject.notes)
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad(), record(subject.model) as recording:
        subject.model(images)
    embeddings = subject.model.wrapped.embeddings
    with torch.no_grad():
        expected = embeddings.patch_embeddings(images) + embeddings.position_embeddings[:, 1:]
    assert torch.allclose(recording.last.tokens[0][:, 1:], expected, atol=1e-6)
    masked = resolve(f"hf:{folder('mae')}", model_kwargs={"mask_ratio": 0.5})
    assert masked.model.wrapped.config.mask_ratio == 0.5
    assert not any("mask_ratio" in note for note in masked.notes)


def test_patches_are_cut_as_the_processor_cuts_them():
    picture = np.random.default_rng(0).integers(0, 256, (32, 48, 3), dtype=np.uint8)
    processor = hf.Siglip2ImageProcessor(patch_size=16, max_num_patches=6, do_resize=False)
    made = processor(images=Image.fromarray(picture), return_tensors="pt")
    scaled = torch.tensor(picture).permute(2, 0, 1)[None] / 255 * 2 - 1
    ours = _as_patches(16, scaled)
    assert ours["spatial_shapes"].tolist() == made["spatial_shapes"].tolist()
    assert torch.allclose(ours["pixel_values"], made["pixel_values"], atol=1e-5)


def test_a_film_is_the_picture_in_every_frame_and_their_number_is_said(folder):
    subject = resolve(f"hf:{folder('vivit')}", img_size=(64, 96), pretrained=False)
    assert plan_of(subject, "cpu", 0).grid is None
    assert "each picture is shown as a film of 4 equal frames" in subject.notes
    films = subject.model.inputs(torch.arange(24.0).reshape(1, 3, 2, 4))["pixel_values"]
    assert films.shape == (1, 4, 3, 2, 4)
    assert all(torch.equal(films[:, 0], films[:, frame]) for frame in range(4))


def test_a_model_of_something_else_is_refused_in_one_sentence(tmp_path):
    sizes = {key: value for key, value in WORDS.items() if key != "max_position_embeddings"}
    hf.BertModel(hf.BertConfig(**sizes)).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"^BertModel takes input_ids, .* and not pictures alone: .*collapse_probe\.record"):
        resolve(f"hf:{tmp_path}")
