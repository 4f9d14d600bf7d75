"""The images at both ends of the headline number as the page shows them: small pictures with name and value."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image

from collapse_probe.extremes import pictured
from collapse_probe.findings import Findings
from collapse_probe.sureness_tables import sides, words_of
from collapse_probe.words import number

QUALITY = 80


@dataclass(frozen=True)
class Shown:
    """One image: its name, its value, a data URL and the picture's size in pixels."""

    name: str
    value: str
    source: str
    width: int
    height: int


@dataclass(frozen=True)
class End:
    """One end of the number and its images, the outermost first."""

    title: str
    images: tuple[Shown, ...]


@dataclass(frozen=True)
class BothEnds:
    """The number in words, its two ends, and its median over how many images."""

    words: str
    ends: tuple[End, ...]
    median: str
    images: int


def both_ends(findings: Findings) -> BothEnds | None:
    """The images at the two ends that have a picture; None where the findings hold none."""
    chosen = pictured(findings.sureness.get("extremes") or {})
    if chosen is None or not findings.thumbnails:
        return None
    name, entry = chosen
    titles = zip(("highest", "lowest"), sides(entry), strict=True)
    ends = tuple(End(title[:1].upper() + title[1:], _shown(findings, entry[end])) for end, title in titles)
    words = words_of(name)
    return BothEnds(words[:1].upper() + words[1:], ends, number(entry["median"]), int(entry["images"]))


def _shown(findings: Findings, listed: Sequence[Mapping[str, Any]]) -> tuple[Shown, ...]:
    found = []
    for image in listed:
        pixels = findings.thumbnails.get(str(image["name"]))
        if pixels is None:
            continue
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "jpeg", quality=QUALITY, optimize=True)
        source = f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"
        height, width = pixels.shape[:2]
        found.append(Shown(str(image["name"]), number(image["value"]), source, width, height))
    return tuple(found)
