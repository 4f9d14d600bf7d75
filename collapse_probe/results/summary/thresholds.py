"""Thresholds on the numbers of a summary, `NAME OP NUMBER`: those of `--fail-on`, and of alarms while training."""

from __future__ import annotations

import difflib
import math
import operator
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from collapse_probe.errors import SettingError

Numbers = Mapping[str, "float | int | None"]
OPERATORS = {
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
    "==": operator.eq,
    "!=": operator.ne,
}
SYNTAX = re.compile(r"\s*([A-Za-z_]\w*)\s*([<>=!]=|[<>])\s*([-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?)\s*")
POINTS, BOUNDS = ("", "_row", "_centred", "_probs"), ("", "_ci_low", "_ci_high")
METRIC_OF = {
    **{"images": "", "accuracy": "", "attention_entropy_share": "attention-entropy"},
    **{f"{name}_similarity_mean": f"{name}-similarity" for name in ("head", "image")},
    **{"feature_similarity_adjacent": "feature-similarity", "attention_entropy_mean": "attention-entropy"},
    "patch_diversity_last": "patch-diversity",
    **{f"gram_drift_last{end}": "gram-drift" for end in BOUNDS},
    **{
        f"{name}{point}_adjacent": f"attention-similarity{point.replace('_', '@')}"
        for name in ("attention_similarity", "other_token", "kappa")
        for point in POINTS
    },
    **{
        f"similar_blocks{point}{end}": f"similar-blocks{point.replace('_', '@')}"
        for point in ("", "_probs")
        for end in (*BOUNDS, "_corrected", "_pairs")
    },
}
"""The numbers of a summary but for those of weights, and the metric that each is of; empty for those of no metric."""
OF_WEIGHTS = re.compile(
    r"(weight_(rank|similarity|orthogonality)|hyperspherical_energy|qk_spectrum)\w*_(mean|adjacent)(_untrained)?"
)
OF_EFFECTS = "(kl|agreement|accuracy_change)"
EFFECTS = re.compile(
    rf"images|accuracy|(share|mean|donor|uniform|identity|skip)_(largest|all)_{OF_EFFECTS}"
    rf"|(prefix_(zero|mean|noise|donor)|sinks_(zero|mean|donor|redirect))(_other)?_largest_{OF_EFFECTS}"
    rf"|drop_(block|attention|mlp)_(spared|(largest|spared)_{OF_EFFECTS})"
)


@dataclass(frozen=True)
class Threshold:
    """`number` that the value called `name` in a summary is compared with."""

    text: str
    name: str
    sign: str
    number: float

    def line(self, numbers: Numbers) -> str | None:
        """One line where the threshold trips, else None; an undefined value trips. SettingError for an unknown name."""
        if self.name not in numbers:
            known = nearest(self.name, numbers) or f"there are {', '.join(sorted(numbers))}"
            raise SettingError(f"threshold {self.text!r} names {self.name!r}, which the summary does not hold; {known}")
        value, text = numbers[self.name], f"threshold {self.text!r}"
        if value is None or value != value:
            return f"{text} cannot be decided and counts as tripped: {self.name} is undefined"
        return f"{text} tripped: {self.name} is {value:.6g}" if OPERATORS[self.sign](value, self.number) else None


def parse(texts: Sequence[str]) -> list[Threshold]:
    """The thresholds that the texts state. SettingError for anything but NAME OP NUMBER, and for a number that is too large."""
    rules = []
    for text in texts:
        match = SYNTAX.fullmatch(text)
        if match is None:
            raise SettingError(
                f"expected NAME OP NUMBER, OP one of {' '.join(OPERATORS)}, as in 'similar_blocks > 4'; came {text!r}"
            )
        if not math.isfinite(number := float(match[3])):
            raise SettingError(f"{match[3][:40]} is too large for a number")
        rules.append(Threshold(text.strip(), match[1], match[2], number))
    return rules


def nearest(name: str, known: Collection[str]) -> str:
    """A question with the names most like `name`; empty where none is."""
    near = difflib.get_close_matches(name, list(known), n=3, cutoff=0.5)
    return f"did you mean {' or '.join(near)}?" if near else ""


def check_names(rules: Sequence[Threshold], command: str) -> None:
    """SettingError for a name that no run of the command has in its summary, as far as no plug-in brings others."""
    from collapse_probe.registry import METRICS, loaded_plugins

    names = {f"{name}{end}": None for name in METRIC_OF for end in BOUNDS}
    if command == "compare":
        names |= {f"{name}_difference": None for name in names}
    for rule in () if loaded_plugins or METRICS.has_entry_points else rules:
        name = rule.name.removesuffix("_difference") if command == "compare" else rule.name
        known = EFFECTS.fullmatch(name) if command == "intervene" else rule.name in names or OF_WEIGHTS.fullmatch(name)
        if not known:
            hint = nearest(rule.name, names) if command != "intervene" else ""
            hint = hint or "the summary that --json prints has them"
            raise SettingError(f"no run of {command} has a number {rule.name!r}; {hint}")
