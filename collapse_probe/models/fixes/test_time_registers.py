"""Test-time registers: an added token takes over the activations that make some patches far longer than the rest."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from collapse_probe.errors import ModelError, SettingError
from collapse_probe.models.fixes.base import Fix, FixSite, Parts, Shapes
from collapse_probe.outliers import outliers
from collapse_probe.registry import FIXES

PUBLISHED: dict[str, dict[str, Any]] = {
    "clip-b16": {"neurons": 10, "threshold": 30.0, "outlier_block": -1, "highest_block": 5},
    "dinov2-l14": {"neurons": 50, "threshold": 150.0, "outlier_block": -2, "highest_block": 17},
}
"""What the authors set for OpenCLIP and CLIP B/16, and for DINOv2 L/14 (`configs/`)."""
ONSET = 0.5
"""Outliers have set in at the first block behind which they have this share of their final norm."""
Pixels = Callable[[], Iterator[Tensor]]


class RegisterNeurons(nn.Module):
    """Which neurons of which block's MLP are moved, [L, M]; while `searching`, the fix does nothing."""

    chosen: Tensor

    def __init__(self, blocks: int, neurons: int) -> None:
        super().__init__()
        self.register_buffer("chosen", torch.zeros(blocks, neurons, dtype=torch.bool))
        self.searching = False


def score_neurons(acts_BNM: Tensor, outliers_BN: Tensor, sparse: bool = False) -> Tensor:
    """The mean |activation| over the outliers of each image that has any, [B, N, M], bool [B, N] -> [images, M] in float64.

    `sparse` gives 0 to a neuron whose activations in the image are below ½ at fewer than half of the tokens.
    """
    some_B = outliers_BN.any(1)
    acts_BNM, held_BN1 = acts_BNM[some_B].double(), outliers_BN[some_B].unsqueeze(-1)
    score_BM = (acts_BNM.abs() * held_BN1).sum(1) / held_BN1.sum(1)
    return score_BM * ((acts_BNM < 0.5).double().mean(1) >= 0.5) if sparse else score_BM


def signed_max(x: Tensor, dim: int) -> Tensor:
    """The value of largest size along an axis, with its sign.

    >>> signed_max(torch.tensor([[1.0, -3.0, 2.0]]), 1).tolist()
    [-3.0]
    """
    high, low = x.amax(dim), x.amin(dim)
    return torch.where(high.abs() > low.abs(), high, low)


@dataclass(frozen=True)
class TestTimeRegisters(Fix):
    """`count` zero tokens beside the prefix; at each register neuron they get the largest activation of all tokens, patches 0.

    Needs no training, but images: `calibrate` (which `compare --fix` and `analyze --fix` call on `images` of theirs) finds
    patches far longer than the rest behind block `outlier_block`: above the limit of token-norm and `ratio` times the median
    of their image (which is ours: among few patches six deviations are nothing rare), or above a fixed `threshold`. It scores
    every neuron of an MLP by its mean size at them after the non-linearity, and takes the first `neurons` of the blocks up to
    `highest_block` (None: the first block behind which these patches have half of their norm). `like` takes over the choices
    of the authors for two models. Until it is calibrated, zero tokens are added and nothing is moved; a model without outliers
    is refused. `sparse` is the filter of their notebook.

    `maximum` "neuron" is the largest of each neuron over the tokens, as the released code says in words; "layer" the largest
    over tokens and register neurons of the block together, as it computes. CLS keeps its activation in both. Outliers are
    looked for among patches, in that code among all tokens. No neutral setting: a zero token is still a key.
    """

    count: Annotated[int, "[1, inf)"] = 1
    neurons: Annotated[int, "[1, inf)"] = 10
    threshold: float | None = None
    ratio: Annotated[float, "[1, inf)"] = 3.0
    outlier_block: int = -1
    highest_block: int | None = None
    like: Literal["own", "clip-b16", "dinov2-l14"] = "own"
    maximum: Literal["neuron", "layer"] = "neuron"
    sparse: bool = False
    images: Annotated[int, "[1, inf)"] = 100

    name = "test-time-registers"
    summary = "moves the activations behind high-norm patches to an added token, without training"
    source = "Vision Transformers Don't Need Trained Registers, arXiv 2506.08010"
    home = "model"
    unseen = ("count", "maximum")
    beside_no = ("class-attention",)
    found = "register_neurons"
    __test__ = False  # for pytest, which takes a class of this name for tests

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("outlier_block", "highest_block"):
            value = getattr(self, name)
            if (value is None and name == "outlier_block") or (value is not None and type(value) is not int):
                raise SettingError(f"{self.name}: {name} must be the number of a block, not {value!r}")
        if self.threshold is not None and not (isinstance(self.threshold, int | float) and 0 < self.threshold < math.inf):
            raise SettingError(f"{self.name}: threshold must be a norm above 0, not {self.threshold!r}")

    @classmethod
    def from_keys(cls, shapes: Shapes) -> Mapping[str, Any] | None:
        """Known by `register_neurons.chosen`, which also holds what was found."""
        return {} if "register_neurons.chosen" in shapes else None

    def parts(self, site: FixSite) -> Parts:
        """`register_neurons`; ModelError for MLPs without a second layer `fc2`, or of different widths."""
        widths = [getattr(getattr(block.mlp, "fc2", None), "in_features", 0) for block in site.home.blocks]
        if len({*widths}) != 1 or not widths[0]:
            raise ModelError(f"{self.name} needs MLPs of one width with a last layer `fc2`, whose input is the neurons")
        return {self.found: RegisterNeurons(site.depth, widths[0])}

    def enter(self, tokens_BND: Tensor, site: FixSite) -> Tensor:
        """[B, N, D] -> [B, N + count, D]."""
        if site.home.register_neurons.searching:
            return tokens_BND
        zeros_BRD = tokens_BND.new_zeros(tokens_BND.shape[0], self.count, tokens_BND.shape[2])
        return torch.cat((tokens_BND[:, : site.prefix], zeros_BRD, tokens_BND[:, site.prefix :]), dim=1)

    def neurons_of(self, acts_BNM: Tensor, site: FixSite) -> Tensor:
        """[B, N, M] -> [B, N, M]: what register neurons hold goes to the added tokens."""
        held = site.home.register_neurons
        chosen_M = held.chosen[site.block]
        if held.searching:
            return acts_BNM
        first, patches = site.prefix, site.prefix + self.count
        largest_BM = signed_max(acts_BNM, 1)
        if self.maximum == "layer":
            largest_BM = signed_max(largest_BM * chosen_M, 1).unsqueeze(1).expand_as(largest_BM)
        moved_BRM = torch.where(chosen_M, largest_BM.unsqueeze(1), acts_BNM[:, first:patches])
        return torch.cat((acts_BNM[:, :first], moved_BRM, acts_BNM[:, patches:].masked_fill(chosen_M, 0)), dim=1)

    def prefix_tokens(self, count: int) -> int:
        """`count` and the added tokens."""
        return count + self.count

    @torch.no_grad()
    def calibrate(self, pixels: Pixels, site: FixSite) -> str:
        """Find the register neurons of the model on images, in two passes; say which.

        Raises ModelError where no patch stands out.
        """
        asked = self if self.like == "own" else type(self)(**{**vars(self), **PUBLISHED[self.like], "like": "own"})
        model, depth = site.home, site.depth
        if not -depth <= asked.outlier_block < depth or not (asked.highest_block is None or 0 <= asked.highest_block < depth):
            raise SettingError(f"{self.name}: the model has blocks 0 to {depth - 1}")
        behind = asked.outlier_block % depth
        held = model.register_neurons
        held.searching = True
        try:
            norms = asked._norms(pixels, site)
            flags = [asked._stand_out(each[behind]) for each in norms]
            seen, patches = sum(len(each) for each in flags), sum(int(each.sum()) for each in flags)
            images = sum(int(each.any(1).sum()) for each in flags)
            own = f"{asked.ratio:g} times the median and median + 6 MAD"
            rule = f"longer than {own if asked.threshold is None else f'{asked.threshold:g}'} behind block {behind}"
            if not patches:
                most = max(float((each[behind] / each[behind].median(1, keepdim=True).values).max()) for each in norms)
                raise ModelError(
                    f"{self.name}: no patch of {seen} images is {rule}: there is nothing to move "
                    f"(the longest has {most:.2f} times the median of its image)"
                )
            grown_L = torch.stack([(each * flagged).sum((1, 2)) for each, flagged in zip(norms, flags, strict=True)]).sum(0)
            onset = int((grown_L >= ONSET * grown_L[behind]).nonzero()[0])
            highest = onset if asked.highest_block is None else asked.highest_block
            score_LM = asked._scores(pixels, site, flags) / images
        finally:
            held.searching = False
        best = score_LM[: highest + 1].flatten().topk(min(asked.neurons, score_LM[: highest + 1].numel())).indices
        held.chosen.zero_().view(-1)[best] = True
        pairs = [f"{int(i) // score_LM.shape[1]}:{int(i) % score_LM.shape[1]}" for i in best]
        return (
            f"{self.name}: {patches} patches of {images} of {seen} images are {rule}; "
            f"moved are the neurons (block:neuron) {', '.join(pairs)}, of blocks up to {highest}"
        )

    def _stand_out(self, norms_BP: Tensor) -> Tensor:
        """Which patches are outliers, bool [B, P]."""
        if self.threshold is not None:
            return outliers(norms_BP, threshold=self.threshold)
        return outliers(norms_BP) & (norms_BP > self.ratio * norms_BP.median(1, keepdim=True).values)

    def _norms(self, pixels: Pixels, site: FixSite) -> list[Tensor]:
        """The norm of every patch behind every block, [L, B, P] by batch."""
        norms: list[list[Tensor]] = []

        def note(module: nn.Module, args: Any, out: Tensor) -> None:
            norms[-1].append(out[:, site.prefix :].float().norm(dim=-1))

        with ExitStack() as stack:
            for block in site.home.blocks:
                stack.callback(block.register_forward_hook(note).remove)
            for images in pixels():
                norms.append([])
                site.home(images)
        return [torch.stack(batch) for batch in norms]

    def _scores(self, pixels: Pixels, site: FixSite, flags: list[Tensor]) -> Tensor:
        """The sum over images of the score of every neuron, [L, M] in float64."""
        blocks, batch = site.home.blocks, iter(flags)
        total = torch.zeros(site.home.register_neurons.chosen.shape, dtype=torch.float64, device=flags[0].device)

        def add(number: int, module: nn.Module, args: tuple[Tensor, ...]) -> None:
            total[number] += score_neurons(args[0], F.pad(flagged, (site.prefix, 0)), self.sparse).sum(0)

        with ExitStack() as stack:
            for i, block in enumerate(blocks):
                stack.callback(block.mlp.fc2.register_forward_pre_hook(partial(add, i)).remove)
            for images in pixels():
                flagged = next(batch)
                site.home(images)
        return total


FIXES.add(TestTimeRegisters.name, TestTimeRegisters)
