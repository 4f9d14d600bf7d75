"""The states of the passes that interventions make over the images: sums and single images' answers, which add and can be
stored.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from collapse_probe.analysis.outputs import Bounds
from collapse_probe.analysis.state.manifest import first_difference
from collapse_probe.analysis.state.records import RECORDS, Records, State
from collapse_probe.data.coverage import Coverage
from collapse_probe.distributed import rank_and_world, shared
from collapse_probe.errors import StateError


class Pass(ABC):
    """What one pass over the images gathers; `identity` says of what, `coverage` which images were read."""

    def __init__(self, identity: Mapping[str, Any]) -> None:
        self.identity: dict[str, Any] = json.loads(json.dumps(identity))
        self.coverage = Coverage()
        self.skipped = 0
        self.inconsistent = False  # while a batch is added

    @property
    def read(self) -> int:
        """How many images were read."""
        return len(self.coverage)

    @property
    @abstractmethod
    def images(self) -> int:
        """How many of them were measured."""

    @abstractmethod
    def tensors(self) -> State:
        """All tensors by name."""

    @abstractmethod
    def facts(self) -> dict[str, Any]:
        """The rest, in JSON types."""

    @abstractmethod
    def add(self, tensors: State, facts: Mapping[str, Any]) -> None:
        """Add what `tensors` and `facts` of another pass of the same kind gave."""

    def state_dict(self) -> dict[str, Any]:
        """Tensors by name, and the text "manifest". Raises StateError where it was stopped while it added a batch."""
        if self.inconsistent:
            raise StateError("it was stopped while it added a batch, which may count in part")
        tally = {**self.facts(), "coverage": self.coverage.to_json()}
        return {"manifest": json.dumps({"identity": self.identity, "tally": tally}), **self.tensors()}

    def merge(self, other: Mapping[str, Any]) -> None:
        """Add a state of the same kind, of other images. Raises StateError that names the first difference."""
        manifest = json.loads(other["manifest"])
        if difference := first_difference(self.identity, manifest["identity"]):
            raise StateError(f"it is of another run: {difference}")
        coverage = Coverage.from_json(manifest["tally"]["coverage"])
        if (twice := self.coverage.overlap(coverage)) is not None:
            raise StateError(f"image number {twice} would count twice")
        self.add({key: value for key, value in other.items() if isinstance(value, Tensor)}, manifest["tally"])
        self.coverage.merge(coverage)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a state of the same kind where nothing was gathered yet."""
        assert not self.read, "something was gathered already"
        self.merge(state)

    def all_reduce(self) -> None:
        """Add what the other processes gathered; the same in all of them."""
        rank, world = rank_and_world()
        own = self.state_dict()
        for source in range(world):
            state = shared(own if source == rank else None, source)
            if source != rank:
                self.merge(state)


class MapSums(Pass):
    """Sums of the maps of some layers [H, N, N] in float64, and of how many images."""

    def __init__(self, identity: Mapping[str, Any]) -> None:
        super().__init__(identity)
        self.sums: dict[int, Tensor] = {}
        self.count = 0

    @property
    def images(self) -> int:
        """How many maps the sums are of."""
        return self.count

    def add_maps(self, layer: int, total: Tensor) -> None:
        """Add the sum over some images of a layer's maps, float64 on the CPU."""
        self.sums[layer] = total if layer not in self.sums else self.sums[layer] + total

    def means(self) -> dict[int, Tensor]:
        """The mean maps by layer."""
        return {layer: total / self.count for layer, total in self.sums.items()}

    def tensors(self) -> State:
        """The sums."""
        return {str(layer): total.contiguous() for layer, total in self.sums.items()}

    def facts(self) -> dict[str, Any]:
        """How many images there were."""
        return {"images": self.count}

    def add(self, tensors: State, facts: Mapping[str, Any]) -> None:
        """Add other sums."""
        for layer, total in tensors.items():
            self.add_maps(int(layer), total)
        self.count += facts["images"]


class Answers(Pass):
    """Of every image the plain top answer, and under each condition the top answer and the divergence from the plain softmax.

    They are columns of `records`: plain [n], top1 [n, conditions], kl [n, conditions]. `nonfinite` are images of which some
    logits are NaN or infinite, each with the condition.
    """

    def __init__(self, identity: Mapping[str, Any], seed: int, most: int = RECORDS) -> None:
        super().__init__(identity)
        self.records = Records(most, seed)
        self.bounds = Bounds()
        self.classes = 0
        self.nonfinite: list[tuple[str, str]] = []

    @property
    def images(self) -> int:
        """How many images were answered."""
        return self.records.seen

    def take(
        self, names: Sequence[str], columns: Mapping[str, Any], places: Sequence[int], labels: Sequence[int], plain: Tensor
    ) -> None:
        """Take some images: their columns, and their plain logits [n, classes]."""
        self.records.add(names, columns, places, labels)
        self.bounds.take(plain)
        self.classes = plain.shape[1]

    def tensors(self) -> State:
        """Records and bounds."""
        bounds = (
            {} if self.bounds.low is None or self.bounds.high is None else {"low": self.bounds.low, "high": self.bounds.high}
        )
        return {**{f"records/{name}": x.contiguous() for name, x in self.records.state().items()}, **bounds}

    def facts(self) -> dict[str, Any]:
        """The rest."""
        return {
            "records": self.records.facts(),
            "classes": self.classes,
            "skipped": self.skipped,
            "nonfinite": [list(each) for each in self.nonfinite],
        }

    def add(self, tensors: State, facts: Mapping[str, Any]) -> None:
        """Add the answers on other images."""
        part = Records(self.records.most, self.records.seed)
        part.load({k.removeprefix("records/"): x for k, x in tensors.items() if k.startswith("records/")}, facts["records"])
        self.records.merge(part)
        for end in ("low", "high"):
            if end in tensors:
                self.bounds.take(tensors[end][None])
        self.classes = max(self.classes, facts["classes"])
        self.skipped += facts["skipped"]
        self.nonfinite += [(str(name), str(why)) for name, why in facts["nonfinite"]]


def identity_of(passes: str, weights: str, listing: Any, *facts: Any) -> dict[str, Any]:
    """What two states of a pass have in common."""
    return {
        "the pass": passes,
        "the weights (SHA-256)": weights,
        "the listing of the data": listing,
        "what is asked": list(facts),
    }
