"""The page of one run: the answer first, then figures in their sections, tables, and how it was measured."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from collapse_probe.report.findings.answer import closest, headline, rows, small_figure
from collapse_probe.report.findings.beside import TABLES
from collapse_probe.report.findings.cards import key_numbers
from collapse_probe.report.findings.figures import FIGURES, caption_of, draw_all, family_figures, metrics_of, undrawn
from collapse_probe.report.findings.outliers import places_of
from collapse_probe.report.findings.provenance import definitions, left_out, not_measured, provenance, skipped
from collapse_probe.report.findings.tables import (
    certainty,
    followed,
    per_block,
    rules_table,
    sides,
    uncompared,
    with_undefined,
    words_of,
)
from collapse_probe.report.gallery import FLAT, is_flat
from collapse_probe.report.html import Figure, Plate, looked_at, paper, picture_url, write_page
from collapse_probe.results.findings import Findings
from collapse_probe.results.readings import is_untrained, null_of, result_of, trained_on, weights_only
from collapse_probe.results.text import number, plain, sentence_case
from collapse_probe.results.verdict import Verdict, verdict_of
from collapse_probe.statistics.breakdowns import pictured

SECTIONS = {
    "pictures": "Pictures",
    "attention": "More about the attention maps",
    "tokens": "More about the tokens",
    "weights": "The weights",
    "other": "Other metrics",
    "sure": "How sure",
}


def write_report(findings: Findings, folder: str | Path) -> Path:
    """Write figures/ and report.html into an existing folder, from the findings alone; returns the page."""
    figures = draw_all(findings)
    return write_page(folder, figures, render(findings, figures))


def render(findings: Findings, figures: Mapping[str, Figure] | None = None) -> str:
    """One self-contained HTML page with `figures`, or with all that `draw_all` makes."""
    figures = draw_all(findings) if figures is None else figures
    listed, more = skipped(findings)
    verdict = verdict_of(findings)
    answers = rows(findings, verdict)
    return paper(
        "findings.html",
        name=plain(findings.model.get("name")),
        weights=plain(findings.model.get("weights")),
        subject=looked_at(findings),
        weights_alone=weights_only(findings),
        headline=headline(findings, answers, verdict),
        answers=answers,
        glance=small_figure(findings),
        closest=closest(findings),
        verdict=verdict,
        caveats=caveats(findings, verdict),
        untrained=is_untrained(findings.model),
        rules=rules_table(findings),
        cards=key_numbers(findings),
        places=findings.model.get("places") or (),
        left_out=left_out(findings),
        sections=_with_plates(findings, figures),
        flat=flat_gallery(findings),
        absent=[*not_measured(findings), *undrawn(findings)],
        sure=certainty(findings),
        both_ends=both_ends(findings),
        table=per_block(findings),
        definitions=definitions(findings),
        presets=followed(findings),
        provenance=provenance(findings),
        version=(findings.run.get("versions") or {}).get("collapse-probe", ""),
        created=plain(findings.run["created"]) if findings.run.get("created") else "",
        skipped=listed,
        skipped_more=more,
    )


def caveats(findings: Findings, verdict: Verdict) -> list[str]:
    """What the answer does not mean, and whether the images are those that the model was trained on."""
    said = [text for text, rule in zip(verdict.caveats, verdict.caveat_rules, strict=True) if rule != "untrained"]
    return [*([known] if (known := trained_on(findings.data)) else []), *said]


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


def sections(findings: Findings, names: Collection[str]) -> list[Section]:
    """The figures called `names` in the sections of the page; sections without any are left out."""
    families = {key: metrics for key, metrics in family_figures(findings).items() if key in names}
    own = {name: entry for name, entry in FIGURES.items() if name in names and name not in families}
    found = []
    for section, title in SECTIONS.items():
        here = [name for name, entry in own.items() if entry.section == section]
        keys = [name for name in here if own[name].after not in families]
        keys += [key for key, metrics in families.items() if findings.metrics[metrics[0]].description.level == section]
        for name in here:
            if own[name].after in keys:
                keys.insert(keys.index(own[name].after) + 1, name)
        aside = tuple(key for key in keys if key in families and "-variants" in key)
        found.append(Section(title, tuple(key for key in keys if key not in aside), aside))
    return [section for section in found if section.figures or section.aside]


def _with_plates(findings: Findings, figures: Mapping[str, Figure]) -> list[dict[str, Any]]:
    """The sections of the page with their plates."""
    families = family_figures(findings)

    def plates(names: tuple[str, ...]) -> list[Plate]:
        return [
            Plate(
                name,
                figures[name],
                caption_of(name, families, findings),
                notes=tuple(_notes(findings, name)),
                metrics=tuple(families.get(name, ())),
                tables=tuple(TABLES[name](findings)) if name in TABLES else (),
            )
            for name in names
        ]

    return [
        {"title": part.title, "anchor": part.anchor, "plates": plates(part.figures), "aside": plates(part.aside)}
        for part in sections(findings, figures)
    ]


def _notes(findings: Findings, name: str) -> list[str]:
    """What a caption must say about these findings alone: last, of which blocks its numbers are."""
    covers = dict.fromkeys(findings.metrics[metric].covers for metric in metrics_of(name, findings))
    more = [f"The numbers are {text}." for text in covers if text]
    if name == "attention-adjacent":
        more += [f"{note}." for note in uncompared(findings)]
    return [*_own_notes(findings, name), *more]


def _own_notes(findings: Findings, name: str) -> list[str]:
    if name in ("attention-gallery", "rollout-gallery") and findings.gallery is not None:
        what = "the attention" if name == "attention-gallery" else "the rollout"
        return [f"Here {what} of {findings.gallery.query} is drawn, a mean over heads."]
    if name == "token-norm":
        rules = [places.rule for places in places_of(findings) if not places.any]
        return [f"No token of any image stands out by the rule “{rule}”." for rule in rules]
    result = result_of(findings, name)
    similarities = ("attention-similarity", "feature-similarity", "attention-rollout")
    if name not in similarities or result is None or null_of(result, "kappa") is not None:
        return []
    reasons = {} if result.nulls is None else result.nulls.reasons
    return [f"κ is not drawn here: {reasons.get('kappa', 'the chance level was not taken, or is 1 everywhere')}."]


def flat_gallery(findings: Findings) -> str:
    """That the maps over pictures are uniform and not drawn; empty where they are drawn or were not kept."""
    if findings.gallery is None or not is_flat(findings):
        return ""
    count = len(findings.gallery.names)
    return (
        f"Where each block looks is not drawn: in {count} images that were kept, no map of any block or head gives a patch "
        f"more than {FLAT:g} times, or less than {1 / FLAT:g} times, uniform attention."
    )


def both_ends(findings: Findings) -> dict[str, Any] | None:
    """The headline number in `words`, its `median` over `images` (`of` says how many have none), and its two `ends`: title and
    images each, outermost first.

    Of an image: name, value, a data URL as `source`, width and height in pixels. None where no image has a picture.
    """
    chosen = pictured(findings.sureness.get("extremes") or {})
    if chosen is None or not findings.thumbnails:
        return None
    name, entry = chosen
    ends = []
    for end, title in zip(("highest", "lowest"), sides(entry), strict=True):
        images = []
        for each in (each for each in entry[end] if str(each["name"]) in findings.thumbnails):
            pixels = findings.thumbnails[str(each["name"])]
            source = picture_url(Image.fromarray(pixels), "jpeg", quality=80, optimize=True)
            size = {"width": pixels.shape[1], "height": pixels.shape[0]}
            images.append({"name": str(each["name"]), "value": number(each["value"]), "source": source, **size})
        ends.append({"title": sentence_case(title), "images": images})
    facts = {"median": number(entry["median"]), "images": int(entry["images"]), "of": with_undefined(entry)}
    return {"words": sentence_case(words_of(name)), "ends": ends, **facts}
