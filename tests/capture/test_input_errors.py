"""A model that does not run on images is refused by what differs, and only what is about the size speaks of the size."""

import pytest
import timm
import torch
from torch import nn

import collapse_probe as cp
from collapse_probe.capture.capture import discover_plan
from collapse_probe.errors import ModelError

SIZE = "img_size"
RECORD = "collapse_probe.record"


def tiny(**settings):
    made = {"img_size": 32, "depth": 2, "embed_dim": 24, "num_heads": 2, "num_classes": 4, **settings}
    return timm.create_model("vit_tiny_patch16_224", **made)


class Wrapped(nn.Module):
    def __init__(self, **settings):
        super().__init__()
        self.vit = tiny(**settings)


class TakesDict(Wrapped):
    def forward(self, batch):
        return self.vit(batch["image"])


class TakesObject(Wrapped):
    def forward(self, batch):
        return self.vit(batch.pixels)


class TakesTwo(Wrapped):
    def forward(self, image, age):
        return self.vit(image) + age


class TakesKeyword(Wrapped):
    def forward(self, image, *, age):
        return self.vit(image) + age


class TakesNothing(Wrapped):
    def encode_image(self, image):
        return self.vit(image)


class TakesWords(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(9, 8)

    def forward(self, ids):
        return self.embed(ids)


class TakesFilms(nn.Module):
    def forward(self, film):
        _, frames, _, _, _ = film.shape
        return film * frames


class Picky(nn.Module):
    def forward(self, image):
        raise RuntimeError("I do not feel like it")


class Mixed(Wrapped):
    def forward(self, image):
        return self.vit(image.half())


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        (TakesDict, "the model treats it as something else"),
        (TakesObject, "the model treats it as something else"),
        (TakesTwo, "TakesTwo.forward needs image, age, and the probe gives images alone"),
        (TakesKeyword, "TakesKeyword.forward needs image, age, and the probe gives images alone"),
        (TakesWords, "the model treats it as something else"),
        (TakesFilms, "the images have 4 dimensions"),
        (Picky, "I do not feel like it"),
    ],
)
def test_a_model_of_something_else_is_offered_a_recording(kind, says):
    with pytest.raises(ModelError) as caught:
        discover_plan(kind().eval(), (32, 32))
    text = str(caught.value)
    assert says in text
    assert RECORD in text
    assert SIZE not in text
    assert "\n" not in text


def test_a_model_without_forward_names_its_parts():
    with pytest.raises(ModelError, match=r"TakesNothing has no forward .*\(its parts: vit\)") as caught:
        discover_plan(TakesNothing().eval(), (32, 32))
    assert SIZE not in str(caught.value)


def test_an_error_about_the_size_speaks_of_the_size():
    with pytest.raises(ModelError, match=r"failed on noise images \[2, 3, 64, 64\] .*64 × 64 pixels: .* give img_size"):
        discover_plan(tiny().eval(), (64, 64))


def test_an_error_about_channels_speaks_of_channels():
    with pytest.raises(ModelError, match=r"the images have 3 channels") as caught:
        discover_plan(tiny(in_chans=5).eval(), (32, 32))
    assert SIZE not in str(caught.value)


def test_an_error_about_types_speaks_of_types():
    with pytest.raises(ModelError, match=r"the images are torch.float32") as caught:
        discover_plan(Mixed().eval(), (32, 32))
    assert SIZE not in str(caught.value)


def test_what_the_message_offers_works():
    model = TakesTwo().eval()
    with torch.no_grad(), cp.record(model) as recording:
        model(torch.randn(2, 3, 32, 32), torch.ones(2, 1))
    assert len(recording.last.plan.blocks) == 2
