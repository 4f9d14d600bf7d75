"""An address becomes a model in eval mode with its own preprocessing, or one line that says why not."""

import sys
import time

import numpy as np
import pytest
import timm
import torch
from PIL import Image, ImageDraw
from torch import nn

from collapse_probe.capture.capture import discover_plan
from collapse_probe.data.preprocessing import Preprocess
from collapse_probe.errors import CheckpointError, ModelError, SettingError, UnknownNameError
from collapse_probe.models.deepvit import FAMILY
from collapse_probe.models.loading import ImageTower, resolve
from collapse_probe.models.sources.ours import bundled_models
from collapse_probe.registry import SOURCES

TINY = {"depth": 2, "embed_dim": 24, "num_heads": 3, "num_classes": 4}
NAME = "vit_tiny_patch16_224"


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def tiny(address=NAME, **settings):
    return resolve(address, **{"pretrained": False, "img_size": 32, "model_kwargs": TINY, **settings})


def picture(width=50, height=40):
    values = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values)


def answer(subject):
    pixels = subject.preprocess.transform(picture())
    assert tuple(pixels.shape) == (3, *subject.preprocess.size)
    assert pixels.dtype == torch.float32
    with torch.no_grad():
        return subject.model(pixels[None])


def same(one, other):
    pairs = zip(one.state_dict().values(), other.state_dict().values(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


def one_line(caught):
    assert "\n" not in str(caught.value)
    return str(caught.value)


# the table


def test_the_places():
    assert {
        "timm",
        "torchvision",
        "hf-hub",
        "local-dir",
        "import",
        "module",
        "ours",
        "hf",
        "open_clip",
    } == set(SOURCES)


@pytest.mark.parametrize("scheme", ["timm", "torchvision", "ours"])
def test_names_can_be_listed_and_are_known(scheme):
    source = SOURCES[scheme]
    names = source.names()
    assert all(source.has(name) for name in names[:: max(1, len(names) // 20)])
    assert not source.has("no_such_model")
    assert set(source.names("vit_b*")) == {name for name in names if name.startswith("vit_b")}


@pytest.mark.parametrize(
    ("address", "source", "name"),
    [
        (NAME, "timm", NAME),
        (f"timm:{NAME}.augreg_in21k_ft_in1k", "timm", f"{NAME}.augreg_in21k_ft_in1k"),
    ],
)
def test_where_a_timm_name_leads(address, source, name):
    subject = tiny(address)
    assert (subject.address, subject.source, subject.name) == (address, source, name)
    assert answer(subject).shape == (1, 4)
    assert not subject.model.training


def test_a_name_of_both_libraries_is_torchvisions_and_a_scheme_overrides():
    assert resolve("resnet18", pretrained=False).source == "torchvision"
    assert resolve("timm:resnet18", pretrained=False).source == "timm"


def test_our_own_names_come_first():
    names = SOURCES["ours"].names("deepvit_*")
    assert names
    subject = resolve(names[-1], pretrained=False, img_size=32)
    assert (subject.source, subject.name) == ("ours", names[-1])
    assert resolve(f"ours:{names[-1]}", pretrained=False, img_size=32).source == "ours"


def test_our_names_are_the_family_and_the_bundled_models():
    assert SOURCES["ours"].names() == sorted([*FAMILY, *bundled_models()])
    assert set(FAMILY) <= set(timm.list_models())
    with pytest.raises(UnknownNameError, match="'deepvit_x' in 'ours'"):
        resolve("ours:deepvit_x")


# fresh parameters


def test_fresh_weights_follow_the_seed_and_leave_the_global_generator_alone():
    torch.manual_seed(3)
    before = torch.get_rng_state()
    zero, again, one = tiny(), tiny(seed=0), tiny(seed=1)
    assert torch.equal(before, torch.get_rng_state())
    assert same(zero.model, again.model)
    assert not same(zero.model, one.model)
    assert (zero.weights, one.weights) == ("random (seed 0)", "random (seed 1)")


def test_a_fresh_twin_has_the_same_architecture_and_its_own_weights():
    subject = tiny()
    before = torch.get_rng_state()
    twin = subject.fresh(5)
    assert torch.equal(before, torch.get_rng_state())
    assert not twin.training
    shapes = [tensor.shape for tensor in twin.state_dict().values()]
    assert shapes == [tensor.shape for tensor in subject.model.state_dict().values()]
    assert not same(twin, subject.model)
    assert same(twin, subject.fresh(5))
    assert same(subject.fresh(0), subject.model)


# sizes


@pytest.mark.parametrize("size", [64, (64, 96), [96, 64]])
@pytest.mark.parametrize(
    ("address", "kwargs"),
    [
        ("torchvision:swin_t", {}),
        ("timm:pvt_v2_b0", {"depths": (1, 1, 1, 1)}),
        ("timm:davit_tiny", {"depths": (1, 1), "embed_dims": (16, 32), "num_heads": (1, 2)}),
        ("timm:vit_tiny_patch16_224", TINY),
    ],
)
def test_a_model_that_takes_any_size_is_given_it(address, kwargs, size):
    subject = resolve(address, pretrained=False, model_kwargs=kwargs, img_size=size)
    assert subject.preprocess.size == ((64, 64) if size == 64 else tuple(size))
    assert answer(subject).shape[0] == 1


def test_a_rectangle_is_cut_without_distorting_the_picture():
    subject = resolve("torchvision:swin_t", pretrained=False, img_size=(64, 96))
    wheel = Image.new("L", (400, 400))
    ImageDraw.Draw(wheel).ellipse((170, 170, 230, 230), fill=255)
    seen = subject.preprocess.transform(wheel.convert("RGB"))[0] > 0
    rows, columns = seen.any(1).sum(), seen.any(0).sum()
    assert rows > 5
    assert abs(rows - columns) <= 1


@pytest.mark.parametrize("size", [0, -3, (64,), (64, 0), "large", 2.5, (1, 2, 3)])
def test_what_is_no_size_is_refused(size):
    with pytest.raises(SettingError, match=r"img_size is a number of pixels above 0, or \(height, width\), not"):
        tiny(img_size=size)


# preprocessing


def test_preprocessing_is_timms_own():
    from timm.data import create_transform, resolve_model_data_config

    subject = tiny()
    config = resolve_model_data_config(subject.model, args={"img_size": 32})
    expected = create_transform(**config, is_training=False)(picture())
    assert torch.equal(subject.preprocess.transform(picture()), expected)
    assert subject.preprocess.size == (32, 32)
    assert subject.preprocess.description == {
        "size": [32, 32],
        "resize": 35,
        "crop_mode": "center",
        "crop_pct": 0.9,
        "interpolation": "bicubic",
        "mean": [0.5, 0.5, 0.5],
        "std": [0.5, 0.5, 0.5],
    }


def test_preprocessing_is_that_of_torchvisions_weights_also_without_them():
    from torchvision.models import Swin_T_Weights

    subject = resolve("swin_t", pretrained=False)
    expected = Swin_T_Weights.DEFAULT.transforms()(picture())
    assert torch.equal(subject.preprocess.transform(picture()), expected)
    assert subject.preprocess.size == (224, 224)
    assert subject.preprocess.description["resize"] == 232
    assert subject.preprocess.description["interpolation"] == "bicubic"


def test_torchvision_at_another_size():
    subject = resolve("vit_b_32", pretrained=False, img_size=64)
    assert subject.model.image_size == 64
    assert subject.preprocess.description["resize"] == 73
    assert answer(subject).shape == (1, 1000)


def test_torchvisions_tag_chooses_size_and_preprocessing():
    subject = resolve("torchvision:vit_b_16.IMAGENET1K_SWAG_E2E_V1", pretrained=False)
    assert subject.model.image_size == 384
    assert subject.preprocess.size == (384, 384)


def test_torchvision_weights_at_another_size_are_interpolated(monkeypatch, tmp_path):
    from torchvision.models import ViT_B_32_Weights, vit_b_32

    state = vit_b_32().state_dict()
    monkeypatch.setattr(ViT_B_32_Weights, "get_state_dict", lambda *_, **__: dict(state))
    monkeypatch.setattr("collapse_probe.models.sources.torchvision.check_url", lambda *_: None)
    subject = resolve("vit_b_32", img_size=64)
    assert subject.weights == "IMAGENET1K_V1"
    assert torch.equal(subject.model.conv_proj.weight, state["conv_proj.weight"])
    assert subject.model.encoder.pos_embedding.shape == (1, 5, 768)


# weights


def test_weights_that_cannot_be_fetched_fail_fast_in_one_line(monkeypatch, tmp_path):
    import huggingface_hub.constants

    monkeypatch.setattr("collapse_probe.downloads._hub_answers", lambda _: False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    start = time.monotonic()
    for address in (NAME, "hf-hub:timm/no_such", "hf:google/no-such-model"):
        with pytest.raises(ModelError, match=r"no network.*--no-pretrained.*--checkpoint") as caught:
            resolve(address)
        one_line(caught)
    assert time.monotonic() - start < 20
    assert huggingface_hub.constants.HF_HUB_OFFLINE is False


def test_torchvisions_weights_that_cannot_be_fetched(monkeypatch, tmp_path):
    import urllib.error

    def silent(*_args, **_settings):
        raise urllib.error.URLError("Name or service not known")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr("urllib.request.urlopen", silent)
    with pytest.raises(ModelError, match=r"no network: Name or.*--no-pretrained.*--checkpoint") as caught:
        resolve("vit_b_32")
    one_line(caught)


def test_a_model_without_published_weights_says_so():
    with pytest.raises(ModelError, match=r"no trained weights.*--no-pretrained"):
        resolve("timm:vit_base_patch16_gap_224")


def test_a_checkpoint_replaces_published_weights(tmp_path):
    trained = tiny(seed=9).model
    torch.save({"state_dict": {f"module.{k}": v for k, v in trained.state_dict().items()}}, tmp_path / "a.pth.tar")
    subject = tiny(pretrained=None, checkpoint=tmp_path / "a.pth.tar")
    assert same(subject.model, trained)
    assert subject.weights == "checkpoint"
    assert subject.checkpoint == str(tmp_path / "a.pth.tar")
    assert len(subject.checkpoint_sha256) == 64
    assert not same(subject.fresh(0), trained)


def test_a_checkpoint_of_another_model_is_refused_unless_partial(tmp_path):
    torch.save(tiny(model_kwargs={**TINY, "num_classes": 7}).model.state_dict(), tmp_path / "a.pth")
    with pytest.raises(CheckpointError, match=r"2 of another shape \(head.weight"):
        tiny(checkpoint=tmp_path / "a.pth")
    subject = tiny(checkpoint=tmp_path / "a.pth", partial=True)
    assert subject.weights == "checkpoint in part, over random (seed 0)"
    assert any("in part" in note for note in subject.notes)


# what cannot be made


@pytest.mark.parametrize(
    ("address", "nearest"),
    [
        ("vit_b32", "'vit_b_32'"),
        ("vit_tiny_patch16_225", f"'{NAME}'"),
        ("timm:vit_b_32", "'torchvision:vit_b_32'"),
        ("torchvision:vit_b32", "'torchvision:vit_b_32'"),
        (f"timm:{NAME}.no_such_tag", f"'timm:{NAME}'"),
        ("google/vit-base-patch16-224", "'hf:google/vit-base-patch16-224'"),
        ("tim:vit_b_32", "'timm'"),
        ("qqqqqqqqq", "ls models"),
        ("import:torch.nn:NoSuch", "no callable"),
    ],
)
def test_an_unknown_name_answers_with_the_nearest(address, nearest):
    with pytest.raises(UnknownNameError) as caught:
        resolve(address)
    assert nearest in one_line(caught)


@pytest.mark.parametrize(
    ("address", "settings", "message"),
    [
        ("maxvit_t", {"img_size": 100, "model_kwargs": {}}, "'maxvit_t' with img_size=100: .*not divisible by"),
        ("vit_b_32", {"img_size": (64, 96), "model_kwargs": {}}, "vit_b_32 takes square images, not 64 × 96"),
        (NAME, {"img_size": 40}, "img_size 40 is not a multiple of the model's patch size 16"),
        (NAME, {"model_kwargs": {"no_such_setting": 1}}, "with no_such_setting=1"),
        ("local-dir:/no/such/folder", {}, "no folder /no/such/folder"),
        ("hf:/no/such/folder", {}, "no folder /no/such/folder"),
        ("import:torch.nn", {}, "reads import:package.module:callable"),
        ("import:no_such_package:Model", {}, "cannot import 'no_such_package'"),
        ("import:builtins:dict", {"model_kwargs": {}}, "must return a torch nn.Module, not dict"),
    ],
)
def test_what_cannot_be_made_is_one_line(address, settings, message):
    with pytest.raises(ModelError, match=message) as caught:
        tiny(address, **settings)
    one_line(caught)


def test_a_size_below_one_is_refused():
    with pytest.raises(SettingError):
        tiny(img_size=0)


# the user's own models


class Own(nn.Module):
    def __init__(self, width=6):
        super().__init__()
        self.layer = nn.Linear(3, width)

    def forward(self, pixels):
        return self.layer(pixels.mean((2, 3)))


def constant(pretrained=True):
    model = Own()
    nn.init.constant_(model.layer.weight, 1.0 if pretrained else 2.0)
    nn.init.zeros_(model.layer.bias)
    return model


@pytest.fixture
def importable(monkeypatch, tmp_path):
    (tmp_path / "their_models.py").write_text(
        f"import sys\nOwn = sys.modules[{__name__!r}].Own\nconstant = sys.modules[{__name__!r}].constant\n"
    )
    monkeypatch.setitem(sys.modules, __name__, sys.modules[Own.__module__])
    monkeypatch.chdir(tmp_path)
    yield
    sys.modules.pop("their_models", None)


@pytest.mark.usefixtures("importable")
def test_an_import_address_calls_the_users_class():
    path = list(sys.path)
    subject = resolve("import:their_models:Own", model_kwargs={"width": 9}, seed=1)
    assert sys.path == path
    assert answer(subject).shape == (1, 9)
    assert subject.source == "import"
    assert subject.weights == "as their_models:Own made them"
    assert same(subject.fresh(1), subject.model)
    assert not same(subject.fresh(2), subject.model)
    assert subject.preprocess.size == (224, 224)
    assert "ImageNet mean and std" in subject.notes[0]


@pytest.mark.usefixtures("importable")
def test_a_callable_that_always_makes_the_same_weights_has_no_untrained_twin():
    subject = resolve("import:their_models:constant")
    assert bool((subject.model.layer.weight == 1.0).all())
    with pytest.raises(ModelError, match="no untrained copy"):
        subject.fresh(0)
    assert bool((resolve("import:their_models:constant", pretrained=False).model.layer.weight == 2.0).all())


def test_a_plain_module_is_taken_as_it_is():
    model = Own().train()
    subject = resolve(model, img_size=48)
    assert subject.model is model
    assert not model.training
    assert subject.fresh is None
    assert (subject.source, subject.name, subject.weights) == ("module", "Own", "as given")
    assert subject.preprocess.size == (48, 48)


def test_wrappers_come_off():
    model = Own()
    assert resolve(torch.compile(model)).model is model
    assert resolve(nn.DataParallel(model)).model is model
    assert resolve(nn.DataParallel(torch.compile(model))).model is model


def test_a_plain_module_with_settings_for_a_constructor_is_refused():
    with pytest.raises(ModelError, match="already made"):
        resolve(Own(), model_kwargs={"width": 3})


def test_a_modules_own_preprocessing_is_used():
    model = Own()
    model.preprocess = lambda image: torch.full((3, 8, 16), float(image.width))
    subject = resolve(model)
    assert subject.preprocess.size == (8, 16)
    assert subject.notes == ()
    model.preprocess = Preprocess(model.preprocess, (8, 16), {"mine": True})
    assert resolve(model).preprocess is model.preprocess


def test_a_modules_preprocessing_that_gives_no_image_is_refused():
    model = Own()
    model.preprocess = lambda image: torch.zeros(4)
    with pytest.raises(ModelError, match=r"float tensor \[channels, height, width\], not torch.float32 \[4\]"):
        resolve(model)


def test_a_timm_model_made_elsewhere_keeps_its_config_and_its_size():
    model = tiny().model
    subject = resolve(model)
    assert subject.preprocess.size == (32, 32)
    assert subject.preprocess.description["mean"] == [0.5, 0.5, 0.5]
    assert subject.notes == ()


# other libraries


def test_timms_local_dir(tmp_path):
    from timm.models._hub import save_for_hf

    model = tiny().model
    save_for_hf(model, str(tmp_path), model_args={**TINY, "img_size": 32})
    subject = resolve(f"local-dir:{tmp_path}")
    assert subject.source == "local-dir"
    assert same(subject.model, model)
    assert subject.weights == str(tmp_path)
    assert not same(subject.fresh(1), model)


@pytest.fixture(scope="module")
def saved_vit(tmp_path_factory):
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("vit")
    config = transformers.ViTConfig(
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        image_size=32,
        patch_size=8,
        num_labels=5,
    )
    model = transformers.ViTForImageClassification(config).eval()
    model.save_pretrained(folder)
    return folder, model


def test_a_transformers_folder(saved_vit, capsys):
    folder, model = saved_vit
    capsys.readouterr()
    subject = resolve(f"hf:{folder}")
    assert capsys.readouterr() == ("", "")
    assert isinstance(subject.model, ImageTower)
    pixels = subject.preprocess.transform(picture())[None]
    with torch.no_grad():
        assert torch.allclose(subject.model(pixels), model(pixels).logits, atol=1e-6)
    assert subject.preprocess.size == (32, 32)
    assert "no image processor" in subject.notes[0]
    assert not same(subject.fresh(1).wrapped, model)
    fresh = resolve(f"hf:{folder}", pretrained=False, model_kwargs={"num_hidden_layers": 1})
    assert len(fresh.model.state_dict()) < len(subject.model.state_dict())
    assert fresh.weights == "random (seed 0)"
    torch.save(model.state_dict(), folder / "own.pth")
    loaded = resolve(f"hf:{folder}", checkpoint=folder / "own.pth")
    assert same(loaded.model.wrapped, model)


def test_a_transformers_folder_with_its_processor(saved_vit):
    import transformers

    folder, _ = saved_vit
    processor = transformers.ViTImageProcessor(size={"height": 32, "width": 32}, image_mean=[0.1, 0.2, 0.3])
    processor.save_pretrained(folder)
    subject = resolve(f"hf:{folder}")
    assert subject.notes == ()
    assert subject.preprocess.description["mean"] == [0.1, 0.2, 0.3]
    expected = processor(images=picture(), return_tensors="pt")["pixel_values"][0]
    assert torch.allclose(subject.preprocess.transform(picture()), expected, atol=1e-6)
    larger = resolve(f"hf:{folder}", img_size=48)
    assert answer(larger).shape == (1, 5)


def test_open_clip_missing_names_the_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "open_clip", None)
    with pytest.raises(ModelError, match="pip install open_clip_torch") as caught:
        resolve("open_clip:ViT-B-32", pretrained=False)
    one_line(caught)
    assert SOURCES["open_clip"].names() == []


def test_transformers_missing_names_the_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ModelError, match="pip install transformers"):
        resolve("hf:google/vit-base-patch16-224")


def test_a_module_for_rectangular_images_gets_rectangular_images():
    model = timm.create_model(NAME, **TINY, img_size=(32, 64))
    by_name = resolve(f"timm:{NAME}", pretrained=False, model_kwargs={**TINY, "img_size": (32, 64)})
    for subject in (resolve(model), by_name):
        assert subject.preprocess.size == (32, 64)
        assert subject.preprocess.transform(Image.new("RGB", (90, 70))).shape == (3, 32, 64)
        assert discover_plan(subject.model, subject.preprocess.size).image_size == (32, 64)


@pytest.mark.parametrize(
    ("kwargs", "size", "shape"),
    [
        ({"image_size": 48}, None, (3, 48, 48)),
        ({"image_size": (32, 64), "channels": 1}, None, (1, 32, 64)),
        ({"channels": 13}, 64, (13, 64, 64)),
    ],
)
def test_an_imported_models_size_and_channels_are_those_of_its_arguments(kwargs, size, shape):
    pytest.importorskip("vit_pytorch")
    own = {"patch_size": 16, "num_classes": 4, "dim": 16, "depth": 2, "heads": 2, "mlp_dim": 16}
    subject = resolve("import:vit_pytorch:ViT", model_kwargs={**own, **kwargs}, img_size=size)
    assert (subject.preprocess.channels, *subject.preprocess.size) == shape
    plan = discover_plan(subject.model, subject.preprocess.size, subject.preprocess.channels)
    assert plan.tokens == 1 + shape[1] * shape[2] // 256
