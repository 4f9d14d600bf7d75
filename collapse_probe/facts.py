"""What findings say about the model and the data that they are of."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from collapse_probe.data import ImageSet
from collapse_probe.provenance import names_sha256
from collapse_probe.subject import Subject
from collapse_probe.trace import Plan


def model_facts(subject: Subject, plan: Plan) -> dict[str, Any]:
    """The section `model`: provenance, and the shape that the probe found."""
    heads = [plan.layers[i].heads for i in plan.map_layers]
    return {
        "address": subject.address,
        "source": subject.source,
        "name": subject.name,
        "weights": subject.weights,
        "checkpoint": subject.checkpoint,
        "checkpoint_sha256": subject.checkpoint_sha256,
        "class": f"{type(subject.model).__module__}.{type(subject.model).__qualname__}",
        "parameters": sum(p.numel() for p in subject.model.parameters()),
        "blocks": len(plan.blocks),
        "heads": heads[0] if len(set(heads)) == 1 else heads,
        "tokens": plan.tokens,
        "prefix_tokens": len(plan.prefix),
        "width": plan.width,
        "preprocess": subject.preprocess.description,
        "block_names": list(plan.blocks),
        "attention_layers": [plan.layers[i].owner for i in plan.map_layers],
        "mixes_maps": any(plan.layers[i].mixed for i in plan.map_layers),
    }


def data_facts(
    images: ImageSet | Iterable[Any] | None, names: Sequence[str], skipped: Sequence[tuple[str, str]]
) -> dict[str, Any]:
    """The section `data`; where no image was used, no address and 0 images."""
    return {
        "address": None if images is None else address_of(images),
        "images": len(names),
        "skipped": [{"name": name, "reason": reason} for name, reason in skipped],
        "names_sha256": None if images is None else names_sha256(names),
        "bundled": isinstance(images, ImageSet) and images.bundled,
    }


def address_of(images: ImageSet | Iterable[Any]) -> str:
    """Where images came from."""
    return images.address if isinstance(images, ImageSet) else f"an iterable ({type(images).__name__})"
