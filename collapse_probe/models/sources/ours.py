"""This project's own models: `ours:NAME`, the family that it registers with timm and the trained models that ship with it,
and `ours:FILE`, what `train` wrote.
"""

from __future__ import annotations

import fnmatch
from pathlib import Path
from typing import Any

import torch

from collapse_probe.data.preprocessing import sides_of
from collapse_probe.errors import ModelError
from collapse_probe.models.loading import Blueprint, Request, Source
from collapse_probe.models.model_file import is_model_file, load_model, read_card
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


class OurSource(Source):
    """The DeepViT family in timm's registry, which timm makes; and model files of this project."""

    def names(self, pattern: str = "*") -> list[str]:
        """Our names, sorted."""
        from collapse_probe.models.deepvit import FAMILY  # which registers the family with timm

        return sorted(fnmatch.filter([*FAMILY, *bundled_models()], pattern))

    def has(self, name: str) -> bool:
        """Whether `name` is one of ours, or a model file of ours lies at that path."""
        return is_model_file(name) or name.partition(".")[0] in self.names()

    def blueprint(self, request: Request) -> Blueprint:
        """What the model file says; for a name timm's own blueprint, for our models are registered there."""
        path = str(file_of(request.name)) if request.name in bundled_models() else request.name
        if not is_model_file(path):
            return SOURCES["timm"].blueprint(request)  # type: ignore[no-any-return]
        card = read_card(path)
        if request.model_kwargs or (request.img_size and sides_of(request.img_size) != tuple(card.input_size[1:])):
            changes = ", ".join([*request.model_kwargs, *(["img_size"] if request.img_size else [])])
            raise ModelError(f"{path} says how its model is built; {changes} cannot be changed")
        recipe, step = card.facts.get("recipe") or {}, card.facts.get("step")
        label = str(recipe.get("name") or "model") + (f", step {step}" if step is not None else "")
        accuracy, recalibrated = card.facts.get("accuracy"), card.facts.get("recalibrated_batches")
        notes = []
        if accuracy is not None:
            notes.append(f"{accuracy:.2%} of the held-out images of {card.facts.get('data')} right at the end of its training")
        if recalibrated:
            notes.append(f"BatchNorm statistics re-estimated over {recalibrated} training batches when it was saved")

        def make(trained: bool) -> Any:
            return load_model(path)[0] if trained else card.architecture.build(int(torch.randint(2**31, ())))

        data = {"address": card.facts.get("data"), "val_data": card.facts.get("val_data"), "share": recipe.get("val_share")}
        return Blueprint(
            label,
            make,
            lambda model: (card.preprocess(), tuple(notes)),
            trained=f"trained: {label}",
            training_data=None if None in (data["address"], data["share"]) else data,
        )


SOURCES.add("ours", OurSource())
