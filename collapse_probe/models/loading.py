"""From an address to a Subject: the model, its weights, its fixes, its preprocessing, and how to make it anew."""

from __future__ import annotations

import difflib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from collapse_probe.data.preprocessing import Preprocess, Size, checked_size, for_channels, input_channels
from collapse_probe.downloads import fetching, first_line
from collapse_probe.errors import CheckpointError, CollapseProbeError, ModelError, SettingError, UnknownNameError
from collapse_probe.models.checkpoints import Checkpoint, LoadReport, load_weights, read_weights
from collapse_probe.models.fixes.apply import PlannedFix, apply, fixes_by_keys, read_fix
from collapse_probe.registry import FIXES, SOURCES
from collapse_probe.seeding import torch_seeded


@dataclass(frozen=True)
class Subject:
    """A model under analysis: in eval mode, with its provenance.

    `source` is the key of the table of sources, `name` the name there, `weights` says which weights it holds (a tag, or
    "random (seed 0)", or "checkpoint"). `img_size` is the size that was asked for, None where the model's own is taken;
    `blocks_pattern`, as in a shell, names the paths of its blocks where they are not found.
    `fresh(seed)` makes the same architecture with fresh parameters, in eval mode; None where
    that is not possible. `loading` says what of a checkpoint went into `model`, by the names of `model`; `training_data`
    on what its weights were trained, as `split_data` takes it, None where that is not known. `request` holds the arguments of
    `resolve` that made it out of an address, None for a module of the caller's.
    """

    address: str
    source: str
    name: str
    weights: str
    model: nn.Module
    preprocess: Preprocess
    fresh: Callable[[int], nn.Module] | None = None
    checkpoint: str | None = None
    checkpoint_sha256: str | None = None
    loading: LoadReport | None = None
    notes: tuple[str, ...] = ()
    img_size: Size | None = None
    blocks_pattern: str | None = None
    training_data: Mapping[str, Any] | None = None
    request: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class Request:
    """What is wanted of a source: `name` is the address without its scheme.

    `img_size` is the side of the input in pixels, or (height, width). `module` is the model itself where the caller passed
    one; otherwise None.
    """

    address: str
    name: str
    model_kwargs: Mapping[str, Any] = field(default_factory=dict)
    img_size: Size | None = None
    module: nn.Module | None = None


@dataclass(frozen=True)
class Blueprint:
    """How a source would make one model.

    `make(trained)` makes it with its published weights, or with fresh ones drawn from torch's CPU generator.
    `preprocess(model)` gives its preprocessing, and notes on what had to be assumed. `trained` is the tag of the published
    weights, None where there are none. `fixed` is set where the weights cannot be chosen here, and says whose they are.
    `remakable` is False where `make` cannot give a second, fresh model. `training_data`: see `Subject`.
    """

    name: str
    make: Callable[[bool], nn.Module]
    preprocess: Callable[[nn.Module], tuple[Preprocess, tuple[str, ...]]]
    trained: str | None = None
    fixed: str | None = None
    remakable: bool = True
    training_data: Mapping[str, Any] | None = None


class Source(ABC):
    """One place where models come from; an instance, or any object with these methods, is entered in `SOURCES` under its
    address scheme.
    """

    def names(self, pattern: str = "*") -> list[str]:
        """Names that match a shell pattern; none where the place cannot be listed. Fetches nothing."""
        return []

    def has(self, name: str) -> bool:
        """Whether `name` is a name here; True where only trying can tell."""
        return True

    @abstractmethod
    def blueprint(self, request: Request) -> Blueprint:
        """How to make the requested model. Raises UnknownNameError or ModelError."""


class ImageTower(nn.Module):
    """Lets a model of another library take pixels and return one tensor: [B, channels, height, width] -> [B, …].

    `wrapped` is the library's own module, `answer` picks the tensor out of what it returns, `inputs` makes the keyword
    arguments of its forward out of the pixels; without it they are its first argument. `notes` say what that means.
    """

    def __init__(
        self,
        wrapped: nn.Module,
        answer: Callable[[Any], Tensor],
        inputs: Callable[[Tensor], Mapping[str, Any]] | None = None,
        notes: tuple[str, ...] = (),
    ) -> None:
        super().__init__()
        self.wrapped, self.answer, self.inputs, self.notes = wrapped, answer, inputs, notes

    def forward(self, pixels: Tensor) -> Tensor:
        """The tensor that `answer` picks."""
        return self.answer(self.wrapped(pixels) if self.inputs is None else self.wrapped(**self.inputs(pixels)))


def library_module(model: nn.Module) -> nn.Module:
    """The library's own module, where an ImageTower stands around it."""
    return model.wrapped if isinstance(model, ImageTower) else model


BARE = ("ours", "torchvision", "timm")  # where a name without a scheme is looked up, in this order


def resolve(
    address: str | nn.Module,
    fixes: Sequence[str] = (),
    blocks: Sequence[int] | None = None,
    *,
    checkpoint: str | Path | None = None,
    checkpoint_key: str | None = None,
    pretrained: bool | None = None,
    model_kwargs: Mapping[str, Any] | None = None,
    img_size: Size | None = None,
    blocks_pattern: str | None = None,
    seed: int = 0,
    partial: bool = False,
) -> Subject:
    """Make the model at `address` ready, in eval mode on the CPU, with its own preprocessing.

    A bare name is looked up in `BARE`; `SCHEME:NAME` names an entry of `SOURCES`; an nn.Module is taken as it is, out of its
    wrappers (a checkpoint then loads into that very module). `pretrained` None means published weights unless a checkpoint is
    given. Fresh weights are drawn under `seed`, and the global generators stay as they were. `model_kwargs` go to the model's
    constructor, `img_size` sets its input side [pixels], or (height, width), `blocks_pattern` names its blocks where they are
    not found, `partial` lets a checkpoint load in part, `checkpoint_key` names the weights that are meant in a file with
    several (`state_dict_ema`, `teacher`, `base_encoder`).

    Fixes whose parameters the checkpoint holds are known by their keys and put in; `fixes`, see `with_fixes`, may add settings
    that no key shows. Other `fixes` are put into `blocks` as well, and stay as they were made: a note says so.

    Raises UnknownNameError, ModelError, CheckpointError, SettingError.
    """
    img_size = None if img_size is None else checked_size(img_size)
    asked = {
        "address": address,
        "fixes": list(fixes),
        "blocks": None if blocks is None else list(blocks),
        "checkpoint": None if checkpoint is None else str(checkpoint),
        "checkpoint_key": checkpoint_key,
        "pretrained": pretrained,
        "model_kwargs": dict(model_kwargs or {}),
        "img_size": img_size,
        "blocks_pattern": blocks_pattern,
        "seed": seed,
        "partial": partial,
    }
    source, request = _locate(address, dict(model_kwargs or {}), img_size)
    blueprint: Blueprint = SOURCES[source].blueprint(request)
    trained = pretrained if pretrained is not None else checkpoint is None
    model = _make(blueprint, request, trained, seed)
    preprocess, notes = blueprint.preprocess(model)
    preprocess = for_channels(preprocess, input_channels(model))

    def fresh(seed: int) -> nn.Module:
        twin = _make(blueprint, request, False, seed)
        if blueprint.fixed:
            other = _make(blueprint, request, False, seed + 1)
            if all(torch.equal(a, b) for a, b in zip(twin.parameters(), other.parameters(), strict=True)):
                raise ModelError(f"{request.address!r} makes the same weights whatever the seed: no untrained copy")
        return twin

    plain = Subject(
        address=request.address,
        source=source,
        name=blueprint.name,
        weights=blueprint.fixed or (blueprint.trained if trained else None) or f"random (seed {seed})",
        model=model,
        preprocess=preprocess,
        fresh=fresh if blueprint.remakable else None,
        notes=notes,
        img_size=img_size,
        blocks_pattern=blocks_pattern,
        training_data=blueprint.training_data if trained and checkpoint is None else None,
        request=asked if isinstance(address, str) else None,
    )
    check_blocks(fixes, blocks)
    if checkpoint is None:
        return replace(with_fixes(plain, fixes, blocks, seed), request=plain.request)
    inner = library_module(model)
    weights = read_weights(inner, checkpoint, checkpoint_key)
    known, others = _fixes_of(weights, model, fixes, blocks)
    try:
        subject = _put_in(plain, known, seed)
    except ModelError as error:
        names = ", ".join(fix.name for fix in known)
        raise CheckpointError(
            f"{weights.path} holds parameters of {names}, for which this model has no place: {error}"
        ) from error
    keys = set(inner.state_dict())
    subject = replace(with_fixes(subject, others, blocks if others else None, seed), request=plain.request)
    report = load_weights(inner, weights, partial=partial, optional=set(inner.state_dict()) - keys)
    place = "" if inner is model else "wrapped."
    return replace(
        subject,
        weights="checkpoint" if report.complete else f"checkpoint in part, over {subject.weights}",
        checkpoint=str(checkpoint),
        checkpoint_sha256=report.sha256,
        loading=replace(report, not_loaded=tuple(place + name for name in report.not_loaded)),
        notes=subject.notes + report.notes,
    )


def remade(subject: Subject, **model_kwargs: Any) -> nn.Module:
    """The architecture of a subject that was made from an address, with other arguments of its constructor, fresh parameters
    and none of its fixes. Raises ModelError where it cannot be.
    """
    asked = subject.request
    assert asked is not None
    source, request = _locate(asked["address"], {**asked["model_kwargs"], **model_kwargs}, asked["img_size"])
    model: nn.Module = _make(SOURCES[source].blueprint(request), request, False, asked["seed"])
    return model


def _fixes_of(
    weights: Checkpoint, model: nn.Module, fixes: Sequence[str], blocks: Sequence[int] | None
) -> tuple[list[PlannedFix], list[str]]:
    """The fixes whose parameters a checkpoint holds, with what `fixes` say of them; and the others of `fixes`.

    Raises CheckpointError where `fixes` ask for other settings or blocks of one than the file has.
    """
    known = fixes_by_keys(model, {name: tensor.shape for name, tensor in weights.unknown_to(model).items()})
    names, planned = {fix.name for fix in known}, []
    asked = {name: settings for name, settings in map(read_fix, fixes) if name in names}
    for fix in known:
        own = asked.get(fix.name, {})
        wrong = [f"{key}={value}" for key, value in own.items() if fix.settings.get(key, value) != value]
        if fix.name in asked and blocks is not None and fix.blocks is not None and {*blocks} != {*fix.blocks}:
            wrong.append(f"blocks {list(blocks)}")
        if wrong:
            where = "the model" if fix.blocks is None else f"blocks {list(fix.blocks)}"
            held = f"{fix.name} in {where} ({_listed(fix.settings)})"
            raise CheckpointError(f"{weights.path} holds {held}, but {', '.join(wrong)} was asked for; leave that out")
        assumed = tuple(name for name in fix.assumed if name not in own)
        planned.append(replace(fix, settings={**fix.settings, **own}, assumed=assumed))
    return planned, [fix for fix in fixes if read_fix(fix)[0] not in names]


def fetching_weights(request: Request, hub: bool) -> AbstractContextManager[None]:
    """Turn a failed download of weights into one line, see `downloads.fetching`."""
    way_out = "use --no-pretrained for fresh parameters, or --checkpoint FILE for your own"
    return fetching(f"weights of {request.address!r}", ModelError, way_out, hub=hub)


def _locate(address: str | nn.Module, kwargs: dict[str, Any], img_size: Size | None) -> tuple[str, Request]:
    if isinstance(address, nn.Module):
        name = type(address).__name__
        return "module", Request(f"module:{name}", name, kwargs, img_size, module=address)
    scheme, colon, name = address.partition(":")
    if not colon:
        name = address
        scheme = next((place for place in BARE if SOURCES[place].has(name)), "")
    if not scheme or not SOURCES[scheme].has(name):
        raise UnknownNameError(_unknown(name, scheme or None))
    return scheme, Request(address, name, kwargs, img_size)


def _unknown(name: str, scheme: str | None) -> str:
    """One line with the nearest names: of the scheme that was asked for, or of all places for a bare name."""
    text = f"no model called {name!r}" + (f" in {scheme!r}" if scheme else "")
    if scheme is None and "/" in name:
        return f"{text}; an address there has a scheme, such as 'hf:{name}' or 'timm:NAME' or 'local-dir:PATH'"
    places = {known: f"{place}:{known}" for place in reversed(BARE) for known in SOURCES[place].names()}
    if scheme is not None:
        if name in places:
            return f"{text}; did you mean '{places[name]}'?"
        places = {known: f"{scheme}:{known}" for known in SOURCES[scheme].names()}
    near = difflib.get_close_matches(name, list(places), n=3, cutoff=0.5)
    if not near:
        return f"{text}; 'collapse-probe ls models' lists the names"
    return f"{text}; did you mean {' or '.join(repr(places[known] if scheme else known) for known in near)}?"


def _make(blueprint: Blueprint, request: Request, trained: bool, seed: int) -> nn.Module:
    """A model in eval mode; ModelError where it cannot be made, or has no modules to look into."""
    if trained and blueprint.trained is None and blueprint.fixed is None:
        ways = "use --no-pretrained for fresh parameters or --checkpoint FILE for your own"
        raise ModelError(f"there are no trained weights of {request.address!r}; {ways}")
    try:
        with torch_seeded(seed):
            model = blueprint.make(trained)
        program = "a TorchScript program" if isinstance(model, torch.jit.ScriptModule) else ""
        try:
            model.eval()
        except (AttributeError, NotImplementedError):
            program = program or "an exported program"
        if program:
            raise ModelError(
                f"{request.address!r} is {program}, without the modules of the model that it was made from: give that"
            )
        return model
    except CollapseProbeError:
        raise
    except Exception as error:  # a constructor may raise anything
        settings = [f"{key}={value!r}" for key, value in request.model_kwargs.items()]
        settings += [] if request.img_size is None else [f"img_size={request.img_size}"]
        using = f" with {', '.join(settings)}" if settings else ""
        raise ModelError(f"cannot make {request.address!r}{using}: {first_line(error)}") from error


def with_fixes(subject: Subject, fixes: Sequence[str], blocks: Sequence[int] | None = None, seed: int = 0) -> Subject:
    """The subject with `fixes` put into its model in place, into `blocks` (None: all that each can act on).

    A fix is `NAME`, at its neutral setting where it has one (the model then still computes what it computed), or
    `NAME:K=V,K=V` with settings of one's own beside the fix's defaults. Whatever a fix draws is drawn under `seed`. Raises
    UnknownNameError, SettingError, ModelError.
    """
    check_blocks(fixes, blocks)
    at = None if blocks is None else tuple(blocks)
    planned = []
    for fix in fixes:
        name, settings = read_fix(fix)
        planned.append(PlannedFix(name, settings if ":" in fix else dict(FIXES[name].neutral or {}), at))
    return replace(_put_in(subject, planned, seed), request=None) if planned else subject


def _put_in(subject: Subject, fixes: Sequence[PlannedFix], seed: int) -> Subject:
    """The subject with fixes put into its model in place, which address, name and notes say."""
    if not fixes:
        return subject

    def put_in(model: Any, seed: int) -> Any:
        with torch_seeded(seed):
            for fix in fixes:
                apply(model, fix.name, fix.blocks, **fix.settings)
        return model.eval()

    model, before = put_in(subject.model, seed), subject.fresh
    parts, notes = [], []
    for fix, applied in zip(fixes, model.fixes[-len(fixes) :], strict=True):
        if fix.checkpoint:
            how = _listed({**fix.settings, **{name: applied.settings[name] for name in fix.assumed}})
            notes += [
                f"no key of the checkpoint shows the {name} of {fix.name}: {applied.settings[name]} is assumed; "
                f"--fix {fix.name}:{name}=… sets it"
                for name in fix.assumed
            ]
        else:
            how = "neutral" if fix.settings == FIXES[fix.name].neutral else _listed(applied.settings)
        everywhere = tuple(applied.blocks) == tuple(range(len(model.blocks)))
        where = "all blocks" if everywhere else f"blocks {', '.join(map(str, applied.blocks))}"
        parts.append(f"{fix.name} in {where} ({how})")
    text = " + ".join(parts)
    said = "fixes of the checkpoint, known by its keys" if fixes[0].checkpoint else "fixes put into the model"
    return replace(
        subject,
        address=f"{subject.address} + {text}",
        name="+".join([subject.name, *(fix.name for fix in fixes)]),
        model=model,
        fresh=None if before is None else lambda seed: put_in(before(seed), seed),
        notes=(*subject.notes, f"{said}: {text}", *notes),
    )


def _listed(settings: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={value}" for name, value in settings.items()) or "no settings"


def check_blocks(fixes: Sequence[str], blocks: Sequence[int] | None) -> None:
    """Raise SettingError for blocks without a fix that could go there."""
    if blocks is not None and not fixes:
        raise SettingError(f"blocks {list(blocks)} were named for a fix, but no fix; name one (--fix)")
