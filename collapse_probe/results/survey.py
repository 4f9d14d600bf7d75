"""The results of a gallery of models: the headline numbers of each, beside the folder of its findings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from collapse_probe.files import Numbers, read_document, write_document
from collapse_probe.results.findings import Findings, plain
from collapse_probe.results.readings import is_untrained, over_heads, result_of, untrained_summary
from collapse_probe.results.verdict import verdict_of

if TYPE_CHECKING:
    import pandas as pd

SCHEMA = "collapse-probe/survey/1"
FILE, TABLE = "gallery.json", "gallery.csv"
MODELS = "models"
FINISHED, FAILED, WAITING = "finished", "failed", "waiting"
SINK = "attention-sink"
NUMBERS = (
    *("kappa_adjacent", "kappa_adjacent_ci_low", "kappa_adjacent_ci_high"),
    *("attention_similarity_adjacent", "other_token_adjacent", "similar_blocks", "similar_blocks_corrected"),
    *("similar_blocks_pairs", "attention_entropy_share", "patch_diversity_last"),
    *("patch_diversity_last_ci_low", "patch_diversity_last_ci_high"),
)
"""What a row holds of the summary of its findings; beside it the largest sink, and what of these the untrained copy has."""


@dataclass(frozen=True, kw_only=True)
class SurveyRow:
    """One model: what was asked for, and how it ended.

    `conditions` are all that its numbers depend on: they are taken up again where these are the same. `folder` is that of its
    findings, below that of the gallery; `reason` says why it failed. `collapsed` is the verdict on its attention across depth,
    `alike` how many pairs of adjacent blocks attend alike beyond chance, and of how many that are compared.
    """

    label: str
    conditions: Mapping[str, Any]
    folder: str
    status: str = WAITING
    reason: str = ""
    model: Mapping[str, Any] = field(default_factory=dict)
    images: int = 0
    case: str = ""
    collapsed: bool | None = None
    alike: tuple[int, int] = (0, 0)
    answer: str = ""
    numbers: Mapping[str, float | None] = field(default_factory=dict)
    untrained: Mapping[str, float | None] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def row_of(findings: Findings, label: str, conditions: Mapping[str, Any], folder: str) -> SurveyRow:
    """The row of a model that was measured."""
    verdict = verdict_of(findings)
    numbers: dict[str, float | None] = {name: findings.summary.get(name) for name in NUMBERS}
    if (sink := result_of(findings, SINK)) is not None:
        by_block = over_heads(sink.array)
        numbers["sink_largest"] = float(np.nanmax(by_block)) if np.isfinite(by_block).any() else None
    facts = {
        name: findings.model.get(name) for name in ("address", "name", "weights", "parameters", "blocks", "heads", "tokens")
    }
    return SurveyRow(
        label=label,
        conditions=conditions,
        folder=folder,
        status=FINISHED,
        model={**facts, "untrained": is_untrained(findings.model)},
        images=int(findings.data["images"]),
        case=verdict.case,
        collapsed=verdict.collapsed,
        alike=verdict.alike,
        answer=verdict.sentences[0],
        numbers=numbers,
        untrained={name: value for name, value in untrained_summary(findings).items() if name in NUMBERS},
        notes=tuple(findings.run.get("notes", ())),
    )


@dataclass(frozen=True)
class Survey(Numbers):
    """Every model of a gallery in the order of its list, and the data that all were measured on."""

    rows: tuple[SurveyRow, ...]
    data: Mapping[str, Any]
    run: Mapping[str, Any] = field(default_factory=dict)

    @property
    def finished(self) -> list[SurveyRow]:
        """Those that have numbers."""
        return [row for row in self.rows if row.status == FINISHED]

    @property
    def failed(self) -> list[SurveyRow]:
        """Those that could not be measured."""
        return [row for row in self.rows if row.status == FAILED]

    def frame(self) -> pd.DataFrame:
        """One row a model, with its numbers and those of its untrained copy."""
        import pandas as pd

        return pd.DataFrame(
            [
                {
                    "model": row.label,
                    "address": row.model.get("address") or row.conditions.get("model"),
                    "weights": row.model.get("weights"),
                    "status": row.status,
                    "reason": row.reason,
                    "images": row.images,
                    **{name: row.model.get(name) for name in ("parameters", "blocks", "heads", "tokens")},
                    "case": row.case,
                    "collapsed": row.collapsed,
                    **dict(zip(("pairs_alike", "pairs_compared"), row.alike, strict=True)),
                    **row.numbers,
                    **{f"untrained_{name}": value for name, value in row.untrained.items()},
                }
                for row in self.rows
            ]
        )

    def to_json(self) -> dict[str, Any]:
        """The content of gallery.json: JSON types alone."""
        return {
            "schema": SCHEMA,
            "data": plain(self.data),
            "run": plain(self.run),
            "rows": [plain(asdict(r)) for r in self.rows],
        }

    def write(self, inside: Path) -> None:
        """Write gallery.json and gallery.csv into an existing folder."""
        write_document(inside / FILE, self.to_json())
        self.frame().to_csv(inside / TABLE, index=False)

    @classmethod
    def load(cls, folder: str | Path) -> Survey:
        """Read the folder of a gallery back; OutputError where it holds none, or one of another schema."""
        refusal = "is not the folder of a gallery"
        content = read_document(Path(folder), FILE, schema=SCHEMA, refusal=refusal, command="gallery", check=check)
        rows = tuple(
            SurveyRow(**{**row, "notes": tuple(row["notes"]), "alike": tuple(row["alike"])}) for row in content["rows"]
        )
        return cls(rows, content["data"], content["run"])


def check(content: Mapping[str, Any], file: str) -> None:
    """Raise ValueError where the document is not what `Survey.to_json` writes."""
    rows = content.get("rows")
    if not isinstance(rows, list) or not isinstance(content.get("data"), dict) or not isinstance(content.get("run"), dict):
        raise ValueError(f"{file} lacks rows, data or run")
    for at, row in enumerate(rows):
        if not isinstance(row, dict) or not {"notes", "alike", "conditions"} <= row.keys():
            raise ValueError(f"{file}.rows[{at}] lacks notes, alike or conditions")
        try:
            SurveyRow(**row)
        except TypeError as error:
            raise ValueError(f"{file}.rows[{at}]: {error}") from error
