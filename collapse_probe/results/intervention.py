"""What replacing attention maps changed: plain numbers with their provenance, and the folder that they live in."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from collapse_probe.files import new_folder, read_document

SCHEMA = "collapse-probe/interventions/1"
FILE, IMAGES = "interventions.json", "images.npz"


Ends = tuple[float, float] | None
DEFINITIONS = {
    "kl": "mean over images of KL(softmax of the plain logits ‖ softmax of the logits with maps replaced), in nats; bootstrap "
    "interval over images (BCa up to 5000 images, else percentile)",
    "agreement": "share of images whose top answer stays the same; Wilson interval",
    "accuracy": "share of images whose top answer is their label, with maps replaced",
    "accuracy_change": "that share less the plain model's on the same images; paired bootstrap interval over images",
}


@dataclass(frozen=True)
class Effect:
    """What happened when the maps of `blocks` were replaced by `kind`; see DEFINITIONS.

    Intervals are 95 % over images, None with fewer than two. Accuracy is None where no labels fit the output. Where nothing
    could be replaced, `not_applicable` says why and there are no numbers.
    """

    kind: str
    blocks: tuple[int, ...]
    kl: float | None = None
    kl_ci95: Ends = None
    agreement: float | None = None
    agreement_ci95: Ends = None
    accuracy: float | None = None
    accuracy_change: float | None = None
    accuracy_change_ci95: Ends = None
    not_applicable: str | None = None


@dataclass(frozen=True)
class Interventions:
    """Effects of replacing maps: `single` one block at a time, `cumulative` from the top (the last block) down, by kind.

    The set of `cumulative[kind][i]` holds all chosen blocks from one block up to the last; `single` has an entry for every
    chosen block. `plain` holds the unreplaced model's accuracy and why there is none; `similarity` the attention similarity of
    every block from 1 on with the one before, its wrong-token null and kappa, from the same images. `images` holds names, top
    answers and per-image KL: arrays with one row for each entry of `plain["conditions"]`.
    """

    model: Mapping[str, Any]
    data: Mapping[str, Any]
    run: Mapping[str, Any]
    plain: Mapping[str, Any]
    single: Mapping[str, tuple[Effect, ...]]
    cumulative: Mapping[str, tuple[Effect, ...]]
    similarity: Mapping[str, Sequence[float | None]]
    kinds: Mapping[str, str]
    images: Mapping[str, NDArray[Any]] = field(default_factory=dict)

    @property
    def summary(self) -> dict[str, float | int | None]:
        """Flat names and numbers, for thresholds: the largest effect of one block, and that of all chosen blocks together."""
        found: dict[str, float | int | None] = {"images": self.data["images"], "accuracy": self.plain["accuracy"]}
        for kind, effects in self.single.items():
            measured = [e for e in effects if e.kl is not None]
            worst = max(measured, key=lambda e: e.kl or 0.0, default=None)
            whole = self.cumulative[kind][-1] if self.cumulative[kind] else None
            for name, effect in (("largest", worst), ("all", whole)):
                for number in ("kl", "agreement", "accuracy_change"):
                    found[f"{kind}_{name}_{number}"] = None if effect is None else getattr(effect, number)
        return found

    def to_json(self) -> dict[str, Any]:
        """The content of interventions.json: JSON types alone, undefined numbers as None."""
        return {
            "schema": SCHEMA,
            "model": dict(self.model),
            "data": dict(self.data),
            "run": dict(self.run),
            "kinds": dict(self.kinds),
            "definitions": DEFINITIONS,
            "plain": dict(self.plain),
            "single": {kind: [_plain(e) for e in effects] for kind, effects in self.single.items()},
            "cumulative": {kind: [_plain(e) for e in effects] for kind, effects in self.cumulative.items()},
            "similarity": {name: list(values) for name, values in self.similarity.items()},
            "summary": self.summary,
        }

    def save(self, folder: str | Path) -> Path:
        """Write interventions.json and images.npz; both or neither."""
        with new_folder(folder) as inside:
            self.write(inside)
        return Path(folder)

    def write(self, inside: Path) -> None:
        """Write the files into an existing folder, without any guard."""
        text = json.dumps(self.to_json(), indent=1, allow_nan=False)
        (inside / FILE).write_text(text + "\n", encoding="utf-8")
        np.savez_compressed(inside / IMAGES, **dict(self.images))  # type: ignore[arg-type]

    @classmethod
    def load(cls, folder: str | Path) -> Interventions:
        """Read a folder back; raises OutputError where it is none or of another schema."""
        content = read_document(folder, FILE, schema=SCHEMA, refusal="holds no interventions", command="intervene")
        with np.load(Path(folder) / IMAGES, allow_pickle=False) as stored:
            images = {key: stored[key] for key in stored.files}
        known: dict[str, Any] = {key: content[key] for key in ("model", "data", "run", "plain", "similarity", "kinds")}
        for part in ("single", "cumulative"):
            known[part] = {kind: tuple(_effect(entry) for entry in found) for kind, found in content[part].items()}
        return cls(**known, images=images)


def _plain(effect: Effect) -> dict[str, Any]:
    values = asdict(effect)
    return {key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in values.items()}


def _effect(entry: Mapping[str, Any]) -> Effect:
    values: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in entry.items()}
    return Effect(**values)
