"""The end of the page: the definition, settings and nulls of each metric; model, data and run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from collapse_probe.report.style import NULL_LABELS
from collapse_probe.results.findings import Findings, MetricResult, Nulls
from collapse_probe.results.readings import weights_only
from collapse_probe.results.text import DASH, plain, spans

MOST_SKIPPED = 200  # names of skipped images that the page lists
COLLAPSED = {"high": "high values are the collapsed end", "low": "low values are the collapsed end"}
POINTS = {"probs": "the softmax map", "weights": "the final map, which multiplies the values"}
UNITS = {"seconds": "{:,.1f} s", "images_per_second": "{:,.1f}", "self_check": "{:.2g}"}
FIRST = {
    "model": ("address", "source", "name", "weights", "checkpoint", "checkpoint_sha256", "class", "preprocess"),
    "data": ("address", "images", "bundled", "names_sha256"),
    "run": ("command", "device", "dtype", "versions", "self_check"),
}
OF_IMAGES = ("batch_size", "images_per_second", "tile_bytes", "until_ci")  # facts of a run that mean nothing without images
SAID_ABOVE = ("adjacent", "places", "uncompared", "left_out")  # facts of a model that the page tells beside its numbers
LABELS = {
    "weights": "parameters are",
    "parameters": "number of parameters",
    "shares_weights": "shares parameters",
    "self_check": "self-check, worst error",
    "names_sha256": "names, SHA-256",
    "checkpoint_sha256": "checkpoint, SHA-256",
    "peak_memory_bytes": "peak memory",
}


@dataclass(frozen=True)
class Entry:
    """A heading, a paragraph and its facts as (name, value)."""

    title: str
    text: str
    facts: tuple[tuple[str, str], ...]


def definitions(findings: Findings) -> list[Entry]:
    """What each metric is, how it was set, and on how many images its nulls were taken."""
    return [Entry(name, result.definition, tuple(_metric(result))) for name, result in findings.metrics.items()]


def _metric(result: MetricResult) -> list[tuple[str, str]]:
    if result.not_applicable is not None:
        return [("not applicable", result.not_applicable)]
    facts = [("axes", " × ".join(result.dims))]
    facts += [("collapse", COLLAPSED[result.collapsed])] if result.collapsed in COLLAPSED else []
    facts += [("taken at", POINTS.get(result.point, result.point))] if result.point else []
    facts += [("numbers are", result.covers)] if result.covers else []
    for key, value in {**result.settings, **result.details}.items():
        if key == "point" and result.point:
            continue  # said above
        text = f"{' × '.join(map(str, np.shape(value)))} numbers, in findings.json" if np.ndim(value) > 1 else plain(value)
        if isinstance(value, (list, tuple)) and value and isinstance(value[0], Mapping):
            text = f"a table of {len(value)} rows, in findings.json"
        facts.append((str(key).replace("_", " "), text))
    nulls = Nulls({}, {}) if result.nulls is None else result.nulls
    for role, values in nulls.values.items():
        name, count = f"compared with: {NULL_LABELS.get(role, role)}", nulls.images.get(role)
        if values is None:
            facts.append((name, nulls.reasons.get(role, "not taken in this run")))
        elif role != "kappa":  # made of the others, on their images
            facts.append((name, f"on {count:,} images" if count else "taken"))
    return facts


def not_measured(findings: Findings) -> list[tuple[str, str]]:
    """Each metric without values, and why."""
    refused = {name: result.not_applicable for name, result in findings.metrics.items() if result.values is None}
    return [(name, reason or "no values were stored") for name, reason in refused.items()]


def left_out(findings: Findings) -> list[tuple[str, str, str]]:
    """The layers that the attention metrics leave out, their numbers on the axis of blocks, and why."""
    stored = [(each, list(each["blocks"])) for each in findings.model.get("left_out") or ()]
    numbers = [f"block{'s' if len(blocks) > 1 else ''} {spans(blocks)}" if blocks else "" for _, blocks in stored]
    return [(str(each["where"]), which, str(each["why"])) for (each, _), which in zip(stored, numbers, strict=True)]


def provenance(findings: Findings) -> list[Entry]:
    """Model, data and run as facts: the important ones first, then everything else that was stored.

    Without images there is no data to speak of, and nothing in the run that counts images.
    """
    model = Entry("Model", "", _facts("model", {key: value for key, value in findings.model.items() if key not in SAID_ABOVE}))
    if weights_only(findings):
        run = {key: value for key, value in findings.run.items() if key not in OF_IMAGES}
        return [model, Entry("Run", "", (("images", "none: the metrics are of the parameters alone"), *_facts("run", run)))]
    left_out = findings.data.get("left_out") or {}
    unreadable = [image for image in findings.data.get("skipped") or () if image.get("reason") not in left_out]
    counts = [("skipped images", f"{len(unreadable):,}"), ("files that were not read", f"{sum(left_out.values()):,}")]
    data = {key: value for key, value in findings.data.items() if key not in ("skipped", "left_out")}
    return [model, Entry("Data", "", (*_facts("data", data), *counts)), Entry("Run", "", _facts("run", findings.run))]


def _facts(section: str, stored: Mapping[str, Any]) -> tuple[tuple[str, str], ...]:
    keys = dict.fromkeys([*(key for key in FIRST[section] if key in stored), *stored])
    return tuple((LABELS.get(key, key.replace("_", " ")), _fact(key, stored[key])) for key in keys)


def _fact(key: str, value: Any) -> str:
    if value is None:
        return f"{DASH} (not recorded, or there is none)"
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return plain(value)
    if key.endswith("_bytes"):
        return f"{value / 2**20:,.0f} MiB"
    if key in UNITS:
        return UNITS[key].format(value)
    return f"{value:,}" if isinstance(value, int) and key != "seed" else plain(value)


def skipped(findings: Findings) -> tuple[list[tuple[str, str]], int]:
    """The first skipped images and files with their reasons, and how many more there are."""
    images = list(findings.data.get("skipped") or ())
    listed = [(plain(image.get("name")), plain(image.get("reason"))) for image in images[:MOST_SKIPPED]]
    return listed, len(images) - len(listed)
