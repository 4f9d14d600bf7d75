"""What edits take from other images: donors that run beside an image, and what is drawn for each image by its name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from collapse_probe.analysis.state.passes import Pass
from collapse_probe.analysis.state.records import State
from collapse_probe.capture.edits.streams import Drawn
from collapse_probe.errors import DataError
from collapse_probe.seeding import rank_of_name

MOST_DONORS = 64
FEWEST = 2


class Pictures(Pass):
    """The pixels of some images, by name."""

    def __init__(self, identity: Mapping[str, Any]) -> None:
        super().__init__(identity)
        self.pixels: dict[str, Tensor] = {}

    @property
    def images(self) -> int:
        """How many there are."""
        return len(self.pixels)

    def tensors(self) -> State:
        """All pixels, in the order of `facts`."""
        return {"pixels": torch.stack([*self.pixels.values()]).contiguous()} if self.pixels else {}

    def facts(self) -> dict[str, Any]:
        """The names."""
        return {"names": [*self.pixels]}

    def add(self, tensors: State, facts: Mapping[str, Any]) -> None:
        """Add other images."""
        self.pixels |= dict(zip(facts["names"], tensors.get("pixels", ()), strict=True))


def donor_names(names: Sequence[str], seed: int) -> frozenset[str]:
    """The images that lend to others: a random sample that every order, partition and process shares.

    Raises DataError where there is one image.
    """
    if len(names) < FEWEST:
        raise DataError(f"a donor is another image, which takes {FEWEST} images or more; came {len(names)}")
    return frozenset(sorted(names, key=lambda name: (rank_of_name(f"donor/{name}", seed), name))[:MOST_DONORS])


@dataclass(frozen=True)
class Donors:
    """Images that lend, sorted by name."""

    names: tuple[str, ...]
    pixels: Tensor
    seed: int

    def partner(self, name: str) -> int:
        """The donor of an image, by its place: drawn by the image's name, never itself."""
        at = rank_of_name(f"partner/{name}", self.seed) % len(self.names)
        return (at + 1) % len(self.names) if self.names[at] == name else at

    def of(self, names: Sequence[str]) -> Tensor:
        """The donors' pixels, one for each name."""
        return self.pixels[[self.partner(name) for name in names]]


def drawn_for(names: Sequence[str], seed: int, patches: Sequence[int], count: int, width: int, device: torch.device) -> Drawn:
    """For each image `count` random patch positions (two at least, all where there are fewer), and directions of length 1."""
    others, noise = [], []
    for name in names:
        generator = torch.Generator().manual_seed(rank_of_name(f"drawn/{name}", seed) % 2**63)
        others.append(torch.tensor(patches)[torch.randperm(len(patches), generator=generator)[: max(count, 2)]])
        noise.append(torch.nn.functional.normalize(torch.randn(min(count, len(patches)), width, generator=generator), dim=1))
    return Drawn(torch.stack(others).to(device), torch.stack(noise).to(device))
