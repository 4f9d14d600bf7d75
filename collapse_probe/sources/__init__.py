"""Where models come from: one file a place; each ends with its entry in `SOURCES`."""

from __future__ import annotations

import contextlib
import difflib
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from collapse_probe.blueprint import Blueprint, ImageTower, Request
from collapse_probe.checkpoints import load_checkpoint
from collapse_probe.errors import CollapseProbeError, ModelError, SettingError, UnknownNameError
from collapse_probe.hub import first_line
from collapse_probe.sockets import SOURCES
from collapse_probe.subject import Subject

BARE = ("ours", "torchvision", "timm")  # where a name without a scheme is looked up, in this order


def resolve(
    address: str | nn.Module,
    *,
    checkpoint: str | Path | None = None,
    pretrained: bool | None = None,
    model_kwargs: Mapping[str, Any] | None = None,
    img_size: int | None = None,
    seed: int = 0,
    partial: bool = False,
) -> Subject:
    """Make the model at `address` ready, in eval mode on the CPU, with its own preprocessing.

    A bare name is looked up in `BARE`; `SCHEME:NAME` names an entry of `SOURCES`; an nn.Module is taken as it
    is, out of its wrappers (a checkpoint then loads into that very module). `pretrained` None means published
    weights unless a checkpoint is given. Fresh weights are drawn under `seed`, and the global generators stay
    as they were. `model_kwargs` go to the model's constructor, `img_size` [pixels] sets its input side,
    `partial` lets a checkpoint load in part.

    Raises UnknownNameError, ModelError, CheckpointError, SettingError.
    """
    if img_size is not None and img_size < 1:
        raise SettingError(f"img_size is a number of pixels above 0, not {img_size}")
    source, request = _locate(address, dict(model_kwargs or {}), img_size)
    blueprint: Blueprint = SOURCES[source].blueprint(request)
    trained = pretrained if pretrained is not None else checkpoint is None
    model = _make(blueprint, request, trained, seed).eval()
    preprocess, notes = blueprint.preprocess(model)
    subject = Subject(
        address=request.address,
        source=source,
        name=blueprint.name,
        weights=blueprint.fixed or (blueprint.trained if trained else None) or f"random (seed {seed})",
        model=model,
        preprocess=preprocess,
        fresh=_fresh(blueprint, request) if blueprint.remakable else None,
        notes=notes,
    )
    return subject if checkpoint is None else loaded(subject, checkpoint, partial=partial)


def loaded(subject: Subject, checkpoint: str | Path, *, partial: bool = False, optional: Collection[str] = ()) -> Subject:
    """The subject with the weights of a checkpoint in its very model; see `checkpoints.load_checkpoint`.

    Raises CheckpointError; the model is then as it was.
    """
    model = subject.model.wrapped if isinstance(subject.model, ImageTower) else subject.model
    report = load_checkpoint(model, checkpoint, partial=partial, optional=optional)
    return replace(
        subject,
        weights="checkpoint" if report.complete else f"checkpoint in part, over {subject.weights}",
        checkpoint=str(checkpoint),
        checkpoint_sha256=report.sha256,
        notes=subject.notes + report.notes,
    )


def _locate(address: str | nn.Module, kwargs: dict[str, Any], img_size: int | None) -> tuple[str, Request]:
    if isinstance(address, nn.Module):
        name = type(address).__name__
        return "module", Request(f"module:{name}", name, kwargs, img_size, module=address)
    scheme, colon, name = address.partition(":")
    if colon:
        source = SOURCES[scheme]
        if not source.has(name):
            raise UnknownNameError(_unknown(name, scheme))
        return scheme, Request(address, name, kwargs, img_size)
    for scheme in BARE:
        if SOURCES[scheme].has(address):
            return scheme, Request(address, address, kwargs, img_size)
    raise UnknownNameError(_unknown(address, None))


def _unknown(name: str, scheme: str | None) -> str:
    """One line with the nearest names: of the scheme that was asked for, or of all places for a bare name."""
    said = f"no model called {name!r}" + (f" in {scheme!r}" if scheme else "")
    if scheme is None and "/" in name:
        return f"{said}; an address there has a scheme, such as 'hf:{name}' or 'timm:NAME' or 'local-dir:PATH'"
    places = {known: f"{place}:{known}" for place in reversed(BARE) for known in SOURCES[place].names()}
    if scheme is not None:
        if name in places:
            return f"{said}; did you mean '{places[name]}'?"
        places = {known: f"{scheme}:{known}" for known in SOURCES[scheme].names()}
    near = difflib.get_close_matches(name, list(places), n=3, cutoff=0.5)
    if not near:
        return f"{said}; 'collapse-probe ls models' lists the names"
    shown = [places[known] if scheme else known for known in near]
    return f"{said}; did you mean {' or '.join(map(repr, shown))}?"


@contextlib.contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Seed torch's CPU generator for the length of the block; no other generator is touched."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield


def _make(blueprint: Blueprint, request: Request, trained: bool, seed: int) -> nn.Module:
    if trained and blueprint.trained is None and blueprint.fixed is None:
        ways = "use --no-pretrained for fresh weights or --checkpoint FILE for your own"
        raise ModelError(f"there are no trained weights of {request.address!r}; {ways}")
    asked = [f"{key}={value!r}" for key, value in request.model_kwargs.items()]
    asked += [] if request.img_size is None else [f"img_size={request.img_size}"]
    try:
        with _seeded(seed):
            return blueprint.make(trained)
    except CollapseProbeError:
        raise
    except Exception as error:  # a constructor may raise anything
        using = f" with {', '.join(asked)}" if asked else ""
        raise ModelError(f"cannot make {request.address!r}{using}: {first_line(error)}") from error


def _fresh(blueprint: Blueprint, request: Request) -> Callable[[int], nn.Module]:
    def fresh(seed: int) -> nn.Module:
        """The same architecture with weights drawn under `seed`, in eval mode."""
        model = _make(blueprint, request, False, seed).eval()
        if blueprint.fixed and _same_weights(model, _make(blueprint, request, False, seed + 1)):
            raise ModelError(f"{request.address!r} makes the same weights whatever the seed: no untrained twin")
        return model

    return fresh


def _same_weights(one: nn.Module, other: nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))
