"""How large are the numbers that go into the softmax?"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from collapse_probe.capture.plan import Plan
from collapse_probe.capture.trace import ALL, Attention, Trace, by_window
from collapse_probe.metrics.coverage import groups_of
from collapse_probe.metrics.map_metric import HeadMeans, HeadMetric
from collapse_probe.metrics.metric import DOTS, Need, Record, Variant
from collapse_probe.registry import METRICS
from collapse_probe.results.findings import MetricResult

MASKED = -100.0
"""An additive bias of this or less is a mask: Swin's is −100, others' the least number of their dtype or −∞."""
SMALLEST = 1e-30
"""A probability below this may be that of a masked entry: of a map without its logits nothing else tells."""
LOGIT_BYTES = 32 * 2**20
ABOVE = 1000
"""One logit in so many may be larger than the quantile."""
QUANTITIES = {
    "largest": "the largest logit of an image's map",
    "quantile": "the 99.9 % quantile of an image's logits: the largest logit that at most one in a thousand exceeds, exact",
    "range": "the mean over queries of the largest less the smallest logit of a query",
}
BY_HAND = (
    "the softmax was captured, not what went into it (attention that is written by hand); @range can be told from the maps"
)
UNDERFLOW = "the softmax was captured, not what went into it, and every map holds probabilities near 0, which may be masked"


def visible_logits(attention: Attention, images: slice, heads: slice, rows: slice) -> tuple[Tensor, Tensor]:
    """Scaled logits [b, h, R, C] with their bias, and which of them are not masked.

    Where the softmax alone was captured the logarithms of its probabilities, which are the logits less one number a query;
    nothing tells then whether one near 0 was masked or is small.
    """
    if attention.q is None:
        probs = attention.maps(images, heads, rows)["probs"]
        return probs.log(), probs > SMALLEST
    logits = attention.logits(images, heads, rows)
    visible = logits > -torch.inf
    if attention.bias is not None and attention.bias.dtype != torch.bool:
        bias = attention.bias.reshape((1,) * (4 - attention.bias.ndim) + attention.bias.shape)
        place = (images, heads, rows, ALL)
        bias = bias[tuple(span if size > 1 else ALL for span, size in zip(place, bias.shape, strict=True))]
        visible = visible & (bias > MASKED)
    return logits, visible


def spans(size: int, step: int) -> Iterator[slice]:
    """All of an axis in steps."""
    return (slice(first, min(first + step, size)) for first in range(0, size, max(step, 1)))


class LogitSums(HeadMeans):
    """Per image, block and head the quantities over all entries of the maps (of all windows) that are not masked."""

    def __init__(self, plan: Plan) -> None:
        super().__init__(plan, *QUANTITIES)
        self.add_state("highest", *self.shape)
        self.states["highest"].fill_(-torch.inf)

    def join(self, names: Sequence[str], others: Sequence[Tensor]) -> None:
        """As means join; `highest` is the larger one."""
        if tuple(names) == ("highest",):
            self.states["highest"] = torch.maximum(self.states["highest"], others[0])
        else:
            super().join(names, others)

    def end_batch(self, trace: Trace) -> dict[str, Tensor]:
        """Add one batch; per image [B, blocks] the means over heads by quantity."""
        shape = (trace.images, *self.shape)
        values = {name: torch.full(shape, torch.nan, dtype=torch.float64) for name in QUANTITIES}
        for group in groups_of(trace.plan, windowed=True):
            size = group.queries * group.keys * 4
            most = max(1, LOGIT_BYTES // (size * group.windows))
            heads, images = min(group.heads, most), max(1, most // group.heads)
            rows = max(1, min(group.queries, LOGIT_BYTES // (group.keys * 4 * group.windows)))
            for position in group.positions:
                attention = trace.attention[trace.plan.map_layers[position]]
                for of_images in spans(trace.images, images):
                    for of_heads in spans(group.heads, heads):
                        found = self._numbers(attention, of_images, of_heads, rows, group.windows, trace.wide_device)
                        for name, numbers in found.items():
                            values[name][of_images, position, of_heads] = numbers.double().cpu()
        highest = torch.where(values["largest"].isnan(), -torch.inf, values["largest"]).amax(0)
        self.join(("highest",), [highest.to(self.state("highest").device)])
        return self.add_heads(**values)

    @staticmethod
    def _numbers(
        attention: Attention, images: slice, heads: slice, rows: int, windows: int, device: torch.device
    ) -> dict[str, Tensor]:
        """The quantities of some images and heads, [b, h] by name; NaN where no entry is visible."""
        inside = slice(images.start * windows, images.stop * windows)
        queries, keys = attention.shape[-2:]
        most = windows * queries * keys // ABOVE + 1
        top: Tensor | None = None
        ranges = torch.zeros(images.stop - images.start, heads.stop - heads.start, dtype=torch.float64, device=device)
        entries, defined = torch.zeros_like(ranges, dtype=torch.int64), torch.zeros_like(ranges, dtype=torch.int64)
        for of_rows in spans(queries, rows):
            logits, visible = (x.to(device) for x in visible_logits(attention, inside, heads, of_rows))
            shown = torch.where(visible, logits, -torch.inf)
            between = shown.amax(-1) - torch.where(visible, logits, torch.inf).amin(-1)
            seen = visible.any(-1)
            ranges += by_window(torch.where(seen, between, 0.0).double().sum(-1), windows).sum(1)
            defined += by_window(seen.sum(-1), windows).sum(1)
            entries += by_window(visible.sum((-2, -1)), windows).sum(1)
            flat = by_window(shown, windows).transpose(1, 2).flatten(2)
            flat = flat if top is None else torch.cat([top, flat], -1)
            top = flat.topk(min(most, flat.shape[-1]), -1).values
        assert top is not None
        if attention.q is None:  # one that is near 0 leaves the smallest logit open
            defined = torch.where(entries == windows * queries * keys, defined, 0)
        quantile = top.gather(-1, (entries // ABOVE).clamp_max(top.shape[-1] - 1)[..., None])[..., 0]
        none = torch.full_like(quantile, torch.nan)
        known = entries > 0 if attention.q is not None else torch.zeros_like(entries, dtype=torch.bool)
        return {
            "largest": torch.where(known, top[..., 0], none),
            "quantile": torch.where(known, quantile, none),
            "range": torch.where(defined > 0, ranges / defined, none.double()),
        }


class AttentionLogits(HeadMetric):
    """The largest logits of each head, and how far a query's logits are apart."""

    name = "attention-logits"
    summary = (
        "largest attention logit by head; @quantile the 99.9 % quantile, @range from the largest to the smallest of a query"
    )
    title = "Attention logits"
    seen = f"The largest number that goes into the softmax of each head. {DOTS}"
    limits = (
        "Logits that grow in training come before entropy collapse and instability; one large logit alone is neither. What a "
        "softmax does depends on differences within a query (@range), not on the size."
    )
    failure_types = ()
    formula = r"\max_{i,j} \; q_i \cdot k_j / \sqrt{d}"
    value_range = "any number; @range 0 upwards"
    source = "this project; Zhai et al., arXiv 2303.06296, for what growing logits lead to"
    traps = (
        "With the scale and any bias on them, as the softmax gets them. A shift of all logits of a query changes the largest "
        "one and no probability. Masked entries do not count."
    )
    panel = "largest logit"
    unit = "logit"
    windowed = True
    defaults = {"value": "largest", "point": "probs"}
    choices = {"value": QUANTITIES}
    quantity_from = "value"
    variants = {
        "quantile": Variant({"value": "quantile"}, "99.9 % quantile of the logits"),
        "range": Variant({"value": "range"}, "largest less smallest logit of a query"),
    }

    @property
    def definition(self) -> str:
        return (
            f"Mean over images of {QUANTITIES[self.quantity]}, of scaled logits with their bias as the softmax takes them, in "
            f"float32; entries that are masked (not to be seen, −∞, or a bias of {MASKED:g} or less) do not count. "
            "details.highest is the largest logit of all images. Attention that is written by hand gives its softmax alone: "
            "the range of a query is then that of the logarithms of its probabilities, and undefined where one is below "
            f"{SMALLEST:g}, which may be masked."
        )

    def accumulators(self) -> list[Need]:
        return [(("attention-logits",), lambda: LogitSums(self.plan))]

    def compute(self, accumulators: Sequence[Any], records: Sequence[Record]) -> MetricResult:
        result = super().compute(accumulators, records)
        if np.isfinite(result.array).any():
            return result
        return self.not_applicable(UNDERFLOW if self.quantity == "range" else BY_HAND)

    def details(self, accumulator: HeadMeans) -> dict[str, Any]:
        """The largest logit of all images by block and head."""
        highest = accumulator.array("highest")
        return {"highest": np.where(np.isfinite(highest), highest, np.nan)}


METRICS.add(AttentionLogits.name, AttentionLogits)
