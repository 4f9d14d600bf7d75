"""The demonstration as a folder: one page that tells it, with the full pages of every comparison and intervention beneath."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from collapse_probe import contrast_figures
from collapse_probe.bundled_models import FOLDER
from collapse_probe.captions import Caption
from collapse_probe.colours import DISTINCT, MARKERS
from collapse_probe.comparison_page import write_comparison
from collapse_probe.demonstration import LABELS, PAIRS, Demonstration, told
from collapse_probe.drawing import NARROW, WIDE, Role, curve, drawn, over_blocks, sheet
from collapse_probe.figures import save
from collapse_probe.intervention_page import write_interventions
from collapse_probe.page import Plate, paper, plate_of
from collapse_probe.tables import Table
from collapse_probe.words import number

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


def write_story(shown: Demonstration, folder: Path) -> Path:
    """Write the whole demonstration into an existing folder; returns the page that tells it."""
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
    path.write_text(render(shown, links), encoding="utf-8")
    return path


def render(shown: Demonstration, links: list[tuple[str, str]]) -> str:
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
        made=_made(),
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


def _made() -> list[tuple[str, str]]:
    """How each bundled model was made, with the spread over seeds."""
    account = json.loads((FOLDER / "spread.json").read_text(encoding="utf-8"))
    lines = []
    for name, entry in account["models"].items():
        seeds = entry["seeds"].values()
        kappas = ", ".join(number(seed["kappa_adjacent"]) for seed in seeds)
        right = ", ".join(f"{100 * seed['accuracy']:.1f} %" for seed in seeds)
        text = f"{entry['command']} ({entry['rule']}). κ of the three seeds: {kappas}; accuracy {right}; on {account['data']}."
        lines.append((name, text))
    return lines
