"""What is compared: the model or the findings behind each word or object, in order, under a short label of its own."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from torch import nn

from collapse_probe.data.preprocessing import Size
from collapse_probe.errors import CheckpointError, CollapseProbeError, OutputError, SettingError
from collapse_probe.models.checkpoint_files import SUFFIXES, read_checkpoint, weight_files
from collapse_probe.models.checkpoint_keys import without_model
from collapse_probe.models.loading import Subject, check_blocks, resolve, with_fixes
from collapse_probe.models.model_file import is_model_file
from collapse_probe.results.findings import Findings

Candidate = str | Path | nn.Module | Subject | Findings
MOST_LABEL = 40


@dataclass(frozen=True)
class ModelOptions:
    """How models are made of addresses and checkpoints, see `resolve`.

    `model` is the architecture of all checkpoints; `fixes` go into every model after the first subject.
    """

    model: str | None = None
    checkpoint_key: str | None = None
    partial: bool = False
    pretrained: bool | None = None
    model_kwargs: Mapping[str, Any] = field(default_factory=dict)
    img_size: Size | None = None
    blocks_pattern: str | None = None
    fixes: tuple[str, ...] = ()
    fix_blocks: tuple[int, ...] | None = None
    seed: int = 0


@dataclass(frozen=True)
class SubjectSpec:
    """One subject that is not opened yet: `candidate` is an object, an address, or the path of findings or of a checkpoint.

    `fixed` where the fixes of the options go into it.
    """

    label: str
    candidate: Candidate
    kind: Literal["findings", "checkpoint", "model"]
    fixed: bool = False
    options: ModelOptions = field(default_factory=ModelOptions)

    @property
    def is_model(self) -> bool:
        """Whether it is a model, to be measured."""
        return self.kind != "findings"

    def open(self) -> Subject | Findings:
        """Its findings, or the model that is to be measured."""
        options, candidate = self.options, self.candidate
        fixes, blocks = (options.fixes, options.fix_blocks) if self.fixed else ((), None)
        if isinstance(candidate, Findings):
            return candidate
        if isinstance(candidate, Subject):
            return with_fixes(candidate, fixes, blocks, options.seed)
        if self.kind == "findings":
            return Findings.load(Path(str(candidate)))
        address: str | nn.Module = candidate if isinstance(candidate, nn.Module) else str(candidate)
        kwargs, checkpoint, pretrained = dict(options.model_kwargs), None, options.pretrained
        if self.kind == "checkpoint":
            checkpoint, pretrained = Path(str(candidate)), False
            if options.model is not None:
                address = options.model
            elif is_model_file(checkpoint):
                address, checkpoint, pretrained = f"ours:{checkpoint}", None, True
            else:
                address, own = deepvit_of(checkpoint)
                kwargs = {**own, **kwargs}
        return resolve(
            address,
            fixes,
            blocks,
            seed=options.seed,
            checkpoint=checkpoint,
            checkpoint_key=options.checkpoint_key,
            pretrained=pretrained,
            partial=options.partial,
            model_kwargs=kwargs,
            img_size=options.img_size,
            blocks_pattern=options.blocks_pattern,
        )


def open_subjects(
    subjects: Mapping[str, Candidate] | Sequence[Candidate], options: ModelOptions
) -> tuple[list[SubjectSpec], bool]:
    """The subjects behind names, paths and objects, and whether they are a trajectory: the checkpoints or findings of one
    folder. Nothing is loaded yet.

    A string is a path where one is there, else a model address. A folder with findings.json is findings, a folder of
    checkpoint files all of them in natural order (epoch 2 before epoch 10), one of findings folders (as a Monitor writes)
    likewise, a file a checkpoint. One model alone with fixes is compared with itself without them. Raises SettingError for
    fewer than two subjects, CheckpointError and OutputError for paths that hold neither.
    """
    check_blocks(options.fixes, options.fix_blocks)
    named = list(subjects.items()) if isinstance(subjects, Mapping) else [(None, subject) for subject in subjects]
    alone = len(named) == 1
    try:
        trajectory = alone and _is_folder(named[0][1])
        if alone and options.fixes and not trajectory:
            named *= 2
        specs = [spec for label, candidate in named for spec in _expand(label, candidate)]
    except OSError as error:
        raise OutputError(f"the subject {error.filename!s:.200} cannot be opened ({error.strerror}); name another") from error
    if len(specs) < 2:
        raise SettingError(
            f"compare takes two or more subjects, came {len(specs)}: models, checkpoints, findings folders, "
            "or one folder of two or more checkpoints or findings folders"
        )
    specs = [replace(spec, fixed=at > 0 and spec.is_model, options=options) for at, spec in enumerate(specs)]
    own_labels = isinstance(subjects, Mapping) and not alone
    suffix = "" if own_labels else "".join(f"+{fix.partition(':')[0]}" for fix in options.fixes)
    labels = unique([spec.label + suffix * spec.fixed for spec in specs])
    return [replace(spec, label=label) for spec, label in zip(specs, labels, strict=True)], trajectory


def _is_folder(subject: Candidate) -> bool:
    return isinstance(subject, (str, Path)) and Path(subject).is_dir() and not (Path(subject) / "findings.json").exists()


def _expand(label: str | None, candidate: Candidate) -> list[SubjectSpec]:
    """The specs behind one word or object: one, or one for each checkpoint or findings folder in a folder."""
    if isinstance(candidate, Findings):
        return [SubjectSpec(label or str(candidate.model.get("name")), candidate, "findings")]
    if isinstance(candidate, (Subject, nn.Module)):
        name = candidate.name if isinstance(candidate, Subject) else type(candidate).__name__
        return [SubjectSpec(label or name, candidate, "model")]
    path = Path(candidate).expanduser()
    if (path / "findings.json").exists():
        return [SubjectSpec(label or path.resolve().name, path, "findings")]
    if path.is_dir():
        inside = sorted(path.iterdir(), key=lambda each: natural(each.name))
        files = sorted(weight_files(path), key=lambda file: natural(str(file.relative_to(path))))
        folders = [f for f in inside if not f.name.startswith(".") and (f / "findings.json").is_file()]
        if len(files) == 1 and not folders:
            return [SubjectSpec(label or path.resolve().name, files[0], "checkpoint")]
        if files and (files[0].parent == path or not folders):
            names = [stem(file) if file.parent == path else file.parent.name for file in files]
            own = zip(names, files, strict=True)
            return [SubjectSpec(f"{label}/{name}" if label else name, file, "checkpoint") for name, file in own]
        if not folders:
            kinds = ", ".join(SUFFIXES)
            raise CheckpointError(f"the folder {path} holds neither findings.json nor a checkpoint ({kinds})")
        return [SubjectSpec(f"{label}/{folder.name}" if label else folder.name, folder, "findings") for folder in folders]
    if path.is_file() or path.suffix.lower() in SUFFIXES:
        if not path.is_file():
            raise CheckpointError(f"there is no checkpoint {path}; give an existing file or folder")
        return [SubjectSpec(label or stem(path), path, "checkpoint")]
    address = str(candidate)
    short = address.rpartition(":")[2].rstrip("/").rpartition("/")[2] or address
    return [SubjectSpec(label or short, address, "model")]


def deepvit_of(path: Path) -> tuple[str, dict[str, Any]]:
    """Address and constructor arguments of the official DeepViT whose weights a file holds;
    CheckpointError for others.
    """
    from collapse_probe.models.deepvit import FAMILY, settings_from

    try:
        own = settings_from(without_model(read_checkpoint(path), path))
    except CollapseProbeError as error:
        hint = "name the architecture with --model"
        raise CheckpointError(f"{path} does not say which model it belongs to ({error}); {hint}") from error
    for name, settings in FAMILY.items():
        if settings == replace(own, classes=settings.classes):
            return f"ours:{name}", {} if own.classes == settings.classes else {"num_classes": own.classes}
    raise CheckpointError(f"{path} holds a DeepViT of no official size ({own}); name the architecture with --model")


def natural(name: str) -> list[tuple[int, int, str]]:
    """A sort key in which numbers count as numbers.

    >>> sorted(["epoch-10.pth", "epoch-2.pth"], key=natural)
    ['epoch-2.pth', 'epoch-10.pth']
    """
    parts = re.findall(r"\d+|\D+", name)
    return [(0, int(part), "") if part.isdecimal() else (1, 0, part.casefold()) for part in parts]


def stem(path: Path) -> str:
    """A file's name without its checkpoint suffixes: `a.pth.tar` is `a`."""
    name = path.name
    while Path(name).suffix.lower() in SUFFIXES and Path(name).stem:
        name = Path(name).stem
    return name


def unique(labels: Sequence[str]) -> list[str]:
    """The labels, those that come again with a number behind: each is another.

    >>> unique(["vit", "vit", "deit"])
    ['vit', 'vit (2)', 'deit']
    """
    labelled: list[str] = []
    for label in labels:
        short = label if len(label) <= MOST_LABEL else f"{label[: MOST_LABEL // 2 - 1]}…{label[-MOST_LABEL // 2 :]}"
        number, each = 1, short
        while each in labelled:
            number += 1
            each = f"{short} ({number})"
        labelled.append(each)
    return labelled
