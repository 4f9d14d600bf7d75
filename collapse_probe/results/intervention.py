"""What replacing attention maps changed: plain numbers with their provenance, and the folder that they live in."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from collapse_probe.files import read_document, write_document
from collapse_probe.results.findings import plain as json_values
from collapse_probe.results.overview.display import Shown
from collapse_probe.results.rules import SETTLES
from collapse_probe.results.stored import checks
from collapse_probe.results.stored.arrays import load_arrays

if TYPE_CHECKING:
    import pandas as pd

SCHEMA = "collapse-probe/interventions/1"
FILE, IMAGES, TABLE = "interventions.json", "images.npz", "interventions.csv"
COLUMNS = [
    *("kind", "how", "first_block", "last_block", "kl", "kl_ci_low", "kl_ci_high"),
    *("agreement", "agreement_ci_low", "agreement_ci_high", "accuracy", "accuracy_change"),
    *("accuracy_change_ci_low", "accuracy_change_ci_high", "blocks"),
    *("moved", "moved_ci_low", "moved_ci_high", "shared", "shared_ci_low", "shared_ci_high", "sinks"),
]
GREEDY = "greedy"
"""The order in which each time the block goes that costs least."""
OTHER = "_other"
"""Ends the name of a control: the same, done to random other tokens."""
ORDERED = ("chosen", "settled", "priced")
"""The parts of the images of which an order has effects; see `Order`."""
INFLUENCE = "influence"
"""The order of block influence, the least first."""
PARTS, EFFECTS = ("model", "data", "run", "kinds", "plain", "similarity"), ("single", "cumulative", "windows")
Ends = tuple[float, float] | None
DEFINITIONS = {
    "kl": "mean over images of KL(softmax of the plain logits ‖ softmax of the changed model's logits), in nats; t interval "
    "over images, wider on the side of the longer tail, ending at 0 where it would go below",
    "agreement": "share of images whose top answer stays the same; Wilson interval",
    "accuracy": "share of images whose top answer is their label, in the changed model",
    "moved": "mean over images of √(mean ‖change‖²) / √(mean ‖token‖²) over the last patch tokens, after the final norm where "
    "one follows the blocks, without the tokens that were edited; t interval over images",
    "shared": "mean over images of the part of that change's energy which all patch tokens share, n ‖mean change‖² / "
    "Σ ‖change‖²; images in which nothing moves are left out; t interval",
    "sinks": "mean over images of the number of heads of the block in which an image has a sink, which were edited; t interval",
    "accuracy_change": "that share less the plain model's on the same images; Tango's score interval",
}


@dataclass(frozen=True)
class Effect:
    """What happened when the maps of `blocks` were replaced by `kind`; see DEFINITIONS.

    Intervals are 95 % over images, None where images are too few or show no spread. Accuracy is None where no labels fit the
    output. Where nothing could be replaced, `not_applicable` says why and there are no numbers.
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
    moved: float | None = None
    moved_ci95: Ends = None
    shared: float | None = None
    shared_ci95: Ends = None
    sinks: float | None = None
    sinks_ci95: Ends = None
    not_applicable: str | None = None


@dataclass(frozen=True)
class Order:
    """Blocks in the order in which they are left out, and what the model is worth after each: over the images on which the
    order was chosen (`chosen`), over those that settle how many can go (`settled`), and over all others, which alone say what
    it costs (`priced`).
    """

    blocks: tuple[int, ...]
    chosen: tuple[Effect, ...]
    settled: tuple[Effect, ...]
    priced: tuple[Effect, ...]

    @property
    def spared(self) -> int:
        """How many of the first blocks can go, by the images that settle it: with each of them gone, SETTLES of the top answers
        stay. How sure that is, the images say that give the price.
        """
        return len([*itertools.takewhile(lambda effect: (effect.agreement or 0.0) >= SETTLES, self.settled)])


@dataclass(frozen=True)
class UntrainedCopy:
    """What a copy with fresh parameters keeps of its own answers, on so many `images`, to which it gives so many different
    `answers`: an effect for each kind of part that is left out, of the blocks that can go or that go first.
    """

    images: int
    answers: int
    effects: tuple[Effect, ...]


@dataclass(frozen=True, repr=False)
class Interventions(Shown):
    """Effects of replacing maps: `single` one block at a time, `cumulative` from the top (the last block) down, by kind.

    The set of `cumulative[kind][i]` holds all chosen blocks from one block up to the last; `single` has an entry for every
    chosen block. `windows` holds every window of consecutive blocks that were left out together, `orders` by kind the orders in
    which blocks were left out one after the other. `plain` holds the unchanged model's accuracy and why there is none;
    `similarity` the attention similarity of every block from 1 on with the one before, its chance level and kappa, from the
    same images. `images` holds names, top answers and per-image KL: arrays with one row for each entry of
    `plain["conditions"]`; and which images `chose` the orders, `settled` and `priced` them.
    """

    model: Mapping[str, Any]
    data: Mapping[str, Any]
    run: Mapping[str, Any]
    plain: Mapping[str, Any]
    single: Mapping[str, tuple[Effect, ...]]
    cumulative: Mapping[str, tuple[Effect, ...]]
    similarity: Mapping[str, Sequence[float | None]]
    kinds: Mapping[str, str]
    windows: Mapping[str, tuple[Effect, ...]] = field(default_factory=dict)
    orders: Mapping[str, Mapping[str, Order]] = field(default_factory=dict)
    untrained: UntrainedCopy | None = None
    images: Mapping[str, NDArray[Any]] = field(default_factory=dict)

    @property
    def summary(self) -> dict[str, float | int | None]:
        """Flat names and numbers, for thresholds: the largest effect of one block, and that of all chosen blocks together; of
        blocks that are left out, how many can go, and their price.
        """
        numbers: dict[str, float | int | None] = {"images": self.data["images"], "accuracy": self.plain["accuracy"]}
        for kind, effects in self.single.items():
            largest = max((e for e in effects if e.kl is not None), key=lambda e: e.kl or 0.0, default=None)
            together: dict[str, Effect | None] = {"all": self.cumulative[kind][-1]} if self.cumulative.get(kind) else {}
            if kind.startswith("drop_"):
                order = self.orders.get(kind, {}).get(GREEDY)
                numbers[f"{kind}_spared"] = None if order is None else order.spared
                together = {"spared": order.priced[order.spared - 1] if order is not None and order.spared else None}
            elif not kind.startswith(("prefix_", "sinks_")):
                together.setdefault("all", None)
            for name, effect in {"largest": largest, **together}.items():
                for number in ("kl", "agreement", "accuracy_change"):
                    numbers[f"{kind}_{name}_{number}"] = None if effect is None else getattr(effect, number)
        return numbers

    def frame(self) -> pd.DataFrame:
        """The content of interventions.csv: one row per kind of replacement and set of blocks, with 95 % intervals over images.

        `how` is single (one block), cumulative (from `first_block` up to the last), windows (consecutive blocks left out
        together), or the name of an order and of the part of the images: then all `blocks` are gone; see `Order`. See
        DEFINITIONS for the numbers.

        Example::

            table = interventions.frame()
            table[table.how == "single"].sort_values("kl", ascending=False).head(3)
        """
        import pandas as pd

        rows = []
        for how, kind, effects in self._listed():
            for effect in effects:
                kl, agreement, change, moved, shared = (
                    [getattr(effect, name), *(getattr(effect, f"{name}_ci95") or (None, None))]
                    for name in ("kl", "agreement", "accuracy_change", "moved", "shared")
                )
                blocks = [min(effect.blocks), max(effect.blocks)]
                names = " ".join(map(str, effect.blocks))
                rows.append(
                    [kind, how, *blocks, *kl, *agreement, effect.accuracy, *change, names, *moved, *shared, effect.sinks]
                )
        values = [name for name in COLUMNS[4:] if name != "blocks"]
        return pd.DataFrame(rows, columns=COLUMNS).astype(dict.fromkeys(values, "float64"))

    def _listed(self) -> Iterator[tuple[str, str, tuple[Effect, ...]]]:
        for how in EFFECTS:
            for kind, effects in getattr(self, how).items():
                yield how, kind, effects
        for kind, orders in self.orders.items():
            for how, order in orders.items():
                for part in ORDERED:
                    yield f"{how}, {part}", kind, getattr(order, part)

    def to_json(self) -> dict[str, Any]:
        """The content of interventions.json: JSON types alone, undefined numbers as None."""
        parts = {part: json_values(getattr(self, part)) for part in PARTS}
        effects = {part: _each(getattr(self, part), lambda effect: json_values(vars(effect))) for part in EFFECTS}
        orders = {kind: {how: json_values(asdict(order)) for how, order in each.items()} for kind, each in self.orders.items()}
        every = {**parts, **effects, **({"orders": orders} if orders else {})}
        if not self.windows:
            every.pop("windows")
        if self.untrained is not None:
            every["untrained"] = json_values(asdict(self.untrained))
        return {"schema": SCHEMA, **every, "definitions": DEFINITIONS, "summary": self.summary}

    @property
    def states(self) -> tuple[str, ...]:
        """Those of `intervene`."""
        return ("similarity-", "means-", "conditions-", "drop_", "states-", "donors-", "sinks-", "untrained-")

    def write(self, inside: Path) -> None:
        """Write interventions.json, interventions.csv and images.npz into an existing folder."""
        write_document(inside / FILE, self.to_json())
        self.frame().to_csv(inside / TABLE, index=False)
        np.savez_compressed(inside / IMAGES, **dict(self.images))  # type: ignore[arg-type]

    @classmethod
    def load(cls, folder: str | Path) -> Interventions:
        """Read a folder back; raises OutputError where it is none or of another schema."""
        content = read_document(
            folder, FILE, schema=SCHEMA, refusal="holds no interventions", command="intervene", check=checks.interventions
        )
        parts = {part: content[part] for part in PARTS} | {part: _each(content.get(part, {}), _effect) for part in EFFECTS}
        stored = content.get("orders", {})
        orders = {kind: {how: _order(order) for how, order in each.items()} for kind, each in stored.items()}
        copy = content.get("untrained")
        twin = None if copy is None else UntrainedCopy(copy["images"], copy["answers"], tuple(map(_effect, copy["effects"])))
        return cls(**parts, orders=orders, untrained=twin, images=load_arrays(Path(folder) / IMAGES))


def _each(by_kind: Mapping[str, Iterable[Any]], convert: Callable[[Any], Any]) -> dict[str, tuple[Any, ...]]:
    return {kind: tuple(map(convert, effects)) for kind, effects in by_kind.items()}


def _effect(entry: Mapping[str, Any]) -> Effect:
    values: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in entry.items()}
    return Effect(**values)


def _order(entry: Mapping[str, Any]) -> Order:
    return Order(tuple(entry["blocks"]), *(tuple(map(_effect, entry[part])) for part in ORDERED))
