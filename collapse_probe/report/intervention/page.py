"""Interventions and figures → one HTML file that opens from disk, in the look of the report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from collapse_probe.report.html import Figure, Table, paper, plates_of, write_page
from collapse_probe.report.intervention import dropping, tokens
from collapse_probe.report.intervention.figures import FIGURES, ORDERS, draw_all
from collapse_probe.report.intervention.verdict import TEXTS, WORDS, headline, verdicts
from collapse_probe.results.intervention import DEFINITIONS, ORDERED, OTHER, Effect, Interventions
from collapse_probe.results.rules import KEEPS_ANSWERS
from collapse_probe.results.text import DASH, facts, interval, number, numbered, plain, sentence_case, spans

HEADER = ("KL, nats", "95 % CI", "same top answer", "95 % CI", "accuracy", "change, points", "95 % CI")

ON = {
    "chosen": "on the images that chose the order",
    "settled": "on those that settle how many can go",
    "priced": "the price, on all other images",
}


def write_interventions(interventions: Interventions, folder: str | Path) -> Path:
    """Write figures/ and report.html into an existing folder, from the numbers alone; returns the page."""
    figures = draw_all(interventions)
    return write_page(folder, figures, render(interventions, figures))


def render(interventions: Interventions, figures: Mapping[str, Figure] | None = None) -> str:
    """One self-contained HTML page; `figures` are drawn where not given."""
    accuracy, answers = interventions.plain["accuracy"], verdicts(interventions)
    header, tables = ("blocks", *HEADER[: None if accuracy is not None else 4]), []

    def table(effects: Sequence[Effect]) -> Table:
        return Table(header, tuple(_row(e, accuracy is not None) for e in effects), ())

    for kind, effects in interventions.single.items():
        parts = [
            ("One block at a time", [e for e in effects if e.kl is not None]),
            ("From the last block down", interventions.cumulative[kind]),
            ("Windows of consecutive blocks", interventions.windows.get(kind, ())),
        ]
        for how, order in interventions.orders.get(kind, {}).items():
            said = sentence_case(ORDERS[how])
            parts += [(f"{said}: {ON[part]}", getattr(order, part)) for part in reversed(ORDERED)]
        tables.append((kind, [(title, table(each)) for title, each in parts if each]))

    every = [effect for effects in interventions.single.values() for effect in effects]
    exported = interventions.run.get("export")
    return paper(
        "intervention.html",
        name=plain(interventions.model.get("name")),
        images=plain(interventions.data.get("images")),
        data=plain(interventions.data.get("address")),
        plain_accuracy=_plain_accuracy(interventions),
        verdicts=answers,
        keeps=f"{100 * KEEPS_ANSWERS:g} %",
        words=WORDS,
        acts={kind: texts[0] for kind, texts in (TEXTS | dropping.PARTS).items()} | tokens.ACTS,
        done=_done(interventions),
        exported=exported,
        gone="" if not exported else numbered(exported.get("dropped_blocks") or []),
        headline=headline(answers, interventions),
        plates=plates_of(FIGURES, draw_all(interventions) if figures is None else figures),
        tables=tables,
        refused=[(e.kind, e.blocks[0], e.not_applicable) for e in every if e.not_applicable],
        kinds=interventions.kinds,
        definitions=DEFINITIONS,
        provenance=[(part, facts(getattr(interventions, part))) for part in ("model", "data", "run")],
    )


def _done(interventions: Interventions) -> str:
    """What is done while the model runs, in two words."""
    kinds = {name.removesuffix(OTHER) for name in interventions.single}
    if kinds <= {*dropping.PARTS}:
        return "parts left out"
    return "states replaced" if kinds <= {*tokens.ACTS} else "maps replaced" if kinds <= {*TEXTS} else "parts changed"


def _plain_accuracy(interventions: Interventions) -> str:
    """The accuracy of the model itself, and how many of its images were trained on; or why there is none."""
    accuracy, count = interventions.plain["accuracy"], interventions.data.get("trained_on")
    if accuracy is None:
        return f"not known: {interventions.plain['reason']}"
    return _percent(accuracy) + (f" ({count} of the {interventions.data['images']} images were trained on)" if count else "")


def _row(effect: Effect, accurate: bool) -> tuple[str, ...]:
    ends = effect.agreement_ci95
    cells = [spans(list(effect.blocks)), number(effect.kl, 4), interval(effect.kl_ci95, 4), _percent(effect.agreement)]
    cells.append(DASH if ends is None else f"{interval([100 * end for end in ends], 1)} %")
    if accurate:
        change, ends = effect.accuracy_change, effect.accuracy_change_ci95
        cells += [_percent(effect.accuracy), number(None if change is None else 100 * change, 1)]
        cells.append(interval(None if ends is None else [100 * end for end in ends], 1))
    return tuple(cells)


def _percent(share: float | None) -> str:
    return DASH if share is None else f"{number(100 * share, 1)} %"
