"""What a fix may touch: the sockets of a transformer, and the attention that runs through them.

A fix is a frozen dataclass of its settings. It owns no tensor: `parts` makes its parameters, and `add_fix` registers them on
the module where the official code keeps them (an attention, a block, the model), under the official names, so that official
checkpoints fit. A socket is a method that receives a tensor and returns it changed; the base class returns it as it came.
Several fixes in one place act in the order in which they were added.

    model      enter → blocks → leave → norm → head
    block      x + branch(attention(normed(norm1(x)))),  x + branch(fc2(neurons_of(act(fc1(normed(norm2(x)))))))
    attention  around( … ):
               query, values → logits → softmax → probs → dropout → weights → @v → heads → joined → proj
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from collapse_probe.errors import ModelError, SettingError
from collapse_probe.registry import FIXES
from collapse_probe.settings import Settings

Parts = Mapping[str, nn.Module | nn.Parameter]
"""What a fix adds to a module, by name."""
Shapes = Mapping[str, Sequence[int]]
"""The shapes of tensors by their names within a home."""


@dataclass(eq=False, repr=False)  # a printed site would print the model
class FixSite:
    """Where one fix acts in one model.

    `home` is the module that holds the fix's parts, `block` its block (-1 for the whole model), `blocks` all blocks of this
    fix, `prefix` the number of prefix tokens before it came. `memory` is shared by the sites of one added fix: what one block
    leaves there, a later block of the same forward pass takes.
    """

    home: Any
    block: int
    blocks: tuple[int, ...]
    depth: int
    width: int
    heads: int
    prefix: int
    memory: dict[str, Tensor]

    def take(self, key: str) -> Tensor:
        """What an earlier block left under `key`; the last block of the fix clears it away."""
        if key not in self.memory:
            raise ModelError(
                f"block {self.block} needs the {key} of an earlier block, which has not run in this forward "
                "pass (blocks run alone, or under gradient checkpointing, cannot pass anything on)"
            )
        return self.memory.pop(key) if self.block in (-1, self.blocks[-1]) else self.memory[key]


@dataclass(frozen=True)
class Fix(Settings):
    """One remedy: its settings are the fields, its sockets the methods it overrides.

    `neutral` holds the settings under which the model computes what it computed without the fix; None where no such setting
    exists. `unseen` names the settings that matter to a trained model and leave no trace in its weights. `failure_types` are
    those that the source sets it against: "depth", "tokens", "entropy", or none of them. `beside_no` names fixes with which it
    cannot share a model. `found` is the part that holds what `calibrate` finds on images, empty for a fix that needs none.
    """

    summary: ClassVar[str]
    source: ClassVar[str]
    failure_types: ClassVar[tuple[str, ...]] = ()
    neutral: ClassVar[Mapping[str, Any] | None] = None
    home: ClassVar[Literal["attention", "block", "model", "modules"]] = "attention"
    unseen: ClassVar[tuple[str, ...]] = ()
    beside_no: ClassVar[tuple[str, ...]] = ()
    found: ClassVar[str] = ""

    @classmethod
    def from_keys(cls, shapes: Shapes) -> Mapping[str, Any] | None:
        """The settings of the fix that added tensors of these names and shapes to one home, as far as they show; None where
        these tell of no such fix. A fix that adds parameters or buffers should know them again here.
        """
        return None

    def reach(self, blocks: tuple[int, ...] | None, depth: int) -> tuple[int, ...]:
        """The blocks in which the fix acts, given those that the user chose (None: no choice made)."""
        if self.home == "model" and blocks is not None:
            raise SettingError(f"{self.name} acts on the whole model: it cannot be put into single blocks")
        return tuple(range(depth)) if blocks is None else blocks

    def parts(self, site: FixSite) -> Parts:
        """The parameters and modules that the fix adds to `site.home`, by name."""
        return {}

    def around(self, x_BND: Tensor, attend: Callable[[], Tensor], site: FixSite) -> Tensor:
        """The whole of an attention, which `attend` carries out on `x_BND`, or does not."""
        return attend()

    def query(self, q_BHNK: Tensor, site: FixSite) -> Tensor:
        """Queries, before they meet the keys."""
        return q_BHNK

    def values(self, v_BHNK: Tensor, site: FixSite) -> Tensor:
        """Values, before the map multiplies them."""
        return v_BHNK

    def maps(self, q_BHNK: Tensor, k_BHNK: Tensor, site: FixSite) -> list[tuple[Tensor, Tensor]]:
        """Queries and keys of each map that a head makes; `merged` makes one of them."""
        return [(q_BHNK, k_BHNK)]

    def logits(self, logits_BHNN: Tensor, site: FixSite) -> Tensor:
        """Scaled logits, before the mask and the softmax."""
        return logits_BHNN

    def probs(self, probs_BHNN: Tensor, site: FixSite) -> Tensor:
        """The map after the softmax, before attention dropout."""
        return probs_BHNN

    def merged(self, maps: list[Tensor], site: FixSite) -> Tensor:
        """One map of those that `maps` asked for, each after its softmax and dropout."""
        return maps[0]

    def weights(self, weights_BHNN: Tensor, site: FixSite) -> Tensor:
        """The map after attention dropout; the result multiplies V."""
        return weights_BHNN

    def heads(self, out_BHNK: Tensor, v_BHNK: Tensor, site: FixSite) -> Tensor:
        """What each head gives, before the projection."""
        return out_BHNK

    def joined(self, out_BND: Tensor, x_BND: Tensor, site: FixSite) -> Tensor:
        """The heads side by side, before the projection; `x_BND` is what entered the attention."""
        return out_BND

    def normed(self, x_BND: Tensor, kind: Literal["attention", "mlp"], site: FixSite) -> Tensor:
        """What the norm before a branch gives."""
        return x_BND

    def neurons_of(self, acts_BNM: Tensor, site: FixSite) -> Tensor:
        """The hidden activations of a block's MLP, before its last layer; also for a fix of the whole model."""
        return acts_BNM

    def branch(self, x_BND: Tensor, kind: Literal["attention", "mlp"], site: FixSite) -> Tensor:
        """What a branch of the block adds to the residual stream."""
        return x_BND

    def enter(self, tokens_BND: Tensor, site: FixSite) -> Tensor:
        """The token sequence before the first block, positions added."""
        return tokens_BND

    def leave(self, tokens_BND: Tensor, site: FixSite) -> Tensor:
        """The token sequence after the last block, before the final norm."""
        return tokens_BND

    def prefix_tokens(self, count: int) -> int:
        """How many prefix tokens the blocks see, when they saw `count` without the fix."""
        return count

    def calibrate(self, pixels: Callable[[], Iterator[Tensor]], site: FixSite) -> str:
        """Find on images what the fix needs, and put it into `site.home`; `pixels()` gives the batches [B, C, height, width]
        once more. Returns a line on what was found.
        """
        return ""

    def convert(self, module: nn.Module, width: int) -> bool:
        """Turn a module into the fix's own kind, in place and with its parameters; False where it cannot."""
        return False

    @property
    def needs_map(self) -> bool:
        """Whether the fix must see the attention map, which rules out fused attention."""
        sockets = ("maps", "logits", "probs", "weights")
        return any(getattr(type(self), socket) is not getattr(Fix, socket) for socket in sockets)


Sites = list[tuple[Fix, FixSite]]


@dataclass(frozen=True)
class AppliedFix:
    """The record of one fix in a model: `model.fixes` lists them in order."""

    name: str
    settings: Mapping[str, Any]
    blocks: tuple[int, ...]


FixSettings = Mapping[str, Mapping[str, Any]]
"""Names of fixes and their settings, `blocks` among them (default: all that the fix can act on), in the order of adding."""


def fixes_in(fixes: FixSettings) -> Iterator[tuple[Fix, Sequence[int] | None]]:
    """Each fix with its settings, and its blocks. Raises UnknownNameError and SettingError."""
    for name, settings in fixes.items():
        own = {key: value for key, value in settings.items() if key != "blocks"}
        yield FIXES[name].with_settings(own), settings.get("blocks")


def plain_fixes(fixes: FixSettings) -> dict[str, dict[str, Any]]:
    """The same as plain values, which JSON can hold."""
    return {
        name: {key: list(value) if key == "blocks" and value is not None else value for key, value in settings.items()}
        for name, settings in fixes.items()
    }


def apply_sites(sites: Sites, socket: str, x: Tensor, *others: Any) -> Tensor:
    """Pass `x` through one socket of every fix in `sites`, in order."""
    for fix, site in sites:
        x = getattr(fix, socket)(x, *others, site)
    return x


def attend(
    sites: Sites,
    q_BHNK: Tensor,
    k_BHNK: Tensor,
    v_BHNK: Tensor,
    *,
    scale: float,
    dropout: float = 0.0,
    mask: Tensor | None = None,
    causal: bool = False,
    fused: bool = True,
) -> Tensor:
    """Attention through the sockets, [B, H, N, K] three times -> [B, H, N, K]; the kernel is fused unless a fix needs the map.

    `dropout` is the rate in force now (0 in eval mode); `mask` is boolean (True: may be seen) or added to the logits.
    """
    q_BHNK, v_BHNK = apply_sites(sites, "query", q_BHNK), apply_sites(sites, "values", v_BHNK)
    if fused and not any(fix.needs_map for fix, _ in sites):
        out_BHNK = F.scaled_dot_product_attention(
            q_BHNK, k_BHNK, v_BHNK, attn_mask=mask, dropout_p=dropout, is_causal=causal, scale=scale
        )
    else:
        if causal:
            mask = torch.ones(q_BHNK.shape[-2], k_BHNK.shape[-2], dtype=torch.bool, device=q_BHNK.device).tril()
        splitting = next((each for each in sites if type(each[0]).maps is not Fix.maps), None)
        pairs = [(q_BHNK, k_BHNK)] if splitting is None else splitting[0].maps(q_BHNK, k_BHNK, splitting[1])
        maps = []
        for q, k in pairs:
            logits_BHNN = apply_sites(sites, "logits", (q * scale) @ k.transpose(-2, -1))
            if mask is not None and mask.dtype == torch.bool:
                logits_BHNN = logits_BHNN.masked_fill(~mask, float("-inf"))
            elif mask is not None:
                logits_BHNN = logits_BHNN + mask
            probs_BHNN = apply_sites(sites, "probs", torch.softmax(logits_BHNN, dim=-1))
            maps.append(F.dropout(probs_BHNN, dropout) if dropout else probs_BHNN)
        weights_BHNN = maps[0] if splitting is None else splitting[0].merged(maps, splitting[1])
        out_BHNK = apply_sites(sites, "weights", weights_BHNN) @ v_BHNK
    return apply_sites(sites, "heads", out_BHNK, v_BHNK)


def add_fix(model: Any, fix: Fix, blocks: Sequence[int] | None = None) -> None:
    """Put `fix` into a model with sockets: into `blocks` (None: all that it can act on), at once or not at all.

    A model with sockets has `blocks` (each with `attn`), `embed_dim`, `num_prefix_tokens`, and a list `sites` on itself, on
    each block and on each attention. Raises SettingError for blocks that the model or the fix does not have, ModelError where
    the fix is there already.
    """
    depth, chosen = len(model.blocks), None
    if blocks is not None:
        chosen = tuple(sorted({*blocks}))
        if not chosen or len(chosen) != len(blocks) or not all(type(i) is int and 0 <= i < depth for i in chosen):
            raise SettingError(f"{fix.name}: blocks must be different numbers from 0 to {depth - 1}, not {list(blocks)}")
    reach = fix.reach(chosen, depth)
    for before in model.fixes:
        if before.name == fix.name and set(before.blocks) & set(reach):
            raise ModelError(f"the model already has {fix.name} in blocks {list(before.blocks)}: once is enough")
        if before.name in fix.beside_no or fix.name in FIXES[before.name].beside_no:
            raise ModelError(f"{fix.name} cannot stand beside {before.name}, which the model already has")
    if fix.home == "modules":
        roots = [model] if chosen is None else [model.blocks[i] for i in chosen]
        modules = [module for root in roots for module in root.modules()]
        if not sum(fix.convert(module, model.embed_dim) for module in modules):
            raise ModelError(f"the model has no layer that {fix.name} could act on")
    else:
        homes = {-1: model} if fix.home == "model" else {i: model.blocks[i] for i in reach}
        if fix.home == "attention":
            homes = {i: block.attn for i, block in homes.items()}
        facts = (reach, depth, model.embed_dim, model.blocks[0].attn.num_heads, model.num_prefix_tokens)
        memory: dict[str, Tensor] = {}
        sites = [FixSite(home, i, *facts, memory) for i, home in homes.items()]
        like = next(model.parameters())
        with torch.device(like.device):
            parts = [(site, name, part) for site in sites for name, part in fix.parts(site).items()]
        for site, name, _ in parts:
            if hasattr(site.home, name):
                where = "the model" if site.block < 0 else f"block {site.block}"
                raise ModelError(f"{where} already has a {name}, which {fix.name} would add")
        for site, name, part in parts:
            fitted = part.to(like.dtype)
            made = fitted.train(site.home.training) if isinstance(fitted, nn.Module) else nn.Parameter(fitted)
            setattr(site.home, name, made)
        for site in sites:
            site.home.sites.append((fix, site))
        if fix.home == "model" and type(fix).neurons_of is not Fix.neurons_of:
            for i, block in enumerate(model.blocks):
                block.sites.append((fix, replace(sites[0], block=i)))
    model.num_prefix_tokens = fix.prefix_tokens(model.num_prefix_tokens)
    model.fixes = (*model.fixes, AppliedFix(fix.name, asdict(fix), reach))
