"""Damaged pictures of every format that Pillow writes: read as Pillow reads them, or left out by name with a reason."""

from __future__ import annotations

import contextlib
import io
import resource
import struct
import zlib
from pathlib import Path
from random import Random

import numpy as np
import torch
from fuzz_trials import READ, SKIPPED, Kind, mutated
from PIL import Image
from torchvision.transforms import Compose, Resize, ToTensor

from collapse_probe.data.images import batches, open_data
from collapse_probe.data.preprocessing import Preprocess
from collapse_probe.data.readers import FORMATS, is_deep

PREPROCESS = Preprocess(Compose([Resize((32, 32)), ToTensor()]), (32, 32), {})
MODES = ("RGB", "L", "P", "1", "RGBA", "CMYK", "I;16", "I", "F", "LA")
MOST_PIXELS, MOST_KIB = 2_000_000, 200_000
GOOD, SIDES, BOMB = "good.png", (32, 24), (2000, 1500)


def pictures(_: Path) -> list[tuple[str, bytes]]:
    """A suffix and the bytes for every format and mode that this Pillow writes; animations too."""
    Image.init()
    suffixes = {form: suffix for suffix, form in reversed(Image.registered_extensions().items())}
    noise = np.random.default_rng(0).integers(0, 256, (*SIDES[::-1], 3), dtype=np.uint8)
    picture, found = Image.fromarray(noise), []
    for form in sorted(set(Image.SAVE) & set(suffixes)):
        for mode in MODES:
            for more in ({}, {"save_all": True, "append_images": [picture.rotate(90)]}):
                stream = io.BytesIO()
                try:
                    made = picture.convert("L").convert(mode) if mode[0] in "IF" else picture.convert(mode)
                    made.save(stream, form, **(more if form in Image.SAVE_ALL else {}))
                except Exception:  # a format that does not take the mode
                    continue
                found.append((suffixes[form], stream.getvalue()))
        stream = io.BytesIO()
        with contextlib.suppress(Exception):
            Image.new("L", BOMB).save(stream, form)
            found.append((suffixes[form], stream.getvalue()))
    assert {Image.registered_extensions()[suffix] for suffix, _ in found} >= set(FORMATS) - {"AVIF", "WEBP", "JPEG2000"}
    return list(dict.fromkeys(found))


def _resized(random: Random, content: bytes) -> bytes:
    """The content with another width or height where its header seems to have one; the checksum of a PNG's fits."""
    data = bytearray(content)
    for form in random.sample((">I", "<I", ">H", "<H", "B"), 5):
        at = content.find(struct.pack(form, random.choice(SIDES)), 0, 256)
        if at >= 0:
            size = random.choice((0, 1, 23, 255, 1500, 12000, 65535, 2**31 - 1))
            data[at : at + struct.calcsize(form)] = struct.pack(form, size % 256 ** struct.calcsize(form))
            break
    if content.startswith(b"\x89PNG"):
        data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    return bytes(data)


def trial(random: Random, folder: Path, made: list[tuple[str, bytes]]) -> str:
    """One damaged picture beside a good one."""
    suffix, content = random.choice(made)
    name = "bad" + random.choice((suffix, suffix, suffix, random.choice(made)[0], ""))
    content = _resized(random, content) if random.random() < 0.2 else content
    content = mutated(random, content, random.choice(made)[1]) if random.random() < 0.9 else content
    (folder / name).write_bytes(content)
    Image.new("RGB", (8, 8), "red").save(folder / GOOD)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    images = open_data(folder, max_pixels=MOST_PIXELS)
    came = list(batches(images, PREPROCESS, batch_size=2))
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < MOST_KIB, f"took {grown} KiB"
    rows = {name: pixels for batch in came for name, pixels in zip(batch.names, batch.pixels, strict=True)}
    skipped = dict(pair for batch in came for pair in batch.skipped)
    left = dict(images.left_out.entries())
    assert sorted([*rows, *skipped, *left]) == sorted([GOOD, name]), f"{[*rows]} read, {skipped} skipped, {left} left out"
    assert GOOD in rows
    assert all(reason.strip() and "\n" not in reason for reason in (*skipped.values(), *left.values()))
    if name not in rows:
        return SKIPPED
    assert rows[name].shape == (3, 32, 32)
    assert bool(rows[name].isfinite().all())
    with Image.open(io.BytesIO(content), formats=list(FORMATS)) as plain:
        assert plain.width * plain.height <= MOST_PIXELS, f"{plain.size} pixels are read"
        if not is_deep(plain):
            assert torch.equal(PREPROCESS.pixels_of(plain.convert("RGB")), rows[name]), "other pixels than Pillow's"
    return READ


KIND = Kind(3000, pictures, trial)
