"""Who is compared: what each word or object stands for, in order, under a short label of its own."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import nn

from collapse_probe.errors import CheckpointError, CollapseProbeError, SettingError
from collapse_probe.models import checkpoints
from collapse_probe.models.loading import Subject, check_blocks, resolved, with_fixes
from collapse_probe.models.model_file import is_model_file
from collapse_probe.results.findings import Findings

Candidate = str | Path | nn.Module | Subject | Findings
MOST_LABEL = 40


@dataclass(frozen=True)
class ModelOptions:
    """How models are made of addresses and checkpoints: what `remedied.resolved` takes.

    `model` is the architecture of all checkpoints; `fixes` go into every model after the first subject.
    """

    model: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    fixes: tuple[str, ...] = ()
    fix_blocks: tuple[int, ...] | None = None
    seed: int = 0


@dataclass(frozen=True)
class SubjectSpec:
    """One subject, made of what was `given`; `make(fixed)` makes it, with the recipe's fixes where `fixed`."""

    label: str
    given: Candidate
    is_model: bool
    make: Callable[[bool], Subject | Findings]
    fixed: bool = False

    def open(self) -> Subject | Findings:
        """Its findings, or the model that is to be measured."""
        return self.make(self.fixed)


@dataclass(frozen=True)
class Subjects:
    """The subjects in order; `trajectory` where they are the checkpoints or the findings of one folder."""

    entries: tuple[SubjectSpec, ...]
    trajectory: bool


def open_subjects(subjects: Mapping[str, Candidate] | Sequence[Candidate], recipe: ModelOptions) -> Subjects:
    """The subjects behind names, paths and objects; nothing is loaded yet.

    A string is a path where one is there, else a model address. A folder with findings.json is findings, a
    folder of checkpoint files all of them in natural order (epoch 2 before epoch 10), one of findings folders
    (as a Monitor writes) likewise, a file a checkpoint.
    One model alone with fixes is compared with itself without them. Raises SettingError for fewer than two
    subjects, CheckpointError and OutputError for paths that hold neither.
    """
    check_blocks(recipe.fixes, recipe.fix_blocks)
    named = subjects.items() if isinstance(subjects, Mapping) else [(None, subject) for subject in subjects]
    given = list(named)
    alone = len(given) == 1
    if alone and recipe.fixes and not _is_folder(given[0][1]):
        given = given * 2
    found = [entry for label, subject in given for entry in _expand(label, subject, recipe)]
    if len(found) < 2:
        raise SettingError(
            f"compare takes two or more subjects, came {len(found)}: models, checkpoints, findings folders, "
            "or one folder of two or more checkpoints or findings folders"
        )
    fixed = [replace(entry, fixed=at > 0 and entry.is_model) for at, entry in enumerate(found)]
    told = alone or not isinstance(subjects, Mapping)
    suffix = "".join(f"+{fix.partition(':')[0]}" for fix in recipe.fixes) if told else ""
    labels = unique([entry.label + suffix * entry.fixed for entry in fixed])
    entries = tuple(replace(entry, label=label) for entry, label in zip(fixed, labels, strict=True))
    return Subjects(entries, trajectory=alone and _is_folder(given[0][1]))


def _is_folder(subject: Candidate) -> bool:
    return isinstance(subject, (str, Path)) and Path(subject).is_dir() and not (Path(subject) / "findings.json").exists()


def _expand(label: str | None, given: Candidate, recipe: ModelOptions) -> list[SubjectSpec]:
    """The entries behind one word or object: one, or one for each checkpoint of a folder."""
    if isinstance(given, Findings):
        return [SubjectSpec(label or str(given.model.get("name")), given, False, lambda fixed: given)]
    if isinstance(given, Subject):
        return [SubjectSpec(label or given.name, given, True, lambda fixed: _remedied(given, recipe, fixed))]
    if isinstance(given, nn.Module):
        return [SubjectSpec(label or type(given).__name__, given, True, lambda fixed: _of_address(given, recipe, fixed))]
    path = Path(given).expanduser()
    if (path / "findings.json").exists():
        return [SubjectSpec(label or path.resolve().name, given, False, lambda fixed: Findings.load(path))]
    if path.is_dir():
        if found := findings_in(path):
            named = [f"{label}/{folder.name}" if label else folder.name for folder in found]
            return [SubjectSpec(n, given, False, _stored(folder)) for n, folder in zip(named, found, strict=True)]
        files = checkpoints_in(path)
        names = [f"{label}/{stem(file)}" if label else stem(file) for file in files]
        return [SubjectSpec(name, given, True, _checkpoint(file, recipe)) for name, file in zip(names, files, strict=True)]
    if path.is_file() or path.suffix.lower() in checkpoints.SUFFIXES:
        if not path.is_file():
            raise CheckpointError(f"there is no checkpoint {path}; give an existing file or folder")
        return [SubjectSpec(label or stem(path), given, True, _checkpoint(path, recipe))]
    address = str(given)
    return [SubjectSpec(label or _short(address), given, True, lambda fixed: _of_address(address, recipe, fixed))]


def _checkpoint(path: Path, recipe: ModelOptions) -> Callable[[bool], Subject | Findings]:
    return lambda fixed: _of_checkpoint(path, recipe, fixed)


def _stored(folder: Path) -> Callable[[bool], Subject | Findings]:
    return lambda fixed: Findings.load(folder)


def _of_address(address: str | nn.Module, recipe: ModelOptions, fixed: bool) -> Subject:
    return _resolved(address, recipe, fixed, dict(recipe.options))


def _of_checkpoint(path: Path, recipe: ModelOptions, fixed: bool) -> Subject:
    """The model that a checkpoint's weights belong to: the one named, or the DeepViT that its keys tell."""
    options = dict(recipe.options)
    address = recipe.model
    if address is None and is_model_file(path):
        return _resolved(f"ours:{path}", recipe, fixed, {**options, "pretrained": True})
    if address is None:
        address, kwargs = deepvit_of(path)
        options["model_kwargs"] = {**kwargs, **dict(options.get("model_kwargs") or {})}
    return _resolved(address, recipe, fixed, {**options, "checkpoint": path, "pretrained": False})


def _resolved(address: str | nn.Module, recipe: ModelOptions, fixed: bool, options: dict[str, Any]) -> Subject:
    fixes, blocks = (recipe.fixes, recipe.fix_blocks) if fixed else ((), None)
    return resolved(address, fixes, blocks, seed=recipe.seed, **options)


def _remedied(subject: Subject, recipe: ModelOptions, fixed: bool) -> Subject:
    return with_fixes(subject, recipe.fixes, recipe.fix_blocks, recipe.seed) if fixed else subject


def deepvit_of(path: Path) -> tuple[str, dict[str, Any]]:
    """Address and constructor arguments of the official DeepViT whose weights a file holds;
    CheckpointError for others.
    """
    from collapse_probe.models.deepvit import FAMILY, settings_from

    try:
        _, state = checkpoints.choose_weights(checkpoints.read_file(path), None, path)
        found = settings_from(state)
    except CollapseProbeError as error:
        hint = "name the architecture with --model"
        raise CheckpointError(f"{path} does not say which model it belongs to ({error}); {hint}") from error
    for name, settings in FAMILY.items():
        if settings == replace(found, classes=settings.classes):
            return f"ours:{name}", {} if found.classes == settings.classes else {"num_classes": found.classes}
    raise CheckpointError(f"{path} holds a DeepViT of no official size ({found}); name the architecture with --model")


def checkpoints_in(folder: Path) -> list[Path]:
    """The checkpoint files of a folder in natural order; CheckpointError where there is none."""
    files = [f for f in folder.iterdir() if f.is_file() and f.suffix.lower() in checkpoints.SUFFIXES]
    if not files:
        kinds = ", ".join(checkpoints.SUFFIXES)
        raise CheckpointError(f"the folder {folder} holds neither findings.json nor a checkpoint ({kinds})")
    return sorted(files, key=lambda file: natural(file.name))


def findings_in(folder: Path) -> list[Path]:
    """The findings folders in a folder, in natural order; none where it holds checkpoint files of its own."""
    inside = list(folder.iterdir())
    if any(f.is_file() and f.suffix.lower() in checkpoints.SUFFIXES for f in inside):
        return []
    finished = [f for f in inside if not f.name.startswith(".") and (f / "findings.json").is_file()]
    return sorted(finished, key=lambda folder: natural(folder.name))


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
    while Path(name).suffix.lower() in checkpoints.SUFFIXES and Path(name).stem:
        name = Path(name).stem
    return name


def _short(address: str) -> str:
    return address.rpartition(":")[2].rstrip("/").rpartition("/")[2] or address


def unique(labels: Sequence[str]) -> list[str]:
    """The labels, those that come again with a number behind: each is another.

    >>> unique(["vit", "vit", "deit"])
    ['vit', 'vit (2)', 'deit']
    """
    found: list[str] = []
    for label in labels:
        short = label if len(label) <= MOST_LABEL else f"{label[: MOST_LABEL // 2 - 1]}…{label[-MOST_LABEL // 2 :]}"
        number, each = 1, short
        while each in found:
            number += 1
            each = f"{short} ({number})"
        found.append(each)
    return found
