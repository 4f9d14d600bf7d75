"""What a metric of the tokens on the residual stream is: curves and matrices over depth."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from collapse_probe.capture.blocks import NO_MIDDLE
from collapse_probe.capture.plan import Plan
from collapse_probe.capture.trace import Trace
from collapse_probe.metrics.accumulators import Means
from collapse_probe.metrics.coverage import NO_PATCHES, has_patches
from collapse_probe.metrics.metric import Metric, Need, Variant

WITH_PREFIX = Variant({"prefix": True}, "with prefix tokens")
WIDE_BYTES = 32 * 2**20
TOKENS = {
    "all": "all tokens, prefix tokens included",
    "patches": "the patch tokens, prefix tokens out",
    "cls": "the first prefix token (the class token)",
}
OF_TOKENS = {"patches": Variant({"tokens": "patches"}, "patch tokens"), "cls": Variant({"tokens": "cls"}, "class token")}
NO_CLASS_TOKEN = "the model has no prefix token (class, distillation or register token)"
ONE_TOKEN = "undefined: there is one such token in an image, and no other to confuse it with"
Numbers = Callable[[Tensor], Mapping[str, Tensor]]
"""Takes tokens [B, N, D] in float64; gives numbers [B] by name, NaN where undefined."""


def sequence(trace: Trace, depth: int, prefix: bool) -> Tensor | None:
    """The tokens at a depth in float32, [B, N, D], with or without the prefix tokens; None where it has no sequence."""
    tokens_BND = trace.tokens[depth]
    return trace.patches(depth) if not prefix or tokens_BND is None else tokens_BND.float()


def tokens_of(trace: Trace, tokens_BND: Tensor | None, depth: int, which: str) -> Tensor | None:
    """Of tokens laid out as those at a depth `which` ones (of TOKENS), [B, n, D] in float32; None where they are not known."""
    if tokens_BND is None or which == "all":
        return None if tokens_BND is None else tokens_BND.float()
    patches_BPD, prefix = trace.patches_of(tokens_BND, depth), trace.plan.prefix
    if which == "patches" or patches_BPD is None:
        return patches_BPD
    known = prefix and tokens_BND.shape[1] - patches_BPD.shape[1] == len(prefix)
    return tokens_BND[:, prefix[0] : prefix[0] + 1].float() if known else None


def block_ends(trace: Trace, block: int, branch: str, which: str) -> tuple[Tensor, Tensor] | None:
    """What enters and what leaves a block, or its attention or MLP branch, of `which` tokens, [B, n, D] each in float32; None
    where either is not read, or has other tokens than the other.
    """
    if block and not trace.plan.adjacent_blocks[block - 1]:
        return None  # what enters it is not what the block before gave
    before, after = trace.tokens[block], trace.tokens[block + 1]
    if branch == "attention":
        after = trace.middles[block]
    elif branch == "mlp":
        before = trace.middles[block]
    x, y = tokens_of(trace, before, block, which), tokens_of(trace, after, block + 1, which)
    return None if x is None or y is None or x.shape != y.shape else (x, y)


def class_and_patches(trace: Trace, depth: int) -> tuple[Tensor, Tensor] | None:
    """The first prefix token [B, D] and the patches [B, P, D] at a depth in float32; None where these are not known there.

    Where a block adds tokens of its own, or the class token comes later, the number of tokens tells.
    """
    tokens_BND, patches_BPD = trace.tokens[depth], trace.patches(depth)
    if tokens_BND is None or patches_BPD is None or not trace.plan.prefix:
        return None
    if tokens_BND.shape[1] - patches_BPD.shape[1] != len(trace.plan.prefix):
        return None
    return tokens_BND[:, trace.plan.prefix[0]].float(), patches_BPD


def in_parts(numbers: Numbers, tokens_BND: Tensor) -> dict[str, Tensor]:
    """`numbers` of a few images at a time in float64, on the CPU, {name: [B]}."""
    images, n, width = tokens_BND.shape
    tokens_BND = tokens_BND.cpu() if tokens_BND.device.type == "mps" else tokens_BND
    step = max(1, WIDE_BYTES // max(n * width * 8, 1))
    parts = [numbers(tokens_BND[i : i + step].to(torch.float64)) for i in range(0, images, step)]
    return {name: torch.cat([part[name] for part in parts]).cpu() for name in parts[0]}


def no_ends(plan: Plan, branch: str, tokens: str) -> str:
    """Why the ends of blocks, or of their branches, are not to be had of some tokens; empty where they are of some block."""
    if not plan.width:
        return "no token sequence was found at the first block's input"
    if tokens == "cls" and not plan.prefix:
        return NO_CLASS_TOKEN
    if tokens == "patches" and not any(plan.patch_shapes):
        return "the tokens do not come from the image"
    return NO_MIDDLE if branch != "block" and not any(plan.middles) else ""


class DepthMeans(Means):
    """Means over images of named numbers at every depth."""

    def __init__(self, depths: int, names: Sequence[str], numbers: Numbers, prefix: bool) -> None:
        super().__init__()
        self.depths, self.names, self.numbers, self.prefix = depths, tuple(names), numbers, prefix
        self.add_means(**dict.fromkeys(names, (depths,)))

    def end_batch(self, trace: Trace) -> dict[str, Tensor]:
        """Add one batch; per image [B, depths] by name."""
        by_depth = {name: torch.full((trace.images, self.depths), torch.nan, dtype=torch.float64) for name in self.names}
        for depth in range(self.depths):
            tokens_BND = sequence(trace, depth, self.prefix)
            if tokens_BND is not None:
                for name, values in in_parts(self.numbers, tokens_BND).items():
                    by_depth[name][:, depth] = values
        for name, values in by_depth.items():
            self.add_images(name, values)
        return by_depth


class TokenMetric(Metric):
    """A metric of the tokens on the residual stream; see `Metric`."""

    level = "tokens"

    def inapplicable(self) -> str:
        """The tokens must be read somewhere, and come from the image where the metric is of patches."""
        if not self.plan.width:
            return "no token sequence was found at the first block's input"
        return "" if self.settings.get("prefix") or has_patches(self.plan) else NO_PATCHES


class BlockMetric(TokenMetric):
    """A metric of what each block does to tokens, with the settings `branch` (block, attention, mlp) and `tokens`."""

    dims = ("block",)

    def __init__(self, plan: Plan, **settings: Any) -> None:
        super().__init__(plan, **settings)
        self.needs = frozenset() if self.settings["branch"] == "block" else frozenset({"middles"})

    def inapplicable(self) -> str:
        """The tokens must be read before and behind a block or its branch, and where they are to be of one kind, be known."""
        return no_ends(self.plan, self.settings["branch"], self.settings["tokens"])

    @property
    def neighbours(self) -> tuple[bool, ...]:
        """Those of the model's blocks."""
        return self.plan.adjacent_blocks


class DepthMetric(TokenMetric):
    """A metric with one value per image and depth.

    `quantities` names all numbers that `numbers` gives at once: variants that differ in `quantity_from` alone share them.
    """

    dims = ("depth",)
    quantities: ClassVar[tuple[str, ...]]

    @abstractmethod
    def numbers(self, tokens_BND: Tensor) -> dict[str, Tensor]:
        """The named numbers [B] of tokens [B, N, D] in float64."""

    def which_tokens(self) -> str:
        """The tokens and the place of the definition, in words."""
        which = "all tokens (prefix tokens included)" if self.settings["prefix"] else "the patch tokens (prefix tokens out)"
        return f"{which} of one image on the residual stream, before any final norm, averaged over images"

    def accumulators(self) -> list[Need]:
        depths, prefix = len(self.plan.taps), bool(self.settings["prefix"])
        shared = tuple((setting, value) for setting, value in self.settings.items() if setting != self.quantity_from)
        return [((self.name, shared), lambda: DepthMeans(depths, self.quantities, self.numbers, prefix))]
