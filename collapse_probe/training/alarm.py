"""An alarm of a monitor: thresholds on what it measures, the error that stops a training, and the last state before it."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from torch import nn

from collapse_probe.distributed import told, unwrap
from collapse_probe.errors import AlarmError, ProcessError, SettingError
from collapse_probe.files import write_whole
from collapse_probe.registry import METRICS
from collapse_probe.results.findings import Findings
from collapse_probe.results.summary.places import extreme
from collapse_probe.results.summary.thresholds import BOUNDS, METRIC_OF, Threshold, nearest, parse
from collapse_probe.statistics.estimates import HEADLINES
from collapse_probe.training.run import save_whole

FOLDER = "last-good"
STATE = re.compile(r"step-\d{7,}\.(pth|safetensors)")
Save = Callable[[nn.Module, Path, int], Path]
"""Writes the model after a step to a path that lacks its suffix, and returns the whole path."""
_alarms = itertools.count()


def save_weights(model: nn.Module, path: Path, step: int) -> Path:
    """The state_dict of the model, as `load_checkpoint` reads it: one tensor at a time is copied from its device."""
    path = path.with_suffix(".pth")
    write_whole(path, lambda stream: save_whole({"state_dict": unwrap(model).state_dict(), "step": step}, stream))
    return path


@dataclass(frozen=True)
class Tripped:
    """How an alarm came to hold: what AlarmError says of it."""

    text: str
    alarm: str
    quantity: str
    value: float | None
    step: int
    block: int | None = None
    head: int | None = None
    state: str | None = None

    def error(self) -> AlarmError:
        """The error to raise."""
        facts = asdict(self)
        state = facts.pop("state")
        return AlarmError(facts.pop("text"), **facts, state=None if state is None else Path(state))


class Alarm:
    """The thresholds of a monitor, and the newest model for which none of them held.

    `metrics` are those that are measured. With a `folder` such a model is written there by `save`, as the only one:
    `folder/last-good/step-0001000.pth`, and `state` is its path. Raises SettingError for anything but `NAME OP NUMBER`, and for
    a number that none of the metrics gives.
    """

    def __init__(self, texts: Sequence[str], metrics: Sequence[str], folder: Path | None, save: Save = save_weights) -> None:
        self.rules = parse(texts)
        _check_given(self.rules, metrics)
        self.folder, self.save = None if folder is None else folder / FOLDER, save
        self.state: Path | None = None
        self.good_step: int | None = None
        self._names = (f"alarm/{number}/{turn}" for number in [next(_alarms)] for turn in itertools.count())

    def judge(self, findings: Findings, step: int) -> Tripped | None:
        """How the first threshold that trips does so, None where none does. SettingError for what the summary lacks.

        A number that is undefined trips, and so does any where activations of some images were not finite.
        """
        ill = findings.run.get("nonfinite") or {}
        for rule in self.rules:
            line = rule.line(findings.summary)
            value = findings.summary[rule.name]
            if line is None and not ill.get("images"):
                continue
            if line is None or value is None:
                why = f"{ill['images']} of {ill['of']} images are not finite" if ill.get("images") else "it is undefined"
                return self._undecided(rule, step, why)
            place = extreme(findings.metrics, rule.name, rule.sign)
            end = "lowest" if rule.sign[0] == "<" else "highest"
            where = ""
            if place is not None:
                where = f" {place.words}" if place.value == value else f", {end} {place.words} ({place.value:.6g})"
            what = f"{rule.name} is {value:.6g}{where}, for which the alarm {rule.text!r} stops the training"
            found = self._tripped(rule, float(value), step, what)
            return found if place is None else replace(found, block=place.block, head=place.head)
        return None

    def undecided(self, step: int, why: str) -> Tripped:
        """How it trips where nothing could be measured."""
        return self._undecided(self.rules[0], step, why)

    def _undecided(self, rule: Threshold, step: int, why: str) -> Tripped:
        what = f"{rule.name} cannot be told ({why}), which counts for the alarm {rule.text!r} and stops the training"
        return self._tripped(rule, None, step, what)

    def _tripped(self, rule: Threshold, value: float | None, step: int, what: str) -> Tripped:
        if self.state is not None:
            rest = f"the last state without an alarm, of step {self.good_step}, is {self.state}"
        elif self.folder is None:
            rest = "no state was saved: the monitor has no folder"
        else:
            rest = "no state was saved: since this monitor began, no measurement was without an alarm"
        state = None if self.state is None else str(self.state)
        return Tripped(f"step {step}: {what}; {rest}", rule.text, rule.name, value, step, state=state)

    def keep(self, model: nn.Module, step: int) -> None:
        """Write the model as the newest for which no alarm held, then remove the one before."""
        if self.folder is None:
            return
        self.state, self.good_step = self.save(model, self.folder / f"step-{step:07d}", step), step
        for old in self.folder.iterdir():
            if STATE.fullmatch(old.name) and old != self.state:
                old.unlink(missing_ok=True)

    def everywhere(self, tripped: Tripped | None) -> Tripped | None:
        """What the first process found, in all of them; what the others pass is not looked at."""
        content = told(next(self._names), None if tripped is None else json.dumps(asdict(tripped)))
        facts = None if content is None else json.loads(content)
        if facts is not None and "failed" in facts:
            raise ProcessError(facts["failed"])
        return None if facts is None else Tripped(**facts)

    def failed(self, error: BaseException) -> None:
        """Tell the other processes that the first could not measure."""
        text = f"the first process could not measure: {type(error).__name__}: {' '.join(str(error).split())[:300]}"
        told(next(self._names), json.dumps({"failed": text}))


def _check_given(rules: Sequence[Threshold], metrics: Sequence[str]) -> None:
    """SettingError for a threshold on a number that none of the metrics gives."""
    given = {"images", *(name for name, metric in METRIC_OF.items() if metric in metrics)}
    for name in metrics:
        # which of the two numbers one of the weights gives, its first result says; gram-drift is no metric of analyze
        if name != "gram-drift" and METRICS[name.partition("@")[0]].level == "weights":
            given |= {f"{name.replace('-', '_').replace('@', '_')}_{end}" for end in ("mean", "adjacent")}
    given |= {f"{name}{end}" for name in given if name in HEADLINES for end in BOUNDS[1:]}
    for rule in rules:
        if rule.name in given:
            continue
        metric = METRIC_OF.get(rule.name)
        if metric:
            hint = f"it is of the metric {metric}, which is not among those measured: {', '.join(metrics)}"
            hint += "; gram_drift=True measures it" if metric == "gram-drift" else ""
        else:
            hint = nearest(rule.name, given) or f"there are {', '.join(sorted(given))}"
        raise SettingError(f"the alarm {rule.text!r} is about {rule.name!r}, which this monitor does not measure; {hint}")
