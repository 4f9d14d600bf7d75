"""The presets that a run followed, each with its metrics, its sources, and who decided what."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from collapse_probe.findings import Findings
from collapse_probe.tables import Table
from collapse_probe.words import plain

DECIDED = {
    "paper": "the paper decides where its code differs",
    "code": "the authors' code decides where the paper differs",
}


@dataclass(frozen=True)
class Followed:
    """One preset: its name, version and summary, its metrics and sources as (name, value), and the table of its choices."""

    name: str
    version: str
    summary: str
    facts: tuple[tuple[str, str], ...]
    choices: Table


def followed(findings: Findings) -> list[Followed]:
    """The presets as the findings hold them; empty where none was asked for."""
    return [_followed(name, record) for name, record in findings.presets.items()]


def _followed(name: str, record: Mapping[str, Any]) -> Followed:
    source: Mapping[str, Any] = record.get("source") or {}
    follows = str(record.get("follows"))
    facts = [("metrics", ", ".join(map(str, record.get("metrics") or ())))]
    facts += [(part, plain(source.get(part))) for part in ("paper", "code")]
    facts.append(("where they differ", DECIDED.get(follows, follows)))
    choices = record.get("choices") or ()
    rows = tuple((str(row["choice"]), str(row["value"]), str(row["follows"])) for row in choices)
    table = Table(("choice", "as it is made here", "decided by"), rows, (), f"The choices of {name}", words=frozenset((1, 2)))
    return Followed(name, str(record.get("version")), str(record.get("summary") or ""), tuple(facts), table)
