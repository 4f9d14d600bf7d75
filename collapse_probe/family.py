"""How one family of metrics is told to a reader: title, unit, scale, what its variants are and what it does not say."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from collapse_probe.captions import Caption

ROWS, CENTRED = "by rows: where one query looks", "centred: each vector's mean taken off"
PROBS, PATCHES, WITH_PREFIX = "of the softmax (probs)", "without prefix tokens", "with prefix tokens"
ONE_HEAD = "rows of one head (q, k, v)"
BESIDE_TWIN = "The grey dashed line is the untrained twin, the same architecture with fresh weights."
DOTS = f"One dot for each head; the line is the mean over heads with its 95 % interval over images. {BESIDE_TWIN}"
CURVE = f"The line is the mean over images with its 95 % interval. {BESIDE_TWIN}"
MATRICES = "No interval is drawn in a matrix; they are in findings.json."


@dataclass(frozen=True)
class Family:
    """The words and the scale of one metric with all its variants.

    `level` is attention, tokens or weights; `plain` the title of the panel of the metric without suffix, `variants` those of
    its suffixes. `unit` stands at the axis (`units` where a suffix changes it), `top` is the least upper end of the scale (of
    `unit` alone). `reference` names a setting with a reference line, and says what that is.
    """

    caption: Caption
    level: str
    plain: str
    unit: str
    variants: Mapping[str, str] = field(default_factory=dict)
    units: Mapping[str, str] = field(default_factory=dict)
    top: float | None = None
    logarithmic: bool = False
    reference: tuple[str, str] | None = None

    def panel(self, name: str) -> str:
        """The title of the panel of metric `name`: what its suffixes change."""
        _, *suffixes = name.split("@")
        return "; ".join(self.variants.get(suffix, suffix) for suffix in suffixes) or self.plain

    def unit_of(self, name: str) -> str:
        """The unit of metric `name`."""
        return next((self.units[suffix] for suffix in name.split("@")[1:] if suffix in self.units), self.unit)


SIMILARITY = {"row": ROWS, "centred": CENTRED, "probs": PROBS, "patches": PATCHES}


def other_readings(title: str, seen: str = "") -> Caption:
    """The caption of the variants of a metric whose plain reading is drawn elsewhere on the page."""
    limits = "No reading is the true one: where they disagree, the number depends on a choice that papers leave open."
    return Caption(f"Other readings: {title}", seen or "The metric with other settings, named above each panel.", limits)
