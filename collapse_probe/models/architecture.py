"""What a model that is trained here is made of, as plain values from which it can be built again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

from torch import nn

from collapse_probe.errors import CollapseProbeError, ModelError, SettingError
from collapse_probe.models.fixes.apply import apply
from collapse_probe.models.fixes.base import FixSettings, fixes_in, plain_fixes
from collapse_probe.models.vit import ViT, ViTSettings
from collapse_probe.seeding import torch_seeded

TIMM_NAMES = {  # what timm calls the settings that both kinds of model have
    "depth": "depth",
    "width": "embed_dim",
    "heads": "num_heads",
    "mlp_ratio": "mlp_ratio",
    "patch_size": "patch_size",
    "image_size": "img_size",
    "classes": "num_classes",
    "drop_path": "drop_path_rate",
}
OWN_FIELDS = tuple(f.name for f in fields(ViTSettings) if f.name != "fixes")


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """A ViT of `collapse_probe.models.vit` (settings), or one that timm makes (`timm:NAME`, `ours:NAME`), and its fixes.

    `model_kwargs` go to timm's constructor. `embedding_std` draws the patch embedding, the positions and CLS from a truncated
    normal of that standard deviation, without bias; None leaves them as the model has them.
    """

    model: str | ViTSettings
    model_kwargs: Mapping[str, Any] = field(default_factory=dict)
    fixes: FixSettings = field(default_factory=dict)
    embedding_std: float | None = None

    def build(self, seed: int) -> Any:
        """The model with fresh parameters, drawn under `seed`; the global generators stay as they were.

        Raises ModelError or SettingError for an architecture that cannot be.
        """
        fixes = {**self.model.fixes, **self.fixes} if isinstance(self.model, ViTSettings) else self.fixes
        for fix, _ in fixes_in(fixes):
            if fix.found:
                raise SettingError(f"{fix.name} needs no training: it acts on a trained model (compare --fix {fix.name})")
        with torch_seeded(seed):
            if isinstance(self.model, ViTSettings):
                model: Any = ViT(replace(self.model, fixes={**self.model.fixes, **self.fixes}))
            else:
                import timm

                import collapse_probe.models.deepvit  # noqa: F401  (registers its family)

                place, _, name = self.model.rpartition(":")
                if place not in ("", "timm", "ours") or not timm.is_model(name.partition(".")[0]):
                    raise ModelError(f"training takes a timm model (timm:NAME), ours:NAME or a small ViT, not {self.model!r}")
                try:
                    model = timm.create_model(name, pretrained=False, **dict(self.model_kwargs))
                except CollapseProbeError:
                    raise
                except Exception as error:  # a constructor may raise anything
                    settings = ", ".join(f"{key}={value!r}" for key, value in self.model_kwargs.items())
                    raise ModelError(f"cannot make {self.model!r} with {settings or 'its defaults'}: {error}") from error
                for fix, blocks in fixes_in(self.fixes):
                    apply(model, fix, blocks)
            if self.embedding_std is not None:
                for name in ("pos_embed", "cls_token"):
                    if getattr(model, name, None) is not None:
                        nn.init.trunc_normal_(getattr(model, name), std=self.embedding_std)
                nn.init.trunc_normal_(model.patch_embed.proj.weight, std=self.embedding_std)
                nn.init.zeros_(model.patch_embed.proj.bias)
            return model

    def facts(self) -> dict[str, int | None]:
        """The values of the settings that both kinds of model have, None where timm's default holds."""
        if isinstance(self.model, ViTSettings):
            return {name: getattr(self.model, name) for name in TIMM_NAMES}
        return {name: self.model_kwargs.get(theirs) for name, theirs in TIMM_NAMES.items()}

    def varied(self, settings: Mapping[str, Any]) -> Architecture:
        """The same with some settings changed, by the names that our ViT gives them (`depth`, `width`, `heads`, …).

        Raises SettingError for a setting that the model does not have.
        """
        if isinstance(self.model, ViTSettings):
            return replace(self, model=replace(self.model, **settings))
        for name in settings:
            if name not in TIMM_NAMES:
                known = ", ".join(TIMM_NAMES)
                raise SettingError(f"{name!r} cannot be changed in {self.model}; only {known} can, or model_kwargs as a whole")
        return replace(self, model_kwargs={**self.model_kwargs, **{TIMM_NAMES[name]: v for name, v in settings.items()}})

    def plain(self) -> dict[str, Any]:
        """The same as plain values, which JSON can hold and `of_plain` takes back."""
        return {
            **({"vit": self.model.plain()} if isinstance(self.model, ViTSettings) else {"address": self.model}),
            "model_kwargs": dict(self.model_kwargs),
            "fixes": plain_fixes(self.fixes),
            "embedding_std": self.embedding_std,
        }

    @classmethod
    def of_plain(cls, values: Mapping[str, Any]) -> Architecture:
        """The architecture that `plain` wrote; SettingError for anything else."""
        try:
            model = ViTSettings(**values["vit"]) if "vit" in values else str(values["address"])
            return cls(model=model, **{name: values[name] for name in ("model_kwargs", "fixes", "embedding_std")})
        except (KeyError, TypeError) as error:
            raise SettingError(f"these values describe no architecture: {error}; it may be from a newer version") from error
