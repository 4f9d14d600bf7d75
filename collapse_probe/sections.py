"""Which figure stands in which section of the page, and under which words."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace

from collapse_probe.captions import CAPTIONS, TESTED_PAIRS, Caption
from collapse_probe.families import family_of
from collapse_probe.family import other_readings
from collapse_probe.family_figures import family_figures
from collapse_probe.findings import Findings
from collapse_probe.permutation import LEVEL, SHOWN, pairs_tested
from collapse_probe.readings import held, null

TITLES = {
    "attention": "More about the attention maps",
    "tokens": "More about the tokens",
    "weights": "The weights",
    "other": "Other metrics",
    "sure": "How sure",
}
FIRST = "Pictures"
LEVELS = {
    "rollout-gallery": "attention",
    "token-norm-places": "tokens",
    "weights": "weights",
    "weights-depth": "weights",
    "convergence": "sure",
}
"""Figures of their own that stand under their level; all others come first."""
FOLLOWS = {"attention-rollout": "rollout-gallery", "token-norm": "token-norm-places"}


@dataclass(frozen=True)
class Section:
    """A heading, its figures, and those that a reader must open."""

    title: str
    figures: tuple[str, ...]
    aside: tuple[str, ...]

    @property
    def anchor(self) -> str:
        """Its address within the page."""
        return self.title.lower().replace(" ", "-")


def sections(findings: Findings, drawn: Collection[str]) -> list[Section]:
    """The figures called `drawn` in the sections of the page; sections without any are left out."""
    families = {key: names for key, names in family_figures(findings).items() if key in drawn}
    own = [name for name in CAPTIONS if name in drawn and name not in families]
    found = [Section(FIRST, tuple(name for name in own if name not in LEVELS), ())]
    for level, title in TITLES.items():
        keys = {key: None for key in own if LEVELS.get(key) == level and key not in FOLLOWS.values()}
        for key, names in families.items():
            if family_of(names[0]).level == level:
                keys[key] = None
        ordered = [each for key in keys for each in (key, FOLLOWS.get(key)) if each in drawn and each is not None]
        ordered += [key for key in own if LEVELS.get(key) == level and key not in ordered]
        open_ones = tuple(key for key in ordered if not _variants(key))
        found.append(Section(title, open_ones, tuple(key for key in ordered if _variants(key))))
    return [section for section in found if section.figures or section.aside]


def _variants(key: str) -> bool:
    return "-variants" in key and key not in CAPTIONS


def caption_of(key: str, families: Mapping[str, list[str]], findings: Findings) -> Caption:
    """The words under a figure: its own, with those about the dots where it has some, or those of its family."""
    names = families.get(key)
    if names is None:
        return _with_tests(CAPTIONS.get(key, Caption(key, "", "")), key, findings)
    family = family_of(names[0])
    if family.level == "other":
        return replace(family.caption, seen=findings.metrics[names[0]].definition)
    if _variants(key) and not family.caption.title.startswith("Other readings"):
        return other_readings(family.caption.title[0].lower() + family.caption.title[1:])
    return family.caption


def _with_tests(caption: Caption, key: str, findings: Findings) -> Caption:
    """`caption` with what the dots on the κ panel say, where all pairs of blocks were tested."""
    reading = held(findings, key)
    whole = pairs_tested(findings.sureness.get("tests") or {}, key)
    if key != SHOWN or whole is None or reading is None or null(reading, "kappa") is None:
        return caption
    said = TESTED_PAIRS.seen.format(level=LEVEL, **{name: whole[name] for name in ("test", "significant", "tested")})
    return replace(caption, seen=f"{caption.seen} {said}", limits=f"{caption.limits} {TESTED_PAIRS.limits}")
