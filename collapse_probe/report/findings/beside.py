"""Tables of what a metric found beside its values: sinks by kind, windows of blocks, boundaries of phases."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from collapse_probe.report.findings.tables import sensitivity_tables
from collapse_probe.report.html import Table
from collapse_probe.results.findings import Findings, MetricResult
from collapse_probe.results.readings import null_of, result_of
from collapse_probe.results.text import DASH, interval, number, numbered

KINDS = {"no_op": "no-op", "broadcast": "broadcast", "other": "neither"}
TOKENS = {"cls": "on the class token", "register": "on a register", "patch": "on a patch", "unknown": "on a token not told"}
MOST_WINDOWS = 6


def sink_tables(findings: Findings) -> list[Table]:
    """How many sinks of each kind an image has, on which tokens, and under other thresholds; values before and behind W_O."""
    found = []
    for suffix, values in (("", "values of the head"), ("@out", "values as they are written")):
        shown = (
            name for name in findings.metrics if name.partition("@")[0] == "sink-kind" and ("@out" in name) == bool(suffix)
        )
        result = next((each for name in shown if (each := result_of(findings, name)) is not None), None)
        if result is not None and result.details.get("per_image"):
            found += [_sinks(result, values), _thresholds(result, values)]
    return found


def _sinks(result: MetricResult, values: str) -> Table:
    details = result.details
    tokens = [name for name in TOKENS if any(name in each for each in details["by_class"].values())]
    rows = [
        (
            label,
            number(details["per_image"][kind], 2),
            interval(details["per_image_ci95"][kind], 2),
            *(number(details["by_class"][kind].get(name, 0.0), 2) for name in tokens),
        )
        for kind, label in KINDS.items()
    ]
    heads, blocks = (result.array.shape[axis] for axis in (1, 0))
    measured = int(np.isfinite(result.array).any(1).sum())
    which = f"all {blocks} blocks" if measured == blocks else f"the {measured} of {blocks} blocks that could be measured"
    where = f"over {which}, with up to {heads} heads each"
    note = f"Sinks an image, {where}. The first prefix token counts as the class token."
    header = ("kind", "per image", "95 % CI", *(TOKENS[name] for name in tokens))
    return Table(header, tuple(rows), (note,), f"Sinks of each kind, {values}")


def _thresholds(result: MetricResult, values: str) -> Table:
    details = result.details
    rows = [
        (
            f"sink: {rule}" if "%" in rule else f"sink: every query gives 1 − ε, {rule}",
            *(number(row[kind], 2) for kind in KINDS),
        )
        for rule, row in details["by_rule"].items()
    ]
    rows += [(f"no-op: ratio ≤ {limit}", number(count, 2), DASH, DASH) for limit, count in details["by_ratio"]["no_op"].items()]
    high = details["by_ratio"]["broadcast"].items()
    rows += [(f"broadcast: ratio ≥ {limit}", DASH, number(count, 2), DASH) for limit, count in high]
    note = "Sinks an image under other thresholds than the authors': where counts move much, they are a choice and no finding."
    return Table(("threshold", *KINDS.values()), tuple(rows), (note,), f"Other thresholds, {values}")


def window_tables(findings: Findings) -> list[Table]:
    """Which consecutive blocks turn the tokens least."""
    result = result_of(findings, "angular-distance")
    windows: Sequence[Mapping[str, Any]] = [] if result is None else result.details.get("windows", ())
    if result is None or not windows:
        return []
    chance, fresh = (null_of(result, role) for role in ("other_token", "untrained"))
    rows = []
    for each in windows[:MOST_WINDOWS]:
        first, last = each["first"], each["first"] + each["blocks"]
        others = (DASH if matrix is None else number(matrix[first, last]) for matrix in (chance, fresh))
        which = numbered(list(range(first, last)))
        rows.append((str(each["blocks"]), which, number(each["distance"]), interval(each["ci95"]), *others))
    note = (
        "The window with the least angle of all is named: being picked as the least makes it look smaller than it is, and "
        "small angles are usual in late blocks, trained or not. Whether blocks can go, dropping them says (intervene --drop)."
    )
    header = ("blocks", "which turn the tokens least", "angle / π", "95 % CI", "chance level", "untrained copy")
    return [Table(header, tuple(rows), (note,), "Where the angle over n blocks is least")]


def boundary_tables(findings: Findings) -> list[Table]:
    """Where phases begin, how sure, and how many an untrained copy and shuffled blocks have."""
    result = result_of(findings, "depth-phases")
    if result is None or "shuffled" not in result.details:
        return []
    details, fresh = result.details, null_of(result, "untrained")
    rows = []
    for each in details["boundaries"]:
        ends = each.get("ci95")
        sure = DASH if ends is None else f"block {ends[0]}" if ends[0] == ends[1] else f"blocks {ends[0]} to {ends[1]}"
        same = DASH if each.get("same_count") is None else f"{number(100 * each['same_count'], 0)} %"
        rows.append((f"block {each['first']}", sure, same))
    shuffled = details["shuffled"]
    notes = [
        f"{details['phases']} {'phase' if details['phases'] == 1 else 'phases'}; with the blocks in random order "
        f"{number(shuffled['mean'], 1)} on average and {shuffled['most']} at most, over {shuffled['orders']} orders."
    ]
    if fresh is not None:
        notes.append(f"The untrained copy has {number(float(fresh.max()) + 1, 1).removesuffix('.0')}.")
    if not rows:
        rows = [("no block but the first", DASH, DASH)]
    header = ("a phase begins with", "in 95 % of resamples of the images", "resamples with as many phases")
    return [Table(header, tuple(rows), tuple(notes), "Boundaries of phases")]


TABLES: Mapping[str, Callable[[Findings], list[Table]]] = {
    "angular-distance": window_tables,
    "depth-phases": boundary_tables,
    "similarity-ratio": sensitivity_tables,
    "sink-kind": sink_tables,
}
"""By the name of the figure under which they stand."""
