"""The demonstration as a folder: one page that tells it, with the full pages of every comparison and intervention beneath."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from collapse_probe.report.comparison import figures as contrast_figures
from collapse_probe.report.comparison.page import write_comparison
from collapse_probe.report.html import Caption, Plate, Table, paper, plate_of
from collapse_probe.report.intervention.page import write_interventions
from collapse_probe.report.style import DISTINCT, MARKERS, NARROW, WIDE, Role, curve, drawn, over_blocks, save, sheet
from collapse_probe.results.comparison import Comparison
from collapse_probe.results.intervention import Effect, Interventions
from collapse_probe.results.text import number

PAIRS = {
    "positive control": ("digits-tied-mhsa", "digits-tied-re-attention"),
    "ordinary ViT": ("digits-mhsa", "digits-re-attention"),
}
LABELS = ("MHSA", "Re-attention")


COLLAPSED, NEAR_ZERO, STILL_ALIKE, ORDINARY = 0.9, 0.1, 0.9, 0.35  # of kappa, of |raw|, of raw probs, of kappa
SPARED = 0.02  # of accuracy


@dataclass(frozen=True)
class Demonstration:
    """The comparison of each pair, and for each model what sharing its maps costs: by the names in PAIRS."""

    comparisons: dict[str, Comparison]
    sharing: dict[str, dict[str, Interventions]]


def upper(found: Interventions) -> Effect:
    """Sharing in the upper three quarters of the blocks at once: block b and all above it use the map of the block below b."""
    effects = found.cumulative["share"]
    depth = max(max(effect.blocks) for effect in effects) + 1
    return next(effect for effect in effects if min(effect.blocks) == depth // 4)


def told(shown: Demonstration) -> list[tuple[str, list[str]]]:
    """The story, chapter by chapter: titles and sentences, which follow the numbers, whatever they are."""
    chapters = [
        ("What collapse looks like", _control(shown)),
        ("What Re-attention does, and where", _remedy(shown)),
        ("What an ordinary ViT shows", _ordinary(shown)),
        ("What the maps are worth", _worth(shown)),
    ]
    return chapters


def _of(shown: Demonstration, pair: str, label: str) -> Mapping[str, Any]:
    return shown.comparisons[pair].subjects[label].summary


def _control(shown: Demonstration) -> list[str]:
    n = _of(shown, "positive control", "MHSA")
    raw, null, kappa = (n[f"{key}_adjacent"] for key in ("attention_similarity", "other_token", "kappa"))
    found = (
        f"One block, reused 24 times and trained to read digits, attends alike throughout: neighbouring blocks have a raw "
        f"cosine of {number(raw)}, other tokens' attention explains {number(null)} of it, and of what is left to agree "
        f"{number(100 * kappa, 1)} % does (κ {number(kappa)}); {n['similar_blocks_corrected']} of 23 pairs count as shared."
    )
    if kappa < COLLAPSED:
        found = f"This control should show collapse, but κ is {number(kappa)} (raw {number(raw)}): read it with care."
    return [
        found,
        "This is collapse by construction, there before any training: it shows how every number here reads when maps are "
        "shared, and is no evidence about ordinary ViTs.",
    ]


def _remedy(shown: Demonstration) -> list[str]:
    n = _of(shown, "positive control", "Re-attention")
    weights, probs = n["attention_similarity_adjacent"], n["attention_similarity_probs_adjacent"]
    kappa = n["kappa_probs_adjacent"]
    gone, alike = abs(weights) <= NEAR_ZERO, probs >= STILL_ALIKE
    after = f"what multiplies V (weights) has a raw cosine of {number(weights)}"
    before = f"the softmax behind it (probs) one of {number(probs)}, κ {number(kappa)}"
    if gone and alike:
        text = (
            f"In its twin with Re-attention {after}, but {before}: the blocks still attend alike, and each then mixes its "
            "heads in another way. The number that falls is the one taken after the mixing."
        )
    else:
        text = f"In its twin with Re-attention {after}, and {before}."
    return [
        text,
        "Every block has a mixing matrix and a BatchNorm of its own here; an untrained Re-attention model reads the same, so "
        "that the fall is no sign of something learned.",
    ]


def _ordinary(shown: Demonstration) -> list[str]:
    n = _of(shown, "ordinary ViT", "MHSA")
    raw, null, kappa = (n[f"{key}_adjacent"] for key in ("attention_similarity", "other_token", "kappa"))
    counts = f"{n['similar_blocks']} of 23 pairs are similar at 0.9, {n['similar_blocks_corrected']} beyond their null"
    text = f"With 24 blocks of their own, trained alike, the raw cosine is {number(raw)}: {counts}. "
    if kappa < ORDINARY:
        share = n.get("attention_entropy_share")
        text += (
            f"Nearly all of it is there for the wrong token too ({number(null)}; κ {number(kappa)}): its attention is "
            f"{'near-uniform' if share is not None and share > 0.8 else 'alike for all tokens'}"
            + ("" if share is None else f" ({number(100 * share, 1)} % of the largest entropy)")
            + ", and near-uniform maps are alike whatever was learned."
        )
    else:
        text += f"Other tokens explain {number(null)} of it; κ is {number(kappa)}, so the blocks do share attention."
    twin = _of(shown, "ordinary ViT", "Re-attention")
    return [
        text,
        f"Its twin with Re-attention reads {number(twin['attention_similarity_adjacent'])} in weights and "
        f"{number(twin['attention_similarity_probs_adjacent'])} in probs.",
    ]


def _worth(shown: Demonstration) -> list[str]:
    parts = []
    for pair, models in shown.sharing.items():
        for label, found in models.items():
            effect = upper(found)
            change = effect.accuracy_change
            if change is not None and effect.accuracy is not None:
                cost = "costs nothing to speak of" if change > -SPARED else f"costs {number(-100 * change, 1)} points"
                parts.append(f"{label} ({pair}): accuracy {number(100 * effect.accuracy, 1)} %, {cost}")
    return [
        "If the upper 18 of 24 blocks all use the map of the block beneath them: " + "; ".join(parts) + ".",
        "This is the functional test: a raw cosine near one says nothing of what sharing costs, and sharing that costs "
        "little does not need a high cosine. The models were not trained for it, and these are digits, 8 pixels wide.",
    ]


PAGE = "report.html"
COLUMNS = {
    "accuracy": "accuracy",
    "raw cosine": "attention_similarity_adjacent",
    "wrong token": "other_token_adjacent",
    "κ": "kappa_adjacent",
    "similar at 0.9": "similar_blocks",
    "beyond the null": "similar_blocks_corrected",
    "raw, softmax": "attention_similarity_probs_adjacent",
    "κ, softmax": "kappa_probs_adjacent",
    "entropy, share": "attention_entropy_share",
    "patch diversity": "patch_diversity_last",
}
SHARED = Caption(
    "What the maps are worth",
    "Accuracy when block b and all blocks above it use the attention map of the block below b: on the left all blocks share "
    "the map of the first, on the right only the last one shares.",
    "The models were not trained with shared maps; a model that was might lose less.",
)


def write_story(shown: Demonstration, folder: Path, spread: Mapping[str, Any]) -> Path:
    """Write the whole demonstration into an existing folder; returns the page that tells it.

    `spread` says how each bundled model was made and how its numbers spread over seeds (`spread.json`).
    """
    links = []
    for pair, comparison in shown.comparisons.items():
        inside = folder / pair.replace(" ", "-")
        inside.mkdir()
        comparison.write(inside)
        write_comparison(comparison, inside)
        links.append((f"the {pair}: MHSA against Re-attention", f"{inside.name}/{PAGE}"))
        for label, found in shown.sharing[pair].items():
            below = inside / f"sharing-{label}"
            below.mkdir()
            found.write(below)
            write_interventions(found, below)
            links.append((f"the {pair}, {label}: its maps replaced", f"{inside.name}/{below.name}/{PAGE}"))
    path = folder / PAGE
    if (drawing := _sharing(shown, WIDE)) is not None:
        save({"sharing": drawing}, folder)
    path.write_text(render(shown, links, spread), encoding="utf-8")
    return path


def render(shown: Demonstration, links: list[tuple[str, str]], spread: Mapping[str, Any]) -> str:
    """The page that tells the story."""
    control, ordinary = (_plates(shown, pair) for pair in PAIRS)
    drawing = _sharing(shown, WIDE)
    sharing = [] if drawing is None else [plate_of("sharing", drawing, _sharing(shown, NARROW), SHARED)]
    first = next(iter(shown.comparisons.values()))
    return paper(
        "story.html",
        images=first.subjects[first.first].data["images"],
        chapters=told(shown),
        plates=[control[:1], control[1:], ordinary, sharing],
        table=_table(shown),
        links=links,
        made=_made(spread),
    )


def _plates(shown: Demonstration, pair: str) -> list[Plate]:
    """The heatmaps of a pair, and the similarity of neighbouring blocks at weights and probs."""
    comparison = shown.comparisons[pair]
    wide, narrow = contrast_figures.draw_all(comparison), contrast_figures.draw_all(comparison, narrow=True)
    return [
        plate_of(f"{pair}-{name}".replace(" ", "-"), wide[name], narrow.get(name), contrast_figures.CAPTIONS[name])
        for name in ("matrices", "adjacent")
        if name in wide
    ]


def _table(shown: Demonstration) -> Table:
    rows = []
    for pair, comparison in shown.comparisons.items():
        for label in LABELS:
            held: dict[str, Any] = comparison.numbers(label)
            cells = [held.get(key) for key in COLUMNS.values()]
            rows.append((f"{pair}, {label}", *(number(c, 0) if isinstance(c, int) else number(c) for c in cells)))
    note = (
        "Means over the 23 pairs of neighbouring blocks; of what multiplies V (weights) unless the column says softmax, which "
        "is another map for Re-attention alone."
    )
    return Table(("model", *COLUMNS), tuple(rows), (note,))


@drawn
def _sharing(shown: Demonstration, width: float) -> Figure | None:
    """Accuracy of all four models when the upper blocks share one map."""
    figure = sheet(width, 3.6)
    axes = figure.subplots()
    lines = [(f"{pair}, {label}", found) for pair, models in shown.sharing.items() for label, found in models.items()]
    for place, (name, found) in enumerate(lines):
        effects = sorted(found.cumulative["share"], key=lambda effect: min(effect.blocks))
        x = np.array([min(effect.blocks) for effect in effects], dtype=np.float64)
        y = np.array([effect.accuracy for effect in effects], dtype=np.float64)
        curve(axes, x, y, Role(name, DISTINCT[place], marker=MARKERS[place], width=1.8))
    axes.set(ylim=(0, 1.02), ylabel="accuracy")
    over_blocks(axes, x, "lowest block that shares the map below it", 8 if width == NARROW else 16)
    axes.grid(axis="y")
    axes.legend(frameon=False, loc="lower right")
    return figure


def _made(spread: Mapping[str, Any]) -> list[tuple[str, str]]:
    """How each bundled model was made, with the spread over seeds."""
    lines = []
    for name, entry in spread["models"].items():
        seeds = entry["seeds"].values()
        kappas = ", ".join(number(seed["kappa_adjacent"]) for seed in seeds)
        right = ", ".join(f"{100 * seed['accuracy']:.1f} %" for seed in seeds)
        text = f"{entry['command']} ({entry['rule']}). κ of the three seeds: {kappas}; accuracy {right}; on {spread['data']}."
        lines.append((name, text))
    return lines
