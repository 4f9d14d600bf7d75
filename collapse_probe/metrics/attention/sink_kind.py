"""What do a head's sinks do: nothing, or do they hand one token's value to all others?"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from collapse_probe.capture.plan import Layer, Plan
from collapse_probe.capture.trace import Attention, Trace, expand_heads
from collapse_probe.capture.weights.matrices import wide
from collapse_probe.metrics.coverage import groups_of
from collapse_probe.metrics.map_metric import OF_PROBS, HeadMeans, HeadMetric, patch_places, prefix_places
from collapse_probe.metrics.metric import DOTS, Need, Record, Variant
from collapse_probe.metrics.nulls import with_reasons
from collapse_probe.registry import METRICS
from collapse_probe.results.findings import MetricResult
from collapse_probe.statistics.intervals import Array

ROUTED, ROUTED_MASS = 0.9, 0.5
"""A sink: this share of all queries give the key this mass (arXiv 2606.08105, lejepa_sinks/sink_table.py: relaxed rule)."""
NO_OP, BROADCAST, BROADCAST_RANK = 0.2, 0.5, 1.5
"""A no-op's value is this short at most, over the mean of the others'; a broadcast's this long at least, and the stable rank of
what the head writes no higher than this."""
FEWEST_KEYS = 3
"""With fewer, uniform attention alone gives each key ROUTED_MASS."""
EPSILONS = (0.5, 0.3, 0.2, 0.1)
"""Of the literal rule, for the sensitivity: every query gives the key 1 − ε or more."""
RATIOS = {"no_op": (0.1, 0.2, 0.3), "broadcast": (0.3, 0.5, 0.7)}
KINDS = ("no_op", "broadcast", "other")
CLASSES = ("cls", "register", "patch", "unknown")
MAP_BYTES = 64 * 2**20
SMALLEST = 1e-12
NOT_BROADCAST = "not taken: the rank of what one image's map makes of another one's values is not among the sums"
OF_MAPS = "undefined: whether a head has a sink follows from its map alone, whichever values it multiplies"
Grams = Callable[[], Sequence[Tensor | None]]
"""Gives for each place on the block axis (γ W_O^h)ᵀ(γ W_O^h) [H, K, K] in float64; None where it is not known."""


@dataclass(frozen=True)
class Sinks:
    """Of some images and heads of one layer, [B, H] each: the most attended `key`, its `mass`, the share of queries that are
    `routed` to it and the least that one gives it; and what the values say: `ratio`, `stable_rank` (NaN where it was not asked
    for). `ratios` [B, H, M] are those that each key would have.
    """

    key: Tensor
    mass: Tensor
    routed: Tensor
    least: Tensor
    ratio: Tensor
    stable_rank: Tensor
    ratios: Tensor

    def kinds(self) -> dict[str, Tensor]:
        """Which heads have a sink, [B, H] by name, and which are of each kind."""
        sink = self.routed >= ROUTED
        no_op = sink & (self.ratio <= NO_OP)
        broadcast = sink & (self.ratio >= BROADCAST) & (self.stable_rank <= BROADCAST_RANK)
        return {"sink": sink, "no_op": no_op, "broadcast": broadcast, "other": sink & ~no_op & ~broadcast}


def sinks_of(maps_BHNM: Tensor, values_BHMK: Tensor, gram_HKK: Tensor | None = None, of_all: bool = False) -> Sinks:
    """The sinks of maps and what their values do; `gram_HKK` measures values as what they are projected to, else as they are.

    s = argmax_j mean_i A_ij; routed = the share of i with A_is ≥ 0.5; ratio = ‖v_s‖ over the mean of ‖v_j‖, j ≠ s; stable_rank
    = ‖A v‖_F²/σ_1², of heads with a sink alone unless `of_all`, NaN where A v is zero.
    """
    mean_BHM = maps_BHNM.double().mean(2)
    mass, key = mean_BHM.max(-1)
    column = maps_BHNM.gather(3, key[:, :, None, None].expand(*maps_BHNM.shape[:3], 1)).squeeze(-1)
    routed = (column >= ROUTED_MASS).double().mean(-1)
    values = values_BHMK.double()
    squares = values.square().sum(-1) if gram_HKK is None else ((values @ gram_HKK) * values).sum(-1)
    lengths_BHM = squares.clamp_min(0).sqrt()
    others = (lengths_BHM.sum(-1, keepdim=True) - lengths_BHM) / max(lengths_BHM.shape[-1] - 1, 1)
    ratios = lengths_BHM / others.clamp_min(SMALLEST)
    rank = torch.full_like(mass, torch.nan)
    asked = torch.ones_like(rank, dtype=torch.bool) if of_all else routed >= ROUTED
    if bool(asked.any()):
        written = maps_BHNM[asked].double() @ values[asked]
        inside = written.mT @ written
        if gram_HKK is not None:
            root = _root(gram_HKK)[None].expand(len(maps_BHNM), -1, -1, -1)[asked]
            inside = root @ inside @ root
        spectrum = torch.linalg.eigvalsh(inside).clamp_min(0)
        top = spectrum[:, -1]
        rank[asked] = torch.where(top > SMALLEST**2, spectrum.sum(-1) / top.clamp_min(SMALLEST**2), torch.nan)
    at = key[..., None]
    return Sinks(key, mass, routed, column.amin(-1).double(), ratios.gather(2, at).squeeze(-1), rank, ratios)


def _root(gram_HKK: Tensor) -> Tensor:
    """The symmetric square root of positive matrices."""
    values, vectors = torch.linalg.eigh(gram_HKK)
    root: Tensor = (vectors * values.clamp_min(0).sqrt()[..., None, :]) @ vectors.mT
    return root


class SinkCounts(HeadMeans):
    """Per image, block and head whether there is a sink and of which kind; sums of events by kind, token and threshold."""

    windowed = False

    def __init__(self, plan: Plan, point: str, grams: Grams | None) -> None:
        super().__init__(plan, "sink", "no_op", "broadcast", "other", "mass")
        self.plan, self.point, self.grams = plan, point, grams
        keys = max((group.keys for group in groups_of(plan, False)), default=1)
        self.add_means(per_image=(len(KINDS),))
        self.add_state("by_class", len(KINDS), len(CLASSES), self.shape[0])
        self.add_state("by_rule", 1 + len(EPSILONS), len(KINDS))
        self.add_state("by_ratio", 2, 3)
        self.add_state("at_key", *self.shape, keys)
        self.add_state("light", *self.shape, keys)
        self.add_state("images", 1)

    def end_batch(self, trace: Trace) -> dict[str, Tensor]:
        """Add one batch; whether there is a sink, by kind, is kept by image as means over heads."""
        names = ("sink", "no_op", "broadcast", "other", "mass")
        values = {n: torch.full((trace.images, *self.shape), torch.nan, dtype=torch.float64) for n in names}
        grams = None if self.grams is None else self.grams()
        for group in groups_of(self.plan, False):
            for position in group.positions:
                attention = trace.attention[self.plan.map_layers[position]]
                gram = None if grams is None else grams[position]
                few = self.plan.layers[self.plan.map_layers[position]].keys < FEWEST_KEYS
                if few or attention.v is None or (grams is not None and gram is None):
                    continue
                self._add_layer(attention, position, gram, values, trace.images)
        counted = torch.stack([values[kind].nansum((1, 2)) for kind in KINDS], -1)
        self.add_images("per_image", counted)
        self.add("images", torch.tensor([float(trace.images)]))
        return self.add_heads(**values)

    def _add_layer(
        self, attention: Attention, position: int, gram: Tensor | None, values: dict[str, Tensor], images: int
    ) -> None:
        heads, queries, keys = self.plan.layers[self.plan.map_layers[position]].signature
        assert attention.v is not None
        v_BHMK = expand_heads(attention.v, heads)
        step = max(1, MAP_BYTES // (queries * keys * 4))
        few, some = max(1, step // heads), min(heads, step)
        place = torch.tensor(_class_of(self.plan, self.plan.layers[self.plan.map_layers[position]]))
        for first in range(0, images, few):
            for head in range(0, heads, some):
                rows, columns = slice(first, first + few), slice(head, head + some)
                maps = attention.maps(rows, columns)[self.point]
                maps, v = (x.cpu() if x.device.type == "mps" else x for x in (maps, v_BHMK[rows, columns]))
                sinks = sinks_of(maps, v, None if gram is None else gram[columns].to(maps.device))
                self._add(sinks, position, rows, columns, place, values)

    def _add(self, sinks: Sinks, position: int, rows: slice, heads: slice, place: Tensor, values: dict[str, Tensor]) -> None:
        kinds, key = sinks.kinds(), sinks.key.cpu()
        values["mass"][rows, position, heads] = sinks.mass.cpu()
        for name, held in kinds.items():
            values[name][rows, position, heads] = held.double().cpu()
        by_class, device = self.state("by_class"), self.state("by_class").device
        for k, kind in enumerate(KINDS):
            counts = torch.bincount(place[key[kinds[kind].cpu()]], minlength=len(CLASSES))
            by_class[k, :, position] += counts.to(device)
        rank_low = sinks.stable_rank <= BROADCAST_RANK
        for r, rule in enumerate([sinks.routed >= ROUTED, *(sinks.least >= 1 - e for e in EPSILONS)]):
            rule = rule & (sinks.routed >= ROUTED)
            no_op, broadcast = rule & (sinks.ratio <= NO_OP), rule & (sinks.ratio >= BROADCAST) & rank_low
            found = torch.stack([no_op.sum(), broadcast.sum(), (rule & ~no_op & ~broadcast).sum()])
            self.state("by_rule")[r] += found.to(device)
        low = torch.stack([(kinds["sink"] & (sinks.ratio <= limit)).sum() for limit in RATIOS["no_op"]])
        high = torch.stack([(kinds["sink"] & rank_low & (sinks.ratio >= limit)).sum() for limit in RATIOS["broadcast"]])
        self.state("by_ratio").add_(torch.stack([low, high]).to(device))
        keys = sinks.ratios.shape[-1]
        at_key = torch.nn.functional.one_hot(sinks.key, keys) * kinds["sink"][..., None]
        for name, held in (("at_key", at_key), ("light", sinks.ratios <= NO_OP)):
            self.state(name)[position, heads, :keys] += held.double().sum(0).to(device)

    def of_other_images(self) -> Array:
        """The share of images, by block and head, in which a sink would be a no-op if maps and values were of different images.

        Over all pairs of images: Σ_s (how many maps have their sink at s) · (how many images have a short value at s), less
        those of an image with itself.
        """
        images = float(self.array("images")[0])
        both = (self.array("at_key") * self.array("light")).sum(-1)
        mean, _, count = self.mean("no_op")
        with np.errstate(invalid="ignore", divide="ignore"):
            other: Array = np.where(images > 1, (both - np.nan_to_num(mean) * count) / (images * (images - 1)), np.nan)
        return np.where(np.isfinite(mean), other, np.nan)


def _class_of(plan: Plan, layer: Layer) -> list[int]:
    """For each key of a layer which of CLASSES its token is; the first prefix token counts as the class token."""
    if patch_places(plan, layer) is None:
        return [CLASSES.index("unknown")] * layer.keys
    prefix = prefix_places(plan, layer)
    return [CLASSES.index("patch" if t not in prefix else "cls" if t == prefix[0] else "register") for t in range(layer.keys)]


class SinkKind(HeadMetric):
    """How often a head has a sink, and whether it does nothing (no-op) or hands out one value (broadcast)."""

    name = "sink-kind"
    summary = "share of images in which a head has a sink; @no-op: whose value is short, @broadcast: whose value all tokens get"
    title = "What the sinks of a head do"
    seen = f"Share of images in which nine of ten queries give one key half of their attention or more. {DOTS}"
    limits = (
        "A no-op is a head that is switched off for an image, a broadcast one that writes one vector everywhere: neither is "
        "collapse by itself, and what later blocks make of it is not seen. The thresholds are the authors'."
    )
    failure_types = ()
    formula = r"\frac{1}{N} \sum_i [A_{is} \ge 0.5] \ge 0.9, \quad s = \arg\max_j \sum_i A_{ij}"
    value_range = "0 to 1"
    source = "arXiv 2606.08105 and its code, KempnerInstitute/attention_sink at a83cd59, lejepa_sinks and vit_causal"
    traps = (
        "Head values are before the output projection, which may lengthen a short one: @out measures what is written, where "
        "the projection is found. Registers take sinks over from patches: read the tokens in the details."
    )
    panel = "heads with a sink"
    unit = "share of images"
    top = 1.0
    defaults = {"value": "sink", "of": "head", "point": "weights"}
    choices = {"value": ("sink", "no_op", "broadcast", "other"), "of": ("head", "out")}
    quantity_from = "value"
    variants = {
        "no-op": Variant({"value": "no_op"}, "no-op: the sink's value is short"),
        "broadcast": Variant({"value": "broadcast"}, "broadcast: all tokens get the sink's value"),
        "other": Variant({"value": "other"}, "a sink of neither kind"),
        "out": Variant({"of": "out"}, "values as the output projection writes them"),
        "probs": OF_PROBS,
    }

    def __init__(self, plan: Plan, **settings: Any) -> None:
        super().__init__(plan, **settings)
        self.needs = frozenset({"values", "matrices"} if self.settings["of"] == "out" else {"values"})

    @property
    def definition(self) -> str:
        of_out = self.settings["of"] == "out"
        value = "u_j = γ W_O^h v_j, what the output projection (with any LayerScale γ) makes of the value" if of_out else "v_j"
        written = "A u" if of_out else "A v"
        what = {
            "sink": "Share of images in which the head has a sink",
            "no_op": f"Share of images in which the head has a sink that is a no-op (ratio ≤ {NO_OP:g})",
            "broadcast": (
                f"Share of images in which the head has a sink that is a broadcast (ratio ≥ {BROADCAST:g} and the stable rank "
                f"‖{written}‖_F²/σ_1² of what the head writes ≤ {BROADCAST_RANK:g})"
            ),
            "other": "Share of images in which the head has a sink that is neither no-op nor broadcast",
        }
        return (
            f"{what[self.quantity]}: with s = argmax_j mean_i A_ij on {self.map_name}, {ROUTED:.0%} of all queries or more "
            f"give s {ROUTED_MASS:g} or more of their attention. ratio = the length of the value at s over the mean length of "
            f"the others', of {value}. details.per_image counts sinks of each kind over all heads of an image in the blocks "
            "that have a value here, "
            "details.by_class by the token they sit on, details.by_rule and details.by_ratio under other thresholds (literal "
            "ε-sinks: every query gives 1 − ε or more)."
        )

    def accumulators(self) -> list[Need]:
        point, of_out = self.point, self.settings["of"] == "out"
        return [(("sink-kind", point, of_out), lambda: SinkCounts(self.plan, point, self._grams if of_out else None))]

    def _grams(self) -> Sequence[Tensor | None]:
        if self.matrices is None:
            return [None] * len(self.layers)
        return [self._gram(layer) for layer in self.layers]

    def _gram(self, layer: Layer) -> Tensor | None:
        assert self.matrices is not None
        block = self.matrices.by_block[layer.block or 0]
        if "proj" not in block or block["proj"].weight.shape[1] % layer.heads:
            return None
        projection = wide(block["proj"].weight)
        by_head = projection.reshape(len(projection), layer.heads, -1).permute(1, 0, 2)  # [H, D, K]
        gram: Tensor = by_head.mT @ by_head
        return gram

    def compute(self, accumulators: Sequence[Any], records: Sequence[Record]) -> MetricResult:
        (counts,) = accumulators
        if (most := max((layer.keys for layer in self.layers), default=FEWEST_KEYS)) < FEWEST_KEYS:
            keys = f"maps of {most} key{'s' * (most > 1)}"
            return self.not_applicable(f"uniform attention alone makes a sink in {keys}: {ROUTED_MASS:g} or more for each")
        if not np.isfinite(counts.mean("sink")[0]).any():
            why = self.matrices.reasons() if self.settings["of"] == "out" and self.matrices is not None else []
            missing = "; ".join(why) or "no attention layer's values could be told from its other tensors"
            return self.not_applicable(f"what the maps multiply is not known ({missing})")
        result = super().compute(accumulators, records)
        other = counts.of_other_images() if self.quantity == "no_op" else None
        reasons = {} if self.quantity == "no_op" else {"other_image": OF_MAPS if self.quantity == "sink" else NOT_BROADCAST}
        nulls = with_reasons({"untrained": None, "other_image": other}, reasons, int(counts.array("images")[0]))
        return self.result(result.array, stderr=result.stderr, ci95=result.ci95, head_mean=result.head_mean,
                           details=result.details, nulls=nulls)  # fmt: skip

    def details(self, accumulator: SinkCounts) -> dict[str, Any]:
        """Counts an image: by kind, by token, and under other thresholds."""
        images = max(float(accumulator.array("images")[0]), 1.0)
        mean, _, _ = accumulator.mean("per_image")
        ends = np.maximum(accumulator.bounds("per_image"), 0.0)  # counts
        by_class = accumulator.array("by_class") / images
        rules = [f"{ROUTED:.0%} of the queries", *(f"ε = {e:g}" for e in EPSILONS)]
        by_rule, by_ratio = accumulator.array("by_rule") / images, accumulator.array("by_ratio") / images
        return {
            "per_image": dict(zip(KINDS, mean.tolist(), strict=True)),
            "per_image_ci95": dict(zip(KINDS, ends.tolist(), strict=True)),
            "by_class": {
                kind: {name: float(total) for name, total in zip(CLASSES, by_class[k].sum(-1), strict=True) if total}
                for k, kind in enumerate(KINDS)
            },
            "by_block": {kind: by_class[k].sum(0) for k, kind in enumerate(KINDS)},
            "by_rule": {rule: dict(zip(KINDS, row.tolist(), strict=True)) for rule, row in zip(rules, by_rule, strict=True)},
            "by_ratio": {
                kind: {f"{limit:g}": float(total) for limit, total in zip(RATIOS[kind], row, strict=True)}
                for kind, row in zip(("no_op", "broadcast"), by_ratio, strict=True)
            },
            "mass": accumulator.mean("mass")[0],
        }


METRICS.add(SinkKind.name, SinkKind)
