"""The models that the benchmarks run, and the least that their analysis can cost by arithmetic."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import timm
import torch
from torch.utils.flop_counter import FlopCounterMode

import collapse_probe.models.deepvit  # noqa: F401  (registers the DeepViTs with timm)


@dataclass(frozen=True)
class Case:
    """A model of timm's at an image size, with the images that go through it together on a CPU and on a GPU."""

    label: str
    name: str
    side: int
    cpu_batch: int
    cuda_batch: int

    def batch(self, device: torch.device) -> int:
        """Images in a batch on this device."""
        return self.cuda_batch if device.type == "cuda" else self.cpu_batch


CASES = {
    case.label: case
    for case in (
        Case("B/32", "vit_base_patch32_224", 224, 16, 256),
        Case("S/16", "vit_small_patch16_224", 224, 16, 256),
        Case("B/16", "vit_base_patch16_224", 224, 8, 256),
        Case("L/16@384", "vit_large_patch16_384", 384, 1, 64),
        Case("S/16@512", "vit_small_patch16_224", 512, 4, 64),
        Case("S/16@1024", "vit_small_patch16_224", 1024, 1, 16),
        Case("DeepViT-L", "deepvit_l", 224, 8, 256),
        Case("tiny", "vit_tiny_patch16_224", 64, 4, 4),
    )
}


def make_model(case: Case, device: torch.device, **settings: Any) -> torch.nn.Module:
    """The model with fresh weights, and queries and keys large enough that its maps are peaked."""
    torch.manual_seed(0)
    size = {} if "deepvit" in case.name else {"img_size": case.side}
    model = timm.create_model(case.name, num_classes=1000, **size, **settings).eval()
    with torch.no_grad():
        for block in model.blocks:
            block.attn.qkv.weight *= 4
    return model.to(device)


@dataclass(frozen=True)
class Sizes:
    """What the floor of one image's analysis follows from: operations, entries of maps, and bytes of q and k in 16 bits."""

    blocks: int
    heads: int
    tokens: int
    width: int
    forward_flops: int

    @property
    def entries(self) -> int:
        """Entries of all maps."""
        return self.blocks * self.heads * self.tokens**2

    @property
    def logits_flops(self) -> int:
        """Recomputing q·kᵀ of every block."""
        return 2 * self.entries * (self.width // self.heads)

    @property
    def gram_flops(self) -> int:
        """The products of every two blocks' maps, for one kind of vector."""
        return 2 * self.blocks * self.entries

    @property
    def patch_flops(self) -> int:
        """The products of every two tokens at each depth, for patch-diversity."""
        return 2 * (self.blocks + 1) * self.tokens**2 * self.width

    def as_dict(self) -> dict[str, int]:
        """All numbers by name."""
        names = ("entries", "logits_flops", "gram_flops", "patch_flops")
        return {**asdict(self), **{name: getattr(self, name) for name in names}}


def sizes_of(case: Case) -> Sizes:
    """The sizes of a model, counted by torch in a forward pass without values."""
    with torch.device("meta"):
        model = timm.create_model(case.name, **({} if "deepvit" in case.name else {"img_size": case.side})).eval()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(torch.empty(1, 3, case.side, case.side, device="meta"))
    tokens = model.patch_embed.num_patches + model.num_prefix_tokens
    return Sizes(len(model.blocks), model.blocks[0].attn.num_heads, tokens, model.embed_dim, counter.get_total_flops())


@dataclass(frozen=True)
class Rates:
    """What a GPU does in a second: products in 16 bits from registers and of short matrices, plain operations in float32 and
    exponentials, and bytes from memory. Of the H100's and H200's data sheets, with the products at what kernels reach.
    """

    logits: float = 400e12
    grams: float = 200e12
    plain: float = 33e12
    exponentials: float = 3.9e12
    bytes: float = 3.35e12


H100, H200 = Rates(), Rates(bytes=4.8e12)
PLAIN_OPERATIONS = 10
"""Operations in float32 for each entry of a map: scale, subtract, sums."""


def floor_seconds(sizes: Sizes, rates: Rates) -> float:
    """Seconds an image on a GPU if maps never left the chip and nothing overlapped: q and k read once, q·kᵀ, exponentials, one
    Gram, the sums, and the Grams of the patches.
    """
    read = 2 * 2 * sizes.blocks * sizes.tokens * sizes.width
    return (
        sizes.logits_flops / rates.logits
        + (sizes.gram_flops + sizes.patch_flops) / rates.grams
        + PLAIN_OPERATIONS * sizes.entries / rates.plain
        + sizes.entries / rates.exponentials
        + read / rates.bytes
    )


def floor_operations(sizes: Sizes) -> float:
    """The floor by operations alone: 1 + (q·kᵀ once more, Grams of columns and rows, Grams of patches) / forward. On a CPU."""
    return 1 + (sizes.logits_flops + 2 * sizes.gram_flops + sizes.patch_flops) / sizes.forward_flops


def floor(case: Case, device: torch.device, plain_seconds: float) -> dict[str, Any]:
    """The floor of a model as a ratio to `plain_seconds` an image, with how it was counted."""
    sizes = sizes_of(case)
    if device.type != "cuda":
        return {"ratio": floor_operations(sizes), "by": "operations", "sizes": sizes.as_dict()}
    rates = H200 if "H200" in torch.cuda.get_device_name(device) else H100
    seconds = floor_seconds(sizes, rates)
    return {"ratio": 1 + seconds / plain_seconds, "by": "seconds", "seconds": seconds, "sizes": sizes.as_dict()}
