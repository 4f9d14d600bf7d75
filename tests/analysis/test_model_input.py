"""A model and its input come together: the size, channels and type of the images, and the batches of a caller's own loader."""

import functools

import numpy as np
import pytest
import timm
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import collapse_probe as cp
from collapse_probe.analysis.cross_cka import cross_cka
from collapse_probe.data.images import OwnImages, batches, open_data
from collapse_probe.data.preprocessing import for_channels, from_timm_config, input_channels
from collapse_probe.devices import floating_like, moved
from collapse_probe.errors import DataError, ModelError, SettingError
from collapse_probe.models.loading import resolve

TINY = {"img_size": 64, "depth": 2, "embed_dim": 24, "num_heads": 2, "num_classes": 4}
analyze = functools.partial(cp.analyze, device="cpu", metrics=("patch-diversity", "attention-entropy"), gallery_images=1)


def vit(**settings):
    return timm.create_model("vit_tiny_patch16_224", **{**TINY, **settings}).eval()


def pixels(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


class Shared(nn.Module):
    """Declares no size and takes any."""

    def __init__(self):
        super().__init__()
        self.vit = vit(dynamic_img_size=True)

    def forward(self, images):
        return self.vit(images)


# ---- the first batch of a caller's own loader ----


@pytest.mark.parametrize(("shape", "tokens"), [((64, 96), 25), ((32, 32), 5), ((80, 48), 16)])
@pytest.mark.parametrize("form", ["list", "generator", "loader", "dict"])
def test_a_model_is_probed_at_the_size_of_the_callers_own_batches(shape, tokens, form):
    data = [pixels(4, 3, *shape, seed=i) for i in range(2)]
    forms = {
        "list": lambda: data,
        "generator": lambda: (batch for batch in data),
        "loader": lambda: DataLoader(TensorDataset(torch.cat(data), torch.arange(8)), batch_size=4),
        "dict": lambda: [{"pixel_values": batch} for batch in data],
    }
    found = analyze(Shared(), data=forms[form]())
    assert found.model["tokens"] == tokens
    assert found.summary["images"] == 8
    assert list(found.images["names"]) == [str(i) for i in range(8)]
    assert found.model["preprocess"] == {"size": list(shape), "given": "pixels, made ready by the caller"}
    assert not any("preprocessing assumed" in note for note in found.run["notes"])
    assert found.data["address"] in ("an iterable (list)", "an iterable (generator)", "an iterable (DataLoader)")


def test_a_size_that_the_batches_do_not_have_is_refused_and_one_that_they_have_is_not():
    data = [pixels(2, 3, 64, 96)]
    assert analyze(vit(dynamic_img_size=True), data=data, img_size=(64, 96)).model["tokens"] == 25
    with pytest.raises(SettingError, match="img_size is 64 × 64, but the images given are 64 × 96"):
        analyze(vit(dynamic_img_size=True), data=data, img_size=64)


def measured(data):
    return analyze(timm.create_model("pvt_v2_b0", depths=(1, 1, 1, 1), num_classes=4), data)


def replaced(data):
    return cp.intervene(vit(dynamic_img_size=True), data, ["uniform"], device="cpu")


def set_side_by_side(data):
    return cross_cka(resolve(vit(dynamic_img_size=True)), resolve(vit(dynamic_img_size=True)), data, device="cpu")


@pytest.mark.parametrize("verb", [measured, replaced, set_side_by_side])
def test_a_later_batch_of_another_size_is_refused(verb):
    with pytest.raises(DataError, match=r"probed with images of 3 × 64 × 64 .*, and this batch has 3 × 96 × 64"):
        verb([pixels(4, 3, 64, 64), pixels(4, 3, 96, 64)])


def test_a_size_that_the_models_own_preprocessing_does_not_give_is_refused(photos):
    model = Shared()
    model.preprocess = lambda picture: torch.ones(3, 48, 48) * picture.getpixel((0, 0))[0] / 255
    with pytest.raises(SettingError, match="img_size is 32 × 32, but the model's own preprocessing gives 48 × 48"):
        analyze(model, photos, img_size=32)
    assert analyze(model, [pixels(2, 3, 32, 32)], img_size=32).model["tokens"] == 5


class WithMethod(Shared):
    def preprocess(self, images):
        return images - images.mean((1, 2, 3), keepdim=True)


def test_a_method_called_preprocess_that_takes_tensors_is_no_preprocessing_of_pictures():
    assert analyze(WithMethod(), data=[pixels(4, 3, 32, 32)]).model["tokens"] == 5


def test_what_comes_after_the_first_batch_is_not_lost_and_an_iterator_runs_once():
    once = OwnImages(iter([pixels(2, 3, 8, 8), pixels(3, 3, 8, 8)]))
    assert (once.shape, once.once) == ((3, 8, 8), True)
    assert [len(batch) for batch in once] == [2, 3]
    assert list(once) == []
    again = OwnImages([pixels(2, 3, 8, 8)])
    assert not again.once
    assert len(list(again)) == len(list(again)) == 1
    for empty in ([], iter(())):
        with pytest.raises(DataError, match="gave no image"):
            OwnImages(empty)


def test_compare_and_intervene_follow_the_loader_too():
    data = [pixels(4, 3, 32, 64, seed=i) for i in range(2)]
    found = cp.compare({"a": Shared(), "b": Shared()}, data, metrics=("patch-diversity",), device="cpu", cka=True)
    assert [each.model["tokens"] for each in found.subjects.values()] == [9, 9]
    assert all(each.run["cost"]["flops"] for each in found.subjects.values())
    effects = cp.intervene(Shared(), data, ["uniform", "skip"], device="cpu")
    assert effects.model["tokens"] == 9


# ---- channels ----


@pytest.mark.parametrize("channels", [1, 2, 13])
@pytest.mark.parametrize(
    "make",
    [
        lambda c: vit(in_chans=c),
        lambda c: nn.Sequential(nn.Conv2d(c, 8, 1), nn.Conv2d(8, 3, 1)),
        lambda c: timm.create_model("naflexvit_base_patch16_gap", depth=1, embed_dim=24, num_heads=2, in_chans=c),
    ],
)
def test_the_channels_are_read_off_the_model(make, channels):
    assert input_channels(make(channels)) == channels


def test_channels_that_nothing_tells_are_not_guessed():
    assert input_channels(nn.Sequential(nn.LayerNorm(48), nn.Linear(48, 8), nn.Conv2d(8, 8, 1))) is None


def test_pictures_become_grey_for_a_model_of_one_channel(photos):
    images = open_data(photos)
    colour = from_timm_config({"mean": (0.5, 0.4, 0.3), "std": (0.2, 0.25, 0.5), "crop_pct": 1.0}, 32)
    grey = for_channels(colour, 1)
    assert (grey.channels, grey.size) == (1, (32, 32))
    seen = grey.transform(images[0])
    assert seen.shape == (1, 32, 32)
    restored = seen * grey.description["std"][0] + grey.description["mean"][0]
    plain = from_timm_config({"mean": (0.0,) * 3, "std": (1.0,) * 3, "crop_pct": 1.0}, 32)
    expected = plain.transform(images[0].convert("L").convert("RGB"))[:1]
    assert torch.allclose(restored, expected, atol=1e-5)

    subject = resolve("timm:vit_tiny_patch16_224", pretrained=False, model_kwargs={**TINY, "in_chans": 1})
    found = analyze(subject, images, metrics=("patch-diversity", "weight-rank"), null_images=4)
    assert found.model["preprocess"]["greyscale"] is True
    assert np.isfinite(found.metrics["patch-diversity"].values).all()
    assert np.isfinite(found.metrics["weight-rank"].values).any()


def test_pictures_are_refused_by_a_model_of_other_channels_whose_own_batches_are_taken(photos):
    subject = resolve("timm:vit_tiny_patch16_224", pretrained=False, model_kwargs={**TINY, "in_chans": 13})
    with pytest.raises(DataError, match="takes images of 13 channels, and pictures have 3"):
        analyze(subject, photos)
    found = analyze(subject, [pixels(4, 13, 64, 64)], metrics=("patch-diversity", "weight-rank"))
    assert np.isfinite(found.metrics["patch-diversity"].values).all()
    assert found.gallery is None or found.gallery.pictures.shape[-1] == 3


def test_an_unreadable_batch_of_grey_pictures_has_their_shape(tmp_path):
    (tmp_path / "broken.png").write_bytes(b"no picture")
    grey = for_channels(from_timm_config({}, 32), 1)
    stream = batches(open_data(tmp_path), grey, batch_size=2, world=2, rank=0)
    assert [tuple(batch.pixels.shape) for batch in stream] == [(0, 1, 32, 32)]


# ---- types and devices ----


class IntegerFirst(nn.Module):
    def __init__(self):
        super().__init__()
        self.order = nn.Parameter(torch.arange(16), requires_grad=False)
        self.small = nn.Parameter(torch.zeros(2).to(torch.float8_e4m3fn), requires_grad=False)
        self.vit = vit()

    def forward(self, images):
        return self.vit(images)


def as_buffers(model):
    for module in list(model.modules()):
        for name, parameter in list(module._parameters.items()):
            if parameter is not None:
                del module._parameters[name]
                module.register_buffer(name, parameter.detach())
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_images_take_the_type_of_the_first_floating_point_parameter_or_buffer(dtype):
    model = IntegerFirst()
    model.vit.to(dtype)
    assert floating_like(model).dtype is dtype
    found = analyze(model, [pixels(4, 3, 64, 64)])
    assert found.run["dtype"] == str(dtype).removeprefix("torch.")
    assert np.isfinite(found.metrics["attention-entropy"].values).all()


def test_a_model_whose_weights_are_buffers_takes_images_in_their_type():
    frozen = as_buffers(vit().double())
    assert floating_like(frozen).dtype is torch.float64
    assert floating_like(nn.Identity()).dtype is torch.float32


def test_a_model_without_values_is_refused_and_stays_as_it_is():
    with torch.device("meta"):
        model = vit()
    model.train()
    with pytest.raises(ModelError, match="on the meta device, where its weights have no values"):
        analyze(model, [pixels(2, 3, 64, 64)])
    assert model.training
    assert next(model.parameters()).is_meta
    plain = vit()
    assert moved(plain, torch.device("cpu")) is plain


def test_a_subject_is_measured_in_eval_mode_and_left_in_train_mode():
    subject = resolve(vit(drop_rate=0.5, pos_drop_rate=0.5))
    expected = analyze(subject, [pixels(4, 3, 64, 64)]).summary
    subject.model.train()
    assert analyze(subject, [pixels(4, 3, 64, 64)]).summary == expected
    assert subject.model.training


def exported(model):
    return torch.export.export(model, (pixels(2, 3, 64, 64),)).module()


def traced(model):
    return torch.jit.trace(model, pixels(2, 3, 64, 64))


def frozen(model):
    return torch.jit.freeze(traced(model))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("made", "says"),
    [
        (torch.jit.script, "a TorchScript program"),
        (traced, "a TorchScript program"),
        (frozen, "a TorchScript program"),
        (exported, "an exported program"),
    ],
)
def test_a_program_without_modules_is_refused_in_one_sentence(made, says):
    program = made(vit())
    for verb in (analyze, functools.partial(cp.intervene, device="cpu"), lambda m, d: cp.compare([m, vit()], d, device="cpu")):
        with pytest.raises(ModelError, match=f"^'module:.*' is {says}, without the modules of the model"):
            verb(program, [pixels(2, 3, 64, 64)])


def test_a_model_sharded_by_fsdp2_is_measured_as_it_was(tmp_path):
    fully_shard = pytest.importorskip("torch.distributed.fsdp").fully_shard
    data = [pixels(4, 3, 64, 64)]
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
        model = vit()
        expected = analyze(model, data).summary
        for block in model.blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
        assert analyze(model, data).summary == expected
    finally:
        torch.distributed.destroy_process_group()
