"""Edits what attention sinks give: the value at a head's most attended key, or the attention that goes there.

Kinds and the rule of a sink as in `vit_causal/interventions.py` of KempnerInstitute/attention_sink (arXiv 2606.08105), which
edits one chosen head at a time; here every head of a block in which an image has a sink is edited at once, and no other.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

ROUTED, ROUTED_MASS = 0.9, 0.5
"""A head has a sink where this share of its queries give one key this much of their attention, or more."""
FEWEST_KEYS = 3


def sinks_in(maps_BHNM: Tensor) -> tuple[Tensor, Tensor]:
    """The most attended key of each head, and whether it is a sink: [B, H, N, M] -> [B, H] twice.

    With fewer than FEWEST_KEYS keys none is: uniform attention alone would make it one.
    """
    key = maps_BHNM.mean(2).argmax(-1)
    column = _column(maps_BHNM, key)
    return key, ((column >= ROUTED_MASS).float().mean(2) >= ROUTED) & (maps_BHNM.shape[-1] >= FEWEST_KEYS)


def _column(maps_BHNM: Tensor, at_BH: Tensor) -> Tensor:
    """What each query gives one key of each head, [B, H, N]."""
    return maps_BHNM.gather(3, at_BH[..., None, None].expand(*maps_BHNM.shape[:3], 1)).squeeze(3)


def _value(values_BHMK: Tensor, at_BH: Tensor) -> Tensor:
    return values_BHMK.gather(2, at_BH[..., None, None].expand(*at_BH.shape, 1, values_BHMK.shape[3])).squeeze(2)


@dataclass(frozen=True)
class SinkEdit:
    """What is done to the sinks of one layer.

    `kind`: zero, mean or donor give the sink's key another value, redirect takes the attention that goes there and gives it to
    the other keys. With `control` the same is done to another key of the same heads: the first of `others` [b, 2], of each of
    the first b images, that is not the sink. `means` [2, H, K] are the mean values of sinks and of patch tokens. A donor's are
    those of the image b places later.
    """

    kind: str
    others: Tensor
    control: bool = False
    means: Tensor | None = None

    def targets(self, key: Tensor) -> Tensor:
        """The keys [b, H] that are edited."""
        first, second = (self.others[:, i, None].expand_as(key) for i in (0, 1))
        return torch.where(first == key, second, first) if self.control else key

    def apply(self, maps_BHNM: Tensor, values_BHMK: Tensor | None) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
        """Other maps, what is added to their product with the values (None where nothing is), which heads have a sink [b, H],
        and the keys that were edited [b, H].

        A value at p that becomes v' changes A·V by A_:p (v' − v_p): here the column p of A is set to zero, and A_:p v' added.
        """
        key, sink = sinks_in(maps_BHNM)
        count = len(self.others)
        at, sink = self.targets(key[:count]), sink[:count]
        maps = maps_BHNM.clone()
        hidden = maps[:count].scatter(3, at[..., None, None].expand(*maps[:count].shape[:3], 1), 0.0)
        if self.kind == "redirect":
            hidden = hidden / hidden.sum(-1, keepdim=True).clamp_min(1e-12)
        maps[:count] = torch.where(sink[..., None, None], hidden, maps[:count])
        if self.kind in ("zero", "redirect"):
            return maps, None, sink, at
        assert values_BHMK is not None
        if self.kind == "mean":
            assert self.means is not None
            new = self.means[1 if self.control else 0].to(values_BHMK).expand(count, -1, -1)
        else:
            lent = values_BHMK[count : 2 * count]
            new = _value(lent, at if self.control else key[count : 2 * count])
        added = _column(maps_BHNM[:count], at)[..., None] * new[:, :, None, :]
        whole = torch.zeros(*maps_BHNM.shape[:3], values_BHMK.shape[3], dtype=added.dtype, device=added.device)
        whole[:count] = torch.where(sink[..., None, None], added, 0.0)
        return maps, whole, sink, at


@dataclass
class SinkRecord:
    """Of the newest run, how many heads of each image were edited, and which keys [b, M]."""

    heads: Tensor | None = None
    keys: Tensor | None = None

    def note(self, sink: Tensor, at: Tensor, tokens: int) -> None:
        """Add a layer's."""
        keys = torch.zeros(len(at), tokens, dtype=torch.int32, device=at.device).scatter_add(1, at, sink.int()) > 0
        heads = sink.sum(1)
        self.heads = heads if self.heads is None else self.heads + heads
        self.keys = keys if self.keys is None else self.keys | keys


@dataclass
class SinkValues:
    """Sums over images of the values at sinks, and of the mean value of the patch tokens, by layer, in float64 on the CPU; and
    of how many they are: [2, H, K] and [2, H].
    """

    sums: dict[int, Tensor] = field(default_factory=dict)
    counts: dict[int, Tensor] = field(default_factory=dict)

    def add(self, layer: int, maps_BHNM: Tensor, values_BHMK: Tensor, patches: Mapping[int, int] | list[int]) -> None:
        """Add some images."""
        key, sink = sinks_in(maps_BHNM)
        at_sinks = (_value(values_BHMK, key).double() * sink[..., None]).sum(0)
        ordinary = values_BHMK[:, :, list(patches)].double().mean(2).sum(0)
        total = torch.stack([at_sinks, ordinary]).cpu()
        count = torch.stack([sink.sum(0), torch.full_like(sink.sum(0), len(values_BHMK))]).double().cpu()
        self.sums[layer] = total + self.sums.get(layer, torch.zeros_like(total))
        self.counts[layer] = count + self.counts.get(layer, torch.zeros_like(count))
