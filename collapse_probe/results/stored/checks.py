"""What stored results must look like before anything is made of them: fields, types, shapes and ranges.

A check takes a value and where it stands, and raises ValueError that says what was expected there and what came.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

Check = Callable[[Any, str], None]
SLACK = 1e-3  # of a range, for rounding
LARGEST = 2**63
RANGES = {  # of a metric, by its unit; others may be any number
    "cosine": (-1.0, 1.0),
    "|cosine|": (-1.0, 1.0),
    "1 − mean |cosine|": (0.0, 1.0),
    "share of vectors": (0.0, 1.0),
    "nats": (0.0, math.inf),
    "pixels": (0.0, math.inf),
    "rank": (0.0, math.inf),
    "adjacent pairs": (0.0, math.inf),
    "ℓ2 norm": (0.0, math.inf),
}
UNITS = {  # of metrics whose findings were stored without their description
    **dict.fromkeys(("attention-similarity", "head-similarity", "image-similarity", "feature-similarity"), "cosine"),
    "attention-entropy": "nats",
    "patch-diversity": "1 − mean |cosine|",
    "similar-blocks": "adjacent pairs",
}
EVERY_NUMBER = (-math.inf, math.inf)


def fail(where: str, expected: str, value: object) -> None:
    """Raise ValueError for a value that is not what was expected."""
    shown = repr(value)
    raise ValueError(f"{where}: expected {expected}, came {shown if len(shown) <= 60 else shown[:57] + '…'}")


def anything(value: Any, where: str) -> None:
    """No check."""


def text(value: Any, where: str) -> None:
    """A string."""
    if not isinstance(value, str):
        fail(where, "a text", value)


def flag(value: Any, where: str) -> None:
    """True or false."""
    if not isinstance(value, bool):
        fail(where, "true or false", value)


def number(low: float = -math.inf, high: float = math.inf) -> Check:
    """A finite number from `low` to `high`, with SLACK."""

    def check(value: Any, where: str) -> None:
        finite = type(value) in (int, float) and -LARGEST < value < LARGEST
        if not finite or not low - SLACK <= value <= high + SLACK:
            bounds = {(True, True): "", (False, True): f" from {low:g} up", (True, False): f" up to {high:g}"}
            fail(where, f"a number{bounds.get((math.isinf(low), math.isinf(high)), f' from {low:g} to {high:g}')}", value)

    return check


def count(value: Any, where: str) -> None:
    """A whole number from 0 up."""
    if type(value) is not int or not 0 <= value < LARGEST:
        fail(where, "a whole number from 0 up", value)


def maybe(check: Check) -> Check:
    """`check`, or null."""
    return lambda value, where: None if value is None else check(value, where)


def either(*checks: Check) -> Check:
    """Any of several checks."""

    def check(value: Any, where: str) -> None:
        errors = []
        for one in checks:
            try:
                return one(value, where)
            except ValueError as error:
                errors.append(error)
        raise errors[0]

    return check


def choice(*values: object) -> Check:
    """One of these values."""
    return lambda value, where: None if value in values else fail(where, f"one of {', '.join(map(str, values))}", value)


def each(check: Check, length: int | None = None) -> Check:
    """A list, of `length` where given, whose items pass `check`."""

    def check_all(value: Any, where: str) -> None:
        if not isinstance(value, list) or (length is not None and len(value) != length):
            fail(where, "a list" if length is None else f"a list of {length}", value)
        for place, item in enumerate(value):
            check(item, f"{where}[{place}]")

    return check_all


def table(check: Check) -> Check:
    """An object whose values pass `check`."""

    def check_all(value: Any, where: str) -> None:
        if not isinstance(value, dict):
            fail(where, "an object", value)
        for name, item in value.items():
            check(item, f"{where}.{name}")

    return check_all


def record(fields: Mapping[str, Check], optional: Mapping[str, Check] | None = None, *, more: bool = True) -> Check:
    """An object with these fields, and with `more` also others."""

    def check(value: Any, where: str) -> None:
        if not isinstance(value, dict):
            fail(where, "an object", value)
        for name, one in fields.items():
            if name not in value:
                raise ValueError(f"{where} lacks {name}")
            one(value[name], f"{where}.{name}")
        for name, one in (optional or {}).items():
            if name in value:
                one(value[name], f"{where}.{name}")
        if not more and (unknown := [name for name in value if name not in {**fields, **(optional or {})}]):
            raise ValueError(f"{where} has {unknown[0]!r}, which it cannot have")

    return check


def numbers(value: Any, where: str, shape: tuple[int, ...] | None = None, span: tuple[float, float] = EVERY_NUMBER) -> Any:
    """Nested lists of numbers within `span`, with SLACK, or null, of one shape, or of the `shape` given; returns the shape."""
    cells: list[Any] = []

    def shape_of(part: Any, depth: int) -> tuple[int, ...]:
        if not isinstance(part, list):
            cells.append(part)
            return ()
        if depth > 8:
            fail(where, "numbers in lists", value)
        shapes = {shape_of(item, depth + 1) for item in part}
        if len(shapes) > 1:
            fail(where, "rows of one length", value)
        return (len(part), *(shapes.pop() if shapes else ()))

    came = shape_of(value, 0)
    for cell in cells:
        maybe(number(*span))(cell, where)
    if shape is not None and came != shape:
        fail(where, f"numbers of the shape {list(shape)}", list(came))
    return came


def interval(value: Any, where: str, shape: tuple[int, ...]) -> None:
    """Two ends for every number of `shape`, the lower one first."""
    numbers(value, where, (*shape, 2))
    ends = np.array(value, dtype=np.float64)
    if (ends[..., 0] > ends[..., 1] + SLACK).any():
        fail(where, "intervals with the lower end first", ends[ends[..., 0] > ends[..., 1]][0].tolist())


SHARE = maybe(number(0, 1))
ENDS = maybe(each(maybe(number()), 2))
NOTES = {"notes": each(text)}
DESCRIPTION = record(
    {"title": text, "seen": text, "limits": text, "level": text, "panel": text, "unit": text, "logarithmic": flag},
    {"top": maybe(number()), "reference": maybe(each(text, 2))},
    more=False,
)
COST = record(
    {},
    {
        "flops": maybe(number(0)),
        "images_per_second": maybe(number(0)),
        "batch_size": count,
        "device": text,
        "note": text,
    },
)
RUN = record(
    {},
    {
        "id": maybe(text),
        "command": text,
        "created": text,
        "device": text,
        "seed": number(),
        "versions": table(text),
        "cost": maybe(COST),
        "outputs": maybe(record({}, {"classes": count, "accuracy": SHARE, "reason": text})),
        **NOTES,
    },
)
PLACES = record({"why": text, "blocks": each(count)})
MODEL = record(
    {},
    {
        **dict.fromkeys(("address", "source", "name", "weights", "checkpoint", "checkpoint_sha256", "class"), maybe(text)),
        **dict.fromkeys(("parameters", "blocks", "tokens", "prefix_tokens", "width"), maybe(count)),
        "heads": maybe(either(count, each(count))),
        "blocks_not_loaded": maybe(each(count)),
        "loaded": maybe(record({"tensors": count, "of": count})),
        "mixes_maps": flag,
        "preprocess": maybe(table(anything)),
        **dict.fromkeys(("block_names", "attention_layers", "places"), each(text)),
        "adjacent": each(flag),
        "uncompared": each(PLACES),
        "left_out": each(record({"where": text, "why": text})),
    },
)
DATA = record(
    {"images": count},
    {
        **dict.fromkeys(("address", "names_sha256"), maybe(text)),
        "skipped": each(record({"name": text, "reason": text})),
    },
)


def summary(value: Any, where: str) -> None:
    """Flat names and numbers: shares, cosines and counts within their range."""
    table(maybe(number()))(value, where)
    for name, each_value in value.items():
        if "difference" in name or "change" in name or each_value is None:
            continue
        if "similarity" in name and name.endswith(("_adjacent", "_mean")) and "weight" not in name:
            number(-1, 1)(each_value, f"{where}.{name}")
        elif name in ("accuracy", "attention_entropy_share", "patch_diversity_last"):
            number(0, 1)(each_value, f"{where}.{name}")
        elif name == "images" or (name.startswith("similar_blocks") and "_ci_" not in name):
            number(0)(each_value, f"{where}.{name}")


NULLS = record({"images": table(count), "reasons": table(text), "kappa_ci95": anything}, {"spread": table(anything)})
BESIDE_NULLS = ("images", "reasons", "kappa_ci95", "spread")


def metric(value: Any, where: str) -> None:
    """One entry of `metrics` in findings.json: arrays of one shape, values and nulls within the range of the metric's unit."""
    fields = {"dims": each(text), "definition": text, "settings": table(anything), "nulls": maybe(NULLS)}
    later = {"details": table(anything), "description": DESCRIPTION, "adjacent": each(flag), "covers": text}
    later |= {"collapsed": maybe(choice("high", "low")), "point": maybe(text), "not_applicable": maybe(text)}
    record({**fields, "values": anything, "stderr": anything, "ci95": anything}, {**later, "head_mean": anything})(value, where)
    if value["values"] is None:
        if not value.get("not_applicable"):
            raise ValueError(f"{where} has no values, and no reason in not_applicable")
        if any(value.get(part) is not None for part in ("stderr", "ci95", "nulls", "head_mean")):
            raise ValueError(f"{where} has no values, but errors or nulls of them")
        return
    unit = UNITS.get(where.rpartition(".")[2].partition("@")[0], value.get("description", {}).get("unit"))
    span = RANGES.get(unit, EVERY_NUMBER)
    shape = numbers(value["values"], f"{where}.values", span=span)
    if len(shape) != len(value["dims"]) or 0 in shape:
        fail(f"{where}.values", f"one axis for each of {', '.join(value['dims'])}", list(shape))
    if value["dims"][0] in value["dims"][1:] and len(set(shape)) > 1:
        fail(f"{where}.values", "a square matrix", list(shape))
    _errors(value, where, shape)
    if (adjacent := value.get("adjacent")) and value["dims"][0] in ("block", "depth") and len(adjacent) != shape[0] - 1:
        fail(f"{where}.adjacent", f"a list of {shape[0] - 1}", adjacent)
    if (mean := value.get("head_mean")) is not None:
        record({"values": anything, "stderr": anything, "ci95": anything}, more=False)(mean, f"{where}.head_mean")
        numbers(mean["values"], f"{where}.head_mean.values", shape[:1], span)
        _errors(mean, f"{where}.head_mean", shape[:1])
        if mean["stderr"] is None or mean["ci95"] is None:
            raise ValueError(f"{where}.head_mean lacks its errors")
    if value["nulls"] is not None:
        _nulls(value["nulls"], f"{where}.nulls", shape, span)


def _errors(value: Mapping[str, Any], where: str, shape: tuple[int, ...]) -> None:
    if value["stderr"] is not None:
        numbers(value["stderr"], f"{where}.stderr", shape, (0.0, math.inf))
    if value["ci95"] is not None:
        interval(value["ci95"], f"{where}.ci95", shape)


def _nulls(value: Mapping[str, Any], where: str, shape: tuple[int, ...], span: tuple[float, float]) -> None:
    for name, null in value.items():
        if name not in BESIDE_NULLS and null is not None:
            numbers(null, f"{where}.{name}", shape, EVERY_NUMBER if name == "kappa" else span)
    if value["kappa_ci95"] is not None:
        interval(value["kappa_ci95"], f"{where}.kappa_ci95", shape)
    for name, part in value.get("spread", {}).items():
        place = f"{where}.spread.{name}"
        if name == "beyond_p":
            numbers(part, place, shape, (0.0, 1.0))
        elif name == "untrained_beyond_p":
            each(lambda p, at: numbers(p, at, shape, (0.0, 1.0)))(part, place)
        elif name == "untrained_beyond":
            table(lambda shares, at: numbers(shares, at, shape))(part, place)
        elif name == "untrained_seeds":
            record({"seeds": each(count)})(part, place)
            for side in ("sd", "low", "high"):
                if side in part:
                    numbers(part[side], f"{place}.{side}", shape)
        else:
            interval(part, place, shape)


ANSWER = record(
    {"case": text, "sentences": each(text)},
    {
        "collapsed": maybe(flag),
        "label": text,
        **dict.fromkeys(("caveats", "rules", "caveat_rules", "pairs"), each(text)),
    },
)
FINDINGS = record(
    {"model": MODEL, "data": DATA, "run": RUN, "metrics": table(metric), "summary": summary},
    {
        "presets": table(anything),
        "sureness": table(maybe(table(anything))),
        "verdict": each(table(anything)),
        "answer": lambda value, where: None if value == {} else ANSWER(value, where),
    },
)
PAIRED = {
    **dict.fromkeys(("first", "second", "difference", "p", "q", "effect"), each(maybe(number()))),
    **dict.fromkeys(("images", "left_out"), each(count)),
    "interval": each(text),
    "ci95": each(ENDS),
}


def difference(value: Any, where: str) -> None:
    """One quantity of a pair of subjects: a number of each kind for every place, and their mean."""
    record({"axis": text, "places": each(count), "overall": record(PAIRED), **PAIRED})(value, where)
    for name in PAIRED:
        for part, length, place in ((value, len(value["places"]), where), (value["overall"], 1, f"{where}.overall")):
            if len(part[name]) != length:
                fail(f"{place}.{name}", f"a list of {length}", part[name])
    for part in (value, value["overall"]):
        for name, span in (("p", (0, 1)), ("q", (0, 1)), ("effect", (-1, 1))):
            numbers(part[name], f"{where}.{name}", span=span)


PAIR = record(
    {
        "first": text,
        "second": text,
        "images": count,
        "metrics": table(difference),
        "counts": each(record({"name": text, "threshold": number(), "first": number(0), "second": number(0), "ci95": ENDS})),
        "not_comparable": table(text),
        "agreement": record(
            {}, {"top1": SHARE, "kl": maybe(number(0)), "images": count, "reason": text, "top1_ci95": ENDS}, more=False
        ),
    }
)
SUBJECT = record({"label": text, "folder": text}, {"run": maybe(text)})


def comparison(value: Any, where: str) -> None:
    """comparison.json: subjects with labels of their own, and pairs of them."""
    record({"run": RUN, "trajectory": flag, "subjects": each(SUBJECT), "pairs": each(PAIR)})(value, where)
    labels = [entry["label"] for entry in value["subjects"]]
    if not labels or len(set(labels)) < len(labels):
        fail(f"{where}.subjects", "subjects, each with another label", labels)
    for entry in value["subjects"]:
        parts = entry["folder"].split("/")
        if parts[0] != "subjects" or len(parts) != 2 or parts[1] in ("", ".", "..") or "\0" in parts[1]:
            fail(f"{where}.subjects", "folders inside subjects/", entry["folder"])
    for pair in value["pairs"]:
        for side in ("first", "second"):
            if pair[side] not in labels:
                fail(f"{where}.pairs", f"labels of subjects ({', '.join(labels)})", pair[side])


EFFECT = record(
    {"kind": text, "blocks": each(count)},
    {
        "kl": maybe(number(0)),
        "agreement": SHARE,
        "accuracy": SHARE,
        "accuracy_change": maybe(number(-1, 1)),
        **dict.fromkeys(("kl_ci95", "agreement_ci95", "accuracy_change_ci95", "moved_ci95", "shared_ci95", "sinks_ci95"), ENDS),
        "moved": maybe(number(0)),
        "sinks": maybe(number(0)),
        "shared": SHARE,
        "not_applicable": maybe(text),
    },
)
_INTERVENTIONS = record(
    {
        "model": MODEL,
        "data": DATA,
        "run": RUN,
        "kinds": table(text),
        "plain": record({"accuracy": SHARE}, {"conditions": each(anything), "reason": text}),
        "similarity": table(each(maybe(number()))),
        "single": table(each(EFFECT)),
        "cumulative": table(each(EFFECT)),
    },
    {
        "windows": table(each(EFFECT)),
        "untrained": record({"images": count, "answers": count, "effects": each(EFFECT)}),
        "orders": table(table(record({"blocks": each(count), **dict.fromkeys(("chosen", "settled", "priced"), each(EFFECT))}))),
    },
)


def interventions(value: Any, where: str) -> None:
    """interventions.json: the same kinds of replacement in every part."""
    _INTERVENTIONS(value, where)
    for part in ("kinds", "cumulative"):
        if missing := [kind for kind in value["single"] if kind not in value[part]]:
            raise ValueError(f"{where}.{part} lacks {missing[0]}")
    for kind, orders in value.get("orders", {}).items():
        for how, order in orders.items():
            if len({len(each) for each in order.values()}) > 1:
                raise ValueError(f"{where}.orders.{kind}.{how} has not one effect for each block")


CELL = record(
    {"name": text, "values": table(anything), "seed": count},
    {
        "status": choice("finished", "failed", "waiting"),
        "reason": text,
        "accuracy": SHARE,
        "loss": maybe(number()),
        "parameters": maybe(count),
        "train_seconds": maybe(number(0)),
        "measure_seconds": maybe(number(0)),
        "names_sha256": text,
        "numbers": summary,
        "untrained": summary,
    },
    more=False,
)


def sweep(value: Any, where: str) -> None:
    """sweep.json: cells that have a value for every varied name."""
    fields = {"recipe": table(anything), "varied": table(each(anything)), "seeds": each(count), "changes": table(anything)}
    record({**fields, "data": table(anything), "run": RUN, "notes": each(text), "cells": each(CELL)})(value, where)
    for place, cell in enumerate(value["cells"]):
        if missing := [name for name in value["varied"] if name not in cell["values"] and name != "seed"]:
            raise ValueError(f"{where}.cells[{place}] has no value of {missing[0]}")
