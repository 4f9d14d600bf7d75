"""What a preset is: the metrics of one paper with every choice fixed, and who made each choice."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from collapse_probe.errors import SettingError
from collapse_probe.sockets import PRESETS

Maker = Literal["paper", "code", "our reading"]


@dataclass(frozen=True)
class Choice:
    """One choice behind a number: what had to be decided, how it is decided here, and after whom.

    `follows` is "paper" (the text or a figure), "code" (the authors' released code) or "our reading" (neither settles it).
    """

    choice: str
    value: str
    follows: Maker


@dataclass(frozen=True)
class Preset:
    """The metrics of one paper, each under a name of the table of metrics and with the settings that the name stands for.

    `version` counts up whenever a metric, a setting or a choice changes, so that two findings with one preset and version
    were measured alike. `follows` says which of the two decides where paper and code differ; `paper` and `code` say where they
    are to be found.
    """

    name: str
    version: str
    summary: str
    paper: str
    code: str
    follows: Literal["paper", "code"]
    metrics: Mapping[str, Mapping[str, Any]]
    choices: tuple[Choice, ...]

    def record(self) -> dict[str, Any]:
        """What the findings keep of it: plain data."""
        return {
            "version": self.version,
            "summary": self.summary,
            "follows": self.follows,
            "source": {"paper": self.paper, "code": self.code},
            "metrics": list(self.metrics),
            "choices": [vars(choice) for choice in self.choices],
        }


def with_presets(metrics: Iterable[str], presets: Iterable[str]) -> tuple[str, ...]:
    """The metrics asked for by name and those of the presets, each once. Raises UnknownNameError for a preset that is none."""
    if isinstance(presets, str):
        raise SettingError(f"presets are a sequence of names, such as ({presets!r},), not the text {presets!r}")
    chosen: list[Preset] = [PRESETS[name] for name in presets]
    return tuple(dict.fromkeys((*metrics, *(name for preset in chosen for name in preset.metrics))))


def records(presets: Iterable[str]) -> dict[str, dict[str, Any]]:
    """The record of each preset by name, as the findings keep it."""
    return {name: PRESETS[name].record() for name in presets}
