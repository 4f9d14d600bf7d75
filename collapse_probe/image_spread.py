"""How sure a similarity between images is: sums by group of images, for a jackknife that leaves groups out."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from collapse_probe.agreement import seeded_sample
from collapse_probe.statistics import jackknife
from collapse_probe.sums import GROUPS, Array, Means, group_of
from collapse_probe.trace import MapTile, Plan, Trace

JACKKNIFE_TOKENS = 4


class ImageSpread(Means):
    """Sums by group of images of a few tokens' vectors, for the jackknife of the similarity between images."""

    def __init__(self, plan: Plan, point: str, axis: str, centred: bool) -> None:
        super().__init__()
        self.point, self.axis, self.centred, self.token_dim = point, axis, centred, -2 if axis == "row" else -1
        self.groups, self.blocks = plan.groups(), len(plan.map_layers)
        self.room("own", GROUPS, self.blocks)
        self.room("own_pairs", GROUPS, self.blocks)
        self.samples = []
        for g, ((heads, rows, columns), positions) in enumerate(self.groups.items()):
            sample = seeded_sample(list(range(rows if axis == "row" else columns)), JACKKNIFE_TOKENS, seed=1)
            self.samples.append(sample)
            shape = (len(sample), columns) if axis == "row" else (rows, len(sample))
            self.room(f"sums_{g}", GROUPS, heads, len(positions), *shape, dtype=torch.float32)
            self.room(f"defined_{g}", GROUPS, heads, len(positions), len(sample), dtype=torch.float32)

    def begin(self, trace: Trace, names: Sequence[str]) -> None:
        """Remember the groups of this batch's images."""
        self._group = torch.tensor([group_of(name) for name in names])

    def tile(self, tile: MapTile) -> None:
        """Add the sampled tokens' vectors to the sums of their images' groups."""
        g = list(self.groups.values()).index(tile.positions)
        sample, held = self.samples[g], tile.tokens(self.axis)
        places = [i for i, t in enumerate(sample) if t in held]
        if not tile.whole(self.axis) or not places:
            return
        vectors, valid = tile.unit_vectors(self.point, self.axis, self.centred)
        inside = [held.index(sample[i]) for i in places]
        vectors = vectors.index_select(self.token_dim, torch.tensor(inside, device=vectors.device))
        valid = valid[..., inside].to(vectors.dtype)
        group = self._group[tile.images].to(vectors.device)
        span = slice(places[0], places[-1] + 1)
        self.state(f"sums_{g}")[:, tile.heads].narrow(self.token_dim, span.start, len(places)).index_add_(0, group, vectors)
        self.state(f"defined_{g}")[:, tile.heads, :, span].index_add_(0, group, valid)
        for name, one in (("own", vectors.square().sum((1, 3, 4))), ("own_pairs", valid.square().sum((1, 3)))):
            own = self.state(name)
            own[:, tile.positions] = own[:, tile.positions].index_add(0, group, one.to(own.dtype))

    def stderr(self) -> Array:
        """Standard error [blocks] of the mean cosine between different images: a jackknife that leaves groups out."""
        own, own_pairs = self.state("own"), self.state("own_pairs")
        left_out = torch.full((GROUPS, self.blocks), torch.nan, dtype=torch.float64)
        for g, positions in enumerate(self.groups.values()):
            sums, defined = self.state(f"sums_{g}"), self.state(f"defined_{g}")
            sums, defined = sums.double(), defined.double()
            rest, rest_defined = sums.sum(0) - sums, defined.sum(0) - defined
            total = rest.square().sum((1, 3, 4)) - (own.sum(0) - own)[:, positions]
            pairs = rest_defined.square().sum((1, 3)) - (own_pairs.sum(0) - own_pairs)[:, positions]
            found = torch.where(pairs > 0.5, total / pairs.clamp_min(0.5), torch.nan)
            empty = defined.sum((1, 2, 3)) == 0
            left_out[:, positions] = torch.where(empty[:, None], torch.nan, found).cpu()
        return jackknife(left_out.numpy())[0]
