"""Writes docs/coverage.md: what is recorded in which model, what is left out of it, or why it is refused."""

from __future__ import annotations

import importlib.metadata
from collections import Counter

from coverage_bench import ABSENT, REFUSED, RIGHT, WRONG

HEAD = """# What is recorded in which model

Written by `make coverage`; not by hand. Each model is small, has random parameters with maps far from uniform, and runs in the
precisions named here. Maps are compared with an independent computation in float64 (of the model itself, or of every attention
kernel and softmax that it calls), tokens with the library's own, for batches of 1, 3 and 5 images; outputs and gradients are
compared bit for bit with and without the recording; nothing may be left behind, after an exception neither.

*right*: all that is recorded is right, and what is left out is listed. *refused*: the capture says in one sentence why not.
*wrong*: a map or a token is not the model's own. *does not run*: the model itself fails in this precision.
"""
PACKAGES = ("torch", "timm", "torchvision", "transformers", "open_clip_torch", "vit-pytorch")


def page(verdicts):
    """The whole page."""
    lines = [HEAD, "With " + ", ".join(f"{name} {_version(name)}" for name in PACKAGES) + ".", ""]
    lines += ["| | " + " | ".join((RIGHT, REFUSED, WRONG.lower(), ABSENT)) + " |", "|---|---|---|---|---|"]
    groups = {}
    for verdict in verdicts:
        groups.setdefault(verdict.family.split(":")[0], []).append(verdict)
    for family, members in (groups | {"all": verdicts}).items():
        for precision in dict.fromkeys(v.precision for v in members):
            counts = Counter(v.outcome for v in members if v.precision == precision)
            numbers = " | ".join(str(counts[outcome]) for outcome in (RIGHT, REFUSED, WRONG, ABSENT))
            lines.append(f"| {family}, {precision} | {numbers} |")
    for family, members in groups.items():
        lines += ["", f"## {family}", "", "| model | precision | recorded | left out, or why not |", "|---|---|---|---|"]
        for (name, *_), alike in _alike(members).items():
            first = alike[0]
            said = "; ".join(first.why) if first.outcome != RIGHT else "; ".join([*first.left_out, *first.why])
            heard = (
                first.heard
                if first.outcome == RIGHT
                else f"{first.outcome.lower()}" + (f" ({first.heard})" if first.heard else "")
            )
            precisions = ", ".join(v.precision for v in alike)
            lines.append(f"| {_cell(name)} | {precisions} | {_cell(heard)} | {_cell(said)[:400]} |")
    return "\n".join(lines) + "\n"


def _alike(members):
    """Verdicts that say the same in several precisions, together."""
    groups = {}
    for v in members:
        groups.setdefault((v.name, v.outcome, v.heard, tuple(v.why), v.left_out), []).append(v)
    return groups


def _cell(text):
    return text.replace("|", "\\|").replace("\n", " ")


def _version(name):
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "(not installed)"
