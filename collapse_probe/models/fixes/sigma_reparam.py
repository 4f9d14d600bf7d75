"""σReparam: divide every weight matrix by its largest singular value and learn the size anew."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from collapse_probe.models.fixes.base import Fix, Shapes
from collapse_probe.registry import FIXES


def power_step(weight: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """One step of power iteration on W [out, in] from u [in]: (σ = vᵀ W u, new u); gradients flow to W alone.

    >>> float(power_step(torch.diag(torch.tensor([3.0, 1.0])), torch.tensor([1.0, 0.0]))[0])
    3.0
    """
    with torch.no_grad():
        v = F.normalize(weight.mv(u), dim=0)
        u = F.normalize(weight.t().mv(v), dim=0)
    return torch.dot(v, weight.mv(u)), u


def _scaled_weight(layer: Any) -> Tensor:
    with torch.autocast(layer.weight.device.type, enabled=False):  # which would make σ coarse
        sigma, u = power_step(layer.weight.flatten(1), layer.u)
        if layer.training:
            layer.u.copy_(u)
        scaled: Tensor = layer.weight * (layer.gamma / sigma).reshape((1,) * layer.weight.ndim)
        return scaled


class SigmaLinear(nn.Linear):
    """A Linear that multiplies by (γ/σ) W: `gamma` [1] is learnable, `u` [in] moves in train mode."""

    def forward(self, x: Tensor) -> Tensor:
        """Like Linear."""
        return F.linear(x, _scaled_weight(self), self.bias)


class SigmaConv2d(nn.Conv2d):
    """A Conv2d that convolves with (γ/σ) W, σ that of W flattened to [out, in·kh·kw]."""

    def forward(self, x: Tensor) -> Tensor:
        """Like Conv2d."""
        convolved: Tensor = self._conv_forward(x, _scaled_weight(self), self.bias)
        return convolved


@dataclass(frozen=True)
class SigmaReparam(Fix):
    """Ŵ = (γ/σ(W)) W in every Linear and Conv2d (of the chosen blocks, or of the whole model).

    As in the official code (apple/ml-sigma-reparam) σ comes by one power step per forward pass, from a vector u that starts at
    the singular value decomposition and moves in train mode only; gradients pass σ, not its vectors. In vision γ starts at
    σ(W), so that Ŵ = W; in speech at 1. The official conversion then removes all norm layers, which is not done here: it has no
    neutral setting. Adds `gamma` and `u` beside each weight.
    """

    gamma: Literal["sigma", "one"] = "sigma"

    name = "sigma-reparam"
    summary = "weights divided by their spectral norm, times a learnable size"
    source = "arXiv 2303.06296"
    failure_types = ("entropy",)
    neutral = {"gamma": "sigma"}
    home = "modules"

    @classmethod
    def from_keys(cls, shapes: Shapes) -> Mapping[str, Any] | None:
        """Known by a `gamma` and a `u` of one module; the norm of the weights is in them."""
        pairs = [name for name in shapes if name.endswith("gamma") and f"{name.removesuffix('gamma')}u" in shapes]
        return {} if pairs else None

    def convert(self, module: nn.Module, width: int) -> bool:
        """Make a Linear or Conv2d its reparametrised kind, with its own weight and bias."""
        kinds: dict[type, type] = {nn.Linear: SigmaLinear, nn.Conv2d: SigmaConv2d}
        if type(module) not in kinds:
            return False
        layer: Any = module
        layer.__class__ = kinds[type(module)]
        matrix = layer.weight.detach().flatten(1)
        precise = matrix.to(torch.promote_types(matrix.dtype, torch.float32))
        leading = torch.linalg.svd(precise, full_matrices=False).Vh[0].to(matrix.dtype)
        sigma, _ = power_step(matrix, leading)
        layer.register_buffer("u", leading)
        layer.gamma = nn.Parameter(sigma[None].clone() if self.gamma == "sigma" else torch.ones_like(sigma)[None])
        return True


FIXES.add(SigmaReparam.name, SigmaReparam)
