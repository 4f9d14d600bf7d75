"""Fixes on models that exist: opens the sockets of a timm Vision Transformer in place, and puts fixes into them.

No weight is copied and no key is renamed: attention modules change their class to one with the same parameters, and hooks serve
the sockets that lie between modules.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from timm.models.vision_transformer import Attention
from torch import Tensor, nn

from collapse_probe.errors import ModelError
from collapse_probe.models.fixes.base import Fix, Shapes, Sites, add_fix, apply_sites, attend
from collapse_probe.registry import FIXES
from collapse_probe.settings import parse_keywords


class AttentionWithSockets(Attention):
    """timm's Attention with sockets: the same parameters, the same result while it has no fix."""

    sites: Sites

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """[B, N, D] -> [B, N, D]."""
        run: Callable[[], Tensor] = partial(self._attended, x, attn_mask, is_causal)
        for fix, site in self.sites:
            run = run if type(fix).around is Fix.around else partial(fix.around, x, run, site)
        return run()

    def _attended(self, x: Tensor, attn_mask: Tensor | None, is_causal: bool) -> Tensor:
        """q_norm and k_norm are respected, as are an output norm and a gate where there are any."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, self.head_dim)).permute(2, 0, 3, 1, 4)
        out_BHNK = attend(
            self.sites,
            self.q_norm(q),
            self.k_norm(k),
            v,
            scale=self.scale,
            dropout=self.attn_drop.p if self.training else 0.0,
            mask=attn_mask,
            causal=is_causal,
            fused=self.fused_attn,
        )
        out_BND = out_BHNK.transpose(1, 2).flatten(2)
        norm, gate = getattr(self, "norm", None), getattr(self, "gate", None)  # older timm has neither
        out_BND = out_BND if norm is None else norm(out_BND)
        out_BND = out_BND if gate is None else out_BND * gate(x).sigmoid()
        out_BND = apply_sites(self.sites, "joined", out_BND, x)
        projected: Tensor = self.proj_drop(self.proj(out_BND))
        return projected


def _branch(sites: Sites, kind: str, module: nn.Module, args: Any, output: Tensor) -> Tensor:
    return apply_sites(sites, "branch", output, kind)


def _normed(sites: Sites, kind: str, module: nn.Module, args: Any, output: Tensor) -> Tensor:
    return apply_sites(sites, "normed", output, kind)


def _neurons(sites: Sites, module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (apply_sites(sites, "neurons_of", args[0]), *args[1:])


def _enter(sites: Sites, module: nn.Module, args: Any, output: Tensor) -> Tensor:
    return apply_sites(sites, "enter", output)


def _leave(sites: Sites, module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (apply_sites(sites, "leave", args[0]), *args[1:])


def open_block(block: Any) -> None:
    """Give a block of timm its sockets, in place."""
    block.attn.__class__ = AttentionWithSockets
    block.attn.sites, block.sites = [], []
    for kind, norm, branch in (("attention", "norm1", "attn"), ("mlp", "norm2", "mlp")):
        getattr(block, branch).register_forward_hook(partial(_branch, block.sites, kind))
        getattr(block, norm).register_forward_hook(partial(_normed, block.sites, kind))
    if hasattr(block.mlp, "fc2"):
        block.mlp.fc2.register_forward_pre_hook(partial(_neurons, block.sites))


def open_sockets(model: Any) -> None:
    """Give a timm VisionTransformer (plain, distilled, with registers) its sockets, in place; what it computes stays.

    Models that have sockets already, our ViT among them, are left alone. Raises ModelError for any other model.
    """
    if hasattr(model, "sites"):
        return
    kind, blocks = type(model).__name__, getattr(model, "blocks", None)
    if not isinstance(blocks, nn.Sequential | nn.ModuleList) or not len(blocks):
        raise ModelError(f"{kind} has no list of blocks: fixes go into timm's VisionTransformer, DeiT or our ViT")
    for i, block in enumerate(blocks):
        attention = type(getattr(block, "attn", None))
        if attention is not Attention:
            what = "no attention" if attention is type(None) else f"{attention.__module__}.{attention.__qualname__}"
            raise ModelError(f"block {i} of {kind} has {what}; a fix has its place in timm.layers.Attention alone")
    missing = [name for name in ("embed_dim", "num_prefix_tokens", "norm_pre", "norm") if not hasattr(model, name)]
    missing += [name for name in ("mlp", "norm1", "norm2") if not all(hasattr(block, name) for block in blocks)]
    if missing:
        raise ModelError(f"{kind} is not built like timm's VisionTransformer (no {', '.join(missing)})")
    for block in model.blocks:
        open_block(block)
    model.sites, model.fixes = [], ()
    model.norm_pre.register_forward_hook(partial(_enter, model.sites))
    model.norm.register_forward_pre_hook(partial(_leave, model.sites))


def apply(model: Any, fix: str | Fix, blocks: Sequence[int] | None = None, **settings: Any) -> Any:
    """Put a fix into `model`, in place, and return it: `apply(vit, "attn-scale", blocks=range(6, 12))`.

    `blocks` None means all that the fix can act on. The model's own parameters and state_dict keys stay; the fix's come on top.
    With the fix's neutral settings the model still computes what it computed.

    Raises UnknownNameError for the name, SettingError for blocks or settings, ModelError for a model that has no place for the
    fix, or has it already.
    """
    fix = FIXES[fix].with_settings(settings) if isinstance(fix, str) else fix
    if fix.home == "model" and getattr(model, "dynamic_img_size", False) and not model.no_embed_class:
        raise ModelError(f"{fix.name} cannot go into a model that resamples its positions (dynamic_img_size)")
    open_sockets(model)
    add_fix(model, fix, blocks)
    return model


@dataclass(frozen=True)
class PlannedFix:
    """A fix that is to be put into a model: into `blocks` (None: all that it can act on).

    Where a checkpoint holds its parameters, `checkpoint` is True, and `assumed` names the settings that no key of it shows.
    """

    name: str
    settings: Mapping[str, Any]
    blocks: tuple[int, ...] | None = None
    checkpoint: bool = False
    assumed: tuple[str, ...] = ()


def fixes_by_keys(model: Any, shapes: Shapes) -> list[PlannedFix]:
    """The fixes that added tensors of these names and shapes to a model like this one."""
    blocks = getattr(model, "blocks", None)
    if not isinstance(blocks, nn.Sequential | nn.ModuleList):
        return []
    around, found = {key: shape for key, shape in shapes.items() if not key.startswith("blocks.")}, []
    for name, kind in FIXES.items():
        if kind.home in ("model", "modules") and (settings := kind.from_keys(around)) is not None:
            found.append(PlannedFix(name, settings, None, True, kind.unseen))
        elif kind.home != "model":
            at: dict[tuple[tuple[str, Any], ...], list[int]] = {}  # blocks by settings
            for i in range(len(blocks)):
                home = f"blocks.{i}.attn." if kind.home == "attention" else f"blocks.{i}."
                inside = {key.removeprefix(home): shape for key, shape in shapes.items() if key.startswith(home)}
                if (settings := kind.from_keys(inside)) is not None:
                    at.setdefault(tuple(settings.items()), []).append(i)
            found += [PlannedFix(name, dict(items), tuple(where), True, kind.unseen) for items, where in at.items()]
    return found


def read_fix(text: str) -> tuple[str, dict[str, Any]]:
    """A fix's name and its settings out of `NAME` or `NAME:K=V,K=V`; what is not said is the fix's default.

    >>> read_fix("re-attention:norm=layer")
    ('re-attention', {'norm': 'layer'})
    """
    name, _, rest = text.partition(":")
    settings = parse_keywords(filter(None, rest.split(",")), text)
    FIXES[name].with_settings(settings)
    return name, settings
