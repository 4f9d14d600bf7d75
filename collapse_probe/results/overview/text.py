"""Results in a few lines of text: what they are of, what they say, the numbers that matter, and what can be asked of them."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from typing import Any

from collapse_probe.results.comparison import Comparison
from collapse_probe.results.findings import Findings
from collapse_probe.results.intervention import GREEDY, OTHER, Interventions
from collapse_probe.results.overview.headline import Headline, headlines
from collapse_probe.results.readings import weights_only
from collapse_probe.results.sweep import Sweep
from collapse_probe.results.text import listed, number, numbered, plain
from collapse_probe.results.verdict import verdict_of

WIDTH = 160
METHODS = '.summary  .frame()  .matrix(name, "kappa")  .plot(name)  .report(folder)'
OTHERS = ".frame()  .plot(name)  .report(folder)"


def lines_of(results: Any) -> str:
    """The text that stands for findings, a comparison, interventions or a sweep: five lines at most."""
    makers: Mapping[type, Any] = {
        Findings: of_findings,
        Comparison: of_comparison,
        Interventions: of_interventions,
        Sweep: of_sweep,
    }
    make = next(make for kind, make in makers.items() if isinstance(results, kind))
    return "\n".join(textwrap.shorten(line, WIDTH, placeholder=" …") for line in make(results))


def subject(findings: Findings) -> str:
    """Model and images in words."""
    name = plain(findings.model.get("address") or findings.model.get("name"))
    if weights_only(findings):
        return f"{name}, its weights alone"
    return f"{name} on {plain(findings.data.get('images'))} images of {plain(findings.data.get('address'))}"


def of_findings(findings: Findings) -> list[str]:
    """Subject, verdict, two lines of numbers, and what can be asked."""
    said = verdict_of(findings).sentences
    numbers = [brief(each) for each in headlines(findings)]
    half = (len(numbers) + 1) // 2 if len(numbers) > 2 else len(numbers)
    rows = ["; ".join(part) for part in (numbers[:half], numbers[half:]) if part]
    return [
        f"Findings: {subject(findings)}",
        *said[:1],
        *rows,
        f"{len(findings.metrics)} metric{'' if len(findings.metrics) == 1 else 's'}: {METHODS}",
    ]


def brief(each: Headline) -> str:
    """A number with its interval, or with chance level and untrained copy, in few words."""
    name = each.name.partition(" of adjacent")[0]
    if name == "κ" and each.interval:
        return f"κ {each.written}, 95 % CI {each.interval}"
    return f"{name} {each.written}" + (f" (chance level {number(each.chance, each.digits)})" if each.chance else "")


def of_comparison(comparison: Comparison) -> list[str]:
    """The subjects with their κ; with more than three, the first and the last."""
    labels = list(comparison.subjects)
    shown = labels if len(labels) <= 3 else [labels[0], labels[-1]]
    kind = "checkpoints of one training" if comparison.trajectory else "subjects"
    images = {findings.data.get("images") for findings in comparison.subjects.values()}
    rows = []
    for label in shown:
        own = comparison.subjects[label].summary
        names = {"κ": "kappa_adjacent", "raw similarity": "attention_similarity_adjacent", "accuracy": "accuracy"}
        parts = [f"{name} {number(own[key])}" for name, key in names.items() if own.get(key) is not None]
        rows.append(f"{label}: {', '.join(parts) or 'no κ was measured'}")
    return [
        f"Comparison: {len(labels)} {kind} on {plain(images.pop() if len(images) == 1 else None)} images",
        *rows,
        f'["{labels[0]}"] gives the findings of a subject: {OTHERS}',
    ]


def of_interventions(interventions: Interventions) -> list[str]:
    """For each kind of replacement the block that changes the output most, and all blocks together."""
    name = plain(interventions.model.get("address") or interventions.model.get("name"))
    rows = []
    shown = [(kind, effects) for kind, effects in interventions.single.items() if not kind.endswith(OTHER)]
    for kind, effects in shown[:3]:
        known = [effect for effect in effects if effect.kl is not None]
        if not known:
            rows.append(f"{kind}: nothing could be replaced")
            continue
        largest = max(known, key=lambda effect: effect.kl or 0.0)
        most = f"most in {numbered(list(largest.blocks))}: KL {number(largest.kl)}"
        if (order := interventions.orders.get(kind, {}).get(GREEDY)) is not None:
            go = f"blocks {listed(sorted(order.blocks[: order.spared]))} can go" if order.spared else "none can go"
            rows.append(f"{kind}: {go}; one at a time {most}")
            continue
        whole = interventions.cumulative[kind][-1] if interventions.cumulative[kind] else None
        together = None if whole is None else whole.agreement
        kept = "" if together is None else f"; all together keep {100 * together:.1f} % of the top answers"
        rows.append(f"{kind}: {most}{kept}")
    data = interventions.data
    return [f"Interventions: {name} on {plain(data.get('images'))} images of {plain(data.get('address'))}", *rows, OTHERS]


def of_sweep(sweep: Sweep) -> list[str]:
    """What was varied, and how many cells ended how."""
    varied = "; ".join(f"{name} {', '.join(map(str, values))}" for name, values in sweep.varied.items())
    ended = f"{len(sweep.finished)} of {len(sweep.cells)} cells finished, {len(sweep.failed)} failed"
    seeds = f"{len(sweep.seeds)} seed{'' if len(sweep.seeds) == 1 else 's'}"
    return [f"Sweep of {plain(sweep.recipe.get('name'))}: {varied or 'nothing varied'}; {seeds}", ended, OTHERS]
