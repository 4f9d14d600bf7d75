"""Which figure stands in which section of the page, and under which words."""

from __future__ import annotations

import base64
import io
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from PIL import Image

from collapse_probe.report.findings.captions import CAPTIONS, TESTED_PAIRS
from collapse_probe.report.findings.figures import draw_all
from collapse_probe.report.findings.metric_figures import family_figures, undrawn, without_outliers
from collapse_probe.report.findings.provenance import definitions, not_measured, provenance, skipped
from collapse_probe.report.findings.tables import (
    certainty,
    followed,
    key_numbers,
    per_block,
    rules_table,
    sensitivity_tables,
    sides,
    words_of,
)
from collapse_probe.report.html import Caption, Plate, looked_at, paper, plate_of
from collapse_probe.report.style import save
from collapse_probe.results.findings import Findings
from collapse_probe.results.readings import is_untrained, null_of, result_of, weights_only
from collapse_probe.results.text import number, plain
from collapse_probe.results.verdict import verdict_of
from collapse_probe.statistics.breakdowns import pictured
from collapse_probe.statistics.permutation import LEVEL, SHOWN, pairs_tested


def write_report(findings: Findings, folder: str | Path) -> Path:
    """Write figures/ and report.html into an existing folder, from the findings alone; returns the page."""
    figures = draw_all(findings)
    save(figures, folder)
    path = Path(folder) / "report.html"
    path.write_text(render(findings, figures), encoding="utf-8")
    return path


def render(findings: Findings, figures: Mapping[str, Figure] | None = None) -> str:
    """One self-contained HTML page with `figures`, or with all that `draw_all` makes."""
    figures = draw_all(findings) if figures is None else figures
    listed, more = skipped(findings)
    untrained, verdict = is_untrained(findings.model), verdict_of(findings)
    return paper(
        "findings.html",
        name=plain(findings.model.get("name")),
        weights=plain(findings.model.get("weights")),
        subject=looked_at(findings),
        weights_alone=weights_only(findings),
        verdict=verdict,
        caveats=[text for text, rule in zip(verdict.caveats, verdict.caveat_rules, strict=True) if rule != "untrained"],
        untrained=untrained,
        rules=rules_table(findings),
        cards=key_numbers(findings),
        sections=_filled(findings, figures),
        absent=[*not_measured(findings), *undrawn(findings)],
        sure=certainty(findings),
        both_ends=both_ends(findings),
        table=per_block(findings),
        definitions=definitions(findings),
        presets=followed(findings),
        provenance=provenance(findings),
        skipped=listed,
        skipped_more=more,
    )


def _filled(findings: Findings, figures: Mapping[str, Figure]) -> list[dict[str, Any]]:
    """The sections of the page with their plates."""
    narrow, families = draw_all(findings, narrow=True, names=figures), family_figures(findings)

    def plates(names: tuple[str, ...]) -> list[Plate]:
        return [
            plate_of(
                name,
                figures[name],
                narrow.get(name),
                caption_of(name, families, findings),
                notes=tuple(_notes(findings, name)),
                metrics=tuple(families.get(name, ())),
                sharp=name not in families,
                tables=tuple(sensitivity_tables(findings)) if name == "similarity-ratio" else (),
            )
            for name in names
        ]

    return [
        {"title": part.title, "anchor": part.anchor, "plates": plates(part.figures), "aside": plates(part.aside)}
        for part in sections(findings, figures)
    ]


def _notes(findings: Findings, name: str) -> list[str]:
    """What a caption must say about these findings alone."""
    gallery = findings.gallery
    if name in ("attention-gallery", "rollout-gallery") and gallery is not None:
        drawn = "the attention" if name == "attention-gallery" else "the rollout"
        return [f"Here {drawn} of {gallery.query} is drawn, a mean over heads."]
    if name.startswith("token-norm"):
        rules = without_outliers(findings)
        return [f"No token of any image stands out by the rule “{rule}”." for rule in rules] if name == "token-norm" else []
    reading = result_of(findings, name)
    if name not in ("attention-similarity", "feature-similarity", "attention-rollout") or reading is None:
        return []
    if null_of(reading, "kappa") is not None:
        return []
    reasons = {} if reading.nulls is None else reading.nulls.reasons
    reason = reasons.get("kappa", "the other-token null was not taken, or is 1 everywhere")
    return [f"κ is not drawn here: {reason}."]


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
OTHER_SETTINGS = Caption(
    "Other readings",
    "The metric with other settings, named above each panel.",
    "No reading is the true one: where they disagree, the number depends on a choice that papers leave open.",
)
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
            if findings.metrics[names[0]].description.level == level:
                keys[key] = None
        ordered = [each for key in keys for each in (key, FOLLOWS.get(key)) if each in drawn and each is not None]
        ordered += [key for key in own if LEVELS.get(key) == level and key not in ordered]
        open_ones = tuple(key for key in ordered if not _variants(key))
        found.append(Section(title, open_ones, tuple(key for key in ordered if _variants(key))))
    return [section for section in found if section.figures or section.aside]


def _variants(key: str) -> bool:
    return "-variants" in key and key not in CAPTIONS


def caption_of(key: str, families: Mapping[str, list[str]], findings: Findings) -> Caption:
    """The words under a figure: its own, with those about the dots where it has some, or those of its metric."""
    names = families.get(key)
    if names is None:
        return _with_tests(CAPTIONS.get(key, Caption(key, "", "")), key, findings)
    result = findings.metrics[names[0]]
    stated = result.description
    if _variants(key):
        return replace(OTHER_SETTINGS, title=f"{OTHER_SETTINGS.title}: {stated.title[0].lower()}{stated.title[1:]}")
    return Caption(stated.title, stated.seen or result.definition, stated.limits)


def _with_tests(caption: Caption, key: str, findings: Findings) -> Caption:
    """`caption` with what the dots on the κ panel say, where all pairs of blocks were tested."""
    reading = result_of(findings, key)
    whole = pairs_tested(findings.sureness.get("tests") or {}, key)
    if key != SHOWN or whole is None or reading is None or null_of(reading, "kappa") is None:
        return caption
    said = TESTED_PAIRS.seen.format(level=LEVEL, **{name: whole[name] for name in ("test", "significant", "tested")})
    return replace(caption, seen=f"{caption.seen} {said}", limits=f"{caption.limits} {TESTED_PAIRS.limits}")
