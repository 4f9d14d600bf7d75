"""This project's own models: `ours:NAME`, the families that it registers with timm and the trained models that ship with it,
and `ours:FILE`, what `train` wrote.
"""

from __future__ import annotations

import fnmatch
import importlib
import importlib.util
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from collapse_probe.data.preprocessing import Preprocess
from collapse_probe.errors import ModelError
from collapse_probe.models.loading import Blueprint, Request
from collapse_probe.models.model_file import ModelCard, is_model_file, load_model, read_card
from collapse_probe.registry import SOURCES

FOLDER = Path(__file__).parent.parent / "bundled"
MODELS = {
    "digits-tied-mhsa": "positive control: one block reused 24 times, plain attention",
    "digits-tied-re-attention": "the positive control with Re-attention, of its own in every block",
    "digits-mhsa": "an ordinary ViT of 24 blocks, plain attention",
    "digits-re-attention": "the ordinary ViT of 24 blocks with Re-attention",
}


def bundled_models() -> list[str]:
    """The names of the models whose files are there, in the order of MODELS."""
    return [name for name in MODELS if file_of(name).is_file()]


def file_of(name: str) -> Path:
    """Where the file of a bundled model lies."""
    return FOLDER / f"{name}.safetensors"


FAMILIES = ("deepvit",)  # modules of this package that register models with timm when imported


class OurSource:
    """The names that `FAMILIES` brought into timm's registry, which timm makes; and model files of this project."""

    def names(self, pattern: str = "*") -> list[str]:
        """Our names, sorted."""
        import timm

        present = [name for name in FAMILIES if importlib.util.find_spec(f"collapse_probe.models.{name}")]
        for family in present:
            importlib.import_module(f"collapse_probe.models.{family}")
        registered = [name for family in present for name in timm.list_models(pattern, module=family)]
        return sorted([*registered, *fnmatch.filter(bundled_models(), pattern)])

    def has(self, name: str) -> bool:
        """Whether one of our families registered `name`, or a model file of ours lies at that path."""
        return is_model_file(name) or name.partition(".")[0] in self.names()

    def blueprint(self, request: Request) -> Blueprint:
        """What the model file says; for a name timm's own blueprint, for our models are registered there."""
        if request.name in bundled_models():
            return _of_file(replace(request, name=str(file_of(request.name))))
        if is_model_file(request.name):
            return _of_file(request)
        blueprint: Blueprint = SOURCES["timm"].blueprint(request)
        return blueprint


def _of_file(request: Request) -> Blueprint:
    card = read_card(request.name)
    if request.model_kwargs or request.img_size not in (None, card.input_size[1]):
        asked = ", ".join([*request.model_kwargs, *(["img_size"] if request.img_size else [])])
        raise ModelError(f"{request.name} says how its model is built; {asked} cannot be changed")

    def make(trained: bool) -> nn.Module:
        if not trained:
            fresh: nn.Module = card.architecture.build(_drawn_seed())
            return fresh
        model: nn.Module = load_model(request.name)[0]
        return model

    def preprocess(model: nn.Module) -> tuple[Preprocess, tuple[str, ...]]:
        return card.preprocess(), _notes(card.facts)

    return Blueprint(name=_label(card), make=make, preprocess=preprocess, trained=f"trained: {_label(card)}")


def _drawn_seed() -> int:
    """A seed out of torch's CPU generator, from which fresh weights are to be drawn."""
    import torch

    return int(torch.randint(2**31, ()))


def _label(card: ModelCard) -> str:
    recipe = card.facts.get("recipe") or {}
    step = card.facts.get("step")
    return str(recipe.get("name") or "model") + (f", step {step}" if step is not None else "")


def _notes(facts: Any) -> tuple[str, ...]:
    told = []
    if facts.get("accuracy") is not None:
        told.append(f"{facts['accuracy']:.2%} of the held-out images of {facts.get('data')} right at the end of its training")
    if facts.get("recalibrated_batches"):
        told.append(
            f"BatchNorm statistics re-estimated over {facts['recalibrated_batches']} training batches when it was saved"
        )
    return tuple(told)


SOURCES.add("ours", OurSource())
