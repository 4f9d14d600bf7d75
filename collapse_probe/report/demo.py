"""The page of the demonstration: what the bundled pairs of models show, with the pages of its comparisons and interventions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from collapse_probe.files import PAGE
from collapse_probe.report.comparison.figures import FIGURES
from collapse_probe.report.comparison.page import write_comparison
from collapse_probe.report.findings.page import write_report
from collapse_probe.report.html import Drawing, Figure, Table, draw_figures, paper, plates_of, write_page
from collapse_probe.report.intervention.dropping import answer
from collapse_probe.report.intervention.figures import FIGURES as BLOCKS_LEFT
from collapse_probe.report.intervention.page import write_interventions
from collapse_probe.report.sheet import Sheet
from collapse_probe.report.style import DISTINCT, MARKERS, Role, charts, curve, drawn, over_blocks, panels
from collapse_probe.results.comparison import Comparison
from collapse_probe.results.findings import Findings
from collapse_probe.results.intervention import Effect, Interventions
from collapse_probe.results.readings import null_of
from collapse_probe.results.rules import (
    BY_NAME,
    CONTROL_COLLAPSED,
    CONTROL_MIXED,
    KEEPS_ANSWERS,
    RAW_ABOVE,
    SHARES_ATTENTION,
)
from collapse_probe.results.text import number

PAIRS = {
    "positive control": ("digits-tied-mhsa", "digits-tied-re-attention"),
    "ordinary ViT": ("digits-mhsa", "digits-re-attention"),
}
LABELS = ("MHSA", "Re-attention")
PRUNED = ("ordinary ViT", "MHSA")
"""The model of which blocks are left out."""
DROPPED = "drop_block"
COLUMNS = {
    "accuracy": "accuracy",
    "raw similarity": "attention_similarity_adjacent",
    "chance level": "other_token_adjacent",
    "κ": "kappa_adjacent",
    f"similar at {RAW_ABOVE:g}": "similar_blocks",
    "similar by κ": "similar_blocks_corrected",
    "raw, softmax map": "attention_similarity_probs_adjacent",
    "κ, softmax map": "kappa_probs_adjacent",
    "entropy, share": "attention_entropy_share",
    "patch diversity": "patch_diversity_last",
}


@dataclass(frozen=True)
class Demonstration:
    """The comparison of each pair, and for each model what sharing its maps costs and what its sinks do: by the names in PAIRS;
    and which blocks of the model PRUNED can go.
    """

    comparisons: Mapping[str, Comparison]
    sharing: Mapping[str, Mapping[str, Interventions]]
    sinks: Mapping[str, Mapping[str, Findings]]
    dropping: Interventions

    def summary(self, pair: str, label: str) -> Mapping[str, Any]:
        """The summary of one model."""
        return self.comparisons[pair].subjects[label].summary


def chapters(demonstration: Demonstration) -> dict[str, list[str]]:
    """The sentences of the page by the title of their chapter; they follow the numbers."""
    return {
        "What collapse looks like": _control(demonstration.summary("positive control", "MHSA")),
        "What Re-attention does, and where": _mixed(demonstration.summary("positive control", "Re-attention")),
        "What an ordinary ViT shows": _ordinary(*(demonstration.summary("ordinary ViT", label) for label in LABELS)),
        "What the maps are worth": _worth(demonstration.sharing),
        "Which blocks can go": _dropped(demonstration.dropping),
        "What the sinks do": _sunk(demonstration.sinks),
    }


def _control(summary: Mapping[str, Any]) -> list[str]:
    raw, null, kappa = (summary[f"{name}_adjacent"] for name in ("attention_similarity", "other_token", "kappa"))
    text = f"This control should show collapse, but κ is {number(kappa)} (raw {number(raw)}): read it with care."
    if kappa >= CONTROL_COLLAPSED:
        text = (
            f"One block, reused 24 times and trained to read digits, attends alike throughout: adjacent blocks have a raw "
            f"similarity of {number(raw)}, against a chance level of {number(null)}. Of the agreement that chance cannot "
            f"explain, {number(100 * kappa, 1)} % is reached (κ {number(kappa)}); {summary['similar_blocks_corrected']} of 23 "
            "pairs count as shared."
        )
    caveat = (
        "This collapse is by construction and there before any training: it shows what every number here is when maps are "
        "shared, and is no evidence about ordinary ViTs."
    )
    return [text, caveat]


def _mixed(summary: Mapping[str, Any]) -> list[str]:
    weights, probs = summary["attention_similarity_adjacent"], summary["attention_similarity_probs_adjacent"]
    text = (
        f"In the version with Re-attention the raw similarity of the final maps is {number(weights)}; that of the softmax "
        f"maps, before the mixing, is {number(probs)}, with κ {number(summary['kappa_probs_adjacent'])}."
    )
    if abs(weights) <= CONTROL_MIXED and probs >= CONTROL_COLLAPSED:
        text += " The blocks still attend alike, and each mixes its heads in another way: only the number after mixing falls."
    caveat = (
        "Every block has a mixing matrix and a BatchNorm of its own here. An untrained Re-attention model has the same "
        "numbers, so the fall is no sign of something learned."
    )
    return [text, caveat]


def _ordinary(plain: Mapping[str, Any], mixed: Mapping[str, Any]) -> list[str]:
    raw, null, kappa = (plain[f"{name}_adjacent"] for name in ("attention_similarity", "other_token", "kappa"))
    share = plain.get("attention_entropy_share")
    if kappa >= SHARES_ATTENTION:
        meaning = "the blocks do share attention"
    elif share is not None and BY_NAME["near-uniform"].holds(share):
        percent = f"{number(100 * share, 1)} % of the largest entropy"
        meaning = f"attention is near-uniform ({percent}), and near-uniform maps are alike whatever was learned"
    else:
        meaning = "attention is alike for all tokens"
    weights, probs = (number(mixed[f"attention_similarity{point}_adjacent"]) for point in ("", "_probs"))
    return [
        f"With 24 blocks of their own and the same training, the raw similarity is {number(raw)}: {plain['similar_blocks']} of "
        f"23 pairs are similar at {RAW_ABOVE:g}, {plain['similar_blocks_corrected']} by κ. The chance level is "
        f"{number(null)} (κ {number(kappa)}): {meaning}.",
        f"The version with Re-attention has a raw similarity of {weights} between final maps and {probs} between softmax maps.",
    ]


def _worth(sharing: Mapping[str, Mapping[str, Interventions]]) -> list[str]:
    parts = []
    for model, effect in {f"{label} ({pair})": upper(i) for pair, each in sharing.items() for label, i in each.items()}.items():
        if effect.accuracy is not None and effect.accuracy_change is not None:
            points = f"a change of {number(100 * effect.accuracy_change, 1)} points"
            parts.append(f"{model} {number(100 * effect.accuracy, 1)} %, {points}")
    return [
        f"Accuracy when the upper 18 of 24 blocks all use the map of the block below them: {'; '.join(parts)}.",
        "This tests the function: a raw similarity near one does not say what sharing costs, and sharing can cost little where "
        "the similarity is low. The models were not trained for it, and these are digits, 8 pixels wide.",
    ]


def _dropped(dropping: Interventions) -> list[str]:
    single = [effect for effect in dropping.single[DROPPED] if effect.agreement is not None]
    cheap = sum((effect.agreement or 0.0) >= KEEPS_ANSWERS for effect in single)
    return [
        f"Of the last {len(single)} blocks of the ordinary ViT without Re-attention: {answer(dropping, DROPPED)}",
        f"One at a time, {cheap} of these {len(single)} can be left out with {100 * KEEPS_ANSWERS:g} % of the top answers "
        "unchanged. A skip connection makes a single block cheap to leave out, whatever it computes: all together is another "
        "question.",
    ]


def _sunk(sinks: Mapping[str, Mapping[str, Findings]]) -> list[str]:
    parts, fresh = [], []
    for pair, models in sinks.items():
        for label, findings in models.items():
            result = findings.metrics["sink-kind"]
            counts = result.details["per_image"]
            parts.append(
                f"{label} ({pair}) {number(sum(counts.values()), 2)}, of them {number(counts['no_op'], 2)} no-ops and "
                f"{number(counts['broadcast'], 2)} broadcasts"
            )
            twin = null_of(result, "untrained")
            fresh.append(float("nan") if twin is None else float(np.nansum(twin)))
    return [
        "Sinks an image, over all heads of all blocks (a key to which nine of ten queries give half of their attention): "
        f"{'; '.join(parts)}. Untrained copies have {number(max(fresh), 2)} at most.",
        "A no-op switches a head off for an image, a broadcast writes one token's value to all others: the same stripe in a "
        "map, and another thing done. These are small models of digits: what large ones have is another question.",
    ]


def upper(interventions: Interventions) -> Effect:
    """Sharing in the upper three quarters of the blocks at once: block b and all above it use the map of the block below b."""
    effects = interventions.cumulative["share"]
    depth = max(max(effect.blocks) for effect in effects) + 1
    return next(effect for effect in effects if min(effect.blocks) == depth // 4)


def write_demonstration(demonstration: Demonstration, folder: Path, spread: Mapping[str, Any]) -> Path:
    """Write every comparison and intervention with its page into an existing folder, and the page about all; returns that.

    `spread` says how each bundled model was made and how its numbers spread over seeds (`spread.json`).
    """
    links = {}
    for pair, comparison in demonstration.comparisons.items():
        inside = folder / pair.replace(" ", "-")
        inside.mkdir()
        comparison.write(inside)
        write_comparison(comparison, inside)
        links[f"the {pair}: MHSA against Re-attention"] = f"{inside.name}/{PAGE}"
        for label, interventions in demonstration.sharing[pair].items():
            below = inside / f"sharing-{label}"
            below.mkdir()
            interventions.write(below)
            write_interventions(interventions, below)
            links[f"the {pair}, {label}: its maps replaced"] = f"{inside.name}/{below.name}/{PAGE}"
            sunk = inside / f"sinks-{label}"
            sunk.mkdir()
            demonstration.sinks[pair][label].write(sunk)
            write_report(demonstration.sinks[pair][label], sunk)
            links[f"the {pair}, {label}: what its sinks do"] = f"{inside.name}/{sunk.name}/{PAGE}"
    pruned = folder / "blocks-left-out"
    pruned.mkdir()
    demonstration.dropping.write(pruned)
    write_interventions(demonstration.dropping, pruned)
    links[f"the {', '.join(PRUNED)}: blocks left out"] = f"{pruned.name}/{PAGE}"
    figures = draw_figures({"sharing": SHARING}, demonstration)
    return write_page(folder, figures, render(demonstration, links, spread, figures))


def render(
    demonstration: Demonstration, links: Mapping[str, str], spread: Mapping[str, Any], figures: Mapping[str, Figure]
) -> str:
    """The page; `links` are the further pages by their names, `figures` hold what sharing costs."""
    plates = []
    for pair in PAIRS:  # the heatmaps, and the similarity of neighbouring blocks at weights and probs
        drawings = {f"{pair}-{name}".replace(" ", "-"): FIGURES[name] for name in ("matrices", "adjacent")}
        plates.append(plates_of(drawings, draw_figures(drawings, demonstration.comparisons[pair])))
    control, ordinary = plates
    drawings = {"left": BLOCKS_LEFT["blocks-left"]}
    left = plates_of(drawings, draw_figures(drawings, demonstration.dropping))
    first = next(iter(demonstration.comparisons.values()))
    return paper(
        "demo.html",
        images=first.subjects[first.first].data["images"],
        chapters=chapters(demonstration),
        plates=[control[:1], control[1:], ordinary, plates_of({"sharing": SHARING}, figures), left, []],
        table=_table(demonstration),
        links=links,
        models=_models(spread),
    )


def _table(demonstration: Demonstration) -> Table:
    rows = []
    for pair in demonstration.comparisons:
        for label in LABELS:
            cells = [demonstration.summary(pair, label).get(key) for key in COLUMNS.values()]
            rows.append((f"{pair}, {label}", *(number(c, 0) if isinstance(c, int) else number(c) for c in cells)))
    note = (
        "Means over the 23 pairs of adjacent blocks; of the final map unless the column says softmax map, which is another one "
        "for Re-attention alone."
    )
    return Table(("model", *COLUMNS), tuple(rows), (note,))


@drawn
def sharing_figure(demonstration: Demonstration) -> Sheet:
    """Accuracy of all four models when the upper blocks share one map."""
    (axes,) = panels(1, tall=3.2)
    lines = {f"{pair}, {label}": i for pair, models in demonstration.sharing.items() for label, i in models.items()}
    for place, (name, interventions) in enumerate(lines.items()):
        effects = sorted(interventions.cumulative["share"], key=lambda effect: min(effect.blocks))
        x = np.array([min(effect.blocks) for effect in effects], dtype=np.float64)
        y = np.array([effect.accuracy for effect in effects], dtype=np.float64)
        curve(axes, x, y, Role(name, DISTINCT[place], marker=MARKERS[place], width=1.8))
    axes.set(ylim=(0, 1.02), ylabel="accuracy")
    over_blocks(axes, x, "lowest block that shares the map below it", 12)
    axes.grid(axis="y")
    return charts([axes])


SHARING = Drawing(
    "What the maps are worth",
    "Accuracy when block b and all blocks above it use the attention map of the block below b: on the left all blocks share "
    "the map of the first, on the right only the last one shares.",
    "The models were not trained with shared maps; a model that was might lose less.",
    sharing_figure,
)


def _models(spread: Mapping[str, Any]) -> list[tuple[str, str]]:
    """How each bundled model was made, with the spread over seeds."""
    lines = []
    for name, entry in spread["models"].items():
        seeds = entry["seeds"].values()
        kappas = ", ".join(number(seed["kappa_adjacent"]) for seed in seeds)
        accuracies = ", ".join(f"{100 * seed['accuracy']:.1f} %" for seed in seeds)
        text = f"{entry['command']} ({entry['rule']}). κ of the three seeds: {kappas}; accuracy {accuracies}"
        lines.append((name, f"{text}; on {spread['data']}."))
    return lines
