"""Fixes that need images before they act: what they find on some of them goes into the model and its untrained copy."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from collapse_probe.data.images import ImageSet, batches
from collapse_probe.data.streams.stream import ImageStream
from collapse_probe.devices import choose_device, floating_like, moved
from collapse_probe.errors import SettingError
from collapse_probe.models.fixes.base import Sites
from collapse_probe.models.loading import Subject, library_module


def to_be_found(model: nn.Module) -> Sites:
    """The fixes of a model that need images, with their sites."""
    sites: Sites = getattr(library_module(model), "sites", [])
    return [(fix, site) for fix, site in sites if fix.found]


def calibrated(subject: Subject, images: Any, *, batch_size: int = 8, device: str = "auto", seed: int = 0) -> Subject:
    """The subject whose fixes have found on images what they need, in place; the notes say what it is.

    The images are a seeded draw from `images`, as many as the fix asks for. What a checkpoint holds already stays. The
    untrained copy gets what was found in the trained model. Raises SettingError where there are no images, or some that can be
    run through only once, and ModelError where a fix finds nothing to do.
    """
    found = to_be_found(subject.model)
    if not found:
        return subject
    names = ", ".join(fix.name for fix, _ in found)
    notes, before = [], subject.fresh
    for fix, site in found:
        if any(bool(tensor.any()) for tensor in getattr(site.home, fix.found).state_dict().values()):
            notes.append(f"{fix.name}: what it needs is in the checkpoint")
            continue
        if not isinstance(images, (ImageSet, ImageStream)):
            raise SettingError(f"{names} needs some of the images before all are measured: give a data address or an ImageSet")
        few, model = images.subset(getattr(fix, "images", batch_size), seed), moved(subject.model, choose_device(device))
        like = floating_like(model)

        def pixels(few: Any = few, like: Tensor = like) -> Iterator[Tensor]:
            for batch in batches(few, subject.preprocess, batch_size=batch_size):
                if batch.names:
                    yield batch.pixels.to(like.device, like.dtype)

        notes.append(f"fixes put into the model found on images: {fix.calibrate(pixels, site)}")

    def fresh(number: int) -> nn.Module:
        assert before is not None
        twin = before(number)
        for (fix, own), (_, site) in zip(found, to_be_found(twin), strict=True):
            getattr(site.home, fix.found).load_state_dict(getattr(own.home, fix.found).state_dict())
        return twin

    return replace(subject, fresh=None if before is None else fresh, notes=(*subject.notes, *notes))
