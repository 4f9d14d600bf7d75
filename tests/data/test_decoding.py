"""Deep greys, several frames and huge pictures are decoded by one rule, and what was done is said."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from collapse_probe.data.images import batches, open_data
from collapse_probe.data.preprocessing import from_timm_config
from collapse_probe.data.readers import REMARK, Unreadable, decode, is_picture, rgb
from collapse_probe.errors import SettingError

PREPROCESS = from_timm_config({"input_size": (3, 16, 16)})


def encoded(picture, kind="PNG", **settings):
    stream = io.BytesIO()
    picture.save(stream, kind, **settings)
    stream.seek(0)
    return stream


def ramp(top, dtype=np.uint16):
    return Image.fromarray(np.linspace(0, top, 64 * 64).reshape(64, 64).astype(dtype))


@pytest.mark.parametrize(("top", "kind"), [(1023, "PNG"), (4095, "PNG"), (4095, "TIFF"), (16383, "PNG"), (65535, "TIFF")])
def test_deep_greys_use_the_bits_that_they_have(top, kind):
    picture = decode(encoded(ramp(top), kind))
    seen = np.asarray(picture)
    assert (seen.min(), seen.max(), len(np.unique(seen))) == (0, 255, 256)
    assert picture.info[REMARK] == f"greys of more than 8 bits, 0 … {top:,} mapped to 0 … 255"


def test_all_deep_pictures_of_a_set_share_one_range(tmp_path):
    ramp(4095).save(tmp_path / "bright.png")
    ramp(500).save(tmp_path / "dark.png")
    Image.new("L", (64, 64), 200).save(tmp_path / "plain.png")
    images = open_data(tmp_path)
    assert images.bits == 12
    assert np.asarray(images[1]).max() == round(500 * 255 / 4095)
    assert open_data(tmp_path, limit=1, seed=3).bits == 12  # of all at the address, so that a draw reads alike
    (batch,) = batches(images, PREPROCESS, batch_size=4)
    assert batch.remarks == {"greys of more than 8 bits, 0 … 4,095 mapped to 0 … 255": 2}


def test_a_picture_deeper_than_those_looked_at_says_its_own_range(tmp_path, monkeypatch):
    monkeypatch.setattr("collapse_probe.data.images.LOOKED_AT", 1)
    ramp(4095).save(tmp_path / "0.png")
    ramp(65535).save(tmp_path / "1.png")
    (batch,) = batches(open_data(tmp_path), PREPROCESS, batch_size=4)
    assert batch.remarks == {
        "greys of more than 8 bits, 0 … 4,095 mapped to 0 … 255": 1,
        "greys of more than 8 bits, 0 … 65,535 mapped to 0 … 255": 1,
    }


def test_floating_point_greys_from_0_to_1_are_read_and_others_refused():
    assert np.asarray(decode(encoded(ramp(1, np.float32), "TIFF"))).max() == 255
    with pytest.raises(Unreadable, match=r"run from 0 to 255; expected 0 … 1"):
        decode(encoded(ramp(255, np.float32), "TIFF"))
    with pytest.raises(Unreadable, match="negative"):
        rgb(Image.fromarray(np.full((4, 4), -1, dtype=np.int32)))


def png16(values):
    """A PNG of 16 bits a colour [height, width, 3], which Pillow cannot write."""

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    height, width, _ = values.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    head = struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0)
    return io.BytesIO(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b""))


def test_sixteen_bit_colours_say_what_is_lost():
    values = np.random.default_rng(0).integers(0, 65536, (8, 8, 3)).astype(np.uint16)
    picture = decode(png16(values))
    assert np.array_equal(np.asarray(picture), values >> 8)
    assert picture.info[REMARK] == "16 bits a colour, of which the upper 8 were read"
    assert decode(png16(values >> 4)).info[REMARK].endswith("nearly black: it uses a small part of that range")


@pytest.mark.parametrize("kind", ["GIF", "TIFF", "WEBP", "PNG"])
def test_of_several_frames_the_first_is_read_and_said(kind):
    frames = [Image.new("RGB", (8, 6), colour) for colour in ("red", "blue")]
    picture = decode(encoded(frames[0], kind, save_all=True, append_images=frames[1:]))
    assert picture.info[REMARK] == "several frames or pages, of which the first was read"
    assert picture.getpixel((0, 0))[0] > 200
    assert REMARK not in decode(encoded(frames[0], kind)).info


def test_the_limit_of_pixels_is_the_caller_s_and_no_global_switch(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    Image.new("RGB", (50, 50)).save(tmp_path / "large.png")
    Image.new("RGB", (40, 40)).save(tmp_path / "between.png")
    images = open_data(tmp_path)
    (batch,) = batches(images, PREPROCESS, batch_size=4)
    assert batch.names == ("between.png",)
    assert "2,500 pixels, and the limit against decompression bombs is 2,000" in batch.skipped[0][1]
    (allowed,) = batches(open_data(tmp_path, max_pixels=2500, limit=2), PREPROCESS, batch_size=4, workers=1)
    assert allowed.names == ("between.png", "large.png")
    (strict,) = batches(open_data(tmp_path, max_pixels=1600), PREPROCESS, batch_size=4)
    assert strict.names == ("between.png",)
    assert Image.MAX_IMAGE_PIXELS == 1000
    with pytest.raises(SettingError, match="max_pixels"):
        open_data(tmp_path, max_pixels=0)


@pytest.mark.parametrize(
    "text", [b"", b"Python is a language", b"P5 students", b"BM: words of some length, no picture", b"%PDF"]
)
def test_words_are_no_picture(text):
    assert not is_picture(text)
