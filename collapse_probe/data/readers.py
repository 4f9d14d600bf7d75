"""What every reader of a data address gives, and how one picture is decoded."""

from __future__ import annotations

import contextlib
import re
import struct
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import IO, Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from collapse_probe.provenance import escaped

Skipped = tuple[str, str]  # name, reason
FEW = 10  # files that are left out for one reason and still named one by one

FORMATS = {  # what is read, by Pillow's names, and how such files are called; nothing that runs another program (EPS, PDF, WMF)
    "JPEG": ".jpg .jpeg .jpe .jfif",
    "PNG": ".png .apng",
    "WEBP": ".webp",
    "AVIF": ".avif .avifs",
    "GIF": ".gif",
    "BMP": ".bmp",
    "TIFF": ".tif .tiff",
    "JPEG2000": ".jp2 .j2k .jpc .jpf .jpx .j2c",
    "PPM": ".ppm .pgm .pbm .pnm .pfm",
}
SUFFIXES = frozenset(" ".join(FORMATS.values()).split())
EIGHT_BITS = frozenset(" ".join(FORMATS[name] for name in ("JPEG", "WEBP", "AVIF", "GIF", "BMP")).split())
HEAD = 32  # bytes that tell what a file is
PICTURE = re.compile(
    rb"\xff\xd8\xff|\x89PNG\r\n\x1a\n|GIF8[79]a|BM.{12}[\x0c\x28\x34\x38\x40\x6c\x7c]\0\0\0|II[*+]\0|MM\0[*+]|RIFF.{4}WEBP"
    rb"|.{4}ftypavi[fs]|\0\0\0\x0cjP  |\xffO\xffQ|P[1-6]\s+[\d#]|P[fF]\s+\d",
    re.DOTALL,
)
OF_SYSTEMS = frozenset(
    [
        "__macosx",
        "__pycache__",
        "@eadir",
        "#recycle",
        "#snapshot",
        "lost+found",
        "$recycle.bin",
        "recycler",
        "system volume information",
        "thumbs.db",
        "ehthumbs.db",
        "desktop.ini",
        "icon\r",
    ]
)
REMARK = "collapse-probe"  # where a decoded picture says what was done to it, in its `info`


class Unreadable(Exception):
    """Why one picture cannot be used, in words."""


class LeftOut:
    """Files that are not read, counted by reason; of each reason the first names."""

    def __init__(self) -> None:
        self.counts: dict[str, int] = {}
        self._first: dict[str, list[str]] = {}

    def add(self, name: str, reason: str) -> None:
        """One more file."""
        self.counts[reason] = self.counts.get(reason, 0) + 1
        first = self._first.setdefault(reason, [])
        if len(first) < FEW:
            first.append(escaped(name))

    def entries(self) -> list[Skipped]:
        """A name and a reason for each file; one for all of a reason that more than FEW share, which says how many."""
        return [
            (name if self.counts[reason] <= FEW else f"{self.counts[reason]:,} files, the first: {name}", reason)
            for reason, first in sorted(self._first.items())
            for name in (sorted(first) if self.counts[reason] <= FEW else first[:1])
        ]

    def notes(self) -> list[str]:
        """A sentence for each reason."""
        return [
            f"not read: {count:,} × {reason}, {'the first ' * (count > 1)}{self._first[reason][0]}"
            for reason, count in sorted(self.counts.items())
        ]


@dataclass(frozen=True)
class Pictures:
    """Names, class labels (or None) and a way to open: `open(i)` gives picture i, or raises.

    That is a stream of its encoded bytes, a PIL image, or a float tensor [channels, height, width] that needs no
    preprocessing; alone, or before its label. `bits` are those of greys of more than 8, where no picture is to be looked at for
    them; `shape` is that of such tensors, else None; `from_memory` says that other processes would not read them faster. `open`
    can be pickled, so that loader processes can have it. Without labels `class_names` is empty; with labels that are class
    numbers as they stand, too.
    """

    names: tuple[str, ...]
    open: Callable[[int], Any]
    labels: tuple[int, ...] | None = None
    class_names: tuple[str, ...] = ()
    bundled: bool = False
    left_out: LeftOut = field(default_factory=LeftOut)
    notes: tuple[str, ...] = ()
    bits: int | None = None
    shape: tuple[int, int, int] | None = None
    content_sha256: str | None = None
    from_memory: bool = False


def is_hidden(name: str) -> bool:
    """Whether a file or folder of this name is hidden, or an operating system's own."""
    return (name.startswith(".") and name not in (".", "..")) or name.lower() in OF_SYSTEMS


HIDDEN = "hidden, or the operating system's own"


def suffix_of(name: str) -> str:
    """The suffix of a file's name, in lower case; at a tenth of what pathlib needs, for there may be millions.

    >>> suffix_of("a.b/c.JPG"), suffix_of("a.b/c"), suffix_of(".hidden")
    ('.jpg', '', '')
    """
    stem, dot, end = name.rpartition("/")[2].rpartition(".")
    return f".{end.lower()}" if stem and dot and end else ""


def is_picture(head: bytes) -> bool:
    """Whether a file that begins so is a picture of one of FORMATS.

    >>> is_picture(b"GIF89a"), is_picture(b"%!PS-Adobe")
    (True, False)
    """
    return PICTURE.match(head) is not None


def no_picture(name: str) -> str:
    """Why a file that is no picture is left out; files of one suffix share the reason."""
    suffix = suffix_of(name)
    known = len(suffix) <= 9 and suffix[1:].isalnum() and suffix.isascii()
    return f"no picture of a format that is read ({suffix if known else 'no suffix'})"


def written(names: Iterable[str]) -> tuple[str, ...]:
    """The names as they are stored and shown, each another, see `escaped`."""
    taken: dict[str, None] = {}
    for name in names:
        plain, number = escaped(name), 1
        name = plain
        while name in taken:
            number += 1
            name = f"{plain} ({number})"
        taken[name] = None
    return tuple(taken)


def classes_of(
    names: Sequence[str], given: Mapping[str, str] | None = None
) -> tuple[tuple[int, ...] | None, tuple[str, ...], tuple[str, ...]]:
    """Labels by folder, the classes in timm's order (natural: 2 before 10), and notes.

    The class is the innermost folder; where that has one name for all pictures (`images`), the one above it, if those differ.
    `given` are the classes of some pictures by name. There are no labels unless every picture has a class.
    """
    from timm.utils.misc import natural_key

    known = given or {}
    folders = {name: name.split("/")[:-1] for name in names if name not in known}
    depth = 1
    while len({tuple(each[-depth:]) for each in folders.values()}) == 1 and all(len(f) > depth for f in folders.values()):
        depth += 1
    inner = next(iter(folders.values()))[-depth + 1 :] if folders and depth > 1 else []
    if len({each[-depth] for each in folders.values() if len(each) >= depth}) < 2:
        depth, inner = 1, []
    classes_by_name = {name: known[name] if name in known else "".join(folders[name][-depth:][:1]) for name in names}
    if not all(classes_by_name.values()):
        return None, (), ()
    classes = sorted(set(classes_by_name.values()), key=natural_key)
    index = {name: i for i, name in enumerate(classes)}
    above = f"an image's class is the folder above {'/'.join(inner)!r}, which is the same for all"
    notes = (above,) if inner else ()
    return tuple(index[classes_by_name[name]] for name in names), written(classes), notes


def most_pixels(max_pixels: int | None) -> int | None:
    """The most pixels that a picture may have: as given, or where Pillow itself stops (twice its MAX_IMAGE_PIXELS)."""
    if max_pixels is not None or Image.MAX_IMAGE_PIXELS is None:
        return max_pixels
    return 2 * Image.MAX_IMAGE_PIXELS


def opened(stream: IO[bytes], max_pixels: int | None = None) -> Image.Image:
    """The picture in a stream, its pixels not yet decoded; UnidentifiedImageError for what is none of FORMATS.

    As Image.open does it, whose limit of pixels can only be changed for the whole process. Raises Unreadable above the limit.
    """
    Image.init()
    head = stream.read(16)
    for name in FORMATS:
        factory, accept = Image.OPEN.get(name, (None, None))
        accepted = factory is not None and (accept is None or accept(head))
        if isinstance(accepted, str):  # this Pillow was built without it
            raise UnidentifiedImageError(accepted)
        if factory is None or not accepted:
            continue
        stream.seek(0)
        with contextlib.suppress(SyntaxError, IndexError, TypeError, struct.error):  # another format after all
            picture: Image.Image = factory(stream, "")
            pixels, most = picture.width * picture.height, most_pixels(max_pixels)
            if most is not None and pixels > most:
                way = "--max-pixels N (Python: max_pixels=N) allows more"
                raise Unreadable(f"it has {pixels:,} pixels, and the limit against decompression bombs is {most:,}; {way}")
            return picture
    raise UnidentifiedImageError(f"no picture that can be read ({', '.join(FORMATS)})")


def decode(stream: IO[bytes], max_pixels: int | None = None, bits: int = 8) -> Image.Image:
    """One picture as RGB, as timm and torchvision do it: convert("RGB"), no rotation by EXIF, alpha dropped.

    One difference: greys of more than 8 bits are scaled, see `rgb`, where convert("RGB") would clip them to white. What was
    done besides is in `info[REMARK]`. Raises what Pillow raises for a damaged or truncated picture, and Unreadable.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # odd metadata, pictures between Pillow's two limits
        picture = opened(stream, max_pixels)
        shortened = any(";16" in str(tile[-1]) for tile in getattr(picture, "tile", ())) and not is_deep(picture)
        whole = rgb(picture, bits)
        if shortened:
            dark = max(high for _, high in whole.getextrema()) < 64  # type: ignore[misc]  # a pair for each colour
            lost = ", which leaves it nearly black: it uses a small part of that range" if dark else ""
            whole.info[REMARK] = f"16 bits a colour, of which the upper 8 were read{lost}"
        elif picture.format not in ("JPEG", "MPO") and _has_frames(picture):
            whole.info[REMARK] = "several frames or pages, of which the first was read"
    return whole


def _has_frames(picture: Image.Image) -> bool:
    try:
        return bool(getattr(picture, "is_animated", False))
    except Exception:  # damaged behind the first frame; Pillow has no common base for its errors
        return True


def is_deep(picture: Image.Image) -> bool:
    """Whether a picture's greys have more than 8 bits."""
    return picture.mode in ("I", "F") or picture.mode.startswith("I;16")


def significant_bits(picture: Image.Image) -> int:
    """The fewest of 8, 10, 12, 14, 16, 24 and 32 bits that hold a picture's greys, or as many as a TIFF says that it has.

    Raises Unreadable for negative greys.
    """
    low, high = (int(value) for value in _greys_of(picture))
    if low < 0:
        raise Unreadable(f"its greys run from {low:,} to {high:,}, and negative ones have no place in a picture")
    stated = getattr(picture, "tag_v2", {}).get(258, (0,))[0]  # BitsPerSample
    return max(stated if stated < 16 else 0, next(bits for bits in (8, 10, 12, 14, 16, 24, 32) if high < 2**bits))


def _greys_of(picture: Image.Image) -> tuple[float, float]:
    values = np.asarray(picture)
    return float(values.min()), float(values.max())


def rgb(picture: Image.Image, bits: int = 8) -> Image.Image:
    """A picture as RGB. Greys of more than 8 bits are mapped from 0 … 2^b − 1 to 0 … 255, b the larger of `bits`, which all
    pictures of a set share, and `significant_bits`; floating-point ones from 0 … 1. Raises Unreadable for other greys.
    """
    if not is_deep(picture):
        return picture.convert("RGB")
    values = np.asarray(picture).astype(np.float32)
    if picture.mode == "F":
        if not (values.min() >= 0 and values.max() <= 1):
            came = f"{values.min():.6g} to {values.max():.6g}"
            raise Unreadable(f"its floating-point greys run from {came}; expected 0 … 1, or a picture of 8 or 16 bits")
        top, said = 1.0, "floating-point greys, 0 … 1 mapped to 0 … 255"
    else:
        top = 2.0 ** max(bits, significant_bits(picture)) - 1
        said = f"greys of more than 8 bits, 0 … {top:,.0f} mapped to 0 … 255"
    values *= 255 / top
    whole = Image.fromarray(np.rint(values, out=values).astype(np.uint8)).convert("RGB")
    whole.info[REMARK] = said
    return whole
