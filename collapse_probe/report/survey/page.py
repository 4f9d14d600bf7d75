"""One table and one figure over all models of a gallery, each with a link to its own page."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from collapse_probe.files import INDEX, PAGE
from collapse_probe.report.findings.answer import SAID, SYMBOLS, badge
from collapse_probe.report.html import Drawing, Figure, draw_figures, paper, plates_of, save
from collapse_probe.report.sheet import MUTED, Sheet
from collapse_probe.report.style import ROLES, charts, drawn, panels, printable
from collapse_probe.results.readings import TRAINED_ON
from collapse_probe.results.rules import KAPPA_ABOVE, RAW_ABOVE
from collapse_probe.results.survey import FINISHED, Survey, SurveyRow
from collapse_probe.results.text import DASH, facts, interval, number

COLUMNS = (
    *("model", "answer", "parameters", "blocks", "κ", "95 % CI", "raw similarity", "chance level", "untrained copy"),
    *(
        f"similar at {RAW_ABOVE:g}",
        f"at κ {KAPPA_ABOVE:g}",
        "of pairs",
        "entropy, share of log N",
        "patch diversity, last",
        "largest sink",
    ),
)
TALL = 0.26  # inches of a model's row in the figure


def write_survey(survey: Survey, folder: str | Path) -> Path:
    """Write figures/ and index.html into an existing folder, from the numbers alone; returns the page."""
    figures = draw_figures({"kappa": KAPPAS}, survey)
    save(figures, folder)
    page = Path(folder) / INDEX
    page.write_text(render(survey, figures), encoding="utf-8")
    return page


def render(survey: Survey, figures: Mapping[str, Figure] | None = None) -> str:
    """One HTML page; `figures` are drawn where not given."""
    figures = draw_figures({"kappa": KAPPAS}, survey) if figures is None else figures
    return paper(
        "survey.html",
        headline=headline(survey),
        trouble=trouble(survey),
        data=survey.data,
        columns=COLUMNS,
        rows=[cells(row) for row in survey.rows],
        fresh=sum(bool(row.model.get("untrained")) for row in survey.finished),
        total=len(survey.finished),
        known=[(row.label, note) for row in survey.finished for note in row.notes if note.startswith(TRAINED_ON)],
        plates=plates_of({"kappa": KAPPAS}, figures),
        run=facts(survey.run),
    )


def headline(survey: Survey) -> str:
    """In how many of the models blocks share attention, by the rules of their own pages."""
    judged = [row for row in survey.finished if SAID.get(row.case, ("",))[0] != "none"]
    if not judged:
        return "No model could be judged on whether attention has collapsed across depth"
    alike = [row for row in judged if row.collapsed]
    fresh = sum(bool(row.model.get("untrained")) for row in alike)
    which = f" ({fresh} of them untrained)" if fresh else ""
    return f"In {len(alike)} of {len(judged)} models{which} some adjacent blocks attend alike beyond chance"


def trouble(survey: Survey) -> str:
    """What is missing, in one sentence; empty where every model was measured."""
    waiting = len(survey.rows) - len(survey.finished) - len(survey.failed)
    parts = [f"{count} {word}" for count, word in ((len(survey.failed), "failed"), (waiting, "not measured yet")) if count]
    return f"Of {len(survey.rows)} models {' and '.join(parts)}." if parts else ""


def cells(row: SurveyRow) -> dict[str, object]:
    """The cells of a row, in the order of COLUMNS without the model; where it failed, the reason."""
    tone, word = badge(row.collapsed, row.case, row.alike)
    n = row.numbers.get
    low, high = n("kappa_adjacent_ci_low"), n("kappa_adjacent_ci_high")
    texts = (
        f"{row.model.get('parameters'):,}" if row.model.get("parameters") else DASH,
        number(row.model.get("blocks"), 0),
        number(n("kappa_adjacent")),
        DASH if low is None or high is None else interval((low, high)),
        number(n("attention_similarity_adjacent")),
        number(n("other_token_adjacent")),
        number(row.untrained.get("attention_similarity_adjacent")),
        *(number(n(key), 0) for key in ("similar_blocks", "similar_blocks_corrected", "similar_blocks_pairs")),
        *(number(n(key)) for key in ("attention_entropy_share", "patch_diversity_last", "sink_largest")),
    )
    return {
        "label": row.label,
        "page": f"{row.folder}/{PAGE}" if row.status == FINISHED else "",
        "tone": tone,
        "symbol": SYMBOLS[tone],
        "word": word,
        "fresh": bool(row.model.get("untrained")),
        "weights": str(row.model.get("weights") or ""),
        "texts": texts,
        "reason": row.reason or ("" if row.status == FINISHED else "not measured yet"),
    }


@drawn
def kappas(survey: Survey) -> Sheet | None:
    """κ of every model with its interval, beside its raw similarity and that of its untrained copy; highest κ first."""
    rows = [row for row in survey.finished if row.numbers.get("kappa_adjacent") is not None]
    if not rows:
        return None
    rows.sort(key=lambda row: -float(row.numbers["kappa_adjacent"] or 0.0))
    (axes,) = panels(1, tall=TALL * len(rows) + 1.0)
    y = np.arange(float(len(rows)))
    role, chance, copy = ROLES["measured"], ROLES["other_token"], ROLES["untrained"]

    def column(name: str, of_copy: bool = False) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
        return np.array([(row.untrained if of_copy else row.numbers).get(name) for row in rows], dtype=np.float64)

    low, high, kappa = (column(f"kappa_adjacent{end}") for end in ("_ci_low", "_ci_high", ""))
    axes.hlines(y, low, high, color=role.colour, linewidth=3.0, alpha=0.35)
    axes.plot(kappa, y, "o", color=role.colour, markersize=5.0, label="κ, 95 % CI")
    axes.plot(column("attention_similarity_adjacent"), y, "|", color=chance.colour, markersize=9.0, label="raw similarity")
    axes.plot(
        column("attention_similarity_adjacent", of_copy=True),
        y,
        "D",
        color=copy.colour,
        markersize=4.5,
        markerfacecolor="white",
        label="raw similarity, untrained copy",
    )
    axes.axvline(0.0, color=MUTED, linewidth=0.8, zorder=0)
    axes.axvline(KAPPA_ABOVE, color=MUTED, linewidth=0.8, linestyle=(0, (1, 3)), zorder=0)
    axes.set_yticks(y, [printable(row.label, 28) for row in rows])
    axes.set(ylim=(len(rows) - 0.5, -0.5), xlabel="mean over adjacent blocks")
    axes.grid(axis="x")
    return charts([axes])


KAPPAS = Drawing(
    "Agreement of adjacent blocks beyond chance",
    "κ of every model, highest first: how much of the possible agreement beyond chance is reached. Beside it the raw "
    "similarity and that of an untrained copy, which show what κ leaves out.",
    "Models of other depth, width and patch size are not otherwise alike; a difference between two has many causes.",
    kappas,
)
